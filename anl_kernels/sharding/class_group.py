"""Classes split over processes: each rank of `class_group` has a contiguous slice of them, and the same targets.

One packed all-gather carries the first sums of every rank's slice, a second one what needs the lse of the whole row,
and only for losses that read it: 48 bytes per row and rank (56 with the squares), then at most 56, whatever K. Every
rank merges them in the ranks' order, so all have the same statistics and the same loss, to the bit; the gradient is
local. Before them goes a fixed header, by which all ranks find out if their calls do not fit together.

The entropy term adds one number per row in backward, and one per class over `batch_group`.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .. import registry
from ..autograd import loss_of_table
from ..backends import Backend
from ..call import Call
from ..derivatives import is_dual, is_usual
from ..layout import acc_dtype, bad_label, check_inputs, is_concrete, overwritten, refuse_leaf, resolved
from ..row_math import coefficients, first_fields, softmax_coefs
from . import slices

ONLY_ONCE = (
    "with class_group a loss is differentiated once and in reverse mode: for second derivatives, forward mode and many "
    "gradients at once (is_grads_batched) gather the logits of all classes and leave class_group out"
)


class ClassShard(NamedTuple):
    """The classes that this rank has: [start, start + size) of `classes`; the largest rank has `largest`."""

    group: dist.ProcessGroup | None  # None: this process has all classes
    start: int
    size: int
    classes: int
    largest: int

    @staticmethod
    def whole(classes: int) -> ClassShard:
        return ClassShard(None, 0, classes, classes, classes)


# ---- what ranks tell each other before anything else, one number each


class Header(NamedTuple):
    failed: int  # this rank's own arguments are wrong: it raises, and so do the others
    size: int  # of its slice
    rows: int
    shape: int  # a checksum of the rows' shape, and so on: a rank that differs is told in what
    dtype: int
    settings: int
    weight: int  # the number of class weights, 0 for none
    low: int  # the least and the largest label, and a checksum of all: on a CPU, where labels can be read
    high: int
    targets: int


_FAILED = Header(1, *[0] * (len(Header._fields) - 1))
_DIFFERENCES = {
    "rows": "the number of rows",
    "shape": "the shape without the classes",
    "dtype": "the dtype",
    "settings": "the loss, a keyword, or whether a gradient is wanted",
    "weight": "the class weights",
    "targets": "the targets, which must be those of all ranks",
}


def checksum(value) -> int:
    return zlib.crc32(repr(value).encode())


def header(size: int, dtype: torch.dtype, target: Tensor, weight: Tensor | None, call: Call, *settings) -> Header:
    """What a rank says whose arguments are right by themselves."""
    keywords = (call.reduction, call.ignore_index, call.entropy_weight, call.min_prob, call.batch_group is None)
    low = high = total = 0
    if target.device.type == "cpu" and target.numel():
        labels = target.reshape(-1).long()
        counted = labels[labels != call.ignore_index]
        low, high = (int(x) for x in counted.aminmax()) if len(counted) else (0, 0)
        total = int((labels * torch.arange(1, len(labels) + 1)).sum())
    return Header(
        failed=0,
        size=size,
        rows=target.numel(),
        shape=checksum(tuple(target.shape)),
        dtype=checksum(dtype),
        settings=checksum((repr(call.expression), call.needs, *keywords, *settings)),
        weight=0 if weight is None else weight.numel(),
        low=low,
        high=high,
        targets=total,
    )


def agree(group, tensor, mine: Header | Exception) -> ClassShard:
    """This rank's classes, from the headers of all ranks. Raises on every rank if the headers differ or a rank failed.

    tensor: the logits or the head's input, or whatever was given in its place.
    mine: this rank's header, or what is wrong with its arguments, which is then raised here.
    """
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            f"class_group must be a torch.distributed process group that this rank belongs to, got {group!r}"
        )
    failed = isinstance(mine, Exception)
    numbers = torch.tensor(_FAILED if failed else mine, device=_device_for_headers(group, tensor))
    ranks = [Header(*numbers) for numbers in gathered(numbers, group).tolist()]
    if failed:
        raise mine
    _compare(ranks)
    sizes = [header.size for header in ranks]
    start, classes = sum(sizes[: dist.get_rank(group)]), sum(sizes)
    if not 0 <= mine.low <= mine.high < max(classes, 1):
        raise bad_label(mine.low if mine.low < 0 else mine.high)
    return ClassShard(group, start, mine.size, classes, max(sizes))


def _device_for_headers(group, tensor) -> torch.device:
    kinds = dist.get_backend_config(group)
    if "cpu:" in kinds:  # the ranks of GPUs then talk without waiting for their streams
        return torch.device("cpu")
    return tensor.device if isinstance(tensor, Tensor) else torch.device(kinds.split(":")[0])


def _compare(ranks: list[Header]) -> None:
    failed = [rank for rank, header in enumerate(ranks) if header.failed]
    if failed:
        raise RuntimeError(f"class_group: the call failed on rank {failed[0]} of the group, so it ends on all ranks")
    for name, words in _DIFFERENCES.items():
        values = [getattr(header, name) for header in ranks]
        if len(set(values)) > 1:
            detail = f": {values}" if name in ("rows", "weight") else ""
            raise ValueError(f"class_group: the ranks' calls differ in {words}{detail}")


def gathered(part: Tensor, group) -> Tensor:
    """(ranks, *part.shape): every rank's `part`, in the ranks' order."""
    if part.numel() == 0:  # on every rank, for all have the same rows
        return part.unsqueeze(0)
    every = part.new_empty((dist.get_world_size(group), *part.shape))
    dist.all_gather(list(every.unbind()), part.contiguous(), group=group)
    return every


def row_table(backend: Backend, call: Call, shard: ClassShard, target: Tensor, tiles) -> Tensor:
    """The statistics' table (NUM_STATS, *target.shape) of whole rows.

    tiles: called for each sweep; yields this rank's logits (N, K_t, ...) and where in its slice they start.
    """
    valid = target != call.ignore_index

    def sweep(sums, *first):
        parts = [
            sums(backend, call, z, slices.local_labels(target, valid, shard.start + start, z.shape[1]), *first)
            for start, z in tiles()
        ]
        return torch.stack(parts)

    first = slices.merged(sweep(slices.first_sums))
    if shard.group is not None:
        fields = first_fields(call.needs)
        parts = gathered(first[fields], shard.group)
        every = parts.new_zeros((len(parts), *first.shape))
        every[:, fields] = parts
        first = slices.merged(every)
    second = None
    fields = slices.second_fields(call.needs)
    if fields:
        part = slices.added(sweep(slices.second_sums, first))
        second = torch.zeros_like(part)
        second[fields] = part[fields]
        if shard.group is not None:
            second[fields] = slices.added(gathered(part[fields], shard.group))
    return slices.table(first, second, valid, shard.classes, call)


# ---- logits


def sharded_loss(logits: Tensor, target: Tensor, weight: Tensor | None, call: Call) -> Tensor:
    """`functional.robust_loss` of this rank's slice of the logits, (N, K_r, ...) or (K_r,)."""
    backend = None
    try:
        _check_alone(logits, target, weight, call)
        backend = registry.choose(logits, call)
        wants_grad = logits.requires_grad and torch.is_grad_enabled()
        if call.inplace and wants_grad:
            refuse_leaf(logits)
        size = logits.shape[min(1, logits.dim() - 1)]
        mine = header(size, logits.dtype, target, weight, call, wants_grad)
    except Exception as error:
        mine = error
    shard = agree(call.class_group, logits, mine)
    check_inputs(_of_all_classes(logits, shard.classes), target, weight, call.clamp)
    single, target = logits.dim() == 1, target.long()  # 8 and 16 bits do not hold every class, nor ignore_index
    rows, labels = (logits.unsqueeze(0), target.unsqueeze(0)) if single else (logits, target)
    table, sums = SliceStats.apply(rows, labels, call, backend, shard)
    loss = loss_of_table(table, sums, labels, weight, call, acc_dtype(logits.dtype), shard.classes)
    return loss.squeeze(0) if single and call.reduction == "none" else loss


def _check_alone(logits: Tensor, target: Tensor, weight: Tensor | None, call: Call) -> None:
    """What a rank can know of its arguments by itself."""
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        check_inputs(logits, target, None, call.clamp)
    size = logits.shape[min(1, logits.dim() - 1)]
    check_inputs(_of_all_classes(logits, max(size, 2)), target, None, 0.0)
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    check_eager(logits, target, weight)


def check_eager(*tensors: Tensor | None) -> None:
    if not is_concrete(*tensors):
        raise RuntimeError("class_group is for eager calls of plain tensors: not under torch.compile or torch.func")
    if is_dual(*tensors):
        raise RuntimeError(ONLY_ONCE)


def check_once(*cotangents: Tensor) -> None:
    """Raises, on every rank and before they talk, where a backward pass is more than the gradient of one loss."""
    if torch.is_grad_enabled() or not all(map(is_usual, cotangents)):
        raise RuntimeError(ONLY_ONCE)


def _of_all_classes(logits: Tensor, classes: int) -> Tensor:
    """The shape, dtype and device that the logits of all ranks would have, without memory."""
    shape = list(logits.shape)
    shape[min(1, logits.dim() - 1)] = classes
    return logits.new_empty(()).expand(shape)


class SliceStats(Function):
    """(logits, target) of a slice -> the whole rows' table and the column sums of p over the slice (K_r,)."""

    @staticmethod
    def forward(ctx, logits, target, call, backend, shard):
        ctx.call, ctx.backend, ctx.shard = call, backend, shard
        table = row_table(backend, call, shard, target, lambda: [(0, logits)])
        ctx.save_for_backward(logits, target, table)
        if not call.entropy_weight or not logits.numel():
            return table, table.new_zeros(logits.shape[1] if call.entropy_weight else 0)
        return table, backend.column_sums(logits, torch.stack(softmax_coefs(table)).to(acc_dtype(logits.dtype)))

    @staticmethod
    def backward(ctx, partials, g):
        logits, target, table = ctx.saved_tensors
        partials, g = resolved(partials), resolved(g)
        check_once(partials, g)
        call, shard = ctx.call, ctx.shard
        grad_coefs = coefficients(table, partials, call, acc_dtype(logits.dtype))
        labels = slices.local_labels(target, target != call.ignore_index, shard.start, shard.size)
        if not call.entropy_weight:
            return slices.grad(ctx.backend, call, logits, labels, grad_coefs), None, None, None, None
        mean = mean_over_classes(slices.moments(logits, grad_coefs, g), shard.group)
        grad = slices.grad(ctx.backend, call.variant(inplace=False), logits, labels, grad_coefs, (g, mean))
        if call.inplace:
            grad = overwritten(logits).copy_(grad)
        return grad, None, None, None, None


def mean_over_classes(moments: Tensor, group) -> Tensor:
    """sum_k p_k g_k per row, from the slices' moments (2, ...)."""
    if group is not None:
        moments = slices.added(gathered(moments, group))
    return moments[0] / moments[1]
