"""A kernel that test_aot.py must refuse: too many numbers alive at once, and loads of one element."""

import torch
import triton
import triton.language as tl

from anl_kernels.kernels import launch


@triton.jit(do_not_specialize=["stride"])
def scale_kernel(In_ptr, Out_ptr, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A softmax times its logits, by one warp, of rows that are far too long for it."""
    offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    x = tl.load(In_ptr + offs * stride).to(tl.float32)
    y = tl.exp(x - tl.max(x, 1)[:, None])
    tl.store(Out_ptr + offs * stride, (x * y / tl.sum(y, 1)[:, None]).to(Out_ptr.dtype.element_ty))


def call():
    x = torch.empty(8192, dtype=torch.bfloat16, device="meta")
    config = launch.LaunchConfig(BLOCK_N=1, BLOCK_K=8192, num_warps=1)
    launch.launch(scale_kernel, (1, 1, 1), (x, x, 3), {}, config, x.device)
