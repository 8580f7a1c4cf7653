"""Terms and their algebra; partials written by hand against autograd of the same formula."""

import copy
import io
import pickle

import helpers
import pytest
import torch
from helpers import EXPRESSIONS, dtype_id

import anl_kernels as ak
from anl_kernels.losses import BUILT_IN
from anl_kernels.statistics import STATISTICS, derived_statistic

TERMS = [term() for term in BUILT_IN]


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
        lambda: ak.AMSE(a=0.0),
        lambda: ak.EpsCE(m=0.0),
        lambda: ak.EpsCE(m=torch.inf),
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
    assert pickle.loads(text.replace(b"anl_kernels.losses.robust", b"anl_kernels.terms")) == ak.RCE(0.01)
    with pytest.raises(AttributeError, match="nothing"):
        ak.terms.nothing  # noqa: B018
