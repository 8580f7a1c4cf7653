"""The mathematics of a row in Triton: statistics, terms, coefficients. It mirrors csrc/row_math.h, formula by formula.

Numbers per row are [BLOCK_N, 1] tensors, classes are the second axis of [BLOCK_N, BLOCK_K] tiles. Compiled in are the
kinds of a sum's terms (KINDS) and the statistics that they read (NEEDS); all numbers are passed at run time. Kernels
loop over the fields of FirstSums, SecondSums, GradCoefs and of the statistics' table: what they are is said here alone.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .folds import asked, equal, folded, lane_sum, last_min, last_sum
from .scalar_math import INF, exp, expm1, focal_weight, log1p, number, one_minus_exp

# Terms, by the numbers that terms.py gives them.
CE, NCE, NNCE, FL, NFL, NNFL = (tl.constexpr(i) for i in range(6))
MAE, RCE, GCE, AGCE, AUL, AEL, MSE, AMSE, EPS_CE = (tl.constexpr(i) for i in range(6, 15))

# Bits of NEEDS, and those that a second sweep is made for. Write `ABOVE & NEEDS`: the interpreter knows no other order.
ABOVE, ABOVE_MASS, FOCAL, FOCAL_ABOVE, SQUARES = (tl.constexpr(1 << i) for i in range(5))
ANY_ABOVE, ANY_FOCAL, IN_SECOND_SWEEP = (tl.constexpr(bits) for bits in (3, 12, 15))


# ---- what sweeps add up, always without the target: with its part added by hand, what is equal in a loss and its
# gradient cancels exactly, however dominant the target or another class


class FirstSums(NamedTuple):
    """What the first sweep finds, [BLOCK_N, LANES] or merged [BLOCK_N, 1]."""

    max: tl.tensor  # merged: the target's logit is considered too
    low: tl.tensor  # the smallest logit, or less
    tail: tl.tensor  # exp(z_j - max)
    gap: tl.tensor  # max - z_j, where z_j > -inf
    count: tl.tensor  # 1, where z_j > -inf
    squares: tl.tensor  # exp(z_j - max)^2; 0 where NEEDS does not ask for it


class SecondSums(NamedTuple):
    """Sums that need the final log_sum, in the order of the statistics' table; 0 where NEEDS does not ask for them."""

    above_sum: tl.tensor  # I_j (T + l_j)
    below_mass: tl.tensor  # (1 - I_j) p_j
    above_count: tl.tensor  # I_j
    focal_sum: tl.tensor  # -w_j l_j
    focal_weight: tl.tensor  # w_j
    focal_above_sum: tl.tensor  # I_j (A + w_j l_j)
    focal_above_weight: tl.tensor  # I_j w_j


# For each field: how those of two parts of a row become one, and the bits of NEEDS that ask for it.
FIRST_FOLDS = tl.constexpr(("about", "min", "sum", "sum", "sum", "sum"))
FIRST_BITS = tl.constexpr((0, 0, 0, 0, 0, SQUARES))
SECOND_FOLDS = tl.constexpr(("sum",) * len(SecondSums._fields))
SECOND_BITS = tl.constexpr((ANY_ABOVE, ABOVE_MASS, ANY_ABOVE, FOCAL, FOCAL, FOCAL_ABOVE, FOCAL_ABOVE))
NUM_FIRST, NUM_SECOND = tl.constexpr(len(FirstSums._fields)), tl.constexpr(len(SecondSums._fields))
_SECOND = tl.constexpr(SecondSums._fields)


@triton.jit
def first_of_tile(z, x, e, base, NEEDS: tl.constexpr, CAREFUL: tl.constexpr):
    """FirstSums of logits z, [BLOCK_N, BLOCK_K] or [BLOCK_N, LANES, classes], about `base`: x = z - base, e = exp(x).
    CAREFUL: -inf may be among them; without it -inf leaves low = -inf, and sums that are of no use."""
    below = x
    if CAREFUL:
        below = tl.where(z != -INF, x, 0.0)
    tail, gap = last_sum(e), -last_sum(below)
    squares = tl.zeros_like(tail)
    if SQUARES & NEEDS:
        squares = last_sum(e * e)
    if CAREFUL:
        low, count = base + last_min(below), last_sum(tl.where(z != -INF, 1.0, 0.0).to(x.dtype))
    else:
        low, count = last_min(z), tl.full(base.shape, z.shape[len(z.shape) - 1], x.dtype)
    return FirstSums(base, low, tail, gap, count, squares)


@triton.jit
def about(f, high, NEEDS: tl.constexpr):
    """FirstSums about a larger maximum."""
    fall = tl.where(f.count > 0.0, f.max - high, 0.0)  # a lane without classes has max = -inf
    shrink, squares = exp(fall), f.squares
    if SQUARES & NEEDS:
        squares *= shrink * shrink
    return FirstSums(high, f.low, f.tail * shrink, f.gap - f.count * fall, f.count, squares)


@triton.jit
def _second_of_class(i: tl.constexpr, x, e, w, cost, threshold, c):
    """What a class adds to the i-th of SecondSums: I_j = [x > threshold], w = w_j, cost = -w_j l_j; below_mass in units
    of e. Comparisons are made where they are used: kept for later, they would fill registers."""
    if equal(_SECOND[i], "above_sum"):
        r = tl.maximum(x - threshold, 0.0)
    elif equal(_SECOND[i], "below_mass"):
        r = tl.where(x <= threshold, e, 0.0)
    elif equal(_SECOND[i], "above_count"):
        r = tl.where(x > threshold, 1.0, 0.0).to(x.dtype)
    elif equal(_SECOND[i], "focal_sum"):
        r = cost
    elif equal(_SECOND[i], "focal_weight"):
        r = w
    elif equal(_SECOND[i], "focal_above_sum"):
        r = tl.where(x > threshold, c.focal_clamp_height - cost, 0.0)
    else:
        tl.static_assert(equal(_SECOND[i], "focal_above_weight"))
        r = tl.where(x > threshold, w, 0.0)
    return r


@triton.jit
def second_of_tile(x, e, s, c, NEEDS: tl.constexpr, LANES: tl.constexpr):
    """SecondSums of a tile, [BLOCK_N, LANES]. x = z - max, and -inf for the target; e = exp(x)."""
    threshold, inv_sum = s.log_sum - c.clamp_height, exp(-s.log_sum)
    w, cost = None, None
    if ANY_FOCAL & NEEDS:
        l = x - s.log_sum
        w = focal_weight(one_minus_exp(l, e * inv_sum), c.gamma)
        w = tl.where(x != -INF, w, 0.0)
        cost = tl.where(x != -INF, -(w * l), 0.0)
    sums = ()
    for i in tl.static_range(NUM_SECOND):
        value = tl.zeros([x.shape[0], LANES], x.dtype)
        if asked(SECOND_BITS[i], NEEDS):
            value = lane_sum(_second_of_class(i, x, e, w, cost, threshold, c), LANES)
            if equal(_SECOND[i], "below_mass"):
                value *= inv_sum
        sums += (value,)
    return SecondSums(*sums)


# ---- statistics


class RowStatistics(NamedTuple):
    """What the sweeps over a row find."""

    first: tl.tensor  # FirstSums
    x_y: tl.tensor  # z_y - max: 0 where the target is the row's top
    log_sum: tl.tensor  # lse - max
    target_log_prob: tl.tensor  # l_y
    target_tail: tl.tensor  # 1 - p_y, from the sum without the target: exact as p_y -> 1
    target_prob: tl.tensor  # p_y
    neg_log_sum: tl.tensor  # sum_{j != y} -l_j
    squares: tl.tensor  # sum_{j != y} p_j^2
    below_top: tl.tensor  # max p - squares, exact as another class's p -> 1
    second: tl.tensor  # SecondSums


NUM_STATS = tl.constexpr(5 + len(SecondSums._fields) + 3)


@triton.jit
def uniform_if(ignored, f, K):
    """FirstSums, of an ignored row those of a uniform one: any loss is finite there."""
    others, gap = K - 1.0, tl.where(ignored, 0.0, f.gap)
    tail, count = tl.where(ignored, others, f.tail), tl.where(ignored, others, f.count)
    return FirstSums(f.max, f.low, tail, gap, count, tl.where(ignored, others, f.squares))


@triton.jit
def row_statistics(f, z_y, c):
    """RowStatistics from the merged FirstSums; the second sweep's as if every class were above the clamp, and without
    the focal ones. A target that does not exist makes a NaN row."""
    x_y = tl.where(z_y == -INF, float("nan"), z_y - f.max)
    e_y = exp(x_y)
    # The largest logit's exp is 1: log1p of the others' keeps the digits that log(sum) would drop.
    log_sum = log1p(tl.where(x_y == 0.0, f.tail, (f.tail - 1.0) + e_y))
    total = f.tail + e_y
    above_sum, zero = f.count * (c.clamp_height - log_sum) - f.gap, tl.zeros_like(f.gap)
    second = SecondSums(above_sum, zero, f.count, zero, zero, zero, zero)
    tail, prob, neg_log_sum = f.tail / total, e_y / total, f.count * log_sum + f.gap
    squares, below_top = f.squares / (total * total), ((f.tail - f.squares) + e_y) / (total * total)
    return RowStatistics(f, x_y, log_sum, x_y - log_sum, tail, prob, neg_log_sum, squares, below_top, second)


@triton.jit
def all_statistics(s, known, ignored, c, NEEDS: tl.constexpr):
    """The statistics over all classes, as StatField in csrc/row_math.h orders them; NaN for those that no sweep was
    asked for, for a NaN row, and for a label that is no class. s: an ignored row is a uniform_if one."""
    l, count = s.target_log_prob, s.first.count + 1.0
    poison = tl.where(known | ignored, s.target_tail - s.target_tail, float("nan"))
    w, cost = None, None
    if ANY_FOCAL & NEEDS:
        w = focal_weight(s.target_tail, c.gamma)
        cost = -(w * l)
    fields = (s.first.max + poison, s.log_sum + poison, l + poison, count + poison, s.neg_log_sum - l + poison)
    for i in tl.static_range(NUM_SECOND):
        value = poison + float("nan")
        if asked(SECOND_BITS[i], NEEDS):
            target = _second_of_class(i, l, s.target_prob, w, cost, -c.clamp_height, c)
            value = tl.where(ignored, count * target, s.second[i] + target) + poison
            if equal(_SECOND[i], "below_mass"):
                value = 1.0 - value.to(tl.float64)  # the mass above: RCE takes p_y from it again
        fields += (value,)
    squares = poison + float("nan")
    if SQUARES & NEEDS:
        squares = s.squares + poison
    fields += (poison - s.x_y, squares, tl.where(ignored, 0.0, 1.0))
    return fields


# ---- terms


class Partials(NamedTuple):
    """A loss and its partials by the statistics over all classes; a without the parts that P and the others' squares
    make. Of a term: what it does not touch is -0.0, which adds nothing at all, so that no instruction is made of it."""

    loss: tl.tensor
    a: tl.tensor
    S: tl.tensor = -0.0
    U: tl.tensor = -0.0
    P: tl.tensor = -0.0
    F: tl.tensor = -0.0
    G: tl.tensor = -0.0
    Q: tl.tensor = -0.0


_SUMS, _ALWAYS = tl.constexpr(("sum",) * len(Partials._fields)), tl.constexpr((0,) * len(Partials._fields))


@triton.jit
def _term(s, c, numbers, i: tl.constexpr, KIND: tl.constexpr):
    """Partials of a term, whose factor and parameters begin at numbers[i]."""
    acc: tl.constexpr = s.log_sum.dtype
    k, p0, p1 = number(numbers, i, acc), number(numbers, i + 1, acc), number(numbers, i + 2, acc)
    l, p, tail, second = s.target_log_prob, s.target_prob, s.target_tail, s.second
    above = l > -c.clamp_height
    if KIND == CE:
        f = Partials(-(k * l), k)
    elif KIND == NCE:  # -l / S
        S = s.neg_log_sum - l
        r = k / S
        # Logits near the dtype's lowest, as masks write them, overflow the sum: the loss and its gradient are then 0.
        a = tl.where(S < INF, r * (s.neg_log_sum + s.first.count * l) / S, 0.0)
        f = Partials(-(r * l), a, S=r * l / S)
    elif KIND == NNCE:  # 1 - I (T + l) / U
        others, height = second.above_sum, c.clamp_height + l
        U = others + height
        r = k / U
        a = tl.where(above, r * (others - second.above_count * height) / U, 0.0)
        f = Partials(tl.where(above, r * others, k), a, U=tl.where(above, r * height / U, 0.0))
    elif KIND == FL:
        w = k * focal_weight(tail, c.gamma)
        f = Partials(-(w * l), w)
    elif KIND == NFL:  # -w l / F
        others, w = second.focal_sum, focal_weight(tail, c.gamma)
        F = others - w * l
        r = k * w / F
        a = tl.where(F < INF, r * (others + second.focal_weight * l) / F, 0.0)
        f = Partials(-(r * l), a, F=r * l / F)
    elif KIND == NNFL:  # 1 - I (A + w l) / G
        others, w = second.focal_above_sum, focal_weight(tail, c.gamma)
        height = c.focal_clamp_height + w * l
        G = others + height
        r = k / G
        a = tl.where(above, r * (w * others - second.focal_above_weight * height) / G, 0.0)
        f = Partials(tl.where(above, r * others, k), a, G=tl.where(above, r * height / G, 0.0))
    elif KIND == MAE:
        f = Partials(k * tail, k * p)
    elif KIND == RCE:  # p0 sum_{j != y} max(p_j, min_prob)
        r = k * p0
        clamped = tail - second.below_mass + (s.first.count - second.above_count) * c.min_prob
        f = Partials(r * clamped, tl.where(above, r * p, 0.0), P=r)
    elif KIND == GCE:  # (1 - p^q) / q
        f = Partials(-(k * expm1(p0 * l) / p0), k * exp(p0 * l))
    elif KIND == AGCE:  # ((a + 1)^q - (a + p)^q) / q, from log(a + p) - log(a + 1) = log1p(-tail / (a + 1))
        lead = k * exp(p1 * tl.log(p0 + 1.0))
        ratio = p1 * log1p(-tail / (p0 + 1.0))
        f = Partials(-(lead * expm1(ratio) / p1), lead * exp(ratio) / (p0 + p) * p)
    elif KIND == AUL:  # ((a - p)^q - (a - 1)^q) / q, likewise
        lead = k * exp(p1 * tl.log(p0 - 1.0))
        ratio = p1 * log1p(tail / (p0 - 1.0))
        f = Partials(lead * expm1(ratio) / p1, lead * exp(ratio) / ((p0 - 1.0) + tail) * p)
    elif KIND == AEL:  # exp(-p / a)
        v = k * exp(-p / p0)
        f = Partials(v, v * p / p0)
    elif KIND == MSE or KIND == AMSE:  # (a - p)^2 + sum_{j != y} p_j^2, over K in AMSE; a is 1 in MSE
        r, gap = k, tail
        if KIND == AMSE:
            r, gap = k / (s.first.count + 1.0), p0 - 1.0 + tail
        f = Partials(r * (gap * gap + s.squares), 2.0 * r * p * gap, Q=r)
    else:  # -log((p + m [y is the top]) / (1 + m)); p1 = log(1 + m)
        tl.static_assert(KIND == EPS_CE)
        top = s.x_y == 0.0
        f = Partials(k * tl.where(top, -log1p(-tail / (p0 + 1.0)), p1 - l), k * tl.where(top, p / (p + p0), 1.0))
    return f


# ---- the gradient


class GradCoefs(NamedTuple):
    """dL/dz_j = (a + d I_j + square (p_j - max p)) p_j + b + c I_j + (bw + cw I_j) w_j for j != y,
    p_j = exp(z_j - max) inv_sum. The order is CoefField's in csrc/row_math.h."""

    max: tl.tensor
    inv_sum: tl.tensor  # 0: an ignored row; NaN: a NaN row
    a: tl.tensor
    b: tl.tensor
    a_above: tl.tensor  # a + d
    c: tl.tensor
    bw: tl.tensor
    cw: tl.tensor
    square: tl.tensor
    target: tl.tensor  # the whole gradient at j = y
    log_sum: tl.tensor


NUM_COEFS = tl.constexpr(len(GradCoefs._fields))
INV_SUM = tl.constexpr(GradCoefs._fields.index("inv_sum"))
# For each field: the bits of NEEDS with which it is read, and whether it is proportional to the loss.
COEF_BITS = tl.constexpr((0, 0, 0, 0, ABOVE_MASS, ABOVE, FOCAL, FOCAL_ABOVE, SQUARES, 0, IN_SECOND_SWEEP))
IS_LINEAR = tl.constexpr((0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0))


@triton.jit
def evaluate(s, known, ignored, c, numbers, KINDS: tl.constexpr, NEEDS: tl.constexpr):
    """The loss of a row and its GradCoefs. A NaN row is NaN in all of them."""
    zero, second = s.target_tail - s.target_tail, s.second
    f = Partials(zero, zero, zero, zero, zero, zero, zero, zero)
    for t in tl.static_range(len(KINDS)):
        f = Partials(*folded(f, _term(s, c, numbers, 4 + 3 * t, KINDS[t]), _SUMS, _ALWAYS, NEEDS))
    # At the target the parts of a p_y + ... + e that are equal cancel by hand: what is left is exact as p_y -> 1.
    target = s.first.count * f.S - f.a * s.target_tail
    a_above = f.a
    if ABOVE & NEEDS:
        target -= second.above_count * f.U
    if ABOVE_MASS & NEEDS:
        below_y = tl.where(s.target_log_prob > -c.clamp_height, 0.0, 1.0)
        below = second.below_mass + below_y * s.target_prob  # 1 - P
        a_above += below * f.P
        target += (below - below_y) * s.target_prob * f.P
    if FOCAL & NEEDS:
        target += second.focal_weight * f.F
    if FOCAL_ABOVE & NEEDS:
        target -= second.focal_above_weight * f.G
    square = 2.0 * f.Q
    if SQUARES & NEEDS:
        a_above += square * s.below_top
        target -= square * s.squares * s.target_prob
    inv_sum = tl.where(known, exp(-s.log_sum), tl.where(ignored, 0.0, float("nan")))
    m, a = s.first.max, a_above - f.P
    return f.loss, GradCoefs(m, inv_sum, a, -f.S, a_above, f.U, -f.F, f.G, square, target, s.log_sum)


class GradientRow(NamedTuple):
    """The gradient of a class is slope e_j + offset + weight w_j, each for classes below and above the clamp."""

    coefs: tl.tensor  # GradCoefs: b and bw are offset and weight below the clamp
    slope: tl.tensor  # a / sum, so that it multiplies e_j = exp(z_j - max)
    slope_above: tl.tensor
    offset_above: tl.tensor
    weight_above: tl.tensor
    square: tl.tensor  # multiplies (e_j - 1) e_j
    threshold: tl.tensor  # z_j - max above which I_j = 1
    inv_sum: tl.tensor
    poison: tl.tensor  # of a class that does not exist: 0; NaN in a NaN row
    gamma: tl.tensor


@triton.jit
def gradient_row(g, inv_sum, c):
    """GradientRow from a row's GradCoefs and exp(-log_sum)."""
    slope, slope_above, poison = g.a * inv_sum, g.a_above * inv_sum, g.inv_sum - g.inv_sum
    offset_above, weight_above, threshold = g.b + g.c, g.bw + g.cw, g.log_sum - c.clamp_height
    square = g.square * inv_sum * inv_sum
    return GradientRow(g, slope, slope_above, offset_above, weight_above, square, threshold, inv_sum, poison, c.gamma)


@triton.jit
def gradient(x, e, r, NEEDS: tl.constexpr):
    """The gradient of every class as if it were not the target and existed: x = z - max, e = exp(x), r: GradientRow."""
    above = x > r.threshold
    slope, offset = r.slope, r.coefs.b
    if ABOVE_MASS & NEEDS:
        slope = tl.where(above, r.slope_above, slope)
    if ABOVE & NEEDS:
        offset = tl.where(above, r.offset_above, offset)
    if ANY_FOCAL & NEEDS:
        weight = r.coefs.bw
        if FOCAL_ABOVE & NEEDS:
            weight = tl.where(above, r.weight_above, weight)
        offset += weight * focal_weight(one_minus_exp(x - r.coefs.log_sum, e * r.inv_sum), r.gamma)
    if SQUARES & NEEDS:
        slope += r.square * (e - 1.0)
    return e * slope + offset
