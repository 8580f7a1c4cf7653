"""A launch as the host side makes it, with its plan, parameters and constants, and what the warps of a CTA do in it."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import struct
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from threading import Semaphore, Thread

from binaries import ROOT
from disassembly import Kernel, run, tool
from machine import State
from walk import Graph, Lost, Trace, Walk

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)  # of csrc/call.h
DTYPES = {"float32": (FLOAT32, 4, "float"), "float64": (FLOAT64, 8, "double"), "float16": (FLOAT16, 2, "half_t"),
          "bfloat16": (BFLOAT16, 2, "bfloat16_t")}  # fmt: skip
LOGITS, GRAD, TARGET, LOSS, COEFS, FACTOR, SCRATCH = (i << 40 for i in range(1, 8))  # memory that is not there
LABEL_BYTES = 8
MEAN = 1


@cache
def host_build():
    """tests/cuda_on_host's module, its library, and calls.py."""
    folder = ROOT / "tests" / "cuda_on_host"

    def load(name):
        spec = importlib.util.spec_from_file_location(f"{name}_on_host", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    build = load("build")
    path = build.build()
    return build.load(path), ctypes.CDLL(str(path)), load("calls")


@cache
def kernels_of_build() -> dict[int, tuple[str, tuple[str, ...]]]:
    """The host build's kernels: place in the module -> name and parameters of the template."""
    found = {}
    path = host_build()[0].__file__
    for line in run(shutil.which("nm") or "nm", "-C", path).splitlines():
        if match := re.match(r"([0-9a-f]+) [tTwW] (.*_kernel(<.*>)?)\(", line):
            kernel = Kernel(match[2], 0, 0, 0, 0)
            found[int(match[1], 16)] = (kernel.base_name, tuple(kernel.parameters))
    return found


@dataclass(frozen=True)
class Case:
    """A call: rows x classes, contiguous; pixels > 1: (rows / pixels, classes, pixels) with pixels innermost."""

    dtype: str = "bfloat16"
    loss: str = "anl_ce"
    classes: int = 1000
    rows: int = 8192
    pixels: int = 1
    device: int = 5  # of tests/cuda_on_host/host_devices.cpp
    gradient_alone: bool = False

    @property
    def elements(self) -> int:
        return self.rows * self.classes

    @property
    def size(self) -> int:
        return DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Launch:
    """The kernel's own launch: its plan, and its parameters as they lie in constant memory."""

    kernel: str  # rows_small_kernel
    template: tuple[str, ...]  # ("bfloat16_t", "8", "false")
    grid: int
    block: int
    cluster: int
    shared_bytes: int
    parameters: bytes

    def same_shape(self, other: Launch) -> bool:
        return (self.grid, self.block, self.cluster, self.shared_bytes) == (
            other.grid, other.block, other.cluster, other.shared_bytes)  # fmt: skip


def launch_of(case: Case) -> Launch:
    """What module.cpp launches for the call on the case's device: nothing runs."""
    module, library, calls = host_build()
    if library.anl_host_use_device(case.device):
        raise RuntimeError(f"there is no device {case.device} in host_devices.cpp")
    code = DTYPES[case.dtype][0]
    shape = (case.rows // case.pixels, case.classes, case.pixels)
    strides = (case.classes * case.pixels, case.pixels, 1)
    terms, gamma, needs = calls.LOSSES[case.loss]
    where = module.Where(case.device, 0, lambda size: SCRATCH)
    library.anl_host_record(1)
    try:
        if case.gradient_alone:
            module.row_grad(code, shape, LOGITS, strides, GRAD, strides, TARGET, 0, 1e-7, gamma, needs, COEFS,
                            FACTOR, 0, 0, 0, where)  # fmt: skip
        else:
            program = module.Program(terms, 1e-7, gamma, needs)
            grad = (GRAD, strides)
            module.row_loss(program, code, shape, LOGITS, strides, *grad, TARGET, 0, -100, 0, MEAN, LOSS, 0, where)
        sizes, pointer, count = (ctypes.c_uint64 * 5)(), ctypes.c_void_p(), ctypes.c_uint64()
        if not library.anl_host_recorded(sizes, ctypes.byref(pointer), ctypes.byref(count)):
            raise RuntimeError(f"nothing was launched for {case}")
        *shape, place = sizes
        return Launch(*kernels_of_build()[place], *shape, ctypes.string_at(pointer, count.value))
    finally:
        library.anl_host_record(0)


def is_full(case: Case) -> bool:
    """Whether a call takes the full kernels (csrc/call.h)."""
    calls = host_build()[2]
    few = calls.FOCAL | calls.FOCAL_ABOVE | calls.SQUARES
    return case.dtype == "float64" or bool(calls.LOSSES[case.loss][2] & few)


# ---- constant memory -------------------------------------------------------------------------------------------------


def sections(binary: Path) -> dict[str, bytes]:
    """An ELF file's."""
    data = binary.read_bytes()
    (table,), (size, count, names) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    strings = headers[names][4]

    def text(offset):
        return data[strings + offset : data.index(b"\0", strings + offset)].decode()

    return {text(name): data[start : start + length] for name, kind, _, _, start, length in headers if kind != 8}


TABLE_LINE = re.compile(r'/\*([0-9a-f]+)\*/.*?BRXU? .*?BRANCH_TARGETS ([^"]*)"')
LABEL = re.compile(r"^(\.L\w*):")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/")


@cache
def jump_tables(binary: Path) -> dict[str, dict[int, list[int]]]:
    """For each kernel's symbol: address of a jump through a table -> addresses it can go to."""
    found, labels, waiting, symbol = {}, {}, [], None
    for line in run(tool("nvdisasm"), "-c", binary).splitlines():
        if line.startswith(".text.") and line.rstrip().endswith(":"):
            symbol = line.strip()[len(".text.") : -1]
            found[symbol] = {}
        elif match := LABEL.match(line):
            waiting.append(match[1])
        elif match := LINE.match(line):
            labels.update(dict.fromkeys(waiting, int(match[1], 16)))
            waiting = []
            if table := TABLE_LINE.search(line):
                found[symbol][int(table[1], 16)] = [name.strip() for name in table[2].split(",")]
    return {s: {at: [labels[name] for name in names] for at, names in tables.items()} for s, tables in found.items()}


PARAMETERS_AT = {8: 0x160, 9: 0x210, 10: 0x380, 12: 0x380}
SIZES_AT = {8: 0x0, 9: 0x0, 10: 0x360, 12: 0x360}  # blockDim; gridDim comes 12 or 16 bytes later


class Constants:
    """Constant memory: parameters, the sizes of the launch, and the kernel's tables."""

    def __init__(self, binary: Path, kernel: Kernel, launch: Launch, arch: int):
        major = arch // 10
        if major not in PARAMETERS_AT:
            raise ValueError(f"it is not known where sm_{arch} keeps parameters")
        at, sizes = PARAMETERS_AT[major], SIZES_AT[major]
        self.bytes = {at + i: byte for i, byte in enumerate(launch.parameters)}
        self._put(sizes, launch.block, 1, 1)
        self._put(sizes + (0xC if major < 10 else 0x10), launch.grid, 1, 1)
        if major == 9:
            self._put(0x140, 1)  # whether there are clusters
        self.tables = sections(binary).get(f".nv.constant2.{kernel.symbol}", b"")

    def _put(self, at, *words):
        for i, byte in enumerate(struct.pack(f"<{len(words)}I", *words)):
            self.bytes[at + i] = byte

    def __call__(self, bank: int, offset: int, size: int) -> int | None:
        if bank == 0:
            found = [self.bytes.get(offset + i) for i in range(size)]
            return None if None in found else int.from_bytes(bytes(found), "little")
        if bank == 2 and offset + size <= len(self.tables):
            return int.from_bytes(self.tables[offset : offset + size], "little")
        return None


FEW_ROWS = 4


# ---- a CTA -----------------------------------------------------------------------------------------------------------


class Arrived(dict):
    """How often every counter that CTAs share was raised: so many times before, if nothing else is known."""

    def __init__(self, before: int = 0):
        super().__init__()
        self.before = before
        self.began = {}  # address -> the two words that a counter began at

    def __missing__(self, address):
        return self.before


def walk_block(
    graph: Graph, kernel: Kernel, binary: Path, launch: Launch, arch: int, block: int, case: Case, before: int = 0
) -> list[Trace]:
    """What each warp of a CTA does; before: how many CTAs are done by then."""
    label = case.classes // 2 + 1 if case.classes > 2 else 1

    def load(address: int, size: int) -> int | None:
        if TARGET <= address < TARGET + case.rows * LABEL_BYTES:
            return label if (address - TARGET) % LABEL_BYTES == 0 else 0
        return None

    constant = Constants(binary, kernel, launch, arch)
    shared: dict[int, int] = {}
    arrived = Arrived(before)
    walks = []
    for warp in range((launch.block + 31) // 32):
        special = {
            "SR_TID.X": [warp * 32 + lane for lane in range(32)], "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.X": block,
            "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SR_LANEID": list(range(32)), "SR_CgaCtaId": block % launch.cluster,
            "SR_CgaSize": launch.cluster,
        }  # fmt: skip
        walks.append(Walk(graph, State(constant, load, special, shared, arrived)))
    return from_barrier_to_barrier(walks)


def from_barrier_to_barrier(walks: list[Walk]) -> list[Trace]:
    """The warps of a CTA in turn, each up to its next barrier: so that all see what one of them has written by then."""
    turns, back = [Semaphore(0) for _ in walks], Semaphore(0)
    traces, lost = [None] * len(walks), []

    def walk(warp):
        turns[warp].acquire()
        try:
            traces[warp] = walks[warp].run()
        except BaseException as error:
            lost.append(error)
        back.release()

    def wait(warp):
        back.release()
        turns[warp].acquire()

    for warp, each in enumerate(walks):
        each.at_barrier = partial(wait, warp)
        Thread(target=walk, args=(warp,), daemon=True).start()
    while None in traces:
        for warp, turn in enumerate(turns):
            if traces[warp] is None:
                turn.release()
                back.acquire()
            if lost:
                raise lost[0]
    return traces


def kernel_of(launch: Launch, found: list[Kernel]) -> Kernel:
    wanted = (launch.kernel, launch.template)
    matching = [k for k in found if (k.base_name, tuple(k.parameters)) == wanted]
    if len(matching) != 1:
        raise LookupError(f"{launch.kernel}<{', '.join(launch.template)}> is not among {[k.name for k in found]}")
    return matching[0]


@dataclass
class Work:
    """What the warps of a cluster issue for so many classes: of all CTAs together, and of each warp of the first."""

    all: Trace
    warps: list[Trace]
    elements: float


PHASES, PHASE, MERGE = range(3), 1, 2  # of rows_split.cu


def walk_split(kernel: Kernel, binary: Path, arch: int, case: Case) -> Work:
    """What two more rows take, phase by phase and merge by merge, of one CTA: all but the tickets."""
    launch = launch_of(case)
    graph = Graph(kernel.instructions, jump_tables(binary).get(kernel.symbol, {}))
    words = struct.unpack(f"<{len(launch.parameters) // 8}q", launch.parameters)

    def walk(rows, step, phase):
        fewer = [rows if word == case.rows else word for word in words[:-1]]
        parameters = struct.pack(f"<{len(fewer)}qii", *fewer, step, phase)
        alone = replace(launch, grid=1, parameters=parameters)
        return walk_block(graph, kernel, binary, alone, arch, 0, replace(case, rows=rows))

    warps = [Trace() for _ in range(launch.block // 32)]
    for step, phases in ((PHASE, PHASES), (MERGE, PHASES[:-1])):
        for phase in phases:
            for trace, more, less in zip(warps, walk(3, step, phase), walk(1, step, phase)):
                trace.add(more)
                trace.add(less, -1)
    total = Trace()
    for trace in warps:
        total.add(trace)
    return Work(total, warps, 2 * case.classes)


def walk_launch(kernel: Kernel, binary: Path, arch: int, case: Case, last=False, alone=False) -> Work:
    """What a launch's first cluster does; where clusters take more rows than a few, what two more rows take.

    alone: the first CTA alone, for few rows; last: besides, the others are done, and it adds up the loss."""
    launch = launch_of(case)
    if launch.kernel == "rows_split_kernel" and not alone:
        return walk_split(kernel, binary, arch, case)
    graph = Graph(kernel.instructions, jump_tables(binary).get(kernel.symbol, {}))
    clusters = launch.grid // launch.cluster

    def cluster(case, launch):
        warps = walk_block(graph, kernel, binary, launch, arch, 0, case, clusters - 1 if last else 0)
        total = Trace()
        for trace in warps:
            total.add(trace)
        if launch.cluster > 1 and not alone:  # the first has edges, the last a shorter part
            for block, times in ((1, launch.cluster - 2), (launch.cluster - 1, 1)):
                for trace in walk_block(graph, kernel, binary, launch, arch, block, case) if times else ():
                    total.add(trace, times)
        return Work(total, warps, case.elements / clusters)

    rows = case.rows / clusters
    # Pixels whole: fewer rows would be no whole images.
    if case.pixels > 1 or rows <= FEW_ROWS or rows * case.classes <= 1 << 16:
        return cluster(case, launch)
    for batch in (1 << i for i in range(int(rows).bit_length())):  # rows that CTAs take together
        few, more = (replace(case, rows=clusters * batch * n) for n in (1, 3))
        launches = [launch_of(few), launch_of(more)]
        if all(launch.same_shape(other) for other in launches):
            break
    else:
        raise Lost(f"{kernel.name}: no multiples of {clusters} rows have the plan of {case.rows}")
    less = cluster(few, launches[0])
    if alone:
        return less
    work = cluster(more, launches[1])
    work.all.add(less.all, -1)
    for trace, other in zip(work.warps, less.warps):
        trace.add(other, -1)
    work.elements -= less.elements
    return work
