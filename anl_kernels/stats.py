"""Row statistics: what a loss sees of a row of logits, and how its partial derivatives become a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Bits of the passes over a row that a statistic asks for (the compiled modules use the same numbers).
ABOVE, ABOVE_MASS, FOCAL, FOCAL_ABOVE = 1, 2, 4, 8

# The statistics that a loss may be differentiated by, and the passes each needs.
PRIMARY = {
    "lse": 0,
    "target_logit": 0,
    "target_log_prob": 0,
    "neg_log_sum": 0,
    "above_sum": ABOVE,
    "above_mass": ABOVE_MASS,
    "focal_sum": FOCAL,
    "focal_above_sum": FOCAL_ABOVE,
}
# Made from those, or constant under differentiation.
DERIVED = {
    "target_prob": ("target_log_prob",),
    "target_above": ("target_log_prob",),
    "target_focal_weight": ("target_log_prob",),
    "other_above_mass": ("above_mass", "target_log_prob"),
    "above_count": ("above_sum",),
    "num_classes": (),
}
# The gradient by the focal sums has the exponent in it.
FOCAL_STATISTICS = ("focal_sum", "focal_above_sum", "target_focal_weight")


class Statistics:
    """What `f` of a loss sees: tensors of one shape, one number a row. Every one is made when it is first read.

    For a row of logits z with target y, l_j = z_j - lse, p_j = exp(l_j), T = -log(min_prob), I_j = [l_j > -T] and
    w_j = (1 - p_j)^gamma (detached):

    ======================  =====================================================================
    `lse`                   logsumexp(z)
    `target_logit`          z_y
    `target_log_prob`       l_y, to full relative accuracy as p_y -> 1
    `target_prob`           p_y
    `neg_log_sum`           S = sum_j -l_j
    `above_sum`             U = sum_j I_j (T + l_j)
    `above_mass`            P = sum_j I_j p_j
    `other_above_mass`      the same without the target's own share
    `focal_sum`             F = sum_j w_j (-l_j)
    `focal_above_sum`       G = sum_j I_j (A + w_j l_j), A = (1 - min_prob)^gamma T
    `above_count`           n = sum_j I_j                                  (constant)
    `target_above`          I_y                                            (constant)
    `target_focal_weight`   w_y                                            (constant)
    `num_classes`           the classes with a logit above -inf            (constant)
    `log_floor`             -T, a float
    `focal_floor`           A, a float
    `min_prob`, `gamma`     the call's two numbers
    ======================  =====================================================================

    Subclasses provide the PRIMARY ones, `above_count` and `num_classes` through `_make(name)`.
    """

    def __init__(self, min_prob: float, gamma: float | None):
        self.min_prob = min_prob
        self.gamma = gamma
        self.log_floor = math.log(min_prob)

    def __getattr__(self, name: str) -> Tensor:
        if name not in PRIMARY and name not in DERIVED:
            raise AttributeError(f"no statistic is called {name!r}; there are {', '.join([*PRIMARY, *DERIVED])}")
        if name in FOCAL_STATISTICS and self.gamma is None:
            raise ValueError(f"the loss reads {name}, which needs a focal exponent: RowLoss(f, gamma=...)")
        derive = _DERIVE.get(name)
        value = self._make(name) if derive is None else derive(self)
        setattr(self, name, value)
        return value

    @property
    def focal_floor(self) -> float:
        return focal_floor(self.min_prob, self.gamma)

    def _make(self, name: str) -> Tensor:
        raise NotImplementedError


def focal_floor(min_prob: float, gamma: float) -> float:
    """A = (1 - min_prob)^gamma T: the focal term of a class that the clamp holds."""
    return -((1.0 - min_prob) ** gamma) * math.log(min_prob)


def one_minus_exp(x: Tensor) -> Tensor:
    """1 - exp(x) for x <= 0, value and derivative to full relative accuracy at both ends."""
    return torch.where(x > -0.5, -torch.expm1(x), 1.0 - torch.exp(x))


def _target_above(s: Statistics) -> Tensor:
    log_prob = s.target_log_prob.detach()
    return (log_prob > s.log_floor).to(log_prob.dtype)


_DERIVE = {
    "target_prob": lambda s: s.target_log_prob.exp(),
    "target_above": _target_above,
    "target_focal_weight": lambda s: (-torch.expm1(s.target_log_prob.detach())) ** s.gamma,
    "other_above_mass": lambda s: s.above_mass - s.target_above * s.target_prob,
}


def needs_of(names) -> int:
    """The passes that reading the statistics `names` asks for."""
    needs = 0
    for name in names:
        if name not in PRIMARY and name not in DERIVED:
            raise ValueError(f"no statistic is called {name!r}; there are {', '.join([*PRIMARY, *DERIVED])}")
        for primary in DERIVED.get(name, (name,)):
            needs |= PRIMARY[primary]
    return needs
