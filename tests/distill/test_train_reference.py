"""A training phase equals a plain loop over the definitions, step by step: weights, gates, multipliers and averages.

`loop` calls the model's forward, the source, tokenizer and preprocessing, and the teacher; everything else that a step
does is written out again here, slowly, from its source. In fp64 the two differ by the order of sums alone.
"""

import copy
import dataclasses
import math
from random import Random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.distill.test_train import tiny_clip, tiny_inputs
from tinyclip import compress as story
from tinyclip.data.loader import Reader
from tinyclip.data.sources import open_source
from tinyclip.data.spec import DataSpec
from tinyclip.distill.objective import Objective
from tinyclip.distill.teacher import _from_clip
from tinyclip.distill.train import DataConfig, Masking, TrainConfig, train
from tinyclip.formats import checkpoint
from tinyclip.formats.files import read_record
from tinyclip.model import CLIP, Gates, TowerGates, initialise
from tinyclip.recipe import Recipe, Stage
from tinyclip.shrink.keep import Keep
from tinyclip.shrink.masks import HardConcreteGates, LearnMasks, SizeConstraint

STEPS, SEED = 6, 3
# 20 pictures of three captions each make two batches an epoch, and four pictures that it leaves out.
PAIRS = DataConfig(train=DataSpec.parse("scenes?count=20"), crop_scale=(0.3, 0.9))


# The definitions.


class Adam:
    """Kingma and Ba, ICLR 2015, algorithm 1; decay apart from the gradient (Loshchilov and Hutter, ICLR 2019)."""

    def __init__(self, parameters, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
        self.parameters, self.betas, self.eps, self.decay, self.steps = list(parameters), betas, eps, decay, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr):
        self.steps += 1
        beta1, beta2 = self.betas
        for p, (m, v) in zip(self.parameters, self.moments, strict=True):
            m.copy_(beta1 * m + (1 - beta1) * p.grad)
            v.copy_(beta2 * v + (1 - beta2) * p.grad**2)
            if p.ndim >= 2:  # biases, norms and scales do not decay
                p -= lr * self.decay * p
            p -= lr * (m / (1 - beta1**self.steps)) / ((v / (1 - beta2**self.steps)).sqrt() + self.eps)


def learning_rate(config, step, num_steps):
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / (num_steps - config.warmup_steps)))


def pairs_of(source, data, config, seed, step):
    """Items, captions, pictures with boxes: an epoch is a permutation, a visit draws a caption, then a crop."""
    epoch, position = divmod(step, len(source) // config.batch_size)
    order = torch.Generator().manual_seed(Random(f"{seed}/{epoch}").getrandbits(63))
    items = torch.randperm(len(source), generator=order).tolist()[position * config.batch_size :][: config.batch_size]
    captions, crops = [], []
    for item in items:
        random, own, image = Random(f"{seed}/{epoch}/{item}"), source.captions(item), source.image(item)
        captions.append(own[random.randrange(len(own))])
        width, height = image.size
        share = random.uniform(*data.crop_scale)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        aspect = min(max(aspect, share * width / height), width / (share * height))  # what fits into the picture
        box_width, box_height = (share * width * height * aspect) ** 0.5, (share * width * height / aspect) ** 0.5
        left, top = random.random() * (width - box_width), random.random() * (height - box_height)
        crops.append((image, (left, top, min(left + box_width, width), min(top + box_height, height))))
    return items, captions, crops


def read(reader, captions, crops):
    return torch.stack([reader.preprocess.crop(image, box) for image, box in crops]), reader.tokenizer(captions)


def affinity(image_BE, text_BE, scale, teacher_image_BT, teacher_text_BT, teacher_scale):
    """Wu et al., ICCV 2023, equations 2 to 4."""
    teacher = teacher_scale * teacher_image_BT.to(image_BE) @ teacher_text_BT.to(image_BE).T
    student = scale * image_BE @ text_BE.T
    return (F.cross_entropy(student, teacher.softmax(1)) + F.cross_entropy(student.T, teacher.T.softmax(1))) / 2


def loss_of(objective, image_BE, text_BE, scale, targets, project):
    student_scale = scale if objective.student_scale == "learned" else objective.student_scale
    scales = [own if objective.teacher_scale == "teacher" else objective.teacher_scale for _, _, own in targets]
    terms = [
        affinity(image_BE, text_BE, student_scale, *target[:2], own)
        for target, own in zip(targets, scales, strict=True)
    ]
    loss = objective.affinity * sum(terms) / max(1, len(terms))
    if objective.contrastive:  # Radford et al., 2021, figure 3
        student, own = scale * image_BE @ text_BE.T, torch.arange(len(image_BE))
        contrastive = (F.cross_entropy(student, own) + F.cross_entropy(student.T, own)) / 2
        loss = loss + objective.contrastive * contrastive
    if objective.feature:
        sides = [side if project is None else project(side) for side in (image_BE, text_BE)]
        cosines = [F.cosine_similarity(own, theirs) for own, theirs in zip(sides, targets[0][:2], strict=True)]
        loss = loss + objective.feature * sum((1 - cosine_B).mean() for cosine_B in cosines) / 2
    return loss


class HardConcrete:
    """Louizos et al., ICLR 2018: a concrete variable of temperature 2/3, stretched to (-0.1, 1.1) and cut to [0, 1]."""

    def __init__(self, config, rule, dtype):
        self.towers = (config.image, config.text)
        sizes = [
            (tower.width, *(b.heads for b in tower.blocks), *(b.ffn for b in tower.blocks)) for tower in self.towers
        ]
        new = [torch.full((size,), rule.initial_log_alpha, dtype=dtype) for size in sum(sizes, ())]
        self.log_alphas = [log_alpha.requires_grad_() for log_alpha in new]

    def shaped(self, vectors):
        rest, towers = iter(vectors), []
        for tower in self.towers:
            width, heads = next(rest), tuple(next(rest) for _ in tower.blocks)
            towers.append(TowerGates(width, heads, tuple(next(rest) for _ in tower.blocks)))
        return Gates(*towers)

    def drawn(self, generator):
        gates = []
        for log_alpha in self.log_alphas:
            u = torch.rand(len(log_alpha), generator=generator).clamp(1e-6, 1 - 1e-6).to(log_alpha)
            concrete = ((u.log() - (1 - u).log() + log_alpha) / (2 / 3)).sigmoid()
            gates.append((concrete * 1.2 - 0.1).clamp(0, 1))
        return self.shaped(gates)

    def expected_params(self):
        """Heads, neurons and output biases of every block, each as large as the open part of the width makes it."""
        total = 0.0
        opened = self.shaped([(a - (2 / 3) * math.log(0.1 / 1.1)).sigmoid().sum() for a in self.log_alphas])
        for config, tower in zip(self.towers, opened, strict=True):
            width = tower.width_D
            for heads, ffn in zip(tower.heads, tower.ffn, strict=True):
                total = total + heads * config.head_dim * (4 * width + 3) + width + ffn * (2 * width + 1) + width
        return total


def loop(student, data, config, *, teachers=(), rule=None, reference_params=None, seed=SEED):
    """After each step: weights (averaged where the settings say so), log alphas and multipliers."""
    source, objective = open_source(data.train), config.objective
    readers = [Reader(student.preprocess, student.tokenizer), *(teacher.reader for teacher in teachers)]
    num_steps = config.steps or round(config.epochs * (len(source) // config.batch_size))
    scale_learns = objective.student_scale == "learned" or objective.contrastive > 0
    learned, project = [p for p in student.parameters() if scale_learns or p is not student.logit_scale], None
    if objective.feature and teachers[0].embed_dim != student.config.embed_dim:
        project = nn.Linear(student.config.embed_dim, teachers[0].embed_dim, bias=False)
        nn.init.orthogonal_(project.weight, generator=torch.Generator().manual_seed(0))
    adamw = Adam(
        [*learned, *(project.parameters() if project else ())],
        (config.beta1, config.beta2), config.eps, config.weight_decay,
    )  # fmt: skip
    if rule is not None:
        gates = HardConcrete(student.config, rule, student.logit_scale.dtype)
        gate_adam, linear, quadratic = Adam(gates.log_alphas), torch.tensor(0.0), torch.tensor(10.0)
        start = 1 - student.config.prunable_params / reference_params
    weights = []
    for step in range(num_steps):
        items, captions, crops = pairs_of(source, data, config, seed, step)
        seen = None
        if step < num_steps * (1 - config.whole_images) and config.image_tokens < 1:
            patches = student.config.image.num_tokens - 1
            count = max(1, round(config.image_tokens * patches))
            seen = torch.tensor([Random(f"{seed}/{step}/{item}").sample(range(patches), count) for item in items])
        drawn = None if rule is None else gates.drawn(torch.Generator().manual_seed(seed * 1_000_003 + step))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            targets = [
                (*teacher.embed(*read(reader, captions, crops)), teacher.scale)
                for teacher, reader in zip(teachers, readers[1:], strict=True)
            ]
            image_BE, text_BE = student(*read(readers[0], captions, crops), drawn, None, seen)
        scale = student.logit_scale.exp().clamp(max=100)
        loss = loss_of(objective, image_BE, text_BE, scale, targets, project)
        for p in adamw.parameters + (gates.log_alphas if rule else []):
            p.grad = torch.zeros_like(p)
        loss.backward()
        if rule is not None:  # Wang et al., EMNLP 2020: descent on the gates, ascent on the multipliers
            share = min(1.0, step / (rule.target_warmup * num_steps)) if rule.target_warmup else 1.0
            gap = 1 - gates.expected_params() / reference_params - (start + (1 - rule.keep_params - start) * share)
            (linear * gap + quadratic * gap**2).backward()
            linear = linear + rule.multiplier_lr * gap.detach()
            quadratic = quadratic + rule.multiplier_lr * gap.detach() ** 2
        norm = sum((p.grad**2).sum() for p in learned).sqrt()
        for p in learned:
            p.grad *= 1 if config.clip_norm is None else min(1.0, config.clip_norm / (norm + 1e-6))
        if (loss + norm).isfinite():
            adamw.step(learning_rate(config, step, num_steps))
            if rule is not None:
                gate_adam.step(rule.log_alpha_lr)
        with torch.no_grad():
            if scale_learns:
                student.logit_scale.clamp_(max=math.log(100) - 1e-6)
            for log_alpha in gates.log_alphas if rule else ():
                log_alpha.clamp_(-math.log(100), math.log(100))
        weights.append({name: p.detach().clone() for name, p in student.named_parameters()})
        after = dict(weights[-1])
        if config.ema_decay is not None:
            counts = [config.ema_decay ** (step - i) for i in range(step + 1)]
            after = {
                name: sum(c * past[name] for c, past in zip(counts, weights, strict=True)) / sum(counts)
                for name in after
            }
        if rule is not None:
            after |= {f"gate {i}": log_alpha.detach().clone() for i, log_alpha in enumerate(gates.log_alphas)}
            after |= {"linear": linear, "quadratic": quadratic}
        yield after


# What is judged.


def trained(student, directory, data, config, *, rule=None, reference_params=None, seed=SEED, **how):
    """The same of `train`, which scores after every step; and the weights that the student is left with."""
    steps, masking = [], None
    if rule is not None:
        gates = HardConcreteGates(student.config, rule.initial_log_alpha).to(student.logit_scale.dtype)
        sizes = {"reference_params": reference_params, "current_params": student.config.prunable_params}
        masking = Masking(gates, SizeConstraint(rule, **sizes, steps=config.steps).to(student.logit_scale.dtype), rule)

    def look(model):
        steps.append(state_of(model, masking))
        return {}

    source = open_source(data.train)
    config = config.model_copy(update={"evaluate_every": 1})
    outcome = train(student, source, data, config, directory, masking=masking, seed=seed, evaluate=look, **how)
    return steps, state_of(student, masking), outcome


def state_of(student, masking):
    found = {name: p.detach().clone() for name, p in student.named_parameters()}
    if masking is not None:
        found |= {f"gate {i}": p.detach().clone() for i, p in enumerate(masking.gates.parameters())}
        found |= {name: getattr(masking.constraint, name).clone() for name in ("linear", "quadratic")}
    return found


def difference(ours, theirs):
    """The largest of any weight."""
    assert ours.keys() == theirs.keys()
    return max(gap(ours[name], theirs[name]) for name in ours)


def gap(ours, theirs):
    return (ours.double() - theirs.double()).abs().max().item()


def moved(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


STUDENT, TEACHERS = tiny_clip(seed=1), [_from_clip(f"teacher {seed}", tiny_clip(seed=seed)) for seed in (0, 2)]
PARAMS = STUDENT.config.prunable_params
INPUTS = tiny_inputs().pixels, tiny_inputs().tokens
MASKS = LearnMasks(keep_params=0.4, log_alpha_lr=0.3, multiplier_lr=2.0, initial_log_alpha=4.375, target_warmup=0.5)
ALL_TERMS = Objective(affinity=0.7, contrastive=0.4, feature=0.6, student_scale="learned", teacher_scale="teacher")
UNSCALED = {
    "clip_norm": None,
    "eps": 1.0,
    "lr": 0.3,
}  # a step is as large as the loss; else Adam and the clip make it 1
SCENARIOS = {
    "published": ({}, {}),
    "no-clip-and-no-warm-up": ({"clip_norm": None, "warmup_steps": 0}, {}),
    "terms": ({"objective": ALL_TERMS}, {}),
    "two-teachers": (UNSCALED | {"objective": Objective(student_scale=20, teacher_scale=35)}, {"teachers": TEACHERS}),
    "captions": ({"objective": Objective(affinity=0, contrastive=1)}, {"teachers": ()}),
    "gates": ({"weight_decay": 0.05}, {"rule": MASKS, "reference_params": 2 * PARAMS}),
    "gates-in-micro-batches": ({"micro_batch_size": 3}, {"rule": MASKS, "reference_params": PARAMS}),
    "micro-batches": ({"micro_batch_size": 3, "objective": ALL_TERMS}, {}),
    "average": ({"ema_decay": 0.7}, {}),
    "patches": ({"image_tokens": 0.5, "whole_images": 0.3}, {}),
    "recomputation": ({"recompute": True}, {"rule": MASKS, "reference_params": PARAMS}),
    "constant-target": ({}, {"rule": MASKS.model_copy(update={"target_warmup": 0}), "reference_params": PARAMS}),
}  # fmt: skip


def settings(**changes):
    own = {"steps": STEPS, "batch_size": 8, "lr": 3e-3, "warmup_steps": 2, "weight_decay": 0.4, "beta1": 0.8}
    return TrainConfig(**own | {"beta2": 0.95, "clip_norm": 0.05, "checkpoint_every": 4} | changes)


def assert_is_the_loop(student, directory, config, *, tolerance=1e-9, loop_how=None, **how):
    """After every step, and at the end."""
    expected = list(loop(copy.deepcopy(student), PAIRS, config, **how | (loop_how or {})))
    steps, end, outcome = trained(student, directory, PAIRS, config, **how)
    assert len(steps) == STEPS
    for step, (ours, theirs) in enumerate(zip([*steps, end], [*expected, expected[-1]], strict=True)):
        assert difference(ours, theirs) < tolerance, step
    return expected, outcome


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_step_is_that_of_the_plain_loop(scenario, tmp_path):
    changes, how = SCENARIOS[scenario]
    student, how = copy.deepcopy(STUDENT).double(), {"teachers": TEACHERS[:1], **how}
    expected, _ = assert_is_the_loop(student, tmp_path, settings(**changes), **how)
    assert len(moved(expected[0], expected[-1])) > 30  # every vector and matrix learns


def test_gates_reach_their_limit_and_the_clip_is_at_work():
    """Or the scenarios would judge neither."""
    _, how = SCENARIOS["gates"]
    *_, last = loop(copy.deepcopy(STUDENT).double(), PAIRS, settings(), teachers=TEACHERS[:1], **how)
    at_limit = torch.cat([last[name] for name in last if name.startswith("gate")]).abs() == math.log(100)
    assert 0 < at_limit.sum() < len(at_limit)
    loose = list(loop(copy.deepcopy(STUDENT).double(), PAIRS, settings(clip_norm=None), teachers=TEACHERS[:1], **how))
    assert difference(loose[-1], last) > 1e-5


def test_a_scale_above_its_limit_is_put_back_and_learns(tmp_path):
    student = copy.deepcopy(STUDENT).double()
    nn.init.constant_(student.logit_scale, 4.7)
    config = settings(objective=Objective(affinity=0, contrastive=1))
    expected, _ = assert_is_the_loop(student, tmp_path, config)
    assert expected[0]["logit_scale"] == math.log(100) - 1e-6 > expected[-1]["logit_scale"]


def test_features_are_projected_to_a_larger_teacher(tmp_path):
    """The projection learns beside the student, at its rate and decay; it is no part of the clip. In fp32."""
    shape = TEACHERS[0].clip.config.model_copy(update={"embed_dim": 20})
    clip = CLIP(shape, preprocess=STUDENT.preprocess, tokenizer=STUDENT.tokenizer)
    large = _from_clip("large", initialise(clip, torch.Generator().manual_seed(5)))
    config = settings(objective=Objective(affinity=0.3, feature=1))
    assert_is_the_loop(copy.deepcopy(STUDENT), tmp_path, config, teachers=[large], tolerance=1e-5)


class Faltering(nn.Module):
    """A teacher whose answers are no numbers in the calls that are named."""

    def __init__(self, clip, calls):
        super().__init__()
        self.clip, self.bad, self.calls = clip, calls, 0

    def encode_image(self, pixels):
        self.calls += 1
        return self.clip.encode_image(pixels) * (math.nan if self.calls - 1 in self.bad else 1)

    def encode_text(self, tokens_BL):
        return self.clip.encode_text(tokens_BL)


def test_steps_without_a_finite_loss_change_no_weight_and_no_moment(tmp_path):
    """Nor gates; but the constraint's multipliers, whose gap is finite, go on."""
    first, second = (
        dataclasses.replace(TEACHERS[0], model=Faltering(TEACHERS[0].clip, calls={0, 3})) for _ in range(2)
    )
    student, how = copy.deepcopy(STUDENT).double(), {"rule": MASKS, "reference_params": PARAMS}
    config = settings(ema_decay=0.7)
    expected, outcome = assert_is_the_loop(
        student, tmp_path, config, teachers=[first], loop_how={"teachers": [second]}, **how
    )
    assert outcome.skipped_steps == 2 and outcome.steps == STEPS
    names = [name for name, _ in STUDENT.named_parameters()]
    assert difference({n: expected[0][n] for n in names}, {n: p.detach() for n, p in STUDENT.named_parameters()}) == 0


def test_products_are_in_bf16_and_the_loss_and_the_weights_in_fp32(tmp_path):
    """Equal gradients can be rounded to neighbours, so here the loop in fp32 is the measure. Adam's eps is large: its
    steps are then as large as gradients are."""
    config = settings(eps=1.0, clip_norm=None, lr=0.3, precision="bf16")
    steps, _, _ = trained(copy.deepcopy(STUDENT), tmp_path, PAIRS, config, teachers=TEACHERS[:1])
    in_bf16, in_fp32 = (
        list(loop(copy.deepcopy(STUDENT), PAIRS, how, teachers=TEACHERS[:1]))
        for how in (config, config.model_copy(update={"precision": "fp32"}))
    )
    for ours, theirs, other in zip(steps, in_bf16, in_fp32, strict=True):
        assert difference(ours, theirs) < 0.05 * difference(theirs, other)


@pytest.mark.parametrize("recompute", [False, True])
def test_with_recomputation_every_block_is_computed_twice(recompute, tmp_path):
    student, calls = copy.deepcopy(STUDENT), []
    for block in (*student.image.blocks, *student.text.blocks):
        block.ffn.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    train(student, open_source(PAIRS.train), PAIRS, settings(recompute=recompute), tmp_path, teachers=TEACHERS[:1])
    assert len(calls) == STEPS * 4 * (1 + recompute)


def test_every_phase_of_a_run_is_the_loop_with_a_seed_of_its_own(tmp_path, monkeypatch):
    """Two stages of learned masks: 1000 x the recipe's seed, then one number more for each phase. In fp32.

    What is distilled is what the masked student was, its gates multiplied in.
    """
    phases, wrong, masked = [], [], []

    def judged(student, source, data, config, directory, *, teachers, seed, masking=None, **rest):
        before, how = copy.deepcopy(student), {"teachers": teachers, "seed": 4000 + len(phases)}
        if masking is not None:
            how |= {"rule": recipe.stages[len(phases) // 2].shrink, "reference_params": PARAMS}
        else:
            pruned, gates = masked.pop()
            gates = gates.values(read_record(Keep, directory.parent / "keep.json"))
            wrong.append(max(map(gap, before(*INPUTS), pruned(*INPUTS, gates))))
        outcome = train(student, source, data, config, directory, teachers=teachers, seed=seed, masking=masking, **rest)
        if masking is not None:
            masked.append((copy.deepcopy(student).eval(), masking.gates))
        *_, expected = loop(before, PAIRS, config, **how)
        phases.append(directory.relative_to(tmp_path / "run").as_posix())
        wrong.append(difference(state_of(student, masking), expected))
        return outcome

    monkeypatch.setattr(story, "train", judged)
    stages = [
        Stage(
            name=f"keep-{keep}",
            shrink=LearnMasks(keep_params=keep, log_alpha_lr=0.1, initial_log_alpha=3),
            while_masking=settings(steps=None, epochs=2),
            distill=settings(steps=3),
        )
        for keep in (0.7, 0.5)
    ]
    teacher = checkpoint.save(TEACHERS[0].clip, tmp_path / "teacher")
    recipe = Recipe(teacher=str(teacher), data=PAIRS, stages=stages, seed=4)
    story.compress(recipe, tmp_path / "run", say=lambda _: None)
    assert phases == ["0-keep-0.7/masks", "0-keep-0.7/distill", "1-keep-0.5/masks", "1-keep-0.5/distill"]
    assert max(wrong) < 1e-4  # steps of gates are 0.1, those of weights 3e-3
