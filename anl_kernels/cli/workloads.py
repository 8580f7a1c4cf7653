"""The shapes and the logits of `bench` and of benchmarks/speed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Workload(NamedTuple):
    """One shape and dtype; written 512x32000:fp32, or 1x21x512x512:bf16 for images (N x K x height x width)."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + ":" + self.dtype

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def rows(self) -> int:
        return self.shape[0] * torch.Size(self.shape[2:]).numel()

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Logits and labels as training meets them; no benchmark gains by uniform rows."""
        generator = torch.Generator().manual_seed(seed)
        target_shape = (self.shape[0], *self.shape[2:])
        target = torch.randint(self.shape[1], target_shape, generator=generator)
        logits = realistic_logits(self.shape, target, generator)
        return logits.to(DTYPES[self.dtype]), target


def realistic_logits(shape: tuple[int, ...], target: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of standard deviation 1 to 4; a quarter is peaked at the label, an eighth at another class."""
    row_shape = (shape[0], 1, *shape[2:])
    logits = torch.empty(shape).normal_(generator=generator)
    logits *= torch.empty(row_shape).uniform_(1.0, 4.0, generator=generator)
    kind = torch.rand(row_shape, generator=generator)
    other = torch.randint(shape[1], row_shape, generator=generator)
    peak = torch.where(kind < 0.25, target.unsqueeze(1), other)
    height = torch.empty(row_shape).uniform_(8.0, 24.0, generator=generator)
    return logits.scatter_add_(1, peak, torch.where(kind < 0.375, height, 0.0))


def parse(text: str) -> list[Workload]:
    """'128x10,512x32000:bf16' -> workloads; without a dtype: fp32."""
    found = []
    for word in text.split(","):
        sizes, _, dtype = word.strip().partition(":")
        try:
            shape = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            shape = ()
        if len(shape) < 2 or min(shape) < 1 or (dtype or "fp32") not in DTYPES:
            raise ValueError(f"{word!r} is no workload: write N x K such as 512x32000, with :bf16 for another dtype")
        found.append(Workload(shape, dtype or "fp32"))
    return found


SMALL = parse("128x10,128x100")
FULL = parse(
    "128x10,128x100,4096x1000,4096x1000:bf16,512x32000,512x32000:bf16,256x100000,256x100000:bf16,"
    "64x1000000,64x1000000:bf16,1x21x512x512,1x21x512x512:bf16"
)
QUICK = parse("128x10,128x100,1024x1000,1024x1000:bf16,1x21x64x64")
