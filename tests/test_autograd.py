"""The gradient as PyTorch uses it: any grad_output, retained graphs, in-place, transforms, compile, AMP."""

import math

import helpers
import oracle
import pytest
import torch
import torch.utils.checkpoint
from helpers import DTYPES, EXPRESSIONS, REPRESENTATIVE, THERE, calculate, dtype_id, expression
from tiers import mainly

import anl_kernels as ak
from anl_kernels.cli.timing import Run, profile

SOME = pytest.mark.parametrize("name", REPRESENTATIVE)
ANL_CE = EXPRESSIONS["anl_ce"]
MADE = pytest.mark.parametrize("recompute", [False, True, None], ids=["forward", "recompute", "default"])


def batch(dtype=torch.float32, classes=17):
    return helpers.batch(classes, dtype)


# ---- grad_output


@pytest.mark.few(name=["anl_ce"], dtype=[torch.float16])
@SOME
@MADE
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_scalar_grad_output(backend, name, recompute, dtype):
    for scale in backend.few((3.7, 0.0, -2.0, 65536.0)):
        values, labels = batch(dtype)
        if dtype == torch.float16 and scale == 65536.0:
            labels = labels.where(torch.arange(len(labels)) < 12, torch.tensor(-100))
        for reduction in ("mean", "sum"):
            if dtype == torch.float16 and reduction == "sum" and scale == 65536.0:
                continue  # overflows, as it should
            helpers.check(
                values,
                labels,
                EXPRESSIONS[name],
                scaled=0.0 if recompute else abs(scale),
                reduction=reduction,
                grad_output=torch.tensor(scale, dtype=helpers.acc(dtype)),
                recompute=recompute,
                backend=backend.name,
            )


def test_a_zero_grad_output_is_a_zero_gradient(backend):
    values, labels = batch()
    for recompute in (False, True):
        _, grad = calculate(
            values, labels, expression(ANL_CE), recompute=recompute, grad_output=torch.tensor(0.0), backend=backend.name
        )
        assert (grad == 0).all()


@pytest.mark.few(tier="thorough")
def test_gradscaler_saves_small_gradients(backend):
    """65536 rows in float16: a gradient of 1e-9 is 0, times 2^16 it is not. The scale enters before the rounding."""
    rows, classes, scale = 65536, 4, 65536.0
    logits = helpers.randn(rows, classes, generator=helpers.generator(0)).half()
    target = helpers.randint(classes, (rows,), generator=helpers.generator(1))
    true = helpers.truth(logits, target, ANL_CE, grad_output=torch.tensor(scale))
    result = calculate(logits, target, expression(ANL_CE), grad_output=torch.tensor(scale), backend=backend.name)
    helpers.assert_as_accurate(*result, target, true)


@pytest.mark.few(name=["anl_ce"], layout=["channels_last"])
@SOME
@pytest.mark.parametrize("layout", ["rows", "spatial", "channels_last", "transposed"])
def test_per_row_grad_output(backend, name, layout):
    """Random, strided and stride-0 grad_outputs of reduction="none"; rows with 0 get 0."""
    values, labels = batch()
    logits, target = helpers.lay_out(layout, values, labels)
    weights = helpers.randn(len(labels), generator=helpers.generator(0))
    weights[::5] = 0
    room = torch.full((len(labels), 2), math.nan)
    room[:, 0] = weights
    outputs = [weights.view(target.shape), torch.tensor(0.3).expand(target.shape)]
    if target.dim() == 1:
        outputs.append(room[:, 0])
    else:
        outputs.append(weights.view(target.shape).transpose(0, 1).contiguous().transpose(0, 1))
    for output in outputs:
        true = helpers.truth(values, labels, EXPRESSIONS[name], reduction="none", grad_output=output.reshape(-1))
        for recompute in (False, True, None):
            loss, grad = calculate(
                logits,
                target,
                expression(EXPRESSIONS[name]),
                reduction="none",
                grad_output=output,
                recompute=recompute,
                backend=backend.name,
            )
            helpers.assert_as_accurate(loss.reshape(-1), oracle.as_rows(grad), labels, true)


@THERE
def test_loss_dot_sum_and_mean_of_none(backend):
    """.sum() hands a stride-0 grad_output down, .mean() one of 1/N."""
    values, labels = helpers.rows_of_every_kind(17, torch.float32)
    for reduce, reduction in ((torch.sum, "sum"), (torch.mean, "mean")):
        logits = values.clone().requires_grad_()
        reduce(ak.anl_ce(logits, labels, reduction="none", backend=backend.name)).backward()
        _, expected = calculate(values, labels, expression(ANL_CE), reduction=reduction, backend=backend.name)
        torch.testing.assert_close(logits.grad, expected, rtol=2e-6, atol=1e-9)


@SOME
def test_a_nan_grad_output_reaches_only_its_row(backend, name):
    values, labels = helpers.rows_of_every_kind(17, torch.float32)
    output = torch.ones(len(labels))
    output[4] = math.nan
    _, grad = calculate(
        values, labels, expression(EXPRESSIONS[name]), reduction="none", grad_output=output, backend=backend.name
    )
    assert grad[4].isnan().any()
    assert grad[[0, 1, 2, 3, 5, 6]].isfinite().all()


# ---- graphs


@THERE
@MADE
@pytest.mark.parametrize("keywords", [dict(), dict(reduction="none"), dict(entropy_weight=0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_backward_twice(backend, recompute, keywords, dtype):
    """retain_graph: the saved gradient is not scaled twice, whatever the grad_outputs."""
    values, labels = batch(dtype)
    logits = values.clone().requires_grad_()
    loss = ak.anl_ce(logits, labels, recompute=recompute, backend=backend.name, **keywords)
    seeds = [torch.full_like(loss, s) for s in (1.0, 4.0, 0.5, 1.0)]
    grads = [torch.autograd.grad(loss, logits, seed, retain_graph=True)[0].clone() for seed in seeds]
    grads.append(torch.autograd.grad(loss, logits, seeds[1])[0])
    for grad, factor in zip(grads, (1.0, 4.0, 0.5, 1.0, 4.0)):
        torch.testing.assert_close(
            grad.float(), grads[0].float() * factor, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6
        )
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(loss, logits, seeds[0])


@pytest.mark.unpoisoned
def test_backward_hands_out_the_memory_of_the_gradient(cpu):
    """What forward made is scaled where it lies, unless the graph is kept."""
    logits = torch.randn(64, 500, requires_grad=True)
    for _ in range(2):
        loss = ak.anl_ce(logits, torch.arange(64), backend="cpu") * 2
        logits.grad = None
        peak = profile(Run(loss.backward)).peak_bytes
    assert peak < logits.nbytes / 4


@THERE
def test_gradients_handed_out_are_not_written_again(backend):
    """What one backward returned stays as it was after the next."""
    values, labels = batch()
    logits = values.clone().requires_grad_()
    loss = ak.anl_ce(logits, labels, recompute=False, backend=backend.name)
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(1.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits, torch.tensor(7.0), retain_graph=True)
    assert torch.equal(first, kept)
    first.zero_()
    (third,) = torch.autograd.grad(loss, logits, torch.tensor(1.0))
    torch.testing.assert_close(third, kept, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(second, kept * 7, rtol=1e-6, atol=1e-8)


@THERE
def test_grad_accumulates(backend):
    values, labels = batch()
    logits = values.clone().requires_grad_()
    for _ in range(3):
        ak.anl_ce(logits, labels, backend=backend.name).backward()
    _, once = calculate(values, labels, expression(ANL_CE), backend=backend.name)
    torch.testing.assert_close(logits.grad, 3 * once)


@THERE
def test_logits_changed_between_forward_and_backward(fused):
    """recompute reads the logits again, so torch's version check must speak up."""
    values, labels = batch()
    logits = values.clone().requires_grad_()
    hidden = logits * 1
    loss = ak.anl_ce(hidden, labels, recompute=True, backend=fused.name)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@THERE
def test_no_grad_where_none_is_wanted(backend):
    values, labels = batch()
    assert not ak.anl_ce(values, labels, backend=backend.name).requires_grad
    with torch.no_grad():
        loss = ak.anl_ce(values.clone().requires_grad_(), labels, backend=backend.name)
    assert not loss.requires_grad
    with torch.inference_mode():
        same = ak.anl_ce(values, labels, backend=backend.name)
    torch.testing.assert_close(same, loss, rtol=0, atol=0)
    _ = ak.anl_ce(values.clone().requires_grad_(), labels, backend=backend.name).detach()
    torch.testing.assert_close(
        calculate(values, labels, expression(ANL_CE), backend=backend.name)[0], loss, rtol=1e-6, atol=0
    )


@THERE
def test_no_gradient_by_target_or_weight(backend):
    values, labels = helpers.rows_of_every_kind(9, torch.float32)
    logits = values.clone().requires_grad_()
    loss = ak.anl_ce(logits, labels, weight=torch.ones(9), backend=backend.name)
    loss.backward()
    assert labels.grad is None


# ---- gradcheck (test_derivatives.py has the second derivatives)


# The focal weight is detached, as in the authors' code: not the derivative of the value.
DIFFERENTIABLE = [name for name, terms in EXPRESSIONS.items() if not any("gamma" in p for _, _, p in terms)]


@THERE
@pytest.mark.few(name=["anl_ce"], tier="thorough")
@pytest.mark.parametrize("name", mainly(("anl_ce", "nce+rce", "nce+agce", "gce"), DIFFERENTIABLE))
def test_gradcheck(one_backend, name):
    logits = helpers.randn(4, 6, dtype=torch.float64, generator=helpers.generator(0)).requires_grad_()
    target = torch.tensor([0, 5, 2, -100])
    criterion = expression(EXPRESSIONS[name])
    for keywords in (dict(), dict(reduction="none"), dict(recompute=True), dict(entropy_weight=0.5)):
        assert torch.autograd.gradcheck(
            lambda z, k=keywords: ak.robust_loss(z, target, criterion, backend=one_backend.name, **k), logits
        )


@pytest.mark.parametrize("name", ["anl_ce", "nce+rce", "nce+agce"])
def test_reference_has_second_derivatives(name):
    logits = helpers.randn(3, 5, dtype=torch.float64, generator=helpers.generator(0)).requires_grad_()
    target, criterion = torch.tensor([0, 4, 2]), expression(EXPRESSIONS[name])

    def loss(z):
        return ak.robust_loss(z, target, criterion, backend="reference", reduction="sum", entropy_weight=0.5)

    assert torch.autograd.gradgradcheck(loss, logits)
    tangent = helpers.randn(3, 5, dtype=torch.float64, generator=helpers.generator(1))
    value, derivative = torch.func.jvp(loss, (logits.detach(),), (tangent,))
    (grad,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(derivative, (grad * tangent).sum())
    torch.testing.assert_close(value, loss(logits.detach()))


# ---- torch.func


@THERE
@pytest.mark.parametrize("keywords", [dict(), dict(recompute=True), dict(reduction="sum", entropy_weight=0.5)], ids=str)
def test_func_grad(one_backend, keywords):
    values, labels = helpers.rows_of_every_kind(9, torch.float32)
    function = lambda z: ak.anl_ce(z, labels, backend=one_backend.name, **keywords)
    loss, expected = calculate(values, labels, expression(ANL_CE), backend=one_backend.name, **keywords)
    torch.testing.assert_close(torch.func.grad(function)(values), expected, rtol=1e-5, atol=1e-7)
    grad, value = torch.func.grad_and_value(function)(values)
    torch.testing.assert_close((value, grad), (loss, expected), rtol=1e-5, atol=1e-7)
    _, pull = torch.func.vjp(function, values)
    torch.testing.assert_close(pull(torch.tensor(2.0))[0], 2 * expected, rtol=1e-5, atol=1e-7)


@THERE
@pytest.mark.few(dims=[(0, None)])
@pytest.mark.parametrize(
    "keywords",
    [
        dict(),
        dict(recompute=True),
        dict(reduction="none"),
        dict(weight=torch.arange(1.0, 8.0)),
        dict(entropy_weight=0.5),  # of the rows of one element of the batch
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, None), (None, 0)], ids=str)
def test_vmap(one_backend, keywords, dims):
    """A batch of batches, batched anywhere, is a loop."""
    keywords = helpers.handed_out_of(keywords)
    g = helpers.generator(0)
    logits, target = helpers.randn(3, 4, 7, generator=g), helpers.randint(7, (3, 4), generator=g)
    target[1, 2] = -100
    given = (logits if dims[0] is not None else logits[0], target if dims[1] is not None else target[0])
    given = (given[0].movedim(0, dims[0]) if dims[0] else given[0], given[1])

    def loss(z, y):
        return ak.anl_ce(z, y, backend=one_backend.name, **keywords)

    def pick(i):
        return logits[i if dims[0] is not None else 0], target[i if dims[1] is not None else 0]

    expected = torch.stack([loss(*pick(i)) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(loss, in_dims=dims)(*given), expected, rtol=1e-6, atol=1e-8)
    one = lambda z, y: loss(z, y).sum()
    expected = torch.stack([torch.func.grad(one)(*pick(i)) for i in range(3)])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(one), in_dims=dims)(*given), expected, rtol=1e-6, atol=1e-8
    )


@THERE
def test_per_sample_gradients(one_backend):
    """The usual use of vmap(grad): one gradient of the weights for each sample, logits (K,) within."""
    g = helpers.generator(0)
    weight, x = helpers.randn(7, 5, generator=g), helpers.randn(6, 5, generator=g)
    y = helpers.randint(7, (6,), generator=g)
    loss = lambda w, a, b: ak.anl_ce(w @ a, b, backend=one_backend.name)
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, x, y)
    expected = torch.stack([torch.func.grad(loss)(weight, a, b) for a, b in zip(x, y)])
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-7)


@THERE
def test_func_jacrev(one_backend):
    values, labels = helpers.rows_of_every_kind(9, torch.float64)
    loss = lambda z: ak.anl_ce(z, labels, reduction="none", backend=one_backend.name)
    jacobian = torch.func.jacrev(loss)(values)
    _, expected = calculate(values, labels, expression(ANL_CE), reduction="none", backend=one_backend.name)
    torch.testing.assert_close(jacobian.diagonal(dim1=0, dim2=1).t(), expected, rtol=1e-10, atol=1e-12)
    assert jacobian.abs().sum().item() == pytest.approx(expected.abs().sum().item())
