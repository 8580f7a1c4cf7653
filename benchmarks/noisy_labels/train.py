"""One run: a network, a loss, noisy labels. Stopped at any moment, it goes on and ends with the same bits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anl_kernels as ak
from anl_kernels.cli.demo import BATCH, CLIP, MOMENTUM

from . import data, noise
from .settings import RECIPES, Recipe

TEST_BATCH = 1000
PADDING, DEGREES = 4, 20.0  # of the random crop and the random rotation
EVALUATIONS = 12  # test accuracies in a curve, about; the last epoch is always one, and that one on all test images
CURVE_IMAGES = 2000  # test images for the others
CURVE_POINTS = 20  # of the losses and training accuracies that are kept of a finished run
SAVE_EVERY = 20.0  # seconds between saved states, at least


class Run(NamedTuple):
    """What makes a run what it is. train_size, test_size: a fixed part of the images; None for all of them. bf16: the
    network's layers in bfloat16 (autocast), so its logits too; the losses compute in float32 all the same.
    """

    dataset: str
    loss: str
    noise: str
    seed: int
    epochs: int
    train_size: int | None = None
    test_size: int | None = None
    bf16: bool = False

    @property
    def name(self) -> str:
        sizes = "".join(f"-{kind}{size}" for kind, size in zip("nt", (self.train_size, self.test_size)) if size)
        kind = f"{self.loss}-{self.noise.replace(':', '')}-e{self.epochs}{sizes}{'-bf16' * self.bf16}"
        return f"{self.dataset}-{kind}-s{self.seed}"


class Where(NamedTuple):
    """Where a run reads, computes and writes; nothing here changes its result on one kind of device."""

    data: str | None
    device: str
    folder: Path
    backend: str = "auto"


class Labelled(NamedTuple):
    """Images uint8 on the device, labels; `noisy` those to train with, `right` the right ones of the same images."""

    images: Tensor
    noisy: Tensor
    right: Tensor
    test_images: Tensor
    test_labels: Tensor


def labelled(run: Run, where: Where) -> Labelled:
    """The run's images and labels, the same for every loss. DataMissing or ValueError where there are none."""
    found = data.load(run.dataset, where.data)
    part = some(len(found.labels), run.train_size)
    images, right = found.images[part], found.labels[part]
    test = some(len(found.test_labels), run.test_size)
    kind = noise.Noise.parse(run.noise)
    if kind.kind == "human":
        if kind.name not in found.given:
            raise ValueError(f"{run.dataset} has no labels {kind.name!r}; given: {', '.join(found.given) or 'none'}")
        noisy = found.given[kind.name][part]
    else:
        confusion = noise.confused_with(run.dataset, found.num_classes)
        features = normalised(images, RECIPES[run.dataset]) if kind.kind == "instance" else None
        noisy = noise.wrong_labels(kind, right, confusion, torch.Generator().manual_seed(run.seed), features)
    tensors = images, noisy, right, found.test_images[test], found.test_labels[test]
    return Labelled(*(tensor.to(where.device) for tensor in tensors))


def some(count: int, size: int | None) -> Tensor:
    """`size` of `count` indices, always the same and in random order: a file may hold class after class."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:size]


def normalised(images: Tensor, recipe: Recipe) -> Tensor:
    """(N, C, H, W) float32 from pixels, uint8 or float32."""
    mean = torch.tensor(recipe.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(recipe.std, device=images.device).view(-1, 1, 1)
    return (images / recipe.scale).sub_(mean).div_(std)


def augmented(images: Tensor, kinds: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Pixels (N, C, H, W) float32, each shifted by up to 4, mirrored, turned by up to 20 degrees; black around."""
    count, _, height, width = images.shape
    random = {"generator": generator, "device": images.device}
    if "crop" in kinds:
        images = F.pad(images, [PADDING] * 4)
        down, right = torch.randint(2 * PADDING + 1, (2, count, 1), **random)
        rows = down + torch.arange(height, device=images.device)
        columns = right + torch.arange(width, device=images.device)
        each = torch.arange(count, device=images.device).view(-1, 1, 1)
        images = images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if "flip" in kinds:
        mirrored = torch.rand(count, 1, 1, 1, **random) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    if "rotate" in kinds:
        angle = torch.deg2rad((torch.rand(count, **random) * 2 - 1) * DEGREES)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
        grid = F.affine_grid(turn, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, mode="nearest", align_corners=False)
    return images


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> float:
    """In %, of the model in evaluation mode."""
    model.eval()
    right = torch.zeros((), device=images.device)
    for image, label in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH)):
        right += (model(normalised(image, recipe)).argmax(1) == label).sum()
    return 100.0 * right.item() / len(labels)


class Training:
    """The state of a run: everything that must be kept for it to go on as if nothing had happened."""

    def __init__(self, run: Run, where: Where):
        self.run, self.where, self.recipe = run, where, RECIPES[run.dataset]
        self.setting = self.recipe.losses[run.loss]
        self.data = labelled(run, where)
        torch.manual_seed(run.seed)
        self.model = self.recipe.network().to(where.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            self.recipe.learning_rate,
            MOMENTUM,
            weight_decay=self.setting.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, run.epochs)
        self.order = torch.Generator().manual_seed(run.seed)
        self.augment = torch.Generator(where.device).manual_seed(run.seed)
        # Each epoch's mean loss and accuracy in % on the noisy labels; [epoch, accuracy in %] on the test images.
        self.curves: dict[str, list] = {"loss": [], "train": [], "test": []}
        self.seconds = 0.0

    @property
    def epoch(self) -> int:
        return len(self.curves["loss"])

    def state(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        random = {name: getattr(self, name).get_state() for name in ("order", "augment")}
        return {**parts, **random, "curves": self.curves, "seconds": self.seconds}

    def restore(self, state: dict) -> None:
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("order", "augment"):
            getattr(self, name).set_state(state[name].cpu())
        self.curves, self.seconds = state["curves"], state["seconds"]

    def autocast(self):
        return torch.autocast(torch.device(self.where.device).type, torch.bfloat16, enabled=self.run.bf16)

    def train_epoch(self) -> None:
        start = time.perf_counter()
        self.model.train()
        device, count = self.where.device, len(self.data.noisy)
        losses, right = torch.zeros((), device=device), torch.zeros((), device=device)
        batches = torch.randperm(count, generator=self.order).to(device).split(BATCH)
        if len(batches[-1]) < 2:  # batch normalisation needs two
            batches = batches[:-1]
        for batch in batches:
            target = self.data.noisy[batch]
            images = augmented(self.data.images[batch].float(), self.recipe.augment, self.augment)
            images = normalised(images, self.recipe)
            with self.autocast():
                logits = self.model(images.contiguous(memory_format=torch.channels_last))
            loss = self.setting.criterion(
                logits, target, entropy_weight=self.setting.entropy_weight, backend=self.where.backend
            )
            losses += loss.detach() * len(batch)
            right += (logits.detach().argmax(1) == target).sum()
            if self.setting.delta:
                loss = loss + self.setting.delta * ak.l1_penalty(self.model.parameters())
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
        self.schedule.step()
        self.curves["loss"].append(losses.item() / count)
        self.curves["train"].append(100.0 * right.item() / count)
        last = self.epoch == self.run.epochs
        if last or self.epoch % max(1, self.run.epochs // EVALUATIONS) == 0:
            part = slice(None if last else CURVE_IMAGES)
            with self.autocast():
                found = accuracy(self.model, self.data.test_images[part], self.data.test_labels[part], self.recipe)
            self.curves["test"].append([self.epoch, found])
        self.seconds += time.perf_counter() - start

    def result(self) -> dict:
        """What is kept of a finished run."""
        wrong = (self.data.noisy != self.data.right).float().mean().item()
        return {
            **self.run._asdict(),
            "accuracy": self.curves["test"][-1][1],
            "wrong_labels": 100.0 * wrong,
            "train_images": len(self.data.noisy),
            "test_images": len(self.data.test_labels),
            "curves": {name: curve if name == "test" else points(curve) for name, curve in self.curves.items()},
            "seconds": round(self.seconds, 1),
            "device": self.where.device,
        }


def points(values: list[float]) -> list[list[float]]:
    """[epoch, value] of some of the epochs, the last one among them, in 4 digits: results stay small files."""
    step = -(-len(values) // CURVE_POINTS)
    first = (len(values) - 1) % step
    return [[i + 1, float(f"{values[i]:.4g}")] for i in range(first, len(values), step)]


def train(run: Run, where: Where, epoch_done: Callable[[int], None] = lambda epochs: None) -> dict:
    """Trains, or goes on where `where.folder` has the run's state; epoch_done is told how many epochs are new."""
    done, kept = where.folder / f"{run.name}.json", where.folder / f"{run.name}.pt"
    if done.exists():
        epoch_done(run.epochs)
        return json.loads(done.read_text())
    training = Training(run, where)
    if kept.exists():
        training.restore(torch.load(kept, map_location=where.device, weights_only=True))
        epoch_done(training.epoch)
    saved = time.perf_counter()
    while training.epoch < run.epochs:
        training.train_epoch()
        if time.perf_counter() - saved > SAVE_EVERY and training.epoch < run.epochs:
            replace(kept, lambda file: torch.save(training.state(), file))
            saved = time.perf_counter()
        epoch_done(1)
    replace(done, lambda file: file.write_text(json.dumps(training.result())))
    kept.unlink(missing_ok=True)
    return training.result()


def replace(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all."""
    part = file.with_suffix(file.suffix + ".part")
    write(part)
    os.replace(part, file)
