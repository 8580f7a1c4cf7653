"""A call: the checked keywords of `robust_loss`, with what the kernels need to know of the loss."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import check_name
from .row_math import CLAMPED
from .terms import Algebra, Expression, number

REDUCTIONS = ("none", "mean", "sum")


class KernelTerm(NamedTuple):
    """A built-in term as the kernels take it."""

    kind: int  # its place in losses.BUILT_IN
    factor: float
    p0: float  # its parameters
    p1: float


@dataclass(frozen=True, eq=False)
class Call:
    """What one call asks for. The operators (ops.py), which know numbers alone, leave `expression` out."""

    expression: Expression | None = None
    terms: tuple[KernelTerm, ...] = ()  # of a sum that is built in
    built_in: bool = True  # whether the kernels know every term; else only f's partial derivatives are given to them
    needs: int = 0  # what the loss reads besides what every loss has, bits of row_math.Needs
    gamma: float | None = None  # the focal exponent, where a term has one
    min_prob: float = 1e-7
    ignore_index: int = -100
    reduction: str = "mean"
    entropy_weight: float = 0.0
    inplace: bool = False
    recompute: bool | None = None
    backend: str = "auto"
    class_group: torch.distributed.ProcessGroup | None = None
    batch_group: torch.distributed.ProcessGroup | None = None

    @property
    def clamp(self) -> float:
        """K * clamp must stay below 1, or a uniform row would be clamped; 0 for a loss that clamps nothing."""
        return self.min_prob if self.needs & CLAMPED else 0.0

    @property
    def deferred(self) -> bool:
        """Whether backward makes the gradient, whatever the dtype."""
        return bool(self.recompute) or self.reduction == "none" or self.entropy_weight != 0.0

    @property
    def explicit(self) -> bool:
        """Whether somebody named the backend: then it takes protocols that nothing has verified here (trust.py)."""
        return self.backend != "auto" or os.environ.get("ANL_KERNELS_BACKEND", "auto") not in ("", "auto")

    def variant(self, **changes) -> Call:
        """This call with some fields changed."""
        return dataclasses.replace(self, **changes)


def checked_call(
    expression: Algebra,
    ignore_index: int,
    reduction: str,
    entropy_weight: float,
    min_prob: float,
    inplace: bool,
    recompute: bool | None,
    backend: str,
    class_group=None,
    batch_group=None,
) -> Call:
    """The call of these keywords of `robust_loss`, or an error that names the one that is wrong."""
    if not isinstance(expression, Algebra):
        raise TypeError(f"expression must be a loss such as 5 * NCE() + NNCE(), got {type(expression).__name__}")
    if not isinstance(expression, Expression):
        expression = Expression(expression.terms_of())
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if type(ignore_index) is not int:
        if isinstance(ignore_index, (bool, Tensor)) or not hasattr(ignore_index, "__index__"):
            raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
        ignore_index = operator.index(ignore_index)
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be True or False, got {inplace!r}")
    if not (recompute is None or isinstance(recompute, bool)):
        raise TypeError(f"recompute must be True, False or None, got {recompute!r}")
    if backend != "auto":
        check_name(backend, "backend")
    entropy_weight = number("entropy_weight", entropy_weight)
    min_prob = number("min_prob", min_prob)
    if not 0.0 < min_prob < 1.0:
        raise ValueError(f"min_prob must be between 0 and 1, got {min_prob:g}")
    if not -math.inf < entropy_weight < math.inf:
        raise ValueError(f"entropy_weight must be finite, got {entropy_weight}")
    if entropy_weight != 0.0 and reduction == "none":
        raise ValueError(
            "the batch entropy couples the rows, so it has no value per row: use reduction='mean' or 'sum'"
        )
    _check_group("class_group", class_group)
    _check_group("batch_group", batch_group)
    return Call(
        expression=expression,
        terms=_kernel_terms(expression) if expression.built_in else (),
        built_in=expression.built_in,
        needs=expression.needs,
        gamma=expression.gamma,
        min_prob=min_prob,
        ignore_index=ignore_index,
        reduction=reduction,
        entropy_weight=entropy_weight,
        inplace=inplace,
        recompute=recompute,
        backend=backend,
        class_group=class_group,
        batch_group=batch_group,
    )


def _check_group(name: str, group) -> None:
    if group is None or (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        return
    raise ValueError(
        f"{name} must be a torch.distributed process group that this rank belongs to, got {type(group).__name__}"
    )


def _kernel_terms(expression: Expression) -> tuple[KernelTerm, ...]:
    return tuple(KernelTerm(term.kind, factor, *term.parameters) for factor, term in expression.terms)
