"""Second derivatives and forward mode: those of the formulas, or an error, on every route that autograd offers."""

import logging

import helpers
import pytest
import torch
from helpers import EXPRESSIONS, THERE, expression

import anl_kernels as ak
from anl_kernels import layout

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
ANL_CE = EXPRESSIONS["anl_ce"]
TARGET = torch.tensor([0, 5, 2, -100, 1])
# What keeps the logits, so that a gradient has a derivative.
KEEPS = {
    "recompute": dict(recompute=True),
    "none": dict(reduction="none"),
    "entropy": dict(entropy_weight=0.5),
    "weight": dict(recompute=True, weight=torch.linspace(0.5, 2, 6, dtype=torch.float64)),
    "inplace": dict(recompute=True, inplace=True),
}
LOSSES = {
    "anl_ce": lambda: expression(ANL_CE),
    "anl_fl+rce": lambda: ak.NFL() + 2 * ak.NNFL() + 0.3 * ak.RCE(),
    "eps_ce": lambda: ak.EpsCE(3.0),
    "row_loss": lambda: ak.RowLoss(lambda s: (s.lse - s.target_logit).square() / s.neg_log_sum + s.above_sum.log()),
}
# A gradient by parameters, from a loss as a function of them; each is wrong if the loss is differentiated but once.
ROUTES = {
    "penalty": lambda f, w: grad_of(grad_of(f(w), w, create_graph=True).square().sum(), w),
    "mixed": lambda f, w: grad_of((grad_of(f(w), w, create_graph=True) ** 2).sum() + f(w).detach() * (w**3).sum(), w),
    "backward": lambda f, w: backward(f, w),
    "backward_of_inputs": lambda f, w: backward(f, w, inputs=[w]),
    "hidden_layer": lambda f, w: through_hidden(f, w),
    "hvp": lambda f, w: torch.autograd.functional.hvp(f, w.detach(), w.detach().cos())[1],
    "vhp": lambda f, w: torch.autograd.functional.vhp(f, w.detach(), w.detach().cos())[1],
    "hessian": lambda f, w: torch.autograd.functional.hessian(f, w.detach()),
    "hessian_vectorized": lambda f, w: torch.autograd.functional.hessian(f, w.detach(), vectorize=True),
    "maml": lambda f, w: grad_of(f(w - 0.5 * grad_of(f(w), w, create_graph=True)), w),
    "adahessian": lambda f, w: grad_of(grad_of(f(w), w, create_graph=True), w, w.detach().sign()),
    "third": lambda f, w: grad_of(
        grad_of(grad_of(f(w), w, create_graph=True).square().sum(), w, create_graph=True).square().sum(), w
    ),
}
FUNC_ROUTES = {
    "func_hessian": lambda f, w: torch.func.hessian(f)(w.detach()),
    "func_jacrev_twice": lambda f, w: torch.func.jacrev(torch.func.jacrev(f))(w.detach()),
    "func_jvp": lambda f, w: torch.func.jvp(f, (w.detach(),), (w.detach().cos(),))[1],
    "func_jvp_of_grad": lambda f, w: torch.func.jvp(torch.func.grad(f), (w.detach(),), (w.detach().cos(),))[1],
    "func_grad_under_autograd": lambda f, w: grad_of(torch.func.grad(f)(w).square().sum(), w),
    "forward_mode": lambda f, w: dual(f, w),
    "forward_over_reverse": lambda f, w: dual(lambda v: grad_of(f(v), v, create_graph=True), w),
}


def grad_of(output, inputs, seed=None, **keywords):
    return torch.autograd.grad(output, inputs, seed, **keywords)[0]


def backward(f, w, **keywords):
    grad_of(f(w), w, create_graph=True).square().sum().backward(**keywords)
    return w.grad


def through_hidden(f, w):
    """The penalty is on a gradient by what lies between the parameters and the logits."""
    hidden = w.tanh()
    return grad_of(grad_of(f(hidden), hidden, create_graph=True).square().sum(), w)


def dual(f, w):
    with torch.autograd.forward_ad.dual_level():
        made = torch.autograd.forward_ad.make_dual(w.detach().requires_grad_(), w.detach().cos())
        return torch.autograd.forward_ad.unpack_dual(f(made)).tangent


def problem(criterion, backend, **keywords):
    """f(parameters), a number, and the parameters (7, 6): logits of a layer."""
    g = helpers.generator(0)
    x = helpers.randn(5, 7, dtype=torch.float64, generator=g) * 2
    w = helpers.randn(7, 6, dtype=torch.float64, generator=g).requires_grad_()
    factor = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)

    def f(w):
        loss = criterion(x @ w.sin(), TARGET.to(x.device), min_prob=1e-3, backend=backend, **keywords)
        return (loss * factor).sum() if loss.dim() else loss * 1.5

    return f, w


def compare(route, criterion, keywords, backend="cpu"):
    reference = {k: v for k, v in keywords.items() if k != "inplace"}
    expected = route(*problem(criterion, "reference", **reference))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(route(*problem(criterion, backend, **keywords)), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("route", [*ROUTES, *FUNC_ROUTES])
def test_second_derivatives_where_the_logits_are_kept(cpu, route, loss):
    compare((ROUTES | FUNC_ROUTES)[route], LOSSES[loss](), KEEPS["recompute"])


@pytest.mark.parametrize("loss", ["anl_ce", "row_loss"])
@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("route", ["penalty", "hvp", "hessian_vectorized", "forward_over_reverse"])
def test_second_derivatives_with_every_keyword(cpu, route, keeps, loss):
    compare(ROUTES.get(route) or FUNC_ROUTES[route], LOSSES[loss](), KEEPS[keeps])


@THERE
@pytest.mark.parametrize("loss", ["anl_ce", "row_loss"])
@pytest.mark.parametrize("route", ["penalty", "hvp"])
def test_second_derivatives_on_every_backend(fused, route, loss):
    compare(ROUTES[route], LOSSES[loss](), KEEPS["none"], fused.name)


@pytest.mark.parametrize("route", ROUTES)
def test_a_gradient_made_in_forward_is_never_differentiated_in_silence(cpu, route):
    """The logits are gone: an error that says how to keep them, wherever the derivative is asked for."""
    with pytest.raises(RuntimeError, match=r'recompute=True.*backend="reference"'):
        ROUTES[route](*problem(LOSSES["anl_ce"](), "cpu"))


@pytest.mark.thorough
@pytest.mark.unpoisoned
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("keeps", ["recompute", "entropy"])
def test_a_compiled_gradient_is_never_differentiated_in_silence(cpu, keeps, compiler):
    """PyTorch compiles no double backward: it says so, or the operators do. (Not in functional.hessian, whatever it is
    given: it takes the missing graph of a compiled function for zeros.)"""
    for route in ("penalty", "mixed", "backward_of_inputs", "hidden_layer", "hvp", "forward_mode"):
        torch.compiler.reset()
        f, w = problem(LOSSES["anl_ce"](), "cpu", **KEEPS[keeps])
        with pytest.raises((RuntimeError, NotImplementedError), match="reference|double backward|forward mode"):
            (ROUTES | FUNC_ROUTES)[route](torch.compile(f, backend=compiler), w)


@pytest.mark.parametrize("route", FUNC_ROUTES)
def test_transforms_know_the_order_of_the_derivative(cpu, route):
    compare(FUNC_ROUTES[route], LOSSES["anl_ce"](), dict())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_spatial_batch_has_second_derivatives(cpu, loss):
    z = helpers.randn(2, 5, 3, dtype=torch.float64, generator=helpers.generator(0)).requires_grad_()
    y = torch.tensor([[0, 4, 2], [1, -100, 3]])
    penalties = []
    for backend in ("cpu", "reference"):
        total = LOSSES[loss]()(z, y, reduction="none", backend=backend, min_prob=1e-3).square().sum()
        penalties.append(grad_of(grad_of(total, z, create_graph=True).square().sum(), z))
    torch.testing.assert_close(*penalties)


def test_learned_parameters_of_a_loss_have_second_derivatives(cpu):
    z = helpers.randn(5, 6, dtype=torch.float64, generator=helpers.generator(0)).requires_grad_()
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = lambda z, a, backend: ak.RowLoss(lambda s: s.neg_log_sum * a - s.target_log_prob**2)(
        z, TARGET, backend=backend
    )
    assert torch.autograd.gradgradcheck(lambda z, a: loss(z, a, "cpu"), (z, a))


@pytest.mark.parametrize("loss", ["anl_ce", "row_loss"])
def test_gradgradcheck(cpu, loss):
    z = helpers.randn(5, 6, dtype=torch.float64, generator=helpers.generator(0)).requires_grad_()
    for keywords in (KEEPS["recompute"], KEEPS["none"]):
        f = lambda z, k=keywords: LOSSES[loss]()(z, TARGET, backend="cpu", **k)
        assert torch.autograd.gradgradcheck(f, z)


def test_a_kept_gradient_is_the_kernels(cpu, monkeypatch):
    """create_graph=True changes neither the first derivative nor what makes it; the formulas run for the second."""
    from anl_kernels.backends import reference

    calls = []
    monkeypatch.setattr(
        reference, "loss_by_formulas", lambda *a, original=reference.loss_by_formulas: calls.append(1) or original(*a)
    )
    f, w = problem(LOSSES["anl_ce"](), "cpu", recompute=True)
    first, again = grad_of(f(w), w), grad_of(f(w), w, create_graph=True)
    assert torch.equal(first, again) and not calls
    again.sum().backward()
    assert calls


def test_the_slower_way_is_logged_once(cpu, caplog, monkeypatch):
    monkeypatch.setattr(layout, "_said", set())
    with caplog.at_level(logging.WARNING, "anl_kernels"):
        for _ in range(2):
            ROUTES["penalty"](*problem(LOSSES["anl_ce"](), "cpu", recompute=True))
            FUNC_ROUTES["func_jvp"](*problem(LOSSES["anl_ce"](), "cpu"))
    assert sum("reference formulas" in record.message for record in caplog.records) == 1


# ---- batched gradients


@pytest.mark.parametrize("keeps", [*KEEPS, "made_in_forward"])
@pytest.mark.parametrize("loss", LOSSES)
def test_batched_gradients(cpu, loss, keeps):
    """is_grads_batched: many vector-Jacobian products in one backward pass."""
    keywords = {k: v for k, v in KEEPS.get(keeps, {}).items() if k != "inplace"}
    f = lambda z: LOSSES[loss]()(z, TARGET, backend="cpu", **keywords)
    z = helpers.randn(5, 6, dtype=torch.float64, generator=helpers.generator(0)).requires_grad_()
    out = f(z)
    seeds = helpers.randn(3, *out.shape, dtype=torch.float64, generator=helpers.generator(1))
    expected = torch.stack([grad_of(out, z, seed, retain_graph=True) for seed in seeds])
    batched = grad_of(out, z, seeds, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, expected)
    both = [torch.autograd.functional.jacobian(f, z.detach(), vectorize=v) for v in (False, True)]
    torch.testing.assert_close(*both)
    if "fl" not in loss:  # the focal weight is detached: the gradient is not the value's derivative
        assert torch.autograd.gradcheck(f, z, check_batched_grad=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_per_sample_gradients_with_class_weights(cpu, loss):
    """vmap(grad) over rows (K,) with targets (), as F.cross_entropy takes them."""
    z = helpers.randn(4, 6, dtype=torch.float64, generator=helpers.generator(0))
    y, weight = torch.tensor([0, 5, 2, 1]), torch.linspace(0.5, 2, 6, dtype=torch.float64)
    f = lambda a, b, **kw: LOSSES[loss]()(a, b, weight=weight, reduction="sum", **kw)
    grads = torch.vmap(torch.func.grad(lambda a, b: f(a, b, backend="cpu")))(z, y)
    expected = torch.stack([torch.func.grad(lambda a, b: f(a, b, backend="reference"))(*row) for row in zip(z, y)])
    torch.testing.assert_close(grads, expected)
