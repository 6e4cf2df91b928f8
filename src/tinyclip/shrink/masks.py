"""Weight inheritance by learned masks (the paper's "automatic"): which heads, neurons and channels the student keeps.

Every head, every FFN neuron and every channel of a tower's residual stream has a gate z in [0, 1], drawn from a
hard-concrete distribution with one parameter, log_alpha. Gates are trained with the weights, under a constraint on the
expected number of prunable parameters (attention and FFN of both towers). Then `survivors` picks indices that meet the
budget and `fold` multiplies the gates into the weights, so that the cut model computes what the gated one did.

Sources: Wu et al., "TinyCLIP", ICCV 2023, section 3.3; hard-concrete gates: Louizos et al., "Learning Sparse Neural
Networks through L0 Regularization", ICLR 2018; the constraint: Wang et al., "Structured Pruning of Large Language
Models", EMNLP 2020.

Shape legend: D width, H heads, K head dim, F FFN neurons.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from tinyclip.model import (
    CLIP,
    Attention,
    CLIPConfig,
    Config,
    FeedForward,
    Gates,
    ImageTower,
    OutputBias,
    TextTower,
    TowerConfig,
    TowerGates,
)
from tinyclip.shrink.keep import Keep, TowerKeep

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


class TowerLogAlpha(nn.Module):
    """log_alpha of one tower: the residual stream's channels, and per block heads and neurons."""

    def __init__(self, config: TowerConfig, initial: float):
        super().__init__()

        def gates(size: int) -> nn.Parameter:
            return nn.Parameter(torch.full((size,), float(initial)))

        self.width_D = gates(config.width)
        self.heads = nn.ParameterList([gates(block.heads) for block in config.blocks])
        self.ffn = nn.ParameterList([gates(block.ffn) for block in config.blocks])

    def map(self, function: Callable[[Tensor], Tensor]) -> TowerGates:
        return TowerGates(function(self.width_D), tuple(map(function, self.heads)), tuple(map(function, self.ffn)))


class HardConcreteGates(nn.Module):
    """log_alpha of every gate of a model."""

    def __init__(self, config: CLIPConfig, initial_log_alpha: float = 4.0):
        super().__init__()
        self.config = config
        self.image = TowerLogAlpha(config.image, initial_log_alpha)
        self.text = TowerLogAlpha(config.text, initial_log_alpha)

    def map(self, function: Callable[[Tensor], Tensor]) -> Gates:
        """`function` of every log_alpha vector, in a fixed order: image then text; width, heads, neurons."""
        return Gates(self.image.map(function), self.text.map(function))

    def sample(self, generator: torch.Generator) -> Gates:
        """Training gates. `generator` is a CPU one, so every device and every rank draws the same numbers."""

        def draw(log_alpha: Tensor) -> Tensor:
            uniform = torch.rand(len(log_alpha), generator=generator, dtype=torch.float32)
            return sample(log_alpha, uniform.clamp(EPSILON, 1 - EPSILON).to(log_alpha))

        return self.map(draw)

    def expected_params(self) -> Tensor:
        """Expected prunable parameters of the cut model, gates taken as independent."""
        probability = self.map(open_probability)

        def tower(p: TowerGates, config: TowerConfig) -> Tensor:
            width = p.width_D.sum()
            total = 2 * len(config.blocks) * width  # output biases of attention and FFN
            for heads_H, ffn_F in zip(p.heads, p.ffn, strict=True):
                total = total + heads_H.sum() * config.head_dim * (4 * width + 3) + ffn_F.sum() * (2 * width + 1)
            return total

        return tower(probability.image, self.config.image) + tower(probability.text, self.config.text)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep every log_alpha where its gradient has not vanished; call after each optimizer step."""
        for log_alpha in self.parameters():
            log_alpha.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)

    @torch.no_grad()
    def values(self, keep: Keep) -> Gates:
        """The gates without noise: `value` for the survivors, zero for the rest."""

        def tower(gates: TowerGates, kept: TowerKeep) -> TowerGates:
            def only(gate: Tensor, indices: tuple[int, ...]) -> Tensor:
                chosen = torch.zeros_like(gate)
                chosen[list(indices)] = 1
                return gate * chosen

            return TowerGates(
                only(gates.width_D, kept.width),
                tuple(map(only, gates.heads, kept.heads)),
                tuple(map(only, gates.ffn, kept.ffn)),
            )

        gates = self.map(value)
        return Gates(tower(gates.image, keep.image), tower(gates.text, keep.text))


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


class _Candidate(NamedTuple):
    log_alpha: float
    cost: int
    tower: str
    block: int
    index: int


@torch.no_grad()
def survivors(gates: HardConcreteGates, budget_params: int) -> Keep:
    """The indices that meet the budget: at most `budget_params` prunable parameters, less than one neuron below it.

    Width and heads: the expected number of each, the largest log_alpha first. FFN neurons of both towers then fill the
    budget, the largest log_alpha first. Where heads alone exceed it, the weakest heads go; where all neurons fit and
    something is left, the best closed heads return. Raises ValueError where not even the width's biases fit.
    """
    config = gates.config
    kept_width: dict[str, list[int]] = {}
    open_heads: list[_Candidate] = []
    closed_heads: list[_Candidate] = []
    neurons: list[_Candidate] = []
    left = budget_params
    for tower, parts, tower_config in (("image", gates.image, config.image), ("text", gates.text, config.text)):
        width = kept_width[tower] = _most_open(parts.width_D)
        head_cost, neuron_cost = tower_config.head_dim * (4 * len(width) + 3), 2 * len(width) + 1
        left -= 2 * len(width) * len(tower_config.blocks)
        for block, log_alpha in enumerate(parts.heads):
            chosen = set(_most_open(log_alpha, at_least=0))
            for index, a in enumerate(log_alpha.tolist()):
                (open_heads if index in chosen else closed_heads).append(_Candidate(a, head_cost, tower, block, index))
        for block, log_alpha in enumerate(parts.ffn):
            neurons += [_Candidate(a, neuron_cost, tower, block, index) for index, a in enumerate(log_alpha.tolist())]
    if left < 0:
        raise ValueError(
            f"keep_params: a budget of {budget_params} parameters is below the {budget_params - left} biases that "
            f"widths {len(kept_width['image'])} and {len(kept_width['text'])} keep; ask for more"
        )
    heads: list[_Candidate] = []
    kept_neurons: list[_Candidate] = []
    for candidates, chosen in ((open_heads, heads), (neurons, kept_neurons), (closed_heads, heads)):
        for candidate in sorted(candidates, reverse=True):
            if candidate.cost <= left:
                chosen.append(candidate)
                left -= candidate.cost

    def tower_keep(tower: str, tower_config: TowerConfig) -> TowerKeep:
        def per_block(chosen: list[_Candidate]) -> tuple[tuple[int, ...], ...]:
            mine = [c for c in chosen if c.tower == tower]
            return tuple(
                tuple(sorted(c.index for c in mine if c.block == block)) for block in range(len(tower_config.blocks))
            )

        return TowerKeep(
            blocks=tuple(range(len(tower_config.blocks))),
            width=tuple(kept_width[tower]),
            heads=per_block(heads),
            ffn=per_block(kept_neurons),
        )

    return Keep(image=tower_keep("image", config.image), text=tower_keep("text", config.text))


def _most_open(log_alpha: Tensor, at_least: int = 1) -> list[int]:
    """As many indices as gates are expected to be open, the largest log_alpha first."""
    count = max(at_least, len(log_alpha) - expected_zeros(log_alpha))
    return sorted(log_alpha.topk(count).indices.tolist())


def expected_zeros(log_alpha: Tensor) -> int:
    """Expected number of closed gates, rounded."""
    return round((len(log_alpha) - open_probability(log_alpha.double()).sum()).item())


@torch.no_grad()
def fold(model: CLIP, gates: Gates) -> CLIP:
    """A copy of the model with the gates multiplied into its weights.

    `take(fold(model, gates), Keep.open_gates(gates))` computes what `model` does under `gates`. On its own the folded
    model differs where a channel is closed, because its LayerNorms still see that channel.
    """
    folded = copy.deepcopy(model)
    for tower, tower_gates in ((folded.image, gates.image), (folded.text, gates.text)):
        _fold_tower(tower, tower_gates)
    return folded


def _fold_tower(tower: ImageTower | TextTower, gates: TowerGates) -> None:
    width_D = gates.width_D
    tower.position *= width_D
    if isinstance(tower, ImageTower):
        tower.patch.weight *= width_D[:, None]
        tower.class_embedding *= width_D
    else:
        tower.token_embedding.weight *= width_D
    for block, gate_H, gate_F in zip(tower.blocks, gates.heads, gates.ffn, strict=True):
        for branch in (block.attention, block.ffn):
            bias = branch.bias if isinstance(branch, OutputBias) else _output(branch).bias
            bias *= width_D
        if isinstance(block.attention, Attention):
            block.attention.out.weight *= width_D[:, None] * gate_H.repeat_interleave(block.attention.head_dim)
        if isinstance(block.ffn, FeedForward):
            block.ffn.down.weight *= width_D[:, None] * gate_F


def _output(branch: Attention | FeedForward) -> nn.Linear:
    return branch.out if isinstance(branch, Attention) else branch.down
