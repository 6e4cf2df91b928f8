"""The other image tower: CLIP's modified ResNet, of the paper's ResNet students and of OpenAI's RN50 to RN50x64.

Three stem convolutions instead of one, average pooling before every strided convolution, and attention instead of an
average over the last grid. Equal to open_clip's class, which is not used itself: here every block says how many
channels its inner convolutions write, and can be gated. Source: Radford et al. 2021, section 2.4.

A block's two inner convolutions, 1x1 and 3x3, have gates on the channels that they write (`ResNetGates`). The residual
stream has none: every block of a stage shares it.

Shape legend: B pictures, C channels, S side, D features = 32 x width, L positions of the last grid and their mean,
H heads, K head dim, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinyclip.config import Config

NUM_STAGES = 4
EXPANSION = 4  # a block writes 4 x its stage's planes
SHRINKAGE = 32  # of the side, from the picture to the last grid
FEATURES_PER_WIDTH = EXPANSION * 2 ** (NUM_STAGES - 1)  # of the last grid: 32


class BottleneckConfig(Config):
    """One residual block: channels that the 1x1 and the 3x3 convolution write, for the last 1x1 to read."""

    conv1: int = Field(gt=0, le=65536)
    conv2: int = Field(gt=0, le=65536)

    def num_params(self, channels_in: int, channels_out: int) -> int:
        """Of the three convolutions and their BatchNorms: what inheritance and gates remove from a ResNet."""
        first = self.conv1 * (channels_in + 2)
        second = self.conv2 * (9 * self.conv1 + 2)
        return first + second + channels_out * (self.conv2 + 2)


class ResNetConfig(Config):
    image_size: int = Field(gt=0, le=16384, description="a multiple of 32")
    width: int = Field(gt=0, le=8192, description="channels after the stem; stage s writes width x 4 x 2^s")
    head_dim: int = Field(default=64, gt=0, le=65536, description="of the attention pool, over 32 x width features")
    stages: tuple[tuple[BottleneckConfig, ...], ...] = Field(min_length=NUM_STAGES, max_length=NUM_STAGES)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.image_size % SHRINKAGE:
            raise ValueError(f"image_size: expected a multiple of {SHRINKAGE}, got {self.image_size}")
        if self.width % 2 or self.num_features % self.head_dim:
            raise ValueError(f"width: expected an even one, 32 x it in heads of {self.head_dim}, got {self.width}")
        if not all(0 < len(blocks) <= 1024 for blocks in self.stages):
            raise ValueError(f"stages: expected 1 to 1024 blocks each, got {[len(blocks) for blocks in self.stages]}")
        return self

    @classmethod
    def uniform(cls, *, image_size: int, width: int, layers: tuple[int, ...], head_dim: int = 64) -> ResNetConfig:
        """The stock shape: in stage s every inner convolution writes width x 2^s channels."""
        stages = tuple((stock_block(width, stage),) * count for stage, count in enumerate(layers))
        return cls(image_size=image_size, width=width, head_dim=head_dim, stages=stages)

    @property
    def num_features(self) -> int:
        return self.stage_channels(NUM_STAGES - 1)

    @property
    def heads(self) -> int:
        return self.num_features // self.head_dim

    @property
    def num_tokens(self) -> int:
        return (self.image_size // SHRINKAGE) ** 2 + 1  # + their mean

    def stage_channels(self, stage: int) -> int:
        """Channels of the residual stream that stage 0 to 3 writes."""
        return self.width * EXPANSION * 2**stage

    def blocks(self) -> Iterator[Place]:
        """Every block in order, with what surrounds it."""
        channels_in = self.width
        for stage, blocks in enumerate(self.stages):
            for index, block in enumerate(blocks):
                channels_out = self.stage_channels(stage)
                yield Place(stage, index, block, channels_in, channels_out)
                channels_in = channels_out

    @property
    def prunable_params(self) -> int:
        """Convolutions and BatchNorms of every block's branch; not the stem, the shortcuts or the attention pool."""
        return sum(at.block.num_params(at.channels_in, at.channels_out) for at in self.blocks())


class Place(NamedTuple):
    """A block, and where it is."""

    stage: int
    index: int
    block: BottleneckConfig
    channels_in: int
    channels_out: int

    @property
    def stride(self) -> int:
        """Of the block's average pooling."""
        return 2 if self.index == 0 and self.stage > 0 else 1

    @property
    def has_shortcut(self) -> bool:
        """Whether the residual stream is itself convolved here: where it changes side or channels."""
        return self.stride > 1 or self.channels_in != self.channels_out


def stock_block(width: int, stage: int) -> BottleneckConfig:
    return BottleneckConfig(conv1=width * 2**stage, conv2=width * 2**stage)


class ResNetGates(NamedTuple):
    """Gate values in [0, 1], per block: of the channels that its first and second convolution write."""

    conv1: tuple[Tensor, ...]
    conv2: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> ResNetGates:
        return ResNetGates(tuple(map(function, self.conv1)), tuple(map(function, self.conv2)))

    def flat(self) -> list[Tensor]:
        return [*self.conv1, *self.conv2]


class Bottleneck(nn.Module):
    """relu(x + branch(x)), the branch in three convolutions."""

    def __init__(self, at: Place):
        super().__init__()
        first, second = at.block.conv1, at.block.conv2
        self.conv1 = nn.Conv2d(at.channels_in, first, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.pool = nn.AvgPool2d(at.stride) if at.stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(second, at.channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(at.channels_out)
        self.shortcut = Shortcut(at) if at.has_shortcut else nn.Identity()

    def forward(self, x_BCSS: Tensor, gate1_C: Tensor | None = None, gate2_C: Tensor | None = None) -> Tensor:
        y_BCSS = _gated(F.relu(self.bn1(self.conv1(x_BCSS))), gate1_C)
        y_BCSS = self.pool(_gated(F.relu(self.bn2(self.conv2(y_BCSS))), gate2_C))
        return F.relu(self.bn3(self.conv3(y_BCSS)) + self.shortcut(x_BCSS))


class Shortcut(nn.Module):
    def __init__(self, at: Place):
        super().__init__()
        self.pool = nn.AvgPool2d(at.stride) if at.stride > 1 else nn.Identity()
        self.conv = nn.Conv2d(at.channels_in, at.channels_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(at.channels_out)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        return self.bn(self.conv(self.pool(x_BCSS)))


def _gated(x_BCSS: Tensor, gate_C: Tensor | None) -> Tensor:
    return x_BCSS if gate_C is None else x_BCSS * gate_C[:, None, None].to(x_BCSS.dtype)


class AttentionPool(nn.Module):
    """The mean of the last grid asks, the grid and the mean answer."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        D, self.head_dim = config.num_features, config.head_dim
        self.position = nn.Parameter(torch.zeros(config.num_tokens, D))
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(D, D)
        self.value = nn.Linear(D, D)

    def forward(self, x_BDSS: Tensor) -> Tensor:
        x_BLD = x_BDSS.flatten(2).transpose(1, 2)
        x_BLD = torch.cat([x_BLD.mean(1, keepdim=True), x_BLD], dim=1) + self.position.to(x_BDSS.dtype)

        def heads(y_BLD: Tensor) -> Tensor:
            return y_BLD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q_BH1K = heads(self.query(x_BLD[:, :1])) * self.head_dim**-0.5
        k_BHLK, v_BHLK = heads(self.key(x_BLD)), heads(self.value(x_BLD))
        y_BH1K = (q_BH1K @ k_BHLK.transpose(-1, -2)).softmax(-1).to(v_BHLK.dtype) @ v_BHLK
        return y_BH1K.flatten(1)


class ResNetTower(nn.Module):
    """Pixels -> stem -> four stages -> attention pool -> projection."""

    def __init__(self, config: ResNetConfig, embed_dim: int):
        super().__init__()
        half, width = config.width // 2, config.width
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(Bottleneck(at) for at in config.blocks())
        self.pool = AttentionPool(config)
        self.projection = nn.Linear(config.num_features, embed_dim)
        self.recompute = False  # gradient checkpointing: keep only each block's input for backward

    def forward(self, pixels_BCSS: Tensor, gates: ResNetGates | None = None) -> Tensor:
        x_BCSS = F.relu(self.bn1(self.conv1(pixels_BCSS)))
        x_BCSS = F.relu(self.bn2(self.conv2(x_BCSS)))
        x_BCSS = F.avg_pool2d(F.relu(self.bn3(self.conv3(x_BCSS))), 2)
        for index, block in enumerate(self.blocks):
            block_gates = () if gates is None else (gates.conv1[index], gates.conv2[index])
            if self.recompute and torch.is_grad_enabled():
                x_BCSS = cast(
                    Tensor,
                    checkpoint(block, x_BCSS, *block_gates, use_reentrant=False, context_fn=_once_counted(block)),
                )
            else:
                x_BCSS = block(x_BCSS, *block_gates)
        return self.projection(self.pool(x_BCSS))


def _once_counted(block: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """Contexts of a forward pass and of its recomputation, which leaves the running statistics alone."""
    return lambda: (nullcontext(), frozen_statistics(block))


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorms use the batch's statistics in training mode, as ever, but their running ones are put back."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, buffers in zip(norms, before, strict=True):
                for buffer, old in zip(norm.buffers(), buffers, strict=True):
                    buffer.copy_(old)


@torch.no_grad()
def initialise_resnet(tower: ResNetTower, normal_: Callable[[Tensor, float], None]) -> None:
    """Random weights, in place: He et al. 2015 for convolutions; every block starts as its shortcut."""
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            normal_(module.weight, (2 / fan_out) ** 0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        if isinstance(module, Bottleneck):
            module.bn3.weight.zero_()
        if isinstance(module, nn.Linear):
            normal_(module.weight, module.in_features**-0.5)
            module.bias.zero_()
    normal_(tower.pool.position, tower.pool.position.shape[1] ** -0.5)
