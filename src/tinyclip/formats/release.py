"""The released TinyCLIP checkpoints -> a CLIP of exactly their size.

Their trainer wrapped each part on its own, so `visual.conv1.weight` is `_image_encoder.module.visual.conv1.weight` in
a manually inherited file and `image_encoder_without_ddp.visual.conv1.weight` in an automatically inherited one; a file
straight from the trainer holds both. Below the wrappers are the names of `formats/open_clip.py`. An automatic file was
pruned from a *dense* model, whose config is published; how many channels, heads and neurons are left is read from the
shapes. Source: wkcn/TinyCLIP, src/open_clip/model.py (`load_pruned_model`).

Shape legend: D width, H heads, K head dim, F FFN neurons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tinyclip.formats import weights
from tinyclip.formats.open_clip import from_open_clip
from tinyclip.formats.uniform import is_uniform
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, ImageConfig, TowerConfig

AUTOMATIC = "_without_ddp."  # in the names of a file that is pruned, or straight from the trainer
WRAPPER = re.compile(r"^_?(image_encoder|text_encoder|logit_scale)(_without_ddp)?\.(module\.)*")


def is_release(state_dict: Mapping[str, Tensor]) -> bool:
    return any(WRAPPER.match(name) for name in state_dict)


def from_release(
    state_dict: Mapping[str, Tensor],
    config: CLIPConfig,
    *,
    where: str = "state_dict",
    device: str | torch.device = "cpu",
) -> CLIP:
    """A CLIP from weights under the names of a release; `config` is the dense one where the file is pruned.

    A block without heads adds no attention bias: the files hold none. Raises ValueError, with `where`, unless every
    key fits.
    """
    state = plain(state_dict, where)
    sizes = pruned(config, state, where)
    if is_uniform(sizes) and not any(AUTOMATIC in name for name in state_dict):
        sizes = config  # a manual file was never pruned: where another config does not fit, the weights are named
    return from_open_clip(state, sizes, where=where, device=device)


def plain(state_dict: Mapping[str, Tensor], where: str = "state_dict") -> dict[str, Tensor]:
    """Open_clip's names. Raises ValueError where two wrapped names of one weight hold different values."""
    state: dict[str, Tensor] = {}
    for wrapped, tensor in state_dict.items():
        name = WRAPPER.sub("", wrapped).removeprefix("module.")
        if not _equal(state.setdefault(name, tensor), tensor):
            raise ValueError(f"{where}: {name} is there twice, with different values")
    return state


def pruned(dense: CLIPConfig, state: Mapping[str, Tensor], where: str = "state_dict") -> CLIPConfig:
    """The dense config with the widths, heads and neurons that the shapes say.

    Raises ValueError for shapes that pruning cannot leave.
    """
    image = dense.image
    if isinstance(image, ImageConfig):  # no ResNet was pruned
        image = _pruned_tower(image, state, "visual.transformer.resblocks", "visual.ln_post.weight", where)
    text = _pruned_tower(dense.text, state, "transformer.resblocks", "ln_final.weight", where)
    return dense.model_copy(update={"image": image, "text": text})


def _pruned_tower(
    dense: TowerConfig, state: Mapping[str, Tensor], blocks_at: str, norm: str, where: str
) -> TowerConfig:
    def units(name: str, rows_per_unit: int, at_most: int) -> int:
        """How many units a weight [units * rows_per_unit, D] has; none where it is gone."""
        if name not in state:
            return 0
        rows, _ = weights.shape(state, name, 2, where)
        if rows % rows_per_unit or not 0 < rows <= at_most * rows_per_unit:
            raise ValueError(f"{where}: {name}: expected 1 to {at_most} times {rows_per_unit} rows, got {rows}")
        return rows // rows_per_unit

    def block(index: int) -> BlockConfig:
        name, whole = f"{blocks_at}.{index}", dense.blocks[index]
        heads = units(f"{name}.attn.in_proj_weight", 3 * dense.head_dim, whole.heads)  # [3 H K, D]
        return BlockConfig(heads=heads, ffn=units(f"{name}.mlp.c_fc.weight", 1, whole.ffn))  # [F, D]

    (width,) = weights.shape(state, norm, 1, where)
    if not 0 < width <= dense.width:
        raise ValueError(f"{where}: {norm}: expected a width of 1 to {dense.width}, got {width}")
    blocks = [block(index) for index in range(len(dense.blocks))]
    while len(blocks) > 1 and blocks[-1] == BlockConfig(heads=0, ffn=0):
        blocks.pop()  # adds nothing
    return dense.model_copy(update={"width": width, "blocks": tuple(blocks)})


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
