"""Lets anl_kernels.backends.cuda run on the CPU, through the host build of its kernels."""

import ctypes
from contextlib import contextmanager
from functools import lru_cache

import cuda_on_host.build as build

from anl_kernels import registry
from anl_kernels.backends import cuda

# Devices of host_devices.cpp. The first three are small: a few hundred classes are long rows there.
SMALL = ("host", "host-sm80", "host-warp")
# And with NVIDIA's numbers: "h20" has too few multiprocessors a GPC for the widest clusters, "mig" is part of an H200,
# "h100-of-80" runs what was compiled for an A100 (and as PTX for what is newer).
LARGE = ("host-h100", "host-a100", "host-h200", "host-h20", "host-b200", "host-rtx4090", "host-rtx5090", "host-mig")
LARGE += ("host-h100-of-80",)
# A small one again, where parts of rows are as long as on large ones.
LONG_PARTS = "host-sm80-long"
DEVICES = {name: index for index, name in enumerate((*SMALL, *LARGE, LONG_PARTS))}


@lru_cache
def loaded():
    path = build.build()
    return build.load(path), ctypes.CDLL(str(path))


def _forget():
    """Programs belong to the module that made them, and what was chosen to what could run."""
    cuda._terms_program.cache_clear()
    registry.choose_anew()


@contextmanager
def on_host(device="host"):
    """Within it backend="cuda" takes CPU tensors, and thinks it runs on that device."""
    module, library = loaded()
    before = cuda._cuda, cuda._why_not, cuda._DEVICE
    cuda._cuda, cuda._why_not, cuda._DEVICE = module, None, "cpu"
    _forget()
    library.anl_host_reset()
    assert library.anl_host_use_device(DEVICES[device]) == 0
    try:
        yield module
    finally:
        cuda._cuda, cuda._why_not, cuda._DEVICE = before
        _forget()
