"""The backends that take part in the tests: every one of NAMES that can run here, with every variant that runs here.

A variant is the CPU's instruction set, the device that CUDA's kernels are compiled for as host code, or the kernel that
Triton is made to take.
"""

import importlib
import importlib.util
import os
from contextlib import contextmanager
from functools import lru_cache
from unittest import mock

import comparison
import cuda_on_host.build
from devices import GPU

import anl_kernels
from anl_kernels import registry
from anl_kernels.backends import NAMES

CPU_ISAS = ("avx512", "avx2", "baseline")
TRITON_PATHS = ("tile", "loop", "split", "launches")  # launches: split where no protocol is trusted
# The kernels compiled for the CPU, as on devices that do not exist; launches: where no protocol is trusted.
CUDA_HOSTS = ("host", "host-sm80", "host-warp", "host-launches")
SAME_KERNELS = ("host-warp", "host-launches")  # what differs is in few cases
GPU_BACKENDS = {name for device, names in registry.FUSED_BY_DEVICE.items() if device != "cpu" for name in names}


def cpu_module():
    """anl_kernels._cpu, or None where it is not built."""
    if importlib.util.find_spec("anl_kernels") is None or importlib.util.find_spec("anl_kernels._cpu") is None:
        return None
    return importlib.import_module("anl_kernels._cpu")


def runnable_isas():
    module = cpu_module()
    if module is None:
        return []
    in_use, runnable = module.info()["isa"], []
    for isa in module.info()["isas"]:
        try:
            module.set_isa(isa)
            runnable.append(isa)
        except ValueError:
            pass
    module.set_isa(in_use)
    return sorted(runnable, key=CPU_ISAS.index)


@lru_cache
def variants(name):
    """The variants of a backend that run here, the best first; None: it has none, or runs as it is."""
    if name == "cpu":
        return runnable_isas()
    if name == "cuda":
        return [None] if GPU else CUDA_HOSTS if cuda_on_host.build.compiler() else []
    return [None, *TRITON_PATHS] if name == "triton" else [None]


class Backend:
    """What a test needs to know of a backend: its name for `backend=`, and what only some of them do."""

    def __init__(self, name, variant):
        self.name, self.variant = name, variant
        self.fused = self.name != "reference"
        self.checks_labels = self.name not in GPU_BACKENDS  # they would wait for the device
        self.isa = variant if self.name == "cpu" else None
        self.on_host = self.name == "cuda" and variant is not None
        self.on_gpu = self.name in GPU_BACKENDS and GPU is not None
        self.device = GPU if self.on_gpu else "cpu"  # where its tensors live
        self.interpreted = self.name == "triton" and GPU != "cuda"  # a thousand times slower
        self.forced = self.name == "triton" and variant is not None  # each path compiles every kernel anew
        self.limited = self.interpreted or self.forced or variant in SAME_KERNELS  # has few cases in every tier
        self.repeats = self.forced and variant == "launches"  # "split" in launches of its own

    def __repr__(self):
        return self.name if self.variant is None else f"{self.name}-{self.variant}"

    @property
    def few_cases(self):
        """Whether it is a further variant of a backend, which by default has few cases."""
        return self.variant != variants(self.name)[0]

    def few(self, cases, count=2):
        """All `cases`; where that would take too long, the first and the last, `count` in all."""
        cases = list(cases)
        if not self.limited or len(cases) <= count:
            return cases
        return cases[: count - 1] + cases[-1:]

    @contextmanager
    def in_use(self):
        """Within it `backend=self.name` means this variant."""
        if self.isa:
            module = cpu_module()
            before = module.info()["isa"]
            module.set_isa(self.isa)
            try:
                yield
            finally:
                module.set_isa(before)
        elif self.name == "triton" and self.variant:
            from anl_kernels.triton_kernels import passes

            trust = {"ANL_KERNELS_TRUST": "none"} if self.variant == "launches" else {}
            with mock.patch.object(passes, "plan", triton_plan(self.variant)), mock.patch.dict(os.environ, trust):
                yield
        elif self.on_host:
            from cuda_on_host import adapter

            device = self.variant.removesuffix("-launches")
            trust = {} if device == self.variant else {"ANL_KERNELS_TRUST": "none"}
            with adapter.on_host(device), mock.patch.dict(os.environ, trust):
                yield
        elif self.name == "reference":
            with mock.patch.object(comparison, "CANCELLED", comparison.CANCELLED_MORE):
                yield
        else:
            yield


def triton_plan(path):
    """A choice of kernels that always takes `path`, with blocks so small that few rows and classes are many blocks."""
    from anl_kernels.triton_kernels import launch, passes, rows

    def plan(view, itemsize, target, may_wait=True):
        if path == "tile":
            config = launch.LaunchConfig(16, launch.power_of_2(view.num_classes), 4)
            return passes.planned(rows.tile_kernel, view, config)
        classes = min(256, max(16, launch.power_of_2(view.num_classes // 3)))
        lanes = 1 if view.lanes <= 6 else 16  # one row per program takes ways that several do not
        if path == "loop":
            return passes.planned(rows.loop_kernel, view, launch.LaunchConfig(lanes, classes, 4))
        p = passes.split(view, launch.LaunchConfig(lanes, classes, 4), group=1, programs=3)
        return p if may_wait else passes.in_launches(p)

    return plan


def backends():
    available = {b.name for b in anl_kernels.backends() if b.available}
    found = [Backend(name, variant) for name in reversed(NAMES) for variant in variants(name)]
    return [b for b in found if b.name in available or b.on_host]


BACKENDS = backends()
# A backend that knows several variants takes part with each, or (ONCE) with the best.
ONCE = [b for b in BACKENDS if b.variant == variants(b.name)[0]]
