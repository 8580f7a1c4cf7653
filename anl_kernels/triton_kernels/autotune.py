"""Opt-in tuning of block sizes: with ANL_KERNELS_AUTOTUNE=1 the first call of a kind times a few configurations.

What won is kept in a file, one line of JSON a kind of call, in the platform's cache folder or in ANL_KERNELS_CACHE. A
kind is the kernel, its classes and rows up to a power of two, the layout, the sum of terms, the device, the versions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import torch
import triton

from ..cache import File
from .launch import LaunchConfig, View, power_of_2

FILE = File("triton.json", "kernels are tuned anew", "what tuning found is not kept")
_known: dict[Path, dict[str, LaunchConfig]] = {}


def enabled() -> bool:
    """Whether calls are timed: asked for, and not while a CUDA graph is captured."""
    if os.environ.get("ANL_KERNELS_AUTOTUNE") != "1":
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def kind_of(kernel: str, view: View, dtype: torch.dtype, needs: int, device: str) -> str:
    """What calls must have in common to share a configuration."""
    rows, classes = power_of_2(view.batches * view.lanes), power_of_2(view.num_classes)
    layout = f"{view.CONTIGUOUS}.{view.VEC}"
    return f"{kernel} {rows}x{classes} {layout} {dtype} needs{needs} {device} triton-{triton.__version__}"


def candidates(config: LaunchConfig, num_classes: int) -> list[LaunchConfig]:
    """`config` first, then its neighbours: fewer and more warps, and smaller and larger blocks where rows are swept."""
    found = [config]
    for warps in (config.num_warps // 2, config.num_warps * 2):
        if 1 <= warps <= 16:
            found.append(replace(config, num_warps=warps))
    if config.BLOCK_K < num_classes:
        for factor in (0.5, 2):
            block = int(config.BLOCK_K * factor)
            warps = int(config.num_warps * factor)
            if 16 <= block <= 16384:
                found.append(replace(config, BLOCK_K=block))
                if 1 <= warps <= 16:
                    found.append(replace(config, BLOCK_K=block, num_warps=warps))
    return found


def milliseconds(run: Callable[[], None]) -> float:
    """The median time of a call on the device."""
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def best(kind: str, tried: list[LaunchConfig], run: Callable[[LaunchConfig], None]) -> LaunchConfig:
    """The configuration of this kind: from the file, or the fastest of `tried`, the first of which must run."""
    known = _known.get(FILE.path)
    if known is None:
        known = _known[FILE.path] = _read()
    if kind not in known:
        times = {tried[0]: milliseconds(lambda: run(tried[0]))}
        for config in tried[1:]:
            try:
                times[config] = milliseconds(lambda: run(config))  # noqa: B023
            except triton.runtime.errors.OutOfResources:
                continue
        known[kind] = min(times, key=times.get)
        FILE.update({kind: astuple(known[kind])})
    return known[kind]


def _read() -> dict[str, LaunchConfig]:
    try:
        return {kind: LaunchConfig(*map(_size, sizes)) for kind, sizes in FILE.read().items()}
    except (ValueError, TypeError) as error:
        FILE.is_not_ours(error)
        return {}


def _size(value) -> int:
    if type(value) is not int or not 0 < value <= 65536 or value & (value - 1):
        raise ValueError(f"{value!r} is no block size")
    return value
