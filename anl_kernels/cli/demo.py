"""`python -m anl_kernels demo`: digits with wrong labels, cross entropy and the robust losses.

Data: the 1797 handwritten digits (8 x 8) that come with scikit-learn; 1297 to train with wrong labels, 500 to test with
right ones. Every loss has the settings its authors published for MNIST, and nothing is chosen by the test accuracy:
SGD, lr 0.01, momentum 0.9, batch 128, cosine to 0, gradient norm clipped at 5; weight decay 1e-3, or for ANL instead
delta = 1e-6 times the L1 norm of the parameters; ANL alpha = beta = 1, min_prob 1e-7; GCE q = 0.7; NCE + 10 RCE. The
entropy term has no published weight for MNIST: 0.4, which is CIFAR-10's 2 over its alpha = beta = 5. 200 epochs, as an
epoch here is 11 steps (MNIST: 469).
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import anl_kernels as ak

from .common import need, output_file, progress, table

TRAINED_ON = 1297
BATCH, LEARNING_RATE, MOMENTUM, CLIP = 128, 0.01, 0.9, 5.0


class Setting(NamedTuple):
    criterion: ak.Expression
    weight_decay: float = 1e-3
    delta: float = 0.0  # of the L1 penalty, instead of weight decay
    entropy_weight: float = 0.0


SETTINGS = {
    "CE": Setting(1 * ak.CE()),
    "GCE": Setting(1 * ak.GCE(q=0.7)),
    "NCE+RCE": Setting(ak.NCE() + 10 * ak.RCE()),
    "ANL-CE": Setting(ak.NCE() + ak.NNCE(), 0.0, 1e-6),
    "ANL-FL": Setting(ak.NFL(0.5) + ak.NNFL(0.5), 0.0, 1e-6),
    "ANL-CE+entropy": Setting(ak.NCE() + ak.NNCE(), 0.0, 1e-6, 0.4),
}
NOISES = {"symmetric 60 %": ("symmetric", 0.6), "asymmetric 40 %": ("asymmetric", 0.4)}
CONFUSED_WITH = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}  # asymmetric noise, as published for MNIST


class Job(NamedTuple):
    noise: str
    loss: str
    seed: int
    epochs: int
    backend: str


class Curve(NamedTuple):
    train: list[float]  # accuracy in % on the (partly wrong) training labels, an epoch each
    test: list[float]  # on the right labels of the test images


class Digits(NamedTuple):
    images: Tensor
    noisy: Tensor
    test_images: Tensor
    test_labels: Tensor


def wrong_labels(labels: Tensor, kind: str, rate: float, generator: torch.Generator) -> Tensor:
    """Flips a share `rate` of the labels: to any other class alike, or to the class it is easily confused with."""
    flipped = torch.rand(len(labels), generator=generator) < rate
    if kind == "symmetric":
        other = (labels + torch.randint(1, 10, (len(labels),), generator=generator)) % 10
    else:
        other = torch.tensor([CONFUSED_WITH.get(digit, digit) for digit in range(10)])[labels]
    return torch.where(flipped, other, labels)


def digits(noise: str, generator: torch.Generator) -> Digits:
    images, labels = need("sklearn.datasets", "demo").load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:TRAINED_ON], order[TRAINED_ON:]
    noisy = wrong_labels(labels[train], *NOISES[noise], generator)
    return Digits(images[train], noisy, images[test], labels[test])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100.0 * (model(images).argmax(1) == labels).float().mean().item()


def train(job: Job) -> Curve:
    generator = torch.Generator().manual_seed(job.seed)  # the same data, noise and order for every loss
    data = digits(job.noise, generator)
    torch.manual_seed(job.seed)
    model, setting = network(), SETTINGS[job.loss]
    decay = setting.weight_decay
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.epochs)
    curve = Curve([], [])
    for _ in range(job.epochs):
        model.train()
        for batch in torch.randperm(len(data.noisy), generator=generator).split(BATCH):
            loss = setting.criterion(
                model(data.images[batch]),
                data.noisy[batch],
                entropy_weight=setting.entropy_weight,
                backend=job.backend,
            )
            if setting.delta:
                loss = loss + setting.delta * ak.l1_penalty(model.parameters())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        schedule.step()
        model.eval()
        curve.train.append(accuracy(model, data.images, data.noisy))
        curve.test.append(accuracy(model, data.test_images, data.test_labels))
    return curve


def run_all(jobs: list[Job], workers: int) -> dict[Job, Curve]:
    """Each job on one thread, `workers` at a time; the results do not depend on how many."""
    found = {}
    with progress(len(jobs), "run") as bar:
        if workers == 1:
            for job in jobs:
                found[job] = train(job)
                bar.update()
            return found
        context = multiprocessing.get_context("spawn")
        start = functools.partial(torch.set_num_threads, 1)
        with ProcessPoolExecutor(workers, mp_context=context, initializer=start) as pool:
            running = {pool.submit(train, job): job for job in jobs}
            for done in as_completed(running):
                found[running[done]] = done.result()
                bar.update()
    return found


def last_epochs(found: dict[Job, Curve], noise: str, loss: str) -> Tensor:
    return torch.tensor([curve.test[-1] for job, curve in found.items() if (job.noise, job.loss) == (noise, loss)])


def report(found: dict[Job, Curve], losses: list[str]) -> str:
    rows = []
    for loss in losses:
        cells = [loss]
        for noise in NOISES:
            final = last_epochs(found, noise, loss)
            cells.append(f"{final.mean():.1f} ± {final.std(correction=0):.1f}")
        rows.append(cells)
    return table(rows, ["accuracy in % on clean test labels, last epoch", *NOISES])


def mean_curve(found: dict[Job, Curve], noise: str, loss: str, part: str) -> Tensor:
    curves = [getattr(curve, part) for job, curve in found.items() if (job.noise, job.loss) == (noise, loss)]
    return torch.tensor(curves).mean(0)


def plot(found: dict[Job, Curve], losses: list[str], path: str) -> None:
    figure = need("matplotlib.figure", "demo").Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.subplots(2, len(NOISES), sharex=True, sharey="row")
    for column, noise in enumerate(NOISES):
        for row, part in enumerate(("test", "train")):
            axes = grid[row][column]
            for index, loss in enumerate(losses):
                curve = mean_curve(found, noise, loss, part)
                axes.plot(range(1, len(curve) + 1), curve.tolist(), color=f"C{index}", label=loss, linewidth=1.4)
            axes.grid(alpha=0.3)
        grid[0][column].set_title(f"{noise} wrong training labels")
        grid[1][column].set_xlabel("epoch")
    grid[0][0].set_ylabel("test accuracy (clean labels), %")
    grid[1][0].set_ylabel("training accuracy (noisy labels), %")
    grid[1][0].legend(loc="lower right", fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__.split("\n", 2)[2]
    parser.add_argument("--seeds", type=int, default=3, help="runs a loss and noise (3)")
    parser.add_argument("--epochs", type=int, default=200, help="(200)")
    parser.add_argument("--losses", metavar="LIST", help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    parser.add_argument(
        "--output", default="anl_kernels_demo.png", metavar="FILE", type=output_file, help="the plot, a PNG"
    )


def run(args: argparse.Namespace) -> int:
    need("sklearn.datasets", "demo"), need("matplotlib.figure", "demo")
    losses = list(SETTINGS)
    if args.losses:
        losses = [name for name in SETTINGS if name in args.losses.split(",")]
        if not losses:
            sys.exit(f"anl_kernels: --losses takes names of {', '.join(SETTINGS)}.")
    known = need("matplotlib.backend_bases", "demo").FigureCanvasBase.filetypes
    if Path(args.output).suffix[1:].lower() not in ("", *known):
        print(f"anl_kernels: --output {args.output}: a plot is one of {', '.join(known)}.", file=sys.stderr)
        return 2
    if args.seeds < 1 or args.epochs < 1 or args.workers < 1:
        sys.exit("anl_kernels: --seeds, --epochs and --workers must be at least 1.")
    jobs = [Job(n, loss, s, args.epochs, args.backend) for s in range(args.seeds) for n in NOISES for loss in losses]
    print(
        f"scikit-learn's digits: {TRAINED_ON} training images with wrong labels, 500 test images with right ones; "
        f"{len(losses)} losses, {args.seeds} seeds, {args.epochs} epochs\n"
        "every loss with its published MNIST settings (python -m anl_kernels demo --help)"
    )
    start = time.perf_counter()
    found = run_all(jobs, min(args.workers, len(jobs)))
    print(f"\n{report(found, losses)}\n")
    plot(found, losses, args.output)
    seconds = time.perf_counter() - start
    print(f"mean ± standard deviation over {args.seeds} seeds; {seconds:.0f} s; plot: {args.output}")
    return 0
