"""The gradient from coefficients by every fused backend, called as autograd calls it."""

import types

import helpers
import oracle
import pytest
import torch
from helpers import THERE

from anl_kernels import registry

CALL = types.SimpleNamespace(min_prob=1e-7, gamma=None, needs=0, inplace=False, explicit=True, program=None, terms=())


@pytest.mark.few(layout=["rows"], forced=dict())
@THERE
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_entropys_gradient_where_all_log_q_are_nearly_alike(fused, layout):
    """It is p (log q - its mean), a difference of a thousandth: what rounding the mean leaves out would show."""
    for classes in fused.few((7, 40, 1003)):
        values = helpers.randn(12, classes, generator=helpers.generator(0))
        log_q = -7 - 1e-3 * helpers.rand(classes, generator=helpers.generator(1))
        coefs = torch.zeros(10, 12)
        coefs[0], coefs[1] = values.amax(1), 1 / (values - values.amax(1, keepdim=True)).exp().sum(1)
        coefs[9] = -coefs[1].log()
        logits, target = helpers.lay_out(layout, values, torch.zeros(12, dtype=torch.int64))
        module = registry.fused(fused.name, explicit=True)
        grad = oracle.as_rows(module.row_grad(CALL, logits, target, coefs, None, (log_q, torch.tensor(1.0))))
        p, q = values.double().softmax(1), log_q.double()
        exact = p * (q - p @ q.unsqueeze(1))
        assert (grad - exact).abs().max() <= 1e-5 * exact.abs().max()
