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
    """alpha, beta and min_prob with which ANL-CE learns at `num_classes` as the papers' constants do at 100 classes.

    From 100 classes on, K of them::

        alpha    = 10 K log K / (100 log 100)             # 10 at 100, 150 at 1,000, 2,000 at 10,000, 25,000 at 100,000
        beta     = 1
        min_prob = (1e-5)^((100 / K)^(1/4)) / K           # 1e-7 at 100, 1.5e-6, 2.6e-6, 1.3e-6

    with the learning rate that suits ANL-CE at 100 classes (CIFAR-100: SGD, 0.1). At 100 these are CIFAR-100's
    constants. Up to 10 classes they are CIFAR-10's (5, 5, 1e-7), whose learning rate is 0.01, and between 10 and 100 a
    power of K joins both; nothing is new there. Both rows agree in learning rate times alpha / (K log K), 2.17e-3.

    Why: with T = -log(min_prob), NCE and NNCE have at uniform logits the gradient of cross entropy times 1 / (K log K)
    and 1 / (K (T - log K)).

    - alpha. With S = -sum_j log p_j, m = S / K and r = -log p_y / m the gradient of NCE is
      (p_j - [j = y] + r (1/K - p_j)) / S: where a label is as unlikely as classes are on average, r = 1, the prediction
      is left alone. Times K log K, only log K / m depends on K, which is near 1 until logits spread.
    - beta. NNCE = R / (V + R), with V = T + log p_y the label's height above the clamp and R the others' together. Its
      push at the label is small on the plateau R >> V and about beta V R / (V + R)^2 / h where R has fallen to V, h the
      mean height of what is still above: at most 0.4 beta at 100 classes, 0.8 to 1 beta from 1,000 on (bulk of standard
      deviation 1). Plateau and peak cannot both be kept. beta = K / 100 keeps the plateau; its peak throws classes not
      yet learned below the clamp, where NNCE has no gradient to bring them back (48 % of right labels at 1,000 classes,
      94 % at 3,000; with this function 0 and 0.2 %). So beta stays.
    - min_prob. What remains is how far R, K (T - log K) at first, is from V: the clamp must come nearer as K grows, or
      the negative part, which is what undoes the wrong labels, starts too late. The power 1/4 of its distance T - log K
      is fitted (it lets the negative part start at the same epoch), not derived.

    Evidence: benchmarks/results/2026-11-21-many-classes-cpu.json, made by benchmarks/noisy_labels/many_classes.py: a
    linear head on synthetic classes, 10 images each, exactly 40 % of the labels wrong, SGD. Accuracy in % on right
    labels after the last epoch (means of 3 seeds at 100 classes, and at 1,000 in the first row; else one seed):

    ======================================  =====  =======  =======  ========
    classes                                   100    1,000    3,000    10,000
    ======================================  =====  =======  =======  ========
    this function                            68.2     76.9     75.7      79.7
    published constants (CIFAR-100's)        68.2     59.3      7.7       0.0
    alpha alone grown                                 78.6     60.4
    alpha and beta grown by K log K                   14.8
    first step kept: also beta = K / 100              44.1      5.0
    NCE alone                                         33.8
    cross entropy                            30.0     39.7     40.3
    ======================================  =====  =======  =======  ========

    A larger learning rate on the published constants is the fourth row. At 100,000 classes, 300 of them with images,
    this function's constants learn too (98.4 %), but most wrong labels then fall on classes without images: an easier
    task, which says nothing on robustness. Not tried: real images at so many classes, unbalanced classes, noise other
    than symmetric, `anl_fl` (its focal weights are near 1 at many classes).

    Adam takes no notice of a factor that alpha and beta share while gradients stay above its eps, and is in no need of
    this function where that holds: 76.8 and 74.2 % at 1,000 and 3,000 classes with the published constants, 73.0 and
    66.6 % with these (on the way both reach 78 to 79 and 75 %; one learning rate, 0.03, tuned at 100 classes). With eps
    1e-8, batch 128 and features near 1 the published constants' gradients fall below eps at 1e5 classes (derived, not
    measured: 1.1e-5 / 128 at a label, which is there in one step of 800).

    float16: the gradient at a class that nobody labels is about 0.02 / (N K); use a GradScaler, as with cross entropy,
    or bfloat16.

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
