"""How fast models embed: measured in turn, so that a machine that slows down slows all of them.

Shape legend: B pairs, L tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from tinyclip.model import CLIP


@torch.no_grad()
def pairs_per_s(models: Mapping[str, CLIP], *, batch_size: int = 64, repeats: int = 7) -> dict[str, float]:
    """Image-text pairs per second of each model, 1 / (1 / images per s + 1 / texts per s): the paper's measure.

    Full-context texts, fp32 pixels in memory, the models' own devices; the median of `repeats` interleaved runs.
    """

    def seconds(model: CLIP) -> float:
        config = model.config
        pixels = torch.zeros(batch_size, 3, config.image.image_size, config.image.image_size, device=model.device)
        tokens_BL = torch.ones(batch_size, config.text.context_length, dtype=torch.int64, device=model.device)
        tokens_BL[:, -1] = config.text.vocab_size - 1  # the end
        started = time.perf_counter()
        image_BE, text_BE = model(pixels, tokens_BL)
        (image_BE.sum() + text_BE.sum()).item()  # waits for the device
        return time.perf_counter() - started

    for model in models.values():
        seconds(model)  # warm-up
    measured = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            measured[name].append(seconds(model))
    return {name: batch_size / statistics.median(times) for name, times in measured.items()}
