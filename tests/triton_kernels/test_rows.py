"""Corners of the one pass that whole calls reach only with gigabytes, or with labels that are no class."""

import math

import helpers
import pytest
import torch
import triton
import triton.language as tl
from backends_under_test import Backend

import anl_kernels as ak
from anl_kernels.backends import triton as backend
from anl_kernels.functional import checked_call
from anl_kernels.row_math import StatField
from anl_kernels.triton_kernels import rows, tiles
from anl_kernels.triton_kernels.row_math import FirstSums, GradCoefs, gradient_row
from anl_kernels.triton_kernels.scalar_math import Constants

WAYS = {path: Backend("triton", path) for path in ("tile", "loop")}


@triton.jit
def sweep_kernel(Logits_ptr, Grad_ptr, Target_ptr, K, BLOCK_K: tl.constexpr):
    """The first BLOCK_K classes of a row of K, of which as many are said to exist as float32 counts without one."""
    v = tiles.layout_of(1, K, 0, 1, 0, 0, 1, 0, 1, 1)
    row = tiles.rows_of(tl.program_id(0), v, Logits_ptr, Grad_ptr, Target_ptr, -100, 1)
    zero = tl.zeros([1, 1], tl.float32)
    f = FirstSums(zero, zero, zero, zero, zero + (K - 2).to(tl.float32), zero)
    g = GradCoefs(zero, zero + 1.0, zero, zero + 1.0, zero, zero, zero, zero, zero, zero, zero)
    r = gradient_row(g, zero + 1.0, Constants(1e-7, 0.5, 16.0, 16.0))
    rows.gradient_sweep(row, v, 0, BLOCK_K, f, r, 0, 1, BLOCK_K)


@pytest.mark.parametrize("classes", [2**24, 2**24 + 2])
def test_a_masked_class_among_more_than_float32_counts(classes, device):
    """Its gradient is 0 whether or not the count tells that it is missing."""
    logits, grad = torch.zeros(16, device=device), torch.full((16,), math.nan, device=device)
    logits[5] = -math.inf
    sweep_kernel[(1,)](logits, grad, torch.zeros(1, dtype=torch.int64, device=device), classes, BLOCK_K=16)
    assert grad.tolist() == [1.0] * 5 + [0.0] + [1.0] * 10


def call_of(criterion, reduction="mean"):
    return checked_call(criterion, -100, reduction, 0.0, 1e-7, False, None, "triton")


@pytest.mark.parametrize("way", WAYS)
def test_statistics_of_an_ignored_row_are_a_uniform_rows(way, device):
    logits = torch.zeros(2, 33, device=device)
    logits[1] = math.nan
    call = call_of(ak.NFL() + ak.NNFL() + ak.RCE() + ak.MSE())
    with WAYS[way].in_use():
        table = backend.row_stats(call, logits, torch.tensor([3, -100], device=device))
    assert table[StatField.VALID].tolist() == [1.0, 0.0]
    others = [field for field in StatField if field != StatField.VALID]
    torch.testing.assert_close(table[others, 1], table[others, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_label_that_is_no_class_counts_one_in_a_weighted_mean(way, device):
    """The same whether one program has all rows, and divides, or a kernel before it does."""
    values = torch.randn(5, 20, generator=helpers.generator(0)) * 3
    labels, weight = torch.tensor([3, 20, 7, -100, 0]), torch.rand(20, generator=helpers.generator(1)) + 0.5
    call, good = call_of(1.0 * ak.CE()), labels.clone()
    good[1] = -100
    true = helpers.truth(values, good, helpers.EXPRESSIONS["ce"], weight=weight)
    share = weight[good[good >= 0]].sum()
    logits, grad = values.to(device), torch.empty_like(values, device=device)
    with WAYS[way].in_use():
        loss = backend.row_loss(call, logits, labels.to(device), weight.to(device), grad, None)
    assert loss.isnan() and grad[1].isnan().all()
    grad = grad.cpu() * (share + 1.0) / share
    torch.testing.assert_close(grad[good >= 0].double(), true.grad[good >= 0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("way", WAYS)
def test_a_focal_exponent_of_zero_is_no_weight_even_where_p_is_one(way, device):
    """0^0 is 1: the weights of a certain row, right or wrong, are as many as its classes."""
    logits = torch.zeros(2, 33, device=device)
    logits[:, 4] = 200.0
    with WAYS[way].in_use():
        table = backend.row_stats(call_of(1.0 * ak.NFL(0.0)), logits, torch.tensor([4, 7], device=device))
    assert table[9].tolist() == [33.0, 33.0]


def test_low_logits_are_as_far_below_the_largest(device):
    """Whether a class is below the clamp is found from sums about each lane's own maximum."""
    values, labels = helpers.rows_of_every_kind(200, torch.float32, kinds=("mixed",) * 8)
    with WAYS["loop"].in_use():
        for shift in (0.0, -4096.0):
            helpers.check(values + shift, labels, helpers.EXPRESSIONS["nnce"], backend="triton")


def test_the_weight_of_a_class_that_is_nearly_certain_keeps_its_digits(device):
    """(1 - p_j)^gamma of a wrong class, where 1 - p_j is lost in p_j."""
    logits = torch.tensor([[0.0, 14.0]], device=device)
    with WAYS["tile"].in_use():
        table = backend.row_stats(call_of(1.0 * ak.NFL(0.5)), logits, torch.tensor([0], device=device))
    p = logits.double().softmax(1)[0]
    assert table[9].item() == pytest.approx(p.sqrt().sum().item(), rel=1e-6)


def test_the_mass_above_the_clamp_is_kept_in_float64(device):
    """What lies below it is less than float32 tells from 1."""
    logits = torch.full((1, 10), -20.0, device=device)
    logits[0, :2] = 0.0
    with WAYS["tile"].in_use():
        table = backend.row_stats(call_of(1.0 * ak.RCE()), logits, torch.tensor([0], device=device))
    assert 1.0 - table[6].item() == pytest.approx(8 * math.exp(-20) / 2, rel=1e-4)
