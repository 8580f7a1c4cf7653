"""What a launch of a Triton kernel costs the host, measured without a GPU.

    python benchmarks/triton_overhead.py

Triton's own driver runs over a libcuda made here whose functions do nothing, so all of Triton's and this package's host
code is in the figures, and nothing of CUDA's (about 2 us a launch on top). Tensors are on the CPU; no kernel runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FUNCTIONS = {  # name -> what it does besides succeeding; `a` to `d` are its first arguments
    "cuInit": "", "cuDeviceGet": "*(int*)a = 0;", "cuDeviceGetCount": "*(int*)a = 1;",
    "cuCtxGetCurrent": "*(void**)a = a;",
    "cuCtxSetCurrent": "", "cuCtxGetDevice": "*(int*)a = 0;", "cuCtxGetLimit": "", "cuCtxSetLimit": "",
    "cuDevicePrimaryCtxRetain": "*(void**)a = a;", "cuDriverGetVersion": "*(int*)a = 13000;",
    "cuDeviceGetAttribute": "*(int*)a = 200000;", "cuFuncGetAttribute": "*(int*)a = (long)b == 0 ? 1024 : 0;",
    "cuFuncSetAttribute": "", "cuFuncSetCacheConfig": "", "cuGetErrorString": "*(const char**)b = \"none\";",
    "cuLaunchKernelEx": "launches += 1;", "cuModuleGetFunction": "*(void**)a = a;",
    "cuModuleLoadData": "*(void**)a = a;",
    "cuModuleUnload": "", "cuPointerGetAttribute": "*(void**)a = c;", "cuStreamIsCapturing": "*(int*)b = 0;",
    "cuOccupancyMaxActiveClusters": "", "cuTensorMapEncodeTiled": "", "cuCtxPushCurrent": "", "cuCtxPopCurrent": "",
}  # fmt: skip


def make_libcuda(folder: Path) -> None:
    code = "long launches;\nlong count_launches(void) { return launches; }\n"
    for name, body in FUNCTIONS.items():
        code += f"int {name}(void* a, void* b, void* c, void* d) {{ {body} return 0; }}\n"
    (folder / "cuda.c").write_text(code)
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-w",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        folder / "libcuda.so.1",
        folder / "cuda.c",
    ]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(folder / "libcuda.so.1")


def microseconds(call, repeats: int = 2000, rounds: int = 15) -> float:
    """The least of several means."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best * 1e6


def use_driver():
    """Triton's NVIDIA driver on the libcuda that does nothing, for one H200."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    from anl_kernels.backends import triton as backend
    from anl_kernels.triton_kernels import launch

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda index: 0
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(driver)
    launch._target = lambda device: launch.Target("cuda:90", 32, 132, 50 << 20)
    backend.unavailable = lambda: None
    backend._device_type = lambda: "cpu"


def measure() -> None:
    import ctypes

    import torch
    import triton

    import anl_kernels as ak
    from anl_kernels.triton_kernels import launch

    use_driver()
    count = ctypes.CDLL("libcuda.so.1").count_launches
    rows = []

    def report(name, call):
        call()
        before = count()
        call()
        rows.append((name, count() - before, microseconds(call)))

    calls = []
    once = launch._launch_here
    launch._launch_here = lambda *rest: calls.append(rest) or once(*rest)
    logits, target = torch.randn(128, 10), torch.randint(10, (128,))
    with torch.no_grad():
        ak.anl_ce(logits, target, backend="triton")
    launch._launch_here = once
    kernel, grid, args, constexprs, config, *_ = calls[0]
    keywords = {**constexprs, **launch._blocks(kernel, config), "num_warps": config.num_warps, "enable_fp_fusion": True}
    report("tile_kernel through JITFunction.run", lambda: kernel[grid](*args, **keywords))
    report("tile_kernel through launch.launch", lambda: launch.launch(*calls[0][:5], logits.device))

    for shape in ((128, 10), (128, 100), (4096, 1000)):
        logits, target = torch.randn(shape), torch.randint(shape[1], shape[:1])
        leaf = logits.clone().requires_grad_()

        def both(leaf=leaf, target=target):
            ak.anl_ce(leaf, target, backend="triton").backward()
            leaf.grad = None

        report(f"anl_ce forward, {shape[0]} x {shape[1]}", lambda: ak.anl_ce(logits, target, backend="triton"))  # noqa: B023
        report(f"anl_ce forward and backward, {shape[0]} x {shape[1]}", both)

    print(f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}")
    for name, launches, time_ in rows:
        print(f"{name:45} {launches} launches {time_:7.1f} us")


def main() -> None:
    if "ANL_FAKE_CUDA" in os.environ:
        measure()
        return
    with tempfile.TemporaryDirectory() as folder:
        make_libcuda(Path(folder))
        paths = {
            "LD_LIBRARY_PATH": folder,
            "TRITON_LIBCUDA_PATH": folder,
            "ANL_FAKE_CUDA": "1",
            "TRITON_CACHE_DIR": folder,
        }
        done = subprocess.run([sys.executable, __file__], env={**os.environ, **paths, "OMP_NUM_THREADS": "1"})
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
