"""A CPU is set up so that products stay fp32 and a step's memory is not asked for twice."""

import subprocess
import sys

import pytest
import torch

from tinyclip.device import pick_device, use_fast_cpu_products

FAULTS = """
import resource, torch
from tinyclip.device import keep_freed_memory
if {keep}: assert keep_freed_memory()
def step(): return [torch.ones(n) for n in (2**24, 2**20, 2**22)]  # 84 MiB, 21,504 pages of 4 KiB
for _ in range(5): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the settings are for machines without a GPU")
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    def faults(keep: bool) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert faults(keep=True) < 1_000 < 50_000 < faults(keep=False)


def test_fast_products_are_fp32():
    before = torch.get_float32_matmul_precision()
    try:
        use_fast_cpu_products()
        a, b = (torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
        exact = a.double() @ b.double()
        assert ((a @ b).double() - exact).abs().max() / exact.abs().max() < 1e-5
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="device: 'nonsense' cannot be used here"):
        pick_device("nonsense")
