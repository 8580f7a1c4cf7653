"""Which kernel runs which rows, and what it takes, as a Markdown table. Needs nvcc and g++, no GPU.

    python tests/cuda_gates/table.py [ROWS] > benchmarks/results/cuda-kernels.md

The choice is the one that csrc/cuda/select.cpp makes with the limits of two devices, by the build for the host.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys

from binaries import ROOT, cubins
from disassembly import Kernel, kernels

DEVICES = {"H100": (3, 90), "A100": (4, 80)}  # of tests/cuda_on_host/host_runtime.cpp
DTYPES = {"bfloat16": (3, 2, "bfloat16_t"), "float32": (0, 4, "float"), "float64": (1, 8, "double")}
LARGEST = 1 << 23  # classes


def load_build():
    """tests/cuda_on_host/build.py."""
    spec = importlib.util.spec_from_file_location("build_on_host", ROOT / "tests" / "cuda_on_host" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ranges(plan_of) -> list[tuple[int, int]]:
    """[(first, last number of classes)] that one kernel runs."""
    found, first = [], 2
    while first < LARGEST:
        kernel, low, high = plan_of(first)["kernel"], first, first + 1
        while high < LARGEST and plan_of(high)["kernel"] == kernel:
            low, high = high, high + max(1, (high - first) // 2)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if plan_of(middle)["kernel"] == kernel else (low, middle)
        found.append((first, low))
        first = high
    return found


def instances(found: list[Kernel], name: str, storage: str) -> list[Kernel]:
    return [k for k in found if k.base_name == f"{name}_kernel" and k.parameters[:1] == [storage]]


def span(amounts, unit=1) -> str:
    low, high = (f"{x / unit:.4g}" for x in (min(amounts), max(amounts)))
    return low if low == high else f"{low} to {high}"


def rows_of_table(kernels_here, module, device, rows):
    for dtype, (code, size, storage) in DTYPES.items():

        def plan_of(classes, code=code):
            return module.plan_for(code, (rows, classes, 1), (classes, 1, 0), device)

        for first, last in ranges(plan_of):
            plans = [plan_of(classes) for classes in sorted({first, (first + last) // 2, last})]
            name = plans[0]["kernel"]
            used = instances(kernels_here, name, storage)
            yield (
                name,
                dtype,
                f"{first} to {last}" if last < LARGEST - 1 else f"from {first}",
                f"{size} + {size}" + ", again from L2" * (name == "rows_split"),
                span([kernel.registers for kernel in used]),
                span([plan["shared_bytes"] + max(k.shared for k in used) for plan in plans], 1024),
                span([plan["cluster"] for plan in plans]),
                span([plan["threads"] for plan in plans]),
                MEASURED,
            )


# Their rows need no range: bytes per class, in units of the storage type.
OTHERS = {
    "spatial": "1 + 1; again through the caches where the pixels' classes do not fit in shared memory",
    "rows_gradient": "1 + 1",
    "rows_gradient_entropy": "1 + 1, twice again through the caches for the mean of log q",
    "spatial_gradient": "1 + 1",
    "column_sums": "1 + 0",
    "pixel_sums": "1 + 0",
}
MEASURED = "not measured on a GPU"


def others_of_table(kernels_here):
    for name, traffic in OTHERS.items():
        for dtype, (_, _, storage) in DTYPES.items():
            used = instances(kernels_here, name, storage)
            yield name, dtype, traffic, span([kernel.registers for kernel in used]), MEASURED


HEADINGS = (
    "kernel",
    "dtype",
    "classes",
    "bytes per class: read + written",
    "registers",
    "shared memory, KB",
    "cluster",
    "threads",
    "share of copy bandwidth",
)
OTHER_HEADINGS = ("kernel, any K", "dtype", "logits read + written", "registers", "share of copy bandwidth")


def show(headings, rows):
    print(f"\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main(rows=4096):
    build = load_build()
    path = build.build()
    module, library = build.load(path), ctypes.CDLL(str(path))
    print(f"Kernels of a loss with its gradient, {rows} contiguous rows. Loads and stores of 128 bits, no spills; one")
    print("MUFU.EX2 per class in each sweep, without the focal losses (tests/cuda_gates).")
    for name, (device, arch) in DEVICES.items():
        assert library.anl_host_use_device(device) == 0
        found = [kernel for path in cubins(arch).values() for kernel in kernels(path)]
        print(f"\n{name}, sm_{arch}:")
        show(HEADINGS, rows_of_table(found, module, device, rows))
        show(OTHER_HEADINGS, others_of_table(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
