"""The CUDA kernels' machine code: no spills, few registers, 128-bit accesses and one exp per element. Needs no GPU."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from binaries import ARCHS, ROOT, cubin, cubins
from disassembly import kernels, tool
from gates import (
    HOT,
    MOST_INSTRUCTIONS,
    Hot,
    adds_up_the_loss,
    code_problems,
    loop_problems,
    resource_problems,
    tail_problems,
)

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not all(map(tool, ("nvcc", "ptxas", "cuobjdump", "nvdisasm"))),
        reason="nvcc, ptxas, cuobjdump or nvdisasm is missing (Triton's wheel has the last three)",
    ),
]
TOYS = ROOT / "tests" / "cuda_gates" / "toys.cu"


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def compiled(request):
    """(architecture, every kernel of csrc/cuda)."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return request.param, [kernel for part in pool.map(kernels, cubins(request.param).values()) for kernel in part]


def test_no_spills_and_few_registers(compiled):
    problems = [problem for kernel in compiled[1] for problem in resource_problems(kernel)]
    assert not problems, "\n".join(problems)


def test_little_to_compile(compiled):
    longest = sorted(((len(kernel.instructions), kernel.name) for kernel in compiled[1]), reverse=True)
    assert sum(count for count, _ in longest) <= MOST_INSTRUCTIONS, longest[:20]


def test_hot_loops(compiled):
    arch, found = compiled
    problems = [problem for kernel in found for problem in code_problems(kernel, arch)]
    assert not problems, "\n".join(problems)
    assert {kernel.base_name for kernel in found} >= set(HOT)


def test_the_sum_of_losses(compiled):
    adding = [kernel for kernel in compiled[1] if adds_up_the_loss(kernel)]
    problems = [problem for kernel in adding for problem in tail_problems(kernel)]
    assert not problems, "\n".join(problems)
    assert {kernel.base_name for kernel in adding} >= {"rows_small_kernel", "rows_split_kernel", "finish_kernel"}


def toy(name, *flags):
    return next(kernel for kernel in kernels(cubin(TOYS, 90, *flags)) if kernel.base_name == name)


def test_a_spill_is_found():
    assert not resource_problems(toy("many_values_kernel"))
    assert "accesses" in resource_problems(toy("many_values_kernel", "-maxrregcount=24"))[0]


def test_an_array_in_local_memory_is_found():
    assert resource_problems(toy("indexed_kernel"))


def test_too_many_registers_are_found():
    assert "registers, at most" in resource_problems(toy("greedy_kernel"))[0]


GOOD = Hot("LDG", 1)


def test_a_good_loop_passes():
    assert loop_problems(toy("good_kernel"), GOOD) == []


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("narrow_kernel", "no sweep"),
        ("narrow_store_kernel", "narrow accesses"),
        ("two_exps_kernel", "4 elements"),
        ("no_sweep_kernel", "no sweep"),
        ("no_writer_kernel", "no loop of 1 wide LDG and as many wide STG"),
    ],
)
def test_a_bad_loop_is_found(name, complaint):
    assert any(complaint in problem for problem in loop_problems(toy(name), GOOD))
