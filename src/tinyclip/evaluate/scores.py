"""What is measured of a model, as settings and as one call."""

from __future__ import annotations

from pydantic import Field

from tinyclip.data.sources import open_source
from tinyclip.data.spec import DataSpec
from tinyclip.evaluate.embed import Model
from tinyclip.evaluate.retrieval import retrieval
from tinyclip.evaluate.zeroshot import DEFAULT_TEMPLATES, zeroshot
from tinyclip.model import Config


class Evaluation(Config):
    """What is measured after each stage."""

    retrieval: DataSpec | None = Field(default=None, description="pairs: a path or a spec")
    zeroshot: DataSpec | None = Field(default=None, description="labelled images: a path or a spec")
    templates: tuple[str, ...] = Field(default=DEFAULT_TEMPLATES, description="zero-shot texts; {} is the class name")


def evaluate(model: Model, evaluation: Evaluation) -> dict[str, float]:
    """Retrieval and zero-shot scores, each a share in [0, 1]."""
    scores: dict[str, float] = {}
    if evaluation.retrieval is not None:
        scores |= retrieval(model, open_source(evaluation.retrieval))
    if evaluation.zeroshot is not None:
        scores |= zeroshot(model, open_source(evaluation.zeroshot), templates=evaluation.templates)
    return scores
