"""What a run leaves on disk, and how a second call finds it again.

RUN/recipe.yaml         the resolved recipe; a run continues only under the same one
RUN/start.json          the shape of the model that the first stage cuts
RUN/calls.jsonl         by which command and on what machine each stage was worked on, and for how long
RUN/teacher.json        the teacher's scores and cost
RUN/0-NAME/             a stage: model/ (loadable), keep.json (what survived), stage.json (scores, cost; written last)
RUN/0-NAME/masks/       metrics.jsonl and skipped.jsonl of mask learning; while it runs, checkpoint.pt
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from tinyclip import __version__
from tinyclip.distill.teacher import Teacher
from tinyclip.distill.train import Outcome
from tinyclip.evaluate import cost
from tinyclip.formats import checkpoint
from tinyclip.model import CLIP

NUM_NAMED = 5  # changed settings that an error names


def claim(run_dir: Path, settings: dict[str, Any]) -> None:
    """Write recipe.yaml, or raise ValueError where the directory holds something else than this recipe's run."""
    path = run_dir / "recipe.yaml"
    if path.exists():
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"{path}: damaged, expected the recipe of a run to continue")
        changed = difference(before, settings)
        if changed:
            more = f"; and {len(changed) - NUM_NAMED} more" if len(changed) > NUM_NAMED else ""
            raise ValueError(
                f"{run_dir} holds a run of another recipe; changed: {'; '.join(changed[:NUM_NAMED])}{more}"
            )
        return
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"{run_dir}: expected a new directory or a run to continue, found neither (no recipe.yaml)")
    write_text(path, yaml.safe_dump(settings, sort_keys=False))


def difference(before: Any, after: Any, name: str = "") -> list[str]:
    """`path: before -> after` of every setting that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before | after
        return [line for k in keys for line in difference(before.get(k), after.get(k), f"{name}.{k}".strip("."))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for i, (a, b) in pairs for line in difference(a, b, f"{name}.{i}")]
    return [] if before == after else [f"{name}: {_short(before)} -> {_short(after)}"]


def _short(setting: Any) -> str:
    return "..." if isinstance(setting, dict | list) and len(str(setting)) > 60 else str(setting)


def record_teacher(run_dir: Path, teacher: Teacher, scores: Callable[[], dict[str, float]]) -> None:
    """Write what the students are held against, once."""
    path = run_dir / "teacher.json"
    if path.exists():
        return
    record: dict[str, Any] = {"name": teacher.name, "scores": scores()}
    if teacher.clip is not None:
        record["cost"] = asdict(cost(teacher.clip.config))
    write_text(path, json.dumps(record, indent=2))


def record_start(run_dir: Path, student: CLIP) -> None:
    """Write the shape that keep.json of the first stage counts in, once."""
    path = run_dir / "start.json"
    if not path.exists():
        write_text(path, student.config.model_dump_json())


@contextmanager
def recorded(run_dir: Path, stage: str, device: torch.device) -> Iterator[None]:
    """A line of calls.jsonl before the work on a stage and one after it, which a killed process does not write."""
    started = time.perf_counter()
    _append(run_dir, {"event": "start", "stage": stage, "command": command(), **environment(device)})
    try:
        yield
    finally:
        _append(run_dir, {"event": "end", "stage": stage, "seconds": round(time.perf_counter() - started, 2)})


def _append(run_dir: Path, line: dict[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (run_dir / "calls.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, **line}) + "\n")


def command() -> str:
    """The command of this process, as one would type it."""
    program = Path(sys.argv[0]) if sys.argv[0] else Path("python")
    if program.name == "__main__.py":  # python -m PACKAGE
        return shlex.join(["python", "-m", program.parent.name, *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


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
    for phase in ("masks", "distill"):
        (stage_dir / phase / "checkpoint.pt").unlink(missing_ok=True)
    shutil.rmtree(stage_dir / "shrunk", ignore_errors=True)
    return result


def finish(run_dir: Path, student: CLIP) -> Path:
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


def write_text(path: Path, text: str) -> None:
    """Atomic: written beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
