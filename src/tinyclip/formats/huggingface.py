"""Hugging Face transformers' CLIPModel: configs, weights, readers, in and out; and directories with their own code.

Nothing here imports transformers but `stock_features`, which reads a finished directory as a user of it would.

Shape legend: B pairs, D width, E embedding, L tokens, P patch side, S side of the picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tokenizers
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from tinyclip.formats import weights
from tinyclip.formats.files import read_json, validated, write_json
from tinyclip.formats.provenance import entry
from tinyclip.formats.uniform import why_not
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, ImageConfig, TextConfig, TowerConfig
from tinyclip.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from tinyclip.tokenizer import END, START, Tokenizer

if TYPE_CHECKING:
    from PIL import Image

HUB = "hf:"
FILES = [  # what is fetched from the hub
    *("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    "preprocess.json",  # of a directory of ours
]
RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
LEGACY_EOS = 2  # configs with this id mean that a text ends at its largest id, which is our rule
PROBE = "A photo  of\n2 Cats -- don't you see?"  # upper case, white space, punctuation: read alike or not CLIP's
REMOTE_CODE = Path(__file__).with_name("modeling_tinyclip.py")
REMOTE_CONFIG = {  # beside ours in config.json
    "model_type": "tinyclip",
    "architectures": ["TinyCLIPModel"],
    "auto_map": {"AutoConfig": "modeling_tinyclip.TinyCLIPConfig", "AutoModel": "modeling_tinyclip.TinyCLIPModel"},
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
    sides = set(value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value])
    return sides.pop() if len(sides) == 1 else value


def _shortest(value: Any) -> Any:
    """The older way to write it: 224 -> {"shortest_edge": 224}."""
    return {"shortest_edge": value} if isinstance(value, int) else value


Side = Annotated[int, BeforeValidator(_square)]


class _Section(BaseModel):
    """The fields that act, at transformers' defaults; the others of its many do not."""

    model_config = ConfigDict(extra="ignore")


class _Tower(_Section):
    hidden_size: int = Field(default=512, gt=0, le=65536)
    intermediate_size: int = Field(default=2048, gt=0)
    num_hidden_layers: int = Field(default=12, gt=0, le=1024)
    num_attention_heads: int = Field(default=8, gt=0)
    hidden_act: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_norm_eps: float = Field(default=1e-5, gt=0)


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
    vision_config: _Vision = _Vision()
    text_config: _Text = _Text()


class _Processor(_Section):
    """CLIPImageProcessor's settings. Those that a Literal holds have no counterpart in ours at any other value."""

    do_resize: Literal[True] = True
    size: Annotated[dict[str, int], BeforeValidator(_shortest)] = {"shortest_edge": 224}
    do_center_crop: bool = True
    crop_size: Side = 224
    resample: Literal[2, 3] = 3  # PIL's numbers, see RESAMPLE
    do_rescale: Literal[True] = True
    rescale_factor: float = Field(1 / 255, ge=0.00392156, le=0.00392157)
    do_normalize: Literal[True] = True
    image_mean: tuple[float, float, float] = OPENAI_MEAN
    image_std: tuple[float, float, float] = OPENAI_STD


class _Index(_Section):
    weight_map: dict[str, str] = Field(min_length=1)


def is_theirs(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is transformers' own; ours, with code for transformers beside it, has a format."""
    return "model_type" in config and "format" not in config


def fetch(name: str | Path) -> Path:
    """The directory of `hf:ORGANISATION/NAME`, downloaded or from the hub's cache. Raises ValueError, one line."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name).removeprefix(HUB), allow_patterns=FILES))
    except Exception as error:  # no network, no such model, no access, no such name
        raise ValueError(f"{name}: the Hugging Face hub does not give it: {weights.first_line(error)}") from None


def from_huggingface_dir(directory: Path, device: str | torch.device = "cpu") -> CLIP:
    """A CLIP from a CLIPModel's directory; it reads pictures and captions where the directory says how.

    Raises FileNotFoundError, or ValueError for what is damaged, does not fit, or has no counterpart here.
    """
    config = config_from_huggingface(read_json(directory / "config.json"), where=str(directory / "config.json"))
    model = from_huggingface(_read_weights(directory), config, where=str(directory), device=device)
    model.preprocess = _read_preprocess(directory, config.image.image_size)
    model.tokenizer = read_tokenizer(directory, config.text)
    return model


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
    model = weights.on_meta(config)
    weights.check(state, to_huggingface(model), where)

    def ours(name: str) -> Tensor:
        tensors = [state[theirs] for theirs in _their_names(name)]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return tensor.flatten(1) if name == "image.patch.weight" else tensor

    return weights.fill(model, {name: ours(name) for name in model.state_dict()}, device)


def _their_names(ours: str) -> list[str]:
    theirs = weights.their_name(ours, TABLE, "CLIPModel")
    return [theirs.replace("[qkv]", part) for part in "qkv"] if "[qkv]" in theirs else [theirs]


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """model.safetensors, or the shards that its index names."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return weights.read(directory / "model.safetensors")
    shards = set(validated(_Index, read_json(index), str(index)).weight_map.values())
    if away := sorted(shard for shard in shards if Path(shard).name != shard):
        raise ValueError(f"{index}: expected the names of files beside it, got {away[0]!r}")
    return {name: tensor for shard in sorted(shards) for name, tensor in weights.read(directory / shard).items()}


def _read_preprocess(directory: Path, image_size: int) -> Preprocess | None:
    """None where the directory does not say. Raises ValueError for another size than the model's, or other steps."""
    file = directory / "preprocessor_config.json"
    if file.is_file():
        settings = read_json(file)
    elif (file := directory / "processor_config.json").is_file():
        settings = read_json(file).get("image_processor")
    else:
        return None
    found = validated(_Processor, settings, str(file))
    square, shortest = {"height": image_size, "width": image_size}, {"shortest_edge": image_size}
    is_square = found.size == square or (found.size == shortest and found.do_center_crop)
    if not is_square or (found.do_center_crop and found.crop_size != image_size):
        crop = found.crop_size if found.do_center_crop else "none"
        raise ValueError(
            f"{file}: expected the shortest edge or both resized to {image_size}, and no smaller crop; "
            f"got size {found.size}, crop {crop}"
        )
    ours = {
        "size": image_size,
        "mean": found.image_mean,
        "std": found.image_std,
        "interpolation": RESAMPLE[found.resample],
        "resize": "squash" if found.size == square else "shortest",
    }
    return validated(Preprocess, ours, str(file))


def read_tokenizer(directory: Path, config: TextConfig) -> Tokenizer | None:
    """None where the directory has none. Raises ValueError for one that is not CLIP's byte pair encoding."""
    file, vocab_file, merges_file = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    theirs = None
    try:
        if file.is_file():
            theirs = tokenizers.Tokenizer.from_file(str(file))
            vocab, merges = theirs.get_vocab(), json.loads(theirs.to_str())["model"]["merges"]
        elif vocab_file.is_file() and merges_file.is_file():
            file = vocab_file
            vocab, merges = tokenizers.models.BPE.read_file(str(vocab_file), str(merges_file))
        else:
            return None
        tokenizer = Tokenizer.from_merges([(left, right) for left, right in merges], config.context_length)
    except Exception as error:  # `tokenizers` raises bare Exception; other kinds of model have no merges
        raise ValueError(f"{file}: not CLIP's byte pair encoding: {weights.first_line(error)}") from None
    tokens = sorted(vocab, key=vocab.__getitem__)
    if len(tokens) != config.vocab_size or tokens[:-2] != tokenizer.tokens[:-2]:
        raise ValueError(
            f"{file}: not CLIP's byte pair encoding: expected {config.vocab_size} tokens, 512 bytes, the merges, start "
            f"and end; got {len(tokens)} tokens, or in another order"
        )
    if theirs is not None:
        theirs.no_padding()
        theirs.enable_truncation(config.context_length)
        if (got := theirs.encode(PROBE).ids) != (expected := tokenizer.encode([PROBE])[0]):
            raise ValueError(f"{file}: does not read texts as CLIP: expected {expected} for {PROBE!r}, got {got}")
    return tokenizer


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
) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers makes of a directory: normalised pixels [B, 3, S, S], unit image and text features [B, E]."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    inputs = processor(images=pictures, text=captions, padding=True, truncation=True, return_tensors="pt")
    output = model(**inputs)
    return inputs["pixel_values"], output.image_embeds, output.text_embeds
