"""The device that computes, and what makes a CPU fast at it: exact products, and memory that is not asked for twice."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The CPU tensor on `device`; a copy to a GPU runs beside its work, and nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def use_fast_cpu_products() -> bool:
    """Let fp32 products run on oneDNN where that is true fp32: on AMD CPUs twice as fast as torch's default.

    The same switch computes in bf16 on CPUs with AMX, so one product is checked against fp64 first, and the setting is
    left alone where the error is above 1e-5. Returns whether it is on. A CUDA device's setting is left alone too, since
    there the switch would mean TF32.
    """
    if torch.cuda.is_available():
        return False
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    error = ((a @ b).double() - exact).abs().max() / exact.abs().max()
    if error > 1e-5:
        torch.set_float32_matmul_precision(before)
        return False
    return True


def prepare_cpu() -> bool:
    """Set this process up to compute on its CPU; nothing where there is CUDA. Returns whether products are fast.

    Both settings are the whole process's, so the commands make them, and a program that loads a model decides itself.
    """
    keep_freed_memory()
    return use_fast_cpu_products()


def keep_freed_memory() -> bool:
    """Let freed memory wait for the next tensor instead of going back to the system (glibc's malloc; else nothing).

    A step allocates what the step before gave back. By default glibc returns large pieces at once, and the system maps
    and clears them again page by page: on two cores a sixth of the time of learning masks. The process then holds its
    largest size until it ends. Returns whether it is on; never where there is a CUDA device.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
