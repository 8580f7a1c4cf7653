"""The gradient as PyTorch uses it: any grad_output, retained graphs, in-place, transforms, compile, AMP."""

import math

import helpers
import oracle
import pytest
import torch
import torch.utils.checkpoint
from helpers import DTYPES, EXPRESSIONS, REPRESENTATIVE, THERE, calculate, dtype_id, expression
from tiers import mainly, thorough

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


# ---- in place


@THERE
@pytest.mark.few(name=["anl_ce"], dtype=[torch.float32, torch.bfloat16])
@SOME
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", ["rows", "padded", "every_other_class", "transposed", "spatial", "channels_last"])
def test_inplace_writes_the_gradient_over_the_logits(fused, name, dtype, layout):
    values, labels = batch(dtype)
    logits, target = helpers.lay_out(layout, values, labels)
    hidden = helpers.Alias.apply(logits.requires_grad_())
    address, version = hidden.data_ptr(), hidden._version
    grads = []
    hidden.register_hook(grads.append)
    loss = ak.robust_loss(
        hidden, target, expression(EXPRESSIONS[name]), inplace=True, backend=fused.name, reduction="sum"
    )
    loss.backward()
    assert hidden._version > version
    assert grads[0].data_ptr() == address
    assert torch.equal(oracle.as_rows(hidden.detach()).nan_to_num(7), oracle.as_rows(grads[0]).nan_to_num(7))
    helpers.assert_as_accurate(
        loss.detach(),
        oracle.as_rows(grads[0]),
        labels,
        helpers.truth(values, labels, EXPRESSIONS[name], reduction="sum"),
    )


@THERE
def test_inplace_is_noticed_by_whoever_saved_the_logits(fused):
    values, labels = batch()
    leaf = values.clone().requires_grad_()
    hidden = leaf.nan_to_num().exp()  # exp saves its result
    loss = ak.anl_ce(hidden, labels, inplace=True, backend=fused.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@THERE
def test_inplace_notices_a_later_write_to_the_logits(fused):
    leaf = torch.randn(6, 9, requires_grad=True)
    hidden = leaf + 1
    loss = ak.anl_ce(hidden, torch.arange(6), inplace=True, backend=fused.name)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@THERE
@pytest.mark.parametrize(
    "use",
    {
        "logits": lambda hidden, view: hidden.pow(2).sum(),
        "cross_entropy": lambda hidden, view: torch.nn.functional.cross_entropy(view, torch.arange(6)),
        "another_view": lambda hidden, view: hidden.view(-1)[3] * 2,
        "part": lambda hidden, view: hidden[:1].sum(),
    }.items(),
    ids=lambda use: use[0],
)
@pytest.mark.parametrize("of_view", [False, True], ids=["logits", "view"])
def test_inplace_notices_a_later_use_of_the_logits(one_fused, use, of_view):
    """What reads the logits after the loss reads their gradient: its own backward pass says so."""
    leaf = torch.randn(6, 9, requires_grad=True)
    hidden = leaf * 1
    view = hidden.view(6, 9) if of_view else hidden
    loss = ak.anl_ce(view, torch.arange(6), inplace=True, backend=one_fused.name)
    with pytest.raises(RuntimeError, match="used after a loss with inplace=True"):
        (loss + use[1](hidden, view)).backward()


@THERE
def test_inplace_of_a_part_that_split_made_is_noticed(one_fused):
    """Autograd cannot mark it as overwritten; whoever saved it is told all the same."""
    hidden = torch.randn(6, 9, requires_grad=True) * 1
    first, _ = hidden.split([5, 4], 1)
    saved = first.exp() * first
    loss = ak.anl_ce(first, torch.arange(6) % 5, inplace=True, backend=one_fused.name)
    with pytest.raises(RuntimeError, match="modified (by an inplace operation|inplace)"):
        (loss + saved.sum()).backward()


@THERE
def test_inplace_of_a_slice_leaves_the_rest(one_fused):
    """The rest of the tensor may be used; the slice, by whatever name, may not."""
    grads, leaf = [], torch.randn(6, 9)
    for inplace in (False, True):
        z = leaf.clone().requires_grad_()
        hidden = z * 2
        first, second = hidden[:, :5], hidden[:, 5:]
        loss = ak.anl_ce(first, torch.arange(6) % 5, inplace=inplace, backend=one_fused.name)
        (loss + torch.nn.functional.cross_entropy(second, torch.arange(6) % 4)).backward()
        grads.append(z.grad)
    torch.testing.assert_close(*grads)
    hidden = leaf.clone().requires_grad_() * 2
    loss = ak.anl_ce(hidden[:, :5], torch.arange(6) % 5, inplace=True, backend=one_fused.name)
    with pytest.raises(RuntimeError, match="used after a loss with inplace=True"):
        (loss + hidden[2, 3]).backward()


@THERE
@pytest.mark.parametrize(
    "logits",
    [
        lambda: torch.randn(12).as_strided((4, 3), (2, 1)),
        lambda: torch.randn(3).expand(4, 3),
        lambda: torch.randn(40).as_strided((2, 3, 4), (4, 4, 1)),
    ],
    ids=["as_strided", "expanded", "rows_over_classes"],
)
def test_inplace_of_overlapping_memory_is_refused(fused, logits):
    z = logits()
    z = torch.randn(50, requires_grad=True).mul(1).as_strided(z.shape, z.stride())
    target = torch.zeros(z.shape[:1] + z.shape[2:], dtype=torch.int64)
    with pytest.raises(ValueError, match="share memory"):
        ak.anl_ce(z, target, inplace=True, backend=fused.name)


@THERE
def test_inplace_of_what_would_have_to_be_copied_is_refused(one_fused):
    leaf = torch.randn(2, 5, 3, 4, requires_grad=True)
    hidden = (leaf * 1).transpose(2, 3)
    with pytest.raises(ValueError, match="one run of memory"):
        ak.anl_ce(hidden, torch.zeros(2, 4, 3, dtype=torch.int64), inplace=True, backend=one_fused.name)


@THERE
def test_inplace_of_a_linear_layers_output(fused):
    g = helpers.generator(0)
    x, weight = helpers.randn(24, 5, generator=g), helpers.randn(17, 5, generator=g)
    _, labels = batch()
    grads = []
    for inplace in (False, True):
        w = weight.clone().requires_grad_()
        ak.anl_ce(torch.nn.functional.linear(x, w), labels, inplace=inplace, backend=fused.name).mul(3.7).backward()
        grads.append(w.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@THERE
def test_inplace_of_a_leaf_is_refused(fused):
    values, labels = batch()
    leaf = values.clone().requires_grad_()
    for logits in (leaf, leaf.view(leaf.shape), leaf[:]):
        with pytest.raises(ValueError, match="leaf"):
            ak.anl_ce(logits, labels, inplace=True, backend=fused.name)
    assert torch.equal(leaf.detach().nan_to_num(9), values.nan_to_num(9))


@THERE
def test_inplace_without_grad_writes_nothing(fused):
    values, labels = batch()
    logits = values.clone()
    loss = ak.anl_ce(logits, labels, inplace=True, backend=fused.name)
    assert torch.equal(logits.nan_to_num(9), values.nan_to_num(9))
    torch.testing.assert_close(loss, ak.anl_ce(values, labels, backend=fused.name), rtol=0, atol=0)


def test_the_reference_does_not_write_in_place():
    with pytest.raises((RuntimeError, ValueError), match="inplace"):
        ak.anl_ce(torch.randn(3, 4), torch.tensor([0, 1, 2]), inplace=True, backend="reference")


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
        pytest.skip("too slow: kernels/test_launch.py has small ones")
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
