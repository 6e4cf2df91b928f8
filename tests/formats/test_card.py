"""A model card holds the facts of a model, its run and its ledger, with the hub's front matter, and no invention."""

import json
import re

import pytest
import yaml

from tests.formats.test_export import IRREGULAR, UNIFORM, toy
from tests.formats.test_provenance import CODE, ENSEMBLE, FIRST, SECOND
from tinyclip.evaluate import cost
from tinyclip.formats.card import Record, card, record_of
from tinyclip.formats.provenance import Origin, Provenance

MIT = Provenance(
    teacher=Origin(name="open_clip:ViT-B-32/laion2b_s34b_b79k", license="mit"),
    data=Origin(name="pairs.tsv", license="mit"), recipe="vit-b32-50 --set seed=1", code=CODE,
)  # fmt: skip
ALIKE = Provenance(data=Origin(name="pairs.tsv", license="mit"), code=CODE)
RECORD = Record({"top1": 0.45, "top5": 1.0, "n": 1200}, {"top1": 0.6, "n": 1200}, {"zeroshot": "imagenet/val"})


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_numbers_are_those_of_the_model():
    model = toy(IRREGULAR)
    text, counts = card(model, "me/small", to="tinyclip", record=Record()), cost(IRREGULAR)
    assert f"| parameters | {counts.image_parameters:,} | {counts.text_parameters:,} (without the token embed" in text
    assert f"| multiply-accumulates | {counts.image_macs:,} | {counts.text_macs:,} |" in text
    total, embedding = counts.parameters, counts.token_embedding_parameters
    assert f"{total:,} parameters in all, {total - embedding:,} without the token embedding" in text
    assert "| heads per layer | 2 0 4 | 1 2 |" in text and "| neurons per layer | 5 3 0 | 7 1 |" in text
    assert "| heads per layer | 3 each | 2 each |" in card(toy(UNIFORM), "me/small", to="tinyclip", record=Record())


def test_scores_stand_beside_the_teachers_with_the_share_that_is_kept():
    text = card(toy(UNIFORM), "me/small", to="tinyclip", record=RECORD)
    assert "| top1 | 45.0% | 60.0% | 75.0% |" in text
    assert "| top5 | 100.0% | unknown | unknown |" in text
    assert "| n | 1,200 |  |  |" in text
    assert "zeroshot on `imagenet/val`" in text
    alone = card(toy(UNIFORM), "me/small", to="tinyclip", record=RECORD._replace(teacher_scores={}))
    assert "| score | model |\n" in alone and "| top1 | 45.0% |\n" in alone


def test_a_bare_model_has_no_facts_to_tell():
    text = card(toy(UNIFORM), "me/small", to="tinyclip", record=Record())
    assert "Unknown: nothing that was measured" in text and "Unknown: the model does not say" in text
    assert front_matter(text)["license"] == "unknown" and "base_model" not in front_matter(text)


@pytest.mark.parametrize(
    "provenance, expected",
    [
        (MIT, {"license": "mit", "base_model": ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]}),
        (SECOND, {"license": "unknown", "base_model": ["timm/vit_base_patch32_clip_224.metaclip_400m"]}),
        (FIRST, {"license": "cc-by-4.0"}),
        (FIRST.model_copy(update={"ancestors": (ALIKE,)}), {"license": "other", "license_name": "cc-by-4.0, mit"}),
    ],
)
def test_the_front_matter_is_what_the_hub_reads(provenance, expected):
    model = toy(UNIFORM)
    model.provenance = provenance
    found = front_matter(card(model, "me/small", to="huggingface", record=Record()))
    assert found.items() >= expected.items()
    assert found.keys() == {"license", "library_name", "pipeline_tag", "tags", *expected}
    assert found["library_name"] == "transformers" and found["tags"] == ["clip", "tinyclip"]


def test_the_ledger_names_every_ingredient_of_every_compression_and_its_licence():
    model = toy(UNIFORM)
    model.provenance = SECOND
    text = card(model, "me/small", to="tinyclip", record=Record())
    ledger = text.partition("## Where it comes from")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\w+) \| `(.*)` \| (.*) \|$", ledger, re.MULTILINE) == [
        ("data", "pairs.tsv", "cc-by-4.0"),
        ("code", "tinyclip 0", "mit"),
        ("teacher", "open_clip:ViT-B-32-quickgelu/metaclip_400m", "cc-by-nc-4.0 (non-commercial use only)"),
        ("start", "other", "unknown"),
        ("data", "scenes", "unknown"),
        ("code", "tinyclip 0", "mit"),
    ]
    assert re.findall("Recipe: (.*)", ledger) == ["`first`", "unknown"]


def test_every_teacher_of_an_ensemble_is_in_the_ledger_and_in_the_front_matter():
    model = toy(UNIFORM)
    published = Origin(name="hf:laion/two", license="mit")
    model.provenance = ENSEMBLE.model_copy(update={"more_teachers": (*ENSEMBLE.more_teachers, published)})
    text = card(model, "me/small", to="tinyclip", record=Record())
    assert re.findall(r"^\| (teacher.*) \| `(.*)` \| (.*) \|$", text, re.MULTILINE) == [
        ("teacher", "a", "mit"),
        ("teacher 2", "b", "cc-by-nc-4.0 (non-commercial use only)"),
        ("teacher 3", "c", "unknown"),
        ("teacher 4", "hf:laion/two", "mit"),
    ]
    assert front_matter(text)["base_model"] == ["laion/two"] and front_matter(text)["license"] == "unknown"


@pytest.mark.parametrize(
    "config, to, line",
    [
        (UNIFORM, "huggingface", 'AutoModel.from_pretrained("me/small")'),
        (IRREGULAR, "huggingface", 'AutoModel.from_pretrained("me/small", trust_remote_code=True)'),
        (UNIFORM, "open_clip", 'open_clip.create_model_from_pretrained("hf-hub:me/small")'),
        (UNIFORM, "tinyclip", 'tinyclip.load("hf:me/small")'),
    ],
)
def test_it_says_how_to_load_the_model_and_the_code_is_python(config, to, line):
    text = card(toy(config), "me/small", to=to, record=Record())
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert line in code and ("custom_code" in front_matter(text)["tags"]) == ("trust_remote_code" in code)


def test_the_record_of_a_run_is_that_of_the_stage_which_the_model_is_of(tmp_path):
    run = tmp_path / "run"
    for name, score in (("0-first", 0.9), ("1-second", 0.8)):
        (run / name / "model").mkdir(parents=True)
        (run / name / "stage.json").write_text(json.dumps({"scores": {"top1": score}, "cost": {}}))
    (run / "model").mkdir()
    evaluation = {"retrieval": None, "zeroshot": {"path": "/home/me/imagenet/val"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump({"evaluation": evaluation}))
    last, first = {"top1": 0.8}, {"top1": 0.9}
    assert record_of(run / "model").teacher_scores == {}
    (run / "teacher.json").write_text(json.dumps({"name": "teacher", "scores": {"top1": 1.0}}))
    for place, scores in {"": last, "model": last, "0-first": first, "0-first/model": first, "1-second": last}.items():
        assert record_of(run / place) == (scores, {"top1": 1.0}, {"zeroshot": "imagenet/val"}), place
    assert record_of(tmp_path) == record_of("hf:me/other") == record_of(run / "0-first" / "distill") == Record()
