"""Kill anywhere: runs that were stopped at random points of every phase end with the bytes of one that never was.

tests/soak.py is the injector; here it strikes few times, with a fixed seed. `make soak` strikes hundreds of times.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = 30


@pytest.fixture(scope="module")
def report():
    """From a process of its own: one that forks must not have trained, as autograd's threads do not survive that."""
    command = [sys.executable, "-m", "tests.soak", "--faults", str(FAULTS), "--seed", "11", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_stopped_runs_leave_the_bytes_of_an_undisturbed_one(report):
    assert report["wrong"] == []
    assert len(report["struck"]) == FAULTS


def test_the_faults_were_spread_over_phases_and_kinds(report):
    phases = Counter(entry["phase"] for entry in report["struck"])
    assert {"masks", "distill", "evaluation", "saving", "between", "store"} <= phases.keys()
    kinds = Counter(entry["kind"] for entry in report["struck"])
    assert kinds["kill"] >= 12
    assert {"term", "ctrl-c", "full disk", "damage", "power loss", "import"} <= kinds.keys()
    assert {entry["variant"] for entry in report["struck"]} == {"masks", "workers", "stored", "scratch", "evaluate"}
    assert {entry["command"] for entry in report["struck"]} == {"compress", "embed", "evaluate"}
    assert any(entry.get("lost") for entry in report["struck"])


def test_of_two_first_calls_at_once_one_works_and_two_runs_begin_one_store(report):
    assert report["races"] == 2
