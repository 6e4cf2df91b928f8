"""Where a benchmark runs: threads, fp32 products, and freed memory. Both sides of a comparison get the same."""

from __future__ import annotations

import json
import platform

import torch

from tinyclip.device import keep_freed_memory, use_fast_cpu_products


def prepare(threads: int, *, keep_memory: bool = True, **more: object) -> None:
    """Set up the process as the commands do, and print how with the machine, torch's version and `more`, as JSON.

    `keep_memory=False` leaves freed memory to the allocator, as in a program that does not ask for it.
    """
    torch.set_num_threads(threads)
    fast, kept = use_fast_cpu_products(), keep_memory and keep_freed_memory()
    row = {"machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", "threads": threads}
    row |= {"fp32 products": "oneDNN" if fast else "torch's default"}
    row |= {"freed memory": "kept" if kept else "left to the allocator", "torch": torch.__version__}
    print(json.dumps(row | more), flush=True)
