"""What a student's ResNet image tower keeps by rule: blocks of each stage, and the channels of a narrower stock shape.

`inherit.choose` calls it. Source of the official rule (the first channels everywhere, a layer map per stage): Wu et
al., "TinyCLIP", ICCV 2023, and wkcn/TinyCLIP, src/open_clip/weight_inherit.py.

Shape legend: C channels, O written, I read, H heads, K head dim, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tinyclip.model_resnet import EXPANSION, AttentionPool, Bottleneck, ResNetConfig, ResNetTower
from tinyclip.shrink.keep_resnet import Indices, ResNetKeep


def choose_resnet(
    tower: ResNetTower,
    config: ResNetConfig,
    *,
    blocks: Sequence[Indices],
    width: int,
    channels: Literal["leading", "largest"],
) -> ResNetKeep:
    """The keep of a tower of `width`, with these blocks of each stage.

    Inner channels shrink with the width, at least one is left. Raises ValueError for a width that is larger, odd, or
    not a whole number of heads.
    """
    if width > config.width:
        raise ValueError(f"image width: expected at most {config.width} (the model's), got {width}")
    narrow = config.model_copy(update={"width": width})
    if width % 2 or narrow.num_features % config.head_dim:
        raise ValueError(f"image width: expected an even one, 32 x it in heads of {config.head_dim}, got {width}")

    def pick(score: Callable[[], Tensor], count: int, size: int) -> Indices:
        return picked(channels, score, count, size)

    def inner(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Indices:
        return pick(lambda: _scores(norm, conv), max(1, conv.out_channels * width // config.width), conv.out_channels)

    kept, last, stem = [], [], []
    for place, block in zip(config.blocks(), tower.blocks, strict=True):
        assert isinstance(block, Bottleneck)
        if place.index in blocks[place.stage]:
            kept.append(block)
        if place.index == blocks[place.stage][-1]:
            last.append(block)
    for conv, norm in ((tower.conv1, tower.bn1), (tower.conv2, tower.bn2), (tower.conv3, tower.bn3)):
        stem.append(inner(conv, norm))
    residual = []
    for stage, block in enumerate(last):
        size = config.stage_channels(stage)
        residual.append(pick(lambda block=block: _scores(block.bn3, block.conv3), width * EXPANSION * 2**stage, size))
    return ResNetKeep(
        stem=(stem[0], stem[1], stem[2]),
        channels=tuple(residual),
        heads=pick(lambda: _head_scores(tower.pool), narrow.heads, config.heads),
        blocks=tuple(blocks),
        conv1=tuple(inner(block.conv1, block.bn1) for block in kept),
        conv2=tuple(inner(block.conv2, block.bn2) for block in kept),
    )


def picked(channels: Literal["leading", "largest"], score: Callable[[], Tensor], count: int, size: int) -> Indices:
    """`count` of `size` indices: the first, or those with the largest scores, which are looked at only then."""
    if channels == "leading" or count == size:
        return tuple(range(count))
    return tuple(sorted(score().topk(count).indices.tolist()))


@torch.no_grad()
def _scores(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> Tensor:
    """[O]: how far BatchNorm lets a channel vary; the convolution's own size says nothing before a normalisation.

    Ties, as in a last BatchNorm that starts at zero, are broken by the convolution's size.
    """
    return norm.weight.abs() + 1e-6 * conv.weight.flatten(1).norm(dim=1)


@torch.no_grad()
def _head_scores(pool: AttentionPool) -> Tensor:
    """[H]: size of the values that a head hands on."""
    return pool.value.weight.unflatten(0, (-1, pool.head_dim)).flatten(1).norm(dim=1)
