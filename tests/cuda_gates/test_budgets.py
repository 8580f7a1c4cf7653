"""What a class costs in every kernel, against budgets.py: instructions on the plain path, for sm_90. Needs no GPU."""

import pytest
from budgets import BOUND_BY_INSTRUCTIONS, BUDGETS, ENOUGH_IN_FLIGHT, LEAST_KB, MOST_AWAITED, MOST_GPU_MEMBARS, SHARES
from counts import count
from disassembly import tool
from gates import gpu_membars_in_loops
from predict import H200, predict, tail_seconds
from scenario import Case, host_build

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not all(map(tool, ("nvcc", "ptxas", "cuobjdump", "nvdisasm"))),
        reason="nvcc, ptxas, cuobjdump or nvdisasm is missing (Triton's wheel has the last three)",
    ),
]
BY_NAME = {budget.name: budget for budget in BUDGETS}


@pytest.fixture(scope="module", params=BY_NAME)
def counted(request):
    """(budget, counts)."""
    host_build()
    budget = BY_NAME[request.param]
    return budget, count(budget.case, H200.arch)


def test_instructions(counted):
    budget, counts = counted
    assert counts.launch.kernel == budget.kernel
    wanted = f"(must {budget.must:g}, aim {budget.aim:g}): {counts.pipes()}"
    assert counts.total <= budget.most, f"{counts.total:.2f} instructions per class, at most {budget.most:g} {wanted}"
    assert counts.opcode("MUFU") <= budget.most_mufu


def test_bytes_in_flight(counted):
    _, counts = counted
    assert counts.case.elements >= 1 << 26
    kilobytes = predict(counts, H200).in_flight / 1024
    assert kilobytes >= LEAST_KB


@pytest.mark.parametrize("case", ENOUGH_IN_FLIGHT, ids=str)
def test_bytes_in_flight_elsewhere(case):
    host_build()
    assert case.elements >= 1 << 26
    assert predict(count(case, H200.arch), H200).in_flight / 1024 >= LEAST_KB


@pytest.mark.parametrize("case", BOUND_BY_INSTRUCTIONS, ids=str)
def test_few_bytes_in_flight_where_instructions_take_longer(case):
    host_build()
    prediction = predict(count(case, H200.arch), H200)
    assert prediction.bound == "issue"
    assert prediction.bounds["bytes in flight"] <= MOST_AWAITED * prediction.seconds


def test_the_tail_of_the_loss_sum(counted):
    budget, counts = counted
    if budget.case.gradient_alone or budget.kernel == "rows_split_kernel":  # no loss; tickets, which cannot be walked
        return
    microseconds = tail_seconds(counts, H200) * 1e6
    assert microseconds <= budget.most_tail


@pytest.mark.parametrize(("dtype", "least", "classes"), [(*key, k) for key, found in SHARES.items() for k in found])
def test_share_of_a_copy(dtype, least, classes):
    rows = 1 << ((1 << 28) // classes).bit_length()
    assert predict(count(Case(dtype, classes=classes, rows=rows), H200.arch), H200).share >= least


def test_fences_of_the_whole_gpu():
    """Two CTAs of a cluster tell one another what they found: the GPU's memory need not have seen it."""
    cluster = count(BY_NAME["cluster"].case, H200.arch)
    assert gpu_membars_in_loops(cluster.kernel) <= MOST_GPU_MEMBARS
