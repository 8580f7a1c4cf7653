"""The compiled CPU kernels where all is not well: no memory is left, labels change meanwhile, tensors hold nothing."""

import math
import os
import subprocess
import sys
from pathlib import Path

import backends_under_test
import helpers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import anl_kernels as ak
from anl_kernels.backends import cpu as backend
from anl_kernels.call import Call
from anl_kernels.row_math import ANY_NEEDS, NUM_COEFS, NUM_STATS, StatField

ISAS = [b.isa for b in backends_under_test.BACKENDS if b.name == "cpu"]
ANL_CE = ((1, 1.0, 0.0, 0.0), (2, 1.0, 0.0, 0.0))
ROWS, CLASSES, FEW = 64, 40, 7  # FEW: of them a vector holds pixels, not classes
VALID = StatField.VALID
NO_CLASSES = [CLASSES, 2**40, -7, -(2**62), 2**63 - 1]


@pytest.fixture(params=ISAS or [None])
def kernels(request, cpu):
    """The module, with each instruction set that runs here."""
    if request.param is None:
        pytest.skip("the cpu backend does not run here")
    before = cpu.info()["isa"]
    cpu.set_isa(request.param)
    yield cpu
    cpu.set_isa(before)


def call(**changes):
    """What the backend's functions read of a checked call."""
    values = dict(
        terms=ANL_CE, min_prob=1e-7, gamma=None, needs=ANY_NEEDS, ignore_index=-100, reduction="none", inplace=False
    )
    return Call(**{**values, **changes})


def logits_of(layout, dtype=torch.float32):
    values = torch.randn(ROWS, CLASSES, generator=helpers.generator(0), dtype=torch.float64).mul(3).to(dtype)
    return {
        "rows": lambda: values,
        "transposed": lambda: values.t().contiguous().t(),
        "spatial": lambda: values.t().contiguous().unsqueeze(0),
        "few_classes": lambda: values[:, :FEW].contiguous(),
    }[layout]()


def flat(grad):
    return grad[0].t() if grad.dim() == 3 else grad


LAYOUTS = ["rows", "transposed", "spatial", "few_classes"]


# ---- labels that another thread changes after they were checked


class Overwritten:
    """Labels that the kernel itself overwrites as it goes, with what it finds for the rows before: after the check, and
    in the same order every time. Where row r's number goes, the label of row r + 16 was; none of these are classes."""

    SHIFT = 16

    def __init__(self, dtype):
        self.results = torch.zeros(ROWS + self.SHIFT, dtype=dtype)
        self.labels = self.results.view({4: torch.int32, 8: torch.int64}[dtype.itemsize])[:ROWS]
        self.target = (torch.arange(ROWS) % FEW).to(self.labels.dtype)
        self.labels.copy_(self.target)
        self.found = self.results[self.SHIFT :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keeps", ["gradient", "coefficients"])
def test_a_label_that_is_none_when_it_is_used_makes_its_row_nan(kernels, layout, dtype, keeps):
    logits, acc = logits_of(layout, dtype), helpers.acc(dtype)
    memory = Overwritten(acc)
    shape, strides = ak.layout.shape_and_strides(logits)
    weight = torch.linspace(1, 2, shape[1], dtype=acc)

    def run(labels, loss):
        grad = torch.full_like(logits, 7.0) if keeps == "gradient" else None
        coefs = torch.full((NUM_COEFS, ROWS), 7.0, dtype=acc) if keeps == "coefficients" else None
        bad = kernels.row_loss(
            kernels.Program(ANL_CE, 1e-7, 0.0, 1), backend.DTYPES[dtype], shape, logits.data_ptr(), strides,
            0 if grad is None else grad.data_ptr(), strides, labels.data_ptr(), backend.TARGETS[labels.dtype], -100,
            weight.data_ptr(), 0, loss.data_ptr(), 0 if coefs is None else coefs.data_ptr(), False,
        )  # fmt: skip
        assert bad == -1
        if grad is None:
            grad = backend.row_grad(call(), logits, memory.target, coefs, torch.ones((), dtype=acc), None)
        return flat(grad)

    loss = torch.empty(ROWS, dtype=acc)
    grad, expected = run(memory.labels, memory.found), run(memory.target, loss)
    assert torch.equal(memory.found[:16], loss[:16])
    assert torch.equal(grad[:16], expected[:16]) and expected.isfinite().all()
    assert memory.found[16:].isnan().all()
    assert grad[16:].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_label_that_is_none_when_it_is_used_are_nan(kernels, layout):
    logits, memory = logits_of(layout), Overwritten(torch.float64)
    shape, strides = ak.layout.shape_and_strides(logits)
    table, expected = (torch.zeros(NUM_STATS * ROWS + 16, dtype=torch.float64) for _ in range(2))
    memory.results = table
    labels = table.view(torch.int64)[:ROWS].copy_(memory.target)
    for where, target in ((table[16:], labels), (expected[16:], memory.target)):
        bad = kernels.row_stats(
            0, shape, logits.data_ptr(), strides, target.data_ptr(), 0, -100, 1e-7, 0.5, ANY_NEEDS, where.data_ptr()
        )
        assert bad == -1
    table, expected = (t[16:].view(NUM_STATS, ROWS) for t in (table, expected))
    assert torch.equal(table[:, :16], expected[:, :16])
    assert table[:VALID, 16:].isnan().all()
    assert (table[VALID] == 1).all()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_changed_between_forward_and_backward_make_their_rows_nan(kernels, layout, inplace, entropy):
    logits = logits_of(layout)
    target = torch.arange(ROWS) % FEW
    target[5] = -100
    shaped = target.view(1, -1) if logits.dim() == 3 else target
    coefs = ak.layout.new_coefs(logits, shaped)
    backend.row_loss(call(), logits, shaped, None, None, coefs)
    classes = logits.shape[1]
    term = (torch.linspace(-3, -1, classes), torch.tensor(0.3)) if entropy else None
    expected = flat(backend.row_grad(call(), logits, shaped, coefs, None, term)).clone()
    changed = target.clone()
    rows = torch.arange(len(NO_CLASSES)) * 7 + 2
    changed[rows] = torch.tensor(NO_CLASSES)
    changed[5] = 2**40  # ignored before: still 0
    grad = flat(backend.row_grad(call(inplace=inplace), logits, changed.view_as(shaped), coefs, None, term))
    others = torch.ones(ROWS, dtype=torch.bool).index_fill(0, rows, False)
    assert grad[rows].isnan().all()
    assert torch.equal(grad[others], expected[others]) and (grad[5] == 0).all()
    assert expected.isfinite().all()


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slice_takes_any_label_that_is_no_class_for_one_elsewhere(kernels, layout, second):
    logits = logits_of(layout)
    target = torch.full((ROWS,), -1)
    lse = torch.stack((torch.full((ROWS,), 9.0), torch.full((ROWS,), 1.0))).double() if second else None
    shaped = target.view(1, -1) if logits.dim() == 3 else target
    expected = backend.slice_stats(call(gamma=0.5), logits, shaped, lse)
    for label in NO_CLASSES:
        assert torch.equal(backend.slice_stats(call(gamma=0.5), logits, torch.full_like(shaped, label), lse), expected)


RACE = """
import itertools, threading
import torch
import anl_kernels as ak
from anl_kernels import _cpu

values = [0, 2**40, 3, -2**62, -100, 1]
for isa in _cpu.info()["isas"]:
    _cpu.set_isa(isa)
    for classes in (5, 50):
        logits, target, weight = torch.randn(20000, classes), torch.zeros(20000, dtype=torch.int64), torch.rand(classes)
        alias, done = target.data[::3], threading.Event()  # autograd does not notice what is written there

        def write():
            for value in itertools.cycle(values):
                alias.fill_(value)
                if done.is_set():
                    return

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        for i in range(40):
            z = logits.clone().requires_grad_()
            try:
                ak.anl_ce(z, target, weight=weight if i % 2 else None, recompute=i % 3 == 0, backend="cpu").backward()
            except IndexError:
                pass
        done.set()
        writer.join()
print("through")
"""


@pytest.mark.thorough
def test_labels_that_change_during_calls_crash_nothing(cpu):
    assert python(RACE).stdout == "through\n"


# ---- arguments that are not one run of memory


def with_gaps(tensor):
    return torch.stack([tensor, torch.full_like(tensor, 99)], -1)[..., 0]


def test_arguments_with_gaps_are_read_as_they_stand(cpu):
    logits, target, weight = logits_of("rows"), torch.arange(ROWS) % CLASSES, torch.linspace(1, 2, CLASSES)
    coefs, output = ak.layout.new_coefs(logits, target), torch.linspace(-1, 2, ROWS)
    lse = torch.stack((torch.full((ROWS,), 9.0), torch.linspace(1, 2, ROWS))).double()
    backend.row_loss(call(), logits, target, None, None, coefs)
    for function, argument in (
        (lambda t: backend.row_loss(call(), logits, t, None, None, None), target),
        (lambda t: backend.row_loss(call(), logits, target, t, None, None), weight),
        (lambda t: backend.row_stats(call(gamma=0.5), logits, t), target),
        (lambda t: backend.slice_stats(call(gamma=0.5), logits, t, lse), target),
        (lambda t: backend.slice_stats(call(gamma=0.5), logits, target, t), lse),
        (lambda t: backend.row_grad(call(), logits, t, coefs, None, None), target),
        (lambda t: backend.row_grad(call(), logits, target, coefs, t, None), output),
    ):
        assert torch.equal(function(with_gaps(argument)), function(argument))


# ---- no memory


def python(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1]), **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/", timeout=120)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr[-2000:]}"
    return result


NO_MEMORY = """
import re, resource
import torch
import anl_kernels as ak

torch.set_num_threads({threads})
classes = 1 << 19  # the working space of a thread: at least 32 MiB
logits, target = torch.randn(1, classes, 40), torch.randint(classes, (1, 40))
small, labels = torch.randn(3, 4000, 40), torch.zeros(3, 40, dtype=torch.int64)
loss = lambda z, y: ak.anl_ce(z, y, backend="cpu")
expected = loss(small, labels)  # PyTorch's threads begin
unlimited = resource.getrlimit(resource.RLIMIT_AS)
used = int(re.search(r"VmSize:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (12 << 20), unlimited[1]))
for _ in range(2):
    try:
        loss(logits, target)
    except MemoryError as error:
        print(error)
    assert loss(small, labels) == expected
resource.setrlimit(resource.RLIMIT_AS, unlimited)
torch.testing.assert_close(loss(logits, target), ak.anl_ce(logits, target, backend="reference"))
print("through")
"""


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_memory_is_an_exception_that_says_how_much_was_asked_for(cpu, threads):
    result = python(NO_MEMORY.format(threads=threads), OMP_NUM_THREADS=str(threads))
    first, second, last = result.stdout.splitlines()
    assert first == second and last == "through"
    assert first.startswith("anl_kernels: no memory for ") and int(first.split()[4]) >= 32 << 20
    assert "torch.set_num_threads" in first
    assert result.stderr == ""  # PyTorch logs what crosses its C functions


# ---- tensors without memory of their own


class Wrapper(torch.Tensor):
    """A subclass with a shape, and nothing behind it."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), keywords=None):
        raise AssertionError(f"{function} of a tensor that is only asked for its memory")


def fake(like):
    with FakeTensorMode():
        return torch.empty(like.shape, dtype=like.dtype)


def zero(like):
    return torch._efficientzerotensor(like.shape, dtype=like.dtype)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("argument", "make", "kind"),
    [
        (argument, make, kind)
        for argument in ("logits", "target", "weight", "grad", "coefs", "grad_output")
        for make, kind in ((Wrapper, "Wrapper"), (fake, "FakeTensor"), (zero, "ZeroTensor"))
        if argument != "logits" or make is not Wrapper  # whose results PyTorch makes like them
    ],
)
def test_a_tensor_without_memory_is_refused_by_name(cpu, make, kind, argument):
    given = dict(
        logits=torch.randn(4, 6), target=torch.tensor([1, 0, 5, 2]), weight=torch.ones(6), grad=torch.ones(4, 6),
        coefs=torch.ones(NUM_COEFS, 4), grad_output=torch.ones(4),
    )  # fmt: skip
    given[argument] = make(given[argument])
    x, target, coefs = given["logits"], given["target"], given["coefs"]
    calls = {
        "loss": lambda: backend.row_loss(call(), x, target, given["weight"], given["grad"], coefs),
        "stats": lambda: backend.row_stats(call(), x, target),
        "slice": lambda: backend.slice_stats(call(), x, target, None),
        "gradient": lambda: backend.row_grad(call(), x, target, coefs, given["grad_output"], None),
        "columns": lambda: backend.column_sums(x, coefs),
    }
    takes = {
        "logits": calls, "target": ("loss", "stats", "slice", "gradient"), "weight": ("loss",), "grad": ("loss",),
        "coefs": ("loss", "gradient", "columns"), "grad_output": ("gradient",),
    }  # fmt: skip
    for name in takes[argument]:
        said = "the gradient" if argument == "grad" else argument
        with pytest.raises(TypeError, match=f"{said} is a {kind} without memory"):
            calls[name]()


def test_no_rows_need_no_memory(cpu):
    x, y = torch.empty(0, 6), torch.empty(0, dtype=torch.int64)
    assert backend.row_loss(call(), x, y, None, None, None).shape == (0,)
    assert math.isnan(ak.cross_entropy(x, y, backend="cpu"))
    assert (backend.column_sums(x, torch.empty(NUM_COEFS, 0)) == 0).all()


def test_the_module_refuses_null_pointers_by_name(cpu):
    x, y, loss = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    coefs, table = torch.ones(NUM_COEFS, 4), torch.zeros(NUM_STATS, 4, dtype=torch.float64)
    shape, strides, at = (4, 6, 1), (6, 1, 0), torch.Tensor.data_ptr

    def row_loss(x, y, loss, reduction):
        cpu.row_loss(
            cpu.Program(ANL_CE, 1e-7, 0.0, 1), 0, shape, x, strides, 0, strides, y, 0, -100, 0, reduction, loss, 0, 0
        )

    def row_grad(x, grad, y, coefs, output, log_q, scale):
        cpu.row_grad(
            0, shape, x, strides, grad, strides, y, 0, 1e-7, 0.0, 0, coefs, output, 1, log_q, scale, False
        )  # fmt: skip

    def row_stats(x, y, table):
        cpu.row_stats(0, shape, x, strides, y, 0, -100, 1e-7, 0.0, 0, table)

    def refused(what):
        return pytest.raises(ValueError, match=f"no memory is given for {what}")

    for reduction in (0, 1, 2):
        for i, what in enumerate(("the logits", "the target", "the loss")):
            with refused(what):
                row_loss(*(0 if j == i else at(t) for j, t in enumerate((x, y, loss))), reduction)
    tensors = (x, x.clone(), y, coefs, loss, torch.ones(6), torch.ones(1))
    names = ("the logits", "the gradient", "the target", "the coefficients", "grad_output", None, "the entropy's scale")
    for i, what in enumerate(names):
        if what:
            with refused(what):
                row_grad(*(0 if j == i else at(t) for j, t in enumerate(tensors)))
    for i, what in enumerate(("the logits", "the target", "the statistics")):
        with refused(what):
            row_stats(*(0 if j == i else at(t) for j, t in enumerate((x, y, table))))
    for i, what in enumerate(("the logits", "the coefficients", "the sums")):
        pointers = [0 if j == i else at(t) for j, t in enumerate((x, coefs, table))]
        with refused(what):
            cpu.column_sums(0, shape, pointers[0], strides, *pointers[1:])
