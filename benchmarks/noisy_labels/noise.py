"""Wrong labels: symmetric, asymmetric and instance-dependent, seeded, with exact counts in every class.

A noise is written `clean`, `symmetric:0.4`, `asymmetric:0.4`, `instance:0.4`, or `human:worse` for labels that come
with the data. What is random is which images are hit, never how many: of every class a share `rate` is flipped, to
within one image, and over all classes the share is met to within one image too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anl_kernels.cli.demo import CONFUSED_WITH

SYNTHETIC = ("symmetric", "asymmetric", "instance")
CIFAR10_CONFUSED_WITH = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}  # truck, bird, cat, dog, deer
SUPERCLASS = 5  # CIFAR-100: a class becomes the next of its block of five
RATE_SPREAD = 0.1  # instance-dependent noise: the standard deviation of an image's own rate


class Noise(NamedTuple):
    """What a noise is written as: kind, and a rate or the name of the given labels."""

    kind: str
    rate: float = 0.0
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Noise:
        """`clean`, `symmetric:0.4`, `asymmetric:0.4`, `instance:0.4`, `human:worse`; ValueError for anything else."""
        kind, _, value = text.partition(":")
        if text == "clean":
            return cls("clean")
        if kind == "human" and value:
            return cls("human", 0.0, value)
        if kind in SYNTHETIC:
            try:
                rate = float(value)
            except ValueError:
                rate = -1.0
            if 0.0 <= rate <= 1.0:
                return cls(kind, rate)
        raise ValueError(
            f"noise {text!r} is none of clean, symmetric:RATE, asymmetric:RATE, instance:RATE (0 to 1), human:NAME"
        )

    def __str__(self) -> str:
        return ":".join([self.kind, *([self.name] if self.name else [f"{self.rate:g}"] if self.rate else [])])


def confused_with(dataset: str, num_classes: int) -> Tensor:
    """(K,): the class that asymmetric noise turns each class into; itself where the class is left alone."""
    classes = torch.arange(num_classes)
    if dataset in ("mnist", "digits", "cifar10"):
        pairs = CIFAR10_CONFUSED_WITH if dataset == "cifar10" else CONFUSED_WITH
        return torch.tensor([pairs.get(c, c) for c in range(num_classes)])
    block = classes // SUPERCLASS * SUPERCLASS
    size = (num_classes - block).clamp(max=SUPERCLASS)
    return block + (classes - block + 1) % size


def transition(noise: Noise, confusion: Tensor) -> Tensor:
    """(K, K): the share of each class (row) that symmetric or asymmetric noise labels as each class (column)."""
    num_classes = len(confusion)
    if noise.kind == "symmetric":
        other = torch.full((num_classes, num_classes), noise.rate / (num_classes - 1))
        return other.fill_diagonal_(1.0 - noise.rate)
    matrix = torch.eye(num_classes) * (1.0 - noise.rate)
    matrix[torch.arange(num_classes), confusion] += noise.rate
    return matrix


def labelled_as(labels: Tensor, noisy: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64: how many images of each class (row) are labelled as each class (column)."""
    return torch.bincount(labels * num_classes + noisy, minlength=num_classes**2).view(num_classes, num_classes)


def exact_counts(expected: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers next to `expected` (C,), each in expectation it; their sum is next to expected's sum."""
    start = torch.rand((), generator=generator, dtype=torch.float64)
    ends = (expected.double().cumsum(0) + start).floor()
    return torch.diff(ends, prepend=torch.zeros(1, dtype=torch.float64)).long()


def rank_in_class(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """(N,): each image's place, from 0, in a random order of its class."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    first = torch.bincount(labels, minlength=num_classes).cumsum(0).roll(1)
    first[0] = 0
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - first[labels[order]]
    return rank


def symmetric(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """A share `rate` of every class goes to every other class alike: their counts differ by at most one."""
    count = torch.bincount(labels, minlength=num_classes)
    rank = rank_in_class(labels, num_classes, generator)
    flipped = rank < exact_counts(rate * count, generator)[labels]
    start = torch.randint(num_classes - 1, (num_classes,), generator=generator)
    other = (labels + 1 + (rank + start[labels]) % (num_classes - 1)) % num_classes
    return torch.where(flipped, other, labels)


def asymmetric(labels: Tensor, rate: float, confusion: Tensor, generator: torch.Generator) -> Tensor:
    """A share `rate` of every class c becomes confusion[c]."""
    count = torch.bincount(labels, minlength=len(confusion))
    flips = exact_counts(rate * count * (confusion != torch.arange(len(confusion))), generator)
    flipped = rank_in_class(labels, len(confusion), generator) < flips[labels]
    return torch.where(flipped, confusion[labels], labels)


def instance(labels: Tensor, rate: float, num_classes: int, features: Tensor, generator: torch.Generator) -> Tensor:
    """Part-dependent noise (Xia et al., NeurIPS 2020): which class an image becomes, and how likely, is its own.

    An image's rate is normal around `rate` (deviation 0.1, within 0 and 1). The class it would become is drawn from
    softmax(x W_y) over the other classes, W_y a random matrix for each class y. Which images are hit is drawn by
    systematic sampling within a class: each with its own rate, and their number is next to the sum of the rates.
    """
    own = torch.empty(len(labels))
    torch.nn.init.trunc_normal_(own, rate, RATE_SPREAD, 0.0, 1.0, generator=generator)
    features = features.flatten(1).float()
    noisy = labels.clone()
    for label in range(num_classes):
        members = (labels == label).nonzero().view(-1)
        members = members[torch.randperm(len(members), generator=generator)]
        hit = exact_counts(own[members], generator).bool()
        weights = torch.randn(features.shape[1], num_classes, generator=generator)
        scores = features[members[hit]] @ weights
        scores[:, label] = -torch.inf
        if len(scores):
            noisy[members[hit]] = torch.multinomial(scores.softmax(1), 1, generator=generator).view(-1)
    return noisy


def wrong_labels(noise: Noise, labels: Tensor, confusion: Tensor, generator: torch.Generator, features=None) -> Tensor:
    """Labels (N,) int64 with `noise`; confusion (K,) for asymmetric, features (N, ...) for instance-dependent noise."""
    if noise.kind == "symmetric":
        return symmetric(labels, noise.rate, len(confusion), generator)
    if noise.kind == "asymmetric":
        return asymmetric(labels, noise.rate, confusion, generator)
    if noise.kind == "instance":
        return instance(labels, noise.rate, len(confusion), features, generator)
    return labels.clone()
