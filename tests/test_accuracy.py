"""Error against float64: never above plain PyTorch's in float32 by more than a stated margin, over many rows of a kind.

The margin: the largest error of a gradient may exceed plain PyTorch's by 5 ulps of the largest gradient, and the
root mean square by half an ulp.  A loss is good to 1e-6 of itself, or as good as plain PyTorch's; NNCE and NNFL, which
are 1 minus a ratio, to 2 ulps of 1.
"""

import math
from functools import lru_cache

import helpers
import oracle
import pytest
import torch
from helpers import EXPRESSIONS, REPRESENTATIVE
from tiers import mainly, thorough

pytestmark = pytest.mark.variants
KINDS = ("normal", "peaked", "wrong", "uniform", "high", "low", "narrow", "mixed", "wide")
ULP = 2.0**-23


@lru_cache(maxsize=64)
def many(kind, classes, rows=96):
    parts = [helpers.rows_of_every_kind(classes, torch.float32, 100 + i, (kind,)) for i in range(rows)]
    return torch.cat([values for values, _ in parts]), torch.cat([labels for _, labels in parts])


@lru_cache(maxsize=2048)
def exact_and_plain(kind, classes, name):
    values, labels = many(kind, classes)
    exact = oracle.loss_and_grad(values, labels, EXPRESSIONS[name], reduction="none")
    plain = oracle.loss_and_grad(values, labels, EXPRESSIONS[name], dtype=torch.float32, reduction="none")
    return exact, [x.double() for x in plain]


def rms(x):
    return x.square().mean().sqrt()


def compare(name, classes, backend, kinds=KINDS):
    terms = EXPRESSIONS[name]
    criteria = helpers.expression(terms), helpers.row_loss_expression(terms)
    ones = sum(abs(coefficient) for coefficient, term, _ in terms if term in ("nnce", "nnfl"))
    squares = helpers.squares_that_cancel(terms, classes)
    for kind in kinds:
        values, labels = many(kind, classes)
        (loss64, grad64), (plain_loss, plain_grad) = exact_and_plain(kind, classes, name)
        ulp = ULP * (grad64.abs().max() + (0 if kind == "peaked" else squares))
        plain_error = (plain_grad - grad64).abs().nan_to_num(0)  # GCE in plain PyTorch is NaN once p_y underflows
        for criterion in criteria:
            # one pass, and by way of coefficients or statistics
            _, grad = helpers.calculate(
                values, labels, criterion, reduction="sum", recompute=False, backend=backend.name
            )
            loss, later = helpers.calculate(values, labels, criterion, reduction="none", backend=backend.name)
            for made in (grad, later):
                error = (made.double() - grad64).abs()
                assert error.max() <= plain_error.max() + 5 * ulp, (kind, classes, criterion)
                assert rms(error) <= rms(plain_error) + 0.75 * ulp, (kind, classes, criterion)
            allowed = (
                torch.maximum(1e-6 * loss64.abs(), (plain_loss - loss64).abs().nan_to_num(0).max()) + 2 * ULP * ones
            )
            assert ((loss.double() - loss64).abs() <= allowed).all(), (kind, classes, criterion)


@pytest.mark.few(name=REPRESENTATIVE, tier="thorough")
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_never_worse_than_plain_pytorch(fused, name):
    compare(name, 10, fused)


@pytest.mark.few(name=["anl_fl"], tier="thorough")
@pytest.mark.parametrize("name", mainly(["anl_fl"], REPRESENTATIVE))
def test_never_worse_than_plain_pytorch_with_many_classes(fused, name):
    compare(name, 1003, fused, fused.few(KINDS, 4))


@pytest.mark.few(classes=[10, 33, 1003], tier="thorough")
@pytest.mark.few(classes=[20_000], spread=[3.0], tier="thorough")
@pytest.mark.parametrize("classes", [10, 33, 1003, thorough(20_000)])
@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
def test_entropy_never_worse_than_plain_pytorch(fused, classes, spread):
    """The term alone, over rows as they come and transposed; its gradient is a difference of large numbers."""
    rows = max(6, min(96, 60_000 // classes))
    values = torch.randn(rows, classes, generator=helpers.generator(classes)) * spread
    labels = torch.zeros(rows, dtype=torch.int64)
    nothing = ((0.0, "ce", {}),)
    loss64, grad64 = oracle.loss_and_grad(values, labels, nothing, entropy_weight=1.0)
    plain_loss, plain_grad = oracle.loss_and_grad(values, labels, nothing, dtype=torch.float32, entropy_weight=1.0)
    ulp, plain_error = ULP * grad64.abs().max(), (plain_grad.double() - grad64).abs()
    for logits in (values, values.t().contiguous().t()):
        knobs = dict(entropy_weight=1.0, backend=fused.name)
        loss, grad = helpers.calculate(logits, labels, helpers.expression(nothing), **knobs)
        error = (grad.double() - grad64).abs()
        worse = 1.5 if fused.name == "triton" else 1.0  # its sums over the classes are float32's throughout
        assert error.max() <= worse * plain_error.max() + 2 * ulp
        assert rms(error) <= worse * rms(plain_error) + 0.1 * ulp
        assert abs(loss - loss64) <= max(1e-6 * loss64.abs(), abs(plain_loss - loss64)) + 2 * ULP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=helpers.dtype_id)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_half_precision_computes_in_float32(fused, name, dtype):
    """Loss to 1e-6, gradient to half an ulp of its own dtype: not what half precision would lose."""
    values, labels = many("normal", 10)
    values = values.to(dtype)
    terms = EXPRESSIONS[name]
    exact, exact_grad = oracle.loss_and_grad(values, labels, terms, reduction="none")
    plain, plain_grad = oracle.loss_and_grad(values, labels, terms, dtype=dtype, reduction="none")
    loss, grad = helpers.calculate(values, labels, helpers.expression(terms), reduction="none", backend=fused.name)
    assert ((loss - exact).abs() <= 1e-6 * exact.abs()).all()
    assert ((grad.double() - exact_grad).abs() <= 1.01 * helpers.EPS[dtype] * exact_grad.abs() + 1e-7).all()
    assert (plain.double() - exact).abs().max() > 100 * (loss - exact).abs().max()
    assert (plain_grad.double() - exact_grad).abs().max() > (grad.double() - exact_grad).abs().max()


@lru_cache(maxsize=8)
def rows_with_large_classes(classes, dtype):
    """Wrong classes of any size besides many small ones: p from 1 - 1e-6 to below the clamp, and around 2^-8."""
    generator = helpers.generator(classes)
    near = torch.linspace(-0.1, 0.1, 24)
    alike = [(near - 3.3).tolist(), (near.repeat(11) - 5.6).tolist()]  # each at the gradient's change of sign
    few = [[-1e-6], [-0.02, -5.6, -5.62], [-0.7, -0.8], [-5.4, -5.5, -5.6], [-15.8, -16.1, -16.4]]
    tops = [*few, [-1.0, -3.0, -5.0, -7.0, -9.0], [], *alike]
    spreads = [0.3, 0.3, 1.0, 0.3, 1.0, 2.0, 3.0, 0.3, 0.3]
    values, labels = torch.empty(len(tops), classes, dtype=torch.float64), torch.arange(len(tops)) * (classes // 9)
    for row, top, spread in zip(values, tops, spreads):
        row.copy_(spread * torch.randn(classes, generator=generator, dtype=torch.float64))
        left = 1 - sum(math.exp(log_p) for log_p in top)
        row += math.log(left) - row.logsumexp(0)
        if len(top) in (1, 3, 24, 264):
            row -= 12  # most classes below the clamp
        row[torch.randperm(classes, generator=generator)[: len(top)]] = torch.tensor(top, dtype=torch.float64)
    values[torch.arange(len(tops)), labels] = -6.0  # p of the target is above the clamp, and NNFL sees the others' sum
    return (values + 3.0).to(dtype), labels


@pytest.mark.few(gamma=[0.5], terms=["nfl+nnfl"], tier="thorough")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=helpers.dtype_id)
@pytest.mark.parametrize("gamma", [0.5, thorough(1.0), 2.0, thorough(2.5), thorough(4.0)])
@pytest.mark.parametrize("terms", ["nfl+nnfl", "nnfl", thorough("nfl")])
def test_focal_weights_in_half_precision(fused, terms, gamma, dtype):
    """Also where (1 - p)^gamma is a series in p: what is left out of it is below a rounding."""
    scale = 1024.0  # few gradients of float16 are subnormal
    relative, ones = 4e-6 if "nfl" in terms.split("+") else 1e-6, scale if "nnfl" in terms else 0.0
    terms = tuple((scale, term, {"gamma": gamma}) for term in terms.split("+"))
    for classes, min_prob in fused.few(((5003, 1e-7), (5000, 1e-5)), 1):
        values, labels = rows_with_large_classes(classes, dtype)
        exact, exact_grad = oracle.loss_and_grad(values, labels, terms, reduction="none", min_prob=min_prob)
        largest = exact_grad.abs().amax(1, keepdim=True)
        allowed = 1.02 * helpers.EPS[dtype] * exact_grad.abs() + 2e-6 * largest + (dtype == torch.float16) * 2.0**-25
        knobs = dict(min_prob=min_prob, backend=fused.name)
        for reduction in ("none", "sum"):  # the gradient later, and in one pass
            loss, grad = helpers.calculate(values, labels, helpers.expression(terms), reduction=reduction, **knobs)
            assert ((grad.double() - exact_grad).abs() <= allowed).all()
            if reduction == "none":
                assert ((loss - exact).abs() <= relative * exact.abs() + 2 * ULP * ones).all()


def test_float64_is_float64(fused):
    for name in EXPRESSIONS:
        values, labels = helpers.rows_of_every_kind(37, torch.float64, 3, ("normal", "narrow", "uniform"))
        exact, exact_grad = oracle.loss_and_grad(values, labels, EXPRESSIONS[name], reduction="none")
        loss, grad = helpers.calculate(
            values, labels, helpers.expression(EXPRESSIONS[name]), reduction="none", backend=fused.name
        )
        torch.testing.assert_close(loss, exact, rtol=1e-14, atol=0)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-13, atol=1e-16)
