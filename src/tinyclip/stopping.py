"""Ctrl-C and SIGTERM, answered where the work can be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


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
