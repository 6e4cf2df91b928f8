"""How much memory a model needs to embed: a script that measures its own process, which does nothing else.

    python -P peak_memory.py '{"backend": "onnx", "directory": ..., "batch_sizes": [1, 32], ...}'

It loads both towers, embeds one batch of images and one of texts for each size in turn, and prints the peak in bytes
after each, as a JSON list. On a CPU that is the peak resident set with all libraries in it; on CUDA, what torch
allocated there. The graphs of ONNX are run without importing torch or tinyclip, as where they are deployed.

Shape legend: B pairs, L tokens, S side of the picture.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Embed = Callable[[int], None]  # embeds one batch of this size and waits for it


class Sizes(NamedTuple):
    """What the inputs of a model look like."""

    image_size: int
    context_length: int
    vocab_size: int


def graphs(directory: Path, sizes: Sizes, threads: int, largest_batch: int) -> dict[str, Embed]:
    """Both towers by onnxruntime on the CPU, fed with noise and with texts of full length."""
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    random = numpy.random.default_rng(0)
    ids_BL = random.integers(0, sizes.vocab_size, (largest_batch, sizes.context_length), dtype=numpy.int64)
    pixels = random.standard_normal((largest_batch, 3, sizes.image_size, sizes.image_size), dtype=numpy.float32)

    def embed(file: str, name: str, inputs: Any) -> Embed:
        session = onnxruntime.InferenceSession(directory / file, options, providers=["CPUExecutionProvider"])

        def run(batch: int) -> None:
            session.run(None, {name: inputs[:batch]})

        return run

    return {"image": embed("image.onnx", "pixels", pixels), "text": embed("text.onnx", "ids", ids_BL)}


def peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of Linux starts with the peak of the parent that made this process
        [line] = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def measure(
    backend: str, directory: str, device: str, threads: int, batch_sizes: list[int], sizes: list[int]
) -> list[int]:
    """The peak after each batch size."""
    if backend in ("onnx", "int8"):
        towers = graphs(Path(directory), Sizes(*sizes), threads, max(batch_sizes))
    else:
        from tinyclip.evaluate.benchmark import load_towers

        towers = load_towers(backend, Path(directory), device, threads, max(batch_sizes))
    peaks = []
    for batch in batch_sizes:
        for embed in towers.values():
            embed(batch)
        peaks.append(peak_bytes(device))
    return peaks


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
