"""The GPU of the tests: a real one, or with ANL_TEST_DEVICE=emulated one whose kernels run on the host.

The emulated one has tensors of its own (tests/emulated_device): a test that leaves one on the CPU fails as on a GPU.
"""

import importlib.util
import os

import torch

EMULATED = os.environ.get("ANL_TEST_DEVICE") == "emulated"
# The type of the devices that the GPU backends' tensors live on; None without a GPU: CUDA's kernels then run compiled
# for the host and Triton's interpreted, with tensors on the CPU.
GPU = "emulated" if EMULATED else "cuda" if torch.cuda.is_available() else None


def emulate():
    """Lets the cuda and the triton backend run on the emulated device, for the rest of the process."""
    from cuda_on_host import adapter
    from emulated_device import device

    from anl_kernels import registry
    from anl_kernels.backends import cuda, triton

    device.start()
    if importlib.util.find_spec("triton"):
        let_the_interpreter_wait()
    cuda._cuda, cuda._why_not, cuda._DEVICE = adapter.loaded()[0], None, GPU
    for name in ("device_type", "_device_type"):
        setattr(triton, name, lambda: GPU)
    registry.FUSED_BY_DEVICE[GPU] = registry.FUSED_BY_DEVICE["cuda"]


def let_the_interpreter_wait():
    """Triton's interpreter copies tensors to the CPU and back, which is no fault of the kernels' callers."""
    from triton.runtime.interpreter import GridExecutor

    called, module = GridExecutor.__call__, torch.get_device_module(GPU)

    def call(self, *args, **keywords):
        with module.waiting_is_allowed():
            return called(self, *args, **keywords)

    GridExecutor.__call__ = call


def peak_bytes(call):
    """The most that the emulated device's allocator holds during a call above what it held before."""
    from emulated_device import device

    with device.Peak() as peak:
        call()
    return peak.bytes
