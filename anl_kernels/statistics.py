"""Row statistics: what a loss sees of a row of logits, and how its partial derivatives become a gradient.

The layout of what the kernels hand out stands here, and nowhere else in Python; csrc/row_math.h has the same enums. A
new statistic has its place in `StatField`, its declaration in `STATISTICS` and its part of `coefficients` here; its
formula, its sums and its gradient in backends/reference.py. One that is made from others is a function under
`derived_statistic`, which may stand beside the loss that reads it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .call import Call


class Needs(enum.IntFlag):
    """The sums of the second sweep over a row that a statistic is made of."""

    ABOVE = 1
    ABOVE_MASS = 2
    FOCAL = 4
    FOCAL_ABOVE = 8


ANY_NEEDS = int(Needs.ABOVE | Needs.ABOVE_MASS | Needs.FOCAL | Needs.FOCAL_ABOVE)
ANY_FOCAL = int(Needs.FOCAL | Needs.FOCAL_ABOVE)
CLAMPED = int(Needs.ABOVE | Needs.ABOVE_MASS | Needs.FOCAL_ABOVE)


class StatField(enum.IntEnum):
    """Rows of the statistics' table (NUM_STATS, *rows), float64."""

    MAX = 0
    LOG_SUM = 1  # lse - max
    TARGET_LOG_PROB = 2
    NUM_CLASSES = 3
    NEG_LOG_SUM = 4
    ABOVE_SUM = 5
    ABOVE_MASS = 6
    ABOVE_COUNT = 7
    FOCAL_SUM = 8
    FOCAL_WEIGHT = 9  # W = sum_j w_j
    FOCAL_ABOVE_SUM = 10
    FOCAL_ABOVE_WEIGHT = 11  # W+ = sum_j I_j w_j
    VALID = 12  # 0 for an ignored row


class CoefField(enum.IntEnum):
    """Rows of the gradient's coefficients (NUM_COEFS, *rows): (a + d I_j) p_j + b + c I_j + (bw + cw I_j) w_j."""

    MAX = 0
    INV_SUM = 1  # 1 / sum exp(z - max); 0 for an ignored row
    A = 2
    B = 3
    A_ABOVE = 4  # a + d
    C = 5
    BW = 6
    CW = 7
    TARGET = 8  # the whole gradient at the target, where a p_y + ... + e would cancel as p_y -> 1
    LOG_SUM = 9


class SliceField(enum.IntEnum):
    """The first sums over a slice's classes, without the target: what `slice_stats` returns before the lse is known."""

    MAX = 0  # with the target
    TAIL = 1  # exp(z_j - max)
    GAP = 2  # max - z_j
    COUNT = 3  # 1


class SliceSecond(enum.IntEnum):
    """The second sums over a slice's classes, without the target, which need the lse of the whole row."""

    ABOVE_SUM = 0  # I_j (T + l_j)
    ABOVE_COUNT = 1  # I_j
    BELOW_MASS = 2  # (1 - I_j) p_j
    FOCAL_SUM = 3  # -w_j l_j
    FOCAL_WEIGHT = 4  # w_j
    FOCAL_ABOVE_SUM = 5  # I_j (A + w_j l_j)
    FOCAL_ABOVE_WEIGHT = 6  # I_j w_j


NUM_STATS, NUM_COEFS = len(StatField), len(CoefField)
NUM_FIRST_SUMS, NUM_SECOND_SUMS = len(SliceField), len(SliceSecond)
# What slices are merged by holds, after the first sums, the target's logit, and 1 where a slice has the target.
TARGET_LOGIT, OWNED = NUM_FIRST_SUMS, NUM_FIRST_SUMS + 1
NUM_MERGED = NUM_FIRST_SUMS + 2

_SUMS_OF = {
    Needs.ABOVE: (SliceSecond.ABOVE_SUM, SliceSecond.ABOVE_COUNT),
    Needs.ABOVE_MASS: (SliceSecond.BELOW_MASS,),
    Needs.FOCAL: (SliceSecond.FOCAL_SUM, SliceSecond.FOCAL_WEIGHT),
    Needs.FOCAL_ABOVE: (SliceSecond.FOCAL_ABOVE_SUM, SliceSecond.FOCAL_ABOVE_WEIGHT),
}


def second_fields(needs: int) -> list[int]:
    """The second sums that statistics of `needs` are made of."""
    return [int(field) for need, fields in _SUMS_OF.items() if needs & need for field in fields]


# Labels of a slice's rows: the target is a class of another slice; the row counts nowhere and is not read.
ELSEWHERE, IGNORED = -1, -2


# ---- the statistics


@dataclass(frozen=True)
class Statistic:
    """One statistic: where it comes from, and what is known of it."""

    name: str
    doc: str
    field: int | None = None  # of the table
    needs: int = 0
    derive: Callable[[Statistics], Tensor] | None = None  # in place of a field: its formula of other statistics
    constant: bool = False  # under differentiation
    focal: bool = False  # the exponent gamma is in its gradient


STATISTICS = {
    statistic.name: statistic
    for statistic in (
        Statistic("lse", "logsumexp(z)", StatField.LOG_SUM),
        Statistic("target_log_prob", "l_y, to full relative accuracy as p_y -> 1", StatField.TARGET_LOG_PROB),
        Statistic("neg_log_sum", "S = sum_j -l_j", StatField.NEG_LOG_SUM),
        Statistic("above_sum", "U = sum_j I_j (T + l_j)", StatField.ABOVE_SUM, Needs.ABOVE),
        Statistic("above_mass", "P = sum_j I_j p_j", StatField.ABOVE_MASS, Needs.ABOVE_MASS),
        Statistic("focal_sum", "F = sum_j w_j (-l_j)", StatField.FOCAL_SUM, Needs.FOCAL, focal=True),
        Statistic(
            "focal_above_sum",
            "G = sum_j I_j (A + w_j l_j), A = (1 - min_prob)^gamma T",
            StatField.FOCAL_ABOVE_SUM,
            Needs.FOCAL_ABOVE,
            focal=True,
        ),
        Statistic("above_count", "n = sum_j I_j", StatField.ABOVE_COUNT, Needs.ABOVE, constant=True),
        Statistic("num_classes", "the classes with a logit above -inf", StatField.NUM_CLASSES, constant=True),
    )
}


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
        STATISTICS[name] = Statistic(name, doc, needs=needs_of(reads), derive=formula, constant=constant, focal=focal)
        _document()
        return formula

    return register


def needs_of(names) -> int:
    """The sums of the second sweep that reading the statistics `names` asks for, bits of Needs."""
    needs = 0
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"no statistic is called {name!r}; there are {', '.join(STATISTICS)}")
        needs |= int(STATISTICS[name].needs)
    return needs


@derived_statistic("target_log_prob", "lse", doc="z_y")
def target_logit(s: Statistics) -> Tensor:
    return s.target_log_prob + s.lse


@derived_statistic("target_log_prob", doc="p_y")
def target_prob(s: Statistics) -> Tensor:
    return s.target_log_prob.exp()


@derived_statistic("target_log_prob", doc="I_y", constant=True)
def target_above(s: Statistics) -> Tensor:
    log_prob = s.target_log_prob.detach()
    return (log_prob > s.log_min_prob).to(log_prob.dtype)


@derived_statistic("target_log_prob", doc="w_y", constant=True, focal=True)
def target_focal_weight(s: Statistics) -> Tensor:
    return (-torch.expm1(s.target_log_prob.detach())) ** s.gamma


@derived_statistic("above_mass", "target_log_prob", doc="P without the target's own part")
def other_above_mass(s: Statistics) -> Tensor:
    return s.above_mass - s.target_above * s.target_prob


def focal_clamp_height(min_prob: float, gamma: float) -> float:
    """A = (1 - min_prob)^gamma T: the focal term of a class that the clamp holds."""
    return -((1.0 - min_prob) ** gamma) * math.log(min_prob)


def one_minus_exp(x: Tensor) -> Tensor:
    """1 - exp(x) for x <= 0, value and derivative to full relative accuracy at both ends."""
    return torch.where(x > -0.5, -torch.expm1(x), 1.0 - torch.exp(x))


# ---- the table


class TableStatistics(Statistics):
    """Statistics from the kernels' table; those that `needs` does not cover are not in it."""

    def __init__(self, table: Tensor, min_prob: float, gamma: float | None, needs: int):
        super().__init__(min_prob, gamma)
        self._table = table
        self._needs = needs

    def _make(self, statistic):
        if statistic.needs & ~self._needs:
            raise RuntimeError(
                f"the loss reads {statistic.name}, which it did not when it was made: name what f reads, "
                "RowLoss(f, needs=[...])"
            )
        value = self._table[statistic.field]
        if statistic.name == "lse":  # max is a constant: the derivative by lse is that by log_sum
            return self._table[StatField.MAX].detach() + value
        return value


# ---- the gradient


def softmax_coefs(table: Tensor) -> tuple[Tensor, Tensor]:
    """What gives p_j = exp(z_j - first) second. An ignored row has second = 0, a NaN row NaN."""
    return table[StatField.MAX], torch.where(table[StatField.VALID] == 0, 0.0, torch.exp(-table[StatField.LOG_SUM]))


def coefficients(table: Tensor, partials: Tensor, call: Call, dtype: torch.dtype) -> Tensor:
    """The gradient's coefficients (NUM_COEFS, *rows) from the table and f's partials by its rows."""
    needs = call.needs
    zero = torch.zeros((), dtype=table.dtype, device=table.device)
    f_lse, f_l, f_S = (partials[i] for i in (StatField.LOG_SUM, StatField.TARGET_LOG_PROB, StatField.NEG_LOG_SUM))
    f_U, f_P = partials[StatField.ABOVE_SUM], partials[StatField.ABOVE_MASS]
    f_F, f_G = partials[StatField.FOCAL_SUM], partials[StatField.FOCAL_ABOVE_SUM]
    log_prob = table[StatField.TARGET_LOG_PROB]
    above = (log_prob > math.log(call.min_prob)).to(table.dtype)
    missing = -torch.expm1(log_prob)
    common = f_lse + table[StatField.NUM_CLASSES] * f_S  # a, without the parts by l and P
    constants = -f_S  # what is added to the gradient at the target besides a p_y
    by_mass = above_part = zero
    if needs & Needs.ABOVE:
        common = common - table[StatField.ABOVE_COUNT] * f_U
        constants = constants + above * f_U
    if needs & Needs.ABOVE_MASS:
        by_mass = f_P
        above_part = (1.0 - table[StatField.ABOVE_MASS]) * f_P
    if needs & ANY_FOCAL:
        weight = missing ** (call.gamma or 0.0)
        if needs & Needs.FOCAL:
            common = common + table[StatField.FOCAL_WEIGHT] * f_F
            constants = constants - weight * f_F
        if needs & Needs.FOCAL_ABOVE:
            common = common - table[StatField.FOCAL_ABOVE_WEIGHT] * f_G
            constants = constants + above * weight * f_G
    a_above = common + above_part - f_l
    a = a_above - by_mass
    slope = torch.where(above > 0, a_above, a)
    at_target = common + above_part - (1.0 - above) * by_mass + constants - slope * missing
    # In the order of CoefField.
    fields = (*softmax_coefs(table), a, -f_S, a_above, f_U, -f_F, f_G, at_target, table[StatField.LOG_SUM])
    return torch.stack(fields).to(dtype)
