"""Scores and costs: pure functions of (model, data) -> dict[str, float], or of a config alone."""

from tinyclip.evaluate.cost import Cost, cost, describe, size_mb
from tinyclip.evaluate.retrieval import recall_at_k, retrieval
from tinyclip.evaluate.zeroshot import DEFAULT_TEMPLATES, classifier, top_k_accuracy, zeroshot

__all__ = [
    "DEFAULT_TEMPLATES",
    "Cost",
    "classifier",
    "cost",
    "describe",
    "recall_at_k",
    "retrieval",
    "size_mb",
    "top_k_accuracy",
    "zeroshot",
]
