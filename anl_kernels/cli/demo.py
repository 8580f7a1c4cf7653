"""`python -m anl_kernels demo`: digits with wrong labels, cross entropy and the robust losses.

Data: the 1797 handwritten digits (8 x 8) that come with scikit-learn; 1297 to train with wrong labels, 500 to test with
right ones. Every loss has the settings its authors published for MNIST, and nothing is chosen by the test accuracy:
SGD, lr 0.01, momentum 0.9, batch 128, cosine to 0, gradient norm clipped at 5; weight decay 1e-3, or for ANL instead
delta = 1e-6 times the L1 norm of the parameters; ANL alpha = beta = 1, min_prob 1e-7; GCE q = 0.7; NCE + 10 RCE. The
entropy term has no published weight for MNIST: 0.4, which is CIFAR-10's 2 over its alpha = beta = 5. 100 epochs, as an
epoch here is 11 steps (MNIST: 469).

Read the best epoch beside the last: a loss whose last epoch is good may only not have learned the wrong labels by heart
yet. Read the lowest recall as well: under asymmetric noise ANL loses whole classes (a label below min_prob has no
gradient in the negative part, and hardly one in the active part), and the entropy term is what keeps them.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing.context
import multiprocessing.forkserver
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
    "ANL-CE+entropy": Setting(ak.NCE() + ak.NNCE(), 0.0, 1e-6, 0.4),
    "ANL-CE": Setting(ak.NCE() + ak.NNCE(), 0.0, 1e-6),
    "ANL-FL": Setting(ak.NFL(0.5) + ak.NNFL(0.5), 0.0, 1e-6),
    "NCE+RCE": Setting(ak.NCE() + 10 * ak.RCE()),
    "GCE": Setting(1 * ak.GCE(q=0.7)),
    "CE": Setting(1 * ak.CE()),
}
NOISES = {"symmetric 60 %": ("symmetric", 0.6), "asymmetric 40 %": ("asymmetric", 0.4)}
CONFUSED_WITH = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}  # asymmetric noise, as published for MNIST


class Run(NamedTuple):
    noise: str
    loss: str
    seed: int


class Job(NamedTuple):
    """The runs of one loss, which are trained side by side."""

    runs: list[Run]
    epochs: int
    backend: str
    images: Any  # NumPy arrays, as scikit-learn has them
    labels: Any


class Curve(NamedTuple):
    train: list[float]  # accuracy in % on the (partly wrong) labels of each epoch's batches, before their steps
    test: list[float]  # on the right labels of the test images, after each epoch
    recall: list[float]  # of each digit, after the last epoch


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


def digits(job: Job, run: Run, generator: torch.Generator) -> Digits:
    images, labels = torch.tensor(job.images, dtype=torch.float32) / 16, torch.tensor(job.labels)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:TRAINED_ON], order[TRAINED_ON:]
    noisy = wrong_labels(labels[train], *NOISES[run.noise], generator)
    return Digits(images[train], noisy, images[test], labels[test])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


class Networks(nn.Module):
    """Several of `network()` side by side, trained together: (runs, batch, 64) -> (runs, batch, 10)."""

    def __init__(self, networks: list[nn.Module]):
        super().__init__()
        self.shapes = [weight.shape for weight in networks[0].parameters()]
        with torch.no_grad():  # all weights of a run in one row
            self.weights = nn.Parameter(torch.stack([nn.utils.parameters_to_vector(n.parameters()) for n in networks]))
        channels = len(networks) * self.shapes[0][0]
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels, affine=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.weights.split([shape.numel() for shape in self.shapes], dim=1)
        parts = [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)]
        for layer, norm in enumerate(self.norms):
            weight, bias, scale, shift = parts[4 * layer : 4 * layer + 4]
            x = linear(x, weight, bias).transpose(0, 1).flatten(1)  # the channels of all runs, for one batch_norm
            statistics = norm.running_mean, norm.running_var
            x = F.batch_norm(x, *statistics, scale.flatten(), shift.flatten(), training=self.training)
            x = x.relu().unflatten(1, bias.shape).transpose(0, 1)
        return linear(x, *parts[-2:])

    def clip_gradients(self) -> None:
        """As clip_grad_norm_, for each run by itself."""
        norms = torch.linalg.vector_norm(self.weights.grad, dim=1, keepdim=True)
        self.weights.grad *= (CLIP / (norms + 1e-6)).clamp(max=1)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight.mT)


def seeded_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return network()


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float()


def sum_of_losses(setting: Setting, logits: Tensor, labels: Tensor, backend: str) -> Tensor:
    """Each run's loss, a mean over its batch, summed over the runs: none depends on another run's weights."""
    if not setting.entropy_weight:  # the rows of all runs in one call
        loss = setting.criterion(logits.flatten(0, 1), labels.flatten(), reduction="sum", backend=backend)
        return loss / labels.shape[1]
    options = {"entropy_weight": setting.entropy_weight, "backend": backend}
    return sum(setting.criterion(z, y, **options) for z, y in zip(logits, labels))


def train(job: Job) -> dict[Run, Curve]:
    generators = [torch.Generator().manual_seed(run.seed) for run in job.runs]  # the same data and order for every loss
    data = [digits(job, run, generator) for run, generator in zip(job.runs, generators)]
    images, noisy, test_images, test_labels = map(torch.stack, zip(*data))
    model = Networks([seeded_network(run.seed) for run in job.runs])
    setting = SETTINGS[job.runs[0].loss]
    options = {"momentum": MOMENTUM, "weight_decay": setting.weight_decay, "fused": True}
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.epochs)
    row = torch.arange(len(job.runs))[:, None]
    train_curve, test_curve = [], []
    for _ in range(job.epochs):
        model.train()
        order = torch.stack([torch.randperm(TRAINED_ON, generator=generator) for generator in generators])
        right = []
        for x, y in zip(images[row, order].split(BATCH, 1), noisy[row, order].split(BATCH, 1)):
            logits = model(x)
            loss = sum_of_losses(setting, logits, y, job.backend)
            if setting.delta:
                loss = loss + setting.delta * ak.l1_penalty(model.parameters())
            optimizer.zero_grad()
            loss.backward()
            model.clip_gradients()
            optimizer.step()
            right.append(is_right(logits.detach(), y))
        schedule.step()
        model.eval()
        with torch.no_grad():
            correct = is_right(model(test_images), test_labels)
        train_curve.append(100 * torch.cat(right, 1).mean(1))
        test_curve.append(100 * correct.mean(1))
    of_digit = F.one_hot(test_labels, 10).float()
    recall = 100 * (of_digit * correct[..., None]).sum(1) / of_digit.sum(1)
    curves = zip(torch.stack(train_curve, 1).tolist(), torch.stack(test_curve, 1).tolist(), recall.tolist())
    return {run: Curve(*curve) for run, curve in zip(job.runs, curves)}


def server_of_workers() -> multiprocessing.context.BaseContext:
    """One process imports PyTorch for all workers, which are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    multiprocessing.forkserver.ensure_running()
    return context


def run_all(jobs: list[Job], workers: int) -> dict[Run, Curve]:
    """Each job on one thread, `workers` at a time; the results do not depend on how many."""
    found = {}
    with progress(len(jobs), "loss") as bar:
        if workers == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                for job in jobs:
                    found |= train(job)
                    bar.update()
            finally:
                torch.set_num_threads(threads)
            return found
        start = functools.partial(torch.set_num_threads, 1)
        with ProcessPoolExecutor(workers, mp_context=server_of_workers(), initializer=start) as pool:
            for done in as_completed([pool.submit(train, job) for job in jobs]):
                found |= done.result()
                bar.update()
    return found


def of_all_seeds(found: dict[Run, Curve], noise: str, loss: str) -> list[Curve]:
    return [curve for run, curve in found.items() if (run.noise, run.loss) == (noise, loss)]


def mean_and_deviation(values: list[float]) -> str:
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {torch.tensor(values).std(correction=1):.1f}"


def report(found: dict[Run, Curve], losses: list[str]) -> str:
    """Last and best epoch of each loss."""
    rows = []
    for loss in losses:
        cells = [loss]
        for noise in NOISES:
            curves = of_all_seeds(found, noise, loss)
            cells.append(mean_and_deviation([curve.test[-1] for curve in curves]))
            cells.append(mean_and_deviation([max(curve.test) for curve in curves]))
            cells.append(mean_and_deviation([min(curve.recall) for curve in curves]))
        rows.append(cells)
    headers = [f"{noise}\n{what}" for noise in NOISES for what in ("last epoch", "best epoch", "lowest recall")]
    return table(rows, ["accuracy in % on\nclean test labels", *headers])


def report_recall(found: dict[Run, Curve], losses: list[str]) -> str:
    """Recall of each digit, mean over the seeds."""
    rows = []
    for noise in NOISES:
        for loss in losses:
            recall = torch.tensor([curve.recall for curve in of_all_seeds(found, noise, loss)]).mean(0)
            rows.append([noise, loss, *(f"{value:.0f}" for value in recall)])
    return table(rows, ["recall in %, last epoch", "digit", *map(str, range(10))])


def mean_curve(found: dict[Run, Curve], noise: str, loss: str, part: str) -> Tensor:
    return torch.tensor([getattr(curve, part) for curve in of_all_seeds(found, noise, loss)]).mean(0)


def plot(found: dict[Run, Curve], losses: list[str], path: str) -> None:
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
    parser.add_argument("--seeds", type=int, default=3, help="runs per loss and noise (3)")
    parser.add_argument("--epochs", type=int, default=100, help="(100)")
    parser.add_argument("--losses", metavar="LIST", help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    parser.add_argument(
        "--output", default="anl_kernels_demo.png", metavar="FILE", type=output_file, help="the plot, a PNG"
    )


def run(args: argparse.Namespace) -> int:
    if args.workers > 1:
        server_of_workers()  # it imports PyTorch while scikit-learn and matplotlib are imported here
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
    images, labels = need("sklearn.datasets", "demo").load_digits(return_X_y=True)
    jobs = [
        Job([Run(n, loss, s) for n in NOISES for s in range(args.seeds)], args.epochs, args.backend, images, labels)
        for loss in losses
    ]
    print(
        f"scikit-learn's digits: {TRAINED_ON} training images with wrong labels, 500 test images with right ones; "
        f"{len(losses)} losses, {args.seeds} seeds, {args.epochs} epochs\n"
        "every loss with its published MNIST settings (python -m anl_kernels demo --help)"
    )
    start = time.perf_counter()
    found = run_all(jobs, min(args.workers, len(jobs)))
    print(f"\n{report(found, losses)}\n\n{report_recall(found, losses)}\n")
    plot(found, losses, args.output)
    seconds = time.perf_counter() - start
    spread = f"mean ± sample standard deviation of {args.seeds} seeds" if args.seeds > 1 else "one seed"
    print(f"{spread}; the best epoch is chosen by the test labels; {seconds:.0f} s; plot: {args.output}")
    return 0
