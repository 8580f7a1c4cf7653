"""The gradient from coefficients by every fused backend, called as autograd calls it."""

import helpers
import oracle
import pytest
import torch
from helpers import THERE

from anl_kernels import registry
from anl_kernels.call import Call
from anl_kernels.row_math import NUM_COEFS, CoefField

CALL = Call(backend="cuda")  # a backend that is named trusts all of its protocols


@pytest.mark.few(layout=["rows"], forced=dict())
@THERE
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_entropys_gradient_where_all_log_q_are_nearly_alike(fused, layout):
    """It is p (log q - its mean), a difference of a thousandth: what rounding the mean leaves out would show."""
    for classes in fused.few((7, 40, 1003)):
        values = helpers.randn(12, classes, generator=helpers.generator(0))
        log_q = -7 - 1e-3 * helpers.rand(classes, generator=helpers.generator(1))
        coefs = torch.zeros(NUM_COEFS, 12)
        coefs[CoefField.MAX] = values.amax(1)
        coefs[CoefField.INV_SUM] = 1 / (values - values.amax(1, keepdim=True)).exp().sum(1)
        coefs[CoefField.LOG_SUM] = -coefs[CoefField.INV_SUM].log()
        logits, target = helpers.lay_out(layout, values, torch.zeros(12, dtype=torch.int64))
        module = registry.fused(fused.name, explicit=True)
        grad = oracle.as_rows(module.row_grad(CALL, logits, target, coefs, None, (log_q, torch.tensor(1.0))))
        p, q = values.double().softmax(1), log_q.double()
        exact = p * (q - p @ q.unsqueeze(1))
        assert (grad - exact).abs().max() <= 1e-5 * exact.abs().max()
