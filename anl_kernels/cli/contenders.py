"""What `bench` and benchmarks/speed time side by side, and how a result is checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import anl_kernels

from . import formulas
from .workloads import Workload

LOSSES = ("anl_ce", "anl_fl")


class Run(NamedTuple):
    """`call` is timed and returns (loss, gradient), or a copy; `before` is not timed."""

    call: Callable
    before: Callable | None = None


class Contender(NamedTuple):
    name: str
    prepare: Callable[[Tensor, Tensor], Run]
    formula: Callable | None = None  # float64 truth of (loss, gradient); None: the call copies the logits
    extra: str | None = None  # what it may hold above its inputs, in the package's promise; None: no promise


def forward_backward(function: Callable, logits: Tensor, target: Tensor) -> Run:
    logits = logits.detach().requires_grad_()

    def call():
        loss = function(logits, target)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    return Run(call)


def overwriting(function: Callable, logits: Tensor, target: Tensor) -> Run:
    """inplace=True: on logits that are no leaf, as a model's are, and that are restored outside the timed region."""
    kept = logits.detach()
    work = kept.clone().requires_grad_().clone()

    def before():
        with torch.no_grad():
            work.copy_(kept)

    def call():
        loss = function(work, target, inplace=True)
        return loss.detach(), torch.autograd.grad(loss, work)[0]

    return Run(call, before)


def copying(logits: Tensor, target: Tensor) -> Run:
    logits, out = logits.detach(), torch.zeros_like(logits)
    return Run(lambda: out.copy_(logits))


def cloning(logits: Tensor, target: Tensor) -> Run:
    logits = logits.detach()
    return Run(lambda: logits.clone())


def compiled(function: Callable, logits: Tensor, target: Tensor) -> Run:
    torch._dynamo.reset()
    return forward_backward(torch.compile(function, fullgraph=True, dynamic=False), logits, target)


def contenders(loss: str, compile: bool = True) -> list[Contender]:
    """Everything timed against `loss`, this package first. `compile`: with torch.compile of the formulas."""
    ours, formula = getattr(anl_kernels, loss), getattr(formulas, loss)

    def plain(logits, target):
        return formula(logits.float(), target).mean()  # in float32, as autocast runs log_softmax

    found = [
        Contender("anl_kernels", lambda z, y: forward_backward(ours, z, y), formula, "gradient"),
        Contender("anl_kernels inplace", lambda z, y: overwriting(ours, z, y), formula, "nothing"),
        Contender("logits.clone()", cloning),
        Contender("out.copy_(logits)", copying),
        Contender("F.cross_entropy", lambda z, y: forward_backward(F.cross_entropy, z, y), formulas.cross_entropy),
        Contender("formulas, eager", lambda z, y: forward_backward(plain, z, y), formula),
    ]
    if compile:
        found.append(Contender("formulas, torch.compile", lambda z, y: compiled(plain, z, y), formula))
    return found


class Truth(NamedTuple):
    loss: float
    grad: Tensor  # float64


def truth(formula: Callable, logits: Tensor, target: Tensor, chunk: int = 1 << 22) -> Truth:
    """The mean loss and its gradient in float64 by autograd, a few rows at a time."""
    rows = target.numel()
    grad = torch.empty(logits.shape, dtype=torch.float64)
    step = max(1, chunk // max(1, logits[0].numel()))
    total = 0.0
    for start in range(0, logits.shape[0], step):
        part = logits[start : start + step].detach().double().requires_grad_()
        loss = formula(part, target[start : start + step]).sum() / rows
        (grad[start : start + step],) = torch.autograd.grad(loss, part)
        total += loss.item()
    return Truth(total, grad)


class Error(NamedTuple):
    """Relative errors: of the loss, and of the gradient in the Euclidean norm."""

    loss: float
    grad: float

    def wrong(self, dtype: torch.dtype) -> bool:
        """Far above what rounding explains: another formula, a forgotten row, a stale result."""
        loss, grad = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 1e-3)}.get(dtype, (2e-2, 5e-2))
        return not (self.loss <= loss and self.grad <= grad)


def error(result: tuple[Tensor, Tensor], expected: Truth) -> Error:
    loss, grad = result
    squared = torch.zeros((), dtype=torch.float64)
    for got, want in zip(grad, expected.grad):
        squared += (got.double() - want).square().sum()
    scale = expected.grad.norm().item() or 1.0
    return Error(abs(loss.item() - expected.loss) / max(abs(expected.loss), 1e-12), squared.sqrt().item() / scale)


def verdict(run: Run, logits: Tensor, expected: Truth | None) -> tuple[bool, dict]:
    """(whether one call of `run` gives the truth, its errors)."""
    if run.before:
        run.before()
    result = run.call()
    if expected is None:
        return torch.equal(result, logits), {}
    found = error(result, expected)
    return not found.wrong(logits.dtype), found._asdict()


def promised_bytes(contender: Contender, workload: Workload) -> int | None:
    """The most that `contender` may hold above its inputs: the gradient and O(N + K), or O(N + K) alone."""
    if contender.extra is None:
        return None
    linear = 48 * workload.rows + 16 * workload.shape[1] + (64 << 10)
    return linear + (workload.bytes if contender.extra == "gradient" else 0)
