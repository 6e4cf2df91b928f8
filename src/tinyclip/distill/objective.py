"""What a stage minimises: weighted terms of affinity mimicking, contrast and features.

Shape legend: B pairs, E student embedding, T teacher embedding. Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tinyclip.config import Config
from tinyclip.distill.affinity import (
    Kernel,
    affinity_and_contrastive_loss,
    affinity_loss,
    contrastive_loss,
    feature_loss,
)
from tinyclip.distributed import ALONE, World

Target = tuple[Tensor, Tensor, float]  # a teacher's image and text embeddings [B, T], and its own scale


class Objective(Config):
    """Weights of the terms, and the scales (1 / temperature) of the affinities.

    The published recipe is affinity alone with both scales fixed at 50.
    """

    affinity: float = Field(default=1.0, ge=0, description="cross-entropy to the teacher's similarity rows")
    contrastive: float = Field(default=0.0, ge=0, description="CLIP's own loss, with the student's learned scale")
    feature: float = Field(default=0.0, ge=0, description="1 - cosine to the teacher's embeddings")
    student_scale: float | Literal["learned"] = Field(default=50.0, description="a number, or 'learned'")
    teacher_scale: float | Literal["teacher"] = Field(default=50.0, description="a number, or 'teacher': its own")

    kernel: Kernel = Field(default="torch", description="what computes affinity and contrast; triton needs a GPU")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> Self:
        if self.affinity == self.contrastive == self.feature == 0:
            raise ValueError("at least one of affinity, contrastive, feature must be above 0")
        for name in ("student_scale", "teacher_scale"):
            scale = getattr(self, name)
            if not isinstance(scale, str) and scale <= 0:
                raise ValueError(f"{name}: expected a number above 0, got {scale}")
        return self

    @property
    def needs_teacher(self) -> bool:
        return self.affinity > 0 or self.feature > 0

    @property
    def learns_scale(self) -> bool:
        """Whether the student's own scale is in the loss."""
        return self.contrastive > 0 or (self.affinity > 0 and self.student_scale == "learned")


def projection(objective: Objective, student_dim: int, teacher_dim: int) -> nn.Linear | None:
    """Maps student embeddings to the teacher's size for the feature term; trained beside the student, then dropped."""
    if objective.feature == 0 or student_dim == teacher_dim:
        return None
    return nn.Linear(student_dim, teacher_dim, bias=False)


def total_loss(
    objective: Objective,
    image_BE: Tensor,
    text_BE: Tensor,
    learned_scale: Tensor,
    targets: Sequence[Target],
    project: nn.Linear | None,
    *,
    world: World = ALONE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, terms) of unit embeddings. `terms` carry no gradient; "affinity_kl" is 0 where the student agrees.

    Of several teachers the affinities are averaged: the cross-entropy to a mean of rows is the mean of cross-entropies.
    "affinity_kl" is then the mean of divergences, and features are the first one's.

    On several ranks each gives its own pairs, and gets the loss of all and `world.size` times its share of the gradient
    (which a data parallel wrapper averages).
    """
    loss = image_BE.new_zeros(())
    terms: dict[str, Tensor] = {}
    contrastive, affinity, entropy = _in_batch(objective, image_BE, text_BE, learned_scale, targets, world)
    if contrastive is not None:
        terms["contrastive"] = contrastive.detach()
        loss = loss + objective.contrastive * contrastive
    if affinity is not None and entropy is not None:
        terms["affinity_kl"] = affinity.detach() - entropy
        loss = loss + objective.affinity * affinity
    if objective.feature and targets:
        teacher = targets[0]
        image_BT, text_BT = (image_BE, text_BE) if project is None else (project(image_BE), project(text_BE))
        term = (feature_loss(image_BT, teacher[0], world=world) + feature_loss(text_BT, teacher[1], world=world)) / 2
        terms["feature"] = term.detach()
        loss = loss + objective.feature * term
    return loss, terms


def _in_batch(
    objective: Objective,
    image_BE: Tensor,
    text_BE: Tensor,
    learned_scale: Tensor,
    targets: Sequence[Target],
    world: World,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(contrastive, affinity, the teachers' entropy), None where not asked for; one pass gives all of a teacher."""
    contrastive, affinities, entropies = None, [], []
    how: dict[str, Any] = {"world": world, "kernel": objective.kernel, "trusted": True}
    student_scale = learned_scale if objective.student_scale == "learned" else float(objective.student_scale)
    for image_BT, text_BT, own_scale in targets if objective.affinity else ():
        teacher_scale = own_scale if objective.teacher_scale == "teacher" else float(objective.teacher_scale)
        target = (image_BT, text_BT, teacher_scale)
        if objective.contrastive and contrastive is None:
            scales = (student_scale, learned_scale)
            affinity, entropy, contrastive = affinity_and_contrastive_loss(image_BE, text_BE, *scales, *target, **how)
        else:
            affinity, entropy = affinity_loss(image_BE, text_BE, student_scale, *target, **how)
        affinities.append(affinity)
        entropies.append(entropy)
    if objective.contrastive and contrastive is None:
        contrastive = contrastive_loss(image_BE, text_BE, learned_scale, **how)
    if not affinities:
        return contrastive, None, None
    return contrastive, torch.stack(affinities).mean(), torch.stack(entropies).mean()
