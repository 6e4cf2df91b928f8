"""OpenAI's own checkpoints: a TorchScript archive, or the state dict of one, that says by its shapes what it is.

Weights have the names of `formats/open_clip.py`. Rules for the config: `build_model` of openai/CLIP, clip/model.py.

Shape legend: D width, E embedding, P patch side, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from tinyclip.formats import weights
from tinyclip.formats.open_clip import from_open_clip
from tinyclip.model import CLIP, CLIPConfig
from tinyclip.model_resnet import NUM_STAGES, SHRINKAGE
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

HEAD_DIM = 64
ATTENTION = "transformer.resblocks.{}.attn.in_proj_weight"
VOCAB_SIZE = 49408  # of CLIP's tokenizer
SIGNATURE = {"input_resolution", "context_length", "vocab_size"}  # integers that only these files hold


def is_openai(state_dict: Mapping[str, Tensor]) -> bool:
    return state_dict.keys() >= SIGNATURE


def config_from_openai(state_dict: Mapping[str, Tensor], where: str = "state_dict") -> CLIPConfig:
    """The config that the shapes say; all of OpenAI's models have heads of 64 and QuickGELU.

    Raises ValueError, with `where`, for a ResNet tower and for shapes that are not a CLIP's.
    """

    def shape(name: str, num_dims: int) -> tuple[int, ...]:
        return weights.shape(state_dict, name, num_dims, where)

    is_resnet = "visual.layer1.0.conv1.weight" in state_dict
    if is_resnet:
        image_width, patch_size = shape("visual.layer1.0.conv1.weight", 4)[0], None
        num_tokens, _ = shape("visual.attnpool.positional_embedding", 2)  # [L, D]
    else:
        image_width, _, _, patch_size = shape("visual.conv1.weight", 4)  # [D, 3, P, P]
        num_tokens, _ = shape("visual.positional_embedding", 2)  # [L, D]
    vocab_size, text_width = shape("token_embedding.weight", 2)  # [V, D]
    side = round((num_tokens - 1) ** 0.5) if num_tokens else 0  # of the picture, in patches or cells of the last grid
    try:
        config = CLIPConfig.uniform(
            embed_dim=shape("text_projection", 2)[1],  # [D, E]
            image_size=(patch_size or SHRINKAGE) * side,
            patch_size=patch_size,
            image_width=image_width,
            image_layers=_stages(state_dict) if is_resnet else _num_blocks(state_dict, f"visual.{ATTENTION}"),
            text_width=text_width,
            text_layers=_num_blocks(state_dict, ATTENTION),
            context_length=shape("positional_embedding", 2)[0],  # [L, D]
            vocab_size=vocab_size,
            head_dim=HEAD_DIM,
            activation="quick_gelu",
        )
    except ValidationError as error:
        raise ValueError(f"{where}: not a CLIP: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{where}: not a CLIP: {error}") from None
    said = [state_dict[name].tolist() for name in ("input_resolution", "context_length", "vocab_size")]
    expected = [config.image.image_size, config.text.context_length, config.text.vocab_size]
    if said != expected:
        raise ValueError(f"{where}: expected picture side, context length and vocabulary {expected}, got {said}")
    return config


def from_openai(
    state_dict: Mapping[str, Tensor], *, where: str = "state_dict", device: str | torch.device = "cpu"
) -> CLIP:
    """A CLIP with its preprocessing and tokenizer. Raises ValueError, with `where`, unless every key fits."""
    config = config_from_openai(state_dict, where)
    return with_openai_reader(from_open_clip(state_dict, config, where=where, device=device))


def with_openai_reader(model: CLIP) -> CLIP:
    """Give the model OpenAI's preprocessing and, where its vocabulary has CLIP's size, CLIP's tokenizer."""
    model.preprocess = Preprocess(size=model.config.image.image_size)
    if model.config.text.vocab_size == VOCAB_SIZE:
        model.tokenizer = Tokenizer.openai(model.config.text.context_length)
    return model


def _stages(state_dict: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(_num_blocks(state_dict, f"visual.layer{stage + 1}.{{}}.conv1.weight") for stage in range(NUM_STAGES))


def _num_blocks(state_dict: Mapping[str, Tensor], name: str) -> int:
    """As many as there are names; one with a number out of order is missed and refused with its name later."""
    return next(count for count in range(len(state_dict) + 1) if name.format(count) not in state_dict)
