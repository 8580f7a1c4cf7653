"""What the fused linear head is given besides plain tensors: subclasses, lazy, meta, fake ones; 8 and 16 bit labels."""

import logging
import os

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import anl_kernels as ak
from anl_kernels import layout, linear
from anl_kernels.backends import LaunchRefused

pytestmark = pytest.mark.usefixtures("small_chunks")
ROWS, CLASSES, WIDTH = 12, 7, 4
NAMES = ("input", "weight", "bias", "target", "class_weight")
ROUTES = {
    "in_forward": dict(),
    "recompute": dict(recompute=True),
    "none": dict(reduction="none"),
    "tiles": dict(max_chunk_bytes=200),
}


@pytest.fixture(scope="module")
def mesh():
    """One process that is a group of its own."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def problem():
    g = helpers.generator(0)
    x, w, b = (torch.randn(s, generator=g) for s in ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,)))
    target = torch.randint(CLASSES, (ROWS,), generator=g)
    return [x, w, b, target, torch.linspace(0.2, 2, CLASSES)]


def call(given, **keywords):
    x, w, b, target, class_weight = given
    loss = ak.NCE() + 2 * ak.NNCE()
    return ak.linear_robust_loss(x, w, target, loss, bias=b, class_weight=class_weight, **keywords)


class WithFunction(torch.Tensor):
    """A subclass that is Python alone."""


class WithoutFunction(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


def negated(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.is_floating_point() else x


LAZY = {
    "with_function": lambda x: x.as_subclass(WithFunction),
    "without_function": lambda x: x.as_subclass(WithoutFunction),
    "negated": negated,
    "zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
}


def assert_right_for_each(make, **keywords):
    """Each argument made unusual, the others plain: the loss, and the gradient by what is unusual."""
    for position, name in enumerate(NAMES):
        if name == "class_weight" and make is LAZY["zeros"]:
            continue  # no row counts
        for differentiate in (False, name in NAMES[:3] and make is not LAZY["zeros"]):
            plain, given = problem(), problem()
            given[position] = make(given[position])
            plain[position] = torch.zeros_like(plain[position]) if make is LAZY["zeros"] else plain[position]
            if differentiate:
                given[position] = given[position].detach().requires_grad_()
                plain[position].requires_grad_()
            expected, loss = call(plain, backend="reference", **keywords), call(given, **keywords)
            torch.testing.assert_close(loss.detach().as_subclass(torch.Tensor), expected.detach())
            if differentiate:
                (grad,) = torch.autograd.grad(loss.sum(), given[position])
                (true,) = torch.autograd.grad(expected.sum(), plain[position])
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                torch.testing.assert_close(grad.as_subclass(torch.Tensor), true)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", LAZY)
def test_lazy_tensors_and_subclasses_of_python(kind, route):
    assert_right_for_each(LAZY[kind], **ROUTES[route])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("route", ROUTES)
def test_collectives_still_under_way(mesh, route):
    """AsyncCollectiveTensor, whose own memory is null: a null pointer would mean no weight to a kernel."""
    from torch.distributed import _functional_collectives as collectives

    assert_right_for_each(lambda x: collectives.all_gather_tensor(x, 0, mesh), **ROUTES[route])


@pytest.mark.parametrize("route", ROUTES)
def test_replicated_dtensors(mesh, route):
    from torch.distributed.tensor import Replicate, distribute_tensor

    assert_right_for_each(lambda x: distribute_tensor(x, mesh, [Replicate()]), **ROUTES[route])


def test_what_is_refused_to_launch_is_made_of_logits_but_not_by_one_rank_alone(mesh, monkeypatch):
    def refuse(*arguments):
        raise LaunchRefused("too much shared memory")

    expected = call(problem(), backend="reference")
    monkeypatch.setattr(linear, "head", refuse)
    torch.testing.assert_close(call(problem()), expected)
    for keywords in (dict(backend="cpu"), dict(class_group=mesh.get_group())):
        with pytest.raises(LaunchRefused, match="shared memory"):
            call(problem(), **keywords)


def test_ranks_add_their_input_gradients_in_float32(mesh, monkeypatch):
    added = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x, **k: added.append(x.dtype) or all_reduce(x, **k))
    x, w, _, target, _ = problem()
    x, w = x.bfloat16().requires_grad_(), w.bfloat16()
    ak.linear_robust_loss(x, w, target, ak.NCE(), class_group=mesh.get_group()).backward()
    assert added == [torch.float32] and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_sharded_dtensors_are_refused_with_the_remedy(mesh, name):
    from torch.distributed.tensor import Shard, distribute_tensor

    given = problem()
    given[NAMES.index(name)] = distribute_tensor(given[NAMES.index(name)], mesh, [Shard(0)])
    remedy = {
        "input": r"input\.to_local\(\).*batch_group",
        "weight": r"weight\.full_tensor\(\).*weight\.to_local\(\) with class_group=mesh\.get_group\(\)",
        "bias": r"bias\.full_tensor\(\).*bias\.to_local\(\) with class_group=mesh\.get_group\(\)",
    }
    with pytest.raises(ValueError, match=remedy.get(name, rf"{name}\.full_tensor\(\)")):
        call(given)


def test_the_log_says_why_the_logits_are_made(mesh, caplog, monkeypatch):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    monkeypatch.setattr(layout, "_said", set())
    caplog.set_level(logging.INFO, "anl_kernels")
    call([distribute_tensor(x, mesh, [Replicate()]) for x in problem()])
    x, w, *rest = problem()
    with pytest.raises(ValueError, match="full_tensor"):
        call([x, distribute_tensor(w, mesh, [Shard(0)]), *rest])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call([mode.from_tensor(x) for x in problem()])
    assert not any("torch.compile" in record.message for record in caplog.records)
    torch.func.grad(lambda w: call([x, w, *rest]))(w)
    assert sum("torch.compile" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_and_dtypes_without_numbers(kind, route):
    """As F.linear and F.cross_entropy: the loss and the gradients of tensors that have no values."""
    mode = FakeTensorMode()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = [x.to(dtype) if x.is_floating_point() else x for x in problem()]
        given = [x.to("meta") if kind == "meta" else mode.from_tensor(x) for x in given]
        leaves = [x.requires_grad_() for x in given[:3]]
        loss = call(given, **ROUTES[route])
        assert loss.shape == ((ROWS,) if route == "none" else ()) and loss.dtype == helpers.acc(dtype)
        for leaf, grad in zip(leaves, torch.autograd.grad(loss.sum(), leaves)):
            assert grad.shape == leaf.shape and grad.dtype == dtype and grad.device == leaf.device


# ---- labels of few bits


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_labels_of_few_bits_are_compared_as_numbers(backend, route):
    """-100 is 156 in 8 bits, and 256 is 0: none of them is a class that is ignored, nor is 255 out of 256 too large."""
    cases = [
        (200, torch.uint8, -100, [156, 0, 199, 3]),
        (256, torch.uint8, -100, [255, 156, 0, 7]),
        (300, torch.uint8, 255, [255, 156, 0, 255]),
        (300, torch.uint8, 256, [255, 156, 0, 7]),  # that label cannot be: no row is ignored
        (40_000, torch.int16, -100, [32_767, 156, -100, 0]),
        (40_000, torch.int16, 65_436, [32_767, 156, 5, 0]),
        (300, torch.int32, -100, [299, 156, -100, 0]),
    ]
    for classes, dtype, ignore_index, labels in cases:
        x, w = (
            helpers.randn(4, 2, generator=helpers.generator(0)),
            helpers.randn(classes, 2, generator=helpers.generator(1)),
        )
        wide = torch.tensor(labels)
        given = dict(ignore_index=ignore_index, class_weight=torch.linspace(0.1, 2, classes))
        limit = dict(max_chunk_bytes=4 * classes) if route == "tiles" else ROUTES[route]
        results = []
        for target, options in ((wide.to(dtype), dict(limit, backend=backend)), (wide, dict(backend="reference"))):
            leaf, options = w.clone().requires_grad_(), {**ROUTES[route], **options}
            loss = ak.linear_robust_loss(x, leaf, target, ak.NCE(), **given, **options)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
        torch.testing.assert_close(*results, msg=lambda text, case=(classes, dtype): f"{case}: {text}")


def test_labels_of_few_bits_that_are_no_class():
    x, w = torch.randn(2, 2), torch.randn(200, 2)
    for reduction in ("mean", "none"):
        with pytest.raises(IndexError, match="Target 201"):
            ak.linear_robust_loss(x, w, torch.tensor([0, 201], dtype=torch.uint8), ak.NCE(), reduction=reduction)


def test_few_bits_of_labels_that_ranks_share(mesh):
    """The mean over batch_group counts class 156, and slices of the classes have it."""
    group, labels = mesh.get_group(), torch.tensor([156, 0, 199, 3])
    w = helpers.randn(200, 2, generator=helpers.generator(1))
    x = helpers.randn(4, 2, generator=helpers.generator(0))
    for narrow in (labels.to(torch.uint8), labels.to(torch.int16), labels.to(torch.int32)):
        for given in (dict(batch_group=group), dict(class_group=group), dict(class_group=group, batch_group=group)):
            for entropy_weight in (0.0, 0.5):
                expected = ak.robust_loss(F.linear(x, w), labels, ak.NNCE(), entropy_weight=entropy_weight)
                options = dict(entropy_weight=entropy_weight, **given)
                torch.testing.assert_close(ak.robust_loss(F.linear(x, w), narrow, ak.NNCE(), **options), expected)
                for route in (dict(), dict(recompute=True), dict(max_chunk_bytes=800)):
                    head = ak.linear_robust_loss(x, w, narrow, ak.NNCE(), **options, **route)
                    torch.testing.assert_close(head, expected)
