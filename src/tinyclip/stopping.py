"""Ctrl-C and SIGTERM, answered where the work can be saved, and before there is any. Imports nothing large."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tinyclip.redact import has_secrets, redacted, visible


class Interrupted(Exception):
    """The run was asked to stop (`signal_number`), and has saved where it was."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM append to, instead of ending the process in the middle of a step."""
    requests: list[int] = []
    try:
        previous = {
            number: signal.signal(number, lambda number, _frame: requests.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread: the caller handles signals
        yield requests
        return
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if requests:  # after the last step had begun: the caller's to answer
        signal.raise_signal(requests[0])


class Stopped(BaseException):
    """Ctrl-C or SIGTERM while nothing trains. No Exception, which a library could take for an error of its own."""

    def __init__(self, signal_number: int):
        super().__init__("stopped")
        self.signal_number = signal_number


@contextmanager
def answered() -> Iterator[list[Stopped]]:
    """A stop becomes `Stopped`, which ends the process in one line; all that came are in the list.

    What imports in C makes of an exception is anything, from an error of its own to nothing: while something is
    imported, and so nothing is half done, the process ends at once.
    """
    stops: list[Stopped] = []

    def stop(signal_number: int, frame: FrameType | None) -> None:
        stops.append(Stopped(signal_number))
        if _is_importing(frame):
            os._exit(_told(stops[-1]))
        raise stops[-1]

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    except Stopped as stopped:
        end(stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def end(stop: Stopped | Interrupted) -> NoReturn:
    """One line, and the exit status."""
    sys.exit(_told(stop))


def _told(stop: Stopped | Interrupted) -> int:
    """The exit status: a run that can be continued has done nothing wrong when it ends by SIGTERM."""
    is_run = bool({"compress", "embed", "train", "demo"} & set(sys.argv[1:3]))
    if os.environ.get("RANK", "0") == "0":
        said = f"tinyclip: {stop}{'; continue with: ' + _to_continue() if is_run else ''}"
        print(visible(redacted(said)), file=sys.stderr, flush=True)
    return 0 if is_run and stop.signal_number == signal.SIGTERM else 128 + stop.signal_number


def _to_continue() -> str:
    """The command of this process; where that holds a secret, one that finds it in the run's recipe."""
    given = sys.argv[1:]
    runs = [given[place + 1] for place, name in enumerate(given[:-1]) if name in ("--run", "--run-dir")]
    runs += [argument.partition("=")[2] for argument in given if argument.startswith(("--run=", "--run-dir="))]
    recipes = [recipe for run in runs if (recipe := Path(run) / "recipe.yaml").is_file() and not has_secrets(run)]
    if not has_secrets(shlex.join(given)) or not recipes:
        return command()
    verb = next(argument for argument in given if not argument.startswith("-"))
    return command([verb, str(recipes[-1]), "--run", str(recipes[-1].parent), "--allow-remote"])


def command(arguments: Sequence[str] | None = None) -> str:
    """The command of this process, or one with other arguments, as one would type it; without secrets."""
    given = [redacted(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    program = Path(sys.argv[0]) if sys.argv[0] else Path("python")
    if program.name == "__main__.py":  # python -m PACKAGE, or torchrun -m PACKAGE
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        start = ["torchrun", f"--nproc-per-node={processes}"] if processes > 1 else ["python"]
        return shlex.join([*start, "-m", program.parent.name, *given])
    return shlex.join([program.name, *given])
