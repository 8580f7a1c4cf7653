"""Tables and pictures of finished runs: python -m benchmarks.noisy_labels.report RESULTS.json --figures FOLDER."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from anl_kernels.cli.common import need, table
from benchmarks import pictures

from .noise import Noise
from .settings import PUBLISHED


def unique(runs: list[dict], field: str) -> list:
    return list(dict.fromkeys(run[field] for run in runs))


def chosen(runs: list[dict], **fields) -> list[dict]:
    return [run for run in runs if all(run[name] == value for name, value in fields.items())]


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def text(runs: list[dict]) -> str:
    """The table of each dataset: accuracy on clean test labels after the last epoch, with the papers' beside it, and at
    the best of the epochs that were tested: how much of a lead is that others have learned wrong labels by then.
    """
    parts = []
    for dataset in unique(runs, "dataset"):
        own = chosen(runs, dataset=dataset)
        published = PUBLISHED.get(dataset, {})
        noises, rows = unique(own, "noise"), []
        for loss in unique(own, "loss"):
            cells = [loss]
            for noise in noises:
                runs_here = chosen(own, loss=loss, noise=noise)
                values = [run["accuracy"] for run in runs_here]
                best = [max(accuracy for _, accuracy in run["curves"]["test"]) for run in runs_here]
                theirs = published.get(loss, {}).get(noise)
                paper = f" ({theirs:.2f})" if theirs is not None else ""
                cells.append(f"{mean_and_spread(values)}{paper} / {mean_and_spread(best)}" if values else "")
            rows.append(cells)
        shape = " / ".join(
            f"{name.replace('_', ' ')}: {', '.join(str(value) for value in unique(own, name))}"
            for name in ("epochs", "train_images", "test_images", "bf16")
        )
        seeds = len(unique(own, "seed"))
        note = "; the papers' in brackets" if published else ""
        head = f"{dataset}: test accuracy in %, last / best epoch, {seeds} seed{'s' * (seeds > 1)}{note}\n{shape}"
        parts.append(f"{head}\n{table(rows, ['', *noises])}")
    return "\n\n".join(parts)


def plots(runs: list[dict], folder: Path) -> list[Path]:
    """Two pictures per dataset: accuracy against the noise rate, and the curves over the epochs."""
    drawn = []
    for dataset in unique(runs, "dataset"):
        own = chosen(runs, dataset=dataset)
        for name, draw in (("accuracy", rates), ("curves", curves)):
            figure = draw(own)
            if figure is not None:
                drawn.append(folder / f"noisy_{dataset}_{name}.svg")
                pictures.save(figure, drawn[-1])
    return drawn


def panels(rows: int, columns: int, size: tuple[float, float]):
    pictures.use_style()
    figure = need("matplotlib.figure", "noisy").Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for axes in grid.flat:
        axes.locator_params(nbins=5)  # each tick is a line, a mark and a text in the file
    return figure, grid


def thinned(values: Sequence, points: int = 20) -> list:
    """At most so many of the values, evenly spaced, the last one among them: a picture stays a small file."""
    step = -(-len(values) // points)
    return list(values[(len(values) - 1) % step :: step])


def band(axes, x: Sequence, values: Sequence[Sequence[float]], **style) -> None:
    """The mean over seeds, and from the lowest seed to the highest a band."""
    x, values = thinned(x), thinned(values)
    axes.plot(x, [statistics.fmean(v) for v in values], **style)
    if any(len(v) > 1 for v in values):
        axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.15, lw=0)


def rates(runs: list[dict]):
    """Accuracy against the rate, one panel per kind of noise that was run at two rates or more (clean is rate 0)."""
    kinds: dict[str, dict[float, str]] = {}
    for text in unique(runs, "noise"):
        noise = Noise.parse(text)
        if noise.kind not in ("clean", "human"):
            kinds.setdefault(noise.kind, {})[noise.rate] = text
    clean = "clean" in unique(runs, "noise")
    for found in kinds.values():
        found |= {0.0: "clean"} if clean else {}
    kinds = {kind: dict(sorted(found.items())) for kind, found in kinds.items() if len(found) > 1}
    if not kinds:
        return None
    figure, grid = panels(1, len(kinds), (4.6 * len(kinds), 3.6))
    for axes, (kind, found) in zip(grid[0], kinds.items()):
        for index, loss in enumerate(unique(runs, "loss")):
            values = {r: [run["accuracy"] for run in chosen(runs, loss=loss, noise=n)] for r, n in found.items()}
            values = {rate: v for rate, v in values.items() if v}
            band(axes, list(values), list(values.values()), color=f"C{index}", label=loss, marker="o", markersize=4)
        axes.set_title(kind)
        axes.set_xlabel("share of wrong training labels")
    grid[0][0].set_ylabel("test accuracy (clean labels), %")
    grid[0][0].legend(fontsize="small")
    return figure


def of_runs(runs: list[dict], curve: str) -> tuple[list[int], list[tuple[float, ...]]]:
    """Its epochs, and for each the values of all runs."""
    epochs = [epoch for epoch, _ in runs[0]["curves"][curve]]
    return epochs, list(zip(*([value for _, value in run["curves"][curve]] for run in runs)))


def curves(runs: list[dict]):
    """Over the epochs, one column per noise: above on the clean test labels, below on the noisy training labels (the
    mean over seeds alone: bands would cover one another).
    """
    noises = unique(runs, "noise")
    figure, grid = panels(2, len(noises), (3.4 * len(noises), 6.0))
    for column, noise in enumerate(noises):
        for index, loss in enumerate(unique(runs, "loss")):
            own = chosen(runs, loss=loss, noise=noise)
            if not own:
                continue
            style = dict(color=f"C{index}", label=loss, linewidth=1.4)
            band(grid[0][column], *of_runs(own, "test"), **style)
            epochs, values = of_runs(own, "train")
            grid[1][column].plot(epochs, [statistics.fmean(v) for v in values], **style)
        grid[0][column].set_title(noise)
        grid[1][column].set_xlabel("epoch")
    grid[0][0].set_ylabel("test accuracy (clean labels), %")
    grid[1][0].set_ylabel("training accuracy (noisy labels), %")
    grid[1][0].legend(fontsize="small")
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.noisy_labels.report", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the pictures, SVG, here")
    args = parser.parse_args(arguments)
    runs = json.loads(args.results.read_text())["runs"]
    print(text(runs))
    if args.figures:
        print("\n".join(str(picture) for picture in plots(runs, args.figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
