"""What the backend takes from its caller as it comes: strides of labels and factors, and logits to be overwritten."""

import helpers
import pytest
import torch

import anl_kernels as ak
from anl_kernels.backends import triton as backend
from anl_kernels.functional import checked_call
from anl_kernels.triton_kernels.row_math import NUM_COEFS


def call_of(inplace=False):
    return checked_call(ak.NCE() + ak.NNCE(), -100, "none", 0.0, 1e-7, inplace, None, "triton")


@pytest.fixture
def problem(device):
    """(logits (4, 9, 6), labels (4, 6), factors (4, 6)), the last two as every second of a row."""
    logits = torch.randn(4, 9, 6, generator=helpers.generator(0)) * 3
    labels = torch.randint(9, (4, 12), generator=helpers.generator(1))
    factors = torch.randn(4, 12, generator=helpers.generator(2))
    return logits.to(device), labels.to(device)[:, ::2], factors.to(device)[:, ::2]


def gradient(call, logits, labels, factors):
    coefs = logits.new_empty(NUM_COEFS.value, *labels.shape)
    backend.row_loss(call, logits, labels, None, None, coefs)
    return backend.row_grad(call, logits, labels, coefs, factors, None)


def test_labels_and_factors_of_any_stride(problem):
    logits, labels, factors = problem
    dense = labels.contiguous(), factors.contiguous()
    expected = gradient(call_of(), logits, *dense)
    for given in ((labels, dense[1]), (dense[0], factors)):
        assert torch.equal(gradient(call_of(), logits, *given), expected)
    statistics = [backend.row_stats(call_of(), logits, y) for y in (labels, dense[0])]
    torch.testing.assert_close(*statistics, rtol=0, atol=0, equal_nan=True)


def test_overwritten_logits_are_known_to_autograd(problem):
    logits, labels, factors = problem
    expected, version = gradient(call_of(), logits, labels, factors), logits._version
    grad = gradient(call_of(inplace=True), logits, labels, factors)
    assert torch.equal(grad, expected) and grad.data_ptr() == logits.data_ptr()
    assert logits._version > version
