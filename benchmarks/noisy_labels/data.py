"""The data: scikit-learn's digits always; MNIST and CIFAR from files that are there, in either of two layouts.

`--data FOLDER` holds `mnist.npz` and `cifar10_jpeg.npz` (JPEG images with one shared header; lossy), or what
torchvision leaves behind: `MNIST/raw`, `cifar-10-batches-py`, `cifar-100-python`, and CIFAR-10N's `CIFAR-10_human.pt`.
Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import io
import itertools
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anl_kernels.cli.common import need
from anl_kernels.cli.demo import TRAINED_ON

HUMAN = {"aggre": "aggre_label", "worse": "worse_label"} | {f"random{i}": f"random_label{i}" for i in (1, 2, 3)}


class DataMissing(FileNotFoundError):
    """The files of a dataset are not where they were looked for."""


class Dataset(NamedTuple):
    """Images (N, C, H, W) uint8, labels (N,) int64; `given`: other labels of the training images, by name."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    given: dict[str, Tensor]
    num_classes: int


def _dataset(images, labels, test_images, test_labels, num_classes=10, given=None) -> Dataset:
    def as_images(array):
        array = torch.from_numpy(np.array(array))
        return array.unsqueeze(1) if array.ndim == 3 else array

    def as_labels(array):
        return torch.from_numpy(np.asarray(array).astype(np.int64))

    named = {name: as_labels(array) for name, array in (given or {}).items()}
    return Dataset(
        as_images(images), as_labels(labels), as_images(test_images), as_labels(test_labels), named, num_classes
    )


def digits(folder: Path | None = None) -> Dataset:
    """1797 digits of 8 x 8, in a fixed random order: 1297 to train, 500 to test."""
    found = need("sklearn.datasets", "noisy").load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = found.images[order].astype(np.uint8), found.target[order]
    return _dataset(images[:TRAINED_ON], labels[:TRAINED_ON], images[TRAINED_ON:], labels[TRAINED_ON:])


def mnist(folder: Path) -> Dataset:
    file, raw = folder / "mnist.npz", folder / "MNIST" / "raw"
    if file.exists():
        with np.load(file) as data:
            return _dataset(*(data[f"{s}_{what}"] for s in ("train", "test") for what in ("images", "labels")))
    if raw.is_dir():
        names = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        return _dataset(*(_idx(raw, name) for name in names))
    raise DataMissing(f"MNIST is not in {folder}: neither mnist.npz nor MNIST/raw (torchvision's layout)")


def _idx(folder: Path, name: str) -> np.ndarray:
    """An IDX file of bytes, plain or gzipped: two zeros, the type 8, the number of sizes, the sizes, the bytes."""
    file = next((f for f in (folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz") if f.exists()), None)
    if file is None:
        raise DataMissing(f"{folder / name}-ubyte is missing, plain and gzipped")
    content = (gzip.decompress if file.suffix == ".gz" else bytes)(file.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is no IDX file of bytes")
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def cifar10(folder: Path) -> Dataset:
    file, batches = folder / "cifar10_jpeg.npz", folder / "cifar-10-batches-py"
    if file.exists():
        return _cifar10_jpeg(file)
    if not batches.is_dir():
        raise DataMissing(
            f"CIFAR-10 is not in {folder}: neither cifar10_jpeg.npz nor cifar-10-batches-py (torchvision's layout)"
        )
    train = [_pickled(batches / f"data_batch_{i}") for i in range(1, 6)]
    test = _pickled(batches / "test_batch")
    images = np.concatenate([part["data"] for part in train]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([part["labels"] for part in train])
    return _dataset(images, labels, test["data"].reshape(-1, 3, 32, 32), test["labels"], given=_human(folder))


def cifar100(folder: Path) -> Dataset:
    batches = folder / "cifar-100-python"
    if not batches.is_dir():
        raise DataMissing(f"CIFAR-100 is not in {folder}: no cifar-100-python (torchvision's layout)")
    parts = [_pickled(batches / name) for name in ("train", "test")]
    fields = [array for p in parts for array in (p["data"].reshape(-1, 3, 32, 32), p["fine_labels"])]
    return _dataset(*fields, num_classes=100)


def _cifar10_jpeg(file: Path) -> Dataset:
    with np.load(file) as data:
        header = data["jpeg_header"].tobytes()
        parts = []
        for split in ("train", "test"):
            images = jpegs(data[f"{split}_payload"], data[f"{split}_offsets"], header)
            parts += [images.transpose(0, 3, 1, 2), data[f"{split}_labels"]]
        given = {name: data[f"train_labels_human_{name}"] for name in HUMAN if f"train_labels_human_{name}" in data}
    return _dataset(*parts, given=given)


def jpegs(payload: np.ndarray, offsets: np.ndarray, header: bytes = b"") -> np.ndarray:
    """(n, H, W, 3) uint8: image i is the JPEG `header + payload[offsets[i]:offsets[i + 1]]`."""
    image, payload = need("PIL.Image", "noisy"), payload.tobytes()
    return np.stack([
        np.asarray(image.open(io.BytesIO(header + payload[start:end])).convert("RGB"))
        for start, end in itertools.pairwise(offsets)
    ])  # fmt: skip


def _human(folder: Path) -> dict:
    """CIFAR-10N's labels by name, from `CIFAR-10_human.pt` where it is there."""
    file = folder / "CIFAR-10_human.pt"
    if not file.exists():
        return {}
    reconstruct = np._core.multiarray._reconstruct
    known = [reconstruct, (reconstruct, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype]
    with torch.serialization.safe_globals([*known, np.dtypes.Int64DType, np.dtypes.UInt8DType]):
        named = torch.load(file, weights_only=True)
    return {name: named[key] for name, key in HUMAN.items() if key in named}


class _Arrays(pickle.Unpickler):
    """Unpickles dictionaries, lists and NumPy arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str):
        root = module.split(".")[0]
        if root == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not data")


def _pickled(file: Path) -> dict:
    if not file.exists():
        raise DataMissing(f"{file} is missing")
    with file.open("rb") as stream:
        return _Arrays(stream, encoding="latin1").load()


LOADERS = {"digits": digits, "mnist": mnist, "cifar10": cifar10, "cifar100": cifar100}


def load(name: str, folder: str | Path | None) -> Dataset:
    """The dataset `name`; DataMissing says what was looked for where it is absent."""
    if name != "digits" and folder is None:
        raise DataMissing(f"{name} needs --data FOLDER, the folder that holds its files; nothing is downloaded")
    return LOADERS[name](Path(folder) if folder is not None else None)
