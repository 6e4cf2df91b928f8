"""What `save` wrote `load` returns, bit for bit; whatever is damaged or does not fit is one line, before any memory."""

import json
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyclip.distill.teacher import load_teacher
from tinyclip.formats import checkpoint, weights
from tinyclip.formats.open_clip import config_to_open_clip, to_open_clip
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, ImageConfig, TextConfig, initialise
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

CONFIG = CLIPConfig.uniform(
    embed_dim=6, image_size=8, patch_size=4, image_width=8, image_layers=2, text_width=8, text_layers=1,
    context_length=10, vocab_size=514, head_dim=4, activation="quick_gelu",
)  # fmt: skip
IRREGULAR = CLIPConfig(
    embed_dim=5,
    image=ImageConfig(
        width=7, head_dim=3, image_size=9, patch_size=4,
        blocks=(BlockConfig(heads=2, ffn=5), BlockConfig(heads=0, ffn=3), BlockConfig(heads=1, ffn=0)),
    ),
    text=TextConfig(width=5, head_dim=2, context_length=10, vocab_size=514, blocks=(BlockConfig(heads=3, ffn=4),)),
)  # fmt: skip


def model(config: CLIPConfig = CONFIG, seed: int = 0) -> CLIP:
    preprocess = Preprocess(size=config.image.image_size, mean=(0.1, 0.2, 0.3), resize="squash")
    tokenizer = Tokenizer.train([], vocab_size=514, context_length=10)
    generator = torch.Generator().manual_seed(seed)
    return initialise(CLIP(config, preprocess=preprocess, tokenizer=tokenizer), generator).eval()


@pytest.fixture
def saved(tmp_path) -> Path:
    return checkpoint.save(model(), tmp_path / "model")


def assert_equal(ours: CLIP, expected: CLIP) -> None:
    assert ours.config == expected.config and not ours.training
    assert ours.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def assert_refused(path: Path, message: str, **arguments) -> None:
    """One line that names the file or directory and says what is wrong."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        checkpoint.load(path, **arguments)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), str(error.value)


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("config", [CONFIG, IRREGULAR], ids=["uniform", "irregular"])
def test_a_saved_model_comes_back(config, tmp_path):
    original = model(config)
    loaded = checkpoint.load(checkpoint.save(original, tmp_path / "a" / "model"))
    assert_equal(loaded, original)
    assert (loaded.preprocess, loaded.tokenizer) == (original.preprocess, original.tokenizer)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_equal(checkpoint.load(checkpoint.save(loaded, tmp_path / "again")), original)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "again"}  # nothing unfinished is left


def test_a_run_directory_holds_its_model(tmp_path):
    checkpoint.save(model(), tmp_path / "run" / "model")
    assert_equal(checkpoint.load(tmp_path / "run"), model())


def test_the_config_says_what_it_is(tmp_path):
    directory = checkpoint.save(model(), tmp_path / "model", extra={"scores": {"top1": 0.5}})
    settings = json.loads((directory / "config.json").read_text())
    assert settings["format"] == "tinyclip" and settings["version"] == 1 and settings["scores"] == {"top1": 0.5}
    assert CLIPConfig.model_validate(settings["model"]) == CONFIG


def test_a_model_is_replaced_and_anything_else_is_not(saved, tmp_path):
    assert_equal(checkpoint.load(checkpoint.save(model(seed=1), saved)), model(seed=1))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(FileExistsError, match="photos: expected a model to replace or nothing"):
        checkpoint.save(model(), tmp_path / "photos")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "photos"}


def test_a_failed_save_leaves_the_old_model(saved, monkeypatch):
    monkeypatch.setattr(weights, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(model(seed=1), saved)
    assert_equal(checkpoint.load(saved), model())
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("names", ["ours", "theirs"])
def test_single_files_are_read_in_both_names(suffix, names, tmp_path):
    original = model()
    state = original.state_dict() if names == "ours" else to_open_clip(original)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}} if names == "theirs" else state,
            path,
        )
    open_clip_json, our_json = tmp_path / "open_clip_config.json", tmp_path / "config.json"
    open_clip_json.write_text(json.dumps({"model_cfg": config_to_open_clip(CONFIG), "preprocess_cfg": {}}))
    our_json.write_text(json.dumps({"format": "tinyclip", "version": 1, "model": CONFIG.model_dump()}))
    for config in (CONFIG, CONFIG.model_dump(), config_to_open_clip(CONFIG), open_clip_json, str(our_json)):
        assert_equal(checkpoint.load(path, config=config), original)


def test_half_precision_files_are_cast_up(tmp_path):
    half = {name: tensor.half() for name, tensor in model().state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    loaded = checkpoint.load(tmp_path / "half.safetensors", config=CONFIG)
    assert all(torch.equal(p, half[name].float()) and p.dtype == torch.float32 for name, p in loaded.named_parameters())


def spoil(state: dict, how: str) -> dict:
    match how:
        case "missing":
            del state["text.position"], state["logit_scale"]
        case "extra":
            state["text.extra"] = torch.zeros(2)
        case "shape":
            state["image.position"] = torch.zeros(3, 8)
        case "nan":
            state["text.position"][0, 0] = torch.nan
        case "infinity":
            state["logit_scale"] = torch.tensor(torch.inf)
        case "dtype":
            state["text.position"] = torch.zeros(10, 8, dtype=torch.int8)
    return state


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "2 missing: logit_scale, text.position$"),
        ("extra", "1 unexpected: text.extra$"),
        ("shape", r"1 of another shape: image.position \(expected \[5, 8\], got \[3, 8\]\)$"),
        ("nan", "finite weights; 1 with NaN or infinity: text.position$"),
        ("infinity", "finite weights; 1 with NaN or infinity: logit_scale$"),
        ("dtype", r"floating-point weights; 1 others: text.position \(torch.int8\)$"),
    ],
)
def test_weights_that_do_not_fit_are_named(saved, how, message):
    path = saved / "model.safetensors"
    save_file(spoil(load_file(path), how), path)
    assert_refused(saved, f"model.safetensors: .*{message}")


def test_many_wrong_keys_are_counted_not_listed(saved):
    rewrite(saved / "config.json", model=IRREGULAR.model_dump(mode="json"))
    assert_refused(saved, r"\d+ missing: [^,]+, [^,]+, [^,]+, \.\.\.; \d+ unexpected")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-10],
        lambda data: data[:100],
        lambda data: struct.pack("<Q", 2**60) + data[8:],
        lambda data: data[:8] + b"x" * 50 + data[58:],
        lambda data: b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    ],
    ids=["empty", "end cut off", "header cut off", "endless header", "no JSON", "no tensors"],
)
def test_damaged_safetensors_are_refused(saved, damage):
    path = saved / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(saved, "model.safetensors: (not a readable checkpoint|weights do not fit)")


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_with_code_is_not_read(tmp_path, capsys):
    torch.save({"state_dict": {"logit_scale": Code()}}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Code()))
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    for name in ("torch", "plain", "text", "empty"):
        assert_refused(tmp_path / f"{name}.pt", f"{name}.pt: (expected tensors only|not a readable)", config=CONFIG)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"logit_scale": 3}}, {"epoch": 1}, torch.zeros(2)])
def test_a_pt_file_must_map_names_to_tensors(content, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    assert_refused(tmp_path / "weights.pt", "weights.pt: expected (a mapping of names to )?tensors", config=CONFIG)


def huge(**changes) -> dict:
    settings = CONFIG.model_dump(mode="json")
    settings["image"] |= changes
    return settings


@pytest.mark.parametrize(
    "settings, message",
    [
        (huge(blocks=[{"heads": 10**6, "ffn": 10**9}] * 1000, width=65536, head_dim=65536), "weights do not fit"),
        (huge(blocks=[{"heads": 10**18, "ffn": 8}]), "cannot be built|weights do not fit"),
        (huge(blocks=[{"heads": 10**30, "ffn": 8}]), "cannot be built|image.blocks.0.heads"),
        (huge(width=10**9), "image.width: Input should be less than or equal to 65536"),
        (huge(blocks=[]), "image.blocks: .*at least 1"),
        (huge(colour=3), "image.colour: Extra inputs are not permitted"),
        (huge(width="wide"), "image.width: Input should be a valid integer"),
        (None, "the whole: Input should be"),
    ],
)
def test_impossible_configs_are_refused_before_anything_is_allocated(saved, settings, message):
    rewrite(saved / "config.json", model=settings)
    assert_refused(saved, message)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[" * 100_000, "config.json: not JSON"),
        ("config.json", "[]", "config.json: expected a JSON object, got list"),
        ("config.json", '{"format": "other"}', "expected format 'tinyclip' version 1, got 'other' version None"),
        (
            "config.json",
            '{"format": "tinyclip", "version": 2}',
            "expected format 'tinyclip' version 1, got 'tinyclip' version 2",
        ),
        ("preprocess.json", Preprocess(size=9).model_dump_json(), "preprocess.json: expected size 8, got 9"),
        ("preprocess.json", '{"size": 8}', "preprocess.json: expected every setting as it was written; mean: None -> "),
        ("preprocess.json", '{"size": 8, "tint": 1}', "preprocess.json: tint: Extra inputs"),
        ("tokenizer.json", "{}", "tokenizer.json: not a CLIP tokenizer"),
    ],
)
def test_damaged_directories_are_refused(saved, file, content, message):
    (saved / file).write_text(content)
    assert_refused(saved, message)


def test_a_tokenizer_of_another_model_is_refused(saved):
    Tokenizer.train([], vocab_size=514, context_length=11).save(saved / "tokenizer.json")
    assert_refused(saved, r"tokenizer.json: expected vocabulary and context length \(514, 10\), got \(514, 11\)")


def test_what_is_not_there_is_named(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "nothing", "nothing: expected a model directory or a checkpoint file, found nothing")
    assert_refused(
        tmp_path / "empty", "empty: expected a model .config.json. or a run .model/config.json., found neither"
    )
    assert_refused(saved / "model.safetensors", "a single file does not describe its model, expected a config")
    assert_refused(
        saved / "model.safetensors", "no.json: expected a JSON file, found none", config=tmp_path / "no.json"
    )
    assert_refused(saved, "has its own config", config=CONFIG)
    (saved / "model.safetensors").unlink()
    assert_refused(saved, "model.safetensors: expected a checkpoint file, found none")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("ViT-B-32/laion2b_s34b_b79k", "open_clip:ViT-B-32/laion2b_s34b_b79k?"),
        ("ViT-B-32/openai", "open_clip:ViT-B-32-quickgelu/openai?"),  # the activation that it was trained with
        ("ViT-B-32", "open_clip:ViT-B-32-quickgelu/openai, open_clip:ViT-B-32/laion2b_e16 or open_clip:ViT-B-32/lai"),
        ("ViT-B/32", "open_clip:ViT-B-32-quickgelu/openai, open_clip:ViT-B-32/laion2b_e16 or open_clip:ViT-B-32/lai"),
        ("RN50", "open_clip:RN50-quickgelu/openai, "),
        ("vit-b32", "open_clip:ViT-B-32/TAG or "),
        (
            "openai/clip-vit-base-patch32",
            "hf:openai/clip-vit-base-patch32 (transformers' format) or hf-hub:openai",
        ),
        ("https://huggingface.co/laion/CLIP-ViT-B-32", "hf:laion/CLIP-ViT-B-32 (transformers' format) or "),
        ("ViT-39M-16-Text-19M-YFCC15M", "tinyclip:ViT-39M-16-Text-19M-YFCC15M?"),
        ("TinyCLIP-ViT-8M-16-Text-3M", "tinyclip:ViT-8M-16-Text-3M-YFCC15M?"),
        ("ViT-40M-32-Text-19-LAION400M", "tinyclip:ViT-40M-32-Text-19M-LAION400M"),
        ("openclip:ViT-B-32/openai", "open_clip:ViT-B-32/openai?"),
        ("runs/techer", "runs/teacher?"),
        ("techer.pt", "teacher.pt?"),
    ],
)
def test_a_name_without_its_prefix_is_not_guessed_but_the_error_spells_it(name, meant, tmp_path, monkeypatch):
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    (tmp_path / "teacher.pt").touch()
    monkeypatch.chdir(tmp_path)
    for load in (checkpoint.load, load_teacher):
        with pytest.raises(FileNotFoundError) as error:
            load(name)
        assert f"found nothing; did you mean {meant}" in str(error.value) and "\n" not in str(error.value)


def test_a_directory_of_that_name_comes_before_any_model_of_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = CLIP(CONFIG)
    for name in ("ViT-B-32", "openai/clip-vit-base-patch32"):
        checkpoint.save(model, name)
        assert checkpoint.load(name).config == CONFIG


@pytest.mark.parametrize("name", ["plain", "/no/such/model", "a/b/c"])
def test_where_nothing_is_close_nothing_is_suggested(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(name, f"{name}: expected a model directory or a checkpoint file, found nothing")
    with pytest.raises(FileNotFoundError, match="found nothing$"):
        checkpoint.load(name)
