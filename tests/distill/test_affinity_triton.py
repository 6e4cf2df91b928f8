"""The Triton kernels equal the definition: value and gradients, for any sizes, types, scales and ranks. CPU only.

On a CPU they run in Triton's interpreter, which must be chosen before Triton is imported. So two processes of their own
(the ranks of one world, see `main`) compute all cases, and the tests compare what those wrote.
"""

import os
import subprocess
import sys
from datetime import timedelta
from itertools import product
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tinyclip.distill.affinity import (
    affinity_and_contrastive_loss,
    affinity_loss,
    affinity_loss_reference,
    contrastive_loss,
)
from tinyclip.distributed import world

UPSTREAM = 7.0  # a loss weight, a gradient scaler
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


# Each loss takes images and texts of student and teacher, and three scales: the student's, the contrastive's, the
# teacher's. `how` says how to compute it; without, it is the definition.
def soft(image, text, teacher_image, teacher_text, scale, _, teacher_scale, **how):
    inputs = (image, text, scale, teacher_image, teacher_text, teacher_scale)
    return affinity_loss(*inputs, **how)[0] if how else affinity_loss_reference(*inputs)


def hard(image, text, _image, _text, _, scale, _scale, **how):
    if how:
        return contrastive_loss(image, text, scale, **how)
    scores, own = scale * image @ text.T, torch.arange(len(image), device=image.device)
    return sum(torch.nn.functional.cross_entropy(x, own) for x in (scores, scores.T)) / 2


def both(image, text, teacher_image, teacher_text, scale, other_scale, teacher_scale, **how):
    inputs = (image, text, teacher_image, teacher_text, scale, other_scale, teacher_scale)
    if not how:
        return 0.6 * soft(*inputs) + 0.4 * hard(*inputs)
    losses = affinity_and_contrastive_loss(
        image, text, scale, other_scale, teacher_image, teacher_text, teacher_scale, **how
    )
    return 0.6 * losses.affinity + 0.4 * losses.contrastive


def one_scale(image, text, teacher_image, teacher_text, scale, _, teacher_scale, **how):
    return both(image, text, teacher_image, teacher_text, scale, scale, teacher_scale, **how)


LOSSES = {loss.__name__: loss for loss in (soft, hard, both, one_scale)}


class Case(NamedTuple):
    loss: str
    N: int = 37
    E: int = 24
    scale: float = 50.0
    tile: int | None = None
    student: torch.dtype = FP32
    teacher: torch.dtype = FP32
    needs: str = "image text scale contrastive_scale"
    rows: str = "unit"
    trusted: bool = False


NEEDS = ("image text", "image", "text", "scale contrastive_scale", "image text scale contrastive_scale teacher_scale")
SIZES = [
    (1, 8, 50.0),
    (1, 24, 100.0),
    (37, 8, 100.0),
    (37, 24, 50.0),
    (37, 40, 100.0),
    (130, 8, 50.0),
    (130, 40, 100.0),
]
CASES = [
    *(Case(loss, *size) for loss, size in product(LOSSES, SIZES)),
    *(Case(loss, 130, tile=50) for loss in LOSSES),  # 50, 50, 30: a tile is less than a block
    Case("both", 160, tile=140),  # a tile of 3 x 2 blocks, and a rest of 20
    *(Case(loss, student=dtype, teacher=dtype) for loss in ("both", "one_scale") for dtype in (BF16, FP16)),
    *(Case("both", student=FP32, teacher=FP16, scale=scale) for scale in (50.0, 100.0)),
    *(Case("both", 20, needs=needs) for needs in NEEDS),
    *(Case("soft", 20, needs=needs) for needs in NEEDS),
    *(Case("both", rows=rows) for rows in ("spread", "long")),
    *(Case("both", rows="opposite", scale=scale) for scale in (100.0, 1000.0)),
    Case("both", rows="opposite", scale=1000.0, student=BF16),
    *(Case(loss, scale=scale, trusted=True) for loss in ("one_scale", "both") for scale in (10.0, 100.0)),
]
AGAIN = CASES.index(Case("both", 160, tile=140))
COUNTS = (5, 8)  # pairs on each rank
RANK_CASES = [Case(loss, N=sum(COUNTS), rows=rows) for loss, rows in product(LOSSES, ("unit", "long"))]


def unit(rows, columns, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


def inputs_of(case, device="cpu"):
    """Images and texts of student and teacher, then three scales, with gradients where the case needs them."""
    embeddings = [unit(case.N, size, seed) for seed, size in enumerate((case.E, case.E, case.E + 7, case.E + 7))]
    if case.rows == "long":
        embeddings[0][0] *= 3  # one row of one rank
    if case.rows == "opposite":  # every score is near -scale
        embeddings = [
            sign * torch.nn.functional.normalize(1 + 0.1 * x, dim=-1)
            for sign, x in zip((1, -1, 1, -1), embeddings, strict=True)
        ]
    types = (case.student, case.student, case.teacher, case.teacher)
    embeddings = [x.to(device, dtype) for x, dtype in zip(embeddings, types, strict=True)]
    if case.rows == "spread":
        embeddings = [torch.stack((x, x), -1)[..., 0] for x in embeddings]
    scales = [torch.tensor(x, device=device) for x in (case.scale, case.scale / 3, case.scale)]
    names = ("image", "text", "", "", "scale", "contrastive_scale", "teacher_scale")
    return [x.requires_grad_(name in case.needs.split()) for x, name in zip((*embeddings, *scales), names, strict=True)]


def value_and_grads(loss, inputs, **how):
    """[value, gradients of image, text and the three scales; zeros where there is none], in fp64."""
    value = loss(*inputs, **how)
    (UPSTREAM * value).backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*inputs[:2], *inputs[4:])]
    return [x.detach().double().cpu() for x in (value, *grads)]


def by_definition(case):
    """In fp64, of the inputs as they were rounded."""
    inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs_of(case)]
    return value_and_grads(LOSSES[case.loss], inputs)


def by_kernels(case, device="cpu"):
    how = {"tile": case.tile, "trusted": case.trusted, "kernel": "triton"}
    return value_and_grads(LOSSES[case.loss], inputs_of(case, device), **how)


def assert_equal(case, actual, expected):
    """fp32 scores near the scale are off by 2^-24 of it, and so their exponentials; bf16 rounds gradients at the end.

    Gradients are compared by their norm. A scale's is a sum of N x N numbers that nearly cancel: 10 times the share.
    """
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-7 * case.scale)
    share = 1e-2 if case.student != FP32 else 6e-8 * case.scale
    for a, b in zip(actual[1:], expected[1:], strict=True):
        norm = max(b.norm(), UPSTREAM * case.scale / case.N) if a.ndim else 10 * max(b.abs(), 1)
        assert (a - b).norm() <= share * norm


def main(folder, rank):
    """One of two ranks: writes what the rank cases gave, and the first what all others gave."""
    from tinyclip.distill.affinity_triton import FusedTiles

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    where, seen = world(), {}
    for i, case in enumerate(RANK_CASES):
        inputs = inputs_of(case)
        mine = [x.detach()[where.own(COUNTS)].requires_grad_(x.requires_grad) for x in inputs[:4]]
        results = value_and_grads(LOSSES[case.loss], [*mine, *inputs[4:]], world=where, kernel="triton")
        seen |= numbered(f"rank case {i}", results)
    where.barrier()
    dist.destroy_process_group()
    for i, case in enumerate(CASES if rank == 0 else ()):
        with patch.object(FusedTiles, "gradients", autospec=True, side_effect=FusedTiles.gradients) as gradients:
            seen |= numbered(f"case {i}", by_kernels(case))
        seen[f"case {i}, fused"] = torch.tensor(gradients.call_count)
    seen |= numbered("again", by_kernels(CASES[AGAIN]))
    save_file(seen, f"{folder}/{rank}.safetensors")


def numbered(name, tensors):
    return {f"{name}, {i}": x for i, x in enumerate(tensors)}


def listed(seen, name):
    return [seen[f"{name}, {i}"] for i in range(6)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks wrote."""
    pytest.importorskip("triton", reason="needs Triton")
    folder = tmp_path_factory.mktemp("interpreted")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    how = {"env": environment, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank)], **how) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: " ".join(map(str, CASES[i])))
def test_value_and_gradients_equal_the_definition(ranks, i):
    assert_equal(CASES[i], listed(ranks[0], f"case {i}"), by_definition(CASES[i]))


def test_torch_computes_the_tiles_only_where_said(ranks):
    """Rows that are not unit vectors, scores all near -scale, and a teacher's scale that learns."""
    for i, case in enumerate(CASES):
        by_torch = case.rows in ("long", "opposite") or "teacher_scale" in case.needs
        assert ranks[0][f"case {i}, fused"] == (0 if by_torch else 1), case


@pytest.mark.parametrize("i", range(len(RANK_CASES)), ids=lambda i: " ".join(map(str, RANK_CASES[i])))
def test_two_ranks_equal_one_process_with_all_pairs(ranks, i):
    """Each has the value of all, and twice its part of the gradient, which a data parallel wrapper averages."""
    results = [listed(seen, f"rank case {i}") for seen in ranks]
    assert torch.equal(results[0][0], results[1][0])
    embeddings = [torch.cat(parts) / 2 for parts in zip(*(x[1:3] for x in results), strict=True)]
    scales = [sum(parts) / 2 for parts in zip(*(x[3:] for x in results), strict=True)]
    assert_equal(RANK_CASES[i], [results[0][0], *embeddings, *scales], by_definition(RANK_CASES[i]))


def test_two_runs_give_the_same_bits(ranks):
    first, second = listed(ranks[0], f"case {AGAIN}"), listed(ranks[0], "again")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


TYPES = {  # of the kernels' arguments, where they are not *fp32
    **dict.fromkeys(("image", "text", "teacher_image", "teacher_text", "gradient"), "*bf16"),
    **dict.fromkeys(("E", "T", "r", "k", "B", "N", "own_offset"), "i32"),
    **{f"{of}{name}": "fp32" for of in ("", "other_", "teacher_") for name in ("scale", "shift")},
    **dict.fromkeys(("OTHER", "TEACHER", "R", "K", "STEP", "TEACHER_STEP"), "constexpr"),
}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", ["_sum_tile", "_gradient_tile"])
def test_the_kernels_compile_for_gpus_and_fit_their_shared_memory(name, monkeypatch, tmp_path):
    """For an H100 or H200 (sm_90), in the 99 KB that a block has at most at compute capability 8.9."""
    triton = pytest.importorskip("triton", reason="needs Triton")
    from tinyclip.distill import affinity_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    steps = dict.fromkeys(("STEP", "TEACHER_STEP"), kernels.ROW_BYTES // 2)
    constants = {"OTHER": 1, "TEACHER": 1, "R": kernels.R, "K": kernels.K, **steps}
    types = {name: TYPES.get(name, "*fp32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, types, constexprs=constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": kernels.NUM_WARPS})
    assert "mma" in compiled.asm["ptx"], "on tensor cores"
    assert compiled.metadata.shared <= 99 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_kernels_equal_the_definition():
    for case in CASES:
        assert_equal(case, by_kernels(case, "cuda"), by_definition(case))


def refusal(inputs, **how):
    with pytest.raises(ValueError) as error:
        soft(*inputs, **how)
    return str(error.value)


def test_what_the_kernels_cannot_take_is_refused(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton")
    inputs = inputs_of(Case("soft"))
    assert refusal(inputs, kernel="cuda") == "kernel: expected torch or triton, got 'cuda'"
    assert "kernel 'triton': expected embeddings on a GPU, got cpu" in refusal(inputs, kernel="triton")
    exact = [x.detach().double() for x in inputs]
    assert "expected embeddings in fp32, bf16 or fp16, got torch.float64" in refusal(exact, kernel="triton")
    monkeypatch.setitem(sys.modules, "tinyclip.distill.affinity_triton", None)  # as if Triton were not there
    assert "kernel 'triton' needs Triton" in refusal(inputs, kernel="triton")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
