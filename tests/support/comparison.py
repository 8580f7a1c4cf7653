"""The package compared with the oracle: how far it may be from float64, row by row."""

import hashlib
import math
from functools import lru_cache
from typing import NamedTuple

import oracle
import torch
from expressions import EPS, expression
from problems import DEVICES, Alias, moved, on_cpu


def acc(dtype):
    """What a dtype is computed in, and the loss's own dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def calculate(logits, target, criterion, grad_output=None, leaf=True, **keywords):
    """(loss, gradient) of the package; leaf=False puts an alias between, for what may not be done to a leaf.

    Tensors go to the backend's device, in the layout they have, and the results come back to where the logits were.
    """
    import anl_kernels as ak

    where, device = logits.device, DEVICES.get(keywords.get("backend"), "cpu")
    logits = moved(logits.detach(), device).requires_grad_()
    keywords = {k: moved(v, device) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    given = logits if leaf else Alias.apply(logits)
    loss = ak.robust_loss(given, moved(target, device), criterion, **keywords)
    seed = torch.ones_like(loss) if grad_output is None else moved(grad_output, device)
    (grad,) = torch.autograd.grad(loss, logits, seed)
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    return loss.detach().to(where), grad.to(where)


@on_cpu
def scales(grad, target):
    """What an element's error is measured by: the largest of its row, the target's and the others' apart."""
    rows = oracle.as_rows(grad.detach().double()).abs()
    labels = target.reshape(-1, 1).long().clamp(0, rows.shape[1] - 1)
    others = rows.scatter(1, labels, 0.0).amax(1, keepdim=True)
    all_ = rows.amax(1, keepdim=True)
    return others.expand_as(rows).scatter(1, labels, all_)


# How far the package may be from float64, row by row (test_accuracy asks for more, of many rows at once):
PLAIN_FACTOR = 3  # times plain PyTorch's own error in that row, one sample of what rounding does there,
ROUNDINGS = 16  # half ulps of what an element is measured by,
CANCELLED = 8  # and half ulps of the largest gradient the loss ever has: what is left where terms of that size cancel.
CANCELLED_MORE = 64  # of them in float64, whose sums no wider number takes, and in plain PyTorch


class Truth(NamedTuple):
    """The oracle's float64 loss and gradient, and how far off plain PyTorch is in the arithmetic of the package."""

    loss: torch.Tensor
    grad: torch.Tensor
    loss_error: torch.Tensor  # as loss
    grad_error: torch.Tensor  # (rows, 1): the largest of each row
    magnitude: torch.Tensor  # (rows, 1): how large the gradient of the row could have been
    ones: float  # how much of the loss is "1 - a ratio"
    dtype: torch.dtype  # of the arithmetic

    def of(self, rows):
        """Those rows of a loss without reduction."""
        return Truth(
            self.loss[rows],
            oracle.as_rows(self.grad)[rows],
            self.loss_error[rows],
            self.grad_error[rows],
            self.magnitude[rows],
            self.ones,
            self.dtype,
        )


def truth(logits, target, terms, **keywords):
    """Made once of the same numbers: every backend, and every way to a gradient, is compared with it."""
    problem = Problem(logits, target, terms, keywords)  # large ones are not kept: a thousand of them fill the memory
    return kept_truth(problem) if logits.numel() <= 100_000 else problem.solve()


class Problem:
    """The arguments of `truth`; two are equal if they hold the same numbers."""

    def __init__(self, logits, target, terms, keywords):
        self.given = {"logits": logits, "target": target, **keywords}
        self.terms = terms
        self.key = freeze(terms), tuple((name, content_of(value)) for name, value in sorted(self.given.items()))

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key

    def solve(self):
        return calculate_truth(terms=self.terms, **self.given)


def content_of(value):
    if not isinstance(value, torch.Tensor):
        return value
    numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return value.dtype, value.shape, hashlib.sha256(numbers).digest()


kept_truth = lru_cache(maxsize=1000)(Problem.solve)


@on_cpu
def calculate_truth(logits, target, terms, **keywords):
    """The error of float64 itself is that of float32, 2^29 times smaller; 64 times that, for chance."""
    exact_loss, exact_grad = oracle.loss_and_grad(logits, target, terms, **keywords)
    plain_loss, plain_grad = oracle.loss_and_grad(logits, target, terms, dtype=torch.float32, **keywords)
    digits = 2.0**-26 if logits.dtype == torch.float64 else 1.0
    grad_error = digits * oracle.as_rows((plain_grad.double() - exact_grad).abs()).amax(1, keepdim=True).nan_to_num(0)
    loss_error = digits * (plain_loss.double() - exact_loss).abs().nan_to_num(0)
    classes, factors = oracle.as_rows(logits).shape[1], row_factors(target, **keywords)
    magnitude = largest_gradient(freeze(terms), classes, keywords.get("min_prob", 1e-7)) + squares_that_cancel(
        terms, classes
    )
    magnitude = magnitude * factors.view(-1, 1)
    if keywords.get("entropy_weight"):
        valid = (factors > 0).view(-1, 1)
        magnitude = magnitude + valid * abs(keywords["entropy_weight"]) * math.log(classes) / valid.sum().clamp(min=1)
    ones = sum(abs(coefficient) for coefficient, name, _ in terms if name in ("nnce", "nnfl"))
    ones *= 1.0 if keywords.get("reduction") == "none" else factors.sum().item()
    return Truth(exact_loss, exact_grad, loss_error, grad_error, magnitude, ones, acc(logits.dtype))


def freeze(terms):
    return tuple((coefficient, name, tuple(parameters.items())) for coefficient, name, parameters in terms)


def squares_that_cancel(terms, classes):
    """p_j^2 and sum p^2, in the gradient at a wrong class with p_j near 1: more than the gradient ever is."""
    return sum(abs(c) / {"mse": 1, "amse": classes}[name] for c, name, _ in terms if name in ("mse", "amse"))


@lru_cache(maxsize=4096)
def largest_gradient(frozen, classes, min_prob):
    """The largest derivative of a row's loss where it matters: nothing known yet, or the target tied with another."""
    z = torch.zeros(3, classes, dtype=torch.float64)
    z[1, :2] = math.log(classes)
    z[2, :2] = math.log(classes) + 3
    terms = tuple((coefficient, name, dict(parameters)) for coefficient, name, parameters in frozen)
    _, grad = oracle.loss_and_grad(z, torch.zeros(3, dtype=torch.int64), terms, reduction="sum", min_prob=min_prob)
    return grad.abs().max().item()


def row_factors(target, *, grad_output=None, weight=None, ignore_index=-100, reduction="mean", **others):
    """(N,): what the reduction multiplies each row's gradient by, without sign."""
    labels = target.reshape(-1).long()
    valid = labels != ignore_index
    factors = (
        torch.ones(len(labels), dtype=torch.float64)
        if weight is None
        else weight.double()[labels.where(valid, torch.tensor(0))]
    )
    factors = factors * valid
    if reduction == "mean" and valid.any():
        factors = factors / factors.sum()
    return (factors * (1.0 if grad_output is None else torch.as_tensor(grad_output).double())).abs()


@on_cpu
def assert_as_accurate(loss, grad, target, true, scaled=0.0):
    """loss and grad against float64; the margin is plain PyTorch's own error, and a few roundings.

    For half precision the arithmetic is float32's, and the gradient is rounded once: half an ulp. scaled: it was
    rounded before it was multiplied by that, and once more after.
    """
    assert loss.dtype == true.dtype
    check_loss(loss, true)
    check_grad(grad, target, true, scaled)


@on_cpu
def check_loss(loss, true):
    exact = true.loss
    assert loss.shape == exact.shape
    assert torch.equal(loss.isnan(), exact.isnan())
    relative = 1e-6 if true.dtype == torch.float32 else 1e-14
    largest = true.ones + (exact.nan_to_num(0).abs().max().item() if exact.numel() else 0.0)
    allowed = torch.maximum(relative * exact.abs(), PLAIN_FACTOR * true.loss_error) + 4 * EPS[true.dtype] * largest
    bad = ((loss.double() - exact).abs() > allowed) & ~exact.isnan()
    assert not bad.any(), f"loss {loss[bad].tolist()}, exact {exact[bad].tolist()}, allowed {allowed[bad].tolist()}"


@on_cpu
def check_grad(grad, target, true, scaled=0.0):
    exact, rows, dtype = oracle.as_rows(true.grad), oracle.as_rows(grad.double()), true.dtype
    assert torch.equal(rows.isnan().any(1), exact.isnan().any(1)), "NaN rows"
    scale = scales(exact, target)
    magnitude = true.magnitude + (scale.nan_to_num(0).max() if scale.numel() else 0.0)
    cancelled = CANCELLED_MORE if dtype == torch.float64 else CANCELLED
    allowed = PLAIN_FACTOR * true.grad_error + EPS[dtype] * (ROUNDINGS * scale + cancelled * magnitude)
    if grad.dtype != dtype:  # the rounding of the gradient itself, subnormals included
        smallest = torch.finfo(grad.dtype).smallest_normal * EPS[grad.dtype]
        once, again = (
            1.001 * (EPS[grad.dtype] * exact.abs() + smallest),
            EPS[grad.dtype] * exact.abs() + smallest * scaled,
        )
        allowed = allowed + (once + again if scaled else once)
        exact = exact.clamp(torch.finfo(grad.dtype).min, torch.finfo(grad.dtype).max)
    error = (rows - exact).abs()
    bad = error > allowed
    if bad.any():
        worst = (error / allowed.clamp(min=1e-300)).nan_to_num(0).argmax()
        row, k = divmod(int(worst), rows.shape[1])
        raise AssertionError(
            f"{int(bad.sum())} elements; worst: row {row}, class {k} (target {target.reshape(-1)[row]}): "
            f"{rows[row, k].item():.9g}, exact {exact[row, k].item():.9g}, "
            f"error {error[row, k].item():.3g}, allowed {allowed[row, k].item():.3g}"
        )


def check(logits, target, terms, criterion=None, scaled=0.0, **keywords):
    """Runs the package and compares; keywords go to both, save those that only the package knows."""
    ours = {k: keywords.pop(k) for k in ("backend", "recompute", "inplace") if k in keywords}
    true = truth(logits, target, terms, **keywords)
    result = calculate(logits, target, criterion or expression(terms), **ours, **keywords)
    assert_as_accurate(*result, target, true, scaled)
    return result
