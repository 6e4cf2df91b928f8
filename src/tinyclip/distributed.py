"""Several processes that train one model: the only file that imports torch.distributed.

A `World` says which process this is, and moves rows between processes. One process is a World too (`ALONE`), whose
collectives return what they were given, so that code is written once.

`scatter_sum` is the gradient of `gather`: together they are an exact matrix product over rows of all ranks. Data
parallel wrappers (DDP) average gradients over ranks, so a function that sums over the pairs of all ranks returns `size`
times its gradient; `tinyclip.distill.affinity` does.

Shape legend: n rows on this rank, N rows on all ranks (in rank order), D columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from itertools import accumulate, chain
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE = timedelta(days=1)  # of processes that wait while the main one evaluates or writes


def _renamed(name: str, before: str) -> Callable[..., Any]:
    """A collective by its present name, or by the one that older releases of torch know."""
    return getattr(dist, name, None) or getattr(dist, before)


_ALL_GATHER = _renamed("all_gather_single", "all_gather_into_tensor")  # since torch 2.14, which deprecates the others
_REDUCE_SCATTER = _renamed("reduce_scatter_single", "reduce_scatter_tensor")


class MainFailed(ValueError):
    """The main process raised what this one waited for."""


@dataclass(frozen=True)
class World:
    """This process (`rank`) among `size`; None for the process groups where alone.

    `group` moves tensors of the model's device. `control` moves numbers and objects of the CPU, and waits long.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.control)

    def on_main(self, work: Callable[P, T], *args: P.args, **settings: P.kwargs) -> T:
        """work(...) as the main process returns it, which alone calls it. Where it fails, others raise MainFailed."""
        if self.size == 1:
            return work(*args, **settings)
        done: list[Any] = [False, None]
        try:
            if self.is_main:
                done = [True, work(*args, **settings)]
        finally:
            dist.broadcast_object_list(done, group=self.control, group_src=0)
        if not done[0]:
            raise MainFailed("the main process failed, and says why")
        return done[1]

    def sums(self, *numbers: int) -> tuple[int, ...]:
        """Of each number, the sum over ranks; no device waits."""
        if self.size == 1:
            return numbers
        packed = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(packed, dist.ReduceOp.SUM, group=self.control)
        return tuple(packed.tolist())

    def concatenated(self, items: list[T]) -> list[T]:
        """The items of all ranks, in rank order."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items, group=self.control)
        return list(chain.from_iterable(parts))

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """In place: each tensor's mean over ranks, in one exchange for all of a type."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same in by_dtype.values():
            packed = self.sum_(torch.cat([tensor.detach().flatten() for tensor in same])) / self.size
            for tensor, mean in zip(same, packed.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """In place: the main process's values."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """In place: the sum over ranks, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """In place: the largest over ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def counts(self, rows: Tensor) -> tuple[int, ...]:
        """The number of rows on each rank."""
        return self.sums(*(len(rows) if rank == self.rank else 0 for rank in range(self.size)))

    def own(self, counts: tuple[int, ...]) -> slice:
        """Which of the N gathered rows are this rank's."""
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def gather(self, rows_nD: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Rows of all ranks [N, D], in rank order and without a gradient."""
        rows_nD = rows_nD.detach()
        if self.size == 1:
            return rows_nD
        longest = max(counts)
        gathered = rows_nD.new_empty(self.size * longest, rows_nD.shape[1])
        _ALL_GATHER(gathered, _padded(rows_nD, longest), group=self.group)
        if min(counts) == longest:
            return gathered
        return torch.cat([part[:count] for part, count in zip(gathered.split(longest), counts, strict=True)])

    def scatter_sum(self, rows_ND: Tensor, counts: tuple[int, ...]) -> Tensor:
        """This rank's rows [n, D] of the sum of `rows_ND` over ranks."""
        if self.size == 1:
            return rows_ND
        longest = max(counts)
        if min(counts) != longest:
            rows_ND = torch.cat([_padded(part, longest) for part in rows_ND.split(counts)])
        summed = rows_ND.new_empty(longest, rows_ND.shape[1])
        _REDUCE_SCATTER(summed, rows_ND.contiguous(), group=self.group)
        return summed[: counts[self.rank]]

    def mean(self, values_n: Tensor) -> Tensor:
        """Over the values of all ranks; its gradient is `size` times the true one, as said above."""
        if self.size == 1:
            return values_n.mean()
        share = values_n.sum() * self.size / sum(self.counts(values_n))
        return share + (self.sum_(share.detach() / self.size) - share.detach())


ALONE = World()


def _padded(rows_nD: Tensor, length: int) -> Tensor:
    if len(rows_nD) == length:
        return rows_nD.contiguous()
    return torch.cat([rows_nD, rows_nD.new_zeros(length - len(rows_nD), rows_nD.shape[1])])


def local_share(count: int, world: World) -> slice:
    """Which of `count` rows of a batch this rank reads: shares differ by one row at most."""
    bounds = [0, *accumulate(count // world.size + (rank < count % world.size) for rank in range(world.size))]
    return slice(bounds[world.rank], bounds[world.rank + 1])


def world() -> World:
    """The processes of the default group; ALONE where none was started.

    The collectives get groups of their own: those of a loss's backward must not meet the gradient buckets of a data
    parallel wrapper in one queue. So call it once in a run, on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(dist.get_rank(), dist.get_world_size(), dist.new_group(), control)


@contextmanager
def launched(device: str = "auto") -> Iterator[World]:
    """The world that `torchrun` started this process in (its environment says so), ended with the block; or ALONE.

    On "cuda" (or "auto" where there is CUDA), the process takes the device of its LOCAL_RANK and speaks NCCL; on "cpu",
    gloo. Raises ValueError for a device by number, which all processes would share.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: on several processes expected auto, cpu or cuda, got {device!r}")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://"))
    # After a restart torchrun's store still holds the addresses of the processes that are gone (torch 2.15).
    store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def data_parallel(module: nn.Module, world: World) -> nn.Module:
    """`module`, whose gradients are averaged over ranks in backward, and whose buffers are not; itself where alone."""
    if world.size == 1:
        return module
    own_buffers: dict[str, Any] = {"broadcast_buffers": False}
    if "forward_sync_buffers" in signature(nn.parallel.DistributedDataParallel).parameters:  # its name since torch 2.15
        own_buffers = {"forward_sync_buffers": False}
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, **own_buffers)


Methods = Mapping[type[nn.Module], Sequence[str]]  # of a class, those that compute beside forward


def shard(module: nn.Module, world: World, device: torch.device, methods: Methods) -> None:
    """In place: each process keeps a part of `module`'s weights on `device`, and a block has all while it runs (FSDP2).

    A block is an element of a ModuleList or Sequential. All processes must then call the module equally often, with as
    many calls of each block.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    blocks = [block for part in lists for block in part if next(block.parameters(), None) is not None]
    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    for part in [*blocks, module]:
        fully_shard(part, mesh=mesh, ignored_params=scalars)
        for name in (name for kind, names in methods.items() if isinstance(part, kind) for name in names):
            register_fsdp_forward_method(part, name)
    module.to(device)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that `shard` split, for which all processes ask at once; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsynchronised(module: nn.Module) -> AbstractContextManager[None]:
    """While a data parallel `module`'s gradients only accumulate on each rank."""
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()
