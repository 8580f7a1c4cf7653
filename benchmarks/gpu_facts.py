"""For gpu.sh: "NAME=WHY", why the GPU or a backend of its cannot be used here; nothing behind "=" where it can."""

import os

import torch

import anl_kernels

there = torch.cuda.is_available() or os.environ.get("ANL_TEST_DEVICE") == "emulated"
gpu = "" if there else "no GPU that PyTorch can use"
print(f"gpu={gpu}")
for backend in anl_kernels.backends():
    if backend.name in ("cuda", "triton"):
        print(f"{backend.name}={gpu or ('' if backend.available else backend.reason)}")
