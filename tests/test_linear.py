"""The fused linear head: against the oracle in float64, in chunks and tiles of every size; how it is called."""

import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from heads import (
    BYTES,
    CHUNKS,
    CLASSES,
    KINDS,
    ROWS,
    WIDTH,
    assert_as_accurate,
    clean,
    compare,
    fused,
    gradients,
    problem,
    truth,
    unfused,
)
from helpers import DTYPES, EXPRESSIONS, dtype_id, expression, row_loss_expression

import anl_kernels as ak
from anl_kernels.linear import chunks as chunking

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_loss(name):
    for chunks in ("one", "recompute", "tiles"):
        compare(torch.float64, name, "mean", chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call(dtype, chunks, kind):
    for name in helpers.EVERY_STATISTIC:
        compare(dtype, name, kind, chunks)
    compare(dtype, "anl_fl", kind, chunks, build=row_loss_expression)
    compare(dtype, "anl_ce", kind, chunks, bias=False)


@pytest.mark.parametrize("chunks", ["some", "recompute", "tiles"])
def test_every_backend(one_fused, chunks):
    device = helpers.DEVICES.get(one_fused.name, "cpu")
    for kind in ("mean", "entropy"):
        compare(torch.float32, "nfl+rce", kind, chunks, one_fused.name, device=device)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_keeps_the_logits(kind):
    hidden, weight, bias, target = problem(torch.float64)
    hidden = clean(hidden, target)
    for name in helpers.EVERY_STATISTIC:
        exact = truth(hidden, weight, bias, target, EXPRESSIONS[name], **KINDS[kind])
        got = fused(hidden, weight, bias, target, expression(EXPRESSIONS[name]), backend="reference", **KINDS[kind])
        for ours, true in zip(got, exact):
            torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", helpers.REPRESENTATIVE)
def test_thousands_of_classes(name):
    """Small softmax in most of the tiles: what is skipped there would be missed."""
    hidden, weight, bias, target = problem(torch.float32, 24, 5003, 32)
    terms = EXPRESSIONS[name]
    exact = truth(hidden, weight, bias, target, terms)
    criterion = expression(terms)
    plain = unfused(hidden, weight, bias, target, criterion)
    for keywords in (dict(), dict(recompute=True), dict(max_chunk_bytes=40_000), dict(max_chunk_bytes=5003 * 4 * 7)):
        got = fused(hidden, weight, bias, target, criterion, **keywords)
        assert_as_accurate(got, plain, exact, torch.float32)


def test_named_functions():
    hidden, weight, bias, target = problem(torch.float64)
    for function, terms in (
        (ak.linear_anl_ce, dict(alpha=5.0, beta=2.0)),
        (ak.linear_anl_fl, dict(alpha=3.0, beta=2.0, gamma=1.5)),
    ):
        plain = getattr(ak, function.__name__.removeprefix("linear_"))
        loss = function(hidden, weight, target, bias=bias, **terms)
        expected = plain(F.linear(clean(hidden, target), weight, bias), target, **terms)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    assert ak.linear_anl_ce(hidden, weight, target, reduction="sum") != ak.linear_anl_ce(hidden, weight, target)


# ---- shapes


@pytest.mark.parametrize("chunks", ["one", "recompute", "tiles"])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 2, 3), ()], ids=str)
def test_leading_dimensions(shape, chunks):
    rows = math.prod(shape)
    hidden, weight, bias, target = problem(torch.float64, rows, ignored=bool(shape))
    shaped, labels = hidden.view(*shape, WIDTH), target.view(shape)
    for reduction in ("mean", "none"):
        flat = fused(hidden, weight, bias, target, ak.NCE(), reduction=reduction)
        got = fused(shaped, weight, bias, labels, ak.NCE(), reduction=reduction, **CHUNKS[chunks])
        assert got[0].shape == (labels.shape if reduction == "none" else ())
        if shape:
            torch.testing.assert_close(got[0].reshape(flat[0].shape), flat[0])
            for ours, theirs in zip(got[1:], flat[1:]):
                torch.testing.assert_close(ours.view(theirs.shape), theirs)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_that_counts(rows, chunks):
    """As F.cross_entropy: mean NaN, sum 0, none zeros; gradients 0."""
    hidden, weight, bias, _ = problem(torch.float32, rows, ignored=False)
    target = torch.full((rows,), -100)
    for reduction, entropy_weight in (("mean", 0.0), ("sum", 0.0), ("none", 0.0), ("mean", 0.5), ("sum", 0.5)):
        keywords = dict(reduction=reduction, entropy_weight=entropy_weight, **CHUNKS[chunks])
        loss, *grads = fused(hidden, weight, bias, target, expression(EXPRESSIONS["anl_ce"]), **keywords)
        if reduction == "mean":
            assert loss.isnan()
        else:
            assert loss.shape == ((rows,) if reduction == "none" else ()) and (loss == 0).all()
        assert all((grad == 0).all() for grad in grads)


def test_strided_input_and_weight():
    hidden, weight, bias, target = problem(torch.float64)
    wide, tall = torch.full((ROWS, 3 * WIDTH), math.nan).double(), weight.t().contiguous().t()
    wide[:, ::3] = hidden
    expected = ak.linear_anl_ce(hidden, weight, target, bias=bias)
    torch.testing.assert_close(ak.linear_anl_ce(wide[:, ::3], tall, target, bias=bias), expected)


# ---- gradients


def test_each_gradient_only_if_needed():
    hidden, weight, bias, target = problem(torch.float64)
    all_of_them = fused(hidden, weight, bias, target, ak.NNCE())[1:]
    for keywords in CHUNKS.values():
        for needs in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)):
            leaves = [x.clone().requires_grad_(bool(need)) for x, need in zip((hidden, weight, bias), needs)]
            loss = ak.linear_robust_loss(*leaves[:2], target, ak.NNCE(), bias=leaves[2], **keywords)
            assert loss.requires_grad == any(needs)
            if any(needs):
                loss.backward()
            for leaf, need, expected in zip(leaves, needs, all_of_them):
                assert (leaf.grad is not None) == bool(need)
                if need:
                    torch.testing.assert_close(leaf.grad, expected, rtol=1e-11, atol=1e-15)


def test_products_are_made_only_for_gradients_that_are_needed(monkeypatch):
    made = []
    monkeypatch.setattr(chunking, "add_product", lambda out, *rest: made.append(out.shape) or out.zero_())
    hidden, weight, _, target = problem(torch.float32)
    for leaf in (hidden, weight):
        made.clear()
        leaf.requires_grad_()
        ak.linear_anl_ce(hidden, weight, target).backward()
        leaf.requires_grad_(False)
        assert len(made) == 1 and made[0][0] == (CLASSES if leaf is weight else int((target != -100).sum()))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_tied_weights(chunks):
    """The weight is the embedding too: both of its gradients add up."""
    _, weight, _, target = problem(torch.float64, ignored=False)
    words = torch.randint(CLASSES, (ROWS,), generator=helpers.generator(3))
    tied, plain = (weight.clone().requires_grad_() for _ in range(2))
    ak.linear_anl_ce(tied[words], tied, target, **CHUNKS[chunks]).backward()
    ak.anl_ce(F.linear(plain[words], plain), target).backward()
    torch.testing.assert_close(tied.grad, plain.grad, rtol=1e-10, atol=1e-14)


def test_grad_output_and_accumulation():
    hidden, weight, bias, target = problem(torch.float64)
    _, *expected = fused(hidden, weight, bias, target, ak.NCE())
    for keywords in CHUNKS.values():
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        loss = ak.linear_robust_loss(*leaves[:2], target, ak.NCE(), bias=leaves[2], **keywords)
        loss.backward(torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
        loss.backward(torch.tensor(-1.0, dtype=torch.float64))
        for leaf, once in zip(leaves, expected):
            torch.testing.assert_close(leaf.grad, 2.0 * once, rtol=1e-10, atol=1e-14)


def test_a_learned_loss():
    """Parameters inside a RowLoss are trained too."""
    hidden, weight, bias, target = problem(torch.float64)
    slopes = [torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    losses = [ak.RowLoss(lambda s, t=t: -s.target_log_prob * t.exp() / s.neg_log_sum + t**2) for t in slopes]
    ak.linear_robust_loss(hidden, weight, target, losses[0], bias=bias, max_chunk_bytes=10 * BYTES).backward()
    losses[1](F.linear(clean(hidden, target), weight, bias), target).backward()
    torch.testing.assert_close(slopes[0].grad, slopes[1].grad)


def test_gradcheck():
    hidden, weight, bias, target = problem(torch.float64, 5, 7, 3)
    hidden = clean(hidden, target)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for keywords in (dict(), dict(reduction="none"), dict(entropy_weight=0.5), dict(max_chunk_bytes=100)):
        for criterion in (5 * ak.NCE() + ak.NNCE(), ak.CE() + ak.GCE()):
            assert torch.autograd.gradcheck(
                lambda x, w, b, c=criterion, k=keywords: ak.linear_robust_loss(x, w, target, c, bias=b, **k), leaves
            )


def test_the_same_bits_from_run_to_run():
    hidden, weight, bias, target = problem(torch.bfloat16, 300, 1001, 64)
    for keywords in CHUNKS.values():
        first, second = (fused(hidden, weight, bias, target, 5 * ak.NFL() + ak.NNFL(), **keywords) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_weight_gradient_is_summed_in_float32(dtype, recompute):
    """Thousands of rows with a gradient of one sign, in chunks of 16: a sum in bfloat16 stops growing."""
    rows, classes, width = 8192, 4, 8
    hidden, weight = torch.ones(rows, width, dtype=dtype), torch.zeros(classes, width, dtype=dtype)
    target = torch.zeros(rows, dtype=torch.int64)
    keywords = dict(reduction="mean", recompute=recompute, max_chunk_bytes=16 * classes * dtype.itemsize)
    _, _, grad, _ = fused(hidden, weight, None, target, ak.CE(), **keywords)
    torch.testing.assert_close(grad[:, 0].double(), torch.tensor([-0.75, 0.25, 0.25, 0.25]).double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_bias_gradient_and_the_loss_are_summed_in_float32_or_more(dtype, recompute):
    """In chunks of 16 rows, each as the one before."""
    rows, classes = 8192, 4
    hidden, weight, bias = torch.zeros(rows, 2, dtype=dtype), torch.zeros(classes, 2, dtype=dtype), torch.zeros(classes)
    target = torch.zeros(rows, dtype=torch.int64)
    keywords = dict(reduction="sum", recompute=recompute, max_chunk_bytes=16 * classes * dtype.itemsize)
    with torch.autocast("cpu", dtype=dtype):  # the bias stays float32
        loss, _, _, grad = fused(hidden, weight, bias, target, ak.CE(), **keywords)
    torch.testing.assert_close(loss.double(), torch.tensor(rows * math.log(4)).double(), rtol=3e-7, atol=0)
    torch.testing.assert_close(grad, rows * torch.tensor([-0.75, 0.25, 0.25, 0.25]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_the_input_gradient_is_summed_in_float32_over_tiles(dtype):
    """A thousand tiles of four classes, each with the same small gradient."""
    rows, classes = 8, 4096
    hidden, weight = torch.zeros(rows, 2, dtype=dtype), torch.ones(classes, 2, dtype=dtype)
    weight[0] = 0.0
    target = torch.zeros(rows, dtype=torch.int64)
    _, grad, *_ = fused(hidden, weight, None, target, ak.CE(), reduction="sum", max_chunk_bytes=32 * dtype.itemsize)
    torch.testing.assert_close(grad.float(), torch.ones(rows, 2), rtol=5e-3, atol=0)


def test_a_gradscaler_saves_small_gradients():
    """In float16 by default: the factor enters before what is small is rounded."""
    hidden, weight, _, target = problem(torch.float16, 300, 20, 8, ignored=False)
    weight = weight * 1e-4  # and so are the input's gradients
    scale = 2.0**16
    _, *exact = gradients(
        lambda x, w: F.cross_entropy(F.linear(x, w), target) * scale, hidden.double(), weight.double()
    )
    loss = lambda x, w: ak.linear_robust_loss(x, w, target, ak.CE()) * scale
    for ours, true in zip(gradients(loss, hidden, weight)[1:], exact):
        assert (ours - true).abs().max() < 2e-3 * true.abs().max()


@pytest.mark.parametrize("rows, classes", [(7, 200), (200, 7)], ids=["wide", "tall"])
@pytest.mark.parametrize("block", [4, 100, 2000], ids="{} bytes".format)
@pytest.mark.parametrize("chunks", [dict(), dict(max_chunk_bytes=1200), dict(recompute=True)], ids=str)
def test_products_in_blocks(monkeypatch, rows, classes, block, chunks):
    """In half precision, whose operands are made float32 one block at a time."""
    hidden, weight, bias, target = problem(torch.bfloat16, rows, classes, 5)
    expected = fused(hidden, weight, bias, target, ak.NCE(), **chunks)
    monkeypatch.setattr(chunking, "BLOCK_BYTES", block)
    for ours, true in zip(fused(hidden, weight, bias, target, ak.NCE(), **chunks), expected):
        torch.testing.assert_close(ours, true, rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("chunks", ["one", "recompute", "tiles"])
def test_autocast_computes_as_linear(chunks):
    """Products in bfloat16 of float32 parameters; their gradients are not rounded to it."""
    hidden, weight, bias, target = problem(torch.float32)
    hidden = clean(hidden, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(hidden, weight, bias, target, ak.NCE(), **CHUNKS[chunks])
        plain = unfused(hidden, weight, bias, target, ak.NCE())
    half = [x.bfloat16() for x in (hidden, weight, bias)]
    exact = truth(*half, target, EXPRESSIONS["nce"])
    assert_as_accurate(got, plain, exact, torch.bfloat16)
    assert all(x.dtype == torch.float32 for x in got)
    assert all(not torch.equal(x, x.bfloat16().float()) for x in got[2:])
    doubles = [x.double() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # float64 stays, as in F.linear
        assert torch.equal(fused(*doubles, target, ak.NCE())[2], fused(*doubles, target, ak.NCE())[2])
        assert fused(*doubles, target, ak.NCE())[0].dtype == torch.float64


# ---- transforms


def test_compile_and_func_make_the_logits():
    hidden, weight, bias, target = problem(torch.float64, 8, ignored=False)
    loss, by_hidden, by_weight, _ = fused(hidden, weight, bias, target, ak.NCE())
    value = lambda x, w: ak.linear_robust_loss(x, w, target, ak.NCE(), bias=bias)
    grads = torch.func.grad(value, argnums=(0, 1))(hidden, weight)
    torch.testing.assert_close(grads, (by_hidden, by_weight))
    torch._dynamo.reset()
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    leaf = hidden.clone().requires_grad_()
    result = compiled(leaf, weight)
    result.backward()
    torch.testing.assert_close(result.detach(), loss)
    torch.testing.assert_close(leaf.grad, by_hidden)


# ---- errors


def bad_calls():
    x, w, _, y = problem(torch.float32, 4, ignored=False)
    yield dict(input=x[:, :-1]), ValueError, "input must be"
    yield dict(weight=w[0]), ValueError, "input must be"
    yield dict(weight=w[:1]), ValueError, "2 classes"
    yield dict(weight=w.double()), TypeError, "one dtype"
    yield dict(bias=torch.zeros(CLASSES - 1)), ValueError, "bias must be"
    yield dict(target=y[:3]), ValueError, "target must have"
    yield dict(target=y.float()), TypeError, "class indices"
    yield dict(class_weight=torch.ones(3)), ValueError, "class_weight must be"
    yield dict(class_weight=torch.ones(CLASSES, requires_grad=True)), ValueError, "constant"
    yield dict(max_chunk_bytes=0), ValueError, "max_chunk_bytes"
    yield dict(min_prob=0.5, loss=ak.NNCE()), ValueError, "min_prob"
    yield dict(reduction="median"), ValueError, "reduction"
    yield dict(entropy_weight=1.0, reduction="none"), ValueError, "entropy"
    yield dict(backend="nonsense"), ValueError, "no such backend"
    yield dict(loss="anl"), TypeError, "expression"
    yield dict(target=torch.tensor([0, 1, CLASSES, 2])), IndexError, "out of bounds"
    yield dict(target=torch.tensor([0, 1, -1, 2])), IndexError, "out of bounds"
    yield dict(class_group="tp"), (TypeError, ValueError), "class_group"
    yield dict(input=[1.0]), TypeError, "input must be a tensor"
    yield dict(weight=None), TypeError, "weight must be a tensor"
    yield dict(target=[1, 2, 3, 4]), TypeError, "target must be a tensor"
    yield dict(bias=0.5), TypeError, "bias must be a tensor"
    yield dict(class_weight=[1.0] * CLASSES), TypeError, "class_weight must be a tensor"
    yield dict(class_weight=torch.ones(CLASSES, dtype=torch.int64)), TypeError, "class_weight must be floating point"
    yield dict(class_weight=torch.ones(CLASSES, device="meta")), ValueError, "class_weight is on meta"
    yield dict(input=x.to_sparse()), TypeError, "input must be a dense tensor"
    yield dict(weight=w.to_sparse()), TypeError, "weight must be a dense tensor"
    yield dict(class_weight=torch.ones(CLASSES).to_sparse()), TypeError, "class_weight must be a dense tensor"
    yield dict(max_chunk_bytes=1e6), TypeError, "max_chunk_bytes must be an int"
    yield dict(max_chunk_bytes=True), TypeError, "max_chunk_bytes must be an int"


@pytest.mark.parametrize(
    "changes, error, words", list(bad_calls()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_errors(changes, error, words):
    x, w, _, y = problem(torch.float32, 4, ignored=False)
    call = dict(input=x, weight=w, target=y, loss=ak.NCE(), **{}) | changes
    with pytest.raises(error, match=words):
        ak.linear_robust_loss(**call)
