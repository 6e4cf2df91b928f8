"""What a stage minimises: weighted terms of affinity mimicking, contrast and features.

Shape legend: B pairs, E student embedding, T teacher embedding. Losses are in nats.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from tinyclip.distill.affinity import affinity_loss, contrastive_loss, feature_loss
from tinyclip.model import Config


class Objective(Config):
    """Weights of the terms, and the scales (1 / temperature) of the affinities.

    The published recipe is affinity alone with both scales fixed at 50.
    """

    affinity: float = Field(default=1.0, ge=0, description="cross-entropy to the teacher's similarity rows")
    contrastive: float = Field(default=0.0, ge=0, description="CLIP's own loss, with the student's learned scale")
    feature: float = Field(default=0.0, ge=0, description="1 - cosine to the teacher's embeddings")
    student_scale: float | Literal["learned"] = Field(default=50.0, description="a number, or 'learned'")
    teacher_scale: float | Literal["teacher"] = Field(default=50.0, description="a number, or 'teacher': its own")

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
    teacher: tuple[Tensor, Tensor, float] | None,
    project: nn.Linear | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, terms) of unit embeddings. `terms` carry no gradient; "affinity_kl" is 0 where the student agrees."""
    loss = image_BE.new_zeros(())
    terms: dict[str, Tensor] = {}
    if objective.contrastive:
        term = contrastive_loss(image_BE, text_BE, learned_scale)
        terms["contrastive"] = term.detach()
        loss = loss + objective.contrastive * term
    if teacher is None:
        return loss, terms
    teacher_image_BT, teacher_text_BT, teacher_own_scale = teacher
    if objective.affinity:
        student_scale = learned_scale if objective.student_scale == "learned" else float(objective.student_scale)
        teacher_scale = teacher_own_scale if objective.teacher_scale == "teacher" else float(objective.teacher_scale)
        term, entropy = affinity_loss(
            image_BE, text_BE, student_scale, teacher_image_BT, teacher_text_BT, teacher_scale
        )
        terms["affinity_kl"] = term.detach() - entropy
        loss = loss + objective.affinity * term
    if objective.feature:
        image_BT, text_BT = (image_BE, text_BE) if project is None else (project(image_BE), project(text_BE))
        term = (feature_loss(image_BT, teacher_image_BT) + feature_loss(text_BT, teacher_text_BT)) / 2
        terms["feature"] = term.detach()
        loss = loss + objective.feature * term
    return loss, terms
