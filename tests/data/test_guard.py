"""What a `pipe:` started ends with the process that asked for it, even one that is killed, with all that it started."""

import os
import signal
import time
from multiprocessing import get_context

import pytest

from tinyclip.data.loader import in_order
from tinyclip.data.remote import Remote, transfer_of
from tinyclip.data.spec import DataSpec


def fetch(command: str, workers: int) -> None:
    spec = DataSpec.parse({"path": f"pipe:{command}", "timeout_s": 60, "retries": 0})
    list(in_order(lambda _: Remote(spec.path, None, "").fetch(transfer_of(spec)), range(1), workers))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
    return found


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forks where there are threads
@pytest.mark.parametrize("workers", [0, 1])
def test_a_command_and_what_it_started_end_when_we_are_killed(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
    pids = tmp_path / "pids"
    started = f"sleep 61 & echo $$ $! >{pids}.part; mv {pids}.part {pids}; sleep 62"
    process = get_context("fork").Process(target=fetch, args=(f'sh -c "{started}"', workers))
    process.start()
    try:
        wait_until(pids.exists)
        shell, background = map(int, pids.read_text().split())
        assert is_alive(shell) and is_alive(background)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)  # not waited for: its number is not free, as when its parent is busy
        wait_until(lambda: not is_alive(shell) and not is_alive(background), seconds=3)
    finally:
        process.kill()
        process.join()
