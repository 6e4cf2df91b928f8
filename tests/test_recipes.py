"""Presets build and survive YAML, files and `--set` are read strictly, a wrong recipe is one line that says where."""

import re

import pytest
import yaml

from tinyclip import recipes
from tinyclip.recipe import Recipe
from tinyclip.recipes import PRESETS, load_recipe, needs, parse

TEACHER, DATA = "some/teacher", "shards/{000..003}.tar"
MINIMAL = {
    "teacher": TEACHER,
    "data": {"train": DATA},
    "stages": [
        {"name": "half", "shrink": {"kind": "inherit", "keep_params": 0.5}, "distill": {"steps": 2, "batch_size": 8}}
    ],
}
SCRATCH = {
    "embed_dim": 8, "image_size": 16, "patch_size": 8, "image_width": 16, "image_layers": 1,
    "text_width": 16, "text_layers": 1,
}  # fmt: skip


def preset(name: str) -> Recipe:
    wanted = {"teacher": TEACHER, "data": DATA}
    return load_recipe(name, **{argument: wanted[argument] for argument in needs(name)})


def changed(**changes) -> dict:
    """MINIMAL with `a__0__b=value` as its field a.0.b; None removes a field."""
    settings = yaml.safe_load(yaml.safe_dump(MINIMAL))
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = settings
        for part in parents:
            target = target[int(part)] if part.isdigit() else target[part]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return settings


def refused(settings) -> str:
    with pytest.raises(ValueError) as error:
        parse(settings, "my.yaml")
    message = str(error.value)
    assert "\n" not in message and message.startswith("recipe my.yaml: "), message
    return message.removeprefix("recipe my.yaml: ")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


# Presets.


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_survives_yaml(name, tmp_path):
    recipe = preset(name)
    for exclude_defaults in (True, False):
        path = tmp_path / f"{exclude_defaults}.yaml"
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=exclude_defaults)))
        assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_every_presets_docstring_holds_its_command(name):
    assert re.search(rf"^ *tinyclip (train|compress) {name} .*--run", PRESETS[name].__doc__ or "", re.MULTILINE)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_shrinks_stage_by_stage_to_the_share_in_its_name(name):
    shares = [stage.shrink.keep_params for stage in preset(name).stages if stage.shrink and stage.shrink.keep_params]
    assert shares == sorted(shares, reverse=True)
    if (number := re.search(r"\d+$", name)) and shares:
        assert shares[-1] == int(number[0]) / 100


def test_one_shot_spends_what_the_progression_spends():
    progressive, one_shot = preset("auto_25"), preset("one_shot_25")

    def total(recipe: Recipe, phase: str, length: str) -> float:
        return sum(getattr(getattr(stage, phase), length) for stage in recipe.stages)

    for phase, length in (("while_masking", "steps"), ("distill", "epochs")):
        assert total(one_shot, phase, length) == total(progressive, phase, length) > 0


def test_the_demos_spend_the_same_number_of_steps():
    def steps(recipe: Recipe) -> int:
        phases = (phase for stage in recipe.stages for phase in (stage.while_masking, stage.distill))
        return sum(phase.steps or 0 for phase in phases if phase is not None)

    assert steps(preset("demo")) == steps(preset("demo_manual")) == steps(recipes.demo_scratch("runs/small")) > 0


@pytest.mark.parametrize(
    "name, given, missing",
    [
        ("auto_25", {}, "--teacher and --data"),
        ("auto_25", {"teacher": TEACHER}, "--data"),
        ("demo", {}, "--teacher"),
    ],
)
def test_a_preset_says_what_it_needs(name, given, missing):
    with pytest.raises(ValueError, match=f"preset {name}: needs {missing}$"):
        load_recipe(name, **given)


@pytest.mark.parametrize("name", ["demo", "demo_teacher", "auto_25"])
def test_data_that_is_given_is_used_by_every_preset(name):
    assert load_recipe(name, teacher=TEACHER, data="mine.tsv").data.train.path == "mine.tsv"


# Files, --teacher, --data and --set.


def test_teacher_and_data_replace_those_of_a_file(file):
    recipe = load_recipe(file, teacher="other", data="scenes?count=16")
    assert (recipe.teacher, recipe.data.train.path, recipe.data.train.count) == ("other", "scenes", 16)
    assert load_recipe(file).teacher == TEACHER


@pytest.mark.parametrize(
    "change, read, value",
    [
        ("stages.0.distill.lr=3e-4", lambda r: r.stages[0].distill.lr, 3e-4),  # YAML 1.1 reads 3e-4 as a text
        ("stages.0.distill.lr=0.01", lambda r: r.stages[0].distill.lr, 0.01),
        ("stages.0.distill.steps=7", lambda r: r.stages[0].distill.steps, 7),
        ("stages.0.name=b", lambda r: r.stages[0].name, "b"),
        ("stages.0.distill.clip_norm=null", lambda r: r.stages[0].distill.clip_norm, None),
        ("stages.0.distill.recompute=true", lambda r: r.stages[0].distill.recompute, True),
        ("stages.0.distill.objective.feature=0.5", lambda r: r.stages[0].distill.objective.feature, 0.5),
        ("stages.0.distill.objective.student_scale=learned", lambda r: r.stages[0].distill.objective.student_scale, "learned"),  # noqa: E501
        ("stages.0.shrink.text.layer_choice=[0, 3]", lambda r: r.stages[0].shrink.text.layer_choice, (0, 3)),
        ("data.crop_scale=[0.5, 1]", lambda r: r.data.crop_scale, (0.5, 1.0)),
        ("data.crop_scale.0=0.5", lambda r: r.data.crop_scale, (0.5, 1.0)),
        ("data.train=a.tsv?where=split=train", lambda r: (r.data.train.path, r.data.train.where), ("a.tsv", "split=train")),  # noqa: E501
        ("evaluation.retrieval=scenes?count=8", lambda r: r.evaluation.retrieval.count, 8),
        ("evaluation={templates: ['a {}']}", lambda r: r.evaluation.templates, ("a {}",)),
        ("seed=3", lambda r: r.seed, 3),
    ],
)  # fmt: skip
def test_set_changes_a_setting(change, read, value, tmp_path):
    path = tmp_path / "full.yaml"  # as `run` writes it, with every default
    path.write_text(yaml.safe_dump(parse(MINIMAL, "minimal").model_dump(mode="json")))
    recipe = load_recipe(str(path), changes=[change])
    assert read(recipe) == value and type(read(recipe)) is type(value)
    assert load_recipe(str(path)) == parse(MINIMAL, "minimal")


def test_set_works_on_presets_and_the_last_change_wins():
    recipe = load_recipe("demo", teacher=TEACHER, changes=["stages.1.distill.steps=5", "stages.1.distill.steps=6"])
    assert [stage.distill.steps for stage in recipe.stages] == [60, 6, 60]


@pytest.mark.parametrize(
    "change, message",
    [
        ("stages.0.distill.lrr=1", "stages.0.distill.lrr: unknown field; known: batch_size, .*lr, "),
        ("stage.0=1", "stage: unknown field; known: data, .*stages, .*teacher"),
        ("stages.1.name=b", "--set stages.1.name: expected a number from 0 to 0, got '1'"),
        ("stages.1=b", "--set stages.1: expected a number from 0 to 0, got '1'"),
        ("stages.first=b", "--set stages.first: expected a number from 0 to 0, got 'first'"),
        ("stages.-1.name=b", "--set stages.-1.name: expected a number from 0 to 0, got '-1'"),
        ("teacher.name=x", "--set teacher.name: teacher has no fields, it is 'some/teacher'"),
        ("seed", "--set seed: expected path=value, such as stages.0.distill.lr=3e-4"),
        ("=3", "--set =3: expected path=value"),
        ("seed=[1", r"--set seed=\[1: not YAML: line 1: .* expected ',' or '\]'"),
        ("seed=many", "seed: Input should be a valid integer.*got 'many'"),
        ("stages.0.distill.steps=", "stages.0.distill: expected one of steps and epochs"),
    ],
)
def test_a_wrong_change_is_one_line(change, message, file):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(file, changes=[change])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("auto25", r"recipe auto25: no such file or preset; did you mean auto_25\? \(presets: auto_25, manual_50, "),
        ("demo-manual", r"did you mean demo_manual\?"),
        ("nothing/like/it.yaml", r"recipe nothing/like/it.yaml: no such file or preset \(presets: "),
    ],
)
def test_an_unknown_name_is_one_line_with_the_presets_and_the_nearest(name, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "expected a mapping of settings, got NoneType"),
        (b"- 1\n- 2\n", "expected a mapping of settings, got list"),
        (b"a: [1\nb: 2", "not YAML: line 2: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "not YAML: 'utf-8' codec can't decode"),
        (b"!!python/object/apply:os.getcwd []", "not YAML: line 1: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(content, message, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# What a recipe may say.


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"techer": 1},
            "techer: unknown field; known: data, device, evaluation, licenses, more_teachers, seed, "
            "shard_teacher, stages, start, store, teacher",
        ),
        (
            {"stages__0__shrink__keep": 1},
            "stages.0.shrink.keep: unknown field; known: embed_dim, image, keep_params, kind, t",
        ),
        (
            {"stages__0__shrink": {"kind": "learn_masks", "keep_params": 0.5, "lr": 1}},
            "stages.0.shrink.lr: unknown field; known: initial_log_alpha, keep_params, kind, log_alpha_lr, "
            "multiplier_lr, target_warmup",
        ),
        ({"start": {**SCRATCH, "depth": 3}}, "start.depth: unknown field; known: context_length, embed_dim, "),
        ({"start": {"like": "x", "lik": 1}}, "start.lik: unknown field; known: like$"),
        ({"data__train": "scenes?counts=3"}, "data.train: unknown key 'counts'; known: path, .*count"),
        ({"data__train": {"path": "scenes", "counts": 3}}, "data.train: unknown key 'counts'; known: path, .*count"),
    ],
)
def test_an_unknown_field_is_named_with_the_known_ones_of_its_place(changes, message):
    assert re.match(message, refused(changed(**changes)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages__0__distill__lr": "fast"}, "stages.0.distill.lr: .*valid number.*, got 'fast'$"),
        ({"stages__0__distill__lr": float("inf")}, "stages.0.distill.lr: .*finite"),
        ({"stages__0__distill__steps": 2.5}, "stages.0.distill.steps: .*integer.*, got 2.5$"),
        ({"stages__0__distill__steps": 0}, "stages.0.distill.steps: .*greater than 0, got 0$"),
        ({"stages__0__distill__precision": "fp8"}, "stages.0.distill.precision: .*'fp32' or 'bf16', got 'fp8'$"),
        ({"stages__0__distill__objective": {"student_scale": "own"}}, "stages.0.distill.objective.student_scale: "),
        ({"stages": 3}, "stages: .*, got 3$"),
        ({"stages": []}, "stages: .*at least 1 item"),
        ({"stages__0__name": "../up"}, "stages.0.name: .*, got '../up'$"),
        ({"stages__0__name": None}, "stages.0.name: Field required"),
        ({"stages__0__shrink__kind": "inherits"}, "stages.0.shrink: expected kind: 'inherit', 'learn_masks'"),
        ({"stages__0__shrink__kind": None}, "stages.0.shrink: expected kind"),
        ({"stages__0__shrink__keep_params": 1.5}, "stages.0.shrink.keep_params: .*less than or equal to 1, got 1.5$"),
        ({"stages__0__shrink": {"kind": "learn_masks"}}, "stages.0.shrink.keep_params: Field required"),
        ({"start": 7}, "start: .*, got 7$"),
        ({"start": {"embed_dim": 8}}, "start.image_size: Field required"),
        ({"start": {"like": 3}}, "start.like: .*string, got 3$"),
        ({"start": {**SCRATCH, "text_layers": 0}}, "start.text_layers: .*greater than 0, got 0$"),
        ({"data": None}, "data: Field required"),
        ({"data__train": None}, "data.train: Field required"),
        ({"data__crop_scale": [0.9, 0.5]}, r"data: crop_scale: expected two shares, .*got \(0.9, 0.5\)"),
    ],
)
def test_a_wrong_value_names_its_field_as_the_recipe_does(changes, message):
    assert re.match(message, refused(changed(**changes)))


MASKS = {"kind": "learn_masks", "keep_params": 0.5}
HALF = MINIMAL["stages"][0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher": None}, "expected a teacher, a start, or both"),
        ({"stages": [HALF, HALF]}, "stages: expected different names, got half, half"),
        (
            {"stages": [HALF, {**HALF, "name": "more", "shrink": {"kind": "inherit", "keep_params": 0.7}}]},
            r"stages: keep_params must not rise from stage to stage, got \[0.5, 0.7\]",
        ),
        ({"stages__0__while_masking": {"steps": 1}}, "stages.0: stage half: while_masking goes with shrink.kind"),
        ({"stages__0__shrink": MASKS}, "stages.0: stage half: while_masking goes with shrink.kind learn_masks"),
        ({"stages__0__shrink": None, "stages__0__while_masking": {"steps": 1}}, "stages.0: stage half: while_masking"),
        ({"stages__0__distill__steps": None}, "stages.0.distill: expected one of steps and epochs"),
        ({"stages__0__distill__epochs": 1}, "stages.0.distill: expected one of steps and epochs"),
        ({"stages__0__distill__objective": {"affinity": 0}}, "stages.0.distill.objective: at least one of affinity, "),
        ({"teacher": None, "start": "x"}, "stage half: affinity and feature need a teacher; or contrastive=1"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(changes, message):
    assert re.match(message, refused(changed(**changes)))


def test_equal_shares_and_stages_without_a_share_are_allowed():
    same = {**HALF, "name": "again"}
    rule = {**HALF, "name": "rule", "shrink": {"kind": "inherit", "text": {"layers": 1}}}
    plain = {"name": "plain", "distill": {"epochs": 0.5}}
    recipe = parse(changed(stages=[plain, HALF, rule, same]), "my.yaml")
    assert [stage.name for stage in recipe.stages] == ["plain", "half", "rule", "again"]
