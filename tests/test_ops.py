"""torch.compile and the operators it sees: one graph, the same numbers, opcheck."""

import contextlib

import helpers
import pytest
import torch
from helpers import EXPRESSIONS, THERE, expression
from tiers import mainly, thorough
from torch.testing._internal.two_tensor import TwoTensor

import anl_kernels as ak
from anl_kernels import ops
from anl_kernels.row_math import ANY_NEEDS

pytestmark = pytest.mark.unpoisoned
CASES = {
    "default": dict(),
    "none": dict(reduction="none"),
    "sum_recompute": dict(reduction="sum", recompute=True),
    "weight": dict(weight=torch.linspace(0.5, 2, 33)),
    "ignore": dict(ignore_index=3, min_prob=1e-4),
    "entropy": dict(entropy_weight=0.5),
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def problem(dtype=torch.float32, shape=(7, 33)):
    g = helpers.generator(0)
    logits = (helpers.randn(shape, generator=g) * 4).to(dtype)
    return logits, helpers.randint(shape[1], (shape[0], *shape[2:]), generator=g)


def loss_and_grad(function, logits, target):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, target)
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 2.5))
    return loss.detach(), grad


def compare(function, logits, target, compiler, **tolerance):
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    expected = loss_and_grad(function, logits, target)
    for _ in range(2):
        torch.testing.assert_close(loss_and_grad(compiled, logits, target), expected, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(compiled(logits, target), expected[0], **tolerance)


CLOSE = dict(rtol=2e-6, atol=1e-8)


@THERE
@pytest.mark.few(case=["entropy"])
@pytest.mark.parametrize("case", mainly(("none", "entropy", "sum_recompute"), CASES))
def test_compiled_in_one_graph(one_fused, case):
    """fullgraph=True, traced and differentiated ahead of time."""
    keywords = helpers.handed_out_of(CASES[case])
    compare(lambda z, y: ak.anl_fl(z, y, backend=one_fused.name, **keywords), *problem(), "aot_eager", **CLOSE)


def test_the_reference_compiles():
    compare(lambda z, y: ak.anl_ce(z, y, backend="reference", entropy_weight=0.5), *problem(), "aot_eager", **CLOSE)


@THERE
@pytest.mark.few(dtype=[torch.float16])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float64, (33, 7, 5)), (torch.bfloat16, (9, 33, 2, 3)), (torch.float16, (7, 33))],
    ids=["float64", "bfloat16", "float16"],
)
def test_compiled_dtypes_and_shapes(one_fused, dtype, shape):
    tolerance = dict(rtol=1.6e-2, atol=1e-6) if dtype == torch.bfloat16 else dict(rtol=2e-3, atol=1e-5)
    compare(lambda z, y: ak.anl_ce(z, y, backend=one_fused.name), *problem(dtype, shape), "aot_eager", **tolerance)


@THERE
@pytest.mark.few(tier="thorough")
def test_compiled_row_loss(one_fused):
    criterion = 2 * ak.RowLoss(lambda s: -s.target_log_prob / s.neg_log_sum) + 0.5 * ak.RCE()
    compare(lambda z, y: criterion(z, y, backend=one_fused.name), *problem(), "aot_eager", **CLOSE)


@THERE
@pytest.mark.thorough
@pytest.mark.not_emulated("a GPU's compiler")
def test_compiled_by_inductor(one_fused):
    """The compiler people use, around a layer; gradients of its weights. Nothing comes from an earlier run's cache."""
    g = helpers.generator(1)
    x, weight, target = helpers.randn(7, 5, generator=g), helpers.randn(33, 5, generator=g), problem()[1]

    def function(w, y):
        logits = torch.nn.functional.linear(x, w).relu() * 2
        knobs = dict(backend=one_fused.name)
        return ak.anl_ce(logits, y, **knobs) + ak.anl_fl(logits * 0.5, y, entropy_weight=0.5, **knobs)

    with torch._inductor.config.patch(force_disable_caches=True):
        compare(function, weight, target, "inductor", rtol=1e-4, atol=1e-6)


def test_compiled_module_with_sizes_that_change(cpu):
    """One dynamic graph for any number of rows: no recompilation for each."""
    criterion = ak.ANLCELoss(alpha=5.0, beta=5.0, backend="cpu")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager", dynamic=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for rows in (4, 6, 9, 13):
        logits, target = problem(shape=(rows, 33))
        torch.testing.assert_close(
            loss_and_grad(compiled, logits, target), loss_and_grad(criterion, logits, target), **CLOSE
        )
    assert counters["stats"]["unique_graphs"] <= 2


def test_compiled_refuses_in_place(cpu):
    logits, target = problem()
    compiled = torch.compile(
        lambda z, y: ak.anl_ce(z * 1, y, inplace=True, backend="cpu"), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="inplace"):
        compiled(logits.requires_grad_(), target)


def test_double_backward_names_the_way_out_when_compiled(cpu):
    logits, target = problem()
    compiled = torch.compile(lambda z, y: ak.anl_ce(z, y, backend="cpu"), fullgraph=True, backend="eager")
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(compiled(logits, target), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        grad.sum().backward()


@pytest.mark.parametrize("of", ["logits", "target"])
def test_compiled_with_a_wrapper_subclass(cpu, of):
    given = dict(zip(("logits", "target"), problem()))
    expected = ak.anl_ce(**given, backend="cpu")
    given[of] = TwoTensor(given[of], given[of].clone())
    compiled = torch.compile(lambda z, y: ak.anl_ce(z, y, backend="cpu"), fullgraph=True, backend="aot_eager")
    loss = compiled(**dict(zip("zy", given.values())))
    torch.testing.assert_close(getattr(loss, "a", loss), expected)


# ---- compiled autograd: an eager forward pass, whose backward pass is traced


TRACED = {
    "default": (lambda: ak.ANLCELoss(5.0, 5.0), dict()),
    "recompute": (lambda: ak.ANLFLLoss(), dict(recompute=True)),
    "none": (lambda: ak.NCE() + ak.RCE(), dict(reduction="none", weight=torch.linspace(0.5, 2, 33))),
    "entropy": (lambda: ak.NCE() + ak.NNCE(), dict(entropy_weight=0.5)),
    "row_loss": (lambda: ak.RowLoss(lambda s: -s.target_log_prob / s.neg_log_sum), dict()),
    "row_loss_entropy": (lambda: ak.RowLoss(lambda s: s.neg_log_sum), dict(entropy_weight=0.5)),
    "inplace": (lambda: ak.NCE() + ak.RCE(), dict(inplace=True)),
}


@THERE
@pytest.mark.few(case=["default"])
@pytest.mark.parametrize("case", mainly(("default", "row_loss_entropy", "inplace"), TRACED))
def test_compiled_autograd_over_an_eager_forward(one_fused, case):
    """The tracer sees operators, never the address of a tensor that is gone when the graph runs."""
    build, keywords = TRACED[case]
    criterion = build()
    criterion = getattr(criterion, "expression", criterion)
    values, target = problem()
    keywords = dict(helpers.handed_out_of(keywords), backend=one_fused.name)

    def gradient(logits, compiler):
        logits = logits.clone().requires_grad_()
        loss = criterion(logits * 1.0, target, **keywords)
        loss = (loss * torch.linspace(1, 2, len(values))).sum() if loss.dim() else loss * 2
        with compiler:
            loss.backward()
        return logits.grad

    for logits in (values, values.flip(1), values * 0.5):  # a graph that is kept reads the tensors of its own call
        compiler = torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True))
        expected = gradient(logits, contextlib.nullcontext())
        torch.testing.assert_close(gradient(logits, compiler), expected, **CLOSE)


# ---- the operators


def terms_of(name):
    return [
        float(number)
        for coef, term in expression(EXPRESSIONS[name]).terms
        for number in (term.kind, coef, *term.parameters)
    ]


def operator_calls(dtype, shape):
    """operator, arguments: every operator of the package, as the package calls it."""
    logits, target = problem(dtype, shape)
    needs, gamma, weight = ANY_NEEDS, 0.5, torch.linspace(0.5, 2, shape[1])
    for reduction in ("mean", "none"):
        numbers = (terms_of("anl_fl"), 1e-7, gamma, needs, -100, reduction, "cpu", True)
        yield ops.row_loss, (logits.clone().requires_grad_(), target, weight, *numbers)
        yield ops.row_loss, (logits.clone().requires_grad_(), target, None, *numbers)
    for with_sums in (False, True):
        yield ops.row_stats, (logits.clone().requires_grad_(), target, 1e-7, gamma, needs, -100, with_sums, "cpu", True)
    _, coefs = ops.row_loss(logits, target, None, terms_of("anl_fl"), 1e-7, gamma, needs, -100, "none", "cpu", True)
    output = torch.ones(target.shape, dtype=helpers.acc(dtype))
    yield ops.row_grad, (logits, target, coefs, output, None, 1e-7, gamma, needs, "cpu")
    yield (
        ops.row_grad,
        (logits, target, coefs, None, torch.ones(shape[1], dtype=torch.float64), 1e-7, gamma, needs, "cpu"),
    )


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [thorough(torch.float32, (7, 33)), thorough(torch.float64, (4, 5, 3)), (torch.bfloat16, (7, 33))],
    ids=str,
)
def test_opcheck(cpu, dtype, shape):
    """Schema, fakes and autograd registration of each operator, also with symbolic shapes."""
    for operator, arguments in operator_calls(dtype, shape):
        torch.library.opcheck(operator, arguments)


def test_only_the_loss_has_a_gradient(cpu):
    """The coefficients go to backward; a gradient by them would be dropped."""
    for operator, arguments in operator_calls(torch.float32, (4, 5)):
        if operator is ops.row_loss:
            loss, coefs = operator(*arguments)
            assert loss.requires_grad and not coefs.requires_grad


def test_every_operator_is_checked(cpu):
    checked = {operator._opoverload.name() for operator, _ in operator_calls(torch.float32, (4, 5))}
    prefix = "anl_kernels::"
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert {name.split(".")[0] for name in ours} == {name.split(".")[0] for name in checked}


def test_fakes_know_shapes_dtypes_and_strides(cpu):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for shape in ((6,), (4, 6), (4, 6, 5)):  # a row by itself, too
        results = []
        for mode in (contextlib.nullcontext(), FakeTensorMode()):
            with mode:
                logits = torch.zeros(shape)
                target = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
                results.append(ops.row_stats(logits, target, 1e-7, 0.5, ANY_NEEDS, -100, True, "cpu", True))
        assert [(x.shape, x.dtype) for x in results[0]] == [(x.shape, x.dtype) for x in results[1]]
    for dtype in (torch.float32, torch.float64, torch.float16):
        with FakeTensorMode():
            logits = torch.empty(4, 6, 5, dtype=dtype).requires_grad_()
            loss = ak.anl_ce(logits, torch.zeros(4, 5, dtype=torch.int64), reduction="none", backend="cpu")
            (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.shape == (4, 5) and loss.dtype == helpers.acc(dtype)
        assert grad.shape == logits.shape and grad.dtype == dtype and grad.stride() == logits.stride()
