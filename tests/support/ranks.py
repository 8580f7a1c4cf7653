"""What checks of class_group are made of: groups of ranks, and a call compared with one process with all classes."""

import helpers
import torch
import torch.distributed as dist

import anl_kernels as ak
from anl_kernels.sharding.class_group import gathered

CLASSES = 37
SIZES = {2: ((19, 18), (36, 1)), 3: ((13, 13, 11), (20, 0, 17)), 4: ((10, 9, 9, 9), (1, 0, 30, 6))}
KINDS = {
    "mean": dict(),
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "entropy": dict(entropy_weight=0.7),
    "weight": dict(weight=torch.linspace(0.1, 2, CLASSES)),
}


class Ranks:
    def __init__(self):
        self.rank = dist.get_rank()
        self.groups = {size: dist.new_group(range(size)) for size in (2, 3, 4)}
        self.pairs = [dist.new_group(pair) for pair in ((0, 1), (2, 3), (0, 2), (1, 3))]

    def members(self):
        """(size, group) of those that this rank belongs to."""
        return [(size, group) for size, group in self.groups.items() if self.rank < size]


def with_gradient(function, *leaves):
    """(loss, the gradients by the leaves), with a seed of its own for every row of a loss without reduction."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    seed = torch.linspace(-1, 1, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()].view(loss.shape)
    grads = torch.autograd.grad(loss, leaves, seed if loss.dim() else None)
    return [loss.detach(), *grads]


def assert_close(got, expected, dtype, scale=None):
    """Within a few roundings of the largest element."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    if got.numel():
        scale = expected if scale is None else scale
        allowed = 64 * helpers.EPS[dtype] * scale.abs().nan_to_num(0.0).max().item()
        error = (got - expected).abs().nan_to_num(0.0).max().item()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def compare(group, rank, sizes, values, target, criterion, backend="auto", **keywords):
    dim = min(1, values.dim() - 1)
    expected = with_gradient(lambda z: ak.robust_loss(z, target, criterion, **keywords), values)
    mine = values.split(sizes, dim)[rank]
    if not mine.numel():  # a leaf without elements has a gradient too
        mine = mine.clone()
    got = with_gradient(
        lambda z: ak.robust_loss(z, target, criterion, class_group=group, backend=backend, **keywords), mine
    )
    loss_dtype = helpers.acc(values.dtype)
    assert_close(got[0], expected[0], loss_dtype)
    assert_close(got[1], expected[1].split(sizes, dim)[rank], values.dtype, expected[1])
    every = gathered(got[0].double(), group)
    assert all(torch.equal(x.nan_to_num(7.0), every[0].nan_to_num(7.0)) for x in every), "one loss on all ranks"


def raises(error, words, function):
    try:
        function()
    except error as found:
        assert words in str(found), found
    else:
        raise AssertionError(f"no {error.__name__}")
