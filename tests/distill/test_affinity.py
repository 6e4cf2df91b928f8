"""The chunked affinity loss equals its definition and the official numbers: value and gradients, any chunk size."""

import pytest
import torch
from safetensors.torch import load_file

from tinyclip.distill.affinity import affinity_loss, affinity_loss_reference, contrastive_loss, feature_loss


def make_batch(pairs=37, student_dim=8, teacher_dim=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def unit(dim):
        return torch.nn.functional.normalize(torch.randn(pairs, dim, generator=generator, dtype=dtype), dim=-1)

    student = [unit(student_dim), unit(student_dim), torch.tensor(20.0, dtype=dtype)]
    teacher = [unit(teacher_dim), unit(teacher_dim), torch.tensor(50.0, dtype=dtype)]
    return [tensor.requires_grad_() for tensor in student] + teacher


@pytest.mark.parametrize("rows_per_chunk", [1, 8, 36, 37, 1000])  # 37 = 4 x 8 + 5: the last chunk is short
def test_chunked_equals_the_definition(rows_per_chunk):
    ours, theirs = make_batch(), make_batch()
    loss, _ = affinity_loss(*ours, rows_per_chunk=rows_per_chunk)
    expected = affinity_loss_reference(*theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_equals_the_official_loss_and_gradients(shared, case):
    golden = load_file(shared / "golden" / "affinity.safetensors")
    names = ("student_image", "student_text", "student_scale", "teacher_image", "teacher_text", "teacher_scale")
    inputs = [golden[f"{case}/{name}"].clone() for name in names]
    for tensor in inputs[:3]:
        tensor.requires_grad_()
    loss, _ = affinity_loss(*inputs, rows_per_chunk=5)
    loss.backward()
    torch.testing.assert_close(loss, golden[f"{case}/loss_mean"], rtol=0, atol=1e-12)
    for name, tensor in zip(names[:3], inputs[:3], strict=True):
        torch.testing.assert_close(tensor.grad, golden[f"{case}/grad_{name}"], rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences():
    batch = make_batch(pairs=5, student_dim=3, teacher_dim=4)
    assert torch.autograd.gradcheck(lambda *b: affinity_loss(*b, rows_per_chunk=4)[0], batch)
    assert torch.autograd.gradcheck(lambda *b: contrastive_loss(*b, rows_per_chunk=2), batch[:3])


def test_contrastive_equals_cross_entropy_with_the_diagonal():
    image, text, scale, *_ = make_batch()
    expected = image.new_zeros(())
    for scores in (scale * image @ text.T, scale * text @ image.T):
        expected = expected + torch.nn.functional.cross_entropy(scores, torch.arange(len(scores))) / 2
    torch.testing.assert_close(contrastive_loss(image, text, scale, rows_per_chunk=8), expected, rtol=1e-12, atol=0)


def test_the_teacher_as_student_has_zero_divergence_and_zero_gradient():
    image, text, scale, *_ = make_batch()
    loss, entropy = affinity_loss(image, text, scale, image, text, scale.detach())
    loss.backward()
    assert abs(loss.item() - entropy.item()) < 1e-13
    assert image.grad.abs().max() < 1e-15 and text.grad.abs().max() < 1e-15 and abs(scale.grad) < 1e-15


def test_entropy_by_eye():
    """Two pairs that the teacher cannot tell apart: every row is (1/2, 1/2), the entropy is ln 2."""
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss, entropy = affinity_loss(same, same, 50.0, same, same, 50.0)
    assert entropy.item() == pytest.approx(torch.tensor(2.0).log().item()) == loss.item()


def test_scores_stay_fp32_under_autocast():
    batch = make_batch(dtype=torch.float32)
    expected = affinity_loss(*batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = affinity_loss(*batch)
    assert loss.dtype == torch.float32 and loss.item() == expected.item()


@pytest.mark.parametrize("loss, expected", [(affinity_loss_reference, 4), (lambda *b: affinity_loss(*b)[0], 0)])
def test_nothing_of_batch_squared_is_kept_for_backward(loss, expected):
    saved, pairs = {}, 256

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(*make_batch(pairs))
    assert sum(count == pairs * pairs for count in saved.values()) == expected
    assert result.requires_grad


def test_feature_loss_is_zero_for_parallel_rows_and_two_for_opposite_ones():
    rows = torch.randn(4, 3)
    assert feature_loss(2 * rows, rows).item() == pytest.approx(0, abs=1e-6)
    assert feature_loss(-rows, rows).item() == pytest.approx(2, abs=1e-6)
