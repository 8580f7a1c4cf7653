"""What the papers publish: training settings, the losses' constants, and their tables.

Constants: Ye et al., NeurIPS 2023 (ANL), its authors' configurations, which also give those of the other losses.
Nothing here is chosen by a test accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

import anl_kernels as ak
from anl_kernels.cli import demo
from anl_kernels.cli.demo import Setting

from . import models


class Recipe(NamedTuple):
    """How a dataset is trained on: SGD, momentum 0.9, batch 128, cosine to 0, gradient norm clipped at 5."""

    network: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    scale: float  # pixels are divided by it, then normalised
    mean: tuple[float, ...]
    std: tuple[float, ...]
    losses: dict[str, Setting]
    augment: tuple[str, ...] = ()


def _losses(decay: float, passive: tuple[float, float], anl: tuple[float, float, float], entropy: float | None) -> dict:
    """The losses by name. decay: weight decay; passive: NCE's and RCE's (MAE's) factors; anl: alpha, beta, delta."""
    nce, other = passive
    alpha, beta, delta = anl
    found = {
        "CE": Setting(1 * ak.CE(), decay),
        "GCE": Setting(1 * ak.GCE(q=0.7), decay),
        "NCE+RCE": Setting(nce * ak.NCE() + other * ak.RCE(), decay),
        "NCE+MAE": Setting(nce * ak.NCE() + other * ak.MAE(), decay),
        "ANL-CE": Setting(alpha * ak.NCE() + beta * ak.NNCE(), 0.0, delta),
        "ANL-FL": Setting(alpha * ak.NFL(0.5) + beta * ak.NNFL(0.5), 0.0, delta),
    }
    if entropy is not None:
        found["ANL-CE+entropy"] = Setting(alpha * ak.NCE() + beta * ak.NNCE(), 0.0, delta, entropy)
    return found


# "x5" has CIFAR-10's alpha and beta. At (1, 1) ANL loses whole classes on the digits (README.md); with the larger
# gradient it keeps them on clean labels, and learns wrong labels by heart as the others do.
MNIST = demo.SETTINGS | {
    "NCE+MAE": Setting(ak.NCE() + 10 * ak.MAE()),
    "ANL-CE x5": Setting(5 * ak.NCE() + 5 * ak.NNCE(), 0.0, 1e-6),
}
CIFAR10 = _losses(1e-4, (1.0, 1.0), (5.0, 5.0, 5e-5), 2.0) | {
    "NCE+AGCE": Setting(ak.NCE() + 4 * ak.AGCE(a=6.0, q=1.5), 1e-4)
}
CIFAR100 = _losses(1e-5, (10.0, 0.1), (10.0, 1.0, 5e-7), 0.01)

RECIPES = {
    "digits": Recipe(models.digits_mlp, 200, demo.LEARNING_RATE, 16.0, (0.0,), (1.0,), MNIST),
    "mnist": Recipe(models.cnn4, 50, 0.01, 255.0, (0.1307,), (0.3081,), MNIST),
    "cifar10": Recipe(
        models.cnn8, 120, 0.01, 255.0, (0.4914, 0.4822, 0.4466), (0.2470, 0.2435, 0.2616), CIFAR10, ("crop", "flip")
    ),
    "cifar100": Recipe(
        models.resnet34, 200, 0.1, 255.0, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), CIFAR100,
        ("crop", "flip", "rotate"),
    ),
}  # fmt: skip

DEFAULT_LOSSES = ("CE", "GCE", "NCE+RCE", "NCE+MAE", "ANL-CE", "ANL-FL")
DEFAULT_NOISES = ("clean", "symmetric:0.4", "symmetric:0.8", "asymmetric:0.4")

# Last epoch's test accuracy in %, as published. CIFAR-10: CE, GCE, NCE+RCE, NCE+AGCE as rerun in eps-softmax (NeurIPS
# 2024), ANL-CE and ANL-FL as rerun in JAL (ICCV 2025); CIFAR-10N worst: ANL-FL, its authors.
_ROW = ["clean", *(f"symmetric:0.{r}" for r in (2, 4, 6, 8)), *(f"asymmetric:0.{r}" for r in (1, 2, 3, 4))]
PUBLISHED = {
    "cifar10": {
        "CE": dict(zip(_ROW, (90.50, 75.47, 58.46, 39.16, 18.95, 86.98, 83.82, 79.35, 75.28))),
        "GCE": dict(zip(_ROW, (89.42, 86.87, 82.24, 68.43, 25.82, 88.43, 86.17, 80.72, 74.01))),
        "NCE+RCE": dict(zip(_ROW, (91.03, 88.41, 85.13, 79.20, 55.28, 90.25, 88.11, 85.35, 79.43))),
        "NCE+AGCE": dict(zip(_ROW, (91.13, 89.00, 85.91, 80.36, 49.98, 89.90, 88.36, 85.73, 79.28))),
        "ANL-CE": {"symmetric:0.4": 87.16, "symmetric:0.8": 62.28, "asymmetric:0.2": 89.09, "asymmetric:0.4": 77.99},
        "ANL-FL": {
            "symmetric:0.4": 86.94, "symmetric:0.8": 61.89, "asymmetric:0.2": 89.29, "asymmetric:0.4": 77.89,
            "human:worse": 80.56,
        },
    },
    "cifar100": {
        "CE": {"symmetric:0.4": 39.31, "symmetric:0.6": 22.38},
        "NCE+RCE": {"symmetric:0.4": 58.64, "symmetric:0.6": 45.25},
        "ANL-CE": {"symmetric:0.4": 61.58, "symmetric:0.6": 52.09, "asymmetric:0.3": 60.57, "asymmetric:0.4": 45.73},
    },
}  # fmt: skip
