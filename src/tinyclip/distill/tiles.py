"""The products of a batch's image and text embeddings, tile by tile.

Shape legend: B pairs (on this rank), N pairs (on all ranks), r rows and k columns of a tile, E embedding of student or
teacher. A cosine is the product of two unit vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tinyclip.distributed import World

LONGEST_UNIT = 1.01  # bf16 leaves the norm of a unit vector up to 0.3 % off
ONE_TILE = 1500  # batches up to this size are one tile, which is kept for backward
TILE, CUDA_TILE = 512, 4096  # rows and columns; on two cores 512 to 2048 are alike. Four tiles of 4,096 are 268 MB


class Scratch:
    """Tiles that are written again and again: a fresh allocation of some MB costs its page faults each time."""

    def __init__(self, like: Tensor):
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def tile(self, name: str, r: int, k: int) -> Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or len(buffer) < r * k:
            buffer = self.buffers[name] = self.like.new_empty(r * k)
        return buffer[: r * k].view(r, k)

    def clear(self) -> None:
        self.buffers.clear()


class Layout(NamedTuple):
    counts: tuple[int, ...]  # pairs on each rank
    own: slice  # this rank's among all
    tile: int
    keep: bool  # one tile holds everything, and stays for backward
    num_models: int


class Tile(NamedTuple):
    rows: slice
    columns: slice
    cosines: tuple[Tensor, ...]  # [r, k]: the student's, and where there is a teacher, its


class Pairs:
    """(image, text), (image, text) of student and teacher: images of this rank, texts of all, at least in fp32."""

    def __init__(self, models: list[tuple[Tensor, Tensor]], layout: Layout):
        self.models, self.layout = models, layout
        self.image, self.text = models[0]
        self.scratch = Scratch(self.image)
        self.kept: tuple[Tensor, ...] = ()

    @classmethod
    def gathered(cls, models: list[tuple[Tensor, Tensor]], world: World, tile: int | None) -> Pairs:
        """From the pairs of this rank. Without `tile`, a small batch is one tile."""
        image_BE = models[0][0]
        at_least = torch.promote_types(image_BE.dtype, torch.float32)
        counts = world.counts(image_BE)
        keep = tile is None and max(counts) * sum(counts) <= ONE_TILE**2
        tile = max(1, sum(counts)) if keep else tile or (CUDA_TILE if image_BE.is_cuda else TILE)
        gathered = [(image.detach().to(at_least), world.gather(text, counts).to(at_least)) for image, text in models]
        return cls(gathered, Layout(counts, world.own(counts), tile, keep, len(models)))

    def saved(self) -> tuple[Tensor, ...]:
        """What `restored` needs, beside the layout."""
        return *(x for model in self.models for x in model), *self.kept

    @classmethod
    def restored(cls, saved: tuple[Tensor, ...], layout: Layout) -> Pairs:
        pairs = cls([(saved[2 * i], saved[2 * i + 1]) for i in range(layout.num_models)], layout)
        pairs.kept = saved[2 * layout.num_models :]
        return pairs

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.image), len(self.text)

    def tiles(self) -> Iterator[Tile]:
        B, N = self.shape
        for rows in _slices(B, self.layout.tile):
            for columns in _slices(N, self.layout.tile):
                cosines = self.kept or tuple(self._product(i, rows, columns) for i in range(len(self.models)))
                if self.layout.keep:
                    self.kept = cosines
                yield Tile(rows, columns, cosines)

    def _product(self, i: int, rows: slice, columns: slice) -> Tensor:
        image_rE, text_kE = self.models[i][0][rows], self.models[i][1][columns]
        return torch.mm(image_rE, text_kE.T, out=self.scratch.tile(f"cosine {i}", len(image_rE), len(text_kE)))

    def are_unit(self, world: World) -> bool:
        norms = [torch.linalg.vector_norm(x, dim=1) for model in self.models for x in model]
        longest = torch.cat([*norms, self.image.new_zeros(1)]).amax()
        return not bool(world.max_(longest) > LONGEST_UNIT)

    def own_cosines(self) -> Tensor:
        """The student's, of each image with its own text [B]."""
        return row_dots(self.image, self.text[self.layout.own])

    def own_diagonal(self, tile: Tile, scores_rk: Tensor) -> Tensor:
        """The view of `scores_rk` at images and their own texts; empty where the tile has none."""
        return scores_rk.diagonal(tile.rows.start + self.layout.own.start - tile.columns.start)


def row_dots(x_BE: Tensor, y_BE: Tensor) -> Tensor:
    """x_b . y_b, without the B x E products that a sum or torch.linalg.vecdot would allocate."""
    return torch.einsum("be,be->b", x_BE, y_BE)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
