"""What survives of a ResNet image tower, and its cut; `keep.take` calls it.

Shape legend: C channels (I read, O written), D features = 32 x width, L positions, H heads, K head dim, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyclip.config import Config
from tinyclip.model_resnet import BottleneckConfig, ResNetConfig, ResNetGates

Indices = tuple[int, ...]


class ResNetKeep(Config):
    """Surviving indices, ascending. `conv1` and `conv2` have one entry per surviving block, through all stages."""

    stem: tuple[Indices, Indices, Indices]  # channels that the stem's convolutions write
    channels: tuple[Indices, ...]  # per stage: of its residual stream
    heads: Indices  # of the attention pool
    blocks: tuple[Indices, ...]  # per stage; the first of each survives: it changes side and channels
    conv1: tuple[Indices, ...]
    conv2: tuple[Indices, ...]

    @property
    def width(self) -> Indices:
        return self.stem[2]

    def check(self, config: ResNetConfig, tower: str) -> None:
        """Raises ValueError where the indices do not fit the tower, or are not a tower's."""

        def check(what: str, indices: Indices, size: int) -> None:
            if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < size:
                raise ValueError(
                    f"keep.{tower}.{what}: expected ascending indices in [0, {size}), at least one, got {indices}"
                )

        sizes = [config.width // 2, config.width // 2, config.width]
        for number, (indices, size) in enumerate(zip(self.stem, sizes, strict=True)):
            check(f"stem.{number}", indices, size)
        if not len(self.channels) == len(self.blocks) == len(config.stages):
            raise ValueError(f"keep.{tower}: expected channels and blocks of {len(config.stages)} stages")
        for stage, blocks in enumerate(self.blocks):
            check(f"channels.{stage}", self.channels[stage], config.stage_channels(stage))
            check(f"blocks.{stage}", blocks, len(config.stages[stage]))
            if blocks[0] != 0:
                raise ValueError(f"keep.{tower}.blocks.{stage}: expected the first block of the stage, got {blocks}")
        check("heads", self.heads, config.heads)
        kept = [config.stages[stage][index] for stage, blocks in enumerate(self.blocks) for index in blocks]
        if not len(self.conv1) == len(self.conv2) == len(kept):
            raise ValueError(
                f"keep.{tower}: expected conv1 and conv2 for {len(kept)} blocks, "
                f"got {len(self.conv1)} and {len(self.conv2)}"
            )
        for number, block in enumerate(kept):
            check(f"conv1.{number}", self.conv1[number], block.conv1)
            check(f"conv2.{number}", self.conv2[number], block.conv2)
        width, halves = len(self.width), [len(indices) for indices in self.stem[:2]]
        expected = [4 * width * 2**stage for stage in range(len(self.channels))]
        got = [len(indices) for indices in self.channels]
        if halves != [width // 2] * 2 or got != expected or len(self.heads) * config.head_dim != expected[-1]:
            raise ValueError(
                f"keep.{tower}: expected {width // 2}, {width // 2} and {width} stem channels, {expected} in the "
                f"stages and heads for the last; got {halves}, {got} and {len(self.heads)} heads of {config.head_dim}"
            )

    def shrink(self, config: ResNetConfig) -> ResNetConfig:
        """The shape that is left."""
        sizes = zip(self.conv1, self.conv2, strict=True)
        stages = tuple(
            tuple(
                BottleneckConfig(conv1=len(first), conv2=len(second))
                for _, (first, second) in zip(blocks, sizes, strict=False)
            )
            for blocks in self.blocks
        )
        return config.model_copy(update={"width": len(self.width), "stages": stages})

    def describe(self, config: ResNetConfig, tower: str) -> str:
        """The map: which blocks, and how many channels of how many."""
        stages = "; ".join(
            "all" if len(kept) == len(stage) else f"{' '.join(map(str, kept))} of {len(stage)}"
            for kept, stage in zip(self.blocks, config.stages, strict=True)
        )
        return (
            f"{tower}: blocks per stage {stages}, width {len(self.width)} of {config.width}, "
            f"inner channels {counts(self.conv1)} (1x1) and {counts(self.conv2)} (3x3)"
        )

    @classmethod
    def everything(cls, config: ResNetConfig) -> ResNetKeep:
        def whole(size: int) -> Indices:
            return tuple(range(size))

        blocks = [block for stage in config.stages for block in stage]
        return cls(
            stem=(whole(config.width // 2), whole(config.width // 2), whole(config.width)),
            channels=tuple(whole(config.stage_channels(stage)) for stage in range(len(config.stages))),
            heads=whole(config.heads),
            blocks=tuple(whole(len(stage)) for stage in config.stages),
            conv1=tuple(whole(block.conv1) for block in blocks),
            conv2=tuple(whole(block.conv2) for block in blocks),
        )

    @classmethod
    def open_gates(cls, config: ResNetConfig, gates: ResNetGates) -> ResNetKeep:
        """Every channel whose gate is not zero; the rest of the tower has no gates."""

        def indices(gates: tuple[Tensor, ...]) -> tuple[Indices, ...]:
            return tuple(tuple(gate.nonzero().flatten().tolist()) for gate in gates)

        return cls.everything(config).model_copy(update={"conv1": indices(gates.conv1), "conv2": indices(gates.conv2)})


def counts(kept: tuple[Indices, ...]) -> str:
    """How many are kept of each block: `3 each`, or `3 1 2`."""
    numbers = [len(indices) for indices in kept]
    return f"{numbers[0]} each" if len(set(numbers)) == 1 else " ".join(map(str, numbers))


def take_resnet(weights: dict[str, Tensor], config: ResNetConfig, keep: ResNetKeep) -> Iterator[tuple[str, Tensor]]:
    """(new name, sliced weight) of every parameter and running statistic that survives."""
    device = weights["pool.position"].device

    def at(indices: Indices) -> Tensor:
        return torch.tensor(indices, device=device)

    def convolution(old: str, new: str, norm: str, written: Indices, read: Indices) -> Iterator[tuple[str, Tensor]]:
        yield f"{new}.weight", weights[f"{old}.weight"][at(written)][:, at(read)]  # [O, I, S, S]
        old_norm, new_norm = (f"{name.rpartition('.')[0]}.{norm}".lstrip(".") for name in (old, new))
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{new_norm}.{part}", weights[f"{old_norm}.{part}"][at(written)]
        yield f"{new_norm}.num_batches_tracked", weights[f"{old_norm}.num_batches_tracked"].clone()

    yield from convolution("conv1", "conv1", "bn1", keep.stem[0], (0, 1, 2))
    yield from convolution("conv2", "conv2", "bn2", keep.stem[1], keep.stem[0])
    yield from convolution("conv3", "conv3", "bn3", keep.stem[2], keep.stem[1])
    numbers = {(place.stage, place.index): number for number, place in enumerate(config.blocks())}
    places = list(config.blocks())
    survivors = [numbers[stage, index] for stage, blocks in enumerate(keep.blocks) for index in blocks]
    read = keep.width
    for number, old_number in enumerate(survivors):
        old, new, place = f"blocks.{old_number}", f"blocks.{number}", places[old_number]
        first, second, written = keep.conv1[number], keep.conv2[number], keep.channels[place.stage]
        yield from convolution(f"{old}.conv1", f"{new}.conv1", "bn1", first, read)
        yield from convolution(f"{old}.conv2", f"{new}.conv2", "bn2", second, first)
        yield from convolution(f"{old}.conv3", f"{new}.conv3", "bn3", written, second)
        if place.has_shortcut:
            yield from convolution(f"{old}.shortcut.conv", f"{new}.shortcut.conv", "bn", written, read)
        read = written
    features = at(read)
    heads_D = torch.arange(config.num_features, device=device).view(-1, config.head_dim)[at(keep.heads)].flatten()
    yield "pool.position", weights["pool.position"][:, features]  # [L, D]
    for part in ("query", "key", "value"):  # [H K, D]
        yield f"pool.{part}.weight", weights[f"pool.{part}.weight"][heads_D][:, features]
        yield f"pool.{part}.bias", weights[f"pool.{part}.bias"][heads_D]
    yield "projection.weight", weights["projection.weight"][:, heads_D]  # [E, H K]
    yield "projection.bias", weights["projection.bias"].clone()
