"""Our models inside LAION's CLIP_benchmark: its own command, with one more model type.

    python -m tinyclip.evaluate.clip_benchmark eval --model_type tinyclip --model RUN/model --no_amp \\
        --dataset wds/cifar10 --dataset_root DATA/wds_cifar10 --output cifar10.json

All arguments are CLIP_benchmark's; --model is what `tinyclip evaluate` takes. On a CPU its mixed precision is bf16, in
which close classes change places: --no_amp gives the numbers of `tinyclip evaluate --suite`.

One function of CLIP_benchmark 1.6.2 is replaced, `accuracy`: numpy 2.4 refuses its conversion of an array to a float.

Shape legend: I images, C classes, B pairs, L tokens, S side of the picture.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinyclip.distill.teacher import Teacher, load_teacher
from tinyclip.terminal import say

MODEL_TYPE = "tinyclip"
MISSING = "this needs CLIP_benchmark: pip install 'tinyclip[suites]'"


class BenchmarkModel(nn.Module):
    """Embeddings of uint8 pixels [B, 3, S, S] and of token ids [B, L], as CLIP_benchmark calls for them."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.model, self.teacher = teacher.model, teacher

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.teacher.encode_image(pixels)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        return self.teacher.encode_text(tokens_BL)


def load(
    model_name: str, pretrained: str | None = None, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[BenchmarkModel, Callable[[Any], Tensor], Callable[[Sequence[str]], Tensor]]:
    """Model, picture -> uint8 pixels [3, S, S], texts -> token ids: what CLIP_benchmark's loaders return."""
    teacher = load_teacher(model_name).to(device)
    return BenchmarkModel(teacher), teacher.preprocess, teacher.tokenizer


def accuracy(logit_IC: Tensor, label_I: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Share of images whose class is among the k with the largest logits, for each k."""
    right = logit_IC.topk(max(topk)).indices == label_I[:, None]
    return [int(right[:, :k].sum()) / len(label_I) for k in topk]


def register() -> None:
    """Add the model type, and mend `accuracy`. Raises ValueError where CLIP_benchmark is not installed."""
    try:
        from clip_benchmark import models
        from clip_benchmark.metrics import zeroshot_classification
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from None
    zeroshot_classification.accuracy = accuracy
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.TYPE2FUNC[MODEL_TYPE] = load
        models.MODEL_TYPES.append(MODEL_TYPE)


def main() -> None:
    """CLIP_benchmark's command; where --pretrained is not given, its results do not name one of open_clip's."""
    register()
    from clip_benchmark.cli import main as benchmark

    if "eval" in sys.argv[1:2] and not any(argument.startswith("--pretrained") for argument in sys.argv):
        sys.argv += ["--pretrained", MODEL_TYPE]
    benchmark()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        main()
    except (ValueError, OSError) as error:
        say(f"tinyclip: error: {' '.join(str(error).split())}")
        sys.exit(2)
