"""Kernels that test_aot.py must refuse: one has too many numbers alive at once, and loads of one element; the other
goes through shared memory all the time."""

import torch
import triton
import triton.language as tl

from anl_kernels.triton_kernels import launch


@triton.jit(do_not_specialize=["stride"])
def scale_kernel(In_ptr, Out_ptr, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A softmax times its logits, by one warp, of rows that are far too long for it."""
    offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    x = tl.load(In_ptr + offs * stride).to(tl.float32)
    y = tl.exp(x - tl.max(x, 1)[:, None])
    tl.store(Out_ptr + offs * stride, (x * y / tl.sum(y, 1)[:, None]).to(Out_ptr.dtype.element_ty))


@triton.jit
def sum_kernel(In_ptr, Out_ptr, BLOCK_K: tl.constexpr):
    """Adds up its tiles one by one, and the warps meet for each."""
    total = 0.0
    for i in tl.static_range(64):
        total += tl.sum(tl.load(In_ptr + i * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.float32))
    tl.store(Out_ptr, total)


def call():
    x = torch.empty(64 * 8192, dtype=torch.bfloat16, device="meta")
    config = launch.LaunchConfig(BLOCK_N=1, BLOCK_K=1024, num_warps=4)
    launch.launch(sum_kernel, (1, 1, 1), (x, x), {}, config, x.device)
    config = launch.LaunchConfig(BLOCK_N=1, BLOCK_K=8192, num_warps=1)
    launch.launch(scale_kernel, (1, 1, 1), (x, x, 3), {}, config, x.device)
