"""The scripts in benchmarks/: what they draw, count and skip. Nothing here looks at a time."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
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


# ---- gpu.sh: one run with Python; the others have something quicker in its place

GPU_STAGES = ("tests_cuda", "tests_triton", "sanitizers", "speed_small", "memory", "linear")
# A Python with a GPU: "-m pytest" fails, `bench` hangs, all else ends well.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *gpu_facts.py) printf 'gpu=\\ncuda=\\ntriton=no Triton\\n' ;;
    *"-m pytest "*) echo "FAILED tests/test_x.py::test_y - AssertionError"; exit 1 ;;
    *"-m anl_kernels bench"*) sleep 60 ;;
    *) echo "it ran: $*" ;;
esac
"""


@pytest.fixture
def gpu_stages(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)

    def run(*stages, **environment):
        command = ["bash", str(BENCHMARKS / "gpu.sh"), str(tmp_path / "out"), *stages]
        own = {"PYTHON": str(fake), "WORK": str(tmp_path / "work"), **environment}
        return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)

    return run


@pytest.mark.thorough
@no_gpu
def test_gpu_stages_say_what_they_skip(gpu_stages):
    done = gpu_stages(*GPU_STAGES, PYTHON=sys.executable)
    assert done.returncode == 3, done.stdout + done.stderr
    for stage in GPU_STAGES:
        assert f"== {stage}: skipped: no GPU" in done.stdout


def test_a_python_that_does_not_run_is_told(gpu_stages):
    done = gpu_stages("tests_cuda", PYTHON="false")
    assert done.returncode == 3 and "== tests_cuda: skipped: false cannot import anl_kernels" in done.stdout


def test_gpu_stages_go_on_where_they_stopped(gpu_stages, tmp_path):
    """What failed is told and not done; a call without names takes the rest, and hands out two files."""
    first = gpu_stages("memory", "tests_cuda", "tests_triton", "speed_small", STAGE_SECONDS="2")
    assert first.returncode == 1, first.stderr
    assert "== tests_cuda: FAILED with exit code 1," in first.stdout
    assert "== speed_small: FAILED with exit code 124 (stopped after 2 s)" in first.stdout
    assert "failed: tests_cuda speed_small; skipped: tests_triton; left for another call: none" in first.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"summary.txt", "results.tar.gz"}
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "FAILED tests/test_x.py::test_y" in summary
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as results:
        assert {"./memory.log", "./tests_cuda.log", "./summary.txt"} <= set(results.getnames())
    again = gpu_stages(CALL_SECONDS="1")
    assert again.returncode == 3 and "== memory: done before" in again.stdout
    assert "failed: none; skipped: none; left for another call: build tests_cuda " in again.stdout


SANITIZERS = {  # a compute-sanitizer, and what becomes of the stage
    "echo 'Error: Device not supported'; exit 1": "skipped: compute-sanitizer refuses the device: Error: Device not",
    "exit 0": "skipped: compute-sanitizer does not see a write out of bounds",
    'case "$*" in *more) exit 9 ;; esac': "ok",
    'case "$*" in *more | *gpu_calls*) exit 9 ;; esac': "FAILED with exit code 9",
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_are_tried_before_they_are_believed(gpu_stages, tmp_path, sanitizer):
    for name, script in (("compute-sanitizer", sanitizer), ("nvcc", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = gpu_stages("sanitizers", PATH=f"{tmp_path}:{os.environ['PATH']}", CUDACXX="nvcc")
    assert f"== sanitizers: {SANITIZERS[sanitizer]}" in done.stdout, done.stdout


def test_gpu_stages_have_names(gpu_stages):
    assert gpu_stages("nonsense").returncode == 2


def test_packages_can_be_brought_along(gpu_stages, tmp_path):
    wheel = tmp_path / "wheels" / "expecttest-0.3.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    done = gpu_stages("build", WHEELS=str(wheel.parent))
    assert done.returncode == 0 and f"--target {tmp_path}/work/site {wheel}" in done.stdout, done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    assert (
        main(["bench", "--shapes", "16x10,8x100,8x100:bf16", "--no-compile", "--seconds", "0.01", "--json", str(file)])
        == 0
    )
    return file


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_table_of_a_run(measured, tmp_path):
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    for file in (readme, page):
        file.write_text("before\n<!-- measured: x -->\nold\n<!-- /measured -->\nafter\n")
    subprocess.run([sys.executable, str(BENCHMARKS / "table.py"), str(measured), "--into", str(readme)], check=True)
    for file in (readme, page):
        text = file.read_text()
        assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| anl_ce | 16x10 fp32 |" in page.read_text() and "16x10" not in readme.read_text()


def test_a_line_of_the_table():
    """The other's time by ours; memory in units of a copy; why there is no number."""
    about = {"loss": "nce", "shape": "4x5", "dtype": "fp32", "state": "ok"}
    result = lambda name, seconds, peak: {**about, "contender": name, "median_s": seconds, "peak_bytes": peak}
    results = [
        result("anl_kernels", 2e-3, 100), result("logits.clone()", 1e-3, 80), result("F.cross_entropy", 5e-3, 160),
        result("formulas, eager", 9e-3, 480), {**result("out.copy_(logits)", 0.0, 0), "state": "failed: why"},
        {**result("anl_kernels", 9.0, 900), "phase": "forward"},
    ]  # fmt: skip
    facts = {"device": "a machine", "threads": 2, "torch": "2.13", "date": "2026-11-21T00"}
    lines = script("table").table({"environment": facts, "results": results}).splitlines()
    assert lines[-1] == "| nce | 4x5 fp32 | 2 ms | 0.50 | failed | 2.50 | 4.50 | not run | 1.25 | 6.00 |"
    only = (("nce", "8x5", "fp32"),)
    assert script("table").table({"environment": facts, "results": results}, only).splitlines()[-1].startswith("|---")


@pytest.mark.thorough
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


def test_a_picture_is_smaller_than_matplotlib_s_and_shows_the_same(tmp_path, monkeypatch):
    """As many marks and texts; each style once; coordinates to a tenth."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    pictures = script("pictures")
    pictures.use_style()
    figure = Figure()
    axes = figure.subplots()
    axes.plot(range(200), [x**0.5 for x in range(200)], label="a root")
    axes.set(title="title of 1.23456 and more"), axes.legend()
    figure.savefig(tmp_path / "full.svg", metadata={"Date": None})
    pictures.save(figure, tmp_path / "new" / "small.svg")
    full, small = (tmp_path / name for name in ("full.svg", "new/small.svg"))
    assert small.stat().st_size < 0.6 * full.stat().st_size
    assert "title of 1.23456 and more" in small.read_text()
    full, small = full.read_text(), small.read_text()
    for mark in ("<path", "<use", "<text", "a root</text>", "\nL "):
        assert full.count(mark) == small.count(mark) > 0
    assert full.count("\nL ") == small.count("\nL ") and " style=" not in small
    assert not re.search(r"<[^>]*\d\.\d{3}", small)
    assert set(re.findall(r'class="(s\d+)"', small)) == set(re.findall(r"^\.(s\d+)\{", small, re.MULTILINE))
