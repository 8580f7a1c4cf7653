"""Loaders on tiny files made here, in every layout; a clear word where there are none."""

import gzip
import io
import pickle

import numpy as np
import pytest
import torch

from benchmarks.noisy_labels import data

random = np.random.default_rng(0)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def digits_like():
    return {
        "train_images": random.integers(0, 256, (7, 28, 28), np.uint8), "train_labels": random.integers(0, 10, 7),
        "test_images": random.integers(0, 256, (3, 28, 28), np.uint8), "test_labels": random.integers(0, 10, 3),
    }  # fmt: skip


def same(found, arrays):
    assert found.images.shape[1:] == (1, 28, 28) and found.images.dtype == torch.uint8
    assert np.array_equal(found.images[:, 0].numpy(), arrays["train_images"])
    assert np.array_equal(found.test_images[:, 0].numpy(), arrays["test_images"])
    assert found.labels.tolist() == arrays["train_labels"].tolist() and found.labels.dtype == torch.int64
    assert found.test_labels.tolist() == arrays["test_labels"].tolist()


def test_mnist_npz(tmp_path, digits_like):
    np.savez(tmp_path / "mnist.npz", **digits_like)
    same(data.load("mnist", tmp_path), digits_like)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_as_torchvision_leaves_it(tmp_path, digits_like, zipped):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, name in (("train", "train"), ("test", "t10k")):
        for what, kind in (("images", "images-idx3-ubyte"), ("labels", "labels-idx1-ubyte")):
            content = idx(digits_like[f"{split}_{what}"])
            if zipped:
                (raw / f"{name}-{kind}.gz").write_bytes(gzip.compress(content))
            else:
                (raw / f"{name}-{kind}").write_bytes(content)
    same(data.load("mnist", tmp_path), digits_like)
    file = next(raw.iterdir())
    file.write_bytes(b"not an idx file")
    with pytest.raises((ValueError, OSError)):
        data.load("mnist", tmp_path)
    file.unlink()
    with pytest.raises(data.DataMissing, match="ubyte is missing"):
        data.load("mnist", tmp_path)


def batch(count, classes=10, key="labels"):
    images = random.integers(0, 256, (count, 3 * 32 * 32), np.uint8)
    return {"data": images, key: [int(label) for label in random.integers(0, classes, count)]}


def test_cifar_as_torchvision_leaves_it(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    parts = {f"data_batch_{i}": batch(2) for i in range(1, 6)} | {"test_batch": batch(3)}
    for name, content in parts.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    worse = random.integers(0, 10, 10)
    torch.save({"worse_label": worse, "random_label2": worse[::-1].copy()}, tmp_path / "CIFAR-10_human.pt")
    found = data.load("cifar10", tmp_path)
    assert found.images.shape == (10, 3, 32, 32) and found.test_images.shape == (3, 3, 32, 32)
    assert np.array_equal(found.images[2].numpy().ravel(), parts["data_batch_2"]["data"][0])
    assert found.labels.tolist()[-2:] == parts["data_batch_5"]["labels"]
    assert found.given["worse"].tolist() == worse.tolist() and set(found.given) == {"worse", "random2"}
    (folder / "data_batch_3").unlink()
    with pytest.raises(data.DataMissing, match="data_batch_3"):
        data.load("cifar10", tmp_path)


def test_cifar100_as_torchvision_leaves_it(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 4), ("test", 2)):
        (folder / name).write_bytes(pickle.dumps(batch(count, 100, "fine_labels"), protocol=2))
    found = data.load("cifar100", tmp_path)
    assert found.num_classes == 100 and found.images.shape == (4, 3, 32, 32)


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_batch_that_would_run_code_is_refused(tmp_path, capsys):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(pickle.UnpicklingError, match="is not data"):
        data.load("cifar100", tmp_path)
    assert "this ran" not in capsys.readouterr().out


def test_jpegs_with_one_header(tmp_path):
    image = pytest.importorskip("PIL.Image")
    whole = []
    for colour in ((250, 10, 10), (10, 250, 10), (10, 10, 250)):
        stream = io.BytesIO()
        image.new("RGB", (32, 32), colour).save(stream, "JPEG", quality=95)
        whole.append(stream.getvalue())
    header = whole[0][:200]
    assert all(content.startswith(header) for content in whole)
    payloads = [content[200:] for content in whole]
    offsets = np.cumsum([0, *map(len, payloads)])
    payload = np.frombuffer(b"".join(payloads), np.uint8)
    split = {"payload": payload, "offsets": offsets, "labels": np.arange(3)}
    arrays = {f"{s}_{name}": array for s in ("train", "test") for name, array in split.items()}
    given = {"train_labels_human_worse": np.array([2, 1, 0])}
    np.savez(tmp_path / "cifar10_jpeg.npz", jpeg_header=np.frombuffer(header, np.uint8), **arrays, **given)
    found = data.load("cifar10", tmp_path)
    assert found.images.shape == (3, 3, 32, 32)
    assert [int(image.float().mean((1, 2)).argmax()) for image in found.images] == [0, 1, 2]
    assert found.given["worse"].tolist() == [2, 1, 0]


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_what_is_absent_is_told(tmp_path, name):
    with pytest.raises(data.DataMissing, match="is not in"):
        data.load(name, tmp_path)
    with pytest.raises(data.DataMissing, match="--data"):
        data.load(name, None)


def test_digits_are_always_there_and_the_same():
    pytest.importorskip("sklearn")
    found, again = data.load("digits", None), data.load("digits", None)
    assert found.images.shape == (1297, 1, 8, 8) and found.test_images.shape == (500, 1, 8, 8)
    assert found.images.max() == 16 and torch.equal(found.images, again.images)
    assert torch.bincount(found.labels).min() > 100
