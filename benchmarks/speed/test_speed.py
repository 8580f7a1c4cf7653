"""The contenders of `python -m anl_kernels bench` under pytest-benchmark, on the same shapes.

    pytest benchmarks                                       # quick shapes; what is asserted is exact, never a time
    ANL_KERNELS_BENCH=full pytest benchmarks                # the full table of shapes
    pytest benchmarks --benchmark-compare --benchmark-autosave
"""

import os

import pytest

from anl_kernels.cli import contenders as entrants
from anl_kernels.cli import timing, workloads

FULL = os.environ.get("ANL_KERNELS_BENCH") == "full"
WORKLOADS = workloads.FULL if FULL else workloads.QUICK
CONTENDERS = {c.name: c for c in entrants.contenders("anl_ce")}
OURS = [name for name, contender in CONTENDERS.items() if contender.extra]


@pytest.fixture(scope="module", params=WORKLOADS, ids=str)
def workload(request):
    """(the workload, logits, target, the float64 truth of each formula): made once for all contenders."""
    chosen = request.param
    logits, target = chosen.tensors()
    formulas = {c.formula for c in CONTENDERS.values() if c.formula}
    return chosen, logits, target, {f: entrants.truth(f, logits, target) for f in formulas}


@pytest.mark.parametrize("name", CONTENDERS)
def test_speed(benchmark, workload, name):
    chosen, logits, target, truths = workload
    contender = CONTENDERS[name]
    run = contender.prepare(logits, target)
    right, errors = entrants.verdict(run, logits, truths.get(contender.formula))
    assert right, errors
    benchmark.group = str(chosen)
    calls = 1 if run.before or chosen.bytes >= timing.COLD_FROM else 20
    setup = run.before and (lambda: run.before())
    benchmark.pedantic(run.call, setup=setup, rounds=10 if FULL else 5, iterations=calls, warmup_rounds=1)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("loss", entrants.LOSSES)
def test_holds_what_it_promises(workload, name, loss):
    chosen, logits, target, _ = workload
    contender = next(c for c in entrants.contenders(loss, compile=False) if c.name == name)
    run = contender.prepare(logits, target)
    run.before and run.before()
    run.call()  # what is made once and kept is no part of a call
    assert timing.peak_bytes(run) <= entrants.promised_bytes(contender, chosen)


def test_nobody_vanished():
    assert list(CONTENDERS) == [
        "anl_kernels", "anl_kernels inplace", "logits.clone()", "out.copy_(logits)", "F.cross_entropy",
        "formulas, eager", "formulas, torch.compile",
    ]  # fmt: skip
