"""The papers' networks: 4 layers for MNIST, 8 for CIFAR-10, ResNet-34 for CIFAR-100; and the demo's for the digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anl_kernels.cli.demo import network as digits_network


def conv(before: int, after: int, *, pool: bool = False) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; the pooling comes before the ReLU: the same values for less work."""
    shrink = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), *shrink, nn.ReLU())


def head(features: int, hidden: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    )


def cnn4(num_classes: int = 10) -> nn.Module:
    """(N, 1, 28, 28): 2 convolutions and 2 linear layers (Ma et al., ICML 2020)."""
    layers = [conv(1, 32, pool=True), conv(32, 64, pool=True), head(64 * 7 * 7, 128, num_classes)]
    return initialised(nn.Sequential(*layers))


def cnn8(num_classes: int = 10) -> nn.Module:
    """(N, 3, 32, 32): 6 convolutions and 2 linear layers (Ma et al., ICML 2020)."""
    layers = []
    for before, after in ((3, 64), (64, 128), (128, 196)):
        layers += [conv(before, after), conv(after, after, pool=True)]
    return initialised(nn.Sequential(*layers, head(196 * 4 * 4, 256, num_classes)))


def initialised(model: nn.Module) -> nn.Module:
    """The papers' start: convolutions Kaiming-uniform, linear layers Xavier-uniform."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.short = nn.Identity()
        if stride != 1 or before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


def resnet34(num_classes: int = 100) -> nn.Module:
    """(N, 3, 32, 32): ResNet-34 with a 3 x 3 stem, as used for CIFAR."""
    layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for after, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(blocks):
            layers.append(Block(width, after, stride if index == 0 else 1))
            width = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def digits_mlp(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *digits_network())
