"""Any file of a run or its store, damaged in any way: one line names it, and nothing changes or the same bits come out.

tests/damage.py has the table. Here a flipped bit strikes most files, and every other kind a fourth of them; `make soak`
strikes all.
"""

import shutil
from pathlib import Path

import pytest

from tests import damage
from tinyclip.compress import compress
from tinyclip.distill import store


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ITEMS", damage.ITEMS)
        yield damage.prepare(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize("state", ["finished", "stopped"])
@pytest.mark.parametrize("kind", damage.DAMAGES, ids=lambda kind: kind.__name__)
def test_damage_is_named_and_nothing_changes_or_what_is_said_to_be_made_again_is(runs, state, kind):
    run_dir: Path = getattr(runs, state)
    files = damage.files_of(run_dir)
    assert len(files) > 20
    every = 4 if kind is not damage.a_bit else 1 if state == "finished" else 2
    chosen = files[damage.DAMAGES.index(kind) % every :: every]
    answers = {name: damage.strike(runs, run_dir, name, kind) for name in chosen}
    assert {name: answer.wrong for name, answer in answers.items() if answer and answer.wrong} == {}
    assert {answer.kind for answer in answers.values() if answer} & {"refused", "said"}


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_run_of_before_there_were_checksums_goes_on_and_nothing_is_said_of_it(runs, state, tmp_path):
    run, said = tmp_path / "run", []
    shutil.copytree(getattr(runs, state), run)
    damage.older(run)
    compress(runs.recipe, run, say=said.append)
    assert [line for line in said if not line.startswith("0-auto: ")] == []
    for name in ("model/model.safetensors", "0-auto/model/model.safetensors", "0-auto/model/tokenizer.json"):
        assert (run / name).read_bytes() == runs.expected[name]
