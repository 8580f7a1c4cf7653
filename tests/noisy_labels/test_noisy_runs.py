"""Training: settings, resuming to the same bits, augmentation, the command at toy size."""

import importlib.util
import itertools
import json

import pytest
import torch

from benchmarks.noisy_labels import __main__ as command
from benchmarks.noisy_labels import data, report, runner, settings, train
from benchmarks.noisy_labels.train import Run, Where

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")


def toy(**changes):
    return Run(**{
        "dataset": "digits", "loss": "ANL-CE", "noise": "symmetric:0.4", "seed": 0, "epochs": 4, "train_size": 300,
        "test_size": 100, **changes,
    })  # fmt: skip


def without_time(result):
    return {name: value for name, value in result.items() if name != "seconds"}


class Killed(Exception):
    pass


@pytest.mark.parametrize("loss", ["CE", "ANL-CE"])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path, monkeypatch, loss):
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    whole = train.train(toy(loss=loss), Where(None, "cpu", tmp_path / "whole"))
    told = []

    def die(epochs):
        told.append(epochs)
        if len(told) == 2:
            raise Killed

    where = Where(None, "cpu", tmp_path / "killed")
    with pytest.raises(Killed):
        train.train(toy(loss=loss), where, die)
    assert [file.suffix for file in where.folder.iterdir()] == [".pt"]
    told.clear()
    trained = []
    monkeypatch.setattr(train.Training, "train_epoch", counted(train.Training.train_epoch, trained))
    result = train.train(toy(loss=loss), where, told.append)
    assert len(trained) == 2 and told == [2, 1, 1]
    assert without_time(result) == without_time(whole)
    assert [file.suffix for file in where.folder.iterdir()] == [".json"]
    assert without_time(train.train(toy(loss=loss), where)) == without_time(whole) and len(trained) == 2


def counted(function, calls):
    def call(self):
        calls.append(1)
        return function(self)

    return call


@pytest.mark.thorough
def test_results_do_not_depend_on_how_many_run_at_once(tmp_path):
    runs = [toy(seed=seed, epochs=2) for seed in range(2)]
    one = runner.run_all(runs, Where(None, "cpu", tmp_path / "one"), workers=1)
    two = runner.run_all(runs, Where(None, "cpu", tmp_path / "two"), workers=2)
    assert [without_time(result) for result in one] == [without_time(result) for result in two]
    assert one[0]["accuracy"] != one[1]["accuracy"] or one[0]["curves"] != one[1]["curves"]


def test_a_run_has_the_noise_asked_for(tmp_path):
    where = Where(None, "cpu", tmp_path)
    found = train.labelled(toy(train_size=1000), where)
    assert abs((found.noisy != found.right).float().mean() - 0.4) < 2e-3
    assert len(found.images) == 1000 and len(found.test_labels) == 100
    clean = train.labelled(toy(noise="clean"), where)
    assert torch.equal(clean.noisy, clean.right)
    instance = train.labelled(toy(noise="instance:0.3", train_size=1000), where)
    assert abs((instance.noisy != instance.right).float().mean() - 0.3) < 0.03
    with pytest.raises(ValueError, match="no labels 'worse'"):
        train.labelled(toy(noise="human:worse"), where)


def test_a_part_of_the_images_has_all_classes_where_the_file_is_sorted_by_them(tmp_path, monkeypatch):
    labels = torch.arange(10).repeat_interleave(50)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    sorted_by_class = data.Dataset(images, labels, images, labels, {}, 10)
    monkeypatch.setattr(data, "load", lambda *_: sorted_by_class)
    found = train.labelled(toy(noise="clean", train_size=200, test_size=100), Where(None, "cpu", tmp_path))
    for image, label in ((found.images, found.right), (found.test_images, found.test_labels)):
        assert torch.bincount(label, minlength=10).min() > 0 and torch.equal(image[:, 0, 0, 0].long(), label)


def test_training_learns_and_bf16_too(tmp_path):
    for loss, bf16 in (("CE", False), ("ANL-CE", True)):
        result = train.train(
            toy(loss=loss, noise="clean", epochs=30, train_size=1000, bf16=bf16), Where(None, "cpu", tmp_path)
        )
        assert result["accuracy"] > 75
        assert [epoch for epoch, _ in result["curves"]["loss"]] == list(range(2, 31, 2))
        assert result["curves"]["train"][-1][0] == 30 and result["curves"]["test"][-1] == [30, result["accuracy"]]


def test_what_is_kept_of_a_curve_ends_with_its_last_epoch():
    assert train.points([0.123456, 98.76543]) == [[1, 0.1235], [2, 98.77]]
    for length in (20, 21, 39, 200):
        kept = train.points([float(epoch) for epoch in range(1, length + 1)])
        assert len(kept) <= train.CURVE_POINTS and kept[-1] == [length, length] and all(e == v for e, v in kept)


def test_settings_are_the_published_ones():
    recipes = settings.RECIPES
    assert [recipes[name].epochs for name in ("mnist", "cifar10", "cifar100")] == [50, 120, 200]
    assert [recipes[name].learning_rate for name in ("mnist", "cifar10", "cifar100")] == [0.01, 0.01, 0.1]
    for name, (alpha, beta, delta) in {
        "mnist": (1, 1, 1e-6),
        "cifar10": (5, 5, 5e-5),
        "cifar100": (10, 1, 5e-7),
    }.items():
        for loss in ("ANL-CE", "ANL-FL"):
            setting = recipes[name].losses[loss]
            assert [factor for factor, _ in setting.criterion.terms] == [alpha, beta]
            assert (setting.weight_decay, setting.delta) == (0.0, delta)
    decays = [recipes[name].losses["CE"].weight_decay for name in ("mnist", "cifar10", "cifar100")]
    assert decays == [1e-3, 1e-4, 1e-5]
    assert all(set(settings.DEFAULT_LOSSES) <= set(recipe.losses) for recipe in recipes.values())


@pytest.mark.parametrize(
    "name, shape", [("mnist", (2, 1, 28, 28)), ("cifar10", (2, 3, 32, 32)), ("cifar100", (2, 3, 32, 32))]
)
def test_networks_take_their_images(name, shape):
    logits = settings.RECIPES[name].network()(torch.rand(shape))
    assert logits.shape == (2, 100 if name == "cifar100" else 10) and logits.isfinite().all()


def test_augmentation_moves_each_image_by_itself():
    images = torch.arange(1, 1025.0).view(1, 1, 32, 32) + 2048 * torch.arange(64.0).view(64, 1, 1, 1).expand(
        64, 3, 1, 1
    )
    generator = torch.Generator().manual_seed(0)
    cropped = train.augmented(images, ("crop",), generator)
    assert cropped.shape == images.shape and (cropped[:, 0, 16, 16] % 2048).unique().numel() > 30
    for index, image in enumerate(
        cropped
    ):  # a window of its own padded image: where it is not 0, neighbours differ by 1
        row = image[0, 16]
        inside = row[row > 0]
        assert len(inside) >= 28 and (inside.diff() == 1).all() and (inside // 2048 == index).all()
    flipped = train.augmented(images, ("flip",), generator)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert 10 < mirrored.sum() < 54 and torch.equal(flipped[~mirrored], images[~mirrored])
    turned = train.augmented(images, ("rotate",), generator)
    middle = (turned[:, :, 15:17, 15:17] - images[:, :, 15:17, 15:17]).abs().max()
    assert middle <= 33 and (turned[:, 0, 0, 0] == 0).float().mean() > 0.5  # the middle stays, corners leave
    generator.manual_seed(5)
    once = train.augmented(images, ("crop", "flip", "rotate"), generator)
    assert torch.equal(once, train.augmented(images, ("crop", "flip", "rotate"), generator.manual_seed(5)))


def test_the_command_at_toy_size(tmp_path, capsys):
    arguments = ["--quick", "--losses", "CE,ANL-CE", "--noise", "clean,symmetric:0.4", "--seeds", "2", "--epochs", "2"]
    arguments += ["--train-size", "200", "--test-size", "50", "--workers", "1", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "digits: test accuracy in %, last / best epoch, 2 seeds" in printed and "±" in printed
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["runs"]) == 8 and str(tmp_path) not in content["command"]
    assert content["runs"][-1]["wrong_labels"] == pytest.approx(40.0)
    for name in ("accuracy", "curves"):
        assert (tmp_path / f"noisy_digits_{name}.svg").read_text().count("<path") > 10
    before = [(file.name, file.stat().st_mtime_ns) for file in sorted((tmp_path / "runs").iterdir())]
    assert command.main(arguments) == 0  # nothing is done again
    assert before == [(file.name, file.stat().st_mtime_ns) for file in sorted((tmp_path / "runs").iterdir())]
    assert report.main([str(tmp_path / "results.json")]) == 0


def test_the_papers_figures_stand_beside_ours():
    run = {
        "dataset": "cifar10", "loss": "ANL-CE", "noise": "symmetric:0.4", "seed": 0, "epochs": 120, "bf16": False,
        "train_images": 50000, "test_images": 10000, "accuracy": 87.0, "curves": {"test": [[60, 89.0], [120, 87.0]]},
    }  # fmt: skip
    assert "87.00 (87.16) / 89.00" in report.text([run])


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--losses", "XYZ"], "takes names of"), (["--noise", "sym"], "none of clean"),
        (["--dataset", "mnist"], "needs --data FOLDER"), (["--seeds", "0"], "at least 1"),
        (["--dataset", "cifar100", "--quick"], "--quick is for"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_told(arguments, word):
    with pytest.raises(SystemExit, match=word):
        command.main(arguments)


def test_a_picture_s_curve_is_thinned_and_keeps_its_last_point():
    for length in range(1, 90):
        kept = report.thinned(range(length))
        assert kept[-1] == length - 1 and len(kept) <= 20
        assert len({b - a for a, b in itertools.pairwise(kept)}) <= 1
    assert report.thinned([3, 1, 2]) == [3, 1, 2]


def test_results_are_indented_but_for_lists_of_numbers():
    content = {
        "command": "run [ --x,  1 ]",
        "runs": [{"curve": [1.5, 2.0], "test": [[1, 0.25], [2, 1e-7]], "none": []}],
    }
    text = runner.indented(content)
    assert json.loads(text) == content
    lines = [line.strip() for line in text.splitlines()]
    assert '"curve": [1.5, 2.0],' in lines and "[2, 1e-07]" in lines and "{" in lines
