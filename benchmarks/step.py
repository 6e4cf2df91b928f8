"""One distillation step: the official recipe and open_clip's, on open_clip's own model, against ours.

    python benchmarks/step.py [--quick] [--threads 2]

    official    open_clip's towers, live teacher, gradient checkpointing, 77 tokens, the affinities in dense matrices
    open_clip   open_clip's towers and its DistillClipLoss, live teacher, 77 tokens
    live        ours, live teacher
    stored      ours, the teacher's embeddings at hand

All start from the same random weights and see the same batch: random pixels, captions of 4 to 77 tokens (log-normal,
mean 18). AdamW is in the time. Contenders take turns in one process, each round in another order; printed are the
machine, per case the median seconds, and the median and range over rounds of the ratio to ours. `gradient_error` is of
the first step: how far any weight's gradient is from the official one in fp32, relative to its largest element.

Source of the official step: wkcn/TinyCLIP, src/training/train.py and src/open_clip/clip_soft_loss.py.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from machine import prepare
from torch import Tensor, nn
from torch.nn import functional as F

from tinyclip.data.loader import Inputs
from tinyclip.distill.objective import Objective, total_loss
from tinyclip.distill.teacher import Teacher
from tinyclip.distill.train import TrainConfig, backward
from tinyclip.formats import zoo
from tinyclip.formats.open_clip import config_to_open_clip, from_open_clip, to_open_clip
from tinyclip.model import CLIP, initialise
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

SCALE = 50.0
WARM_UP = 3  # rounds: until then, memory that the process asks for is new to the machine; one where it is to be quick
CASES = {  # student, teacher, pairs
    "40M/32 from B/32": ("ViT-40M-32-Text-19M", "ViT-B-32", 32),
    "8M/16 from B/16": ("ViT-8M-16-Text-3M", "ViT-B-16", 24),
}


def clip(architecture: str) -> CLIP:
    config = zoo.config(f"tinyclip:{architecture}")
    generator = torch.Generator().manual_seed(0)
    return initialise(CLIP(config, preprocess=Preprocess(size=config.image.image_size)), generator)


def theirs(model: CLIP) -> nn.Module:
    """open_clip's model with the same weights."""
    peer = open_clip.CLIP(**config_to_open_clip(model.config))
    peer.load_state_dict(to_open_clip(model), strict=True)
    return peer


def batch(model: CLIP, pairs: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    side, text = model.config.image.image_size, model.config.text
    pixels = torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8, generator=generator)
    length_B = (torch.randn(pairs, generator=generator) * 0.5 + 2.77).exp().round().long().clamp(4, text.context_length)
    tokens_BL = torch.randint(1, text.vocab_size - 2, (pairs, text.context_length), generator=generator)
    position_L = torch.arange(text.context_length)
    tokens_BL[torch.arange(pairs), length_B - 1] = text.vocab_size - 1
    tokens_BL[position_L >= length_B[:, None]] = 0
    return Inputs(pixels, tokens_BL)


def official_loss(image_BE: Tensor, text_BE: Tensor, image_BT: Tensor, text_BT: Tensor) -> Tensor:
    """Every matrix is built: student and teacher, image to text and text to image."""
    losses = []
    for (x, y), (u, v) in (((image_BE, text_BE), (image_BT, text_BT)), ((text_BE, image_BE), (text_BT, image_BT))):
        losses.append(F.cross_entropy(SCALE * x @ y.T, (SCALE * u @ v.T).softmax(-1)))
    return sum(losses) / 2


class Contender:
    """`loss(inputs)` back-propagates; a step is that and AdamW."""

    def __init__(self, model: nn.Module, backpropagate: Callable[[nn.Module, Inputs], None]):
        self.model, self.backpropagate = model.train(), backpropagate
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, inputs: Inputs) -> float:
        started = time.perf_counter()
        self.backpropagate(self.model, inputs)
        self.optimizer.step()
        elapsed = time.perf_counter() - started
        self.optimizer.zero_grad(set_to_none=True)
        return elapsed


def contenders(student: CLIP, teacher: CLIP, inputs: Inputs, precision: str) -> dict[str, Contender]:
    preprocess = student.preprocess
    assert preprocess is not None
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    config = TrainConfig(steps=1, batch_size=len(inputs), precision=precision)
    objective = Objective()
    their_teacher, distill = theirs(teacher).eval(), open_clip.loss.DistillClipLoss()

    def their_embeddings(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        with autocast:
            pixels = preprocess.normalise(inputs.pixels)
            image, text = model.encode_image(pixels), model.encode_text(inputs.tokens)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def official(model: nn.Module, inputs: Inputs) -> None:
        with torch.no_grad():
            target = their_embeddings(their_teacher, inputs)
        official_loss(*their_embeddings(model, inputs), *target).backward()

    def open_clips(model: nn.Module, inputs: Inputs) -> None:
        with torch.no_grad():
            target = their_embeddings(their_teacher, inputs)
        scale = torch.tensor(SCALE)
        sum(distill(*their_embeddings(model, inputs), scale, *target, scale)).backward()

    def ours(target: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]:
        return lambda image_BE, text_BE, scale: total_loss(
            objective, image_BE, text_BE, scale, [(*target, SCALE)], None
        )

    asked = Teacher("", preprocess, Tokenizer.openai(77), teacher.config.embed_dim, SCALE, teacher)

    def embed(inputs: Inputs) -> tuple[Tensor, Tensor]:
        with autocast:
            return asked.embed(inputs.pixels, inputs.tokens)

    def live(model: nn.Module, inputs: Inputs) -> None:
        backward(model, inputs, None, ours(embed(inputs)), config)

    stored_embeddings = embed(inputs)

    def stored(model: nn.Module, inputs: Inputs) -> None:
        backward(model, inputs, None, ours(stored_embeddings), config)

    checkpointed = theirs(student)
    checkpointed.set_grad_checkpointing(True)
    return {
        "official": Contender(checkpointed, official),
        "open_clip": Contender(theirs(student), open_clips),
        "live": Contender(copy.deepcopy(student), live),
        "stored": Contender(copy.deepcopy(student), stored),
    }


def gradient_errors(runs: dict[str, Contender], exact: Contender, student: CLIP, inputs: Inputs) -> dict[str, float]:
    """The largest over all weights; `exact` is the official step in fp32. open_clip's loss is another."""

    def gradients(run: Contender) -> dict[str, Tensor]:
        run.backpropagate(run.model, inputs)
        found = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
        if not isinstance(run.model, CLIP):
            found = dict(from_open_clip({"logit_scale": torch.zeros(()), **found}, student.config).named_parameters())
        run.optimizer.zero_grad(set_to_none=True)
        return {name: grad.detach() for name, grad in found.items() if name != "logit_scale"}

    expected, errors = gradients(exact), {}
    for name in ("official", "live", "stored"):
        apart = [
            (grad - expected[weight]).abs().max() / expected[weight].abs().max()
            for weight, grad in gradients(runs[name]).items()
        ]
        errors[name] = float(f"{max(apart).item():.1e}")
    return errors


def measure(case: str, precision: str, rounds: int, warm_up: int, pairs: int | None = None) -> dict[str, object]:
    student_name, teacher_name, usual_pairs = CASES[case]
    pairs = pairs or usual_pairs
    student, teacher = clip(student_name), clip(teacher_name).eval()
    inputs = batch(student, pairs)
    runs = contenders(student, teacher, inputs, precision)
    exact = runs["official"] if precision == "fp32" else contenders(student, teacher, inputs, "fp32")["official"]
    row: dict[str, object] = {"case": case, "precision": precision, "pairs": pairs, "rounds": rounds}
    row["gradient_error"] = gradient_errors(runs, exact, student, inputs)
    del exact
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(-warm_up, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            elapsed = runs[name].step(inputs)
            if number >= 0:
                seconds[name].append(elapsed)
    row["seconds"] = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    row["seconds_least"] = {name: round(min(times), 3) for name, times in seconds.items()}
    for peer, mine in (("official", "stored"), ("official", "live"), ("open_clip", "stored"), ("open_clip", "live")):
        ratios = [a / b for a, b in zip(seconds[peer], seconds[mine], strict=True)]
        row[f"{peer}/{mine}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one case in fp32, 16 pairs, one round")
    options = parser.parse_args()
    prepare(options.threads, open_clip=open_clip.__version__)
    if options.quick:
        print(json.dumps(measure(next(iter(CASES)), "fp32", rounds=1, warm_up=1, pairs=16)), flush=True)
        return
    for case in CASES:
        for precision in ("fp32", "bf16"):
            print(json.dumps(measure(case, precision, options.rounds, WARM_UP)), flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
