"""Affinity mimicking: the student ranks the pairs of a batch the way the teacher does.

An affinity row is softmax(scale * image_i . text_j) over all texts j of the batch. The loss is the cross-entropy from
the teacher's rows to the student's, averaged over rows and over the two directions (image to text, text to image).
Source: Wu et al., "TinyCLIP", ICCV 2023, equations 2 to 4. CLIP's own (contrastive) loss has the identity for the
teacher's rows.

`affinity_loss_reference` is the definition. It keeps several N x N matrices for backward. Here they are visited in
tiles and none is kept: forward is one pass that sums exponentials over rows and columns, of student and teacher
together; backward forms each tile again, and its gradient. That is six products of N x N x E (two, then four), the
fewest for memory that is linear in N, since the sums are complete only after the last tile. A batch of which one tile
holds everything keeps its two products: four.

With p, q the row and column softmax of the student, P, Q the teacher's, c_ij = image_i . text_j, and the exponential
E_ij = exp(scale * c_ij - shift) with sums r_i over its row and k_j over its column (p_ij = E_ij / r_i):

    2 N loss = sum_i (shift + log r_i - scale sum_j P_ij c_ij) + sum_j (shift + log k_j - scale sum_i Q_ij c_ij)
    2 N d loss / d c = scale (p + q - P - Q)
    d loss / d scale = sum_ij c_ij (d loss / d c_ij) / scale = sum_i image_i . (d loss / d image_i) / scale   (Euler)
    2 N d loss / d teacher_scale = -scale (sum_i Cov_P_i(c, teacher's c) + sum_j Cov_Q_j(c, teacher's c))

Of unit vectors no score is above the scale, so one shift for all serves (`ShiftedSums`): one exponential for both
directions, sums that are merged by adding, over tiles and over ranks. Where rows are longer than units or the sums
come near the smallest numbers, maxima that run along are the shifts (`RunningSums`), as in a numerically safe softmax.
To know which, the host looks at the embeddings, at scales that are tensors and, where a sum could vanish, at the sums.
A GPU would be waited for; `trusted` inputs are not looked at.

Tiles are computed by torch, or, where kernel="triton", by the fused kernels of `affinity_triton.py`: same result.

On several ranks, each has its own images x all texts: texts are gathered, the sums over columns are added up, and the
gradient of the texts is scattered back.

Shape legend: B pairs (on this rank), N pairs (on all ranks), r rows and k columns of a tile, E student embedding,
T teacher embedding. Embeddings are unit vectors, scales are 1 / temperature, losses are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinyclip.distill.softmax_sums import RunningSums, ShiftedSums, SoftmaxSums
from tinyclip.distill.tiles import Pairs, Tile, row_dots
from tinyclip.distributed import ALONE, World

if TYPE_CHECKING:
    from tinyclip.distill.affinity_triton import FusedTiles

Kernel = Literal["torch", "triton"]  # what computes the tiles


def affinity_loss_reference(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor | float,
    teacher_image_BT: Tensor,
    teacher_text_BT: Tensor,
    teacher_scale: Tensor | float,
) -> Tensor:
    """The definition, which judges `affinity_loss`."""
    student_BB = scale * image_BE @ text_BE.T
    teacher_BB = teacher_scale * teacher_image_BT @ teacher_text_BT.T
    image_to_text = F.cross_entropy(student_BB, teacher_BB.softmax(-1))
    text_to_image = F.cross_entropy(student_BB.T, teacher_BB.T.softmax(-1))
    return (image_to_text + text_to_image) / 2


class Losses(NamedTuple):
    """Means over the pairs of all ranks. `entropy` is that of the teacher's rows, without gradient."""

    affinity: Tensor
    entropy: Tensor
    contrastive: Tensor


def affinity_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor | float,
    teacher_image_BT: Tensor,
    teacher_text_BT: Tensor,
    teacher_scale: Tensor | float,
    *,
    world: World = ALONE,
    tile: int | None = None,
    kernel: Kernel = "torch",
    trusted: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, entropy), equal to `affinity_loss_reference`, in memory linear in the batch.

    `entropy` is that of the teacher's rows, without gradient: loss - entropy is a KL divergence, 0 where the student
    agrees. Gradients reach the student's embeddings and both scales. `tile` is the rows and columns in hand at once.
    `kernel` "triton" needs a GPU and embeddings of 16 or 32 bits, and raises ValueError elsewhere. `trusted` takes
    embeddings to be unit vectors and scales to be in (0, 100], as a CLIP's are: no GPU is waited for. Where
    they are not, or where in fp32 the scores of a whole row are below -32 at a scale above 60, the loss is not finite.
    """
    student, teacher = (image_BE, text_BE), (teacher_image_BT, teacher_text_BT)
    losses = _losses(student, scale, None, teacher, teacher_scale, world, tile, kernel, trusted)
    return losses.affinity, losses.entropy


def contrastive_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor | float,
    *,
    world: World = ALONE,
    tile: int | None = None,
    kernel: Kernel = "torch",
    trusted: bool = False,
) -> Tensor:
    """CLIP's loss: the cross-entropy of each pair against the rest of the batch, both directions averaged."""
    student = (image_BE, text_BE)
    return _losses(student, None, scale, (None, None), None, world, tile, kernel, trusted).contrastive


def affinity_and_contrastive_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor | float,
    contrastive_scale: Tensor | float,
    teacher_image_BT: Tensor,
    teacher_text_BT: Tensor,
    teacher_scale: Tensor | float,
    *,
    world: World = ALONE,
    tile: int | None = None,
    kernel: Kernel = "torch",
    trusted: bool = False,
) -> Losses:
    """Both losses from the same tiles: no more products than one. Where the scales are one, no more exponentials."""
    student, teacher = (image_BE, text_BE), (teacher_image_BT, teacher_text_BT)
    return _losses(student, scale, contrastive_scale, teacher, teacher_scale, world, tile, kernel, trusted)


def _losses(
    student,
    scale,
    contrastive_scale,
    teacher,
    teacher_scale,
    world: World,
    tile: int | None,
    kernel: Kernel,
    trusted: bool,
) -> Losses:
    for name, rows in zip(("text", "teacher's image", "teacher's text"), (student[1], *teacher), strict=True):
        if rows is not None and len(rows) != len(student[0]):
            raise ValueError(f"expected a {name} embedding for each of {len(student[0])} images, got {len(rows)}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile: expected at least 1 row, got {tile}")
    both = contrastive_scale is scale
    scale, contrastive_scale, teacher_scale = (_checked(x, trusted) for x in (scale, contrastive_scale, teacher_scale))
    scales = (scale, scale if both else contrastive_scale, teacher_scale)
    fused = _fused_tiles(kernel, [student] if teacher[0] is None else [student, teacher])
    return Losses(*_InBatchLosses.apply(*student, *scales, *teacher, world, tile, fused, trusted))


def _fused_tiles(kernel: Kernel, models: list[tuple[Tensor, Tensor]]) -> FusedTiles | None:
    if kernel == "torch":
        return None
    if kernel != "triton":
        raise ValueError(f"kernel: expected torch or triton, got {kernel!r}")
    try:
        from tinyclip.distill.affinity_triton import FusedTiles
    except ImportError as error:
        raise ValueError(f"kernel 'triton' needs Triton ({error}): pip install triton") from error
    return FusedTiles.of(models)


def _checked(scale: Tensor | float | None, trusted: bool) -> Tensor | float | None:
    if isinstance(scale, Tensor) and trusted:
        return scale.reshape(())
    if scale is not None and _number(scale) <= 0:
        raise ValueError(f"expected scales above 0, got {_number(scale):g}")
    return scale.reshape(()) if isinstance(scale, Tensor) else scale


def _number(scale: Tensor | float) -> float:
    return float(scale.detach() if isinstance(scale, Tensor) else scale)


class _InBatchLosses(torch.autograd.Function):
    """`Losses`. The upstream gradients of affinity and contrastive are their weights."""

    @staticmethod
    def forward(
        ctx,
        image,
        text,
        scale,
        contrastive_scale,
        teacher_scale,
        teacher_image,
        teacher_text,
        world,
        tile,
        fused,
        trusted,
    ):  # type: ignore[override]
        models = [(image, text)] if teacher_image is None else [(image, text), (teacher_image, teacher_text)]
        with torch.autocast(image.device.type, enabled=False):  # a bf16 score near 50 would be off by up to 0.125
            pairs = Pairs.gathered(models, world, tile)
            fits = trusted or pairs.are_unit(world)
            softmaxes = _softmaxes(pairs, _Scales(scale, contrastive_scale, teacher_scale), world, fused, fits, trusted)
            losses = _values(pairs, softmaxes, world)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*pairs.saved())
        ctx.layout, ctx.softmaxes, ctx.world, ctx.fused = pairs.layout, softmaxes, world, fused
        pairs.scratch.clear()
        ctx.mark_non_differentiable(losses.entropy)
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_affinity, _grad_entropy, grad_contrastive):  # type: ignore[override]
        pairs = Pairs.restored(ctx.saved_tensors, ctx.layout)
        with torch.autocast(pairs.image.device.type, enabled=False):
            terms = _terms(pairs, ctx.softmaxes, (grad_affinity, grad_contrastive), ctx.world)
            grads = _gradients(pairs, terms, ctx.needs_input_grad, ctx.world, ctx.fused) if terms else [None] * 5
        return *grads, *[None] * 6


class _Affinity(NamedTuple):
    student: SoftmaxSums
    teacher: SoftmaxSums


class _Softmaxes(NamedTuple):
    """What the losses read. Where the scales are one, the contrastive softmax is the affinity's of the student."""

    affinity: _Affinity | None
    contrastive: SoftmaxSums | None

    def distinct(self) -> list[SoftmaxSums]:
        return list(dict.fromkeys([*(self.affinity or ()), *([self.contrastive] if self.contrastive else ())]))


class _Scales(NamedTuple):
    """One object where affinity and contrastive share theirs."""

    affinity: Tensor | float | None
    contrastive: Tensor | float | None
    teacher: Tensor | float | None

    def known(self, trusted: bool) -> _Scales:
        """Numbers; of a trusted tensor a copy of its own."""
        affinity, teacher = (_known(scale, trusted) for scale in (self.affinity, self.teacher))
        shared = self.affinity is not None and _is_same(self.affinity, self.contrastive)
        return _Scales(affinity, affinity if shared else _known(self.contrastive, trusted), teacher)


def _softmaxes(
    pairs: Pairs, scales: _Scales, world: World, fused: FusedTiles | None, fits: bool, trusted: bool
) -> _Softmaxes:
    """The sums of one pass; of two where the constant shift turns out not to fit."""
    scales = scales.known(trusted)
    if fits:
        softmaxes = _one_pass(partial(ShiftedSums, trusted=trusted), pairs, scales, fused)
        if all([softmax.merge(world) for softmax in softmaxes.distinct()]):  # a list: every rank merges every one
            return softmaxes
    softmaxes = _one_pass(RunningSums, pairs, scales)
    for softmax in softmaxes.distinct():
        softmax.merge(world)
    return softmaxes


def _one_pass(
    kind: Callable[..., SoftmaxSums], pairs: Pairs, scales: _Scales, fused: FusedTiles | None = None
) -> _Softmaxes:
    affinity = contrastive = None
    if scales.affinity is not None and scales.teacher is not None:
        affinity = _Affinity(kind(pairs, 0, scales.affinity), kind(pairs, 1, scales.teacher, means=True))
    if scales.contrastive is not None:
        shared = affinity is not None and scales.contrastive is scales.affinity
        contrastive = affinity.student if affinity and shared else kind(pairs, 0, scales.contrastive)
    softmaxes = _Softmaxes(affinity, contrastive)
    if fused is not None:
        fused.add(pairs, softmaxes.distinct())
        return softmaxes
    for tile in pairs.tiles():
        for softmax in softmaxes.distinct():
            softmax.add(tile)
    return softmaxes


def _known(scale: Tensor | float | None, trusted: bool) -> Tensor | float | None:
    if isinstance(scale, Tensor):
        return scale.detach().clone() if trusted else _number(scale)
    return scale


def _is_same(scale: Tensor | float | None, other: Tensor | float | None) -> bool:
    return scale is other or (isinstance(scale, float | int) and isinstance(other, float | int) and scale == other)


def _values(pairs: Pairs, softmaxes: _Softmaxes, world: World) -> Losses:
    """Of each loss the sum over rows (this rank's) and over columns (all); then the mean of both."""
    rows, columns = (pairs.image.new_zeros(3, dtype=torch.float64) for _ in range(2))
    if softmaxes.affinity is not None:
        teacher = softmaxes.affinity.teacher
        for i, softmax in enumerate(softmaxes.affinity):
            (row_log_B, column_log_N), (row_mean_B, column_mean_N) = softmax.log_sums(), teacher.means(softmax.model)
            rows[i] = (row_log_B - softmax.scale * row_mean_B).sum()
            columns[i] = (column_log_N - softmax.scale * column_mean_N).sum()
    if softmaxes.contrastive is not None:
        row_log_B, column_log_N = softmaxes.contrastive.log_sums()
        rows[2] = (row_log_B - 2 * softmaxes.contrastive.scale * pairs.own_cosines()).sum()  # 2: columns have none
        columns[2] = column_log_N.sum()
    return Losses(*((world.sum_(rows) + columns) / (2 * len(pairs.text))).to(pairs.image.dtype).unbind())


class Term(NamedTuple):
    """One softmax of the student, the place of its scale among the inputs, and the losses that read it.

    `affinity` and `contrastive` are d loss / d cosine's factors before the softmaxes' difference to their targets.
    """

    student: SoftmaxSums
    place: int
    teacher: SoftmaxSums | None = None
    affinity: Tensor | None = None
    contrastive: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return torch.stack([weight for weight in (self.affinity, self.contrastive) if weight is not None]).sum()

    def gradient(self, pairs: Pairs, tile: Tile, out: str) -> Tensor:
        """d loss / d cosine of one tile, written to the scratch tile `out`."""
        g_rk = self.student.weigh(tile, self.weight, out)
        if self.teacher is not None and self.affinity is not None:
            g_rk.sub_(self.teacher.weigh(tile, self.affinity, "e"))
        if self.contrastive is not None:
            pairs.own_diagonal(tile, g_rk).sub_(2 * self.contrastive)
        return g_rk


def _terms(pairs: Pairs, softmaxes: _Softmaxes, upstream: tuple[Tensor | None, ...], world: World) -> list[Term]:
    """Of world.size times the loss, since a data parallel wrapper averages gradients over ranks."""
    per_row = world.size / (2 * len(pairs.text))
    terms = []
    if softmaxes.affinity is not None and upstream[0] is not None:
        student, teacher = softmaxes.affinity
        terms = [Term(student, 2, teacher, affinity=per_row * student.scale * upstream[0])]
    if softmaxes.contrastive is not None and upstream[1] is not None:
        factor = per_row * softmaxes.contrastive.scale * upstream[1]
        if terms and terms[0].student is softmaxes.contrastive:
            return [terms[0]._replace(contrastive=factor)]
        terms.append(Term(softmaxes.contrastive, 3, contrastive=factor))
    return terms


def _gradients(
    pairs: Pairs, terms: list[Term], needs: tuple[bool, ...], world: World, fused: FusedTiles | None
) -> list[Tensor | None]:
    """For image, text, and the scales of affinity, contrastive and teacher; None where not needed."""
    can_fuse = not needs[4] and all(isinstance(term.student, ShiftedSums) for term in terms)
    compute = fused.gradients if fused is not None and can_fuse else _tiled_gradients
    d_image, d_text, d_scales = compute(pairs, terms, needs)
    if d_text is not None:
        d_text = world.scatter_sum(d_text, pairs.layout.counts)
    return [
        grad if needed else None for grad, needed in zip((d_image, d_text, *d_scales.values()), needs, strict=False)
    ]


def _tiled_gradients(
    pairs: Pairs, terms: list[Term], needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, dict[int, Tensor]]:
    """(d image, d text, d scale by its place among the inputs), not yet summed over ranks."""
    image, text = pairs.image, pairs.text
    by_euler = len(terms) == 1 and needs[terms[0].place]
    d_image = torch.zeros_like(image) if needs[0] or (by_euler and not needs[1]) else None
    d_text = torch.zeros_like(text) if needs[1] else None
    d_scales: dict[int, Tensor] = dict.fromkeys((2, 3, 4), image.new_zeros(()))
    for tile in pairs.tiles():
        g_rk = _tile_gradient(pairs, tile, terms, needs, d_scales)
        if d_image is not None:
            d_image[tile.rows].addmm_(g_rk, text[tile.columns])
        if d_text is not None:
            d_text[tile.columns].addmm_(g_rk.T, image[tile.rows])
    if by_euler:
        by_rows = [row_dots(x, dx) for x, dx in ((image, d_image), (text, d_text)) if dx is not None]
        d_scales[terms[0].place] = by_rows[0].sum() / terms[0].student.scale  # both sums are the same number
    return d_image, d_text, d_scales


def _tile_gradient(
    pairs: Pairs, tile: Tile, terms: list[Term], needs: tuple[bool, ...], d_scales: dict[int, Tensor]
) -> Tensor:
    """d loss / d cosine of one tile, and what of the scales' gradients is not Euler's: added to `d_scales`."""
    total_rk = None
    for term, out in zip(terms, ("gradient", "other gradient"), strict=False):
        g_rk = term.gradient(pairs, tile, out)
        if needs[term.place] and len(terms) > 1:
            d_scales[term.place] = d_scales[term.place] + _dot(g_rk, tile.cosines[0]) / term.student.scale
        if needs[4] and term.teacher is not None and term.affinity is not None:
            d_scales[4] = d_scales[4] - term.affinity * _covariance(term.teacher, tile)
        total_rk = g_rk if total_rk is None else total_rk.add_(g_rk)
    assert total_rk is not None, "no term"
    return total_rk


def _covariance(teacher: SoftmaxSums, tile: Tile) -> Tensor:
    """This tile's part of the covariances of student's and teacher's cosines under the teacher's softmaxes."""
    cosine_rk, target_rk = tile.cosines
    by_row_rk, by_column_rk = teacher.softmaxes(tile)
    mean_B, mean_N = (mean.to(cosine_rk.dtype) for mean in teacher.means(0))
    by_row_rk.mul_(cosine_rk - mean_B[tile.rows, None])
    by_column_rk.mul_(cosine_rk - mean_N[tile.columns])
    return _dot(by_row_rk.add_(by_column_rk), target_rk)


def _dot(a_rk: Tensor, b_rk: Tensor) -> Tensor:
    return torch.dot(a_rk.flatten(), b_rk.flatten())


def feature_loss(student_BT: Tensor, teacher_BT: Tensor, *, world: World = ALONE) -> Tensor:
    """1 - cosine similarity, averaged over rows; 0 where the student's (projected) embedding is the teacher's."""
    return world.mean(1 - F.cosine_similarity(student_BT, teacher_BT, dim=-1))
