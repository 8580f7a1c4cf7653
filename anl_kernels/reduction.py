"""From the rows' losses to the loss: weights per row, what a mean divides by, and the batch entropy.

Ranks of `batch_group` share the denominator of a mean and the entropy; R = log K + sum_j q_j log q_j, with q the mean
of the rows' p (Ye et al., arXiv 2412.02373).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .call import Call
from .row_math import StatField
from .statistics import Statistics


def world_size(group) -> int:
    return 1 if group is None else torch.distributed.get_world_size(group)


def all_reduced(local: Tensor, group) -> Tensor:
    """The sum of `local` over the ranks of `group` (a new tensor, no gradient)."""
    total = local.detach().clone()
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total


def row_weights(label: Tensor, valid: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Each row's weight in the mean: 0 where it is ignored, 1 where a GPU was given a label that is no class."""
    row_weight = valid.to(dtype)
    if weight is None:
        return row_weight
    known = (label >= 0) & (label < weight.shape[0])
    of_label = weight.to(dtype).index_select(0, torch.where(known, label, 0).flatten()).view(label.shape)
    return row_weight * torch.where(known, of_label, 1.0)


def denominator(row_weight: Tensor, call: Call) -> Tensor:
    """What "mean" divides by; where ranks share it, so that the average of their losses is the mean of all rows."""
    total = row_weight.sum()
    if call.batch_group is None:
        return total
    return all_reduced(total, call.batch_group) / world_size(call.batch_group)


def reduce_rows(rows: Tensor, label: Tensor, valid: Tensor, weight: Tensor | None, call: Call) -> Tensor:
    """mean, sum or none of `rows`, with class weights, as F.cross_entropy reduces."""
    row_weight = row_weights(label, valid, weight, rows.dtype)
    rows = torch.where(valid, rows, 0.0)
    rows = rows if weight is None else rows * row_weight
    if call.reduction == "none":
        return rows
    return rows.sum() if call.reduction == "sum" else rows.sum() / denominator(row_weight, call)


def mean_as_sum(
    target: Tensor, weight: Tensor | None, call: Call, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Class weights (K,) with which the sum over rows is the mean, and a number to add: NaN if no row counts, else 0.

    For a mean whose denominator no kernel sees: rows in several chunks, or on several ranks.
    """
    target = target.long()  # 8 and 16 bits do not hold every class, nor ignore_index
    valid = target != call.ignore_index
    label = torch.where((target >= 0) & (target < classes), target, 0)
    total = denominator(row_weights(label, valid, weight, torch.float64), call)
    scale = 1.0 / total
    weight = scale.to(dtype).expand(classes).contiguous() if weight is None else (weight.double() * scale).to(dtype)
    nan_if_empty = torch.where(total == 0.0, math.nan, 0.0).to(dtype)
    return weight, nan_if_empty


class _Total(torch.autograd.Function):
    """(local, total) -> total, whose gradient is taken as local's."""

    @staticmethod
    def forward(ctx, local, total):
        return total.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def batch_entropy(sums: Tensor, count: Tensor, call: Call, classes: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """R, log q and the number of rows, from the column sums of p (K,) and this rank's number of rows.

    classes: where `sums` are those of a slice, how many there are in all the slices of call.class_group.

    Differentiable by `sums`. Where ranks share R, its gradient here is world_size times this rank's part of it, so that
    the average of the ranks' gradients (DDP) is the gradient of R.
    """
    if call.batch_group is not None:
        shared = sums * world_size(call.batch_group)
        sums = shared + (all_reduced(sums, call.batch_group) - shared).detach()
        count = all_reduced(count, call.batch_group)
    q = sums / count
    # sum q log(K q) is R, without the digits that log K + sum q log q loses where R is small, and log(K q) serves as
    # log q where a constant does not matter. A class without probability adds 0; NaN stays NaN.
    log_q = torch.where(q == 0, 1.0, q * (classes or sums.shape[0])).log()
    entropy = (q * log_q).sum()
    if call.class_group is not None:
        entropy = _Total.apply(entropy, all_reduced(entropy, call.class_group))
    if call.reduction == "sum":
        entropy = torch.where(count > 0, entropy, 0.0)
    return entropy, log_q, count


class TableStatistics(Statistics):
    """Statistics from the kernels' table; those that `needs` does not cover are not in it."""

    def __init__(self, table: Tensor, min_prob: float, gamma: float | None, needs: int):
        super().__init__(min_prob, gamma)
        self._table = table
        self._needs = needs

    def _make(self, statistic):
        if statistic.needs & ~self._needs:
            raise RuntimeError(
                f"the loss reads {statistic.name}, which it did not when it was made: name what f reads, "
                "RowLoss(f, needs=[...])"
            )
        value = self._table[statistic.field]
        if statistic.name == "lse":  # max is a constant: the derivative by lse is that by log_sum
            return self._table[StatField.MAX].detach() + value
        return value


def loss_of_table(
    table: Tensor,
    sums: Tensor,
    target: Tensor,
    weight: Tensor | None,
    call: Call,
    dtype: torch.dtype,
    classes: int | None = None,
) -> Tensor:
    """f of the statistics, reduced, with the entropy term; differentiable by `table` and the column sums `sums`.

    classes: how many there are, where `sums` are those of a slice of them.
    """
    s = TableStatistics(table, call.min_prob, call.gamma, call.needs)
    valid = table[StatField.VALID].detach() != 0.0
    label = torch.where(valid, target.long(), 0)
    loss = reduce_rows(call.expression.value(s), label, valid, weight, call)
    if call.entropy_weight:
        loss = loss + call.entropy_weight * batch_entropy(sums, valid.sum(), call, classes)[0]
    return loss.to(dtype)
