"""transformers' CLIPModel comes in with equal features, every key used, and what our towers lack is refused by name."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers import CLIPConfig as TheirConfig

import tinyclip
from tinyclip.formats.huggingface import (
    config_from_huggingface,
    config_to_huggingface,
    from_huggingface,
    to_huggingface,
)
from tinyclip.model import unit
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import END, START, Tokenizer

CAPTIONS = ["A red  star, isn't it?", "two blue hearts", "x"]
TOKENIZER = Tokenizer.train(["a red star", "two blue hearts"] * 2, vocab_size=530, context_length=11)
SETTINGS = {
    "model_type": "clip",
    "projection_dim": 6,
    "vision_config": {
        "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 5,
        "image_size": 23,
    },
    "text_config": {
        "hidden_size": 8, "intermediate_size": 30, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 11, "vocab_size": TOKENIZER.vocab_size, "eos_token_id": TOKENIZER.eot,
    },
}  # fmt: skip


def changed(section: str = "", **changes) -> dict:
    return {**SETTINGS, section: {**SETTINGS[section], **changes}} if section else {**SETTINGS, **changes}


def both(**changes) -> dict:
    return {name: {**SETTINGS[name], **changes} for name in ("vision_config", "text_config")} | {
        name: SETTINGS[name] for name in ("model_type", "projection_dim")
    }


def their_model(settings: dict) -> CLIPModel:
    """Random weights, none of them 0 or 1."""
    model = CLIPModel(TheirConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def their_tokenizer(directory: Path) -> CLIPTokenizer:
    """The toy's merges under OpenAI's names of start and end, as transformers builds a tokenizer from them."""
    TOKENIZER.save(directory / "ours.json")
    bpe = json.loads((directory / "ours.json").read_text())["model"]
    (directory / "ours.json").unlink()
    names = {START: "<|startoftext|>", END: "<|endoftext|>"}
    vocab = {names.get(token, token): index for token, index in bpe["vocab"].items()}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in bpe["merges"]], model_max_length=11)


def save(directory: Path, settings: dict = SETTINGS, **arguments) -> CLIPModel:
    model = their_model(settings)
    model.save_pretrained(directory, **arguments)
    side = model.config.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side, image_mean=[0.4] * 3)
    images.save_pretrained(directory)
    their_tokenizer(directory).save_pretrained(directory)
    return model


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def assert_same_features(ours: tinyclip.CLIP, theirs: CLIPModel, tokens: torch.Tensor) -> None:
    pixels = torch.randn(3, 3, *(ours.config.image.image_size,) * 2, generator=torch.Generator().manual_seed(1))
    output = theirs(pixel_values=pixels, input_ids=tokens)
    assert (ours.encode_image(pixels, normalize=True) - output.image_embeds).abs().max() < 1e-5
    assert (ours.encode_text(tokens, normalize=True) - unit(output.text_embeds)).abs().max() < 1e-5
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        both(hidden_act="gelu", layer_norm_eps=1e-3),
        changed("vision_config", image_size=16, patch_size=16),
        changed("text_config", eos_token_id=2),
    ],
    ids=["quick_gelu and odd sizes", "gelu and another eps", "one patch", "the legacy end of text"],
)
def test_a_clip_model_of_transformers_gives_the_same_features_here(settings, tmp_path):
    theirs = save(tmp_path, settings)
    ours = tinyclip.load(tmp_path)
    tokens = their_tokenizer(tmp_path)(CAPTIONS, padding=True, truncation=True, return_tensors="pt").input_ids
    assert_same_features(ours, theirs, tokens)
    assert ours.tokenizer == TOKENIZER
    assert ours.preprocess == Preprocess(size=settings["vision_config"]["image_size"], mean=(0.4,) * 3)


def test_there_and_back_is_the_same():
    for settings in (SETTINGS, both(hidden_act="gelu", layer_norm_eps=1e-3)):
        config = config_from_huggingface(settings)
        assert config_from_huggingface(config_to_huggingface(config)) == config
        state = their_model(settings).state_dict()
        back = to_huggingface(from_huggingface(state, config))
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], tensor) and back[name].is_contiguous() for name, tensor in state.items())


def test_old_configs_mean_what_they_meant():
    text = {**SETTINGS["text_config"], "num_attention_heads": 4}
    assert config_from_huggingface(changed(text_config_dict=text)).text.blocks[0].heads == 4
    default = config_from_huggingface({"model_type": "clip", "text_config": None})
    assert (default.embed_dim, default.image.width, default.text.vocab_size) == (512, 768, 49408)
    assert default.activation == "quick_gelu"


def test_shards_half_precision_and_position_ids_are_read(tmp_path):
    theirs = save(tmp_path, max_shard_size="5KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    expected = from_huggingface(theirs.state_dict(), config_from_huggingface(SETTINGS)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tinyclip.load(tmp_path).state_dict().items())

    (tmp_path / "model.safetensors.index.json").unlink()
    state = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    state |= {"text_model.embeddings.position_ids": torch.arange(11)[None], "logit_scale": state["logit_scale"][None]}
    save_file(state, tmp_path / "model.safetensors")
    loaded = tinyclip.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, expected[name].half().float()) for name, tensor in loaded.items())


def test_every_key_is_used_or_named():
    config, state = config_from_huggingface(SETTINGS), their_model(SETTINGS).state_dict()
    with pytest.raises(ValueError, match="^file: .*1 unexpected: ../adapter.weight$"):
        from_huggingface({**state, "../adapter.weight": torch.zeros(2)}, config, where="file")
    del state["text_model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match="1 missing: text_model.encoder.layers.0.self_attn.k_proj.bias$"):
        from_huggingface(state, config)


@pytest.mark.parametrize(
    "settings, message",
    [
        (changed(model_type="siglip"), "model_type"),
        (changed(quantization_config={"bits": 4}), "quantization_config"),
        (changed("vision_config", hidden_act="gelu"), "hidden_act: expected one for both towers, got gelu and quick"),
        (both(hidden_act="gelu_pytorch_tanh"), "hidden_act"),
        (changed("text_config", layer_norm_eps=1e-6), "layer_norm_eps: expected one for both towers"),
        (changed("vision_config", num_channels=1), "vision_config.num_channels"),
        (changed("vision_config", image_size=[23, 46]), "vision_config.image_size"),
        (changed("vision_config", num_attention_heads=5), "vision_config.hidden_size: expected a multiple of 5 heads"),
        (changed("vision_config", num_hidden_layers=10**9), "vision_config.num_hidden_layers"),
        (changed("vision_config", patch_size=99), "patch_size 99 is larger"),
        (changed("text_config", eos_token_id=7), "eos_token_id: expected the largest id, .*; got 7"),
        (changed("text_config", vocab_size=10**12, eos_token_id=2), "text.vocab_size"),
    ],
)
def test_what_our_towers_lack_is_named(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        config_from_huggingface(settings, where="config.json")
    assert str(error.value).startswith("config.json: ") and "\n" not in str(error.value)


def refused(directory: Path, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        tinyclip.load(directory)
    assert "\n" not in str(error.value)


def test_bad_directories_are_refused_in_one_line(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../elsewhere.safetensors"}}))
    refused(tmp_path, "expected the names of files beside it, got '../elsewhere.safetensors'")
    index.write_text("{}")
    refused(tmp_path, "weight_map")
    index.unlink()
    refused(tmp_path, "model.safetensors: expected a checkpoint file, found none; nor pytorch_model.bin, nor an index")
    (tmp_path / "tf_model.h5").touch()
    refused(tmp_path, "; tf_model.h5 is not read$")


def test_the_file_of_weights_is_the_one_that_transformers_takes(tmp_path):
    """One file of safetensors, shards of it, one pickle, shards of it."""
    state, config = their_model(SETTINGS).state_dict(), config_from_huggingface(SETTINGS)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    names = sorted(state)

    def scaled(number: float) -> dict[str, torch.Tensor]:
        return {**state, "logit_scale": torch.tensor(number)}

    def write_shards(name: str, write, number: float) -> None:
        halves = [name.replace(".", f"-{part}-of-2.") for part in (1, 2)]
        for half, keys in zip(halves, (names[::2], names[1::2]), strict=True):
            write({key: scaled(number)[key] for key in keys}, tmp_path / half)
        places = {key: halves[index % 2] for index, key in enumerate(names)}
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    write_shards("pytorch_model.bin", torch.save, 1.0)
    assert tinyclip.load(tmp_path).logit_scale.item() == CLIPModel.from_pretrained(tmp_path).logit_scale.item() == 1.0
    expected = from_huggingface(scaled(1.0), config).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tinyclip.load(tmp_path).state_dict().items())
    torch.save(scaled(2.0), tmp_path / "pytorch_model.bin")
    assert tinyclip.load(tmp_path).logit_scale.item() == CLIPModel.from_pretrained(tmp_path).logit_scale.item() == 2.0
    write_shards("model.safetensors", save_file, 3.0)
    assert tinyclip.load(tmp_path).logit_scale.item() == CLIPModel.from_pretrained(tmp_path).logit_scale.item() == 3.0
    save_file(scaled(4.0), tmp_path / "model.safetensors", {"format": "pt"})
    assert tinyclip.load(tmp_path).logit_scale.item() == CLIPModel.from_pretrained(tmp_path).logit_scale.item() == 4.0


def test_a_pickle_that_holds_code_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    torch.save({"logit_scale": CLIPModel}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin: expected tensors only; the file holds code or is damaged")


def test_pictures_are_read_as_their_processor_says_or_it_is_refused(tmp_path):
    save(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    before = file.read_text()
    picture = Image.effect_mandelbrot((90, 62), (-3, -2.5, 2, 2.5), 100).resize((40, 31)).convert("RGB")
    for changes in (
        {"size": 23, "crop_size": 23, "resample": 2},  # as older versions wrote it
        {"size": {"height": 23, "width": 23}},
        {"size": {"height": 23, "width": 23}, "do_center_crop": False, "crop_size": 20},
        {"size": [23, 23], "crop_size": [23, 23]},
        {"size": 23, "default_to_square": True},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.9, 0.8], "image_std": [0.5, 0.6, 0.7]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"do_pad": None, "default_to_square": None, "device": None},
        {"do_convert_rgb": False},
        {"image_processor_type": "CLIPImageProcessorFast"},
        {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"},
    ):
        rewrite(file, **changes)
        theirs = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt").pixel_values
        ours = tinyclip.load(tmp_path).preprocess
        levels = (ours.normalise(ours(picture)[None]) - theirs).abs() * 255 * torch.tensor(ours.std).view(3, 1, 1)
        assert levels.max() < 1.1, changes
        file.write_text(before)
    rewrite(file, size={"height": 23, "width": 23}, do_center_crop=False)
    assert tinyclip.load(tmp_path).preprocess.resize == "squash"
    for changes, message in (
        ({"size": {"shortest_edge": 30}}, "size, crop_size: expected .* resized to 23"),
        ({"size": {"shortest_edge": 23, "longest_edge": 23}}, "size, crop_size: expected"),
        ({"size": [23, 24]}, "size, crop_size: expected"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 23}}, "size, crop_size: expected"),
        ({"do_resize": False}, "do_resize"),
        ({"do_rescale": None}, "do_rescale"),
        ({"image_mean": None}, "image_mean"),
        ({"do_pad": True}, "do_pad"),
        ({"do_normalize": "false"}, "do_normalize"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type"),
        ({"size": {"shortest_edge": 23}, "do_center_crop": False}, "crop none"),
        ({"size": {"shortest_edge": 23}, "do_center_crop": True, "crop_size": 20}, "crop {'height': 20, 'width': 20}"),
        ({"resample": 0}, "resample"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"image_std": [0, 1, 1]}, "std"),
    ):
        before = file.read_text()
        rewrite(file, **changes)
        refused(tmp_path, message)
        file.write_text(before)
    settings, newer = json.loads(file.read_text()), tmp_path / "processor_config.json"
    file.unlink()
    newer.write_text(json.dumps({"image_processor": settings}))
    assert tinyclip.load(tmp_path).preprocess.resize == "squash"
    newer.unlink()
    assert tinyclip.load(tmp_path).preprocess is None


@pytest.mark.parametrize("newer", [{"image_processor": {"image_mean": [0.5] * 3}}, {"image_processor": None}, {}])
def test_of_two_files_that_say_how_pictures_are_read_the_one_that_transformers_takes_counts(newer, tmp_path):
    save(tmp_path)  # preprocessor_config.json: mean 0.4
    if newer.get("image_processor"):
        newer["image_processor"] |= {"size": {"shortest_edge": 23}, "crop_size": {"height": 23, "width": 23}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor", **newer}))
    theirs = CLIPProcessor.from_pretrained(tmp_path).image_processor
    assert tinyclip.load(tmp_path).preprocess.mean == tuple(theirs.image_mean)
    assert theirs.image_mean[0] == (0.5 if newer.get("image_processor") else 0.4)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": ["no object"]}))
    refused(tmp_path, "processor_config.json: the whole: ")


def test_captions_are_read_with_clips_vocabulary_or_it_is_refused(tmp_path):
    save(tmp_path)
    file = tmp_path / "tokenizer.json"
    good = json.loads(file.read_text())
    good["model"]["vocab"] |= {added["content"]: added["id"] for added in good["added_tokens"]}

    file.write_text(json.dumps({**good, "normalizer": None}))
    refused(tmp_path, "does not read texts as CLIP")
    file.write_text(json.dumps({**good, "model": {**good["model"], "merges": good["model"]["merges"][:-1]}}))
    refused(tmp_path, "not CLIP's byte pair encoding: expected")
    file.write_text(json.dumps({**good, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))
    refused(tmp_path, "not CLIP's byte pair encoding")

    file.unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(good["model"]["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in good["model"]["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    assert tinyclip.load(tmp_path).tokenizer == TOKENIZER
    (tmp_path / "merges.txt").unlink()
    assert tinyclip.load(tmp_path).tokenizer is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_max_length": 7}, "model_max_length: expected the context length, 11, or more; got 7"),
        ({"padding_side": "left"}, "padding_side"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"tokenizer_class": "GPT2Tokenizer"}, "tokenizer_class"),
        ({"eos_token": "</s>"}, "eos_token: expected '<|endoftext|>', got '</s>'"),
        ({"bos_token": {"content": "x</w>"}}, "bos_token: expected '<|startoftext|>', got 'x</w>'"),
        ({"pad_token": "!"}, "pad_token: expected '<|startoftext|>' or '<|endoftext|>', got '!'"),
        (
            {"additional_special_tokens": ["red"]},
            "additional_special_tokens: expected '<|startoftext|>' or '<|endoftext|>'",
        ),
        (
            {"added_tokens_decoder": {"0": {"content": "!"}}},
            "added_tokens_decoder: expected '<|startoftext|>' or '<|endo",
        ),
        ({"model_max_length": 10**30}, None),
        ({"model_max_length": None}, None),
    ],
)
def test_settings_of_a_tokenizer_that_change_ids_are_named(settings, message, tmp_path):
    save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    rewrite(file, **settings)
    if message is None:
        assert tinyclip.load(tmp_path).tokenizer == TOKENIZER
        theirs = AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS, truncation=True, max_length=11)
        assert theirs.input_ids == TOKENIZER.encode(CAPTIONS)
    else:
        refused(tmp_path, re.escape(f"{file}: {message}"))


@pytest.mark.parametrize(
    "name, settings", [("special_tokens_map.json", {"pad_token": "!"}), ("added_tokens.json", {"!": 0})]
)
def test_special_tokens_in_older_files_are_named_where_they_count(name, settings, tmp_path):
    """To transformers a "!" that pads is no exclamation mark, in any text."""
    save(tmp_path)
    rewrite(tmp_path / "tokenizer_config.json", added_tokens_decoder=None)
    settings_file = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings_file["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_file))
    assert tinyclip.load(tmp_path).tokenizer == TOKENIZER
    (tmp_path / name).write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(tmp_path)(["red!"]).input_ids != TOKENIZER.encode(["red!"])
    refused(tmp_path, f"{name}: (pad_token|added_tokens): expected .*, got '!'")


def test_a_directory_of_sentence_transformers_is_read_where_it_is_a_clip_model_alone(tmp_path):
    (tmp_path / "0_CLIPModel").mkdir()
    theirs = save(tmp_path / "0_CLIPModel")
    kinds = ("0_CLIPModel", "1_Dense", "2_Normalize")
    clip, dense, normalize = ({"path": path, "type": f"sentence_transformers.models.{path[2:]}"} for path in kinds)
    (tmp_path / "modules.json").write_text(json.dumps([clip, normalize]))
    loaded = tinyclip.load(tmp_path)
    assert torch.equal(loaded.logit_scale, theirs.logit_scale) and loaded.tokenizer == TOKENIZER
    (tmp_path / "modules.json").write_text(json.dumps([clip, dense]))
    refused(tmp_path, "modules.json: expected a CLIPModel in '0_CLIPModel' alone, got .*models.Dense in '1_Dense'")
    (tmp_path / "modules.json").write_text(json.dumps([{**clip, "path": "../elsewhere"}]))
    refused(tmp_path, "expected a CLIPModel in '0_CLIPModel' alone, got .* in '../elsewhere'")
    for damaged in ("", "{}", "[]", "[1]", '[{"path": 1}]'):
        (tmp_path / "modules.json").write_text(damaged)
        refused(tmp_path, "modules.json: (not JSON|modules)")


def test_a_model_of_the_hub_is_found_in_its_cache_and_else_refused_in_one_line(tmp_path):
    home = tmp_path / "hub" / "models--toy--clip"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    save(snapshot)
    shutil.copytree(home, home.with_name("models--toy--old"))
    old = home.with_name("models--toy--old") / "snapshots" / ("0" * 40)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    program = """
import tinyclip
print(sum(parameter.numel() for parameter in tinyclip.load("hf:toy/clip").parameters()))
assert tinyclip.load("hf:toy/old").logit_scale == tinyclip.load("hf:toy/clip").logit_scale
for name in ("hf:toy/none", "hf:", "hf:../../etc"):
    try:
        tinyclip.load(name)
    except ValueError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    count, *refusals = done.stdout.splitlines()
    assert int(count) == sum(tensor.numel() for tensor in load_file(snapshot / "model.safetensors").values())
    assert [line.partition(": the Hugging Face hub")[0] for line in refusals] == ["hf:toy/none", "hf:", "hf:../../etc"]


def test_the_processor_that_transformers_saves_is_understood(tmp_path):
    """transformers 5 writes processor_config.json for a CLIPProcessor."""
    save(tmp_path)
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 23}, crop_size=23), tokenizer=their_tokenizer(tmp_path)
    )
    (tmp_path / "preprocessor_config.json").unlink()
    processor.save_pretrained(tmp_path)
    loaded = tinyclip.load(tmp_path)
    assert (loaded.preprocess, loaded.tokenizer) == (Preprocess(size=23), TOKENIZER)
