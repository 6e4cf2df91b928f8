"""The story: a teacher goes in, and stage by stage a smaller student comes out.

    teacher -> for each stage: shrink (inherit weights), distil (mimic affinities), evaluate, record -> model

Every stage leaves a complete, loadable directory. A second call with the same run directory continues after the last
complete stage, and inside a stage from its last checkpoint. Training a CLIP from scratch is the same story with one
stage that shrinks nothing and no teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tinyclip import run
from tinyclip.check import check_data, check_rules
from tinyclip.data.sources import Source, open_source
from tinyclip.device import pick_device, use_fast_cpu_products
from tinyclip.distill.teacher import Teacher, load_teacher
from tinyclip.distill.train import Masking, TrainConfig, train
from tinyclip.evaluate.scores import evaluate
from tinyclip.formats import checkpoint
from tinyclip.model import CLIP
from tinyclip.recipe import Recipe, Stage
from tinyclip.shrink.inherit import Inherit, choose
from tinyclip.shrink.keep import take
from tinyclip.shrink.masks import HardConcreteGates, LearnMasks, SizeConstraint, fold, survivors
from tinyclip.start import starting_point


def compress(recipe: Recipe, run_dir: Path, *, name: str | None = None, say: Callable[[str], None] = print) -> Path:
    """Run the recipe, known as `name`, and return the directory of the final model, `run_dir`/model.

    Raises ValueError for a recipe that does not fit its model or data, or a run directory of another recipe.
    """
    use_fast_cpu_products()
    device = pick_device(recipe.device)
    source = open_source(recipe.data.train)
    teacher = load_teacher(recipe.teacher).to(device) if recipe.teacher is not None else None
    student = starting_point(recipe.start, teacher, source, seed=recipe.seed).to(device)
    student.provenance = recipe.provenance(name, (teacher and teacher.clip, student))
    check_rules(recipe, student)
    check_data(recipe, source, student)
    setup = Setup(recipe, source, teacher, student.config.prunable_params, say)
    run.claim(run_dir, recipe.model_dump(mode="json"))
    run.record_start(run_dir, student)
    if teacher is not None:
        run.record_teacher(run_dir, teacher, lambda: evaluate(teacher, recipe.evaluation))
    for index, stage in enumerate(recipe.stages):
        stage_dir = run_dir / f"{index}-{stage.name}"
        if run.is_complete(stage_dir):
            say(f"{stage_dir.name}: complete")
            student = checkpoint.load(stage_dir, device=str(device))
            continue
        with run.recorded(run_dir, stage_dir.name, device):
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
