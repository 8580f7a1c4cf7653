"""The oracle itself: its float64 and its 120-digit form agree, and it knows the cases."""

import helpers
import oracle
import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("name", helpers.EXPRESSIONS)
def test_float64_agrees_with_120_digits(name):
    z = torch.tensor([[0.3, -1.0, 2.5, 0.0, -20.0], [-3.0, 1.0, 1.5, -0.5, 2.0]], dtype=torch.float64)
    y = torch.tensor([2, 0])
    terms = helpers.EXPRESSIONS[name]
    loss, grad = oracle.loss_and_grad(z, y, terms, reduction="sum")
    rows = [oracle.exact(row.tolist(), int(label), terms) for row, label in zip(z, y)]
    torch.testing.assert_close(
        loss, torch.tensor(sum(value for value, _ in rows), dtype=torch.float64), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(grad, torch.tensor([g for _, g in rows], dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_cross_entropy_is_torchs():
    z = torch.randn(6, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[0, 1, 4], [2, -100, 3], [1, 1, 1], [-100, 0, 2], [3, 3, 0], [4, 2, 1]])
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1], dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        ours = oracle.loss(z, y, ((1, "ce", {}),), weight=weight, reduction=reduction)
        torch.testing.assert_close(ours, F.cross_entropy(z, y, weight=weight, reduction=reduction))


def test_a_masked_class_is_no_class():
    z = torch.tensor([[1.0, -torch.inf, 0.5, 2.0]], dtype=torch.float64)
    for terms in helpers.EXPRESSIONS.values():
        masked, grad = oracle.loss_and_grad(z, torch.tensor([2]), terms)
        smaller, small_grad = oracle.loss_and_grad(z[:, [0, 2, 3]], torch.tensor([1]), terms)
        assert masked == smaller
        assert grad[0, 1] == 0
        assert torch.equal(grad[:, [0, 2, 3]], small_grad)
    assert oracle.loss(z, torch.tensor([1]), terms).isnan()
