"""suggest(num_classes): the papers' constants, and the gradients its rule promises."""

import dataclasses
import math

import pytest
import torch

import anl_kernels as ak

MANY = (100, 128, 1000, 30_522, 100_000)


@pytest.mark.parametrize(("classes", "published"), [(10, (5.0, 5.0, 1e-7)), (100, (10.0, 1.0, 1e-7))])
def test_the_papers_own_classes_have_the_papers_own_constants(classes, published):
    assert dataclasses.astuple(ak.suggest(classes)) == pytest.approx(published, rel=1e-12)


def test_fewer_than_ten_classes_have_ten_classes_constants():
    assert ak.suggest(2) == ak.suggest(10)


@pytest.mark.parametrize("classes", [11, 20, 32, 64, 99])
def test_between_10_and_100_classes_a_power_of_k_joins_both(classes):
    found, share = ak.suggest(classes), math.log10(classes) - 1
    assert dataclasses.astuple(found) == pytest.approx((5 * 2**share, 5 * 0.2**share, 1e-7), rel=1e-12)


@pytest.mark.parametrize(
    ("classes", "alpha", "min_prob"), [(1000, 150, 1.5e-6), (10_000, 2000, 2.6e-6), (100_000, 25_000, 1.3e-6)]
)
def test_above_100_classes_as_documented(classes, alpha, min_prob):
    assert dataclasses.astuple(ak.suggest(classes)) == pytest.approx((alpha, 1.0, min_prob), rel=0.03)


@pytest.mark.parametrize("classes", [1, 0, -5])
def test_fewer_than_two_classes(classes):
    with pytest.raises(ValueError, match="at least 2"):
        ak.suggest(classes)


@pytest.mark.parametrize("classes", [100.0, "100", None, True])
def test_what_is_no_number_of_classes(classes):
    with pytest.raises(TypeError, match="num_classes must be an int"):
        ak.suggest(classes)


def test_constants_change_gradually_and_the_clamp_stays_below_one_over_k():
    classes = sorted({int(1.1**power) for power in range(8, 300)})
    found = [ak.suggest(k) for k in classes]
    for k, one, following in zip(classes, found, found[1:]):
        assert one.alpha <= following.alpha <= 1.5 * one.alpha
        assert one.beta / 1.5 <= following.beta <= one.beta
        assert k * one.min_prob < 1.0


def test_a_suggestion_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ak.suggest(100).alpha = 1.0


def push_at_the_label(classes, expression, min_prob):
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    expression(logits, torch.tensor([3]), min_prob=min_prob).backward()
    return -logits.grad[0, 3].item()


@pytest.mark.parametrize("classes", MANY)
def test_at_uniform_logits_the_active_part_pushes_as_at_100_classes(classes):
    found = ak.suggest(classes)
    push = push_at_the_label(classes, found.alpha * ak.NCE(), found.min_prob)
    exact = 10 / (100 * math.log(100)) * (1 - 1 / classes)
    assert push == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("classes", MANY)
def test_at_uniform_logits_the_negative_part_pushes_by_the_clamp_s_distance(classes):
    found = ak.suggest(classes)
    distance = -math.log(found.min_prob) - math.log(classes)
    assert distance == pytest.approx(math.log(1e5) * (100 / classes) ** 0.25)
    push = push_at_the_label(classes, found.beta * ak.NNCE(), found.min_prob)
    assert push == pytest.approx(found.beta / (classes * distance) * (1 - 1 / classes), rel=1e-9)


@pytest.mark.parametrize("classes", (100, 10_000))
def test_the_negative_part_s_largest_push_does_not_grow_with_classes(classes):
    """A label at p = 1 but for a bulk one above the clamp: n heights of 1 push by beta V n / (V + n)^2, at most 1/4."""
    found = ak.suggest(classes)
    floor = math.log(found.min_prob)
    above = round(-floor)  # heights of 1 that sum to the label's own height
    logits = torch.full((1, classes), floor - 5.0, dtype=torch.float64)
    logits[0, :above], logits[0, -1] = floor + 1.0, 0.0
    logits[0] -= logits[0].logsumexp(0)
    logits.requires_grad_()
    (found.beta * ak.NNCE())(logits, torch.tensor([classes - 1]), min_prob=found.min_prob).backward()
    assert -logits.grad[0, -1].item() == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.parametrize("loss", [ak.anl_ce, ak.anl_fl])
def test_a_suggestion_is_a_loss_s_keywords(loss):
    logits = torch.randn(4, 1000, requires_grad=True, generator=torch.Generator().manual_seed(0))
    loss(logits, torch.arange(4), **vars(ak.suggest(1000))).backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 0] < 0
