"""Every file of every kind of model directory, damaged in every way: exit status 2, one line that names the file.

Nothing in the directory changes. A damage that does no harm stands in HARMLESS, and there the model that comes out is
the one that was written. CPU only, a model of a few thousand weights.
"""

import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyclip import cli
from tinyclip.formats import checkpoint, huggingface, open_clip
from tinyclip.formats.provenance import Origin, Provenance
from tinyclip.model import CLIP, CLIPConfig, initialise
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

CONFIG = CLIPConfig.uniform(
    embed_dim=6, image_size=8, patch_size=4, image_width=8, image_layers=2, text_width=8, text_layers=1,
    context_length=10, vocab_size=518, head_dim=4, activation="quick_gelu",
)  # fmt: skip
CAPTIONS = ["a cat on a mat", "a dog on a mat", "cats and dogs"]


@cache
def model() -> CLIP:
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=518, context_length=10)
    preprocess = Preprocess(size=8, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")
    made = initialise(CLIP(CONFIG, preprocess=preprocess, tokenizer=tokenizer), torch.Generator().manual_seed(0))
    code = Origin(name="tinyclip", license="mit")
    made.provenance = Provenance(teacher=Origin(name="hf:a/b"), data=Origin(name="d"), code=code, recipe="r")
    return made.eval()


# The directories.


def write_ours(made: CLIP, directory: Path) -> None:
    checkpoint.write(made, directory, {})


def write_older_huggingface(made: CLIP, directory: Path) -> None:
    """With other files for the same: weights in parts, processor_config.json, vocab.json and merges.txt."""
    huggingface.to_huggingface_dir(made, directory)
    state, parts = load_file(directory / "model.safetensors"), {}
    for name in state:
        parts.setdefault(f"model-0000{1 + ('text' in name)}-of-00002.safetensors", []).append(name)
    for part, names in parts.items():
        save_file({name: state[name] for name in names}, directory / part)
    index = {"metadata": {}, "weight_map": {name: part for part, names in parts.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    processor = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    bpe = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, bpe["merges"])]) + "\n")
    for name in ("model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


WRITERS: dict[str, Callable[[CLIP, Path], None]] = {
    "tinyclip": write_ours,
    "huggingface": huggingface.to_huggingface_dir,
    "older huggingface": write_older_huggingface,
    "open_clip": open_clip.to_open_clip_dir,
}
FILES = {
    "tinyclip": ("config.json", "model.safetensors", "preprocess.json", "tokenizer.json"),
    "huggingface": (
        *("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    ),
    "older huggingface": (
        *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "processor_config.json"),
        *("vocab.json", "merges.txt"),
    ),
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}
ROWS = [(kind, file) for kind, files in FILES.items() for file in files]
WEIGHTS_ROWS = [(kind, file) for kind, file in ROWS if file.endswith(".safetensors")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """A directory of each kind."""
    root = tmp_path_factory.mktemp("whole")
    for kind, write in WRITERS.items():
        (root / kind).mkdir()
        write(model(), root / kind)
        assert_equal(checkpoint.load(root / kind))
    return {kind: root / kind for kind in WRITERS}


def test_the_table_has_every_file_that_is_read(whole):
    others = {"model-00002-of-00002.safetensors"}  # a second one of a kind
    for kind, directory in whole.items():
        assert {path.name for path in directory.iterdir()} - others == set(FILES[kind]), kind


def assert_equal(got: CLIP) -> None:
    """The same features of every picture and caption, since all that makes them is equal."""
    expected = model()
    assert (got.config, got.preprocess, got.tokenizer) == (expected.config, expected.preprocess, expected.tokenizer)
    assert all(torch.equal(got.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def content(directory: Path) -> dict[str, Any]:
    """Of every file its bytes and when it was written."""
    return {
        path.name: (path.is_symlink() or path.is_dir() or path.read_bytes(), path.lstat().st_mtime_ns)
        for path in directory.iterdir()
    }


# The damages of a file.


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": _bytes(lambda _: b""),
    "half": _bytes(lambda data: data[: len(data) // 2]),
    "one byte short": _bytes(lambda data: data.rstrip()[:-1]),
    "other bytes": _bytes(lambda data: bytes((7 * i * i + 131) % 256 for i in range(len(data)))),
    "zeros": _bytes(lambda data: bytes(len(data))),
    "a null byte": _bytes(lambda data: data[:5] + b"\0" + data[5:]),
    "no UTF-8": _bytes(lambda data: data[:5] + b"\xff\xfe" + data[5:]),
    "nested": _bytes(lambda _: b'{"a": ' + b"[" * 100_000),
    "too large": lambda path: os.truncate(path, 2**25 + 2**20),
    "a directory": _directory,
    "a link to itself": _loop,
}


@pytest.fixture
def run(capsys, monkeypatch):
    """`run("inspect", path)` runs the command in this process, as its entry point does."""

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tinyclip", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        assert stop.value.code == 0 or shown.out == "", shown
        return int(stop.value.code or 0), shown.err

    return command


@pytest.mark.parametrize("kind, file", ROWS)
def test_a_damaged_file_is_one_line_and_nothing_changes(kind, file, whole, run, tmp_path):
    for name, damage in DAMAGES.items():
        directory = tmp_path / name
        shutil.copytree(whole[kind], directory)
        damage(directory / file)
        before = content(directory)
        commands = [["inspect", directory]]
        if name == "half":
            commands.append(["evaluate", directory, "--retrieval", "scenes?split=heldout&count=2"])
        for command in commands:
            status, said = run(*command)
            assert status == 2 and said.startswith("tinyclip: error: ") and said.count("\n") == 1, (name, said)
            assert str(directory) in said and file in said and len(said) < 700, (name, said)
        assert content(directory) == before, name
        shutil.rmtree(directory)


@pytest.mark.parametrize("kind, file", ROWS)
def test_a_missing_file_is_named_or_the_model_reads_less(kind, file, whole, run, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(whole[kind], directory)
    (directory / file).unlink()
    optional = {
        **dict.fromkeys(("preprocess.json", "preprocessor_config.json", "processor_config.json"), "preprocess"),
        **dict.fromkeys(("tokenizer.json", "vocab.json", "merges.txt"), "tokenizer"),
    }
    if file == "tokenizer_config.json":  # whose settings are then the library's defaults, which are ours
        assert_equal(checkpoint.load(directory))
        return
    if file not in optional or kind == "open_clip":  # whose config names the file
        status, said = run("inspect", directory)
        assert status == 2 and said.count("\n") == 1 and str(directory) in said, said
        return
    got = checkpoint.load(directory)
    assert getattr(got, optional[file]) is None
    status, said = run("evaluate", directory, "--retrieval", "scenes?split=heldout&count=2")
    assert (status == 2 and "a teacher needs" in said) or optional[file] in said, said


# The damages of a key.

VALUES = (None, "x", 10**30, [], math.nan, {}, -1, [1, [2]], "\0")  # every key gets one or two of them, in turn
PROVENANCE = r"provenance\b.*|an extra key"
PROCESSOR = r"(image_processor\.)?(image_processor_type|processor_class|do_convert_rgb)\b.*|an extra key"
ITS_DEFAULT = r"(image_processor\.)?(do_\w+|rescale_factor|crop_size\.\w+) is missing"
HARMLESS = {  # what makes no embedding, and what has the value of its default: the same model
    ("tinyclip", "config.json"): PROVENANCE,
    ("tinyclip", "tokenizer.json"): r"version is .*|.* (is missing|is None|is \[\]|is \{\})|model.unk_token is .*",
    ("huggingface", "config.json"): (
        rf"(\w+_config\.)?(architectures|dtype|model_type|projection_dim|bos_token_id|pad_token_id)\b.*|{PROVENANCE}|"
        r"\w+_config\.(hidden_act|layer_norm_eps) is missing"
    ),
    ("huggingface", "preprocessor_config.json"): f"{PROCESSOR}|{ITS_DEFAULT}",
    ("huggingface", "tokenizer.json"): (
        r"(version|truncation|padding|decoder|model\.unk_token|added_tokens\.0\.(?!id|content))\b.*|"
        r".* is (missing|None|\[\]|\{\})"
    ),
    ("older huggingface", "model.safetensors.index.json"): r"metadata\b.*|weight_map\.\w+ is missing|an extra key",
    ("older huggingface", "processor_config.json"): f"{PROCESSOR}|{ITS_DEFAULT}",
    ("open_clip", "open_clip_config.json"): "|".join(
        (
            r"model_cfg\.\w+\.mlp_ratio is missing",
            r".*resize_mode is .*",
            r".*tokenizer_name is (?!missing|None).*",
            PROVENANCE,
        )
    ),
}
OTHERS = {  # what another model might say, and what the library at home there replaces by its default: another model
    ("tinyclip", "preprocess.json"): r"mean\.0 is -1",
    ("huggingface", "config.json"): r"text_config\.num_attention_heads is missing",
    ("huggingface", "preprocessor_config.json"): r"(resample|image_mean|image_std) is missing|image_mean\.0 is -1",
    ("older huggingface", "processor_config.json"): (
        r"image_processor\.(resample|image_mean|image_std) is missing|image_processor\.image_mean\.0 is -1|"
        r"image_processor is (missing|None)|the root is \{\}"
    ),
    ("open_clip", "open_clip_config.json"): (
        r"model_cfg\.(quick_gelu|text_cfg\.heads|text_cfg\.hf_tokenizer_name) is missing|"
        r"preprocess_cfg is (missing|None)|preprocess_cfg\.(mean|std|interpolation) is (missing|\[\])"
    ),
}
KEY_ROWS = [  # the others are read as one of these
    *HARMLESS,
    ("tinyclip", "preprocess.json"),
    ("older huggingface", "vocab.json"),
]


def keys(settings: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every mapping in it; of a list the first item, of a vocabulary and of a map of weights the first key."""
    if isinstance(settings, dict):
        for key in list(settings)[: 1 if path[-1:] in (("weight_map",), ("vocab",)) or len(settings) > 500 else None]:
            yield (*path, key)
            yield from keys(settings[key], (*path, key))
    elif isinstance(settings, list) and settings:
        yield (*path, 0)
        yield from keys(settings[0], (*path, 0))


def changed(settings: Any, path: tuple[Any, ...], change: Callable[[Any, Any], object]) -> Any:
    copy = json.loads(json.dumps(settings))
    place = copy
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return copy


def damaged(settings: Any) -> Iterator[tuple[str, Any]]:
    for value in (None, [], "x", 1, [settings], {}):
        yield f"the root is {value!r:.20}", value
    values = cycle(VALUES)
    for path in keys(settings):
        name = ".".join(map(str, path))
        yield f"{name} is missing", changed(settings, path, lambda place, key: place.pop(key))
        for value in (next(values), next(values))[: 1 if "added_tokens" in settings else 2]:
            copy = changed(settings, path, lambda place, key, value=value: place.__setitem__(key, value))
            if json.dumps(copy) != json.dumps(settings):
                yield f"{name} is {value!r}", copy
    yield "an extra key", {**settings, "extra": 1}


def outcome(directory: Path, file: str) -> str:
    """What came of loading it: "refused", "the same model", "another model", or what is wrong."""
    try:
        got = checkpoint.load(directory)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        is_named = str(directory) in said and (file in said or "the config" in said)
        return "refused" if is_named and "\n" not in said and len(said) < 700 else f"said {said}"
    except Exception as error:
        return f"raised {error!r}"
    try:
        assert_equal(got)
    except AssertionError:
        return "another model"
    return "the same model"


@pytest.mark.parametrize("kind, file", KEY_ROWS)
def test_a_damaged_key_is_refused_or_known_to_do_no_harm(kind, file, whole, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(whole[kind], directory)
    settings = json.loads((directory / file).read_text())
    wrong = []
    for name, damage in damaged(settings):
        (directory / file).write_text(json.dumps(damage))
        expected = {"refused"}
        if re.fullmatch(HARMLESS.get((kind, file), ""), name):
            expected = {"refused", "the same model"}
        elif re.fullmatch(OTHERS.get((kind, file), ""), name):
            expected = {"refused", "another model"}
        if (came := outcome(directory, file)) not in expected:
            wrong.append(f"{kind} {file}: {name}: {came}")
    assert not wrong, "\n".join(wrong)


# The damages of weights.


def weights_damages(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    first = next(name for name, tensor in state.items() if tensor.ndim == 2)
    for name in list(state)[::7]:
        yield f"{name} missing", {key: tensor for key, tensor in state.items() if key != name}
    yield "extra", {**state, "extra": torch.zeros(1)}
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        yield str(dtype), {**state, first: torch.zeros(state[first].shape).to(dtype)}
    for shape in ((), (0,), (1, *state[first].shape), (*state[first].shape, 1), (state[first].shape[0] + 1, 1)):
        yield str(shape), {**state, first: torch.zeros(shape)}
    for value in (math.nan, math.inf, -math.inf):
        spoilt = state[first].clone()
        spoilt[-1, -1] = value
        yield str(value), {**state, first: spoilt}


@pytest.mark.parametrize("kind, file", WEIGHTS_ROWS)
def test_weights_that_do_not_fit_are_one_line(kind, file, whole, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(whole[kind], directory)
    state = load_file(directory / file)
    for name, damage in weights_damages({key: tensor.clone() for key, tensor in state.items()}):
        (directory / file).unlink()
        save_file({key: tensor.contiguous() for key, tensor in damage.items()}, directory / file)
        with pytest.raises(ValueError) as error:
            checkpoint.load(directory)
        said = str(error.value)
        assert "\n" not in said and str(directory) in said and len(said) < 700, (name, said)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}},
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "X", "shape": [4], "data_offsets": [0, 16]}},
        {"a": []},
    ],
)
def test_a_header_that_claims_what_the_file_has_not_is_refused(header, whole, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(whole["tinyclip"], directory)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable checkpoint"):
        checkpoint.load(directory)
