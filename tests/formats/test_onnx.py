"""The ONNX graphs give the model's unit embeddings: any batch, any caption length, odd layer sizes; int8 nearly so."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

import tinyclip
from tests.formats.test_export import CUT, IRREGULAR, UNIFORM, toy
from tinyclip.cli import app
from tinyclip.data.scenes import Scenes
from tinyclip.formats import onnx as onnx_module
from tinyclip.formats.onnx import Difference, difference, to_onnx
from tinyclip.model import CLIP, BlockConfig, unit

NO_BRANCHES = CUT.model_copy(
    update={"text": CUT.text.model_copy(update={"blocks": (BlockConfig(heads=0, ffn=0), BlockConfig(heads=1, ffn=3))})}
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model of blocks that differ, and the directory of its graphs."""
    model = toy(IRREGULAR)
    return model, to_onnx(model, tmp_path_factory.mktemp("exports") / "out", say=lambda line: None)


def run(directory, name, array):
    session = onnxruntime.InferenceSession(directory / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: array.numpy()})[0])


def opset(path) -> int:
    [version] = [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""]
    return version


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_gives_the_unit_embeddings_of_the_model(exported, batch):
    model, directory = exported
    pixels = torch.randn(batch, 3, 23, 23)
    tokens_BL = model.tokenizer(["a red star", "two blue hearts", "red", "", "a star"][:batch])
    torch.testing.assert_close(run(directory, "image", pixels), unit(model.image(pixels)), atol=1e-6, rtol=0)
    torch.testing.assert_close(run(directory, "text", tokens_BL), unit(model.text(tokens_BL)), atol=1e-6, rtol=0)


@torch.no_grad()
def test_padding_after_a_caption_may_be_left_out(exported):
    model, directory = exported
    tokens_BL = model.tokenizer(["a red star"])
    end = int(tokens_BL.argmax()) + 1
    assert end < tokens_BL.shape[1]
    short, whole = run(directory, "text", tokens_BL[:, :end]), run(directory, "text", tokens_BL)
    torch.testing.assert_close(short, whole, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_text_is_read_at_its_largest_id_wherever_that_stands(exported):
    model, directory = exported
    tokens_BL = torch.ones(11, 11, dtype=torch.int64).fill_diagonal_(model.config.text.vocab_size - 1)
    text_BE = run(directory, "text", tokens_BL)
    torch.testing.assert_close(text_BE, unit(model.text(tokens_BL)), atol=1e-6, rtol=0)
    assert torch.pdist(text_BE).min() > 1e-4  # eleven different places


@pytest.mark.parametrize("config", [CUT, NO_BRANCHES], ids=["a cut width", "branches that are gone"])
def test_odd_sizes_are_exact(config, tmp_path):
    to_onnx(toy(config), tmp_path / "out", say=lambda line: None)
    assert difference(toy(config), tmp_path / "out").largest < 1e-6


def test_bare_weights_are_compared_on_noise_and_ids_may_be_int32(tmp_path):
    model, said = CLIP(UNIFORM), []
    model.load_state_dict(toy(UNIFORM).state_dict())
    directory = to_onnx(model, tmp_path / "out", ids="int32", opset=20, say=said.append)
    assert {opset(path) for path in directory.glob("*.onnx")} == {20}
    assert json.loads((directory / "onnx.json").read_text())["opset"] == 20
    assert "largest difference" in said[0] and sorted(path.name for path in directory.iterdir()) == [
        "image.onnx",
        "onnx.json",
        "text.onnx",
    ]
    tokens_BL = torch.randint(UNIFORM.text.vocab_size, (3, 11), dtype=torch.int32)
    with torch.no_grad():
        expected_BE = unit(model.eval().text(tokens_BL))
    torch.testing.assert_close(run(directory, "text", tokens_BL), expected_BE, atol=1e-6, rtol=0)


def test_the_description_says_all_that_a_reader_needs(exported):
    model, directory = exported
    settings = json.loads((directory / "onnx.json").read_text())
    assert settings["image"]["input"]["shape"] == ["batch", 3, 23, 23] and settings["text"]["input"]["type"] == "int64"
    assert settings["scale"] == pytest.approx(model.scale.item())
    assert settings["preprocess"] == json.loads(model.preprocess.model_dump_json())
    assert (directory / "tokenizer.json").is_file()
    for name in ("image", "text"):
        graph = onnx.load(directory / f"{name}.onnx")
        onnx.checker.check_model(graph)
        assert [graph.graph.input[0].name, graph.graph.output[0].name] == [
            settings[name]["input"]["name"],
            settings[name]["output"]["name"],
        ]
        assert graph.opset_import[0].version == settings["opset"]


ALONE = """
import sys
sys.modules["torch"] = sys.modules["tinyclip"] = None  # importing them is an error
import json, numpy, onnxruntime
from PIL import Image
from tokenizers import Tokenizer
directory, picture, caption, out = sys.argv[1:]
settings = json.load(open(f"{directory}/onnx.json"))
read = settings["preprocess"]
image = Image.open(picture).convert("RGB").resize((read["size"], read["size"]), Image.Resampling.BICUBIC)
pixels = (numpy.asarray(image, dtype="float32") / 255 - read["mean"]) / read["std"]
ids = Tokenizer.from_file(f"{directory}/tokenizer.json").encode(caption).ids
embed = lambda name, x: onnxruntime.InferenceSession(f"{directory}/{name}.onnx").run(None, x)[0]
image = embed("image", {"pixels": pixels.transpose(2, 0, 1)[None].astype("float32")})
text = embed("text", {"ids": numpy.array([ids], dtype="int64")})
numpy.save(out, settings["scale"] * image @ text.T)
"""


@torch.no_grad()
def test_a_picture_and_a_caption_are_scored_without_torch_and_without_tinyclip(exported, tmp_path):
    model, directory = exported
    scene = Scenes("heldout", 1, size=46).image(0)
    scene.save(tmp_path / "scene.png")
    command = [sys.executable, "-c", ALONE, directory, tmp_path / "scene.png", "a red star", tmp_path / "logit.npy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image_BE, text_BE = (
        model.encode_image([scene], normalize=True),
        model.encode_text(["a red star"], normalize=True),
    )
    expected = model.scale * image_BE @ text_BE.T
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logit.npy")), expected, atol=1e-4, rtol=0)


def test_int8_stores_8_bits_and_says_how_far_it_is(tmp_path):
    said, model = [], toy(IRREGULAR)
    directory = to_onnx(model, tmp_path / "out", quantize="int8", say=said.append)
    settings = json.loads((directory / "onnx.json").read_text())
    assert settings["quantize"] == "int8" and {opset(path) for path in directory.glob("*.onnx")} == {settings["opset"]}
    assert len(list(directory.iterdir())) == 4  # the fp32 graphs are gone
    for name in ("image", "text"):
        graph = onnx.load(directory / f"{name}.onnx").graph
        assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in graph.initializer)
        assert any(node.op_type == "MatMulInteger" for node in graph.node)
    found = difference(model, directory)
    assert found.largest > 1e-4 and 0.9 < found.smallest_cosine < 1 and f"{found.smallest_cosine:.6f}" in said[0]


def test_weights_past_the_limit_of_a_protobuf_stand_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_module, "MAX_INSIDE", 20_500)  # bytes, between the two towers
    directory = to_onnx(toy(UNIFORM), tmp_path / "out", say=lambda line: None)
    assert sorted(path.name for path in directory.glob("*.data")) == ["text.onnx.data"]
    directory = to_onnx(toy(UNIFORM), tmp_path / "int8", quantize="int8", say=lambda line: None)
    assert difference(toy(UNIFORM), directory).smallest_cosine > 0.9


def test_graphs_that_differ_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_module, "difference", lambda model, directory: Difference(2e-4, 1.0))
    with pytest.raises(
        ValueError, match="not written: expected unit embeddings that differ by at most 1e-04, got 2.0e-04"
    ):
        to_onnx(toy(UNIFORM), tmp_path / "out", say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_the_exporter_does_not_write_is_refused(exported, tmp_path, monkeypatch):
    model, directory = exported
    for wanted in (17, 7, "18", 18.0):  # before any work
        with pytest.raises(ValueError, match=f"opset: expected 18 or more, .*, got {wanted!r}$"):
            to_onnx(model, tmp_path / "out", opset=wanted)
    assert not list(tmp_path.iterdir())

    def as_torch_does(tower, path, *_):  # it logs that it could not convert, and writes what it has
        shutil.copy(directory / path.name, path)

    monkeypatch.setattr(onnx_module, "_trace", as_torch_does)
    with pytest.raises(ValueError, match="^opset: the installed torch cannot write 99; image.onnx got 18; expected"):
        to_onnx(model, tmp_path / "out", opset=99)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="expected a new or empty directory"):
        to_onnx(toy(UNIFORM), tmp_path)
    with pytest.raises(ValueError, match="quantize: expected int8 or nothing, got 'int4'"):
        to_onnx(toy(UNIFORM), tmp_path / "out", quantize="int4")
    monkeypatch.setattr(onnx_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need onnx, onnxruntime, onnxscript: pip install 'tinyclip\[onnx\]'"):
        to_onnx(toy(UNIFORM), tmp_path / "out")


@pytest.mark.parametrize("to", ["onnx", "onnx-int8"])
def test_the_command_exports_and_verifies(to, tmp_path):
    tinyclip.save(toy(IRREGULAR), tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--to", to, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.stdout == f"{tmp_path / 'out'}\n" and f"read back with {to}: features differ" in done.stderr
    assert (tmp_path / "out" / "image.onnx").is_file()
