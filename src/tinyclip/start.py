"""Where a student comes from: a model whose weights it inherits, or a random start."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from pydantic import Field

from tinyclip.config import Config
from tinyclip.data.sources import Source
from tinyclip.distill.teacher import Teacher, load_teacher
from tinyclip.evaluate.embed import texts_of
from tinyclip.model import CLIP, CLIPConfig, initialise
from tinyclip.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from tinyclip.tokenizer import Tokenizer


class Scratch(Config):
    """A random start: every block alike, width / head_dim heads and 4 x width neurons; or a stock ResNet for images."""

    embed_dim: int = Field(gt=0)
    image_size: int = Field(gt=0)
    patch_size: int | None = Field(default=None, gt=0, description="a ResNet has none")
    image_width: int = Field(gt=0)
    image_layers: int | tuple[int, int, int, int] = Field(description="of a ResNet four numbers: blocks of each stage")
    text_width: int = Field(gt=0)
    text_layers: int = Field(gt=0)
    context_length: int = Field(default=77, gt=1)
    head_dim: int = Field(default=64, gt=0)
    vocabulary: int | None = Field(
        default=None, ge=600, description="learn a byte-pair vocabulary of this size from the captions; else CLIP's"
    )


class Like(Config):
    """A random start with the shape, preprocessing and vocabulary of another model."""

    like: str = Field(description="a run, stage or model directory, or a name as of a teacher")


def starting_point(
    start: str | Scratch | Like | None,
    teachers: Sequence[Teacher],
    source: Source,
    *,
    seed: int,
    allow_remote: bool = False,
) -> CLIP:
    """The model that the first stage shrinks. Raises ValueError where a teacher's weights cannot be inherited."""
    generator = torch.Generator().manual_seed(seed)
    match start:
        case Scratch() as scratch:
            return from_scratch(scratch, source, generator)
        case Like(like=spec) | str(spec):
            parent = load_teacher(spec, allow_remote=allow_remote)
        case None:
            assert teachers, "a recipe has a teacher or a start"
            parent = teachers[0]
    if parent.clip is None:
        raise ValueError(
            f"{parent.name} can only teach ({parent.teach_only}); name a ViT- or ResNet-CLIP or a shape as `start`"
        )
    model = copy.deepcopy(parent.clip)
    if isinstance(start, Like):
        return initialise(CLIP(model.config, preprocess=model.preprocess, tokenizer=model.tokenizer), generator)
    return model


def from_scratch(scratch: Scratch, source: Source, generator: torch.Generator) -> CLIP:
    if scratch.vocabulary is None:
        tokenizer = Tokenizer.openai(scratch.context_length)
    else:
        captions = texts_of(source, source.captions, "captions").values()
        texts = itertools.chain.from_iterable(captions)
        tokenizer = Tokenizer.train(texts, vocab_size=scratch.vocabulary, context_length=scratch.context_length)
    shape = scratch.model_dump(exclude={"vocabulary"})
    config = CLIPConfig.uniform(**shape, vocab_size=tokenizer.vocab_size)
    preprocess = Preprocess(size=scratch.image_size, mean=OPENAI_MEAN, std=OPENAI_STD)
    return initialise(CLIP(config, preprocess=preprocess, tokenizer=tokenizer), generator)
