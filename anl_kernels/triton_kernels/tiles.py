"""The rows of a program: where they are, their logits tile by tile, and where results go.

Rows are (outer, K, inner) tensors seen as batches of lanes (launch.as_lanes). A program takes BLOCK_N lanes of one
batch: tiles are [BLOCK_N, BLOCK_K], and whether threads run across classes or across pixels follows from the strides.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .memory import load_label, multiple, stored
from .row_math import IS_LINEAR, NUM_COEFS, NUM_STATS, GradCoefs, RowStatistics, all_statistics, evaluate, gradient
from .scalar_math import INF


class Layout(NamedTuple):
    """(batches, K, lanes) tensors of one shape: the strides of the logits, and those of the gradient."""

    lanes: tl.tensor
    K: tl.tensor
    so: tl.tensor  # from batch to batch
    sk: tl.tensor  # from class to class
    si: tl.tensor  # from lane to lane
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


class Outputs(NamedTuple):
    """Where results go; None for those that are not wanted."""

    Weight_ptr: tl.tensor
    Denominator_ptr: tl.tensor
    Loss_ptr: tl.tensor
    Table_ptr: tl.tensor  # (NUM_COEFS, rows) coefficients, or (NUM_STATS, rows) statistics
    num_rows: tl.tensor


@triton.jit
def scaled(g, factor):
    """GradCoefs of `factor` times the loss."""
    fields = ()
    for i in tl.static_range(NUM_COEFS):
        value = g[i]
        if IS_LINEAR[i]:
            value *= factor
        fields += (value,)
    return GradCoefs(*fields)


@triton.jit
def with_second(s, second):
    """RowStatistics with the second sweep's sums."""
    return RowStatistics(*s[:-1], second)


@triton.jit
def layout_of(lanes, K, so, sk, si, gso, gsk, gsi, CONTIGUOUS: tl.constexpr, VEC: tl.constexpr):
    """The Layout, with what the compiler is to know. CONTIGUOUS: neighbours in memory are classes (1), lanes (2) or
    neither (0). VEC: K and every stride but the classes' are multiples of it; of no use across lanes.
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
def rows_of(block, v, Logits_ptr, Grad_ptr, Target_ptr, ignore_index, BLOCK_N: tl.constexpr):
    """The block-th BLOCK_N lanes."""
    blocks = tl.cdiv(v.lanes, BLOCK_N)
    batch = (block // blocks).to(tl.int64)
    start = (block % blocks).to(tl.int64) * BLOCK_N
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
def write_results(
    rows,
    s,
    c,
    numbers,
    out,
    block,
    writes,
    KINDS: tl.constexpr,
    NEEDS: tl.constexpr,
    REDUCTION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The rows' losses, and their coefficients if there is a table for them. Returns the GradCoefs.

    REDUCTION "none" writes a loss per row, "sum" and "mean" a sum per block of rows. WHOLE: the block has all rows, and
    divides by the mean's denominator. writes: of the programs that share a row, one does.
    """
    loss, g = evaluate(s, rows.known, rows.ignored, c, numbers, KINDS, NEEDS)
    weight = class_weight(out.Weight_ptr, rows, loss.dtype)
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
            tl.store(out.Loss_ptr + block, total)
        if out.Table_ptr is not None:
            for i in tl.static_range(NUM_COEFS):
                tl.store(out.Table_ptr + i * out.num_rows + rows.number, g[i], mask=rows.exist)
    return g


@triton.jit
def write_statistics(rows, s, c, out, NEEDS: tl.constexpr):
    """The table of the rows' statistics."""
    fields = all_statistics(s, rows.known, rows.ignored, c, NEEDS)
    for i in tl.static_range(NUM_STATS):
        tl.store(out.Table_ptr + i * out.num_rows + rows.number, fields[i].to(tl.float64), mask=rows.exist)


@triton.jit
def load_tile(rows, v, offs_k, acc: tl.constexpr, CONTIGUOUS: tl.constexpr, EVICT: tl.constexpr):
    """The logits of the classes offs_k; -inf for those that do not exist, and for rows whose label is not known."""
    mask = rows.exist & (offs_k < v.K)
    if CONTIGUOUS != 2:  # across lanes, a mask that differs from one to the next would read them one by one
        mask = rows.known & (offs_k < v.K)
    z = tl.load(rows.logits + offs_k.to(tl.int64) * v.sk, mask=mask, other=-INF, eviction_policy=EVICT).to(acc)
    if CONTIGUOUS == 2:
        z = tl.where(rows.known, z, -INF)
    return z


@triton.jit
def without_target(z, rows, k0, BLOCK_K: tl.constexpr):
    """The logits of the classes k0, k0 + 1, ... as if the target did not exist."""
    return tl.where(k0 + tl.arange(0, BLOCK_K)[None, :] == rows.label, -INF, z)


@triton.jit
def holds_target(rows, k0, BLOCK_K: tl.constexpr):
    """Whether the target of the one row is among BLOCK_K classes: in most blocks of a long row it is not."""
    label = tl.max(rows.label) - k0
    return (label >= 0) & (label < BLOCK_K)


@triton.jit
def write_gradient(rows, v, offs_k, x, e, r, NEEDS: tl.constexpr, EXIST: tl.constexpr, EVICT: tl.constexpr):
    """The gradient of the classes offs_k, the target as if it were another. EXIST: none is at -inf."""
    value = gradient(x, e, r, NEEDS)
    if not EXIST:
        value = tl.where(x != -INF, value, r.poison)
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
