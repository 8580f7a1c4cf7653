"""The one pass: rows that stay on chip (`tile_kernel`) and rows that are swept a block of classes at a time
(`loop_kernel`).

Rows are (outer, K, inner) tensors seen as batches of lanes (launch.as_lanes). A program takes BLOCK_N lanes of one
batch: tiles are [BLOCK_N, BLOCK_K], and whether threads run across classes or across pixels follows from the strides.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .math import (
    _INF,
    ANY_FOCAL,
    add_second,
    all_statistics,
    by_row,
    closed_form,
    constants,
    evaluate,
    exp,
    gradient,
    gradient_row,
    lane_sum,
    load_label,
    merged_second,
    multiple,
    no_second,
    scaled,
    second_sums,
    stored,
    target_statistics,
    with_second,
)


class Layout(NamedTuple):
    """(batches, K, lanes) tensors of one shape: the strides of the logits and of the gradient."""

    lanes: tl.tensor
    K: tl.tensor
    so: tl.tensor
    sk: tl.tensor
    si: tl.tensor
    gso: tl.tensor
    gsk: tl.tensor
    gsi: tl.tensor


class Rows(NamedTuple):
    """The rows of a program, each field [BLOCK_N, 1]."""

    number: tl.tensor  # int64
    exist: tl.tensor  # the last program has fewer than BLOCK_N
    label: tl.tensor  # int32; -1 if not known
    known: tl.tensor  # the label is a class, and not ignored
    ignored: tl.tensor
    logits: tl.tensor  # pointers to the first class
    grad: tl.tensor


class FirstSums(NamedTuple):
    """What the first sweep finds of the classes besides the target, [BLOCK_N, LANES] or merged [BLOCK_N, 1]."""

    max: tl.tensor
    low: tl.tensor  # the smallest logit, or less
    tail: tl.tensor  # sum of exp(z_j - max)
    gap: tl.tensor  # sum of max - z_j, where z_j > -inf
    count: tl.tensor  # how many those are


class Outputs(NamedTuple):
    """Where results go; None for those that are not wanted."""

    Weight_ptr: tl.tensor
    Denominator_ptr: tl.tensor
    Loss_ptr: tl.tensor
    Table_ptr: tl.tensor  # (10, rows) coefficients, or (13, rows) statistics
    num_rows: tl.tensor


@triton.jit
def layout_of(lanes, K, so, sk, si, gso, gsk, gsi, CONTIGUOUS: tl.constexpr, VEC: tl.constexpr):
    """The Layout, with what the compiler is to know. CONTIGUOUS: neighbours in memory are classes (1), lanes (2) or
    neither (0). VEC: K and every stride but the classes' are multiples of it; across lanes, one a thread, it is no use.
    """
    if CONTIGUOUS == 1:
        so, si, gso, gsi = multiple(so, VEC), multiple(si, VEC), multiple(gso, VEC), multiple(gsi, VEC)
        v = Layout(lanes, multiple(K, VEC), so, 1, si, gso, 1, gsi)
    elif CONTIGUOUS == 2:
        v = Layout(lanes, K, so, sk, 1, gso, gsk, 1)
    else:
        v = Layout(lanes, K, so, sk, si, gso, gsk, gsi)
    return v


@triton.jit
def rows_of(program, v, Logits_ptr, Grad_ptr, Target_ptr, ignore_index, BLOCK_N: tl.constexpr):
    """Rows of the program-th block of BLOCK_N lanes."""
    blocks = tl.cdiv(v.lanes, BLOCK_N)
    batch = (program // blocks).to(tl.int64)
    start = (program % blocks).to(tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)[:, None]
    exist = lane < v.lanes - start
    number = batch * v.lanes + start + lane
    label, known, ignored = load_label(Target_ptr, number, exist, v.K, ignore_index)
    lane = lane.to(tl.int64)
    logits = Logits_ptr + (batch * v.so + start * v.si) + lane * v.si
    grad = logits
    if Grad_ptr is not None:
        grad = Grad_ptr + (batch * v.gso + start * v.gsi) + lane * v.gsi
    return Rows(number, exist, label, known, ignored, logits, grad)


@triton.jit
def target_logit(rows, v, acc: tl.constexpr):
    """z_y; 0 for a label that is not known."""
    return tl.load(rows.logits + rows.label.to(tl.int64) * v.sk, mask=rows.known, other=0.0).to(acc)


@triton.jit
def class_weight(Weight_ptr, rows, acc: tl.constexpr):
    """The weight of each row's label; 1 without weights, and for a label that is not known."""
    if Weight_ptr is None:
        weight = tl.full(rows.label.shape, 1.0, acc)
    else:
        weight = tl.load(Weight_ptr + rows.label, mask=rows.known, other=1.0).to(acc)
    return weight


@triton.jit
def first_statistics(rows, m, tail, gap, count, z_y, K, STATS: tl.constexpr):
    """RowStatistics from the first sweep. A target that does not exist makes a NaN row. With STATS an ignored row
    becomes a uniform one."""
    x_y = tl.where(z_y == -_INF, float("nan"), z_y - m)
    if STATS:
        others = K - 1.0
        tail, count = tl.where(rows.ignored, others, tail), tl.where(rows.ignored, others, count)
        gap = tl.where(rows.ignored, 0.0, gap)
    return target_statistics(x_y, tail, count, gap)


@triton.jit
def write_results(
    rows, s, m, c, numbers, out, program, writes,
    KINDS: tl.constexpr, NEEDS: tl.constexpr, REDUCTION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The rows' losses, and their coefficients if there is a table for them. Returns the Coefficients.

    REDUCTION "none" writes a loss a row, "sum" and "mean" a sum a program. WHOLE: the program has all rows, and divides
    by the mean's denominator. writes: of the programs that share a row, one does.
    """
    acc: tl.constexpr = m.dtype
    loss, g = evaluate(s, c, numbers, KINDS, NEEDS)
    weight = class_weight(out.Weight_ptr, rows, acc)
    loss = tl.where(rows.known, loss * weight, tl.where(rows.ignored, 0.0, float("nan")))
    if WHOLE and REDUCTION == "mean":
        denominator = tl.sum(tl.where(rows.exist & ~rows.ignored, weight, 0.0))
        g = scaled(g, weight / denominator)
    elif out.Denominator_ptr is not None:
        g = scaled(g, weight / tl.load(out.Denominator_ptr))
    elif out.Weight_ptr is not None:
        g = scaled(g, weight)
    if writes:
        if REDUCTION == "none":
            tl.store(out.Loss_ptr + rows.number, loss, mask=rows.exist)
        else:
            total = tl.sum(tl.where(rows.exist, loss, 0.0))
            if WHOLE and REDUCTION == "mean":
                total /= denominator
            tl.store(out.Loss_ptr + program, total)
        if out.Table_ptr is not None:
            inv_sum = tl.where(rows.known, exp(-s.log_sum), tl.where(rows.ignored, 0.0, float("nan")))
            fields = (m, inv_sum, g.a, g.b, g.a_above, g.c, g.bw, g.cw, g.target, s.log_sum)
            for i in tl.static_range(10):
                tl.store(out.Table_ptr + i * out.num_rows + rows.number, fields[i], mask=rows.exist)
    return g


@triton.jit
def write_statistics(rows, s, m, c, out, NEEDS: tl.constexpr):
    """The 13 statistics of the rows; NaN for a label that is no class."""
    fields = all_statistics(s, m, rows.ignored, c, NEEDS)
    lost = tl.where(rows.known | rows.ignored, 0.0, float("nan"))
    for i in tl.static_range(13):
        value = fields[i]
        if i < 12:
            value += lost
        tl.store(out.Table_ptr + i * out.num_rows + rows.number, value.to(tl.float64), mask=rows.exist)


@triton.jit
def poison_of(rows, s):
    """What a class that does not exist gets for its gradient: 0, and NaN in a NaN row."""
    return tl.where(rows.known, s.target_tail - s.target_tail, tl.where(rows.ignored, 0.0, float("nan")))


@triton.jit
def load_tile(rows, v, offs_k, acc: tl.constexpr, CONTIGUOUS: tl.constexpr, EVICT: tl.constexpr):
    """The logits of the classes offs_k; -inf for those that do not exist, and for rows whose label is not known."""
    mask = rows.exist & (offs_k < v.K)
    if CONTIGUOUS != 2:  # across lanes, a mask that differs from one to the next would read them one by one
        mask = rows.known & (offs_k < v.K)
    z = tl.load(rows.logits + offs_k.to(tl.int64) * v.sk, mask=mask, other=-_INF, eviction_policy=EVICT).to(acc)
    if CONTIGUOUS == 2:
        z = tl.where(rows.known, z, -_INF)
    return z


@triton.jit
def without_target(z, rows, k0, BLOCK_K: tl.constexpr):
    """The logits of the classes k0, k0 + 1, ... as if the target did not exist."""
    return tl.where(k0 + tl.arange(0, BLOCK_K)[None, :] == rows.label, -_INF, z)


@triton.jit
def holds_target(rows, k0, BLOCK_K: tl.constexpr):
    """Whether the target of the one row is among BLOCK_K classes: in most blocks of a long row it is not."""
    label = tl.max(rows.label) - k0
    return (label >= 0) & (label < BLOCK_K)


@triton.jit
def write_gradient(rows, v, offs_k, x, e, r, poison, NEEDS: tl.constexpr, EXIST: tl.constexpr, EVICT: tl.constexpr):
    """The gradient of the classes offs_k, the target as if it were another. EXIST: none is at -inf."""
    value = gradient(x, e, r, NEEDS)
    if not EXIST:
        value = tl.where(x != -_INF, value, poison)
    pointers = rows.grad + offs_k.to(tl.int64) * v.gsk
    mask = rows.exist & (offs_k < v.K)
    tl.store(pointers, stored(value, rows.grad.dtype.element_ty), mask=mask, eviction_policy=EVICT)


@triton.jit
def write_target_gradient(rows, v, g, begin, end):
    """The gradient of the targets in [begin, end), over what write_gradient left there."""
    tl.debug_barrier()
    pointers = rows.grad + rows.label.to(tl.int64) * v.gsk
    mask = rows.known & (rows.label >= begin) & (rows.label < end)
    tl.store(pointers, stored(g.target, rows.grad.dtype.element_ty), mask=mask)


_NUMBERS = ["lanes", "K", "num_rows", "so", "sk", "si", "gso", "gsk", "gsi", "ignore_index"]


@triton.jit(do_not_specialize=_NUMBERS)
def tile_kernel(
    Logits_ptr, Grad_ptr, Target_ptr, Weight_ptr, Denominator_ptr, Loss_ptr, Table_ptr, numbers,
    lanes, K, num_rows, so, sk, si, gso, gsk, gsi, ignore_index,
    KINDS: tl.constexpr, NEEDS: tl.constexpr, REDUCTION: tl.constexpr, STATS: tl.constexpr, WHOLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loss and gradient, coefficients or statistics of rows with K <= BLOCK_K: the logits are read once.

    Grid: batches * cdiv(lanes, BLOCK_N). Strides, CONTIGUOUS, VEC: layout_of. Results: write_results.
    """
    acc: tl.constexpr = tl.float64 if Logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    v = layout_of(lanes, K, so, sk, si, gso, gsk, gsi, CONTIGUOUS, VEC)
    program = tl.program_id(0)
    rows = rows_of(program, v, Logits_ptr, Grad_ptr, Target_ptr, ignore_index, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    z_y = target_logit(rows, v, acc)
    z = load_tile(rows, v, offs_k, acc, CONTIGUOUS, "")
    z = tl.where(offs_k == rows.label, -_INF, z)
    c = constants(numbers, acc)
    out = Outputs(Weight_ptr, Denominator_ptr, Loss_ptr, Table_ptr, num_rows.to(tl.int64))

    m = tl.maximum(tl.max(z, 1)[:, None], z_y)
    x = z - m
    e = exp(x)
    gap = -lane_sum(tl.where(z != -_INF, x, 0.0), 1)
    count = lane_sum(tl.where(z != -_INF, 1.0, 0.0).to(acc), 1)
    s = first_statistics(rows, m, lane_sum(e, 1), gap, count, z_y, v.K, STATS)
    s = with_second(s, second_sums(x, e, s, c, NEEDS, 1))
    if STATS:
        write_statistics(rows, s, m, c, out, NEEDS)
    else:
        g = write_results(rows, s, m, c, numbers, out, program, True, KINDS, NEEDS, REDUCTION, WHOLE)
        if Grad_ptr is not None:
            r = gradient_row(g, s.log_sum, exp(-s.log_sum), c)
            write_gradient(rows, v, offs_k, x, e, r, poison_of(rows, s), NEEDS, False, "")
            write_target_gradient(rows, v, g, 0, v.K)


# ---- rows that do not fit


@triton.jit
def first_step(
    f, rows, v, k0, acc: tl.constexpr, CONTIGUOUS: tl.constexpr, CAREFUL: tl.constexpr, LANES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """FirstSums `f` with the classes k0, k0 + 1, ... CAREFUL: the target, the row's end or -inf may be among them;
    without it -inf leaves low = -inf, and sums that are of no use.

    Every lane has a maximum of its own, to which it rescales what it has when that rises: one exp a class, and one a
    lane and block.
    """
    z = load_tile(rows, v, k0 + tl.arange(0, BLOCK_K)[None, :], acc, CONTIGUOUS, "evict_last")
    if CAREFUL:
        z = without_target(z, rows, k0, BLOCK_K)
    z = tl.reshape(z, [BLOCK_N, LANES, BLOCK_K // LANES])
    high = tl.maximum(f.max, tl.max(z, 2))
    base = tl.where(high == -_INF, 0.0, high)  # a lane without classes
    x = z - base[:, :, None]
    tail = f.tail * exp(f.max - base) + tl.sum(exp(x), 2)
    gap = f.gap + tl.where(f.count > 0.0, f.count * (base - f.max), 0.0)
    if CAREFUL:
        below = tl.where(z != -_INF, x, 0.0)
        gap -= tl.sum(below, 2)
        low = tl.minimum(f.low, base + tl.min(below, 2))
        count = f.count + tl.sum(tl.where(z != -_INF, 1.0, 0.0).to(acc), 2)
    else:
        gap -= tl.sum(x, 2)
        low = tl.minimum(f.low, tl.min(z, 2))
        count = f.count + BLOCK_K // LANES
    return FirstSums(high, low, tail, gap, count)


@triton.jit
def first_sweep(
    rows, v, begin, end, acc: tl.constexpr, CONTIGUOUS: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """FirstSums of the classes [begin, end), both a multiple of BLOCK_K but for the end of the row."""
    zero = tl.zeros([BLOCK_N, LANES], acc)
    nothing = FirstSums(zero - _INF, zero + _INF, zero, zero, zero)
    f = nothing
    careful = True
    if BLOCK_N == 1:  # masked classes are rare: begin as if there were none
        for k0 in range(begin, end, BLOCK_K):
            if holds_target(rows, k0, BLOCK_K) | (k0 + BLOCK_K > end):
                f = first_step(f, rows, v, k0, acc, CONTIGUOUS, True, LANES, BLOCK_N, BLOCK_K)
            else:
                f = first_step(f, rows, v, k0, acc, CONTIGUOUS, False, LANES, BLOCK_N, BLOCK_K)
        careful = tl.min(f.low) == -_INF
    if careful:
        f = nothing
        for k0 in range(begin, end, BLOCK_K):
            f = first_step(f, rows, v, k0, acc, CONTIGUOUS, True, LANES, BLOCK_N, BLOCK_K)
    return f


@triton.jit
def merged_first(f, z_y):
    """[BLOCK_N, LANES] -> [BLOCK_N, 1], about the row's maximum, which may be the target."""
    m = tl.maximum(by_row(tl.max(f.max, 1)), z_y)
    below = tl.where(f.count > 0.0, m - f.max, 0.0)
    tail, gap = tl.sum(f.tail * exp(-below), 1), tl.sum(f.gap + f.count * below, 1)
    return FirstSums(m, by_row(tl.min(f.low, 1)), by_row(tail), by_row(gap), by_row(tl.sum(f.count, 1)))


@triton.jit
def second_sweep(
    rows, v, begin, end, m, s, c, acc: tl.constexpr, NEEDS: tl.constexpr, CONTIGUOUS: tl.constexpr, LANES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SecondSums of the classes [begin, end), merged."""
    sums = no_second(tl.zeros([BLOCK_N, LANES], acc))
    for k0 in range(begin, end, BLOCK_K):
        x = load_tile(rows, v, k0 + tl.arange(0, BLOCK_K)[None, :], acc, CONTIGUOUS, "evict_last") - m
        if BLOCK_N > 1:
            x = without_target(x, rows, k0, BLOCK_K)
        elif holds_target(rows, k0, BLOCK_K):
            x = without_target(x, rows, k0, BLOCK_K)
        sums = add_second(sums, second_sums(x, exp(x), s, c, NEEDS, LANES), NEEDS)
    return merged_second(sums, NEEDS)


@triton.jit
def needs_second_sweep(rows, f, s, c, NEEDS: tl.constexpr):
    """Whether the sums of some row have no closed form: a class below the clamp, or focal sums."""
    if ANY_FOCAL & NEEDS:
        needed = tl.full([], True, tl.int1)
    else:
        needed = tl.max((rows.known & (f.low - f.max <= s.log_sum - c.floor)).to(tl.int32)) > 0
    return needed


@triton.jit
def gradient_loop(
    rows, v, begin, end, m, r, poison, acc: tl.constexpr, NEEDS: tl.constexpr, EXIST: tl.constexpr,
    CONTIGUOUS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for k0 in range(begin, end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)[None, :]
        x = load_tile(rows, v, offs_k, acc, CONTIGUOUS, "evict_first") - m
        write_gradient(rows, v, offs_k, x, exp(x), r, poison, NEEDS, EXIST, "evict_first")


@triton.jit
def gradient_sweep(
    rows, v, begin, end, f, r, poison, acc: tl.constexpr, NEEDS: tl.constexpr, CONTIGUOUS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the classes [begin, end) but for the target's; f: the rows' FirstSums."""
    masked = True
    if BLOCK_N == 1:  # beyond 2^24 classes float32 does not count them one by one
        masked = tl.min((rows.known & (f.count == v.K - 1) & (v.K <= 16777216)).to(tl.int32)) == 0
    if masked:
        gradient_loop(rows, v, begin, end, f.max, r, poison, acc, NEEDS, False, CONTIGUOUS, BLOCK_K)
    else:
        gradient_loop(rows, v, begin, end, f.max, r, poison, acc, NEEDS, True, CONTIGUOUS, BLOCK_K)


@triton.jit(do_not_specialize=_NUMBERS)
def loop_kernel(
    Logits_ptr, Grad_ptr, Target_ptr, Weight_ptr, Denominator_ptr, Loss_ptr, Table_ptr, numbers,
    lanes, K, num_rows, so, sk, si, gso, gsk, gsi, ignore_index,
    KINDS: tl.constexpr, NEEDS: tl.constexpr, REDUCTION: tl.constexpr, STATS: tl.constexpr, WHOLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """tile_kernel for any K: two or three sweeps, of which the later ones read what the caches kept of the first."""
    acc: tl.constexpr = tl.float64 if Logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    v = layout_of(lanes, K, so, sk, si, gso, gsk, gsi, CONTIGUOUS, VEC)
    program = tl.program_id(0)
    rows = rows_of(program, v, Logits_ptr, Grad_ptr, Target_ptr, ignore_index, BLOCK_N)
    z_y = target_logit(rows, v, acc)
    c = constants(numbers, acc)
    out = Outputs(Weight_ptr, Denominator_ptr, Loss_ptr, Table_ptr, num_rows.to(tl.int64))

    f = merged_first(first_sweep(rows, v, 0, v.K, acc, CONTIGUOUS, LANES, BLOCK_N, BLOCK_K), z_y)
    s = first_statistics(rows, f.max, f.tail, f.gap, f.count, z_y, v.K, STATS)
    second = closed_form(s, f.gap, c)
    if NEEDS > 0:
        if needs_second_sweep(rows, f, s, c, NEEDS):
            second = second_sweep(rows, v, 0, v.K, f.max, s, c, acc, NEEDS, CONTIGUOUS, LANES, BLOCK_N, BLOCK_K)
    s = with_second(s, second)
    if STATS:
        write_statistics(rows, s, f.max, c, out, NEEDS)
    else:
        g = write_results(rows, s, f.max, c, numbers, out, program, True, KINDS, NEEDS, REDUCTION, WHOLE)
        if Grad_ptr is not None:
            r = gradient_row(g, s.log_sum, exp(-s.log_sum), c)
            gradient_sweep(rows, v, 0, v.K, f, r, poison_of(rows, s), acc, NEEDS, CONTIGUOUS, BLOCK_N, BLOCK_K)
            write_target_gradient(rows, v, g, 0, v.K)
