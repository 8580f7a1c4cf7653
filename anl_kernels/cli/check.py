"""`python -m anl_kernels check`: every backend that is present against float64 on this machine.

A GPU's backends run in processes of their own, which is all that a hang or a dead context would cost: first without
protocols between CTAs, then each of those is verified and remembered (verify.py).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import anl_kernels as ak

from .. import formulas, losses, registry, trust
from . import workloads
from .common import progress, table

DTYPES = workloads.DTYPES
# (of the value, of the gradient rounded to the logits' dtype): see `relative` and `gradient_error`
TOLERANCE = {"fp64": (1e-11, 1e-11), "fp32": (4e-6, 5e-5), "bf16": (4e-6, 4.1e-3), "fp16": (4e-6, 5.1e-4)}
ENTROPY = 0.7
SHOWN_FAILURES = 20
SECONDS = 900  # of a GPU backend's process; Triton compiles hundreds of kernels


class Loss(NamedTuple):
    name: str
    ours: Callable  # (logits, target, **keywords)
    formula: Callable  # (logits, target) -> one number per row
    entropy_weight: float = 0.0


def user_written(s: ak.Statistics) -> Tensor:
    return -s.target_log_prob / s.neg_log_sum + torch.exp(s.target_log_prob * 0.5)


def same_as_user_written(z: Tensor, y: Tensor) -> Tensor:
    return formulas.nce(z, y) + torch.exp(-0.5 * formulas.cross_entropy(z, y))


def sum_of_three(z: Tensor, y: Tensor) -> Tensor:
    return 2 * formulas.nce(z, y) + 3 * formulas.rce(z, y) + formulas.agce(z, y)


def named(function: str) -> Loss:
    name = {"cross_entropy": "CE", "focal": "FL"}.get(function, function.upper().replace("_", "-"))
    return Loss(name, getattr(ak, function), getattr(formulas, function))


LOSSES = [
    *(named(function) for function in losses.__all__ if hasattr(formulas, function)),
    Loss("2 NCE + 3 RCE + AGCE", 2 * ak.NCE() + 3 * ak.RCE() + ak.AGCE(), sum_of_three),
    Loss("ANL-CE, entropy", ak.anl_ce, formulas.anl_ce, ENTROPY),
    Loss("RowLoss", 1.0 * ak.RowLoss(user_written), same_as_user_written),
]


def rows(dtype: torch.dtype, classes: int = 1001, count: int = 24) -> tuple[Tensor, Tensor]:
    target = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(1))
    logits = workloads.realistic_logits((count, classes), target, torch.Generator().manual_seed(2))
    logits[0] = 0.25  # uniform
    logits[1] -= 30.0
    logits[1, target[1]] = 60.0  # as sure as float32 can say
    logits[2] += 128.0  # exp of it is beyond float32; bfloat16 still tells these apart
    return logits.to(dtype), target


def images(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    target = torch.randint(21, (2, 5, 7), generator=torch.Generator().manual_seed(3))
    return workloads.realistic_logits((2, 21, 5, 7), target, torch.Generator().manual_seed(4)).to(dtype), target


def padded(logits: Tensor) -> Tensor:
    wide = torch.full((logits.shape[0], logits.shape[1] + 23), 7.0, dtype=logits.dtype)
    wide[:, : logits.shape[1]] = logits
    return wide[:, : logits.shape[1]]


LAYOUTS: dict[str, Callable] = {
    "few classes": lambda d: rows(d, classes=10, count=50),
    "rows": rows,
    "padded rows": lambda d: (padded(rows(d)[0]), rows(d)[1]),
    "transposed": lambda d: (rows(d)[0].t().contiguous().t(), rows(d)[1]),
    "images": images,
    "channels last": lambda d: (images(d)[0].contiguous(memory_format=torch.channels_last), images(d)[1]),
}

# How a call may make its gradient: in forward, over the logits, in backward, without reduction.
WAYS = {
    "mean": {},
    "inplace": {"inplace": True},
    "recompute": {"recompute": True},
    "none": {"reduction": "none"},
}


class Errors(NamedTuple):
    value: float = 0.0
    grad: float = 0.0

    def worst(self, other: Errors) -> Errors:
        # max() would drop a NaN that comes second
        return Errors(*(b if math.isnan(b) else max(a, b) for a, b in zip(self, other)))

    def within(self, dtype: str, slack: float = 1.0) -> bool:
        return self.value <= slack * TOLERANCE[dtype][0] and self.grad <= slack * TOLERANCE[dtype][1]


class Truth(NamedTuple):
    rows: Tensor  # the loss per row
    grad: Tensor  # of their sum
    entropy: Tensor
    entropy_grad: Tensor


def truth(loss: Loss, logits: Tensor, target: Tensor) -> Truth:
    z = logits.detach().double().requires_grad_()
    values = loss.formula(z, target)
    (grad,) = torch.autograd.grad(values.sum(), z)
    entropy = formulas.batch_entropy(z)
    (entropy_grad,) = torch.autograd.grad(entropy, z)
    return Truth(values.detach(), grad, entropy.detach(), entropy_grad)


def near_the_clamp(logits: Tensor) -> Tensor:
    """Rows with a class so near to min_prob that rounding decides on which side it is: the gradient jumps there."""
    distance = (logits.detach().double().log_softmax(1) + formulas.CLAMP_HEIGHT).abs()
    return (distance < 1e-4).any(1, keepdim=True)


def compare(loss: Loss, backend: str, logits: Tensor, target: Tensor, expected: Truth, way: str) -> Errors:
    keywords, device = dict(WAYS[way], backend=backend), registry.device_of(backend)
    leaf = placed(logits.detach(), device).requires_grad_()
    if way == "inplace":  # what is overwritten must not be a leaf; the layout stays
        leaf = Source.apply(leaf)
    if loss.entropy_weight:
        keywords["entropy_weight"] = loss.entropy_weight
    edge = torch.autograd.graph.get_gradient_edge(leaf)  # of the logits as they are before they are overwritten
    value = loss.ours(leaf, target.to(device), **keywords)
    (grad,) = torch.autograd.grad(value.sum(), edge)
    value, grad = value.to(logits.device), grad.to(logits.device)
    scale = 1.0 if way == "none" else 1.0 / target.numel()
    want_value = expected.rows if way == "none" else expected.rows.mean() + loss.entropy_weight * expected.entropy
    want_grad = scale * expected.grad + loss.entropy_weight * expected.entropy_grad
    return Errors(relative(value, want_value), gradient_error(grad, want_grad, near_the_clamp(logits)))


def placed(logits: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, with the same strides."""
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=device).copy_(logits)


class Source(torch.autograd.Function):
    """Logits as a model hands them on: no leaf, and not a view that autograd would have to follow."""

    @staticmethod
    def forward(ctx, leaf):
        return placed(leaf, leaf.device)

    @staticmethod
    def backward(ctx, grad):
        return grad


def relative(got: Tensor, want: Tensor) -> float:
    """The largest relative error; a loss near 0 is measured against a tenth of the largest."""
    least = 0.1 * want.abs().max().item() + 1e-30
    return ((got.double() - want).abs() / want.abs().clamp(min=least)).max().item()


def gradient_error(got: Tensor, want: Tensor, skip: Tensor) -> float:
    """The largest error in a row over its largest gradient (at least a tenth of the tensor's), beyond underflow."""
    if got.isnan().any():
        return math.nan
    size = want.abs().amax(1, keepdim=True)
    size = size.clamp(min=0.1 * size.max().item() + 1e-30)
    smallest_step = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    beyond = ((got.double() - want).abs() - smallest_step).clamp(min=0)
    return (beyond / size).masked_fill(skip, 0.0).max().item()


class Row(NamedTuple):
    loss: str
    dtype: str
    layout: str
    errors: Errors
    failures: list[str]

    @property
    def ok(self) -> bool:
        return not self.failures


def rows_of(backend: str, losses: list[Loss], dtypes: list[str]) -> Iterator[Row]:
    for dtype in dtypes:
        for layout, make in LAYOUTS.items():
            logits, target = make(DTYPES[dtype])
            for loss in losses:
                yield check_one(backend, loss, dtype, layout, logits, target)


def check_one(backend: str, loss: Loss, dtype: str, layout: str, logits: Tensor, target: Tensor) -> Row:
    expected, worst, failures = truth(loss, logits, target), Errors(), []
    for way in WAYS:
        if (way == "none" and loss.entropy_weight) or (way == "inplace" and backend == "reference"):
            continue
        try:
            errors = compare(loss, backend, logits, target, expected, way)
        except Exception as error:
            failures.append(f"{way}: {type(error).__name__}: {str(error)[:160]}")
            continue
        worst = worst.worst(errors)
        if not errors.within(dtype):
            failures.append(f"{way}: error of the value {errors.value:.1e}, of the gradient {errors.grad:.1e}")
    return Row(loss.name, dtype, layout, worst, failures)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", action="append", help="only this one (may be given again)")
    parser.add_argument("--loss", action="append", choices=[loss.name for loss in LOSSES], metavar="NAME")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--full", action="store_true", help="a line for every loss, dtype and layout")
    parser.add_argument("--again", action="store_true", help="verify also the protocols that were verified before")
    parser.add_argument("--here", action="store_true", help="GPU backends too in this process, and no protocols")
    parser.add_argument("--protocol", help=argparse.SUPPRESS)  # with --here, what verify.py runs in its processes
    parser.add_argument("--device", type=torch.device, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from . import verify

    if args.protocol:
        return verify.run_here(args.protocol, args.device)
    present = {b.name: b for b in ak.backends()}
    chosen = args.backend or [name for name, b in present.items() if b.available]
    losses = [loss for loss in LOSSES if not args.loss or loss.name in args.loss]
    dtypes = args.dtype or ["fp64", "fp32", "bf16", "fp16"]
    failed = False
    for name in chosen:
        if name not in present or not present[name].available:
            print(f"{name}: FAIL, it cannot run here: {present[name].reason if name in present else 'no such backend'}")
            failed = True
            continue
        if name in trust.PROTOCOLS and not args.here:
            failed |= not run_apart(name, args)
            continue
        found = []
        with progress(len(losses) * len(dtypes) * len(LAYOUTS), "check") as bar:
            for row in rows_of(name, losses, dtypes):
                found.append(row)
                bar.update()
        print(report(name, found, dtypes, args.full))
        failed |= any(not row.ok for row in found)
    print("FAIL" if failed else "all within tolerance of float64")
    return 1 if failed else 0


def run_apart(name: str, args: argparse.Namespace) -> bool:
    """Checks a GPU's backend in processes of its own: without protocols, then each of these; whether all is well."""
    from . import verify

    chosen = [f"--loss={loss}" for loss in args.loss or []] + [f"--dtype={dtype}" for dtype in args.dtype or []]
    chosen += ["--full"] if args.full else []
    outcome = verify.in_a_process(
        ["check", "--here", f"--backend={name}", *chosen], SECONDS, **{trust.VARIABLE: "none"}
    )
    print(outcome.output.rstrip())
    if outcome.code != 0:
        print(f"FAIL {name}: {outcome.reason}")
        return False
    if registry.is_interpreted(name):
        return True  # which proves nothing of a GPU
    lines, failed = verify.report(name, args.again)
    print(f"\nprotocols between the CTAs of a launch, on {trust.device_name(registry.device_of(name))}")
    print(table(lines, ["protocol", "", "", "what it is"]))
    return not failed


def report(backend: str, found: list[Row], dtypes: list[str], full: bool) -> str:
    lines = [f"\nbackend {backend}: largest relative error of value / gradient, over {len(LAYOUTS)} layouts"]
    if full:
        lines[0] = f"\nbackend {backend}: largest relative error of value / gradient"
        cells = [[r.loss, r.dtype, r.layout, *cell([r]).split(" ", 1)] for r in found]
        lines.append(table(cells, ["loss", "dtype", "layout", "", "value / grad"]))
    else:
        names = list(dict.fromkeys(row.loss for row in found))
        cells = [[n, *(cell([r for r in found if (r.loss, r.dtype) == (n, d)]) for d in dtypes)] for n in names]
        limits = ["tolerance", *(f"   {TOLERANCE[d][0]:.0e} / {TOLERANCE[d][1]:.0e}" for d in dtypes)]
        lines.append(table([*cells, limits], ["loss", *dtypes]))
    failures = [f"FAIL {backend} {r.loss} {r.dtype} {r.layout}: {failure}" for r in found for failure in r.failures]
    hidden = 0 if full else max(0, len(failures) - SHOWN_FAILURES)
    more = [f"... and {hidden} more: --full shows all"] if hidden else []
    return "\n".join(lines + failures[: len(failures) - hidden] + more)


def cell(found: list[Row]) -> str:
    worst = Errors()
    for row in found:
        worst = worst.worst(row.errors)
    state = "ok" if all(row.ok for row in found) else "FAIL"
    return f"{state} {worst.value:.0e} / {worst.grad:.0e}"
