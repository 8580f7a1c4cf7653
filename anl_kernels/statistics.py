"""Row statistics: what a loss sees of a row of logits, and how its partial derivatives become a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .entropy import all_reduced, world_size

# Bits of the passes over a row that a statistic asks for (the compiled modules use the same numbers).
ABOVE, ABOVE_MASS, FOCAL, FOCAL_ABOVE = 1, 2, 4, 8
CLAMPED = ABOVE | ABOVE_MASS | FOCAL_ABOVE

# The statistics that a loss may be differentiated by, and the passes each needs.
PRIMARY = {
    "lse": 0,
    "target_logit": 0,
    "target_log_prob": 0,
    "neg_log_sum": 0,
    "above_sum": ABOVE,
    "above_mass": ABOVE_MASS,
    "focal_sum": FOCAL,
    "focal_above_sum": FOCAL_ABOVE,
}
# Made from those, or constant under differentiation.
DERIVED = {
    "target_prob": ("target_log_prob",),
    "target_above": ("target_log_prob",),
    "target_focal_weight": ("target_log_prob",),
    "other_above_mass": ("above_mass", "target_log_prob"),
    "above_count": ("above_sum",),
    "num_classes": (),
}
# Rows of the table that the kernels fill, (13, N) in float64: those with a partial derivative, and constants.
LOG_SUM, TARGET_LOG_PROB, NEG_LOG_SUM, ABOVE_SUM, ABOVE_MASS_SUM, FOCAL_SUM, FOCAL_ABOVE_SUM = 1, 2, 4, 5, 6, 8, 10
MAX, NUM_CLASSES, ABOVE_COUNT, FOCAL_WEIGHT, FOCAL_ABOVE_WEIGHT, VALID = 0, 3, 7, 9, 11, 12
DIFFERENTIABLE = {
    "target_log_prob": TARGET_LOG_PROB,
    "neg_log_sum": NEG_LOG_SUM,
    "above_sum": ABOVE_SUM,
    "above_mass": ABOVE_MASS_SUM,
    "focal_sum": FOCAL_SUM,
    "focal_above_sum": FOCAL_ABOVE_SUM,
}
_TABLE_ROW = {**DIFFERENTIABLE, "num_classes": NUM_CLASSES, "above_count": ABOVE_COUNT}

# Labels of a slice's rows: the target is a class of another slice; the row counts nowhere and is not read.
ELSEWHERE, IGNORED = -1, -2

# The gradient by the focal sums has the exponent in it.
FOCAL_STATISTICS = ("focal_sum", "focal_above_sum", "target_focal_weight")


class Statistics:
    """What `f` of a loss sees: tensors of one shape, one number a row. Every one is made when it is first read.

    For a row of logits z with target y, l_j = z_j - lse, p_j = exp(l_j), T = -log(min_prob), I_j = [l_j > -T] and
    w_j = (1 - p_j)^gamma (detached):

    ======================  =====================================================================
    `lse`                   logsumexp(z)
    `target_logit`          z_y
    `target_log_prob`       l_y, to full relative accuracy as p_y -> 1
    `target_prob`           p_y
    `neg_log_sum`           S = sum_j -l_j
    `above_sum`             U = sum_j I_j (T + l_j)
    `above_mass`            P = sum_j I_j p_j
    `other_above_mass`      the same without the target's own share
    `focal_sum`             F = sum_j w_j (-l_j)
    `focal_above_sum`       G = sum_j I_j (A + w_j l_j), A = (1 - min_prob)^gamma T
    `above_count`           n = sum_j I_j                                  (constant)
    `target_above`          I_y                                            (constant)
    `target_focal_weight`   w_y                                            (constant)
    `num_classes`           the classes with a logit above -inf            (constant)
    `log_min_prob`          -T, a float (`log_floor` is another name of it)
    `focal_clamp_height`    A, a float
    `min_prob`, `gamma`     the call's two numbers
    ======================  =====================================================================

    Subclasses provide the PRIMARY ones, `above_count` and `num_classes` through `_make(name)`.
    """

    def __init__(self, min_prob: float, gamma: float | None):
        self.min_prob = min_prob
        self.gamma = gamma
        self.log_min_prob = self.log_floor = math.log(min_prob)

    def __getattr__(self, name: str) -> Tensor:
        if name not in PRIMARY and name not in DERIVED:
            raise AttributeError(f"no statistic is called {name!r}; there are {', '.join([*PRIMARY, *DERIVED])}")
        if name in FOCAL_STATISTICS and self.gamma is None:
            raise ValueError(f"the loss reads {name}, which needs a focal exponent: RowLoss(f, gamma=...)")
        derive = _DERIVE.get(name)
        value = self._make(name) if derive is None else derive(self)
        setattr(self, name, value)
        return value

    @property
    def focal_clamp_height(self) -> float:
        return focal_clamp_height(self.min_prob, self.gamma)

    def _make(self, name: str) -> Tensor:
        raise NotImplementedError


def focal_clamp_height(min_prob: float, gamma: float) -> float:
    """A = (1 - min_prob)^gamma T: the focal term of a class that the clamp holds."""
    return -((1.0 - min_prob) ** gamma) * math.log(min_prob)


def one_minus_exp(x: Tensor) -> Tensor:
    """1 - exp(x) for x <= 0, value and derivative to full relative accuracy at both ends."""
    return torch.where(x > -0.5, -torch.expm1(x), 1.0 - torch.exp(x))


def _target_above(s: Statistics) -> Tensor:
    log_prob = s.target_log_prob.detach()
    return (log_prob > s.log_min_prob).to(log_prob.dtype)


_DERIVE = {
    "target_prob": lambda s: s.target_log_prob.exp(),
    "target_above": _target_above,
    "target_focal_weight": lambda s: (-torch.expm1(s.target_log_prob.detach())) ** s.gamma,
    "other_above_mass": lambda s: s.above_mass - s.target_above * s.target_prob,
}


def needs_of(names) -> int:
    """The passes that reading the statistics `names` asks for."""
    needs = 0
    for name in names:
        if name not in PRIMARY and name not in DERIVED:
            raise ValueError(f"no statistic is called {name!r}; there are {', '.join([*PRIMARY, *DERIVED])}")
        for primary in DERIVED.get(name, (name,)):
            needs |= PRIMARY[primary]
    return needs


class TableStatistics(Statistics):
    """Statistics from the kernels' table (13, ...); those that `needs` does not cover are not in it."""

    def __init__(self, table: Tensor, min_prob: float, gamma: float | None, needs: int):
        super().__init__(min_prob, gamma)
        self._table = table
        self._needs = needs

    def _make(self, name):
        if name == "lse":  # max is a constant: the derivative by lse is that by log_sum
            return self._table[MAX].detach() + self._table[LOG_SUM]
        if name == "target_logit":
            return self.target_log_prob + self.lse
        if needs_of([name]) & ~self._needs:
            raise RuntimeError(
                f"the loss reads {name}, which it did not when it was made: name what f reads, RowLoss(f, needs=[...])"
            )
        return self._table[_TABLE_ROW[name]]


def softmax_coefs(table: Tensor) -> tuple[Tensor, Tensor]:
    """What gives p_j = exp(z_j - first) second. An ignored row has second = 0, a NaN row NaN."""
    return table[MAX], torch.where(table[VALID] == 0, 0.0, torch.exp(-table[LOG_SUM]))


def coefficients(table: Tensor, partials: Tensor, call, dtype: torch.dtype) -> Tensor:
    """The kernels' coefficients (10, ...) from the table and f's partials by its rows, both (13, ...).

    Fields: max, 1 / sum exp; a, b, a + d, c, bw, cw of the gradient (a + d I_j) p_j + b + c I_j + (bw + cw I_j) w_j,
    the whole gradient at the target, where a p_y + ... + e would cancel as p_y -> 1; log sum exp.
    """
    needs = call.needs
    zero = torch.zeros((), dtype=table.dtype, device=table.device)
    f_lse, f_l, f_S = partials[LOG_SUM], partials[TARGET_LOG_PROB], partials[NEG_LOG_SUM]
    f_U, f_P = partials[ABOVE_SUM], partials[ABOVE_MASS_SUM]
    f_F, f_G = partials[FOCAL_SUM], partials[FOCAL_ABOVE_SUM]
    log_prob = table[TARGET_LOG_PROB]
    above = (log_prob > math.log(call.min_prob)).to(table.dtype)
    missing = -torch.expm1(log_prob)
    common = f_lse + table[NUM_CLASSES] * f_S  # a, without the parts by l and P
    constants = -f_S  # what is added to the gradient at the target besides a p_y
    by_mass = above_part = zero
    if needs & ABOVE:
        common = common - table[ABOVE_COUNT] * f_U
        constants = constants + above * f_U
    if needs & ABOVE_MASS:
        by_mass = f_P
        above_part = (1.0 - table[ABOVE_MASS_SUM]) * f_P
    if needs & (FOCAL | FOCAL_ABOVE):
        weight = missing ** (call.gamma or 0.0)
        if needs & FOCAL:
            common = common + table[FOCAL_WEIGHT] * f_F
            constants = constants - weight * f_F
        if needs & FOCAL_ABOVE:
            common = common - table[FOCAL_ABOVE_WEIGHT] * f_G
            constants = constants + above * weight * f_G
    a_above = common + above_part - f_l
    a = a_above - by_mass
    slope = torch.where(above > 0, a_above, a)
    at_target = common + above_part - (1.0 - above) * by_mass + constants - slope * missing
    fields = (*softmax_coefs(table), a, -f_S, a_above, f_U, -f_F, f_G, at_target, table[LOG_SUM])
    return torch.stack(fields).to(dtype)


def row_shares(label: Tensor, valid: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Each row's weight in the mean: 0 where it is ignored, 1 where a GPU was given a label that is no class."""
    share = valid.to(dtype)
    if weight is None:
        return share
    known = (label >= 0) & (label < weight.shape[0])
    of_label = weight.to(dtype).index_select(0, torch.where(known, label, 0).flatten()).view(label.shape)
    return share * torch.where(known, of_label, 1.0)


def denominator(share: Tensor, call) -> Tensor:
    """What "mean" divides by; where ranks share it, so that the average of their losses is the mean of all rows."""
    total = share.sum()
    if call.batch_group is None:
        return total
    return all_reduced(total, call.batch_group) / world_size(call.batch_group)


def reduce_rows(rows: Tensor, label: Tensor, valid: Tensor, weight: Tensor | None, call) -> Tensor:
    """mean, sum or none of `rows`, with class weights, as F.cross_entropy reduces."""
    share = row_shares(label, valid, weight, rows.dtype)
    rows = torch.where(valid, rows, 0.0)
    rows = rows if weight is None else rows * share
    if call.reduction == "none":
        return rows
    return rows.sum() if call.reduction == "sum" else rows.sum() / denominator(share, call)


def mean_as_sum(target: Tensor, weight: Tensor | None, call, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Class weights (K,) with which the sum over rows is the mean, and a number to add: NaN if no row counts, else 0.

    For a mean whose denominator no kernel sees: rows in several chunks, or on several ranks.
    """
    target = target.long()  # 8 and 16 bits do not hold every class, nor ignore_index
    valid = target != call.ignore_index
    label = torch.where((target >= 0) & (target < classes), target, 0)
    total = denominator(row_shares(label, valid, weight, torch.float64), call)
    scale = 1.0 / total
    weight = scale.to(dtype).expand(classes).contiguous() if weight is None else (weight.double() * scale).to(dtype)
    return weight, torch.where(total == 0.0, math.nan, 0.0).to(dtype)
