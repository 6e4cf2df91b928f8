"""Losses over 1 to 4 processes equal one process with all pairs: value, every gradient, a training step. CPU, gloo.

Each world is started once, and runs every case there; what it saw comes back as a table of errors. Everything is fp64,
and gradients are compared before any optimizer, since Adam would hide a wrong factor.
"""

import json
import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.shrink.test_keep import random_gates, tiny_clip
from tinyclip.data.loader import Inputs
from tinyclip.distill.affinity import affinity_and_contrastive_loss, affinity_loss, contrastive_loss, feature_loss
from tinyclip.distill.objective import Objective, total_loss
from tinyclip.distill.train import TrainConfig, backward
from tinyclip.distributed import ALONE, World, data_parallel, launched, local_share, world

E, T = 5, 7
UPSTREAM = 7.0  # a loss weight, a gradient scaler
COUNTS = {  # pairs on each rank: even, uneven, and a rank that ran out of pairs
    1: [(6,)],
    2: [(5, 5), (4, 7), (3, 0)],
    3: [(2, 2, 2), (4, 1, 2)],
    4: [(3, 3, 3, 3), (5, 5, 5, 3)],
}


def unit(rows, columns, seed, dtype=torch.float64):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return nn.functional.normalize(x, dim=-1)


def embeddings(N):
    """Student's image and text, teacher's image and text."""
    return [unit(N, size, seed) for seed, size in enumerate((E, E, T, T))]


def number(value):
    return torch.tensor(value, dtype=torch.float64)


# Each loss takes the four embeddings and three scales: the student's, the contrastive term's, the teacher's.
def soft(image, text, scale, _, teacher_image, teacher_text, teacher_scale, **how):
    return affinity_loss(image, text, scale, teacher_image, teacher_text, teacher_scale, **how)[0]


def hard(image, text, _, scale, _image, _text, _scale, **how):
    return contrastive_loss(image, text, scale, **how)


def both(*inputs, **how):
    losses = affinity_and_contrastive_loss(*inputs, **how)
    return 0.6 * losses.affinity + 0.4 * losses.contrastive


def one_scale(image, text, scale, _, *teacher, **how):
    return both(image, text, scale, scale, *teacher, **how)


def feature(image, text, *_, world, **_how):
    return feature_loss(image, text, world=world)


def run(loss, pairs, scales, needs, where, **how):
    """(value, gradients of image, text and the three scales; zero where not needed)."""
    student = [x.clone().requires_grad_(need) for x, need in zip(pairs[:2], needs, strict=False)]
    scales = [number(scale).requires_grad_(need) for scale, need in zip(scales, needs[2:], strict=True)]
    value = loss(*student, *scales[:2], *pairs[2:], scales[2], world=where, **how)
    if value.requires_grad:
        (UPSTREAM * value).backward()
    return value.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in (*student, *scales)]


def error(where, counts, loss, pairs, scales=(20.0, 14.0, 50.0), needs=(True,) * 5, **how):
    """The largest difference of value and gradients between `where` and one process with all pairs."""
    expected, expected_grads = run(loss, pairs, scales, needs, ALONE)
    mine = where.own(counts)
    value, grads = run(loss, [x[mine] for x in pairs], scales, needs, where, **how)
    differences = [(value - expected).abs()]
    for grad, expected_grad in zip(grads[:2], expected_grads[:2], strict=True):
        differences.append((grad / where.size - expected_grad[mine]).abs().sum())
    for grad, expected_grad in zip(grads[2:], expected_grads[2:], strict=True):
        differences.append((where.sum_(grad.clone()) / where.size - expected_grad).abs())
    return max(x.item() / max(1.0, expected.abs().item()) for x in differences)


def cases_of(where, counts):
    """Name -> error."""
    pairs = embeddings(sum(counts))
    for loss in (soft, hard, both, one_scale, feature):
        yield loss.__name__, error(where, counts, loss, pairs)
    for tile in (1, 2, 4, 1000):
        yield f"tiles of {tile}", error(where, counts, both, pairs, tile=tile)
    for needs in product((False, True), repeat=3):
        yield f"needs {needs}", error(where, counts, both, pairs, needs=(*needs[:2], needs[2], needs[2], False))
    yield "not contiguous", error(where, counts, both, [torch.stack((x, x), 2)[..., 0] for x in pairs])
    anti_aligned = [pairs[0], -pairs[0], pairs[2], -pairs[2]]
    for scale in (100.0, 1000.0):  # 1,000: the constant shift leaves no sum of these rows
        yield f"anti-aligned at {scale:g}", error(where, counts, both, anti_aligned, (scale, scale / 2, scale))
    one_long = torch.ones(sum(counts), 1, dtype=torch.float64)
    one_long[0] = 30  # an image of the first rank alone: every rank must take the other way
    yield "one long row", error(where, counts, both, [one_long * pairs[0], *pairs[1:]])


def student_inputs(N):
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 29, (N, 7), generator=generator)
    tokens[torch.arange(N), torch.randint(1, 7, (N,), generator=generator)] = 29
    return Inputs(torch.randn(N, 3, 16, 16, generator=generator, dtype=torch.float64), tokens)


def after_a_step(where, inputs, teacher, *, chunk=None, freeze_image=False, gated=False):
    """The parameters after one step of SGD on half affinity, half contrast, a tenth features; the gates' gradient."""
    student = tiny_clip().train()
    student.image.requires_grad_(not freeze_image)
    model = data_parallel(student, where)
    objective = Objective(affinity=0.5, contrastive=0.5, feature=0.1, student_scale="learned")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    project = nn.Linear(student.config.embed_dim, T, bias=False, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        project.weight.copy_(unit(T, student.config.embed_dim, 9))
    gates = random_gates(student, 0.3, seed=1).map(Tensor.requires_grad_) if gated else None

    def loss_of(image, text, scale):
        return total_loss(objective, image, text, scale, [(*teacher, 50.0)], project, world=where)

    backward(model, inputs, gates, loss_of, TrainConfig(steps=1, batch_size=2, micro_batch_size=chunk))
    optimizer.step()
    moved = [parameter.detach().flatten() for parameter in student.parameters()]
    gates_grad = [] if gates is None else [gate.grad.flatten() for gate in gates.flat() if gate.grad is not None]
    where.mean_(gates_grad)
    return torch.cat([*moved, *gates_grad])


def step_cases(where, counts):
    """A training step with DDP against one process: the difference of parameters, and that they moved."""
    N, mine = sum(counts), where.own(counts)
    inputs, teacher = student_inputs(N), embeddings(N)[2:]
    cases = {
        "step": {},
        "step of chunks": {"chunk": 2},
        "step, image frozen": {"freeze_image": True},
        "step of chunks with gates": {"chunk": 2, "gated": True},
    }
    for name, how in cases.items():
        alone = {key: value for key, value in how.items() if key != "chunk"}
        expected = after_a_step(ALONE, inputs, teacher, **alone)
        actual = after_a_step(where, inputs[mine], [x[mine] for x in teacher], **how)
        yield name, (actual - expected).abs().max().item()


@dataclass(frozen=True)
class CountingWorld(World):
    """Counts the numbers that are gathered and scattered."""

    moved: dict = field(default_factory=lambda: {"gathered": 0, "scattered": 0})

    def gather(self, rows_nD, counts):
        gathered = super().gather(rows_nD, counts)
        self.moved["gathered"] += gathered.numel()
        return gathered

    def scatter_sum(self, rows_ND, counts):
        self.moved["scattered"] += rows_ND.numel()
        return super().scatter_sum(rows_ND, counts)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_torchrun_starts_it(rank, size, port):
    """What `launched` makes of torchrun's environment."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with launched() as where:
        return [where.rank, where.size, where.is_main, where.sum_(torch.ones(1)).item()]


def on_rank(rank, size, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=30))
    where = world()
    errors = {}
    for counts in COUNTS[size]:
        errors |= {f"{counts}, {name}": value for name, value in cases_of(where, counts)}
        if min(counts):  # a model's forward on no pairs is DDP's business
            errors |= {f"{counts}, {name}": value for name, value in step_cases(where, counts)}
    counting = CountingWorld(where.rank, where.size, where.group, where.control)
    counts = COUNTS[size][0]
    error(counting, counts, both, embeddings(sum(counts)))
    seen = {"rank": where.rank, "size": where.size, "errors": errors, "moved": counting.moved}
    seen["own_group"] = size == 1 or where.group is not dist.group.WORLD
    seen["broadcast"] = where.broadcast_(torch.tensor([rank + 3])).item()
    where.barrier()
    dist.destroy_process_group()
    seen["launched"] = as_torchrun_starts_it(rank, size, port)
    (folder / f"{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module", params=COUNTS, ids=lambda size: f"{size} processes")
def ranks(request, tmp_path_factory):
    """What every rank of a world saw."""
    folder = tmp_path_factory.mktemp("world")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["tinyclip.distill.objective"])  # torch once
    torch.multiprocessing.start_processes(
        on_rank, (request.param, folder, free_port()), nprocs=request.param, start_method="forkserver"
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_value_and_every_gradient_equal_one_process(ranks):
    for rank in ranks:
        wrong = {name: value for name, value in rank["errors"].items() if not value < 1e-10}
        assert not wrong
        assert len(rank["errors"]) >= 20


def test_every_rank_knows_its_place_and_has_a_group_of_its_own(ranks):
    assert [rank["rank"] for rank in ranks] == list(range(len(ranks)))
    assert all(rank["size"] == len(ranks) and rank["own_group"] and rank["broadcast"] == 3 for rank in ranks)


def test_what_torchrun_starts_is_a_world(ranks):
    size = len(ranks)
    assert [rank["launched"] for rank in ranks] == [
        [rank, size, rank == 0, size if size > 1 else 1] for rank in range(size)
    ]


def test_only_texts_are_moved(ranks):
    """Texts of student and teacher there, the student's gradient back: half of what gathering images too would move."""
    N = sum(COUNTS[len(ranks)][0])
    for rank in ranks:
        assert rank["moved"] == {"gathered": N * (E + T), "scattered": N * E}


def test_alone_nothing_is_copied_or_waited_for():
    rows = torch.randn(3, 2)
    assert world() is ALONE and ALONE.is_main and ALONE.counts(rows) == (3,)
    assert ALONE.gather(rows, (3,)).data_ptr() == rows.data_ptr() and ALONE.scatter_sum(rows, (3,)) is rows
    assert ALONE.sum_(rows) is rows and ALONE.max_(rows) is rows and ALONE.broadcast_(rows) is rows
    ALONE.barrier()
    module = nn.Linear(1, 1)
    assert data_parallel(module, ALONE) is module


def test_without_torchrun_a_run_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched() as where:
        assert where is ALONE


@pytest.mark.parametrize("count, size", [(10, 1), (10, 3), (2, 4)])
def test_shares_of_a_batch_cover_it_once(count, size):
    shares = [local_share(count, World(rank, size)) for rank in range(size)]
    rows = [row for share in shares for row in range(count)[share]]
    assert rows == list(range(count))
    assert max(share.stop - share.start for share in shares) - min(share.stop - share.start for share in shares) <= 1
