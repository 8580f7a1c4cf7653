"""The nn.Modules: the functions with their keywords remembered, and nothing to save."""

import copy
import pickle

import helpers
import pytest
import torch

import anl_kernels as ak
from anl_kernels import modules

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 4, -100, 2, 3])
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1])

MODULES = {
    "anl_ce": (
        lambda **k: ak.ANLCELoss(alpha=5.0, beta=2.0, **k),
        lambda **k: ak.anl_ce(LOGITS, TARGET, alpha=5.0, beta=2.0, **k),
    ),
    "anl_fl": (
        lambda **k: ak.ANLFLLoss(alpha=2.0, beta=1.0, gamma=1.0, **k),
        lambda **k: ak.anl_fl(LOGITS, TARGET, alpha=2.0, beta=1.0, gamma=1.0, **k),
    ),
    "robust": (
        lambda **k: ak.RobustLoss(5 * ak.NCE() + 0.5 * ak.RCE(), **k),
        lambda **k: ak.robust_loss(LOGITS, TARGET, 5 * ak.NCE() + 0.5 * ak.RCE(), **k),
    ),
}
KEYWORDS = [
    dict(),
    dict(reduction="sum", entropy_weight=0.5),
    dict(reduction="none", weight=WEIGHT),
    dict(ignore_index=2, min_prob=1e-3),
    dict(backend="reference"),
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("keywords", KEYWORDS, ids=lambda k: "-".join(k) or "default")
def test_a_module_is_its_function(name, keywords):
    module, function = MODULES[name]
    target_ok = TARGET.where(TARGET >= 0, keywords.get("ignore_index", -100))
    expected = function(**keywords) if (target_ok == TARGET).all() else None
    if expected is None:
        with pytest.raises(IndexError):
            module(**keywords)(LOGITS, TARGET)
    else:
        assert torch.equal(module(**keywords)(LOGITS, TARGET), expected)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_to_save(name):
    module = MODULES[name][0]()
    assert list(module.parameters()) == []
    assert dict(module.state_dict()) == {}
    module.load_state_dict({})
    with_weight = MODULES[name][0](weight=WEIGHT)  # as nn.CrossEntropyLoss: the weight is a buffer
    assert list(with_weight.state_dict()) == list(torch.nn.CrossEntropyLoss(weight=WEIGHT).state_dict())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name, copier):
    module = MODULES[name][0](weight=WEIGHT, reduction="sum")
    module(LOGITS, TARGET)  # whatever a first call caches must not stand in the way
    assert torch.equal(copier(module)(LOGITS, TARGET), module(LOGITS, TARGET))


def test_repr_says_what_is_computed():
    text = repr(ak.ANLCELoss(alpha=5.0, beta=2.0, entropy_weight=0.25))
    assert text.startswith("ANLCELoss(") and "5" in text and "2" in text and "0.25" in text and "\n" not in text
    assert "NCE" in repr(ak.RobustLoss(5 * ak.NCE() + ak.RCE())) and "RCE" in repr(
        ak.RobustLoss(5 * ak.NCE() + ak.RCE())
    )


def test_weight_follows_the_module():
    """`.to(dtype)` moves the weight as nn.CrossEntropyLoss's does."""
    module = ak.ANLCELoss(weight=WEIGHT).double()
    assert module.weight.dtype == torch.float64
    module(LOGITS.double(), TARGET)


def test_in_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(8, 5))
    loss = ak.ANLCELoss()(model(torch.randn(6, 8)), TARGET)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.nn.ModuleList([ak.ANLCELoss()]).train()[0].training


# ---- attributes


def test_what_is_assigned_holds_from_the_next_call_on():
    module = ak.ANLCELoss(5, 5)
    assert (module.alpha, module.beta, module.ignore_index, module.reduction) == (5.0, 5.0, -100, "mean")
    module(LOGITS, TARGET)
    module.alpha, module.reduction, module.ignore_index = 2, "sum", 4
    target = TARGET.where(TARGET >= 0, 4)
    assert torch.equal(
        module(LOGITS, target), ak.anl_ce(LOGITS, target, alpha=2, beta=5, reduction="sum", ignore_index=4)
    )
    module.weight = WEIGHT
    expected = ak.anl_ce(LOGITS, target, alpha=2, beta=5, reduction="sum", ignore_index=4, weight=WEIGHT)
    assert torch.equal(module(LOGITS, target), expected)
    focal = ak.ANLFLLoss()
    focal.gamma, focal.beta = 2.0, 0.5
    assert torch.equal(focal(LOGITS, TARGET), ak.anl_fl(LOGITS, TARGET, gamma=2.0, beta=0.5))
    robust = ak.RobustLoss(ak.NCE())
    robust.expression = 3 * ak.MAE()
    assert robust.expression == 3 * ak.MAE()
    assert torch.equal(robust(LOGITS, TARGET), (3 * ak.MAE())(LOGITS, TARGET))


@pytest.mark.parametrize("module", [ak.ANLCELoss(), ak.RobustLoss(ak.NCE())], ids=["pair", "robust"])
def test_every_keyword_is_an_attribute(module):
    for name, default in ak.robust_loss.__kwdefaults__.items():
        assert name == "input" or getattr(module, name) == default, name
    keywords = dict(ignore_index=2, reduction="sum", entropy_weight=0.5, min_prob=1e-3, recompute=True)
    assert set(modules.OPTIONS) >= set(keywords)
    for name, value in keywords.items():
        setattr(module, name, value)
    target = TARGET.where(TARGET >= 0, 2)
    assert torch.equal(module(LOGITS, target), ak.robust_loss(LOGITS, target, module.expression, **keywords))
    module.reduction = "average"
    with pytest.raises(ValueError, match="reduction"):
        module(LOGITS, target)


@pytest.mark.parametrize("module", [ak.ANLFLLoss(), ak.RobustLoss(ak.NCE())], ids=["pair", "robust"])
def test_every_keyword_is_handed_on(module, monkeypatch):
    given = {name: object() for name in modules.OPTIONS}
    for name, value in given.items():
        setattr(module, name, value)
    module.weight = WEIGHT
    calls = []
    monkeypatch.setattr(modules, "robust_loss", lambda *a, **keywords: calls.append((a, keywords)))
    module(LOGITS, TARGET)
    ((arguments, keywords),) = calls
    assert arguments[0] is LOGITS and arguments[1] is TARGET and arguments[2] == module.expression
    assert keywords.pop("weight") is WEIGHT and keywords == given


def test_parameters_of_an_expression_that_is_replaced_are_gone():
    alpha = torch.nn.Parameter(torch.tensor(2.0))
    module = ak.RobustLoss(alpha * ak.NCE() + alpha * ak.MAE() / alpha)
    assert list(module.parameters()) == [alpha] and len(module.state_dict()) == 1
    module.expression = 3 * ak.MAE()
    assert list(module.parameters()) == [] and dict(module.state_dict()) == {}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ak.ANLCELoss(reduction="average"), ValueError, "reduction"),
        (lambda: ak.ANLCELoss(min_prob=2.0), ValueError, "min_prob"),
        (lambda: ak.RobustLoss(ak.NCE(), entropy_weight=1.0, reduction="none"), ValueError, "entropy"),
        (lambda: ak.ANLCELoss(reducton="mean"), TypeError, "reducton"),
        (lambda: ak.ANLCELoss(WEIGHT), ValueError, "keyword weight"),
        (lambda: ak.ANLCELoss(weight=[1.0, 2.0]), TypeError, "weight must be"),
        (lambda: ak.ANLCELoss(weight=WEIGHT.long()), TypeError, "weight must be"),
        (lambda: ak.ANLFLLoss(gamma=-1.0), ValueError, "gamma"),
        (lambda: setattr(ak.ANLCELoss(), "alpha", "5"), TypeError, "alpha"),
        (lambda: setattr(ak.ANLFLLoss(), "gamma", -1.0), ValueError, "gamma"),
        (lambda: setattr(ak.RobustLoss(ak.NCE()), "expression", 5), TypeError, "expression"),
    ],
)
def test_what_is_wrong_is_said_when_it_is_assigned(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_repr_says_what_differs_from_the_defaults():
    assert repr(ak.ANLCELoss(5, 2)) == "ANLCELoss(5 * NCE() + 2 * NNCE())"
    text = repr(ak.ANLCELoss(weight=WEIGHT, reduction="sum"))
    assert "weight=(5,)" in text and "reduction='sum'" in text and "ignore_index" not in text


def learning(name):
    alpha = torch.nn.Parameter(torch.tensor(2.0))
    if name == "attribute":
        return ak.ANLCELoss(alpha, 1.0)
    if name == "later":
        module = ak.ANLCELoss(1.0, 1.0)
        module.alpha = alpha
        return module
    return ak.RobustLoss(alpha * ak.NCE() + ak.NNCE())


@pytest.mark.parametrize("name", ["attribute", "later", "factor"])
def test_a_parameter_is_learned(name):
    module = learning(name)
    (alpha,) = module.parameters()
    (key,) = module.state_dict()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        (other,) = twin.parameters()
        with torch.no_grad():
            other += 1.0
        torch.testing.assert_close(twin(LOGITS, TARGET).detach(), ak.anl_ce(LOGITS, TARGET, alpha=3.0))
    assert "\n" not in module.extra_repr()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = module(LOGITS, TARGET)
        torch.testing.assert_close(loss.detach(), ak.anl_ce(LOGITS, TARGET, alpha=alpha.item()))
        loss.backward()
        torch.testing.assert_close(alpha.grad, ak.nce(LOGITS, TARGET))
        optimizer.step()
    module.load_state_dict({key: torch.tensor(5.0)})
    torch.testing.assert_close(module(LOGITS, TARGET).detach(), ak.anl_ce(LOGITS, TARGET, alpha=5.0))


@pytest.mark.parametrize("kind", [float, int])
def test_alpha_on_a_schedule_is_compiled_at_most_once_more(kind):
    torch._dynamo.reset()
    counter = helpers.compile_counter()
    module = ak.ANLCELoss(5, 5)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    logits = LOGITS.clone().requires_grad_()
    for epoch in range(12):
        module.alpha = kind(1.25 * epoch)
        losses = compiled(logits, TARGET), ak.anl_ce(logits, TARGET, alpha=kind(1.25 * epoch), beta=5.0)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits) for loss in losses))
    assert counter.frame_count <= 2
