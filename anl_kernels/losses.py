"""The losses: each a frozen term, the formula written once in `value`, and beside it the public function.

csrc/terms.h and triton_kernels/row_math.py hold the same formulas with their partial derivatives. A new loss is a class
and a function here, their names in `__all__`, the class in BUILT_IN, and those two.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import cached, robust_loss
from .statistics import derived_statistic, one_minus_exp
from .terms import Expression, Factor, RowLoss, Term, as_factor

__all__ = [
    "AEL",
    "AGCE",
    "AUL",
    "CE",
    "FL",
    "GCE",
    "MAE",
    "NCE",
    "NFL",
    "NNCE",
    "NNFL",
    "RCE",
    "EpsCE",
    "ael",
    "agce",
    "anl_ce",
    "anl_fl",
    "aul",
    "cross_entropy",
    "eps_ce",
    "focal",
    "gce",
    "mae",
    "nce",
    "nfl",
    "nnce",
    "nnfl",
    "rce",
    "sce",
]

_SHARED_KEYWORDS = """

    Args:
        logits: (N, K), (K,) or (N, K, d1, ...), float16, bfloat16, float32 or float64.
        target: (N,), () or (N, d1, ...), class indices.
        weight, ignore_index, reduction, entropy_weight, min_prob, inplace, recompute, backend, class_group,
            batch_group, input: the keywords of `robust_loss`, whose documentation has shapes, results and errors."""


def _loss(function):
    """Documents the keywords that `function` hands on to robust_loss. Its logits may come as `input`."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [p for p in inspect.signature(robust_loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    function.__signature__ = inspect.Signature(own + shared, return_annotation=Tensor)
    function.__doc__ = function.__doc__.rstrip() + _SHARED_KEYWORDS
    function.__defaults__ = (None, None)
    return function


@cached
def _one(term_class, *parameters) -> Expression:
    return Expression(term_class(*parameters).terms_of())


@cached
def pair(alpha, first, beta, second, *parameters) -> Expression:
    """alpha and beta times two terms of these classes, both with the same parameters."""
    alpha, beta = as_factor("alpha", alpha), as_factor("beta", beta)
    return Expression(((alpha, first(*parameters)), (beta, second(*parameters))))


# ---- cross entropy and what is normalized of it


@dataclass(frozen=True)
class CE(Term):
    """Cross entropy: -log p_y."""

    def value(self, s):
        return -s.target_log_prob


@_loss
def cross_entropy(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Cross entropy: -log p_y, as F.cross_entropy with class indices (no label smoothing)."""
    return robust_loss(logits, target, _one(CE), **options)


@dataclass(frozen=True)
class NCE(Term):
    """Normalized cross entropy: log p_y / sum_j log p_j. Ma et al., ICML 2020."""

    reads = ("target_log_prob", "neg_log_sum")

    def value(self, s):
        return -s.target_log_prob / s.neg_log_sum


@_loss
def nce(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Normalized cross entropy: log p_y / sum_j log p_j. Ma et al., ICML 2020."""
    return robust_loss(logits, target, _one(NCE), **options)


@dataclass(frozen=True)
class NNCE(Term):
    """Normalized negative cross entropy: 1 - I_y (T + log p_y) / sum_j I_j (T + log p_j). Ye et al., NeurIPS 2023."""

    reads = ("target_log_prob", "above_sum")

    def value(self, s):
        return 1.0 - s.target_above * (s.target_log_prob - s.log_min_prob) / s.above_sum


@_loss
def nnce(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Normalized negative cross entropy: 1 - (T + log p_y) / sum_j (T + log p_j), p clamped to min_prob = exp(-T).

    Ye et al., NeurIPS 2023.
    """
    return robust_loss(logits, target, _one(NNCE), **options)


@_loss
def anl_ce(logits: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 1.0, **options) -> Tensor:
    """Active negative loss on cross entropy: alpha NCE + beta NNCE. Ye et al., NeurIPS 2023.

    NCE = log p_y / sum_j log p_j, NNCE = 1 - (T + log p_y) / sum_j (T + log p_j), T = -log(min_prob), p clamped to
    min_prob in NNCE. Published (alpha, beta): MNIST 1, 1; CIFAR-10 5, 5; CIFAR-100 10, 1; WebVision 20, 1, each with an
    L1 penalty on the parameters (`l1_penalty`). alpha and beta are numbers, or tensors with one element, which get
    their gradient.
    """
    return robust_loss(logits, target, pair(alpha, NCE, beta, NNCE), **options)


# ---- the same on the focal loss


@dataclass(frozen=True)
class _Focal(Term):
    gamma: float = 0.5

    def __post_init__(self):
        self._check("gamma", 0.0, include=True)


@dataclass(frozen=True)
class FL(_Focal):
    """Focal loss: -(1 - p_y)^gamma log p_y, the weight detached. Lin et al., 2017."""

    reads = ("target_log_prob", "target_focal_weight")

    def value(self, s):
        return -s.target_focal_weight * s.target_log_prob


@_loss
def focal(logits: Tensor, target: Tensor, *, gamma: float = 0.5, **options) -> Tensor:
    """Focal loss: -(1 - p_y)^gamma log p_y, the weight detached as in the ANL authors' code. Lin et al., 2017."""
    return robust_loss(logits, target, _one(FL, gamma), **options)


@dataclass(frozen=True)
class NFL(_Focal):
    """Normalized focal loss: w_y log p_y / sum_j w_j log p_j, w = (1 - p)^gamma detached. Ma et al., ICML 2020."""

    reads = ("target_log_prob", "target_focal_weight", "focal_sum")

    def value(self, s):
        return -s.target_focal_weight * s.target_log_prob / s.focal_sum


@_loss
def nfl(logits: Tensor, target: Tensor, *, gamma: float = 0.5, **options) -> Tensor:
    """Normalized focal loss: w_y log p_y / sum_j w_j log p_j, w = (1 - p)^gamma detached. Ma et al., ICML 2020."""
    return robust_loss(logits, target, _one(NFL, gamma), **options)


@dataclass(frozen=True)
class NNFL(_Focal):
    """Normalized negative focal loss: 1 - I_y (A + w_y log p_y) / sum_j I_j (A + w_j log p_j). Ye et al., 2023."""

    reads = ("target_log_prob", "target_focal_weight", "focal_above_sum")

    def value(self, s):
        height = s.focal_clamp_height + s.target_focal_weight * s.target_log_prob
        return 1.0 - s.target_above * height / s.focal_above_sum


@_loss
def nnfl(logits: Tensor, target: Tensor, *, gamma: float = 0.5, **options) -> Tensor:
    """Normalized negative focal loss: 1 - (A + w_y log p_y) / sum_j (A + w_j log p_j), p clamped to min_prob.

    w = (1 - p)^gamma detached, A = -(1 - min_prob)^gamma log(min_prob). Ye et al., NeurIPS 2023.
    """
    return robust_loss(logits, target, _one(NNFL, gamma), **options)


@_loss
def anl_fl(
    logits: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.5, **options
) -> Tensor:
    """Active negative loss on the focal loss: alpha NFL + beta NNFL. Ye et al., NeurIPS 2023.

    The focal weights (1 - p)^gamma are detached, as in the authors' code.
    """
    return robust_loss(logits, target, pair(alpha, NFL, beta, NNFL, gamma), **options)


# ---- symmetric losses


@dataclass(frozen=True)
class MAE(Term):
    """Mean absolute error, to its usual scale: 1 - p_y. Ghosh et al., AAAI 2017."""

    def value(self, s):
        return one_minus_exp(s.target_log_prob)


@_loss
def mae(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Mean absolute error, to its usual scale: 1 - p_y. Ghosh et al., AAAI 2017."""
    return robust_loss(logits, target, _one(MAE), **options)


@dataclass(frozen=True)
class RCE(Term):
    """Reverse cross entropy: -log(floor) sum_{k != y} max(p_k, min_prob). Wang et al., ICCV 2019."""

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


@_loss
def rce(logits: Tensor, target: Tensor, *, floor: float = 1e-4, **options) -> Tensor:
    """Reverse cross entropy: -log(floor) sum_{k != y} max(p_k, min_prob). Wang et al., ICCV 2019."""
    return robust_loss(logits, target, _one(RCE, floor), **options)


@cached
def _sce(alpha, beta, floor) -> Expression:
    return Expression(((as_factor("alpha", alpha), CE()), (as_factor("beta", beta), RCE(floor))))


@_loss
def sce(
    logits: Tensor, target: Tensor, *, alpha: float = 0.1, beta: float = 1.0, floor: float = 1e-4, **options
) -> Tensor:
    """Symmetric cross entropy: alpha CE + beta RCE. Wang et al., ICCV 2019 (CIFAR-10: 0.1, 1; CIFAR-100: 6, 0.1)."""
    return robust_loss(logits, target, _sce(alpha, beta, floor), **options)


# ---- between cross entropy and mean absolute error


@dataclass(frozen=True)
class GCE(Term):
    """Generalized cross entropy: (1 - p_y^q) / q. Zhang & Sabuncu, NeurIPS 2018."""

    q: float = 0.7

    def __post_init__(self):
        self._check("q", 0.0)

    @property
    def parameters(self):
        return (self.q, 0.0)

    def value(self, s):
        return one_minus_exp(self.q * s.target_log_prob) / self.q


@_loss
def gce(logits: Tensor, target: Tensor, *, q: float = 0.7, **options) -> Tensor:
    """Generalized cross entropy: (1 - p_y^q) / q. Zhang & Sabuncu, NeurIPS 2018."""
    return robust_loss(logits, target, _one(GCE, q), **options)


# ---- asymmetric losses


@dataclass(frozen=True)
class AGCE(Term):
    """Asymmetric generalized cross entropy: ((a + 1)^q - (a + p_y)^q) / q. Zhou et al., ICML 2021.

    The defaults are the paper's for CIFAR-10, as AUL's and AEL's are.
    """

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


@_loss
def agce(logits: Tensor, target: Tensor, *, a: float = 0.6, q: float = 0.6, **options) -> Tensor:
    """Asymmetric generalized cross entropy: ((a + 1)^q - (a + p_y)^q) / q. Zhou et al., ICML 2021."""
    return robust_loss(logits, target, _one(AGCE, a, q), **options)


@dataclass(frozen=True)
class AUL(Term):
    """Asymmetric unhinged loss: ((a - p_y)^q - (a - 1)^q) / q. Zhou et al., ICML 2021."""

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


@_loss
def aul(logits: Tensor, target: Tensor, *, a: float = 5.5, q: float = 3.0, **options) -> Tensor:
    """Asymmetric unhinged loss: ((a - p_y)^q - (a - 1)^q) / q. Zhou et al., ICML 2021."""
    return robust_loss(logits, target, _one(AUL, a, q), **options)


@dataclass(frozen=True)
class AEL(Term):
    """Asymmetric exponential loss: exp(-p_y / a). Zhou et al., ICML 2021."""

    a: float = 2.5

    def __post_init__(self):
        self._check("a", 0.0)

    @property
    def parameters(self):
        return (self.a, 0.0)

    def value(self, s):
        return torch.exp(s.target_prob / -self.a)


@_loss
def ael(logits: Tensor, target: Tensor, *, a: float = 2.5, **options) -> Tensor:
    """Asymmetric exponential loss: exp(-p_y / a). Zhou et al., ICML 2021."""
    return robust_loss(logits, target, _one(AEL, a), **options)


# ---- epsilon-softmax


@derived_statistic("top_gap", doc="1 where z_y is the row's maximum, tied or not, else 0", constant=True)
def target_is_top(s):
    return (s.top_gap == 0.0).to(s.top_gap.dtype)


@dataclass(frozen=True)
class EpsCE(Term):
    """Cross entropy on epsilon-softmax: -log((p_y + m [y is the top]) / (1 + m)). Wang et al., NeurIPS 2024."""

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


@_loss
def eps_ce(logits: Tensor, target: Tensor, *, m: float = 1e5, **options) -> Tensor:
    """Cross entropy on epsilon-softmax: -log((p_y + m [y is the top]) / (1 + m)). Wang et al., NeurIPS 2024.

    y is the top where no logit is above z_y. Published as alpha EpsCE(m) + 2 beta MAE().
    """
    return robust_loss(logits, target, _one(EpsCE, m), **options)


# The built-in terms in the order of TermKind in csrc/terms.h: a term's kind is its place.
BUILT_IN = (CE, NCE, NNCE, FL, NFL, NNFL, MAE, RCE, GCE, AGCE, AUL, AEL, EpsCE)
for _kind, _term_class in enumerate(BUILT_IN):
    _term_class.kind = _kind

# What torch.load(weights_only=True) may make: terms hold numbers, and a RowLoss a function that has to be allowed too.
torch.serialization.add_safe_globals([*BUILT_IN, RowLoss, Expression, Factor])
torch.serialization.add_safe_globals([(term, f"anl_kernels.terms.{term.__name__}") for term in BUILT_IN])  # once there
