"""Instructions per class of the kernel that a call takes: everything of a row divided by its classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pipes import pipe_of

from binaries import one_kernel
from disassembly import Kernel, Loop, kernels
from scenario import Case, Launch, Work, is_full, kernel_of, launch_of, walk_launch
from walk import Lost, Trace

# File of csrc/cuda that has a kernel, where it is not named like it.
FILES = {"spatial_gradient": "spatial", "rows_gradient_entropy": "rows_gradient", "pixel_sums": "column_sums"}
# What a gradient reads of a row besides logits, at least: ten float32 coefficients, grad_output, an int64 label.
GIVEN_BYTES = 4 * 10 + 4 + 8
DEVICE_OF_ARCH = {80: 4, 89: 8, 90: 5, 100: 7, 120: 9}  # of host_devices.cpp


@dataclass
class Counts:
    """What a call's kernel issues, per class of a row and lane-instruction."""

    case: Case
    arch: int
    kernel: Kernel
    launch: Launch
    binary: Path
    work: Work

    @property
    def trace(self) -> Trace:
        return self.work.all

    @property
    def elements(self) -> float:
        return self.work.elements

    def per_element(self, chosen=lambda instruction: True) -> float:
        code = self.kernel.instructions
        return sum(32 * n for i, n in self.trace.issued.items() if chosen(code[i])) / self.elements

    def pipe_of(self, i: int) -> str:
        return pipe_of(self.kernel.instructions[i].opcode)

    def pipes(self) -> dict[str, float]:
        found = Counter()
        for i, n in self.trace.issued.items():
            found[self.pipe_of(i)] += 32 * n / self.elements
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


@cache
def count(case: Case, arch: int = 90) -> Counts:
    """Lost if the path cannot be found, or is not that of a row: every class read, its gradient written."""
    launch = launch_of(case)
    stem = launch.kernel.removesuffix("_kernel")
    binary = one_kernel(FILES.get(stem, stem), arch, case.dtype, is_full(case))
    kernel = kernel_of(launch, kernels(binary))
    counts = Counts(case, arch, kernel, launch, binary, walk_launch(kernel, binary, arch, case))
    check(counts)
    return counts


def check(counts: Counts) -> None:
    """That the walk did what the kernel is for."""
    size = counts.case.size
    written = counts.moved("STG")
    if written < 0.97 * size:
        raise Lost(f"{counts.kernel.name}: {written:.2f} bytes per class are written, a class has {size}")
    if counts.case.gradient_alone:
        read, least = counts.moved("LDG"), 0.99 * (size + GIVEN_BYTES / counts.case.classes)
    else:
        read, least = counts.moved("LDG", "LDS", "LDGSTS", "LD"), 0.97 * size
    if read < least:
        raise Lost(f"{counts.kernel.name}: {read:.2f} bytes per class are read, not {least:.2f}")
    if counts.case.dtype != "float64" and counts.opcode("MUFU.EX2") < 0.97:
        raise Lost(f"{counts.kernel.name}: {counts.opcode('MUFU.EX2'):.2f} exps per class")


def element_loops(counts: Counts) -> set[int]:
    """The instructions of the shortest loops that read or write 16 bytes, or take exps: not those of loops inside."""
    place = {i.address: n for n, i in enumerate(counts.kernel.instructions)}
    issued = counts.trace.issued
    within: set[int] = set()  # addresses in loops so far
    found: set[int] = set()
    for loop in counts.kernel.loops:  # the shortest first
        own = Loop([i for i in loop.instructions if i.address not in within and issued[place[i.address]]])
        indices = {place[i.address] for i in own.instructions}
        outer = found & {place[address] for address in loop.addresses}
        if not outer and (any(own.count(n, wide=True) for n in ("LDS", "LDG", "STG")) or own.count("MUFU.EX2") > 1):
            found |= indices
        within |= loop.addresses
    return found


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
