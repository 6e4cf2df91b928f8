"""How far the first opening of a large set of shards is, on stderr: a remote one can take hours."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

FEW_SHARDS = 8  # to scan: nothing is shown
SECONDS_PER_LINE = 60  # where there is no terminal
TITLE = "indexing shards"


class Scanned:
    """Counts shards: on a terminal in a bar with shards/s and the time left, which goes when all is done; when piped in
    a line a minute. Of the processes that torchrun started the first alone shows it."""

    def __init__(self) -> None:
        self.done = self.total = 0
        self._is_shown = os.environ.get("RANK", "0") == "0"
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()

    def expect(self, total: int) -> None:
        """So many in all, as far as is known."""
        self.total = total
        if total <= FEW_SHARDS or not self._is_shown or not sys.stderr.isatty():
            return
        if self._bar is None:
            columns = (TextColumn(TITLE), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(
                *columns,
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                speed_estimate_period=600,  # s; a shard can take a minute
            )
            self._task = self._bar.add_task(TITLE, total=total, completed=self.done, rate="")
            self._bar.start()
        self._bar.update(self._task, total=total)

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        seconds_each = (now - self._started) / self.done
        rate = f"{1 / max(seconds_each, 1e-9):,.3g} shards/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=rate)
        elif self._is_shown and self.total > FEW_SHARDS and now - self._last_line >= SECONDS_PER_LINE:
            self._last_line = now
            left_min = seconds_each * (self.total - self.done) / 60
            print(f"{TITLE}  {self.done}/{self.total}  {rate}  {left_min:.0f} min left", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()
