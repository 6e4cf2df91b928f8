"""The device that computes, and its fastest exact products."""

from __future__ import annotations

import torch


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
