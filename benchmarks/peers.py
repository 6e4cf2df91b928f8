"""What others compute for the same loss, written anew in a few lines each; `loss.py` checks them equal and times them.

Each takes (image, text, scale, teacher's image, teacher's text, teacher's scale) and returns the sum
of the losses that it is named for.
`open_clip_distill` is open_clip's own class where it can be imported.

Shape legend: N pairs, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def official_soft(image, text, scale, teacher_image, teacher_text, teacher_scale) -> Tensor:
    """Affinity as in TinyCLIP, src/open_clip/clip_soft_loss.py, on one device: each direction on its own."""
    loss = image.new_zeros(())
    directions = ((image, text, teacher_image, teacher_text), (text, image, teacher_text, teacher_image))
    for x_NE, y_NE, teacher_x_NE, teacher_y_NE in directions:
        student_NN = scale * (x_NE @ y_NE.T)
        teacher_NN = teacher_scale * (teacher_x_NE @ teacher_y_NE.T)
        loss = loss + F.cross_entropy(student_NN, F.softmax(teacher_NN, -1))
    return loss / 2


def contrastive(image, text, scale) -> Tensor:
    """CLIP's loss as in open_clip, src/open_clip/loss.py (ClipLoss), on one device."""
    own = torch.arange(len(image), device=image.device)
    image_to_text, text_to_image = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(image_to_text, own) + F.cross_entropy(text_to_image, own)) / 2


def official_both(image, text, scale, *teacher) -> Tensor:
    """Affinity and contrastive loss as TinyCLIP adds them up: two losses that share nothing."""
    return official_soft(image, text, scale, *teacher) + contrastive(image, text, scale)


def open_clip_distill(image, text, scale, teacher_image, teacher_text, teacher_scale) -> Tensor:
    """open_clip's DistillClipLoss: affinity and contrastive loss from the same scores, each direction on its own."""
    from open_clip.loss import DistillClipLoss

    return sum(DistillClipLoss()(image, text, scale, teacher_image, teacher_text, teacher_scale))


def one_matrix(image, text, scale, teacher_image, teacher_text, teacher_scale) -> Tensor:
    """Affinity from one student and one teacher matrix: the fewest products (4), for N x N matrices that are kept."""
    student_NN, teacher_NN = scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T
    loss = image.new_zeros(())
    for student, teacher in ((student_NN, teacher_NN), (student_NN.T, teacher_NN.T)):
        loss = loss + F.cross_entropy(student, teacher.softmax(-1))
    return loss / 2


def row_chunks(image, text, scale, teacher_image, teacher_text, teacher_scale, rows: int = 1024) -> Tensor:
    """Affinity in checkpointed chunks of rows, one direction after the other."""

    def chunk(x_RE, y_NE, teacher_x_RE, teacher_y_NE):
        target_RN = (teacher_scale * teacher_x_RE @ teacher_y_NE.T).softmax(-1)
        return F.cross_entropy(scale * x_RE @ y_NE.T, target_RN, reduction="sum")

    loss = image.new_zeros(())
    directions = ((image, text, teacher_image, teacher_text), (text, image, teacher_text, teacher_image))
    for x, y, teacher_x, teacher_y in directions:
        for x_RE, teacher_x_RE in zip(x.split(rows), teacher_x.split(rows), strict=True):
            loss = loss + checkpoint(chunk, x_RE, y, teacher_x_RE, teacher_y, use_reentrant=False)
    return loss / (2 * len(image))
