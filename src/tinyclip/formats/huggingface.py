"""Hugging Face transformers' CLIPModel: configs, weights, readers, in and out; and directories with their own code.

Nothing here imports transformers but `stock_features`, which reads a finished directory as a user of it would.

Shape legend: B pairs, D width, E embedding, L tokens, P patch side, S side of the picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, RootModel, StrictBool
from torch import Tensor

from tinyclip.formats import weights
from tinyclip.formats.files import is_there, parse_json, read_json, read_text, validated, write_json
from tinyclip.formats.provenance import entry
from tinyclip.formats.uniform import why_not
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, ImageConfig, TextConfig, TowerConfig
from tinyclip.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from tinyclip.tokenizer import END, START, WORDS, Tokenizer, TokenizerFile, is_same, ours_of, vocab_of

if TYPE_CHECKING:
    from PIL import Image

HUB = "hf:"
SAFETENSORS, PICKLES = "model.safetensors", "pytorch_model.bin"  # or shards, which NAME.index.json names
OTHER_WEIGHTS = ("tf_model.h5", "flax_model.msgpack")  # that transformers itself no longer reads
OLDER_TOKENS = ("special_tokens_map.json", "added_tokens.json")  # now inside tokenizer_config.json
SPECIAL = [  # fields of tokenizer_config.json that name tokens, beside those of start and end
    *("unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "added_tokens"),
]
FILES = [  # what is fetched from the hub
    *("config.json", SAFETENSORS, "model-*-of-*.safetensors", f"{SAFETENSORS}.index.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", *OLDER_TOKENS),
    "preprocess.json",  # of a directory of ours
]
PICKLE_FILES = [PICKLES, "pytorch_model-*-of-*.bin", f"{PICKLES}.index.json"]  # fetched where there is nothing better
MODULES_FILE, CLIP_MODULE = "modules.json", "0_CLIPModel"  # of sentence-transformers, which has a CLIPModel inside
RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
LEGACY_EOS = 2  # configs with this id mean that a text ends at its largest id, which is our rule
NOT_CLIP = "not CLIP's byte pair encoding"
SPLITS = (  # of a text into words, in tokenizer.json: ours, transformers 4's and 5's
    WORDS,
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
)
IN_DECODING = ("trim_offsets", "use_regex")  # which words a character came from; another split of what is split
REMOTE_CODE = Path(__file__).with_name("modeling_tinyclip.py")
REMOTE_CONFIG = {  # beside ours in config.json
    "model_type": "tinyclip",
    "architectures": ["TinyCLIPModel"],
    "auto_map": {
        "AutoConfig": "modeling_tinyclip.TinyCLIPConfig",
        "AutoModel": "modeling_tinyclip.TinyCLIPModel",
        "AutoModelForZeroShotImageClassification": "modeling_tinyclip.TinyCLIPModel",
    },
    "dtype": "float32",
}

BLOCK_TABLE = {
    "attention.norm.weight": "layer_norm1.weight",
    "attention.norm.bias": "layer_norm1.bias",
    "attention.qkv.weight": "self_attn.[qkv]_proj.weight",  # three of theirs, one above the other, are one of ours
    "attention.qkv.bias": "self_attn.[qkv]_proj.bias",
    "attention.out.weight": "self_attn.out_proj.weight",
    "attention.out.bias": "self_attn.out_proj.bias",
    "ffn.norm.weight": "layer_norm2.weight",
    "ffn.norm.bias": "layer_norm2.bias",
    "ffn.up.weight": "mlp.fc1.weight",
    "ffn.up.bias": "mlp.fc1.bias",
    "ffn.down.weight": "mlp.fc2.weight",
    "ffn.down.bias": "mlp.fc2.bias",
}
TABLE = {  # our name: theirs; * is a block's number
    "logit_scale": "logit_scale",
    "image.class_embedding": "vision_model.embeddings.class_embedding",
    "image.position": "vision_model.embeddings.position_embedding.weight",
    "image.patch.weight": "vision_model.embeddings.patch_embedding.weight",  # [D, 3 P P] here, [D, 3, P, P] there
    "image.norm_pre.weight": "vision_model.pre_layrnorm.weight",  # their spelling
    "image.norm_pre.bias": "vision_model.pre_layrnorm.bias",
    "image.norm_post.weight": "vision_model.post_layernorm.weight",
    "image.norm_post.bias": "vision_model.post_layernorm.bias",
    "image.projection.weight": "visual_projection.weight",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.position": "text_model.embeddings.position_embedding.weight",
    "text.norm_final.weight": "text_model.final_layer_norm.weight",
    "text.norm_final.bias": "text_model.final_layer_norm.bias",
    "text.projection.weight": "text_projection.weight",
    **{f"image.blocks.*.{ours}": f"vision_model.encoder.layers.*.{theirs}" for ours, theirs in BLOCK_TABLE.items()},
    **{f"text.blocks.*.{ours}": f"text_model.encoder.layers.*.{theirs}" for ours, theirs in BLOCK_TABLE.items()},
}
NOT_WEIGHTS = {"vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"}  # 0, 1, 2, ...


def _square(value: Any) -> Any:
    """[224, 224] and {"height": 224, "width": 224} -> 224."""
    sides = list(value.values()) if isinstance(value, Mapping) else value
    return sides[0] if isinstance(sides, list) and sides and all(side == sides[0] for side in sides) else value


def _sides(value: Any) -> Any:
    """The older way to write it: [height, width]."""
    return dict(zip(("height", "width"), value, strict=True)) if isinstance(value, list) and len(value) == 2 else value


def _thrice(value: Any) -> Any:
    """One number for all three colours."""
    return [value] * 3 if isinstance(value, int | float) else value


Side = Annotated[int, BeforeValidator(_square)]
Size = Annotated[int | dict[str, int], BeforeValidator(_sides)]
PerColour = Annotated[tuple[float, float, float], BeforeValidator(_thrice)]


class _Section(BaseModel):
    """The fields that act, at transformers' defaults; the others of its many do not."""

    model_config = ConfigDict(extra="ignore")


class _Tower(_Section):
    hidden_size: int = Field(default=512, gt=0, le=65536)
    intermediate_size: int = Field(default=2048, gt=0)
    num_hidden_layers: int = Field(default=12, gt=0, le=1024)
    num_attention_heads: int = Field(default=8, gt=0)
    hidden_act: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_norm_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)


class _Vision(_Tower):
    hidden_size: int = Field(default=768, gt=0, le=65536)
    intermediate_size: int = Field(default=3072, gt=0)
    num_attention_heads: int = Field(default=12, gt=0)
    num_channels: Literal[3] = 3
    image_size: Side = 224
    patch_size: Side = 32


class _Text(_Tower):
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


class _Model(_Section):
    model_type: Literal["clip"]
    projection_dim: int = 512
    quantization_config: None = None
    transformers_weights: None = None  # another file of weights
    vision_config: _Vision = _Vision()
    text_config: _Text = _Text()


class _Processor(_Section):
    """CLIPImageProcessor's settings. Those that a Literal holds have no counterpart in ours at any other value.

    `do_convert_rgb` is not one: without it, pictures that are not RGB fail there.
    """

    image_processor_type: Literal["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"]
    do_resize: Literal[True] = True
    size: Size = {"shortest_edge": 224}
    default_to_square: StrictBool | None = False  # what a size of one number means
    use_square_size: Literal[False, None] = False
    do_center_crop: StrictBool = True
    crop_size: Size = {"height": 224, "width": 224}
    resample: Literal[2, 3] = 3  # PIL's numbers, see RESAMPLE
    do_rescale: StrictBool = True
    rescale_factor: float = Field(1 / 255, gt=0)
    do_normalize: StrictBool = True
    image_mean: PerColour = OPENAI_MEAN
    image_std: PerColour = OPENAI_STD
    do_pad: Literal[False, None] = False


class _TokenizerSettings(_Section):
    """The fields of tokenizer_config.json that change ids."""

    tokenizer_class: Literal[
        "CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None
    ] = "CLIPTokenizer"
    padding_side: Literal["right"] = "right"
    truncation_side: Literal["right"] = "right"
    model_max_length: float | None = Field(None, validation_alias=AliasChoices("model_max_length", "max_len"))


class _Module(_Section):
    path: str
    type: str


class _Modules(_Section):
    modules: list[_Module] = Field(min_length=1)


class _Vocab(RootModel[dict[str, int]]):
    """vocab.json."""


class _Index(_Section):
    weight_map: dict[str, str] = Field(min_length=1)


def is_theirs(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is transformers' own; ours, with code for transformers beside it, has a format."""
    return "model_type" in config and "format" not in config


def fetch(name: str | Path) -> Path:
    """The directory of `hf:ORGANISATION/NAME`, downloaded or from the hub's cache. Raises ValueError, one line."""
    from huggingface_hub import snapshot_download

    def download(*patterns: str) -> Path:
        inside = [f"{CLIP_MODULE}/{pattern}" for pattern in patterns]
        patterns = (*patterns, *inside, MODULES_FILE)
        return Path(snapshot_download(str(name).removeprefix(HUB), allow_patterns=list(patterns)))

    try:
        directory = download(*FILES)
        return directory if any(directory.glob("**/*.safetensors")) else download(*FILES, *PICKLE_FILES)
    except Exception as error:  # no network, no such model, no access, no such name
        raise ValueError(f"{name}: the Hugging Face hub does not give it: {weights.first_line(error)}") from None


def meant(name: str) -> list[str]:
    """What `name`, without a prefix, may mean on the hub: ORGANISATION/NAME, or the address of its page."""
    name = name.removeprefix("https://huggingface.co/").rstrip("/")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return []
    return [f"{HUB}{name} (transformers' format)", f"hf-hub:{name} (open_clip's)"]


def from_huggingface_dir(directory: Path, device: str | torch.device = "cpu") -> CLIP:
    """A CLIP from a CLIPModel's directory; it reads pictures and captions where the directory says how.

    Raises FileNotFoundError, or ValueError for what is damaged, does not fit, or has no counterpart here.
    """
    config = config_from_huggingface(read_json(directory / "config.json"), where=str(directory / "config.json"))
    state, where = read_weights(directory, config)
    model = from_huggingface(state, config, where=str(where), device=device)
    model.preprocess = read_preprocess(directory, config.image.image_size)
    model.tokenizer = read_tokenizer(directory, config.text)
    return model


def clip_module(directory: Path) -> Path | None:
    """The CLIPModel inside a directory of sentence-transformers; None where it is not one.

    Raises ValueError where other modules work on its features.
    """
    file = directory / MODULES_FILE
    if not is_there(file):
        return None
    modules = validated(_Modules, {"modules": parse_json(read_text(file, "JSON"), str(file))}, str(file)).modules
    first, *others = (module.type.rpartition(".")[2] for module in modules)
    if first != "CLIPModel" or any(kind != "Normalize" for kind in others) or modules[0].path != CLIP_MODULE:
        got = ", ".join(f"{module.type} in {module.path!r}" for module in modules)
        raise ValueError(f"{file}: expected a CLIPModel in {CLIP_MODULE!r} alone, got {got:.200}")
    return directory / CLIP_MODULE


def config_from_huggingface(settings: Mapping[str, Any], where: str = "config") -> CLIPConfig:
    """Raises ValueError, naming the field, where our towers lack something or a value is not one."""
    settings = {name: value for name, value in settings.items() if value is not None}
    for section in ("vision_config", "text_config"):  # of old files the ..._dict is what counts
        if f"{section}_dict" in settings:
            settings[section] = settings[f"{section}_dict"]
    model = validated(_Model, settings, where)
    vision, text = model.vision_config, model.text_config
    for field in ("hidden_act", "layer_norm_eps"):
        image_value, text_value = getattr(vision, field), getattr(text, field)
        if image_value != text_value:
            raise ValueError(f"{where}: {field}: expected one for both towers, got {image_value} and {text_value}")
    if text.eos_token_id not in (LEGACY_EOS, text.vocab_size - 1):
        raise ValueError(
            f"{where}: text_config.eos_token_id: expected the largest id, {text.vocab_size - 1}, or {LEGACY_EOS} for "
            f"the legacy rule; got {text.eos_token_id}"
        )
    ours = {
        "embed_dim": model.projection_dim,
        "activation": vision.hidden_act,
        "norm_eps": vision.layer_norm_eps,
        "image": {
            **_from_tower("vision_config", vision, where),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text": {
            **_from_tower("text_config", text, where),
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
        },
    }
    return validated(CLIPConfig, ours, where)


def _from_tower(section: str, tower: _Tower, where: str) -> dict[str, Any]:
    width, heads = tower.hidden_size, tower.num_attention_heads
    if width % heads:
        raise ValueError(f"{where}: {section}.hidden_size: expected a multiple of {heads} heads, got {width}")
    block = BlockConfig(heads=heads, ffn=tower.intermediate_size)
    return {"width": width, "head_dim": width // heads, "blocks": (block,) * tower.num_hidden_layers}


def config_to_huggingface(config: CLIPConfig) -> dict[str, Any]:
    """transformers' config.json. Raises ValueError for a student that CLIPModel cannot describe."""
    image, text = config.image, config.text
    if not isinstance(image, ImageConfig):
        raise ValueError("CLIPModel's image tower is a transformer; this one is a ResNet")
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "vision_config": {
            "model_type": "clip_vision_model",
            **_to_tower("image", config, image),
            "image_size": image.image_size,
            "patch_size": image.patch_size,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **_to_tower("text", config, text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": text.vocab_size - 1,
        },
    }


def _to_tower(name: str, config: CLIPConfig, tower: TowerConfig) -> dict[str, Any]:
    if reason := why_not(tower):
        raise ValueError(f"CLIPModel's blocks are all alike, with heads x head size = width; {name} tower: {reason}")
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.blocks[0].ffn,
        "num_hidden_layers": len(tower.blocks),
        "num_attention_heads": tower.blocks[0].heads,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "projection_dim": config.embed_dim,
    }


def to_huggingface(model: CLIP) -> dict[str, Tensor]:
    """The weights in transformers' names and layouts. Raises ValueError for a block without heads or neurons."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "image.patch.weight" and isinstance(model.config.image, ImageConfig):
            side = model.config.image.patch_size
            tensor = tensor.unflatten(1, (3, side, side))
        theirs = _their_names(name)
        state |= zip(theirs, tensor.chunk(len(theirs)) if len(theirs) > 1 else [tensor], strict=True)
    return state


def from_huggingface(
    state_dict: Mapping[str, Tensor],
    config: CLIPConfig,
    *,
    where: str = "state_dict",
    device: str | torch.device = "cpu",
) -> CLIP:
    """A CLIP from weights in transformers' names. Raises ValueError, with `where`, unless every key fits."""
    state = {name: tensor for name, tensor in state_dict.items() if name not in NOT_WEIGHTS}
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())
    model = weights.on_meta(config, where)
    weights.check(state, to_huggingface(model), where)

    def ours(name: str) -> Tensor:
        tensors = [state[theirs] for theirs in _their_names(name)]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return tensor.flatten(1) if name == "image.patch.weight" else tensor

    return weights.fill(model, {name: ours(name) for name in model.state_dict()}, device)


def _their_names(ours: str) -> list[str]:
    theirs = weights.their_name(ours, TABLE, "CLIPModel")
    return [theirs.replace("[qkv]", part) for part in "qkv"] if "[qkv]" in theirs else [theirs]


def read_weights(directory: Path, config: CLIPConfig) -> tuple[dict[str, Tensor], Path]:
    """What transformers reads: safetensors before pickles, and of each one file before shards that an index names.

    And the file, or the index.
    """
    for name in (SAFETENSORS, PICKLES):
        if is_there(file := directory / name):
            return weights.read(file, config), file
        if is_there(index := directory / f"{name}.index.json"):
            shards = sorted(set(validated(_Index, read_json(index), str(index)).weight_map.values()))
            if away := [shard for shard in shards if not re.fullmatch(r"[\w-][\w.-]*", shard)]:
                raise ValueError(f"{index}: expected the names of files beside it, got {away[0]!r:.80}")
            weights.check_room([directory / shard for shard in shards], config)
            states = [weights.read(directory / shard, config) for shard in shards]
            return {name: tensor for state in states for name, tensor in state.items()}, index
    other = [f"; {name} is not read" for name in OTHER_WEIGHTS if (directory / name).is_file()]
    raise FileNotFoundError(
        f"{directory / SAFETENSORS}: expected a checkpoint file, found none; nor {PICKLES}, nor an index of shards"
        + "".join(other)
    )


def read_preprocess(directory: Path, image_size: int) -> Preprocess | None:
    """How transformers reads pictures with a directory; None where it does not say.

    As there, the image processor inside processor_config.json comes before preprocessor_config.json. Raises ValueError
    for another size than the model's, or other steps.
    """
    file = directory / "processor_config.json"
    settings = read_json(file).get("image_processor") if is_there(file) else None
    if settings is None:
        file = directory / "preprocessor_config.json"
        if not is_there(file):
            return None
        settings = read_json(file)
    if isinstance(settings, dict) and settings.get("image_processor_type") is None:
        older = str(settings.get("feature_extractor_type") or "CLIPFeatureExtractor")
        settings = {**settings, "image_processor_type": older.replace("FeatureExtractor", "ImageProcessor")}
    found = validated(_Processor, settings, str(file))
    square, shortest = {"height": image_size, "width": image_size}, {"shortest_edge": image_size}
    size, crop = found.size, found.crop_size if found.do_center_crop else None
    if isinstance(size, int):
        size = {"height": size, "width": size} if found.default_to_square else {"shortest_edge": size}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if (size, crop) not in ((square, None), (square, square), (shortest, square)):
        raise ValueError(
            f"{file}: size, crop_size: expected the shortest edge or both resized to {image_size}, and no smaller "
            f"crop; got size {size}, crop {crop or 'none'}"
        )
    mean, std = (found.image_mean, found.image_std) if found.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    largest = 255 * found.rescale_factor if found.do_rescale else 255.0  # what a white pixel is before it is normalised
    if not math.isclose(largest, 1, rel_tol=1e-6):
        mean, std = (tuple(value / largest for value in values) for values in (mean, std))
    ours = {
        "size": image_size,
        "mean": mean,
        "std": std,
        "interpolation": RESAMPLE[found.resample],
        "resize": "squash" if size == square else "shortest",
    }
    return validated(Preprocess, ours, str(file))


def read_tokenizer(directory: Path, config: TextConfig) -> Tokenizer | None:
    """None where the directory has none. Raises ValueError for one that is not CLIP's byte pair encoding."""
    file, vocab_file, merges_file = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if is_there(file):
        where = f"{file}: {NOT_CLIP}"
        found = validated(TokenizerFile, read_json(file), where)
        vocab, merges = found.vocab, found.model.merges
    elif is_there(vocab_file) and is_there(merges_file):
        where, found = f"{vocab_file} and {merges_file.name}: {NOT_CLIP}", None
        vocab, merges = validated(_Vocab, read_json(vocab_file), where).root, _read_merges(merges_file)
    else:
        return None
    tokens = sorted(vocab, key=vocab.__getitem__)
    if len(tokens) != config.vocab_size or [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"{where}: expected ids 0 to {config.vocab_size - 1}, got {len(tokens)} of them, or others")
    if tokens[:-2] != list(vocab_of(merges))[:-2]:
        raise ValueError(f"{where}: expected 512 bytes, the merges, start and end, in this order")
    if found is not None:
        _check_special({"added_tokens": [token.content for token in found.added_tokens]}, tokens, file)
        _check_reading(found, where)
    _check_settings(directory, config, tokens)
    try:
        return Tokenizer.from_merges(merges, config.context_length)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_merges(file: Path) -> list[tuple[str, str]]:
    """Of a merges.txt: two tokens on a line, after one that says the version."""
    lines = [line for line in read_text(file).split("\n") if line.strip() and not line.startswith("#version")]
    pairs = [tuple(line.split(" ")) for line in lines]
    if odd := next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None):
        raise ValueError(f"{file}: {NOT_CLIP}: expected two tokens on a line, got {odd!r:.80}")
    return [(left, right) for left, right in pairs]


def _check_reading(found: TokenizerFile, where: str) -> None:
    """Raises ValueError for a tokenizer.json that cleans, splits or frames a text in another way than CLIP's do."""
    start, end = len(found.vocab) - 2, len(found.vocab) - 1
    names = {token.id: token.content for token in found.added_tokens}
    frames = [
        {"type": "RobertaProcessing", "sep": [names.get(end), end], "cls": [names.get(start), start]},
        ours_of(len(found.vocab), 3)["post_processor"],
    ]
    splits = [{"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True} for words in SPLITS]
    known = {
        "normalizer": [ours_of(len(found.vocab), 3)["normalizer"]],
        "pre_tokenizer": [{"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]} for split in splits],
        "post_processor": frames,
    }
    for name, ones in known.items():
        got = getattr(found, name)
        if not any(is_same(one, _without(got, IN_DECODING)) for one in ones):
            raise ValueError(f"{where}: does not read texts as CLIP: {name} {got!r:.200}")


def _without(part: Any, fields: Sequence[str]) -> Any:
    if isinstance(part, dict):
        return {name: _without(value, fields) for name, value in part.items() if name not in fields}
    return [_without(value, fields) for value in part] if isinstance(part, list) else part


def _check_settings(directory: Path, config: TextConfig, tokens: list[str]) -> None:
    """Raises ValueError for settings at which transformers gives a text other ids than its vocabulary says."""
    file = directory / "tokenizer_config.json"
    settings = read_json(file) if is_there(file) else {}
    found = validated(_TokenizerSettings, settings, str(file))
    if found.model_max_length is not None and found.model_max_length < config.context_length:
        raise ValueError(
            f"{file}: model_max_length: expected the context length, {config.context_length}, or more; "
            f"got {found.model_max_length:g}"
        )
    _check_special(settings, tokens, file)
    if "added_tokens_decoder" not in settings:
        special, added = (directory / name for name in OLDER_TOKENS)
        _check_special(read_json(special) if is_there(special) else {}, tokens, special)
        _check_special({"added_tokens": list(read_json(added)) if is_there(added) else []}, tokens, added)


def _check_special(settings: Mapping[str, Any], tokens: list[str], file: Path) -> None:
    """Raises ValueError where another token than start and end is special: it would be looked for in texts."""
    start, end = tokens[-2:]
    for name, expected in {"bos_token": (start,), "eos_token": (end,), **dict.fromkeys(SPECIAL, (start, end))}.items():
        for token in _contents(settings.get(name)):
            if token not in expected:
                raise ValueError(f"{file}: {name}: expected {' or '.join(map(repr, expected))}, got {token!r:.80}")


def _contents(token: Any) -> list[Any]:
    """The texts of a token, and of a list or a mapping of tokens."""
    if isinstance(token, Mapping):
        return [token["content"]] if "content" in token else _contents(list(token.values()))
    if isinstance(token, list):
        return [content for one in token for content in _contents(one)]
    return [] if token is None else [token]


def to_huggingface_dir(model: CLIP, directory: Path) -> None:
    """Write the files of a CLIPModel into a directory that is there. Raises ValueError for a model that is not one."""
    write_json(directory / "config.json", {**config_to_huggingface(model.config), **entry(model.provenance)})
    weights.write(to_huggingface(model), directory / "model.safetensors")
    write_processor(model, directory)


def write_processor(model: CLIP, directory: Path) -> None:
    """What a CLIPProcessor needs. It cleans white space and case as we do, but neither mojibake nor HTML entities."""
    assert model.preprocess is not None and model.tokenizer is not None, "checked by export"
    preprocess = model.preprocess
    side = {"height": preprocess.size, "width": preprocess.size}
    write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": preprocess.size} if preprocess.resize == "shortest" else side,
            "resample": {name: number for number, name in RESAMPLE.items()}[preprocess.interpolation],
            "do_center_crop": preprocess.resize == "shortest",
            "crop_size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": preprocess.mean,
            "image_std": preprocess.std,
        },
    )
    write_tokenizer(model.tokenizer, directory)


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """What transformers' CLIPTokenizer needs."""
    tokenizer.save(directory / "tokenizer.json")
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "processor_class": "CLIPProcessor",
            "model_max_length": tokenizer.context_length,
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": END,
        },
    )


@torch.no_grad()
def stock_features(
    directory: Path, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What transformers makes of a directory: pixels [B, 3, S, S], unit features [B, E] of both, logits [B, B]."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    inputs = processor(images=pictures, text=captions, padding=True, truncation=True, return_tensors="pt")
    output = model(**inputs)
    return inputs["pixel_values"], output.image_embeds, output.text_embeds, output.logits_per_image
