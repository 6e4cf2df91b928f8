"""The tiles of the in-batch losses as two Triton kernels, which `tinyclip.distill.affinity` takes with kernel="triton".

The mathematics is that of `affinity.py`. What is fused is a tile: the products of images and texts, of student and
teacher, their exponentials, and what is read of them. `_sum_tile` leaves only sums over blocks of rows and columns,
`_gradient_tile` only d loss / d cosine; cosines and exponentials never reach memory. The gradients of the embeddings
are two products with that tile, by torch. As without Triton that is six products of N x N x E, and no more than one
tile of the gradient (of four) in memory. Partial sums are added in a fixed order, without atomics: two runs give the
same bits.

Exact where `ShiftedSums` is: the rows are unit vectors and the sums can be trusted. Elsewhere (the same rule, decided
by the same lines), and for the gradient of a teacher's scale that learns, `affinity.py` computes tiles with torch.

Rows of 16 bits are multiplied as such, and products are summed in fp32; fp32 rows are multiplied in fp32, without
tensor cores, since TF32 would round them to 11 bits. The gradient tile has the type of the student's rows,
but bf16 for fp16, whose range is too short: d loss / d cosine is near 1 / N^2. fp64 is refused.

The kernels equal the definition in Triton's interpreter and compile for NVIDIA's GPUs, without spilled registers for
rows of 16 bits (sm_80, sm_90). They have been neither run nor timed on a GPU, and their blocks are not tuned: nothing
here says that they are faster.

Shape legend: B pairs (on this rank), N pairs (on all ranks), r rows and k columns of a tile, R and K of a block, which
is what one program of a kernel computes, E student embedding, T teacher embedding, S softmaxes, M sums of a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyclip.distill.softmax_sums import SoftmaxSums
from tinyclip.distill.tiles import Pairs

if TYPE_CHECKING:
    from tinyclip.distill.affinity import Term

R, K = 64, 128  # a block of two fp32 products is 64 registers of each of 256 threads
ROW_BYTES = 128  # of an embedding at a time: a line of the L2 cache
NUM_WARPS = 8
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x log2 e): GPUs have 2^x, and one rounding of x is enough


@triton.jit
def _product(x, y, rows, columns, r, k, width, R: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr):
    """x . y of a block [R, K], 0 outside the tile."""
    product = tl.zeros((R, K), tl.float32)
    for start in range(0, width, STEP):
        e = start + tl.arange(0, STEP)
        x_RE = tl.load(x + rows[:, None] * width + e, mask=(rows < r)[:, None] & (e < width), other=0.0)
        y_EK = tl.load(y + columns * width + e[:, None], mask=(columns < k) & (e < width)[:, None], other=0.0)
        product = tl.dot(x_RE, y_EK, product, input_precision="ieee")
    return product


@triton.jit
def _exponential(cosine, exponents, softmax):
    """exp(scale * cosine - shift) of a block; [softmaxes, 2] `exponents` are scales and shifts / ln 2."""
    return tl.exp2(cosine * tl.load(exponents + 2 * softmax) - tl.load(exponents + 2 * softmax + 1))


@triton.jit
def _keep_sums(block, row_sums, column_sums, place, rows, columns, r, k):
    """Over the rows and the columns of a block, at the block's own place in [M, blocks, r] and [M, blocks, k]."""
    row_block = place * tl.num_programs(1) + tl.program_id(1)
    column_block = place * tl.num_programs(0) + tl.program_id(0)
    tl.store(row_sums + row_block * r + rows, tl.sum(block, 1), mask=rows < r)
    tl.store(column_sums + column_block * k + columns, tl.sum(block, 0), mask=columns < k)


@triton.jit(do_not_specialize=["r", "k"])
def _sum_tile(
    image, text, teacher_image, teacher_text, E, T, r, k,
    exponents,
    row_sums, column_sums,
    OTHER: tl.constexpr, TEACHER: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, TEACHER_STEP: tl.constexpr,
):  # fmt: skip
    """The sums of one block: of the student's exponentials (at one or two scales), of the teacher's and its means."""
    rows, columns = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * K + tl.arange(0, K)
    inside = (rows < r)[:, None] & (columns < k)
    cosine = _product(image, text, rows, columns, r, k, E, R, K, STEP)
    exponential = tl.where(inside, _exponential(cosine, exponents, 0), 0.0)
    _keep_sums(exponential, row_sums, column_sums, 0, rows, columns, r, k)
    if OTHER:
        exponential = tl.where(inside, _exponential(cosine, exponents, 1), 0.0)
        _keep_sums(exponential, row_sums, column_sums, 1, rows, columns, r, k)
    if TEACHER:
        target = _product(teacher_image, teacher_text, rows, columns, r, k, T, R, K, TEACHER_STEP)
        exponential = tl.where(inside, _exponential(target, exponents, 2), 0.0)
        _keep_sums(exponential, row_sums, column_sums, 1 + OTHER, rows, columns, r, k)
        _keep_sums(exponential * cosine, row_sums, column_sums, 2 + OTHER, rows, columns, r, k)
        _keep_sums(exponential * target, row_sums, column_sums, 3 + OTHER, rows, columns, r, k)


@triton.jit
def _weights(row_weights, column_weights, place, rows, columns, r, k, B, N):
    """Of a softmax's exponentials in d loss / d cosine [R, K]: a part of the row and a part of the column."""
    row_R = tl.load(row_weights + place * B + rows, mask=rows < r, other=0.0)
    column_K = tl.load(column_weights + place * N + columns, mask=columns < k, other=0.0)
    return row_R[:, None] + column_K


@triton.jit
def _keep_dot(gradient, cosine, dots, place):
    """sum_ij gradient_ij cosine_ij of a block, at its own place in [terms, row blocks, column blocks]."""
    block = (place * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(dots + block, tl.sum(tl.sum(gradient * cosine, 1), 0))


@triton.jit(do_not_specialize=["r", "k", "B", "N", "own_offset"])
def _gradient_tile(
    image, text, teacher_image, teacher_text, E, T, r, k,
    exponents,
    row_weights, column_weights, own_weight, B, N, own_offset,
    gradient, dots,
    OTHER: tl.constexpr, TEACHER: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, TEACHER_STEP: tl.constexpr,
):  # fmt: skip
    """d loss / d cosine of one block [R, K], and its product with the cosines for each term (a scale's gradient).

    The last term of the student is that with the diagonal, where there is one (else `own_weight` is 0).
    """
    rows, columns = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * K + tl.arange(0, K)
    cosine = _product(image, text, rows, columns, r, k, E, R, K, STEP)
    own = tl.where(columns == rows[:, None] + own_offset, tl.load(own_weight), 0.0)
    total = _exponential(cosine, exponents, 0) * _weights(row_weights, column_weights, 0, rows, columns, r, k, B, N)
    if TEACHER:
        target = _product(teacher_image, teacher_text, rows, columns, r, k, T, R, K, TEACHER_STEP)
        weights = _weights(row_weights, column_weights, 1 + OTHER, rows, columns, r, k, B, N)
        total += _exponential(target, exponents, 2) * weights
    if OTHER:
        weights = _weights(row_weights, column_weights, 1, rows, columns, r, k, B, N)
        other = _exponential(cosine, exponents, 1) * weights - own
        _keep_dot(total, cosine, dots, 0)
        _keep_dot(other, cosine, dots, 1)
        total += other
    else:
        total -= own
        _keep_dot(total, cosine, dots, 0)
    place = rows.to(tl.int64)[:, None] * k + columns
    tl.store(gradient + place, total.to(gradient.dtype.element_ty), mask=(rows < r)[:, None] & (columns < k))


INTERPRETED = not isinstance(_sum_tile, triton.JITFunction)  # TRITON_INTERPRET=1 when Triton was imported


class FusedTiles(NamedTuple):
    """What `affinity.py` asks of all tiles of a batch, by kernels."""

    dtypes: tuple[torch.dtype, ...]  # in which the rows of student and teacher are multiplied

    @classmethod
    def of(cls, models: list[tuple[Tensor, Tensor]]) -> FusedTiles:
        """For embeddings like these. Raises ValueError where the kernels do not take them."""
        for x in (x for model in models for x in model):
            if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"kernel 'triton': expected embeddings in fp32, bf16 or fp16, got {x.dtype}")
            if x.device.type not in ("cuda", "xpu") and not INTERPRETED:
                raise ValueError(
                    f"kernel 'triton': expected embeddings on a GPU, got {x.device} (kernel 'torch' is for it)"
                )
        return cls(tuple(torch.promote_types(image.dtype, text.dtype) for image, text in models))

    def add(self, pairs: Pairs, softmaxes: list[SoftmaxSums]) -> None:
        """Adds every tile to the sums of `softmaxes`, whose shifts are constants."""
        scores = _Scores.of(pairs, softmaxes, self.dtypes)
        num_sums = [len(softmax.rows_MB) for softmax in scores.softmaxes]
        for tile in scores.tiles():
            row_sums = pairs.image.new_empty(sum(num_sums), tile.grid[1], tile.r)
            column_sums = pairs.image.new_empty(sum(num_sums), tile.grid[0], tile.k)
            scores.launch(_sum_tile, tile, row_sums, column_sums)
            parts = zip(row_sums.sum(1).split(num_sums), column_sums.sum(1).split(num_sums), strict=True)
            for softmax, (rows_Mr, columns_Mk) in zip(scores.softmaxes, parts, strict=True):
                softmax.rows_MB[:, tile.rows] += rows_Mr
                softmax.columns_MN[:, tile.columns] += columns_Mk

    def gradients(
        self, pairs: Pairs, terms: list[Term], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, dict[int, Tensor]]:
        """(d image, d text, d scale by its place among the inputs), not yet summed over ranks."""
        softmaxes = [x for term in terms for x in (term.student, term.teacher) if x is not None]
        scores = _Scores.of(pairs, softmaxes, self.dtypes)
        weights = _Weights.of(terms, scores.softmaxes)
        image, text = [x.to(_gradient_dtype(self.dtypes[0])) for x in pairs.models[0]]
        d_image, d_text = (
            torch.zeros_like(x) if need else None for x, need in zip(pairs.models[0], needs, strict=False)
        )
        d_scales = {place: image.new_zeros((), dtype=torch.float32) for place in (2, 3, 4)}
        for tile in scores.tiles():
            gradient_rk, dots = image.new_empty(tile.r, tile.k), pairs.image.new_empty(len(terms), *tile.grid)
            scores.launch(_gradient_tile, tile, *weights.of_tile(tile, pairs), gradient_rk, dots)
            if d_image is not None:
                d_image[tile.rows] += gradient_rk @ text[tile.columns]
            if d_text is not None:
                d_text[tile.columns] += gradient_rk.T @ image[tile.rows]
            for term, dot in zip(terms, dots.sum((1, 2)), strict=True):
                d_scales[term.place] = d_scales[term.place] + dot / term.student.scale
        return d_image, d_text, d_scales


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float32 else torch.bfloat16


class _Place(NamedTuple):
    """Of a tile in the matrix of all scores; a program for each block."""

    rows: slice
    columns: slice

    @property
    def r(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def k(self) -> int:
        return self.columns.stop - self.columns.start

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(self.r, R), triton.cdiv(self.k, K)


class _Scores(NamedTuple):
    """What both kernels read of a batch. Softmaxes are in the kernels' order: the student's, then the teacher's."""

    models: list[tuple[Tensor, Tensor]]  # contiguous; the student's again where there is no teacher
    softmaxes: list[SoftmaxSums]
    # [3, 2] in fp32: of the student's first softmax, of its last and of the teacher's, scale / ln 2 and shift / ln 2
    exponents: Tensor
    tile: int

    @classmethod
    def of(cls, pairs: Pairs, softmaxes: list[SoftmaxSums], dtypes: tuple[torch.dtype, ...]) -> _Scores:
        models = [
            (image.to(_product_dtype(dtype)).contiguous(), text.to(_product_dtype(dtype)).contiguous())
            for (image, text), dtype in zip(pairs.models, dtypes, strict=True)
        ]
        softmaxes = sorted(softmaxes, key=lambda x: x.model)
        students = [x for x in softmaxes if x.model == 0]
        read = (students[0], students[-1], softmaxes[-1])  # where one is absent, another that is not read
        exponents = pairs.image.new_empty(3, 2, dtype=torch.float32)
        for row, softmax in zip(exponents, read, strict=True):
            row[0] = softmax.scale  # of a tensor a copy on the device
            row[1] = softmax.shifts()[0]
        exponents *= LOG2_E
        return cls([models[0], models[-1]], softmaxes, exponents, pairs.layout.tile)

    def tiles(self) -> Iterator[_Place]:
        (image, text), _ = self.models
        for i in range(0, len(image), self.tile):
            for j in range(0, len(text), self.tile):
                yield _Place(slice(i, min(i + self.tile, len(image))), slice(j, min(j + self.tile, len(text))))

    def launch(self, kernel, tile: _Place, *arguments) -> None:
        """With what both kernels take, then `arguments`."""
        rows = [x[place] for model in self.models for x, place in zip(model, (tile.rows, tile.columns), strict=True)]
        widths = [image.shape[1] for image, _ in self.models]
        steps = [ROW_BYTES // image.element_size() for image, _ in self.models]
        num_students = sum(x.model == 0 for x in self.softmaxes)
        flags = (num_students - 1, len(self.softmaxes) - num_students)
        with torch.cuda.device_of(rows[0]):
            kernel[tile.grid](
                *rows, *widths, tile.r, tile.k, self.exponents, *arguments, *flags, R, K, *steps, num_warps=NUM_WARPS
            )


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Triton's interpreter has no products of bf16; fp32 holds bf16 and its products exactly."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


class _Weights(NamedTuple):
    """d loss / d cosine is the sum over softmaxes of exponentials x (row weight + column weight), less the own's."""

    rows_SB: Tensor
    columns_SN: Tensor
    own: Tensor  # of an image and its own text

    @classmethod
    def of(cls, terms: list[Term], softmaxes: list[SoftmaxSums]) -> _Weights:
        weights = {term.student: term.weight for term in terms}
        weights |= {term.teacher: -term.affinity for term in terms if term.teacher and term.affinity is not None}
        own = [2 * term.contrastive for term in terms if term.contrastive is not None]
        return cls(
            torch.stack([weights[x] / x.rows_MB[0] for x in softmaxes]),
            torch.stack([weights[x] / x.columns_MN[0] for x in softmaxes]),
            own[0] if own else softmaxes[0].rows_MB.new_zeros(()),
        )

    def of_tile(self, tile: _Place, pairs: Pairs) -> tuple[Tensor | int, ...]:
        own_offset = tile.rows.start + pairs.layout.own.start - tile.columns.start
        return self.rows_SB[:, tile.rows], self.columns_SN[:, tile.columns], self.own, *pairs.shape, own_offset
