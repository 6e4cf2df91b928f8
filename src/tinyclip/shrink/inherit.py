"""Weight inheritance by rule (the paper's "manual"): which layers, channels, heads and neurons the student keeps.

`choose(model, rule)` decides; `keep.take` cuts. Sizes are given outright (layers, width, ffn), or follow from
`keep_params`: then the image tower gets narrower and the text tower shallower, as in the published models, and the
FFN takes what is left of the budget. A ResNet is cut to the widest stock shape within it (`inherit_resnet.py`).
Source: Wu et al., "TinyCLIP", ICCV 2023, section 3.2.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tinyclip.config import Config
from tinyclip.model import (
    CLIP,
    Attention,
    Block,
    BlockConfig,
    FeedForward,
    ImageTower,
    OutputBias,
    TextTower,
    TowerConfig,
)
from tinyclip.model_resnet import FEATURES_PER_WIDTH, ResNetConfig, ResNetTower
from tinyclip.shrink.inherit_resnet import choose_resnet, picked
from tinyclip.shrink.keep import Keep, TowerKeep
from tinyclip.shrink.keep_resnet import ResNetKeep


class TowerRule(Config):
    """What one tower keeps; a size that is not given stays, or follows from the budget."""

    layers: int | tuple[int, ...] | None = Field(
        default=None, description="how many of the model's layers; of a ResNet four numbers, one for each stage"
    )
    width: int | None = Field(default=None, gt=0, description="channels; a multiple of the head size")
    ffn: int | None = Field(default=None, gt=0, description="neurons per block; a ResNet has none")
    layer_choice: Literal["even", "leading", "official"] | tuple[int, ...] = Field(
        default="even",
        description="even: spread from the first layer to the last; leading: the first ones; "
        "official: every floor(teacher / student)-th, as the official code; or a list of layers",
    )
    channels: Literal["leading", "largest"] = Field(
        default="leading", description="the first channels, heads and neurons, or those with the largest weights"
    )

    @model_validator(mode="after")
    def _one_way_to_say_layers(self) -> TowerRule:
        layers = (self.layers,) if isinstance(self.layers, int) else self.layers or ()
        if any(count < 1 for count in layers):
            raise ValueError(f"layers: expected at least 1, got {self.layers}")
        if isinstance(self.layer_choice, tuple) and (not self.layer_choice or not _ascend(self.layer_choice)):
            raise ValueError(f"layer_choice: expected layers in ascending order, got {list(self.layer_choice)}")
        if isinstance(self.layer_choice, tuple) and self.layers not in (None, len(self.layer_choice)):
            raise ValueError(f"layers is {self.layers}, but layer_choice lists {len(self.layer_choice)}")
        return self


def _ascend(layers: tuple[int, ...]) -> bool:
    return list(layers) == sorted(set(layers))


class Inherit(Config):
    kind: Literal["inherit"] = "inherit"
    keep_params: float | None = Field(
        default=None, gt=0, le=1, description="share of the starting model's prunable parameters (attention and FFN)"
    )
    image: TowerRule = TowerRule()
    text: TowerRule = TowerRule()
    embed_dim: int | None = Field(
        default=None,
        gt=0,
        description="channels of the joint embedding, the first ones as in the official code; else all",
    )


def choose(model: CLIP, rule: Inherit, budget_params: int | None = None) -> Keep:
    """The indices that `rule` keeps, of at most `budget_params` prunable parameters where that is given.

    Raises ValueError where the model is smaller than asked for, a width is not a multiple of the head size, or the
    budget is too small for the rule.
    """
    if rule.embed_dim is not None and rule.embed_dim > model.config.embed_dim:
        raise ValueError(f"embed_dim: expected at most {model.config.embed_dim} (the model's), got {rule.embed_dim}")
    share = None if budget_params is None else budget_params / model.config.prunable_params
    image, config = model.image, model.config.image
    if isinstance(image, ResNetTower) and isinstance(config, ResNetConfig):
        image_keep = _choose_resnet(image, config, rule.image, share)
    else:
        assert isinstance(image, ImageTower) and isinstance(config, TowerConfig), "a ViT, or a ResNet"
        image_keep = _choose_tower(image, config, _fit(config, rule.image, share, "image", vary="width"), "image")
    text = _fit(model.config.text, rule.text, share, "text", vary="layers")
    embed = None if rule.embed_dim is None else tuple(range(rule.embed_dim))
    return Keep(image=image_keep, text=_choose_tower(model.text, model.config.text, text, "text"), embed=embed)


def _choose_resnet(tower: ResNetTower, config: ResNetConfig, rule: TowerRule, share: float | None) -> ResNetKeep:
    """Without a width, but with a share of the prunable parameters: the widest tower within it."""
    there = tuple(len(stage) for stage in config.stages)
    layers = there if rule.layers is None else rule.layers
    if isinstance(layers, int) or len(layers) != len(there) or any(map(int.__gt__, layers, there)):
        raise ValueError(f"image layers: expected a number for each stage, at most {list(there)}, got {rule.layers}")
    if rule.ffn is not None or isinstance(rule.layer_choice, tuple):
        raise ValueError(
            "image: a ResNet takes layers, width, layer_choice (even, leading, official) and channels only"
        )
    blocks = [layer_map(rule.layer_choice, count, of) for count, of in zip(layers, there, strict=True)]

    def keep(width: int, channels: Literal["leading", "largest"] = "leading") -> ResNetKeep:
        return choose_resnet(tower, config, blocks=blocks, width=width, channels=channels)

    step = math.lcm(2 * FEATURES_PER_WIDTH, config.head_dim) // FEATURES_PER_WIDTH
    widths = [rule.width] if rule.width else range(step, config.width + 1, step)
    budget_params = config.prunable_params if share is None else int(share * config.prunable_params + 1e-6)
    count = bisect_left(widths, True, key=lambda width: keep(width).shrink(config).prunable_params > budget_params)
    if not count:
        smallest = keep(widths[0]).shrink(config).prunable_params
        raise ValueError(
            f"keep_params: the smallest image tower has {smallest} prunable parameters, not {budget_params}"
        )
    return keep(widths[count - 1], rule.channels)


def layer_map(choice: str | tuple[int, ...], layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher layer that each student layer inherits."""
    if isinstance(choice, tuple):
        return choice
    if choice == "leading":
        return tuple(range(layers))
    if choice == "official":
        step = teacher_layers // layers
        return tuple(range(0, layers * step, step))
    if layers == 1:
        return (0,)
    return tuple((2 * i * (teacher_layers - 1) + layers - 1) // (2 * (layers - 1)) for i in range(layers))  # rounded


class _Sizes(NamedTuple):
    """What a rule leaves of one tower, before it is decided which channels, heads and neurons those are."""

    layers: tuple[int, ...]  # of the model
    width: int
    blocks: tuple[BlockConfig, ...]

    def num_params(self, head_dim: int) -> int:
        return sum(block.num_params(self.width, head_dim) for block in self.blocks)


def _sizes(config: TowerConfig, rule: TowerRule, name: str) -> _Sizes:
    listed = len(rule.layer_choice) if isinstance(rule.layer_choice, tuple) else None
    if isinstance(rule.layers, tuple):
        raise ValueError(f"{name} layers: expected one number for a transformer, got {list(rule.layers)}")
    num_layers = rule.layers or listed or len(config.blocks)
    width = rule.width or config.width
    most_neurons = max(block.ffn for block in config.blocks)
    for what, asked, there in (
        ("layers", num_layers, len(config.blocks)),
        ("width", width, config.width),
        ("ffn", rule.ffn or 0, most_neurons),
    ):
        if asked > there:
            raise ValueError(f"{name} {what}: expected at most {there} (the model's), got {asked}")
    if rule.width and width % config.head_dim:
        raise ValueError(f"{name} width: expected a multiple of the head size {config.head_dim}, got {width}")
    layers = layer_map(rule.layer_choice, num_layers, len(config.blocks))
    for layer in layers:
        if not 0 <= layer < len(config.blocks):
            raise ValueError(f"{name} layer_choice: expected layers 0 to {len(config.blocks) - 1}, got {layer}")

    def block(there: BlockConfig) -> BlockConfig:
        """Without a size of its own the FFN shrinks with the width."""
        heads = min(there.heads, width // config.head_dim) if rule.width else there.heads
        return BlockConfig(heads=heads, ffn=min(there.ffn, rule.ffn or max(1, there.ffn * width // config.width)))

    return _Sizes(layers, width, tuple(block(config.blocks[layer]) for layer in layers))


def _choose_tower(tower: ImageTower | TextTower, config: TowerConfig, rule: TowerRule, name: str) -> TowerKeep:
    sizes = _sizes(config, rule, name)

    def pick(score: Callable[[], Tensor], count: int, size: int) -> tuple[int, ...]:
        return picked(rule.channels, score, count, size)

    heads, ffn = [], []
    for layer, kept in zip(sizes.layers, sizes.blocks, strict=True):
        block, there = tower.blocks[layer], config.blocks[layer]
        heads.append(pick(partial(head_scores, block), kept.heads, there.heads))
        ffn.append(pick(partial(neuron_scores, block), kept.ffn, there.ffn))
    return TowerKeep(
        blocks=sizes.layers,
        width=pick(partial(channel_scores, tower, sizes.layers), sizes.width, config.width),
        heads=tuple(heads),
        ffn=tuple(ffn),
    )


def _fit(
    config: TowerConfig, rule: TowerRule, share: float | None, name: str, vary: Literal["width", "layers"]
) -> TowerRule:
    """The rule with its sizes filled in: `share` of the tower's prunable parameters, less at most a neuron a block.

    Of all widths (or depths) that spend the budget, the one whose ratio of neurons to width changes least.
    """
    if share is None:
        return rule
    K, num_layers, most_neurons = config.head_dim, len(config.blocks), max(block.ffn for block in config.blocks)
    budget_params = int(share * config.prunable_params + 1e-6)
    widths: list[int | None] = [rule.width]
    depths: list[int | tuple[int, ...] | None] = [rule.layers]
    if vary == "width" and rule.width is None:
        widths += range(K, config.width, K)
    if vary == "layers" and rule.layers is None and not isinstance(rule.layer_choice, tuple):
        depths += range(1, num_layers)
    fits: list[tuple[int, float, TowerRule]] = []
    for width, layers in product(widths, depths):

        def sized(neurons: int, width: int | None = width, layers: int | tuple[int, ...] | None = layers) -> TowerRule:
            return rule.model_copy(update={"width": width, "layers": layers, "ffn": neurons})

        def unspent(neurons: int) -> int:
            return budget_params - _sizes(config, sized(neurons), name).num_params(K)

        def too_large(neurons: int) -> bool:
            return unspent(neurons) < 0

        candidates = [rule.ffn] if rule.ffn else range(1, most_neurons + 1)
        count = bisect_left(candidates, True, key=too_large)
        if count:
            neurons = candidates[count - 1]
            change = abs(math.log((neurons / most_neurons) / ((width or config.width) / config.width)))
            sizes = _sizes(config, sized(neurons), name)
            left, neuron_per_block = unspent(neurons), len(sizes.layers) * (2 * sizes.width + 1)
            wasted = left if left >= neuron_per_block else 0  # more than these blocks can hold
            fits.append((wasted, change, sized(neurons)))
    if not fits:
        raise ValueError(
            f"keep_params: no {name} tower of {num_layers} layers or fewer, width {config.width} or less and head "
            f"size {K} has at most {share:.1%} of {config.prunable_params} prunable parameters and a neuron per block"
        )
    return min(fits, key=lambda fit: fit[:2])[2]


@torch.no_grad()
def channel_scores(tower: ImageTower | TextTower, blocks: Iterable[int]) -> Tensor:
    """[D]: squared weights that write each channel of the residual stream."""
    embedding_XD = tower.patch.weight.T if isinstance(tower, ImageTower) else tower.token_embedding.weight
    score_D = embedding_XD.square().mean(0) + tower.position.square().mean(0)
    for index in blocks:
        attention, ffn = tower.blocks[index].attention, tower.blocks[index].ffn
        if isinstance(attention, Attention):
            score_D = score_D + attention.out.weight.square().sum(1)
        if isinstance(ffn, FeedForward):
            score_D = score_D + ffn.down.weight.square().sum(1)
    return score_D


@torch.no_grad()
def head_scores(block: Block) -> Tensor:
    """[H]: size of what each head can write, |values| x |outputs|."""
    attention = block.attention
    if isinstance(attention, OutputBias):
        return attention.bias.new_zeros(0)
    _, _, v_HKD = attention.qkv.weight.unflatten(0, (3, attention.heads, attention.head_dim)).unbind(0)
    out_DHK = attention.out.weight.unflatten(1, (attention.heads, attention.head_dim))
    return v_HKD.flatten(1).norm(dim=1) * out_DHK.transpose(0, 1).flatten(1).norm(dim=1)


@torch.no_grad()
def neuron_scores(block: Block) -> Tensor:
    """[F]: |what a neuron reads| x |what it writes|."""
    ffn = block.ffn
    if isinstance(ffn, OutputBias):
        return ffn.bias.new_zeros(0)
    return ffn.up.weight.norm(dim=1) * ffn.down.weight.norm(dim=0)
