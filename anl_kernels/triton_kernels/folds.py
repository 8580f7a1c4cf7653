"""Tuples of sums over classes, in Triton: how they begin, and how those of two parts of a row become one.

What a field is, its owner says in two tuples: FOLDS, how two of them become one ("sum", "min", or "about": what the
others are about, the same in both), and BITS, the bits of NEEDS that ask for it (0: it is always there). So who adds,
merges, stores or loads such tuples loops over their fields and names none.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


@triton.constexpr_function
def asked(bits, needs):
    """Whether NEEDS asks for a field with these bits. A field without any is always there."""
    return bits == 0 or bits & needs != 0


@triton.constexpr_function
def size(fields):
    return len(fields)


@triton.constexpr_function
def equal(a, b):
    """Before Triton 3.7 an element of a constexpr tuple is no constexpr, and `==` something else."""
    return a == b


@triton.constexpr_function
def neutral(fold):
    """The field of no classes. "about": what the other fields are about, the same in both parts."""
    return {"about": -math.inf, "min": math.inf, "sum": 0.0}[fold]


@triton.jit
def no_sums(zero, FOLDS: tl.constexpr):
    """The sums of no classes, as a tuple. zero: zeros of their shape."""
    sums = ()
    for i in tl.static_range(size(FOLDS)):
        sums += (zero + neutral(FOLDS[i]),)
    return sums


@triton.jit
def folded(f, g, FOLDS: tl.constexpr, BITS: tl.constexpr, NEEDS: tl.constexpr):
    """The sums of two parts of a row's classes, those that NEEDS asks for."""
    sums = ()
    for i in tl.static_range(size(FOLDS)):
        value = f[i]
        if asked(BITS[i], NEEDS):
            if equal(FOLDS[i], "min"):
                value = tl.minimum(value, g[i])
            elif equal(FOLDS[i], "sum"):
                value += g[i]
        sums += (value,)
    return sums


@triton.jit
def merged(f, FOLDS: tl.constexpr, BITS: tl.constexpr, NEEDS: tl.constexpr):
    """[BLOCK_N, LANES] -> [BLOCK_N, 1], those sums that NEEDS asks for; what they are about is [BLOCK_N, 1] already."""
    sums = ()
    for i in tl.static_range(size(FOLDS)):
        value = tl.zeros([f[i].shape[0], 1], f[i].dtype)
        if asked(BITS[i], NEEDS):
            if equal(FOLDS[i], "about"):
                value = f[i]
            elif equal(FOLDS[i], "min"):
                value = by_row(tl.min(f[i], 1))
            else:
                value = by_row(tl.sum(f[i], 1))
        sums += (value,)
    return sums


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
def last_sum(t):
    """The sum over the last axis of a tile, or of one whose classes are split into lanes: [BLOCK_N, LANES]."""
    if len(t.shape) == 2:
        return tl.sum(t, 1)[:, None]
    else:
        return tl.sum(t, 2)


@triton.jit
def last_min(t):
    if len(t.shape) == 2:
        return tl.min(t, 1)[:, None]
    else:
        return tl.min(t, 2)
