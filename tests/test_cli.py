"""`python -m anl_kernels`: what its commands print, write and return."""

import json

import pytest

from anl_kernels.__main__ import main
from anl_kernels.cli import bench, check, contenders, timing, workloads


def test_info(capsys):
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert {"torch", "device", "backends"} <= set(json.loads(capsys.readouterr().out))


def test_check_passes(capsys):
    assert main(["check", "--loss", "ANL-CE", "--loss", "RowLoss", "--dtype", "fp32"]) == 0
    assert "all within tolerance" in capsys.readouterr().out


def test_check_sees_a_wrong_loss(monkeypatch, capsys):
    wrong = check.Loss("CE", check.ak.cross_entropy, lambda z, y: 1.01 * check.formulas.cross_entropy(z, y))
    monkeypatch.setattr(check, "LOSSES", [wrong])
    assert main(["check", "--dtype", "fp64", "--backend", "reference"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_check_of_a_backend_that_is_not_there(capsys):
    assert main(["check", "--backend", "abacus", "--dtype", "fp64"]) == 1
    assert "no such backend" in capsys.readouterr().out


def test_bench_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = [
        "--shapes",
        "16x10,2x21x4x4:bf16",
        "--no-compile",
        "--seconds",
        "0.01",
        "--strict",
        "--json",
        str(file),
    ]
    assert main(["bench", *arguments]) == 0
    document = json.loads(file.read_text())
    assert {r["state"] for r in document["results"]} == {"ok"}
    assert len(document["results"]) == 2 * len(contenders.contenders("anl_ce", compile=False))


def test_bench_shows_a_wrong_contender_as_wrong():
    chosen = workloads.parse("16x10")[0]
    logits, target = chosen.tensors()
    found = contenders.contenders("anl_ce", compile=False)
    other = next(c for c in found if c.name == "F.cross_entropy")
    expected = contenders.truth(found[0].formula, logits, target)
    right, _ = contenders.verdict(other, logits, target, expected)
    assert not right
    measured = bench.Bench("cpu", 0.01, ("both",)).measure(chosen, [other._replace(formula=found[0].formula)])
    assert measured["both"][0]["state"] == "wrong" and "median_s" not in measured["both"][0]


def test_bench_measures_memory_exactly():
    logits, target = workloads.parse("64x1000")[0].tensors()
    found = timing.profile(contenders.cloning(logits, target, "both"))
    assert found.peak_bytes == logits.numel() * 4
    assert found.allocations == 1
    assert found.launches is None


@pytest.mark.parametrize("what, more", [("peak_bytes", 1 << 30), ("allocations", 10), ("launches", 100)])
def test_bench_reports_a_broken_promise(monkeypatch, capsys, what, more):
    def greedy(run, device):
        return timing.profile(run, device)._replace(**{what: more})

    monkeypatch.setattr(bench, "profile", greedy)
    assert main(["bench", "--shapes", "16x10", "--no-compile", "--seconds", "0.01", "--strict"]) == 1
    assert "promised" in capsys.readouterr().err


def test_bench_times_each_phase(tmp_path):
    file = tmp_path / "bench.json"
    options = ["--shapes", "16x10", "--no-compile", "--seconds", "0.01", "--phase", "all", "--json", str(file)]
    assert main(["bench", *options]) == 0
    assert {r["phase"] for r in json.loads(file.read_text())["results"]} == set(contenders.PHASES)


@pytest.mark.parametrize("text", ["10", "axb", "0x5", "4x4:int8"])
def test_bench_rejects_what_is_no_shape(text):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--shapes", text])
    assert "no workload" in str(end.value)


def test_demo(tmp_path, capsys):
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    small = ["--seeds", "1", "--epochs", "2", "--workers", "1", "--losses", "CE,ANL-CE+entropy"]
    assert main(["demo", *small, "--output", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "ANL-CE+entropy" in capsys.readouterr().out
