"""A script that runs a command, and ends it when the process that asked for it is gone, however that ended.

    python -I -S guard.py PARENT COMMAND [ARGUMENT ...]

It is started in a group of its own. Where its parent is another process than number PARENT, the whole group is killed:
the command, with what that started. Else it ends with the command's exit status (128 + N for signal N).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

LOOK_EVERY_S = 0.2


def run(parent: int, command: list[str]) -> int:
    process = subprocess.Popen(command)
    while True:
        try:
            status = process.wait(LOOK_EVERY_S)
            return status if status >= 0 else 128 - status
        except subprocess.TimeoutExpired:
            if os.getppid() != parent:
                os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    try:
        sys.exit(run(int(sys.argv[1]), sys.argv[2:]))
    except OSError as error:
        print(f"{sys.argv[2]}: {error.strerror}", file=sys.stderr)
        sys.exit(126)
