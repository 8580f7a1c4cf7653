"""Factors of terms that are tensors, learned or changing; and nothing that outlives its use."""

import copy
import gc
import pickle
import weakref

import helpers
import numpy as np
import pytest
import torch
from helpers import THERE
from tiers import thorough

import anl_kernels as ak

# ---- the algebra


def value(criterion, **keywords):
    logits = helpers.randn(6, 9, dtype=torch.float64, generator=helpers.generator(0))
    target = helpers.randint(9, (6,), generator=helpers.generator(1))
    return torch.cat([x.reshape(-1) for x in helpers.calculate(logits, target, criterion, **keywords)])


# ---- factors that are tensors, and that change


def learned(value=2.0, shape=()):
    return torch.full(shape, value, requires_grad=True)


FACTORED = {
    "left": lambda a: a * ak.NCE() + ak.MAE(),
    "right": lambda a: ak.NCE() * a + ak.MAE(),
    "divided": lambda a: ak.NCE() / a + ak.MAE(),
    "twice": lambda a: 3 * (a * (a * ak.NCE() - 2 * ak.MAE())) / 2,
    "row loss": lambda a: a * ak.RowLoss(lambda s: 1 - s.target_prob) + ak.NCE(),
}


@THERE
@pytest.mark.parametrize("build", FACTORED.values(), ids=FACTORED)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_learned_factor_gets_its_gradient(one_backend, build, shape):
    """The loss is the one with the number, and its derivative by the factor that of a difference quotient."""
    z = helpers.randn(6, 9, dtype=torch.float64, generator=helpers.generator(0))
    y = helpers.randint(9, (6,), generator=helpers.generator(1))
    factor, logits = learned(2.0, shape), z.clone().requires_grad_()
    criterion = build(factor)
    loss = criterion(logits, y, backend=one_backend.name)
    by_logits, by_factor = torch.autograd.grad(loss, (logits, factor))
    number, gradient = helpers.calculate(z, y, build(2.0), backend=one_backend.name)
    torch.testing.assert_close(loss.detach(), number, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_logits, gradient, rtol=1e-10, atol=1e-14)
    above, below = (helpers.calculate(z, y, build(2.0 + h), backend=one_backend.name)[0] for h in (1e-4, -1e-4))
    torch.testing.assert_close(by_factor.reshape(()).double(), (above - below) / 2e-4, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        factor += 1.0  # what an optimizer does: the sum was made before
    again = criterion(z, y, backend=one_backend.name)
    torch.testing.assert_close(again.detach(), build(3.0)(z, y), rtol=1e-12, atol=0)


@THERE
@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 2)], ids=str)
def test_a_factor_does_not_change_the_loss_s_dtype_and_shape(one_backend, shape):
    logits = torch.randn(shape)
    target = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    for dtype in (torch.float16, torch.float32, torch.float64):
        criterion = torch.ones(1, dtype=dtype) * ak.NCE()
        for reduction in ("mean", "none"):
            loss = criterion(logits, target, reduction=reduction, backend=one_backend.name)
            expected = ak.nce(logits, target, reduction=reduction)
            assert loss.dtype == torch.float32 and loss.shape == expected.shape
            torch.testing.assert_close(loss, expected)


def test_sums_with_tensors_are_values_by_identity():
    factor = learned()
    criterion = factor * ak.NCE() + 3 * ak.MAE()
    assert criterion == factor * ak.NCE() + 3 * ak.MAE()
    assert hash(criterion) == hash(factor * ak.NCE() + 3 * ak.MAE())
    assert criterion != learned() * ak.NCE() + 3 * ak.MAE()
    assert ak.NCE() / factor == ak.NCE() / factor and ak.NCE() / factor != ak.NCE() / learned()
    assert "2." in repr(criterion) and "NCE" in repr(criterion) and "\n" not in repr(criterion)
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(twin(logits, target), criterion(logits, target))
        assert twin != criterion  # its tensor learns by itself
    assert "tensor" in repr(torch.ones((), device="meta") * ak.NCE())


def test_numpy_s_numbers_scale():
    for two in (np.float64(2), np.float32(2), np.int64(2)):
        assert two * ak.NCE() == ak.NCE() * two == 2 * ak.NCE()
        assert ak.NCE() / two == 0.5 * ak.NCE()


CHANGING = {
    "alpha": lambda z, y, a: ak.anl_ce(z, y, alpha=a),
    "sum": lambda z, y, a: (2 * (a * ak.NCE()) + ak.MAE() / a)(z, y),
    "row loss": lambda z, y, a: ak.robust_loss(z, y, a * (ak.RowLoss(lambda s: s.target_prob) + ak.NCE())),
    "entropy": lambda z, y, a: ak.anl_ce(z, y, alpha=a, entropy_weight=a),
}
VALUES = [0.25 + k for k in range(12)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [thorough("alpha", "float"), thorough("alpha", "int"), thorough("alpha", "tensor"), ("sum", "float"),
     thorough("sum", "tensor"), thorough("row loss", "float"), thorough("entropy", "float")],
)  # fmt: skip
def test_a_factor_that_changes_is_compiled_at_most_once_more(name, kind):
    """Dynamo makes a changed number symbolic; an operator that takes it as a number would be compiled for each."""
    z = torch.randn(6, 9, requires_grad=True, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 8, 2, 3, 1, 1])
    torch._dynamo.reset()
    counter = helpers.compile_counter()
    compiled = torch.compile(CHANGING[name], fullgraph=True, backend=counter)
    make = {"float": float, "int": lambda v: int(v + 1), "tensor": learned}[kind]
    for value in map(make, VALUES):
        inputs = (z, value) if kind == "tensor" else (z,)
        losses = compiled(z, y, value), CHANGING[name](z, y, value)
        gradients = [torch.autograd.grad(loss, inputs) for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)
    assert counter.frame_count <= (1 if kind == "tensor" else 2)


def test_a_constant_factor_is_compiled_as_one_operator():
    """The route for factors that change is not that of factors that do not."""
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        lambda z, y: (5 * ak.NCE() + ak.MAE())(z, y), backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    compiled(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    operators = [str(node.target) for node in graphs[0].graph.nodes if "anl_kernels" in str(node.target)]
    assert operators and all("row_loss" in name for name in operators)


@pytest.mark.parametrize(
    "f",
    [
        lambda: 5 * ak.NCE() + ak.MAE(),
        lambda: sum([ak.NCE(), ak.GCE(0.5), 2 * ak.FL(1.0)]),
        lambda: 2 * ak.RowLoss(lambda s: 1 - s.target_prob) - ak.NCE(),
        lambda: (ak.NCE() + ak.NCE()) / 3,
    ],
    ids=["two", "sum", "row loss", "equal"],
)
def test_terms_combine_inside_a_compiled_function(f):
    z, y = torch.randn(6, 9), torch.tensor([0, 8, 2, 3, 1, 1])
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, y: f()(z, y), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, y), f()(z, y))


def test_a_row_loss_made_inside_a_compiled_function_may_hold_tensors():
    """f is tried on one made-up row, which goes with tensors of any length."""
    z, y, share = torch.randn(6, 9), torch.tensor([0, 8, 2, 3, 1, 1]), torch.arange(6.0)
    torch._dynamo.reset()
    loss = lambda z, y, share: ak.RowLoss(lambda s: share * s.target_prob + s.neg_log_sum)(z, y)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, y, share), loss(z, y, share))


def test_a_compiled_row_loss_that_fails_on_a_made_up_row_says_needs():
    z, y, share = torch.randn(6, 9), torch.tensor([0, 8, 2, 3, 1, 1]), torch.arange(6.0)
    torch._dynamo.reset()
    loss = lambda z, y, share: ak.RowLoss(lambda s: torch.dot(share, s.target_prob.float()).expand(6))(z, y)
    with pytest.raises(Exception, match=r"needs=\["):
        torch.compile(loss, fullgraph=True, backend="eager")(z, y, share)
    needs = ["target_prob"]
    loss = lambda z, y, share: ak.RowLoss(lambda s: torch.dot(share, s.target_prob.float()).expand(6), needs=needs)(
        z, y
    )
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(z, y, share), loss(z, y, share))


# ---- nothing outlives its use


class Holder:
    """An f that holds a tensor, as a closure does."""

    def __init__(self):
        self.held = torch.ones(())

    def __call__(self, s):
        return s.target_prob * self.held


STEPS = {
    "bare": lambda f, **k: lambda z, y: ak.RowLoss(f)(z, y, **k),
    "sum": lambda f, **k: lambda z, y: (5 * ak.NCE() + ak.RowLoss(f))(z, y, **k),
    "module": lambda f, **k: ak.RobustLoss(ak.RowLoss(f), **k),
}


@pytest.fixture
def no_gc():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_a_row_loss_and_what_f_holds_are_freed_at_once(one_backend, make, no_gc):
    logits, target, f = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3]), Holder()
    gone = weakref.ref(f), weakref.ref(f.held)
    criterion = make(f, backend=one_backend.name)
    del f
    for _ in range(2):
        criterion(logits.to(one_backend.device), target.to(one_backend.device)).backward()
    del criterion
    assert [one() for one in gone] == [None, None]


def test_sums_of_built_in_terms_are_freed_at_once(no_gc):
    logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    criterion = 5 * ak.NCE() + ak.RCE()
    gone = weakref.ref(criterion)
    criterion(logits, target).backward()
    criterion(logits, target, reduction="sum").backward()
    del criterion
    assert gone() is None


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y, a: ak.anl_ce(z, y, alpha=a),
        lambda z, y, a: ak.sce(z, y, beta=a),
        lambda z, y, a: (a * ak.NCE())(z, y),
        lambda z, y, a: ak.ANLCELoss(a)(z, y),
    ],
    ids=["function", "sce", "factor", "module"],
)
def test_a_factor_is_freed_at_once(loss, no_gc):
    logits, target, factor = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3]), learned()
    gone = weakref.ref(factor)
    loss(logits, target, factor).backward()
    assert factor.grad.isfinite()
    del factor
    assert gone() is None
