"""ANL-CE's alpha, beta and min_prob at many classes: the study behind `anl_kernels.suggest`, which is experimental.

    python -m benchmarks.noisy_labels.many_classes --json RESULT.json                  # hours; goes on where it stopped
    python -m benchmarks.noisy_labels.many_classes --json RESULT.json --classes 100,1000
    python -m benchmarks.noisy_labels.many_classes --json RESULT.json --plot docs/figures/cpu/many_classes.svg

Data: K random directions in 32 dimensions, an image is its class's direction plus Gaussian noise, such that the nearest
direction is the right one for 95 % of the images; 10 training images per class, exactly 4 of them with the label of
another class, drawn evenly; 2000 test images with right labels. At 100,000 classes only 300 have images; wrong labels
still fall on all classes.

Model: a linear head. SGD as on CIFAR-100: lr 0.1, momentum 0.9, batch 128, cosine to 0. What 200 epochs of 500 images
per class move there, 60 epochs of 10 images move here, as the features are longer (norm 90; Adam: norm 5.7, lr 0.03).
Cross entropy's learning rate is set by the first step's length, not tuned; tuned, it does far better than here
(docs/hyperparameters.md).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import anl_kernels as ak
from anl_kernels.cli.common import environment, need, progress, table
from benchmarks import pictures

from .report import thinned

DIMENSIONS, PER_CLASS, WRONG, TEST_IMAGES, NEAREST_IS_RIGHT = 32, 10, 4, 2000, 0.95
BATCH, EPOCHS = 128, 60
WITH_IMAGES = 300  # of 100,000 classes
PUBLISHED = {"alpha": 10.0, "beta": 1.0, "min_prob": 1e-7}  # CIFAR-100
FIRST_STEP = 10 / (100 * math.log(100)) + 1 / (100 * math.log(1e7 / 100))  # of these at 100 classes, CE's being 1


class Optimizer(NamedTuple):
    lr: float
    feature_norm: float


OPTIMIZERS = {"SGD": Optimizer(0.1, 90.0), "Adam": Optimizer(0.03, math.sqrt(DIMENSIONS))}


class Run(NamedTuple):
    classes: int
    optimizer: str
    setting: str
    seed: int


class Data(NamedTuple):
    images: Tensor
    noisy: Tensor
    wrong: Tensor  # which training images have a wrong label
    test_images: Tensor
    test_labels: Tensor


def growth(classes: int) -> float:
    """How much smaller NCE's gradient is than at 100 classes, at uniform logits."""
    return classes * math.log(classes) / (100 * math.log(100))


def constants(setting: str, classes: int) -> dict:
    """alpha, beta and min_prob of a setting; none for cross entropy."""
    if setting == "CE":
        return {}
    if setting == "published":
        return PUBLISHED
    if setting == "raised lr":  # on SGD the same as this factor on the learning rate
        return {**PUBLISHED, "alpha": 10 * growth(classes), "beta": growth(classes)}
    if setting == "same first step":  # every gradient and the clamp as at 100 classes, at uniform logits
        return {"alpha": 10 * growth(classes), "beta": classes / 100, "min_prob": 1e-5 / classes}
    if setting == "alpha alone":
        return {**PUBLISHED, "alpha": 10 * growth(classes)}
    if setting == "NCE alone":
        return {**PUBLISHED, "alpha": 10 * growth(classes), "beta": 0.0}
    return vars(ak.suggest(classes))


def learning_rate(run: Run) -> float:
    lr = OPTIMIZERS[run.optimizer].lr
    return lr * FIRST_STEP if run.setting == "CE" and run.optimizer == "SGD" else lr


def spread_of(directions: Tensor, generator: torch.Generator) -> float:
    """The noise's standard deviation at which the nearest direction is the right one for NEAREST_IS_RIGHT."""
    labels = torch.randint(len(directions), (500,), generator=generator)
    noise = torch.randn(500, DIMENSIONS, generator=generator)
    low, high = 0.01, 1.0
    for _ in range(10):
        middle = math.sqrt(low * high)
        right = accuracy(directions, directions[labels] + middle * noise, labels)
        low, high = (middle, high) if right > NEAREST_IS_RIGHT else (low, middle)
    return low


def data_of(run: Run) -> Data:
    generator = torch.Generator().manual_seed(run.seed)
    directions = torch.nn.functional.normalize(torch.randn(run.classes, DIMENSIONS, generator=generator), dim=1)
    spread = spread_of(directions, generator)
    scale = OPTIMIZERS[run.optimizer].feature_norm / math.sqrt(1 + DIMENSIONS * spread**2)

    def images(labels: Tensor) -> Tensor:
        return scale * (directions[labels] + spread * torch.randn(len(labels), DIMENSIONS, generator=generator))

    present = WITH_IMAGES if run.classes >= 100_000 else run.classes
    labels = torch.arange(present).repeat_interleave(PER_CLASS)
    other = (labels + torch.randint(1, run.classes, (len(labels),), generator=generator)) % run.classes
    noisy = torch.where(torch.arange(len(labels)) % PER_CLASS < WRONG, other, labels)
    test_labels = torch.randint(present, (TEST_IMAGES,), generator=generator)
    wrong = (noisy != labels).nonzero().squeeze(1)
    return Data(images(labels), noisy, wrong, images(test_labels), test_labels)


@torch.no_grad()
def accuracy(weight: Tensor, images: Tensor, labels: Tensor) -> float:
    parts = [(x @ weight.T).argmax(1) == y for x, y in zip(images.split(BATCH), labels.split(BATCH))]
    return torch.cat(parts).float().mean().item()


@torch.no_grad()
def lost(weight: Tensor, data: Data, min_prob: float) -> float:
    """The share (%) of right labels below the clamp, where NNCE has no gradient to bring them back."""
    is_right = torch.ones(len(data.noisy), dtype=torch.bool).index_fill_(0, data.wrong, False)
    some = is_right.nonzero().squeeze(1)
    some = some[:: max(1, len(some) // TEST_IMAGES)]
    below = [
        (images @ weight.T).log_softmax(1).gather(1, labels[:, None]) < math.log(min_prob)
        for images, labels in zip(data.images[some].split(BATCH), data.noisy[some].split(BATCH))
    ]
    return round(100 * torch.cat(below).float().mean().item(), 2)


def loss_of(run: Run, logits: Tensor, target: Tensor) -> Tensor:
    if run.setting == "CE":
        return ak.cross_entropy(logits, target, inplace=True)
    return ak.anl_ce(logits, target, inplace=True, **constants(run.setting, run.classes))


def train(run: Run, epochs: int, bar) -> dict:
    """The run as it is kept: its constants, after every epoch test accuracy and the share of wrong labels learnt."""
    data, generator = data_of(run), torch.Generator().manual_seed(run.seed)
    lr, start = learning_rate(run), time.perf_counter()
    spread = 1 / OPTIMIZERS[run.optimizer].feature_norm  # logits of standard deviation 0.6
    weight = torch.empty(run.classes, DIMENSIONS).uniform_(-spread, spread, generator=generator).requires_grad_()
    if run.optimizer == "SGD":
        optimizer = torch.optim.SGD([weight], lr, momentum=0.9, fused=True)
    else:
        optimizer = torch.optim.Adam([weight], lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    wrong = data.wrong[:: max(1, len(data.wrong) // TEST_IMAGES)]  # about so many of them are looked at
    curves: dict = {"test": [], "wrong": []}
    for _ in range(epochs):
        for batch in torch.randperm(len(data.noisy), generator=generator).split(BATCH):
            loss = loss_of(run, data.images[batch] @ weight.T, data.noisy[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        curves["test"].append(round(100 * accuracy(weight, data.test_images, data.test_labels), 2))
        curves["wrong"].append(round(100 * accuracy(weight, data.images[wrong], data.noisy[wrong]), 2))
        bar.update()
    seconds = round(time.perf_counter() - start, 1)
    chosen = constants(run.setting, run.classes)
    ended = {"lost": lost(weight, data, chosen["min_prob"])} if chosen else {}
    return {**run._asdict(), "lr": lr, **chosen, **curves, **ended, "seconds": seconds}


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The runs asked for; at 100 classes several settings are one."""
    runs = []
    for classes in args.classes:
        for seed in range(args.seeds):
            for optimizer in args.optimizers:
                for setting in args.settings:
                    if classes > 100 or setting in ("CE", "published"):
                        runs.append(Run(classes, optimizer, setting, seed))
    return runs


def run_of(kept: dict) -> Run:
    return Run(*(kept[field] for field in Run._fields))


def write(path: Path, result: dict) -> None:
    """Replaces the file at once, one run per line: a killed run leaves the last whole one."""
    partial = path.with_suffix(".partial")
    runs = ",\n".join(json.dumps(run) for run in result["runs"])
    partial.write_text(f'{{"environment": {json.dumps(result["environment"], indent=1)},\n"runs": [\n{runs}\n]}}\n')
    os.replace(partial, path)


def text(runs: list[dict]) -> str:
    """Test accuracy after the last epoch, mean over seeds, and behind it the share of wrong labels learnt by heart."""
    rows: dict = {}
    columns = sorted({run["classes"] for run in runs})
    for run in runs:
        rows.setdefault((run["optimizer"], run["setting"]), {}).setdefault(run["classes"], []).append(run)
    lines = []
    for (optimizer, setting), cells in rows.items():
        means = [{part: statistics.fmean(r[part][-1] for r in cells[k]) for part in ("test", "wrong")} if k in cells
                 else None for k in columns]  # fmt: skip
        lines.append([optimizer, setting, *(f"{m['test']:.1f} ({m['wrong']:.1f})" if m else "" for m in means)])
    return table(lines, ["", "", *(f"K = {k:,}" for k in columns)])


STYLE = {
    "CE": "C7",
    "published": "C0",
    "raised lr": "C1",
    "same first step": "C4",
    "NCE alone": "C9",
    "alpha alone": "C2",
    "suggest": "C3",
}


def plot(runs: list[dict], path: Path) -> None:
    """Test accuracy over the epochs: rows are optimizers, columns numbers of classes, and each run is a line."""
    pictures.use_style()
    columns = sorted({run["classes"] for run in runs})
    rows = [name for name in OPTIMIZERS if any(run["optimizer"] == name for run in runs)]
    size = 2.7 * len(columns), 2.5 * len(rows) + 0.5
    figure = need("matplotlib.figure", "noisy").Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    labels: dict = {}
    for axes_row, optimizer in zip(grid, rows):
        axes_row[0].set_ylabel(f"{optimizer}: test accuracy, %")
        for axes, classes in zip(axes_row, columns):
            here = [run for run in runs if (run["classes"], run["optimizer"]) == (classes, optimizer)]
            for run in here:
                style = dict(color=STYLE[run["setting"]], linewidth=1.2)
                line, *_ = axes.plot(thinned(range(1, len(run["test"]) + 1), 30), thinned(run["test"], 30), **style)
                labels[run["setting"]] = line
            axes.set_visible(bool(here))
    for axes, classes in zip(grid[0], columns):
        axes.set_title("K = 100 (published: suggest)" if classes == 100 else f"K = {classes:,}")
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    order = [name for name in STYLE if name in labels]
    figure.legend([labels[name] for name in order], order, loc="outside lower center", ncols=len(order))
    pictures.save(figure, path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.noisy_labels.many_classes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = lambda text: text.split(",")
    numbers = lambda text: [int(word) for word in words(text)]
    add = made.add_argument
    add("--json", type=Path, required=True, metavar="FILE", help="results, added to run by run")
    add("--classes", type=numbers, default=[100, 1000, 10_000, 100_000], metavar="LIST")
    add("--optimizers", type=words, default=list(OPTIMIZERS), metavar="LIST")
    add("--settings", type=words, default=list(STYLE), metavar="LIST")
    add("--seeds", type=int, default=1)
    add("--epochs", type=int, default=EPOCHS)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, metavar="FILE", help="draws what the file holds, and trains nothing")
    return made


def main() -> int:
    args = parser().parse_args()
    if unknown := [*set(args.optimizers) - set(OPTIMIZERS), *set(args.settings) - set(STYLE)]:
        sys.exit(f"many_classes: {unknown[0]!r} is none of {', '.join([*OPTIMIZERS, *STYLE])}.")
    result = json.loads(args.json.read_text()) if args.json.exists() else {"environment": None, "runs": []}
    if args.plot:
        plot(result["runs"], args.plot)
        print(args.plot)
        return 0
    torch.set_num_threads(args.threads)
    result["environment"] = environment()
    done = {run_of(kept) for kept in result["runs"]}
    waiting = [run for run in runs_of(args) if run not in done]
    with progress(len(waiting) * args.epochs, "epoch") as bar:
        for run in waiting:
            result["runs"].append(train(run, args.epochs, bar))
            write(args.json, result)
    print(text(result["runs"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
