"""Weight inheritance by learned masks (the paper's "automatic"): which heads, neurons and channels the student keeps.

Every head, every FFN neuron and every channel of a transformer's residual stream has a gate z in [0, 1], and so has
every channel that a ResNet's inner convolutions write. Gates are drawn from a hard-concrete distribution with one
parameter, log_alpha, and trained with the weights, under a constraint on the expected number of prunable parameters
(attention and FFN; the branches of a ResNet's blocks). Then `survivors` picks indices that meet the
budget and `fold` multiplies the gates into the weights, so that the cut model computes what the gated one did.

Sources: Wu et al., "TinyCLIP", ICCV 2023, section 3.3; hard-concrete gates: Louizos et al., "Learning Sparse Neural
Networks through L0 Regularization", ICLR 2018; the constraint: Wang et al., "Structured Pruning of Large Language
Models", EMNLP 2020.

Shape legend: D width, H heads, K head dim, F FFN neurons, C channels of a convolution.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tinyclip.config import Config
from tinyclip.device import to_device
from tinyclip.model import (
    CLIP,
    Attention,
    CLIPConfig,
    FeedForward,
    Gates,
    ImageTower,
    OutputBias,
    TextTower,
    TowerConfig,
    TowerGates,
)
from tinyclip.model_resnet import Bottleneck, ResNetConfig, ResNetGates, ResNetTower
from tinyclip.shrink.keep import Keep, TowerKeep
from tinyclip.shrink.keep_resnet import ResNetKeep

# The distribution is a concrete one stretched to (LOW, HIGH) and clipped to [0, 1]; values as in the official code.
LOW, HIGH, TEMPERATURE, EPSILON = -0.1, 1.1, 2 / 3, 1e-6
VALUE_SHARPNESS = 0.8  # of the deterministic gate: sigmoid(0.8 log_alpha / TEMPERATURE)
LOG_ALPHA_LIMIT = math.log(100)


class LearnMasks(Config):
    """Settings of the gates and their constraint; how long and how fast is in the stage's `while_masking`."""

    kind: Literal["learn_masks"] = "learn_masks"
    keep_params: float = Field(
        gt=0, le=1, description="share of the starting model's prunable parameters (attention and FFN) to keep"
    )
    log_alpha_lr: float = Field(default=0.02, gt=0, description="Adam's step on log_alpha")
    multiplier_lr: float = Field(default=1.0, gt=0, description="step of dual ascent on the two multipliers")
    initial_log_alpha: float = Field(default=4.0, description="4.0: every gate starts open with probability 0.996")
    target_warmup: float = Field(
        default=0.7, ge=0, le=1, description="share of the steps over which the asked-for sparsity rises linearly"
    )


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0)."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """z in [0, 1] for uniform numbers in (0, 1), differentiable in log_alpha."""
    concrete = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def value(log_alpha: Tensor) -> Tensor:
    """The gate without noise: what a survivor is multiplied with."""
    return torch.sigmoid(log_alpha / TEMPERATURE * VALUE_SHARPNESS)


def _gates(sizes: Iterable[int], initial: float) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.full((size,), float(initial))) for size in sizes])


class TowerLogAlpha(nn.Module):
    """log_alpha of one transformer: the residual stream's channels, and per block heads and neurons."""

    parts = ("ffn", "heads")  # of the blocks, the cheapest unit first

    def __init__(self, config: TowerConfig, initial: float):
        super().__init__()
        self.config = config
        self.width_D = nn.Parameter(torch.full((config.width,), float(initial)))
        self.heads = _gates((block.heads for block in config.blocks), initial)
        self.ffn = _gates((block.ffn for block in config.blocks), initial)

    def map(self, function: Callable[[Tensor], Tensor]) -> TowerGates:
        return TowerGates(function(self.width_D), tuple(map(function, self.heads)), tuple(map(function, self.ffn)))

    def expected_params(self) -> Tensor:
        p, config = self.map(open_probability), self.config
        width = p.width_D.sum()
        total = 2 * len(config.blocks) * width  # output biases of attention and FFN
        for heads_H, ffn_F in zip(p.heads, p.ffn, strict=True):
            total = total + heads_H.sum() * config.head_dim * (4 * width + 3) + ffn_F.sum() * (2 * width + 1)
        return total

    def expected_keep(self, shift: float) -> TowerKeep:
        return TowerKeep(
            blocks=tuple(range(len(self.heads))),
            width=_most_open(self.width_D, shift, at_least=1),
            heads=tuple(_most_open(log_alpha, shift) for log_alpha in self.heads),
            ffn=tuple(_most_open(log_alpha, shift) for log_alpha in self.ffn),
        )

    def unit_params(self, part: str, keep: TowerKeep) -> list[int]:
        """Per block: the parameters of one more head or neuron."""
        width, head_dim = len(keep.width), self.config.head_dim
        return [2 * width + 1 if part == "ffn" else head_dim * (4 * width + 3)] * len(keep.blocks)

    def values(self, keep: TowerKeep) -> TowerGates:
        gates = self.map(value)
        return TowerGates(
            _only(gates.width_D, keep.width),
            tuple(map(_only, gates.heads, keep.heads)),
            tuple(map(_only, gates.ffn, keep.ffn)),
        )


class ResNetLogAlpha(nn.Module):
    """log_alpha of a ResNet: per block the channels that its two inner convolutions write. None closes entirely."""

    parts = ("conv2", "conv1")

    def __init__(self, config: ResNetConfig, initial: float):
        super().__init__()
        self.config = config
        self.conv1 = _gates((place.block.conv1 for place in config.blocks()), initial)
        self.conv2 = _gates((place.block.conv2 for place in config.blocks()), initial)

    def map(self, function: Callable[[Tensor], Tensor]) -> ResNetGates:
        return ResNetGates(tuple(map(function, self.conv1)), tuple(map(function, self.conv2)))

    def expected_params(self) -> Tensor:
        p = self.map(open_probability)
        total = p.conv1[0].new_zeros(())
        for first_C, second_C, at in zip(p.conv1, p.conv2, self.config.blocks(), strict=True):
            first, second = first_C.sum(), second_C.sum()
            total = total + first * (at.channels_in + 2) + second * (9 * first + 2) + at.channels_out * (second + 2)
        return total

    def expected_keep(self, shift: float) -> ResNetKeep:
        kept = {
            part: tuple(_most_open(log_alpha, shift, at_least=1) for log_alpha in getattr(self, part))
            for part in self.parts
        }
        return ResNetKeep.everything(self.config).model_copy(update=kept)

    def unit_params(self, part: str, keep: ResNetKeep) -> list[int]:
        """Per block: the parameters of one more channel."""
        if part == "conv2":
            places = zip(keep.conv1, self.config.blocks(), strict=True)
            return [9 * len(first) + 2 + at.channels_out for first, at in places]
        return [
            at.channels_in + 2 + 9 * len(second) for second, at in zip(keep.conv2, self.config.blocks(), strict=True)
        ]

    def values(self, keep: ResNetKeep) -> ResNetGates:
        gates = self.map(value)
        return ResNetGates(
            tuple(map(_only, gates.conv1, keep.conv1)),
            tuple(map(_only, gates.conv2, keep.conv2)),
        )


def _only(gate: Tensor, indices: tuple[int, ...]) -> Tensor:
    chosen = torch.zeros_like(gate)
    chosen[list(indices)] = 1
    return gate * chosen


def _most_open(log_alpha: Tensor, shift: float, at_least: int = 0) -> tuple[int, ...]:
    count = max(at_least, len(log_alpha) - expected_zeros(log_alpha - shift))
    return tuple(sorted(log_alpha.topk(count).indices.tolist()))


class HardConcreteGates(nn.Module):
    """log_alpha of every gate of a model."""

    def __init__(self, config: CLIPConfig, initial_log_alpha: float = 4.0):
        super().__init__()
        self.config = config
        self.image: TowerLogAlpha | ResNetLogAlpha
        if isinstance(config.image, ResNetConfig):
            self.image = ResNetLogAlpha(config.image, initial_log_alpha)
        else:
            self.image = TowerLogAlpha(config.image, initial_log_alpha)
        self.text = TowerLogAlpha(config.text, initial_log_alpha)

    def map(self, function: Callable[[Tensor], Tensor]) -> Gates:
        """`function` of every log_alpha vector, in a fixed order: that of `Gates.flat`."""
        return Gates(self.image.map(function), self.text.map(function))

    def sample(self, generator: torch.Generator) -> Gates:
        """Training gates. `generator` is a CPU one, so every device and every rank draws the same numbers."""

        sizes = [len(log_alpha) for log_alpha in self.map(lambda log_alpha: log_alpha).flat()]
        uniform = torch.cat([torch.rand(size, generator=generator, dtype=torch.float32) for size in sizes])
        uniform = to_device(uniform.clamp(EPSILON, 1 - EPSILON), next(self.parameters()).device)
        parts = iter(uniform.split(sizes))
        return self.map(lambda log_alpha: sample(log_alpha, next(parts).to(log_alpha)))

    def expected_params(self) -> Tensor:
        """Expected prunable parameters of the cut model, gates taken as independent."""
        return self.image.expected_params() + self.text.expected_params()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep every log_alpha where its gradient has not vanished; call after each optimizer step."""
        for log_alpha in self.parameters():
            log_alpha.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)

    @torch.no_grad()
    def values(self, keep: Keep) -> Gates:
        """The gates without noise: `value` for the survivors, zero for the rest."""

        image: Any = self.image
        return Gates(image.values(keep.image), self.text.values(keep.text))


class SizeConstraint(nn.Module):
    """Lagrangian of "sparsity p equals target q": l1 (p - q) + l2 (p - q)^2, the multipliers raised by dual ascent.

    p = 1 - expected parameters / `reference_params`, a fraction of the starting model's prunable parameters.
    """

    linear: Tensor
    quadratic: Tensor

    def __init__(self, rule: LearnMasks, *, reference_params: int, current_params: int, steps: int):
        super().__init__()
        self.reference_params, self.rule, self.steps = reference_params, rule, steps
        self.start, self.end = 1 - current_params / reference_params, 1 - rule.keep_params
        self.register_buffer("linear", torch.zeros(()))
        self.register_buffer("quadratic", torch.tensor(10.0))

    def target(self, step: int) -> float:
        """Asked-for sparsity: from the start's to the end's over the warm-up, then constant."""
        warmup_steps = self.rule.target_warmup * self.steps
        share = 1.0 if step >= warmup_steps else step / warmup_steps
        return self.start + (self.end - self.start) * share

    def sparsity(self, gates: HardConcreteGates) -> Tensor:
        return 1 - gates.expected_params() / self.reference_params

    def penalty(self, sparsity: Tensor, step: int) -> Tensor:
        gap = sparsity - self.target(step)
        return self.linear * gap + self.quadratic * gap.square()

    @torch.no_grad()
    def ascend(self, sparsity: Tensor, step: int) -> None:
        """Plain dual ascent: a multiplier moves by its gradient."""
        gap = sparsity.detach() - self.target(step)
        self.linear += self.rule.multiplier_lr * gap
        self.quadratic += self.rule.multiplier_lr * gap.square()


@torch.no_grad()
def survivors(gates: HardConcreteGates, budget_params: int) -> Keep:
    """The indices that meet the budget: at most `budget_params` prunable parameters, less than a neuron below it.

    Of each gate vector survive as many as are expected to be open, the largest log_alpha first, after one common shift
    of all log_alphas that brings the size down to the budget (none is needed where the constraint was met). FFN neurons
    then fill what rounding left, and heads where every neuron is in; of a ResNet the channels of 3x3 convolutions, then
    of 1x1. Raises ValueError where nothing fits.
    """
    config, low, high = gates.config, -40.0, 40.0
    if _expected_keep(gates, high).shrink(config).prunable_params > budget_params:
        smallest = _expected_keep(gates, high).shrink(config).prunable_params
        raise ValueError(f"keep_params: {budget_params} parameters are below the {smallest} of the smallest cut")
    for _ in range(60):  # the size falls with the shift
        middle = (low + high) / 2
        fits = _expected_keep(gates, middle).shrink(config).prunable_params <= budget_params
        low, high = (low, middle) if fits else (middle, high)
    return _fill(_expected_keep(gates, high), gates, budget_params)


def _expected_keep(gates: HardConcreteGates, shift: float) -> Keep:
    return Keep(image=gates.image.expected_keep(shift), text=gates.text.expected_keep(shift))


def expected_zeros(log_alpha: Tensor) -> int:
    """Expected number of closed gates, rounded."""
    return round((len(log_alpha) - open_probability(log_alpha.double()).sum()).item())


def _fill(keep: Keep, gates: HardConcreteGates, budget_params: int) -> Keep:
    """Add closed units, the largest log_alpha first, while they fit: first the cheap ones of both towers."""
    left = budget_params - keep.shrink(gates.config).prunable_params
    towers: dict[str, Any] = {"image": gates.image, "text": gates.text}
    for turn in range(2):
        closed: list[tuple[float, int, str, int, int]] = []
        for name, tower in towers.items():
            tower_keep, part = getattr(keep, name), tower.parts[turn]
            costs, kept = tower.unit_params(part, tower_keep), getattr(tower_keep, part)
            for block, log_alpha in enumerate(getattr(tower, part)):
                there = set(kept[block])
                closed += [
                    (a, costs[block], name, block, i) for i, a in enumerate(log_alpha.tolist()) if i not in there
                ]
        added: dict[tuple[str, int], list[int]] = {}
        for _, cost, name, block, index in sorted(closed, reverse=True):
            if cost <= left:
                left -= cost
                added.setdefault((name, block), []).append(index)
        for name, tower in towers.items():
            tower_keep, part = getattr(keep, name), tower.parts[turn]
            grown = tuple(
                tuple(sorted([*kept, *added.get((name, block), ())]))
                for block, kept in enumerate(getattr(tower_keep, part))
            )
            keep = keep.model_copy(update={name: tower_keep.model_copy(update={part: grown})})
    return keep


@torch.no_grad()
def fold(model: CLIP, gates: Gates) -> CLIP:
    """A copy of the model with the gates multiplied into its weights.

    `take(fold(model, gates), Keep.open_gates(model.config, gates))` computes what `model` does under `gates`, in
    evaluation mode. On its own the folded model differs where a channel of the residual stream is closed, because its
    LayerNorms still see that channel.
    """
    folded = copy.deepcopy(model)
    if isinstance(folded.image, ResNetTower):
        assert isinstance(gates.image, ResNetGates), f"gates of a ResNet, got {type(gates.image)}"
        _fold_resnet(folded.image, gates.image)
    else:
        assert isinstance(gates.image, TowerGates), f"gates of a ViT, got {type(gates.image)}"
        _fold_tower(folded.image, gates.image)
    _fold_tower(folded.text, gates.text)
    return folded


def _fold_resnet(tower: ResNetTower, gates: ResNetGates) -> None:
    """Into the convolutions that read the gated channels: nothing but an average lies between."""
    for block, first_C, second_C in zip(tower.blocks, gates.conv1, gates.conv2, strict=True):
        assert isinstance(block, Bottleneck)
        block.conv2.weight.mul_(first_C[:, None, None])
        block.conv3.weight.mul_(second_C[:, None, None])


def _fold_tower(tower: ImageTower | TextTower, gates: TowerGates) -> None:
    width_D = gates.width_D
    tower.position.mul_(width_D)
    if isinstance(tower, ImageTower):
        tower.patch.weight.mul_(width_D[:, None])
        tower.class_embedding.mul_(width_D)
    else:
        tower.token_embedding.weight.mul_(width_D)
    for block, gate_H, gate_F in zip(tower.blocks, gates.heads, gates.ffn, strict=True):
        for branch in (block.attention, block.ffn):
            bias = branch.bias if isinstance(branch, OutputBias) else _output(branch).bias
            bias.mul_(width_D)
        if isinstance(block.attention, Attention):
            block.attention.out.weight.mul_(width_D[:, None] * gate_H.repeat_interleave(block.attention.head_dim))
        if isinstance(block.ffn, FeedForward):
            block.ffn.down.weight.mul_(width_D[:, None] * gate_F)


def _output(branch: Attention | FeedForward) -> nn.Linear:
    return branch.out if isinstance(branch, Attention) else branch.down
