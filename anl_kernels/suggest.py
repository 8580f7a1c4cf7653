"""Which alpha, beta and min_prob to use at how many classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

CIFAR_10, CIFAR_100 = (10, 5.0, 5.0), (100, 10.0, 1.0)  # classes, alpha, beta as published
MIN_PROB = 1e-7  # published with both


@dataclass(frozen=True)
class Suggestion:
    """Keywords of `anl_ce`, `anl_fl` and `linear_anl_ce`: `anl_ce(logits, target, **vars(suggest(num_classes)))`."""

    alpha: float
    beta: float
    min_prob: float


def suggest(num_classes: int) -> Suggestion:
    """Experimental, for SGD: alpha, beta and min_prob of ANL-CE, extrapolated from the papers' to `num_classes`.

    Up to 10 classes CIFAR-10's, at 100 CIFAR-100's, a power of K between them; above 100 alpha grows by K log K, which
    is by how much NCE's gradient shrinks, beta stays, and the clamp comes nearer (that part is fitted). Meant for the
    learning rate that suits CIFAR-100, 0.1.

    It was fitted on synthetic classes with symmetric noise and without tuned learning rates, and it differs from what
    the authors chose for MNIST, Clothing-1M and WebVision: docs/hyperparameters.md has the derivation, the evidence,
    and what speaks against it.

    Raises:
        ValueError: num_classes < 2. TypeError: not an int.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral):
        raise TypeError(f"num_classes must be an int, got {type(num_classes).__name__}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    low, alpha_low, beta_low = CIFAR_10
    high, alpha_high, beta_high = CIFAR_100
    if num_classes < high:
        share = max(0.0, math.log(num_classes / low) / math.log(high / low))
        return Suggestion(
            alpha_low * (alpha_high / alpha_low) ** share, beta_low * (beta_high / beta_low) ** share, MIN_PROB
        )
    growth = num_classes * math.log(num_classes) / (high * math.log(high))
    clamped_below = (high * MIN_PROB) ** (high / num_classes) ** 0.25  # K min_prob
    return Suggestion(alpha_high * growth, beta_high, clamped_below / num_classes)
