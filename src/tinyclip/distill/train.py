"""One training phase: a student (and its gates, while masks are learned) against a teacher, or against captions alone.

Knows nothing of the phases before or after. What a step does is a function of (settings, seed, step) and of the state
in the checkpoint, so a phase that was cut off continues to the same weights.

On several processes each takes its share of every batch, and the loss compares all pairs: a step does what it does on
one process, but for the order of sums. Losses are `world.size` times their share of the gradient, and gradients are
averaged: the student's by a data parallel wrapper while backward runs, those of gates and projection after it.

Shape legend: B pairs, E student embedding, T teacher embedding.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tinyclip.config import MAX_WORKERS, Config, changes
from tinyclip.data.loader import Batch, Inputs, PairLoader, Reader, Skipped, check_share_of_bad
from tinyclip.data.sources import Source
from tinyclip.data.spec import DataSpec
from tinyclip.device import to_device
from tinyclip.distill.checkpoints import Checkpoints, check_like, read
from tinyclip.distill.metrics import LOGS, Metrics, Muted, Tracker
from tinyclip.distill.objective import Objective, Target, projection, total_loss
from tinyclip.distill.store import Stored, in_all
from tinyclip.distill.teacher import Teacher
from tinyclip.distributed import ALONE, World, data_parallel, unsynchronised
from tinyclip.formats.files import make_directory, write_digests
from tinyclip.model import CLIP, Gates, ImageConfig, lengths
from tinyclip.model_resnet import frozen_statistics
from tinyclip.redact import redacted
from tinyclip.shrink.masks import HardConcreteGates, LearnMasks, SizeConstraint
from tinyclip.stopping import Interrupted, stop_requests

MAX_NON_FINITE_STEPS = 20  # in a row: then the run has diverged


class TrainConfig(Config):
    """How long and how fast one phase trains. One of `steps` and `epochs` is given."""

    steps: int | None = Field(default=None, gt=0, description="batches; or give epochs")
    epochs: float | None = Field(default=None, gt=0, description="visits to every image; or give steps")
    batch_size: int = Field(default=256, ge=2, description="pairs of all processes; the loss compares all of them")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="pairs in a process's memory at once; the gradient is exactly that of the whole batch, but "
        "BatchNorms (of ResNets) see these pairs alone",
    )
    lr: float = Field(default=5e-4, gt=0, description="the highest learning rate")
    warmup_steps: int = Field(default=50, ge=0, description="linear; then a cosine to 0")
    weight_decay: float = Field(default=0.1, ge=0, description="on matrices; biases, norms and scales have none")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="of AdamW")
    eps: float = Field(default=1e-6, gt=0, description="of AdamW")
    clip_norm: float | None = Field(default=1.0, gt=0, description="of the gradient")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="score, and end with, the exponential moving average of the student's weights (not of gates); "
        "it reaches back about 1 / (1 - ema_decay) steps",
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of products; similarities are always fp32")
    image_tokens: float = Field(
        default=1.0, gt=0, le=1, description="share of its patches that a student's ViT sees: faster, not exact"
    )
    whole_images: float = Field(
        default=0.1, ge=0, le=1, description="with image_tokens, the last share of the steps, which see every patch"
    )
    recompute: bool = Field(default=False, description="gradient checkpointing")
    compile: bool = Field(default=False, description="torch.compile of both towers: slow start, faster steps on GPUs")
    objective: Objective = Objective()
    log_every: int = Field(default=10, gt=0, description="steps")
    checkpoint_every: int = Field(default=200, gt=0, description="steps")
    keep_checkpoints: int = Field(default=2, gt=0, description="the last so many; a damaged one is passed over")
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
    workers: int = Field(
        default=0, ge=0, le=MAX_WORKERS, description="processes that read pictures; 0 reads in the training process"
    )
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
    teachers: Sequence[Teacher | Stored] = (),
    masking: Masking | None = None,
    seed: int = 0,
    evaluate: Callable[[CLIP], dict[str, float]] | None = None,
    world: World = ALONE,
) -> Outcome:
    """Train `student` (and gates) in place; `directory` gets checkpoints, metrics.jsonl and skipped.jsonl.

    With `ema_decay`, `evaluate` sees the averaged weights, and the student ends with them.

    The newest checkpoint found there is continued. Raises Interrupted after Ctrl-C or SIGTERM, once the state is saved;
    ValueError where the objective needs a teacher and there is none, where the data is unfit or too much of it is bad,
    or the loss diverges.
    """
    if config.objective.needs_teacher and not teachers:
        raise ValueError("objective: affinity and feature need a teacher; without one set contrastive=1, affinity=0")
    if student.preprocess is None or student.tokenizer is None:
        raise ValueError("the student came without preprocessing or tokenizer, so it cannot read pairs")
    world.on_main(make_directory, directory)
    if config.image_tokens < 1 and not isinstance(student.config.image, ImageConfig):
        raise ValueError(f"image_tokens {config.image_tokens:g}: expected 1, since a ResNet's images have no tokens")
    if not config.objective.needs_teacher:
        teachers = ()
    readers = [Reader(student.preprocess, student.tokenizer)]
    readers += [teacher.reader for teacher in teachers if isinstance(teacher, Teacher)]
    stores = [teacher for teacher in teachers if isinstance(teacher, Stored)]
    state = _State(student, config, masking, teachers, world)
    settings = config.model_dump(mode="json") | {"seed": seed}  # those that decide what a step does
    settings["data"] = redacted(data.model_dump(mode="json", exclude={"workers", "max_bad_share"}))
    settings["masks"] = masking and masking.rule.model_dump(mode="json")
    checkpoints = Checkpoints(directory, keep=config.keep_checkpoints)
    state.resume(checkpoints, settings)
    loader = PairLoader(
        source,
        readers,
        batch_size=config.batch_size,
        seed=seed,
        workers=data.workers,
        crop_scale=data.crop_scale,
        views=stores[0].views if stores else None,
        may_show=partial(in_all, stores) if stores else None,
        start_step=state.step,
        world=world,
    )
    num_steps = config.num_steps(loader.steps_per_epoch)
    enough = loader.steps_per_epoch * config.batch_size  # items, to say whether too many are bad
    lately: Skipped = []  # of the bad ones, for the message
    student.train()
    student.set_recompute(config.recompute)
    student.set_compiled(config.compile)
    started = time.perf_counter()
    metrics: Muted = Muted()
    if world.is_main:
        metrics = Metrics(
            directory, start_step=state.step, total_steps=num_steps, trackers=config.trackers, sha256s=state.logs
        )
    try:
        with stop_requests() as requests:
            for batch in loader if state.step < num_steps else ():
                step = state.step
                last = step + 1 == num_steps
                stop, pairs, num_skipped = world.sums(len(requests), len(batch.keys), len(batch.skipped))
                state.pairs += pairs
                state.skipped_pairs += num_skipped
                skipped = world.concatenated(batch.skipped) if num_skipped else []
                metrics.skip(step, skipped)
                seen = state.pairs + state.skipped_pairs
                lately = (skipped + lately)[:3]
                check_share_of_bad(source.name, state.skipped_pairs, seen, enough, data.max_bad_share, lately)
                values = _step(state, batch, config, teachers, step, num_steps, seed)
                metrics.advance(step, pairs)
                scored = evaluate is not None and config.evaluate_every and (step + 1) % config.evaluate_every == 0
                if scored or step % config.log_every == 0 or last:
                    state.check_convergence()
                    if scored and evaluate is not None:
                        state.share_statistics()
                        with state.averaged():
                            values |= world.on_main(evaluate, student)
                        student.train()
                    metrics.write(step, _plain(values))
                if last or stop or (step + 1) % config.checkpoint_every == 0:
                    state.share_statistics()
                    state.logs = metrics.sync()
                    world.on_main(state.save, checkpoints, settings)
                if stop:
                    reached = f"stopped after step {step + 1} of {num_steps}, state saved in {directory}"
                    raise Interrupted(reached, requests[0] if requests else signal.SIGTERM)
                if last:
                    break
    finally:
        metrics.close()
        state.release()
        student.set_recompute(False)
        student.set_compiled(False)
    world.on_main(write_digests, directory, LOGS)
    if state.average is not None:
        state.average.swap()
    student.eval()
    seconds = time.perf_counter() - started
    return Outcome(state.step, state.pairs, state.skipped_pairs, int(state.skipped_steps), seconds)


def _plain(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(f"{float(value):.6g}") for name, value in values.items()}


class _State:
    """Everything that a checkpoint holds."""

    def __init__(
        self,
        student: CLIP,
        config: TrainConfig,
        masking: Masking | None,
        teachers: Sequence[Teacher | Stored],
        world: World = ALONE,
    ):
        self.student, self.config, self.masking, self.world = student, config, masking, world
        student.logit_scale.requires_grad_(config.objective.learns_scale)
        self.project = None
        if teachers:
            self.project = projection(config.objective, student.config.embed_dim, teachers[0].embed_dim)
        if self.project is not None:
            nn.init.orthogonal_(self.project.weight, generator=torch.Generator().manual_seed(0))
            self.project.to(student.device)
        self.step = self.pairs = self.skipped_pairs = 0
        self.logs: dict[str, str] = {}  # file: sha256 of what was told up to here
        self.skipped_steps, self.non_finite_in_a_row = (
            torch.zeros((), dtype=torch.int64, device=student.device) for _ in range(2)
        )
        self.optimizer = _adamw(student, self.project, config)
        self.gate_optimizer = None
        if masking is not None:
            lr = masking.rule.log_alpha_lr
            self.gate_optimizer = torch.optim.Adam(masking.gates.parameters(), lr=lr, fused=_has_fused(student.device))
        self.model = data_parallel(student, world)
        self.average = None if config.ema_decay is None else _Average(student, config.ema_decay)

    _COUNTS = ("step", "pairs", "skipped_pairs")
    _DEVICE_COUNTS = ("skipped_steps", "non_finite_in_a_row")  # nobody waits for them but a log line or a checkpoint

    def release(self) -> None:
        """Give the student back as it came: every weight learns."""
        self.student.logit_scale.requires_grad_(True)

    def share_gradients(self) -> None:
        """Those that the data parallel wrapper does not average."""
        besides = [part for part in (self.project, self.masking and self.masking.gates) if part is not None]
        self.world.mean_(p.grad for part in besides for p in part.parameters() if p.grad is not None)

    def share_statistics(self) -> None:
        """BatchNorms' running statistics, which no step reads: means over ranks are due when they are saved or used."""
        named = [*self.student.named_buffers(), *(self.average.mean.items() if self.average is not None else ())]
        self.world.mean_(b for name, b in named if name.rpartition(".")[2].startswith("running"))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While the student has its averaged weights, where an average is kept."""
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

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
        if self.config.objective.learns_scale:
            self.student.clip_scale_()
        if self.average is not None:
            self.average.update(self.step + 1)

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
        if self.average is not None:
            parts["average"] = self.average
        return parts

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: part for name, part in self._parts().items() if isinstance(part, torch.optim.Optimizer)}

    def save(self, checkpoints: Checkpoints, settings: dict[str, Any]) -> None:
        content = {name: part.state_dict() for name, part in self._parts().items()}
        for name in self._optimizers():
            del content[name]["param_groups"]  # which are of the settings
        content["counts"] = {name: int(getattr(self, name)) for name in (*self._COUNTS, *self._DEVICE_COUNTS)}
        content["settings"] = json.dumps(settings)
        content["logs"] = self.logs
        checkpoints.save(content, self.step)

    def resume(self, checkpoints: Checkpoints, settings: dict[str, Any]) -> None:
        """Continue from the newest checkpoint, if there is one. Raises ValueError where it is of something else."""
        path = self.world.on_main(checkpoints.latest)
        if path is None:
            return
        content = read(path, self.student.device)
        try:
            self._check(content, settings, str(path))
        except ValueError as error:
            raise ValueError(f"{' '.join(str(error).split())}; use another --run or delete it") from None
        for name, optimizer in self._optimizers().items():
            content[name]["param_groups"] = optimizer.state_dict()["param_groups"]
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        for name in self._COUNTS:
            setattr(self, name, content["counts"][name])
        for name in self._DEVICE_COUNTS:
            getattr(self, name).fill_(content["counts"][name])
        self.logs = content.get("logs", {})

    def _check(self, content: dict[str, Any], settings: dict[str, Any], where: str) -> None:
        """Raises ValueError where a checkpoint is of other settings, or not what `save` writes."""
        told = {"logs": dict.fromkeys(LOGS, "")} if "logs" in content else {}  # not of before they were noted
        check_like(content.get("settings"), "", f"{where}: settings")
        if changed := changes(redacted(json.loads(content["settings"])), json.loads(json.dumps(settings))):
            raise ValueError(f"{where}: written with other training settings: {changed}")
        expected = {name: part.state_dict() for name, part in self._parts().items()} | told
        expected["counts"] = dict.fromkeys((*self._COUNTS, *self._DEVICE_COUNTS), 0)
        for name, optimizer in self._optimizers().items():
            if isinstance(own := content.get(name), dict):
                own.pop("param_groups", None)  # as once written
            expected[name] = {"state": _state_like(optimizer, own)}
        check_like(content, expected | {"settings": ""}, where)


def _state_like(optimizer: torch.optim.Optimizer, content: Any) -> dict[int, dict[str, Tensor]]:
    """What a checkpoint holds of an optimizer: moments of its parameters' shapes, of those that had a gradient."""
    parameters = enumerate(p for group in optimizer.param_groups for p in group["params"])
    known = content.get("state") if isinstance(content, dict) else None
    moved = {i: p for i, p in parameters if not isinstance(known, dict) or i in known}
    return {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in moved.items()}


class _Average:
    """The exponential moving average of a student's weights and running statistics, kept beside it.

    After step t it is the mean of the weights after steps 1 to t, where those after step i count decay^(t - i). So it
    does not lean on where the student began: Kingma and Ba, "Adam", ICLR 2015, section 3, on the correction of bias.
    """

    def __init__(self, student: CLIP, decay: float):
        self.decay = decay
        self.student = {name: tensor for name, tensor in student.state_dict().items() if tensor.is_floating_point()}
        self.mean = {name: tensor.clone() for name, tensor in self.student.items()}

    def update(self, steps: int) -> None:
        """Take in the student's weights after so many steps."""
        share = (1 - self.decay) / (1 - self.decay**steps)  # of the newest: 1 after the first step
        get_ema_multi_avg_fn(1 - share)(list(self.mean.values()), list(self.student.values()), steps)

    def swap(self) -> None:
        """The student gets the average, and its own weights are kept here; a second call puts both back, to the bit."""
        for name, tensor in self.student.items():
            own = tensor.clone()
            tensor.copy_(self.mean[name])
            self.mean[name] = own

    def state_dict(self) -> dict[str, Tensor]:
        return self.mean

    def load_state_dict(self, mean: dict[str, Tensor]) -> None:
        self.mean = mean


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
    state: _State,
    batch: Batch,
    config: TrainConfig,
    teachers: Sequence[Teacher | Stored],
    step: int,
    num_steps: int,
    seed: int,
) -> dict[str, Any]:
    student, masking = state.student, state.masking
    lr = config.lr_at(step, num_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    targets = _targets(teachers, batch, config, state)

    def loss_of(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return total_loss(config.objective, image_BE, text_BE, scale, targets, state.project, world=state.world)

    gates = None
    if masking is not None:
        gates = masking.gates.sample(torch.Generator().manual_seed(seed * 1_000_003 + step))
    values: dict[str, Any] = {"lr": lr}
    inputs = replace(batch.inputs[0], seen=_seen_patches(student, batch, config, step, num_steps, seed))
    loss, terms = backward(state.model, inputs, gates, loss_of, config)
    values |= {"loss": loss, **terms, "scale": student.scale.detach()}
    state.share_gradients()
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
    return values | {"skipped_steps": state.skipped_steps, "skipped_pairs": state.skipped_pairs}


def _seen_patches(
    student: CLIP, batch: Batch, config: TrainConfig, step: int, num_steps: int, seed: int
) -> Tensor | None:
    """Some patches [B, n] of each image; None for all. A pair's are its own, on any number of processes.

    Source: Li et al., "Scaling Language-Image Pre-training via Masking" (FLIP), CVPR 2023.
    """
    if config.image_tokens == 1 or step >= num_steps * (1 - config.whole_images):
        return None
    patches = student.config.image.num_tokens - 1
    n = max(1, round(config.image_tokens * patches))
    drawn = [Random(f"{seed}/{step}/{visit.index}").sample(range(patches), n) for visit in batch.visits]
    return torch.tensor(drawn)


def _targets(teachers: Sequence[Teacher | Stored], batch: Batch, config: TrainConfig, state: _State) -> list[Target]:
    """What each teacher says of the batch, on the device."""
    live = iter(batch.inputs[1:])
    targets = []
    for teacher in teachers:
        if isinstance(teacher, Stored):
            image_BT, text_BT = (to_device(side, state.student.device) for side in teacher.embeddings(batch))
        else:
            image_BT, text_BT = _teach(teacher, next(live), config, state.world)
        targets.append((image_BT, text_BT, teacher.scale))
    return targets


def _teach(teacher: Teacher, inputs: Inputs, config: TrainConfig, world: World) -> tuple[Tensor, Tensor]:
    """The teacher's unit embeddings [B, T] of images and texts, micro-batch by micro-batch."""
    chunks = _micro_batches(inputs, config)
    calls = max(world.concatenated([len(chunks)])) if teacher.sharded else len(chunks)
    with _autocast(teacher.device, config):
        parts = [teacher.embed(*_to(inputs[chunks[i % len(chunks)]], teacher.device)[:3]) for i in range(calls)]
    image_BT, text_BT = (torch.cat(side) for side in zip(*parts[: len(chunks)], strict=True))
    return image_BT, text_BT


def _micro_batches(inputs: Inputs, config: TrainConfig) -> list[slice]:
    B = len(inputs)
    size = config.micro_batch_size or B
    return [slice(start, start + size) for start in range(0, B, size)]


def backward(
    model: nn.Module,
    inputs: Inputs,
    gates: Gates | None,
    loss_of: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    config: TrainConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate the gradient of `loss_of(image_BE, text_BE, scale)`, in micro-batches where the batch is larger.

    `model` is the student, or the data parallel wrapper of it.

    An in-batch loss cannot be summed over micro-batches. So the embeddings of the whole batch are computed first
    without a graph, the loss gives their gradient, and each micro-batch is computed again and back-propagated from it:
    exact, at the cost of one more forward pass; but a ResNet's BatchNorms see one micro-batch at a time. Source: Gao et
    al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), RepL4NLP 2021.
    """
    student: CLIP = getattr(model, "module", model)  # type: ignore[assignment]
    chunks = _micro_batches(inputs, config)
    leaves = gates
    if len(chunks) > 1 and gates is not None:
        leaves = gates.map(lambda gate: gate.detach().requires_grad_())

    def embed(module: nn.Module, rows: slice) -> tuple[Tensor, Tensor]:
        with _autocast(student.device, config):
            pixels, tokens_BL, length_B, seen_Bn = _to(inputs[rows], student.device)
            return module(pixels, tokens_BL, leaves, length_B, seen_Bn)

    if len(chunks) == 1:
        loss, terms = loss_of(*embed(model, chunks[0]), student.scale)
        loss.backward()
        return loss.detach(), terms
    with torch.no_grad(), frozen_statistics(student):
        parts = [embed(student, rows) for rows in chunks]
    image_BE, text_BE = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    scale = student.scale.detach().requires_grad_()
    loss, terms = loss_of(image_BE, text_BE, scale)
    loss.backward()
    for rows in chunks:
        last = rows is chunks[-1]
        with nullcontext() if last else unsynchronised(model):
            outputs, grads = list(embed(model, rows)), [image_BE.grad[rows], text_BE.grad[rows]]  # type: ignore[index]
            if last and scale.grad is not None:  # once
                outputs, grads = [*outputs, student.scale], [*grads, scale.grad]
            torch.autograd.backward(outputs, grads)
    if gates is not None and leaves is not None:
        pairs = [(z, leaf.grad) for z, leaf in zip(gates.flat(), leaves.flat(), strict=True) if leaf.grad is not None]
        torch.autograd.backward([z for z, _ in pairs], [grad for _, grad in pairs])
    return loss.detach(), terms


def _autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


def _to(inputs: Inputs, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pixels, token ids, on the CPU how many of these each row has, patches."""
    seen = None if inputs.seen is None else to_device(inputs.seen, device)
    return to_device(inputs.pixels, device), to_device(inputs.tokens, device), lengths(inputs.tokens), seen
