"""Launches and tickets: a sum is one kernel and a mean two; counters whose memory nobody zeroes, call after call."""

import math

import helpers
import pytest
import torch
from cuda_on_host import adapter, build

import anl_kernels as ak

pytestmark = pytest.mark.skipif(
    build.compiler() is None or torch.cuda.is_available(), reason="needs g++ on Linux and the source tree, and no GPU"
)
INVALID_CONFIGURATION = 9
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
TICKETS_ALONE = 1
# (device, rows, classes, contiguous): every kernel, with several CTAs
KERNELS = {
    "rows_small": ("host", 4096, 10, True),
    "rows_block": ("host", 24, 403, True),
    "rows_cluster": ("host", 24, 1025, True),  # two clusters of two
    "rows_split": ("host-sm80", 5, 3001, True),
    "spatial": ("host", 500, 7, False),
}


class Problem:
    """A call of the module, in memory of its own: the same from call to call, and nobody clears it."""

    def __init__(self, module, rows, classes, contiguous):
        g = helpers.generator(classes)
        self.module, self.rows, self.classes = module, rows, classes
        self.logits = torch.randn(rows, classes, generator=g) * 4
        self.target = torch.randint(classes, (rows,), generator=g)
        self.target[rows // 2] = -100
        self.strides = (classes, 1, 0) if contiguous else (1, rows, 0)
        self.stored = self.logits if contiguous else self.logits.t().contiguous().t()
        self.grad = torch.empty_like(self.stored)
        self.memory = torch.randint(256, (1 << 20,), dtype=torch.uint8)

    def empty(self, size):
        assert size <= self.memory.numel() - 256
        return (self.memory.data_ptr() + 255) // 256 * 256

    def run(self, reduction, protocols=7, weight=None):
        loss = torch.full((self.rows,) if reduction == "none" else (), math.nan)
        program = self.module.Program([(1, 1.0, 0.0, 0.0), (2, 1.0, 0.0, 0.0)], 1e-7, 0.0, 1)
        self.module.row_loss(
            program, 0, (self.rows, self.classes, 1), self.stored.data_ptr(), self.strides, self.grad.data_ptr(),
            self.strides, self.target.data_ptr(), 0, -100, 0 if weight is None else weight.data_ptr(),
            REDUCTIONS[reduction], loss.data_ptr(), 0, self.module.Where(-1, 0, self.empty, protocols),
        )  # fmt: skip
        return loss

    def check(self, loss, reduction):
        live = self.target != -100
        true = helpers.truth(self.logits[live], self.target[live], helpers.EXPRESSIONS["anl_ce"])
        scale = {"mean": 1, "sum": int(live.sum()), "none": int(live.sum())}[reduction]
        helpers.assert_as_accurate(loss.sum() / scale, self.grad[live] / scale, self.target[live], true)


@pytest.fixture(params=KERNELS)
def problem(request):
    device, *shape = KERNELS[request.param]
    with adapter.on_host(device) as module:
        one = Problem(module, *shape)
        plan = module.plan_for(0, (one.rows, one.classes, 1), one.strides, -1)
        assert (plan["kernel"], plan["blocks"] > 1) == (request.param, True)
        yield one
        adapter.loaded()[1].anl_host_refuse(b"", 0)


def launches():
    return adapter.loaded()[1].anl_host_launches()


@pytest.mark.parametrize(("reduction", "expected"), [("none", 1), ("sum", 1), ("mean", 2)])
def test_launches(problem, reduction, expected):
    """The kernel, and before it for a mean what counts the rows."""
    launches()
    loss = problem.run(reduction)
    assert launches() == expected
    problem.check(loss, reduction)
    problem.run(reduction, weight=torch.ones(problem.classes))
    assert launches() == expected


def test_launches_without_tickets(problem):
    """What the last CTA does is then a launch of its own."""
    launches()
    problem.check(problem.run("sum", protocols=7 - TICKETS_ALONE), "sum")
    assert launches() == 2
    problem.check(problem.run("mean", protocols=7 - TICKETS_ALONE), "mean")
    assert launches() == 3


@pytest.mark.parametrize("content", [None, 0, 0xFF])
def test_memory_that_held_anything(problem, content):
    for reduction in ("sum", "mean", "sum"):
        if content is None:
            problem.memory.random_(256)
        else:
            problem.memory.fill_(content)
        problem.check(problem.run(reduction), reduction)


def test_calls_back_to_back(problem):
    """Each in the memory that the one before has left."""
    first = problem.run("sum")
    for _ in range(4):
        assert torch.equal(problem.run("sum"), first)
    problem.check(first, "sum")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_call_that_is_run_again(problem, reduction):
    """As a graph does: the same launches with the same mark."""
    library = adapter.loaded()[1]
    library.anl_host_capture(1)
    loss = problem.run(reduction)
    library.anl_host_capture(0)
    expected = loss.clone(), problem.grad.clone()
    for other in ("sum", "mean", "none"):
        for _ in range(3):
            loss.fill_(math.nan)
            problem.grad.fill_(math.nan)
            assert library.anl_host_replay() == 0
            assert torch.equal(loss, expected[0]) and torch.equal(problem.grad, expected[1])
        problem.run(other)  # another call in between, in the same memory
    problem.memory.random_(256)
    assert library.anl_host_replay() == 0 and torch.equal(loss, expected[0])


def test_after_a_refused_launch(problem):
    library = adapter.loaded()[1]
    expected = problem.run("mean").clone()
    library.anl_host_refuse(b"1" * 16, INVALID_CONFIGURATION)
    with pytest.raises(problem.module.LaunchRefused):
        problem.run("mean")
    library.anl_host_refuse(b"01", INVALID_CONFIGURATION)  # what prepares has run, and the kernel then has not
    try:
        problem.check(problem.run("mean"), "mean")
    except problem.module.LaunchRefused:
        assert not problem.strides[1] == 1  # only strides that one kernel alone can take
    library.anl_host_refuse(b"", 0)
    assert torch.equal(problem.run("mean"), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_denominator(dtype, weighted):
    """Of every label's type, and of more rows than what prepares takes at a time."""
    rows, classes = 70_001, 5
    g = helpers.generator(1)
    target = torch.randint(classes, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < 0.3] = 200
    weight = torch.rand(classes, generator=g) if weighted else None
    logits = torch.randn(rows, classes, generator=g)
    with adapter.on_host("host-h200"):
        loss = ak.anl_ce(logits, target.to(dtype), weight=weight, ignore_index=200, backend="cuda")
    expected = ak.anl_ce(logits.double(), target, weight=weight, ignore_index=200, backend="reference")
    assert math.isclose(loss, expected, rel_tol=1e-6)
