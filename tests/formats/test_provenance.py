"""Where a model comes from is known once it is compressed, stays with it in every format, is said when it leaves."""

import json

import pytest
import torch
import yaml

import tinyclip
from tests.formats.test_export import IRREGULAR, UNIFORM, toy
from tinyclip.compress import compress
from tinyclip.data.spec import DataSpec
from tinyclip.formats.export import export
from tinyclip.formats.provenance import (
    UNKNOWN,
    Origin,
    Provenance,
    ancestors,
    entry,
    hub_name,
    license_line,
    model_origin,
    public,
    read_provenance,
)
from tinyclip.formats.uniform import pad
from tinyclip.recipe import Recipe
from tinyclip.recipes import load_recipe
from tinyclip.shrink.keep import Keep, take
from tinyclip.shrink.masks import HardConcreteGates, fold

CODE = Origin(name="tinyclip 0", license="mit")
FIRST = Provenance(data=Origin(name="pairs.tsv", license="cc-by-4.0"), recipe="first", code=CODE)
SECOND = Provenance(
    teacher=Origin(name="open_clip:ViT-B-32-quickgelu/metaclip_400m", license="cc-by-nc-4.0"),
    start=Origin(name="other"), data=Origin(name="scenes"), code=CODE, ancestors=(FIRST,),
)  # fmt: skip
ENSEMBLE = Provenance(
    teacher=Origin(name="a", license="mit"),
    more_teachers=(Origin(name="b", license="cc-by-nc-4.0"), Origin(name="c")), data=Origin(name="d"), code=CODE,
)  # fmt: skip


def recipe(**settings):
    distill = {"steps": 1, "batch_size": 4, "warmup_steps": 0, "precision": "fp32"}
    data = {"train": "scenes?count=8", "workers": 0}
    return {"data": data, "device": "cpu", "stages": [{"name": "half", "distill": distill}], **settings}


def run(tmp_path, name, **settings):
    """Compress as the command does, in one step, and return the final model."""
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe(**settings)))
    return tinyclip.load(compress(load_recipe(str(file)), tmp_path / name, name=file.name, say=lambda line: None))


def test_a_compressed_model_compressed_again_keeps_its_parents(tmp_path):
    tinyclip.save(toy(UNIFORM), tmp_path / "published")
    teacher = str(tmp_path / "published")
    child = run(tmp_path, "child", teacher=teacher, licenses={"teacher": "cc-by-nd-4.0", "data": "cc0-1.0"})
    shrink = {"kind": "inherit", "keep_params": 0.6}
    stage = {**recipe()["stages"][0], "shrink": shrink}
    grandchild = run(tmp_path, "grandchild", teacher=teacher, start=str(tmp_path / "child"), stages=[stage])
    place = f"{tmp_path.name}/published"
    assert child.provenance == Provenance(
        teacher=Origin(name=place, license="cc-by-nd-4.0"),
        data=Origin(name="scenes?count=8", license="cc0-1.0"),
        recipe="child.yaml",
        code=Origin(name=f"tinyclip {tinyclip.__version__}", license="mit"),
    )
    assert grandchild.config.prunable_params < child.config.prunable_params
    assert grandchild.provenance.ancestors == (child.provenance,)
    assert grandchild.provenance.start == Origin(name=f"{tmp_path.name}/child", license="unknown")
    assert grandchild.provenance.teacher.license == "unknown"
    assert str(tmp_path) not in (tmp_path / "grandchild" / "model" / "config.json").read_text()


def test_a_student_of_several_teachers_names_all_of_them_and_what_they_were_made_from(tmp_path):
    named = []
    for number in range(3):
        teacher = toy(UNIFORM)
        teacher.provenance = FIRST.model_copy(update={"recipe": f"recipe {number}"})
        named.append(str(tinyclip.save(teacher, tmp_path / f"teacher-{number}")))
    licenses = {"teacher": "mit", "more_teachers": ["cc-by-nc-4.0", None]}
    found = run(tmp_path, "student", teacher=named[0], more_teachers=named[1:], licenses=licenses).provenance
    assert found.parts.keys() == {"teacher", "teacher 2", "teacher 3", "data", "code"}
    names = [f"{tmp_path.name}/teacher-{number}" for number in range(3)]
    assert [found.teacher.name, *(origin.name for origin in found.more_teachers)] == names
    assert [origin.license for origin in found.more_teachers] == ["cc-by-nc-4.0", UNKNOWN]
    assert [earlier.recipe for earlier in found.ancestors] == ["recipe 0", "recipe 1", "recipe 2"]
    assert found == tinyclip.load(tmp_path / "student").provenance


def test_each_teachers_licence_is_said():
    assert license_line(ENSEMBLE) == (
        "warning: licences: teacher a: mit; teacher 2 b: cc-by-nc-4.0 (non-commercial use only); teacher 3 c: unknown; "
        "data d: unknown; code tinyclip 0: mit"
    )


def test_what_has_one_teacher_is_written_and_read_as_before_there_could_be_more():
    before = {"teacher": {"name": "a", "license": "mit"}, "data": {"name": "d", "license": UNKNOWN}}
    before |= {"code": {"name": "tinyclip 0", "license": "mit"}, "ancestors": []}
    one = ENSEMBLE.model_copy(update={"more_teachers": None})
    assert entry(one) == {"provenance": before} and read_provenance({"provenance": before}, "x") == one


def test_licences_of_other_than_the_recipes_teachers_are_refused():
    settings = recipe(teacher="a", more_teachers=["b", "c"], licenses={"more_teachers": ["mit"]})
    with pytest.raises(ValueError, match=r"licenses.more_teachers: expected one for each of the 2 .*, got 1"):
        Recipe.model_validate(settings)


def test_a_line_of_parents_names_each_compression_once():
    assert ancestors([None, FIRST, SECOND]) == (FIRST, SECOND.model_copy(update={"ancestors": ()}))


@torch.no_grad()
def test_it_survives_every_cut():
    model = toy(UNIFORM)
    model.provenance = SECOND
    assert take(model, Keep.everything(model.config)).provenance == SECOND
    assert fold(model, HardConcreteGates(model.config).values(Keep.everything(model.config))).provenance == SECOND
    assert pad(model).provenance == SECOND


@pytest.mark.parametrize(
    "config, to", [(UNIFORM, "tinyclip"), (UNIFORM, "huggingface"), (UNIFORM, "open_clip"), (IRREGULAR, "huggingface")]
)
def test_it_travels_in_every_format_and_its_licences_are_said(config, to, tmp_path):
    model, said = toy(config), []
    model.provenance = SECOND
    export(model, tmp_path / "out", to=to, say=said.append)
    assert said[-1].startswith("warning: licences: data pairs.tsv: cc-by-4.0; ")
    assert "teacher open_clip:ViT-B-32-quickgelu/metaclip_400m: cc-by-nc-4.0 (non-commercial use only); " in said[-1]
    assert said[-1].endswith("; start other: unknown; data scenes: unknown")
    file = tmp_path / "out" / ("open_clip_config.json" if to == "open_clip" else "config.json")
    assert Provenance.model_validate(json.loads(file.read_text())["provenance"]) == SECOND
    if to != "open_clip":
        assert tinyclip.load(tmp_path / "out").provenance == SECOND


def test_what_is_not_known_is_said_to_be_unknown(tmp_path):
    said = []
    export(toy(UNIFORM), tmp_path / "out", to="tinyclip", verify=False, say=said.append)
    assert said[-1] == "licences: unknown; the model does not say where it comes from"
    assert tinyclip.load(tmp_path / "out").provenance is None
    assert not license_line(FIRST).startswith("warning")


def test_a_damaged_entry_is_one_line_that_names_the_field(tmp_path):
    model = toy(UNIFORM)
    model.provenance = FIRST
    tinyclip.save(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace('"pairs.tsv"', "7"))
    with pytest.raises(ValueError, match=r"config.json: provenance: data.name: Input should be a valid string"):
        tinyclip.load(tmp_path / "model")


@pytest.mark.parametrize(
    "license, restriction",
    [
        ("mit", None),
        ("cc-by-4.0", None),
        ("CC BY-NC-ND 4.0", "non-commercial use only, no derivatives"),
        ("cc_by_nd_4.0", "no derivatives"),
        ("apple-amlr", "research only"),
        ("FAIR Noncommercial Research License", "non-commercial use only, research only"),
        ("bsd-3-clause", None),
    ],
)
def test_a_licence_that_restricts_says_so_in_its_name(license, restriction):
    assert Origin(name="x", license=license).restriction == restriction


@pytest.mark.parametrize(
    "spec, name, license",
    [
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "mit"),
        ("open_clip:ViT-B-32-quickgelu/metaclip_400m", "timm/vit_base_patch32_clip_224.metaclip_400m", "cc-by-nc-4.0"),
        ("open_clip:ViT-B-32/openai", "timm/vit_base_patch32_clip_224.openai", "unknown"),
        ("open_clip:ViT-B-32/file.pt", None, "unknown"),
        ("hf:laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", UNKNOWN),
        ("tinyclip:ViT-39M-16-Text-19M-YFCC15M/x.pt", "wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M", UNKNOWN),
        ("local-dir:mine", None, "unknown"),
        ("runs/mine", None, "unknown"),
    ],
)
def test_licences_of_published_models_are_those_on_their_cards_and_never_guessed(spec, name, license):
    assert hub_name(spec) == name
    assert model_origin(spec) == Origin(name=spec, license=license)
    assert model_origin(spec, "said by the user").license == "said by the user"


@pytest.mark.parametrize(
    "spec, shown",
    [
        ("/home/me/pairs/train.tsv?images=/mnt/disk/all/images.zip", "pairs/train.tsv?images=all/images.zip"),
        ("local-dir:/models/clip/teacher", "local-dir:clip/teacher"),
        ("~/data/cc3m/{00000..00331}.tar", "cc3m/{00000..00331}.tar"),
        ("hf:organisation/name", "hf:organisation/name"),
        ("https://example.org/a/b/c.tar", "https://example.org/a/b/c.tar"),
        ("runs/a/b/model", "runs/a/b/model"),
    ],
)
def test_where_on_a_disk_something_lay_is_nobodys_business(spec, shown):
    assert public(spec) == shown


@pytest.mark.parametrize(
    "spec", ["scenes?split=train&count=8", "a/pairs.tsv?caption=50%25 off %26 more&where=x=1", "d"]
)
def test_a_data_spec_reads_as_it_was_written(spec):
    assert DataSpec.parse(str(DataSpec.parse(spec))) == DataSpec.parse(spec)
