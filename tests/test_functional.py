"""The public functions: each is its formula, with its parameters and the keywords that all share."""

import inspect

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import THERE, single

import anl_kernels as ak
from anl_kernels import functional
from anl_kernels.call import checked_call
from anl_kernels.losses import functions

# function -> (its own parameters, the oracle's terms for them)
FUNCTIONS = {
    "cross_entropy": [({}, single("ce"))],
    "nce": [({}, single("nce"))],
    "nnce": [({}, single("nnce"))],
    "focal": [({}, single("fl", gamma=0.5)), ({"gamma": 2.0}, single("fl", gamma=2.0))],
    "nfl": [({}, single("nfl", gamma=0.5)), ({"gamma": 1.0}, single("nfl", gamma=1.0))],
    "nnfl": [({}, single("nnfl", gamma=0.5)), ({"gamma": 1.0}, single("nnfl", gamma=1.0))],
    "mae": [({}, single("mae"))],
    "rce": [({}, single("rce", floor=1e-4)), ({"floor": 1e-2}, single("rce", floor=1e-2))],
    "sce": [
        ({}, ((0.1, "ce", {}), (1.0, "rce", {"floor": 1e-4}))),
        ({"alpha": 6.0, "beta": 0.5, "floor": 1e-3}, ((6.0, "ce", {}), (0.5, "rce", {"floor": 1e-3}))),
    ],
    "gce": [({}, single("gce", q=0.7)), ({"q": 0.3}, single("gce", q=0.3))],
    "agce": [({}, single("agce", a=0.6, q=0.6)), ({"a": 6.0, "q": 1.5}, single("agce", a=6.0, q=1.5))],
    "aul": [({}, single("aul", a=5.5, q=3.0)), ({"a": 6.3, "q": 1.5}, single("aul", a=6.3, q=1.5))],
    "ael": [({}, single("ael", a=2.5)), ({"a": 5.0}, single("ael", a=5.0))],
    "mse": [({}, single("mse"))],
    "amse": [({}, single("amse", a=30.0)), ({"a": 1.0}, single("amse", a=1.0))],
    "jal_ce": [
        ({}, ((1.0, "nce", {}), (1.0, "amse", {"a": 30.0}))),
        ({"alpha": 5.0, "beta": 0.1, "a": 5.0}, ((5.0, "nce", {}), (0.1, "amse", {"a": 5.0}))),
    ],
    "jal_fl": [
        ({}, ((1.0, "nfl", {"gamma": 0.5}), (1.0, "amse", {"a": 30.0}))),
        ({"alpha": 5.0, "a": 20.0, "gamma": 2.0}, ((5.0, "nfl", {"gamma": 2.0}), (1.0, "amse", {"a": 20.0}))),
    ],
    "eps_ce": [({}, single("eps_ce", m=1e5)), ({"m": 3.0}, single("eps_ce", m=3.0))],
    "anl_ce": [
        ({}, ((1.0, "nce", {}), (1.0, "nnce", {}))),
        ({"alpha": 5.0, "beta": 2.0}, ((5.0, "nce", {}), (2.0, "nnce", {}))),
    ],
    "anl_fl": [
        ({}, ((1.0, "nfl", {"gamma": 0.5}), (1.0, "nnfl", {"gamma": 0.5}))),
        ({"alpha": 5.0, "beta": 2.0, "gamma": 2.0}, ((5.0, "nfl", {"gamma": 2.0}), (2.0, "nnfl", {"gamma": 2.0}))),
    ],
}
SHARED = {
    "weight": None,
    "ignore_index": -100,
    "reduction": "mean",
    "entropy_weight": 0.0,
    "min_prob": 1e-7,
    "inplace": False,
    "recompute": None,
    "backend": "auto",
    "class_group": None,
    "batch_group": None,
    "input": None,
}
CALLS = [(name, parameters, terms) for name, cases in FUNCTIONS.items() for parameters, terms in cases]


def differentiate(function, logits, *args, **keywords):
    logits = logits.detach().requires_grad_()
    loss = function(logits, *args, **keywords)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


@THERE
@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize(
    ("name", "parameters", "terms"), CALLS, ids=[f"{n}{list(p.values()) or ''}" for n, p, _ in CALLS]
)
def test_every_function(one_backend, name, parameters, terms):
    values, labels = helpers.rows_of_every_kind(23, torch.float32)
    weight = helpers.rand(23, generator=helpers.generator(0)) + 0.5
    for keywords in (
        dict(),
        dict(reduction="sum", min_prob=1e-3, entropy_weight=0.5),
        dict(reduction="none", weight=weight, ignore_index=int(labels[0])),
    ):
        values_ = helpers.away_from_clamp(values, keywords.get("min_prob", 1e-7))
        result = differentiate(getattr(ak, name), values_, labels, **parameters, backend=one_backend.name, **keywords)
        helpers.assert_as_accurate(*result, labels, helpers.truth(values_, labels, terms, **keywords))


@pytest.mark.parametrize("name", [*FUNCTIONS, "robust_loss"])
def test_every_function_takes_the_shared_keywords(name):
    parameters = inspect.signature(getattr(ak, name)).parameters
    for keyword, default in SHARED.items():
        assert parameters[keyword].default == default, keyword


@THERE
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 5), (5,), (4, 5, 3), (2, 5, 3, 2)], ids=str)
def test_cross_entropy_is_torchs(one_backend, reduction, shape):
    """A stranger's check: no oracle, torch itself; weight, ignore_index, shapes and reductions mean the same."""
    g = helpers.generator(0)
    logits, weight = (
        helpers.randn(shape, generator=g, dtype=torch.float64),
        helpers.rand(5, generator=g, dtype=torch.float64),
    )
    target = helpers.randint(5, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=g)
    if target.dim():
        target.view(-1)[1] = 2
    for keywords in (dict(), dict(weight=weight), dict(ignore_index=2), dict(weight=weight, ignore_index=2)):
        ours = differentiate(
            ak.cross_entropy, logits, target, reduction=reduction, backend=one_backend.name, **keywords
        )
        theirs = differentiate(F.cross_entropy, logits, target, reduction=reduction, **keywords)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@THERE
def test_mse_is_torchs(one_backend):
    """A stranger's check: the sum over the classes, K times the mean that torch takes."""
    logits = helpers.randn(6, 5, generator=helpers.generator(0), dtype=torch.float64)
    target = helpers.randint(5, (6,), generator=helpers.generator(1))

    def theirs(logits, target):
        return 5 * F.mse_loss(logits.softmax(1), F.one_hot(target, 5).to(logits))

    ours = differentiate(ak.mse, logits, target, backend=one_backend.name)
    torch.testing.assert_close(ours, differentiate(theirs, logits, target), rtol=1e-12, atol=1e-14)


@THERE
def test_anl_ce_is_the_authors_code(one_backend):
    """Their two losses as published (one-hot, clamp, log), alpha and beta 5."""

    def authors(pred, labels, min_prob=1e-7):
        hot = F.one_hot(labels, pred.shape[1])
        log_p = F.log_softmax(pred, dim=1)
        nce = -1 * torch.sum(hot * log_p, dim=1) / (-log_p.sum(dim=1))
        p = F.softmax(pred, dim=1).clamp(min=min_prob, max=1)
        negative = torch.tensor(min_prob, dtype=p.dtype).log() - p.log()
        return (5 * nce + 5 * (1 - (hot * negative).sum(dim=1) / negative.sum(dim=1))).mean()

    logits = helpers.randn(20, 10, dtype=torch.float64, generator=helpers.generator(3)) * 5
    labels = helpers.randint(10, (20,), generator=helpers.generator(4))
    ours = differentiate(ak.anl_ce, logits, labels, alpha=5.0, beta=5.0, backend=one_backend.name)
    torch.testing.assert_close(ours, differentiate(authors, logits, labels), rtol=1e-11, atol=1e-15)


def test_l1_penalty():
    parameters = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    penalty = ak.l1_penalty(iter(parameters))
    torch.testing.assert_close(penalty, sum(p.detach().abs().sum() for p in parameters))
    penalty.backward()
    for parameter in parameters:
        assert torch.equal(parameter.grad, parameter.detach().sign())
    layer = torch.nn.Linear(3, 2)
    assert torch.equal(ak.l1_penalty(layer), ak.l1_penalty(layer.parameters())) and ak.l1_penalty(layer) > 0
    assert ak.l1_penalty(torch.full((7000,), -10.0, dtype=torch.float16)).item() == 70_000  # more than float16 holds
    assert ak.l1_penalty([]) == 0


def test_robust_loss_and_a_call_of_the_expression_are_one():
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    criterion = 2 * ak.NCE() + 3 * ak.RCE()
    keywords = dict(reduction="sum", min_prob=1e-4, ignore_index=3)
    assert torch.equal(criterion(logits, target, **keywords), ak.robust_loss(logits, target, criterion, **keywords))
    assert torch.equal(ak.NCE()(logits, target), ak.nce(logits, target))


@THERE
def test_a_term_alone_is_an_expression(one_backend):
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    assert torch.equal(
        ak.robust_loss(logits, target, ak.MAE(), backend=one_backend.name),
        ak.mae(logits, target, backend=one_backend.name),
    )


@pytest.mark.parametrize("name", [*FUNCTIONS, "robust_loss"])
def test_the_logits_may_be_called_input(name):
    """As F.cross_entropy calls them; the signature stays that of logits and target."""
    function = getattr(ak, name)
    more = {"expression": ak.NCE()} if name == "robust_loss" else {}
    expected = function(LOGITS, TARGET, **more)
    assert torch.equal(function(input=LOGITS, target=TARGET, **more), expected)
    assert torch.equal(function(logits=LOGITS, target=TARGET, **more), expected)
    for wrong, message in (
        (dict(input=LOGITS, logits=LOGITS, target=TARGET), "twice"),
        (dict(input=LOGITS), "target must be a tensor"),
        (dict(target=TARGET), "logits must be a tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            function(**wrong, **more)
    parameters = inspect.signature(function).parameters
    assert parameters["logits"].default is parameters["target"].default is inspect.Parameter.empty


# ---- keywords that are checked


def call(expression=None, **keywords):
    values = dict(ignore_index=-100, reduction="mean", entropy_weight=0.0, min_prob=1e-7, inplace=False)
    values |= dict(recompute=None, backend="auto", class_group=None, batch_group=None)
    return checked_call(expression or ak.NCE(), **{**values, **keywords})


LOGITS, TARGET = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(recompute="yes"), TypeError, "recompute must be True, False or None, got 'yes'"),
        (dict(recompute=1), TypeError, "recompute"),
        (dict(inplace="no"), TypeError, "inplace must be True or False, got 'no'"),
        (dict(ignore_index=True), TypeError, "ignore_index"),
        (dict(ignore_index=1.0), TypeError, "ignore_index"),
        (dict(ignore_index=torch.tensor(1)), TypeError, "ignore_index"),
        (dict(class_group="world"), ValueError, "class_group must be a torch.distributed process group .* got str"),
        (dict(batch_group="world"), ValueError, "batch_group must be a torch.distributed process group .* got str"),
        (dict(batch_group=0), ValueError, "batch_group must be a torch.distributed process group .* got int"),
        (dict(backend="nonsense"), ValueError, "no such backend"),
        (dict(entropy_weight=True), TypeError, "entropy_weight must be a number, got bool"),
        (dict(entropy_weight=float("inf")), ValueError, "entropy_weight must be finite"),
        (dict(entropy_weight=float("nan")), ValueError, "entropy_weight must be finite"),
        (dict(min_prob="1e-7"), TypeError, "min_prob must be a number, got str"),
        (dict(min_prob=0.0), ValueError, "min_prob must be between 0 and 1"),
        (dict(min_prob=1.0), ValueError, "min_prob must be between 0 and 1"),
        (dict(min_prob=float("nan")), ValueError, "min_prob must be between 0 and 1"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_keyword_s_value_is_checked(keywords, error, message):
    with pytest.raises(error, match=message):
        ak.anl_ce(LOGITS, TARGET, **keywords)
    with pytest.raises(error, match=message):
        ak.ANLCELoss(**keywords)  # when it is made


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [("recompute", True, 1), ("inplace", False, 0), ("ignore_index", 1, True), ("ignore_index", 1, 1.0),
     ("entropy_weight", 1.0, True)],
)  # fmt: skip
def test_a_keyword_s_value_is_checked_though_an_equal_one_is_kept(name, right, wrong):
    loss, target = ak.NCE() + 7 * ak.MAE(), torch.tensor([0, 1, 2, 3])
    loss(LOGITS, target, **{name: right})
    with pytest.raises(TypeError, match=name):
        loss(LOGITS, target, **{name: wrong})


@pytest.mark.parametrize("name", ["gce", "nfl", "aul", "anl_fl", "ael"])
def test_a_parameter_s_type_is_checked_though_an_equal_one_is_kept(name):
    function, parameter = getattr(ak, name), {"gce": "q", "aul": "q", "ael": "a"}.get(name, "gamma")
    function(LOGITS, TARGET, **{parameter: 1})
    with pytest.raises(TypeError, match=f"{parameter} must be a number, got bool"):
        function(LOGITS, TARGET, **{parameter: True})


@pytest.mark.parametrize("function", [ak.anl_ce, ak.anl_fl, ak.sce])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_coefficient_is_a_finite_number_or_one_element(function, name):
    function(LOGITS, TARGET, **{name: 1})  # kept: what equals it is checked all the same
    for wrong in (True, np.True_, None, "1", [1.0], torch.tensor(1)):
        with pytest.raises(TypeError, match=f"{name} must be a number or a tensor with one element"):
            function(LOGITS, TARGET, **{name: wrong})
    for wrong in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            function(LOGITS, TARGET, **{name: wrong})
    with pytest.raises(ValueError, match=rf"{name} must be .* got a tensor of shape \(5,\) .*keyword weight"):
        function(LOGITS, TARGET, **{name: torch.ones(5)})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(weight=torch.ones(5, requires_grad=True)), ValueError, r"requires grad: pass weight\.detach\(\)"),
        (dict(weight=torch.ones(4)), ValueError, r"shape \(5,\)"),
        (dict(weight=torch.ones(5, 1)), ValueError, r"shape \(5,\)"),
        (dict(weight=torch.ones(5).long()), TypeError, "weight must be floating point"),
        (dict(weight=[1.0] * 5), TypeError, "weight must be a tensor"),
        (dict(weight=torch.ones(5, device="meta")), ValueError, "weight is on meta"),
        (dict(target=TARGET.to("meta")), ValueError, "target is on meta"),
        (dict(target=TARGET.float()), TypeError, "class indices"),
        (dict(target=TARGET[:3]), ValueError, "target must have the shape"),
        (dict(logits=LOGITS[:, :1]), ValueError, "at least 2 classes"),
        (dict(logits=LOGITS[:, :4], min_prob=0.25), ValueError, "choose it below 1/4"),
        (dict(logits=LOGITS.to_sparse()), TypeError, "dense"),
        (dict(logits=LOGITS.long()), TypeError, "logits must be float16"),
        (dict(logits=torch.tensor(1.0)), ValueError, "without dimensions"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_a_call_cannot_be_of_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ak.anl_ce(**dict(logits=LOGITS, target=TARGET) | arguments)


def test_a_clamp_just_below_a_uniform_row_is_none():
    logits, target = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([2])
    torch.testing.assert_close(ak.nnce(logits, target, min_prob=0.2499).item(), 0.75)


def test_what_is_kept_is_bounded():
    expression = 2 * ak.NCE() + ak.MAE()
    known = [inspect.getclosurevars(f).nonlocals["known"] for f in (functions.one, functions.pair)]
    for k in range(2 * functional.CACHE_SIZE + 7):
        expression(LOGITS, TARGET, ignore_index=-1 - k)
        ak.gce(LOGITS, TARGET, q=1 + k / 1024)
        ak.anl_ce(LOGITS, TARGET, beta=1 + k / 1024)
    for kept in (expression.calls, *known):
        assert 0 < len(kept) <= functional.CACHE_SIZE


def test_a_call_is_a_value():
    one = call(ak.NCE() + ak.NNCE(), recompute=True)
    other = one.variant(recompute=None, reduction="none")
    assert (one.recompute, one.reduction, other.recompute, other.reduction) == (True, "mean", None, "none")
    assert one.deferred and other.deferred and not one.variant(recompute=False).deferred
    assert other.terms is one.terms and [(t.kind, t.factor) for t in one.terms] == [(1, 1.0), (2, 1.0)]
    with pytest.raises(AttributeError):
        one.reduction = "sum"


def test_ignore_index_is_any_integer():
    for two in (np.int64(2), np.uint8(2)):
        assert torch.equal(ak.nce(LOGITS, TARGET, ignore_index=two), ak.nce(LOGITS, TARGET, ignore_index=2))
        assert type(call(ignore_index=two).ignore_index) is int


CLAMPED = [ak.NNCE(), ak.NNFL(), ak.RCE(), ak.NCE() + ak.NNCE(), ak.RowLoss(lambda s: s.above_mass)]
UNCLAMPED = [ak.CE(), ak.NCE(), ak.NFL(), ak.MAE(), ak.GCE(), ak.RowLoss(lambda s: s.target_prob)]


@pytest.mark.parametrize("loss", [*CLAMPED, *UNCLAMPED], ids=repr)
def test_the_clamp_is_checked_only_where_a_loss_has_one(one_backend, loss):
    """K * min_prob >= 1: ten million classes and the default, or these three."""
    clamp = call(loss, min_prob=0.5).clamp
    logits, target = LOGITS[:, :3].contiguous(), TARGET.clamp(max=2)
    if loss in CLAMPED:
        assert clamp == 0.5
        with pytest.raises(ValueError, match="min_prob"):
            loss(logits, target, min_prob=0.5, backend=one_backend.name)
        return
    assert clamp == 0.0
    result = helpers.calculate(logits, target, loss, min_prob=0.5, backend=one_backend.name)
    torch.testing.assert_close(result, helpers.calculate(logits, target, loss, backend=one_backend.name))


def test_many_classes_without_a_clamp():
    logits = torch.zeros(1, 20_000_000, dtype=torch.bfloat16)
    target = torch.tensor([7])
    torch.testing.assert_close(ak.cross_entropy(logits, target), torch.tensor(2e7).log())
    with pytest.raises(ValueError, match="min_prob"):
        ak.nnce(logits, target)


def test_nothing_of_the_caller_s_is_kept():
    """A loss is kept by its numbers; one with a function or a tensor is not kept at all."""
    kept = inspect.getclosurevars(functions.pair).nonlocals["known"]
    before = len(kept)
    ak.anl_ce(LOGITS, TARGET, alpha=torch.tensor(2.5))
    assert len(kept) == before
    ak.anl_ce(LOGITS, TARGET, alpha=2.53125)
    assert len(kept) == before + 1
    terms = inspect.getclosurevars(functional._expression_of).nonlocals["known"]
    before = len(terms)
    ak.RowLoss(lambda s: s.lse)(LOGITS, TARGET)
    assert len(terms) == before
