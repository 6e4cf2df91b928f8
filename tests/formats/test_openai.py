"""OpenAI's archives say what they are and are read, not run: equal to the model that was saved, or refused."""

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tinyclip.formats import checkpoint, weights
from tinyclip.formats.openai import config_from_openai
from tinyclip.formats.torch_file import is_torchscript
from tinyclip.model import CLIPConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit, which writes such archives, is deprecated

CONFIG = CLIPConfig.uniform(
    embed_dim=16, image_size=24, patch_size=8, image_width=128, image_layers=2, text_width=64, text_layers=1,
    context_length=8, vocab_size=50, activation="quick_gelu",
)  # fmt: skip
PIXELS, TOKENS = (
    torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)),
    torch.tensor([[48, 7, 49, 0, 0, 0, 0, 0]]),
)


@pytest.fixture(scope="module")
def their_model():
    """open_clip's model with the three integers of OpenAI's archives."""
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 24, "patch_size": 8, "width": 128, "layers": 2}
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, quick_gelu=True, vision_cfg=vision, text_cfg=text).eval()
    for name, value in (("input_resolution", 24), ("context_length", 8), ("vocab_size", 50)):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    return model


@pytest.fixture(scope="module")
def archive(their_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("openai") / "ViT-tiny.pt"
    torch.jit.save(torch.jit.trace(their_model, (PIXELS, TOKENS), check_trace=False), path)
    return path


def rewritten(archive: Path, path: Path, change: dict[str, bytes | None], compression=zipfile.ZIP_STORED) -> Path:
    """The archive with other members; None leaves one out."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w", compression) as new:
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, content in (members | change).items():
            if content is not None:
                new.writestr(f"archive/{name}", content)
    return path


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)


@torch.no_grad()
def test_an_archive_gives_the_features_of_the_model_that_was_saved(archive, their_model):
    model = checkpoint.load(archive)
    assert model.config == CONFIG and model.preprocess is not None and model.preprocess.size == 24
    torch.testing.assert_close(model.encode_image(PIXELS), their_model.encode_image(PIXELS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.encode_text(TOKENS), their_model.encode_text(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_every_tensor_is_the_one_that_torch_reads(half, archive, tmp_path):
    module = torch.jit.load(archive)
    torch.jit.save(module.half() if half else module, tmp_path / "again.pt")
    state = weights.read(tmp_path / "again.pt")
    expected = module.state_dict()
    assert state.keys() == expected.keys()
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def test_a_scripted_module_is_read_like_a_traced_one(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.GELU()))
    torch.jit.save(torch.jit.script(module), tmp_path / "module.pt")
    state = weights.read(tmp_path / "module.pt")
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


def test_a_state_dict_of_an_archive_is_enough(their_model, tmp_path):
    state = their_model.state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert checkpoint.load(tmp_path / "state.pt").config == CONFIG
    # Without OpenAI's integers it could be anyone's, and nothing says its activation.
    torch.save({name: tensor for name, tensor in state.items() if tensor.is_floating_point()}, tmp_path / "state.pt")
    assert_refused(tmp_path / "state.pt", "a single file does not describe its model, expected a config with it")
    assert checkpoint.load(tmp_path / "state.pt", config=CONFIG).config == CONFIG


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("visual.layer1.0.conv1.weight", torch.zeros(1), "expected visual.layer1.0.conv1.weight with 4 axes"),
        ("visual.conv1.weight", torch.zeros(96, 3, 8, 8), "image width 96 is not a multiple of the head size 64"),
        (
            "visual.conv1.weight",
            torch.zeros(128, 192),
            "expected visual.conv1.weight with 4 axes, got shape .128, 192.",
        ),
        ("visual.conv1.weight", torch.zeros(128, 3, 0, 0), "not a CLIP: Input should be greater than 0"),
        ("visual.positional_embedding", torch.zeros(0, 128), "not a CLIP"),
        ("visual.positional_embedding", torch.zeros(11, 128), "visual.positional_embedding .expected .10, 128., got"),
        ("visual.transformer.resblocks.3.attn.in_proj_weight", torch.zeros(1), "1 unexpected: visual.transformer"),
        ("input_resolution", torch.tensor(16), r"expected picture side, .* \[24, 8, 50\], got \[16, 8, 50\]"),
        ("visual.extra", torch.zeros(1), "1 unexpected: visual.extra"),
    ],
)
def test_shapes_that_are_no_vit_clip_are_refused(name, tensor, message, their_model, tmp_path):
    torch.save({**their_model.state_dict(), name: tensor}, tmp_path / "odd.pt")
    assert_refused(tmp_path / "odd.pt", message)


def test_the_published_sizes_are_recognised():
    def state(width, layers, patch, side, text_width, embed):
        with torch.device("meta"):
            tensors = {
                "visual.conv1.weight": torch.empty(width, 3, patch, patch),
                "visual.positional_embedding": torch.empty((side // patch) ** 2 + 1, width),
                "token_embedding.weight": torch.empty(49408, text_width),
                "positional_embedding": torch.empty(77, text_width),
                "text_projection": torch.empty(text_width, embed),
            }
            for tower, number in (("visual.", layers), ("", 12)):
                for i in range(number):
                    tensors[f"{tower}transformer.resblocks.{i}.attn.in_proj_weight"] = torch.empty(1)
        said = {"input_resolution": side, "context_length": 77, "vocab_size": 49408}
        return tensors | {name: torch.tensor(value) for name, value in said.items()}

    for side in (224, 336):  # ViT-L/14 and its second picture size
        config = config_from_openai(state(1024, 24, 14, side, 768, 768))
        assert (config.image.image_size, len(config.image.blocks), config.image.blocks[0].heads) == (side, 24, 16)
        assert (config.text.blocks[0].heads, config.activation, config.embed_dim) == (12, "quick_gelu", 768)


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


class Getter:
    """A way to everything that an allowed name leads to."""

    def __reduce__(self):
        return getattr, (dict, "fromkeys")


@pytest.mark.parametrize("content", [Code(), {"visual.proj": Code()}, Getter(), torch.load])
def test_an_archive_with_code_is_refused_and_nothing_runs(content, archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = rewritten(archive, tmp_path / "evil.pt", {"data.pkl": pickle.dumps(content, protocol=2)})
    assert is_torchscript(evil)
    assert_refused(evil, "expected tensors only; the file holds code or is damaged, and is not read")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def test_the_archives_own_code_is_never_looked_at(archive, tmp_path):
    with zipfile.ZipFile(archive) as old:
        code = [name.partition("/")[2] for name in old.namelist() if "/code/" in name]
    assert code
    replaced = rewritten(archive, tmp_path / "nonsense.pt", dict.fromkeys(code, b"import os; os.abort()"))
    assert checkpoint.load(replaced).config == CONFIG


def pickled(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


MODULE = b"c__torch__.a\nModule\n)\x81"
OWN_CHILD = pickled(MODULE, b"q\x01}X\x05\x00\x00\x00childh\x01sb")


def tensor_op(numel: int, shape: bytes, stride: bytes) -> bytes:
    """A module whose tensor `a` claims a shape of the storage 0."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
        + numel.to_bytes(4, "little")
        + b"tQ"
    )
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + stride + b"\x89)tR"
    return pickled(MODULE, b"}X\x01\x00\x00\x00a", rebuilt, b"sb")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data.pkl": b""}, "not a readable checkpoint"),
        ({"data.pkl": None}, "not a readable checkpoint"),
        ({"data.pkl": OWN_CHILD}, "not a readable checkpoint: the module child occurs twice"),
        ({"data.pkl": pickle.dumps([1, 2])}, "expected a mapping of names to tensors, got list"),
        ({"data/0": None}, "not a readable checkpoint"),
        ({"data/0": b"\0" * 3}, "not a readable checkpoint"),
        ({"data.pkl": tensor_op(4, b"K\x04\x85", b"K\x01\x85"), "data/0": b"\0" * 16}, "a single file does not descr"),
        ({"data.pkl": tensor_op(4, b"K\x05\x85", b"K\x01\x85"), "data/0": b"\0" * 16}, "not a readable checkpoint"),
        (
            {"data.pkl": tensor_op(4, b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"), "data/0": b"\0" * 16},
            "a: expected a tensor that the file holds in full",
        ),
    ],
)
def test_damaged_archives_are_one_line(change, message, archive, tmp_path):
    assert_refused(rewritten(archive, tmp_path / "damaged.pt", change), message)


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(archive, tmp_path):
    bomb = rewritten(archive, tmp_path / "bomb.pt", {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    assert_refused(bomb, "the archive would unpack to more than its own size")


def test_a_tar_is_not_read_nor_one_in_a_zip(archive, tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.add(archive, arcname="../../escaped.pt")
    (tmp_path / "plain.pt").write_bytes(content.getvalue())
    with zipfile.ZipFile(tmp_path / "wrapped.pt", "w") as wrapped:
        wrapped.writestr("archive/inner.tar", content.getvalue())
    with zipfile.ZipFile(tmp_path / "instead.pt", "w") as wrapped:
        wrapped.writestr("archive/data.pkl", content.getvalue())
        wrapped.writestr("archive/constants.pkl", b"")
    for name in ("plain", "wrapped", "instead"):
        assert_refused(tmp_path / f"{name}.pt", "not a readable checkpoint|expected tensors only")
    assert not (tmp_path.parent.parent / "escaped.pt").exists()


@pytest.mark.parametrize("length", [10, 1000, -100])
def test_a_file_that_is_cut_off_is_refused(length, archive, tmp_path):
    (tmp_path / "cut.pt").write_bytes(archive.read_bytes()[:length])
    assert_refused(tmp_path / "cut.pt", "not a readable checkpoint|expected tensors only")
