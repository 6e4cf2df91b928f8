"""The story: a teacher goes in, and stage by stage a smaller student comes out.

    teacher -> for each stage: shrink (inherit weights), distil (mimic affinities), evaluate, record -> model

Every stage leaves a complete, loadable directory. A second call with the same run directory continues after the last
complete stage, and inside a stage from its last checkpoint. Training a CLIP from scratch is the same story with one
stage that shrinks nothing and no teacher.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_validator

from tinyclip import run
from tinyclip.data.loader import PairLoader, Reader
from tinyclip.data.sources import Source, open_source
from tinyclip.data.spec import DataSpec
from tinyclip.device import pick_device, use_fast_cpu_products
from tinyclip.distill.teacher import Teacher, load_teacher
from tinyclip.distill.train import DataConfig, Masking, TrainConfig, train
from tinyclip.evaluate import DEFAULT_TEMPLATES, retrieval, zeroshot
from tinyclip.evaluate.embed import Model, texts_of
from tinyclip.formats import checkpoint
from tinyclip.model import CLIP, CLIPConfig, Config, initialise
from tinyclip.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from tinyclip.shrink.inherit import Inherit, choose
from tinyclip.shrink.keep import take
from tinyclip.shrink.masks import HardConcreteGates, LearnMasks, SizeConstraint, fold, survivors
from tinyclip.tokenizer import Tokenizer


class Stage(Config):
    """One step of the progression: shrink, then distil."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    shrink: Annotated[Inherit | LearnMasks, Field(discriminator="kind")] | None = None
    while_masking: TrainConfig | None = Field(default=None, description="training while masks are learned")
    distill: TrainConfig

    @model_validator(mode="after")
    def _masks_need_training(self) -> Self:
        if isinstance(self.shrink, LearnMasks) != (self.while_masking is not None):
            raise ValueError(f"stage {self.name}: while_masking goes with shrink.kind learn_masks, and only with it")
        return self

    @field_serializer("shrink", mode="wrap", when_used="unless-none")
    def _with_kind(self, shrink: Inherit | LearnMasks, dump: SerializerFunctionWrapHandler) -> Any:
        """A dump without defaults needs the kind too, to be read back."""
        return {"kind": shrink.kind, **dump(shrink)}


class Scratch(Config):
    """A random start: every block alike, width / head_dim heads and 4 x width neurons."""

    embed_dim: int = Field(gt=0)
    image_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    image_width: int = Field(gt=0)
    image_layers: int = Field(gt=0)
    text_width: int = Field(gt=0)
    text_layers: int = Field(gt=0)
    context_length: int = Field(default=77, gt=1)
    head_dim: int = Field(default=64, gt=0)
    vocabulary: int | None = Field(
        default=None, ge=600, description="learn a byte-pair vocabulary of this size from the captions; else CLIP's"
    )


class Like(Config):
    """A random start with the shape, preprocessing and vocabulary of another model."""

    like: str


class Evaluation(Config):
    """What is measured after each stage."""

    retrieval: DataSpec | None = Field(default=None, description="pairs: a path or a spec")
    zeroshot: DataSpec | None = Field(default=None, description="labelled images: a path or a spec")
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


class Recipe(Config):
    """All that decides a run. `teacher` is always the original; without `start` its weights are the ones inherited."""

    teacher: str | None = None
    start: str | Scratch | Like | None = None
    data: DataConfig
    stages: tuple[Stage, ...] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    seed: int = 0
    device: str = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher is None and self.start is None:
            raise ValueError("expected a teacher, a start, or both")
        for stage in self.stages:
            for phase in (stage.while_masking, stage.distill):
                if self.teacher is None and phase is not None and phase.objective.needs_teacher:
                    raise ValueError(
                        f"stage {stage.name}: affinity and feature need a teacher; or contrastive=1, affinity=0"
                    )
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: expected different names, got {', '.join(names)}")
        shares = [s.shrink.keep_params for s in self.stages if s.shrink is not None and s.shrink.keep_params]
        if shares != sorted(shares, reverse=True):
            raise ValueError(f"stages: keep_params must not rise from stage to stage, got {shares}")
        return self


def compress(recipe: Recipe, run_dir: Path, *, say: Callable[[str], None] = print) -> Path:
    """Run the recipe and return the directory of the final model, `run_dir`/model.

    Raises ValueError for a recipe that does not fit its model or data, or a run directory of another recipe.
    """
    use_fast_cpu_products()
    device = pick_device(recipe.device)
    source = open_source(recipe.data.train)
    teacher = load_teacher(recipe.teacher).to(device) if recipe.teacher is not None else None
    student = starting_point(recipe, teacher, source).to(device)
    check_rules(recipe, student)
    check_data(recipe, source, student)
    setup = Setup(recipe, source, teacher, student.config.prunable_params, say)
    run.claim(run_dir, recipe.model_dump(mode="json"))
    if teacher is not None:
        run.record_teacher(run_dir, teacher, lambda: evaluate(teacher, recipe.evaluation))
    for index, stage in enumerate(recipe.stages):
        stage_dir = run_dir / f"{index}-{stage.name}"
        if run.is_complete(stage_dir):
            say(f"{stage_dir.name}: complete")
            student = checkpoint.load(stage_dir, device=str(device))
            continue
        seed = recipe.seed * 1000 + 2 * index
        student = shrink(student, stage, stage_dir, setup, seed)
        outcome = train(
            student,
            source,
            recipe.data,
            stage.distill,
            stage_dir / "distill",
            teacher=teacher,
            seed=seed + 1,
            evaluate=lambda model: evaluate(model, recipe.evaluation),
        )
        result = run.complete(stage_dir, student, outcome, evaluate(student, recipe.evaluation))
        say(f"{stage_dir.name}: {run.summary(result)}")
    return run.finish(run_dir, student)


class Setup(NamedTuple):
    """What stays the same through a run."""

    recipe: Recipe
    source: Source
    teacher: Teacher | None
    reference_params: int  # prunable parameters of the starting model, which keep_params are shares of
    say: Callable[[str], None]


def starting_point(recipe: Recipe, teacher: Teacher | None, source: Source) -> CLIP:
    """The model that the first stage shrinks. Raises ValueError where a teacher's weights cannot be inherited."""
    generator = torch.Generator().manual_seed(recipe.seed)
    match recipe.start:
        case Scratch() as scratch:
            return from_scratch(scratch, source, generator)
        case Like(like=path):
            model = checkpoint.load(path)
            return initialise(CLIP(model.config, preprocess=model.preprocess, tokenizer=model.tokenizer), generator)
        case str() as spec:
            start = load_teacher(spec)
        case None:
            assert teacher is not None, "a recipe has a teacher or a start"
            start = teacher
    if start.clip is None:
        raise ValueError(
            f"{start.name} can only teach: its weights do not fit our towers; name another model as `start`"
        )
    return copy.deepcopy(start.clip)


def from_scratch(scratch: Scratch, source: Source, generator: torch.Generator) -> CLIP:
    if scratch.vocabulary is None:
        tokenizer = Tokenizer.openai(scratch.context_length)
    else:
        captions = texts_of(source, source.captions, "captions").values()
        texts = itertools.chain.from_iterable(captions)
        tokenizer = Tokenizer.train(texts, vocab_size=scratch.vocabulary, context_length=scratch.context_length)
    shape = scratch.model_dump(exclude={"vocabulary"})
    config = CLIPConfig.uniform(**shape, vocab_size=tokenizer.vocab_size)
    preprocess = Preprocess(size=scratch.image_size, mean=OPENAI_MEAN, std=OPENAI_STD)
    return initialise(CLIP(config, preprocess=preprocess, tokenizer=tokenizer), generator)


def shrink(student: CLIP, stage: Stage, stage_dir: Path, setup: Setup, seed: int) -> CLIP:
    """The stage's smaller student, before it is distilled; kept in stage_dir/shrunk, so a second call finds it."""
    shrunk, rule = stage_dir / "shrunk", stage.shrink
    if rule is None:
        return student
    if (shrunk / "config.json").exists():
        return checkpoint.load(shrunk, device=str(student.device))
    budget_params = int(rule.keep_params * setup.reference_params) if rule.keep_params else None
    if isinstance(rule, Inherit):
        keep = choose(student, rule, budget_params)
        small = take(student, keep)
    else:
        assert budget_params is not None and stage.while_masking is not None, "checked by Stage"
        gates = learn_masks(student, rule, stage.while_masking, stage_dir / "masks", setup, seed)
        keep = survivors(gates, budget_params)
        small = take(fold(student, gates.values(keep)), keep)
    setup.say(f"{stage_dir.name}: {keep.describe(student.config)}")
    run.write_text(stage_dir / "keep.json", keep.model_dump_json())
    return checkpoint.load(checkpoint.save(small, shrunk), device=str(student.device))


def learn_masks(
    student: CLIP, rule: LearnMasks, config: TrainConfig, directory: Path, setup: Setup, seed: int
) -> HardConcreteGates:
    """Train the student and its gates under the size constraint."""
    gates = HardConcreteGates(student.config, rule.initial_log_alpha).to(student.device)
    constraint = SizeConstraint(
        rule,
        reference_params=setup.reference_params,
        current_params=student.config.prunable_params,
        steps=config.num_steps(max(1, len(setup.source) // config.batch_size)),
    ).to(student.device)
    train(
        student,
        setup.source,
        setup.recipe.data,
        config,
        directory,
        teacher=setup.teacher,
        masking=Masking(gates, constraint, rule),
        seed=seed,
    )
    return gates


def check_rules(recipe: Recipe, student: CLIP) -> None:
    """Refuse rules that cannot be satisfied, before anything is trained or written.

    Rules are followed through the stages up to the first that learns masks: what that one leaves is not known yet.
    """
    reference_params = student.config.prunable_params
    for stage in recipe.stages:
        share = stage.shrink.keep_params if stage.shrink is not None else None
        budget_params = int(share * reference_params) if share else None
        if isinstance(stage.shrink, Inherit):
            student = take(student, choose(student, stage.shrink, budget_params))
        elif isinstance(stage.shrink, LearnMasks):
            assert budget_params is not None, "keep_params is a field without default"
            survivors(HardConcreteGates(student.config), budget_params)
            return


def check_data(recipe: Recipe, source: Source, student: CLIP) -> None:
    """Refuse data that cannot be trained or evaluated on, before anything is written: a few pairs are read."""
    for spec in (recipe.evaluation.retrieval, recipe.evaluation.zeroshot):
        if spec is not None:
            open_source(spec)
    if student.preprocess is None or student.tokenizer is None:
        raise ValueError("the student came without preprocessing or tokenizer, so it cannot read pairs")
    reader = Reader(student.preprocess, student.tokenizer)
    for phase in (phase for stage in recipe.stages for phase in (stage.while_masking, stage.distill)):
        if phase is not None:
            PairLoader(source, [reader], batch_size=phase.batch_size, seed=recipe.seed)
    few = min(recipe.stages[0].distill.batch_size, 16)
    PairLoader(source, [reader], batch_size=few, seed=recipe.seed).batch(0)


def evaluate(model: Model, evaluation: Evaluation) -> dict[str, float]:
    """Retrieval and zero-shot scores, each a share in [0, 1]."""
    scores: dict[str, float] = {}
    if evaluation.retrieval is not None:
        scores |= retrieval(model, open_source(evaluation.retrieval))
    if evaluation.zeroshot is not None:
        scores |= zeroshot(model, open_source(evaluation.zeroshot), templates=evaluation.templates)
    return scores
