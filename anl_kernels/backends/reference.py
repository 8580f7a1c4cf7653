"""The losses in plain PyTorch: every device, every transform, double backward and forward mode.

It keeps tens of bytes a logit. What the other backends are compared with, and what they leave to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..entropy import batch_entropy
from ..layout import acc_dtype, bad_label, is_concrete, new_grad
from ..statistics import (
    DIFFERENTIABLE,
    FOCAL,
    FOCAL_ABOVE,
    IGNORED,
    LOG_SUM,
    PRIMARY,
    Statistics,
    focal_clamp_height,
    reduce_rows,
)

NAME = "reference"
PURPOSE = "plain PyTorch on every device, with double backward and forward mode"


def unavailable() -> str | None:
    return None


def cannot_run(logits: Tensor, call) -> str | None:
    if call.inplace:
        return "it keeps the logits: inplace=True is for the fused backends"
    return None


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
        self._label = label
        self._top = top
        self._exists = logits != -math.inf
        self._below_top = (logits - top).masked_fill(~self._exists, 0.0)
        # The sum without the largest keeps log p and 1 - p accurate as p -> 1; derivatives are those of the whole sum.
        exps = (logits - top).exp()
        rest = exps.scatter(-1, top_label, 0.0).sum(-1)
        log_sum = exps.sum(-1).log()
        self._log_sum = log_sum + (rest.log1p() - log_sum).detach()
        target_below_top = self._below_top.gather(-1, label).squeeze(-1)
        target_is_top = (label == top_label).squeeze(-1)
        target_exp = torch.where(target_is_top, target_below_top, 0.0).exp()
        self.target_log_prob = torch.where(
            target_is_top, -torch.log1p(rest / target_exp), target_below_top - self._log_sum
        )

    def _make(self, name):
        return getattr(self, "_make_" + name)()

    @property
    def log_prob(self) -> Tensor:
        """l (..., K); 0 for a class that does not exist."""
        if "_log_prob" not in self.__dict__:
            log_prob = (self._below_top - self._log_sum.unsqueeze(-1)).masked_fill(~self._exists, 0.0)
            # One l_y for the target and for the sums: where a loss is their quotient, the parts cancel exactly.
            self._log_prob = log_prob.scatter(-1, self._label, self.target_log_prob.unsqueeze(-1))
        return self._log_prob

    @property
    def prob(self) -> Tensor:
        """p (..., K)."""
        return self.log_prob.exp().masked_fill(~self._exists, 0.0)

    @property
    def _above(self) -> Tensor:
        return (self._exists & (self.log_prob.detach() > self.log_min_prob)).to(self.log_prob.dtype)

    @property
    def _focal_weight(self) -> Tensor:
        return (-torch.expm1(self.log_prob.detach())) ** self.gamma

    def _make_lse(self):
        return self._top.squeeze(-1) + self._log_sum

    def _make_target_logit(self):
        return self.target_log_prob + self.lse

    def _make_num_classes(self):
        return self._exists.sum(-1).to(self.target_log_prob.dtype)

    def _make_neg_log_sum(self):
        return -self.log_prob.sum(-1)

    def _make_above_count(self):
        return self._above.sum(-1)

    def _make_above_sum(self):
        return (self._above * (self.log_prob - self.log_min_prob)).sum(-1)

    def _make_above_mass(self):
        return (self._above * self.prob).sum(-1)

    @property
    def other_above_mass(self) -> Tensor:  # a sum without the target, rather than the sum less the target
        return (self._above * self.prob).scatter(-1, self._label, 0.0).sum(-1)

    def _make_focal_sum(self):
        return (self._focal_weight * -self.log_prob).sum(-1)

    def _make_focal_above_sum(self):
        return (self._above * (self.focal_clamp_height + self._focal_weight * self.log_prob)).sum(-1)

    def table(self, needs: int) -> Tensor:
        """The kernels' table (13, ...), float64, of the statistics that can be differentiated; the others are 0."""
        rows = [torch.zeros_like(self._log_sum)] * 13
        rows[LOG_SUM] = self._log_sum
        for name, row in DIFFERENTIABLE.items():
            if not PRIMARY[name] & ~needs:
                rows[row] = getattr(self, name)
        return torch.stack(rows).double()


def _statistics(logits: Tensor, target: Tensor, call):
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


def robust_loss(logits: Tensor, target: Tensor, weight: Tensor | None, call) -> Tensor:
    """The loss of a validated call, class dimension and keywords as in `functional.robust_loss`."""
    s, label, valid = _statistics(logits, target, call)
    loss = reduce_rows(call.expression.value(s), label, valid, weight, call)
    if call.entropy_weight:
        loss = loss + call.entropy_weight * batch_entropy(_column_sums(s, valid), valid.sum(), call)[0]
    return loss


def row_stats(logits: Tensor, target: Tensor, call):
    """What `autograd.RowStats` returns, differentiable: the table, and the column sums if the call has the entropy."""
    s, _, valid = _statistics(logits, target, call)
    table = s.table(call.needs)
    return (table, _column_sums(s, valid).double()) if call.entropy_weight else table


def _raise_for_labels(target: Tensor, out_of_range: Tensor) -> None:
    """IndexError where labels can be read without cost: plain CPU tensors. Elsewhere the row is NaN."""
    if out_of_range.device.type == "cpu" and is_concrete(out_of_range) and out_of_range.any():
        raise bad_label(int(target[out_of_range].flatten()[0]))


# ---- what fused backends have as kernels, for slices of the classes (slices.py) in PyTorch's own operators

SLICE_ELEMENTS = 1 << 22  # of logits at a time


def slice_stats(call, logits: Tensor, target: Tensor, lse: Tensor | None) -> Tensor:
    """Sums over a slice's classes, each row's target left out, float64.

    Args:
        logits: (N, K_r, ...), K_r >= 1.
        target: (N, ...), int64: a class of the slice, -1 where the row's target is elsewhere, -2 where the row is
            ignored: its logits are not read and its sums are not specified.
        lse: None, or (2, N, ...) float64: the max and log sum exp(z - max) of the whole row.

    Returns:
        Without lse (4, N, ...): max over all classes of the slice (-inf if none exists), and over j != y the sums of
        exp(z_j - max), max - z_j and 1, of classes that exist; max - z_j sums to NaN where a logit is NaN or +inf.
        With it (7, N, ...), sums over j != y of I_j (T + l_j), I_j, (1 - I_j) p_j, -w_j l_j, w_j, I_j (A + w_j l_j) and
        I_j w_j; those that call.needs does not ask for are not specified.
    """
    result = torch.empty((4 if lse is None else 7, *target.shape), dtype=torch.float64, device=logits.device)
    step = max(1, SLICE_ELEMENTS // max(1, logits[:1].numel()))
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        z, y = logits.detach()[rows], target[rows].unsqueeze(1)
        z = z.to(acc_dtype(z.dtype)).masked_fill(y == IGNORED, 0.0)
        other = torch.ones_like(z, dtype=torch.bool).scatter(1, y.clamp(min=0), y < 0) & (z != -math.inf)
        sums = _first_sums(z, other) if lse is None else _second_sums(call, z, other, lse[:, rows].unsqueeze(2))
        for field, value in enumerate(sums):
            result[field, rows] = value
    return result


def _first_sums(z, other):
    high = z.amax(1, keepdim=True)
    x = torch.where(other, z - high, 0.0)
    total = lambda terms: torch.where(other, terms, 0.0).sum(1, dtype=torch.float64)
    # Where the largest is NaN or +inf, a class at -inf would hide it from the sums.
    poison = torch.where(high.squeeze(1) < math.inf, 0.0, math.nan)
    return high.squeeze(1), total(x.exp()), total(-x) + poison, total(torch.ones_like(x))


def _second_sums(call, z, other, lse):
    l = (z.double() - lse[0] - lse[1]).to(z.dtype)
    T = -math.log(call.min_prob)
    total = lambda mask, terms: torch.where(mask, terms, 0.0).sum(1, dtype=torch.float64)
    above = other & (l > -T)
    sums = [total(above, l + T), total(above, torch.ones_like(l)), total(other & ~above, l.exp())]
    if call.gamma is None:
        return sums
    w = (-torch.expm1(l)).clamp(min=0.0) ** call.gamma
    floor = focal_clamp_height(call.min_prob, call.gamma)
    return [*sums, total(other, -w * l), total(other, w), total(above, floor + w * l), total(above, w)]


def row_grad(call, logits: Tensor, target: Tensor, coefs: Tensor, grad_output: Tensor | None, entropy) -> Tensor:
    """The gradient of `coefs` (10, *target.shape); in the logits' memory if call.inplace."""
    grad = logits.detach() if call.inplace else new_grad(logits)
    step = max(1, SLICE_ELEMENTS // max(1, logits[:1].numel()))
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        grad[rows] = _gradient(call, logits.detach()[rows], target[rows], coefs[:, rows].unsqueeze(2))
    return grad


def _gradient(call, z, target, coefs):
    high, inv_sum, a, b, a_above, c, bw, cw, at_target, log_sum = coefs
    x = z.to(coefs.dtype) - high
    above = x > log_sum + math.log(call.min_prob)
    grad = torch.where(above, a_above, a) * (x.exp() * inv_sum) + torch.where(above, b + c, b)
    if call.needs & (FOCAL | FOCAL_ABOVE):
        w = (-torch.expm1(x - log_sum)).clamp(min=0.0) ** call.gamma
        grad = grad + torch.where(above, bw + cw, bw) * w
    grad = grad.masked_fill(z == -math.inf, 0.0).scatter(1, target.long().unsqueeze(1), at_target)
    return torch.where(inv_sum == 0.0, 0.0, torch.where(inv_sum.isnan(), math.nan, grad))


def gradient(call, logits: Tensor, target: Tensor, coefs: Tensor, log_q: Tensor | None) -> Tensor:
    """`row_grad` by operators that take any tensors, batched ones too. log_q adds p_j (log_q_j - sum_k p_k log_q_k)."""
    if logits.dim() == 1:
        return gradient(call, logits.unsqueeze(0), target.unsqueeze(0), coefs.unsqueeze(1), log_q).squeeze(0)
    z, coefs = logits.detach(), coefs.unsqueeze(2)
    grad = _gradient(call, z, target.long().clamp(0, z.shape[1] - 1), coefs)
    if log_q is not None:
        p = torch.where(coefs[1] == 0.0, 0.0, torch.exp(z - coefs[0]) * coefs[1])
        log_q = log_q.to(p.dtype).view(1, -1, *[1] * (z.dim() - 2))
        grad = grad + p * (log_q - (p * log_q).sum(1, keepdim=True))
    return grad.to(logits.dtype)


def scaled(grad: Tensor, factor: Tensor, keep: bool) -> Tensor:
    """grad * factor."""
    return grad * factor


def column_sums(logits: Tensor, coefs: Tensor) -> Tensor:
    """Sum over the rows of p, (K_r,), float64."""
    sums = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    step = max(1, SLICE_ELEMENTS // max(1, logits[:1].numel()))
    for begin in range(0, len(logits), step):
        high, inv_sum = coefs[:2, begin : begin + step].unsqueeze(2)
        p = torch.exp(logits.detach()[begin : begin + step] - high) * inv_sum
        sums += torch.where(inv_sum == 0.0, 0.0, p).movedim(1, -1).flatten(0, -2).sum(0, dtype=torch.float64)
    return sums
