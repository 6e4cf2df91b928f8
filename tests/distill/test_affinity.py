"""The tiled losses equal their definition and the official numbers: value and gradients, for any tile and any scores.

Also what they cost: the products of N x N x E, the tiles that stay for backward, the peak of memory. CPU only.
"""

from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tinyclip.distill import affinity
from tinyclip.distill.affinity import (
    affinity_and_contrastive_loss,
    affinity_loss,
    affinity_loss_reference,
    contrastive_loss,
    feature_loss,
)
from tinyclip.distill.softmax_sums import RunningSums


def make_batch(pairs=37, student_dim=8, teacher_dim=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def unit(dim):
        return torch.nn.functional.normalize(torch.randn(pairs, dim, generator=generator, dtype=dtype), dim=-1)

    student = [unit(student_dim), unit(student_dim), torch.tensor(20.0, dtype=dtype)]
    teacher = [unit(teacher_dim), unit(teacher_dim), torch.tensor(50.0, dtype=dtype)]
    return [tensor.requires_grad_() for tensor in student] + teacher


@pytest.mark.parametrize("tile", [1, 8, 36, 37, 1000])  # 37 = 4 x 8 + 5: the last chunk is short
def test_chunked_equals_the_definition(tile):
    ours, theirs = make_batch(), make_batch()
    loss, _ = affinity_loss(*ours, tile=tile)
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
    loss, _ = affinity_loss(*inputs, tile=5)
    loss.backward()
    torch.testing.assert_close(loss, golden[f"{case}/loss_mean"], rtol=0, atol=1e-12)
    for name, tensor in zip(names[:3], inputs[:3], strict=True):
        torch.testing.assert_close(tensor.grad, golden[f"{case}/grad_{name}"], rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences():
    batch = [x.requires_grad_(x.ndim == 0 or not i > 2) for i, x in enumerate(make_batch(5, 3, 4))]
    assert torch.autograd.gradcheck(lambda *b: affinity_loss(*b, tile=4)[0], batch)
    assert torch.autograd.gradcheck(lambda *b: contrastive_loss(*b, tile=2), batch[:3])
    image, text, scale, *teacher = batch
    contrastive_scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *b: combined(*b, tile=3), (image, text, scale, contrastive_scale, *teacher))


def contrastive_reference(image, text, scale):
    own = torch.arange(len(image))
    scores = scale * image @ text.T
    return sum(torch.nn.functional.cross_entropy(s, own) for s in (scores, scores.T)) / 2


def combined(*inputs, **how):
    losses = affinity_and_contrastive_loss(*inputs, **how)
    return 0.7 * losses.affinity + 0.3 * losses.contrastive


def combined_reference(image, text, scale, contrastive_scale, *teacher):
    return 0.7 * affinity_loss_reference(image, text, scale, *teacher) + 0.3 * contrastive_reference(
        image, text, contrastive_scale
    )


def value_and_grads(loss, inputs, **how):
    """In fp64; zeros where an input has no gradient."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    value = loss(*inputs, **how)
    value.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
    return [x.detach().double() for x in (value, *grads)]


def combined_batch(pairs=37, *, scale=20.0, contrastive_scale=14.0, teacher_scale=50.0):
    """Everything learns but the teacher's embeddings."""
    image, text, _, teacher_image, teacher_text, _ = make_batch(pairs)
    scales = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scale, contrastive_scale)]
    teacher_scale = torch.tensor(teacher_scale, dtype=torch.float64, requires_grad=True)
    return [image, text, *scales, teacher_image, teacher_text, teacher_scale]


def assert_equal(actual, expected, rtol=1e-10):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("pairs", [1, 2, 37])
@pytest.mark.parametrize("tile", [1, 16, None])
def test_both_losses_at_once_equal_their_definitions(pairs, tile):
    """Every gradient, of all three scales too."""
    batch = combined_batch(pairs)
    assert_equal(value_and_grads(combined, batch, tile=tile), value_and_grads(combined_reference, batch))


@pytest.mark.parametrize("needed", range(32))
def test_a_frozen_input_has_no_gradient_and_the_others_keep_theirs(needed):
    batch = combined_batch(9)
    learn = [bool(needed >> i & 1) for i in range(5)]
    for x, learns in zip([*batch[:4], batch[6]], learn, strict=True):
        x.requires_grad_(learns)
    if not any(learn):
        assert not combined(*batch).requires_grad
    else:
        assert_equal(value_and_grads(combined, batch, tile=4), value_and_grads(combined_reference, batch))


@pytest.mark.parametrize("needed", range(1, 8))
def test_with_one_scale_a_frozen_tower_leaves_the_scales_gradient(needed):
    """Euler's identity reads it off the other tower."""
    batch = [x.detach().requires_grad_(bool(needed >> i & 1)) for i, x in enumerate(make_batch(9))]
    assert_equal(
        value_and_grads(lambda *b: affinity_loss(*b, tile=4)[0], batch), value_and_grads(affinity_loss_reference, batch)
    )


def test_a_shared_scale_gets_the_gradient_of_both_losses():
    image, text, scale, _, *teacher = combined_batch()

    def shared(loss, **how):
        return lambda image, text, scale, *teacher: loss(image, text, scale, scale, *teacher, **how)

    inputs = (image, text, scale, *teacher)
    assert_equal(
        value_and_grads(shared(combined, tile=16), inputs), value_and_grads(shared(combined_reference), inputs)
    )


def test_a_loss_that_is_not_used_adds_no_gradient():
    batch = combined_batch()
    affinity_only = value_and_grads(lambda *b: affinity_and_contrastive_loss(*b).affinity, batch)
    contrastive_only = value_and_grads(lambda *b: affinity_and_contrastive_loss(*b).contrastive, batch)
    image, text, scale, contrastive_scale, *teacher = batch
    expected = value_and_grads(lambda *b: affinity_loss(*b)[0], [image, text, scale, *teacher])
    assert_equal([x for i, x in enumerate(affinity_only) if i != 4], expected)
    expected = value_and_grads(contrastive_loss, [image, text, contrastive_scale])
    assert_equal([contrastive_only[i] for i in (0, 1, 2, 4)], expected)


def anti_aligned_batch(scale):
    """All images near one direction, all texts near its opposite: every score is near -scale."""
    batch = combined_batch(scale=scale, contrastive_scale=scale / 3, teacher_scale=scale)
    for place, sign in ((0, 1), (1, -1), (4, 1), (5, -1)):
        rows = torch.ones_like(batch[place]) + batch[place].detach()
        batch[place] = (sign * torch.nn.functional.normalize(rows, dim=-1)).requires_grad_(place < 2)
    return batch


@pytest.fixture
def running_sums(monkeypatch):
    """Those that were made so far."""
    made = []

    class Watched(RunningSums):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(affinity, "RunningSums", Watched)
    return made


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_anti_aligned_rows_at_large_scales_are_exact(scale, dtype, tolerance, running_sums):
    """In fp32 the constant shift rounds whole rows to 0 here, so maxima run along."""
    batch = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in anti_aligned_batch(scale)]
    expected = value_and_grads(combined_reference, [x.detach().double().requires_grad_(x.requires_grad) for x in batch])
    assert_equal(value_and_grads(combined, batch, tile=16), expected, rtol=tolerance * scale / 100)
    assert bool(running_sums) == (dtype == torch.float32 or scale == 1000)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_trusted_inputs_give_the_same_numbers(scale, dtype, tolerance, running_sums):
    """The largest scale that a tensor may be decides the shift."""
    batch = combined_batch(scale=scale, contrastive_scale=scale / 3, teacher_scale=scale)
    low = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in batch]
    expected = value_and_grads(combined_reference, [x.detach().double().requires_grad_(x.requires_grad) for x in low])
    assert_equal(value_and_grads(combined, low, tile=16, trusted=True), expected, rtol=tolerance)
    assert not running_sums


def test_where_trust_is_misplaced_the_loss_is_not_finite(running_sums):
    """Never a number that is wrong: a step with such a loss is skipped."""
    image, text, *_ = (x.detach().float() for x in anti_aligned_batch(100.0))
    for scale in (100.0, torch.tensor(100.0)):
        assert not contrastive_loss(image, text, scale, trusted=True).isfinite()
    assert not contrastive_loss(30 * image, -text, 10.0, trusted=True).isfinite(), "long rows"
    assert not running_sums
    expected = contrastive_reference(image.double(), text.double(), 1000.0)
    torch.testing.assert_close(
        contrastive_loss(image, text, 1000.0, trusted=True).double(), expected, rtol=0, atol=1e-4
    )
    assert running_sums, "no CLIP has such a scale, so sums are looked at"


def test_the_constant_shift_serves_unit_rows_up_to_the_largest_learned_scale(running_sums):
    image, text, _, *teacher = make_batch(300, 32, 48, dtype=torch.float32)
    for scale in (1.0, 50.0, 100.0):
        affinity_loss(image, text, scale, *teacher[:2], scale)
        assert not running_sums
    affinity_loss(3 * image, text, 1.0, *teacher)
    assert running_sums, "long rows"


def test_rows_that_are_not_unit_vectors_are_exact_too():
    batch = combined_batch()
    lengths = torch.linspace(0.1, 9, 37, dtype=torch.float64)[:, None]
    batch[0], batch[1] = ((x.detach() * lengths).requires_grad_() for x in batch[:2])
    assert_equal(value_and_grads(combined, batch, tile=16), value_and_grads(combined_reference, batch))


@pytest.mark.parametrize("scale", [50.0, 100.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_the_error_of_low_precision_inputs_is_that_of_their_rounding(scale, dtype, tolerance):
    """Against the fp64 definition on the rounded inputs; bf16 gradients are rounded to bf16 (4e-3) at the end.

    A scale's gradient is a sum of N x N numbers that nearly cancel: 10 times the share.
    """
    batch = combined_batch(257, scale=scale, contrastive_scale=scale, teacher_scale=scale)
    low = [x.detach().to(dtype if x.ndim else torch.float32).requires_grad_(x.requires_grad) for x in batch]
    expected = value_and_grads(combined_reference, [x.detach().double().requires_grad_(x.requires_grad) for x in low])
    actual = value_and_grads(combined, low, tile=100)
    assert abs(actual[0] - expected[0]) < 3e-6 * expected[0]
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert (a - b).norm() <= tolerance * b.norm() * (1 if a.ndim else 10)


def test_rows_need_not_lie_together_in_memory():
    batch = combined_batch()
    spread = [torch.stack((x, x), -1)[..., 0].detach().requires_grad_(x.requires_grad) for x in batch]
    assert not spread[0].is_contiguous()
    assert_equal(value_and_grads(combined, spread, tile=16), value_and_grads(combined_reference, batch))


def test_two_runs_give_the_same_bits():
    batch = [x.detach().float().requires_grad_(x.requires_grad) for x in combined_batch(300)]
    first, second = (value_and_grads(combined, batch, tile=64) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_can_be_run_again_but_has_no_second_derivative():
    image, *rest = make_batch()
    loss, _ = affinity_loss(image, *rest, tile=16)
    (first,) = torch.autograd.grad(loss, image, retain_graph=True)
    (again,) = torch.autograd.grad(loss, image, create_graph=True)
    assert torch.equal(first, again)
    assert not again.requires_grad


def test_contrastive_equals_cross_entropy_with_the_diagonal():
    image, text, scale, *_ = make_batch()
    expected = contrastive_reference(image, text, scale)
    torch.testing.assert_close(contrastive_loss(image, text, scale, tile=8), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({1: torch.ones(4, 8)}, "expected a text embedding for each of 37 images, got 4"),
        ({4: torch.ones(36, 12)}, "expected a teacher's text embedding for each of 37 images, got 36"),
        ({2: 0.0}, "expected scales above 0, got 0"),
        ({5: torch.tensor(-50.0)}, "expected scales above 0, got -50"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(change, message):
    batch = dict(enumerate(make_batch())) | change
    with pytest.raises(ValueError, match=message):
        affinity_loss(*batch.values())
    with pytest.raises(ValueError, match="tile: expected at least 1 row, got 0"):
        affinity_loss(*make_batch(), tile=0)


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
    def both(batch):
        image, text, scale, *teacher = batch
        return affinity_and_contrastive_loss(image, text, scale, 14.0, *teacher)

    batch = make_batch(dtype=torch.float32)
    expected = both(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = both(batch)
    assert all(loss.dtype == torch.float32 for loss in losses) and losses == expected


@pytest.mark.parametrize(
    "loss, expected",
    [
        (affinity_loss_reference, 4),
        (lambda *b: affinity_loss(*b)[0], 2),  # one tile holds the batch: its products are kept
        (lambda *b: affinity_loss(*b, tile=100)[0], 0),
    ],
)
def test_nothing_of_batch_squared_is_kept_for_backward(loss, expected):
    saved, pairs = {}, 256

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(*make_batch(pairs))
    assert sum(count == pairs * pairs for count in saved.values()) == expected
    assert result.requires_grad


class CountProducts(TorchDispatchMode):
    """Multiply-adds of matrix products."""

    macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_", "addmm", "bmm"):
            a, b = args[-2:]
            if name != "bmm":  # that is a dot product of rows: N x E
                self.macs += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "loss, products",
    [
        (lambda i, t, s, c, *teacher: affinity_loss(i, t, s, *teacher, tile=16)[0], 6),
        (lambda *b: combined(*b, tile=16), 6),
        (lambda i, t, s, c, *_: contrastive_loss(i, t, c, tile=16), 4),
        (combined, 4),  # one tile, kept
    ],
)
def test_the_products_of_a_loss_and_its_gradient(loss, products):
    N, E = 64, 8
    units = [torch.nn.functional.normalize(torch.randn(N, E), dim=-1).requires_grad_(i < 2) for i in range(4)]
    with CountProducts() as count:
        loss(*units[:2], 20.0, 14.0, *units[2:], 50.0).backward()
    assert count.macs == products * N * N * E


def peak_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def peak_of(loss):
    """Of forward and backward; in a process of its own, since memory that was freed before would not show."""
    batch = make_batch(4096, 16, 16, dtype=torch.float32)
    loss(*make_batch(64, 16, 16, dtype=torch.float32)).backward()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    loss(*batch).backward()
    return peak_bytes() - before


def in_tiles(*batch):
    return affinity_loss(*batch, tile=256)[0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone resets the peak of a process")
def test_peak_memory_is_linear_in_the_batch():
    """At 4,096 pairs one N x N matrix is 67 MB: the definition needs several, the tiles 2 MB and the gradients 1 MB."""
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        dense, tiled = (pool.apply(peak_of, (loss,)) for loss in (affinity_loss_reference, in_tiles))
    assert dense > 4 * 67e6 and tiled < 20e6


def test_feature_loss_is_zero_for_parallel_rows_and_two_for_opposite_ones():
    rows = torch.randn(4, 3)
    assert feature_loss(2 * rows, rows).item() == pytest.approx(0, abs=1e-6)
    assert feature_loss(-rows, rows).item() == pytest.approx(2, abs=1e-6)
