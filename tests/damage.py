"""Damage any file of a run or of its teacher store, call the command again, and judge the answer.

    python -m tests.damage          (the end of `make soak`): every file x every kind of damage

The answer is right where it names the file in one line and changes nothing, or says in one line what it made again and
ends with the bytes of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.test_compress import DATA, EVALUATION, phase, teacher_recipe
from tinyclip.compress import compress
from tinyclip.distill import store, train
from tinyclip.distill.store import StoreConfig
from tinyclip.embed import embed
from tinyclip.formats.checkpoint import load
from tinyclip.formats.files import read_sealed, write_record
from tinyclip.recipe import Recipe, Stage
from tinyclip.report import report
from tinyclip.shrink.masks import LearnMasks

ITEMS = 24  # of a part of the store: 64 pictures make three, the last one short
NEVER_READ = {"calls.jsonl", ".lock"}  # by a call that continues
REQUIRED = {
    "stages",
    "images",
    "model",
    "scores",
    "files",
    "weights",
    "counts",
}  # of keys that are there; others may lack
Damage = Callable[[Path, Random], None]


def cut(path: Path, random: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content))] if content else b"")


def emptied(path: Path, _: Random) -> None:
    path.write_bytes(b"")


def noise(path: Path, random: Random) -> None:
    path.write_bytes(random.randbytes(max(100, path.stat().st_size)))


def a_bit(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def a_directory(path: Path, _: Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


def another_type(path: Path, _: Random) -> None:
    """JSON, but a list."""
    path.write_text("[3, null]\n")


def without_a_key(path: Path, random: Random) -> None:
    """With the right checksum, as all that follow."""
    _rewritten(path, lambda content: content.pop(random.choice(sorted(REQUIRED & content.keys() or content))))


def another_value(path: Path, random: Random) -> None:
    _rewritten(path, lambda content: content.__setitem__(random.choice(sorted(content)), [{"deep": None}]))


def another_dtype(path: Path, _: Random) -> None:
    _rewritten(path, lambda content: _change_a_tensor(content, lambda tensor: tensor.to(torch.float64)))


def another_shape(path: Path, _: Random) -> None:
    _rewritten(path, lambda content: _change_a_tensor(content, lambda tensor: tensor.flatten()[:-1].clone()))


DAMAGES: tuple[Damage, ...] = (
    a_bit, cut, emptied, noise, a_directory, another_type, without_a_key, another_value, another_dtype, another_shape
)  # fmt: skip


def _rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A record or tensors, changed, as the program would have written it."""
    if path.suffix == ".json":
        content = read_sealed(path)
        before = json.dumps(content)
        change(content)
        if json.dumps(content) != before:
            write_record(path, json.dumps(content))
    elif path.suffix == ".yaml":
        content = yaml.safe_load(path.read_text())
        change(content)
        text = yaml.safe_dump(content, sort_keys=False)
        path.write_text(f"{text}# sha256: {hashlib.sha256(text.encode()).hexdigest()}\n")
    elif path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        change(content)
        _put(content, path)
    elif path.suffix == ".safetensors":
        content = {name: tensor.clone() for name, tensor in load_file(path).items()}
        with contextlib.suppress(TypeError, AttributeError):
            change(content)
            tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
            save_file(tensors, path, metadata={"sha256": store._sha256(tensors)})


def _put(content: dict[str, Any], path: Path) -> None:
    """In the place of a checkpoint, under the name that its bytes ask for."""
    path.unlink()
    beside = path.parent / "beside"
    beside.mkdir()
    saved = train.Checkpoints(beside).save(content, int(path.name.split("-")[1]))
    saved.rename(path.parent / saved.name)
    beside.rmdir()


def _change_a_tensor(content: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The last tensor with axes; of an optimizer's state where there is one."""
    places = [(owner, key) for owner in _mappings(content) for key, value in owner.items() if _is_array(value)]
    if places:
        owner, key = max(places, key=lambda place: str(place[1]).startswith("exp_avg"))
        owner[key] = change(owner[key])


def _mappings(content: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(content, dict):
        yield content
        for value in content.values():
            yield from _mappings(value)


def _is_array(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


class Runs(NamedTuple):
    """A finished run, one that stopped while it distilled, after masks were learned, and what the first one holds."""

    recipe: Recipe
    finished: Path
    stopped: Path
    expected: dict[str, Any]


class Stop(Exception):
    """A kill, for a test."""


def prepare(room: Path) -> Runs:
    store.ITEMS = ITEMS
    compress(teacher_recipe(), room / "teacher", say=_nothing)
    stage = Stage(name="auto", shrink=LearnMasks(keep_params=0.6), while_masking=phase(2), distill=phase(5))
    recipe = Recipe(
        teacher=str(room / "teacher"), data=DATA, stages=(stage,), evaluation=EVALUATION, store=StoreConfig()
    )
    compress(recipe, room / "finished", say=_nothing)
    save, num_saved = train._State.save, iter(range(1, 99))

    def save_some(*arguments: Any) -> None:
        save(*arguments)
        if next(num_saved) == 3:  # one of masks, two of distillation
            raise Stop

    train._State.save = save_some
    try:
        compress(recipe, room / "stopped", say=_nothing)
    except Stop:
        pass
    finally:
        train._State.save = save
    return Runs(recipe, room / "finished", room / "stopped", contents(room / "finished"))


def _nothing(_: str) -> None:
    """What nobody hears."""


def contents(run_dir: Path) -> dict[str, Any]:
    """Every file but those that a call adds to, without times."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*")):
        name = str(path.relative_to(run_dir))
        if NEVER_READ & {path.name, path.parent.name}:
            continue
        if path.is_dir():
            found[name] = "directory"
        elif path.name == "stage.json":
            found[name] = path.read_text().partition('"seconds"')[0]
        elif path.name == "metrics.jsonl":
            found[name] = [json.loads(line) | {"pairs_per_s": 0} for line in path.read_text().splitlines()]
        elif not (path.name == "digests.json" and path.parent.name in ("masks", "distill")):  # of times too
            found[name] = path.read_bytes()
    return found


class Answer(NamedTuple):
    kind: str  # refused, said or silent
    wrong: str  # empty where it is right


def older(run_dir: Path) -> None:
    """As runs were before anything but a checkpoint had a checksum."""
    for path in sorted(run_dir.rglob("*")):
        if path.name == "digests.json":
            path.unlink()
        elif path.name == "recipe.yaml":
            path.write_text(path.read_text().rpartition("# sha256")[0])
        elif path.suffix == ".json" and path.parent.name not in ("model", "shrunk"):
            content = read_sealed(path)
            content.pop("data", None)
            path.write_text(json.dumps(content, indent=2))
        elif path.suffix == ".safetensors" and "teacher-store" in path.parts:
            save_file(load_file(path), path)
        elif path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
            for name in [name for name in content if "optimizer" in name]:
                content[name]["param_groups"] = [{"lr": 1.0, "params": sorted(content[name]["state"])}]
            del content["logs"]
            _put(content, path)


def strike(runs: Runs, run_dir: Path, name: str, damage: Damage, seed: int = 0) -> Answer | None:
    """Of a copy of `run_dir`, one file; None where the damage changes nothing."""
    copy = run_dir.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_dir, copy)
    path = copy / name
    before = path.read_bytes()
    damage(path, Random(f"{seed} {name} {damage.__name__}"))
    if path.is_file() and path.read_bytes() == before:
        return None
    path = path if path.exists() else max(path.parent.iterdir(), key=lambda other: other.stat().st_mtime_ns)
    damaged = _raw(copy)
    try:
        with contextlib.suppress(ValueError, OSError):
            report([copy], out=run_dir.with_name("report.html"), with_examples=False, say=_nothing)
        if name.startswith("model/"):
            with contextlib.suppress(ValueError, OSError):
                load(copy)
                return Answer("silent", "its model is loaded")
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            if "teacher-store" in name:
                embed(runs.recipe, copy, say=lambda line: print(line, file=sys.stderr))
            compress(runs.recipe, copy, say=lambda line: print(line, file=sys.stderr))
    except (ValueError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        return Answer("refused", _wrong_refusal(message, path, copy, damaged))
    except Exception as error:
        return Answer("refused", f"{type(error).__name__}: {error}")
    lines = [line for line in said.getvalue().splitlines() if str(path) in line]
    if not lines and not _is_passed_over(name, run_dir):
        return Answer("silent", f"nothing was said of it, but {said.getvalue()!r}")
    got = contents(copy)
    differ = [file for file in sorted(got.keys() | runs.expected.keys()) if got.get(file) != runs.expected.get(file)]
    return Answer("said" if lines else "silent", f"{', '.join(differ)} differ; {lines}" if differ else "")


def _is_passed_over(name: str, run_dir: Path) -> bool:
    """Whether a call that continues the run does not read the file, or knows what its end may be like after a kill."""
    path = run_dir / name
    if path.suffix == ".pt":
        return "masks" in name or path != max(path.parent.glob("checkpoint-*.pt"))
    return path.name in NEVER_READ or (run_dir.name == "stopped" and name.endswith("distill/skipped.jsonl"))


def _wrong_refusal(message: str, path: Path, copy: Path, damaged: dict[str, bytes]) -> str:
    if "\n" in message or len(message) > 600:
        return f"not one line: {message!r}"
    if str(path) not in message:
        return f"does not name the file: {message}"
    after = _raw(copy)
    changed = [file for file in sorted(after.keys() | damaged.keys()) if after.get(file) != damaged.get(file)]
    return f"{', '.join(changed)} changed though it was refused: {message}" if changed else ""


def _raw(run_dir: Path) -> dict[str, bytes]:
    files = (path for path in run_dir.rglob("*") if path.is_file() and path.name not in NEVER_READ)
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def files_of(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())


def table(room: Path) -> tuple[Counter[str], list[str]]:
    """Every file x every damage: how many of which answer, and what was wrong."""
    runs, wrong, kinds = prepare(room), [], Counter()
    for run_dir in (runs.finished, runs.stopped):
        for name in files_of(run_dir):
            for damage in DAMAGES:
                answer = strike(runs, run_dir, name, damage)
                kinds[answer.kind if answer else "nothing to damage"] += 1
                if answer is not None and answer.wrong:
                    wrong.append(f"{run_dir.name}: {name}: {damage.__name__}: {answer.kind}: {answer.wrong}")
    return kinds, wrong


def main() -> int:
    """Print the table's sums; returns the number of wrong answers."""
    with tempfile.TemporaryDirectory() as room:
        kinds, wrong = table(Path(room))
    print(f"files x damages: {', '.join(f'{kind} {count}' for kind, count in kinds.most_common())}")
    print("\n".join([*wrong, f"{len(wrong)} wrong"]))
    return len(wrong)


if __name__ == "__main__":
    sys.exit(bool(main()))
