"""Functions of one number in Triton, and the numbers that a kernel is told at run time.

`acc` (float32, or float64 for float64 logits) is the arithmetic's type.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import triton
import triton.language as tl

from ..statistics import focal_clamp_height

INF = tl.constexpr(math.inf)
_EXPM1_32 = tl.constexpr(tuple(1.0 / math.factorial(n) for n in range(8, 0, -1)))
_EXPM1_64 = tl.constexpr(tuple(1.0 / math.factorial(n) for n in range(16, 0, -1)))


class Constants(NamedTuple):
    """A call's numbers."""

    min_prob: tl.tensor
    gamma: tl.tensor
    clamp_height: tl.tensor  # T = -log(min_prob)
    focal_clamp_height: tl.tensor  # A = (1 - min_prob)^gamma T


def runtime_numbers(terms, min_prob: float, gamma: float, exact: bool) -> tuple[float, ...]:
    """What `constants` and row_math.evaluate read: min_prob, gamma, T, A, then factor, p0 and p1 of each term.

    Triton takes a Python float as float32; exact: each number is three of them, which sum to it.
    """
    numbers = [min_prob, gamma, -math.log(min_prob), focal_clamp_height(min_prob, gamma)]
    for _, factor, p0, p1 in terms:
        numbers += (factor, p0, p1)
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
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


@triton.jit
def number(numbers, i: tl.constexpr, acc: tl.constexpr):
    """The i-th of the runtime_numbers."""
    if acc == tl.float64:
        high = tl.full([], numbers[3 * i], acc) + tl.full([], numbers[3 * i + 1], acc)
        return high + tl.full([], numbers[3 * i + 2], acc)
    else:
        return tl.full([], numbers[i], acc)


@triton.jit
def constants(numbers, acc: tl.constexpr):
    """The call's Constants from its runtime_numbers."""
    return Constants(number(numbers, 0, acc), number(numbers, 1, acc), number(numbers, 2, acc), number(numbers, 3, acc))


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
