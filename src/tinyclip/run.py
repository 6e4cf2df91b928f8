"""What a run leaves on disk, and how a second call finds it again.

RUN/recipe.yaml         the resolved recipe; a run continues only under the same one, but for where and how it computes.
                        The only file that holds a secret which the recipe names; then nobody else may read it
RUN/inputs.json         the number of images, the teachers' weights and what tells the data's content, as it began
RUN/.lock               held while a call works on the run
RUN/start.json          the shape of the model that the first stage cuts, and of its weights the sha256
RUN/calls.jsonl         by which command and on what machine each stage was worked on, and for how long
RUN/teacher.json        the teacher's scores and cost
RUN/0-NAME/             a stage: model/ (loadable), keep.json (what survived), stage.json (scores, cost; written last)
RUN/0-NAME/masks/       metrics.jsonl and skipped.jsonl of mask learning; while it runs, checkpoints
RUN/0-NAME/distill/     the same of distillation
RUN/model/              the last stage's model

All that a call continues from tells when it is damaged: these records end with their own sha256, directories of models
and of finished phases hold digests.json, the name of a checkpoint ends with its sha256. A record and its checksum are
written in one, so a kill cannot part them. What costs little is made again, and said; else the error says what to
delete. Files without a checksum, of runs that began before there were any, are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from tinyclip import __version__
from tinyclip.config import Config, changes
from tinyclip.data.sources import Evidence, Source, evidence
from tinyclip.distill.checkpoints import Checkpoints
from tinyclip.distill.teacher import Teacher, weights_sha256
from tinyclip.distill.train import Outcome
from tinyclip.distributed import ALONE, World
from tinyclip.evaluate import cost
from tinyclip.formats import checkpoint
from tinyclip.formats.files import (
    DIGESTS,
    check_digests,
    make_directory,
    read_record,
    read_sealed,
    read_yaml,
    sha256_of,
    validated,
    write_record,
    write_text,
    writing,
)
from tinyclip.model import CLIP, CLIPConfig
from tinyclip.redact import has_secrets, redacted
from tinyclip.shrink.keep import Keep
from tinyclip.stopping import command

FREE = ("device", "data.workers", "data.max_bad_share")  # another call of the same run may have others


BEFORE_CLAIM = (".lock", ".recipe.yaml.tmp")  # what a directory may hold that no run has claimed yet
PHASES = ("masks", "distill")
Say = Callable[[str], None]
SEAL = re.compile(r"(.*\n)# sha256: ([^\n]*)\n?", re.DOTALL)


def claim(run_dir: Path, settings: dict[str, Any], say: Say = print) -> None:
    """Write recipe.yaml, or raise ValueError where the directory holds something else than this recipe's run."""
    _check_place(run_dir)
    path = run_dir / "recipe.yaml"
    if not path.exists():
        text = yaml.safe_dump(settings, sort_keys=False)
        seal = f"# sha256: {hashlib.sha256(text.encode()).hexdigest()}\n"
        write_text(path, text + seal, private=has_secrets(settings))
        return
    changed, as_written = changes(read_recipe(path), settings, free=FREE), is_as_written(path)
    if changed and not as_written:
        raise ValueError(f"{path}: damaged or changed since it was written: {changed}; put back what it was")
    if changed:
        raise ValueError(f"{path}: holds a run of another recipe; changed: {changed}")
    if not as_written:
        say(f"{path}: damaged or changed since it was written, but it is the recipe that was asked for")


def _check_place(run_dir: Path) -> None:
    if (run_dir / "recipe.yaml").exists() or not run_dir.exists():
        return
    if not run_dir.is_dir() or any(path.name not in BEFORE_CLAIM for path in run_dir.iterdir()):
        raise ValueError(f"{run_dir}: expected a new directory or a run to continue, found neither (no recipe.yaml)")


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in recipe.yaml. Raises ValueError where there are none."""
    try:
        settings = read_yaml(path)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: damaged, expected the recipe of a run to continue; put back what it was")
    return settings


def is_as_written(path: Path) -> bool:
    """Whether a recipe.yaml ends with the sha256 of what it holds, or without any, as all once did."""
    sealed = SEAL.fullmatch(path.read_text(encoding="utf-8"))
    return sealed is None or hashlib.sha256(sealed[1].encode()).hexdigest() == sealed[2]


class Inputs(Config):
    """What a recipe names and does not hold."""

    images: int  # which decides the order
    teachers: tuple[str, ...]  # sha256 of their weights
    data: Evidence | None = None


def inputs_of(source: Source, teachers: Sequence[Teacher]) -> Inputs:
    return Inputs(
        images=len(source), teachers=tuple(teacher.weights_sha256 for teacher in teachers), data=evidence(source)
    )


def claim_inputs(run_dir: Path, inputs: Inputs, say: Say) -> None:
    """Write inputs.json, or raise ValueError where the run began with others. Says where images have changed since."""
    path = run_dir / "inputs.json"
    if not path.exists():
        write_record(path, inputs.model_dump_json(indent=2))
        return
    with _advice("delete it if data and teachers are those that the run began with"):
        before = read_record(Inputs, path)
    now, then = (each.model_dump(mode="json", exclude={"data"}) for each in (inputs, before))
    if changed := changes(then, now):
        raise ValueError(f"{run_dir} began with other data or another teacher; changed: {changed}; use another --run")
    if before.data is not None and inputs.data is not None and (changed := inputs.data.since(before.data)):
        say(f"{run_dir}: {changed}")


@contextmanager
def _advice(what: str) -> Iterator[None]:
    """What to do about the ValueError that a damaged file makes."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; {what}") from None


@contextmanager
def exclusive(run_dir: Path, world: World = ALONE) -> Iterator[None]:
    """Keeps other calls away from the run; the lock ends with the process, however that ends.

    Raises ValueError where another call holds it, or where the directory is none for a run.
    """
    lock = FileLock(run_dir / ".lock")

    def acquire() -> None:
        _check_place(run_dir)
        make_directory(run_dir)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{run_dir}: another process is working on this run") from None

    world.on_main(acquire)
    try:
        yield
    finally:
        lock.release()


class TeacherRecord(Config):
    name: str
    scores: dict[str, int | float]
    cost: dict[str, int] | None = None


def has_teacher(run_dir: Path, say: Say) -> bool:
    """Whether teacher.json is there; a damaged one is told of, and is not."""
    path = run_dir / "teacher.json"
    return path.exists() and _is_whole(lambda: read_record(TeacherRecord, path), "the teacher is scored again", say)


def _is_whole(read: Callable[[], object], otherwise: str, say: Say) -> bool:
    try:
        read()
    except ValueError as error:
        say(f"{error}; {otherwise}")
        return False
    return True


def record_teacher(run_dir: Path, teacher: Teacher, scores: dict[str, float]) -> None:
    """Write what the students are held against."""
    record: dict[str, Any] = {"name": redacted(teacher.name), "scores": scores}
    if teacher.clip is not None:
        record["cost"] = asdict(cost(teacher.clip.config))
    write_record(run_dir / "teacher.json", json.dumps(record, indent=2))


class Start(Config):
    """What the first stage cuts: its shape, and the sha256 of its weights where they are not random."""

    model: CLIPConfig
    weights: str | None = None


def record_start(run_dir: Path, student: CLIP, is_random: bool, say: Say) -> None:
    """Write start.json, once. Raises ValueError where the run began with another model."""
    path, found = run_dir / "start.json", []
    now = Start(model=student.config, weights=None if is_random else weights_sha256(student))
    if path.exists() and _is_whole(lambda: found.append(read_start(path)), "written again", say):
        before, after = (start.model_dump(mode="json") for start in (found[0], now))
        if None in (found[0].weights, now.weights):  # random, or of before they were noted
            before["weights"] = after["weights"] = None
        if changed := changes(before, after):
            raise ValueError(f"{path}: the run began with another model; changed: {changed}; use another --run")
        return
    write_record(path, now.model_dump_json())


def read_start(path: Path) -> Start:
    """Raises ValueError for a damaged one. Once it was the config alone."""
    settings = read_sealed(path)
    return validated(Start, settings if "model" in settings else {"model": settings}, str(path))


@contextmanager
def recorded(run_dir: Path, stage: str, device: torch.device, world: World = ALONE) -> Iterator[None]:
    """A line of calls.jsonl before the work on a stage and one after it, which a killed process does not write."""
    if not world.is_main:
        yield
        return
    started = time.perf_counter()
    here = environment(device) | {"processes": world.size}
    _append(run_dir, {"event": "start", "stage": stage, "command": command(), **here})
    try:
        yield
    finally:
        _append(run_dir, {"event": "end", "stage": stage, "seconds": round(time.perf_counter() - started, 2)})


def _append(run_dir: Path, line: dict[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    path = run_dir / "calls.jsonl"
    with writing(path), path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read(1) not in (b"", b"\n")  # a line that a full disk or a crash cut off stays alone
        file.write(b"\n" * torn + json.dumps(redacted({"time": now, **line})).encode() + b"\n")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "tinyclip": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _cpu_name() -> str:
    """/proc/cpuinfo names it on Linux; platform.processor() on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Training(Config):
    """As `train` counted."""

    steps: int = 0
    pairs: int = 0
    skipped_pairs: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0


class StageRecord(Config):
    scores: dict[str, int | float]
    cost: dict[str, int]
    training: Training = Training()
    model: str | None = None  # sha256 of its digests.json; of none before it was noted


def is_complete(stage_dir: Path) -> bool:
    """Whether stage.json is there, the last to be written. Raises ValueError where a file of the stage is damaged."""
    if not (stage_dir / "stage.json").exists():
        return False
    with _advice(f"delete {stage_dir} to make this stage again"):
        noted = read_record(StageRecord, stage_dir / "stage.json").model
        check_digests(stage_dir / "model")
        if not (stage_dir / "model").is_dir():
            raise ValueError(f"{stage_dir / 'model'}: gone")
        if noted is not None and _model_sha256(stage_dir / "model") not in (None, noted):
            raise ValueError(f"{stage_dir / 'model'}: another model than the one that stage.json tells of")
    for phase in PHASES:
        _check_logs(stage_dir / phase)
    if (stage_dir / "keep.json").exists():
        with _advice("nothing but the report reads it: delete it to go on without"):
            read_record(Keep, stage_dir / "keep.json")
    return True


def _model_sha256(model: Path) -> str | None:
    """Over all files of a model that a run wrote."""
    return sha256_of(model / DIGESTS) if (model / DIGESTS).is_file() else None


def _check_logs(phase_dir: Path) -> None:
    with _advice(f"nothing but the report reads it: delete {phase_dir} to go on without"):
        check_digests(phase_dir)


def record_shrunk(stage_dir: Path, keep: Keep, small: CLIP) -> None:
    """Write keep.json, then shrunk/."""
    write_record(stage_dir / "keep.json", keep.model_dump_json())
    checkpoint.save(small, stage_dir / "shrunk", digests=True)


def has_shrunk(stage_dir: Path, say: Say) -> bool:
    """Whether the stage's student was cut. Where it is damaged, that is told, and it goes to be cut again."""
    shrunk, keep = stage_dir / "shrunk", stage_dir / "keep.json"
    if not shrunk.exists():
        return False
    try:
        read_record(Keep, keep)
        _check_model(shrunk)
    except (ValueError, FileNotFoundError) as error:
        say(f"{error}; the student is cut again")
        _away(shrunk)
        _away(keep)
        return False
    _check_logs(stage_dir / "masks")
    return True


def _check_model(directory: Path) -> None:
    """Raises ValueError or FileNotFoundError where it cannot be loaded as it was written."""
    check_digests(directory)
    checkpoint.load(directory)


def _away(path: Path) -> None:
    """Of a file or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def complete(stage_dir: Path, student: CLIP, outcome: Outcome, scores: dict[str, float]) -> dict[str, Any]:
    """Save the stage's model, then stage.json, then drop what only an unfinished stage needs."""
    result = {"scores": scores, "cost": asdict(cost(student.config)), "training": outcome._asdict()}
    checkpoint.save(student, stage_dir / "model", digests=True)
    noted = {**result, "model": _model_sha256(stage_dir / "model")}
    write_record(stage_dir / "stage.json", json.dumps(noted, indent=2))
    _drop_scaffolding(stage_dir)
    return result


def _drop_scaffolding(stage_dir: Path) -> None:
    for phase in PHASES:
        Checkpoints(stage_dir / phase).remove()
    shutil.rmtree(stage_dir / "shrunk", ignore_errors=True)


def finish(run_dir: Path, student: CLIP, say: Say) -> Path:
    """Write the run's model, of which the last stage has another copy; any other is told of and replaced."""
    for written in run_dir.glob("*/stage.json"):
        _drop_scaffolding(written.parent)  # again: a process may have been killed before it did
    last = next((stage["model"] for stage in reversed(results(run_dir))), None)
    model = run_dir / "model"
    if model.exists():
        try:
            _check_model(model)
            if last is None or _model_sha256(model) in (None, last):
                return model
            raise ValueError(f"{model}: another model than the last stage's")
        except (ValueError, FileNotFoundError) as error:
            say(f"{error}; written again")
            _away(model)
    checkpoint.save(student, model, digests=True)
    return model


def results(run_dir: Path) -> list[dict[str, Any]]:
    """stage.json of every complete stage, in order, each with its `name`. Raises ValueError for a damaged one."""
    stages = [path for path in run_dir.glob("*/stage.json") if re.match(r"\d+-", path.parent.name)]
    stages.sort(key=lambda path: int(path.parent.name.split("-")[0]))
    return [{"name": path.parent.name, **read_record(StageRecord, path).model_dump()} for path in stages]


def summary(result: dict[str, Any]) -> str:
    """One line for people."""
    macs = result["cost"]["image_macs"] + result["cost"]["text_macs"]
    scores = [f"{name} {share:.1%}" for name, share in result["scores"].items() if name.endswith(("@1", "top1"))]
    counts = {what: result["training"][f"skipped_{what}"] for what in ("pairs", "steps")}
    skipped = [f"{count} bad {what} skipped" for what, count in counts.items() if count]
    size = f"{result['cost']['parameters']:,} parameters", f"{macs / 1e6:,.1f} MMACs"
    return "  ".join([*size, *scores, *skipped])
