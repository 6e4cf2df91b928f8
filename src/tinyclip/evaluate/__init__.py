"""Scores and costs: pure functions of (model, data) -> dict[str, float], or of a config alone."""

from tinyclip.evaluate.confidence import Difference, Interval, interval, paired_difference, with_interval
from tinyclip.evaluate.cost import Cost, cost, describe, size_mb
from tinyclip.evaluate.embed import top_k
from tinyclip.evaluate.linear_probe import few_shot, linear_probe, probe
from tinyclip.evaluate.retrieval import recall_at_k, recall_differences, retrieval, retrieval_ranks
from tinyclip.evaluate.zeroshot import (
    DEFAULT_TEMPLATES,
    Answers,
    answer_scores,
    answers,
    classifier,
    top_k_accuracy,
    zeroshot,
)

__all__ = [
    "DEFAULT_TEMPLATES",
    "Answers",
    "Cost",
    "Difference",
    "Interval",
    "answer_scores",
    "answers",
    "classifier",
    "cost",
    "describe",
    "few_shot",
    "interval",
    "linear_probe",
    "paired_difference",
    "probe",
    "recall_at_k",
    "recall_differences",
    "retrieval",
    "retrieval_ranks",
    "size_mb",
    "top_k",
    "top_k_accuracy",
    "with_interval",
    "zeroshot",
]
