"""Published models by name: the figures are the published ones, files are found, and only the right ones are read."""

import dataclasses
import hashlib
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tinyclip.cli import app
from tinyclip.evaluate.cost import cost
from tinyclip.formats import checkpoint, zoo
from tinyclip.formats.open_clip import config_from_open_clip, to_open_clip
from tinyclip.model import CLIP, initialise

NAME, UNKNOWN = "tinyclip:ViT-8M-16-Text-3M-YFCC15M", "tinyclip:auto-ViT-63M-32-Text-31M-LAION400M"
TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "layers": 1, "width": 64, "heads": 1},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """All architectures of this page are tiny, the cache is empty, and nobody is at the other end of the line."""
    for architecture in ("ViT-8M-16-Text-3M", "ViT-B-32"):
        monkeypatch.setitem(zoo.ARCHITECTURES, architecture, TINY)
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "URL", "http://127.0.0.1:9/")


@pytest.fixture
def released(tmp_path):
    """A file in the released form of the tiny architecture, and its SHA-256."""
    model = initialise(CLIP(config_from_open_clip(TINY)), torch.Generator().manual_seed(0))
    state = to_open_clip(model)
    encoder = {True: "_image_encoder.module.", False: "_text_encoder.module."}
    wrapped = {encoder[name.startswith("visual.")] + name: tensor for name, tensor in state.items()}
    wrapped["_logit_scale.module.logit_scale"] = wrapped.pop("_text_encoder.module.logit_scale")
    path = tmp_path / "served" / "file.pt"
    path.parent.mkdir()
    torch.save({"state_dict": wrapped}, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def served(released, monkeypatch):
    """The file under the name of every release, from a server of our own; the list of what was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.path = "/file.pt"
            super().do_GET()

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=released[0].parent)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(zoo, "URL", f"http://127.0.0.1:{server.server_port}/")
        yield asked
        server.shutdown()
        thread.join()


def assert_refused(message: str, name: str, call=checkpoint.load) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call(name)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), str(error.value)


@pytest.fixture(scope="module")
def figures(shared):
    return json.loads((shared / "golden" / "zoo.json").read_text())["models"]


def test_the_figures_are_the_published_ones_to_the_unit(figures, monkeypatch):
    monkeypatch.undo()  # the real architectures
    assert len(figures) == 9
    for name, model in figures.items():
        ours = cost(zoo.config(f"tinyclip:{name}"))
        assert dataclasses.asdict(ours) == {
            "image_parameters": model["image_params"],
            "text_parameters": model["text_params_excl_token_embedding"],
            "token_embedding_parameters": model["token_embedding_params"],
            "parameters": model["total_params"],
            "image_macs": model["macs_image"],
            "text_macs": model["macs_text"],
        }
        assert zoo.config(f"tinyclip:{name}") == config_from_open_clip(model["config"])


def test_the_table_is_the_published_one(figures, monkeypatch):
    monkeypatch.undo()
    assert zoo.ARCHITECTURES.keys() == {name.removeprefix("TinyCLIP-") for name in figures}
    for name, model in figures.items():
        ours = zoo.ARCHITECTURES[name.removeprefix("TinyCLIP-")]
        assert json.loads(json.dumps(ours["vision_cfg"])) == model["config"]["vision_cfg"]
        assert ours["text_cfg"].items() <= model["config"]["text_cfg"].items()
        assert ours["embed_dim"] == model["config"]["embed_dim"]
    assert len(zoo.CHECKPOINTS) == 11 and {architecture for architecture, _ in zoo.CHECKPOINTS} == {
        *zoo.PRUNED,
        *(zoo.ARCHITECTURES.keys() - {"ViT-B-32", "ViT-B-16", "RN50"}),
    }


def test_inspect_knows_names(monkeypatch):
    monkeypatch.undo()
    result = CliRunner().invoke(app, ["inspect", "tinyclip:ViT-39M-16-Text-19M", "--json"])
    facts = json.loads(result.output)
    assert (facts["parameters"], facts["image_macs"], facts["image_width"]) == (83101185, 7990718464, 512)


def test_names_that_have_no_model_are_one_line():
    assert_refused("no published model has this name; close: ViT-8M-16-Text-3M", "tinyclip:ViT-8M-16-Text-4M")
    assert_refused("expected tinyclip:ViT-8M-16-Text-3M-YFCC15M, or .*/FILE", "tinyclip:ViT-8M-16-Text-3M")
    assert_refused(
        "expected tinyclip:auto-ViT-45M-32-Text-18M-LAION400M or tinyclip:auto-ViT-45M-32-Text-18M-LAIONYFCC400M",
        "tinyclip:auto-ViT-45M-32-Text-18M",
        zoo.config,
    )
    assert_refused("expected .sha256= and 64 hexadecimal digits, got .sha256=12", f"{NAME}?sha256=12")
    with pytest.raises(ValueError, match="has its own config"):
        checkpoint.load(NAME, config=TINY)


def test_a_given_file_is_read(released, tmp_path):
    path, sha256 = released
    for name in (NAME, "tinyclip:TinyCLIP-ViT-8M-16-Text-3M", "tinyclip:ViT-B-32"):
        model = checkpoint.load(f"{name}/{path}")
        assert model.config == config_from_open_clip(TINY) and model.preprocess is not None
        assert model.tokenizer is None  # its vocabulary is not CLIP's
    checkpoint.load(f"{NAME}/{path}?sha256={sha256.upper()}")
    assert_refused("file.pt: expected SHA-256 0000.*, got [0-9a-f]{64}", f"{NAME}/{path}?sha256={'0' * 64}")
    assert_refused("expected the weights of ViT-8M-16-Text-3M, found no file", f"{NAME}/{tmp_path}/nothing.pt")


def test_a_pruned_file_is_sized_by_its_shapes_and_no_other(released, tmp_path):
    state = torch.load(released[0])["state_dict"]
    headless = {
        name: tensor
        for name, tensor in state.items()
        if "resblocks.0.attn" not in name and "resblocks.0.ln_1" not in name
    }
    save_file(headless, tmp_path / "pruned.safetensors")
    config = zoo.config(f"tinyclip:auto-ViT-22M-32-Text-10M/{tmp_path}/pruned.safetensors")
    assert [block.heads for block in config.image.blocks] == [0, 1]
    assert_refused("expected the sizes of ViT-8M-16-Text-3M, got those of a", f"{NAME}/{tmp_path}/pruned.safetensors")


def test_a_cached_file_is_read_without_network(released, tmp_path, monkeypatch):
    cached = tmp_path / "cache" / "TinyCLIP-ViT-8M-16-Text-3M-YFCC15M.pt"
    assert_refused(f"could not download http.*; if you have the file, put it into {cached.parent} or give", NAME)
    cached.write_bytes(released[0].read_bytes())
    assert_refused("YFCC15M.pt: expected SHA-256 3d9f86a5.*, got ", NAME)
    monkeypatch.setitem(zoo.CHECKPOINTS, ("ViT-8M-16-Text-3M", "YFCC15M"), released[1])
    assert checkpoint.load(NAME).config == config_from_open_clip(TINY)


def test_a_download_is_kept_where_its_checksum_is_known(released, served, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.CHECKPOINTS, ("ViT-8M-16-Text-3M", "YFCC15M"), released[1])
    for _ in range(2):
        checkpoint.load(NAME)
    assert served == ["/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M.pt"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["TinyCLIP-ViT-8M-16-Text-3M-YFCC15M.pt"]


def test_a_download_of_unknown_checksum_is_read_only_when_accepted(released, served, tmp_path):
    assert_refused(f"no checksum of it is published; .*accept it with {UNKNOWN}.sha256={released[1]}$", UNKNOWN)
    assert_refused("expected SHA-256 0000", f"{UNKNOWN}?sha256={'0' * 64}")
    checkpoint.load(f"{UNKNOWN}?sha256={released[1]}")
    checkpoint.load(UNKNOWN)
    assert served == ["/TinyCLIP-auto-ViT-63M-32-Text-31M-LAION400M.pt"]


def test_a_download_that_is_another_file_is_not_read(served):
    assert_refused("expected SHA-256 3d9f86a5", NAME)


def test_a_download_that_breaks_off_leaves_nothing(released, served, tmp_path, monkeypatch):
    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", lambda self, source, target: target.write(b"half"))
    assert_refused(r"could not download .*: it broke off \d+ bytes before the end", NAME)
    assert not any((tmp_path / "cache").iterdir())
