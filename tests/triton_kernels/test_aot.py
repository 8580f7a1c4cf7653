"""The machine code of every kernel, for GPUs that are not here: registers, spills, instructions, accesses to memory.

Each call of aot.GATED is compiled in the configuration that it really picks; those of aot.STOCK also by the Tritons
that stock PyTorch brings, for the GPU that matters most.
"""

import json
import os
from dataclasses import asdict

import aot
import pytest
import tritons
from filelock import FileLock
from offline import TARGETS

pytestmark = pytest.mark.thorough

# Registers a thread. 128 leave room for 16 warps of an SM, 80 for 24: loads of one cover the arithmetic of another.
REGISTERS = {
    "tile_kernel": 128, "loop_kernel": 112, "split_kernel": 112, "gradient_kernel": 128, "columns_kernel": 112,
    "add_kernel": 64, "scale_kernel": 64, "sum_kernel": 64, "row_weight_kernel": 64,
}  # fmt: skip
MORE_REGISTERS = {  # where the arithmetic, not the memory, is the limit; and AMD's split rows of pixels
    "loss anl_fl": 224, "stats": 152, "gradient anl_fl": 200, "gradient entropy": 168,
    "loss anl_ce bf16 8192x50257": 256, "columns fp32 8x19x512x512": 160, "loss anl_ce fp32 8x150x512x512": 152,
    "loss anl_ce bf16 8x19x512x512": 160,
}  # fmt: skip
# Kernels that move the logits; the others read numbers by row.
OF_LOGITS = ("tile_kernel", "loop_kernel", "split_kernel", "gradient_kernel", "columns_kernel", "scale_kernel")
# Instructions an element of one sweep over rows, in its longest form (masked classes, the target). At the H200's
# bandwidth a bf16 logit leaves time for about 30 of all sweeps together; the short forms are in the table of aot.py.
SWEEP = 36
SWEEP_BY_ELEMENT = 64  # where a thread loads them one by one, each with sums of its own
# sm_90: instructions of the whole kernel, those that store to shared memory, barriers. A tile that changes its layout
# takes dozens of them, and the split kernel had thousands.
WHOLE = {
    "tile_kernel": (1600, 4, 4), "loop_kernel": (2700, 24, 32), "split_kernel": (3500, 28, 48),
    "gradient_kernel": (1600, 4, 4), "columns_kernel": (850, 12, 4), "add_kernel": (250, 4, 4),
    "scale_kernel": (600, 4, 4), "sum_kernel": (350, 4, 4), "row_weight_kernel": (280, 4, 4),
}  # fmt: skip
WHOLE_BY_ELEMENT = (5000, 28, 48)
MACHINES = [(tritons.INSTALLED, target) for target in TARGETS]
MACHINES += [(release, "sm_90") for release in tritons.RELEASES if release != tritons.INSTALLED]


@pytest.fixture(scope="module")
def compiled_by(tmp_path_factory):
    """What a release makes of its calls, compiled once for all processes of a test run."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    folder = tmp_path_factory.mktemp("aot") if alone else tmp_path_factory.getbasetemp().parent

    def facts_of(release):
        file = folder / f"{release}.json"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_text(json.dumps([asdict(f) for f in compiled_anew(release)]))
        return [aot.Facts(**facts) for facts in json.loads(file.read_text())]

    return facts_of


def compiled_anew(release):
    if release == tritons.INSTALLED:
        return aot.in_a_process(TARGETS, *aot.GATED)
    return aot.in_a_process(["sm_90"], *aot.STOCK, triton=tritons.folder_of(release))


@pytest.fixture(scope="module", params=MACHINES, ids="-".join)
def facts(request, compiled_by):
    """The kernels on one target."""
    release, target = request.param
    return [f for f in compiled_by(release) if f.target == target]


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
        pytest.skip("on AMD such rows are read one element at a time")
    assert f.loads["128"] * 16 >= f.elements * 2 and f.stores["128"] * 16 >= f.elements * 2, described([f])


def test_instructions_of_a_sweep(facts):
    for f in facts:
        if f.kernel in ("loop_kernel", "split_kernel") and not f.scenario.endswith("x512x512"):
            most = SWEEP_BY_ELEMENT if f.scenario.endswith("50257") else SWEEP
            assert all(part["instructions"] / f.elements <= most for part in hot(f)), described([f])


def bloated(f):
    most = WHOLE_BY_ELEMENT if f.scenario.endswith("50257") and f.kernel == "split_kernel" else WHOLE[f.kernel]
    return any(n > limit for n, limit in zip((f.instructions, f.shared_stores, f.barriers), most))


@pytest.mark.parametrize("release", tritons.RELEASES)
def test_whole_kernels(release, compiled_by):
    found = [f for f in compiled_by(release) if f.target == "sm_90" and f.scenario in aot.STOCK]
    assert {f.kernel for f in found} == set(WHOLE)
    assert not described([f for f in found if bloated(f)])


def test_bad_kernels_are_caught():
    scatters, spills = aot.in_a_process(["sm_90"], "deliberately bad bf16")
    assert spilling([spills]) and spills.registers > cap(spills) and narrow(spills), described([spills])
    for name, most in zip(("instructions", "shared_stores", "barriers"), WHOLE["sum_kernel"]):
        assert getattr(scatters, name) > most, described([scatters])
