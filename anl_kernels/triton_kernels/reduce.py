"""Sums over rows, in an order that depends on the number of rows alone, and the scaling of a gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import shape_and_strides
from .launch import LaunchConfig, cdiv, launch, target_of, view_of
from .memory import multiple, stored

ITEMS = 16384  # what one program adds up
_SUM = LaunchConfig(BLOCK_N=1, BLOCK_K=1024, num_warps=4)
_FLAT = LaunchConfig(BLOCK_N=1, BLOCK_K=4096, num_warps=4)
_PIXELS = LaunchConfig(BLOCK_N=256, BLOCK_K=16, num_warps=4)


@triton.jit(do_not_specialize=["N", "items"])
def sum_kernel(Values_ptr, Denominator_ptr, Out_ptr, N, items, DIVIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Out[i] = the sum, in float64, of the i-th `items` of the N Values, over Denominator where DIVIDE."""
    start = tl.program_id(0).to(tl.int64) * items
    total = tl.zeros([BLOCK_K], tl.float64)
    for i in range(0, tl.minimum(N - start, items), BLOCK_K):
        offs = start + i + tl.arange(0, BLOCK_K)
        total += tl.load(Values_ptr + offs, mask=offs < N, other=0.0).to(tl.float64)
    result = tl.sum(total, axis=0)
    if DIVIDE:
        result /= tl.load(Denominator_ptr).to(tl.float64)
    tl.store(Out_ptr + tl.program_id(0), result.to(Out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "K", "items", "ignore_index"])
def row_weight_kernel(
    Target_ptr, Weight_ptr, Out_ptr, N, K, items, ignore_index, WEIGHTED: tl.constexpr, BLOCK_K: tl.constexpr
):
    """As sum_kernel, of what each row counts in the mean: weight[label]; 1 without weights, or for a label that is no
    class; 0 for an ignored row."""
    start = tl.program_id(0).to(tl.int64) * items
    total = tl.zeros([BLOCK_K], tl.float64)
    for i in range(0, tl.minimum(N - start, items), BLOCK_K):
        offs = start + i + tl.arange(0, BLOCK_K)
        label = tl.load(Target_ptr + offs, mask=offs < N, other=0).to(tl.int64)
        counts = (offs < N) & (label != ignore_index)
        row_weight = tl.where(counts, 1.0, 0.0).to(tl.float64)
        if WEIGHTED:
            known = counts & (label >= 0) & (label < K)
            row_weight = tl.where(known, tl.load(Weight_ptr + label, mask=known, other=0.0).to(tl.float64), row_weight)
        total += row_weight
    tl.store(Out_ptr + tl.program_id(0), tl.sum(total, axis=0).to(Out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["batches", "lanes", "K", "so", "sk", "si", "out_so", "out_sk", "out_si"])
def scale_kernel(
    In_ptr,
    Out_ptr,
    Factor_ptr,
    batches,
    lanes,
    K,
    so,
    sk,
    si,
    out_so,
    out_sk,
    out_si,
    ALWAYS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Out = In * Factor, (batches, K, lanes) by their strides; nothing is touched where Factor is 1, unless ALWAYS.

    CONTIGUOUS, VEC: as in launch.View. Grid: any number of programs.
    """
    factor = tl.load(Factor_ptr)
    if ALWAYS or factor != 1.0:
        so, out_so, si, out_si = multiple(so, VEC), multiple(out_so, VEC), multiple(si, VEC), multiple(out_si, VEC)
        if CONTIGUOUS == 1:
            K, sk, out_sk = multiple(K, VEC), 1, 1
        if CONTIGUOUS == 2:
            lanes, sk, out_sk, si, out_si = multiple(lanes, VEC), multiple(sk, VEC), multiple(out_sk, VEC), 1, 1
        lane, offs_k = tl.arange(0, BLOCK_N)[:, None].to(tl.int64), tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
        offsets, out_offsets = lane * si + offs_k * sk, lane * out_si + offs_k * out_sk
        lane_blocks, blocks = tl.cdiv(lanes, BLOCK_N), tl.cdiv(K, BLOCK_K)
        tiles = batches.to(tl.int64) * lane_blocks * blocks
        for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
            tile = tl.full([], tile, tl.int64)
            o, i, k = tile // blocks // lane_blocks, tile // blocks % lane_blocks * BLOCK_N, tile % blocks * BLOCK_K
            mask = (lane < lanes - i) & (offs_k < K - k)
            value = tl.load(In_ptr + (o * so + i * si + k * sk) + offsets, mask=mask).to(factor.dtype) * factor
            out = Out_ptr + (o * out_so + i * out_si + k * out_sk) + out_offsets
            tl.store(out, stored(value, Out_ptr.dtype.element_ty), mask=mask)


def reduce_sum(values: Tensor, denominator: Tensor | None = None) -> Tensor:
    """The sum of `values` (contiguous), over `denominator` () if given: (), their dtype. It is added up in float64."""
    total, parts = values.new_empty(()), _parts(values)
    if parts is None:
        _launch_sum(values, denominator, total)
    else:
        _launch_sum(values, None, parts)
        _launch_sum(parts, denominator, total)
    return total


def denominator(target: Tensor, ignore_index: int, weight: Tensor | None, num_classes: int, acc: torch.dtype) -> Tensor:
    """What "mean" divides by, (), `acc`: the weights of the labels, or how many there are, of the rows not ignored.

    target: contiguous; weight (num_classes,): contiguous. A label that is no class counts 1.
    """
    total, parts = target.new_empty((), dtype=acc), _parts(target)
    out = total if parts is None else parts
    args = (target, weight, out, target.numel(), num_classes, ITEMS, ignore_index)
    launch(row_weight_kernel, (out.numel(), 1, 1), args, {"WEIGHTED": weight is not None}, _SUM, target.device)
    if parts is not None:
        _launch_sum(parts, None, total)
    return total


def _parts(items: Tensor) -> Tensor | None:
    """Memory for the sums of several programs, where one is not enough."""
    n = cdiv(items.numel(), ITEMS)
    return None if n <= 1 else items.new_empty(n, dtype=torch.float64)


def _launch_sum(values, denominator, out):
    """One program adds up a part, and all the parts, however many."""
    args = (values, denominator, out, values.numel(), ITEMS if out.dim() else values.numel())
    constexprs = {"DIVIDE": denominator is not None}
    launch(sum_kernel, (out.numel(), 1, 1), args, constexprs, _SUM, values.device)


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """grad *= factor, (), in place; grad is not touched where factor is 1."""
    return _scale(grad, factor, grad)


def scale(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor as a new tensor."""
    return _scale(grad, factor, torch.empty_like(grad))


def _scale(grad, factor, out):
    if not grad.numel():
        return out
    if grad.is_contiguous() or (_is_dense(grad) and grad.stride() == out.stride()):
        shape, strides = (1, grad.numel(), 1), [(0, 1, 0)] * 2
    else:
        shape, strides = shape_and_strides(grad)[0], [shape_and_strides(x)[1] for x in (grad, out)]
    view = view_of(shape, grad.element_size(), *strides)
    config = _PIXELS if view.CONTIGUOUS == 2 else _FLAT
    tiles = view.batches * cdiv(view.lanes, config.BLOCK_N) * cdiv(shape[1], config.BLOCK_K)
    grid = (min(tiles, 8 * target_of(grad.device).num_sms), 1, 1)
    args = (grad, out, factor, view.batches, view.lanes, shape[1], *view.strides)
    constexprs = {"ALWAYS": out is not grad, "CONTIGUOUS": view.CONTIGUOUS, "VEC": view.VEC}
    launch(scale_kernel, grid, args, constexprs, config, grad.device)
    return out


_is_dense = torch.ops.aten.is_non_overlapping_and_dense
