"""The model to imitate, frozen, behind one call.

Shape legend: B pairs, L tokens, S side of the picture, T teacher embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyclip.data.loader import Reader
from tinyclip.distributed import World, shard, whole
from tinyclip.formats import checkpoint, huggingface, zoo
from tinyclip.formats.files import read_json
from tinyclip.formats.open_clip import (
    CONFIG_FILE,
    PREFIXES,
    TeachOnly,
    config_from_open_clip,
    from_open_clip,
    load_pretrained,
    refuse_addresses,
)
from tinyclip.formats.provenance import read_provenance
from tinyclip.model import CLIP, Block, lengths, unit
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

LOCAL_DIR = "local-dir:"
IMAGES_ALIKE, TEXTS_ALIKE, LENGTHS_ALIKE = 8, 4, 8  # rows of a block, and the steps of a text's length: LOG.md
PUBLISHED = tuple(prefix for prefix in PREFIXES if prefix != LOCAL_DIR)
OPEN_CLIP = PREFIXES  # names that open_clip resolves


@dataclass(frozen=True, eq=False)
class Teacher:
    name: str
    preprocess: Preprocess
    tokenizer: Callable[[Sequence[str]], Tensor]  # texts -> int64 [B, L]
    embed_dim: int
    scale: float  # 1 / temperature
    model: Any  # a CLIP, or a model of open_clip with the same encode_image and encode_text
    teach_only: str | None = None  # why its weights cannot be inherited
    sharded: bool = False  # every process has a part of the weights: all must call it equally often

    @property
    def clip(self) -> CLIP | None:
        """The model where its weights can be inherited."""
        return self.model if isinstance(self.model, CLIP) else None

    @property
    def reader(self) -> Reader:
        return Reader(self.preprocess, self.tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def weights_sha256(self) -> str:
        """Of a split teacher all processes must ask at once."""
        return weights_sha256(self.model)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self.model.to(device)
        return self

    def shard(self, world: World, device: torch.device) -> Teacher:
        """Split the weights over the processes, in place, for a model too big for one card."""
        if world.size == 1:
            return self.to(device)
        if self.clip is not None:
            self.clip.text.chunk_counts = (1,)  # by length, processes would differ
        shard(self.model, world, device, {type(self.model): ("encode_image", "encode_text"), Block: ("read",)})
        return replace(self, sharded=True)

    @torch.no_grad()
    def embed(self, pixels: Tensor, tokens_BL: Tensor, length_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit fp32 embeddings [B, T] of uint8 pixels [B, 3, S, S] and of token ids; lengths as in `CLIP.forward`.

        Those of a CLIP on a CPU have the same bits in any batch, so a stored one is the live one; not under autocast.
        """
        if self.clip is not None and not self._alike:  # all the text in one call, cut into chunks by length
            return self.clip(pixels, tokens_BL, length_B=length_B)
        return self.embed_images(pixels), self.embed_texts(tokens_BL)

    @torch.no_grad()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Unit fp32 embeddings [B, T] of uint8 pixels [B, 3, S, S], as `embed` gives them."""
        encode = partial(self.encode_image, normalize=True)
        return _in_blocks(encode, pixels, IMAGES_ALIKE) if self._alike else encode(pixels)

    @torch.no_grad()
    def embed_texts(self, texts: Tensor | Sequence[str]) -> Tensor:
        """Unit fp32 embeddings [B, T] of texts or of token ids [B, L], as `embed` gives them."""
        tokens_BL = texts if isinstance(texts, Tensor) else self.tokenizer(texts).to(self.device)
        if self.clip is None or not self._alike:
            return self.encode_text(tokens_BL, normalize=True)
        text, context = self.clip.text, self.clip.config.text.context_length
        tokens_BL = F.pad(tokens_BL, (0, context - tokens_BL.shape[1]))
        length_B = (-(-lengths(tokens_BL) // LENGTHS_ALIKE) * LENGTHS_ALIKE).clamp(max=context)
        text_BT = torch.empty(len(tokens_BL), self.embed_dim)
        for length in length_B.unique().tolist():
            rows = length_B == length
            text_BT[rows] = _in_blocks(lambda tokens: unit(text(tokens)), tokens_BL[rows, :length], TEXTS_ALIKE)
        return text_BT

    @property
    def _alike(self) -> bool:
        """Whether every product has one of few shapes, so that a row's sums do not depend on what stands beside it.

        Cheap on a CPU. A GPU would wait for small pieces; a split teacher must be called equally often everywhere;
        autocast would cast the weights again for every piece, and what is stored is fp32's.
        """
        on_cpu = self.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return self.clip is not None and on_cpu and not self.sharded

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, *, normalize: bool = False) -> Tensor:
        """Embeddings [B, T] of uint8 pixels [B, 3, S, S]."""
        image_BT = self.model.encode_image(self.preprocess.normalise(pixels))
        return unit(image_BT) if normalize else image_BT

    @torch.no_grad()
    def encode_text(self, texts: Tensor | Sequence[str], *, normalize: bool = False) -> Tensor:
        """Embeddings [B, T] of texts or of token ids [B, L]."""
        tokens_BL = texts if isinstance(texts, Tensor) else self.tokenizer(texts).to(self.device)
        if isinstance(self.tokenizer, Tokenizer):  # the data is cut after the longest caption; open_clip wants it whole
            tokens_BL = F.pad(tokens_BL, (0, self.tokenizer.context_length - tokens_BL.shape[1]))
        text_BT = self.model.encode_text(tokens_BL)
        return unit(text_BT) if normalize else text_BT


def weights_sha256(model: torch.nn.Module) -> str:
    """Over names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = whole(tensor).detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _in_blocks(encode: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """`encode` of `size` rows at a time; the last block is filled up."""
    parts = []
    for block in rows.split(size):
        padding = block[:1].expand(size - len(block), *block.shape[1:])
        parts.append(encode(torch.cat([block, padding]))[: len(block)])
    return torch.cat(parts)


def is_local(spec: str) -> bool:
    """Whether the model that a spec names is a path: loading it opens no address."""
    return not spec.startswith((*PUBLISHED, huggingface.HUB, zoo.PREFIX))


def load_teacher(spec: str, *, allow_remote: bool = False) -> Teacher:
    """A teacher in evaluation mode on the CPU, from what `checkpoint.load` reads without a config, or from open_clip:

    open_clip:ViT-B-32/laion2b_s34b_b79k, open_clip:ViT-B-32-quickgelu/path/to/file.pt, hf-hub:ORGANISATION/MODEL or
    local-dir:DIRECTORY. A ViT- or ResNet-CLIP becomes our CLIP, so that its weights can be inherited; any other only
    teaches.
    Raises ValueError or FileNotFoundError, one line; without `allow_remote` also for a DIRECTORY that names parts of
    itself on the hub.
    """
    if spec.startswith(OPEN_CLIP):
        if spec.startswith(LOCAL_DIR) and not allow_remote:
            refuse_addresses(Path(spec.removeprefix(LOCAL_DIR)))
        return _from_open_clip(spec)
    clip = checkpoint.load(spec)
    if clip.preprocess is None or clip.tokenizer is None:
        raise ValueError(f"{spec}: a teacher needs preprocess.json and tokenizer.json beside its weights")
    return _from_clip(spec, clip)


def _from_clip(name: str, clip: CLIP) -> Teacher:
    assert clip.preprocess is not None and clip.tokenizer is not None, "checked by the callers"
    return Teacher(name, clip.preprocess, clip.tokenizer, clip.config.embed_dim, clip.scale.item(), clip)


def _from_open_clip(spec: str) -> Teacher:
    found = load_pretrained(spec.removeprefix("open_clip:"))
    try:
        config = config_from_open_clip(found.model_cfg)
        if not isinstance(found.tokenizer, Tokenizer) or found.tokenizer.vocab_size != config.text.vocab_size:
            raise TeachOnly("its captions are not read with CLIP's vocabulary")
    except TeachOnly as reason:
        model, embed_dim = found.model, found.model_cfg["embed_dim"]
        return Teacher(
            spec, found.preprocess, found.tokenizer, embed_dim, model.logit_scale.exp().item(), model, str(reason)
        )
    clip = from_open_clip(found.model.state_dict(), config, where=spec)
    if spec.startswith(LOCAL_DIR):
        file = Path(spec.removeprefix(LOCAL_DIR)) / CONFIG_FILE
        clip.provenance = read_provenance(read_json(file), str(file))
    clip.preprocess, clip.tokenizer = found.preprocess, found.tokenizer
    return _from_clip(spec, clip)
