"""The nn.Modules: the functions with their keywords remembered, and nothing to save."""

import copy
import pickle

import pytest
import torch

import anl_kernels as ak

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
