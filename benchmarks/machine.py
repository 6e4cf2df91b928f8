"""Where a benchmark runs: how many threads, and which fp32 products. Both sides of a comparison get the same."""

from __future__ import annotations

import platform

import torch

from tinyclip.device import use_fast_cpu_products


def prepare(threads: int, **versions: str) -> None:
    """Set the threads and the products, and print them with the machine and versions."""
    torch.set_num_threads(threads)
    fast = use_fast_cpu_products()
    libraries = ", ".join(f"{name} {version}" for name, version in {"torch": torch.__version__, **versions}.items())
    print(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} threads, ", end="")
    print(f"{libraries}, oneDNN fp32 products {'on' if fast else 'off'}")
