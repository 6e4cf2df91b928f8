"""Where a benchmark runs: how many threads, and which fp32 products. Both sides of a comparison get the same."""

from __future__ import annotations

import json
import platform

import torch

from tinyclip.device import prepare_cpu


def prepare(threads: int, **more: object) -> None:
    """Set the threads and the products, and print them with the machine, torch's version and `more`: a line of JSON."""
    torch.set_num_threads(threads)
    fast = prepare_cpu()
    row = {"machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", "threads": threads}
    row |= {"fp32 products": "oneDNN" if fast else "torch's default", "torch": torch.__version__}
    print(json.dumps(row | more), flush=True)
