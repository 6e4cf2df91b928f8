"""The demo, cut short: five runs, one table with a row each, and a second call that only reads."""

import json

import pytest

from tinyclip import recipes
from tinyclip.data.spec import DataSpec
from tinyclip.demo import MODELS, demo
from tinyclip.evaluate.scores import Evaluation


@pytest.fixture
def short(monkeypatch):
    """The demo with a few steps a phase, scored on a few pictures."""
    monkeypatch.setattr(recipes, "DEMO_TEACHER_STEPS", 3)
    monkeypatch.setattr(recipes, "DEMO_MASK_STEPS", 2)
    monkeypatch.setattr(recipes, "DEMO_DISTILL_STEPS", 2)
    scenes = {"retrieval": "scenes?split=heldout&count=16", "zeroshot": "scenes?split=classes&count=16"}
    specs = {name: DataSpec.parse(spec) for name, spec in scenes.items()}
    monkeypatch.setattr(recipes, "DEMO_EVALUATION", Evaluation(**specs))


def test_the_demo_makes_two_students_of_a_quarter_and_their_baselines(short, tmp_path, capsys):
    rows = json.loads(demo(tmp_path / "run", say=lambda _: None).read_text())
    assert [row["run"] for row in rows] == list(MODELS)
    teacher = rows[0]["prunable_parameters"]
    for row in rows[1:]:
        assert 0.24 * teacher < row["prunable_parameters"] <= 0.25 * teacher
        assert row["pairs_per_s"] > 0 and set(row["scores"]) == set(rows[0]["scores"])
    shapes = {row["run"]: (row["parameters"], row["macs"]) for row in rows}
    assert shapes["auto"] == shapes["scratch-auto"] and shapes["manual"] == shapes["scratch-manual"]
    printed = capsys.readouterr().out
    assert "25 % by masks" in printed and max(map(len, printed.splitlines())) <= 80
    lines: list[str] = []
    demo(tmp_path / "run", say=lines.append)
    assert sum(line.endswith(": complete") for line in lines) == 9  # teacher, two times three stages, two baselines
