"""Properties that hold for any logits: hypothesis picks shapes, scales, labels and masks."""

import math
import os

import helpers
import pytest
import torch
from helpers import EXPRESSIONS, calculate, expression
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# The same examples in every run; ANL_KERNELS_TEST_RANDOM=1 looks for new ones.
settings.register_profile(
    "anl_kernels",
    deadline=None,
    max_examples=int(os.environ.get("ANL_KERNELS_TEST_EXAMPLES", "25")),
    derandomize=os.environ.get("ANL_KERNELS_TEST_RANDOM", "") in ("", "0"),
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("anl_kernels")

pytestmark = pytest.mark.few(tier="thorough")
names = st.sampled_from(sorted(EXPRESSIONS))
classes = st.one_of(st.integers(2, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 257, 1000]))
rows = st.integers(1, 9)
spreads = st.sampled_from([0.0, 0.1, 1.0, 4.0, 15.0, 60.0])
seeds = st.integers(0, 2**31)
recomputes = st.booleans()


def problem(rows, classes, spread, seed, dtype=torch.float64):
    g = helpers.generator(seed)
    values = torch.randn(rows, classes, generator=g, dtype=torch.float64) * spread
    return helpers.away_from_clamp(values).to(dtype), torch.randint(classes, (rows,), generator=g)


def close(left, right, scale=1.0):
    for a, b in zip(left, right):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * scale)


@given(names, rows, classes, spreads, seeds, st.floats(-1e3, 1e3), recomputes)
def test_adding_a_number_to_a_row_changes_nothing(one_backend, name, rows, classes, spread, seed, shift, recompute):
    values, labels = problem(rows, classes, spread, seed)
    keywords = dict(reduction="none", backend=one_backend.name, recompute=recompute)
    shifts = torch.linspace(-1, 1, rows, dtype=torch.float64).view(-1, 1) * shift
    expected = calculate(values, labels, expression(EXPRESSIONS[name]), **keywords)
    moved = calculate(values + shifts, labels, expression(EXPRESSIONS[name]), **keywords)
    close(moved, expected, scale=100)


@given(names, rows, classes, spreads, seeds, recomputes)
def test_the_gradient_of_a_row_sums_to_zero(one_backend, name, rows, classes, spread, seed, recompute):
    values, labels = problem(rows, classes, spread, seed)
    for keywords in (dict(reduction="none"), dict(reduction="mean", entropy_weight=0.5)):
        _, grad = calculate(
            values, labels, expression(EXPRESSIONS[name]), backend=one_backend.name, recompute=recompute, **keywords
        )
        assert (grad.sum(1).abs() <= 1e-12 * (1 + grad.abs().sum(1))).all()


@given(names, rows, classes, spreads, seeds, recomputes)
def test_the_order_of_the_classes_does_not_matter(one_backend, name, rows, classes, spread, seed, recompute):
    values, labels = problem(rows, classes, spread, seed)
    order = torch.randperm(classes, generator=helpers.generator(seed))
    place = order.argsort()  # class k is now at place[k]
    keywords = dict(backend=one_backend.name, recompute=recompute, entropy_weight=0.5)
    loss, grad = calculate(values, labels, expression(EXPRESSIONS[name]), **keywords)
    close(calculate(values[:, order], place[labels], expression(EXPRESSIONS[name]), **keywords), (loss, grad[:, order]))


@given(names, rows, classes, spreads, seeds)
def test_the_order_of_the_rows_does_not_matter(one_backend, name, rows, classes, spread, seed):
    values, labels = problem(rows, classes, spread, seed)
    order = torch.randperm(rows, generator=helpers.generator(seed))
    keywords = dict(backend=one_backend.name, entropy_weight=0.5)
    loss, grad = calculate(values, labels, expression(EXPRESSIONS[name]), **keywords)
    close(calculate(values[order], labels[order], expression(EXPRESSIONS[name]), **keywords), (loss, grad[order]))


@given(st.sampled_from(["nnce", "nce", "mae"]), classes, spreads, seeds)
def test_symmetric_losses(one_backend, name, classes, spread, seed):
    """The sum over all labels is a constant: K - 1 for NNCE and MAE, 1 for NCE. It is why they stand label noise."""
    if one_backend.interpreted:
        classes = min(classes, 20)
    values, _ = problem(1, classes, spread, seed)
    labels = torch.arange(classes)
    loss, grad = calculate(
        values.expand(classes, classes),
        labels,
        expression(EXPRESSIONS[name]),
        reduction="none",
        backend=one_backend.name,
    )
    constant = 1 if name == "nce" else classes - 1
    assert math.isclose(loss.sum().item(), constant, rel_tol=1e-11)
    assert (grad.sum(0).abs() <= 1e-12 * (1 + grad.abs().sum(0))).all()


@given(names, names, rows, classes, spreads, seeds, st.floats(-5, 5), st.floats(-5, 5))
def test_coefficients_add(one_backend, first, second, rows, classes, spread, seed, a, b):
    gammas = {p["gamma"] for name in (first, second) for _, _, p in EXPRESSIONS[name] if "gamma" in p}
    if len(gammas) > 1:
        return
    values, labels = problem(rows, classes, spread, seed)
    one, other = expression(EXPRESSIONS[first]), expression(EXPRESSIONS[second])
    both = calculate(values, labels, a * one + b * other, backend=one_backend.name)
    x = calculate(values, labels, one, backend=one_backend.name)
    y = calculate(values, labels, other, backend=one_backend.name)
    close(both, [a * p + b * q for p, q in zip(x, y)], scale=10)


@given(names, rows, classes, st.integers(1, 70), spreads, seeds, recomputes)
def test_classes_at_minus_infinity_are_no_classes(one_backend, name, rows, classes, more, spread, seed, recompute):
    """Spread among the others at random."""
    values, labels = problem(rows, classes, spread, seed)
    where = torch.randperm(classes + more, generator=helpers.generator(seed))[:classes]
    padded = torch.full((rows, classes + more), -math.inf, dtype=torch.float64)
    padded[:, where] = values
    keywords = dict(backend=one_backend.name, recompute=recompute)
    loss, grad = calculate(padded, where[labels], expression(EXPRESSIONS[name]), **keywords)
    close((loss, grad[:, where]), calculate(values, labels, expression(EXPRESSIONS[name]), **keywords))
    grad[:, where] = 0
    assert (grad == 0).all()


@given(names, rows, classes, spreads, seeds, st.sampled_from(sorted(helpers.LAYOUTS)))
def test_the_layout_does_not_matter(one_backend, name, rows, classes, spread, seed, layout):
    values, labels = problem(12 * rows if layout != "spatial_inner_one" else rows, min(classes, 70), spread, seed)
    logits, target = helpers.lay_out(layout, values, labels)
    keywords = dict(reduction="none", backend=one_backend.name)
    loss, grad = calculate(logits, target, expression(EXPRESSIONS[name]), **keywords)
    expected = calculate(values, labels, expression(EXPRESSIONS[name]), **keywords)
    close((loss.reshape(-1), helpers.oracle.as_rows(grad)), expected)


@given(names, rows, classes, spreads, seeds, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_float64_is_the_limit(one_backend, name, rows, classes, spread, seed, dtype):
    """Any problem, in any precision, against the oracle."""
    values, labels = problem(rows, classes, spread, seed)
    values = helpers.away_from_clamp(values.to(dtype))
    helpers.check(values, labels, EXPRESSIONS[name], reduction="sum", backend=one_backend.name)


@given(rows, classes, st.floats(0.1, 30), seeds)
def test_bounds(one_backend, rows, classes, spread, seed):
    """NCE, NNCE, NFL, NNFL and MAE lie in [0, 1], the entropy term in [0, log K]."""
    values, labels = problem(rows, classes, spread, seed, torch.float32)
    for name in ("nce", "nnce", "nfl", "nnfl", "mae"):
        loss, _ = calculate(values, labels, expression(EXPRESSIONS[name]), reduction="none", backend=one_backend.name)
        assert ((loss >= 0) & (loss <= 1)).all(), name
    import anl_kernels as ak

    loss, _ = calculate(values, labels, 0.0 * ak.CE(), entropy_weight=1.0, backend=one_backend.name)
    assert -1e-6 <= loss <= math.log(classes) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["anl_ce", "nce", "nnce", "mae", "gce"])
def test_a_better_answer_costs_less(one_backend, name):
    logits = torch.zeros(7, 10)
    logits[:, 3] = torch.tensor([-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0])
    loss, _ = calculate(
        logits, torch.full((7,), 3), expression(EXPRESSIONS[name]), reduction="none", backend=one_backend.name
    )
    assert (loss.diff() < 0).all()
