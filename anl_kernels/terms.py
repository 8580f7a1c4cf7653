"""Terms that add and scale: the algebra of losses, and `RowLoss`, any function of a row's statistics.

The built-in terms are in losses/. Each is a frozen value: `value(s)` is f(statistics), one number per row, in
differentiable PyTorch; `kind` and `parameters` are what the kernels know the term by.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import row_math  # noqa: F401  declares the statistics
from .statistics import STATISTICS, Statistics, needs_of

MAX_TERMS = 16  # of a sum that the compiled modules know; a longer one is computed as any loss is


def number(name: str, value, what: str = "a number") -> float:
    """`value` as a float, or a TypeError that names the parameter."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")
    return float(value)


def as_factor(name: str, value) -> float | Factor:
    """What a loss is multiplied by: a number, or a tensor with one element, through which gradients flow."""
    what = "a number or a tensor with one element"
    if isinstance(value, Tensor):
        if value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}"
            raise ValueError(f"{name} must be {what}, got {got} (class weights are the keyword weight)")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be {what}, floating point, got {value.dtype}")
        return Factor(1.0, (value,))
    found = number(name, value, what)
    if torch.compiler.is_compiling() and not _is_static(found):
        # A number that changes between calls. An operator would be compiled for every value; the product is not.
        return Factor(1.0, (torch.ones((), dtype=torch.float64, device="cpu") * found,))
    if not -math.inf < found < math.inf:
        raise ValueError(f"{name} must be finite, got {found}")
    return found


def _is_static(value: float) -> bool:
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long to import, but a compiler has

    return has_static_value(value)


class Factor:
    """A number times tensors, and divided by others. Multiplied where a loss is computed: the tensors may learn."""

    def __init__(self, number: float, tensors: tuple[Tensor, ...] = (), divisors: tuple[Tensor, ...] = ()):
        self.number, self.tensors, self.divisors = number, tensors, divisors

    def inverse(self) -> Factor:
        return Factor(1.0 / self.number, self.divisors, self.tensors)

    def times(self, rows: Tensor) -> Tensor:
        rows = self.number * rows
        for tensor in self.tensors:
            rows = rows * tensor.reshape(()).to(rows.dtype)
        for tensor in self.divisors:
            rows = rows / tensor.reshape(()).to(rows.dtype)
        return rows

    def _key(self):  # tensors are the same if they are one: their values change
        return self.number, tuple(map(id, self.tensors)), tuple(map(id, self.divisors))

    def __eq__(self, other):
        return isinstance(other, Factor) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def __repr__(self):
        parts = [] if self.number == 1.0 else [f"{self.number:g}"]
        text = " * ".join([*parts, *(repr(tensor.detach()) for tensor in self.tensors)]) or "1"
        return text + "".join(f" / {tensor.detach()!r}" for tensor in self.divisors)


def _product(a: float | Factor, b: float | Factor) -> float | Factor:
    if not (isinstance(a, Factor) or isinstance(b, Factor)):
        return a * b
    a, b = (x if isinstance(x, Factor) else Factor(x) for x in (a, b))
    return Factor(a.number * b.number, a.tensors + b.tensors, a.divisors + b.divisors)


class Algebra:
    """Sums and multiples of losses: `5 * NCE() + 5 * NNCE()`. The result is an `Expression`; one kernel runs it.

    A factor may be a tensor with one element, also one that learns: it gets its gradient.
    """

    __array_ufunc__ = None  # NumPy's numbers leave their product with a loss to the loss

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """A tensor's product with a loss is the loss's: under torch.compile the operators ask here, and never there."""
        name = getattr(function, "__name__", "")
        if name in ("mul", "__mul__", "__rmul__"):
            tensor, loss = args if isinstance(args[1], Algebra) else (args[1], args[0])
            return loss.__mul__(tensor)
        if name in ("__rdiv__", "__rtruediv__"):
            return args[1].__truediv__(args[0])
        return NotImplemented

    def terms_of(self) -> tuple[tuple[float | Factor, Term], ...]:
        raise NotImplementedError

    def __call__(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        """The loss, as `robust_loss(logits, target, self, **options)`."""
        from .functional import robust_loss

        return robust_loss(logits, target, self, **options)

    def __add__(self, other):
        if not isinstance(other, Algebra):
            return self if _is_zero(other) else NotImplemented
        return Expression(self.terms_of() + other.terms_of())

    def __radd__(self, other):  # sum([...]) starts from 0
        return self if _is_zero(other) else NotImplemented

    def __sub__(self, other):
        return self + -1.0 * other if isinstance(other, Algebra) else NotImplemented

    def __mul__(self, factor):
        if isinstance(factor, Algebra):
            raise TypeError("losses add and scale; the product of two losses is written as a RowLoss")
        return self._scaled(as_factor("the factor of a loss", factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        divisor = as_factor("the divisor of a loss", divisor)
        return self._scaled(divisor.inverse() if isinstance(divisor, Factor) else 1.0 / divisor)

    def _scaled(self, by: float | Factor) -> Expression:
        return Expression(tuple((_product(by, factor), term) for factor, term in self.terms_of()))

    def __neg__(self):
        return self * -1.0


def _is_zero(value) -> bool:
    return isinstance(value, numbers.Real) and value == 0


@dataclass(frozen=True)
class Expression(Algebra):
    """A weighted sum of terms, ((factor, term), ...). Equal terms are one, with the sum of their numbers."""

    terms: tuple[tuple[float | Factor, Term], ...] = ()  # torch 2.10 hashes what it has yet to fill

    def __post_init__(self):
        if not self.terms:
            raise ValueError("a sum of losses needs at least one")
        terms = _merged(self.terms)
        gammas = sorted({term.gamma for _, term in terms if term.gamma is not None})
        if len(gammas) > 1:
            raise ValueError(f"one call has one focal exponent, but the terms of {self!r} ask for gamma = {gammas}")
        known = all(term.kind is not None and not isinstance(factor, Factor) for factor, term in terms)
        set_once = object.__setattr__
        set_once(self, "terms", terms)
        set_once(self, "gamma", gammas[0] if gammas else None)
        set_once(self, "built_in", known and len(terms) <= MAX_TERMS)
        set_once(self, "needs", needs_of(name for _, term in terms for name in term.reads))
        set_once(self, "calls", {})  # checked keywords of earlier calls: functional.robust_loss keeps them here

    def without_calls(self) -> Expression:
        """The same, for the calls that are kept here: would they hold this one, only gc could free it."""
        other = object.__new__(Expression)
        other.__dict__.update(self.__dict__, calls={})
        return other

    def terms_of(self):
        return self.terms

    def value(self, s: Statistics) -> Tensor:
        total = None
        for factor, term in self.terms:
            rows = term.value(s)
            part = factor.times(rows) if isinstance(factor, Factor) else factor * rows
            total = part if total is None else total + part
        return total

    def __repr__(self):
        shown = [(repr(factor) if isinstance(factor, Factor) else f"{factor:g}", term) for factor, term in self.terms]
        return " + ".join(f"{factor} * {term!r}" for factor, term in shown)

    def __getstate__(self):
        return self.terms

    def __setstate__(self, terms):
        object.__setattr__(self, "terms", terms)
        self.__post_init__()


def _merged(terms):
    """`terms` with equal ones added, where their factors are numbers."""
    found = []
    for factor, term in terms:
        for place, (other_factor, other) in enumerate(found):
            if not (isinstance(factor, Factor) or isinstance(other_factor, Factor)) and term.is_as(other):
                found[place] = (other_factor + factor, other)
                break
        else:
            found.append((factor, term))
    return tuple(found)


class Term(Algebra):
    """One loss of the family. `kind`: its number in the compiled modules (None: only PyTorch knows it)."""

    kind: ClassVar[int | None] = None
    reads: ClassVar[tuple[str, ...]] = ("target_log_prob",)
    gamma: ClassVar[float | None] = None

    @property
    def parameters(self) -> tuple[float, float]:
        return (0.0, 0.0)

    def value(self, s: Statistics) -> Tensor:
        raise NotImplementedError

    def terms_of(self):
        return ((1.0, self),)

    def is_as(self, other: Term) -> bool:
        """Whether both have the same value; of terms that only PyTorch knows, whether they are one."""
        if self.kind is None or self.kind != other.kind:
            return self is other
        return self.gamma == other.gamma and self.parameters == other.parameters

    def _check(self, name: str, low: float, include: bool = False) -> None:
        value = number(f"{type(self).__name__}'s {name}", getattr(self, name))
        if not (low < value < math.inf or (include and value == low)):
            raise ValueError(
                f"{type(self).__name__}'s {name} must be {'at least' if include else 'above'} {low:g}, got {value:g}"
            )
        object.__setattr__(self, name, value)


class _Probe(Statistics):
    """Statistics of a made-up row that remember what was read of them."""

    def __init__(self, gamma: float):
        super().__init__(1e-7, gamma)
        self.seen = set()

    def _make(self, statistic):
        self.seen.add(statistic.name)
        value = {"lse": 2.0, "target_log_prob": -1.0}.get(statistic.name, 4.0)
        return torch.full((1,), value, dtype=torch.float64)  # (1,) goes with tensors of any length


class RowLoss(Term):
    """Any loss f(statistics): RowLoss(lambda s: -s.target_log_prob / s.neg_log_sum) is NCE.

    Args:
        f: takes a `Statistics` (see `help(anl_kernels.Statistics)`) and returns one number per row, in PyTorch. Its
            derivatives are taken by autograd, also those by tensors that f holds (learned parameters). The statistics
            are float64 on the fused backends.
        gamma: the exponent of the focal weights, if f reads one of the focal statistics.
        needs: the names of the statistics that f reads. Found by calling f once on a made-up row if not given, which
            misses what f reads only under some condition.

    It adds and scales like the built-in losses.
    """

    def __init__(self, f: Callable[[Statistics], Tensor], gamma: float | None = None, needs=None):
        if not callable(f):
            raise TypeError(f"RowLoss needs a function of the statistics, got {type(f).__name__}")
        self.f = f
        self.gamma = gamma
        if gamma is not None:
            self._check("gamma", 0.0, include=True)
        self.reads = _probe(f, self.gamma) if needs is None else tuple(needs)
        needs_of(self.reads)  # names that do not exist are an error here

    def cached(self) -> Expression:
        """This loss as a sum that keeps its calls: of a twin, since a circle through this one only gc could free."""
        own = self.__dict__.get("_own")
        if own is None or own.terms[0][1].f is not self.f:
            twin = object.__new__(type(self))
            twin.__dict__.update(self.__dict__, _own=None)
            self._own = own = Expression(twin.terms_of())
        return own

    def value(self, s):
        rows = self.f(s)
        shape = s.target_log_prob.shape
        if not isinstance(rows, Tensor) or rows.shape != shape:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"RowLoss: f must return one number per row, a tensor of shape {tuple(shape)}; got {got}")
        return rows

    def __repr__(self):
        name = getattr(self.f, "__name__", type(self.f).__name__)
        return f"RowLoss({name})" if self.gamma is None else f"RowLoss({name}, gamma={self.gamma:g})"


def _probe(f, gamma) -> tuple[str, ...]:
    """The statistics f reads. f may fail on a made-up row (it may hold tensors of many): then all of them."""
    probe = _Probe(0.5 if gamma is None else gamma)  # the exponent may come from another term of the sum
    try:
        with torch.no_grad():
            f(probe)  # where torch.compile fails here: say what f reads, RowLoss(f, needs=[...])
    except Exception:
        return tuple(s.name for s in STATISTICS.values() if s.derive is None and not (s.focal and gamma is None))
    return tuple(name for name in STATISTICS if name in probe.seen)


def __getattr__(name: str):
    """The losses, which older pickles look for here."""
    from . import losses

    if name in losses.__all__:
        return getattr(losses, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
