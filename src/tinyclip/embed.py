"""A run's teachers, asked once: what comes before the first stage where a recipe has a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tinyclip import run
from tinyclip.data.loader import LeftOut
from tinyclip.data.sources import Source, open_source
from tinyclip.device import pick_device, prepare_cpu
from tinyclip.distill.store import Stored, store_teacher
from tinyclip.distill.teacher import Teacher, load_teacher
from tinyclip.distributed import ALONE, World
from tinyclip.recipe import Recipe


def embed(
    recipe: Recipe,
    run_dir: Path,
    *,
    say: Callable[[str], None] = print,
    world: World = ALONE,
    allow_remote: bool = False,
) -> Path:
    """Store the teachers' embeddings of the recipe's data where `compress` will look for them; returns the directory.

    Raises ValueError for a recipe without a store.
    """
    if recipe.store is None or not recipe.teachers:
        raise ValueError("expected a recipe with a teacher and a store, for example by --set store.views=1")
    prepare_cpu()
    device = pick_device(recipe.device)
    source = open_source(recipe.data.train)
    teachers = [load_teacher(teacher, allow_remote=allow_remote) for teacher in recipe.teachers]
    teachers = placed(teachers, recipe, device, world)
    LeftOut(say if world.is_main else None).opened(source)
    inputs = run.inputs_of(source, teachers)
    with run.exclusive(run_dir, world):
        world.on_main(run.claim, run_dir, recipe.model_dump(mode="json"), say)
        world.on_main(run.claim_inputs, run_dir, inputs, say)
        return stored(teachers, source, recipe, run_dir, say=say, world=world)[0].directory


def placed(teachers: Sequence[Teacher], recipe: Recipe, device: torch.device, world: World) -> list[Teacher]:
    """On the device, or split over the processes where the recipe says so."""
    return [teacher.shard(world, device) if recipe.shard_teacher else teacher.to(device) for teacher in teachers]


def stored(
    teachers: Sequence[Teacher],
    source: Source,
    recipe: Recipe,
    run_dir: Path,
    *,
    say: Callable[[str], None] = print,
    world: World = ALONE,
) -> list[Stored]:
    """Each teacher's embeddings of the recipe's data, made where they are not there yet."""
    assert recipe.store is not None, "asked for by the caller"
    path = Path(recipe.store.path) if recipe.store.path else run_dir / "teacher-store"
    how = {"crop_scale": recipe.data.crop_scale, "max_bad_share": recipe.data.max_bad_share}
    how |= {"workers": recipe.data.workers, "say": say, "world": world}
    places = [path if number == 0 else path / f"teacher-{number + 1}" for number in range(len(teachers))]
    return [
        store_teacher(teacher, source, recipe.store, place, **how)
        for teacher, place in zip(teachers, places, strict=True)
    ]
