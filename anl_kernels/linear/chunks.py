"""Chunks of a linear head's logits: how large they are, and the matrix products before and after them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, reference
from ..call import Call
from ..layout import acc_dtype
from ..sharding.class_group import ClassShard

# A chunk's memory if the caller does not say: products of so many rows run near full speed at a million classes.
CHUNK_BYTES = {"cpu": 256 << 20}
GPU_CHUNK_BYTES = 1 << 30
MIN_ROWS = 32  # rows of a chunk; if so many whole rows do not fit into it, it holds some classes of more rows
TILE_ROWS = 512
BLOCK_BYTES = 16 << 20  # temporaries in float32 of a half precision chunk


class Plan(NamedTuple):
    rows: int  # of a chunk
    classes: int  # of a chunk; all of them, if its rows are whole


def plan(num_rows: int, classes: int, dtype: torch.dtype, device: str, max_bytes: int | None) -> Plan:
    fits = (max_bytes or CHUNK_BYTES.get(device, GPU_CHUNK_BYTES)) // dtype.itemsize  # logits
    rows = fits // max(classes, 1)
    if rows >= min(num_rows, MIN_ROWS):
        return Plan(even(num_rows, rows), classes)
    rows = even(num_rows, min(TILE_ROWS, fits))
    return Plan(rows, even(classes, max(1, fits // rows)))


def even(total: int, most: int) -> int:
    """The size of the fewest equal parts of at most `most`."""
    parts = -(-total // max(most, 1))
    return max(1, -(-total // max(parts, 1)))


def spans(total: int, size: int) -> list[tuple[int, int]]:
    """(begin, end) of parts of at most `size`; one empty part if there is nothing."""
    return [(begin, min(total, begin + size)) for begin in range(0, max(total, 1), size)]


class Matrices(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (K, D)
    bias: Tensor | None  # (K,)

    def computed_in(self, dtype: torch.dtype) -> Matrices:
        return Matrices(*(None if x is None else x.detach().to(dtype) for x in self))


class WantsGrad(NamedTuple):
    """The matrices whose gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


NO_GRAD = WantsGrad()


class Job(NamedTuple):
    """What all chunks of a call have in common."""

    call: Call
    backend: Backend
    shard: ClassShard
    dtype: torch.dtype  # of the logits
    plan: Plan | None = None  # when it is known how many rows count

    @property
    def in_tiles(self) -> bool:
        """Whether a chunk holds some of this process's classes, not all."""
        return self.plan.classes < self.shard.size

    @property
    def has_whole_rows(self) -> bool:
        """Whether a chunk holds whole rows, so that the kernels for these serve."""
        return self.shard.group is None and not self.in_tiles and self.backend is not reference


class Products:
    """Makes chunks of logits, and takes their gradients to those of the matrices. All chunks share one buffer."""

    def __init__(self, matrices: Matrices, job: Job, wants_grad: WantsGrad = NO_GRAD):
        self.given, self.job = matrices, job
        self.hidden, self.weight, self.bias = matrices.computed_in(job.dtype)
        self.acc = acc_dtype(job.dtype)
        rows, classes = job.plan
        self.buffer = self.hidden.new_empty(min(rows, len(self.hidden)) * min(classes, len(self.weight)))
        dtypes = (self.acc if job.in_tiles else job.dtype, self.acc, self.acc)
        # Every element of the gradients is written by the first chunk that has it.
        self.grads = [
            x.new_empty(x.shape, dtype=dtype) if wanted else None
            for x, wanted, dtype in zip(matrices, wants_grad, dtypes)
        ]

    def rows(self) -> list[tuple[int, int]]:
        return spans(len(self.hidden), self.job.plan.rows) if len(self.hidden) else []

    def tiles(self, rows):
        """((begin, end), logits) over the classes; the logits until the next are made."""
        for tile in spans(len(self.weight), self.job.plan.classes):
            yield tile, self.logits(rows, tile)

    def sweeps(self, rows):
        """A function that yields the tiles of these rows, made again for every sweep unless there is but one."""
        if self.job.in_tiles:
            return lambda: self.tiles(rows)
        made = list(self.tiles(rows))
        return lambda: made

    def logits(self, rows, tile) -> Tensor:
        x, w = self.hidden[slice(*rows)], self.weight[slice(*tile)]
        out = self.buffer[: len(x) * len(w)].view(len(x), len(w))
        if self.bias is None:
            return torch.mm(x, w.t(), out=out)
        return torch.addmm(self.bias[slice(*tile)], x, w.t(), out=out)

    def add(self, grad: Tensor, rows, tile) -> None:
        """The gradient of the chunk of these rows and classes."""
        by_hidden, by_weight, by_bias = self.grads
        x, w = self.hidden[slice(*rows)], self.weight[slice(*tile)]
        if by_hidden is not None:
            add_product(by_hidden[slice(*rows)], grad, w, tile[0] == 0)
        if by_weight is not None:
            add_product(by_weight[slice(*tile)], grad.t(), x, rows[0] == 0)
        if by_bias is not None:
            _add(by_bias[slice(*tile)], grad.sum(0, dtype=self.acc), rows[0] == 0)

    def finished(self) -> list[Tensor | None]:
        """The gradients in the dtypes of what they are of."""
        if not len(self.hidden):  # no chunk has written them
            for grad in self.grads:
                if grad is not None:
                    grad.zero_()
        by_hidden, *others = self.grads
        if by_hidden is not None and self.job.shard.group is not None:
            by_hidden = by_hidden.to(self.acc)
            torch.distributed.all_reduce(by_hidden, group=self.job.shard.group)
        grads = (by_hidden, *others)
        return [None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, self.given)]


def _add(out: Tensor, value: Tensor, first: bool) -> None:
    """out = value, or += where it is not the first."""
    if first:
        out.copy_(value)
    else:
        out.add_(value)


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a @ b, or += where it is not the first; summed in out's dtype."""
    keep = 0 if first else 1  # addmm_ does not read `out` where it is multiplied by 0
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=keep)
        return
    if a.device.type == "cuda" and torch.version.hip is None:  # half precision in, float32 out
        for begin, end in spans(len(out), max(1, BLOCK_BYTES // (4 * b.shape[1]))):
            _add(out[begin:end], torch.mm(a[begin:end], b, out_dtype=out.dtype), first)
        return
    size = max(1, BLOCK_BYTES // (4 * max(b.shape[1], min(a.shape))))
    if len(a) < a.shape[1]:  # the longer of the two is cut: what is summed over, or the rows of the result
        for begin, end in spans(a.shape[1], size):
            left, right = a[:, begin:end].to(out.dtype), b[begin:end].to(out.dtype)
            out.addmm_(left, right, beta=keep if begin == 0 else 1)
        return
    b = b.to(out.dtype)
    for begin, end in spans(len(out), size):
        out[begin:end].addmm_(a[begin:end].to(out.dtype), b, beta=keep)
