"""What is the CUDA backend's own: which kernel runs what, launches, labels that are none, errors, the module's loading.

The kernels run on the host (tests/cuda_on_host) where there is no GPU; the conformance suite has the numbers.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import cuda_on_host.build
import devices
import helpers
import oracle
import pytest
import torch
from helpers import EXPRESSIONS
from tiers import mainly, thorough

import anl_kernels as ak
from anl_kernels.backends import cuda
from anl_kernels.call import Call
from anl_kernels.row_math import NUM_COEFS

pytestmark = pytest.mark.skipif(not cuda_on_host.build.compiler(), reason="needs g++ on Linux and the source tree")

FLOAT32, FLOAT64, BFLOAT16 = 0, 1, 3
ABOVE = 1  # what the kernels are told that NNCE needs


GPU = [pytest.param("gpu", marks=pytest.mark.gpu)] if devices.GPU else []


@pytest.fixture(params=["host", "host-sm80", "host-h100", *GPU])
def device(request):
    """A device that does not exist, where backend="cuda" takes CPU tensors; or the GPU. Tensors are made there."""
    from cuda_on_host import adapter

    if request.param == "gpu":
        with torch.device(devices.GPU):
            yield
        return
    with adapter.on_host(request.param):
        yield


@pytest.fixture
def module():
    from cuda_on_host import adapter

    with adapter.on_host("host-h100") as found:
        yield found


H100, A100, B200, RTX4090 = 3, 4, 7, 8  # of tests/cuda_on_host/host_devices.cpp


@pytest.mark.parametrize(
    ("device", "dtype", "rows", "classes", "kernel"),
    [
        (H100, FLOAT32, 128, 10, "rows_small"),
        (H100, FLOAT32, 4096, 4096, "rows_small"),
        (H100, BFLOAT16, 4096, 8192, "rows_small"),
        (H100, BFLOAT16, 4096, 8193, "rows_block"),
        (H100, FLOAT64, 4096, 512, "rows_small"),
        (H100, FLOAT64, 4096, 513, "rows_block"),
        (H100, FLOAT32, 4096, 4097, "rows_block"),
        (H100, BFLOAT16, 4096, 20_000, "rows_block"),
        (H100, BFLOAT16, 4096, 100_000, "rows_cluster"),
        (H100, FLOAT32, 1024, 800_000, "rows_cluster"),
        (H100, FLOAT32, 1, 1_000_000, "rows_cluster"),
        (H100, FLOAT32, 1, 1_100_000, "rows_split"),
        (H100, FLOAT32, 1024, 4_000_000, "rows_split"),
        (A100, FLOAT32, 1024, 20_000, "rows_block"),
        (A100, FLOAT32, 1024, 20_800, "rows_split"),  # with what CUDA and the kernel need, two do not fit
        (A100, FLOAT32, 1024, 100_000, "rows_split"),
    ],
)
def test_selection(module, device, dtype, rows, classes, kernel):
    assert module.plan_for(dtype, (rows, classes, 1), (classes, 1, 0), device)["kernel"] == kernel


def test_selection_by_strides(module):
    assert module.plan_for(FLOAT32, (8, 19, 64), (19 * 64, 64, 1), H100)["kernel"] == "spatial"
    assert module.plan_for(FLOAT32, (8, 19, 64), (19 * 64, 1, 19), H100)["kernel"] == "rows_small"  # channels-last
    assert module.plan_for(FLOAT32, (8, 5000, 1), (1, 8, 0), H100)["kernel"] == "spatial"


def row_loss(module, logits, target, empty, device=-1):
    program = module.Program([(1, 1.0, 0.0, 0.0), (2, 1.0, 0.0, 0.0)], 1e-7, 0.0, ABOVE)
    loss, grad = torch.empty(()), torch.empty_like(logits)
    rows, classes = logits.shape
    module.row_loss(
        program, FLOAT32, (rows, classes, 1), logits.data_ptr(), (classes, 1, 0), grad.data_ptr(), (classes, 1, 0),
        target.data_ptr(), 0, -100, 0, 1, loss.data_ptr(), 0, module.Where(device, 0, empty),
    )  # fmt: skip
    return loss, grad


@pytest.mark.parametrize(("rows", "classes", "launches"), [(128, 10, 1), (128, 100, 1), (64, 37, 1), (4096, 10, 2)])
def test_a_small_batch_is_one_launch(module, rows, classes, launches):
    """With its mean's denominator and the loss's sum: it asks for no memory that another kernel has to prepare."""
    asked = []

    def empty(size):
        asked.append(torch.empty(size, dtype=torch.uint8))
        return asked[-1].data_ptr()

    logits, target = torch.randn(rows, classes), torch.arange(rows) % classes
    loss, grad = row_loss(module, logits, target, empty)
    assert len(asked) == launches - 1
    helpers.assert_as_accurate(loss, grad, target, helpers.truth(logits, target, EXPRESSIONS["anl_ce"]))


SHAPES = mainly(
    [(7, 6), (3, 3000), (2, 6, 5)], [(7, 6), (40, 33), (5, 700), (3, 3000), (2, 20_001), (2, 6, 5), (3, 40, 4)]
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("label", [thorough(-1), "classes", 2**40], ids=str)
def test_a_label_out_of_bounds_is_a_row_of_nan(device, shape, label):
    """That row alone is NaN; the others' gradients are divided by the number of rows that are not ignored."""
    rows, classes = math.prod(shape) // shape[1], shape[1]
    logits = helpers.randn(shape, generator=helpers.generator(0)) * 3
    labels = helpers.randint(classes, (rows,), generator=helpers.generator(1))
    bad = rows // 2
    clean = labels.clone()
    labels[bad] = classes if label == "classes" else label
    target = labels.view(shape[0], *shape[2:])
    others = torch.arange(rows) != bad
    exact = helpers.on_cpu(oracle.loss_and_grad)
    clean_loss, clean_grad = exact(logits, clean.view(target.shape), EXPRESSIONS["anl_ce"])
    for build in (helpers.expression, helpers.row_loss_expression):
        for keywords in (dict(), dict(recompute=True), dict(reduction="none"), dict(weight=torch.rand(classes) + 1)):
            if "weight" in keywords and build is helpers.row_loss_expression:
                continue
            given = logits.clone().requires_grad_()
            loss = ak.robust_loss(given, target, build(EXPRESSIONS["anl_ce"]), backend="cuda", **keywords)
            loss.sum().backward()
            grad = oracle.as_rows(given.grad)
            assert loss.reshape(-1).isnan().tolist() == ([True] if loss.dim() == 0 else (~others).tolist())
            assert grad[bad].isnan().all()
            assert grad[others].isfinite().all()
            if keywords in (dict(), dict(recompute=True)):
                torch.testing.assert_close(
                    grad[others].cpu().double(), oracle.as_rows(clean_grad)[others.cpu()], rtol=1e-4, atol=1e-7
                )
    assert clean_loss.isfinite()


@pytest.mark.parametrize("name", ["anl_ce", "anl_fl"])
def test_targets_at_the_edges_and_in_every_pack_of_a_long_row(device, name):
    """A row begins and ends within 16 bytes, each in its own way; a thread takes several packs at a time."""
    classes = 1901
    labels = torch.tensor([*range(9), *range(100, 1800, 61), *range(classes - 9, classes)], device="cpu")
    values = torch.randn(len(labels), classes, generator=helpers.generator(0), device="cpu") * 4
    helpers.check(helpers.away_from_clamp(values), labels, EXPRESSIONS[name], backend="cuda")


@pytest.mark.parametrize("classes", [*range(29, 34), *range(61, 66), *range(125, 130)])
def test_edges_of_rows_that_fill_their_lanes(device, classes):
    """They begin within 16 bytes, as does the gradient in their place, and need a power of two or just more."""
    values, labels = helpers.rows_of_every_kind(classes, torch.float32)
    values, labels, criterion = values.cpu(), labels.cpu(), helpers.expression(EXPRESSIONS["anl_ce"])
    true = helpers.truth(values, labels, EXPRESSIONS["anl_ce"])
    for start in range(4):
        room = torch.zeros(start + values.numel(), device="cpu")
        logits = room[start:].view(values.shape).copy_(values)
        result = helpers.calculate(logits, labels, criterion, leaf=False, inplace=True, backend="cuda")
        helpers.assert_as_accurate(*result, labels, true)


@pytest.mark.parametrize("classes", [35, 403, 1899, 8003])
def test_a_gradient_aligned_otherwise_than_its_logits(device, classes):
    """Their rows begin at 16 bytes each, the gradient's do not."""
    values, labels = helpers.rows_of_every_kind(classes, torch.float32)
    for rows in (3, len(labels)):
        logits = helpers.LAYOUTS["padded"](values[:rows].cpu())
        helpers.check(logits, labels[:rows].cpu(), EXPRESSIONS["anl_ce"], backend="cuda")


@pytest.mark.parametrize("start", [0, 1, 3])
def test_the_edges_of_a_gradient_from_coefficients(device, start):
    """A tile's number of classes that begin within 16 bytes."""
    values, labels = helpers.rows_of_every_kind(1024, torch.float32)
    room = torch.zeros(16 + len(labels) * 1028, device="cpu")
    logits = room[start:].as_strided((len(labels), 1024), (1028, 1), start).copy_(values)
    helpers.check(logits, labels, EXPRESSIONS["anl_ce"], backend="cuda", recompute=True)


def checked_call(**changes):
    """What the backend's functions read of a checked call."""
    values = dict(terms=((0, 1.0, 0.0, 0.0),), min_prob=1e-7, gamma=None, needs=0, ignore_index=-100, reduction="none")
    return Call(**{"backend": "cuda", **values, **changes})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_labels_changed_between_forward_and_backward_touch_their_own_rows_alone(device, shape):
    rows, classes = math.prod(shape) // shape[1], shape[1]
    logits = helpers.randn(shape, generator=helpers.generator(0))
    target = helpers.randint(classes, (rows,), generator=helpers.generator(1)).view(shape[0], *shape[2:])
    coefs = ak.layout.new_coefs(logits, target)
    cuda.row_loss(checked_call(), logits, target, None, None, coefs)
    expected = oracle.as_rows(cuda.row_grad(checked_call(), logits, target, coefs, None, None))
    for label in (classes, 2**40, -7, -(2**62)):
        changed = target.clone()
        changed.view(-1)[rows // 2] = label
        grad = oracle.as_rows(cuda.row_grad(checked_call(), logits, changed, coefs, None, None))
        others = torch.arange(rows) != rows // 2
        assert torch.equal(grad[others], expected[others])


@pytest.mark.parametrize("argument", ["logits", "target", "weight", "grad", "coefs", "grad_output"])
def test_a_tensor_without_memory_is_refused_by_name(module, argument):
    x, target = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    coefs, output = torch.ones(NUM_COEFS, 4), torch.ones(4)
    given = dict(logits=x, target=target, weight=torch.ones(6), grad=x.clone(), coefs=coefs, grad_output=output)
    given[argument] = torch._efficientzerotensor(given[argument].shape, dtype=given[argument].dtype)
    x, target, weight, grad, coefs, output = given.values()
    said = {"grad": "the gradient"}.get(argument, argument)
    with pytest.raises(TypeError, match=f"{said} is a ZeroTensor without memory"):
        if argument == "grad_output":
            cuda.row_grad(checked_call(), x, target, coefs, output, None)
        else:
            cuda.row_loss(checked_call(), x, target, weight, grad, coefs)


def test_the_module_refuses_null_pointers_by_name(module):
    x, y, out = torch.randn(4, 6).data_ptr(), torch.zeros(4, dtype=torch.int64).data_ptr(), torch.zeros(4).data_ptr()
    program, where = module.Program([(0, 1.0, 0.0, 0.0)], 1e-7, 0.0, 0), module.Where(-1, 0, lambda size: 0)
    at = ((4, 6, 1), (6, 1, 0))
    for logits, target, loss, what in ((0, y, out, "the logits"), (x, 0, out, "the target"), (x, y, 0, "the loss")):
        with pytest.raises(ValueError, match=f"no memory is given for {what}"):
            module.row_loss(program, 0, at[0], logits, at[1], 0, at[1], target, 0, -100, 0, 0, loss, 0, where)


@pytest.mark.parametrize("classes", [10, 700, 3000])
def test_nothing_but_ignored_rows(device, classes):
    logits = torch.full((5, classes), math.nan, requires_grad=True)
    target = torch.full((5,), -100)
    for recompute in (False, True):
        loss = ak.anl_ce(logits, target, backend="cuda", recompute=recompute)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isnan() and (grad == 0).all()
    assert ak.anl_ce(logits, target, backend="cuda", reduction="sum") == 0


def test_a_batch_without_rows(module):
    logits, target = torch.empty(0, 10, requires_grad=True), torch.empty(0, dtype=torch.int64)
    assert ak.anl_ce(logits, target, backend="cuda").isnan()
    assert ak.anl_ce(logits, target, backend="cuda", reduction="sum", entropy_weight=1.0) == 0
    assert ak.anl_ce(logits, target, backend="cuda", reduction="none").shape == (0,)
    for shape in ((0, 10), (0, 10, 4), (3, 10, 0)):  # as where other processes have rows
        assert torch.equal(cuda.column_sums(torch.empty(shape), torch.empty(NUM_COEFS, 0)), torch.zeros(10).double())


def test_scaling_by_one_writes_nothing(module):
    grad = torch.randn(6, 5)
    version, before = grad._version, grad.clone()
    assert cuda.scaled(grad, torch.ones(()), keep=False) is grad
    assert torch.equal(grad, before) and grad._version == version
    assert torch.equal(cuda.scaled(grad, torch.tensor(3.0), keep=True), 3 * before)
    assert torch.equal(cuda.scaled(grad, torch.tensor(3.0), keep=False), 3 * before)


def in_several_runs(values):
    """Images of 12 pixels, channels last, with more pixels between them."""
    room = torch.full((len(values) // 12, 14, values.shape[1]), math.nan, device="cpu")
    return room[:, :12].copy_(values.view(-1, 12, values.shape[1])).movedim(2, 1)


COLUMN_LAYOUTS = {**helpers.LAYOUTS, "in_several_runs": in_several_runs}


@pytest.mark.parametrize("layout", COLUMN_LAYOUTS)
@pytest.mark.parametrize("classes", [9, 70])
def test_column_sums(device, classes, layout):
    """Rows in several chunks, one of which is ignored and NaN."""
    values = torch.randn(132, classes, generator=helpers.generator(0), device="cpu") * 3
    coefs = torch.zeros(NUM_COEFS, len(values), device="cpu")
    coefs[0], coefs[1] = values.amax(1), 1 / (values - values.amax(1, keepdim=True)).exp().sum(1)
    expected = values.double().softmax(1)[1:].sum(0)
    values[0], coefs[:2, 0] = math.nan, 0.0
    logits = helpers.moved(COLUMN_LAYOUTS[layout](values), torch.get_default_device().type)
    sums = cuda.column_sums(logits, helpers.handed_out(coefs))
    torch.testing.assert_close(sums.cpu(), expected, rtol=1e-5, atol=0)


SCALED = {  # the gradient as a view of a larger tensor
    "rows": lambda room: room[0, :, :1024],
    "rows that begin within 16 bytes": lambda room: room[0, :, 3:1027],
    "a hole": lambda room: room[:, :4, ::3],
    "transposed": lambda room: room[1].t(),
    "a run of memory": lambda room: room.movedim(1, 2),
    "one class": lambda room: room[:, :1],
    "one number": lambda room: room[0, :1, 5:6],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", SCALED)
def test_scaling(module, dtype, view):
    """Every element once, by a factor of any dtype, and nothing around them."""
    room = torch.randn(2, 6, 1031, generator=helpers.generator(0)).to(dtype)
    expected = room.clone()
    SCALED[view](expected).mul_(3.0)
    for factor_dtype in (torch.float32, torch.float64):
        scaled = room.clone()
        cuda.scaled(SCALED[view](scaled), torch.tensor(3.0, dtype=factor_dtype), keep=False)
        assert torch.equal(scaled, expected)


def test_a_failing_call_is_an_error(module):
    with pytest.raises(RuntimeError, match=r"anl_kernels: .*device.* failed: .*cuda"):
        row_loss(module, torch.randn(4, 6), torch.zeros(4, dtype=torch.int64), None, device=77)


def test_the_device_is_the_current_one_while_a_call_is_launched(module):
    """And the one before is current again then."""
    from cuda_on_host import adapter

    library = adapter.loaded()[1]
    assert library.anl_host_use_device(H100) == 0
    assert module.plan_for(FLOAT32, (1024, 100_000, 1), (100_000, 1, 0), A100)["kernel"] == "rows_split"
    assert module.plan_for(FLOAT32, (1024, 100_000, 1), (100_000, 1, 0), -1)["kernel"] == "rows_cluster"


@pytest.mark.parametrize(
    ("device", "compiled", "arch"),
    [
        *((A100, archs, 80 if bad else None) for archs, bad in (("80", 0), ("86", 1), ("90+PTX", 1), ("86;80", 0))),
        *((H100, archs, 90 if bad else None) for archs, bad in (("80", 1), ("80+PTX", 0), ("90", 0), ("100+PTX", 1))),
        *((RTX4090, archs, 89 if bad else None) for archs, bad in (("80", 0), ("86", 0), ("90", 1), ("120+PTX", 1))),
        *((B200, archs, 100 if bad else None) for archs, bad in (("80;90", 1), ("80;90+PTX", 0), ("100", 0))),
    ],
)
def test_what_the_kernels_were_compiled_for(module, device, compiled, arch):
    """Machine code runs on later GPUs of the same generation, PTX on all that are newer. arch: the GPU's, where not."""
    why_not = module.why_not(device, compiled)
    if arch is None:
        assert why_not == ""
    else:
        assert f"compiled for sm {compiled}, and the GPU is sm {arch}: " in why_not
        assert why_not.endswith(f"ANL_KERNELS_CUDA_ARCHS={arch}")


# ---- the module that nvcc built

BUILT = importlib.util.find_spec("anl_kernels._cuda") is not None
needs_module = pytest.mark.skipif(not BUILT, reason="anl_kernels._cuda is not built (no nvcc)")


@needs_module
def test_the_module_loads_without_torch_and_without_a_driver():
    code = (
        "import importlib.util, sys\n"
        f"path = {importlib.util.find_spec('anl_kernels._cuda').origin if BUILT else ''!r}\n"
        "spec = importlib.util.spec_from_file_location('anl_kernels._cuda', path)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.info()['archs'], module.why_not(-1), sep='|')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    archs, why_not = result.stdout.strip().split("|")
    assert archs and all(arch.removesuffix("+PTX").isdigit() for arch in archs.split(";"))
    if not torch.cuda.is_available() and not Path("/dev/nvidiactl").exists():
        assert why_not.startswith(("there is no NVIDIA driver here", "there is no usable NVIDIA GPU here"))


@needs_module
@pytest.mark.skipif(devices.GPU is not None, reason="it can run here")
def test_why_it_cannot_run_is_said():
    unseen = {"min_prob": 3e-7}  # keywords of no other test: a call that was checked before is not asked again
    reasons = {b.name: b.reason for b in ak.backends() if not b.available}
    assert "NVIDIA" in reasons["cuda"]
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this call: .*NVIDIA"):
        ak.anl_ce(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64), backend="cuda", **unseen)
    with pytest.raises(RuntimeError, match="ANL_KERNELS_BACKEND='cuda'"):
        os.environ["ANL_KERNELS_BACKEND"] = "cuda"
        try:
            ak.anl_ce(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64), **unseen)
        finally:
            del os.environ["ANL_KERNELS_BACKEND"]


@pytest.mark.parametrize("y", [0, 1, 8, 300])
def test_the_target_is_in_no_other_class_s_way(device, y):
    """Where it towers over the others, their exps must not be taken about its logit: they would all be 0."""
    logits = torch.zeros(1, 512, dtype=torch.bfloat16)
    logits[0, y] = 88.0
    loss = ak.cross_entropy(logits, torch.tensor([y]), backend="cuda")
    assert loss.item() == pytest.approx(511 * math.exp(-88.0), rel=1e-3, abs=0.0)
