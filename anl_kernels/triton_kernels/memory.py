"""Loads and stores that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
