"""What can be refused before anything is trained or written."""

from __future__ import annotations

from tinyclip.data.loader import PairLoader, Reader
from tinyclip.data.sources import Source, open_source
from tinyclip.distributed import ALONE, World
from tinyclip.model import CLIP
from tinyclip.recipe import Recipe
from tinyclip.shrink.inherit import Inherit, choose
from tinyclip.shrink.keep import take
from tinyclip.shrink.masks import HardConcreteGates, LearnMasks, survivors


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


def check_data(recipe: Recipe, source: Source, student: CLIP, world: World = ALONE) -> None:
    """Refuse data that cannot be trained or evaluated on, before anything is written: a few pairs are read."""
    for spec in (recipe.evaluation.retrieval, recipe.evaluation.zeroshot):
        if spec is not None:
            open_source(spec)
    if student.preprocess is None or student.tokenizer is None:
        raise ValueError("the student came without preprocessing or tokenizer, so it cannot read pairs")
    reader = Reader(student.preprocess, student.tokenizer)
    for phase in (phase for stage in recipe.stages for phase in (stage.while_masking, stage.distill)):
        if phase is not None:
            PairLoader(source, [reader], batch_size=phase.batch_size, seed=recipe.seed, world=world)
    few = min(recipe.stages[0].distill.batch_size, 16)
    PairLoader(source, [reader], batch_size=few, seed=recipe.seed).batch(0)
