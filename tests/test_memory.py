"""Memory: the gradient and O(N + K), in place O(N + K), without grad O(N); and offsets beyond 32 bits."""

import os
import re
import tempfile
from pathlib import Path

import devices
import helpers
import pytest
import torch
from helpers import EXPRESSIONS, expression
from tiers import mainly

import anl_kernels as ak
from anl_kernels.cli import timing
from anl_kernels.cli.contenders import Run

pytestmark = pytest.mark.unpoisoned


class Case:
    """Logits and labels where the backend runs, and the most memory that a call holds there beyond them.

    On the CPU the process's resident memory. On a GPU, and where kernels are emulated (their memory is the emulator's,
    and the logits are few), what PyTorch's allocator holds.
    """

    def __init__(self, backend, rows, classes, resident=True):
        self.backend, self.device = backend, backend.device
        self.resident = resident and backend.name == "cpu"
        if backend.interpreted or backend.on_host or devices.EMULATED:
            rows = 48
        self.values = torch.randn(rows, classes, generator=helpers.generator(0))
        self.labels = torch.randint(classes, (rows,), generator=helpers.generator(1))
        self.bytes = self.values.numel() * 4
        # "O(N + K)": so many numbers per row and per class; malloc's own habits are in the larger one
        self.small = (64 if self.resident else 16) * (rows + classes) * 8

    def keywords(self, kind):
        moved = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in KINDS[kind].items()}
        return {**moved, "backend": self.backend.name}

    def lay_out(self, layout):
        logits, target = helpers.lay_out(layout, self.values, self.labels)
        return helpers.moved(logits, self.device), target.to(self.device)

    def tensors(self):
        return self.values.to(self.device), self.labels.to(self.device)

    def peak_of(self, function):
        run = Run(function)
        if self.device == "emulated":
            return devices.peak_bytes(function)
        peak = timing.peak_resident(run) if self.resident else timing.profile(run, self.device).peak_bytes
        if peak is None:
            pytest.skip("needs Linux's /proc")
        return peak


@pytest.fixture
def case(fused):
    case = Case(fused, 2000, 4001)
    small, target = case.values[:, :5].to(case.device).requires_grad_(), case.labels.to(case.device) % 5
    for criterion in (expression(EXPRESSIONS["anl_ce"]), ak.RowLoss(lambda s: s.lse)):
        loss = ak.robust_loss(small, target, criterion, backend=fused.name)
        loss.backward(torch.full_like(loss, 1024.0))  # a first use maps code: not the call's memory
    return case


KINDS = {
    "default": dict(),
    "recompute": dict(recompute=True),
    "none": dict(reduction="none"),
    "entropy": dict(entropy_weight=0.5),
    "entropy_recompute": dict(entropy_weight=0.5, recompute=True),
    "weight": dict(weight=torch.ones(4001)),
}
SOME_KINDS = mainly(("default", "none", "entropy"), KINDS)
LOSSES = pytest.mark.parametrize(
    "build", [lambda: expression(EXPRESSIONS["anl_fl"]), lambda: ak.RowLoss(lambda s: s.lse)], ids=["fused", "row_loss"]
)


def step(logits, target, criterion, **keywords):
    loss = ak.robust_loss(logits, target, criterion, **keywords)
    loss.backward(torch.ones_like(loss))


@pytest.mark.few(tier="thorough")
@LOSSES
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_forward_and_backward_allocate_the_gradient(case, build, kind):
    criterion, keywords = build(), case.keywords(kind)
    logits, target = case.tensors()
    logits.requires_grad_()
    peak = case.peak_of(lambda: step(logits, target, criterion, **keywords))
    assert peak >= 0.9 * case.bytes  # the measurement itself: the gradient is there
    assert peak <= case.bytes + case.small


@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_grad_output_costs_nothing_more(case, kind):
    """A GradScaler's factor is multiplied into the gradient where it lies."""
    keywords = case.keywords(kind)
    logits, target = case.tensors()
    logits.requires_grad_()

    def run():
        loss = ak.robust_loss(logits, target, expression(EXPRESSIONS["anl_ce"]), **keywords)
        loss.backward(torch.full_like(loss, 1024.0))

    assert case.peak_of(run) <= case.bytes + case.small


@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_inplace_allocates_no_gradient(case, kind):
    keywords = dict(case.keywords(kind), inplace=True)
    logits, target = case.tensors()
    hidden = helpers.Alias.apply(logits.requires_grad_())
    grads = []
    hidden.register_hook(lambda grad: grads.append(grad.data_ptr()))

    def run():
        loss = ak.robust_loss(hidden, target, expression(EXPRESSIONS["anl_fl"]), **keywords)
        torch.autograd.grad(loss, logits, torch.full_like(loss, 3.0))

    assert case.peak_of(run) <= case.small
    assert grads == [logits.data_ptr()]


@pytest.mark.few(kind=["default", "weight", "entropy"], tier="thorough")
@LOSSES
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_without_grad_nothing_is_written(case, build, kind):
    criterion, keywords = build(), case.keywords(kind)
    logits, target = case.tensors()
    assert case.peak_of(lambda: ak.robust_loss(logits, target, criterion, **keywords)) <= case.small
    with torch.no_grad():
        logits.requires_grad_()
        assert case.peak_of(lambda: ak.robust_loss(logits, target, criterion, **keywords)) <= case.small


@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("kind", ["recompute", "none", "entropy_recompute"])
def test_between_forward_and_backward(case, kind):
    """recompute keeps O(N) until backward."""
    keywords = case.keywords(kind)
    logits, target = case.tensors()
    logits.requires_grad_()
    losses = []
    peak = case.peak_of(
        lambda: losses.append(ak.robust_loss(logits, target, expression(EXPRESSIONS["anl_ce"]), **keywords))
    )
    assert peak <= case.small


@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("layout", ["padded", "transposed", "every_other_class", "spatial_1d", "channels_last"])
def test_layouts_are_not_copied(fused, layout):
    case = Case(fused, 24000, 501)
    logits, target = case.lay_out(layout)
    case.values = None
    logits.requires_grad_()
    peak = case.peak_of(lambda: step(logits, target, expression(EXPRESSIONS["anl_ce"]), backend=fused.name))
    assert 0.9 * case.bytes <= peak <= case.bytes + case.small


@pytest.mark.few(kind=["default"], tier="thorough")
@pytest.mark.parametrize("kind", SOME_KINDS)
@LOSSES
def test_tensors_made_by_a_call(fused, build, kind):
    """In PyTorch's own allocations: the gradient, and numbers for rows and classes."""
    case = Case(fused, 48, 4001, resident=False)
    logits, target = case.tensors()
    logits.requires_grad_()
    peak = case.peak_of(lambda: step(logits, target, build(), **case.keywords(kind)))
    assert case.bytes <= peak <= case.bytes + case.small


# ---- offsets beyond 32 bits, in memory that is mostly never touched


@pytest.fixture
def alone(device):
    """One such test at a time on a GPU, however many workers there are: there each holds its gigabytes."""
    if device.type == "cpu":
        yield
        return
    import fcntl

    with open(Path(tempfile.gettempdir()) / "anl_kernels_gigabytes.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if device.type == "cuda":
            torch.cuda.empty_cache()


def room(elements, device, dtype=torch.bfloat16):
    """So many elements of address space; on the CPU pages come with the first write."""
    try:
        return torch.empty(elements, dtype=dtype, device=device)
    except RuntimeError:
        pytest.skip(f"no {elements * dtype.itemsize >> 30} GiB on {device}")


FAR = 2**31 + 2**20
VIEWS = {
    "rows": ((3, 1001), (FAR, 1)),
    "classes": ((2, 3), (1, FAR)),
    "strided": ((3, 65), (FAR, 3)),
    "spatial_batch": ((2, 37, 11), (FAR, 11, 1)),
    "spatial_classes": ((2, 3, 11), (11, FAR, 1)),
    "spatial_inner": ((2, 37, 3), (37, 1, FAR)),
}


@pytest.mark.few(view=["classes", "spatial_batch"], mode=["forward"])
@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", ["forward", "recompute", "inplace", "row_loss", "entropy"])
def test_offsets_beyond_32_bits(fused, device, alone, view, mode):
    """Strides of more than 2^31 elements: for the logits, and in place for the gradient too."""
    if fused.interpreted and devices.EMULATED:
        pytest.skip("no emulation of gigabytes: Triton's interpreter would copy them to the CPU")
    shape, strides = VIEWS[view]
    memory = room(sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1, device)
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


@pytest.mark.thorough
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
