"""What a run leaves on disk, and how a second call finds it again.

RUN/recipe.yaml         the resolved recipe; a run continues only under the same one, but for where and how it computes.
                        The only file that holds a secret which the recipe names; then nobody else may read it
RUN/inputs.json         the number of images and the teachers' weights that it began with
RUN/.lock               held while a call works on the run
RUN/start.json          the shape of the model that the first stage cuts
RUN/calls.jsonl         by which command and on what machine each stage was worked on, and for how long
RUN/teacher.json        the teacher's scores and cost
RUN/0-NAME/             a stage: model/ (loadable), keep.json (what survived), stage.json (scores, cost; written last)
RUN/0-NAME/masks/       metrics.jsonl and skipped.jsonl of mask learning; while it runs, checkpoints
RUN/0-NAME/distill/     the same of distillation
RUN/model/              the last stage's model
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from tinyclip import __version__
from tinyclip.config import changes
from tinyclip.data.sources import Source
from tinyclip.distill.checkpoints import Checkpoints
from tinyclip.distill.teacher import Teacher
from tinyclip.distill.train import Outcome
from tinyclip.distributed import ALONE, World
from tinyclip.evaluate import cost
from tinyclip.formats import checkpoint
from tinyclip.formats.files import read_json, read_yaml, write_text, writing
from tinyclip.model import CLIP
from tinyclip.redact import has_secrets, redacted

FREE = ("device", "data.workers", "data.max_bad_share")  # another call of the same run may have others


def claim(run_dir: Path, settings: dict[str, Any]) -> None:
    """Write recipe.yaml, or raise ValueError where the directory holds something else than this recipe's run."""
    path = run_dir / "recipe.yaml"
    if path.exists():
        try:
            before = read_yaml(path)
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"{path}: damaged, expected the recipe of a run to continue")
        if changed := changes(before, settings, free=FREE):
            raise ValueError(f"{run_dir} holds a run of another recipe; changed: {changed}")
        return
    if run_dir.exists() and (not run_dir.is_dir() or any(p.name != f".{path.name}.tmp" for p in run_dir.iterdir())):
        raise ValueError(f"{run_dir}: expected a new directory or a run to continue, found neither (no recipe.yaml)")
    write_text(path, yaml.safe_dump(settings, sort_keys=False), private=has_secrets(settings))


def inputs_of(source: Source, teachers: Sequence[Teacher]) -> dict[str, Any]:
    """What a recipe names and does not hold. Of the data it is the number of images, which decides the order."""
    return {"images": len(source), "teachers": [teacher.weights_sha256 for teacher in teachers]}


def claim_inputs(run_dir: Path, inputs: dict[str, Any]) -> None:
    """Write inputs.json, or raise ValueError where the run began with others."""
    path = run_dir / "inputs.json"
    if not path.exists():
        write_text(path, json.dumps(inputs, indent=2))
    elif changed := changes(read_json(path), inputs):
        raise ValueError(f"{run_dir} began with other data or another teacher; changed: {changed}; use another --run")


@contextmanager
def exclusive(run_dir: Path, world: World = ALONE) -> Iterator[None]:
    """Keeps other calls away from the run; the lock ends with the process, however that ends.

    Raises ValueError where another call holds it.
    """
    if not world.is_main:
        yield
        return
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{run_dir}: another process is working on this run") from None
    try:
        yield
    finally:
        lock.release()


def has_teacher(run_dir: Path) -> bool:
    return (run_dir / "teacher.json").exists()


def record_teacher(run_dir: Path, teacher: Teacher, scores: dict[str, float]) -> None:
    """Write what the students are held against."""
    record: dict[str, Any] = {"name": redacted(teacher.name), "scores": scores}
    if teacher.clip is not None:
        record["cost"] = asdict(cost(teacher.clip.config))
    write_text(run_dir / "teacher.json", json.dumps(record, indent=2))


def record_start(run_dir: Path, student: CLIP) -> None:
    """Write the shape that keep.json of the first stage counts in, once."""
    path = run_dir / "start.json"
    if not path.exists():
        write_text(path, student.config.model_dump_json())


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


def command(arguments: Sequence[str] | None = None) -> str:
    """The command of this process, or one with other arguments, as one would type it; without secrets."""
    given = [redacted(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    program = Path(sys.argv[0]) if sys.argv[0] else Path("python")
    if program.name == "__main__.py":  # python -m PACKAGE, or torchrun -m PACKAGE
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        start = ["torchrun", f"--nproc-per-node={processes}"] if processes > 1 else ["python"]
        return shlex.join([*start, "-m", program.parent.name, *given])
    return shlex.join([program.name, *given])


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


def is_complete(stage_dir: Path) -> bool:
    return (stage_dir / "stage.json").exists()


def complete(stage_dir: Path, student: CLIP, outcome: Outcome, scores: dict[str, float]) -> dict[str, Any]:
    """Save the stage's model, then stage.json, then drop what only an unfinished stage needs."""
    result = {"scores": scores, "cost": asdict(cost(student.config)), "training": outcome._asdict()}
    checkpoint.save(student, stage_dir / "model")
    write_text(stage_dir / "stage.json", json.dumps(result, indent=2))
    _drop_scaffolding(stage_dir)
    return result


def _drop_scaffolding(stage_dir: Path) -> None:
    for phase in ("masks", "distill"):
        Checkpoints(stage_dir / phase).remove()
    shutil.rmtree(stage_dir / "shrunk", ignore_errors=True)


def finish(run_dir: Path, student: CLIP) -> Path:
    for written in run_dir.glob("*/stage.json"):
        _drop_scaffolding(written.parent)  # again: a process may have been killed before it did
    if not (run_dir / "model").exists():
        checkpoint.save(student, run_dir / "model")
    return run_dir / "model"


def results(run_dir: Path) -> list[dict[str, Any]]:
    """stage.json of every complete stage, in order, each with its `name`."""
    stages = sorted(run_dir.glob("*/stage.json"), key=lambda path: int(path.parent.name.split("-")[0]))
    return [{"name": path.parent.name, **json.loads(path.read_text(encoding="utf-8"))} for path in stages]


def summary(result: dict[str, Any]) -> str:
    """One line for people."""
    macs = result["cost"]["image_macs"] + result["cost"]["text_macs"]
    scores = [f"{name} {share:.1%}" for name, share in result["scores"].items() if name.endswith(("@1", "top1"))]
    counts = {what: result["training"][f"skipped_{what}"] for what in ("pairs", "steps")}
    skipped = [f"{count} bad {what} skipped" for what, count in counts.items() if count]
    size = f"{result['cost']['parameters']:,} parameters", f"{macs / 1e6:,.1f} MMACs"
    return "  ".join([*size, *scores, *skipped])
