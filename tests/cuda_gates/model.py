"""Instructions per class and a predicted time for every kernel, out of its machine code. Nothing is measured; no GPU.

    python tests/cuda_gates/model.py > benchmarks/results/cuda-model.md
    python tests/cuda_gates/model.py --dtype bfloat16 --loss anl_ce -K 128256 [-N 8192] [--arch 90] [--loops]

The second form compiles the kernel that csrc/cuda/select.cpp would take, for that dtype alone, and walks through it
(walk.py): everything of a row divided by its classes, on the plain path.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pipes import pipe_of

from binaries import one_kernel
from disassembly import Kernel, kernels
from scenario import Case, Launch, is_full, kernel_of, launch_of, walk_launch
from walk import Lost, Trace

# File of csrc/cuda that has a kernel, where it is not named like it.
FILES = {"spatial_gradient": "spatial", "rows_gradient_entropy": "rows_gradient", "pixel_sums": "column_sums"}
DEVICE_OF_ARCH = {80: 4, 89: 8, 90: 5, 100: 7, 120: 9}  # of host_devices.cpp


@dataclass
class Counts:
    """What a call's kernel issues, per class of a row and lane-instruction."""

    case: Case
    arch: int
    kernel: Kernel
    launch: Launch
    trace: Trace
    elements: float
    warps: list[Trace]  # of the first CTA

    def per_element(self, chosen=lambda instruction: True) -> float:
        code = self.kernel.instructions
        return sum(32 * n for i, n in self.trace.issued.items() if chosen(code[i])) / self.elements

    def pipes(self) -> dict[str, float]:
        found = Counter()
        for i, n in self.trace.issued.items():
            found[pipe_of(self.kernel.instructions[i].opcode)] += 32 * n / self.elements
        return dict(found.most_common())

    def moved(self, *bases: str) -> float:
        """Bytes per class that lanes load or store by such instructions."""
        code = self.kernel.instructions
        return sum(n for i, n in self.trace.moved.items() if code[i].base in bases) / self.elements

    @property
    def total(self) -> float:
        return self.per_element()

    def opcode(self, name: str) -> float:
        return self.per_element(lambda i: (i.opcode + ".").startswith(name + "."))


def count(case: Case, arch: int = 90) -> Counts:
    """Lost if the path cannot be found, or is not that of a row: every class read, its gradient written."""
    launch = launch_of(case)
    stem = launch.kernel.removesuffix("_kernel")
    binary = one_kernel(FILES.get(stem, stem), arch, case.dtype, is_full(case))
    kernel = kernel_of(launch, kernels(binary))
    counts = Counts(case, arch, kernel, launch, *walk_launch(kernel, binary, arch, case))
    check(counts)
    return counts


def check(counts: Counts) -> None:
    """That the walk did what the kernel is for."""
    size = counts.case.size
    written = counts.moved("STG")
    if written < 0.97 * size:
        raise Lost(f"{counts.kernel.name}: {written:.2f} bytes per class are written, a class has {size}")
    read = counts.moved("LDG", "LDS", "LDGSTS", "LD")
    if read < 0.97 * size:
        raise Lost(f"{counts.kernel.name}: {read:.2f} bytes per class are read, a class has {size}")
    if counts.case.dtype != "float64" and counts.opcode("MUFU.EX2") < 0.97:
        raise Lost(f"{counts.kernel.name}: {counts.opcode('MUFU.EX2'):.2f} exps per class")


def loops_of(counts: Counts) -> list[tuple[str, float, str]]:
    """(where, instructions per class, what is in it): of every loop, without the loops within it."""
    code = counts.kernel.instructions
    place = {i.address: n for n, i in enumerate(code)}
    taken: set[int] = set()
    rows = []
    for loop in counts.kernel.loops:  # the shortest first: what an inner loop has is not the outer one's
        indices = [place[i.address] for i in loop.instructions if place[i.address] not in taken]
        taken.update(indices)
        share = sum(32 * counts.trace.issued[i] for i in indices) / counts.elements
        if share >= 0.05:
            what = Counter(code[i].opcode for i in indices if counts.trace.issued[i] and is_notable(code[i].opcode))
            text = " ".join(f"{n} {name}" for name, n in what.most_common(6))
            where = f"loop at {loop.instructions[0].address:#x}, run {counts.trace.issued[indices[0]]:.0f} times"
            rows.append((where, share, text))
    rest = sum(32 * n for i, n in counts.trace.issued.items() if i not in taken) / counts.elements
    return [*sorted(rows, key=lambda row: -row[1]), ("in no loop", rest, "")]


def is_notable(opcode: str) -> bool:
    return opcode.split(".")[0] in ("LDS", "LDG", "STG", "STS", "HMMA", "BAR", "SHFL") or opcode.startswith("MUFU.EX2")


def show(counts: Counts, with_loops: bool) -> None:
    case, launch, kernel = counts.case, counts.launch, counts.kernel
    pipes = ", ".join(f"{name} {n:.2f}" for name, n in counts.pipes().items())
    print(f"{kernel.name}, sm_{counts.arch}, {case.loss}, {case.rows} x {case.classes}")
    memory = f"{launch.shared_bytes} + {kernel.shared} bytes of shared memory"
    print(
        f"  {launch.grid} CTAs of {launch.block} threads, clusters of {launch.cluster}, {memory}, {kernel.registers} registers"
    )
    exps = counts.opcode("MUFU.EX2")
    print(f"  instructions per class: {counts.total:.2f} ({pipes}); MUFU.EX2 {exps:.2f}")
    if with_loops:
        for where, share, what in loops_of(counts):
            print(f"  {share:7.2f}  {where}  {what}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-K", type=int, help="classes")
    parser.add_argument("-N", type=int, help="rows; else so many that there are 2^30 logits")
    parser.add_argument("--pixels", type=int, default=1, help="(N / pixels, K, pixels) instead of (N, K)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--loss", default="anl_ce")
    parser.add_argument("--gradient", action="store_true", help="the gradient alone, from saved coefficients")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--loops", action="store_true", help="by loop")
    options = parser.parse_args()
    rows = options.N or max(1, (1 << 30) // options.K // options.pixels) * options.pixels
    device = DEVICE_OF_ARCH[options.arch]
    case = Case(options.dtype, options.loss, options.K, rows, options.pixels, device, options.gradient)
    show(count(case, options.arch), options.loops)


if __name__ == "__main__":
    main()
