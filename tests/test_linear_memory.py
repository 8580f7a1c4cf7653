"""The fused linear head's chunks: how many there are, and how much memory they and the gradients take."""

import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch
from heads import CLASSES, ROWS, fused, problem
from helpers import dtype_id
from torch.autograd import profiler

import anl_kernels as ak
from anl_kernels.cli import timing
from anl_kernels.cli.timing import Run, profile
from anl_kernels.linear import chunks as chunking
from anl_kernels.row_math import NUM_STATS

pytestmark = pytest.mark.usefixtures("small_chunks")


def count_rows(monkeypatch, name):
    backend = ak.registry.choose(
        torch.empty(0, 2), ak.functional.checked_call(ak.NCE(), -100, "mean", 0.0, 1e-7, False, None, "auto")
    )
    seen, original = [], getattr(backend, name)
    monkeypatch.setattr(
        backend, name, lambda call, logits, *rest: seen.append(logits.shape) or original(call, logits, *rest)
    )
    return seen


def test_ignored_rows_cost_nothing(monkeypatch):
    hidden, weight, _, target = problem(torch.float32)
    rows = int((target != -100).sum())
    for name, keywords in (("row_loss", dict()), ("row_stats", dict(recompute=True))):
        seen = count_rows(monkeypatch, name)
        fused(hidden, weight, None, target, ak.NCE(), **keywords)
        assert seen == [(rows, CLASSES)]


def test_chunks_keep_to_the_memory_asked_for(monkeypatch):
    hidden, weight, _, target = problem(torch.float32, ignored=False)
    for limit in (4 * CLASSES * ROWS, 4 * CLASSES * 20, 4 * CLASSES * 4, 4 * CLASSES, 64):
        shapes = []
        for name in ("row_loss", "slice_stats"):
            shapes.append(count_rows(monkeypatch, name))
        fused(hidden, weight, None, target, ak.NCE(), max_chunk_bytes=limit)
        found = shapes[0] + shapes[1]
        assert max(math.prod(shape) for shape in found) * 4 <= limit
        assert 2 * max(math.prod(shape) for shape in found) * 4 >= min(limit, 4 * CLASSES * ROWS)
        monkeypatch.undo()


def test_plans(monkeypatch):
    """As many equal chunks as the memory asks for; a million classes still give products of 32 rows and more."""
    monkeypatch.undo()
    gib = 1 << 30
    assert chunking.plan(4096, 1000, torch.float32, "cpu", None) == (4096, 1000)
    assert chunking.plan(4096, 50_000, torch.float32, "cpu", None) == (1024, 50_000)
    assert chunking.plan(4096, 1_000_000, torch.bfloat16, "cuda", None) == (512, 1_000_000)
    rows, classes = chunking.plan(256, 1_000_000, torch.float32, "cpu", None)
    assert classes == 1_000_000 and 32 <= rows <= 67
    rows, classes = chunking.plan(256, 100_000_000, torch.float32, "cpu", gib)
    assert gib / 2 <= rows * classes * 4 <= gib and rows == 256
    assert chunking.plan(256, 1000, torch.float32, "cpu", 32 * 4000) == (32, 1000)
    assert chunking.plan(10, 1000, torch.float32, "cpu", 4 * 4000)[0] == 10
    assert chunking.spans(10, chunking.even(10, 4)) == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_a_chunk_and_the_gradients(recompute, reduction):
    rows, classes, width, limit = 2000, 5000, 32, 1 << 20
    hidden, weight, bias, target = problem(torch.float32, rows, classes, width, ignored=False)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    keywords = dict(recompute=recompute, reduction=reduction, max_chunk_bytes=limit)

    def step():
        loss = ak.linear_robust_loss(*leaves[:2], target, 5 * ak.NCE() + ak.NNCE(), bias=leaves[2], **keywords)
        loss.backward(torch.ones_like(loss))
        for leaf in leaves:
            leaf.grad = None

    step()
    grads = 4 * (hidden.numel() + weight.numel() + bias.numel())
    peak = profile(Run(step)).peak_bytes
    assert 0.9 * (grads + limit / 2) <= peak <= grads + limit + 100 * 8 * (rows + classes) // (1 if recompute else 4)
    assert peak < 4 * rows * classes / 4  # a quarter of the logits


@pytest.mark.unpoisoned
def test_backward_hands_out_the_memory_of_the_gradients():
    """What forward made is scaled where it lies, unless the graph is kept."""
    hidden, weight, bias, target = problem(torch.float32, 200, 500, 64, ignored=False)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = lambda: ak.linear_robust_loss(*leaves[:2], target, ak.NCE(), bias=leaves[2]) * 2
    loss().backward()
    for leaf in leaves:
        leaf.grad = None
    made = loss()
    assert profile(Run(made.backward)).peak_bytes < 4 * hidden.numel() / 2


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_what_waits_for_backward(dtype):
    """The gradients, in the dtypes that they will have; with recompute the table of statistics. No chunk is kept."""
    rows, classes, width = 400, 300, 64
    hidden, weight, bias, target = problem(dtype, rows, classes, width, ignored=False)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for recompute in (False, True):
        keywords = dict(bias=leaves[2], recompute=recompute)
        ak.linear_robust_loss(*leaves[:2], target, ak.NCE(), **keywords)
        with timing.quiet_stderr(), profiler.profile(use_kineto=True, profile_memory=True) as seen:
            loss = ak.linear_robust_loss(*leaves[:2], target, ak.NCE(), **keywords)
        held = sum(event.nbytes() for event in seen.kineto_results.events() if event.name() == "[memory]")
        del loss
        expected = NUM_STATS * 8 * rows if recompute else sum(x.nbytes for x in leaves)
        assert expected <= held <= expected + 16 * rows + 8 * classes, recompute


def test_frozen_weight_needs_no_gradient_memory():
    rows, classes, width = 64, 20_000, 64
    hidden, weight, _, target = problem(torch.float32, rows, classes, width, ignored=False)
    hidden.requires_grad_()
    keywords = dict(max_chunk_bytes=1 << 18)
    step = lambda: ak.linear_anl_ce(hidden, weight, target, **keywords).backward()
    step()
    assert profile(Run(step)).peak_bytes < 4 * weight.numel() / 4


@pytest.mark.thorough
def test_the_benchmark(tmp_path):
    """Its table of a small case: gradients compared, times and peaks of every contender; the full logits need most."""
    pytest.importorskip("tabulate")
    file = tmp_path / "linear.json"
    script = pathlib.Path(__file__).parents[1] / "benchmarks" / "linear.py"
    sizes = "--device cpu --classes 500 --width 8 --logits 100000 --chunk-mib 0 --rounds 1".split()
    subprocess.run([sys.executable, script, *sizes, "--json", file], check=True, capture_output=True)
    results = {result["contender"]: result for result in json.loads(file.read_text())["results"]}
    assert results["ours"]["error"] < 1e-5 and all(result["median_s"] > 0 for result in results.values())
    full = results.pop("F.linear + ours")["peak_bytes"]
    assert full >= 4 * 100_000 > 1.5 * max(result["peak_bytes"] for result in results.values())
    assert "| 500 |" in file.with_suffix(".md").read_text().replace("  ", "")
