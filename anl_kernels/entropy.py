"""The batch entropy term R = log K + sum_j q_j log q_j, q the mean of the rows' p. Ye et al., arXiv 2412.02373."""

from __future__ import annotations

import torch
from torch import Tensor


def world_size(group) -> int:
    return 1 if group is None else torch.distributed.get_world_size(group)


def all_reduced(local: Tensor, group) -> Tensor:
    """The sum of `local` over the ranks of `group` (a new tensor, no gradient)."""
    total = local.detach().clone()
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total


class _Total(torch.autograd.Function):
    """(local, total) -> total, whose gradient is taken as local's."""

    @staticmethod
    def forward(ctx, local, total):
        return total.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def batch_entropy(sums: Tensor, count: Tensor, call, classes: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """R, log q and the number of rows, from the column sums of p (K,) and this rank's number of rows.

    classes: where `sums` are those of a slice, how many there are in all the slices of call.class_group.

    Differentiable by `sums`. Where ranks share R, its gradient here is world_size times the share of this rank, so that
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
