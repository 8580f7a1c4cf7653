"""How the Triton kernels are launched: block sizes by shape and device, and the rows of a tensor as lanes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from ..backends import LaunchRefused


@dataclass(frozen=True)
class LaunchConfig:
    """A tile is BLOCK_N lanes (rows) by BLOCK_K classes."""

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int = 1


class Target(NamedTuple):
    """What the choice of a configuration looks at."""

    name: str  # "cuda:90", "hip:gfx942", "interpreter"
    warp_size: int
    num_sms: int
    l2_bytes: int  # of the cache that all share


class Lanes(NamedTuple):
    """Rows (outer, inner) of (outer, K, inner) tensors as batches of lanes: lane i of batch o is row o * lanes + i."""

    batches: int
    lanes: int


class View(NamedTuple):
    """What a kernel knows of its rows when it is compiled, and what it is told at run time."""

    batches: int
    lanes: int
    num_classes: int
    strides: tuple  # (batch, class, lane) of each tensor, flat
    CONTIGUOUS: int  # 1: classes, 2: lanes have stride 1 in every tensor; 0: neither
    VEC: int  # divides the run of CONTIGUOUS and the other strides: elements of a load, 16 bytes (4 across lanes), or 1


INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETER = Target("interpreter", 32, 4, 1 << 20)
_ONE_AT_A_TIME = threading.Lock()  # the interpreter keeps a launch's state in globals


# Where the second-level cache is one of several, and a larger one stands behind all of them.
_SHARED_CACHE = {"hip:gfx942": 256 << 20, "hip:gfx950": 256 << 20}


def target_of(device: torch.device) -> Target:
    """What is known of `device`; of the interpreter, if that runs the kernels."""
    return _INTERPRETER if INTERPRETED else _target(device)


@lru_cache(maxsize=64)
def _target(device):
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type != "cuda":
        name = device.type
    elif torch.version.hip:
        name = f"hip:{properties.gcnArchName.split(':')[0]}"
    else:
        name = f"cuda:{properties.major}{properties.minor}"
    known = lambda field, default: getattr(properties, field, default)
    shared_cache = _SHARED_CACHE.get(name, known("L2_cache_size", 16 << 20))
    return Target(name, known("warp_size", 32), known("multi_processor_count", 64), shared_cache)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def as_lanes(shape, *strides):
    """((batches, lanes), (batch stride, class stride, lane stride) for each of `strides`).

    The rows are one run of lanes where every tensor's are.
    """
    outer, _, inner = shape
    if inner == 1:
        return Lanes(1, outer), [(0, sk, so) for so, sk, _ in strides]
    if outer == 1 or all(so == si * inner for so, _, si in strides):
        return Lanes(1, outer * inner), [(0, sk, si) for _, sk, si in strides]
    return Lanes(outer, inner), list(strides)


def view_of(shape, itemsize: int, *strides) -> View:
    """The View of tensors of one (outer, K, inner) shape, each with its three strides."""
    (batches, lanes), strides = as_lanes(shape, *strides)
    num_classes, width = shape[1], 16 // itemsize
    flat = tuple(stride for triple in strides for stride in triple)
    if all(sk == 1 for _, sk, _ in strides):
        others = [(si, lanes) for _, _, si in strides]
        contiguous, run = 1, num_classes
    elif all(si == 1 for _, _, si in strides):
        others = [(sk, num_classes) for _, sk, _ in strides]
        contiguous, run = 2, lanes
    else:
        return View(batches, lanes, num_classes, flat, 0, 1)
    if contiguous == 2:  # a thread has the classes of few lanes: 4 bytes per load, side by side with its neighbours'
        width = max(1, 4 // itemsize)
    others += [(so, batches) for so, _, _ in strides]
    aligned = run % width == 0 and all(stride % width == 0 or size == 1 for stride, size in others)
    return View(batches, lanes, num_classes, flat, contiguous, width if aligned else 1)


def same_misalignment(view: View, *tensors: torch.Tensor) -> bool:
    """Whether each row begins as many bytes past a multiple of 16 in one tensor as in the others."""
    size = tensors[0].element_size()
    sizes = (view.batches, 0, view.lanes)
    first = view.strides[:3]
    return all(
        (tensor.data_ptr() - tensors[0].data_ptr()) % 16 == 0
        and all(n <= 1 or (s - f) * size % 16 == 0 for n, s, f in zip(sizes, view.strides[3 * i : 3 * i + 3], first))
        for i, tensor in enumerate(tensors)
    )


def choose_tile(num_rows: int, num_classes: int, spatial: bool, itemsize: int, target: Target) -> LaunchConfig:
    """A row, or several short ones, on chip.

    Every thread that has a part of a row does the mathematics of the row: few threads per row, and few rows per thread.
    """
    BLOCK_K, rows = power_of_2(num_classes), power_of_2(num_rows)
    if spatial:  # a thread has all classes of a lane
        return LaunchConfig(min(4 * target.warp_size, rows), BLOCK_K, 4)
    load = min(16 // itemsize, num_classes & -num_classes)  # elements
    rows_of_warp = max(1, target.warp_size * load // BLOCK_K)
    if rows * BLOCK_K <= _BATCH:
        return LaunchConfig(rows, BLOCK_K, min(512 // target.warp_size, max(1, rows // rows_of_warp)))
    if rows_of_warp == 1:
        return LaunchConfig(1, BLOCK_K, _warps(BLOCK_K, 32, target))
    return LaunchConfig(min(4 * rows_of_warp, rows), BLOCK_K, max(1, min(4, rows // rows_of_warp)))


def choose_loop(num_rows: int, num_classes: int, spatial: bool, itemsize: int, target: Target) -> LaunchConfig:
    """Rows that a program sweeps a block of classes at a time."""
    if spatial:
        return LaunchConfig(min(4 * target.warp_size, power_of_2(num_rows)), min(power_of_2(num_classes), 16), 4)
    BLOCK_K = min(power_of_2(num_classes), 4096)
    return LaunchConfig(1, BLOCK_K, _warps(BLOCK_K, 16, target))


def choose_gradient(view: View, itemsize: int, heavy: bool, target: Target) -> LaunchConfig:
    """One read and one write, nothing that joins classes: as many blocks as the classes need. heavy: focal, entropy."""
    classes = power_of_2(view.num_classes)
    if view.CONTIGUOUS == 2:
        lanes = 128 * max(1, 4 // itemsize)
        return LaunchConfig(min(lanes, power_of_2(view.lanes)), min(classes, 16), 4)
    each = (64 if heavy else 128) // itemsize  # elements of a thread: loads of 16 bytes, four or eight under way
    BLOCK_K = min(classes, 128 * each)
    BLOCK_N = min(max(1, 32 * each // BLOCK_K), power_of_2(view.lanes))
    return LaunchConfig(BLOCK_N, BLOCK_K, _warps(BLOCK_N * BLOCK_K, each, target))


def choose_columns(view: View, itemsize: int, target: Target) -> LaunchConfig:
    """Sums over lanes: a thread keeps its classes, and few threads share one."""
    classes = power_of_2(view.num_classes)
    if view.CONTIGUOUS == 2:
        return LaunchConfig(min(128, power_of_2(view.lanes)), min(classes, 16), 4)
    BLOCK_K = min(classes, 1024)
    BLOCK_N = min(4096 // BLOCK_K, power_of_2(view.lanes))
    return LaunchConfig(BLOCK_N, BLOCK_K, _warps(BLOCK_N * BLOCK_K, 32, target))


_BATCH = 4096  # logits of a batch that one program takes: its loss needs no second launch


def _warps(elements: int, each: int, target: Target) -> int:
    """Warps whose threads have about `each` elements."""
    return min(max(1, power_of_2(elements // (each * target.warp_size))), 512 // target.warp_size)


def launch(kernel, grid, args: tuple, constexprs: dict, config: LaunchConfig, device: torch.device) -> None:
    """kernel[grid](*args, **constexprs) on the current stream of `device`, with the blocks of `config` it has.

    args: the parameters that are not compiled in, in the kernel's order, before those that are.
    """
    if INTERPRETED:
        with _ONE_AT_A_TIME:
            kernel[grid](*args, **constexprs, **_blocks(kernel, config))
        return
    driver = triton.runtime.driver.active
    index = driver.get_current_device()
    if device.index is None or device.index == index:
        _launch_here(kernel, grid, args, constexprs, config, driver, index)
    else:
        with torch.get_device_module(device).device(device):
            _launch_here(kernel, grid, args, constexprs, config, driver, device.index)


def launch_first(kernel, grid, args: tuple, constexprs: dict, config: LaunchConfig, device: torch.device) -> None:
    """`launch` of a kernel before which no result was written: LaunchRefused where the device cannot hold it."""
    try:
        launch(kernel, grid, args, constexprs, config, device)
    except triton.runtime.errors.OutOfResources as error:
        name = kernel.fn.__name__
        raise LaunchRefused(f"anl_kernels: the device refuses to launch {name}: {error}") from None


class _Compiled(NamedTuple):
    """A kernel in the form that one key asks for."""

    kernel: triton.compiler.CompiledKernel
    compiled_in: tuple  # the arguments behind `args`
    known: bool  # whether _launch_here may pass them on itself


_compiled: dict[tuple, _Compiled] = {}
# Where CompiledKernel.run, which is Triton's own affair, is known to take what _launch_here passes.
_KNOWN_RELEASES = ("3.6", "3.7", "3.8", "3.9")
_KNOWN_BACKENDS = ("cuda", "hip")


def _launch_here(kernel, grid, args, constexprs, config, driver, index):
    """What JITFunction.run does, but for its most costly part: asking anew what each argument is compiled as.

    What decides that is in the key: types, whether a pointer is a multiple of 16, whether an int fits 32 bits (every
    int of these kernels is do_not_specialize). A Triton that is not known runs its own JITFunction.run every time.
    """
    key = [kernel.fn, index, config.BLOCK_N, config.BLOCK_K, config.num_warps, config.num_stages, *constexprs.items()]
    values = []
    for arg in args:
        kind = type(arg)
        if kind is int:
            key.append(-0x80000000 <= arg <= 0x7FFFFFFF)
        elif kind is tuple:
            key.append(len(arg))
        elif arg is not None:
            key.append(arg.dtype)
            arg = arg.data_ptr()
            key.append(arg % 16 == 0)
        else:
            key.append(None)
        values.append(arg)
    key = tuple(key)
    found = _compiled.get(key)
    if found is None or not found.known or _profiled():
        _compiled[key] = _launch_by_triton(kernel, grid, args, constexprs, config, _known(driver))
        return
    compiled, compiled_in, _ = found
    hooks = (None, None, None)  # what they are told, and the two of them
    stream = driver.get_current_stream(index)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, *hooks, *values, *compiled_in)


def _known(driver) -> bool:
    release = ".".join(triton.__version__.split(".")[:2])
    return release in _KNOWN_RELEASES and driver.get_current_target().backend in _KNOWN_BACKENDS


def _launch_by_triton(kernel, grid, args, constexprs, config, known) -> _Compiled:
    named = {**constexprs, **_blocks(kernel, config)}
    behind = kernel.arg_names[len(args) :]
    if sorted(behind) != sorted(named):
        raise TypeError(f"{kernel.fn.__name__} takes {behind} behind its {len(args)} arguments, not {list(named)}")
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return _Compiled(_run(kernel, grid, args, named | options), tuple(named[name] for name in behind), known)


def _run(kernel, grid, args, keywords) -> triton.compiler.CompiledKernel:
    return kernel[grid](*args, **keywords)


def _blocks(kernel, config):
    return {name: getattr(config, name) for name in ("BLOCK_N", "BLOCK_K") if name in kernel.arg_names}


def _profiled() -> bool:
    """Whether somebody, a profiler as a rule, wants to hear of every launch from Triton."""
    runtime = triton.knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
