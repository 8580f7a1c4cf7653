"""Classes split over processes: gloo on 2 to 4 of them against one process; and the sums over slices themselves."""

import importlib.util
import math
import pathlib
import re
import subprocess
import sys

import class_parallel_checks
import helpers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import EXPRESSIONS, dtype_id, expression

from anl_kernels import functional, registry, slices
from anl_kernels.backends import reference

HERE = pathlib.Path(__file__).parent
gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo")
CHECKS = [name.removeprefix("check_") for name in dir(class_parallel_checks) if name.startswith("check_")]


@gloo
@pytest.mark.unpoisoned
@pytest.mark.parametrize("part", [0, 1])
def test_four_processes(tmp_path, part):
    """Groups of two, three and four of them; half of the checks a test, for they take a while to start."""
    arguments = (4, tmp_path / "rendezvous", CHECKS[part::2])
    mp.start_processes(class_parallel_checks.worker, args=arguments, nprocs=4, start_method="spawn")


# ---- the sums over a slice, by every backend that has them


def checked(name, **changes):
    values = dict(ignore_index=-100, reduction="mean", entropy_weight=0.0, min_prob=1e-7, inplace=False)
    return functional.checked_call(expression(EXPRESSIONS[name]), *{**values, **changes}.values(), None, "auto")


def slice_of_rows(classes, dtype):
    """(logits (16, classes), labels): rows of every kind, wholly masked and NaN ones, targets here and elsewhere."""
    values, labels = helpers.rows_of_every_kind(max(classes, 2), dtype)
    extra = torch.full((6, classes), -math.inf, dtype=dtype)
    extra[0] = math.nan  # an ignored row
    extra[1, 0] = extra[2, classes // 2] = math.nan
    extra[3, classes // 2] = math.inf
    values = torch.cat([values[:, :classes], extra])
    labels = torch.cat([labels.clamp(max=classes - 1), torch.tensor([-2, -1, -1, -1, -1, -1])])
    labels[::3] = -1
    labels[10] = -2
    gone = values.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1) == -math.inf
    return values, torch.where(gone & (labels >= 0), -1, labels)


@pytest.fixture
def kernels(fused):
    module = registry.fused(fused.name, explicit=True)
    if not hasattr(module, "slice_stats"):
        pytest.skip(f"{fused.name} leaves slices to PyTorch's operators")
    return module


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("classes", [1, 2, 5, 31, 33, 100, 2049, 5000])
def test_slice_stats(kernels, dtype, classes):
    """The first sums, and the second with the lse of rows that have more classes elsewhere."""
    values, labels = slice_of_rows(classes, dtype)
    device = helpers.DEVICES.get(kernels.NAME, "cpu")
    z, y = values.to(device), labels.to(device)
    for name in helpers.REPRESENTATIVE:
        call = checked(name)
        first = kernels.slice_stats(call, z, y, None).cpu()
        exact = reference.slice_stats(call, values.double(), labels, None)
        counted = labels != -2
        bad = exact[2].isnan()
        assert torch.equal(first[2][counted].isnan(), bad[counted]), "NaN or +inf shows in the gap"
        good = counted & ~bad
        digits = dict(rtol=3e-6, atol=1e-6) if dtype != torch.float64 else dict(rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(first[:, good], exact[:, good], **digits)
        lse = torch.stack((exact[0] + 0.5, torch.log1p(exact[1]) + 0.25))
        second = kernels.slice_stats(call, z, y, lse.to(device)).cpu()
        exact_second = reference.slice_stats(call, values.double(), labels, lse)
        good &= exact[0] > -math.inf
        for field in slices.second_fields(call.needs):
            torch.testing.assert_close(second[field, good], exact_second[field, good], **digits)


@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_slice_stats_of_every_layout(kernels, layout):
    values, labels = helpers.batch(33, torch.float32)
    logits, target = helpers.lay_out(layout, values, torch.where(labels < 0, -2, labels))
    device = helpers.DEVICES.get(kernels.NAME, "cpu")
    call = checked("anl_fl")
    valid = (target != -2).reshape(-1)
    first = reference.slice_stats(call, logits.double(), target, None)
    for lse in (None, torch.stack((first[0] + 0.5, torch.log1p(first[1]) + 0.25))):
        moved = None if lse is None else lse.to(device)
        got = kernels.slice_stats(call, helpers.moved(logits, device), target.to(device), moved).cpu()
        exact = reference.slice_stats(call, logits.double(), target, lse)
        fields = range(4) if lse is None else slices.second_fields(call.needs)
        for field in fields:
            torch.testing.assert_close(
                got[field].reshape(-1)[valid], exact[field].reshape(-1)[valid], rtol=3e-6, atol=1e-5
            )


def test_merged_sums_are_those_of_the_whole_row():
    """Slices of any size, none of their own classes lost; the target in any of them."""
    values, labels = slice_of_rows(33, torch.float64)
    labels = labels.clamp(min=0)
    call, valid = checked("everything"), torch.ones(len(labels), dtype=torch.bool)
    for sizes in ((33,), (1, 32), (0, 20, 13), (11, 11, 11), (1,) * 33):
        parts, start = [], 0
        for part in values.split(sizes, 1):
            local = slices.local_labels(labels, valid, start, part.shape[1])
            parts.append(slices.first_sums(reference, call, part, local))
            start += part.shape[1]
        total = slices.merged(torch.stack(parts))
        whole = slices.first_sums(reference, call, values, labels)
        bad = whole[2].isnan()
        assert torch.equal(total[2].isnan(), bad)
        torch.testing.assert_close(total[:, ~bad], whole[:, ~bad], rtol=1e-13, atol=1e-13)


EXAMPLE = HERE.parent / "examples" / "million_classes.py"


def test_a_margin_before_the_loss_composes():
    """The example's RowLoss on statistics is NCE + MAE of logits whose target has the margin, with its gradient."""
    import torch.nn.functional as F

    import anl_kernels as ak

    spec = importlib.util.spec_from_file_location("million_classes", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    g = helpers.generator(2)
    target = torch.randint(23, (9,), generator=g)
    hidden, weight = (F.normalize(torch.randn(n, 8, generator=g, dtype=torch.float64)) for n in (9, 23))
    results = []
    for fused in (True, False):
        x, w = (example.SCALE * hidden).requires_grad_(), weight.clone().requires_grad_()
        if fused:
            loss = ak.linear_robust_loss(x, w, target, example.with_margin(3.0, 0.5, 0.2), max_chunk_bytes=8 * 23 * 4)
        else:
            logits, rows = F.linear(x, w), torch.arange(9)
            angle = (logits[rows, target] / example.SCALE).acos() + 0.2
            logits = logits.index_put((rows, target), example.SCALE * angle.cos())
            loss = (3.0 * ak.NCE() + 0.5 * ak.MAE())(logits, target)
        results.append((loss, *torch.autograd.grad(loss, (x, w))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@gloo
def test_the_example_trains_with_two_processes():
    """Under torchrun, at a size for a test: the loss falls, and both processes print their peak."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        EXAMPLE, "--classes", "3001", "--width", "16", "--rows", "64",
        "--steps", "12",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    losses = [float(word) for word in re.findall(r"step \d+: loss ([\d.e+-]+),", result.stdout)]
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0], result.stdout
    assert result.stdout.count("peak memory") == 2, result.stdout
