"""The mathematics of a row in Triton: statistics, terms, coefficients. It mirrors csrc/row_math.h, formula by formula.

Numbers of a row are [BLOCK_N, 1] tensors, classes are the second axis of [BLOCK_N, BLOCK_K] tiles, and `acc` (float32,
or float64 for float64 logits) is the arithmetic's type. What changes from call to call (a term's factor and parameters,
the clamp, the focal exponent) is passed at run time; what is compiled in is which terms a sum has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ..statistics import focal_clamp_height

# Terms, by the numbers that terms.py gives them.
CE, NCE, NNCE, FL, NFL, NNFL = (tl.constexpr(i) for i in range(6))
MAE, RCE, GCE, AGCE, AUL, AEL = (tl.constexpr(i) for i in range(6, 12))

# Statistics of the second sweep, bits of NEEDS. Write `ABOVE & NEEDS`: the interpreter knows no other order.
ABOVE, ABOVE_MASS, FOCAL, FOCAL_ABOVE = (tl.constexpr(1 << i) for i in range(4))
ANY_ABOVE, ANY_FOCAL = tl.constexpr(3), tl.constexpr(12)

NUM_COEFS, NUM_STATS = 10, 13

_INF = tl.constexpr(math.inf)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_EXPM1_32 = tl.constexpr(tuple(1.0 / math.factorial(n) for n in range(8, 0, -1)))
_EXPM1_64 = tl.constexpr(tuple(1.0 / math.factorial(n) for n in range(16, 0, -1)))


def runtime_numbers(terms, min_prob: float, gamma: float, exact: bool) -> tuple[float, ...]:
    """What `constants` and `add_term` read: min_prob, gamma, T, A, then factor and parameters of each term.

    Triton takes a Python float as float32; exact: each number is three of them, which sum to it.
    """
    numbers = [min_prob, gamma, -math.log(min_prob), focal_clamp_height(min_prob, gamma)]
    for _, coef, p0, p1 in terms:
        numbers += (coef, p0, p1)
    if not exact:
        return tuple(map(float, numbers))
    parts = []
    for x in numbers:
        for _ in range(3):
            part = _to_float32(x)
            parts.append(part)
            x -= part
    return tuple(parts)


def _to_float32(x: float) -> float:
    import struct

    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


class Constants(NamedTuple):
    """A call's numbers."""

    min_prob: tl.tensor
    gamma: tl.tensor
    floor: tl.tensor  # T = -log(min_prob)
    focal_floor: tl.tensor  # A = (1 - min_prob)^gamma T


class RowStatistics(NamedTuple):
    """What the sweeps over a row find. Sums leave the target out, as in csrc/row_math.h."""

    log_sum: tl.tensor  # lse - max
    target_log_prob: tl.tensor  # l_y
    target_tail: tl.tensor  # 1 - p_y, from the sum without the target: exact as p_y -> 1
    target_prob: tl.tensor  # p_y
    classes: tl.tensor  # how many exist (logit > -inf) besides the target
    neg_log_sum: tl.tensor  # sum_{j != y} -l_j
    second: tl.tensor  # SecondSums


class SecondSums(NamedTuple):
    """Sums over j != y that need the final log_sum; 0 for those that NEEDS does not ask for."""

    above_sum: tl.tensor  # I_j (T + l_j)
    above_count: tl.tensor  # I_j
    below_mass: tl.tensor  # (1 - I_j) p_j
    focal_sum: tl.tensor  # -w_j l_j
    focal_weight: tl.tensor  # w_j
    focal_above_sum: tl.tensor  # I_j (A + w_j l_j)
    focal_above_weight: tl.tensor  # I_j w_j


class Partials(NamedTuple):
    """A loss and its partials by the statistics over all classes; a without the part that P makes."""

    loss: tl.tensor
    a: tl.tensor
    S: tl.tensor
    U: tl.tensor
    P: tl.tensor
    F: tl.tensor
    G: tl.tensor


class Coefficients(NamedTuple):
    """dL/dz_j = (a + d I_j) p_j + b + c I_j + (bw + cw I_j) w_j for j != y, a_above = a + d. `target`: that of y."""

    a: tl.tensor
    b: tl.tensor
    a_above: tl.tensor
    c: tl.tensor
    bw: tl.tensor
    cw: tl.tensor
    target: tl.tensor


class GradientRow(NamedTuple):
    """The gradient of a class is slope e_j + offset + weight w_j, each for classes below and above the clamp."""

    slope: tl.tensor  # a / sum, so that it multiplies e_j = exp(z_j - max)
    slope_above: tl.tensor
    offset: tl.tensor
    offset_above: tl.tensor
    weight: tl.tensor
    weight_above: tl.tensor
    threshold: tl.tensor  # z_j - max above which I_j = 1
    log_sum: tl.tensor
    inv_sum: tl.tensor
    gamma: tl.tensor


# ---- functions of one number


@triton.jit
def _number(numbers, i: tl.constexpr, acc: tl.constexpr):
    if acc == tl.float64:
        high = tl.full([], numbers[3 * i], acc) + tl.full([], numbers[3 * i + 1], acc)
        return high + tl.full([], numbers[3 * i + 2], acc)
    else:
        return tl.full([], numbers[i], acc)


@triton.jit
def constants(numbers, acc: tl.constexpr):
    """The call's Constants from its runtime_numbers."""
    return Constants(
        _number(numbers, 0, acc), _number(numbers, 1, acc), _number(numbers, 2, acc), _number(numbers, 3, acc)
    )


@triton.jit
def exp(x):
    """e^x. tl.exp would spend three more instructions on results below the smallest normal number, taken as 0 here."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _expm1_near_0(x):
    """exp(x) - 1 for |x| <= 0.5, to full relative accuracy."""
    if x.dtype == tl.float64:
        r = x * _EXPM1_64[0] + _EXPM1_64[1]
        for n in tl.static_range(2, 16):
            r = r * x + _EXPM1_64[n]
    else:
        r = x * _EXPM1_32[0] + _EXPM1_32[1]
        for n in tl.static_range(2, 8):
            r = r * x + _EXPM1_32[n]
    return r * x


@triton.jit
def expm1(x):
    """exp(x) - 1."""
    return tl.where(tl.abs(x) < 0.5, _expm1_near_0(x), exp(x) - 1.0)


@triton.jit
def one_minus_exp(x, e):
    """1 - exp(x) for x <= 0, where exp(x) is known as e."""
    return tl.where(x > -0.5, -_expm1_near_0(x), 1.0 - e)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1: what 1 + x rounds off is added back."""
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) / u


@triton.jit
def focal_weight(x, gamma):
    """x^gamma for x >= 0; the published exponent avoids the logarithm."""
    if gamma == 0.5:
        w = tl.sqrt(x)
    else:
        w = tl.where(x > 0.0, exp(gamma * tl.log(x)), tl.where(gamma == 0.0, 1.0, 0.0).to(x.dtype))
    return w


# ---- statistics


@triton.jit
def target_statistics(x_y, tail, classes, gap):
    """RowStatistics but for the second sweep's, from the first: x_y = z_y - max, tail = sum_{j != y} exp(z_j - max),
    gap = sum_{j != y} max - z_j."""
    e_y = exp(x_y)
    # The largest logit's exp is 1: log1p of the others' keeps the digits that log(sum) would drop.
    log_sum = log1p(tl.where(x_y == 0.0, tail, (tail - 1.0) + e_y))
    total = tail + e_y
    return RowStatistics(log_sum, x_y - log_sum, tail / total, e_y / total, classes, classes * log_sum + gap, 0.0)


@triton.jit
def with_second(s, second):
    """RowStatistics with the second sweep's sums."""
    return RowStatistics(s.log_sum, s.target_log_prob, s.target_tail, s.target_prob, s.classes, s.neg_log_sum, second)


@triton.jit
def closed_form(s, gap, c):
    """The second sweep's sums of a row whose classes are all above the clamp; not the focal ones."""
    zero = tl.zeros_like(gap)
    return SecondSums(s.classes * (c.floor - s.log_sum) - gap, s.classes, zero, zero, zero, zero, zero)


@triton.jit
def by_row(x):
    """[BLOCK_N], what a reduction found -> [BLOCK_N, 1]. One row's is the splat of a scalar, which has no layout:
    before Triton 3.9 that of [1, 1] drags loads and tiles along, or goes through shared memory once an operation."""
    if x.shape[0] == 1:
        return tl.full([1, 1], tl.sum(x), x.dtype)
    else:
        return x[:, None]


@triton.jit
def lane_sum(t, LANES: tl.constexpr):
    """[BLOCK_N, BLOCK_K] -> [BLOCK_N, LANES]: neighbouring classes are added up."""
    if LANES == 1:
        return tl.sum(t, 1)[:, None]
    else:
        return tl.sum(tl.reshape(t, [t.shape[0], LANES, t.shape[1] // LANES]), 2)


@triton.jit
def second_sums(x, e, s, c, NEEDS: tl.constexpr, LANES: tl.constexpr):
    """SecondSums of a tile, [BLOCK_N, LANES]. x = z - max, and -inf for the target; e = exp(x).

    Comparisons are made where they are used: kept for later, they would fill registers.
    """
    threshold = s.log_sum - c.floor
    none = tl.zeros([x.shape[0], LANES], x.dtype)
    above_sum, above_count, below_mass = none, none, none
    focal_sum, weight, focal_above, weight_above = none, none, none, none
    if ANY_ABOVE & NEEDS:
        above_sum = lane_sum(tl.maximum(x - threshold, 0.0), LANES)
        above_count = lane_sum(tl.where(x > threshold, 1.0, 0.0).to(x.dtype), LANES)
    if ABOVE_MASS & NEEDS:
        below_mass = lane_sum(tl.where(x <= threshold, e, 0.0), LANES) * exp(-s.log_sum)
    if ANY_FOCAL & NEEDS:
        l = x - s.log_sum
        w = focal_weight(one_minus_exp(l, e * exp(-s.log_sum)), c.gamma)
        w = tl.where(x != -_INF, w, 0.0)
        wl = tl.where(x != -_INF, w * l, 0.0)
        if FOCAL & NEEDS:
            focal_sum = -lane_sum(wl, LANES)
            weight = lane_sum(w, LANES)
        if FOCAL_ABOVE & NEEDS:
            focal_above = lane_sum(tl.where(x > threshold, wl + c.focal_floor, 0.0), LANES)
            weight_above = lane_sum(tl.where(x > threshold, w, 0.0), LANES)
    return SecondSums(above_sum, above_count, below_mass, focal_sum, weight, focal_above, weight_above)


@triton.jit
def no_second(like):
    """SecondSums of nothing."""
    zero = tl.zeros_like(like)
    return SecondSums(zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def add_second(a, b, NEEDS: tl.constexpr):
    """a + b, of those sums that are needed."""
    above_sum, above_count, below_mass = a.above_sum, a.above_count, a.below_mass
    focal_sum, weight = a.focal_sum, a.focal_weight
    focal_above, weight_above = a.focal_above_sum, a.focal_above_weight
    if ANY_ABOVE & NEEDS:
        above_sum, above_count = above_sum + b.above_sum, above_count + b.above_count
    if ABOVE_MASS & NEEDS:
        below_mass += b.below_mass
    if FOCAL & NEEDS:
        focal_sum, weight = focal_sum + b.focal_sum, weight + b.focal_weight
    if FOCAL_ABOVE & NEEDS:
        focal_above, weight_above = focal_above + b.focal_above_sum, weight_above + b.focal_above_weight
    return SecondSums(above_sum, above_count, below_mass, focal_sum, weight, focal_above, weight_above)


@triton.jit
def merged_second(a, NEEDS: tl.constexpr):
    """[BLOCK_N, LANES] -> [BLOCK_N, 1]."""
    zero = tl.zeros([a.above_sum.shape[0], 1], a.above_sum.dtype)
    above_sum, above_count, below_mass = zero, zero, zero
    focal_sum, weight, focal_above, weight_above = zero, zero, zero, zero
    if ANY_ABOVE & NEEDS:
        above_sum, above_count = by_row(tl.sum(a.above_sum, 1)), by_row(tl.sum(a.above_count, 1))
    if ABOVE_MASS & NEEDS:
        below_mass = by_row(tl.sum(a.below_mass, 1))
    if FOCAL & NEEDS:
        focal_sum, weight = by_row(tl.sum(a.focal_sum, 1)), by_row(tl.sum(a.focal_weight, 1))
    if FOCAL_ABOVE & NEEDS:
        focal_above, weight_above = by_row(tl.sum(a.focal_above_sum, 1)), by_row(tl.sum(a.focal_above_weight, 1))
    return SecondSums(above_sum, above_count, below_mass, focal_sum, weight, focal_above, weight_above)


# ---- terms: each adds `k` times itself to the loss and its partials


@triton.jit
def _ce(f, s, k):
    return Partials(f.loss - k * s.target_log_prob, f.a + k, f.S, f.U, f.P, f.F, f.G)


@triton.jit
def _nce(f, s, k):  # -l / S
    l = s.target_log_prob
    S = s.neg_log_sum - l
    r = k / S
    # Logits near the dtype's lowest, as masks write them, overflow the sum: the loss and its gradient are then 0.
    a = tl.where(S < _INF, r * (s.neg_log_sum + s.classes * l) / S, 0.0)
    return Partials(f.loss - r * l, f.a + a, f.S + r * l / S, f.U, f.P, f.F, f.G)


@triton.jit
def _nnce(f, s, k, c):  # 1 - I (T + l) / U
    others, height = s.second.above_sum, c.floor + s.target_log_prob
    above = s.target_log_prob > -c.floor
    U = others + height
    r = k / U
    a = tl.where(above, r * (others - s.second.above_count * height) / U, 0.0)
    loss = f.loss + tl.where(above, r * others, k)
    return Partials(loss, f.a + a, f.S, f.U + tl.where(above, r * height / U, 0.0), f.P, f.F, f.G)


@triton.jit
def _fl(f, s, k, c):
    k *= focal_weight(s.target_tail, c.gamma)
    return Partials(f.loss - k * s.target_log_prob, f.a + k, f.S, f.U, f.P, f.F, f.G)


@triton.jit
def _nfl(f, s, k, c):  # -w l / F
    l, others, w_y = s.target_log_prob, s.second.focal_sum, focal_weight(s.target_tail, c.gamma)
    F = others - w_y * l
    r = k * w_y / F
    a = tl.where(F < _INF, r * (others + s.second.focal_weight * l) / F, 0.0)
    return Partials(f.loss - r * l, f.a + a, f.S, f.U, f.P, f.F + r * l / F, f.G)


@triton.jit
def _nnfl(f, s, k, c):  # 1 - I (A + w l) / G
    w_y = focal_weight(s.target_tail, c.gamma)
    others, height = s.second.focal_above_sum, c.focal_floor + w_y * s.target_log_prob
    above = s.target_log_prob > -c.floor
    G = others + height
    r = k / G
    a = tl.where(above, r * (w_y * others - s.second.focal_above_weight * height) / G, 0.0)
    loss = f.loss + tl.where(above, r * others, k)
    return Partials(loss, f.a + a, f.S, f.U, f.P, f.F, f.G + tl.where(above, r * height / G, 0.0))


@triton.jit
def _mae(f, s, k):
    return Partials(f.loss + k * s.target_tail, f.a + k * s.target_prob, f.S, f.U, f.P, f.F, f.G)


@triton.jit
def _rce(f, s, k, c):  # sum_{j != y} max(p_j, min_prob)
    second = s.second
    clamped = s.target_tail - second.below_mass + (s.classes - second.above_count) * c.min_prob
    a = tl.where(s.target_log_prob > -c.floor, k * s.target_prob, 0.0)
    return Partials(f.loss + k * clamped, f.a + a, f.S, f.U, f.P + k, f.F, f.G)


@triton.jit
def _gce(f, s, k, q):  # (1 - p^q) / q
    l = q * s.target_log_prob
    return Partials(f.loss - k * expm1(l) / q, f.a + k * exp(l), f.S, f.U, f.P, f.F, f.G)


@triton.jit
def _agce(f, s, k, a, q):  # ((a + 1)^q - (a + p)^q) / q, from log(a + p) - log(a + 1) = log1p(-tail / (a + 1))
    k *= exp(q * tl.log(a + 1.0))
    ratio = q * log1p(-s.target_tail / (a + 1.0))
    slope = k * exp(ratio) / (a + s.target_prob) * s.target_prob
    return Partials(f.loss - k * expm1(ratio) / q, f.a + slope, f.S, f.U, f.P, f.F, f.G)


@triton.jit
def _aul(f, s, k, a, q):  # ((a - p)^q - (a - 1)^q) / q, likewise
    k *= exp(q * tl.log(a - 1.0))
    ratio = q * log1p(s.target_tail / (a - 1.0))
    slope = k * exp(ratio) / ((a - 1.0) + s.target_tail) * s.target_prob
    return Partials(f.loss + k * expm1(ratio) / q, f.a + slope, f.S, f.U, f.P, f.F, f.G)


@triton.jit
def _ael(f, s, k, a):  # exp(-p / a)
    v = k * exp(-s.target_prob / a)
    return Partials(f.loss + v, f.a + v * s.target_prob / a, f.S, f.U, f.P, f.F, f.G)


@triton.jit
def _add_term(f, s, c, numbers, i: tl.constexpr, KIND: tl.constexpr):
    """Adds the term whose factor and parameters begin at numbers[i]."""
    acc: tl.constexpr = f.loss.dtype
    k = _number(numbers, i, acc)
    if KIND == CE:
        r = _ce(f, s, k)
    elif KIND == NCE:
        r = _nce(f, s, k)
    elif KIND == NNCE:
        r = _nnce(f, s, k, c)
    elif KIND == FL:
        r = _fl(f, s, k, c)
    elif KIND == NFL:
        r = _nfl(f, s, k, c)
    elif KIND == NNFL:
        r = _nnfl(f, s, k, c)
    elif KIND == MAE:
        r = _mae(f, s, k)
    elif KIND == RCE:
        r = _rce(f, s, k * _number(numbers, i + 1, acc), c)
    elif KIND == GCE:
        r = _gce(f, s, k, _number(numbers, i + 1, acc))
    elif KIND == AGCE:
        r = _agce(f, s, k, _number(numbers, i + 1, acc), _number(numbers, i + 2, acc))
    elif KIND == AUL:
        r = _aul(f, s, k, _number(numbers, i + 1, acc), _number(numbers, i + 2, acc))
    else:
        tl.static_assert(KIND == AEL)
        r = _ael(f, s, k, _number(numbers, i + 1, acc))
    return r


@triton.jit
def evaluate(s, c, numbers, KINDS: tl.constexpr, NEEDS: tl.constexpr):
    """The loss of a row and the Coefficients of its gradient. A NaN row is NaN in every loss."""
    zero = s.target_tail - s.target_tail
    f = Partials(zero, zero, zero, zero, zero, zero, zero)
    for t in tl.static_range(len(KINDS)):
        f = _add_term(f, s, c, numbers, 3 * t + 4, KINDS[t])
    # At the target the parts of a p_y + ... + e that are equal cancel by hand: what is left is exact as p_y -> 1.
    second = s.second
    target = s.classes * f.S - f.a * s.target_tail
    a_above = f.a
    if ABOVE & NEEDS:
        target -= second.above_count * f.U
    if ABOVE_MASS & NEEDS:
        below_y = tl.where(s.target_log_prob > -c.floor, 0.0, 1.0)
        below = second.below_mass + below_y * s.target_prob  # 1 - P
        a_above += below * f.P
        target += (below - below_y) * s.target_prob * f.P
    if FOCAL & NEEDS:
        target += second.focal_weight * f.F
    if FOCAL_ABOVE & NEEDS:
        target -= second.focal_above_weight * f.G
    return f.loss, Coefficients(a_above - f.P, -f.S, a_above, f.U, -f.F, f.G, target)


@triton.jit
def scaled(g, factor):
    """Coefficients of `factor` times the loss."""
    return Coefficients(
        g.a * factor, g.b * factor, g.a_above * factor, g.c * factor, g.bw * factor, g.cw * factor, g.target * factor
    )


@triton.jit
def all_statistics(s, m, ignored, c, NEEDS: tl.constexpr):
    """The 13 statistics over all classes, as StatField in csrc/row_math.h orders them; NaN for those that no sweep was
    asked for, and for a NaN row. Those of an ignored row are a uniform row's: any f is finite there."""
    l, second = s.target_log_prob, s.second
    I_y = tl.where(l > -c.floor, 1.0, 0.0)
    poison = s.target_tail - s.target_tail
    absent = poison + float("nan")
    count = s.classes + 1.0
    above_sum, above_count, mass = absent, absent, absent
    focal_sum, weight, focal_above, weight_above = absent, absent, absent, absent
    if NEEDS > 0:
        height = I_y * (c.floor + l)
        above_sum = tl.where(ignored, count * height, second.above_sum + height)
        above_count = tl.where(ignored, count * I_y, second.above_count + I_y) + poison
    if ABOVE_MASS & NEEDS:
        mass = 1.0 - (second.below_mass + (1.0 - I_y) * s.target_prob).to(tl.float64)  # RCE takes p_y from it again
    if ANY_FOCAL & NEEDS:
        w_y = focal_weight(s.target_tail, c.gamma)
        focal_sum = tl.where(ignored, -count * w_y * l, second.focal_sum - w_y * l)
        weight = tl.where(ignored, count * w_y, second.focal_weight + w_y)
        above = I_y * (c.focal_floor + w_y * l)
        focal_above = tl.where(ignored, count * above, second.focal_above_sum + above)
        weight_above = tl.where(ignored, count * w_y, second.focal_above_weight + I_y * w_y)
    valid = tl.where(ignored, 0.0, 1.0)
    return (m + poison, s.log_sum, l, count + poison, s.neg_log_sum - l, above_sum, mass,
            above_count, focal_sum, weight, focal_above, weight_above, valid)  # fmt: skip


# ---- the gradient of a class


@triton.jit
def gradient_row(g, log_sum, inv_sum, c):
    """GradientRow from a row's Coefficients, log_sum and exp(-log_sum)."""
    return GradientRow(
        g.a * inv_sum, g.a_above * inv_sum, g.b, g.b + g.c, g.bw, g.bw + g.cw, log_sum - c.floor, log_sum, inv_sum,
        c.gamma,
    )  # fmt: skip


@triton.jit
def gradient(x, e, r, NEEDS: tl.constexpr):
    """The gradient of every class as if it were not the target and existed: x = z - max, e = exp(x), r: GradientRow."""
    above = x > r.threshold
    slope, offset = r.slope, r.offset
    if ABOVE_MASS & NEEDS:
        slope = tl.where(above, r.slope_above, slope)
    if ABOVE & NEEDS:
        offset = tl.where(above, r.offset_above, offset)
    if ANY_FOCAL & NEEDS:
        weight = r.weight
        if FOCAL_ABOVE & NEEDS:
            weight = tl.where(above, r.weight_above, weight)
        offset += weight * focal_weight(one_minus_exp(x - r.log_sum, e * r.inv_sum), r.gamma)
    return e * slope + offset


# ---- memory


@triton.jit
def stored(x, dtype: tl.constexpr):
    """x as `dtype`, rounded to nearest even; the interpreter by itself would truncate to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def multiple(x, factor: tl.constexpr):
    """x, which is a multiple of `factor`, so that the compiler knows."""
    return x // factor * factor


@triton.jit
def load_label(Target_ptr, rows, mask, K, ignore_index):
    """(label int32, known, ignored) of `rows`: a label that is no class, and is not ignored, is not known either.

    The label of a row that is not known is -1, which no class has.
    """
    label = tl.load(Target_ptr + rows, mask=mask, other=0).to(tl.int64)
    ignored = label == ignore_index
    known = mask & (label >= 0) & (label < K) & (label != ignore_index)
    return tl.where(known, label, -1).to(tl.int32), known, mask & ignored
