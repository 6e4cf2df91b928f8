"""Embedding pictures, building a zero-shot classifier, and learning masks: ours against open_clip, or without masks.

    python benchmarks/inference.py [--quick] [--threads 2] [--classes 10]

    classifier   the first ImageNet classes of open_clip's list with its 80 templates; ViT-B/32's text tower
    images       32 pictures and one alone; ViT-B/32's image tower
    masks        one distillation step of ViT-B/32's shape while masks are learned, against the same without

Random weights; open_clip as it comes, and on our fp32 products. Contenders take turns in one process; printed are
medians, the median and range over rounds of the ratio of the first contender's time to the other's, and beside it the
smallest cosine of the embeddings.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import open_clip
import torch
from machine import prepare
from step import WARM_UP, batch, clip, theirs
from torch import Tensor
from torch.nn import functional as F

from tinyclip.distill.objective import Objective, total_loss
from tinyclip.distill.train import TrainConfig, backward
from tinyclip.evaluate.zeroshot import classifier
from tinyclip.shrink.masks import HardConcreteGates
from tinyclip.tokenizer import Tokenizer

Contenders = Mapping[str, Callable[[], Tensor]]


@torch.no_grad()
def classifiers(num_classes: int) -> Contenders:
    ours = clip("ViT-B-32").eval()
    ours.tokenizer = Tokenizer.openai(77)
    half, peer = copy.deepcopy(ours).bfloat16(), theirs(ours).eval()
    names, templates = open_clip.IMAGENET_CLASSNAMES[:num_classes], open_clip.OPENAI_IMAGENET_TEMPLATES
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def build(model) -> Tensor:
        return classifier(model, [(name,) for name in names], [template("{}") for template in templates])

    def their_build() -> Tensor:
        return open_clip.build_zero_shot_classifier(
            peer, tokenizer, names, templates, num_classes_per_batch=4, device="cpu"
        ).T

    return against(their_build, {"ours": lambda: build(ours), "ours, bf16": lambda: build(half)})


@torch.no_grad()
def image_encoders(pictures: int) -> Contenders:
    ours = clip("ViT-B-32").eval()
    half, peer = copy.deepcopy(ours).bfloat16(), theirs(ours).eval()
    pixels = torch.randn(pictures, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    return against(
        lambda: peer.encode_image(pixels, normalize=True),
        {
            "ours": lambda: ours.encode_image(pixels, normalize=True),
            "ours, bf16": lambda: half.encode_image(pixels, normalize=True),
        },
    )


def against(theirs: Callable[[], Tensor], ours: Contenders) -> Contenders:
    """open_clip as it comes, on torch's own fp32 products; then open_clip on the products that ours has."""

    def as_it_comes() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return theirs()
        finally:
            torch.set_float32_matmul_precision(before)

    return {"open_clip, torch's own products": as_it_comes, "open_clip": theirs} | dict(ours)


def mask_steps(pairs: int) -> Contenders:
    student = clip("ViT-B-32").train()
    inputs, config, objective = batch(student, pairs), TrainConfig(steps=1, batch_size=pairs), Objective()
    gates = HardConcreteGates(student.config, initial_log_alpha=2.0)
    target = tuple(F.normalize(torch.randn(pairs, 512), dim=-1) for _ in range(2))
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True) for module in (student, gates)]

    def loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return total_loss(objective, image_BE, text_BE, scale, [(*target, 50.0)], None)

    def step(masked: bool) -> Tensor:
        drawn = gates.sample(torch.Generator().manual_seed(0)) if masked else None
        value, _ = backward(student, inputs, drawn, loss, config)
        if masked:
            (gates.expected_params() / student.config.prunable_params).square().backward()
        for optimizer in optimizers if masked else optimizers[:1]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return value

    return {"masked": lambda: step(True), "dense": lambda: step(False)}


def measure(name: str, contenders: Contenders, rounds: int, warm_up: int, *, compare: bool = True) -> dict[str, object]:
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    outputs: dict[str, Tensor] = {}
    labels = list(contenders)
    for number in range(-warm_up, rounds):
        for label in labels[number % len(labels) :] + labels[: number % len(labels)]:
            started = time.perf_counter()
            with torch.set_grad_enabled(not compare):
                outputs[label] = contenders[label]()
            if number >= 0:
                seconds[label].append(time.perf_counter() - started)
    first, *others = labels
    row: dict[str, object] = {"what": name, "rounds": rounds}
    row["seconds"] = {label: round(statistics.median(times), 4) for label, times in seconds.items()}
    row["seconds_least"] = {label: round(min(times), 4) for label, times in seconds.items()}
    for other in others:
        ratios = [a / b for a, b in zip(seconds[first], seconds[other], strict=True)]
        row[f"{first}/{other}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
        if compare:
            cosine = F.cosine_similarity(outputs[first].double(), outputs[other].double())
            row[f"cosine of {other}"] = round(cosine.min().item(), 6)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="two classes, steps of eight pairs, one round")
    parser.add_argument("--only", nargs="+", choices=("classifier", "images", "masks"))
    options = parser.parse_args()
    prepare(options.threads, open_clip=open_clip.__version__)
    rounds, warm_up, num_classes, pairs = options.rounds, WARM_UP, options.classes, 32
    if options.quick:
        rounds, warm_up, num_classes, pairs = 1, 1, 2, 8
    cases: dict[str, list[tuple[str, Callable[[], Contenders]]]] = {
        "classifier": [(f"classifier of {num_classes} classes x 80 prompts", partial(classifiers, num_classes))],
        "images": [("32 images", partial(image_encoders, 32)), ("1 image", partial(image_encoders, 1))],
        "masks": [(f"mask-learning step, {pairs} pairs", partial(mask_steps, pairs))],
    }
    for what in options.only or cases:
        for name, contenders in cases[what]:
            print(json.dumps(measure(name, contenders(), rounds, warm_up, compare=what != "masks")), flush=True)


if __name__ == "__main__":
    main()
