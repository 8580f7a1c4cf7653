"""What a loss sees of a row of logits: statistics, declared once and made when they are first read.

The machinery: row_math.py declares the statistics. One that is made from others is a function under
`derived_statistic`, which may stand beside the loss that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    """One statistic: where it comes from, and what is known of it."""

    name: str
    doc: str
    field: int | None = None  # of the kernels' table
    needs: int = 0  # sums that not every loss needs, bits of row_math.Needs
    formula: Callable[[Statistics], Tensor] | None = None  # of a field: from reference.LogitStatistics
    derive: Callable[[Statistics], Tensor] | None = None  # in place of a field: its formula of other statistics
    constant: bool = False  # under differentiation
    focal: bool = False  # the exponent gamma is in its gradient


STATISTICS: dict[str, Statistic] = {}  # by name


def declare(*statistics: Statistic) -> None:
    STATISTICS.update((statistic.name, statistic) for statistic in statistics)
    _document()


class Statistics:
    """What `f` of a loss sees: tensors of one shape, one number per row. Every one is made when it is first read.

    For a row of logits z with target y, l_j = z_j - lse, p_j = exp(l_j), T = -log(min_prob), I_j = [l_j > -T] and
    w_j = (1 - p_j)^gamma (detached):
    """

    def __init__(self, min_prob: float, gamma: float | None):
        self.min_prob = min_prob
        self.gamma = gamma
        self.log_min_prob = self.log_floor = math.log(min_prob)

    def __getattr__(self, name: str) -> Tensor:
        statistic = STATISTICS.get(name)
        if statistic is None:
            raise AttributeError(f"no statistic is called {name!r}; there are {', '.join(STATISTICS)}")
        if statistic.focal and self.gamma is None:
            raise ValueError(f"the loss reads {name}, which needs a focal exponent: RowLoss(f, gamma=...)")
        value = self._make(statistic) if statistic.derive is None else statistic.derive(self)
        setattr(self, name, value)
        return value

    @property
    def focal_clamp_height(self) -> float:
        return focal_clamp_height(self.min_prob, self.gamma)

    def _make(self, statistic: Statistic) -> Tensor:
        """A statistic that is not derived from others."""
        raise NotImplementedError


_DOC = Statistics.__doc__
_MORE = {
    "log_min_prob": "-T, a float (also called log_floor)",
    "focal_clamp_height": "A, a float",
    "min_prob, gamma": "the call's two numbers",
}


def _document() -> None:
    """Adds the table of all statistics to the class's documentation."""
    lines = {s.name: s.doc + ("  (constant)" if s.constant else "") for s in STATISTICS.values()} | _MORE
    rule = "    " + "=" * 21 + "  " + "=" * 60
    table = "\n".join(f"    {'`' + name + '`':21}  {doc}" for name, doc in lines.items())
    Statistics.__doc__ = f"{_DOC.rstrip()}\n\n{rule}\n{table}\n{rule}\n"


def derived_statistic(*reads: str, doc: str, constant: bool = False, focal: bool = False):
    """Declares the statistic that the decorated formula makes of the statistics `reads`. constant: it detaches them."""

    def register(formula: Callable[[Statistics], Tensor]):
        name = formula.__name__
        declare(Statistic(name, doc, needs=needs_of(reads), derive=formula, constant=constant, focal=focal))
        return formula

    return register


def needs_of(names) -> int:
    """What reading the statistics `names` asks for, bits of row_math.Needs."""
    needs = 0
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"no statistic is called {name!r}; there are {', '.join(STATISTICS)}")
        needs |= int(STATISTICS[name].needs)
    return needs


def focal_clamp_height(min_prob: float, gamma: float) -> float:
    """A = (1 - min_prob)^gamma T: the focal term of a class that the clamp holds."""
    return -((1.0 - min_prob) ** gamma) * math.log(min_prob)


def one_minus_exp(x: Tensor) -> Tensor:
    """1 - exp(x) for x <= 0, value and derivative to full relative accuracy at both ends."""
    return torch.where(x > -0.5, -torch.expm1(x), 1.0 - torch.exp(x))
