"""What `bench` and benchmarks/speed time side by side, and how a result is checked before it is timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

import anl_kernels

from .. import formulas
from .workloads import Workload

LOSSES = ("anl_ce", "anl_fl")
PHASES = ("both", "forward", "backward")


class Run(NamedTuple):
    """`call` is timed and returns (loss, gradient), a loss, a gradient or a copy; `before` is not timed."""

    call: Callable
    before: Callable | None = None


class Contender(NamedTuple):
    name: str
    prepare: Callable[[Tensor, Tensor, str], Run]  # (logits, target, phase)
    formula: Callable | None = None  # float64 truth of (loss, gradient); None: the call copies the logits
    extra: str | None = None  # what it may hold above its inputs, in the package's promise; None: no promise
    package: str | None = None  # a peer: compared where this package is installed and the tensors are on a GPU


class Problem:
    """A loss of these logits, run forward, backward or both. An overwriting one finds its logits restored, untimed."""

    def __init__(self, function: Callable, logits: Tensor, target: Tensor, overwrites: bool = False):
        self.function, self.target, self.overwrites, self.loss = function, target, overwrites, None
        self.leaf = self.logits = logits.detach().requires_grad_()
        self.restore()

    def restore(self) -> None:
        if self.overwrites:  # what is overwritten must be no leaf, as a model's logits are none
            self.logits = None
            self.logits = self.leaf.clone()
        self.edge = get_gradient_edge(self.logits)  # an in-place loss gives the tensor a new place in the graph

    def forward(self) -> Tensor:
        return self.function(self.logits, self.target)

    def prepare_backward(self) -> None:
        self.loss = None
        self.restore()
        self.loss = self.forward()

    def backward(self) -> Tensor:
        return torch.autograd.grad(self.loss, self.edge)[0]

    def both(self) -> tuple[Tensor, Tensor]:
        loss = self.forward()
        return loss.detach(), torch.autograd.grad(loss, self.edge)[0]

    def run(self, phase: str) -> Run:
        if phase == "backward":
            return Run(self.backward, self.prepare_backward)
        return Run(getattr(self, phase), self.restore if self.overwrites else None)


def training(function: Callable, overwrites: bool = False) -> Callable:
    return lambda logits, target, phase: Problem(function, logits, target, overwrites).run(phase)


def compiling(function: Callable) -> Callable:
    def prepare(logits, target, phase):
        torch._dynamo.reset()
        return Problem(torch.compile(function, fullgraph=True, dynamic=False), logits, target).run(phase)

    return prepare


def copying(logits: Tensor, target: Tensor, phase: str) -> Run:
    logits, out = logits.detach(), torch.zeros_like(logits)
    return Run(lambda: out.copy_(logits))


def cloning(logits: Tensor, target: Tensor, phase: str) -> Run:
    logits = logits.detach()
    return Run(lambda: logits.clone())


def liger(logits, target):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, target)


def quack(logits, target):
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, target, reduction="mean")


PEERS = [  # an easier loss than ours: plain cross entropy
    Contender("Liger cross entropy", training(liger, overwrites=True), formulas.cross_entropy, package="liger_kernel"),
    Contender("quack cross entropy", training(quack), formulas.cross_entropy, package="quack"),
]


def contenders(loss: str, compile: bool = True, device: str = "cpu") -> list[Contender]:
    """Everything timed against `loss`, this package first. `compile`: with torch.compile of the formulas."""
    ours, formula = getattr(anl_kernels, loss), getattr(formulas, loss)

    def plain(logits, target):
        return formula(logits.float(), target).mean()  # in float32, as autocast runs log_softmax

    def through(backend: str) -> Callable:
        return training(lambda z, y: ours(z, y, backend=backend))

    found = [
        Contender("anl_kernels", training(ours), formula, "gradient"),
        Contender("anl_kernels inplace", training(lambda z, y: ours(z, y, inplace=True), True), formula, "nothing"),
    ]
    if device == "cuda":  # `auto` takes one of these; the others are worth knowing
        fused = anl_kernels.registry.FUSED_BY_DEVICE[device]
        runnable = [b.name for b in anl_kernels.backends() if b.available and b.name in fused]
        found += [Contender(f"anl_kernels {name}", through(name), formula, "gradient") for name in runnable]
    found += [
        Contender("logits.clone()", cloning),
        Contender("out.copy_(logits)", copying),
        Contender("F.cross_entropy", training(F.cross_entropy), formulas.cross_entropy),
        Contender("formulas, eager", training(plain), formula),
    ]
    if compile:
        found.append(Contender("formulas, torch.compile", compiling(plain), formula))
    if device == "cuda":
        found += [peer for peer in PEERS if importlib.util.find_spec(peer.package)]
    return found


class Truth(NamedTuple):
    loss: float
    grad: Tensor  # float64


def truth(formula: Callable, logits: Tensor, target: Tensor, chunk: int = 1 << 22) -> Truth:
    """The mean loss and its gradient in float64 by autograd, a few rows at a time."""
    rows = target.numel()
    grad = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
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
    squared = torch.zeros((), dtype=torch.float64, device=grad.device)
    for got, want in zip(grad, expected.grad):
        squared += (got.double() - want).square().sum()
    scale = expected.grad.norm().item() or 1.0
    return Error(abs(loss.item() - expected.loss) / max(abs(expected.loss), 1e-12), squared.sqrt().item() / scale)


def verdict(contender: Contender, logits: Tensor, target: Tensor, expected: Truth | None) -> tuple[bool, dict]:
    """(whether one forward and backward of `contender` gives the truth, its errors)."""
    run = contender.prepare(logits, target, "both")
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


def promised_allocations(contender: Contender, device: str) -> int | None:
    """How often a call may ask for memory: the gradient, the loss, autograd's grad_output; a GPU's partial sums."""
    if contender.extra is None:
        return None
    return 2 + (contender.extra == "gradient") + (2 if device == "cuda" else 0)
