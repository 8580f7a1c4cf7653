"""Terms and their algebra; partials written by hand against autograd of the same formula."""

import copy
import gc
import io
import pickle
import weakref

import helpers
import numpy as np
import oracle
import pytest
import torch
from helpers import EXPRESSIONS, THERE, dtype_id
from tiers import thorough

import anl_kernels as ak
from anl_kernels.statistics import STATISTICS, derived_statistic

TERMS = [
    ak.CE(),
    ak.NCE(),
    ak.NNCE(),
    ak.FL(),
    ak.NFL(),
    ak.NNFL(),
    ak.MAE(),
    ak.RCE(),
    ak.GCE(),
    ak.AGCE(),
    ak.AUL(),
    ak.AEL(),
]


# ---- partials by hand == autograd of f


@pytest.mark.few(dtype=[torch.float32], name=["anl_fl", "everything"])
@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_fused_gradient_is_autograds_of_the_formula(backend, name, dtype):
    """One kernel with partials by hand, `RowLoss(term.value)` with partials by autograd, and the oracle."""
    values, labels = helpers.batch(19, dtype)
    terms = EXPRESSIONS[name]
    true = helpers.truth(values, labels, terms)
    for criterion in (helpers.expression(terms), helpers.row_loss_expression(terms)):
        result = helpers.calculate(values, labels, criterion, backend=backend.name)
        helpers.assert_as_accurate(*result, labels, true)


def test_a_loss_of_ones_own(backend):
    """A formula the package does not have, over statistics of every kind, against the same by plain autograd."""
    z = helpers.randn(9, 13, dtype=torch.float64, generator=helpers.generator(0)) * 8
    y = helpers.randint(13, (9,), generator=helpers.generator(1))
    min_prob, floor = 1e-5, -torch.tensor(1e-5, dtype=torch.float64).log()

    def mine(s):
        return (
            s.target_log_prob.square() / s.neg_log_sum
            + 0.1 * s.above_sum.sqrt()
            + s.above_mass / (1 + s.target_prob)
            + 1e-3 * s.lse
        )

    def plain(z):
        log_p = z.log_softmax(1)
        above = (log_p > -floor).detach()
        l_y, p_y = oracle.take(log_p, y), oracle.take(log_p, y).exp()
        u, mass = (above * (floor + log_p)).sum(1), (above * log_p.exp()).sum(1)
        return l_y.square() / -log_p.sum(1) + 0.1 * u.sqrt() + mass / (1 + p_y) + 1e-3 * z.logsumexp(1)

    given = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain(given).mean(), given)
    loss, grad = helpers.calculate(z, y, ak.RowLoss(mine), min_prob=min_prob, backend=backend.name)
    torch.testing.assert_close(loss, plain(z).mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-15)


@THERE
def test_what_a_loss_sees(one_backend):
    """Every statistic, against its definition."""
    z = helpers.randn(6, 11, dtype=torch.float64, generator=helpers.generator(0)) * 9
    y = helpers.randint(11, (6,), generator=helpers.generator(1))
    z[2, (y[2] + 1) % 11] = -torch.inf
    gamma, min_prob, seen = 0.8, 1e-4, {}
    names = "lse target_logit neg_log_sum above_sum above_mass focal_sum focal_above_sum target_log_prob target_prob"
    names = [*names.split(), "above_count", "target_above", "num_classes", "log_floor"]

    def spy(s):
        seen.update({name: torch.as_tensor(getattr(s, name), dtype=torch.float64).detach() for name in names})
        return s.lse

    ak.robust_loss(z, y, ak.RowLoss(spy, gamma=gamma), min_prob=min_prob, backend=one_backend.name)
    l = z.log_softmax(1)
    p, exists, above = l.exp(), z.isfinite(), l > torch.tensor(min_prob).log()
    w, zero = (1 - p) ** gamma, torch.zeros(())
    height = -((1 - min_prob) ** gamma) * torch.tensor(min_prob, dtype=torch.float64).log()
    log_floor = torch.tensor(min_prob, dtype=torch.float64).log()
    expected = {
        "lse": z.logsumexp(1),
        "target_logit": oracle.take(z, y),
        "neg_log_sum": -l.where(exists, zero).sum(1),
        "above_sum": (l - log_floor).where(above, zero).sum(1),
        "above_mass": p.where(above, zero).sum(1),
        "focal_sum": -(w * l).where(exists, zero).sum(1),
        "focal_above_sum": (height + w * l).where(above, zero).sum(1),
        "target_log_prob": oracle.take(l, y),
        "target_prob": oracle.take(p, y),
        "above_count": above.sum(1).double(),
        "target_above": oracle.take(above, y).double(),
        "num_classes": exists.sum(1).double(),
        "log_floor": log_floor,
    }
    for name in names:
        torch.testing.assert_close(
            seen[name].expand_as(expected[name]),
            expected[name],
            rtol=1e-12,
            atol=1e-13,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_row_loss_joins_a_sum(one_backend):
    values, labels = helpers.batch(19, torch.float32)
    mixed = 2 * ak.NCE() + 0.5 * ak.RowLoss(lambda s: 1 - s.target_prob)
    result = helpers.calculate(values, labels, mixed, backend=one_backend.name)
    helpers.assert_as_accurate(*result, labels, helpers.truth(values, labels, ((2.0, "nce", {}), (0.5, "mae", {}))))


def test_row_loss_that_ignores_its_statistics(one_backend):
    """A constant, or a loss of one statistic: the partials that autograd does not give are zero."""
    z, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss, grad = helpers.calculate(
        z, y, ak.RowLoss(lambda s: s.lse * 0 + 2.0), reduction="sum", backend=one_backend.name
    )
    assert loss == 8
    assert (grad == 0).all()


def test_row_loss_with_focal_statistics_needs_a_gamma():
    with pytest.raises(ValueError, match="gamma"):
        ak.RowLoss(lambda s: s.focal_sum)(torch.randn(2, 3), torch.tensor([0, 1]))


@THERE
def test_a_row_loss_with_learned_parameters(one_backend):
    """f may hold tensors that learn: their gradients come too."""
    z, y = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 6])
    sharpness = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    criterion = ak.RowLoss(lambda s: (1 - s.target_prob**sharpness) / sharpness)
    logits = z.clone().requires_grad_()
    criterion(logits, y, backend=one_backend.name).backward()
    expected, by_q = z.clone().requires_grad_(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    ((1 - oracle.take(expected.softmax(1), y) ** by_q) / by_q).mean().backward()
    torch.testing.assert_close(logits.grad, expected.grad)
    torch.testing.assert_close(sharpness.grad, by_q.grad)


def test_a_module_as_f_belongs_to_the_loss():
    class Tempered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Parameter(torch.tensor(0.7))

        def forward(self, s):
            return (1 - s.target_prob**self.q) / self.q

    module = ak.RobustLoss(ak.NCE() + ak.RowLoss(Tempered()))
    assert len(list(module.parameters())) == 1
    module(torch.randn(3, 4), torch.tensor([0, 1, 2])).backward()
    assert next(module.parameters()).grad.isfinite()


@THERE
def test_statistics_read_under_a_condition(one_fused):
    """What f did not read when it was made is not computed: an error that says how to ask for it."""
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])

    def f(s, calls=[]):  # noqa: B006
        calls.append(1)
        return s.lse if len(calls) == 1 else s.lse + s.above_sum

    with pytest.raises(RuntimeError, match="needs"):
        ak.RowLoss(f)(logits, target, backend=one_fused.name)
    named = ak.RowLoss(lambda s: s.lse + s.above_sum, needs=["lse", "above_sum"])
    assert named(logits, target, backend=one_fused.name).isfinite()


@THERE
def test_a_row_loss_that_fails_on_a_made_up_row_may_read_all(one_backend):
    """f holds a tensor of as many numbers as there are rows."""
    values, labels = helpers.rows_of_every_kind(7, torch.float64, kinds=("normal", "peaked", "mixed"))
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for read, gamma in (
        (lambda s: s.neg_log_sum + s.above_sum, None),
        (lambda s: s.other_above_mass, None),
        (lambda s: s.focal_sum + s.focal_above_sum, 0.5),
    ):
        needs = ["neg_log_sum", "above_sum", "other_above_mass", *(["focal_sum", "focal_above_sum"] if gamma else [])]
        fails = ak.RowLoss(lambda s, read=read: weight * read(s).view(3), gamma=gamma)
        named = ak.RowLoss(lambda s, read=read: weight * read(s), gamma=gamma, needs=needs)
        losses = [f(values, labels, backend=one_backend.name) for f in (fails, named)]
        torch.testing.assert_close(*losses, rtol=1e-13, atol=0)


def test_another_f_holds_from_the_next_call_on():
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss = ak.RowLoss(lambda s: s.target_prob)
    loss(logits, target)
    loss.f = lambda s: 1 - s.target_prob
    torch.testing.assert_close(loss(logits, target), ak.mae(logits, target))


def test_a_confident_row_keeps_its_digits(one_backend):
    """1 - p of p near 1, in the coefficients that are made of a table."""
    row = torch.tensor([0.25, -0.5, 0.0, 20.75, -1.25], dtype=torch.float64)
    for name in ("ce", "nce", "fl", "mae"):
        loss, grad = oracle.exact(row.tolist(), 3, EXPRESSIONS[name])
        criterion = helpers.row_loss_expression(EXPRESSIONS[name])
        got = helpers.calculate(row, torch.tensor(3), criterion, backend=one_backend.name)
        expected = torch.tensor(loss, dtype=torch.float64), torch.tensor(grad, dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_unknown_statistics_are_named():
    with pytest.raises(AttributeError, match="neg_log_sum"):
        ak.RowLoss(lambda s: s.nothing)(torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="nothing"):
        ak.RowLoss(lambda s: s.lse, needs=["nothing"])


@THERE
@pytest.mark.parametrize(
    "f",
    [lambda s: s.lse.sum(), lambda s: 1.0, lambda s: None, lambda s: s.lse.unsqueeze(0)],
    ids=["sum", "number", "none", "shape"],
)
def test_a_row_loss_gives_one_number_a_row(one_backend, f):
    with pytest.raises(ValueError, match="one number per row"):
        ak.RowLoss(f)(torch.randn(2, 3), torch.tensor([0, 1]), backend=one_backend.name)


# ---- the algebra


def value(criterion, **keywords):
    logits = helpers.randn(6, 9, dtype=torch.float64, generator=helpers.generator(0))
    target = helpers.randint(9, (6,), generator=helpers.generator(1))
    return torch.cat([x.reshape(-1) for x in helpers.calculate(logits, target, criterion, **keywords)])


def test_linear(one_backend):
    a, b = ak.NCE(), ak.RCE()
    both = value(3 * a + 0.5 * b, backend=one_backend.name)
    apart = 3 * value(a, backend=one_backend.name) + 0.5 * value(b, backend=one_backend.name)
    torch.testing.assert_close(both, apart, rtol=1e-12, atol=1e-14)


def test_ways_to_write_a_sum():
    nce, nnce = ak.NCE(), ak.NNCE()
    expected = value(2 * nce + 3 * nnce)
    for criterion in (
        nce * 2 + nnce * 3,
        nce + nce + nnce * 3.0,
        (nce + 1.5 * nnce) * 2,
        2 * (nce + 1.5 * nnce),
        sum([nce, nce, 3 * nnce]),
        3 * (nce + nnce) - nce,
        (4 * nce + 6 * nnce) / 2,
        -(-2 * nce - 3 * nnce),
    ):
        torch.testing.assert_close(value(criterion), expected, rtol=1e-13, atol=1e-15)


def test_two_gammas_are_refused():
    for criterion in (
        lambda: ak.FL(gamma=0.5) + ak.NFL(gamma=2.0),
        lambda: ak.NFL(gamma=0.5) + ak.RowLoss(lambda s: s.focal_sum, gamma=1.0),
        lambda: ak.FL(gamma=0.5) + ak.FL(gamma=2.0),  # not equal terms, of which one would be left
    ):
        with pytest.raises(ValueError, match="gamma"):
            criterion()(torch.randn(2, 3), torch.tensor([0, 1]))
    (ak.FL(gamma=2.0) + ak.NFL(gamma=2.0) + ak.CE())(torch.randn(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("term", TERMS, ids=lambda t: type(t).__name__)
def test_terms_are_values(term):
    again = type(term)()
    assert term == again and hash(term) == hash(again) and term is not again
    assert type(term).__name__ in repr(term)
    assert eval(repr(term), vars(ak)) == term
    assert copy.deepcopy(term) == term
    assert pickle.loads(pickle.dumps(term)) == term
    fields = getattr(term, "__dataclass_fields__", {})
    for field in fields or ["anything"]:
        with pytest.raises(AttributeError):
            setattr(term, field, 3.0)


def test_expressions_are_values():
    assert 2 * ak.NCE() + ak.RCE() == 2 * ak.NCE() + ak.RCE()
    assert hash(2 * ak.NCE() + ak.RCE()) == hash(2 * ak.NCE() + ak.RCE())
    assert 2 * ak.NCE() != 3 * ak.NCE()
    assert ak.GCE(q=0.7) != ak.GCE(q=0.6) and ak.AGCE() != ak.AUL()
    both = pickle.loads(pickle.dumps(2 * ak.NCE() + ak.RCE()))
    assert both == 2 * ak.NCE() + ak.RCE()
    assert "NCE" in repr(both) and "RCE" in repr(both) and "2" in repr(both)


@pytest.mark.parametrize("wrong", [None, "NCE", object(), torch.tensor(1.0), 1.0, True], ids=lambda x: type(x).__name__)
def test_only_terms_add(wrong):
    for total in (lambda: ak.NCE() + wrong, lambda: wrong + ak.NCE(), lambda: ak.NCE() - wrong):
        with pytest.raises(TypeError):
            total()


def test_only_numbers_scale():
    with pytest.raises(TypeError):
        ak.NCE() * ak.NNCE()
    with pytest.raises(TypeError):
        "2" * ak.NCE()
    for wrong in (True, None, "2", torch.tensor(2), torch.tensor(True)):
        for product in (lambda x: x * ak.NCE(), lambda x: ak.NCE() * x, lambda x: ak.NCE() / x):
            with pytest.raises(TypeError):
                product(wrong)
    for wrong in (torch.ones(5), torch.ones(0), torch.nan, torch.inf):
        for product in (lambda x: x * ak.NCE(), lambda x: ak.NCE() * x, lambda x: ak.NCE() / x):
            with pytest.raises(ValueError, match="of a loss must be"):
                product(wrong)
    with pytest.raises(TypeError):
        torch.tensor(2.0) / ak.NCE()


@pytest.mark.parametrize("wrong", [None, "anl_ce", lambda s: s.lse, 3.0], ids=lambda x: type(x).__name__)
def test_a_criterion_is_an_expression(wrong):
    with pytest.raises(TypeError):
        ak.robust_loss(torch.randn(2, 3), torch.tensor([0, 1]), wrong)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ak.FL(gamma=-1.0),
        lambda: ak.NFL(gamma=float("nan")),
        lambda: ak.GCE(q=0.0),
        lambda: ak.GCE(q=-1.0),
        lambda: ak.RCE(floor=0.0),
        lambda: ak.RCE(floor=1.5),
        lambda: ak.RCE(floor=1.0),
        lambda: ak.AUL(a=1.0),
        lambda: ak.FL(gamma=torch.inf),
        lambda: ak.GCE(q=torch.inf),
        lambda: ak.AGCE(a=torch.inf),
        lambda: ak.RowLoss(lambda s: s.focal_sum, gamma=torch.nan),
        lambda: ak.AEL(a=0.0),
        lambda: ak.AGCE(a=1.0, q=0.0),
        lambda: ak.AUL(a=0.5, q=3.0),
        lambda: ak.AUL(a=5.5, q=0.0),
    ],
)
def test_parameters_without_meaning_are_refused(build):
    with pytest.raises(ValueError, match=r"\w"):
        build()


@pytest.mark.parametrize("wrong", [True, "1", None, torch.tensor(1.0)], ids=lambda x: type(x).__name__)
def test_parameters_are_numbers(wrong):
    for build in (lambda: ak.GCE(q=wrong), lambda: ak.NFL(gamma=wrong), lambda: ak.AGCE(a=wrong)):
        with pytest.raises(TypeError, match="must be a number"):
            build()


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


# ---- long sums, and sums of equal terms


def test_equal_terms_are_one():
    assert 5 * ak.NCE() + 5 * ak.NCE() == 10 * ak.NCE()
    assert ak.GCE(0.5) + ak.MAE() + ak.GCE(0.5) - ak.MAE() / 2 == 2 * ak.GCE(0.5) + 0.5 * ak.MAE()
    assert len((ak.GCE(0.5) + ak.GCE(0.7) + ak.FL(1.0) + ak.NFL(1.0)).terms) == 4
    one, other = (ak.RowLoss(lambda s: s.lse) for _ in range(2))
    assert len((one + other + one).terms) == 2
    with pytest.raises(ValueError, match="at least one"):
        ak.Expression(())


def test_a_long_sum_runs_fused(one_fused):
    """More terms than the kernels' program holds: statistics, f in PyTorch, gradient."""
    criterion = sum(ak.GCE(0.1 * k) for k in range(1, 18))
    assert len(criterion.terms) == 17 and not criterion.built_in
    assert sum(ak.GCE(0.1 * k) for k in range(1, 17)).built_in
    values, labels = helpers.batch(19, torch.float32)
    terms = tuple((1.0, "gce", {"q": 0.1 * k}) for k in range(1, 18))
    result = helpers.calculate(values, labels, criterion, backend=one_fused.name)
    helpers.assert_as_accurate(*result, labels, helpers.truth(values, labels, terms))


# ---- statistics of one's own


def test_a_statistic_is_declared_beside_the_loss_that_reads_it(one_backend):
    """What it reads says what the kernels must sum up; it is documented with the others."""

    @derived_statistic("above_sum", "above_count", doc="U / n, held constant", constant=True)
    def mean_height(s):
        return (s.above_sum / s.above_count).detach()

    try:
        loss, same = (
            ak.RowLoss(lambda s: s.lse * s.mean_height),
            ak.RowLoss(lambda s: s.lse * (s.above_sum / s.above_count).detach()),
        )
        assert "above_sum" in loss.reads and "mean_height" in ak.Statistics.__doc__
        values, labels = helpers.batch(19, torch.float32)
        for got, want in zip(*(helpers.calculate(values, labels, x, backend=one_backend.name) for x in (loss, same))):
            torch.testing.assert_close(got, want)
    finally:
        del STATISTICS["mean_height"]


# ---- files


@pytest.mark.parametrize("term", TERMS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("factor", [None, 5.0, torch.tensor(2.0)], ids=["term", "number", "tensor"])
def test_a_saved_loss_is_loaded_by_default(term, factor):
    """torch.load's default is weights_only=True."""
    loss = term if factor is None else factor * term + ak.CE()
    file = io.BytesIO()
    torch.save({"loss": loss}, file)
    file.seek(0)
    loaded = torch.load(file)["loss"]
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert repr(loaded) == repr(loss) and torch.equal(loaded(logits, target), loss(logits, target))


def test_a_loss_saved_where_the_losses_once_were_is_loaded():
    text = pickle.dumps(ak.RCE(0.01), protocol=0)
    assert pickle.loads(text.replace(b"anl_kernels.losses", b"anl_kernels.terms")) == ak.RCE(0.01)
    with pytest.raises(AttributeError, match="nothing"):
        ak.terms.nothing  # noqa: B018
