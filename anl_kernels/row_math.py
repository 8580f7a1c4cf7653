"""The mathematics of a row in PyTorch: statistics and their formulas, sums over slices of the classes, the gradient.

Mirrors csrc/row_math.h and triton_kernels/row_math.py, formula by formula. The layout of what kernels hand out stands
here and nowhere else in Python; the enums are in the order of those in csrc/row_math.h.
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .statistics import Statistic, Statistics, declare, derived_statistic, focal_clamp_height

if TYPE_CHECKING:
    from .call import Call


class Needs(enum.IntFlag):
    """The sums over a row that a statistic is made of, besides those that every loss has."""

    ABOVE = 1
    ABOVE_MASS = 2
    FOCAL = 4
    FOCAL_ABOVE = 8
    SQUARES = 16  # of the first sweep


ANY_NEEDS = sum(Needs)
ANY_FOCAL = int(Needs.FOCAL | Needs.FOCAL_ABOVE)
CLAMPED = int(Needs.ABOVE | Needs.ABOVE_MASS | Needs.FOCAL_ABOVE)


class StatField(enum.IntEnum):
    """Rows of the statistics' table (NUM_STATS, *rows), float64."""

    MAX = 0
    LOG_SUM = 1  # lse - max
    TARGET_LOG_PROB = 2
    NUM_CLASSES = 3
    NEG_LOG_SUM = 4
    ABOVE_SUM = 5
    ABOVE_MASS = 6
    ABOVE_COUNT = 7
    FOCAL_SUM = 8
    FOCAL_WEIGHT = 9  # W = sum_j w_j
    FOCAL_ABOVE_SUM = 10
    FOCAL_ABOVE_WEIGHT = 11  # W+ = sum_j I_j w_j
    TOP_GAP = 12  # max - z_y
    OTHER_P2 = 13  # without the target, which would round the others away as p_y -> 1
    VALID = 14  # 0 for an ignored row


class CoefField(enum.IntEnum):
    """Rows of the gradient's coefficients (NUM_COEFS, *rows).

    (a + d I_j + square (p_j - max p)) p_j + b + c I_j + (bw + cw I_j) w_j
    """

    MAX = 0
    INV_SUM = 1  # 1 / sum exp(z - max); 0 for an ignored row
    A = 2
    B = 3
    A_ABOVE = 4  # a + d
    C = 5
    BW = 6
    CW = 7
    SQUARE = 8
    TARGET = 9  # the whole gradient at the target, where a p_y + ... + e would cancel as p_y -> 1
    LOG_SUM = 10


class SliceField(enum.IntEnum):
    """The first sums over a slice's classes, without the target: what `slice_stats` returns before the lse is known."""

    MAX = 0  # with the target
    TAIL = 1  # exp(z_j - max)
    GAP = 2  # max - z_j
    COUNT = 3  # 1
    SQUARES = 4  # exp(z_j - max)^2


class SliceSecond(enum.IntEnum):
    """The second sums over a slice's classes, without the target, which need the lse of the whole row."""

    ABOVE_SUM = 0  # I_j (T + l_j)
    ABOVE_COUNT = 1  # I_j
    BELOW_MASS = 2  # (1 - I_j) p_j
    FOCAL_SUM = 3  # -w_j l_j
    FOCAL_WEIGHT = 4  # w_j
    FOCAL_ABOVE_SUM = 5  # I_j (A + w_j l_j)
    FOCAL_ABOVE_WEIGHT = 6  # I_j w_j


NUM_STATS, NUM_COEFS = len(StatField), len(CoefField)
NUM_FIRST_SUMS, NUM_SECOND_SUMS = len(SliceField), len(SliceSecond)
# What slices are merged by holds, after the first sums, the target's logit, and 1 where a slice has the target.
TARGET_LOGIT, OWNED = NUM_FIRST_SUMS, NUM_FIRST_SUMS + 1
NUM_MERGED = NUM_FIRST_SUMS + 2

_SUMS_OF = {
    Needs.ABOVE: (SliceSecond.ABOVE_SUM, SliceSecond.ABOVE_COUNT),
    Needs.ABOVE_MASS: (SliceSecond.BELOW_MASS,),
    Needs.FOCAL: (SliceSecond.FOCAL_SUM, SliceSecond.FOCAL_WEIGHT),
    Needs.FOCAL_ABOVE: (SliceSecond.FOCAL_ABOVE_SUM, SliceSecond.FOCAL_ABOVE_WEIGHT),
}


def second_fields(needs: int) -> list[int]:
    """The second sums that statistics of `needs` are made of."""
    return [int(field) for need, fields in _SUMS_OF.items() if needs & need for field in fields]


def first_fields(needs: int) -> list[int]:
    """Of the NUM_MERGED that slices are merged by, those that statistics of `needs` are made of."""
    return [field for field in range(NUM_MERGED) if field != SliceField.SQUARES or needs & Needs.SQUARES]


# Labels of a slice's rows: the target is a class of another slice; the row counts nowhere and is not read.
ELSEWHERE, IGNORED = -1, -2


# ---- the statistics

declare(
    Statistic("lse", "logsumexp(z)", StatField.LOG_SUM, formula=lambda s: s.top.squeeze(-1) + s.log_sum),
    Statistic("target_log_prob", "l_y, to full relative accuracy as p_y -> 1", StatField.TARGET_LOG_PROB),
    Statistic("neg_log_sum", "S = sum_j -l_j", StatField.NEG_LOG_SUM, formula=lambda s: -s.log_prob.sum(-1)),
    Statistic(
        "above_sum",
        "U = sum_j I_j (T + l_j)",
        StatField.ABOVE_SUM,
        Needs.ABOVE,
        formula=lambda s: (s.above * (s.log_prob - s.log_min_prob)).sum(-1),
    ),
    Statistic(
        "above_mass",
        "P = sum_j I_j p_j",
        StatField.ABOVE_MASS,
        Needs.ABOVE_MASS,
        formula=lambda s: (s.above * s.prob).sum(-1),
    ),
    Statistic(
        "focal_sum",
        "F = sum_j w_j (-l_j)",
        StatField.FOCAL_SUM,
        Needs.FOCAL,
        focal=True,
        formula=lambda s: (s.focal_weight * -s.log_prob).sum(-1),
    ),
    Statistic(
        "focal_above_sum",
        "G = sum_j I_j (A + w_j l_j), A = (1 - min_prob)^gamma T",
        StatField.FOCAL_ABOVE_SUM,
        Needs.FOCAL_ABOVE,
        focal=True,
        formula=lambda s: (s.above * (s.focal_clamp_height + s.focal_weight * s.log_prob)).sum(-1),
    ),
    Statistic(
        "other_p2",
        "sum_{j != y} p_j^2",
        StatField.OTHER_P2,
        Needs.SQUARES,
        formula=lambda s: s.prob.scatter(-1, s.label, 0.0).square().sum(-1),
    ),
    Statistic(
        "above_count",
        "n = sum_j I_j",
        StatField.ABOVE_COUNT,
        Needs.ABOVE,
        constant=True,
        formula=lambda s: s.above.sum(-1),
    ),
    Statistic(
        "num_classes",
        "the classes with a logit above -inf",
        StatField.NUM_CLASSES,
        constant=True,
        formula=lambda s: s.exists.sum(-1).to(s.target_log_prob.dtype),
    ),
    Statistic(
        "top_gap",
        "max_j z_j - z_y: 0 where the target is the row's top",
        StatField.TOP_GAP,
        constant=True,
        formula=lambda s: -s.below_top.detach().gather(-1, s.label).squeeze(-1),
    ),
)


@derived_statistic("target_log_prob", "lse", doc="z_y")
def target_logit(s: Statistics) -> Tensor:
    return s.target_log_prob + s.lse


@derived_statistic("target_log_prob", doc="p_y")
def target_prob(s: Statistics) -> Tensor:
    return s.target_log_prob.exp()


@derived_statistic("target_log_prob", doc="I_y", constant=True)
def target_above(s: Statistics) -> Tensor:
    log_prob = s.target_log_prob.detach()
    return (log_prob > s.log_min_prob).to(log_prob.dtype)


@derived_statistic("target_log_prob", doc="w_y", constant=True, focal=True)
def target_focal_weight(s: Statistics) -> Tensor:
    return (-torch.expm1(s.target_log_prob.detach())) ** s.gamma


@derived_statistic("other_p2", "target_log_prob", doc="sum_j p_j^2")
def sum_p2(s: Statistics) -> Tensor:
    return s.other_p2 + s.target_prob.square()


@derived_statistic("above_mass", "target_log_prob", doc="P without the target's own part")
def other_above_mass(s: Statistics) -> Tensor:
    return s.above_mass - s.target_above * s.target_prob


# ---- sums over slices of the classes


def first_terms(x: Tensor, call: Call) -> list[Tensor]:
    """What a class adds to each of the first sums, in SliceField's order after the max; x = z_j - max. Without the
    squares where none are needed."""
    e = x.exp()
    return [e, -x, torch.ones_like(x), e * e] if call.needs & Needs.SQUARES else [e, -x, torch.ones_like(x)]


def second_terms(l: Tensor, call: Call) -> list[Tensor]:
    """What a class with this log p adds to each of the second sums; without the focal ones where none is needed."""
    above = l > math.log(call.min_prob)
    held = above.to(l.dtype)
    terms = [torch.where(above, l - math.log(call.min_prob), 0.0), held, torch.where(above, 0.0, l.exp())]
    if not call.needs & ANY_FOCAL:
        return terms
    gamma = call.gamma or 0.0
    w = (-torch.expm1(l)).clamp(min=0.0) ** gamma
    height = torch.where(above, focal_clamp_height(call.min_prob, gamma) + w * l, 0.0)
    return [*terms, -w * l, w, height, held * w]


def merged(parts: Tensor) -> Tensor:
    """First sums of slices (S, NUM_MERGED, *rows) as those of all their classes, added in the slices' order."""
    largest, count = parts[:, SliceField.MAX], parts[:, SliceField.COUNT]
    high = largest.amax(0)
    below = torch.where(largest == -math.inf, 0.0, high - largest)
    sums = list(parts.unbind(1))
    sums[SliceField.TAIL] = sums[SliceField.TAIL] * torch.exp(-below)
    sums[SliceField.SQUARES] = sums[SliceField.SQUARES] * torch.exp(-2.0 * below)
    sums[SliceField.GAP] = sums[SliceField.GAP] + count * below
    sums = [added(x) for x in sums]
    sums[SliceField.MAX] = high
    return torch.stack(sums)


def added(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def target_of(first: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp(z - max) and l_y of whole rows, from their merged first sums; NaN for a row that must be."""
    x_y = first[TARGET_LOGIT] - first[SliceField.MAX]
    # NaN and +inf leave a NaN gap. A target that no slice has, or two, or at -inf: NaN by definition.
    bad = first[SliceField.GAP].isnan() | (first[OWNED] != 1.0) | ~(first[TARGET_LOGIT] > -math.inf)
    x_y, tail = torch.where(bad, math.nan, x_y), first[SliceField.TAIL]
    # The largest logit's exp is 1: log1p of the others' keeps the digits that log(sum) would drop.
    log_sum = torch.log1p(torch.where(x_y == 0.0, tail, (tail - 1.0) + x_y.exp()))
    return log_sum, x_y - log_sum


def table_of_sums(first: Tensor, second: Tensor | None, call: Call) -> Tensor:
    """The statistics' table of whole rows, from their first sums (NUM_MERGED, *rows) and second ones."""
    log_sum, l = target_of(first)
    poison = log_sum - log_sum
    rows = torch.full((NUM_STATS, *l.shape), math.nan, dtype=l.dtype, device=l.device)
    rows[StatField.MAX] = first[SliceField.MAX] + poison
    rows[StatField.LOG_SUM] = log_sum
    rows[StatField.TARGET_LOG_PROB] = l
    rows[StatField.NUM_CLASSES] = first[SliceField.COUNT] + 1.0 + poison
    rows[StatField.NEG_LOG_SUM] = first[SliceField.COUNT] * log_sum + first[SliceField.GAP] - l
    rows[StatField.TOP_GAP] = first[SliceField.MAX] - first[TARGET_LOGIT] + poison
    rows[StatField.VALID] = 1.0
    if call.needs & Needs.SQUARES:
        rows[StatField.OTHER_P2] = first[SliceField.SQUARES] * torch.exp(-2.0 * log_sum)
    if second is None:
        return rows
    with_target = [x + of_y + poison for x, of_y in zip(second, second_terms(l, call))]
    if call.needs & Needs.ABOVE:
        rows[StatField.ABOVE_SUM] = with_target[SliceSecond.ABOVE_SUM]
        rows[StatField.ABOVE_COUNT] = with_target[SliceSecond.ABOVE_COUNT]
    if call.needs & Needs.ABOVE_MASS:
        rows[StatField.ABOVE_MASS] = 1.0 - with_target[SliceSecond.BELOW_MASS]
    if call.needs & Needs.FOCAL:
        rows[StatField.FOCAL_SUM] = with_target[SliceSecond.FOCAL_SUM]
        rows[StatField.FOCAL_WEIGHT] = with_target[SliceSecond.FOCAL_WEIGHT]
    if call.needs & Needs.FOCAL_ABOVE:
        rows[StatField.FOCAL_ABOVE_SUM] = with_target[SliceSecond.FOCAL_ABOVE_SUM]
        rows[StatField.FOCAL_ABOVE_WEIGHT] = with_target[SliceSecond.FOCAL_ABOVE_WEIGHT]
    return rows


# ---- the gradient


def softmax_coefs(table: Tensor) -> tuple[Tensor, Tensor]:
    """What gives p_j = exp(z_j - first) second. An ignored row has second = 0, a NaN row NaN."""
    return table[StatField.MAX], torch.where(table[StatField.VALID] == 0, 0.0, torch.exp(-table[StatField.LOG_SUM]))


def coefficients(table: Tensor, partials: Tensor, call: Call, dtype: torch.dtype) -> Tensor:
    """The gradient's coefficients (NUM_COEFS, *rows) from the table and f's partials by its rows."""
    needs = call.needs
    zero = torch.zeros((), dtype=table.dtype, device=table.device)
    f_lse, f_l, f_S = (partials[i] for i in (StatField.LOG_SUM, StatField.TARGET_LOG_PROB, StatField.NEG_LOG_SUM))
    f_U, f_P = partials[StatField.ABOVE_SUM], partials[StatField.ABOVE_MASS]
    f_F, f_G = partials[StatField.FOCAL_SUM], partials[StatField.FOCAL_ABOVE_SUM]
    log_prob = table[StatField.TARGET_LOG_PROB]
    above = (log_prob > math.log(call.min_prob)).to(table.dtype)
    missing = -torch.expm1(log_prob)
    common = f_lse + table[StatField.NUM_CLASSES] * f_S  # a, without the parts by l and P
    constants = -f_S  # what is added to the gradient at the target besides a p_y
    by_mass = above_part = zero
    if needs & Needs.ABOVE:
        common = common - table[StatField.ABOVE_COUNT] * f_U
        constants = constants + above * f_U
    if needs & Needs.ABOVE_MASS:
        by_mass = f_P
        above_part = (1.0 - table[StatField.ABOVE_MASS]) * f_P
    if needs & ANY_FOCAL:
        weight = missing ** (call.gamma or 0.0)
        if needs & Needs.FOCAL:
            common = common + table[StatField.FOCAL_WEIGHT] * f_F
            constants = constants - weight * f_F
        if needs & Needs.FOCAL_ABOVE:
            common = common - table[StatField.FOCAL_ABOVE_WEIGHT] * f_G
            constants = constants + above * weight * f_G
    a_above = common + above_part - f_l
    a = a_above - by_mass
    slope = torch.where(above > 0, a_above, a)
    at_target = common + above_part - (1.0 - above) * by_mass + constants - slope * missing
    square = 2.0 * partials[StatField.OTHER_P2]
    if needs & Needs.SQUARES:
        squares, top = table[StatField.OTHER_P2], torch.exp(-table[StatField.LOG_SUM])
        a, a_above = a + square * (top - squares), a_above + square * (top - squares)
        at_target = at_target - square * squares * log_prob.exp()
    # In the order of CoefField.
    fields = (*softmax_coefs(table), a, -f_S, a_above, f_U, -f_F, f_G, square, at_target, table[StatField.LOG_SUM])
    return torch.stack(fields).to(dtype)


def class_gradient(call: Call, z: Tensor, coefs: Tensor) -> Tensor:
    """The gradient by logits z of classes other than the target, from coefficients (NUM_COEFS, ...) that broadcast."""
    log_sum = coefs[CoefField.LOG_SUM]
    x = z.to(coefs.dtype) - coefs[CoefField.MAX]
    above = x > log_sum + math.log(call.min_prob)
    b, bw = coefs[CoefField.B], coefs[CoefField.BW]
    p, slope = x.exp() * coefs[CoefField.INV_SUM], torch.where(above, coefs[CoefField.A_ABOVE], coefs[CoefField.A])
    if call.needs & Needs.SQUARES:
        slope = slope + coefs[CoefField.SQUARE] * (p - coefs[CoefField.INV_SUM])
    grad = slope * p
    grad = grad + torch.where(above, b + coefs[CoefField.C], b)
    if call.needs & ANY_FOCAL:
        w = (-torch.expm1(x - log_sum)).clamp(min=0.0) ** (call.gamma or 0.0)
        grad = grad + torch.where(above, bw + coefs[CoefField.CW], bw) * w
    return for_rows_that_count(grad.masked_fill(z == -math.inf, 0.0), coefs)


def for_rows_that_count(grad: Tensor, coefs: Tensor) -> Tensor:
    """0 for an ignored row, NaN for a row that must be."""
    inv_sum = coefs[CoefField.INV_SUM]
    return torch.where(inv_sum == 0.0, 0.0, torch.where(inv_sum.isnan(), math.nan, grad))


def probabilities(z: Tensor, coefs: Tensor) -> Tensor:
    """p of logits z from coefficients that broadcast; 0 in an ignored row."""
    high, inv_sum = coefs[CoefField.MAX], coefs[CoefField.INV_SUM]
    return torch.where(inv_sum == 0.0, 0.0, torch.exp(z - high) * inv_sum)
