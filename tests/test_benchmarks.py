"""The scripts in benchmarks/: what they draw, count and skip. Nothing here looks at a time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anl_kernels.__main__ import main

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the source tree")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU skips")


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gpu_stages(out, *stages, python=sys.executable):
    command = ["bash", str(BENCHMARKS / "gpu.sh"), str(out), *stages]
    return subprocess.run(command, env={**os.environ, "PYTHON": python}, capture_output=True, text=True)


@no_gpu
def test_gpu_stages_say_what_they_skip(tmp_path):
    stages = ("tests_cuda", "tests_triton", "memcheck", "racecheck", "speed_small", "speed_big", "memory", "linear")
    done = gpu_stages(tmp_path, *stages)
    assert done.returncode == 3, done.stdout + done.stderr
    for stage in stages:
        assert f"== {stage}: skipped: no GPU" in done.stdout
    assert not list(tmp_path.glob("*.done"))


def test_gpu_stages_go_on_where_they_stopped(tmp_path):
    assert gpu_stages(tmp_path, "info").returncode == 0
    again = gpu_stages(tmp_path, "info")
    assert again.returncode == 0 and "== info: done before" in again.stdout


def test_gpu_stage_that_fails_is_told_and_not_done(tmp_path):
    done = gpu_stages(tmp_path, "build", python="false")
    assert done.returncode == 1 and "== build: FAILED" in done.stdout
    assert not (tmp_path / "build.done").exists()
    assert gpu_stages(tmp_path, "nonsense").returncode == 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    assert (
        main(["bench", "--shapes", "16x10,8x100,8x100:bf16", "--no-compile", "--seconds", "0.01", "--json", str(file)])
        == 0
    )
    return file


def test_pictures_of_a_run(measured, tmp_path):
    pytest.importorskip("matplotlib")
    plots = script("plots")
    document = json.loads(measured.read_text())
    lines = plots.by_classes(document["results"])
    assert [k for k, _ in lines["fp32", "anl_kernels"]] == [10, 100]
    assert [k for k, _ in lines["bf16", "anl_kernels"]] == [100]
    subprocess.run([sys.executable, str(BENCHMARKS / "plots.py"), str(measured), "--out", str(tmp_path)], check=True)
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    assert {f.name for f in (tmp_path / kind).iterdir()} == {"bandwidth.svg", "speedup.svg", "error.svg"}
    assert ("CPU:" in (tmp_path / kind / "speedup.svg").read_text()) == (kind == "cpu")


def test_a_contender_that_failed_has_no_mark(measured):
    pytest.importorskip("matplotlib")
    plots = script("plots")
    results = json.loads(measured.read_text())["results"]
    for result in results:
        if result["contender"] == "F.cross_entropy":
            result.pop("median_s"), result.update(state="failed: out of memory")
    drawn = {}
    original, plots.save = plots.save, lambda figure, title, file: drawn.update({file.name: figure})
    try:
        plots.speed_pictures({"results": results}, "here", Path("nowhere"))
    finally:
        plots.save = original
    labels = {line.get_label() for axis in drawn["speedup.svg"].axes for line in axis.lines}
    assert "anl_kernels" in labels and "F.cross_entropy" not in labels


def test_table_of_a_run(measured, tmp_path):
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- measured: x -->\nold\n<!-- /measured -->\nafter\n")
    command = [sys.executable, str(BENCHMARKS / "table.py"), str(measured), "--into", str(document)]
    subprocess.run(command, check=True)
    text = document.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| anl_ce | 16x10 fp32 |" in text


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@no_gpu
def test_memory_says_who_runs_out():
    memory = script("memory")
    workload = memory.workloads.Workload((256, 100_000), "fp32")  # 98 MiB of logits
    fits = memory.in_child("anl_kernels", workload, 0.4, "cpu")
    assert fits == {"state": "ok", "peak_bytes": fits["peak_bytes"]}
    assert 1.0 <= fits["peak_bytes"] / workload.bytes < 1.01
    assert memory.in_child("formulas, eager", workload, 0.4, "cpu") == {"state": "out of memory"}


def test_random_gpu_calls_compare_with_float64():
    calls = script("gpu_calls")
    calls.random.seed(1), torch.manual_seed(1)
    for _ in range(5):
        assert calls.one_call("cpu" if "cpu" in runnable() else "reference", "cpu")


def runnable():
    import anl_kernels

    return {b.name for b in anl_kernels.backends() if b.available}
