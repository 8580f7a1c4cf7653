"""`python -m benchmarks.noisy_labels`: accuracy on clean test labels after training on wrong ones.

    python -m benchmarks.noisy_labels --quick                                    # digits, 3 seeds, minutes
    python -m benchmarks.noisy_labels --dataset mnist --data FOLDER --quick      # a part of MNIST, minutes
    python -m benchmarks.noisy_labels --dataset cifar10 --data FOLDER --noise symmetric:0.4,human:worse --workers 8

The papers' networks, settings and losses (settings.py). Killed, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from anl_kernels.cli.common import need

from . import report
from .data import LOADERS, DataMissing, load
from .noise import Noise
from .runner import run_all, write_results
from .settings import DEFAULT_LOSSES, DEFAULT_NOISES, RECIPES
from .train import Run, Where

# Within 10 minutes on 2 cores: epochs, training images, test images, seeds.
QUICK = {"digits": (200, None, None, 3), "mnist": (15, 2560, 2000, 1)}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.noisy_labels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--dataset", default="digits", choices=list(LOADERS))
    add("--data", metavar="FOLDER", help="where the dataset's files are (data.py says which)")
    add("--losses", metavar="LIST", default=",".join(DEFAULT_LOSSES))
    add("--noise", metavar="LIST", default=",".join(DEFAULT_NOISES))
    add("--seeds", type=int, help="runs per loss and noise (3)")
    add("--epochs", type=int, help="the papers' number; the cosine ends with the last one")
    add("--train-size", type=int, help="only so many training images")
    add("--test-size", type=int, help="only so many test images")
    add("--quick", action="store_true", help="less of everything: within 10 minutes on 2 cores")
    add("--bf16", action="store_true", help="the network in bfloat16 (autocast)")
    add("--workers", type=int, help="runs at once, on one GPU too (1; --quick: a core each)")
    add("--threads", type=int, default=1, help="a worker's (1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", default="auto")
    add("--out", type=Path, default=Path("noisy_labels"), metavar="FOLDER", help="states and results (noisy_labels)")
    add("--json", type=Path, metavar="FILE", help="all results in one file (OUT/results.json)")
    add("--figures", type=Path, metavar="FOLDER", help="the plots, SVG (OUT)")
    return made


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The runs asked for, seed by seed; ends the command with a sentence where one cannot be."""
    known = RECIPES[args.dataset].losses
    losses = args.losses.split(",")
    for name in losses:
        if name not in known:
            sys.exit(f"anl_kernels: --losses takes names of {', '.join(known)}; got {name!r}.")
    try:
        noises = [str(Noise.parse(text)) for text in args.noise.split(",")]
    except ValueError as error:
        sys.exit(f"anl_kernels: {error}.")
    if args.quick and args.dataset not in QUICK:
        sys.exit(f"anl_kernels: --quick is for {', '.join(QUICK)}.")
    preset = QUICK[args.dataset] if args.quick else (RECIPES[args.dataset].epochs, None, None, 3)
    given = args.epochs, args.train_size, args.test_size, args.seeds
    epochs, train, test, seeds = (value if value is not None else default for value, default in zip(given, preset))
    for name, value in zip(("epochs", "train-size", "test-size", "seeds", "workers"), (*given, args.workers)):
        if value is not None and value < 1:
            sys.exit(f"anl_kernels: --{name} must be at least 1.")
    return [
        Run(args.dataset, loss, kind, seed, epochs, train, test, args.bf16)
        for seed in range(seeds)
        for kind in noises
        for loss in losses
    ]


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    need("matplotlib", "noisy")
    runs = runs_of(args)
    try:
        load(args.dataset, args.data)
    except DataMissing as error:
        sys.exit(f"anl_kernels: {error}.")
    where = Where(args.data, args.device, args.out / "runs", args.backend)
    workers = args.workers or ((os.cpu_count() or 1) if args.quick else 1)
    results = run_all(runs, where, min(workers, len(runs)), args.threads)
    file = args.json or args.out / "results.json"
    shown = sys.argv[1:] if arguments is None else arguments
    write_results(results, file, f"python -m benchmarks.noisy_labels {shlex.join(without_folders(shown))}")
    print(report.text(results))
    drawn = report.plots(results, args.figures or args.out)
    print(f"\n{file}\n" + "\n".join(str(picture) for picture in drawn))
    return 0


def without_folders(arguments: list[str]) -> list[str]:
    """The command as others would type it: what names a place on this machine is left out."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            kept.append("FOLDER" if kept[-1] == "--data" else "")
        elif argument in ("--out", "--json", "--figures"):
            kept.append("")
        else:
            kept.append(argument)
        skip = not skip and argument in ("--data", "--out", "--json", "--figures")
    return [argument for argument in kept if argument]


if __name__ == "__main__":
    sys.exit(main())
