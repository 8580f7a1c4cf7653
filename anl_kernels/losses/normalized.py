"""Cross entropy and the focal loss, what is normalized of them, and Active Negative Loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..functional import robust_loss
from ..terms import Term
from .functions import loss_function, one, pair

__all__ = [
    "CE",
    "FL",
    "NCE",
    "NFL",
    "NNCE",
    "NNFL",
    "anl_ce",
    "anl_fl",
    "cross_entropy",
    "focal",
    "nce",
    "nfl",
    "nnce",
    "nnfl",
]


# ---- cross entropy and what is normalized of it


@dataclass(frozen=True)
class CE(Term):
    """Cross entropy: -log p_y."""

    kind = 0

    def value(self, s):
        return -s.target_log_prob


@loss_function
def cross_entropy(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Cross entropy: -log p_y, as F.cross_entropy with class indices (no label smoothing)."""
    return robust_loss(logits, target, one(CE), **options)


@dataclass(frozen=True)
class NCE(Term):
    """Normalized cross entropy: log p_y / sum_j log p_j. Ma et al., ICML 2020."""

    kind = 1
    reads = ("target_log_prob", "neg_log_sum")

    def value(self, s):
        return -s.target_log_prob / s.neg_log_sum


@loss_function
def nce(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Normalized cross entropy: log p_y / sum_j log p_j. Ma et al., ICML 2020."""
    return robust_loss(logits, target, one(NCE), **options)


@dataclass(frozen=True)
class NNCE(Term):
    """Normalized negative cross entropy: 1 - I_y (T + log p_y) / sum_j I_j (T + log p_j). Ye et al., NeurIPS 2023."""

    kind = 2
    reads = ("target_log_prob", "above_sum")

    def value(self, s):
        return 1.0 - s.target_above * (s.target_log_prob - s.log_min_prob) / s.above_sum


@loss_function
def nnce(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Normalized negative cross entropy: 1 - (T + log p_y) / sum_j (T + log p_j), p clamped to min_prob = exp(-T).

    Ye et al., NeurIPS 2023.
    """
    return robust_loss(logits, target, one(NNCE), **options)


@loss_function
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

    kind = 3
    reads = ("target_log_prob", "target_focal_weight")

    def value(self, s):
        return -s.target_focal_weight * s.target_log_prob


@loss_function
def focal(logits: Tensor, target: Tensor, *, gamma: float = 0.5, **options) -> Tensor:
    """Focal loss: -(1 - p_y)^gamma log p_y, the weight detached as in the ANL authors' code. Lin et al., 2017."""
    return robust_loss(logits, target, one(FL, gamma), **options)


@dataclass(frozen=True)
class NFL(_Focal):
    """Normalized focal loss: w_y log p_y / sum_j w_j log p_j, w = (1 - p)^gamma detached. Ma et al., ICML 2020."""

    kind = 4
    reads = ("target_log_prob", "target_focal_weight", "focal_sum")

    def value(self, s):
        return -s.target_focal_weight * s.target_log_prob / s.focal_sum


@loss_function
def nfl(logits: Tensor, target: Tensor, *, gamma: float = 0.5, **options) -> Tensor:
    """Normalized focal loss: w_y log p_y / sum_j w_j log p_j, w = (1 - p)^gamma detached. Ma et al., ICML 2020."""
    return robust_loss(logits, target, one(NFL, gamma), **options)


@dataclass(frozen=True)
class NNFL(_Focal):
    """Normalized negative focal loss: 1 - I_y (A + w_y log p_y) / sum_j I_j (A + w_j log p_j). Ye et al., 2023."""

    kind = 5
    reads = ("target_log_prob", "target_focal_weight", "focal_above_sum")

    def value(self, s):
        height = s.focal_clamp_height + s.target_focal_weight * s.target_log_prob
        return 1.0 - s.target_above * height / s.focal_above_sum


@loss_function
def nnfl(logits: Tensor, target: Tensor, *, gamma: float = 0.5, **options) -> Tensor:
    """Normalized negative focal loss: 1 - (A + w_y log p_y) / sum_j (A + w_j log p_j), p clamped to min_prob.

    w = (1 - p)^gamma detached, A = -(1 - min_prob)^gamma log(min_prob). Ye et al., NeurIPS 2023.
    """
    return robust_loss(logits, target, one(NNFL, gamma), **options)


@loss_function
def anl_fl(
    logits: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.5, **options
) -> Tensor:
    """Active negative loss on the focal loss: alpha NFL + beta NNFL. Ye et al., NeurIPS 2023.

    The focal weights (1 - p)^gamma are detached, as in the authors' code.
    """
    return robust_loss(logits, target, pair(alpha, NFL, beta, NNFL, gamma), **options)
