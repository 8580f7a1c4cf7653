"""Rows split over programs: what the phases tell one another, and the same in one launch as in a launch for each.

Interpreted programs run one after another, so what is not there when a program waits will never be.
"""

import pytest
import torch
from backends_under_test import Backend
from tiers import thorough

import anl_kernels as ak
from anl_kernels import trust
from anl_kernels.backends import triton as backend
from anl_kernels.functional import checked_call
from anl_kernels.triton_kernels import launch, passes
from anl_kernels.triton_kernels import split as kernels
from anl_kernels.triton_kernels.row_math import NUM_COEFS

WAYS = {"one launch": Backend("triton", "split"), "launches": Backend("triton", "launches")}
LOSSES = {
    "ce": 1.0 * ak.CE(),  # needs no second sweep, ever
    "anl_ce": 5 * ak.NCE() + 5 * ak.NNCE(),
    "anl_fl": ak.NFL() + ak.NNFL(),
    "nce_rce": ak.NCE() + ak.RCE(),
}


@pytest.fixture
def launched(monkeypatch):
    """(kernel's name, PHASE, counters) of every launch of split_kernel or loop_kernel."""
    found, launch_it = [], launch.launch

    def recorded(kernel, grid, args, constexprs, config, device):
        launch_it(kernel, grid, args, constexprs, config, device)
        if kernel is passes.split_kernel:
            found.append(("split", constexprs["PHASE"], args[kernel.arg_names.index("Counters_ptr")]))
        elif kernel is passes.loop_kernel:
            found.append(("loop", None, None))

    monkeypatch.setattr(launch, "launch", recorded)
    return found


def phases(launched):
    return [phase for _, phase, _ in launched]


def call_of(name, reduction="mean", min_prob=1e-7, inplace=False, asked="triton"):
    return checked_call(LOSSES[name], -100, reduction, 0.0, min_prob, inplace, None, asked)


def batch(device, rows=5, classes=101, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    target[1:2] = -100
    return logits.to(device, dtype), target.to(device)


def gradient_of(call, logits, target, weight=None):
    """(loss, gradient) of the one pass."""
    logits = logits.clone()
    grad = logits if call.inplace else torch.empty_like(logits)
    return backend.row_loss(call, logits, target, weight, grad, None), grad


def coefficients_of(call, logits, target):
    coefs = logits.new_empty((NUM_COEFS.value, len(target)), dtype=torch.float32)
    return backend.row_loss(call, logits, target, None, None, coefs), coefs


def statistics_of(call, logits, target):
    return (backend.row_stats(call, logits, target),)


def results_both_ways(run, launched):
    """What `run` returns in one launch, and in a launch for each phase; how many launches those are."""
    results, counts = [], []
    for way in WAYS.values():
        launched.clear()
        with way.in_use():
            results.append(run())
        counts.append(phases(launched))
    return results, counts


CASES = {
    "gradient": lambda name, device: gradient_of(call_of(name), *batch(device)),
    "clamped": lambda name, device: gradient_of(call_of(name, "sum"), *batch(device, spread=9.0)),
    "inplace": lambda name, device: gradient_of(call_of(name, inplace=True), *batch(device, spread=9.0)),
    "a loss per row": lambda name, device: coefficients_of(call_of(name, "none"), *batch(device, spread=9.0)),
    "statistics": lambda name, device: statistics_of(call_of(name), *batch(device, spread=9.0)),
    "several rows per program": lambda name, device: gradient_of(call_of(name), *batch(device, 18, spread=9.0)),
    "bfloat16": lambda name, device: gradient_of(call_of(name), *batch(device, classes=96, dtype=torch.bfloat16)),
}
FEW = ("gradient", "inplace", "statistics")  # with the losses that differ from ANL-CE by what they sum up alone


@pytest.mark.parametrize(
    "name, case",
    [
        (n, c) if (n, c) == ("anl_ce", "inplace") else thorough(n, c)
        for n in LOSSES
        for c in CASES
        if n == "anl_ce" or c in FEW
    ],
)
def test_a_launch_a_phase_gives_the_same_bits(name, case, device, launched):
    (one, apart), counts = results_both_ways(lambda: CASES[case](name, device), launched)
    needs = call_of(name).needs
    assert counts == [[None], [0, 1, 2] if needs else [0, 1]]
    for a, b in zip(one, apart):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- the decision about the second sweep is the second phase's, and the last phase's only to read


@pytest.fixture
def nobody_waits_forever(monkeypatch):
    wait = kernels.wait

    def checked(pointer, count):
        if pointer is not None:
            assert not kernels.tl.load(pointer) < count, "a program waits for what nobody will publish"
        wait(pointer, count)

    monkeypatch.setattr(kernels, "wait", checked)


@pytest.fixture
def only_the_first_answers_count(monkeypatch):
    """From the third time on `needs_second_sweep` says the opposite: the two parts of a row's second phase, compiled
    together, agree, and what another phase would find, it finds otherwise."""
    decide, asked = kernels.needs_second_sweep, []

    def decided(*arguments):
        asked.append(arguments)
        needed = decide(*arguments)
        return needed if len(asked) <= 2 else needed == 0

    monkeypatch.setattr(kernels, "needs_second_sweep", decided)
    return asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces functions of the interpreter's")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", [1.0, 9.0])  # no class below the clamp; many
def test_the_last_phase_takes_the_decision_as_it_was_made(
    way, spread, device, nobody_waits_forever, only_the_first_answers_count
):
    logits, _ = batch(device, rows=1, spread=spread)
    target = logits.argmax(1)
    low = (logits.log_softmax(1) < torch.tensor(1e-7).log()).any()
    assert low == (spread > 1.0)
    expected = ak.anl_ce(logits, target, alpha=5.0, beta=5.0, backend="reference")
    with WAYS[way].in_use():
        loss, _ = gradient_of(call_of("anl_ce"), logits, target)
    assert only_the_first_answers_count
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces functions of the interpreter's")
def test_each_phase_waits_for_the_ones_before(device, launched, monkeypatch):
    wait, waited = kernels.wait, []

    def recorded(pointer, count):
        waited.append(int(pointer.handle.data.item()))
        wait(pointer, count)

    monkeypatch.setattr(kernels, "wait", recorded)
    with WAYS["one launch"].in_use():
        gradient_of(call_of("anl_ce"), *batch(device, rows=1))
    ((_, _, counters),) = launched
    ticket, parts, first, second = counters.data_ptr(), 2, 4, 8
    assert [pointer - ticket for pointer in waited] == [first] * parts + [first, second] * parts


@pytest.mark.parametrize("spread", [1.0, 9.0])
def test_every_part_of_every_phase_publishes(spread, device, launched):
    """Also where no row has a class below the clamp."""
    rows, parts = 5, 2
    with WAYS["one launch"].in_use():
        gradient_of(call_of("anl_ce"), *batch(device, rows, spread=spread))
    ((_, _, counters),) = launched
    items = 3 * (rows + 2) * parts
    assert counters.tolist() == [items] + 2 * rows * [parts]


# ---- which way is taken


@pytest.fixture
def nothing_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("ANL_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("ANL_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    trust._trusted.cache_clear()
    yield
    trust._trusted.cache_clear()


def split_of(asked, device):
    """The phases launched for three long rows, by the plan that a call really gets."""
    logits, target = batch(device, rows=3, classes=passes.ON_CHIP + 1)
    return gradient_of(call_of("ce", asked=asked), logits, target)


@pytest.mark.parametrize(
    "asked, variable, expected",
    [
        ("triton", None, [None]),  # who names a backend trusts it
        ("auto", None, [0, 1]),
        ("auto", "triton.split", [None]),
        ("triton", "none", [0, 1]),
    ],
)
def test_programs_wait_only_where_that_is_trusted(
    asked, variable, expected, device, launched, nothing_verified, monkeypatch
):
    if variable:
        monkeypatch.setenv(trust.VARIABLE, variable)
    monkeypatch.setattr(launch, "target_of", lambda device: H200)
    split_of(asked, device)
    assert phases(launched) == expected


def test_what_was_verified_is_trusted(device, launched, nothing_verified, monkeypatch):
    monkeypatch.setattr(launch, "target_of", lambda device: H200)
    trust.record("triton.split", device, {})
    split_of("auto", device)
    assert phases(launched) == [None]


H200 = launch.Target("cuda:90", 32, 132, 50 << 20)


@pytest.mark.parametrize(
    "rows, classes, waiting, apart",
    [
        (64, 1000, "tile", "tile"),
        (8192, 32768, "loop", "loop"),  # all rows under way fit the cache
        (1, 1 << 24, "split", "launches"),
        (3, 1 << 20, "split", "launches"),
        (16, 1 << 20, "split", "launches"),
        (300, 1 << 20, "split", "launches"),  # one row per program would leave half of the device idle
        (8192, 131072, "split", "loop"),
    ],
)
def test_plans(rows, classes, waiting, apart):
    view = launch.view_of((rows, classes, 1), 2, (classes, 1, 0))
    plans = [passes.plan(view, 2, H200, may_wait=may_wait) for may_wait in (True, False)]
    names = {passes.tile_kernel: "tile", passes.loop_kernel: "loop", passes.split_kernel: "split"}
    kinds = ["launches" if p.split and not p.split.one_launch else names[p.kernel] for p in plans]
    assert kinds == [waiting, apart]
    if apart == "launches":
        assert plans[0].split[:2] == plans[1].split[:2] and plans[0].config == plans[1].config
        assert all(p.split.parts <= passes.MAX_PARTS and p.split.group <= p.row_blocks for p in plans)
