"""RowLoss: a user's own f of the statistics."""

import helpers
import oracle
import pytest
import torch
from helpers import EXPRESSIONS, THERE

import anl_kernels as ak


def test_a_loss_of_ones_own(backend):
    """A formula the package does not have, over statistics of every kind, against the same by plain autograd."""
    z = helpers.randn(9, 13, dtype=torch.float64, generator=helpers.generator(0)) * 8
    y = helpers.randint(13, (9,), generator=helpers.generator(1))
    min_prob, floor = 1e-5, -torch.tensor(1e-5, dtype=torch.float64).log()

    def mine(s):
        return (
            s.target_log_prob.square() / s.neg_log_sum
            + 0.1 * s.above_sum.sqrt()
            + s.above_mass / (1 + s.target_prob)
            + 1e-3 * s.lse
        )

    def plain(z):
        log_p = z.log_softmax(1)
        above = (log_p > -floor).detach()
        l_y, p_y = oracle.take(log_p, y), oracle.take(log_p, y).exp()
        u, mass = (above * (floor + log_p)).sum(1), (above * log_p.exp()).sum(1)
        return l_y.square() / -log_p.sum(1) + 0.1 * u.sqrt() + mass / (1 + p_y) + 1e-3 * z.logsumexp(1)

    given = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain(given).mean(), given)
    loss, grad = helpers.calculate(z, y, ak.RowLoss(mine), min_prob=min_prob, backend=backend.name)
    torch.testing.assert_close(loss, plain(z).mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-15)


@THERE
def test_what_a_loss_sees(one_backend):
    """Every statistic, against its definition."""
    z = helpers.randn(6, 11, dtype=torch.float64, generator=helpers.generator(0)) * 9
    y = helpers.randint(11, (6,), generator=helpers.generator(1))
    z[2, (y[2] + 1) % 11] = -torch.inf
    gamma, min_prob, seen = 0.8, 1e-4, {}
    names = "lse target_logit neg_log_sum above_sum above_mass focal_sum focal_above_sum target_log_prob target_prob"
    names = [*names.split(), "above_count", "target_above", "num_classes", "log_floor"]

    def spy(s):
        seen.update({name: torch.as_tensor(getattr(s, name), dtype=torch.float64).detach() for name in names})
        return s.lse

    ak.robust_loss(z, y, ak.RowLoss(spy, gamma=gamma), min_prob=min_prob, backend=one_backend.name)
    l = z.log_softmax(1)
    p, exists, above = l.exp(), z.isfinite(), l > torch.tensor(min_prob).log()
    w, zero = (1 - p) ** gamma, torch.zeros(())
    height = -((1 - min_prob) ** gamma) * torch.tensor(min_prob, dtype=torch.float64).log()
    log_floor = torch.tensor(min_prob, dtype=torch.float64).log()
    expected = {
        "lse": z.logsumexp(1),
        "target_logit": oracle.take(z, y),
        "neg_log_sum": -l.where(exists, zero).sum(1),
        "above_sum": (l - log_floor).where(above, zero).sum(1),
        "above_mass": p.where(above, zero).sum(1),
        "focal_sum": -(w * l).where(exists, zero).sum(1),
        "focal_above_sum": (height + w * l).where(above, zero).sum(1),
        "target_log_prob": oracle.take(l, y),
        "target_prob": oracle.take(p, y),
        "above_count": above.sum(1).double(),
        "target_above": oracle.take(above, y).double(),
        "num_classes": exists.sum(1).double(),
        "log_floor": log_floor,
    }
    for name in names:
        torch.testing.assert_close(
            seen[name].expand_as(expected[name]),
            expected[name],
            rtol=1e-12,
            atol=1e-13,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_row_loss_joins_a_sum(one_backend):
    values, labels = helpers.batch(19, torch.float32)
    mixed = 2 * ak.NCE() + 0.5 * ak.RowLoss(lambda s: 1 - s.target_prob)
    result = helpers.calculate(values, labels, mixed, backend=one_backend.name)
    helpers.assert_as_accurate(*result, labels, helpers.truth(values, labels, ((2.0, "nce", {}), (0.5, "mae", {}))))


def test_row_loss_that_ignores_its_statistics(one_backend):
    """A constant, or a loss of one statistic: the partials that autograd does not give are zero."""
    z, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss, grad = helpers.calculate(
        z, y, ak.RowLoss(lambda s: s.lse * 0 + 2.0), reduction="sum", backend=one_backend.name
    )
    assert loss == 8
    assert (grad == 0).all()


def test_row_loss_with_focal_statistics_needs_a_gamma():
    with pytest.raises(ValueError, match="gamma"):
        ak.RowLoss(lambda s: s.focal_sum)(torch.randn(2, 3), torch.tensor([0, 1]))


@THERE
def test_a_row_loss_with_learned_parameters(one_backend):
    """f may hold tensors that learn: their gradients come too."""
    z, y = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 6])
    sharpness = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    criterion = ak.RowLoss(lambda s: (1 - s.target_prob**sharpness) / sharpness)
    logits = z.clone().requires_grad_()
    criterion(logits, y, backend=one_backend.name).backward()
    expected, by_q = z.clone().requires_grad_(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    ((1 - oracle.take(expected.softmax(1), y) ** by_q) / by_q).mean().backward()
    torch.testing.assert_close(logits.grad, expected.grad)
    torch.testing.assert_close(sharpness.grad, by_q.grad)


def test_a_module_as_f_belongs_to_the_loss():
    class Tempered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Parameter(torch.tensor(0.7))

        def forward(self, s):
            return (1 - s.target_prob**self.q) / self.q

    module = ak.RobustLoss(ak.NCE() + ak.RowLoss(Tempered()))
    assert len(list(module.parameters())) == 1
    module(torch.randn(3, 4), torch.tensor([0, 1, 2])).backward()
    assert next(module.parameters()).grad.isfinite()


@THERE
def test_statistics_read_under_a_condition(one_fused):
    """What f did not read when it was made is not computed: an error that says how to ask for it."""
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])

    def f(s, calls=[]):  # noqa: B006
        calls.append(1)
        return s.lse if len(calls) == 1 else s.lse + s.above_sum

    with pytest.raises(RuntimeError, match="needs"):
        ak.RowLoss(f)(logits, target, backend=one_fused.name)
    named = ak.RowLoss(lambda s: s.lse + s.above_sum, needs=["lse", "above_sum"])
    assert named(logits, target, backend=one_fused.name).isfinite()


@THERE
def test_a_row_loss_that_fails_on_a_made_up_row_may_read_all(one_backend):
    """f holds a tensor of as many numbers as there are rows."""
    values, labels = helpers.rows_of_every_kind(7, torch.float64, kinds=("normal", "peaked", "mixed"))
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for read, gamma in (
        (lambda s: s.neg_log_sum + s.above_sum, None),
        (lambda s: s.other_above_mass, None),
        (lambda s: s.focal_sum + s.focal_above_sum, 0.5),
    ):
        needs = ["neg_log_sum", "above_sum", "other_above_mass", *(["focal_sum", "focal_above_sum"] if gamma else [])]
        fails = ak.RowLoss(lambda s, read=read: weight * read(s).view(3), gamma=gamma)
        named = ak.RowLoss(lambda s, read=read: weight * read(s), gamma=gamma, needs=needs)
        losses = [f(values, labels, backend=one_backend.name) for f in (fails, named)]
        torch.testing.assert_close(*losses, rtol=1e-13, atol=0)


def test_another_f_holds_from_the_next_call_on():
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss = ak.RowLoss(lambda s: s.target_prob)
    loss(logits, target)
    loss.f = lambda s: 1 - s.target_prob
    torch.testing.assert_close(loss(logits, target), ak.mae(logits, target))


def test_a_confident_row_keeps_its_digits(one_backend):
    """1 - p of p near 1, in the coefficients that are made of a table."""
    row = torch.tensor([0.25, -0.5, 0.0, 20.75, -1.25], dtype=torch.float64)
    for name in ("ce", "nce", "fl", "mae"):
        loss, grad = oracle.exact(row.tolist(), 3, EXPRESSIONS[name])
        criterion = helpers.row_loss_expression(EXPRESSIONS[name])
        got = helpers.calculate(row, torch.tensor(3), criterion, backend=one_backend.name)
        expected = torch.tensor(loss, dtype=torch.float64), torch.tensor(grad, dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_unknown_statistics_are_named():
    with pytest.raises(AttributeError, match="neg_log_sum"):
        ak.RowLoss(lambda s: s.nothing)(torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="nothing"):
        ak.RowLoss(lambda s: s.lse, needs=["nothing"])


@THERE
@pytest.mark.parametrize(
    "f",
    [lambda s: s.lse.sum(), lambda s: 1.0, lambda s: None, lambda s: s.lse.unsqueeze(0)],
    ids=["sum", "number", "none", "shape"],
)
def test_a_row_loss_gives_one_number_a_row(one_backend, f):
    with pytest.raises(ValueError, match="one number per row"):
        ak.RowLoss(f)(torch.randn(2, 3), torch.tensor([0, 1]), backend=one_backend.name)
