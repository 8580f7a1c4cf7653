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

    def tensors(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Logits and labels as training meets them; no benchmark gains by uniform rows."""
        generator = torch.Generator(device).manual_seed(seed)
        target_shape = (self.shape[0], *self.shape[2:])
        target = torch.randint(self.shape[1], target_shape, generator=generator, device=device)
        return realistic_logits(self.shape, target, generator, DTYPES[self.dtype]), target


def realistic_logits(shape, target: Tensor, generator: torch.Generator, dtype=torch.float32) -> Tensor:
    """Rows of standard deviation 1 to 4; a quarter is peaked at the label, an eighth at another class."""
    device, row_shape = target.device, (shape[0], 1, *shape[2:])
    logits = torch.empty(shape, dtype=dtype, device=device)
    spread = torch.empty(row_shape, device=device).uniform_(1.0, 4.0, generator=generator)
    step = max(1, (1 << 28) // max(1, logits[0].numel()))  # float32 only for a part at a time
    for rows in range(0, shape[0], step):
        part = torch.empty(logits[rows : rows + step].shape, device=device).normal_(generator=generator)
        logits[rows : rows + step] = part * spread[rows : rows + step]
    kind = torch.rand(row_shape, generator=generator, device=device)
    other = torch.randint(shape[1], row_shape, generator=generator, device=device)
    peak = torch.where(kind < 0.25, target.unsqueeze(1), other)
    height = torch.empty(row_shape, device=device).uniform_(8.0, 24.0, generator=generator)
    return logits.scatter_add_(1, peak, torch.where(kind < 0.375, height, 0.0).to(dtype))


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


CLASSES = (10, 100, 1000, 10_000, 32_000, 50_257, 128_000, 262_144, 1_000_000)


def ladder(elements: int) -> list[Workload]:
    """Every number of classes with about `elements` logits, in fp32 and bf16."""
    return [Workload((max(1, elements // k), k), dtype) for k in CLASSES for dtype in ("fp32", "bf16")]


SMALL = parse("128x10,128x100")
IMAGES = parse("1x21x512x512,1x21x512x512:bf16,1x150x512x512,1x150x512x512:bf16")
ONE_ROW = parse("1x1000,1x1000000,1x1000000:bf16")
CPU = [
    *SMALL,
    *parse("4096x1000,4096x1000:bf16"),
    *ladder(25_600_000),
    *parse("256x100000,256x100000:bf16,64x1000000,64x1000000:bf16"),
    *ONE_ROW,
    *IMAGES,
]
GPU = [*SMALL, *ladder(1 << 28), *ONE_ROW, *parse("16384x131072:bf16,2148x1000000"), *IMAGES]  # up to 2^31 elements
QUICK = parse("128x10,128x100,1024x1000,1024x1000:bf16,8x100000,1x21x64x64")
