"""The papers' formulas in plain PyTorch, one number per row; they share nothing with the kernels.

In float64 they are what `check` and `bench` compare with; in the logits' own dtype they are what `bench` times as
"the papers' formulas". The authors' code multiplies with one-hot labels; a gather is used here, which is faster.
z: (N, K) or (N, K, d1, ...); y: (N,) or (N, d1, ...).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_PROB = 1e-7
CLAMP_HEIGHT = -math.log(MIN_PROB)  # T in the papers


def at(values: Tensor, y: Tensor) -> Tensor:
    return values.gather(1, y.long().unsqueeze(1)).squeeze(1)


def cross_entropy(z, y):
    return -at(z.log_softmax(1), y)


def nce(z, y):
    log_p = z.log_softmax(1)
    return at(log_p, y) / log_p.sum(1)


def nnce(z, y):
    height = CLAMP_HEIGHT + z.softmax(1).clamp(min=MIN_PROB).log()
    return 1 - at(height, y) / height.sum(1)


def focal_terms(log_p: Tensor, gamma: float) -> Tensor:
    return -((1 - log_p.detach().exp()) ** gamma) * log_p


def focal(z, y, gamma=0.5):
    return at(focal_terms(z.log_softmax(1), gamma), y)


def nfl(z, y, gamma=0.5):
    terms = focal_terms(z.log_softmax(1), gamma)
    return at(terms, y) / terms.sum(1)


def nnfl(z, y, gamma=0.5):
    height = (1 - MIN_PROB) ** gamma * CLAMP_HEIGHT - focal_terms(z.log_softmax(1).clamp(min=-CLAMP_HEIGHT), gamma)
    return 1 - at(height, y) / height.sum(1)


def mae(z, y):
    return 1 - at(z.softmax(1), y)


def rce(z, y, floor=1e-4):
    p = z.softmax(1).clamp(min=MIN_PROB)
    return -math.log(floor) * (p.sum(1) - at(p, y))


def sce(z, y, alpha=0.1, beta=1.0):
    return alpha * cross_entropy(z, y) + beta * rce(z, y)


def gce(z, y, q=0.7):
    return (1 - at(z.softmax(1), y) ** q) / q


def agce(z, y, a=0.6, q=0.6):
    return ((a + 1) ** q - (a + at(z.softmax(1), y)) ** q) / q


def aul(z, y, a=5.5, q=3.0):
    return ((a - at(z.softmax(1), y)) ** q - (a - 1) ** q) / q


def ael(z, y, a=2.5):
    return torch.exp(-at(z.softmax(1), y) / a)


def mse(z, y):
    p = z.softmax(1)
    return p.square().sum(1) - 2 * at(p, y) + 1


def amse(z, y, a=30.0):
    p = z.softmax(1)
    return (p.square().sum(1) - 2 * a * at(p, y) + a**2) / z.shape[1]


def jal_ce(z, y, alpha=1.0, beta=1.0):
    return alpha * nce(z, y) + beta * amse(z, y)


def jal_fl(z, y, alpha=1.0, beta=1.0):
    return alpha * nfl(z, y) + beta * amse(z, y)


def eps_ce(z, y, m=1e5):
    """The class with the largest logit gets m, then all are divided by 1 + m."""
    top = at(z, y) == z.amax(1)
    return -torch.log((at(z.softmax(1), y) + m * top) / (1 + m))


def anl_ce(z, y, alpha=1.0, beta=1.0):
    return alpha * nce(z, y) + beta * nnce(z, y)


def anl_fl(z, y, alpha=1.0, beta=1.0):
    return alpha * nfl(z, y) + beta * nnfl(z, y)


def batch_entropy(z: Tensor) -> Tensor:
    """R = log K + sum_j q_j log q_j, q the mean of the rows' softmax."""
    q = z.softmax(1).transpose(0, 1).flatten(1).mean(1)
    return math.log(z.shape[1]) + torch.special.xlogy(q, q).sum()
