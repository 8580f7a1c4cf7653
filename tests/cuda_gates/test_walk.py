"""Walks through kernels whose warps issue what is known beforehand, and predictions from numbers that are. No GPU."""

import struct
from collections import Counter

import pytest
from binaries import ROOT, cubin
from counts import Counts
from disassembly import kernels, tool
from opcodes import lookup_bits, permute, shift
from predict import COPY, GLOBAL_CLOCKS, GPUS, H200, SUSTAINED, predict, resident_ctas
from scenario import Case, Launch, Work, jump_tables, walk_block
from walk import Graph, Lost, Trace

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not all(map(tool, ("nvcc", "ptxas", "cuobjdump", "nvdisasm"))),
        reason="nvcc, ptxas, cuobjdump or nvdisasm is missing (Triton's wheel has the last three)",
    ),
]
TOYS = ROOT / "tests" / "cuda_gates" / "walk_toys.cu"
IN, OUT = 1 << 40, 2 << 40


@pytest.fixture(scope="module", params=[80, 90], ids=lambda arch: f"sm_{arch}")
def walk(request):
    """f(kernel, threads, format and values of parameters after in and out) -> a Warp for each warp of the CTA."""
    binary = cubin(TOYS, request.param)
    found = {kernel.base_name: kernel for kernel in kernels(binary)}

    def run(name, threads, layout="", *values):
        kernel = found[name]
        parameters = struct.pack("<QQ" + layout, IN, OUT, *values)
        launch = Launch(name, (), 1, threads, 1, 0, parameters)
        graph = Graph(kernel.instructions, jump_tables(binary)[kernel.symbol])
        traces = walk_block(graph, kernel, binary, launch, request.param, 0, Case())
        return [Warp(kernel, trace) for trace in traces]

    return run


class Warp:
    def __init__(self, kernel, trace):
        self.kernel, self.trace = kernel, trace

    def __getitem__(self, opcode):
        code = self.kernel.instructions
        return sum(n for i, n in self.trace.issued.items() if (code[i].opcode + ".").startswith(opcode + "."))

    @property
    def total(self):
        return sum(self.trace.issued.values())


def test_a_sweep_runs_as_often_as_its_parameters_say_and_the_rare_branch_never(walk):
    one, two, more = (walk("sweep_kernel", 32, "ii", n, rows)[0] for n, rows in ((7, 1), (7, 3), (9, 3)))
    assert (one["MUFU.EX2"], two["MUFU.EX2"], more["MUFU.EX2"]) == (28, 84, 108)
    assert (one["LDG"], two["LDG"], more["LDG"]) == (7, 21, 27)
    assert more["MUFU.SIN"] == 0
    assert (one["STG"], two["STG"]) == (1, 3)
    assert one["MUFU.RSQ"] == 1 and more["MUFU.RSQ"] == 3  # the row's tail


def test_a_turn_of_a_loop_takes_what_the_loop_has_without_the_rare_branch(walk):
    few, more = (walk("sweep_kernel", 32, "ii", n, 1)[0] for n in (5, 6))
    loop = min((loop for loop in few.kernel.loops if loop.count("MUFU.EX2")), key=lambda loop: len(loop.instructions))
    rare = loop.count("MUFU.SIN")
    assert rare
    assert len(loop.instructions) - 6 * rare < more.total - few.total < len(loop.instructions)


def test_what_warps_wait_for(walk):
    warp = walk("sweep_kernel", 32, "ii", 7, 1)[0]
    assert (warp.trace.waits.total(), warp.trace.in_flight) == (7, 512)


def test_what_warps_wait_for_while_more_is_on_its_way(walk):
    few, many = (walk("copies_kernel", 32, "i", n)[0].trace for n in (10, 20))
    assert few.waits.total() == many.waits.total() == 2
    assert few.in_flight == many.in_flight == 1024
    turn = (sum(many.issued.values()) - sum(few.issued.values())) // 10
    assert max(many.waits) == max(few.waits) + 10 * turn >= 20


def test_numbers_are_neither_infinite_nor_nan(walk):
    warp = walk("finite_kernel", 32)[0]
    assert (warp["MUFU.EX2"], warp["MUFU.SIN"]) == (1, 2)


def test_lanes_that_part_make_their_warp_do_both(walk):
    warps = walk("lanes_kernel", 96, "i", 40)
    assert [warp["MUFU.EX2"] for warp in warps] == [5, 5, 0]
    assert [warp["MUFU.SIN"] for warp in warps] == [7, 15, 23]
    assert [warp["STG"] for warp in warps] == [1, 1, 1]


@pytest.mark.parametrize("kinds, exps, sines", [((0, 0, 1), 2, 2), ((2, 4, 5), 1, 1), ((1, 2, 3), 1, 3), ((), 0, 0)])
def test_a_table_leads_to_the_case_that_the_parameters_name(walk, kinds, exps, sines):
    padded = [*kinds, *[0] * (8 - len(kinds))]
    warp = walk("kinds_kernel", 32, "i8i", len(kinds), *padded)[0]
    assert (warp["MUFU.EX2"], warp["MUFU.SIN"]) == (exps, sines)


def test_what_is_read_again_under_a_condition_is_read(walk):
    warps = walk("again_kernel", 64, "i", 11)
    assert [warp["MUFU.EX2"] for warp in warps] == [11, 11]


def test_what_is_done_one_by_one_in_a_rare_case_is_not(walk):
    warp = walk("at_once_kernel", 32, "i", 16)[0]
    assert (warp["MUFU.EX2"], warp["MUFU.SIN"]) == (16, 0)


def test_what_tensor_cores_do_is_not_done_number_by_number(walk):
    warp = walk("packed_kernel", 32, "i", 7)[0]
    assert (warp["HMMA"], warp["MUFU.EX2"], warp["MUFU.SIN"]) == (7, 28, 0)


def test_warps_see_what_was_written_before_their_barrier(walk):
    warps = walk("told_kernel", 96, "i", 5)
    assert [warp["MUFU.EX2"] for warp in warps] == [18, 18, 18]


@pytest.mark.parametrize("a, b, c, d", [(100, 7, 1 << 40, 29), (5, 9, 17, 17), (-20, -3, 1000003, 1009)])
def test_divisions_come_out(walk, a, b, c, d):
    warp = walk("division_kernel", 32, "iiqq", a, b, c, d)[0]
    assert (warp["MUFU.EX2"], warp["MUFU.SIN"]) == (int(a / b), c % d)


def test_a_loop_that_nobody_can_count_is_said_to_be_one(walk):
    with pytest.raises(Lost, match="not known"):
        walk("endless_kernel", 32)


def test_words():
    assert permute(0x33221100, 0x5410, 0x77665544) == 0x55441100
    assert permute(0x80, 0x8888, 0) == 0xFFFFFFFF
    assert shift(["R", "S32", "HI"], 0, 4, 0x80000000) == 0xF8000000
    assert shift(["L", "U64", "HI"], 0x80000000, 1, 1) == 3
    assert shift(["R", "U64"], 1, 1, 1) == 0x80000000
    assert lookup_bits(0xC0, (0b1100, 0b0011), (0b1010, 0), (0, 0)) == (0b1000, 0b0010)  # a & b


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_ctas_that_a_multiprocessor_holds():
    a100, rtx = GPUS[0], GPUS[1]
    assert resident_ctas(H200, 512, 128, 0) == 1  # 64K registers
    assert resident_ctas(H200, 256, 60, 0) == 4  # 60 registers are 64
    assert resident_ctas(H200, 256, 64, 100 << 10) == 2
    assert resident_ctas(H200, 32, 16, 0) == 32
    assert resident_ctas(a100, 1024, 32, 0) == 2 and resident_ctas(rtx, 1024, 32, 0) == 1
    assert resident_ctas(rtx, 128, 32, 99 << 10) == 1 and resident_ctas(rtx, 128, 32, 100 << 10) == 0


def counts_of(walk, per_turn, waits=None, in_flight=1 << 20):
    """sweep_kernel's, as if its loop had been walked so often that every class takes so many instructions."""
    warp = walk("sweep_kernel", 32, "ii", 1, 1)[0]
    exps = [i for i, instruction in enumerate(warp.kernel.instructions) if instruction.opcode == "MUFU.EX2"]
    trace = Trace(Counter({i: per_turn // len(exps) for i in exps}), Counter(), {}, Counter(waits), in_flight)
    case = Case("float32", classes=1 << 10, rows=1 << 20)
    launch = Launch("sweep_kernel", (), 1 << 20, 32, 1, 0, b"")
    return Counts(case, 90, warp.kernel, launch, None, Work(trace, [trace], 1 << 10))


def test_what_takes_few_instructions_is_bound_by_memory(walk):
    p = predict(counts_of(walk, 8), H200)
    assert p.bound == "memory" and p.share == 1.0
    assert p.seconds == pytest.approx(2 * 4 * (1 << 30) / (COPY * 4.8e12))


def test_exps_are_bound_by_their_pipe(walk):
    p = predict(counts_of(walk, 320), H200)  # 10 a class, 16 a clock
    assert p.bound == "xu" and p.seconds == pytest.approx(10 / 16 * (1 << 30) / 132 / 1.98e9)
    assert p.bounds["issue"] == pytest.approx(10 / 128 / SUSTAINED * (1 << 30) / 132 / 1.98e9)


def test_warps_that_wait_are_bound_by_latency(walk):
    p = predict(counts_of(walk, 8, waits={0: 100}), H200)
    rows_at_a_time = 132 * p.resident
    assert p.bound == "latency of a row"
    assert p.seconds == pytest.approx((100 * GLOBAL_CLOCKS + 8 * 2) * (1 << 20) / rows_at_a_time / 1.98e9)


def test_lanes_of_which_nobody_knows_whether_they_end_go_on(walk):
    warp = walk("ends_kernel", 32)[0]
    assert (warp["STG"], warp["MUFU.EX2"]) == (2, 1)


def test_few_bytes_in_flight_are_a_bound(walk):
    p = predict(counts_of(walk, 8, in_flight=64), H200)
    assert p.bound == "bytes in flight"
    assert p.in_flight == 64 * p.resident
