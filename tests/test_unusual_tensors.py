"""Tensors whose memory is not their values, or which have none: the right numbers, or an error that says why."""

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives
from helpers import EXPRESSIONS, expression
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import anl_kernels as ak
from anl_kernels.reduction import mean_as_sum

CLASSES = 200  # 156 is -100 in 8 bits
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
LOSSES = {
    "anl_ce": lambda: expression(EXPRESSIONS["anl_ce"]),
    "row_loss": lambda: ak.RowLoss(lambda s: -s.target_log_prob / s.neg_log_sum),
}


@pytest.fixture(scope="module", autouse=True)
def group():
    """One process that has a group: collectives and DTensors for what they look like, not for what they move."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class OfPython(torch.Tensor):
    pass


class OfPythonWithoutFunctions(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


def gathered(tensor):
    return torch.distributed._functional_collectives.all_gather_tensor(tensor.contiguous(), 0, dist.group.WORLD)


def distributed(tensor, placement):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [placement])


def replicated(tensor):
    from torch.distributed.tensor import Replicate

    return distributed(tensor, Replicate())


def sharded(tensor):
    from torch.distributed.tensor import Shard

    return distributed(tensor, Shard(0))


def negated(tensor):
    """A view with the lazy minus sign that the imaginary part of a conjugate has."""
    result = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert result.is_neg()
    return result


RIGHT = {
    "async_collective": gathered,
    "dtensor": replicated,
    "of_python": lambda t: t.as_subclass(OfPython),
    "of_python_without_functions": lambda t: t.as_subclass(OfPythonWithoutFunctions),
    "wrapper": lambda t: TwoTensor(t, t.clone()),
    "negated": negated,  # every other number of its memory, which any copy writes out
    "negated_in_one_run": lambda t: torch._neg_view(-t),
}
REFUSED = {
    "sharded": sharded,
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "list": lambda t: t.tolist(),
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}
SAID = {  # of the role, by the package or by PyTorch
    "sharded": "DTensor",
    "fake": "FakeTensor",
    "meta": "{0} (are|is) on|{0} is on meta|got meta",
    "sparse": "dense tensor|Contiguous|[sS]parse|storage",
    "list": "{0} must be a tensor, got list|gradients can be either Tensors or None",
    "zero": "{0} is a ZeroTensor without memory",
}
ROLES = ("logits", "target", "weight", "grad_output")


def arguments():
    g = helpers.generator(0)
    return {
        "logits": helpers.randn(6, CLASSES, generator=g) * 4,
        "target": torch.tensor([0, 156, 2, -100, 5, 199]),
        "weight": torch.linspace(0.5, 2, CLASSES),
        "grad_output": torch.linspace(-1, 1, 6),
    }


def results(loss, backend, logits, target, weight, grad_output, recompute=None):
    logits = logits.detach().requires_grad_() if isinstance(logits, torch.Tensor) else logits
    out = loss(logits, target, weight=weight, reduction="none", recompute=recompute, backend=backend)
    (grad,) = torch.autograd.grad(out, logits, grad_output)
    return local(out.detach()), local(grad)


def local(tensor):
    tensor = getattr(tensor, "_local_tensor", tensor)
    tensor = tensor.a if isinstance(tensor, TwoTensor) else tensor
    tensor = tensor.wait() if hasattr(tensor, "wait") else tensor
    return tensor.as_subclass(torch.Tensor)


@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", RIGHT)
def test_tensors_that_hold_their_values_elsewhere(one_fused, kind, role, loss):
    """Each argument in turn; and what comes back is what the plain tensor gives, in whatever tensor."""
    if one_fused.on_gpu:
        pytest.skip("the process group is one of CPUs")
    given = arguments()
    if kind.startswith("negated") and role == "target":
        pytest.skip("integers have no lazy minus sign")
    if kind == "dtensor" and role == "grad_output":
        pytest.skip("PyTorch does not mix DTensors with other tensors")
    expected = results(LOSSES[loss](), one_fused.name, **given)
    given[role] = RIGHT[kind](given[role])
    torch.testing.assert_close(results(LOSSES[loss](), one_fused.name, **given), expected, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        out = LOSSES[loss]()(
            *list(given.values())[:2], weight=given["weight"], reduction="none", backend=one_fused.name
        )
    torch.testing.assert_close(local(out), expected[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_without_values_are_refused(cpu, kind, role, loss):
    """No address 0 is read, and no class weight with address 0 is taken for none."""
    given = arguments()
    if kind == "zero" and (role == "grad_output" or (role == "weight" and loss == "row_loss")):
        expected = results(LOSSES[loss](), "cpu", **given | {role: torch.zeros_like(given[role])})
        got = results(LOSSES[loss](), "cpu", **given | {role: REFUSED[kind](given[role])})
        torch.testing.assert_close(got, expected)
        return
    given[role] = REFUSED[kind](given[role])
    with pytest.raises((TypeError, ValueError, RuntimeError, AssertionError), match=SAID[kind].format(role)):
        results(LOSSES[loss](), "cpu", **given)


@pytest.mark.parametrize("name", ["logits", "target", "weight"])
def test_a_refused_dtensor_is_named(cpu, name):
    given = arguments() | {name: sharded(arguments()[name])}
    with pytest.raises(ValueError, match=rf"DTensor {name}.*to_local|DTensor {name}.*full_tensor"):
        results(LOSSES["anl_ce"](), "cpu", **given)


class Asked(torch.Tensor):
    """Answers functions with what it is asked."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (ak.robust_loss, ak.linear_robust_loss):
            return args, kwargs
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("function", [ak.robust_loss, ak.linear_robust_loss])
def test_a_subclass_is_asked_with_every_argument_under_its_name(function, group):
    given = arguments()
    given = {name: given[name].as_subclass(Asked) for name in ("logits", "target", "weight")}
    values = dict(
        bias=given["weight"], class_weight=given["weight"] + 1, weight=given["weight"], ignore_index=-3,
        reduction="sum", entropy_weight=0.25, min_prob=1e-4, inplace=True, recompute=False, backend="cpu",
        class_group=group, batch_group=dist.new_group([0]), max_chunk_bytes=77,
    )  # fmt: skip
    named = [name for name in function.__kwdefaults__ if name != "input"]
    tensors = ("logits", "target") if function is ak.robust_loss else ("logits", "weight", "target")
    positional = (*map(given.get, tensors), ak.NCE())
    args, keywords = function(*positional, **{name: values[name] for name in named})
    assert list(map(id, args)) == list(map(id, positional))
    assert {name: id(x) for name, x in keywords.items()} == {name: id(values[name]) for name in named}


def test_a_graph_through_a_subclass(cpu):
    """The gradient reaches what the subclass was made of."""
    given, grads = arguments(), []
    for wrap in (lambda t: t, RIGHT["of_python"], negated):
        leaf = given["logits"].clone().requires_grad_()
        hidden = wrap(leaf * 2) if wrap is not negated else torch.complex(torch.zeros_like(leaf), -leaf * 2).conj().imag
        ak.anl_ce(hidden, given["target"], weight=given["weight"]).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1:], grads[:1] * 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_shared_mean_counts_narrow_labels_as_wide_ones(dtype):
    """-100 is 156 in 8 bits, and 255 classes are more than 8 bits count with a sign."""
    labels = [0, 156, 2, 199, 200]
    call = lambda: None
    call.ignore_index, call.batch_group = -100, None
    scale, nothing = mean_as_sum(torch.tensor(labels, dtype=dtype), None, call, 300, torch.float64)
    assert torch.equal(scale, torch.full((300,), 0.2, dtype=torch.float64)) and nothing == 0


# ---- what records calls in place of running them


def test_jit_trace_records_the_loss(cpu):
    """A trace has the operator, not the numbers of the call that made it."""
    given = arguments()
    other = given["logits"].flip(1)
    for keywords in (dict(), dict(entropy_weight=0.5), dict(recompute=True)):
        f = lambda z, y, k=keywords: ak.anl_ce(z, y, backend="cpu", **k)
        traced = torch.jit.trace(f, (given["logits"], given["target"]))
        leaf = other.clone().requires_grad_()
        torch.testing.assert_close(traced(other, given["target"]), f(other, given["target"]))
        torch.testing.assert_close(
            torch.autograd.grad(traced(leaf, given["target"]), leaf),
            torch.autograd.grad(f(leaf, given["target"]), leaf),
        )


@pytest.mark.parametrize(
    "build",
    [
        lambda: lambda z, y: ak.anl_ce(z * 2, y, alpha=5.0),
        lambda: lambda z, y: (5 * ak.NCE() + ak.RCE())(z * 2, y, reduction="sum"),
        lambda: ak.ANLFLLoss(2.0, 3.0),
    ],
    ids=["function", "expression", "module"],
)
def test_fx_symbolic_trace_records_the_loss(cpu, build):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = build()

        def forward(self, z, y):
            return self.loss(z, y)

    given, model = arguments(), Model()
    graph = torch.fx.symbolic_trace(model)
    other = given["logits"].flip(1)
    torch.testing.assert_close(graph(other, given["target"]), model(other, given["target"]))


def test_dispatch_modes_see_the_operators(cpu):
    """What counts, logs or selects operators (selective checkpointing) finds one, and the numbers are the same."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    given = arguments()
    expected = results(LOSSES["anl_ce"](), "cpu", **given)
    with Mode():
        torch.testing.assert_close(results(LOSSES["anl_ce"](), "cpu", **given), expected)
        with pytest.raises(ValueError, match="TorchDispatchMode"):
            ak.anl_ce(given["logits"] * 1, given["target"], inplace=True)
    assert "anl_kernels.row_loss.default" in seen
