"""The story: a teacher goes in, and stage by stage a smaller student comes out.

    teacher -> for each stage: shrink (inherit weights), distil (mimic affinities), evaluate, record -> model

Every stage leaves a complete, loadable directory. A second call with the same run directory continues after the last
complete stage, and inside a stage from its last checkpoint. Training a CLIP from scratch is the same story with one
stage that shrinks nothing and no teacher.

On several processes (`world`) all tell the same story; the main one alone writes and evaluates, and says what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyclip import run
from tinyclip.check import check_data, check_rules
from tinyclip.data.loader import LeftOut
from tinyclip.data.sources import Source, open_source
from tinyclip.device import pick_device, prepare_cpu
from tinyclip.distill.store import Stored
from tinyclip.distill.teacher import Teacher, load_teacher
from tinyclip.distill.train import Masking, TrainConfig, train
from tinyclip.distributed import ALONE, World
from tinyclip.embed import placed, stored
from tinyclip.evaluate.scores import evaluate
from tinyclip.formats import checkpoint
from tinyclip.model import CLIP
from tinyclip.recipe import Recipe, Stage
from tinyclip.shrink.inherit import Inherit, choose
from tinyclip.shrink.keep import take
from tinyclip.shrink.masks import HardConcreteGates, LearnMasks, SizeConstraint, fold, survivors
from tinyclip.start import starting_point


def compress(
    recipe: Recipe,
    run_dir: Path,
    *,
    name: str | None = None,
    say: Callable[[str], None] = print,
    world: World = ALONE,
    allow_remote: bool = False,
) -> Path:
    """Run the recipe, known as `name`, and return the directory of the final model, `run_dir`/model.

    What the recipe names is trusted. With `allow_remote`, so is what a teacher's own directory names.
    Raises ValueError for a recipe that does not fit its model or data, or a run directory of another recipe. On several
    processes, `run_dir` is on storage that all of them see.
    """
    prepare_cpu()
    device = pick_device(recipe.device)
    source = open_source(recipe.data.train)
    teachers = [load_teacher(teacher, allow_remote=allow_remote) for teacher in recipe.teachers]
    start = starting_point(recipe.start, teachers, source, seed=recipe.seed, allow_remote=allow_remote)
    student = start.to(device)
    student.provenance = recipe.provenance(name, (*(teacher.clip for teacher in teachers), student))
    teachers = placed(teachers, recipe, device, world)
    world.on_main(check_rules, recipe, student)
    world.on_main(check_data, recipe, source, student, world)
    say = say if world.is_main else _nothing
    LeftOut(say).opened(source)
    setup = Setup(recipe, source, teachers, student.config.prunable_params, say, world)
    inputs = run.inputs_of(source, teachers)
    with run.exclusive(run_dir, world):
        world.on_main(run.claim, run_dir, recipe.model_dump(mode="json"), say)
        world.on_main(run.claim_inputs, run_dir, inputs, say)
        world.on_main(run.record_start, run_dir, student, recipe.starts_at_random, say)
        record_teacher(teachers, run_dir, setup)
        if recipe.store is not None:
            setup = setup._replace(teachers=stored(teachers, source, recipe, run_dir, say=say, world=world))
        for index, stage in enumerate(recipe.stages):
            stage_dir = run_dir / f"{index}-{stage.name}"
            student = run_stage(student, stage, stage_dir, setup, seed=recipe.seed * 1000 + 2 * index)
        return world.on_main(run.finish, run_dir, student, say)


def run_stage(student: CLIP, stage: Stage, stage_dir: Path, setup: Setup, *, seed: int) -> CLIP:
    """The student that the stage makes of its predecessor; loaded where the stage is complete."""
    recipe, world = setup.recipe, setup.world
    if world.on_main(run.is_complete, stage_dir):
        setup.say(f"{stage_dir.name}: complete")
        return checkpoint.load(stage_dir, device=str(student.device))
    with run.recorded(stage_dir.parent, stage_dir.name, student.device, world):
        student = shrink(student, stage, stage_dir, setup, seed)
        outcome = train(
            student,
            setup.source,
            recipe.data,
            stage.distill,
            stage_dir / "distill",
            teachers=setup.teachers,
            seed=seed + 1,
            evaluate=lambda model: evaluate(model, recipe.evaluation),
            world=world,
        )
        scores = world.on_main(evaluate, student, recipe.evaluation, say=setup.say)
        result = world.on_main(run.complete, stage_dir, student, outcome, scores)
    setup.say(f"{stage_dir.name}: {run.summary(result)}")
    return student


def record_teacher(teachers: Sequence[Teacher], run_dir: Path, setup: Setup) -> None:
    """Score the first teacher, once: it is what students are held against."""
    if not teachers or setup.world.on_main(run.has_teacher, run_dir, setup.say):
        return
    asked = (teachers[0], setup.recipe.evaluation)
    say = setup.say
    scores = evaluate(*asked, say=say) if teachers[0].sharded else setup.world.on_main(evaluate, *asked, say=say)
    setup.world.on_main(run.record_teacher, run_dir, teachers[0], scores)


def _nothing(_line: str) -> None:
    """What the other processes say."""


class Setup(NamedTuple):
    """What stays the same through a run."""

    recipe: Recipe
    source: Source
    teachers: Sequence[Teacher | Stored]
    reference_params: int  # prunable parameters of the starting model, which keep_params are shares of
    say: Callable[[str], None]
    world: World


def shrink(student: CLIP, stage: Stage, stage_dir: Path, setup: Setup, seed: int) -> CLIP:
    """The stage's smaller student, before it is distilled; kept in stage_dir/shrunk, so a second call finds it."""
    shrunk, rule = stage_dir / "shrunk", stage.shrink
    if rule is None:
        return student
    if setup.world.on_main(run.has_shrunk, stage_dir, setup.say):
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
    setup.world.on_main(run.record_shrunk, stage_dir, keep, small)
    return checkpoint.load(shrunk, device=str(student.device))


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
        teachers=setup.teachers,
        masking=Masking(gates, constraint, rule),
        seed=seed,
        world=setup.world,
    )
    return gates
