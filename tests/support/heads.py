"""Linear heads under test: a problem, its truth in float64, and the comparison."""

import math

import helpers
import oracle
import torch
import torch.nn.functional as F
from helpers import EPS, EXPRESSIONS, expression

import anl_kernels as ak

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
