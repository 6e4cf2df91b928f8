"""One training phase: a student (and its gates, while masks are learned) against a teacher, or against captions alone.

Knows nothing of the phases before or after. What a step does is a function of (settings, seed, step) and of the state
in the checkpoint, so a phase that was cut off continues to the same weights.

Shape legend: B pairs, E student embedding, T teacher embedding.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tinyclip.config import Config
from tinyclip.data.loader import Batch, Inputs, PairLoader, Reader
from tinyclip.data.sources import Source
from tinyclip.data.spec import DataSpec
from tinyclip.distill.metrics import JsonLines, Metrics, Tracker
from tinyclip.distill.objective import Objective, projection, total_loss
from tinyclip.distill.teacher import Teacher
from tinyclip.model import CLIP, Gates, lengths
from tinyclip.model_resnet import frozen_statistics
from tinyclip.shrink.masks import HardConcreteGates, LearnMasks, SizeConstraint

MAX_NON_FINITE_STEPS = 20  # in a row: then the run has diverged


class TrainConfig(Config):
    """How long and how fast one phase trains. One of `steps` and `epochs` is given."""

    steps: int | None = Field(default=None, gt=0, description="batches; or give epochs")
    epochs: float | None = Field(default=None, gt=0, description="visits to every image; or give steps")
    batch_size: int = Field(default=256, ge=2, description="pairs; the loss compares all of them")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="pairs in memory at once; the gradient is exactly that of the whole batch, but "
        "BatchNorms (of ResNets) see these pairs alone",
    )
    lr: float = Field(default=5e-4, gt=0, description="the highest learning rate")
    warmup_steps: int = Field(default=50, ge=0, description="linear; then a cosine to 0")
    weight_decay: float = Field(default=0.1, ge=0, description="on matrices; biases, norms and scales have none")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="of AdamW")
    eps: float = Field(default=1e-6, gt=0, description="of AdamW")
    clip_norm: float | None = Field(default=1.0, gt=0, description="of the gradient")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of products; similarities are always fp32")
    recompute: bool = Field(default=False, description="gradient checkpointing")
    compile: bool = Field(default=False, description="torch.compile of both towers: slow start, faster steps on GPUs")
    objective: Objective = Objective()
    log_every: int = Field(default=10, gt=0, description="steps")
    checkpoint_every: int = Field(default=200, gt=0, description="steps")
    evaluate_every: int | None = Field(default=None, gt=0, description="steps")
    trackers: tuple[Tracker, ...] = Field(default=(), description="optional libraries that also get the metrics")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("expected one of steps and epochs")
        return self

    def num_steps(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else max(1, round((self.epochs or 0) * steps_per_epoch))

    def lr_at(self, step: int, num_steps: int) -> float:
        """Linear from lr / warmup_steps, then a cosine to 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        return self.lr * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


class DataConfig(Config):
    """The training pairs and how they are read."""

    train: DataSpec = Field(description="what to train on: a path or a spec, see tinyclip.data.spec")
    workers: int = Field(default=0, ge=0, description="processes that read pictures; 0 reads in the training process")
    crop_scale: tuple[float, float] = Field(default=(0.9, 1.0), description="share of the picture's area in view")
    max_bad_share: float = Field(default=0.01, ge=0, le=1, description="of corrupt pairs; more stop the run")

    @model_validator(mode="after")
    def _crop_is_a_range(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: expected two shares, 0 < smallest <= largest <= 1, got {self.crop_scale}")
        return self


class Masking(NamedTuple):
    """The gates that learn beside the student, and what pulls them to the asked-for size."""

    gates: HardConcreteGates
    constraint: SizeConstraint
    rule: LearnMasks


class Interrupted(Exception):
    """The run was asked to stop (`signal_number`), and has saved where it was."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class Outcome(NamedTuple):
    steps: int
    pairs: int
    skipped_pairs: int
    skipped_steps: int  # non-finite
    seconds: float  # of the last call, where a phase was cut off and continued


def train(
    student: CLIP,
    source: Source,
    data: DataConfig,
    config: TrainConfig,
    directory: Path,
    *,
    teacher: Teacher | None = None,
    masking: Masking | None = None,
    seed: int = 0,
    evaluate: Callable[[CLIP], dict[str, float]] | None = None,
) -> Outcome:
    """Train `student` (and gates) in place; `directory` gets checkpoint.pt, metrics.jsonl and skipped.jsonl.

    A checkpoint found there is continued. Raises Interrupted after Ctrl-C or SIGTERM, once the state is saved;
    ValueError where the objective needs a teacher and there is none, where the data is unfit, or the loss diverges.
    """
    if config.objective.needs_teacher and teacher is None:
        raise ValueError("objective: affinity and feature need a teacher; without one set contrastive=1, affinity=0")
    if student.preprocess is None or student.tokenizer is None:
        raise ValueError("the student came without preprocessing or tokenizer, so it cannot read pairs")
    directory.mkdir(parents=True, exist_ok=True)
    readers = [Reader(student.preprocess, student.tokenizer)]
    readers += [teacher.reader] if teacher is not None and config.objective.needs_teacher else []
    state = _State(student, config, masking, teacher)
    state.resume(directory / "checkpoint.pt")
    loader = PairLoader(
        source,
        readers,
        batch_size=config.batch_size,
        seed=seed,
        workers=data.workers,
        crop_scale=data.crop_scale,
        max_bad_share=data.max_bad_share,
        start_step=state.step,
    )
    num_steps = config.num_steps(loader.steps_per_epoch)
    student.train()
    student.set_recompute(config.recompute)
    student.set_compiled(config.compile)
    started = time.perf_counter()
    metrics = Metrics(directory, start_step=state.step, total_steps=num_steps, trackers=config.trackers)
    skipped = JsonLines(directory / "skipped.jsonl", start_step=state.step)
    try:
        with _stop_requests() as stop:
            for batch in loader if state.step < num_steps else ():
                step = state.step
                last = step + 1 == num_steps
                values = _step(state, batch, config, teacher, step, num_steps, seed)
                for key, reason in batch.skipped:
                    skipped.write({"step": step, "key": key, "reason": reason})
                metrics.advance(step, len(batch.keys))
                scored = evaluate is not None and config.evaluate_every and (step + 1) % config.evaluate_every == 0
                if scored or step % config.log_every == 0 or last:
                    state.check_convergence()
                    if scored and evaluate is not None:
                        values |= evaluate(student)
                        student.train()
                    metrics.write(step, _plain(values))
                if last or stop or (step + 1) % config.checkpoint_every == 0:
                    state.save(directory / "checkpoint.pt")
                if stop:
                    reached = f"stopped after step {step + 1} of {num_steps}, state saved in {directory}"
                    raise Interrupted(reached, stop[0])
                if last:
                    break
    finally:
        metrics.close()
        skipped.close()
        student.set_recompute(False)
        student.set_compiled(False)
    student.eval()
    seconds = time.perf_counter() - started
    return Outcome(state.step, state.pairs, state.skipped_pairs, int(state.skipped_steps), seconds)


def _plain(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(f"{float(value):.6g}") for name, value in values.items()}


class _State:
    """Everything that a checkpoint holds."""

    def __init__(self, student: CLIP, config: TrainConfig, masking: Masking | None, teacher: Teacher | None):
        self.student, self.config, self.masking = student, config, masking
        self.project = None
        if teacher is not None:
            self.project = projection(config.objective, student.config.embed_dim, teacher.embed_dim)
        if self.project is not None:
            nn.init.orthogonal_(self.project.weight, generator=torch.Generator().manual_seed(0))
            self.project.to(student.device)
        self.step = self.pairs = self.skipped_pairs = 0
        self.skipped_steps, self.non_finite_in_a_row = (
            torch.zeros((), dtype=torch.int64, device=student.device) for _ in range(2)
        )
        self.optimizer = _adamw(student, self.project, config)
        self.gate_optimizer = None
        if masking is not None:
            lr = masking.rule.log_alpha_lr
            self.gate_optimizer = torch.optim.Adam(masking.gates.parameters(), lr=lr, fused=_has_fused(student.device))

    _COUNTS = ("step", "pairs", "skipped_pairs")
    _DEVICE_COUNTS = ("skipped_steps", "non_finite_in_a_row")  # nobody waits for them but a log line or a checkpoint

    def update(self, is_finite: Tensor) -> None:
        """A step of the optimizers, or none where the loss or its gradient is not finite: the device decides."""
        self.skipped_steps += ~is_finite
        self.non_finite_in_a_row = torch.where(is_finite, 0, self.non_finite_in_a_row + 1)
        for optimizer in (self.optimizer, self.gate_optimizer):
            if optimizer is None:
                continue
            if optimizer.defaults["fused"]:
                optimizer.found_inf = (~is_finite).float()  # type: ignore[union-attr]  fused kernels then change nothing
                optimizer.step()
            elif is_finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def check_convergence(self) -> None:
        """Raises ValueError where the run has diverged."""
        if self.non_finite_in_a_row >= MAX_NON_FINITE_STEPS:
            raise ValueError(
                f"training diverged: the loss was not finite for {int(self.non_finite_in_a_row)} steps up to step "
                f"{self.step - 1}; lower lr (now {self.config.lr:g}) or look for broken pictures"
            )

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"student": self.student, "optimizer": self.optimizer}
        if self.project is not None:
            parts["project"] = self.project
        if self.masking is not None:
            parts |= {"gates": self.masking.gates, "constraint": self.masking.constraint}
            parts["gate_optimizer"] = self.gate_optimizer
        return parts

    def save(self, path: Path) -> None:
        """Atomic: a reader sees the old checkpoint or the new one."""
        content = {name: part.state_dict() for name, part in self._parts().items()}
        content["counts"] = {name: int(getattr(self, name)) for name in (*self._COUNTS, *self._DEVICE_COUNTS)}
        content["settings"] = self.config.model_dump_json()
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def resume(self, path: Path) -> None:
        """Continue from `path` if it is there. Raises ValueError for a checkpoint of other settings."""
        if not path.exists():
            return
        content = torch.load(path, map_location=self.student.device, weights_only=True)
        if content["settings"] != self.config.model_dump_json():
            raise ValueError(f"{path}: was written with other training settings; use another --run or delete it")
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        for name in self._COUNTS:
            setattr(self, name, content["counts"][name])
        for name in self._DEVICE_COUNTS:
            getattr(self, name).fill_(content["counts"][name])


def _adamw(student: CLIP, project: nn.Linear | None, config: TrainConfig) -> torch.optim.AdamW:
    """Decay on matrices only."""
    parameters = [p for p in student.parameters() if p.requires_grad] + list(project.parameters() if project else ())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=_has_fused(student.device)
    )


def _has_fused(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


def _step(
    state: _State, batch: Batch, config: TrainConfig, teacher: Teacher | None, step: int, num_steps: int, seed: int
) -> dict[str, Any]:
    student, masking = state.student, state.masking
    lr = config.lr_at(step, num_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    target = None
    if teacher is not None and config.objective.needs_teacher:
        target = (*_teach(teacher, batch.inputs[1], config), teacher.scale)

    def loss_of(image_BE: Tensor, text_BE: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return total_loss(config.objective, image_BE, text_BE, student.scale, target, state.project)

    gates = None
    if masking is not None:
        gates = masking.gates.sample(torch.Generator().manual_seed(seed * 1_000_003 + step))
    values: dict[str, Any] = {"lr": lr}
    loss, terms = backward(student, batch.inputs[0], gates, loss_of, config)
    values |= {"loss": loss, **terms, "scale": student.scale.detach()}
    if masking is not None:
        sparsity = masking.constraint.sparsity(masking.gates)
        masking.constraint.penalty(sparsity, step).backward()
        values |= {"sparsity": sparsity.detach(), "target_sparsity": masking.constraint.target(step)}
        masking.constraint.ascend(sparsity, step)
    values["grad_norm"] = nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm or math.inf)
    state.update(torch.isfinite(loss + values["grad_norm"]))
    if masking is not None:
        masking.gates.clamp_()
    state.step = step + 1
    state.pairs += len(batch.keys)
    state.skipped_pairs += len(batch.skipped)
    return values | {"skipped_steps": state.skipped_steps, "skipped_pairs": state.skipped_pairs}


def _teach(teacher: Teacher, inputs: Inputs, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The teacher's unit embeddings [B, T] of images and texts, micro-batch by micro-batch."""
    with _autocast(teacher.device, config):
        parts = [teacher.embed(*_to(inputs[rows], teacher.device)) for rows in _micro_batches(inputs, config)]
    image_BT, text_BT = (torch.cat(side) for side in zip(*parts, strict=True))
    return image_BT, text_BT


def _micro_batches(inputs: Inputs, config: TrainConfig) -> list[slice]:
    B = len(inputs)
    size = config.micro_batch_size or B
    return [slice(start, start + size) for start in range(0, B, size)]


def backward(
    student: CLIP,
    inputs: Inputs,
    gates: Gates | None,
    loss_of: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    config: TrainConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate the gradient of `loss_of(image_BE, text_BE)`, in micro-batches where the batch is larger than one.

    An in-batch loss cannot be summed over micro-batches. So the embeddings of the whole batch are computed first
    without a graph, the loss gives their gradient, and each micro-batch is computed again and back-propagated from it:
    exact, at the cost of one more forward pass; but a ResNet's BatchNorms see one micro-batch at a time. Source: Gao et
    al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), RepL4NLP 2021.
    """
    chunks = _micro_batches(inputs, config)
    if len(chunks) == 1:
        with _autocast(student.device, config):
            pixels, tokens_BL, length_B = _to(inputs, student.device)
            image_BE, text_BE = student(pixels, tokens_BL, gates, length_B)
        loss, terms = loss_of(image_BE, text_BE)
        loss.backward()
        return loss.detach(), terms

    leaves = None if gates is None else gates.map(lambda gate: gate.detach().requires_grad_())

    def embed(rows: slice) -> tuple[Tensor, Tensor]:
        with _autocast(student.device, config):
            pixels, tokens_BL, length_B = _to(inputs[rows], student.device)
            return student(pixels, tokens_BL, leaves, length_B)

    with torch.no_grad(), frozen_statistics(student):
        parts = [embed(rows) for rows in chunks]
    image_BE, text_BE = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    loss, terms = loss_of(image_BE, text_BE)
    loss.backward()
    for rows in chunks:
        torch.autograd.backward(embed(rows), (image_BE.grad[rows], text_BE.grad[rows]))  # type: ignore[index]
    if gates is not None and leaves is not None:
        pairs = [(z, leaf.grad) for z, leaf in zip(gates.flat(), leaves.flat(), strict=True) if leaf.grad is not None]
        torch.autograd.backward([z for z, _ in pairs], [grad for _, grad in pairs])
    return loss.detach(), terms


def _autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


def _to(inputs: Inputs, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, token ids, and on the CPU how many of these each row has; a copy to a GPU runs beside its work."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return moved(inputs.pixels), moved(inputs.tokens), lengths(inputs.tokens)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM append to, instead of ending the process in the middle of a step."""
    requests: list[int] = []
    try:
        previous = {
            number: signal.signal(number, lambda number, _frame: requests.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread: the caller handles signals
        yield requests
        return
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
