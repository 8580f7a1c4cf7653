"""Classes split over processes: gloo on 2 to 4 of them against one process; and the sums over slices themselves."""

import importlib.util
import math
import pathlib
import re
import subprocess
import sys
import threading
import time

import class_parallel_checks
import helpers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import EXPRESSIONS, dtype_id, expression
from ranks import Ranks

from anl_kernels import functional, registry
from anl_kernels import row_math as stats
from anl_kernels.backends import reference
from anl_kernels.row_math import StatField, first_fields
from anl_kernels.sharding import class_group, slices

HERE = pathlib.Path(__file__).parent
gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo")
CHECKS = sorted(class_parallel_checks.CHECKS)


@pytest.mark.thorough
@gloo
@pytest.mark.unpoisoned
@pytest.mark.parametrize("part", [0, 1])
def test_four_processes(tmp_path, part):
    """Groups of two, three and four of them; half of the checks per test, for they take a while to start."""
    arguments = (4, tmp_path / "rendezvous", CHECKS[part::2])
    mp.start_processes(class_parallel_checks.worker, args=arguments, nprocs=4, start_method="spawn")


# Checks that keep to their own thread: no state of forward mode, of mpmath or of torch.distributed's functions.
IN_THREADS = ["disagreement", "data_parallel_too", "inplace", "linear", "shapes"]


@pytest.fixture
def ranks_in_threads(monkeypatch):
    """run(names): four ranks in one process, which start at once; PyTorch's own tests run distributed code so."""
    if not dist.is_available():
        pytest.skip("torch is built without torch.distributed")
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    isolate = torch._C._distributed_c10d._set_thread_isolation_mode
    failed, store = [], dist.HashStore()

    def rank(number, names):
        try:
            dist.init_process_group("threaded", rank=number, world_size=4, store=store)
            ranks = Ranks()
            for name in names:
                class_parallel_checks.CHECKS[name](ranks)
        except BaseException as error:  # the others then end with SystemExit
            failed.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)

    def run(names):
        threads = [threading.Thread(target=rank, args=(number, names), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in threads):  # a rank waits for one that has gone on
            threaded.ProcessLocalGroup.exception_handle(None)
            pytest.fail("the ranks wait for one another")
        if failed:
            raise next((error for error in failed if isinstance(error, Exception)), failed[0])

    isolate(True)
    threaded._install_threaded_pg()
    threaded.ProcessLocalGroup.reset()
    yield run
    threaded._uninstall_threaded_pg()
    isolate(False)


@pytest.mark.parametrize("name", IN_THREADS)
def test_four_threads(ranks_in_threads, name):
    """What needs no processes, without waiting for them to start."""
    ranks_in_threads([name])


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
def slicing(fused):
    """A backend that has kernels for slices."""
    backend = registry.fused(fused.name, explicit=True)
    if fused.name != "cpu":
        pytest.skip(f"{fused.name} leaves slices to PyTorch's operators")
    return backend


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("classes", [1, 2, 5, 31, 33, 100, 2049, 5000])
def test_slice_stats(slicing, dtype, classes):
    """The first sums, and the second with the lse of rows that have more classes elsewhere."""
    values, labels = slice_of_rows(classes, dtype)
    device = helpers.DEVICES.get(slicing.NAME, "cpu")
    z, y = values.to(device), labels.to(device)
    for name in helpers.EVERY_STATISTIC:
        call = checked(name)
        first = slicing.slice_stats(call, z, y, None).cpu()
        exact = reference.slice_stats(call, values.double(), labels, None)
        counted = labels != -2
        bad = exact[2].isnan()
        assert torch.equal(first[2][counted].isnan(), bad[counted]), "NaN or +inf shows in the gap"
        good = counted & ~bad
        digits = dict(rtol=3e-6, atol=1e-6) if dtype != torch.float64 else dict(rtol=1e-13, atol=1e-13)
        fields = [field for field in first_fields(call.needs) if field < len(first)]
        torch.testing.assert_close(first[fields][:, good], exact[fields][:, good], **digits)
        lse = torch.stack((exact[0] + 0.5, torch.log1p(exact[1]) + 0.25))
        second = slicing.slice_stats(call, z, y, lse.to(device)).cpu()
        exact_second = reference.slice_stats(call, values.double(), labels, lse)
        good &= exact[0] > -math.inf
        for field in slices.second_fields(call.needs):
            torch.testing.assert_close(second[field, good], exact_second[field, good], **digits)


@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_slice_stats_of_every_layout(slicing, layout):
    values, labels = helpers.batch(33, torch.float32)
    logits, target = helpers.lay_out(layout, values, torch.where(labels < 0, -2, labels))
    device = helpers.DEVICES.get(slicing.NAME, "cpu")
    call = checked("anl_fl")
    valid = (target != -2).reshape(-1)
    first = reference.slice_stats(call, logits.double(), target, None)
    for lse in (None, torch.stack((first[0] + 0.5, torch.log1p(first[1]) + 0.25))):
        moved = None if lse is None else lse.to(device)
        got = slicing.slice_stats(call, helpers.moved(logits, device), target.to(device), moved).cpu()
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


SPLITS = ((33,), (1, 32), (0, 20, 13), (11, 11, 11))


def parts_of(values, labels, valid, sizes):
    """(logits, labels) of each slice."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    split = values.split(sizes, 1)
    return [(z, slices.local_labels(labels, valid, start, z.shape[1])) for start, z in zip(starts, split)]


def rows_and_labels():
    """24 rows of every kind, four of them ignored, and four that must be NaN."""
    values, labels = helpers.batch(33, torch.float64)
    bad = torch.zeros(4, 33, dtype=torch.float64)
    bad[0, 3], bad[1, 20], bad[2, 7], bad[3, 5] = math.nan, math.inf, -math.inf, math.nan
    bad[3, 6:] = -math.inf
    return torch.cat([values, bad]), torch.cat([labels, torch.tensor([5, 6, 7, 8])])


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_the_table_of_slices_is_that_of_whole_rows(cpu, sizes):
    """Every statistic, and which of them are NaN; an ignored row's are finite, whatever its logits."""
    backend = registry.fused("cpu", explicit=True)
    values, labels = rows_and_labels()
    for name in ("everything", "nce+rce", "nnce"):
        call, valid = checked(name), labels != -100
        parts = parts_of(values, labels, valid, sizes)
        first = slices.merged(torch.stack([slices.first_sums(backend, call, *part) for part in parts]))
        second = slices.added(torch.stack([slices.second_sums(backend, call, *part, first) for part in parts]))
        table, whole = slices.table(first, second, valid, 33, call), backend.row_stats(call, values, labels)
        assert table[:, ~valid].isfinite().all()
        assert torch.equal(table[StatField.VALID], whole[StatField.VALID])
        weights = (StatField.FOCAL_WEIGHT, StatField.FOCAL_ABOVE_WEIGHT)  # of rows that are NaN nobody reads these
        for row in range(stats.NUM_STATS):
            rows = valid & ~whole[StatField.TARGET_LOG_PROB].isnan() if row in weights else valid
            if not whole[row, rows].isnan().all():
                torch.testing.assert_close(table[row, rows], whole[row, rows], rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("rows_at_a_time", [1, 5, 1000])
@pytest.mark.parametrize("backend", [registry.BACKENDS["cpu"], reference], ids=["cpu", "reference"])
def test_the_gradient_of_slices_is_that_of_whole_rows(cpu, backend, rows_at_a_time, monkeypatch):
    """With and without the column sums' part; PyTorch's operators take a few rows at a time."""
    for module, limit in ((slices, "CHUNK_ELEMENTS"), (reference, "SLICE_ELEMENTS")):
        monkeypatch.setattr(module, limit, 11 * rows_at_a_time)
    values, labels = rows_and_labels()
    call, valid = checked("everything"), labels != -100
    table = registry.fused("cpu", explicit=True).row_stats(call, values, labels)
    partials = torch.randn(table.shape, generator=helpers.generator(0)).double()
    partials[:, ~valid] = 0.0
    grad_coefs = stats.coefficients(table, partials, call, torch.float64)
    g = torch.randn(33, generator=helpers.generator(1)).double()
    for by_sums in (None, g):
        exact = reference.gradient(call, values, labels.clamp(min=0), grad_coefs, by_sums)
        exact[~valid] = 0.0
        for sizes in SPLITS[1:]:
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            parts, gs = parts_of(values, labels, valid, sizes), g.split(sizes)
            moments = slices.added(torch.stack([slices.moments(z, grad_coefs, x) for (z, _), x in zip(parts, gs)]))
            mean = class_group.mean_over_classes(moments, None)
            for (z, local), x, start in zip(parts, gs, starts):
                entropy = None if by_sums is None else (x, mean)
                grad = slices.grad(backend, call, z, local, grad_coefs, entropy)
                torch.testing.assert_close(
                    grad, exact[:, start : start + z.shape[1]], rtol=1e-10, atol=1e-12, equal_nan=True
                )
                sums = backend.column_sums(z[:24], grad_coefs[:, :24].contiguous()) if z.numel() else z.new_zeros(0)
                p = torch.where(valid[:24, None], values[:24].nan_to_num().softmax(1), 0.0).sum(0)
                torch.testing.assert_close(sums, p[start : start + z.shape[1]])


def test_a_log_sum_that_rounding_made_negative_poisons_nothing():
    """Where one class is certain, sums of a slice may round to a lse below its logit: (1 - p)^gamma of a p above 1."""
    call, z = checked("anl_fl"), torch.tensor([[0.0, -40.0, -41.0]])
    grad_coefs = torch.ones(stats.NUM_COEFS, 1)
    grad_coefs[stats.CoefField.MAX], grad_coefs[stats.CoefField.LOG_SUM] = 0.0, -1e-7
    for backend in (registry.BACKENDS["cpu"], reference):
        assert slices.grad(backend, call, z, torch.tensor([stats.ELSEWHERE]), grad_coefs).isfinite().all()


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


@pytest.mark.thorough
@gloo
def test_the_example_trains_with_two_processes():
    """Under torchrun, at a size for a test: the loss falls, and both processes print their peak."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, EXAMPLE, *"--classes 3001 --width 16 --rows 64 --steps 12".split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    losses = [float(word) for word in re.findall(r"step \d+: loss ([\d.e+-]+),", result.stdout)]
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0], result.stdout
    assert result.stdout.count("peak memory") == 2, result.stdout
