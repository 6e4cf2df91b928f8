"""Presets: functions that return a Recipe, and how a recipe is read from a name, a YAML file and `--set`.

A preset's docstring is its command and its cost. `tinyclip recipes NAME` prints one as YAML, to keep and edit.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tinyclip.data.spec import ALLOW_REMOTE, DataSpec, from_file
from tinyclip.distill.objective import Objective
from tinyclip.distill.train import DataConfig, TrainConfig
from tinyclip.evaluate.scores import Evaluation
from tinyclip.formats.files import parse_yaml, read_yaml
from tinyclip.recipe import Recipe, Stage
from tinyclip.redact import redacted
from tinyclip.shrink.inherit import Inherit, TowerRule
from tinyclip.shrink.masks import LearnMasks
from tinyclip.start import Like, Scratch

CONTRASTIVE = Objective(affinity=0, contrastive=1)


def auto_25(teacher: str, data: str) -> Recipe:
    """Learned masks, 100 -> 75 -> 50 -> 25 % of attention and FFN, for one GPU.

    tinyclip compress auto_25 --teacher open_clip:ViT-B-32/laion2b_s34b_b79k --data 'shards/{000..999}.tar' --run R

    Each stage learns masks for 1,500 steps and distils for two epochs at batch 1,024. No score is promised: none has
    been measured with this preset at that size. The published recipe, with far more samples, is `paper_auto_25`.
    """
    return _progressive(teacher, data, keep=(0.75, 0.5, 0.25), learn_masks=True)


def manual_50(teacher: str, data: str) -> Recipe:
    """Weights inherited by rule, 100 -> 75 -> 50 % of attention and FFN, for one GPU; the student has a stock shape.

    tinyclip compress manual_50 --teacher open_clip:ViT-B-32/laion2b_s34b_b79k --data 'shards/{000..999}.tar' --run R

    Each stage distils for two epochs at batch 1,024. No score has been measured with this preset at that size.
    """
    return _progressive(teacher, data, keep=(0.75, 0.5), learn_masks=False)


def one_shot_25(teacher: str, data: str) -> Recipe:
    """Learned masks straight to 25 %, with the samples of `auto_25`: what the progression is worth is their difference.

    tinyclip compress one_shot_25 --teacher TEACHER --data DATA --run R
    """
    recipe = _progressive(teacher, data, keep=(0.25,), learn_masks=True)
    stage = recipe.stages[0]
    longer = stage.model_copy(
        update={
            "while_masking": _while_masking(steps=4500),
            "distill": stage.distill.model_copy(update={"epochs": 6.0}),
        }
    )
    return recipe.model_copy(update={"stages": (longer,)})


def paper_auto_25(teacher: str, data: str) -> Recipe:
    """The published automatic recipe: LAION-400M, batch 32,768, 6 epochs a stage, 100 -> 75 -> 50 -> 25 %.

    tinyclip compress paper_auto_25 --teacher open_clip:ViT-B-32/laion2b_e16 --data 'laion/{00000..41455}.tar' --run R

    Settings of the official scripts (wkcn/TinyCLIP, script/auto_weight_inherit_100to75.sh): lr 1e-4 with 3,000 steps of
    warm-up and a cosine, weight decay 0.2, gradient norm 5, both scales 50; masks are cut at step 3,000 of a stage, the
    target sparsity rises over the first 1,000. It ran on 32 GPUs; micro-batches give the same batch on one.
    """
    steps_per_epoch = 400_000_000 // 32_768
    return _progressive(
        teacher,
        data,
        keep=(0.75, 0.5, 0.25),
        learn_masks=True,
        masking=_PAPER.model_copy(update={"steps": 3000, "warmup_steps": 3000}),
        distill=_PAPER.model_copy(update={"steps": 6 * steps_per_epoch - 3000, "warmup_steps": 0}),
        target_warmup=1000 / 3000,
    )


def paper_manual_50(teacher: str, data: str) -> Recipe:
    """The published manual recipe: ViT-B/32 to 61M/32 + 29M to 40M/32 + 19M, cut as the official code does.

    tinyclip compress paper_manual_50 --teacher open_clip:ViT-B-32/laion2b_e16 --data 'laion/{00000..41455}.tar' --run R

    Shapes of the published models; the schedule is that of `paper_auto_25`, 6 epochs a stage at batch 32,768.
    """
    return _paper_manual(teacher, data, {"manual-75": (640, 9), "manual-50": (512, 6)})


def paper_resnet_50(teacher: str, data: str) -> Recipe:
    """The published ResNet students: RN50 to ResNet-30M + 29M to ResNet-19M + 19M, cut as the official code does.

    tinyclip compress paper_resnet_50 --teacher open_clip:RN50-quickgelu/openai --data 'laion/{0..41455}.tar' --run R

    Shapes of the published models, of which the teacher is not known here; the schedule is that of `paper_auto_25`, 6
    epochs a stage at batch 32,768. BatchNorms see micro-batches of 1,024.
    """
    return _paper_manual(teacher, data, {"manual-75": (56, 9), "manual-50": (44, 6)})


def _paper_manual(teacher: str, data: str, sizes: Mapping[str, tuple[int, int]]) -> Recipe:
    """`sizes` of the stages: width of the image tower, layers of the text tower."""
    steps = 6 * (400_000_000 // 32_768)
    train = _PAPER.model_copy(update={"steps": steps, "warmup_steps": 3000})

    def stage(name: str, image_width: int, text_layers: int) -> Stage:
        rule = Inherit(
            image=TowerRule(width=image_width, layer_choice="official"),
            text=TowerRule(layers=text_layers, layer_choice="official"),
        )
        return Stage(name=name, shrink=rule, distill=train)

    return Recipe(
        teacher=teacher,
        data=DataConfig(train=DataSpec.parse(data), workers=8),
        stages=tuple(stage(name, *size) for name, size in sizes.items()),
    )


_PAPER = TrainConfig(
    steps=1,
    batch_size=32_768,
    micro_batch_size=1024,
    lr=1e-4,
    weight_decay=0.2,
    clip_norm=5.0,
    precision="bf16",
    checkpoint_every=500,
)


def _while_masking(steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=1024,
        micro_batch_size=512,
        lr=1e-4,
        warmup_steps=200,
        weight_decay=0.2,
        precision="bf16",
    )


def _progressive(
    teacher: str,
    data: str,
    *,
    keep: Sequence[float],
    learn_masks: bool,
    masking: TrainConfig | None = None,
    distill: TrainConfig | None = None,
    target_warmup: float = 0.7,
) -> Recipe:
    masking = masking or _while_masking(steps=1500)
    distill = distill or masking.model_copy(update={"steps": None, "epochs": 2.0})

    def stage(share: float) -> Stage:
        if not learn_masks:
            return Stage(name=_stage_name("manual", share), shrink=Inherit(keep_params=share), distill=distill)
        return Stage(
            name=_stage_name("auto", share),
            shrink=LearnMasks(keep_params=share, target_warmup=target_warmup),
            while_masking=masking,
            distill=distill,
        )

    return Recipe(
        teacher=teacher,
        data=DataConfig(train=DataSpec.parse(data), workers=8),
        stages=tuple(map(stage, keep)),
    )


# The demo's runs, on built-in pictures. `tinyclip demo` runs all of them and prints one table.

DEMO_DATA = DataConfig(train=DataSpec.parse("scenes?split=train&count=12000"))
DEMO_EVALUATION = Evaluation(
    retrieval=DataSpec.parse("scenes?split=heldout&count=300"),
    zeroshot=DataSpec.parse("scenes?split=classes&count=512"),
)
DEMO_SHARES = (0.75, 0.5, 0.25)
DEMO_TEACHER_STEPS = 1000
DEMO_MASK_STEPS, DEMO_DISTILL_STEPS = 40, 60  # per stage
OWN_SCALES = Objective(student_scale="learned", teacher_scale="teacher")  # a small teacher's own scale is far from 50


def demo_teacher() -> Recipe:
    """A CLIP for the built-in scenes, trained from scratch: about a minute on two cores.

    tinyclip train demo_teacher --run runs/teacher
    """
    return Recipe(
        start=Scratch(
            embed_dim=128, image_size=64, patch_size=16, image_width=128, image_layers=4,
            text_width=128, text_layers=4, head_dim=32, context_length=32, vocabulary=700,
        ),
        data=DEMO_DATA,
        stages=(_from_scratch(steps=DEMO_TEACHER_STEPS),),
        evaluation=DEMO_EVALUATION,
    )  # fmt: skip


def demo(teacher: str) -> Recipe:
    """Learned masks, 100 -> 75 -> 50 -> 25 %, on the built-in scenes: about a minute on two cores.

    tinyclip compress demo --teacher runs/teacher --run runs/small
    """

    def stage(share: float) -> Stage:
        return Stage(
            name=_stage_name("auto", share),
            shrink=LearnMasks(keep_params=share, log_alpha_lr=0.3, multiplier_lr=3.0, initial_log_alpha=3.0),
            while_masking=_demo_train(DEMO_MASK_STEPS),
            distill=_demo_train(DEMO_DISTILL_STEPS),
        )

    return Recipe(teacher=teacher, data=DEMO_DATA, stages=tuple(map(stage, DEMO_SHARES)), evaluation=DEMO_EVALUATION)


def demo_manual(teacher: str) -> Recipe:
    """Weights inherited by rule, 100 -> 75 -> 50 -> 25 %, with the samples of `demo`.

    tinyclip compress demo_manual --teacher runs/teacher --run runs/small
    """
    train = _demo_train(DEMO_MASK_STEPS + DEMO_DISTILL_STEPS)
    stages = (
        Stage(name=_stage_name("manual", share), shrink=Inherit(keep_params=share), distill=train)
        for share in DEMO_SHARES
    )
    return Recipe(teacher=teacher, data=DEMO_DATA, stages=tuple(stages), evaluation=DEMO_EVALUATION)


def demo_scratch(like: str) -> Recipe:
    """The baseline: a demo student's shape from random weights, without a teacher, with the samples of `demo`.

    Run by `tinyclip demo` on the students that it makes.
    """
    steps = len(DEMO_SHARES) * (DEMO_MASK_STEPS + DEMO_DISTILL_STEPS)
    return Recipe(
        start=Like(like=like), data=DEMO_DATA, stages=(_from_scratch(steps=steps),), evaluation=DEMO_EVALUATION
    )


def _demo_train(steps: int) -> TrainConfig:
    return TrainConfig(steps=steps, batch_size=128, lr=1e-3, warmup_steps=10, objective=OWN_SCALES)


def _from_scratch(steps: int) -> Stage:
    return Stage(name="train", distill=TrainConfig(steps=steps, batch_size=128, lr=1e-3, objective=CONTRASTIVE))


def _stage_name(kind: str, share: float) -> str:
    return f"{kind}-{100 * share:.0f}"


PRESETS: Mapping[str, Callable[..., Recipe]] = {
    preset.__name__: preset
    for preset in (
        auto_25,
        manual_50,
        one_shot_25,
        paper_auto_25,
        paper_manual_50,
        paper_resnet_50,
        demo_teacher,
        demo,
        demo_manual,
    )
}


# Reading a recipe.


def load_recipe(
    name: str,
    *,
    teacher: str | None = None,
    data: str | None = None,
    changes: Sequence[str] = (),
    allow_remote: bool = False,
) -> Recipe:
    """A preset's name or a YAML file, with `changes` such as "stages.0.distill.lr=3e-4" applied.

    Raises ValueError, one line, for an unknown preset, field or type, for a preset without its teacher or data, and,
    unless `allow_remote`, for a command (pipe:) that stands in the file and not in `data` or `changes`.
    """
    if name in PRESETS:
        wanted = {"teacher": teacher, "data": data}
        settings = _preset(name, wanted)
    else:
        settings = _read_yaml(name)
    if teacher is not None:
        settings["teacher"] = teacher
    if data is not None:
        _set(settings, "data.train", data)
    for change in changes:
        path, equals, value = change.partition("=")
        if not path or not equals:
            raise ValueError(f"--set {redacted(change)}: expected path=value, such as stages.0.distill.lr=3e-4")
        _set(settings, path, parse_yaml(value, f"--set {redacted(change)}"))
    return parse(settings, name, allow_remote=allow_remote)


def needs(name: str) -> tuple[str, ...]:
    """What a preset asks for: "teacher", "data", both or neither."""
    code = PRESETS[name].__code__
    return code.co_varnames[: code.co_argcount]


def _preset(name: str, wanted: Mapping[str, str | None]) -> dict[str, Any]:
    missing = [argument for argument in needs(name) if wanted[argument] is None]
    if missing:
        raise ValueError(f"preset {name}: needs {' and '.join(f'--{argument}' for argument in missing)}")
    recipe = PRESETS[name](**{argument: wanted[argument] for argument in needs(name)})
    return recipe.model_dump(mode="json")


def _read_yaml(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"recipe {name}: no such file or preset{hint} (presets: {', '.join(PRESETS)})")
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {name}: expected a mapping of settings, got {type(settings).__name__}")
    return from_file(settings)


def _set(settings: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    target: Any = settings
    for number, part in enumerate(parents, 1):
        key = _key(target, part, path)
        if isinstance(target, dict) and target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, list | dict):
            raise ValueError(f"--set {path}: {'.'.join(parents[:number])} has no fields, it is {target!r}")
    target[_key(target, last, path)] = value


def _key(target: Any, part: str, path: str) -> Any:
    """`part` as the key of a mapping, or the index of a list."""
    if isinstance(target, dict):
        return part
    if part not in map(str, range(len(target))):
        raise ValueError(f"--set {path}: expected a number from 0 to {len(target) - 1}, got {part!r}")
    return int(part)


def parse(settings: Any, name: str, *, allow_remote: bool = False) -> Recipe:
    """Validate, with one line for the first error: which field, what was expected, what came."""
    try:
        return Recipe.model_validate(settings, context=ALLOW_REMOTE if allow_remote else None)
    except ValidationError as error:
        first = _most_telling(error.errors())
        where = ".".join(_path(settings, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = sorted(_known_fields(first["loc"][:-1]))
            raise ValueError(f"recipe {name}: {where}: unknown field; known: {', '.join(known)}") from None
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"].startswith("union_tag"):
            reason = f"expected kind: {first.get('ctx', {}).get('expected_tags') or 'the name of a rule'}"
        got = f", got {redacted(first['input'])!r}" if isinstance(first["input"], str | int | float | None) else ""
        raise ValueError(f"recipe {name}: {where + ': ' if where else ''}{reason}{got}") from None


def _most_telling(errors: Sequence[Any]) -> Any:
    """The deepest error; where a field has alternatives, of the one that knows most of the fields that were given."""
    unknown = Counter(error["loc"][:-1] for error in errors if error["type"] == "extra_forbidden")
    return min(errors, key=lambda e: (-len(e["loc"]), unknown[e["loc"][:-1]], e["type"] == "missing"))


def _path(settings: Any, location: Sequence[str | int]) -> Iterator[str]:
    """The parts of a location that a recipe holds: pydantic adds the name of the alternative that it tried."""
    for part in location:
        if isinstance(settings, list | tuple) and isinstance(part, int):
            settings = settings[part] if part < len(settings) else None
        elif isinstance(settings, dict) and (part in settings or part is location[-1]):
            settings = settings.get(part)
        else:
            continue
        yield str(part)


def _known_fields(location: Sequence[str | int]) -> set[str]:
    """The fields of the settings at a place in a recipe, of all alternatives that can stand there."""
    models: set[type[BaseModel]] = {Recipe}
    for part in location:
        inside = {
            m for model in models if part in model.model_fields for m in _models(model.model_fields[part].annotation)
        }
        chosen = {m for m in models if part in (m.__name__, getattr(m.model_fields.get("kind"), "default", None))}
        models = inside or chosen or models  # an index stays where it is
    return {name for model in models for name in model.model_fields}


def _models(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for argument in get_args(annotation) for model in _models(argument)}
