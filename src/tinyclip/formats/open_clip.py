"""open_clip's models (and OpenAI's, which have the same names): configs, weights, pretrained downloads.

The only file that imports open_clip, and only where a pretrained model is asked for.

A Vision Transformer's names are a table; a ResNet's blocks, numbered through here, are numbered by stage there.

Shape legend: D width, E embedding, P patch side.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from tinyclip.formats import huggingface, weights
from tinyclip.formats.files import is_there, read_json, validated, write_json
from tinyclip.formats.provenance import entry, read_provenance
from tinyclip.formats.uniform import why_not
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, ImageConfig, TextConfig, TowerConfig
from tinyclip.model_resnet import ResNetConfig
from tinyclip.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from tinyclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

BLOCK_TABLE = {
    "attention.norm.weight": "ln_1.weight",
    "attention.norm.bias": "ln_1.bias",
    "attention.qkv.weight": "attn.in_proj_weight",
    "attention.qkv.bias": "attn.in_proj_bias",
    "attention.out.weight": "attn.out_proj.weight",
    "attention.out.bias": "attn.out_proj.bias",
    "ffn.norm.weight": "ln_2.weight",
    "ffn.norm.bias": "ln_2.bias",
    "ffn.up.weight": "mlp.c_fc.weight",
    "ffn.up.bias": "mlp.c_fc.bias",
    "ffn.down.weight": "mlp.c_proj.weight",
    "ffn.down.bias": "mlp.c_proj.bias",
}
TABLE = {  # our name: theirs; * is a block's number
    "logit_scale": "logit_scale",
    "image.class_embedding": "visual.class_embedding",
    "image.position": "visual.positional_embedding",
    "image.patch.weight": "visual.conv1.weight",  # [D, 3 P P] here, [D, 3, P, P] there
    "image.norm_pre.weight": "visual.ln_pre.weight",
    "image.norm_pre.bias": "visual.ln_pre.bias",
    "image.norm_post.weight": "visual.ln_post.weight",
    "image.norm_post.bias": "visual.ln_post.bias",
    "image.projection.weight": "visual.proj",  # [E, D] here, [D, E] there
    "text.token_embedding.weight": "token_embedding.weight",
    "text.position": "positional_embedding",
    "text.norm_final.weight": "ln_final.weight",
    "text.norm_final.bias": "ln_final.bias",
    "text.projection.weight": "text_projection",  # [E, D] here, [D, E] there
    **{f"image.blocks.*.{ours}": f"visual.transformer.resblocks.*.{theirs}" for ours, theirs in BLOCK_TABLE.items()},
    **{f"text.blocks.*.{ours}": f"transformer.resblocks.*.{theirs}" for ours, theirs in BLOCK_TABLE.items()},
}
RESNET_TABLE = {  # our parts of a ResNet: theirs; the rest of a name is the same
    "image.pool.position": "visual.attnpool.positional_embedding",
    "image.pool.query": "visual.attnpool.q_proj",
    "image.pool.key": "visual.attnpool.k_proj",
    "image.pool.value": "visual.attnpool.v_proj",
    "image.projection": "visual.attnpool.c_proj",
    **{f"image.{layer}{number}": f"visual.{layer}{number}" for layer in ("conv", "bn") for number in (1, 2, 3)},
}
SHORTCUT_TABLE = {"shortcut.conv": "downsample.0", "shortcut.bn": "downsample.1"}
LOST_BRANCH = (".attention.bias", ".ffn.bias")  # ours of a block without heads or neurons
NOT_WEIGHTS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}  # buffers of OpenAI's archives

# Fields of open_clip's configs that only act in training, or together with a field that is refused.
WITHOUT_EFFECT = {
    *("custom_text", "init_logit_scale", "nonscalar_logit_scale", "patch_dropout"),
    *("attn_pooler_queries", "attn_pooler_heads", "pad_id", "eos_id"),
    "use_pad_mask",  # padding comes after the end token, which a causal tower keeps from seeing it anyhow
    *("timm_pool", "timm_proj", "timm_drop", "timm_drop_path", "timm_model_pretrained"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}
ORDINARY = {"pos_embed_type": "learnable", "proj_type": "linear", "block_type": "default"}  # else: None, False, 0, {}


PREFIXES = ("open_clip:", "hf-hub:", "local-dir:")  # of names that open_clip resolves
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"  # of a local-dir
OTHER_WEIGHTS_FILES = [  # in the order in which open_clip looks for them; after these, any other
    *(f"open_clip_pytorch_model.{ending}" for ending in ("safetensors", "bin", "pth")),
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
]
TOKENIZER_FILE = "tokenizer.json"


class TeachOnly(ValueError):
    """A model of open_clip that our towers cannot express: it can teach, its weights cannot be inherited."""


def _side(value: Any) -> Any:
    """[224, 224] -> 224."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1] else value


class _Section(BaseModel):
    """The fields we read, at open_clip's defaults; `model_extra` holds the others."""

    model_config = ConfigDict(extra="allow")


Layers = Annotated[int, Field(gt=0, le=1024)]


class _Vision(_Section):
    width: int = Field(768, gt=0, le=65536)
    layers: Layers | tuple[Layers, Layers, Layers, Layers] = 12  # of a ResNet blocks per stage
    head_width: int = Field(64, gt=0)
    mlp_ratio: float = Field(4.0, gt=0, le=1024)
    patch_size: Annotated[int | None, BeforeValidator(_side)] = 16  # a ResNet has none
    image_size: Annotated[int, BeforeValidator(_side)] = 224
    norm_kwargs: dict[str, float] | None = None
    pool_type: Literal["tok"] = "tok"


class _Text(_Section):
    width: int = Field(512, gt=0, le=65536)
    layers: Layers = 12
    heads: int = Field(8, gt=0)
    mlp_ratio: float = Field(4.0, gt=0, le=1024)
    context_length: int = 77
    vocab_size: int = 49408
    norm_kwargs: dict[str, float] | None = None
    pool_type: Literal["argmax"] = "argmax"


class _Model(_Section):
    embed_dim: int
    quick_gelu: bool = False
    vision_cfg: _Vision
    text_cfg: _Text


def _thrice(value: Any) -> Any:
    """One number for all three colours."""
    return [value] * 3 if isinstance(value, int | float) else value


PerColour = Annotated[tuple[float, float, float], BeforeValidator(_thrice)]


class _PreprocessCfg(_Section):
    size: Annotated[int, BeforeValidator(_side)]
    mode: Literal["RGB"] = "RGB"
    mean: PerColour = OPENAI_MEAN
    std: PerColour = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"  # "random" is for training: else bicubic
    resize_mode: Literal["shortest", "squash"] = "shortest"  # "longest" leaves borders, of `fill_color`


def config_from_open_clip(model_cfg: Mapping[str, Any], where: str | None = None) -> CLIPConfig:
    """Raises TeachOnly, naming `where` and the field, where our towers lack something or a value is not one."""
    try:
        return _config(model_cfg)
    except TeachOnly as error:
        raise error if where is None else TeachOnly(f"{where}: {error}") from None


def _config(model_cfg: Mapping[str, Any]) -> CLIPConfig:
    try:
        model = _Model.model_validate(model_cfg)
        vision, text = model.vision_cfg, model.text_cfg
        _refuse_others(model, "")
        _refuse_others(vision, "vision_cfg.")
        _refuse_others(text, "text_cfg.")
        norm, is_resnet = text.norm_kwargs or {}, isinstance(vision.layers, tuple)
        if not is_resnet and (vision.norm_kwargs or {}) != norm:  # open_clip's ResNets have no LayerNorm
            got = f"{vision.norm_kwargs} and {text.norm_kwargs}"
            raise TeachOnly(f"open_clip's norm_kwargs: expected one for both towers, got {got}")
        return CLIPConfig(
            embed_dim=model.embed_dim,
            activation="quick_gelu" if model.quick_gelu else "gelu",
            **({"norm_eps": norm["eps"]} if norm else {}),
            image=_image(vision),
            text=TextConfig(
                **_tower("text_cfg", text, text.heads), context_length=text.context_length, vocab_size=text.vocab_size
            ),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if not field:  # the sizes of an image tower do not go together
            raise TeachOnly(f"open_clip's vision_cfg: {first['msg'].removeprefix('Value error, ')}") from None
        raise TeachOnly(f"open_clip's {field}: {first['msg']}, got {first['input']!r:.80}") from None


def _image(vision: _Vision) -> ImageConfig | ResNetConfig:
    if isinstance(vision.layers, tuple):
        return ResNetConfig.uniform(
            image_size=vision.image_size, width=vision.width, layers=vision.layers, head_dim=vision.head_width
        )
    if vision.patch_size is None:
        raise TeachOnly(f"open_clip's vision_cfg.patch_size: expected one for {vision.layers} layers, got none")
    tower = _tower("vision_cfg", vision, vision.width // vision.head_width)
    return ImageConfig(**tower, image_size=vision.image_size, patch_size=vision.patch_size)


def _tower(name: str, section: _Vision | _Text, heads: int) -> dict[str, Any]:
    if heads < 1 or section.width % heads:
        raise TeachOnly(f"open_clip's {name}.width: expected a multiple of {heads} heads, got {section.width}")
    block = BlockConfig(heads=heads, ffn=int(section.width * section.mlp_ratio))
    assert isinstance(section.layers, int), "a transformer"
    return {"width": section.width, "head_dim": section.width // heads, "blocks": (block,) * section.layers}


def _refuse_others(section: _Section, prefix: str) -> None:
    for name, value in (section.model_extra or {}).items():
        if value and name not in WITHOUT_EFFECT and ORDINARY.get(name) != value:
            raise TeachOnly(f"open_clip's {prefix}{name}={value!r:.80} has no counterpart in our towers")
    kwargs = getattr(section, "norm_kwargs", None)
    if kwargs and kwargs.keys() != {"eps"}:
        raise TeachOnly(f"open_clip's {prefix}norm_kwargs: expected eps alone, got {kwargs}")


def config_to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    """open_clip's model config. Raises ValueError for a student that open_clip cannot describe."""
    image, text = config.image, config.text
    norm = {} if config.norm_eps == 1e-5 else {"norm_kwargs": {"eps": config.norm_eps}}
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": _vision_cfg(image, norm),
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "heads": text.blocks[0].heads,
            **_uniform("text", text),
            **norm,
        },
    }


def _vision_cfg(image: ImageConfig | ResNetConfig, norm: dict[str, Any]) -> dict[str, Any]:
    sizes = {"image_size": image.image_size, "head_width": image.head_dim}
    if isinstance(image, ImageConfig):
        return {**sizes, "patch_size": image.patch_size, **_uniform("image", image), **norm}
    if reason := why_not(image):
        raise ValueError(f"open_clip's ResNets have stages all alike: {reason}; pad it, or export to huggingface")
    return {**sizes, "patch_size": None, "width": image.width, "layers": [len(blocks) for blocks in image.stages]}


def _uniform(name: str, tower: TowerConfig) -> dict[str, Any]:
    if reason := why_not(tower):
        raise ValueError(
            f"open_clip's blocks are all alike, with heads x head size = width; those of the {name} tower are not: "
            f"{reason}; pad it, or export to huggingface"
        )
    ffn = tower.blocks[0].ffn
    ratio = ffn / tower.width  # open_clip cuts width x ratio down to a whole number
    if int(tower.width * ratio) != ffn:
        ratio = (ffn + 0.5) / tower.width
    return {"width": tower.width, "layers": len(tower.blocks), "mlp_ratio": ratio}


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """The weights in open_clip's names and layouts. Raises ValueError for a block without heads or neurons."""
    return _theirs(model.state_dict(), model.config)


def from_open_clip(
    state_dict: Mapping[str, Tensor],
    config: CLIPConfig,
    *,
    where: str = "state_dict",
    device: str | torch.device = "cpu",
) -> CLIP:
    """A CLIP from weights in OpenAI's and open_clip's names. Raises ValueError, with `where`, unless every key fits.

    A block of the config without heads or neurons has no keys, and adds nothing: its output bias is zero.
    """
    model = weights.on_meta(config, where)
    state = _plain(state_dict)
    lost = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(LOST_BRANCH)}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in lost}
    weights.check(state, _theirs(kept, config), where)

    def ours(name: str) -> Tensor:
        tensor = state[_their_name(name, config)]
        if name == "image.patch.weight":
            return tensor.flatten(1)
        return tensor.T.contiguous() if _is_transposed(name, config) else tensor

    zeros = {name: torch.zeros(tensor.shape) for name, tensor in lost.items()}
    return weights.fill(model, {name: ours(name) for name in kept} | zeros, device)


def _theirs(ours: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    def theirs(name: str, tensor: Tensor) -> Tensor:
        if name == "image.patch.weight":
            assert isinstance(config.image, ImageConfig), f"{name} in a ResNet"
            side = config.image.patch_size
            return tensor.unflatten(1, (3, side, side))
        return tensor.T.contiguous() if _is_transposed(name, config) else tensor

    return {_their_name(name, config): theirs(name, tensor) for name, tensor in ours.items()}


def _is_transposed(ours: str, config: CLIPConfig) -> bool:
    """Projections are bare matrices there; that of a ResNet is a linear layer in both."""
    is_resnet = isinstance(config.image, ResNetConfig)
    return ours == "text.projection.weight" or (ours == "image.projection.weight" and not is_resnet)


def has_their_names(state_dict: Mapping[str, Tensor]) -> bool:
    return any(name.removeprefix("module.").startswith("visual.") for name in state_dict)


def _their_name(ours: str, config: CLIPConfig) -> str:
    if not (isinstance(config.image, ResNetConfig) and ours.startswith("image.")):
        return weights.their_name(ours, TABLE, "open_clip")
    if ours.startswith("image.blocks."):
        number, _, rest = ours.removeprefix("image.blocks.").partition(".")
        place = list(config.image.blocks())[int(number)]
        part, _, tensor = rest.rpartition(".")
        return f"visual.layer{place.stage + 1}.{place.index}.{SHORTCUT_TABLE.get(part, part)}.{tensor}"
    part, _, tensor = ours.rpartition(".")
    return RESNET_TABLE[ours] if ours in RESNET_TABLE else f"{RESNET_TABLE[part]}.{tensor}"


def _plain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo what wrappers add: DistributedDataParallel's "module.", CustomTextCLIP's "text.", a scale in a vector."""
    state = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    if "text.token_embedding.weight" in state:
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in NOT_WEIGHTS}


class Pretrained(NamedTuple):
    """A model as open_clip loads it, and how it reads pictures and captions."""

    model: Any  # an nn.Module in evaluation mode
    model_cfg: dict[str, Any]
    preprocess: Preprocess
    tokenizer: Callable[[Sequence[str]], Tensor]


def load_pretrained(name: str) -> Pretrained:
    """`ARCHITECTURE/TAG` or `ARCHITECTURE/FILE` of open_clip, `hf-hub:ORGANISATION/MODEL`, or `local-dir:DIRECTORY`.

    Raises ValueError, one line, where open_clip cannot load it or its weights are known to need the other activation.
    """
    import open_clip

    if name.startswith((open_clip.factory.HF_HUB_PREFIX, open_clip.factory.LOCAL_DIR_PREFIX)):
        architecture, weights_from = name, None
    else:
        architecture, _, weights_from = name.partition("/")
        _check_choice(architecture, weights_from)
    logging.disable(logging.ERROR)  # open_clip talks on the root logger; what matters it also raises
    try:
        model: Any = open_clip.create_model(architecture, weights_from, require_pretrained=True).eval()
        model_cfg: Any = open_clip.get_model_config(architecture)
        tokenizer: Any = open_clip.get_tokenizer(architecture)
    except Exception as error:  # whatever the hub, the file or the architecture's own library raises
        raise ValueError(f"open_clip could not load {name}: {weights.first_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)
    weights.check_finite({key: value for key, value in model.state_dict().items() if value.is_floating_point()}, name)
    is_clip_bpe = isinstance(tokenizer, open_clip.SimpleTokenizer) and not model_cfg["text_cfg"].get("tokenizer_kwargs")
    reader: Any = Tokenizer.openai(model.context_length) if is_clip_bpe else tokenizer
    return Pretrained(model, model_cfg, _preprocess(model.visual.preprocess_cfg, name), reader)


def refuse_addresses(directory: Path) -> None:
    """Raises ValueError for a local-dir whose towers open_clip would look for on the Hugging Face hub."""
    file = directory / CONFIG_FILE
    model_cfg = read_json(file).get("model_cfg") if file.is_file() else None
    sections = [model_cfg.get(name) for name in ("text_cfg", "vision_cfg")] if isinstance(model_cfg, dict) else []
    for section in (section for section in sections if isinstance(section, dict)):
        for field in ("hf_model_name", "timm_model_name"):
            name = section.get(field)
            if name and (field == "hf_model_name" or ":" in str(name)):  # timm has models of its own
                raise ValueError(f"{file}: {field}: {name} would be fetched from the hub; --allow-remote does so")


def on_the_hub(name: str) -> str | None:
    """The hub's name of `ARCHITECTURE/TAG`, where open_clip downloads it from there."""
    import open_clip

    architecture, _, tag = name.partition("/")
    hub = (open_clip.get_pretrained_cfg(architecture, tag) or {}).get("hf_hub", "")
    return "/".join(hub.split("/")[:2]) or None


def meant(name: str) -> list[str]:
    """What `name`, without the prefix, may mean: an architecture with weights that fit it, the most used ones first.

    ViT-B-32/openai, which was trained with the other activation, means ViT-B-32-quickgelu/openai; ViT-B/32 is how
    OpenAI writes ViT-B-32. open_clip itself is asked only for the weights of an architecture that it has.
    """
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return []
    configs = Path(package.submodule_search_locations[0]) / "model_configs"
    known = sorted(path.stem for path in configs.glob("*.json"))
    architecture, _, tag = name.partition("/")
    if name.replace("/", "-") in known:
        architecture, tag = name.replace("/", "-"), ""
    if architecture not in known:
        lower = {one.lower(): one for one in known}
        close = [lower[one] for one in difflib.get_close_matches(architecture.lower(), lower, n=2, cutoff=0.8)]
        return [f"open_clip:{one}/{tag or 'TAG'}" for one in close]
    import open_clip

    twins = dict.fromkeys([architecture, architecture.removesuffix("-quickgelu") + "-quickgelu"])
    fitting = [
        (one, weights)
        for one in twins
        if one in known
        for weights in open_clip.list_pretrained_tags_by_model(one)
        if _trained_and_computed(one, weights)[0] == _trained_and_computed(one, weights)[1]
    ]
    wanted = [(one, weights) for one, weights in fitting if weights == tag] or sorted(
        fitting, key=lambda pair: (pair[1] != "openai", not pair[1].startswith(("laion2b", "datacomp_xl")))
    )
    return [f"open_clip:{one}/{weights}" for one, weights in wanted[:3]] or [f"open_clip:{architecture}/FILE"]


def to_open_clip_dir(model: CLIP, directory: Path) -> None:
    """Write what open_clip loads as local-dir:DIRECTORY, into a directory that is there.

    A vocabulary that is not CLIP's own comes along, and open_clip reads it with transformers. Raises ValueError for a
    model that open_clip cannot describe.
    """
    assert model.preprocess is not None and model.tokenizer is not None, "checked by export"
    preprocess, model_cfg = model.preprocess, config_to_open_clip(model.config)
    if model.tokenizer != Tokenizer.openai(model.config.text.context_length):
        model_cfg["text_cfg"]["hf_tokenizer_name"] = TOKENIZER_FILE  # any name: it is looked for in the directory
        huggingface.write_tokenizer(model.tokenizer, directory)
    preprocess_cfg = {
        "mean": preprocess.mean,
        "std": preprocess.std,
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize,
    }
    settings = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg, **entry(model.provenance)}
    write_json(directory / CONFIG_FILE, settings)
    weights.write(to_open_clip(model), directory / WEIGHTS_FILE)


def is_theirs(directory: Path) -> bool:
    return is_there(directory / CONFIG_FILE)


def from_open_clip_dir(directory: Path, device: str | torch.device = "cpu") -> CLIP:
    """A CLIP from open_clip's local-dir, read without open_clip; with its preprocessing, tokenizer and provenance.

    Raises ValueError for a damaged directory, and TeachOnly where our towers or tokenizer lack something.
    """
    settings = read_json(directory / CONFIG_FILE)
    model_cfg, where = settings.get("model_cfg"), f"{directory / CONFIG_FILE}"
    if not isinstance(model_cfg, dict) or not isinstance(model_cfg.get("text_cfg"), dict):
        raise ValueError(f"{where}: expected model_cfg with a text_cfg")
    own_vocabulary = bool(model_cfg["text_cfg"].get("hf_tokenizer_name"))  # whatever the name, it is in the directory
    if own_vocabulary:
        text_cfg = {name: value for name, value in model_cfg["text_cfg"].items() if name != "hf_tokenizer_name"}
        model_cfg = {**model_cfg, "text_cfg": text_cfg}
    config, file = config_from_open_clip(model_cfg, where), _weights_file(directory)
    model = from_open_clip(weights.read(file, config), config, where=str(file), device=device)
    preprocess_cfg = settings.get("preprocess_cfg") or {}
    if not isinstance(preprocess_cfg, dict):
        raise ValueError(f"{where}: preprocess_cfg: expected an object, got {type(preprocess_cfg).__name__}")
    model.preprocess = _preprocess({**preprocess_cfg, "size": config.image.image_size}, where)
    if own_vocabulary:
        model.tokenizer = huggingface.read_tokenizer(directory, config.text)
        if model.tokenizer is None:
            raise FileNotFoundError(f"{directory / TOKENIZER_FILE}: expected the vocabulary that the config names")
    elif config.text.vocab_size == len(Tokenizer.openai(config.text.context_length).tokens):
        model.tokenizer = Tokenizer.openai(config.text.context_length)
    model.provenance = read_provenance(settings, where)
    return model


def _weights_file(directory: Path) -> Path:
    """The file that open_clip would take: by name, else the first of any name, safetensors before the others."""
    named = [directory / name for name in (WEIGHTS_FILE, *OTHER_WEIGHTS_FILES)]
    other = (path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin", ".pth"))
    other = sorted(other, key=lambda path: (path.suffix != ".safetensors", path))
    return next((path for path in [*named, *other] if is_there(path)), named[0])


@torch.no_grad()
def stock_features(
    directory: Path, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What open_clip makes of a directory: pixels [B, 3, S, S], unit features [B, E] of both, logits [B, B]."""
    import open_clip

    name = f"local-dir:{directory}"
    loaded: Any = open_clip.create_model_from_pretrained(name)
    model, transform = loaded
    pixels_BCHW = torch.stack([transform(picture) for picture in pictures])
    tokens_BL = open_clip.get_tokenizer(name)(list(captions))
    model.eval()
    image_BE, text_BE = model.encode_image(pixels_BCHW, normalize=True), model.encode_text(tokens_BL, normalize=True)
    return pixels_BCHW, image_BE, text_BE, model.get_logits(pixels_BCHW, tokens_BL)[0]


def _check_choice(architecture: str, weights_from: str) -> None:
    """Refuse, before anything is downloaded, what open_clip does not have and an activation that does not fit."""
    import open_clip

    known = open_clip.list_models()
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3, cutoff=0.4)
        raise ValueError(f"open_clip has no architecture {architecture!r}; close: {', '.join(close) or 'none'}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights_from not in tags and not Path(weights_from).is_file():
        raise ValueError(
            f"{architecture}: expected weights as {architecture}/TAG or {architecture}/FILE, got {weights_from!r}; "
            f"tags: {', '.join(tags) or 'none'}"
        )
    trained, computed = _trained_and_computed(architecture, weights_from)
    if weights_from in tags and trained != computed:
        names = {True: "x*sigmoid(1.702x)", False: "GELU"}
        twin = architecture.removesuffix("-quickgelu") + ("-quickgelu" if trained else "")
        advice = f"; use {twin}/{weights_from}" if twin in known and twin != architecture else ""
        raise ValueError(
            f"{weights_from} was trained with {names[trained]}, but {architecture} computes {names[computed]}{advice}"
        )


def _trained_and_computed(architecture: str, tag: str) -> tuple[bool, bool]:
    """Whether the weights were trained with x*sigmoid(1.702x), and whether the architecture computes that."""
    import open_clip

    cfgs = open_clip.get_pretrained_cfg(architecture, tag), open_clip.get_model_config(architecture)
    trained, computed = (bool((cfg or {}).get("quick_gelu", False)) for cfg in cfgs)
    return trained, computed


def _preprocess(cfg: Mapping[str, Any], where: str) -> Preprocess:
    """What is false or null there is a default. Raises ValueError for pictures that are not square or have borders."""
    size, resize = cfg["size"], cfg.get("resize_mode")
    if not isinstance(_side(size), int) or resize == "longest":
        raise ValueError(f"{where}: expected square pictures without borders, got size {size}, resize {resize!r}")
    found = validated(_PreprocessCfg, {name: value for name, value in cfg.items() if value}, f"{where}: preprocess_cfg")
    ours = {
        "size": found.size,
        "mean": found.mean,
        "std": found.std,
        "interpolation": "bilinear" if found.interpolation == "bilinear" else "bicubic",
        "resize": found.resize_mode,
    }
    return validated(Preprocess, ours, f"{where}: preprocess_cfg")
