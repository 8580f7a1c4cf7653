"""The gradient from the coefficients that a forward pass left: one read, one write."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .folds import asked
from .launch import cdiv, choose_gradient, launch_first, same_misalignment, target_of, view_of
from .memory import multiple, stored
from .row_math import COEF_BITS, INV_SUM, NUM_COEFS, GradCoefs, gradient, gradient_row
from .scalar_math import INF, constants, exp, runtime_numbers
from .tiles import scaled


class Row(NamedTuple):
    """What the gradient of a program's rows is made from, each [BLOCK_N, 1]."""

    live: tl.tensor  # neither ignored nor beyond the last row: the logits of others are not read
    label: tl.tensor  # int32; -1 if it is no class
    parts: tl.tensor  # GradientRow, from the coefficients times grad_output


class Entropy(NamedTuple):
    """s p_j (log_q_j - mean), the mean in two parts: what rounding it left out follows. [BLOCK_N, 1]."""

    slope: tl.tensor  # s / sum, multiplies exp(z_j - max)
    center: tl.tensor
    lost: tl.tensor


@triton.jit
def load_row(Coefs_ptr, Target_ptr, GradOutput_ptr, rows, exist, K, num_rows, step, c, NEEDS: tl.constexpr):
    """The Row of the rows `rows` (int64)."""
    inv_sum = tl.load(Coefs_ptr + INV_SUM * num_rows + rows, mask=exist, other=0.0)
    live = inv_sum != 0.0
    factor = tl.full(rows.shape, 1.0, inv_sum.dtype)
    if GradOutput_ptr is not None:
        factor = tl.load(GradOutput_ptr + rows * step, mask=live, other=0.0)
    fields = ()
    for i in tl.static_range(NUM_COEFS):
        field = tl.zeros_like(inv_sum)
        if i == INV_SUM:
            field = inv_sum
        elif asked(COEF_BITS[i], NEEDS):
            field = tl.load(Coefs_ptr + i * num_rows + rows, mask=live, other=0.0)
        fields += (field,)
    coefs = scaled(GradCoefs(*fields), factor)
    label = tl.load(Target_ptr + rows, mask=live, other=-1).to(tl.int64)
    label = tl.where((label >= 0) & (label < K), label, -1).to(tl.int32)
    return Row(live, label, gradient_row(coefs, inv_sum, c))


@triton.jit
def mean_log_q(center, logits, LogQ_ptr, offs_k, offsets, K, sk, row):
    """sum_k p_k log_q_k as center + sum_k p_k (log_q_k - center), float64: the nearer `center`, the fewer digits cancel
    where the gradient takes the mean from log_q_j."""
    acc: tl.constexpr = row.parts.coefs.max.dtype
    mass, moment = tl.zeros(offsets.shape, acc), tl.zeros(offsets.shape, acc)
    for k0 in range(0, K, offsets.shape[1]):
        mask = k0 + offs_k < K
        z = tl.load(logits + tl.full([], k0, tl.int64) * sk + offsets, mask=row.live & mask, other=-INF).to(acc)
        e = exp(z - row.parts.coefs.max)
        mass += e
        moment += e * (tl.load(LogQ_ptr + k0 + offs_k, mask=mask, other=0.0) - center)
    return center.to(tl.float64) + tl.sum(moment, 1)[:, None].to(tl.float64) / tl.sum(mass, 1)[:, None].to(tl.float64)


@triton.jit
def find_entropy(logits, LogQ_ptr, Scale_ptr, offs_k, offsets, K, sk, row):
    """The Entropy of the rows: the mean of log_q under p, about itself."""
    mean = mean_log_q(tl.zeros_like(row.parts.coefs.max), logits, LogQ_ptr, offs_k, offsets, K, sk, row)
    mean = mean_log_q(mean.to(row.parts.coefs.max.dtype), logits, LogQ_ptr, offs_k, offsets, K, sk, row)
    center = mean.to(row.parts.coefs.max.dtype)
    return Entropy(
        tl.load(Scale_ptr) * row.parts.coefs.inv_sum,
        center,
        (mean - center.to(tl.float64)).to(row.parts.coefs.max.dtype),
    )


@triton.jit
def part_of(log_q, e, entropy):
    """The entropy term's gradient."""
    return e * (entropy.slope * ((log_q - entropy.center) - entropy.lost))


@triton.jit
def write_tile(logits, grad, k, exist, inside, row, LogQ_ptr, entropy, NEEDS: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """The gradient of the classes k, [1, BLOCK_K], those `inside` the row, the target as if it were another.

    logits, grad: pointers to them."""
    if CONTIGUOUS == 2:  # across lanes, a mask that differs from one to the next would read them one by one
        z = tl.load(logits, mask=exist & inside, other=-INF).to(row.parts.coefs.max.dtype)
        z = tl.where(row.live, z, -INF)
    else:
        z = tl.load(logits, mask=row.live & inside, other=-INF).to(row.parts.coefs.max.dtype)
    x = z - row.parts.coefs.max
    e = exp(x)
    value = gradient(x, e, row.parts, NEEDS)
    if LogQ_ptr is not None:
        value += part_of(tl.load(LogQ_ptr + k, mask=inside, other=0.0), e, entropy)
    value = tl.where(z != -INF, value, row.parts.poison)
    tl.store(grad, stored(value, grad.dtype.element_ty), mask=exist & inside)


@triton.jit
def target_value(logits, sk, row, LogQ_ptr, entropy):
    """The whole gradient at the labels."""
    value = row.parts.coefs.target + row.parts.poison
    if LogQ_ptr is not None:
        known = row.live & (row.label >= 0)
        z = tl.load(logits + row.label.to(tl.int64) * sk, mask=known, other=-INF).to(row.parts.coefs.max.dtype)
        value += part_of(tl.load(LogQ_ptr + row.label, mask=known, other=0.0), exp(z - row.parts.coefs.max), entropy)
    return value


@triton.jit
def write_target(grad, value, begin, end, gsk, row):
    """The gradient of the targets among the classes [begin, end), over what write_tile left there."""
    tl.debug_barrier()
    here = row.live & (row.label >= begin) & (row.label < end)
    tl.store(grad + row.label.to(tl.int64) * gsk, stored(value, grad.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["lanes", "K", "num_rows", "step", "so", "sk", "si", "gso", "gsk", "gsi"])
def gradient_kernel(
    Logits_ptr,
    Grad_ptr,
    Target_ptr,
    Coefs_ptr,
    GradOutput_ptr,
    LogQ_ptr,
    Scale_ptr,
    numbers,
    lanes,
    K,
    num_rows,
    step,
    so,
    sk,
    si,
    gso,
    gsk,
    gsi,
    NEEDS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of BLOCK_N lanes; of ONE block of classes a program, or of all.

    Logits, Grad: (batches, K, lanes) by their strides; Coefs: (NUM_COEFS, num_rows); GradOutput: None, or row r's at
    r * step. LogQ (K,) and Scale () or None: the entropy term, not with ONE. CONTIGUOUS, VEC: as in launch.View.
    WIDTH > 1: one row of any alignment, the same in both tensors, is cut at multiples of so many elements.
    Grid: batches * cdiv(lanes, BLOCK_N) * (blocks of classes if ONE).
    """
    acc: tl.constexpr = Coefs_ptr.dtype.element_ty
    so, gso, si, gsi = multiple(so, VEC), multiple(gso, VEC), multiple(si, VEC), multiple(gsi, VEC)
    if CONTIGUOUS == 1:
        K, sk, gsk = multiple(K, VEC), 1, 1
    if CONTIGUOUS == 2:
        lanes, sk, gsk, si, gsi = multiple(lanes, VEC), multiple(sk, VEC), multiple(gsk, VEC), 1, 1
    class_blocks = 1
    if ONE:
        class_blocks = tl.cdiv(K + WIDTH - 1, BLOCK_K)
    class_block = tl.program_id(0) % class_blocks
    lane_blocks = tl.cdiv(lanes, BLOCK_N)
    batch = (tl.program_id(0) // class_blocks // lane_blocks).to(tl.int64)
    start = (tl.program_id(0) // class_blocks % lane_blocks).to(tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)[:, None]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    exist = lane < lanes - start
    c = constants(numbers, acc)
    rows = batch * lanes + start + lane
    row = load_row(Coefs_ptr, Target_ptr, GradOutput_ptr, rows, exist, K, num_rows.to(tl.int64), step, c, NEEDS)

    logits, grad = Logits_ptr + (batch * so + start * si), Grad_ptr + (batch * gso + start * gsi)
    lane = lane.to(tl.int64)
    offsets, grad_offsets = lane * si + offs_k.to(tl.int64) * sk, lane * gsi + offs_k.to(tl.int64) * gsk
    entropy = None
    if LogQ_ptr is not None:
        entropy = find_entropy(logits, LogQ_ptr, Scale_ptr, offs_k, offsets, K, sk, row)
    target = target_value(logits + lane * si, sk, row, LogQ_ptr, entropy)
    if ONE:
        k0 = class_block * BLOCK_K
        first = k0
        if WIDTH > 1:
            size: tl.constexpr = Logits_ptr.dtype.element_ty.primitive_bitwidth // 8
            first -= (logits.to(tl.int64) // size % WIDTH).to(tl.int32)
            at, grad_at = tl.multiple_of(logits + first, 16) + offsets, tl.multiple_of(grad + first, 16) + grad_offsets
        else:
            at, grad_at = logits + k0.to(tl.int64) * sk + offsets, grad + k0.to(tl.int64) * gsk + grad_offsets
        k = first + offs_k
        if WIDTH > 1 and (first >= 0 and first + BLOCK_K <= K):
            write_tile(at, grad_at, k, exist, exist, row, LogQ_ptr, entropy, NEEDS, CONTIGUOUS)
        else:
            write_tile(at, grad_at, k, exist, (k >= 0) & (k < K), row, LogQ_ptr, entropy, NEEDS, CONTIGUOUS)
        write_target(grad + lane * gsi, target, first, first + BLOCK_K, gsk, row)
    else:
        for block in range(0, tl.cdiv(K, BLOCK_K)):
            k0 = tl.full([], block, tl.int64) * BLOCK_K
            at, grad_at = logits + k0 * sk + offsets, grad + k0 * gsk + grad_offsets
            k = block * BLOCK_K + offs_k
            write_tile(at, grad_at, k, exist, k < K, row, LogQ_ptr, entropy, NEEDS, CONTIGUOUS)
        write_target(grad + lane * gsi, target, 0, K, gsk, row)


def row_grad(
    grad: Tensor,
    logits: Tensor,
    shape,
    strides,
    grad_strides,
    target: Tensor,
    coefs: Tensor,
    grad_output,
    step: int,
    log_q,
    scale,
    min_prob: float,
    gamma: float | None,
    needs: int,
) -> Tensor:
    """grad = grad_output times the gradient of `coefs` (NUM_COEFS, rows), plus scale p_j (log_q_j - sum_k p_k log_q_k).

    logits, grad: (outer, K, inner) `shape` by their strides. target: contiguous, its labels need not be classes.
    grad_output: None (1), or that of row r at r * step. log_q (K,), scale (): None without the entropy term.
    All but logits and grad (of their dtype) and target have the coefficients' dtype.
    """
    if not logits.numel():
        return grad
    view = view_of(shape, logits.element_size(), strides, grad_strides)
    device, itemsize = target_of(logits.device), logits.element_size()
    unaligned = view.CONTIGUOUS == 1 and view.VEC == 1
    config = choose_gradient(view, itemsize, unaligned or log_q is not None or needs & 12 != 0, device)
    width = 1
    # Triton's code for AMD does not believe that an address it is told of is aligned.
    if unaligned and log_q is None and config.BLOCK_N == 1 and not device.name.startswith("hip"):
        width = 16 // itemsize if same_misalignment(view, logits, grad) else 1
    one = view.CONTIGUOUS != 2 and log_q is None
    class_blocks = cdiv(view.num_classes + width - 1, config.BLOCK_K) if one else 1
    numbers = runtime_numbers((), min_prob, gamma or 0.0, coefs.element_size() == 8)
    pointers = (logits, grad, target, coefs, grad_output, log_q, scale)
    sizes = (view.lanes, view.num_classes, view.batches * view.lanes, step)
    constexprs = {"NEEDS": needs, "CONTIGUOUS": view.CONTIGUOUS, "VEC": view.VEC, "WIDTH": width, "ONE": one}
    grid = (view.batches * cdiv(view.lanes, config.BLOCK_N) * class_blocks, 1, 1)
    launch_first(gradient_kernel, grid, (*pointers, numbers, *sizes, *view.strides), constexprs, config, logits.device)
    return grad
