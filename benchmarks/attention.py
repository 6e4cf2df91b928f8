"""Attention on a CPU: torch's fused kernel (SDPA) against the three products of `tinyclip.model.attend`.

    python benchmarks/attention.py [--threads 2]

Both run interleaved in one process; printed are the machine, and per shape the median forward and forward + backward
time of each, their ratio, and the largest difference of the outputs. Shapes are B x H x L x K: pairs, heads, tokens,
head size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from machine import prepare
from torch import Tensor
from torch.nn import functional as F

from tinyclip.model import attend

SHAPES = {
    "demo, image": (128, 4, 17, 32, False),
    "demo, text": (128, 4, 17, 32, True),
    "ViT-B/32, image": (32, 12, 50, 64, False),
    "ViT-B, text": (32, 8, 77, 64, True),
    "ViT-B/16, image": (8, 12, 197, 64, False),
}


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    prepare(options.threads)
    for name, (B, H, L, K, causal) in SHAPES.items():
        qkv = torch.randn(3, B, H, L, K, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def seconds(function, backward: bool, qkv: Tensor = qkv, causal: bool = causal) -> float:
            started = time.perf_counter()
            with torch.set_grad_enabled(backward):
                y = function(*qkv.unbind(0), causal=causal)
                if backward:
                    y.sum().backward()
            return time.perf_counter() - started

        row: dict[str, object] = {"shape": name, "B": B, "H": H, "L": L, "K": K, "causal": causal}
        for backward in (False, True):
            times: dict[str, list[float]] = {"sdpa": [], "products": []}
            for repeat in range(options.repeats + 2):
                for label, function in (("sdpa", sdpa), ("products", attend)):
                    elapsed = seconds(function, backward)
                    if repeat >= 2:
                        times[label].append(elapsed)
            phase = "forward_backward" if backward else "forward"
            median = {label: statistics.median(values) for label, values in times.items()}
            row |= {f"{phase}_{label}_ms": round(1e3 * value, 3) for label, value in median.items()}
            row[f"{phase}_ratio"] = round(median["sdpa"] / median["products"], 2)
        with torch.no_grad():
            difference = attend(*qkv.unbind(0), causal=causal) - sdpa(*qkv.unbind(0), causal=causal)
        row["max_difference"] = float(f"{difference.abs().max():.1e}")
        print(json.dumps(row))


if __name__ == "__main__":
    main()
