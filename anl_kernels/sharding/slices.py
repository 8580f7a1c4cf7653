"""Rows whose classes lie in slices, held by other processes or made one after the other: their sums, and the merge.

Sums leave the target out, wherever it lies, as the kernels do: with its part added by hand, what is equal in a loss and
its gradient cancels exactly. Logits here are (N, K_r, ...): the caller gives one row (K_r,) a dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import stats
from ..backends import reference
from ..layout import acc_dtype, log_once
from ..stats import ABOVE, ABOVE_MASS, ELSEWHERE, FOCAL, FOCAL_ABOVE, IGNORED

# First sums (6, ...): those of the kernels, of exp(z_j - max), max - z_j and 1; the target's logit; 1 where it is here.
MAX, TAIL, GAP, COUNT, TARGET, OWNED = range(6)
NUM_FIRST = 6
# Second sums (7, ...), with the lse of the whole row.
ABOVE_SUM, ABOVE_COUNT, BELOW_MASS, FOCAL_SUM, FOCAL_WEIGHT, FOCAL_ABOVE_SUM, FOCAL_ABOVE_WEIGHT = range(7)
NUM_SECOND = 7
TABLE_ROWS = 13  # of the statistics' table
AT_TARGET = 8  # among the gradient's coefficients: the gradient at the target

CHUNK_ELEMENTS = 1 << 22  # of logits at a time, where PyTorch's own operators make temporaries of them


def second_fields(needs: int) -> list[int]:
    """The second sums that statistics of `needs` are made of."""
    fields = [ABOVE_SUM, ABOVE_COUNT] if needs & ABOVE else []
    fields += [BELOW_MASS] if needs & ABOVE_MASS else []
    fields += [FOCAL_SUM, FOCAL_WEIGHT] if needs & FOCAL else []
    return fields + ([FOCAL_ABOVE_SUM, FOCAL_ABOVE_WEIGHT] if needs & FOCAL_ABOVE else [])


def local_labels(target: Tensor, valid: Tensor, start: int, size: int) -> Tensor:
    """Labels of the slice [start, start + size), int64: ELSEWHERE and IGNORED besides those in [0, size)."""
    local = target.long() - start
    local = torch.where((local >= 0) & (local < size), local, ELSEWHERE)
    return torch.where(valid, local, IGNORED)


def _kernel(backend):
    """`slice_stats` of the backend, or PyTorch's operators in its place."""
    if not hasattr(backend, "slice_stats"):
        log_once(
            f"anl_kernels: the {backend.NAME} backend has no kernel for slices of the classes: PyTorch's operators"
        )
        return reference.slice_stats
    return backend.slice_stats


def first_sums(backend, call, logits: Tensor, labels: Tensor) -> Tensor:
    """(6, *labels.shape), float64; max is -inf where the slice has no class."""
    sums = torch.zeros((NUM_FIRST, *labels.shape), dtype=torch.float64, device=logits.device)
    if logits.shape[1] == 0:
        sums[MAX] = -math.inf
        return sums
    sums[:TARGET] = _kernel(backend)(call, logits, labels, None)
    here = labels >= 0
    target = logits.detach().gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1).double()
    sums[TARGET] = torch.where(here, target, 0.0)
    sums[OWNED] = here
    return sums


def second_sums(backend, call, logits: Tensor, labels: Tensor, first: Tensor) -> Tensor:
    """(7, *labels.shape), float64, from the first sums of the whole rows. Those not needed are not specified."""
    if logits.shape[1] == 0:
        return torch.zeros((NUM_SECOND, *labels.shape), dtype=torch.float64, device=logits.device)
    max_and_log_sum = torch.stack((first[MAX], _target(first)[0]))
    return _kernel(backend)(call, logits, labels, max_and_log_sum)


def merged(parts: Tensor) -> Tensor:
    """First sums of slices (S, 6, ...) as those of all their classes (6, ...), added in the slices' order."""
    high = parts[:, MAX].amax(0)
    below = torch.where(parts[:, MAX] == -math.inf, 0.0, high - parts[:, MAX])
    gap = parts[:, GAP] + parts[:, COUNT] * below
    tail = parts[:, TAIL] * torch.exp(-below)
    return torch.stack((high, *(added(x) for x in (tail, gap, *parts[:, COUNT:].unbind(1)))))


def added(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _target(first: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp(z - max) and l_y of whole rows; NaN for a row that must be."""
    x_y = first[TARGET] - first[MAX]
    # NaN and +inf leave a NaN gap. A target that no slice has, or two, or at -inf: NaN by definition.
    bad = first[GAP].isnan() | (first[OWNED] != 1.0) | ~(first[TARGET] > -math.inf)
    x_y, tail = torch.where(bad, math.nan, x_y), first[TAIL]
    # The largest logit's exp is 1: log1p of the others' keeps the digits that log(sum) would drop.
    log_sum = torch.log1p(torch.where(x_y == 0.0, tail, (tail - 1.0) + x_y.exp()))
    return log_sum, x_y - log_sum


def table(first: Tensor, second: Tensor | None, valid: Tensor, classes: int, call) -> Tensor:
    """The statistics' table (13, ...) of whole rows, as `row_stats` makes it."""
    log_sum, l = _target(first)
    log_min_prob = math.log(call.min_prob)
    above = (l > log_min_prob).to(l.dtype)
    poison = log_sum - log_sum
    rows = torch.full((TABLE_ROWS, *l.shape), math.nan, dtype=l.dtype, device=l.device)
    rows[stats.MAX], rows[stats.LOG_SUM], rows[stats.TARGET_LOG_PROB] = first[MAX] + poison, log_sum, l
    rows[stats.NUM_CLASSES] = first[COUNT] + 1.0 + poison
    rows[stats.NEG_LOG_SUM] = first[COUNT] * log_sum + first[GAP] - l
    if call.needs & ABOVE:
        rows[stats.ABOVE_SUM] = second[ABOVE_SUM] + above * (l - log_min_prob)
        rows[stats.ABOVE_COUNT] = second[ABOVE_COUNT] + above + poison
    if call.needs & ABOVE_MASS:
        rows[stats.ABOVE_MASS_SUM] = 1.0 - (second[BELOW_MASS] + (1.0 - above) * l.exp())
    if call.needs & (FOCAL | FOCAL_ABOVE):
        w = (-torch.expm1(l)) ** call.gamma
    if call.needs & FOCAL:
        rows[stats.FOCAL_SUM] = second[FOCAL_SUM] - w * l
        rows[stats.FOCAL_WEIGHT] = second[FOCAL_WEIGHT] + w
    if call.needs & FOCAL_ABOVE:
        height = stats.focal_floor(call.min_prob, call.gamma)
        rows[stats.FOCAL_ABOVE_SUM] = second[FOCAL_ABOVE_SUM] + above * (height + w * l)
        rows[stats.FOCAL_ABOVE_WEIGHT] = second[FOCAL_ABOVE_WEIGHT] + above * w
    rows[stats.VALID] = 1.0
    uniform = torch.tensor(_uniform_row(classes, call), dtype=l.dtype, device=l.device)
    return torch.where(valid, rows, uniform.view(TABLE_ROWS, *[1] * l.dim()))


def _uniform_row(classes: int, call) -> list[float]:
    """An ignored row's statistics, those of a uniform one: any f is finite there, and its result is dropped."""
    K, log_k, T, gamma = float(classes), math.log(classes), -math.log(call.min_prob), call.gamma or 0.0
    w = (1.0 - 1.0 / K) ** gamma
    heights = stats.focal_floor(call.min_prob, gamma) - w * log_k
    return [0.0, log_k, -log_k, K, K * log_k, K * (T - log_k), 1.0, K, K * w * log_k, K * w, K * heights, K * w, 0.0]


def grad(backend, call, logits: Tensor, labels: Tensor, grad_coefs: Tensor, entropy=None) -> Tensor:
    """The gradient by a slice, from the coefficients (10, *labels.shape) of whole rows.

    entropy: None, or (g (K_r,), mean (*labels.shape)): p_j (g_j - mean) is added. Not where call.inplace.
    """
    if logits.numel() == 0:
        return torch.zeros_like(logits)
    grad_coefs = _without_target(grad_coefs, logits, labels, call)
    out = backend.row_grad(call, logits.detach(), labels.clamp(min=0), grad_coefs, None, None)
    if entropy is not None:
        g, mean = entropy
        for rows, p in _probabilities(logits, grad_coefs):
            difference = _along_classes(g, p) - mean[rows].to(p.dtype).unsqueeze(1)
            part = out[rows]
            part.copy_(part + torch.where(p == 0.0, 0.0, p * difference))
    return out


def moments(logits: Tensor, grad_coefs: Tensor, g: Tensor) -> Tensor:
    """(2, *rows): sum_k p_k g_k and sum_k p_k over a slice's classes, float64."""
    result = torch.zeros((2, *grad_coefs.shape[1:]), dtype=torch.float64, device=logits.device)
    for rows, p in _probabilities(logits, grad_coefs) if logits.numel() else ():
        result[0, rows] = torch.where(p == 0.0, 0.0, p * _along_classes(g, p)).sum(1, dtype=torch.float64)
        result[1, rows] = p.sum(1, dtype=torch.float64)
    return result


def _along_classes(g: Tensor, p: Tensor) -> Tensor:
    return g.to(p.dtype).view(1, -1, *[1] * (p.dim() - 2))


def _probabilities(logits: Tensor, grad_coefs: Tensor):
    """(rows, p (n, K_r, ...)), at most CHUNK_ELEMENTS at a time, rows a slice of the first dimension."""
    step = max(1, CHUNK_ELEMENTS // logits[:1].numel())
    high, inv_sum = (x.unsqueeze(1).to(acc_dtype(logits.dtype)) for x in grad_coefs[:2])
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        p = torch.exp(logits.detach()[rows] - high[rows]) * inv_sum[rows]
        yield rows, torch.where(inv_sum[rows] == 0.0, 0.0, p)


def _without_target(grad_coefs: Tensor, logits: Tensor, labels: Tensor, call) -> Tensor:
    """Coefficients for row_grad, whose label is 0 where the target is elsewhere: there "the gradient at the target" is
    that of any class, at class 0."""
    first = logits.detach()[:, :1].double()
    twice = torch.cat((first, first), 1)  # as two classes of which the second is the target
    call = call.variant(inplace=False)
    value = reference.row_grad(call, twice, torch.ones_like(labels), grad_coefs.double(), None, None)[:, 0]
    grad_coefs = grad_coefs.clone()
    grad_coefs[AT_TARGET] = torch.where(labels == ELSEWHERE, value.to(grad_coefs.dtype), grad_coefs[AT_TARGET])
    return grad_coefs
