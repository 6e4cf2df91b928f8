"""The affinity loss, forward and backward: time and memory against the losses of `peers.py`.

    python benchmarks/loss.py            # 2,048, 8,192 and 16,384 pairs (the peers need up to 14 GB)
    python benchmarks/loss.py --quick    # 4,096 pairs, and the memory of three, under a minute
    python benchmarks/loss.py --largest  # 65,536 pairs, tiled only

All contenders run in turn in one process, on the same inputs and with the same setting of fp32 products. A line of JSON
each: seconds (least, median) and processor seconds of forward + backward, the ratio of a contender's median to that of
the tiled loss with the same terms, and its gradient's error against the fp64 definition at 1,024 pairs. Memory is that
of the step alone, gradients included: in a fresh process each, the peak resident set after it was reset.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import torch
from machine import prepare
from peers import official_both, official_soft, one_matrix, open_clip_distill, row_chunks
from torch import Tensor

from tinyclip.device import use_fast_cpu_products
from tinyclip.distill.affinity import affinity_and_contrastive_loss, affinity_loss

E = 512
SCALE = 50.0


def tiled_soft(*inputs) -> Tensor:
    return affinity_loss(*inputs)[0]


def tiled_both(image, text, scale, *teacher) -> Tensor:
    losses = affinity_and_contrastive_loss(image, text, scale, scale, *teacher)
    return losses.affinity + losses.contrastive


OURS = {"soft": tiled_soft, "both": tiled_both}
PEERS = {  # name: (the terms it computes, function)
    "official soft": ("soft", official_soft),
    "official soft + hard": ("both", official_both),
    "open_clip DistillClipLoss": ("both", open_clip_distill),
    "one matrix": ("soft", one_matrix),
    "row chunks, checkpointed": ("soft", row_chunks),
}
CONTENDERS = {f"tiled {terms}": (terms, function) for terms, function in OURS.items()} | PEERS
GOALS = {  # least ratio of time, of memory: (contender, pairs), on two cores
    ("open_clip DistillClipLoss", 8192): (2.2, 47),
    ("open_clip DistillClipLoss", 16384): (3.3, 103),
    ("official soft", 8192): (2.2, 47),
    ("official soft", 16384): (3.3, 103),
}


def inputs_of(N: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor | float, ...]:
    """Unit vectors; of student and teacher, an image and its text have a cosine near 0.3."""
    generator = torch.Generator().manual_seed(0)

    def pairs() -> list[Tensor]:
        image, text = (torch.randn(N, E, generator=generator, dtype=dtype) for _ in range(2))
        text.add_(image, alpha=0.3)
        return [torch.nn.functional.normalize(x, dim=-1, out=x) for x in (image, text)]

    student, teacher = pairs(), pairs()
    scale = torch.tensor(SCALE, dtype=dtype, requires_grad=True)
    return *(x.requires_grad_() for x in student), scale, *teacher, SCALE


def step(function, inputs) -> float:
    function(*inputs).backward()
    return time.perf_counter()


def seconds(functions: dict, N: int, repeats: int) -> dict[str, dict[str, float]]:
    """Interleaved; the first round is not counted."""
    inputs = inputs_of(N)
    wall: dict[str, list[float]] = {name: [] for name in functions}
    processor: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, (_, function) in functions.items():
            gc.collect()
            started, processor_started = time.perf_counter(), time.process_time()
            ended = step(function, inputs)
            for x in inputs[:3]:
                x.grad = None
            if repeat:
                wall[name].append(ended - started)
                processor[name].append(time.process_time() - processor_started)
    return {
        name: {
            "seconds_least": min(wall[name]),
            "seconds": statistics.median(wall[name]),
            "processor_seconds": statistics.median(processor[name]),
        }
        for name in functions
    }


def gradient_error(terms: str, function, N: int = 1024) -> float:
    """Of the embeddings, against fp64 autograd of the definition: largest difference / largest gradient."""
    reference = official_soft if terms == "soft" else official_both
    exact, single = inputs_of(N, torch.float64), inputs_of(N)
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in single)
    reference(*exact).backward()
    function(*single).backward()
    grads = [(x.grad, y.grad) for x, y in zip(single[:2], exact[:2], strict=True)]
    return max(((ours - true).abs().max() / true.abs().max()).item() for ours, true in grads)


def peak_megabytes(contender: str, N: int) -> float:
    """Of one step, in a process of its own."""
    command = [sys.executable, __file__, "--measure-memory", contender, "--pairs", str(N)]
    command += ["--threads", str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(contender: str, N: int) -> float:
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def peak() -> int:
        return int(status.read_text().split("VmHWM:")[1].split()[0])

    function = CONTENDERS[contender][1]
    step(function, inputs_of(64))  # libraries load what they need
    inputs = inputs_of(N)
    gc.collect()
    forget.write_text("5")
    before = peak()
    step(function, inputs)
    return (peak() - before) * 1024 / 1e6


def compare(N: int, repeats: int, weighed: Collection[str]) -> list[str]:
    """Prints a line for each contender, with the memory of those in `weighed`; returns the goals that were missed."""
    times = seconds(CONTENDERS, N, repeats)
    memory = {name: peak_megabytes(name, N) for name in weighed}
    missed = []
    for name, (terms, function) in CONTENDERS.items():
        ours = f"tiled {terms}"
        time_ratio, memory_ratio = times[name]["seconds"] / times[ours]["seconds"], math.inf
        row = {"pairs": N, "contender": name, **{key: round(value, 4) for key, value in times[name].items()}}
        row |= {"time_ratio": round(time_ratio, 2), "gradient_error": float(f"{gradient_error(terms, function):.1e}")}
        if name in memory and ours in memory:
            memory_ratio = memory[name] / memory[ours]
            row |= {"peak_mb": round(memory[name], 1), "memory_ratio": round(memory_ratio, 1)}
        print(json.dumps(row), flush=True)
        for goal, ratio in zip(GOALS.get((name, N), (0, 0)), (time_ratio, memory_ratio), strict=True):
            if ratio < 0.8 * goal:
                missed.append(f"{N} pairs: a ratio of {name} to tiled is {ratio:.2f}, expected {goal}")
    return missed


def largest(N: int = 65536) -> None:
    """Tiled only: one matrix of the peers would be 17 GB."""
    started = time.perf_counter()
    megabytes = peak_megabytes("tiled both", N)
    row = {"pairs": N, "contender": "tiled both", "peak_mb": round(megabytes, 1)}
    print(json.dumps(row | {"seconds_with_start": round(time.perf_counter() - started, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep-memory", action="store_true", help="freed memory waits for the next step, for all")
    parser.add_argument("--largest", action="store_true")
    parser.add_argument("--measure-memory", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, nargs="+", help="instead of the sizes above")
    options = parser.parse_args()
    if options.measure_memory:
        torch.set_num_threads(options.threads)
        use_fast_cpu_products()
        print(json.dumps(measure_memory(options.measure_memory, options.pairs[0])))
        return
    prepare(options.threads, keep_memory=options.keep_memory, embedding=E, scale=SCALE)
    if options.largest:
        largest()
        return
    sizes = options.pairs or ((4096,) if options.quick else (2048, 8192, 16384))
    weighed = ("tiled soft", "official soft", "row chunks, checkpointed") if options.quick else tuple(CONTENDERS)
    missed = [line for N in sizes for line in compare(N, options.repeats, weighed)]
    if missed and not options.keep_memory:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
