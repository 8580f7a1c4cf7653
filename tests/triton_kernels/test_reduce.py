"""The sums over rows and the scaling of a gradient, against float64."""

import math

import pytest
import torch
from helpers import DTYPES
from tiers import mainly, thorough

from anl_kernels.triton_kernels import reduce

FLOATS = (torch.float32, torch.float64)
NUMBERS = (1, 2, 31, 1023, 1025, reduce.ITEMS, reduce.ITEMS + 1, 3 * reduce.ITEMS + 5)


def values_of(n, dtype, device):
    generator = torch.Generator().manual_seed(n)
    return (torch.randn(n, generator=generator).exp() * 1e4 - 1e4).to(device, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", NUMBERS)
@pytest.mark.parametrize("divisor", [None, 3.0])
def test_reduce_sum(n, dtype, divisor, device):
    values = values_of(n, dtype, device)
    by = None if divisor is None else torch.tensor(divisor, dtype=dtype, device=device)
    result = reduce.reduce_sum(values, by)
    exact = math.fsum(values.tolist()) / (divisor or 1.0)
    assert result.shape == () and result.dtype == dtype
    bound = values.double().abs().sum().item() * (2.0**-44 if dtype == torch.float32 else 2.0**-48)
    assert abs(result.item() - exact) <= bound + torch.finfo(dtype).eps * abs(exact)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's 0 / 0
def test_reduce_sum_of_nothing_and_of_nan(device):
    assert reduce.reduce_sum(torch.empty(0, device=device)).item() == 0.0
    zero = torch.zeros((), device=device)
    assert math.isnan(reduce.reduce_sum(torch.empty(0, device=device), zero).item())
    values = torch.ones(40000, device=device)
    values[39999] = math.nan
    assert math.isnan(reduce.reduce_sum(values).item())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("weight_dtype", [None, *FLOATS, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 100, reduce.ITEMS + 3])
def test_denominator(n, dtype, weight_dtype, device):
    num_classes, ignored = 50, 7
    label = torch.arange(n) * 13 % 53  # 50, 51 and 52 are no classes
    weight = None
    share = torch.ones(53, dtype=torch.float64)
    if weight_dtype is not None:
        weight = torch.rand(num_classes, generator=torch.Generator().manual_seed(0)).to(weight_dtype)
        share[:num_classes] = weight.double()
        weight = weight.to(device)
    share[ignored] = 0.0
    result = reduce.denominator(label.to(device, dtype), ignored, weight, num_classes, torch.float64)
    assert result.dtype == torch.float64 and result.shape == ()
    torch.testing.assert_close(result.cpu(), share[label].sum(), rtol=1e-13, atol=0)
    rounded = reduce.denominator(label.to(device, dtype), ignored, weight, num_classes, torch.float32)
    assert rounded.item() == result.float().item()


def test_denominator_of_labels_far_outside_the_classes(device):
    label = torch.tensor([-1, 2**40, -(2**62), 3, -100, 2**63 - 1], device=device)
    weight = torch.full((4,), 2.0, device=device)
    assert reduce.denominator(label, -100, weight, 4, torch.float32).item() == 6.0
    assert reduce.denominator(label[4:5], -100, weight, 4, torch.float32).item() == 0.0
    assert reduce.denominator(label[:0], -100, weight, 4, torch.float32).item() == 0.0


def _padded(shape):
    return lambda device, dtype: torch.empty(shape[0], shape[1] + 3, dtype=dtype, device=device)[:, : shape[1]]


GRADIENTS = {
    "rows": lambda device, dtype: torch.empty(7, 33, dtype=dtype, device=device),
    "one": lambda device, dtype: torch.empty(5, dtype=dtype, device=device),
    "padded": _padded((9, 40)),
    "columns": lambda device, dtype: torch.empty(33, 7, dtype=dtype, device=device).t(),
    "every_second_class": lambda device, dtype: torch.empty(4, 20, dtype=dtype, device=device)[:, ::2],
    "spatial": lambda device, dtype: torch.empty(2, 5, 3, 4, dtype=dtype, device=device),
    "spatial_hole": lambda device, dtype: torch.empty(2, 6, 3, 4, dtype=dtype, device=device)[:, :5],
    "channels_last": lambda device, dtype: torch.empty(2, 5, 3, 4, dtype=dtype, device=device).to(
        memory_format=torch.channels_last
    ),
    "long": lambda device, dtype: torch.empty(3, 70001, dtype=dtype, device=device),
    "nothing": lambda device, dtype: torch.empty(0, 5, dtype=dtype, device=device),
}


@pytest.mark.parametrize("dtype", mainly((torch.float32, torch.bfloat16), DTYPES))
@pytest.mark.parametrize("layout", GRADIENTS)
@pytest.mark.parametrize("factor", [1.0, 0.1, thorough(math.nan)])
def test_scale(layout, dtype, factor, device):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    grad = GRADIENTS[layout](device, dtype)
    whole = grad.as_strided((grad.untyped_storage().nbytes() // grad.element_size(),), (1,), 0)
    whole.copy_(torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)))
    by, before = torch.tensor(factor, dtype=acc, device=device), whole.clone()
    expected = (grad.to(acc) * by).to(dtype)
    scaled = reduce.scale(grad, by)
    assert torch.equal(whole, before) and (scaled.data_ptr() != grad.data_ptr() or not grad.numel())
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0, equal_nan=True)
    assert reduce.scale_(grad, by) is grad
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)
    grad.copy_(before.as_strided(grad.shape, grad.stride(), grad.storage_offset()))
    assert torch.equal(whole, before), "something between the elements was written"


def test_scale_by_one_leaves_even_nan_alone(device):
    grad = torch.tensor([math.nan, 1.0], device=device)
    bits = grad.view(torch.int32).clone()
    reduce.scale_(grad, torch.ones((), device=device))
    assert torch.equal(grad.view(torch.int32), bits)
