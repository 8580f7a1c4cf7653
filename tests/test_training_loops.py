"""The fused backends as training loops use them: autocast, GradScaler, checkpoints, offloading, threads."""

import helpers
import oracle
import pytest
import torch
import torch.utils.checkpoint
from helpers import EXPRESSIONS, THERE, calculate, expression
from tiers import thorough

import anl_kernels as ak

ANL_CE = EXPRESSIONS["anl_ce"]


def batch(dtype=torch.float32, classes=17):
    return helpers.batch(classes, dtype)


# ---- autocast


@THERE
def test_autocast(one_backend, device):
    """Half-precision logits of a layer are taken as they are: the loss is float32, the gradients the parameters'."""
    layer, x, labels = torch.nn.Linear(5, 7), torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 5])
    with torch.autocast(device.type, torch.bfloat16):
        logits = layer(x)
        loss = ak.anl_ce(logits, labels, backend=one_backend.name)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()
    torch.testing.assert_close(loss.detach(), ak.anl_ce(logits.detach(), labels, backend=one_backend.name))


@THERE
def test_gradscaler(one_backend, device):
    """A whole float16 step: scale, backward, unscale, against float64."""
    g = helpers.generator(0)
    w, x = helpers.randn(7, 5, generator=g).half().requires_grad_(), helpers.randn(64, 5, generator=g).half()
    labels = helpers.randint(7, (64,), generator=g)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**14)
    loss = ak.anl_ce((x @ w.t()), labels, backend=one_backend.name)
    scaler.scale(loss).backward()
    w64 = w.detach().double().requires_grad_()
    oracle.loss((x.double() @ w64.t()).half().double() + 0 * (x.double() @ w64.t()), labels, ANL_CE)
    true = oracle.loss(x.double() @ w64.t(), labels, ANL_CE)
    true.backward()
    torch.testing.assert_close(w.grad.double() / 2.0**14, w64.grad, rtol=2e-2, atol=2e-4)


# ---- other ways in


@THERE
def test_a_parameter_as_logits(backend):
    """nn.Parameter is a Tensor like another: same numbers, same errors."""
    values, labels = helpers.rows_of_every_kind(9, torch.float32)
    parameter = torch.nn.Parameter(values)
    loss = ak.anl_ce(parameter, labels, backend=backend.name)
    loss.backward()
    expected = calculate(values, labels, expression(ANL_CE), backend=backend.name)
    assert torch.equal(loss.detach(), expected[0]) and torch.equal(parameter.grad, expected[1])
    if backend.checks_labels:
        with pytest.raises(IndexError):
            ak.anl_ce(parameter, labels + 9, backend=backend.name)
    if backend.fused:
        with pytest.raises(ValueError, match="leaf"):
            ak.anl_ce(parameter, labels, inplace=True, backend=backend.name)


@THERE
@pytest.mark.parametrize("keywords", [dict(), dict(recompute=True), dict(reduction="none")], ids=str)
def test_checkpoint(backend, keywords):
    """Activation checkpointing runs the forward pass twice."""
    values, labels = helpers.rows_of_every_kind(9, torch.float32)
    grads = []
    for checkpointed in (False, True):
        weight = torch.ones(9, requires_grad=True)
        function = lambda w: ak.anl_ce(values.nan_to_num() * w, labels, backend=backend.name, **keywords).sum()
        if checkpointed:
            loss = torch.utils.checkpoint.checkpoint(function, weight, use_reentrant=False)
        else:
            loss = function(weight)
        loss.backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("keywords", [dict(), dict(recompute=True), dict(entropy_weight=0.5)], ids=str)
def test_saved_tensors_offloaded(backend, keywords):
    values, labels = helpers.rows_of_every_kind(9, torch.float32)
    _, expected = calculate(values, labels, expression(ANL_CE), backend=backend.name, **keywords)
    with torch.autograd.graph.save_on_cpu():
        _, grad = calculate(values, labels, expression(ANL_CE), backend=backend.name, **keywords)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("keywords", [dict(), dict(recompute=True), dict(reduction="none")], ids=str)
@pytest.mark.parametrize("loss", ["anl_ce", "row_loss"])
def test_saved_tensor_hooks_see_all_that_is_kept(cpu, loss, keywords):
    """What offloads or compresses activations gets hold of every tensor of the logits' size, the gradient too."""
    criterion = expression(ANL_CE) if loss == "anl_ce" else ak.RowLoss(lambda s: s.neg_log_sum)
    z, packed = torch.randn(64, 500, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.numel()) or t.clone(), lambda t: t):
        out = criterion(z, torch.arange(64), backend="cpu", **keywords)
    assert packed.count(z.numel()) == 1
    (grad,) = torch.autograd.grad(out.sum(), z)
    (expected,) = torch.autograd.grad(criterion(z, torch.arange(64), backend="cpu", **keywords).sum(), z)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpoint_keeps_as_little_as_for_cross_entropy(cpu, use_reentrant):
    """Between forward and backward nothing of the logits' size stays: neither they nor their gradient."""
    w, x = torch.randn(1000, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    y = torch.arange(64)

    def kept(loss):
        function = lambda x, w: loss(x @ w.t(), y)
        results = []
        with torch.profiler.profile(profile_memory=True) as profiler:
            results.append(torch.utils.checkpoint.checkpoint(function, x, w, use_reentrant=use_reentrant))
        return sum(e.self_cpu_memory_usage for e in profiler.key_averages())

    assert kept(lambda z, y: ak.anl_ce(z, y, backend="cpu")) <= kept(torch.nn.functional.cross_entropy) + 4096


@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize(
    "keywords", [dict(entropy_weight=0.5), *map(thorough, (dict(), dict(recompute=True)))], ids=str
)
def test_several_python_threads(fused, keywords):
    """The kernels run without the interpreter's lock: calls side by side do not disturb each other."""
    if fused.interpreted:
        pytest.skip("too slow: triton_kernels/test_launch.py has small ones")
    from concurrent.futures import ThreadPoolExecutor

    problems = [
        (helpers.randn(shape, generator=helpers.generator(i)) * 4, torch.randint(shape[1], shape[:1]))
        for i, shape in enumerate([(300, 40), (64, 500), (1000, 10), (5, 9000), (1, 140_000), (200, 129)] * 3)
    ]
    run = lambda problem: calculate(*problem, expression(EXPRESSIONS["anl_fl"]), backend=fused.name, **keywords)
    expected = [run(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(run, problems), expected):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@THERE
@pytest.mark.few(tier="thorough")
def test_changing_knobs_keeps_no_memory(one_fused, monkeypatch):
    """A schedule hands in a new number at every step: what a call remembers of its keywords must not grow with them."""
    import gc

    if one_fused.interpreted:  # thousands of launches, whose results do not matter
        from triton.runtime.interpreter import InterpretedFunction

        monkeypatch.setattr(InterpretedFunction, "run", lambda *arguments, **keywords: None)
    logits, target = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    criterion = ak.NCE() + ak.NNCE()

    def run(steps, offset):
        for i in range(steps):
            ak.anl_ce(logits, target, alpha=1.0 + (offset + i) * 1e-6, backend=one_fused.name)
            criterion(logits, target, min_prob=1e-7 + (offset + i) * 1e-12, backend=one_fused.name)
        gc.collect()
        return len(gc.get_objects())

    before = run(700, 0)
    assert run(3000, 10_000) <= before + 3000
