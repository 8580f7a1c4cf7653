"""The pictures of a measured run: python benchmarks/plots.py BENCH.json [MEMORY.json] --out docs/figures.

Every mark in a picture is a number in the JSON; a picture whose data are missing is not drawn.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import pictures

pictures.use_style()

COPY, OURS = "out.copy_(logits)", "anl_kernels"
STYLE = {
    "anl_kernels": dict(color="C3", marker="o", linewidth=2.2),
    "anl_kernels inplace": dict(color="C1", marker="o"),
    "anl_kernels cuda": dict(color="C6", marker="s", linestyle=":"),
    "anl_kernels triton": dict(color="C8", marker="s", linestyle=":"),
    "out.copy_(logits)": dict(color="black", linestyle="--"),
    "logits.clone()": dict(color="grey", linestyle="--"),
    "F.cross_entropy": dict(color="C0", marker="^"),
    "formulas, eager": dict(color="C2", marker="v"),
    "formulas, torch.compile": dict(color="C4", marker="v"),
    "Liger cross entropy": dict(color="C5", marker="x"),
    "quack cross entropy": dict(color="C9", marker="x"),
}
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


def by_classes(results: list[dict]) -> dict[tuple[str, str], list[tuple[int, dict]]]:
    """(dtype, contender) -> [(K, result)], of the largest (N, K) shape measured for each K."""
    largest: dict = {}
    for result in results:
        sizes = [int(size) for size in result["shape"].split("x")]
        if len(sizes) != 2 or result.get("phase", "both") != "both" or result["loss"] != "anl_ce":
            continue
        key = result["dtype"], result["contender"], sizes[1]
        if key not in largest or sizes[0] > largest[key][0]:
            largest[key] = sizes[0], result
    lines: dict = {}
    for (dtype, name, classes), (_, result) in sorted(largest.items(), key=lambda item: item[0][2]):
        lines.setdefault((dtype, name), []).append((classes, result))
    return lines


def logits_bytes(result: dict) -> int:
    total = ITEMSIZE[result["dtype"]]
    for size in result["shape"].split("x"):
        total *= int(size)
    return total


def panels(lines, y, ylabel: str, title: str, file: Path, skip=(), log=True) -> None:
    """One panel per dtype, one line per contender; y(result, K) is a number, or None for what was not measured."""
    dtypes = [dtype for dtype in ITEMSIZE if any(d == dtype for d, _ in lines)]
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5.2 * len(dtypes), 3.8), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes):
        for name, style in STYLE.items():
            points = [(k, y(r, k)) for k, r in lines.get((dtype, name), ()) if name not in skip]
            points = [point for point in points if point[1] is not None]
            if points:
                axis.plot(*zip(*points), label=name, markersize=4, **style)
        axis.set(xscale="log", xlabel="classes K", title=dtype)
        if log:
            axis.set_yscale("log")
    axes[0][0].set_ylabel(ylabel)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, title, file)


def save(figure, title: str, file: Path) -> None:
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    pictures.save(figure, file)
    plt.close(figure)
    print(file)


def speed_pictures(document: dict, where: str, out: Path) -> None:
    lines = by_classes(document["results"])
    median = {(d, n, k): r["median_s"] for (d, n), found in lines.items() for k, r in found if "median_s" in r}

    def bandwidth(result, classes):
        return 2e-9 * logits_bytes(result) / result["median_s"] if "median_s" in result else None

    def speedup(result, classes):
        ours = median.get((result["dtype"], OURS, classes))
        return result["median_s"] / ours if ours and "median_s" in result else None

    def gradient_error(result, classes):
        return result.get("error_grad") or None

    both = "forward + backward"
    title = f"{both}: one read and one write of the logits over the time; {where}"
    panels(lines, bandwidth, "GB/s", title, out / "bandwidth.svg")
    title = f"{both}: time divided by that of anl_ce; {where}"
    panels(lines, speedup, "times ours", title, out / "speedup.svg", skip=("logits.clone()",))
    title = f"gradient against float64, Euclidean norm (half precision: mostly its own rounding); {where}"
    panels(lines, gradient_error, "relative error", title, out / "error.svg")


def memory_picture(document: dict, where: str, file: Path) -> None:
    results = document["memory"]
    names = [name for name in STYLE if any(r["contender"] == name for r in results)]
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5.6 * len(dtypes), 3.8), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes):
        shapes = list(dict.fromkeys(r["shape"] for r in results if r["dtype"] == dtype))
        width = 0.85 / len(names)
        for i, name in enumerate(names):
            for j, shape in enumerate(shapes):
                found = next(
                    (r for r in results if (r["contender"], r["shape"], r["dtype"]) == (name, shape, dtype)), None
                )
                at, label = j + (i - len(names) / 2) * width, name if j == 0 else None
                if found is None:
                    continue
                if found["state"] == "ok":
                    axis.bar(
                        at, found["peak_bytes"] / found["logits_bytes"], width, color=STYLE[name]["color"], label=label
                    )
                else:
                    axis.bar(at, 0.0, width, color=STYLE[name]["color"], label=label)
                    axis.plot(at, 0.15, marker="x", color=STYLE[name]["color"])
                    axis.annotate(found["state"], (at, 0.4), rotation=90, fontsize=6, ha="center", va="bottom")
        axis.set(title=dtype, xticks=range(len(shapes)), xticklabels=[shape.replace("x", " x ") for shape in shapes])
        axis.tick_params(axis="x", labelsize=7)
    axes[0][0].set_ylabel("peak above the inputs / logits")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, f"forward + backward within {document['limit_gib']:g} GiB; {where}", file)


def place(document: dict) -> str:
    facts = document["environment"]
    device = f"GPU: {facts['gpu']}" if facts["gpu"] else f"CPU: {facts['device']}, {facts['threads']} threads"
    return f"{device}, PyTorch {facts['torch']}, {facts['date'][:10]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for file in args.files:
        document = json.loads(file.read_text())
        kind = "gpu" if document["environment"]["gpu"] else "cpu"
        out = args.out / kind
        out.mkdir(exist_ok=True)
        if "memory" in document:
            memory_picture(document, place(document), out / "memory.svg")
        else:
            speed_pictures(document, place(document), out)


if __name__ == "__main__":
    main()
