"""The study of many classes: its data, that it goes on where it stopped, and that its kept runs are of this rule."""

import json
from pathlib import Path

import pytest
import torch

import anl_kernels as ak
from benchmarks.noisy_labels import many_classes

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("*-many-classes-cpu.json"))


@pytest.mark.skipif(not RESULTS, reason="the kept results are not in this tree")
def test_every_suggested_run_that_is_kept_had_these_constants():
    runs = [run for path in RESULTS for run in json.loads(path.read_text())["runs"] if run["setting"] == "suggest"]
    assert runs
    for run in runs:
        found = vars(ak.suggest(run["classes"]))
        assert {name: run[name] for name in found} == pytest.approx(found), run["classes"]


def test_the_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    command = ["many_classes", "--json", str(path), "--classes", "100,120", "--optimizers", "SGD", "--epochs", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--settings", "CE,suggest"])
    many_classes.main()
    first = json.loads(path.read_text())["runs"]
    monkeypatch.setattr("sys.argv", [*command, "--settings", "CE,published,suggest"])
    many_classes.main()
    runs = json.loads(path.read_text())["runs"]
    assert runs[: len(first)] == first
    assert [(run["classes"], run["setting"]) for run in runs] == [
        (100, "CE"), (120, "CE"), (120, "suggest"), (100, "published"), (120, "published"),
    ]  # fmt: skip
    assert all(len(run["test"]) == len(run["wrong"]) == 1 for run in runs)
    assert "published" in capsys.readouterr().out


@pytest.mark.parametrize("classes", [100, 300])
def test_the_study_s_noise_is_exact(classes):
    data = many_classes.data_of(many_classes.Run(classes, "SGD", "CE", 0))
    labels = torch.arange(classes).repeat_interleave(many_classes.PER_CLASS)
    wrong = (data.noisy != labels).view(classes, -1).sum(1)
    assert (wrong == many_classes.WRONG).all()
    assert 0 <= data.noisy.min() and data.noisy.max() < classes


def test_the_picture_shows_every_setting(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run = {"optimizer": "SGD", "seed": 0, "test": [10.0, 50.0]}
    kept = [{**run, "classes": 100, "setting": "CE"}, {**run, "classes": 1000, "setting": "suggest"}]
    (tmp_path / "found.json").write_text(json.dumps({"runs": kept}))
    command = ["many_classes", "--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "new" / "curves.svg")]
    monkeypatch.setattr("sys.argv", command)
    many_classes.main()
    picture = (tmp_path / "new" / "curves.svg").read_text()
    assert all(f">{name}</text>" in picture for name in ("CE", "suggest", "K = 1,000", "epoch"))
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == kept
