"""One phase: micro-batches give the whole batch's gradient, schedules by eye, bad steps are skipped, KL goes down.

The average of the weights is the sum of its definition over the recorded weights of every step, and survives a stop.
"""

import importlib.util
import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_compress import CONTRASTIVE, DATA, phase
from tinyclip.data.loader import Inputs, PairLoader, Reader
from tinyclip.data.sources import open_source
from tinyclip.distill import train as module
from tinyclip.distill.checkpoints import Checkpoints, read
from tinyclip.distill.objective import Objective, total_loss
from tinyclip.distill.teacher import _from_clip, load_teacher
from tinyclip.distill.train import (
    Masking,
    TrainConfig,
    _Average,
    _seen_patches,
    _State,
    backward,
    train,
)
from tinyclip.distributed import World
from tinyclip.formats import checkpoint
from tinyclip.model import CLIP, MACS_PER_CALL
from tinyclip.shrink.masks import HardConcreteGates, LearnMasks, SizeConstraint
from tinyclip.start import Scratch, from_scratch
from tinyclip.stopping import Interrupted


def tiny_clip(seed: int = 0) -> CLIP:
    shape = Scratch(
        embed_dim=12, image_size=32, patch_size=16, image_width=16, image_layers=2,
        text_width=16, text_layers=2, head_dim=8, context_length=20, vocabulary=620,
    )  # fmt: skip
    return from_scratch(shape, open_source(DATA.train), torch.Generator().manual_seed(seed))


def tiny_resnet() -> CLIP:
    shape = Scratch(
        embed_dim=12, image_size=32, image_width=8, image_layers=(1, 1, 1, 1),
        text_width=16, text_layers=1, head_dim=8, context_length=20, vocabulary=620,
    )  # fmt: skip
    return from_scratch(shape, open_source(DATA.train), torch.Generator().manual_seed(0))


def tiny_inputs(pairs: int = 7) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 600, (pairs, 9), generator=generator)
    tokens[:, -1] = 619
    return Inputs(torch.randint(0, 256, (pairs, 3, 32, 32), dtype=torch.uint8, generator=generator), tokens)


def gradients(micro_batch_size, *, gated: bool, recompute: bool = False):
    student = tiny_clip().double()
    student.set_recompute(recompute)
    gates_of = HardConcreteGates(student.config, 1.0).double()
    gates = gates_of.sample(torch.Generator().manual_seed(0)) if gated else None
    config = TrainConfig(steps=1, micro_batch_size=micro_batch_size)

    def loss_of(image_BE, text_BE, scale):
        return total_loss(CONTRASTIVE, image_BE, text_BE, scale, (), None)

    loss, _ = backward(student, tiny_inputs(), gates, loss_of, config)
    named = [*student.named_parameters(), *(gates_of.named_parameters() if gated else ())]
    return loss, {name: parameter.grad for name, parameter in named}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 6])  # 7 = 2 x 3 + 1 = 6 + 1: the last micro-batch is short
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch_size, gated):
    loss, whole = gradients(None, gated=gated)
    micro_loss, parts = gradients(micro_batch_size, gated=gated)
    torch.testing.assert_close(micro_loss, loss, rtol=1e-12, atol=0)
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-9, atol=1e-13, msg=name)
    assert whole["logit_scale"].abs() > 0


def test_gradient_checkpointing_changes_no_gradient():
    _, plain = gradients(None, gated=True)
    _, recomputed = gradients(None, gated=True, recompute=True)
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-12, atol=1e-15, msg=name)


def test_the_learning_rate_by_eye():
    config = TrainConfig(steps=10, lr=1.0, warmup_steps=4)
    rates = [config.lr_at(step, 10) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[7] == pytest.approx(0.5) and 0 < rates[9] < 0.1
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_only_matrices_decay():
    state = _State(tiny_clip(), TrainConfig(steps=1, weight_decay=0.3), None, ())
    decayed, rest = state.optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.ndim >= 2 for p in decayed["params"])
    assert rest["weight_decay"] == 0 and all(p.ndim < 2 for p in rest["params"])


def test_a_non_finite_step_is_skipped_and_counted(tmp_path, monkeypatch):
    student, source = tiny_clip(), open_source(DATA.train)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    broken = torch.tensor(float("nan"))
    monkeypatch.setattr(
        "tinyclip.distill.train.total_loss", lambda *_, **__: (student.logit_scale * broken, {"contrastive": broken})
    )
    outcome = train(student, source, DATA, phase(3, objective=CONTRASTIVE), tmp_path)
    assert outcome.skipped_steps == 3 and outcome.steps == 3
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())


def test_a_step_whose_gradient_alone_is_not_finite_is_skipped(tmp_path):
    student, calls = tiny_clip(), []
    before = student.image.projection.weight.detach().clone()

    def break_first(grad):
        calls.append(grad)
        return grad * math.inf if len(calls) == 1 else grad

    student.text.projection.weight.register_hook(break_first)
    outcome = train(student, open_source(DATA.train), DATA, phase(2, objective=CONTRASTIVE), tmp_path)
    assert outcome.skipped_steps == 1 and all(parameter.isfinite().all() for parameter in student.parameters())
    assert not torch.equal(student.image.projection.weight, before)  # by the second step


def test_a_run_that_only_yields_non_finite_steps_stops(tmp_path, monkeypatch):
    student, source = tiny_clip(), open_source(DATA.train)
    broken = torch.tensor(float("inf"))
    monkeypatch.setattr("tinyclip.distill.train.total_loss", lambda *_, **__: (student.logit_scale * broken, {}))
    with pytest.raises(ValueError, match="diverged: the loss was not finite for 20 steps"):
        train(student, source, DATA, phase(50, objective=CONTRASTIVE), tmp_path)


def test_a_run_that_is_scored_at_every_step_stops_too(tmp_path, monkeypatch):
    student, source = tiny_clip(), open_source(DATA.train)
    broken = torch.tensor(float("inf"))
    monkeypatch.setattr("tinyclip.distill.train.total_loss", lambda *_, **__: (student.logit_scale * broken, {}))
    config = phase(50, objective=CONTRASTIVE, evaluate_every=1)
    with pytest.raises(ValueError, match="diverged: the loss was not finite for 20 steps"):
        train(student, source, DATA, config, tmp_path, evaluate=lambda _: {})


def test_distillation_lowers_the_divergence_from_the_teacher(tmp_path):
    teacher = load_teacher(str(checkpoint.save(tiny_clip(seed=0), tmp_path / "teacher")))
    student, source = tiny_clip(seed=1), open_source(DATA.train)
    train(student, source, DATA, phase(40, lr=3e-3), tmp_path / "run", teachers=[teacher])
    kl = [json.loads(line)["affinity_kl"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(kl) == 40 and sum(kl[-5:]) < 0.7 * sum(kl[:5])


def test_scores_are_written_every_so_many_steps(tmp_path):
    scores = iter([{"top1": 0.25}, {"top1": 0.5}])
    config = phase(4, objective=CONTRASTIVE, evaluate_every=2)
    train(tiny_clip(), open_source(DATA.train), DATA, config, tmp_path, evaluate=lambda _: next(scores))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("top1") for line in lines] == [None, 0.25, None, 0.5]


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    config = phase(2, objective=CONTRASTIVE, trackers=("tensorboard",))
    train(tiny_clip(), open_source(DATA.train), DATA, config, tmp_path)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_missing_tracker_says_what_to_install(tmp_path):
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    config = phase(2, objective=CONTRASTIVE, trackers=("wandb",))
    with pytest.raises(ValueError, match=r"pip install tinyclip\[wandb\]"):
        train(tiny_clip(), open_source(DATA.train), DATA, config, tmp_path)


def test_the_teacher_as_student_starts_at_zero_divergence(tmp_path):
    teacher = load_teacher(str(checkpoint.save(tiny_clip(), tmp_path / "teacher")))
    train(tiny_clip(), open_source(DATA.train), DATA, phase(1), tmp_path / "run", teachers=[teacher])
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["affinity_kl"] == pytest.approx(0, abs=1e-5) and line["grad_norm"] < 1e-4


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    source = open_source(DATA.train)
    train(tiny_clip(), source, DATA, phase(2, objective=CONTRASTIVE), tmp_path)
    with pytest.raises(ValueError, match="written with other training settings"):
        train(tiny_clip(), source, DATA, phase(3, objective=CONTRASTIVE), tmp_path)


def test_bf16_keeps_similarities_and_weights_in_fp32(tmp_path):
    student = tiny_clip()
    train(student, open_source(DATA.train), DATA, phase(2, objective=CONTRASTIVE, precision="bf16"), tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image_BE, text_BE = student(tiny_inputs().pixels, tiny_inputs().tokens)
    assert image_BE.dtype == text_BE.dtype == torch.float32
    torch.testing.assert_close(image_BE.norm(dim=-1), torch.ones(7), rtol=0, atol=1e-6)


def test_dropped_patches_are_a_pairs_own_until_the_last_steps():
    """Half of 4 patches, in 8 of 10 steps; whichever process reads the pair."""
    student, config = tiny_clip(), TrainConfig(steps=10, image_tokens=0.5, whole_images=0.2)
    loader = PairLoader(open_source(DATA.train), [Reader(student.preprocess, student.tokenizer)], batch_size=8, seed=0)
    share = PairLoader(open_source(DATA.train), loader.readers, batch_size=8, seed=0, world=World(rank=1, size=2))
    for step in range(10):
        seen = _seen_patches(student, loader.batch(step), config, step, 10, seed=7)
        if step >= 8:
            assert seen is None
            continue
        assert seen.shape == (8, 2) and all(len(set(row)) == 2 and set(row) <= set(range(4)) for row in seen.tolist())
        assert torch.equal(_seen_patches(student, share.batch(step), config, step, 10, seed=7), seen[4:])
    assert _seen_patches(student, loader.batch(0), TrainConfig(steps=10), 0, 10, seed=7) is None


def test_a_run_with_dropped_patches_learns(tmp_path):
    teacher = load_teacher(str(checkpoint.save(tiny_clip(seed=0), tmp_path / "teacher")))
    config = phase(40, lr=3e-3, image_tokens=0.5, micro_batch_size=3)
    train(tiny_clip(seed=1), open_source(DATA.train), DATA, config, tmp_path / "run", teachers=[teacher])
    kl = [json.loads(line)["affinity_kl"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(kl[-4:]) / 4 < 0.8 * sum(kl[:4]) / 4


def test_a_resnet_has_no_patches_to_drop(tmp_path):
    student = tiny_resnet()
    with pytest.raises(ValueError, match=r"image_tokens 0\.5: expected 1, since a ResNet's images have no tokens"):
        train(student, open_source(DATA.train), DATA, phase(1, image_tokens=0.5, objective=CONTRASTIVE), tmp_path)


DECAY = 0.8


def copied(student) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained(directory, student=None, *, evaluate=None, stop_before: int | None = None, **settings):
    """The weights after each step, and those that the student ends with: 5 steps, a checkpoint after 2, 4 and 5."""
    student = student or tiny_clip()
    steps, original = [], module._step

    def step(state, *arguments):
        if state.step == stop_before:
            raise Interrupted("cut off", 15)
        values = original(state, *arguments)
        steps.append(copied(student))
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_step", step)
        config = phase(5, lr=3e-3, objective=CONTRASTIVE, **settings)
        train(student, open_source(DATA.train), DATA, config, directory, evaluate=evaluate)
    return steps, copied(student)


def assert_is_average(got: dict[str, torch.Tensor], steps: list[dict[str, torch.Tensor]]) -> None:
    """Of the floating-point tensors; counts of batches are those of the last step."""
    share = [DECAY ** (len(steps) - 1 - i) for i in range(len(steps))]
    for name, tensor in got.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, steps[-1][name])
            continue
        mean = sum(s * step[name].double() for s, step in zip(share, steps, strict=True)) / sum(share)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-7, msg=name)


def test_the_average_by_eye():
    """Decay 1/2 of weights 1, 2, 4: (1/2 x 1 + 2) / (3/2), then (1/4 x 1 + 1/2 x 2 + 4) / (7/4)."""
    student = nn.Linear(1, 1, bias=False)
    average, seen = _Average(student, 0.5), []
    for steps, weight in enumerate([1.0, 2.0, 4.0], start=1):
        nn.init.constant_(student.weight, weight)
        average.update(steps)
        seen.append(average.mean["weight"].item())
    assert seen == pytest.approx([1, 5 / 3, 3])


@pytest.mark.parametrize("model", [tiny_clip, tiny_resnet])
def test_evaluations_and_the_end_have_the_averaged_weights_and_training_the_raw_ones(tmp_path, model):
    scored = []

    def evaluate(student):
        scored.append(copied(student))
        return {}

    plain, plain_end = trained(tmp_path / "plain", model())
    steps, end = trained(tmp_path / "ema", model(), ema_decay=DECAY, evaluate=evaluate, evaluate_every=2)
    assert same(plain_end, plain[-1])  # off by default
    assert len(steps) == 5 and all(same(one, other) for one, other in zip(steps, plain, strict=True))
    assert_is_average(end, steps)
    assert len(scored) == 2 and not same(end, steps[-1])
    assert_is_average(scored[0], steps[:2])
    assert_is_average(scored[1], steps[:4])


@pytest.mark.parametrize("model", [tiny_clip, tiny_resnet])
def test_an_average_that_was_cut_off_ends_with_the_same_bits(tmp_path, model):
    _, end = trained(tmp_path / "whole", model(), ema_decay=DECAY)
    with pytest.raises(Interrupted):
        trained(tmp_path / "run", model(), ema_decay=DECAY, stop_before=3)
    steps, resumed = trained(tmp_path / "run", model(), ema_decay=DECAY)
    assert len(steps) == 3 and same(resumed, end)
    steps, again = trained(tmp_path / "run", model(), ema_decay=DECAY)
    assert not steps and same(again, end)  # nothing was left to do


def test_an_average_is_not_begun_in_the_middle(tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path, stop_before=3)
    with pytest.raises(ValueError, match=r"ema_decay: None -> 0\.8"):
        trained(tmp_path, ema_decay=DECAY)


def test_a_checkpoint_from_before_there_were_averages_is_continued(tmp_path):
    _, end = trained(tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(tmp_path / "run", stop_before=3)
    checkpoints = Checkpoints(tmp_path / "run")
    content = read(checkpoints.latest(), torch.device("cpu"))
    settings = json.loads(content["settings"])
    assert settings.pop("ema_decay") is None and "average" not in content
    checkpoints.save(content | {"settings": json.dumps(settings)}, content["counts"]["step"])
    steps, resumed = trained(tmp_path / "run")
    assert len(steps) == 3 and same(resumed, end)


def test_gates_are_not_averaged(tmp_path):
    def masked(**settings):
        student, rule = tiny_clip(), LearnMasks(keep_params=0.5)
        gates, params = HardConcreteGates(student.config, rule.initial_log_alpha), student.config.prunable_params
        masking = Masking(gates, SizeConstraint(rule, reference_params=params, current_params=params, steps=4), rule)
        config = phase(4, lr=3e-3, objective=CONTRASTIVE, **settings)
        train(student, open_source(DATA.train), DATA, config, tmp_path / str(settings), masking=masking)
        return copied(student), copied(gates)

    (raw, gates), (averaged, averaged_gates) = masked(), masked(ema_decay=DECAY)
    assert same(gates, averaged_gates) and not same(raw, averaged)


def test_masks_that_were_cut_off_continue_to_the_same_bits(tmp_path):
    """Weights, gates, multipliers and the moments of both optimizers."""
    original = module._step

    def masked(directory, stop_before=None):
        def step(state, *arguments):
            if state.step == stop_before:
                raise Interrupted("cut off", 15)
            return original(state, *arguments)

        student, rule = tiny_clip(), LearnMasks(keep_params=0.5)
        gates, params = HardConcreteGates(student.config, rule.initial_log_alpha), student.config.prunable_params
        constraint = SizeConstraint(rule, reference_params=params, current_params=params, steps=5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_step", step)
            masking = Masking(gates, constraint, rule)
            config = phase(5, lr=3e-3, objective=CONTRASTIVE)
            train(student, open_source(DATA.train), DATA, config, directory, masking=masking)
        return [copied(part) for part in (student, gates, constraint)]

    with pytest.raises(Interrupted):
        masked(tmp_path / "run", stop_before=3)  # a checkpoint holds two steps
    for whole, continued in zip(masked(tmp_path / "whole"), masked(tmp_path / "run"), strict=True):
        assert same(whole, continued)


class CopiesBetweenDevices(TorchDispatchMode):
    """Whether each makes its caller wait: a blocking one to a GPU waits for all that is queued there."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            self.waits.append(not kwargs.get("non_blocking", False))
        return function(*args, **kwargs)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_asks_its_device_nothing_and_waits_for_no_copy(masked, micro_batch_size, monkeypatch):
    """On a device that holds no values, a read is an error. Live teacher, all terms, learned scale, dropped patches.

    Optimizers are left out: of CUDA's fused AdamW there is no such twin.
    """
    monkeypatch.setitem(MACS_PER_CALL, "cuda", 1.0)  # texts in chunks
    moved = []
    for user in ("model", "preprocess", "distill.train", "shrink.masks"):
        monkeypatch.setattr(
            f"tinyclip.{user}.to_device", lambda x, device: moved.append(x.shape) or x.to(device, non_blocking=True)
        )
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_settings: nullcontext())
    monkeypatch.setattr(module, "_has_fused", lambda _device: False)
    monkeypatch.setattr(module._State, "update", lambda *_: None)
    student, teacher, rule = tiny_clip(), _from_clip("teacher", tiny_clip(seed=1)), LearnMasks(keep_params=0.5)
    source = open_source(DATA.train)
    batch = PairLoader(source, [Reader(student.preprocess, student.tokenizer), teacher.reader], batch_size=8, seed=0)
    terms = Objective(affinity=1, contrastive=1, feature=1, student_scale="learned", teacher_scale="teacher")
    config = phase(4, objective=terms, micro_batch_size=micro_batch_size, image_tokens=0.5)
    masking = None
    if masked:
        gates, params = HardConcreteGates(student.config, rule.initial_log_alpha), student.config.prunable_params
        constraint = SizeConstraint(rule, reference_params=params, current_params=params, steps=4)
        masking = Masking(gates.to("meta"), constraint, rule)
    student.to("meta")
    state = _State(student, config, masking, [teacher.to("meta")])
    with CopiesBetweenDevices() as copies:
        values = module._step(state, batch.batch(0), config, [teacher], 0, 4, 0)
    assert values["loss"].is_meta and values["grad_norm"].is_meta
    assert len(copies.waits) == len(moved) and not any(copies.waits)
    assert moved.count((3,)) >= 4  # mean and standard deviation of pixels, of student and teacher


def test_a_learned_scale_is_put_back_to_where_it_has_a_gradient(tmp_path):
    student = tiny_clip()
    with torch.no_grad():
        student.logit_scale.fill_(5.0)
    train(student, open_source(DATA.train), DATA, phase(1, objective=CONTRASTIVE), tmp_path)
    assert student.logit_scale.item() == pytest.approx(math.log(100), abs=1e-5) and student.scale < 100
