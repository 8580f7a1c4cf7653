"""The machine code of every kernel, for GPUs that are not here: registers, spills, how memory is accessed.

Each call of aot.GATED is compiled in the configuration that it really picks.
"""

import aot
import pytest
from offline import TARGETS

pytestmark = pytest.mark.slow

# Registers a thread. 128 leave room for 16 warps of an SM, 80 for 24: loads of one cover the arithmetic of another.
REGISTERS = {
    "tile_kernel": 128, "loop_kernel": 112, "split_kernel": 112, "gradient_kernel": 128, "columns_kernel": 112,
    "add_kernel": 64, "scale_kernel": 64, "sum_kernel": 64, "share_kernel": 64,
}  # fmt: skip
MORE_REGISTERS = {  # where the arithmetic, not the memory, is the limit; and AMD's split rows of pixels
    "loss anl_fl": 216, "stats": 152, "gradient anl_fl": 200, "gradient entropy": 168,
    "columns fp32 8x19x512x512": 160, "loss anl_ce fp32 8x150x512x512": 152,
    "loss anl_ce bf16 8x19x512x512": 160,
}  # fmt: skip
# Kernels that move the logits; the others read numbers by row.
OF_LOGITS = ("tile_kernel", "loop_kernel", "split_kernel", "gradient_kernel", "columns_kernel", "scale_kernel")
# Instructions an element of one sweep over rows, in its longest form (masked classes, the target). At the H200's
# bandwidth a bf16 logit leaves time for about 30 of all sweeps together; the short forms are in the table of aot.py.
SWEEP = 36


@pytest.fixture(scope="module")
def found():
    return aot.in_a_process(TARGETS, gated=True)


@pytest.fixture(scope="module", params=TARGETS)
def facts(request, found):
    """The kernels on one target."""
    return [f for f in found if f.target == request.param]


def described(facts):
    return aot.table(facts) if facts else ""


def test_every_kernel_is_there(facts):
    assert {f.kernel for f in facts} == set(REGISTERS)


def spilling(facts):
    return [f for f in facts if f.spills]


def test_nothing_is_spilled(facts):
    assert not described(spilling(facts))


def cap(f):
    more = (n for start, n in MORE_REGISTERS.items() if f.scenario.startswith(start))
    return next(more, REGISTERS[f.kernel]) if f.kernel in OF_LOGITS else REGISTERS[f.kernel]


def test_registers(facts):
    assert not described([f for f in facts if f.registers > cap(f)])


def tile_bytes(f):
    """A thread's share of a tile of logits."""
    size = {"bf16": 2, "fp32": 4, "fp64": 8}
    return f.elements * next(size[word] for word in f.scenario.split() if word in size)


def moved(accesses, least=0):
    """Bytes that a thread moves with instructions of at least so many bits."""
    return sum(int(bits) // 8 * n for bits, n in accesses.items() if int(bits) >= least)


def hot(f):
    """The parts of a kernel that move tiles of logits: loops that read one, or all of it.

    A loop that stores something, but no tile, merges partial sums.
    """
    loops = [part for part in f.loops if moved(part["loads"]) >= 0.9 * tile_bytes(f)]
    loops = [part for part in loops if not 0 < moved(part["stores"]) < 0.9 * tile_bytes(f)]
    return loops or [{"loads": f.loads, "stores": f.stores, "instructions": f.instructions}]


def narrow(f):
    """Whether tiles move by less than 16 bytes at a time: loads in every hot part, stores in those that store tiles.

    A quarter is left for the loads that a compiler moves out of a loop.
    """
    parts = [part["loads"] for part in hot(f)]
    parts += [part["stores"] for part in hot(f) if moved(part["stores"]) >= 0.9 * tile_bytes(f)]
    return any(moved(accesses, 128) < 0.75 * tile_bytes(f) for accesses in parts)


def test_rows_move_by_16_bytes(facts):
    rows = [f for f in facts if f.kernel in OF_LOGITS and not f.scenario.endswith(("x512x512", "128x10", "50257"))]
    rows = [f for f in rows if not f.scenario.startswith("stats")]
    assert {f.kernel for f in rows} == set(OF_LOGITS)
    assert not described([f for f in rows if narrow(f)])


def test_rows_of_any_alignment_move_by_16_bytes_but_for_their_ends(facts):
    (f,) = [f for f in facts if f.scenario.startswith("gradient") and f.scenario.endswith("50257")]
    if f.target.startswith("gfx"):
        pytest.skip("on AMD such rows are read an element at a time")
    assert f.loads["128"] * 16 >= f.elements * 2 and f.stores["128"] * 16 >= f.elements * 2, described([f])


def test_instructions_of_a_sweep(facts):
    for f in facts:
        if f.kernel in ("loop_kernel", "split_kernel") and not f.scenario.endswith("x512x512"):
            assert all(part["instructions"] / f.elements <= SWEEP for part in hot(f)), described([f])


def test_a_kernel_that_spills_is_caught():
    (f,) = aot.in_a_process(["sm_90"], only="deliberately bad", gated=False)
    assert spilling([f]) and f.registers > cap(f) and narrow(f), described([f])
