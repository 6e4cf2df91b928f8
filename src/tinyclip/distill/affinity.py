"""Affinity mimicking: the student ranks the pairs of a batch the way the teacher does.

An affinity row is softmax(scale * image_i . text_j) over all texts j of the batch. The loss is the cross-entropy from
the teacher's rows to the student's, averaged over rows and over the two directions (image to text, text to image).
Source: Wu et al., "TinyCLIP", ICCV 2023, equations 2 to 4.

`affinity_loss_reference` is the definition. It keeps several B x B matrices for backward; `affinity_loss` visits
`rows_per_chunk` rows at a time, twice: once for the log-sums of rows and columns, once for the loss and, while the
chunk is in hand, its gradient. Nothing of size B x B is ever alive; both directions share each product.

Shape legend: B pairs, R rows in a chunk, E student embedding, T teacher embedding. Embeddings are unit vectors,
scales are 1 / temperature, losses are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def affinity_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor | float,
    teacher_image_BT: Tensor,
    teacher_text_BT: Tensor,
    teacher_scale: Tensor | float,
    *,
    rows_per_chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(loss, entropy), equal to `affinity_loss_reference` in O(rows_per_chunk x B) memory.

    `entropy` is that of the teacher's rows, without gradient: loss - entropy is a KL divergence, 0 where the student
    agrees. Gradients reach the student's embeddings and scale.
    """
    teacher = (teacher_image_BT.detach(), teacher_text_BT.detach(), teacher_scale)
    return _InBatchCrossEntropy.apply(image_BE, text_BE, _as_scale(scale, image_BE), teacher, rows_per_chunk)


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor | float, *, rows_per_chunk: int = 1024) -> Tensor:
    """CLIP's loss: the cross-entropy of each pair against the rest of the batch, both directions averaged."""
    return _InBatchCrossEntropy.apply(image_BE, text_BE, _as_scale(scale, image_BE), None, rows_per_chunk)[0]


def _as_scale(scale: Tensor | float, like: Tensor) -> Tensor:
    return scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=like.dtype, device=like.device)


class _InBatchCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy from target rows (the teacher's, or the identity) to the student's, in both directions.

    With p, q the row and column softmax of the student's scores s, and P, Q the teacher's:
    2 B loss = -sum_ij (P log p + Q log q)_ij,  and  2 B d loss / d s = p + q - P - Q.
    """

    @staticmethod
    def forward(ctx, image_BE, text_BE, scale, teacher, rows_per_chunk):  # type: ignore[override]
        with torch.autocast(image_BE.device.type, enabled=False):  # a bf16 score near 50 would be off by up to 0.125
            return _InBatchCrossEntropy._forward(ctx, image_BE, text_BE, scale, teacher, rows_per_chunk)

    @staticmethod
    def _forward(ctx, image_BE, text_BE, scale, teacher, rows_per_chunk):
        at_least = torch.promote_types(image_BE.dtype, torch.float32)
        x_BE, y_BE, tau = image_BE.to(at_least), text_BE.to(at_least), scale.to(at_least)
        B = len(x_BE)
        student = _Scores(x_BE, y_BE, tau, rows_per_chunk)
        target = None
        if teacher is not None:
            teacher_x_BT, teacher_y_BT, teacher_scale = teacher
            target = _Scores(teacher_x_BT.to(at_least), teacher_y_BT.to(at_least), teacher_scale, rows_per_chunk)
        loss, entropy = x_BE.new_zeros(()), x_BE.new_zeros(())
        grad_x_BE, grad_y_BE, grad_tau = torch.zeros_like(x_BE), torch.zeros_like(y_BE), torch.zeros_like(tau)
        for start in range(0, B, rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            log_p_RB, log_q_RB = student.log_softmax(rows)
            g_RB = log_p_RB.exp() + log_q_RB.exp()
            if target is None:
                loss -= log_p_RB.diagonal(start).sum() + log_q_RB.diagonal(start).sum()
                g_RB.diagonal(start).sub_(2)
            else:
                for log_student_RB, log_target_RB in zip((log_p_RB, log_q_RB), target.log_softmax(rows), strict=True):
                    target_RB = log_target_RB.exp()
                    loss -= (target_RB * log_student_RB).sum()
                    entropy -= (target_RB * log_target_RB).sum()
                    g_RB -= target_RB
            if any(ctx.needs_input_grad):
                g_y_RE = g_RB @ y_BE
                grad_x_BE[rows] = tau * g_y_RE
                grad_y_BE += tau * (g_RB.T @ x_BE[rows])
                grad_tau += (x_BE[rows] * g_y_RE).sum()  # sum_ij g_ij x_i . y_j
        inputs = (image_BE, text_BE, scale)
        grads = (grad_x_BE, grad_y_BE, grad_tau)
        ctx.save_for_backward(*((grad / (2 * B)).to(x.dtype) for grad, x in zip(grads, inputs, strict=True)))
        entropy /= 2 * B
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return loss / (2 * B), entropy

    @staticmethod
    def backward(ctx, grad_loss, _grad_entropy):  # type: ignore[override]
        if grad_loss is None:
            return None, None, None, None, None
        return *((grad_loss * grad).to(grad.dtype) for grad in ctx.saved_tensors), None, None


class _Scores:
    """scale * x y^T of one model, a chunk of rows at a time, normalised by the log-sums of all its rows and columns."""

    def __init__(self, x_BE: Tensor, y_BE: Tensor, scale: Tensor | float, rows_per_chunk: int):
        self.x_BE, self.y_BE, self.scale = x_BE, y_BE, scale
        row_lse, self.column_lse_B = [], x_BE.new_full((len(y_BE),), -torch.inf)
        for start in range(0, len(x_BE), rows_per_chunk):
            s_RB = self._chunk(slice(start, start + rows_per_chunk))
            row_lse.append(s_RB.logsumexp(1))
            self.column_lse_B = torch.logaddexp(self.column_lse_B, s_RB.logsumexp(0))
        self.row_lse_B = torch.cat(row_lse)

    def _chunk(self, rows: slice) -> Tensor:
        return self.scale * (self.x_BE[rows] @ self.y_BE.T)

    def log_softmax(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(over the texts of each row, over the images of each column), for these rows."""
        s_RB = self._chunk(rows)
        return s_RB - self.row_lse_B[rows, None], s_RB - self.column_lse_B


def feature_loss(student_BT: Tensor, teacher_BT: Tensor) -> Tensor:
    """1 - cosine similarity, averaged over rows; 0 where the student's (projected) embedding is the teacher's."""
    return 1 - F.cosine_similarity(student_BT, teacher_BT, dim=-1).mean()
