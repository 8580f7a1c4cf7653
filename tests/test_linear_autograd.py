"""The fused linear head under autograd: second derivatives, batched gradients, what is saved, compiled autograd."""

import contextlib

import helpers
import pytest
import torch
import torch.nn.functional as F
from test_derivatives import FUNC_ROUTES, ROUTES, grad_of

import anl_kernels as ak
from anl_kernels import linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph"),
    pytest.mark.usefixtures("small_chunks"),
]
ROWS, CLASSES, WIDTH = 21, 11, 5
CHUNKS = {
    "one": dict(),
    "some": dict(max_chunk_bytes=10 * 8 * CLASSES),
    "recompute": dict(recompute=True),
    "recompute_some": dict(recompute=True, max_chunk_bytes=10 * 8 * CLASSES),
    "tiles": dict(max_chunk_bytes=280),
}
KINDS = {
    "mean": dict(),
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "entropy": dict(entropy_weight=0.7),
    "weight": dict(class_weight=torch.linspace(0.1, 2, CLASSES).double()),
}
LOSSES = {
    "anl_ce": lambda: 5 * ak.NCE() + ak.NNCE(),
    "anl_fl+rce": lambda: ak.NFL() + 2 * ak.NNFL() + 0.3 * ak.RCE(),
    "row_loss": lambda: ak.RowLoss(lambda s: (s.lse - s.target_logit).square() / s.neg_log_sum),
}


def problem(seed=0):
    """[input, weight, bias], which require grad, and a target of which some rows are ignored."""
    g = helpers.generator(seed)
    leaves = [torch.randn(s, generator=g).double() for s in ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,))]
    target = torch.randint(CLASSES, (ROWS,), generator=g)
    target[2::7] = -100
    return [x.requires_grad_() for x in leaves], target


def loss_of(criterion, target, **keywords):
    """A number, of the matrices; the rows of a loss without reduction count differently."""

    def f(x, w, b=None):
        loss = ak.linear_robust_loss(x, w, target, criterion, bias=b, min_prob=1e-3, **keywords)
        return (loss * torch.linspace(0.5, 1.5, ROWS).double()).sum() if loss.dim() else loss * 1.5

    return f


def assert_as_the_reference(measure, criterion, keywords, chunks):
    leaves, target = problem()
    ours = measure(loss_of(criterion, target, **keywords, **chunks), leaves)
    expected = measure(loss_of(criterion, target, **keywords, backend="reference"), leaves)
    for got, true in zip(ours, expected, strict=True):
        assert true.abs().max() > 0
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-11)


def penalty(f, leaves):
    """The gradients of a gradient penalty by all that the head is made of, and what lies below it."""
    x, w, b = leaves
    hidden = x.tanh()
    grads = torch.autograd.grad(f(hidden, w, b), (hidden, w, b), create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_penalty(kind, chunks, loss):
    assert_as_the_reference(penalty, LOSSES[loss](), KINDS[kind], CHUNKS[chunks])


class OnAGPU(torch.Tensor):
    """Says so; all else is a CPU's."""

    device = torch.device("cuda")


@pytest.fixture
def ignored_rows_stay(monkeypatch):
    """As on a GPU, where they stay in the products as zeros."""
    original = linear.kept_rows

    def kept(hidden, labels, call):
        hidden, rows, labels = original(hidden.as_subclass(OnAGPU), labels, call)
        return hidden.as_subclass(torch.Tensor), rows, labels

    monkeypatch.setattr(linear, "kept_rows", kept)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_ignored_rows_among_the_others_are_not_read(ignored_rows_stay, chunks):
    for kind in KINDS.values():
        results = []
        for garbage in (0.0, torch.nan):
            leaves, target = problem()
            with torch.no_grad():
                leaves[0][target == -100] = garbage
            loss = loss_of(LOSSES["anl_fl+rce"](), target, **kind, **CHUNKS[chunks])(*leaves)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_a_gradient_penalty_with_ignored_rows_among_the_others(ignored_rows_stay, chunks):
    for kind in KINDS.values():
        assert_as_the_reference(penalty, LOSSES["anl_ce"](), kind, CHUNKS[chunks])


@pytest.mark.parametrize("chunks", ["some", "recompute", "tiles"])
@pytest.mark.parametrize("route", [*ROUTES, *FUNC_ROUTES])
def test_every_route_to_a_second_derivative(route, chunks):
    """By the weight of the head, and by weights below it."""
    run = (ROUTES | FUNC_ROUTES)[route]

    def measure(f, leaves):
        x, w, b = (leaf.detach() for leaf in leaves)
        below = torch.linspace(-1, 1, WIDTH * WIDTH).double().view(WIDTH, WIDTH).requires_grad_()
        return run(lambda v: f(x, v.sin(), b), w.requires_grad_()), run(lambda v: f((x @ v).tanh(), w), below)

    assert_as_the_reference(measure, LOSSES["anl_ce"](), {}, CHUNKS[chunks])


@pytest.mark.parametrize("chunks", CHUNKS)
def test_only_what_requires_grad_has_a_second_derivative(chunks):
    for which in ((0,), (1,), (2,), (0, 2)):

        def measure(f, leaves, which=which):
            given = [x.detach().requires_grad_(i in which) for i, x in enumerate(leaves)]
            wanted = [given[i] for i in which]
            grads = torch.autograd.grad(f(*given), wanted, create_graph=True)
            return *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted)

        assert_as_the_reference(measure, LOSSES["anl_ce"](), {}, CHUNKS[chunks])


@pytest.mark.parametrize("chunks", CHUNKS)
def test_gradgradcheck(chunks):
    leaves, target = problem()
    f = loss_of(ak.CE() + 3 * ak.NCE(), target[:4], **CHUNKS[chunks])
    leaves[0] = leaves[0].detach()[:4].requires_grad_()
    assert torch.autograd.gradgradcheck(f, leaves)


def test_learned_parameters_of_a_loss():
    """The mixed derivative by a parameter of the loss and by the matrices."""
    leaves, target = problem()
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    results = []
    for chunks in (*CHUNKS.values(), dict(backend="reference")):
        criterion = ak.RowLoss(lambda s: -s.target_log_prob * t.exp() / s.neg_log_sum + t**2)
        grads = torch.autograd.grad(loss_of(criterion, target, **chunks)(*leaves), (*leaves, t), create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), (*leaves, t)))
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1])


@pytest.mark.parametrize("chunks", CHUNKS)
def test_a_kept_gradient_is_the_same_each_time(chunks):
    """create_graph=True leaves what is kept as it was, for the next backward pass."""
    leaves, target = problem()
    loss = loss_of(LOSSES["anl_ce"](), target, **CHUNKS[chunks])(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for _ in range(2):
        again = torch.autograd.grad(loss, leaves, create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert all(grad.requires_grad for grad in again)
    last = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, last)) and not any(grad.requires_grad for grad in last)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_a_second_backward_pass_is_refused_by_pytorch(chunks):
    leaves, target = problem()
    loss = ak.linear_robust_loss(*leaves[:2], target, LOSSES["anl_ce"](), reduction="sum", **CHUNKS[chunks])
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_second_derivatives_under_autocast():
    """The formulas compute in the dtype that forward did, wherever backward is called."""
    leaves, target = problem()
    leaves = [x.detach().float().requires_grad_() for x in leaves]
    results = []
    for dtype, chunks in ((torch.bfloat16, {}), (torch.bfloat16, dict(recompute=True)), (torch.float32, {})):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = loss_of(LOSSES["anl_ce"](), target, **chunks)(*leaves)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves))
        assert all(grad.dtype == torch.float32 for grad in results[-1])
    for half in results[:2]:
        for got, exact in zip(half, results[2]):
            assert 0 < (got - exact).abs().max() < 0.05 * exact.abs().max()


# ---- many gradients at once


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients(kind, chunks, loss):
    leaves, target = problem()
    given = dict(**KINDS[kind], **CHUNKS[chunks])
    out = ak.linear_robust_loss(*leaves[:2], target, LOSSES[loss](), bias=leaves[2], min_prob=1e-3, **given)
    seeds = torch.randn(3, *out.shape, generator=helpers.generator(1)).double()
    each = [torch.autograd.grad(out, leaves, seed, retain_graph=True) for seed in seeds]
    batched = torch.autograd.grad(out, leaves, seeds, is_grads_batched=True, retain_graph=True)
    vmapped = torch.vmap(lambda seed: torch.autograd.grad(out, leaves, seed, retain_graph=True))(seeds)
    for got, by_vmap, *expected in zip(batched, vmapped, *each):
        torch.testing.assert_close(got, torch.stack(expected))
        torch.testing.assert_close(by_vmap, torch.stack(expected))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_jacobian_and_gradcheck_of_batches(chunks):
    leaves, target = problem()
    x, target = leaves[0].detach()[:4].requires_grad_(), target[:4]
    for reduction in ("mean", "none"):
        given = dict(reduction=reduction, **CHUNKS[chunks])
        f = lambda x, w, b, g=given: ak.linear_robust_loss(x, w, target, ak.NCE(), bias=b, **g)
        both = [torch.autograd.functional.jacobian(f, (x, *leaves[1:]), vectorize=v) for v in (False, True)]
        torch.testing.assert_close(*both)
        assert torch.autograd.gradcheck(f, (x, *leaves[1:]), check_batched_grad=True)


def test_a_batch_of_gradients_is_not_differentiated_again_in_silence():
    """As a made gradient allows, or an error."""
    leaves, target = problem()
    for chunks in CHUNKS.values():
        loss = loss_of(LOSSES["anl_ce"](), target, **chunks)(*leaves)
        first = grad_of(loss, leaves[1], create_graph=True)
        expected = grad_of(first.square().sum(), leaves[1], retain_graph=True)
        seeds = torch.ones(2).double()
        try:
            (grads,) = torch.autograd.grad(loss, leaves[1], seeds, is_grads_batched=True, create_graph=True)
        except RuntimeError as error:
            assert "create_graph=True" in str(error), error
        else:
            torch.testing.assert_close(grad_of(grads[0].square().sum(), leaves[1]), expected)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_gradients_that_lie_nowhere_as_they_are(chunks):
    """grad_output lazily negated, or zeros without memory."""
    leaves, target = problem()
    for kind in ("mean", "none", "entropy"):
        given = dict(**KINDS[kind], **CHUNKS[chunks])
        loss = ak.linear_robust_loss(*leaves[:2], target, LOSSES["anl_ce"](), bias=leaves[2], **given)
        seed = torch.linspace(0.5, 1.5, ROWS).double() if loss.dim() else torch.tensor(0.5).double()
        expected = torch.autograd.grad(loss, leaves, -seed, retain_graph=True)
        negated = torch.autograd.grad(loss, leaves, torch._neg_view(seed), retain_graph=True)
        torch.testing.assert_close(negated, expected)
        zeros = torch.autograd.grad(loss, leaves, torch._efficientzerotensor(seed.shape, dtype=seed.dtype))
        assert all((grad == 0).all() for grad in zeros)


# ---- what is saved


@pytest.mark.parametrize("chunks", CHUNKS)
def test_hooks_see_all_that_is_saved(chunks):
    """save_on_cpu and the like can move every matrix that waits for backward."""
    leaves, target = problem()
    f = loss_of(LOSSES["anl_ce"](), target, **CHUNKS[chunks])
    expected = torch.autograd.grad(f(*leaves), leaves)
    packed = []
    pack = lambda x: (packed.append(x.shape), x.clone())[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = f(*leaves)
    assert (CLASSES, WIDTH) in packed
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_a_checkpoint_keeps_nothing_of_the_head(chunks):
    leaves, target = problem()
    target = target.clamp(min=0)  # to leave out ignored rows saves something too
    f = lambda x, w: ak.linear_robust_loss(x, w, target, LOSSES["anl_ce"](), reduction="sum", **CHUNKS[chunks])
    expected = torch.autograd.grad(f(*leaves[:2]), leaves[:2])
    calls = []
    loss = torch.utils.checkpoint.checkpoint(lambda *x: calls.append(1) or f(*x), *leaves[:2], use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves[:2]), expected)
    assert len(calls) == 2  # what was saved was made again


@pytest.mark.parametrize("chunks", CHUNKS)
def test_weights_changed_in_place_are_noticed(chunks):
    leaves, target = problem()
    loss = loss_of(LOSSES["anl_ce"](), target, **CHUNKS[chunks])(*leaves)
    with torch.no_grad():
        leaves[1].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- compiled autograd


@contextlib.contextmanager
def compiled_by_enable(loss):
    from torch._dynamo import compiled_autograd

    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        yield loss.backward


@contextlib.contextmanager
def compiled_by_config(loss):
    with torch._dynamo.config.patch(compiled_autograd=True):
        yield torch.compile(lambda: loss.backward(), backend="aot_eager")


@pytest.mark.thorough
@pytest.mark.parametrize("way", [compiled_by_enable, compiled_by_config])
@pytest.mark.parametrize("kind", ["mean", "entropy"])
def test_compiled_autograd_over_an_eager_forward(kind, way):
    """Backward is not traced, which would break its graph at every kernel; the gradients are those of its own call."""
    torch._dynamo.reset()
    for chunks in ("one", "recompute", "tiles"):
        for seed in range(2):
            leaves, target = problem(seed)
            loss = loss_of(LOSSES["anl_ce"](), target, **KINDS[kind], **CHUNKS[chunks])(*leaves)
            expected = torch.autograd.grad(loss, leaves, retain_graph=True)
            with way(loss) as backward:
                backward()
            for leaf, grad in zip(leaves, expected):
                torch.testing.assert_close(leaf.grad, grad)


# ---- forward mode


@pytest.mark.parametrize("chunks", CHUNKS)
def test_forward_mode(chunks):
    """Duals in any of the matrices, and torch.func.jvp."""
    leaves, target = problem()
    f = loss_of(LOSSES["anl_ce"](), target, **CHUNKS[chunks])
    plain = [x.detach() for x in leaves]
    tangents = [x.cos() for x in plain]
    products = [(grad * tangent).sum() for grad, tangent in zip(torch.autograd.grad(f(*leaves), leaves), tangents)]
    with torch.autograd.forward_ad.dual_level():
        for i, product in enumerate(products):
            given = list(plain)
            given[i] = torch.autograd.forward_ad.make_dual(plain[i], tangents[i])
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(f(*given)).tangent, product)
    torch.testing.assert_close(torch.func.jvp(f, tuple(plain), tuple(tangents))[1], sum(products))


def test_first_derivatives_stay_with_the_kernels(monkeypatch):
    """No formula runs, and no logits are made in full, unless a second derivative is asked for."""
    leaves, target = problem()
    from anl_kernels.backends import reference

    refuse = lambda *a, **k: pytest.fail("the reference formulas ran")
    monkeypatch.setattr(reference, "loss_by_formulas", refuse)
    monkeypatch.setattr(reference, "gradient", refuse)
    monkeypatch.setattr(F, "linear", refuse)
    for kind in KINDS.values():
        for chunks in CHUNKS.values():
            torch.autograd.grad(loss_of(LOSSES["anl_ce"](), target, **kind, **chunks)(*leaves), leaves)
