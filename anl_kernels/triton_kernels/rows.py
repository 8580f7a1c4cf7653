"""The one pass: rows that stay on chip (`tile_kernel`) and rows that are swept a block of classes at a time
(`loop_kernel`). tiles.py has what both see of their rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .folds import by_row, folded, merged, no_sums
from .row_math import (
    ANY_FOCAL,
    FIRST_BITS,
    FIRST_FOLDS,
    IN_SECOND_SWEEP,
    SECOND_BITS,
    SECOND_FOLDS,
    FirstSums,
    SecondSums,
    about,
    first_of_tile,
    gradient_row,
    row_statistics,
    second_of_tile,
    uniform_if,
)
from .scalar_math import INF, constants, exp
from .tiles import (
    Outputs,
    holds_target,
    layout_of,
    load_tile,
    rows_of,
    target_logit,
    with_second,
    without_target,
    write_gradient,
    write_results,
    write_statistics,
    write_target_gradient,
)

# Parameters that are not compiled in.
NUMBERS = ["lanes", "K", "num_rows", "so", "sk", "si", "gso", "gsk", "gsi", "ignore_index"]


@triton.jit
def add_first(f, z, NEEDS: tl.constexpr, CAREFUL: tl.constexpr):
    """FirstSums `f` with the logits z, [BLOCK_N, LANES, classes]; CAREFUL: first_of_tile. Every lane has a maximum of
    its own, to which it rescales what it has when that rises: one exp per class, and one per lane and block."""
    high = tl.maximum(f.max, tl.max(z, 2))
    f = about(f, high, NEEDS)
    base = tl.where(high == -INF, 0.0, high)  # a lane without classes
    x = z - base[:, :, None]
    tile = first_of_tile(z, x, exp(x), base, NEEDS, CAREFUL)
    return FirstSums(*folded(f, tile, FIRST_FOLDS, FIRST_BITS, NEEDS))


@triton.jit
def merged_first(f, z_y, NEEDS: tl.constexpr):
    """[BLOCK_N, LANES] -> [BLOCK_N, 1], about the row's maximum, which may be the target."""
    high = tl.maximum(by_row(tl.max(f.max, 1)), z_y)
    return FirstSums(*merged(about(f, high, NEEDS), FIRST_FOLDS, FIRST_BITS, NEEDS))


@triton.jit(do_not_specialize=NUMBERS)
def tile_kernel(
    Logits_ptr,
    Grad_ptr,
    Target_ptr,
    Weight_ptr,
    Denominator_ptr,
    Loss_ptr,
    Table_ptr,
    numbers,
    lanes,
    K,
    num_rows,
    so,
    sk,
    si,
    gso,
    gsk,
    gsi,
    ignore_index,
    KINDS: tl.constexpr,
    NEEDS: tl.constexpr,
    REDUCTION: tl.constexpr,
    STATS: tl.constexpr,
    WHOLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loss and gradient, coefficients or statistics of rows with K <= BLOCK_K: the logits are read once.

    Grid: batches * cdiv(lanes, BLOCK_N). Strides, CONTIGUOUS, VEC: layout_of. Results: write_results.
    """
    acc: tl.constexpr = tl.float64 if Logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    v = layout_of(lanes, K, so, sk, si, gso, gsk, gsi, CONTIGUOUS, VEC)
    block = tl.program_id(0)
    rows = rows_of(block, v, Logits_ptr, Grad_ptr, Target_ptr, ignore_index, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    z_y = target_logit(rows, v, acc)
    z = load_tile(rows, v, offs_k, acc, CONTIGUOUS, "")
    z = tl.where(offs_k == rows.label, -INF, z)
    c = constants(numbers, acc)
    out = Outputs(Weight_ptr, Denominator_ptr, Loss_ptr, Table_ptr, num_rows.to(tl.int64))

    m = tl.maximum(tl.max(z, 1)[:, None], z_y)
    x = z - m
    e = exp(x)
    f = first_of_tile(z, x, e, m, NEEDS, True)
    if STATS:
        f = uniform_if(rows.ignored, f, v.K)
    s = row_statistics(f, z_y, c)
    s = with_second(s, second_of_tile(x, e, s, c, NEEDS, 1))
    if STATS:
        write_statistics(rows, s, c, out, NEEDS)
    else:
        g = write_results(rows, s, c, numbers, out, block, True, KINDS, NEEDS, REDUCTION, WHOLE)
        if Grad_ptr is not None:
            write_gradient(rows, v, offs_k, x, e, gradient_row(g, exp(-s.log_sum), c), NEEDS, False, "")
            write_target_gradient(rows, v, g, 0, v.K)


# ---- rows that do not fit


@triton.jit
def first_step(
    f, rows, v, k0, NEEDS: tl.constexpr, CONTIGUOUS: tl.constexpr, CAREFUL: tl.constexpr, BLOCK_K: tl.constexpr
):
    """FirstSums `f` with the classes k0, k0 + 1, ... CAREFUL: the target, the row's end or -inf may be among them."""
    z = load_tile(rows, v, k0 + tl.arange(0, BLOCK_K)[None, :], f.max.dtype, CONTIGUOUS, "evict_last")
    if CAREFUL:
        z = without_target(z, rows, k0, BLOCK_K)
    BLOCK_N: tl.constexpr = f.max.shape[0]
    LANES: tl.constexpr = f.max.shape[1]
    return add_first(f, tl.reshape(z, [BLOCK_N, LANES, BLOCK_K // LANES]), NEEDS, CAREFUL)


@triton.jit
def first_sweep(
    rows, v, begin, end, z_y, NEEDS: tl.constexpr, CONTIGUOUS: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr
):
    """FirstSums of the classes [begin, end), both a multiple of BLOCK_K but for the end of the row, merged."""
    BLOCK_N: tl.constexpr = z_y.shape[0]
    nothing = FirstSums(*no_sums(tl.zeros([BLOCK_N, LANES], z_y.dtype), FIRST_FOLDS))
    f = nothing
    careful = True
    if BLOCK_N == 1:  # masked classes are rare: begin as if there were none
        for k0 in range(begin, end, BLOCK_K):
            if holds_target(rows, k0, BLOCK_K) | (k0 + BLOCK_K > end):
                f = first_step(f, rows, v, k0, NEEDS, CONTIGUOUS, True, BLOCK_K)
            else:
                f = first_step(f, rows, v, k0, NEEDS, CONTIGUOUS, False, BLOCK_K)
        careful = tl.min(f.low) == -INF
    if careful:
        f = nothing
        for k0 in range(begin, end, BLOCK_K):
            f = first_step(f, rows, v, k0, NEEDS, CONTIGUOUS, True, BLOCK_K)
    return merged_first(f, z_y, NEEDS)


@triton.jit
def second_sweep(
    rows, v, begin, end, s, c, NEEDS: tl.constexpr, CONTIGUOUS: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr
):
    """SecondSums of the classes [begin, end), merged."""
    m = s.first.max
    BLOCK_N: tl.constexpr = m.shape[0]
    sums = SecondSums(*no_sums(tl.zeros([BLOCK_N, LANES], m.dtype), SECOND_FOLDS))
    for k0 in range(begin, end, BLOCK_K):
        x = load_tile(rows, v, k0 + tl.arange(0, BLOCK_K)[None, :], m.dtype, CONTIGUOUS, "evict_last") - m
        if BLOCK_N > 1:
            x = without_target(x, rows, k0, BLOCK_K)
        elif holds_target(rows, k0, BLOCK_K):
            x = without_target(x, rows, k0, BLOCK_K)
        tile = second_of_tile(x, exp(x), s, c, NEEDS, LANES)
        sums = SecondSums(*folded(sums, tile, SECOND_FOLDS, SECOND_BITS, NEEDS))
    return SecondSums(*merged(sums, SECOND_FOLDS, SECOND_BITS, NEEDS))


@triton.jit
def needs_second_sweep(known, s, c, NEEDS: tl.constexpr):
    """Whether some row has a class below the clamp, or focal sums: then row_statistics does not know its SecondSums."""
    if ANY_FOCAL & NEEDS:
        needed = tl.full([], True, tl.int1)
    else:
        needed = tl.max((known & (s.first.low - s.first.max <= s.log_sum - c.clamp_height)).to(tl.int32)) > 0
    return needed


@triton.jit
def gradient_loop(
    rows, v, begin, end, m, r, NEEDS: tl.constexpr, EXIST: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK_K: tl.constexpr
):
    for k0 in range(begin, end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)[None, :]
        x = load_tile(rows, v, offs_k, m.dtype, CONTIGUOUS, "evict_first") - m
        write_gradient(rows, v, offs_k, x, exp(x), r, NEEDS, EXIST, "evict_first")


@triton.jit
def gradient_sweep(rows, v, begin, end, f, r, NEEDS: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The gradient of the classes [begin, end) but for the target's; f: the rows' FirstSums."""
    masked = True
    if rows.label.shape[0] == 1:  # beyond 2^24 classes float32 does not count them one by one
        masked = tl.min((rows.known & (f.count == v.K - 1) & (v.K <= 16777216)).to(tl.int32)) == 0
    if masked:
        gradient_loop(rows, v, begin, end, f.max, r, NEEDS, False, CONTIGUOUS, BLOCK_K)
    else:
        gradient_loop(rows, v, begin, end, f.max, r, NEEDS, True, CONTIGUOUS, BLOCK_K)


@triton.jit(do_not_specialize=NUMBERS)
def loop_kernel(
    Logits_ptr,
    Grad_ptr,
    Target_ptr,
    Weight_ptr,
    Denominator_ptr,
    Loss_ptr,
    Table_ptr,
    numbers,
    lanes,
    K,
    num_rows,
    so,
    sk,
    si,
    gso,
    gsk,
    gsi,
    ignore_index,
    KINDS: tl.constexpr,
    NEEDS: tl.constexpr,
    REDUCTION: tl.constexpr,
    STATS: tl.constexpr,
    WHOLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """tile_kernel for any K: two or three sweeps, of which the later ones read what the caches kept of the first."""
    acc: tl.constexpr = tl.float64 if Logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    v = layout_of(lanes, K, so, sk, si, gso, gsk, gsi, CONTIGUOUS, VEC)
    out = Outputs(Weight_ptr, Denominator_ptr, Loss_ptr, Table_ptr, num_rows.to(tl.int64))
    c = constants(numbers, acc)
    block = tl.program_id(0)
    rows = rows_of(block, v, Logits_ptr, Grad_ptr, Target_ptr, ignore_index, BLOCK_N)
    z_y = target_logit(rows, v, acc)

    f = first_sweep(rows, v, 0, v.K, z_y, NEEDS, CONTIGUOUS, LANES, BLOCK_K)
    if STATS:
        f = uniform_if(rows.ignored, f, v.K)
    s = row_statistics(f, z_y, c)
    second = s.second
    if IN_SECOND_SWEEP & NEEDS:
        if needs_second_sweep(rows.known, s, c, NEEDS):
            second = second_sweep(rows, v, 0, v.K, s, c, NEEDS, CONTIGUOUS, LANES, BLOCK_K)
    s = with_second(s, second)
    if STATS:
        write_statistics(rows, s, c, out, NEEDS)
    else:
        g = write_results(rows, s, c, numbers, out, block, True, KINDS, NEEDS, REDUCTION, WHOLE)
        if Grad_ptr is not None:
            gradient_sweep(rows, v, 0, v.K, f, gradient_row(g, exp(-s.log_sum), c), NEEDS, CONTIGUOUS, BLOCK_K)
            write_target_gradient(rows, v, g, 0, v.K)
