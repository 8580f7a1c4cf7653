"""Robust losses of the probability of the label, and of all probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import robust_loss
from ..statistics import derived_statistic, one_minus_exp
from ..terms import Term
from .functions import loss_function, one, unlike
from .normalized import CE, NCE, NFL

__all__ = [
    "AEL",
    "AGCE",
    "AMSE",
    "AUL",
    "GCE",
    "MAE",
    "MSE",
    "RCE",
    "EpsCE",
    "ael",
    "agce",
    "amse",
    "aul",
    "eps_ce",
    "gce",
    "jal_ce",
    "jal_fl",
    "mae",
    "mse",
    "rce",
    "sce",
]


# ---- symmetric losses


@dataclass(frozen=True)
class MAE(Term):
    """Mean absolute error, to its usual scale: 1 - p_y. Ghosh et al., AAAI 2017."""

    kind = 6

    def value(self, s):
        return one_minus_exp(s.target_log_prob)


@loss_function
def mae(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Mean absolute error, to its usual scale: 1 - p_y. Ghosh et al., AAAI 2017."""
    return robust_loss(logits, target, one(MAE), **options)


@dataclass(frozen=True)
class RCE(Term):
    """Reverse cross entropy: -log(floor) sum_{k != y} max(p_k, min_prob). Wang et al., ICCV 2019."""

    kind = 7
    floor: float = 1e-4
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


@loss_function
def rce(logits: Tensor, target: Tensor, *, floor: float = 1e-4, **options) -> Tensor:
    """Reverse cross entropy: -log(floor) sum_{k != y} max(p_k, min_prob). Wang et al., ICCV 2019."""
    return robust_loss(logits, target, one(RCE, floor), **options)


@loss_function
def sce(
    logits: Tensor, target: Tensor, *, alpha: float = 0.1, beta: float = 1.0, floor: float = 1e-4, **options
) -> Tensor:
    """Symmetric cross entropy: alpha CE + beta RCE. Wang et al., ICCV 2019 (CIFAR-10: 0.1, 1; CIFAR-100: 6, 0.1)."""
    return robust_loss(logits, target, unlike(alpha, CE, beta, RCE, floor), **options)


# ---- between cross entropy and mean absolute error


@dataclass(frozen=True)
class GCE(Term):
    """Generalized cross entropy: (1 - p_y^q) / q. Zhang & Sabuncu, NeurIPS 2018."""

    kind = 8
    q: float = 0.7

    def __post_init__(self):
        self._check("q", 0.0)

    @property
    def parameters(self):
        return (self.q, 0.0)

    def value(self, s):
        return one_minus_exp(self.q * s.target_log_prob) / self.q


@loss_function
def gce(logits: Tensor, target: Tensor, *, q: float = 0.7, **options) -> Tensor:
    """Generalized cross entropy: (1 - p_y^q) / q. Zhang & Sabuncu, NeurIPS 2018."""
    return robust_loss(logits, target, one(GCE, q), **options)


# ---- asymmetric losses


@dataclass(frozen=True)
class AGCE(Term):
    """Asymmetric generalized cross entropy: ((a + 1)^q - (a + p_y)^q) / q. Zhou et al., ICML 2021.

    The defaults are the paper's for CIFAR-10, as AUL's and AEL's are.
    """

    kind = 9
    a: float = 0.6
    q: float = 0.6

    def __post_init__(self):
        self._check("a", 0.0)
        self._check("q", 0.0)

    @property
    def parameters(self):
        return (self.a, self.q)

    def value(self, s):  # a + p = (a + 1) (1 - (1 - p) / (a + 1)): no difference of near equals as p -> 1
        missing = one_minus_exp(s.target_log_prob) / (self.a + 1.0)
        return one_minus_exp(self.q * torch.log1p(-missing)) * ((self.a + 1.0) ** self.q / self.q)


@loss_function
def agce(logits: Tensor, target: Tensor, *, a: float = 0.6, q: float = 0.6, **options) -> Tensor:
    """Asymmetric generalized cross entropy: ((a + 1)^q - (a + p_y)^q) / q. Zhou et al., ICML 2021."""
    return robust_loss(logits, target, one(AGCE, a, q), **options)


@dataclass(frozen=True)
class AUL(Term):
    """Asymmetric unhinged loss: ((a - p_y)^q - (a - 1)^q) / q. Zhou et al., ICML 2021."""

    kind = 10
    a: float = 5.5
    q: float = 3.0

    def __post_init__(self):
        self._check("a", 1.0)
        self._check("q", 0.0)

    @property
    def parameters(self):
        return (self.a, self.q)

    def value(self, s):  # a - p = (a - 1) (1 + (1 - p) / (a - 1))
        missing = one_minus_exp(s.target_log_prob) / (self.a - 1.0)
        return torch.expm1(self.q * torch.log1p(missing)) * ((self.a - 1.0) ** self.q / self.q)


@loss_function
def aul(logits: Tensor, target: Tensor, *, a: float = 5.5, q: float = 3.0, **options) -> Tensor:
    """Asymmetric unhinged loss: ((a - p_y)^q - (a - 1)^q) / q. Zhou et al., ICML 2021."""
    return robust_loss(logits, target, one(AUL, a, q), **options)


@dataclass(frozen=True)
class AEL(Term):
    """Asymmetric exponential loss: exp(-p_y / a). Zhou et al., ICML 2021."""

    kind = 11
    a: float = 2.5

    def __post_init__(self):
        self._check("a", 0.0)

    @property
    def parameters(self):
        return (self.a, 0.0)

    def value(self, s):
        return torch.exp(s.target_prob / -self.a)


@loss_function
def ael(logits: Tensor, target: Tensor, *, a: float = 2.5, **options) -> Tensor:
    """Asymmetric exponential loss: exp(-p_y / a). Zhou et al., ICML 2021."""
    return robust_loss(logits, target, one(AEL, a), **options)


# ---- squared errors


@dataclass(frozen=True)
class MSE(Term):
    """Mean square error, to its usual scale (Brier score): sum_j (p_j - [j = y])^2. Brier, 1950."""

    kind = 12
    reads = ("target_log_prob", "other_p2")

    def value(self, s):
        return one_minus_exp(s.target_log_prob).square() + s.other_p2


@loss_function
def mse(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Mean square error, to its usual scale (Brier score): sum_j (p_j - [j = y])^2. Brier, 1950.

    Robust to symmetric noise: Ghosh et al., AAAI 2017.
    """
    return robust_loss(logits, target, one(MSE), **options)


@dataclass(frozen=True)
class AMSE(Term):
    """Asymmetric mean square error: (sum_j p_j^2 - 2 a p_y + a^2) / K, which is asymmetric for a > 1.

    K: the classes that exist in the row. Wang et al., ICCV 2025 (arXiv 2507.17692).
    """

    kind = 13
    a: float = 30.0
    reads = ("target_log_prob", "other_p2", "num_classes")

    def __post_init__(self):
        self._check("a", 0.0)

    @property
    def parameters(self):
        return (self.a, 0.0)

    def value(self, s):
        return ((self.a - 1.0 + one_minus_exp(s.target_log_prob)).square() + s.other_p2) / s.num_classes


@loss_function
def amse(logits: Tensor, target: Tensor, *, a: float = 30.0, **options) -> Tensor:
    """Asymmetric mean square error: (sum_j p_j^2 - 2 a p_y + a^2) / K. Wang et al., ICCV 2025 (arXiv 2507.17692)."""
    return robust_loss(logits, target, one(AMSE, a), **options)


@loss_function
def jal_ce(
    logits: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 1.0, a: float = 30.0, **options
) -> Tensor:
    """Joint asymmetric loss on cross entropy: alpha NCE + beta AMSE(a). Wang et al., ICCV 2025 (arXiv 2507.17692).

    Published (alpha, beta, a): CIFAR-10 1, 1, 30; CIFAR-100 5, 1, 20; WebVision 50, 1, 30; Clothing-1M 5, 0.1, 5.
    """
    return robust_loss(logits, target, unlike(alpha, NCE, beta, AMSE, a), **options)


@loss_function
def jal_fl(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    a: float = 30.0,
    gamma: float = 0.5,
    **options,
) -> Tensor:
    """Joint asymmetric loss on the focal loss: alpha NFL(gamma) + beta AMSE(a). Wang et al., ICCV 2025."""
    return robust_loss(logits, target, unlike(alpha, NFL, beta, AMSE, a, gamma), **options)


# ---- epsilon-softmax


@derived_statistic("top_gap", doc="1 where z_y is the row's maximum, tied or not, else 0", constant=True)
def target_is_top(s):
    return (s.top_gap == 0.0).to(s.top_gap.dtype)


@dataclass(frozen=True)
class EpsCE(Term):
    """Cross entropy on epsilon-softmax: -log((p_y + m [y is the top]) / (1 + m)). Wang et al., NeurIPS 2024."""

    kind = 14
    m: float = 1e5
    reads = ("target_log_prob", "target_is_top")

    def __post_init__(self):
        self._check("m", 0.0)

    @property
    def parameters(self):
        return (self.m, math.log1p(self.m))

    def value(self, s):  # p + m = (1 + m) (1 - (1 - p) / (1 + m))
        missing = one_minus_exp(s.target_log_prob) / (1.0 + self.m)
        return torch.where(s.target_is_top > 0, -torch.log1p(-missing), math.log1p(self.m) - s.target_log_prob)


@loss_function
def eps_ce(logits: Tensor, target: Tensor, *, m: float = 1e5, **options) -> Tensor:
    """Cross entropy on epsilon-softmax: -log((p_y + m [y is the top]) / (1 + m)). Wang et al., NeurIPS 2024.

    y is the top where no logit is above z_y. Published as alpha EpsCE(m) + 2 beta MAE().
    """
    return robust_loss(logits, target, one(EpsCE, m), **options)
