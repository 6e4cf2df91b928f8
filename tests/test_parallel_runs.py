"""Runs on several processes: torchrun starts the command, and its model is that of one process. CPU, gloo.

fp32 sums in another order are not the same bits, and Adam makes steps of one size out of small differences of gradients
near 0: what one and several processes agree on is a tolerance. The same number of processes gives the same bits.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.test_compress import DATA, phase, student_recipe, teacher_recipe
from tinyclip.compress import compress
from tinyclip.distill.objective import Objective
from tinyclip.distill.store import StoreConfig
from tinyclip.distill.train import DataConfig
from tinyclip.recipe import Recipe, Stage
from tinyclip.shrink.inherit import Inherit
from tinyclip.shrink.masks import LearnMasks

TERMS = Objective(affinity=1, contrastive=0.5, feature=0.1, student_scale="learned")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run = tmp_path_factory.mktemp("teacher") / "run"
    compress(teacher_recipe(), run, say=lambda _: None)
    return run


def recipe(teacher, **settings) -> Recipe:
    """Gates, micro-batches, every term of the loss, a projection to the teacher's size, an odd batch."""
    masks = phase(4, objective=TERMS).model_copy(update={"batch_size": 7, "micro_batch_size": 2})
    distill = phase(6, objective=TERMS).model_copy(update={"batch_size": 7})
    return Recipe(
        teacher=str(teacher),
        data=DATA,
        stages=(
            Stage(name="auto", shrink=LearnMasks(keep_params=0.7), while_masking=masks, distill=distill),
            Stage(name="rule", shrink=Inherit(keep_params=0.35), distill=distill),
        ),
        **settings,
    )


def launch(processes: int, recipe: Recipe, folder, *torchrun: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *torchrun]
    command = [*start, "-m", "tinyclip", "compress", str(file), "--run-dir", str(folder / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model" / "model.safetensors")


def lines(folder, phase_dir: str, name: str = "metrics") -> list[dict]:
    path = folder / "run" / phase_dir / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def two(teacher, tmp_path_factory):
    """A finished run on two processes, and what it said."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *finish(launch(2, recipe(teacher), folder))


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    compress(recipe(teacher), folder / "run", say=lambda _: None)
    return folder


def test_two_processes_train_the_model_of_one(two, alone):
    for phase_dir in ("0-auto/masks", "0-auto/distill", "1-rule/distill"):
        ours, theirs = lines(two[0], phase_dir), lines(alone, phase_dir)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"pairs_per_s"}:
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), (phase_dir, a["step"], name)
    assert (two[0] / "run/0-auto/keep.json").read_text() == (alone / "run/0-auto/keep.json").read_text()
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weights(two[0])[name], weight, rtol=0, atol=2e-3, msg=name)


def test_the_main_process_alone_tells_and_writes(two):
    folder, out, err = two
    ours = [line for line in out.splitlines() if "peer ranks" not in line]  # gloo's, in torch 2.8
    assert ours == [str(folder / "run" / "model")]
    assert err.count("1-rule: ") == 2  # what survived, and the summary; each once
    calls = [json.loads(line) for line in (folder / "run/calls.jsonl").read_text().splitlines()]
    assert [call["event"] for call in calls] == ["start", "end"] * 2 and calls[0]["processes"] == 2
    assert not list(folder.rglob("*.tmp"))


def test_a_killed_process_is_started_again_and_the_bits_are_the_same(two, teacher, tmp_path):
    """torchrun restarts all processes, and they continue from the last checkpoint."""
    process = launch(2, recipe(teacher), tmp_path, "--max-restarts=1")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("run/0-auto/distill/checkpoint*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(worker(process, rank=1), signal.SIGKILL)
    finish(process)
    for name, weight in weights(two[0]).items():
        assert torch.equal(weights(tmp_path)[name], weight), name
    assert lines(tmp_path, "1-rule/distill")[-1]["loss"] == lines(two[0], "1-rule/distill")[-1]["loss"]


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process number of torchrun's worker."""
    for path in (f"/proc/{process.pid}/task/{process.pid}/children",):
        with open(path) as file:
            children = [int(child) for child in file.read().split()]
    for child in children:
        with open(f"/proc/{child}/environ") as file:
            if f"\0RANK={rank}\0" in f"\0{file.read()}":
                return child
    raise AssertionError(f"no worker {rank} among {children}")


def test_a_run_continues_on_another_number_of_processes(teacher, alone, tmp_path):
    """SIGTERM saves and ends all; every pair is still seen once, and the model is that of one process."""
    process = launch(2, recipe(teacher), tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("run/0-auto/masks/checkpoint*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert f"continue with: torchrun --nproc-per-node=2 -m tinyclip compress {tmp_path}" in err
    compress(recipe(teacher), tmp_path / "run", say=lambda _: None)
    assert [line["step"] for line in lines(tmp_path, "0-auto/masks")] == list(range(4))
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight, rtol=0, atol=2e-3, msg=name)


def with_bad_images(folder, count: int, bad: Collection[int]) -> DataConfig:
    """Pairs, of which some are no image: each visit to one is written down, so it shows who was visited when."""
    (folder / "images").mkdir()
    rows = ["file\tcaption"]
    for number in range(count):
        file = folder / "images" / f"{number}.png"
        if number in bad:
            file.write_bytes(b"not an image")
        else:
            Image.new("RGB", (40, 40), (number * 255 // count, 0, 0)).save(file)
        rows.append(f"{number}.png\ta picture of number {number}")
    (folder / "pairs.tsv").write_text("\n".join(rows))
    return DataConfig(train={"path": str(folder / "pairs.tsv"), "images": "images"}, max_bad_share=0.5)


def test_every_pair_is_visited_once_an_epoch_on_one_two_and_one_process(teacher, tmp_path):
    """A third of the pairs are bad, so that the visits to them are on record; an epoch has four batches."""
    steps = phase(100).model_copy(update={"batch_size": 15, "checkpoint_every": 10})
    data = with_bad_images(tmp_path, 60, bad := range(1, 60, 3))
    counted = Recipe(teacher=str(teacher), data=data, stages=(Stage(name="only", distill=steps),))
    reached = [0]
    for processes in (1, 2):
        process = launch(processes, counted, tmp_path)
        deadline = time.monotonic() + 60
        while not (path := tmp_path / "run/0-only/distill/metrics.jsonl").exists() or (
            path.read_text().count("\n") < reached[-1] + 7
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        reached.append(int(re.search(r"stopped after step (\d+) of 100", err)[1]))
    compress(counted, tmp_path / "run", say=lambda _: None)
    assert 0 < reached[1] < reached[2] < 100
    visits = [(line["step"] // 4, line["key"]) for line in lines(tmp_path, "0-only/distill", "skipped")]
    assert sorted(visits) == sorted((epoch, f"{number}.png") for epoch in range(25) for number in bad)
    assert [line["step"] for line in lines(tmp_path, "0-only/distill")] == list(range(100))


def test_bad_pairs_of_every_process_are_counted_and_named(teacher, tmp_path):
    """An image of each share is no image."""
    data = with_bad_images(tmp_path, 16, bad=(3, 11))
    stage = Stage(name="only", distill=phase(4))
    bad = Recipe(teacher=str(teacher), data=data, stages=(stage,))
    finish(launch(2, bad, tmp_path))
    seen = {(line["step"], line["key"]) for line in lines(tmp_path, "0-only/distill", "skipped")}
    assert len(seen) == 4 and {key for _, key in seen} == {"3.png", "11.png"}
    assert lines(tmp_path, "0-only/distill")[-1]["skipped_pairs"] == 4


def test_a_teacher_split_over_processes_teaches_the_same_live_and_stored(teacher, tmp_path):
    """Whole pictures, so that a stored teacher has seen the same."""
    stage = Stage(name="rule", shrink=Inherit(keep_params=0.5), distill=phase(4).model_copy(update={"batch_size": 7}))
    data = DATA.model_copy(update={"crop_scale": (1.0, 1.0)})
    whole = Recipe(teacher=str(teacher), data=data, stages=(stage,), evaluation=student_recipe(teacher).evaluation)
    split = whole.model_copy(update={"shard_teacher": True})
    stored = split.model_copy(update={"store": StoreConfig(dtype="fp32")})
    compress(whole, tmp_path / "whole" / "run", say=lambda _: None)
    for name, recipe_of in (("split", split), ("stored", stored)):
        finish(launch(2, recipe_of, tmp_path / name))
        for weight_name, weight in weights(tmp_path / "whole").items():
            torch.testing.assert_close(weights(tmp_path / name)[weight_name], weight, rtol=0, atol=1e-4, msg=name)
    scores = [json.loads((tmp_path / how / "run/teacher.json").read_text())["scores"] for how in ("whole", "split")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_a_mistake_is_said_once(teacher, tmp_path):
    large = phase(1).model_copy(update={"batch_size": 99})
    large = Recipe(teacher=str(teacher), data=DATA, stages=(Stage(name="a", distill=large),))
    process = launch(2, large, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("tinyclip: error: ") == 1 and "batch_size 99: expected 2 to 64" in err
