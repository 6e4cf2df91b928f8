"""What a training phase tells: one JSON line per logged step, a progress bar for people, trackers on request."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from tinyclip.formats.files import sync, write_text, writing
from tinyclip.progress import Display
from tinyclip.redact import redacted

Tracker = Literal["tensorboard", "wandb"]
LOGS = ("metrics.jsonl", "skipped.jsonl")
SHOWN = ("affinity_kl", "contrastive", "feature", "sparsity", "target_sparsity")  # beside the progress


class JsonLines:
    """Appends {"step": ..., ...} to `path`. Lines of `start_step` and later, left by a killed run, are dropped.

    Raises ValueError where the lines before it have not the `sha256` that they had when that step was reached. A file
    that is gone begins again.
    """

    def __init__(self, path: Path, *, start_step: int, sha256: str | None = None):
        self._path, self._sha256 = path, hashlib.sha256()
        if path.exists():
            kept = "".join(_lines_before(path, start_step))
            self._sha256.update(kept.encode())
            if sha256 is not None and self._sha256.hexdigest() != sha256:
                raise ValueError(
                    f"{path}: damaged, its lines before step {start_step} are not those that were written; nothing but "
                    "the report reads them: delete it to go on without"
                )
            write_text(path, kept)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(redacted(values)) + "\n"
        with writing(self._path):
            self._file.write(line)
            self._file.flush()
        self._sha256.update(line.encode())

    def sync(self) -> str:
        """Wait until all is on the disk; returns the sha256 of all lines."""
        with writing(self._path):
            os.fsync(self._file.fileno())
            sync(self._path.parent)
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()


def _lines_before(path: Path, step: int) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] < step:
                yield line + "\n"
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # the torn last line of a killed run


class Muted:
    """What a process that is not the main one tells: nothing."""

    def advance(self, step: int, pairs: int) -> None:
        """Count one finished step of so many pairs."""

    def skip(self, step: int, skipped: Sequence[tuple[str, str]]) -> None:
        """Note the (key, reason) of pairs that could not be read."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Tell what a step saw."""

    def sync(self) -> dict[str, str]:
        """What was told is to last as long as the checkpoint that comes next, which holds these checksums of it."""
        return {}

    def close(self) -> None:
        """No more follows."""


class Metrics(Muted):
    """A line per logged step in `directory`/metrics.jsonl, one per skipped pair in skipped.jsonl, the trackers, and a
    progress display on stderr."""

    def __init__(
        self,
        directory: Path,
        *,
        start_step: int,
        total_steps: int,
        trackers: tuple[Tracker, ...] = (),
        sha256s: Mapping[str, str] | None = None,
    ):
        """`sha256s` are what `sync` returned at `start_step`."""
        self._files: dict[str, JsonLines] = {}
        with ExitStack() as opened:
            for name in LOGS:
                noted = (sha256s or {}).get(name)
                self._files[name] = JsonLines(directory / name, start_step=start_step, sha256=noted)
                opened.callback(self._files[name].close)
            self._trackers = [_open_tracker(tracker, directory, start_step) for tracker in trackers]
            opened.pop_all()
        self._lines, self._skipped = self._files.values()
        self._pairs, self._started = 0, time.perf_counter()
        self._display = Display(f"{directory.parent.name}/{directory.name}", start_step, total_steps)

    def advance(self, step: int, pairs: int) -> None:
        self._pairs += pairs
        self._display.advance(step + 1, self.pairs_per_s)

    @property
    def pairs_per_s(self) -> float:
        return self._pairs / max(time.perf_counter() - self._started, 1e-9)

    def skip(self, step: int, skipped: Sequence[tuple[str, str]]) -> None:
        for key, reason in skipped:
            self._skipped.write({"step": step, "key": key, "reason": reason})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, "pairs_per_s": round(self.pairs_per_s, 1), **values}
        self._lines.write(line)
        for tracker in self._trackers:
            tracker(step, line)
        self._display.note("  ".join(f"{name} {values[name]:.3f}" for name in SHOWN if name in values))

    def sync(self) -> dict[str, str]:
        return {name: lines.sync() for name, lines in self._files.items()}

    def close(self) -> None:
        self._lines.close()
        self._skipped.close()
        self._display.close()


@contextmanager
def _without_secrets_in_argv() -> Iterator[None]:
    typed = sys.argv
    sys.argv = redacted(typed)
    try:
        yield
    finally:
        sys.argv = typed


def _open_tracker(tracker: Tracker, directory: Path, start_step: int) -> Any:
    """A function (step, values) of an optional library. Raises ValueError where the library is missing."""
    try:
        if tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step)  # hides a killed run's later
            return lambda step, values: [writer.add_scalar(name, value, step) for name, value in values.items()]
        import wandb  # type: ignore[import-not-found]

        with _without_secrets_in_argv():  # it sends the command along
            run = wandb.init(project="tinyclip", dir=str(directory), name=directory.name)
        return lambda step, values: run.log(values, step=step)
    except ImportError as error:
        raise ValueError(f"trackers: {tracker} needs `pip install tinyclip[{tracker}]` ({error})") from error
