"""Sums over the rows of p_j = exp(z_j - max) / sum, for the batch entropy: the logits are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, cdiv, choose_columns, launch_first, target_of, view_of
from .memory import multiple
from .scalar_math import INF, exp

PROGRAMS = 1024  # the rows are cut into chunks for about so many, whatever the device
GROUP = tl.constexpr(8)  # so many tiles are added up in the arithmetic of the logits, then on in float64
_ADD = LaunchConfig(BLOCK_N=64, BLOCK_K=16, num_warps=4)


@triton.jit(do_not_specialize=["batches", "lanes", "K", "num_rows", "tiles", "so", "sk", "si"])
def columns_kernel(
    Logits_ptr,
    Coefs_ptr,
    Parts_ptr,
    batches,
    lanes,
    K,
    num_rows,
    tiles,
    so,
    sk,
    si,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Parts (chunks, K), float64: the sums over the `tiles` blocks of BLOCK_N lanes of a chunk, added in order.

    Logits: (batches, K, lanes) by its strides; Coefs: max and 1 / sum of each row, (>= 2, num_rows). CONTIGUOUS, VEC:
    as in launch.View. Grid: blocks of classes * chunks.
    """
    acc: tl.constexpr = Coefs_ptr.dtype.element_ty
    so, si = multiple(so, VEC), multiple(si, VEC)
    if CONTIGUOUS == 1:
        K, sk = multiple(K, VEC), 1
    if CONTIGUOUS == 2:
        lanes, sk, si = multiple(lanes, VEC), multiple(sk, VEC), 1
    blocks = tl.cdiv(K, BLOCK_K)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)[:, None]
    offs_k = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    offsets = lane.to(tl.int64) * si + offs_k.to(tl.int64) * sk
    lane_blocks = tl.cdiv(lanes, BLOCK_N)
    stop = tl.minimum((chunk + 1) * tiles, batches.to(tl.int64) * lane_blocks)
    total = tl.zeros([BLOCK_K], tl.float64)
    for group in range(chunk * tiles, stop, GROUP):
        part = tl.zeros([BLOCK_N, BLOCK_K], acc)
        for tile in range(group, tl.minimum(group + GROUP, stop)):
            tile = tl.full([], tile, tl.int64)
            batch, start = tile // lane_blocks, tile % lane_blocks * BLOCK_N
            exist = lane < lanes - start
            row = Coefs_ptr + (batch * lanes + start) + lane
            high, inv_sum = tl.load(row, mask=exist, other=0.0), tl.load(row + num_rows, mask=exist, other=0.0)
            live = inv_sum != 0.0
            z = tl.load(Logits_ptr + (batch * so + start * si) + offsets, mask=live & (offs_k < K), other=-INF)
            part += tl.where(live, exp(z.to(acc) - high) * inv_sum, 0.0)
        total += tl.sum(part, 0).to(tl.float64)
    offs_k = tl.reshape(offs_k, [BLOCK_K])
    tl.store(Parts_ptr + chunk * K + offs_k, total, mask=offs_k < K)


@triton.jit(do_not_specialize=["chunks", "K"])
def add_kernel(Parts_ptr, Out_ptr, chunks, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Out (K,) = the sum over the chunks of Parts (chunks, K). Grid: blocks of classes."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs = tl.arange(0, BLOCK_N)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
    for chunk in range(0, chunks, BLOCK_N):
        mask = (chunk + offs < chunks) & (offs_k < K)[None, :]
        total += tl.load(Parts_ptr + (chunk + offs).to(tl.int64) * K + offs_k[None, :], mask=mask, other=0.0)
    tl.store(Out_ptr + offs_k, tl.sum(total, 0), mask=offs_k < K)


def column_sums(logits: Tensor, shape, strides, coefs: Tensor) -> Tensor:
    """Sum over the rows of p, (K,), float64, in an order that depends on shape and strides alone.

    logits: (outer, K, inner) `shape` by its strides; coefs (>= 2, rows): max and 1 / sum. Rows with 1 / sum = 0, the
    ignored ones, are not read and add nothing.
    """
    num_classes = shape[1]
    sums = logits.new_empty(num_classes, dtype=torch.float64)
    if not logits.numel():
        return sums.zero_()
    view = view_of(shape, logits.element_size(), strides)
    config = choose_columns(view, logits.element_size(), target_of(logits.device))
    blocks, all_tiles = cdiv(num_classes, config.BLOCK_K), view.batches * cdiv(view.lanes, config.BLOCK_N)
    tiles = max(GROUP.value, cdiv(all_tiles, max(1, PROGRAMS // blocks)))
    chunks = cdiv(all_tiles, tiles)
    parts = sums if chunks == 1 else sums.new_empty(chunks, num_classes)
    num_rows = view.batches * view.lanes
    args = (logits, coefs, parts, view.batches, view.lanes, num_classes, num_rows, tiles, *view.strides)
    constexprs = {"CONTIGUOUS": view.CONTIGUOUS, "VEC": view.VEC}
    launch_first(columns_kernel, (blocks * chunks, 1, 1), args, constexprs, config, logits.device)
    if chunks > 1:
        grid = (cdiv(num_classes, _ADD.BLOCK_K), 1, 1)
        launch_first(add_kernel, grid, (parts, sums, chunks, num_classes), {}, _ADD, logits.device)
    return sums
