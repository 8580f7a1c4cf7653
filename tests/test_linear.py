"""The fused linear head: against the oracle in float64, in chunks and tiles of every size; memory; how it is called."""

import json
import math
import pathlib
import subprocess
import sys

import helpers
import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, EPS, EXPRESSIONS, dtype_id, expression, row_loss_expression
from torch.autograd import profiler

import anl_kernels as ak
from anl_kernels.cli import timing
from anl_kernels.cli.timing import Run, profile
from anl_kernels.linear import chunks as chunking

ROWS, CLASSES, WIDTH = 43, 37, 16
WEIGHTS = torch.linspace(0.1, 2, CLASSES)
BYTES = 8 * CLASSES  # of a row of float64 logits

# How chunks are made: whole rows at once, a few, one at a time; tiles of classes; the logits made again in backward.
CHUNKS = {
    "one": dict(),
    "some": dict(max_chunk_bytes=10 * BYTES),
    "recompute": dict(recompute=True),
    "recompute_some": dict(recompute=True, max_chunk_bytes=10 * BYTES),
    "tiles": dict(max_chunk_bytes=576),
}
KINDS = {
    "mean": dict(),
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "entropy": dict(entropy_weight=0.7),
    "weight": dict(class_weight=WEIGHTS),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """As few rows per chunk as asked for, before a chunk becomes some classes of more rows."""
    monkeypatch.setattr(chunking, "MIN_ROWS", 8)
    monkeypatch.setattr(chunking, "TILE_ROWS", 16)


def problem(dtype, rows=ROWS, classes=CLASSES, width=WIDTH, seed=0, ignored=True):
    """(input, weight, bias, target): logits of standard deviation 4, some rows confident, some ignored and NaN."""
    g = helpers.generator(seed)
    weight = torch.randn(classes, width, generator=g, dtype=torch.float64) * 4 / math.sqrt(width)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=g)
    hidden[::4] = weight[target[::4]] * 0.8
    bias = torch.randn(classes, generator=g, dtype=torch.float64)
    if ignored:
        target[2::7] = -100
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    hidden[target == -100] = math.nan
    return hidden, weight, bias, target


def clean(hidden, target):
    return torch.where((target == -100).unsqueeze(-1), torch.zeros((), dtype=hidden.dtype), hidden)


def seeds(loss, target):
    return torch.rand(loss.shape, generator=helpers.generator(9)).to(loss.dtype) - 0.5 if loss.dim() else None


def gradients(function, *tensors):
    """(loss, the gradients by the tensors); None in tensors stays None."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    loss.backward(seeds(loss, None))
    return [loss.detach(), *(None if x is None else x.grad for x in leaves)]


def truth(hidden, weight, bias, target, terms, class_weight=None, **keywords):
    given = (clean(hidden, target).double(), weight.double(), None if bias is None else bias.double())

    def value(x, w, b):
        if class_weight is not None:
            keywords["weight"] = class_weight.double()
        return oracle.loss(F.linear(x, w, b), target, terms, **keywords)

    return gradients(value, *given)


def unfused(hidden, weight, bias, target, criterion, class_weight=None, **keywords):
    def value(x, w, b):
        return ak.robust_loss(F.linear(x, w, b), target, criterion, weight=class_weight, **keywords)

    return gradients(value, clean(hidden, target), weight, bias)


def fused(hidden, weight, bias, target, criterion, **keywords):
    def value(x, w, b):
        return ak.linear_robust_loss(x, w, target, criterion, bias=b, **keywords)

    return gradients(value, hidden, weight, bias)


def assert_as_accurate(got, plain, exact, dtype):
    """No further from float64 than the loss of the full logits, and a few roundings of the largest element."""
    for name, ours, theirs, true in zip(("loss", "input", "weight", "bias"), got, plain, exact):
        if true is None:
            assert ours is None
            continue
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
        error, other = ((x.double() - true).abs().max().item() for x in (ours, theirs))
        rounding = EPS[torch.float32 if name == "loss" and dtype != torch.float64 else dtype]
        few = 8 if dtype != torch.float64 else 40  # float64 itself is not exact
        allowed = 2 * other + few * rounding * true.abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, of the full logits {other:.3g}, allowed {allowed:.3g}"


def compare(dtype, name, kind, chunks, backend="auto", build=expression, bias=True, device="cpu"):
    hidden, weight, b, target = problem(dtype)
    b = b if bias else None
    keywords = dict(KINDS[kind])
    exact = truth(hidden, weight, b, target, EXPRESSIONS[name], **keywords)
    criterion = build(EXPRESSIONS[name])
    plain = unfused(hidden, weight, b, target, criterion, **keywords)
    keywords = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in keywords.items()}
    given = [None if x is None else x.to(device) for x in (hidden, weight, b, target)]
    got = fused(*given, criterion, backend=backend, **keywords, **CHUNKS[chunks])
    got = [None if x is None else x.cpu() for x in got]
    assert_as_accurate(got, plain, exact, dtype)
    assert (got[1][target == -100] == 0).all()


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_loss(name):
    for chunks in ("one", "recompute", "tiles"):
        compare(torch.float64, name, "mean", chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call(dtype, chunks, kind):
    for name in helpers.REPRESENTATIVE:
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
    for name in helpers.REPRESENTATIVE:
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
    """Of chunks of 16 rows, each as the one before."""
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
    """Of half precision, whose operands are made float32 a block at a time."""
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


# ---- chunks and memory


def count_rows(monkeypatch, name):
    kernels = ak.registry.choose(
        torch.empty(0, 2), ak.functional.checked_call(ak.NCE(), -100, "mean", 0.0, 1e-7, False, None, "auto")
    )
    seen, original = [], getattr(kernels, name)
    monkeypatch.setattr(
        kernels, name, lambda call, logits, *rest: seen.append(logits.shape) or original(call, logits, *rest)
    )
    return seen


def test_ignored_rows_cost_nothing(monkeypatch):
    hidden, weight, _, target = problem(torch.float32)
    rows = int((target != -100).sum())
    for name, keywords in (("row_loss", dict()), ("row_stats", dict(recompute=True))):
        seen = count_rows(monkeypatch, name)
        fused(hidden, weight, None, target, ak.NCE(), **keywords)
        assert seen == [(rows, CLASSES)]


def test_chunks_keep_to_the_memory_asked_for(monkeypatch):
    hidden, weight, _, target = problem(torch.float32, ignored=False)
    for limit in (4 * CLASSES * ROWS, 4 * CLASSES * 20, 4 * CLASSES * 4, 4 * CLASSES, 64):
        shapes = []
        for name in ("row_loss", "slice_stats"):
            shapes.append(count_rows(monkeypatch, name))
        fused(hidden, weight, None, target, ak.NCE(), max_chunk_bytes=limit)
        found = shapes[0] + shapes[1]
        assert max(math.prod(shape) for shape in found) * 4 <= limit
        assert 2 * max(math.prod(shape) for shape in found) * 4 >= min(limit, 4 * CLASSES * ROWS)
        monkeypatch.undo()


def test_plans(monkeypatch):
    """As many equal chunks as the memory asks for; a million classes still give products of 32 rows and more."""
    monkeypatch.undo()
    gib = 1 << 30
    assert chunking.plan(4096, 1000, torch.float32, "cpu", None) == (4096, 1000)
    assert chunking.plan(4096, 50_000, torch.float32, "cpu", None) == (1024, 50_000)
    assert chunking.plan(4096, 1_000_000, torch.bfloat16, "cuda", None) == (512, 1_000_000)
    rows, classes = chunking.plan(256, 1_000_000, torch.float32, "cpu", None)
    assert classes == 1_000_000 and 32 <= rows <= 67
    rows, classes = chunking.plan(256, 100_000_000, torch.float32, "cpu", gib)
    assert gib / 2 <= rows * classes * 4 <= gib and rows == 256
    assert chunking.plan(256, 1000, torch.float32, "cpu", 32 * 4000) == (32, 1000)
    assert chunking.plan(10, 1000, torch.float32, "cpu", 4 * 4000)[0] == 10
    assert chunking.spans(10, chunking.even(10, 4)) == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_a_chunk_and_the_gradients(recompute, reduction):
    rows, classes, width, limit = 2000, 5000, 32, 1 << 20
    hidden, weight, bias, target = problem(torch.float32, rows, classes, width, ignored=False)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    keywords = dict(recompute=recompute, reduction=reduction, max_chunk_bytes=limit)

    def step():
        loss = ak.linear_robust_loss(*leaves[:2], target, 5 * ak.NCE() + ak.NNCE(), bias=leaves[2], **keywords)
        loss.backward(torch.ones_like(loss))
        for leaf in leaves:
            leaf.grad = None

    step()
    grads = 4 * (hidden.numel() + weight.numel() + bias.numel())
    peak = profile(Run(step)).peak_bytes
    assert 0.9 * (grads + limit / 2) <= peak <= grads + limit + 100 * 8 * (rows + classes) // (1 if recompute else 4)
    assert peak < 4 * rows * classes / 4  # a quarter of the logits


@pytest.mark.unpoisoned
def test_backward_hands_out_the_memory_of_the_gradients():
    """What forward made is scaled where it lies, unless the graph is kept."""
    hidden, weight, bias, target = problem(torch.float32, 200, 500, 64, ignored=False)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = lambda: ak.linear_robust_loss(*leaves[:2], target, ak.NCE(), bias=leaves[2]) * 2
    loss().backward()
    for leaf in leaves:
        leaf.grad = None
    made = loss()
    assert profile(Run(made.backward)).peak_bytes < 4 * hidden.numel() / 2


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_what_waits_for_backward(dtype):
    """The gradients, in the dtypes that they will have; with recompute 13 numbers a row. No chunk is kept."""
    rows, classes, width = 400, 300, 64
    hidden, weight, bias, target = problem(dtype, rows, classes, width, ignored=False)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for recompute in (False, True):
        keywords = dict(bias=leaves[2], recompute=recompute)
        ak.linear_robust_loss(*leaves[:2], target, ak.NCE(), **keywords)
        with timing.quiet_stderr(), profiler.profile(use_kineto=True, profile_memory=True) as seen:
            loss = ak.linear_robust_loss(*leaves[:2], target, ak.NCE(), **keywords)
        held = sum(event.nbytes() for event in seen.kineto_results.events() if event.name() == "[memory]")
        del loss
        expected = 13 * 8 * rows if recompute else sum(x.nbytes for x in leaves)
        assert expected <= held <= expected + 16 * rows + 8 * classes, recompute


def test_frozen_weight_needs_no_gradient_memory():
    rows, classes, width = 64, 20_000, 64
    hidden, weight, _, target = problem(torch.float32, rows, classes, width, ignored=False)
    hidden.requires_grad_()
    keywords = dict(max_chunk_bytes=1 << 18)
    step = lambda: ak.linear_anl_ce(hidden, weight, target, **keywords).backward()
    step()
    assert profile(Run(step)).peak_bytes < 4 * weight.numel() / 4


@pytest.mark.thorough
def test_the_benchmark(tmp_path):
    """Its table of a small case: gradients compared, times and peaks of every contender; the full logits need most."""
    pytest.importorskip("tabulate")
    file = tmp_path / "linear.json"
    script = pathlib.Path(__file__).parents[1] / "benchmarks" / "linear.py"
    sizes = "--device cpu --classes 500 --width 8 --logits 100000 --chunk-mib 0 --rounds 1".split()
    subprocess.run([sys.executable, script, *sizes, "--json", file], check=True, capture_output=True)
    results = {result["contender"]: result for result in json.loads(file.read_text())["results"]}
    assert results["ours"]["error"] < 1e-5 and all(result["median_s"] > 0 for result in results.values())
    full = results.pop("F.linear + ours")["peak_bytes"]
    assert full >= 4 * 100_000 > 1.5 * max(result["peak_bytes"] for result in results.values())
    assert "| 500 |" in file.with_suffix(".md").read_text().replace("  ", "")


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
