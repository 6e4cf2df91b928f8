"""What is measured of a model, as settings and as one call."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field, field_validator

from tinyclip.config import Config
from tinyclip.data.loader import LeftOut
from tinyclip.data.sources import open_source
from tinyclip.data.spec import DataSpec
from tinyclip.evaluate.embed import Model
from tinyclip.evaluate.retrieval import retrieval
from tinyclip.evaluate.zeroshot import DEFAULT_TEMPLATES, check_templates, zeroshot


class Evaluation(Config):
    """What is measured after each stage."""

    retrieval: DataSpec | None = Field(default=None, description="pairs: a path or a spec")
    zeroshot: DataSpec | None = Field(default=None, description="labelled images: a path or a spec")
    templates: tuple[str, ...] = Field(default=DEFAULT_TEMPLATES, description="zero-shot texts; {} is the class name")

    @field_validator("templates")
    @classmethod
    def _have_a_place_for_the_name(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        check_templates(templates, "zero-shot")
        return templates


def evaluate(
    model: Model,
    evaluation: Evaluation,
    *,
    batch_size: int = 64,
    workers: int = 0,
    say: Callable[[str], None] | None = None,
    left_out: LeftOut | None = None,
) -> dict[str, float]:
    """Retrieval and zero-shot scores, each a share in [0, 1], with intervals and counts; and median ranks.

    `say` is told what a reader of the scores should know; what was left out is counted in `left_out`, or else told.
    """
    scores: dict[str, float] = {}
    reading = {"batch_size": batch_size, "workers": workers, "left_out": left_out or LeftOut(say)}
    if evaluation.retrieval is not None:
        scores |= retrieval(model, open_source(evaluation.retrieval), **reading)
    if evaluation.zeroshot is not None:
        scores |= zeroshot(model, open_source(evaluation.zeroshot), evaluation.templates, **reading, say=say)
    return scores
