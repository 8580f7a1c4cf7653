"""`python -m benchmarks.noisy_labels.segmentation --data FOLDER`: CamVid, a small U-Net, clean and wrong masks.

The losses get logits (N, 11, H, W) and masks (N, H, W) with ignore_index = 11 (void). Adam, lr 1e-3, batch 8, cosine to
0, mirrored images; the losses' constants are those published for CIFAR-10, whose number of classes is the nearest.
The result is the mean IoU on the clean test masks. No test mask chose anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anl_kernels as ak
from anl_kernels.cli.common import need, progress, table
from anl_kernels.cli.demo import CLIP
from benchmarks import pictures

from .data import DataMissing, jpegs
from .masks import wrong_masks
from .models import conv
from .report import band, chosen, mean_and_spread, panels, unique
from .runner import write_results
from .settings import CIFAR10
from .train import replace

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
VOID = len(CLASSES)
LOSSES = ("CE", "GCE", "ANL-CE", "ANL-CE+entropy")
BATCH, LEARNING_RATE = 8, 1e-3
MULTIPLE = 8  # the U-Net halves the image three times


class Run(NamedTuple):
    loss: str
    rate: float  # of the objects whose mask is wrong
    seed: int
    epochs: int
    shrink: int
    width: int

    @property
    def name(self) -> str:
        return f"camvid-{self.loss}-{self.rate:g}-e{self.epochs}-x{self.shrink}-w{self.width}-s{self.seed}"


class Scenes(NamedTuple):
    """Images (n, 3, H, W) uint8, masks (n, H, W) int64; H and W are multiples of 8, the rest filled with void."""

    images: Tensor
    masks: Tensor


def load(folder: str | Path, split: str, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, H, W, 3) and masks (n, H, W), every `shrink`-th pixel of them; DataMissing where there are none."""
    file = Path(folder) / "camvid_240x180.npz"
    if not file.exists():
        raise DataMissing(f"CamVid is not in {folder}: no camvid_240x180.npz")
    with np.load(file) as data:
        images, masks = jpegs(data[f"{split}_jpeg"], data[f"{split}_offsets"]), data[f"{split}_masks"]
    return images[:, ::shrink, ::shrink], masks[:, ::shrink, ::shrink]


def scenes(images: np.ndarray, masks: np.ndarray, device: str) -> Scenes:
    height, width = masks.shape[1:]
    fill = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    pictures = F.pad(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), fill)
    return Scenes(pictures.to(device), F.pad(torch.from_numpy(masks.astype(np.int64)), fill, value=VOID).to(device))


class UNet(nn.Module):
    """(N, 3, H, W) -> (N, K, H, W): three halvings, width, 2, 4 and 8 times the width."""

    def __init__(self, num_classes: int = VOID, width: int = 16):
        super().__init__()
        sizes = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(nn.Sequential(conv(a, b), conv(b, b)) for a, b in zip([3, *sizes], sizes))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * a, a, 2, stride=2) for a in sizes[:-1])
        self.join = nn.ModuleList(nn.Sequential(conv(2 * a, a), conv(a, a)) for a in sizes[:-1])
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for level in reversed(range(len(self.up))):
            x = self.join[level](torch.cat([kept[level], self.up[level](x)], 1))
        return self.head(x)


def pixels(images: Tensor) -> Tensor:
    """float32, about zero and of unit scale, channels last."""
    return ((images.float() - 110.0) / 75.0).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def ious(model: nn.Module, data: Scenes) -> list[float]:
    """Intersection over union of each class in %, over all pixels that are not void; NaN: a class that is nowhere."""
    model.eval()
    count = torch.zeros(VOID * VOID, dtype=torch.int64, device=data.masks.device)
    for images, masks in zip(data.images.split(BATCH), data.masks.split(BATCH)):
        seen = masks != VOID
        count += torch.bincount(masks[seen] * VOID + model(pixels(images)).argmax(1)[seen], minlength=VOID * VOID)
    matrix = count.view(VOID, VOID).double()
    hits = matrix.diagonal()
    return (100.0 * hits / (matrix.sum(0) + matrix.sum(1) - hits)).tolist()


def mean_iou(each: list[float]) -> float:
    return float(np.nanmean(each))


def train(run: Run, data: Scenes, test: Scenes, device: str, epoch_done) -> dict:
    """data: with the masks to train on. Losses see one batch as (N, 11, H, W)."""
    start, setting = time.perf_counter(), CIFAR10[run.loss]
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    model = UNet(width=run.width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=setting.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs)
    curves: dict[str, list] = {"loss": [], "test": []}
    for epoch in range(1, run.epochs + 1):
        model.train()
        losses = torch.zeros((), device=device)
        batches = torch.randperm(len(data.images), generator=generator).split(BATCH)
        for batch in batches:
            images, masks = data.images[batch], data.masks[batch]
            if torch.rand((), generator=generator) < 0.5:
                images, masks = images.flip(3), masks.flip(2)
            loss = setting.criterion(
                model(pixels(images)), masks, ignore_index=VOID, entropy_weight=setting.entropy_weight
            )
            losses += loss.detach()
            if setting.delta:
                loss = loss + setting.delta * ak.l1_penalty(model.parameters())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        schedule.step()
        curves["loss"].append(losses.item() / len(batches))
        if epoch == run.epochs or epoch % max(1, run.epochs // 4) == 0:
            each = ious(model, test)
            curves["test"].append([epoch, mean_iou(each)])
        epoch_done(1)
    seconds = round(time.perf_counter() - start, 1)
    return {**run._asdict(), "mean_iou": mean_iou(each), "iou": each, "curves": curves, "seconds": seconds}


def text(runs: list[dict], wrong: dict[float, float]) -> str:
    """Mean IoU by loss and share of wrong objects; then each class's, of the highest share."""
    rates = unique(runs, "rate")
    heads = [
        f"{100 * rate:g} % of objects ({wrong[rate]:.1f} % of pixels)" if rate else "clean masks" for rate in rates
    ]
    rows, classes = [], []
    for loss in unique(runs, "loss"):
        found = {rate: chosen(runs, loss=loss, rate=rate) for rate in rates}
        rows.append([loss, *(mean_and_spread([run["mean_iou"] for run in found[rate]]) for rate in rates)])
        for rate in rates:
            each = [statistics.fmean(values) for values in zip(*(run["iou"] for run in found[rate]))]
            classes.append([loss, f"{rate:g}", *(f"{value:.0f}" for value in each)])
    return f"{table(rows, ['mean IoU in %', *heads])}\n\n{table(classes, ['IoU in %', 'wrong', *CLASSES])}"


def plot(runs: list[dict], file: Path) -> None:
    """Mean IoU on the clean test masks over the epochs, one panel per share of wrong objects."""
    rates = unique(runs, "rate")
    figure, grid = panels(1, len(rates), (4.6 * len(rates), 3.6))
    for axes, rate in zip(grid[0], rates):
        for index, loss in enumerate(unique(runs, "loss")):
            own = [run["curves"]["test"] for run in chosen(runs, loss=loss, rate=rate)]
            values = list(zip(*([value for _, value in curve] for curve in own)))
            band(axes, [epoch for epoch, _ in own[0]], values, color=f"C{index}", label=loss, marker="o", markersize=4)
        axes.set_title(f"{100 * rate:g} % of the objects wrong" if rate else "clean masks")
        axes.set_xlabel("epoch")
    grid[0][0].set_ylabel("mean IoU (clean test masks), %")
    grid[0][0].legend(fontsize="small")
    pictures.save(figure, file)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.noisy_labels.segmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    add = made.add_argument
    add("--data", required=True, metavar="FOLDER", help="holds camvid_240x180.npz")
    add("--losses", default=",".join(LOSSES), metavar="LIST")
    add("--rates", default="0,0.6", metavar="LIST", help="shares of the objects whose masks are wrong (0,0.6)")
    add("--seeds", type=int, default=3 if cuda else 1)
    add("--epochs", type=int, default=100 if cuda else 8)
    add("--shrink", type=int, default=1 if cuda else 2, help="every so many pixels each way (1 on a GPU, else 2)")
    add("--width", type=int, default=32 if cuda else 16, help="channels at full size (32 on a GPU, else 16)")
    add("--threads", type=int, default=1)
    add("--device", default="cuda" if cuda else "cpu")
    add("--out", type=Path, default=Path("noisy_labels"), metavar="FOLDER")
    add("--json", type=Path, metavar="FILE", help="all results in one file (OUT/segmentation.json)")
    add("--figures", type=Path, metavar="FOLDER", help="the plot, SVG (OUT)")
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    losses, rates = args.losses.split(","), [float(rate) for rate in args.rates.split(",")]
    if not set(losses) <= set(CIFAR10) or not all(0.0 <= rate <= 1.0 for rate in rates):
        sys.exit(f"anl_kernels: --losses takes names of {', '.join(CIFAR10)}, --rates shares from 0 to 1.")
    need("matplotlib", "noisy")
    torch.set_num_threads(args.threads)
    try:
        images, masks = load(args.data, "train", args.shrink)
        test = scenes(*load(args.data, "test", args.shrink), args.device)
    except DataMissing as error:
        sys.exit(f"anl_kernels: {error}.")
    results, wrong, folder = [], {}, args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    with progress(args.seeds * len(rates) * len(losses) * args.epochs, "epoch") as bar:
        for seed in range(args.seeds):
            for rate in rates:
                noisy = wrong_masks(masks, rate, VOID, seed) if rate else masks
                wrong[rate] = 100.0 * float((noisy != masks)[masks < VOID].mean())
                data = scenes(images, noisy, args.device)
                for loss in losses:
                    run = Run(loss, rate, seed, args.epochs, args.shrink, args.width)
                    kept = folder / f"{run.name}.json"
                    if kept.exists():
                        bar.update(run.epochs)
                    else:
                        result = train(run, data, test, args.device, bar.update)
                        replace(kept, lambda part, result=result: part.write_text(json.dumps(result)))
                    results.append(json.loads(kept.read_text()) | {"wrong_pixels": wrong[rate]})
    command = (
        f"python -m benchmarks.noisy_labels.segmentation --data FOLDER --losses {args.losses} --rates {args.rates}"
    )
    sizes = f" --seeds {args.seeds} --epochs {args.epochs} --shrink {args.shrink} --width {args.width}"
    write_results(results, args.json or args.out / "segmentation.json", command + sizes)
    print(text(results, wrong))
    plot(results, (args.figures or args.out) / "noisy_camvid_iou.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
