"""Memory: the gradient and O(N + K), in place O(N + K), without grad O(N); and offsets beyond 32 bits."""

import ctypes
import gc
import os
import re

import helpers
import pytest
import torch
from helpers import EXPRESSIONS, expression
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import anl_kernels as ak

pytestmark = pytest.mark.unpoisoned
ROWS, CLASSES = 4000, 4001
BYTES = ROWS * CLASSES * 4
SMALL = 64 * (ROWS + CLASSES) * 8  # "O(N + K)": 64 numbers a row and a class


class Allocations(TorchDispatchMode):
    """The bytes of every storage that an operation returns and did not get."""

    def __init__(self):
        super().__init__()
        self.bytes, self.kept = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.bytes += x.untyped_storage().nbytes()
                self.kept.append(x)  # so that no storage comes again under the same address
        return result


def peak_of(function):
    """The peak of this process's resident memory while `function` runs, above what it was before."""
    gc.collect()  # what is freed meanwhile, or was freed but kept, would serve the call without showing
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def status(field):
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.M).group(1)) * 1024


@pytest.fixture
def logits():
    return torch.randn(ROWS, CLASSES, generator=helpers.generator(0))


@pytest.fixture
def target():
    return torch.randint(CLASSES, (ROWS,), generator=helpers.generator(1))


resident = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
KINDS = {
    "default": dict(),
    "recompute": dict(recompute=True),
    "none": dict(reduction="none"),
    "entropy": dict(entropy_weight=0.5),
    "entropy_recompute": dict(entropy_weight=0.5, recompute=True),
    "weight": dict(weight=torch.ones(CLASSES)),
}
LOSSES = pytest.mark.parametrize(
    "build", [lambda: expression(EXPRESSIONS["anl_fl"]), lambda: ak.RowLoss(lambda s: s.lse)], ids=["fused", "row_loss"]
)


def step(logits, target, criterion, **keywords):
    loss = ak.robust_loss(logits, target, criterion, **keywords)
    loss.backward(torch.ones_like(loss))


@resident
@LOSSES
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_allocate_the_gradient(fused, logits, target, build, kind):
    criterion = build()
    step(logits[:5].clone().requires_grad_(), target[:5], criterion, backend=fused.name, **KINDS[kind])
    logits.requires_grad_()
    peak = peak_of(lambda: step(logits, target, criterion, backend=fused.name, **KINDS[kind]))
    assert peak >= 0.9 * BYTES  # the measurement itself: the gradient is there
    assert peak <= BYTES + SMALL


@resident
@pytest.mark.parametrize("kind", KINDS)
def test_grad_output_costs_nothing_more(fused, logits, target, kind):
    """A GradScaler's factor is multiplied into the gradient where it lies."""
    criterion, keywords = expression(EXPRESSIONS["anl_ce"]), {**KINDS[kind], "backend": fused.name}

    def run():
        loss = ak.robust_loss(logits, target, criterion, **keywords)
        loss.backward(torch.full_like(loss, 1024.0))

    small = torch.randn(4000, 5, requires_grad=True)  # a first use maps code: not the call's memory
    loss = ak.robust_loss(small, target.new_zeros(4000), criterion, backend=fused.name)
    loss.backward(torch.full_like(loss, 1024.0))
    logits.requires_grad_()
    assert peak_of(run) <= BYTES + SMALL


@resident
@pytest.mark.parametrize("kind", KINDS)
def test_inplace_allocates_no_gradient(fused, logits, target, kind):
    hidden = helpers.Alias.apply(logits.requires_grad_())
    grads = []
    hidden.register_hook(lambda grad: grads.append(grad.data_ptr()))

    def run():
        loss = ak.robust_loss(
            hidden, target, expression(EXPRESSIONS["anl_fl"]), inplace=True, backend=fused.name, **KINDS[kind]
        )
        torch.autograd.grad(loss, logits, torch.full_like(loss, 3.0))

    assert peak_of(run) <= SMALL
    assert grads == [logits.data_ptr()]


@resident
@LOSSES
@pytest.mark.parametrize("kind", KINDS)
def test_without_grad_nothing_is_written(fused, logits, target, build, kind):
    criterion = build()
    assert peak_of(lambda: ak.robust_loss(logits, target, criterion, backend=fused.name, **KINDS[kind])) <= SMALL
    with torch.no_grad():
        logits.requires_grad_()
        assert peak_of(lambda: ak.robust_loss(logits, target, criterion, backend=fused.name, **KINDS[kind])) <= SMALL


@resident
@pytest.mark.parametrize("kind", ["recompute", "none", "entropy_recompute"])
def test_between_forward_and_backward(fused, logits, target, kind):
    """recompute keeps O(N) until backward."""
    logits.requires_grad_()
    losses = []
    keywords = {**KINDS[kind], "backend": fused.name}
    peak = peak_of(lambda: losses.append(ak.robust_loss(logits, target, expression(EXPRESSIONS["anl_ce"]), **keywords)))
    assert peak <= SMALL


@resident
@pytest.mark.parametrize("layout", ["padded", "transposed", "every_other_class", "spatial_1d", "channels_last"])
def test_layouts_are_not_copied(fused, layout):
    values = torch.randn(24000, 501, generator=helpers.generator(0))
    labels = torch.randint(501, (24000,), generator=helpers.generator(1))
    logits, target = helpers.lay_out(layout, values, labels)
    size = values.numel() * 4
    del values
    logits.requires_grad_()
    peak = peak_of(lambda: step(logits, target, expression(EXPRESSIONS["anl_ce"]), backend=fused.name))
    assert 0.9 * size <= peak <= size + SMALL


@pytest.mark.parametrize("kind", KINDS)
@LOSSES
def test_tensors_made_by_a_call(fused, build, kind):
    """Counted in PyTorch's own allocations: the gradient, and numbers for rows and classes."""
    logits = torch.randn(40, 3000).requires_grad_()
    target = torch.zeros(40, dtype=torch.int64)
    keywords = {**KINDS[kind], "backend": fused.name}
    if "weight" in keywords:
        keywords["weight"] = torch.ones(3000)
    with Allocations() as made:
        step(logits, target, build(), **keywords)
    assert made.bytes >= 40 * 3000 * 4
    assert made.bytes <= 40 * 3000 * 4 + 64 * (40 + 3000) * 8


# ---- offsets beyond 32 bits, in memory that is mostly never touched


def room(elements, dtype=torch.bfloat16):
    """So many elements of address space; pages come with the first write."""
    try:
        return torch.empty(elements, dtype=dtype)
    except RuntimeError:
        pytest.skip(f"no {elements * dtype.itemsize >> 30} GiB of address space")


FAR = 2**31 + 2**20
VIEWS = {
    "rows": ((3, 1001), (FAR, 1)),
    "classes": ((2, 3), (1, FAR)),
    "strided": ((3, 65), (FAR, 3)),
    "spatial_batch": ((2, 37, 11), (FAR, 11, 1)),
    "spatial_classes": ((2, 3, 11), (11, FAR, 1)),
    "spatial_inner": ((2, 37, 3), (37, 1, FAR)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", ["forward", "recompute", "inplace", "row_loss", "entropy"])
def test_offsets_beyond_32_bits(fused, view, mode):
    """Strides of more than 2^31 elements: for the logits, and in place for the gradient too."""
    shape, strides = VIEWS[view]
    memory = room(sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1)
    logits = memory.as_strided(shape, strides)
    values = (torch.randn(shape, generator=helpers.generator(0)) * 3).bfloat16()
    logits.copy_(values)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=helpers.generator(1))
    terms = EXPRESSIONS["anl_fl"]
    criterion = helpers.row_loss_expression(terms) if mode == "row_loss" else expression(terms)
    keywords = dict(entropy_weight=0.5) if mode == "entropy" else {}
    true = helpers.truth(values, target, terms, **keywords)
    own = dict(recompute=mode == "recompute", inplace=mode == "inplace", leaf=mode != "inplace")
    result = helpers.calculate(logits, target, criterion, backend=fused.name, **own, **keywords)
    helpers.assert_as_accurate(*result, target, true)
    if mode == "inplace":
        helpers.check_grad(logits.detach(), target, true)


def available():
    with open("/proc/meminfo") as file:
        return int(re.search(r"MemAvailable:\s+(\d+)", file.read()).group(1)) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/meminfo") or available() < 12 * 2**30, reason="needs 12 GiB of memory")
def test_more_than_two_billion_logits(cpu):
    """A real gradient of 2^31 + elements: the logits are one row seen many times, the gradient is not."""
    classes = 32_768
    rows = 2**31 // classes + 3
    row = (torch.randn(1, classes, generator=helpers.generator(0)) * 3).bfloat16()
    logits = row.expand(rows, classes).requires_grad_()
    target = torch.arange(rows) % classes
    picked = torch.tensor([0, 1, rows // 2, rows - 4, rows - 3, rows - 2, rows - 1])
    loss = ak.anl_ce(logits, target, reduction="sum", backend="cpu")
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.numel() > 2**31
    true = helpers.truth(row.expand(len(picked), classes), target[picked], EXPRESSIONS["anl_ce"], reduction="sum")
    helpers.check_grad(grad[picked], target[picked], true)
    del grad
    # the loss of row y is linear in what it knows of y: its mean over all labels comes from one row
    some = ak.anl_ce(row.expand(classes, classes), torch.arange(classes), reduction="none", backend="cpu").double()
    torch.testing.assert_close(
        loss.double(), some.sum() * (rows // classes) + some[: rows % classes].sum(), rtol=1e-6, atol=0
    )
