"""The losses in plain PyTorch: every device, every transform, double backward and forward mode.

It keeps tens of bytes per logit. The other backends are compared with it, and leave to it what they cannot do.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..call import Call
from ..layout import acc_dtype, bad_label, is_concrete, log_once, new_grad
from ..reduction import batch_entropy, reduce_rows
from ..row_math import (
    ANY_NEEDS,
    IGNORED,
    NUM_FIRST_SUMS,
    NUM_SECOND_SUMS,
    NUM_STATS,
    CoefField,
    SliceField,
    StatField,
    class_gradient,
    first_terms,
    for_rows_that_count,
    probabilities,
    second_terms,
    table_of_sums,
)
from ..statistics import STATISTICS, Statistics

NAME = "reference"
PURPOSE = "plain PyTorch on every device, with double backward and forward mode"


def unavailable() -> str | None:
    return None


def cannot_run(logits: Tensor, call: Call) -> str | None:
    if call.inplace:
        return "it keeps the logits: inplace=True is for the fused backends"
    return None


def device_type() -> str:
    return "cpu"


class LogitStatistics(Statistics):
    """Statistics of rows of `logits` (..., K) and `target` (...), differentiable, each made when first read.

    A row that must be NaN (a NaN or +inf logit, -inf at the target, `bad`) is NaN in every statistic and derivative.
    """

    def __init__(self, logits: Tensor, target: Tensor, bad: Tensor, min_prob: float, gamma: float | None):
        super().__init__(min_prob, gamma)
        label = target.unsqueeze(-1)
        top, top_label = logits.detach().max(-1, keepdim=True)
        poison = bad.unsqueeze(-1) | ~(top < math.inf) | (logits.detach().gather(-1, label) == -math.inf)
        logits = logits * torch.where(poison, math.nan, 1.0).to(logits.dtype)
        self.label = label
        self.top = top
        self.exists = logits != -math.inf
        self.below_top = (logits - top).masked_fill(~self.exists, 0.0)
        # The sum without the largest keeps log p and 1 - p accurate as p -> 1; derivatives are those of the whole sum.
        exps = (logits - top).exp()
        rest = exps.scatter(-1, top_label, 0.0).sum(-1)
        log_sum = exps.sum(-1).log()
        self.log_sum = log_sum + (rest.log1p() - log_sum).detach()
        target_below_top = self.below_top.gather(-1, label).squeeze(-1)
        target_is_top = (label == top_label).squeeze(-1)
        target_exp = torch.where(target_is_top, target_below_top, 0.0).exp()
        self.target_log_prob = torch.where(
            target_is_top, -torch.log1p(rest / target_exp), target_below_top - self.log_sum
        )

    def _make(self, statistic):
        return statistic.formula(self)

    @property
    def log_prob(self) -> Tensor:
        """l (..., K); 0 for a class that does not exist."""
        if "_log_prob" not in self.__dict__:
            log_prob = (self.below_top - self.log_sum.unsqueeze(-1)).masked_fill(~self.exists, 0.0)
            # One l_y for the target and for the sums: where a loss is their quotient, the parts cancel exactly.
            self._log_prob = log_prob.scatter(-1, self.label, self.target_log_prob.unsqueeze(-1))
        return self._log_prob

    @property
    def prob(self) -> Tensor:
        """p (..., K)."""
        return self.log_prob.exp().masked_fill(~self.exists, 0.0)

    @property
    def above(self) -> Tensor:
        return (self.exists & (self.log_prob.detach() > self.log_min_prob)).to(self.log_prob.dtype)

    @property
    def focal_weight(self) -> Tensor:
        return (-torch.expm1(self.log_prob.detach())) ** self.gamma

    @property
    def other_above_mass(self) -> Tensor:  # a sum without the target, rather than the sum less the target
        return (self.above * self.prob).scatter(-1, self.label, 0.0).sum(-1)

    def table(self, needs: int) -> Tensor:
        """The kernels' table, float64, of the statistics that can be differentiated; the others are 0."""
        rows = [torch.zeros_like(self.log_sum)] * NUM_STATS
        for statistic in STATISTICS.values():
            if statistic.field is not None and not (statistic.constant or statistic.needs & ~needs):
                rows[statistic.field] = getattr(self, statistic.name)
        return torch.stack(rows).double()


def _statistics(logits: Tensor, target: Tensor, call: Call):
    """The rows' statistics, their labels in [0, K), and which rows count."""
    rows = logits.movedim(1, -1) if logits.dim() > 1 else logits
    rows = rows.to(acc_dtype(logits.dtype))
    target = target.long()
    valid = target != call.ignore_index
    out_of_range = valid & ((target < 0) | (target >= rows.shape[-1]))
    _raise_for_labels(target, out_of_range)
    label = torch.where(valid & ~out_of_range, target, 0)
    rows = rows.masked_fill(~valid.unsqueeze(-1), 0.0)  # an ignored row's logits may be NaN
    return LogitStatistics(rows, label, out_of_range, call.min_prob, call.gamma), label, valid


def _column_sums(s: LogitStatistics, valid: Tensor) -> Tensor:
    return (s.prob * valid.unsqueeze(-1)).flatten(0, -2).sum(0) if valid.dim() else s.prob * valid


def loss_by_formulas(logits: Tensor, target: Tensor, weight: Tensor | None, call: Call) -> Tensor:
    """The loss of a validated call, class dimension and keywords as in `functional.robust_loss`."""
    s, label, valid = _statistics(logits, target, call)
    loss = reduce_rows(call.expression.value(s), label, valid, weight, call)
    if call.entropy_weight:
        loss = loss + call.entropy_weight * batch_entropy(_column_sums(s, valid), valid.sum(), call)[0]
    return loss


def stats_by_formulas(logits: Tensor, target: Tensor, call: Call):
    """What `autograd.RowStats` returns, differentiable: the table, and the column sums if the call has the entropy."""
    s, _, valid = _statistics(logits, target, call)
    table = s.table(call.needs)
    return (table, _column_sums(s, valid).double()) if call.entropy_weight else table


def _raise_for_labels(target: Tensor, out_of_range: Tensor) -> None:
    """IndexError where labels can be read without cost: plain CPU tensors. Elsewhere the row is NaN."""
    if out_of_range.device.type == "cpu" and is_concrete(out_of_range) and out_of_range.any():
        raise bad_label(int(target[out_of_range].flatten()[0]))


# ---- what fused backends have as kernels: sums over slices of the classes, and the table made of them

SLICE_ELEMENTS = 1 << 22  # of logits at a time


def slice_stats(call: Call, logits: Tensor, target: Tensor, lse: Tensor | None) -> Tensor:
    num_sums = NUM_FIRST_SUMS if lse is None else NUM_SECOND_SUMS
    result = torch.zeros((num_sums, *target.shape), dtype=torch.float64, device=logits.device)
    step = max(1, SLICE_ELEMENTS // max(1, logits[:1].numel()))
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        z, y = logits.detach()[rows], target[rows].unsqueeze(1)
        z = z.to(acc_dtype(z.dtype)).masked_fill(y == IGNORED, 0.0)
        other = torch.ones_like(z, dtype=torch.bool).scatter(1, y.clamp(min=0), y < 0) & (z != -math.inf)
        sums = _first_sums(call, z, other) if lse is None else _second_sums(call, z, other, lse[:, rows].unsqueeze(2))
        for field, value in enumerate(sums):
            result[field, rows] = value
    return result


def slice_stats_for(name: str, call: Call, logits: Tensor, target: Tensor, lse: Tensor | None) -> Tensor:
    """`slice_stats` for a backend that has no kernel for it."""
    log_once(f"anl_kernels: the {name} backend has no kernel for slices of the classes: PyTorch's operators")
    return slice_stats(call, logits, target, lse)


def _first_sums(call: Call, z: Tensor, other: Tensor) -> list[Tensor]:
    high = z.amax(1, keepdim=True)
    terms = first_terms(torch.where(other, z - high, 0.0), call)
    sums = [high.squeeze(1), *(torch.where(other, x, 0.0).sum(1, dtype=torch.float64) for x in terms)]
    # Where the largest is NaN or +inf, a class at -inf would hide it from the sums.
    sums[SliceField.GAP] += torch.where(sums[SliceField.MAX] < math.inf, 0.0, math.nan)
    return sums


def _second_sums(call: Call, z: Tensor, other: Tensor, lse: Tensor) -> list[Tensor]:
    l = (z.double() - lse[0] - lse[1]).to(z.dtype)
    return [torch.where(other, terms, 0.0).sum(1, dtype=torch.float64) for terms in second_terms(l, call)]


@lru_cache(maxsize=64)
def uniform_row(classes: int, min_prob: float, gamma: float) -> tuple[float, ...]:
    """An ignored row's part of the table. A uniform row's: any f is finite there, and its result is dropped."""
    call = Call(needs=ANY_NEEDS, min_prob=min_prob, gamma=gamma)
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    others = classes - 1.0
    first = torch.stack((zero, *(others * term for term in first_terms(zero, call)), zero, one))
    second = others * torch.stack(second_terms(-math.log(classes) * one, call))
    table = table_of_sums(first, second, call)
    table[StatField.VALID] = 0.0
    return tuple(table.tolist())


# ---- the gradient


def row_grad(call: Call, logits: Tensor, target: Tensor, coefs: Tensor, grad_output: Tensor | None, entropy) -> Tensor:
    """`Backend.row_grad`, with neither grad_output nor entropy."""
    grad = logits.detach() if call.inplace else new_grad(logits)
    step = max(1, SLICE_ELEMENTS // max(1, logits[:1].numel()))
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        grad[rows] = _gradient(call, logits.detach()[rows], target[rows], coefs[:, rows].unsqueeze(2))
    return grad


def _gradient(call: Call, z: Tensor, target: Tensor, coefs: Tensor) -> Tensor:
    at_target = for_rows_that_count(coefs[CoefField.TARGET], coefs)
    return class_gradient(call, z, coefs).scatter(1, target.long().unsqueeze(1), at_target)


def gradient(call: Call, logits: Tensor, target: Tensor, coefs: Tensor, log_q: Tensor | None) -> Tensor:
    """`row_grad` by operators that take any tensors, batched ones too. log_q adds p_j (log_q_j - sum_k p_k log_q_k)."""
    if logits.dim() == 1:
        return gradient(call, logits.unsqueeze(0), target.unsqueeze(0), coefs.unsqueeze(1), log_q).squeeze(0)
    z, coefs = logits.detach(), coefs.unsqueeze(2)
    grad = _gradient(call, z, target.long().clamp(0, z.shape[1] - 1), coefs)
    if log_q is not None:
        p = probabilities(z, coefs)
        log_q = log_q.to(p.dtype).view(1, -1, *[1] * (z.dim() - 2))
        grad = grad + p * (log_q - (p * log_q).sum(1, keepdim=True))
    return grad.to(logits.dtype)


def scaled(grad: Tensor, factor: Tensor, keep: bool) -> Tensor:
    return grad * factor


def column_sums(logits: Tensor, coefs: Tensor) -> Tensor:
    sums = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    step = max(1, SLICE_ELEMENTS // max(1, logits[:1].numel()))
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        p = probabilities(logits.detach()[rows], coefs[:, rows].unsqueeze(2))
        sums += p.movedim(1, -1).flatten(0, -2).sum(0, dtype=torch.float64)
    return sums
