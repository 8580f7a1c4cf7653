"""A time for what counts.py counts: the largest of several bounds on a GPU. Nothing here is measured.

Numbers of the GPUs are NVIDIA's: data sheets (multiprocessors, boost clock, memory bandwidth) and the programming
guide's tables of compute capabilities (limits of a multiprocessor, results per clock). What a copy reaches of the
bandwidth, the issue rate that long loops reach, and latencies are judgement, the same for every GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from counts import Counts, element_loops
from scenario import walk_launch
from walk import Trace

COPY = 0.9  # of the data sheet's bandwidth
SUSTAINED = 0.65  # of four instructions a clock
CLOCKS_IN_LOOPS, CLOCKS_ELSEWHERE = 2, 4  # from one instruction of a warp to its next: independent ones, dependent ones
GLOBAL_CLOCKS, L2_CLOCKS = 800, 500  # until what was asked for is there
BARRIER_CLOCKS, CLUSTER_CLOCKS = 40, 500
SLICE = 128  # bytes that shared memory and L1 move in a clock

REGISTERS = 65536
TWO_FLOATS = ("FADD2", "FMUL2", "FFMA2")  # one issue, and twice the pipe
LANES_80 = {"fma": 64, "alu": 64, "xu": 16, "convert64": 16, "lsu": 32, "fp64": 32, "tensor": 32, "uniform": 64}
LANES_89 = {**LANES_80, "fma": 128, "convert64": 2, "fp64": 2, "tensor": 8}
LANES_90 = {**LANES_80, "fma": 128, "fp64": 64}  # of HMMA.1688: as many as an A100, though mma.sync is faster


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: int
    device: int  # of tests/cuda_on_host/host_devices.cpp
    sms: int
    ghz: float
    terabytes: float  # a second
    shared: int  # bytes of a multiprocessor
    lanes: dict = field(compare=False)
    threads: int = 2048
    ctas: int = 32

    def clocks(self, seconds: float) -> float:
        return seconds * self.ghz * 1e9


GPUS = (
    Gpu("A100 80 GB", 80, 4, 108, 1.41, 2.039, 164 << 10, LANES_80),
    Gpu("RTX 4090", 89, 8, 128, 2.52, 1.008, 100 << 10, LANES_89, 1536, 24),
    Gpu("H100 SXM", 90, 3, 132, 1.98, 3.35, 228 << 10, LANES_90),
    Gpu("H200", 90, 5, 132, 1.98, 4.8, 228 << 10, LANES_90),
    Gpu("B200", 100, 7, 148, 1.96, 8.0, 228 << 10, LANES_90),
)
H200 = GPUS[3]


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def resident_ctas(gpu: Gpu, threads: int, registers: int, shared_bytes: int) -> int:
    """CTAs that a multiprocessor holds; registers come in eights, for whole warps; 1 KB of shared memory is CUDA's."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (round_up(registers * 32, 256) * warps)
    return min(gpu.threads // (32 * warps), by_registers, gpu.shared // (shared_bytes + 1024), gpu.ctas)


@dataclass
class Prediction:
    bounds: dict[str, float]  # seconds
    copy: float  # seconds that a copy of the logits takes
    resident: int  # CTAs on a multiprocessor
    warps: int
    in_flight: int  # bytes that a multiprocessor's warps have asked for at a time

    @property
    def seconds(self) -> float:
        return max(self.bounds.values())

    @property
    def bound(self) -> str:
        return max(self.bounds, key=self.bounds.get)

    @property
    def share(self) -> float:
        return self.copy / self.seconds


def waited_clocks(trace: Trace, latency: int) -> float:
    """What a warp waits for memory, less what it issues meanwhile."""
    return sum(times * max(0, latency - CLOCKS_IN_LOOPS * since) for since, times in trace.waits.items())


def serial_clocks(counts: Counts) -> float:
    """The slowest warp of a CTA alone: its instructions, and what it waits for."""
    code = counts.kernel.instructions
    inside = element_loops(counts)

    def clocks(trace):
        total = waited_clocks(trace, GLOBAL_CLOCKS)
        for i, n in trace.issued.items():
            total += n * (CLOCKS_IN_LOOPS if i in inside else CLOCKS_ELSEWHERE)
            total += n * {"BAR": BARRIER_CLOCKS, "UCGABAR_WAIT": CLUSTER_CLOCKS}.get(code[i].base, 0)
        return total

    return max(clocks(trace) for trace in counts.work.warps)


def lsu_clocks(counts: Counts) -> float:
    """Per class: one for every instruction, more where it moves more bytes than a slice."""
    code, found = counts.kernel.instructions, 0.0
    for i, n in counts.trace.issued.items():
        if counts.pipe_of(i) == "lsu":
            bytes_moved = counts.trace.moved.get(i, 0) if code[i].base in ("LDS", "LDG", "STS", "STG") else 0
            found += max(n, bytes_moved / SLICE)
    return found / counts.elements


def in_flight(counts: Counts, resident: int) -> int:
    """Bytes of global memory that a multiprocessor has asked for at a time: a ring's, or what its warps' loads name."""
    if any(counts.kernel.instructions[i].base == "UBLKCP" for i in counts.trace.issued):
        return resident * counts.launch.shared_bytes
    return resident * sum(trace.in_flight for trace in counts.work.warps)


def predict(counts: Counts, gpu: Gpu) -> Prediction:
    case, launch = counts.case, counts.launch
    resident = resident_ctas(gpu, launch.block, counts.kernel.registers, launch.shared_bytes + counts.kernel.shared)
    if resident == 0:
        raise ValueError(f"{counts.kernel.name}: no CTA fits {gpu.name}")
    elements, asked = case.elements, in_flight(counts, resident)
    clock = 1 / (gpu.ghz * 1e9)
    copy = elements * 2 * case.size / (COPY * gpu.terabytes * 1e12)
    bounds = {"memory": copy}
    if asked:
        bounds["bytes in flight"] = elements * case.size * GLOBAL_CLOCKS * clock / (gpu.sms * asked)
    per_class = elements * clock / gpu.sms
    bounds["issue"] = counts.total / (128 * SUSTAINED) * per_class
    for pipe, lanes in counts.pipes().items():
        if pipe == "lsu":
            bounds[pipe] = lsu_clocks(counts) * per_class
        elif pipe in gpu.lanes:
            twice = sum(map(counts.opcode, TWO_FLOATS)) if pipe == "fma" else 0.0
            bounds[pipe] = (lanes + twice) / gpu.lanes[pipe] * per_class
    at_a_time = min(gpu.sms * resident, launch.grid) / launch.cluster
    bounds["latency of a row"] = serial_clocks(counts) * clock * elements / counts.elements / at_a_time
    warps = resident * -(-launch.block // 32)
    return Prediction(bounds, copy, resident, warps, asked)


def tail_seconds(counts: Counts, gpu: Gpu) -> float:
    """How much longer the last CTA is at work than any other: it adds up the parts of the loss."""

    def slowest(last: bool) -> float:
        work = walk_launch(counts.kernel, counts.binary, counts.arch, counts.case, last=last, alone=True)
        return max(CLOCKS_ELSEWHERE * sum(t.issued.values()) + waited_clocks(t, L2_CLOCKS) for t in work.warps)

    return (slowest(True) - slowest(False)) / (gpu.ghz * 1e9)
