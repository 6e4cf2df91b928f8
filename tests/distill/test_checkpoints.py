"""Checkpoints: damaged ones are passed over and told, k are kept, a full disk leaves the last; a phase continues."""

import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distill.test_train import tiny_clip
from tests.test_compress import CONTRASTIVE, DATA, phase
from tinyclip.data.sources import open_source
from tinyclip.distill.checkpoints import Checkpoints, read
from tinyclip.distill.metrics import JsonLines
from tinyclip.distill.objective import Objective
from tinyclip.distill.teacher import load_teacher
from tinyclip.distill.train import train
from tinyclip.formats import checkpoint
from tinyclip.formats.files import whole, write_text

CPU = torch.device("cpu")


def content(number: int) -> dict:
    return {"step": number, "weight": torch.full((1000,), float(number))}


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in directory.glob("checkpoint-*.pt"))


def number(path: Path | None) -> int | None:
    return None if path is None else read(path, CPU)["step"]


@pytest.fixture
def told():
    return []


@pytest.fixture
def three(tmp_path, told):
    checkpoints = Checkpoints(tmp_path, keep=3, say=told.append)
    for step in (2, 4, 6):
        checkpoints.save(content(step), step)
    return checkpoints


@pytest.fixture
def small_files():
    """No file of more than 3,000 bytes can be written: the write that crosses the limit fails in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_is_read_and_the_last_k_are_kept(tmp_path, told, keep):
    checkpoints = Checkpoints(tmp_path, keep=keep, say=told.append)
    assert checkpoints.latest() is None
    for step in (5, 10, 999_999, 1_000_000):  # in the order of numbers, not of names
        checkpoints.save(content(step), step)
        assert number(checkpoints.latest()) == step
    assert steps(tmp_path) == [5, 10, 999_999, 1_000_000][-keep:] and told == []
    assert len(list(tmp_path.iterdir())) == keep
    checkpoints.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda _: b"",
        lambda whole: whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
        lambda whole: whole + b"\0",
    ],
    ids=["cut by a byte", "cut in half", "empty", "a bit", "longer"],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(three, told, damage):
    newest = three.latest()
    newest.write_bytes(damage(newest.read_bytes()))
    used = three.latest()
    assert number(used) == 4
    assert told == [f"{newest}: damaged (its sha256 is not the one in its name); continuing from {used.name}"]


def test_where_all_are_damaged_a_phase_starts_again(three, told, tmp_path):
    for path in tmp_path.glob("checkpoint-*.pt"):
        path.write_bytes(b"torn")
    assert three.latest() is None
    assert len(told) == 3 and all(line.endswith("none is whole; starting again") for line in told)


def test_what_was_passed_over_goes_when_its_step_is_saved_again(three, tmp_path):
    three.latest().write_bytes(b"torn")
    three.save(content(6), 6)
    assert steps(tmp_path) == [2, 4, 6] and number(three.latest()) == 6


def test_what_a_killed_process_left_unfinished_is_no_checkpoint(three, tmp_path):
    (tmp_path / "checkpoint.tmp").write_bytes(b"the beginning of one")
    assert number(three.latest()) == 6
    assert not (tmp_path / "checkpoint.tmp").exists()


def test_nothing_is_unpickled(three):
    path = three.save({"step": 8, "code": Path}, 8)
    assert three.latest() == path  # whole
    with pytest.raises(ValueError, match="expected tensors and numbers only; the file holds code, and is not read"):
        read(path, CPU)


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(three, small_files, tmp_path):
    with pytest.raises(OSError, match="not written, the file would be larger .* what was there before is intact"):
        three.save(content(8), 8)
    assert number(three.latest()) == 6 and steps(tmp_path) == [2, 4, 6]
    assert len(list(tmp_path.iterdir())) == 3  # nothing unfinished


def test_a_full_disk_leaves_texts_and_directories_as_they_were(tmp_path, small_files):
    write_text(tmp_path / "scores.json", "old")
    with pytest.raises(OSError, match="not written") as caught:
        write_text(tmp_path / "scores.json", "new " * 1000)
    assert caught.value.filename == str(tmp_path / "scores.json")
    with pytest.raises(OSError, match="not written") as caught:
        checkpoint.save(tiny_clip(), tmp_path / "model")  # the weights are written by a library in Rust
    assert caught.value.filename == str(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    assert (tmp_path / "scores.json").read_text() == "old"


def test_what_killed_processes_left_beside_a_directory_is_cleared_and_the_old_one_put_back(tmp_path):
    gone = 2**22 + 1  # above the largest process number that Linux gives
    (tmp_path / f".model.{gone}.unfinished").mkdir()
    (tmp_path / f".model.{gone}.old").mkdir()
    (tmp_path / f".model.{gone}.old" / "weights").write_text("old")
    (tmp_path / ".model.1.unfinished").mkdir()  # of a process that lives
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "model"):
        raise ZeroDivisionError
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".model.1.unfinished"}


def test_lines_of_a_cut_off_run_are_dropped_and_a_torn_end_is_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    lines = JsonLines(path, start_step=2)
    lines.write({"step": 2, "again": True})
    lines.close()
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2, "again": true}\n'
    path.write_text('{"step": 0}\n{"step": 1}')  # all but the end of the line
    lines = JsonLines(path, start_step=2)
    lines.write({"step": 2})
    lines.close()
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def trained(directory: Path, **settings) -> dict[str, torch.Tensor]:
    student = tiny_clip()
    train(student, open_source(DATA.train), DATA, phase(4, objective=CONTRASTIVE), directory, **settings)
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_phase_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(tmp_path, capfd):
    expected = trained(tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_text().splitlines()
    newest = Checkpoints(tmp_path).latest()
    newest.write_bytes(newest.read_bytes()[:-100])
    assert same(trained(tmp_path), expected)
    assert f"{newest}: damaged" in capfd.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(metrics) == 4


def test_a_phase_of_other_settings_is_refused_with_the_difference(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"other training settings: seed: 0 -> 1; use another --run or delete it"):
        trained(tmp_path, seed=1)
    config, source = phase(4, objective=CONTRASTIVE, lr=1e-3), open_source(DATA.train)
    free = {"max_bad_share": 0.5, "workers": 3}  # they change no step
    other = DATA.model_copy(update={"crop_scale": (0.5, 1.0), **free})
    with pytest.raises(ValueError, match=r"settings: lr: 0.0005 -> 0.001; data.crop_scale.0: 0.9 -> 0.5; use"):
        train(tiny_clip(), source, other, config, tmp_path)


def test_no_random_state_of_the_process_has_a_part_in_training(tmp_path):
    teacher = load_teacher(str(checkpoint.save(tiny_clip(seed=1), tmp_path / "teacher")))
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        student, config = tiny_clip(), phase(2, objective=Objective(affinity=1, feature=1))
        train(student, open_source(DATA.train), DATA, config, tmp_path / str(seed), teachers=[teacher])
        ends.append(student.state_dict())
    assert same(*ends)
