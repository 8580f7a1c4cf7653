"""Rows that are certain, or no numbers: what 120 digits find is found, and NaN stays in its row."""

import math
from functools import lru_cache

import helpers
import oracle
import pytest
import torch
from helpers import DTYPES, EXPRESSIONS, REPRESENTATIVE, dtype_id
from modes import run
from tiers import mainly

import anl_kernels as ak

pytestmark = pytest.mark.variants

MOST = pytest.mark.parametrize("name", mainly(REPRESENTATIVE, EXPRESSIONS))  # by default, where kernels differ more


# ---- confident rows: float64 itself cancels there, 120 digits do not

CONFIDENT = ("ce", "nce", "fl", "nfl", "mae", "rce", "gce", "agce", "aul", "eps_ce", "anl_ce", "anl_fl", "nce+rce")


@pytest.mark.few(name=["anl_ce", "nfl"])
@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("name", CONFIDENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_no_cancellation_as_the_target_becomes_certain(backend, name, dtype):
    """Loss and gradient keep relative digits while 1 - p_y falls from 1e-2 to 1e-12."""
    terms, eps = EXPRESSIONS[name], helpers.EPS[dtype]
    relative = 3e-6 if dtype == torch.float32 else 1e-13
    # NNCE and NNFL are 1 minus a ratio near 1, by their definition: of them no more than roundings of 1 is asked.
    floor = 8 * eps if any(term.startswith("nn") for _, term, _ in terms) else 0.0
    for margin in (5.0, 9.0, 14.0, 20.0, 28.0):
        row = torch.tensor([0.25, -0.5, 0.0, 0.75, -1.25, 0.125, -0.25], dtype=dtype)
        label = 3
        row[label] += margin
        exact_loss, exact_grad = exact_row(tuple(row.tolist()), label, name)
        missing, _ = exact_row(tuple(row.tolist()), label, "mae")  # 1 - p_y: what the gradient is made of
        expected = torch.tensor(exact_grad, dtype=torch.float64)
        allowed = 2 * relative * expected.abs().max() + 100 * eps * missing + floor
        for recompute in (False, True):
            loss, grad = helpers.calculate(
                row, torch.tensor(label), helpers.expression(terms), recompute=recompute, backend=backend.name
            )
            assert abs(loss.item() - exact_loss) <= relative * abs(exact_loss) + floor, (
                margin,
                loss.item(),
                exact_loss,
            )
            assert ((grad.double() - expected).abs() <= allowed).all(), (margin, grad.tolist(), exact_grad)


@lru_cache(maxsize=512)
def exact_row(row, label, name):
    return oracle.exact(row, label, EXPRESSIONS[name])


@pytest.mark.few()
@pytest.mark.few(forced=dict(), tier="thorough")
def test_certain_rows(backend):
    """p_y = 1 to every digit: nothing divides by the zero that is left, and what 120 digits find is found."""
    margins, label = (60.0, 200.0, 3e4), 4
    logits = torch.zeros(len(margins), 10)
    logits[:, label] = torch.tensor(margins)
    exact = lambda name: zip(*(exact_row(tuple(row.tolist()), label, name) for row in logits))
    missing = torch.tensor(next(exact("mae")), dtype=torch.float64).view(-1, 1)
    smallest = torch.finfo(torch.float32).smallest_normal
    for name, terms in EXPRESSIONS.items():
        losses, grads = (torch.tensor(values, dtype=torch.float64) for values in exact(name))
        loss, grad = helpers.calculate(
            logits, torch.full((3,), label), helpers.expression(terms), reduction="sum", backend=backend.name
        )
        error = (grad.double() - grads).abs()
        assert abs(loss.item() - losses.sum()) <= 3e-6 * losses.sum() + smallest, name
        allowed = 3e-6 * (grads.abs().amax(1, keepdim=True) + 10 * missing) + smallest  # 10: RCE is -log(floor) p_j
        assert (error <= allowed).all(), name


# ---- the target and the top


@pytest.mark.few(layout=["rows"], dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "spatial", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_target_is_the_top_only_if_no_logit_is_larger(backend, dtype, layout):
    terms, seen = EXPRESSIONS["eps_ce3"], []
    spy = ak.RowLoss(lambda s: seen.append(s.target_is_top) or s.target_log_prob)
    for classes in backend.few((7, 40, 5000), 2):
        values, labels, is_top = helpers.near_ties(classes, dtype)
        logits, target = helpers.lay_out(layout, values, labels)
        for criterion in (helpers.expression(terms), helpers.row_loss_expression(terms)):
            for recompute in (False, True):
                keywords = dict(reduction="sum", recompute=recompute, backend=backend.name)
                helpers.check(logits, target, terms, criterion, **keywords)
            loss, _ = helpers.calculate(logits, target, criterion, reduction="none", backend=backend.name)
            assert torch.equal(loss.reshape(-1) < 0.5, is_top)  # at most log(4 / 3), at least log 4
        helpers.calculate(logits, target, spy, backend=backend.name)
        assert torch.equal(seen.pop().reshape(-1).bool().cpu(), is_top)


@pytest.mark.few(name=["rce"], dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ce", "rce", "anl_ce", "anl_fl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_rows_of_one_large_number_alone(backend, name, dtype):
    """As masks leave them: every class has 1 / K, however far such numbers' neighbours are."""
    for classes in backend.few((7, 403, 5003), 2):
        numbers = torch.tensor([torch.finfo(dtype).min, -1e30, -1e10, 1e12])
        values = numbers.to(dtype).unsqueeze(1).repeat(1, classes)
        labels = torch.arange(len(numbers)) * (classes // 5)
        helpers.check(values, labels, EXPRESSIONS[name], reduction="sum", backend=backend.name)


@pytest.mark.few(name=["anl_ce", "anl_fl"])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("name", ["ce", "anl_ce", "anl_fl", "nce+rce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_rows_far_from_zero(backend, name, dtype, layout):
    """What all logits have in common leaves nothing behind, though sums with it are rounded to 1/8."""
    steps, step, offsets = (
        (80, 0.25, (0.0, 1e4, -1e5, 2e6)) if dtype == torch.float32 else (2, 16.0, (0, 1600, -3008, 3008))
    )
    for classes in backend.few((5, 211, 5003), 2):
        values = torch.randint(-steps, 1, (4, classes), generator=helpers.generator(0)) * step
        values += torch.tensor(offsets).unsqueeze(1)
        logits, labels = helpers.lay_out(layout, values.to(dtype), torch.arange(4) * (classes // 5))
        helpers.check(logits, labels, EXPRESSIONS[name], reduction="sum", backend=backend.name)


@pytest.mark.parametrize("offset", [3e4, -1e5])
def test_heights_of_rows_far_from_zero(backend, offset):
    """Logits that fill a float's last digits: what is summed of them is how far they are above the clamp."""
    values = torch.randn(4, 5003, generator=helpers.generator(1)) * 5 + offset
    helpers.check(values, values.argmax(1), EXPRESSIONS["anl_ce"], reduction="sum", backend=backend.name)


@pytest.mark.few(dtype=[torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_linear_head_s_target_is_the_top_only_if_no_logit_is_larger(one_backend, dtype):
    values, labels, is_top = helpers.near_ties(40, dtype)
    given = values, torch.eye(40, dtype=dtype), labels
    values, weight, labels = (helpers.moved(x, one_backend.device) for x in given)
    for criterion in (ak.EpsCE(3.0), helpers.row_loss_expression(EXPRESSIONS["eps_ce3"])):
        loss = ak.linear_robust_loss(values, weight, labels, criterion, reduction="none", backend=one_backend.name)
        assert torch.equal(loss.cpu() < 0.5, is_top)


# ---- rows that are no numbers

POISONS = (math.nan, math.inf)


@pytest.mark.few(name=["anl_ce"])
@pytest.mark.few(name=REPRESENTATIVE, forced=dict(name=["anl_ce"], layout=["rows"]), tier="thorough")
@MOST
@pytest.mark.parametrize("layout", ["rows", "spatial", "transposed"])
def test_a_row_of_nan_harms_no_other(backend, name, layout):
    values, labels = helpers.batch(33, torch.float32)
    values = values.clone()
    broken = [3, 11, 17]
    labels = labels.where(labels >= 0, torch.tensor(0))
    values[values.isnan().any(1)] = 0.5
    clean = helpers.truth(values, labels, EXPRESSIONS[name], reduction="none")
    values[3, 32], values[11, 0] = POISONS
    values[17, labels[17]] = math.nan
    logits, target = helpers.lay_out(layout, values, labels)
    others = torch.ones(len(labels), dtype=torch.bool)
    others[broken] = False
    criterion = helpers.expression(EXPRESSIONS[name])
    for extra in (dict(), dict(reduction="sum", recompute=False), dict(reduction="sum", recompute=True)):
        loss, grad = helpers.calculate(
            logits, target, criterion, **{"reduction": "none", **extra}, backend=backend.name
        )
        grad = oracle.as_rows(grad)
        assert grad[broken].isnan().all()
        if extra:
            assert loss.isnan()
        else:
            assert loss.reshape(-1)[broken].isnan().all()
            helpers.check_loss(loss.reshape(-1)[others], clean.of(others))
        helpers.check_grad(grad[others], labels[others], clean.of(others))


@pytest.mark.few(name=["anl_ce"])
@pytest.mark.few(name=REPRESENTATIVE, forced=dict(name=["anl_ce"]), tier="thorough")
@MOST
def test_a_target_that_does_not_exist_is_nan(backend, name):
    """Few classes and many: other kernels, each with its own test for it."""
    for classes in backend.few((7, 40, 5000)):
        logits = torch.randn(3, classes, generator=helpers.generator(0))
        logits[1, 2] = -math.inf
        target = torch.tensor([0, 2, 6])
        for build in (helpers.expression, helpers.row_loss_expression):
            criterion = build(EXPRESSIONS[name])
            for recompute in (False, True):
                total, grad = helpers.calculate(
                    logits, target, criterion, reduction="sum", recompute=recompute, backend=backend.name
                )
                assert total.isnan()
                assert grad[[0, 2]].isfinite().all()
            loss, _ = helpers.calculate(logits, target, criterion, reduction="none", backend=backend.name)
            assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.few(layout=["rows"])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_a_nan_row_is_nan_where_it_is_masked_too(backend, layout):
    """Every way to the gradient: classes that do not exist get 0 in all other rows."""
    for classes in backend.few((5000, 7, 40), 1):
        values = torch.randn(3, classes, generator=helpers.generator(0))
        values[:, 4:6] = -math.inf
        values[1, 2] = math.nan
        logits, labels = helpers.lay_out(layout, values, torch.tensor([3, 0, 3]))
        for name in backend.few(REPRESENTATIVE, 1):
            for mode in ("forward", "recompute", "entropy"):
                _, grad = run(logits, labels, name, mode, backend)
                assert grad[1].isnan().all()
                if mode != "entropy":  # through which every row sees the NaN
                    assert (grad[[0, 2], 4:6] == 0).all()


@pytest.mark.parametrize("name", ["rce", "nce+rce", "nfl+rce"])
def test_a_stretch_just_below_the_clamp(backend, name):
    """Thousands of classes whose p is below min_prob each, and in sum is not: RCE sees it."""
    values = torch.zeros(3, 3 * 2048)
    values[:, 2048:] = -9 - torch.rand(3, 2 * 2048, generator=helpers.generator(0)) / 4
    labels = torch.tensor([5, 2047, 3000])
    for recompute in (False, True):
        helpers.check(values, labels, EXPRESSIONS[name], reduction="sum", recompute=recompute, backend=backend.name)
