"""Times in turns, so that every contender meets the same machine, and the peak of memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .contenders import Run

COLD_FROM = 1 << 20  # bytes: below, the logits are warm in any training loop
SMALL_SAMPLE = 2e-3  # seconds: short calls are repeated until a sample takes this long


class Times(NamedTuple):
    """Seconds per call."""

    median: float
    low: float  # the 10 % quantile
    high: float  # the 90 % quantile
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Times:
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


class Cache:
    """Evicts the caches by walking through more memory than they hold."""

    def __init__(self, device: str, size: int = 256 << 20):
        self.filler = torch.zeros((size if device == "cuda" else size // 2) // 4, device=device)

    def evict(self) -> None:
        self.filler.add_(1.0)


class Clock:
    """Seconds that the device spent on a call: wall time on a CPU, the time between two events on a GPU's stream."""

    def __init__(self, device: str):
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device == "cuda" else None

    def time(self, call, calls: int = 1) -> float:
        if self.events:
            self.events[0].record()
        start = time.perf_counter()
        for _ in range(calls - 1):
            call()
        result = call()
        elapsed = time.perf_counter() - start
        if self.events:
            self.events[1].record()
            self.events[1].synchronize()
            elapsed = self.events[0].elapsed_time(self.events[1]) * 1e-3
        del result  # handing memory back is the caller's, for every contender alike
        return elapsed / calls


def one_sample(run: Run, calls: int, cache: Cache | None, clock: Clock) -> float:
    if cache:  # one call untimed, so that fresh memory comes as it does in a loop and not as the last contender left it
        if run.before:
            run.before()
        run.call()
    if run.before is None or calls == 1:
        if run.before:
            run.before()
        if cache:
            cache.evict()
        return clock.time(run.call, calls)
    spent = 0.0
    for _ in range(calls):  # a call that overwrites its input: restored between calls, outside the clock
        run.before()
        spent += clock.time(run.call)
    return spent / calls


def interleaved(
    runs: Sequence[Run], size: int, seconds: float, device: str = "cpu", rounds: tuple[int, int] = (5, 60)
) -> list[Times]:
    """Times of `runs`, one sample of each per round, for about `seconds`. size: bytes of the logits (COLD_FROM)."""
    cache, clock = Cache(device) if size >= COLD_FROM else None, Clock(device)
    first = [min(one_sample(run, 1, None, clock) for _ in range(2)) for run in runs]
    calls = [1 if cache else max(1, round(SMALL_SAMPLE / max(t, 1e-7))) for t in first]
    samples: list[list[float]] = [[] for _ in runs]
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while done < rounds[0] or (done < rounds[1] and time.perf_counter() - start < seconds):
            for step in range(len(runs)):
                index = (step + done) % len(runs)  # nobody always follows the same neighbour
                samples[index].append(one_sample(runs[index], calls[index], cache, clock))
            done += 1
    finally:
        if enabled:
            gc.enable()
    return [Times.of(values) for values in samples]


@contextlib.contextmanager
def quiet_stderr():
    """Kineto writes a line for every start and stop straight to file descriptor 2."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Profile(NamedTuple):
    """What one call did, exact, from PyTorch's profiler."""

    peak_bytes: int  # the most that PyTorch's allocator held above what it held before
    allocations: int
    launches: int | None  # kernels and memory operations on the GPU; None on a CPU


def profile(run: Run, device: str = "cpu") -> Profile:
    from torch.autograd import profiler

    if run.before:
        run.before()
    gc.collect()
    gpu = device == "cuda"
    with (
        quiet_stderr(),
        profiler.profile(use_kineto=True, profile_memory=True, use_device="cuda" if gpu else None) as seen,
    ):
        result = run.call()
        if gpu:
            torch.cuda.synchronize()
    del result
    events = list(seen.kineto_results.events())
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    memory = [e for e in events if e.name() == "[memory]" and e.device_type() == kind]
    held = peak = 0
    for event in sorted(memory, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    launches = sum(e.device_type() == kind and e.name() != "[memory]" for e in events) if gpu else None
    return Profile(peak, sum(e.nbytes() > 0 for e in memory), launches)


def peak_resident(run: Run) -> int | None:
    """The growth of the process's resident memory in one call: also what no allocator of PyTorch sees. Linux only."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if run.before:
        run.before()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        refs.write_text("5")  # the high-water mark starts again from here
        before = resident(status.read_text(), "VmRSS")
        result = run.call()
        after = resident(status.read_text(), "VmHWM")
    except (OSError, AttributeError):
        return None
    del result
    return max(0, after - before)


def resident(status: str, field: str) -> int:
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
