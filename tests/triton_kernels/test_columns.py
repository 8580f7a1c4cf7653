"""Column sums of p against float64, and their order."""

import math

import helpers
import pytest
import torch
from helpers import DTYPES, EPS, dtype_id
from tiers import thorough

from anl_kernels.backends import cpu
from anl_kernels.layout import as_rows
from anl_kernels.triton_kernels import columns


def coefs_of(values, labels, acc):
    """(10, N): what the kernel reads of the coefficients; the rest is NaN."""
    z = values.double()
    coefs = torch.full((10, len(labels)), math.nan, dtype=torch.float64)
    coefs[0] = z.amax(1)
    coefs[1] = 1.0 / (z - coefs[0][:, None]).exp().sum(1)
    coefs[1, labels == -100] = 0.0
    return coefs.to(acc)


def run(logits, coefs, device):
    rows, shape, strides = as_rows(helpers.moved(logits, device.type))
    return columns.column_sums(rows, shape, strides, coefs.to(device)).cpu()


def check(values, labels, logits, device):
    acc = helpers.acc(values.dtype)
    coefs = coefs_of(values, labels, acc)
    result = run(logits, coefs, device)
    live = labels != -100
    z, high, inv_sum = values.double()[live], coefs[0].double()[live], coefs[1].double()[live]
    p = (z - high[:, None]).exp() * inv_sum[:, None]
    assert result.dtype == torch.float64 and result.shape == (values.shape[1],)
    allowed = 32 * EPS[acc] * p.sum(0) + 1e-36
    assert ((result - p.sum(0)).abs() <= allowed).all()
    if cpu.unavailable() is None:
        other = cpu.column_sums(logits, coefs.view(10, *([logits.shape[0], *logits.shape[2:]])))
        assert ((result - other).abs() <= 2 * allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("classes", [2, 33, 1000, 3001])
def test_sums(classes, dtype, device):
    values, labels = helpers.batch(classes, dtype)
    check(values, labels, values, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_layouts(layout, dtype, device):
    values, labels = helpers.batch(40, dtype)
    check(values, labels, helpers.lay_out(layout, values, labels)[0], device)


def many_rows(layout, classes):
    values, labels = helpers.batch(classes, torch.float32)
    return values.repeat(100, 1), labels.repeat(100)


@pytest.mark.parametrize("layout", ["rows", thorough("transposed"), thorough("spatial"), thorough("channels_last")])
def test_many_rows(layout, device, monkeypatch):
    """Several chunks, each of several groups of tiles, neither of which the rows fill."""
    values, labels = many_rows(layout, 70)
    monkeypatch.setattr(columns, "PROGRAMS", 4)
    logits = helpers.lay_out(layout, values, labels)[0]
    check(values, labels, logits, device)
    monkeypatch.setattr(columns, "PROGRAMS", 1 << 20)
    check(values, labels, logits, device)


def test_the_same_bits_again(device):
    values, labels = many_rows("rows", 70)
    coefs = coefs_of(values, labels, torch.float32)
    assert torch.equal(run(values, coefs, device), run(values, coefs, device))


def test_groups_of_tiles_are_added_in_float64(device, monkeypatch):
    monkeypatch.setattr(columns, "PROGRAMS", 1)
    values, labels = many_rows("rows", 70)
    sums = run(values, coefs_of(values, labels, torch.float32), device)
    assert (sums != sums.float()).any()


def test_a_nan_row_poisons_the_sums_and_an_ignored_one_does_not(device):
    values = torch.randn(5, 9, generator=helpers.generator(0))
    labels = torch.tensor([1, -100, 2, 3, 4])
    values[1] = math.nan
    assert not run(values, coefs_of(values, labels, torch.float32), device).isnan().any()
    values[3, 2] = math.nan
    assert run(values, coefs_of(values, labels, torch.float32), device).isnan().all()


def test_no_rows(device):
    assert run(torch.empty(0, 5), torch.empty(10, 0), device).tolist() == [0.0] * 5
