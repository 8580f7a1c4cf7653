"""The plan of a call follows the device's limits: the kernels on further devices, and that all of them take part."""

import ctypes
import math

import helpers
import oracle
import pytest
import torch
from cuda_on_host import adapter, build
from tiers import mainly

from anl_kernels import layout

pytestmark = pytest.mark.skipif(
    build.compiler() is None or torch.cuda.is_available(), reason="needs g++ on Linux and the source tree, and no GPU"
)


@pytest.mark.parametrize(
    "device, rows, classes, kernel",
    [
        ("host", 24, 37, "rows_small"),
        ("host", 24, 403, "rows_block"),
        ("host", 24, 3001, "rows_cluster"),
        ("host", 1, 5003, "rows_split"),
        ("host-sm80", 24, 37, "rows_small"),
        ("host-sm80", 24, 403, "rows_block"),
        ("host-sm80", 24, 3001, "rows_split"),
        ("host-h100", 4096, 1000, "rows_small"),
        ("host-h100", 4096, 5000, "rows_block"),
        ("host-h100", 4096, 100_000, "rows_cluster"),
        ("host-a100", 4096, 100_000, "rows_split"),
    ],
)
def test_every_kernel_takes_part(device, rows, classes, kernel):
    float32 = 0
    with adapter.on_host(device) as module:
        shape = (rows, classes, 1)
        assert module.plan_for(float32, shape, (classes, 1, 0), -1)["kernel"] == kernel
        assert module.plan_for(float32, shape, (1, rows + 1, 0), -1)["kernel"] == "spatial"


@pytest.mark.parametrize("device", ["host-warp", "host-h100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=helpers.dtype_id)
@pytest.mark.parametrize("layout", ["rows", "offset", "transposed"])
def test_on_a_further_device(device, dtype, layout):
    for classes, name in ((3, "anl_fl"), (100, "anl_ce"), (1001, "nce+rce"), (2051, "anl_ce")):
        values, labels = helpers.batch(classes, dtype)
        logits, target = helpers.lay_out(layout, values, labels)
        terms = helpers.EXPRESSIONS[name]
        true = helpers.truth(values, labels, terms)
        for recompute in (False, True):
            with adapter.on_host(device):
                loss, grad = helpers.calculate(
                    logits, target, helpers.expression(terms), backend="cuda", recompute=recompute
                )
            helpers.assert_as_accurate(loss, oracle.as_rows(grad), labels, true)


FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
# (dtype, rows, classes): so that between them they take every kernel that a device's plan may pick. Three rows at most
# are live, the others are ignored and cost next to nothing.
CASES = {
    "small": (FLOAT32, 300, 100),
    "block": (FLOAT32, 300, 5000),
    "block of 48 KB": (FLOAT32, 300, 12_200),
    "wide block": (FLOAT64, 170, 9000),
    "cluster of one": (BFLOAT16, 170, 24_600),
    "cluster": (BFLOAT16, 40, 24_600),
    "wide cluster": (BFLOAT16, 14, 100_000),
    "widest cluster": (FLOAT32, 2, 500_000),  # alone on its multiprocessors
    "split": (FLOAT32, 1, 30_000),
}


def few_live_rows(dtype, rows, classes):
    """(logits, labels, the live rows' numbers)."""
    live = sorted({0, rows // 2, rows - 1}) if classes < 50_000 else [rows - 1]
    logits = torch.full((rows, classes), math.nan, dtype=dtype)
    logits[live] = (torch.randn(len(live), classes, generator=helpers.generator(classes)) * 4).to(dtype)
    labels = torch.full((rows,), -100)
    labels[live] = torch.tensor([0, classes - 1, classes // 2][: len(live)])
    return logits, labels, live


MODELS = mainly(["host-h200"], adapter.LARGE)


@pytest.mark.parametrize("device", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_on_every_model(device, case, caplog, monkeypatch):
    """Whatever the plan is there, it is not refused, and right."""
    monkeypatch.setattr(layout, "_said", set())  # what is said once is said anew
    logits, labels, live = few_live_rows(*CASES[case])
    terms = helpers.EXPRESSIONS["anl_ce"]
    true = helpers.truth(logits[live], labels[live], terms)
    for recompute in (False, True):
        with adapter.on_host(device):
            loss, grad = helpers.calculate(
                logits, labels, helpers.expression(terms), backend="cuda", recompute=recompute
            )
        helpers.assert_as_accurate(loss, grad[live], labels[live], true)
        assert grad.count_nonzero() == grad[live].count_nonzero()
    assert "refuses to launch" not in caplog.text


@pytest.mark.parametrize("layout", ["rows", "offset"])
@pytest.mark.parametrize("name", ["anl_ce", "anl_fl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=helpers.dtype_id)
def test_long_parts_of_rows(dtype, name, layout):
    """Whose copies come a few at a time, while the first of them are swept."""
    values, labels = helpers.rows_of_every_kind(40_003, dtype, kinds=("normal", "mixed", "wrong", "masked"))
    logits, target = helpers.lay_out(layout, values, labels)
    terms = helpers.EXPRESSIONS[name]
    with adapter.on_host(adapter.LONG_PARTS) as module:
        assert module.plan_for(0, (4, 40_003, 1), (40_003, 1, 0), -1)["kernel"] == "rows_split"
        loss, grad = helpers.calculate(logits, target, helpers.expression(terms), backend="cuda")
    helpers.assert_as_accurate(loss, oracle.as_rows(grad), labels, helpers.truth(values, labels, terms))


@pytest.mark.parametrize(("device", "classes"), [("host", 3001), ("host-warp", 1001)])
def test_long_runs_of_ignored_rows(device, classes):
    """A cluster knows a few rows ahead which of them it reads."""
    logits, labels, live = few_live_rows(FLOAT32, 90, classes)
    terms = helpers.EXPRESSIONS["anl_ce"]
    true = helpers.truth(logits[live], labels[live], terms)
    with adapter.on_host(device) as module:
        assert module.plan_for(0, (90, classes, 1), (classes, 1, 0), -1)["kernel"] == "rows_cluster"
        loss, grad = helpers.calculate(logits, labels, helpers.expression(terms), backend="cuda")
    helpers.assert_as_accurate(loss, grad[live], labels[live], true)


@pytest.mark.parametrize("device", adapter.LARGE)
def test_the_cases_take_every_kernel_there_is(device):
    codes = {FLOAT32: 0, FLOAT64: 1, BFLOAT16: 3}
    with adapter.on_host(device) as module:
        picked = {
            module.plan_for(codes[dtype], (rows, classes, 1), (classes, 1, 0), -1)["kernel"]
            for dtype, rows, classes in CASES.values()
        }
    clusters = set() if device in ("host-a100", "host-rtx4090", "host-h100-of-80") else {"rows_cluster"}
    assert picked == {"rows_small", "rows_block", "rows_split"} | clusters


@pytest.mark.parametrize(("device", "expected"), [("host-h200", ("rows_cluster", 16)), ("host-h20", ("rows_split", 1))])
def test_the_widest_cluster_of_a_device(device, expected):
    """Rows that only 16 CTAs hold: an H20 has too few multiprocessors in a GPC for so many."""
    with adapter.on_host(device) as module:
        plan = module.plan_for(0, (2, 600_000, 1), (600_000, 1, 0), -1)
    assert (plan["kernel"], plan["cluster"]) == expected


@pytest.mark.parametrize(("layout", "classes", "name"), [("rows", 480_000, "anl_ce"), ("offset", 500_003, "nce+rce")])
def test_rows_partly_in_registers(layout, classes, name):
    """Longer than a cluster's shared memory; two clusters take three rows each."""
    values = torch.randn(6, classes, generator=helpers.generator(classes)) * 4
    labels = torch.tensor([0, classes - 1, -100, classes // 2, 5000, 100_000])
    terms = helpers.EXPRESSIONS[name]
    true = helpers.truth(values, labels, terms)
    logits, target = helpers.lay_out(layout, values, labels)
    with adapter.on_host("host-mig") as module:
        plan = module.plan_for(0, (6, classes, 1), (*logits.stride(), 0), -1)
        loss, grad = helpers.calculate(logits, target, helpers.expression(terms), backend="cuda")
    assert (plan["kernel"], plan["cluster"], plan["threads"]) == ("rows_cluster", 8, 352)
    helpers.assert_as_accurate(loss, oracle.as_rows(grad), labels, true)


# ---- contexts


def run_on(module, device):
    """A call on that device, through the module alone."""
    memory = []

    def empty(size):
        memory.append(ctypes.create_string_buffer(size))
        return ctypes.addressof(memory[-1])

    logits, factor = torch.ones(3, 5), torch.tensor(2.0)
    where = module.Where(device, 0, empty)
    module.scale(0, (3, 5, 1), logits.data_ptr(), (5, 1, 0), factor.data_ptr(), where)
    assert (logits == 2).all()


@pytest.mark.parametrize("current", [None, 1, 2])
def test_a_call_leaves_the_contexts_as_they_were(current):
    """A context costs half a gigabyte: none is made on a device that nobody uses."""
    with adapter.on_host("host") as module:
        library = adapter.loaded()[1]
        library.anl_host_create_context(1)
        if current is not None:
            library.anl_host_set_device(current)
        contexts = library.anl_host_contexts()
        assert not contexts & 1
        run_on(module, 1)
        assert library.anl_host_contexts() == contexts
        assert library.anl_host_current_context() == (-1 if current is None else current)
