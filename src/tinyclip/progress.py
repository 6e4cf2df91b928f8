"""How far long work is, on stderr: on a terminal a bar with the rate and the time left, when piped a line a minute."""

from __future__ import annotations

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinyclip.terminal import console, line, say

SECONDS_PER_LINE = 60  # where there is no terminal


class Display:
    """Counts up to `total`, from `done`. With `stays`, the bar is left on the screen when all is done."""

    def __init__(self, title: str, done: int, total: int, *, unit: str = "pairs", stays: bool = True):
        self._title, self._start, self._total, self._unit = title, done, total, unit
        self._text = ""
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", style="dim", markup=False),
                console=console(stderr=True),
                transient=not stays,
                speed_estimate_period=600,  # s; one of the counted things can take a minute
            )
            self._task = self._bar.add_task(line(title), total=total, completed=done, rate="", text="")
            self._bar.start()

    def expect(self, total: int) -> None:
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def advance(self, done: int, units_per_s: float) -> None:
        """So many are done; the units of the rate may be others than what is counted (pairs, of steps)."""
        rate = f"{units_per_s:,.0f}" if units_per_s >= 100 else f"{units_per_s:.2g}"
        rate, now = f"{rate} {self._unit}/s", time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=rate, text=self._text)
        elif now - self._last_line >= SECONDS_PER_LINE:
            self._last_line = now
            left_s = (now - self._started) / (done - self._start) * (self._total - done)
            told = f"{self._title}  {done}/{self._total}  {rate}  {left_s / 60:.0f} min left  {self._text}"
            say(told.rstrip())

    def note(self, text: str) -> None:
        """Shown beside it from now on."""
        self._text = line(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
