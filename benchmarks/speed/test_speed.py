"""The contenders of `python -m anl_kernels bench` under pytest-benchmark, on the same shapes.

pytest benchmarks                                       # quick shapes; what is asserted is exact, never a time
ANL_KERNELS_BENCH=full pytest benchmarks                # the full table of shapes
pytest benchmarks --benchmark-compare --benchmark-autosave
"""

import os

import pytest
import torch

from anl_kernels.cli import bench, timing
from anl_kernels.cli import contenders as entrants

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = os.environ.get("ANL_KERNELS_BENCH") == "full"
WORKLOADS = bench.default_workloads(not FULL, DEVICE)
CONTENDERS = {c.name: c for c in entrants.contenders("anl_ce", device=DEVICE)}
OURS = [name for name, contender in CONTENDERS.items() if contender.extra]


@pytest.fixture(scope="module", params=WORKLOADS, ids=str)
def workload(request):
    """(the workload, logits, target, the float64 truth of each formula): made once for all contenders."""
    chosen = request.param
    logits, target = chosen.tensors(device=DEVICE)
    formulas = {c.formula for c in CONTENDERS.values() if c.formula}
    return chosen, logits, target, {f: entrants.truth(f, logits, target) for f in formulas}


@pytest.mark.parametrize("phase", entrants.PHASES if FULL else entrants.PHASES[:1])
@pytest.mark.parametrize("name", CONTENDERS)
def test_speed(benchmark, workload, name, phase):
    chosen, logits, target, truths = workload
    contender = CONTENDERS[name]
    right, errors = entrants.verdict(contender, logits, target, truths.get(contender.formula))
    assert right, errors
    run, clock = contender.prepare(logits, target, phase), timing.Clock(DEVICE)
    benchmark.group = f"{chosen} {phase}"
    calls = 1 if run.before or chosen.bytes >= timing.COLD_FROM else 20

    def call():
        run.call()
        if clock.events:
            torch.cuda.synchronize()

    setup = run.before and (lambda: run.before())
    benchmark.pedantic(call, setup=setup, rounds=10 if FULL else 5, iterations=calls, warmup_rounds=1)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("loss", entrants.LOSSES)
def test_holds_what_it_promises(workload, name, loss):
    chosen, logits, target, _ = workload
    contender = next(c for c in entrants.contenders(loss, compile=False, device=DEVICE) if c.name == name)
    run = contender.prepare(logits, target, "both")
    run.before and run.before()
    run.call()  # what is made once and kept is no part of a call
    found = timing.profile(run, DEVICE)
    assert found.peak_bytes <= entrants.promised_bytes(contender, chosen)
    assert found.allocations <= entrants.promised_allocations(contender, DEVICE)
    assert (found.launches or 0) <= bench.LAUNCHES


def test_nobody_vanished():
    peers = {peer.name for peer in entrants.PEERS} | {"anl_kernels cuda", "anl_kernels triton"}
    assert [name for name in CONTENDERS if name not in peers] == [
        "anl_kernels", "anl_kernels inplace", "logits.clone()", "out.copy_(logits)", "F.cross_entropy",
        "formulas, eager", "formulas, torch.compile",
    ]  # fmt: skip
