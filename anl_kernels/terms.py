"""The losses as values: frozen terms that add and scale. Each formula is written once, in `value`.

`value(s)` is f(statistics), one number a row, differentiable PyTorch. `kind` and `parameters` are what the compiled
modules know the term by; they hold the same formula and its partial derivatives in `csrc/row_math.h`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .stats import DERIVED, FOCAL_STATISTICS, PRIMARY, Statistics, needs_of, one_minus_exp


def number(name: str, value) -> float:
    """`value` as a float, or a TypeError that names the parameter."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


class Algebra:
    """Sums and multiples of losses: `5 * NCE() + 5 * NNCE()`. The result is an `Expression`; one kernel runs it."""

    def terms_of(self) -> tuple[tuple[float, Term], ...]:
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
        factor = number("the factor of a loss", factor)
        return Expression(tuple((factor * coef, term) for coef, term in self.terms_of()))

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        return self * (1.0 / number("the divisor of a loss", divisor))

    def __neg__(self):
        return self * -1.0


def _is_zero(value) -> bool:
    return isinstance(value, numbers.Real) and value == 0


@dataclass(frozen=True)
class Expression(Algebra):
    """A weighted sum of terms, ((coef, term), ...)."""

    terms: tuple[tuple[float, Term], ...]

    def __post_init__(self):
        gammas = sorted({term.gamma for _, term in self.terms if term.gamma is not None})
        if len(gammas) > 1:
            raise ValueError(f"one call has one focal exponent, but the terms of {self!r} ask for gamma = {gammas}")
        set_once = object.__setattr__
        set_once(self, "gamma", gammas[0] if gammas else None)
        set_once(self, "built_in", all(term.kind is not None for _, term in self.terms))
        set_once(self, "needs", needs_of(name for _, term in self.terms for name in term.reads))
        set_once(self, "calls", {})  # checked keywords of earlier calls: functional.robust_loss keeps them here

    def terms_of(self):
        return self.terms

    def value(self, s: Statistics) -> Tensor:
        total = None
        for coef, term in self.terms:
            part = coef * term.value(s)
            total = part if total is None else total + part
        return total

    def __repr__(self):
        return " + ".join(f"{coef:g} * {term!r}" for coef, term in self.terms)

    def __getstate__(self):
        return self.terms

    def __setstate__(self, terms):
        object.__setattr__(self, "terms", terms)
        self.__post_init__()


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

    def _check(self, name: str, low: float, include: bool = False) -> None:
        value = number(f"{type(self).__name__}'s {name}", getattr(self, name))
        if not (low < value < math.inf or (include and value == low)):
            raise ValueError(
                f"{type(self).__name__}'s {name} must be {'at least' if include else 'above'} {low:g}, got {value:g}"
            )
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class CE(Term):
    """Cross entropy: -log p_y."""

    kind = 0

    def value(self, s):
        return -s.target_log_prob


@dataclass(frozen=True)
class NCE(Term):
    """Normalized cross entropy: log p_y / sum_j log p_j. Ma et al., ICML 2020."""

    kind = 1
    reads = ("target_log_prob", "neg_log_sum")

    def value(self, s):
        return -s.target_log_prob / s.neg_log_sum


@dataclass(frozen=True)
class NNCE(Term):
    """Normalized negative cross entropy: 1 - I_y (T + log p_y) / sum_j I_j (T + log p_j). Ye et al., NeurIPS 2023."""

    kind = 2
    reads = ("target_log_prob", "above_sum")

    def value(self, s):
        return 1.0 - s.target_above * (s.target_log_prob - s.log_floor) / s.above_sum


@dataclass(frozen=True)
class _Focal(Term):
    gamma: float = 0.5

    def __post_init__(self):
        self._check("gamma", 0.0, include=True)


@dataclass(frozen=True)
class FL(_Focal):
    """Focal loss: -(1 - p_y)^gamma log p_y, the weight detached. Lin et al., 2017."""

    kind = 3
    reads = ("target_log_prob", "target_focal_weight")

    def value(self, s):
        return -s.target_focal_weight * s.target_log_prob


@dataclass(frozen=True)
class NFL(_Focal):
    """Normalized focal loss: w_y log p_y / sum_j w_j log p_j, w = (1 - p)^gamma detached. Ma et al., ICML 2020."""

    kind = 4
    reads = ("target_log_prob", "target_focal_weight", "focal_sum")

    def value(self, s):
        return -s.target_focal_weight * s.target_log_prob / s.focal_sum


@dataclass(frozen=True)
class NNFL(_Focal):
    """Normalized negative focal loss: 1 - I_y (A + w_y log p_y) / sum_j I_j (A + w_j log p_j). Ye et al., 2023."""

    kind = 5
    reads = ("target_log_prob", "target_focal_weight", "focal_above_sum")

    def value(self, s):
        return 1.0 - s.target_above * (s.focal_floor + s.target_focal_weight * s.target_log_prob) / s.focal_above_sum


@dataclass(frozen=True)
class MAE(Term):
    """Mean absolute error, to its usual scale: 1 - p_y."""

    kind = 6

    def value(self, s):
        return one_minus_exp(s.target_log_prob)


@dataclass(frozen=True)
class RCE(Term):
    """Reverse cross entropy: -log(floor) sum_{k != y} max(p_k, min_prob). Wang et al., ICCV 2019."""

    floor: float = 1e-4
    kind = 7
    reads = ("other_above_mass", "above_count", "target_above", "num_classes")

    def __post_init__(self):
        self._check("floor", 0.0)
        if self.floor >= 1.0:
            raise ValueError(f"RCE's floor must be below 1, got {self.floor:g}")

    @property
    def parameters(self):
        return (-math.log(self.floor), 0.0)

    def value(self, s):
        others_below = s.num_classes - s.above_count - (1.0 - s.target_above)
        return -math.log(self.floor) * (s.other_above_mass + others_below * s.min_prob)


@dataclass(frozen=True)
class GCE(Term):
    """Generalized cross entropy: (1 - p_y^q) / q. Zhang & Sabuncu, NeurIPS 2018."""

    q: float = 0.7
    kind = 8

    def __post_init__(self):
        self._check("q", 0.0)

    @property
    def parameters(self):
        return (self.q, 0.0)

    def value(self, s):
        return one_minus_exp(self.q * s.target_log_prob) / self.q


@dataclass(frozen=True)
class AGCE(Term):
    """Asymmetric generalized cross entropy: ((a + 1)^q - (a + p_y)^q) / q. Zhou et al., ICML 2021.

    The defaults are the paper's for CIFAR-10, as AUL's and AEL's are.
    """

    a: float = 0.6
    q: float = 0.6
    kind = 9

    def __post_init__(self):
        self._check("a", 0.0)
        self._check("q", 0.0)

    @property
    def parameters(self):
        return (self.a, self.q)

    def value(self, s):  # a + p = (a + 1) (1 - (1 - p) / (a + 1)): no difference of near equals as p -> 1
        missing = one_minus_exp(s.target_log_prob) / (self.a + 1.0)
        return one_minus_exp(self.q * torch.log1p(-missing)) * ((self.a + 1.0) ** self.q / self.q)


@dataclass(frozen=True)
class AUL(Term):
    """Asymmetric unhinged loss: ((a - p_y)^q - (a - 1)^q) / q. Zhou et al., ICML 2021."""

    a: float = 5.5
    q: float = 3.0
    kind = 10

    def __post_init__(self):
        self._check("a", 1.0)
        self._check("q", 0.0)

    @property
    def parameters(self):
        return (self.a, self.q)

    def value(self, s):  # a - p = (a - 1) (1 + (1 - p) / (a - 1))
        missing = one_minus_exp(s.target_log_prob) / (self.a - 1.0)
        return torch.expm1(self.q * torch.log1p(missing)) * ((self.a - 1.0) ** self.q / self.q)


@dataclass(frozen=True)
class AEL(Term):
    """Asymmetric exponential loss: exp(-p_y / a). Zhou et al., ICML 2021."""

    a: float = 2.5
    kind = 11

    def __post_init__(self):
        self._check("a", 0.0)

    @property
    def parameters(self):
        return (self.a, 0.0)

    def value(self, s):
        return torch.exp(s.target_prob / -self.a)


class _Probe(Statistics):
    """Statistics of a few made-up rows that remember what was read of them."""

    def __init__(self, gamma: float):
        super().__init__(1e-7, gamma)
        self.seen = set()

    def _make(self, name):
        self.seen.add(name)
        made_up = {"lse": 2.0, "target_logit": 1.0, "target_log_prob": -1.0}
        return torch.full((2,), made_up.get(name, 4.0), dtype=torch.float64)


class RowLoss(Term):
    """Any loss f(statistics): RowLoss(lambda s: -s.target_log_prob / s.neg_log_sum) is NCE.

    Args:
        f: takes a `Statistics` (see `help(anl_kernels.Statistics)`) and returns one number a row, in PyTorch. Its
            derivatives are taken by autograd, also those by tensors that f holds (learned parameters). The statistics
            are float64 on the fused backends.
        gamma: the exponent of the focal weights, if f reads one of the focal statistics.
        needs: the names of the statistics that f reads. Found by calling f once on made-up rows if not given, which
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

    def value(self, s):
        rows = self.f(s)
        shape = s.target_log_prob.shape
        if not isinstance(rows, Tensor) or rows.shape != shape:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"RowLoss: f must return one number a row, a tensor of shape {tuple(shape)}; got {got}")
        return rows

    def __repr__(self):
        name = getattr(self.f, "__name__", type(self.f).__name__)
        return f"RowLoss({name})" if self.gamma is None else f"RowLoss({name}, gamma={self.gamma:g})"


def _probe(f, gamma) -> tuple[str, ...]:
    """The statistics f reads. f may fail on made-up rows (it may hold tensors of another length): then all of them."""
    probe = _Probe(0.5 if gamma is None else gamma)  # the exponent may come from another term of the sum
    try:
        with torch.no_grad():
            f(probe)
    except Exception:
        focal = () if gamma is None else ("focal_sum", "focal_above_sum")
        return (*(name for name in PRIMARY if name not in FOCAL_STATISTICS), *focal)
    return tuple(name for name in (*PRIMARY, *DERIVED) if name in probe.seen)
