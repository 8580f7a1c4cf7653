"""What is demanded of the kernels' machine code, and what a kernel lacks of it."""

from __future__ import annotations

from dataclasses import dataclass

from disassembly import Kernel, Loop

ELEMENTS = {"float": 4, "half_t": 8, "bfloat16_t": 8, "double": 2}  # of 16 bytes

# Registers a thread may have: 65536 a multiprocessor, over the threads that are to be on it together.
REGISTERS = {
    "rows_small_kernel": 128,
    "rows_block_kernel": 168,  # two CTAs of 192 threads; most take 256 of 128
    "rows_cluster_kernel": 168,  # at most 384 threads a multiprocessor: its rows take the shared memory
    "rows_split_kernel": 168,  # two CTAs of 192 threads
    "rows_gradient_kernel": 128,
    "rows_gradient_entropy_kernel": 128,
    "spatial_kernel": 128,
    "spatial_gradient_kernel": 128,
    "column_sums_kernel": 128,
    "pixel_sums_kernel": 128,
}
MOST_INSTRUCTIONS = 355_000  # of all kernels for one architecture, which two cores compile in about a minute
DOUBLE_REGISTERS = 216  # of the kernels above for float64, whose values take two each: 256 threads a multiprocessor
FEW_REGISTERS = 64  # of everything else: what prepares, scales and adds up


@dataclass(frozen=True)
class Hot:
    """The loops over a row's classes: `packs` of 16 bytes a turn, read by `load`; a sweep, and one that writes."""

    load: str  # LDG, LDS
    packs: int
    writes: bool = True
    narrow: bool = False  # whether the loop may reach for single numbers as well
    from_arch: int = 80


HOT = {
    "rows_block_kernel": Hot("LDS", 1, narrow=True),  # packs that a row shares with its neighbour
    "rows_cluster_kernel": Hot("LDS", 4, from_arch=90),
    "rows_split_kernel": Hot("LDS", 4),
    "column_sums_kernel": Hot("LDG", 4, writes=False, narrow=True),  # each row's max and sum
}
# Other kernels that read and write 128 bits at a time, and by what they read.
WIDE = {"rows_small_kernel": "LDGSTS", "rows_gradient_kernel": "LDG", "rows_gradient_entropy_kernel": "LDG"}
TURN = 16  # doubles that each thread of the last CTA reads at a time, when it adds up the loss
REBASE = 1  # exps of a tile whose largest class is larger than all before


def resource_problems(kernel: Kernel) -> list[str]:
    """Stack, local memory, spills, too many registers."""
    most = REGISTERS.get(kernel.base_name, FEW_REGISTERS)
    if kernel.base_name in REGISTERS and kernel.parameters[:1] == ["double"]:
        most = DOUBLE_REGISTERS
    found = []
    if kernel.stack or kernel.local or kernel.spills:
        found.append(
            f"{kernel.name}: {kernel.stack} bytes of stack, {kernel.local} of local memory, {kernel.spills} accesses"
        )
    if kernel.registers > most:
        found.append(f"{kernel.name}: {kernel.registers} registers, at most {most}")
    return found


def hot_loops(kernel: Kernel, hot: Hot) -> list[Loop]:
    """The loops that read whole tiles and take exps, without the loops within them, which take classes one by one."""
    loops = kernel.loops
    found = []
    for loop in loops:
        within = frozenset().union(*(other.addresses for other in loops if other.addresses < loop.addresses))
        inner, own = (
            Loop([i for i in loop.instructions if (i.address in within) == inside]) for inside in (True, False)
        )
        of_a_row = own.count("BAR") or inner.count(hot.load, wide=True)
        if own.count(hot.load, wide=True) >= hot.packs and own.count("MUFU.EX2") > 0 and not of_a_row:
            found.append(own)
    return found


def loop_problems(kernel: Kernel, hot: Hot) -> list[str]:
    """128-bit reads and writes, and one MUFU.EX2 per element, in a sweep and in the loop that writes the gradient."""
    elements = ELEMENTS[kernel.parameters[0]]
    found, sweeps, writers = [], 0, 0
    for loop in hot_loops(kernel, hot):
        packs, stores, exps = loop.count(hot.load, wide=True), loop.count("STG", wide=True), loop.count("MUFU.EX2")
        where = (
            f"{kernel.name}, loop at {min(loop.addresses):#x}: {packs} wide {hot.load}, {stores} wide STG, {exps} EX2"
        )
        if not packs * elements <= exps <= packs * elements + REBASE:
            found.append(f"{where}: {packs * elements} elements")
        narrow = loop.count("STG", wide=False) + (hot.load == "LDG") * loop.count("LDG", wide=False)
        if narrow and not hot.narrow:
            found.append(f"{where}: and narrow accesses")
        if stores == 0:
            sweeps += 1
        elif stores == packs:
            writers += 1
        else:
            found.append(f"{where}: not every pack is written whole")
    if sweeps == 0:
        found.append(f"{kernel.name}: no sweep of {hot.packs} wide {hot.load} with exps")
    if writers == 0 and hot.writes:
        found.append(f"{kernel.name}: no loop of {hot.packs} wide {hot.load} and as many wide STG")
    return found


def width_problems(kernel: Kernel) -> list[str]:
    everything = Loop(kernel.instructions)
    missing = [name for name in (WIDE[kernel.base_name], "STG") if not everything.count(name, wide=True)]
    return [f"{kernel.name}: no 128-bit {' and '.join(missing)}"] if missing else []


def is_single_exp(kernel: Kernel) -> bool:
    """Focal weights take exps of their own; float64 has no MUFU for them."""
    return "true" not in kernel.parameters[1:] and kernel.parameters[:1] != ["double"]


def code_problems(kernel: Kernel, arch: int) -> list[str]:
    hot = HOT.get(kernel.base_name)
    if hot and arch >= hot.from_arch and is_single_exp(kernel):
        return loop_problems(kernel, hot)
    halved = arch >= 100 and kernel.parameters[:1] == ["double"]  # ptxas reads the two numbers of 16 bytes one by one
    return width_problems(kernel) if kernel.base_name in WIDE and not halved else []


def adds_up_the_loss(kernel: Kernel) -> bool:
    tickets = any(i.base == "ATOMG" and "ADD" in i.opcode and "64" in i.opcode for i in kernel.instructions)
    return tickets or kernel.base_name == "finish_kernel"


def tail_problems(kernel: Kernel) -> list[str]:
    """The loss's parts are added up while the GPU idles: no number before all of a turn are on their way."""
    for loop in kernel.innermost_loops:
        code = sorted(loop.instructions, key=lambda i: i.address)
        loads = [i.address for i in code if i.base == "LDG" and "64" in i.opcode.split(".")]
        sums = [i.address for i in code if i.base == "DADD"]
        if len(loads) == TURN and len(sums) >= TURN:
            return [] if loads[-1] < sums[0] else [f"{kernel.name}: the loss's parts are added before all are read"]
    return [f"{kernel.name}: no turn of {TURN} parts of the loss"]


def gpu_membars_in_loops(kernel: Kernel) -> int:
    """Fences that wait until all the memory of the GPU has seen what a thread wrote."""
    inside = {i.address: i for loop in kernel.loops for i in loop.instructions}
    return sum(i.base == "MEMBAR" and "GPU" in i.opcode.split(".") for i in inside.values())
