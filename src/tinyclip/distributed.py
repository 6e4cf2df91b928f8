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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process (`rank`) among `size`. `group` is the process group of its collectives; None where alone."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.group)

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
        if self.size == 1:
            return (len(rows),)
        counts = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        return tuple(self.sum_(counts).tolist())

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
        dist.all_gather_into_tensor(gathered, _padded(rows_nD, longest), group=self.group)
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
        dist.reduce_scatter_tensor(summed, rows_ND.contiguous(), group=self.group)
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

    The collectives get a group of their own: those of a loss's backward must not meet the gradient buckets of a data
    parallel wrapper in one queue. So call it once in a run, on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    return World(dist.get_rank(), dist.get_world_size(), dist.new_group())


@contextmanager
def launched(device: str = "cpu") -> Iterator[World]:
    """The world that `torchrun` started this process in (its environment says so), ended with the block; or ALONE.

    On "cuda", the process takes the device of its LOCAL_RANK and speaks NCCL; on "cpu", gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def data_parallel(module: nn.Module, world: World) -> nn.Module:
    """`module`, whose gradients are averaged over ranks in backward; itself where alone."""
    return module if world.size == 1 else nn.parallel.DistributedDataParallel(module)
