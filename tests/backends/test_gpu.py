"""What only a GPU has: streams, graphs, several devices, and a host that must not wait.

The emulated device has one stream and no graphs: there these tests run, but the order of launches is not tested.
"""

import devices
import helpers
import pytest
import torch
from helpers import EXPRESSIONS, expression

import anl_kernels as ak

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]  # the fill of fresh memory would be captured, and waits
# Kernels of the CUDA backend, and shapes that take them: on a GPU, and on the small device of the emulation.
SHAPES = {
    "small": ((128, 10), (12, 37)),
    "small_many": ((4096, 1000), (70, 10)),
    "block": ((512, 5000), (8, 403)),
    "cluster": ((64, 131_072), (4, 3001)),
    "split": ((1, 1_000_003), (1, 5003)),
    "spatial": ((2, 21, 64, 64), (2, 6, 5)),
}
WAYS = {
    "forward": dict(),
    "recompute": dict(recompute=True),
    "none": dict(reduction="none"),
    "entropy": dict(entropy_weight=0.5),
    "weight": dict(weight=True),
    "row_loss": dict(),
}


@pytest.fixture
def gpu(gpu_backend):
    """torch.cuda, or what the emulated device has of it."""
    return torch.get_device_module(devices.GPU)


class Problem:
    """Logits and labels in static buffers on the GPU, and the calls of one way."""

    def __init__(self, gpu_backend, shape, way="forward", device=devices.GPU):
        self.shape, self.way = SHAPES[shape][devices.EMULATED], way
        self.logits = torch.full(self.shape, torch.nan, device=device, requires_grad=True)
        self.target = torch.zeros(self.shape[:1] + self.shape[2:], dtype=torch.int64, device=device)
        terms = EXPRESSIONS["anl_fl"]
        self.criterion = helpers.row_loss_expression(terms) if way == "row_loss" else expression(terms)
        self.keywords = dict(WAYS[way], backend=gpu_backend.name)
        if way == "weight":
            self.keywords["weight"] = torch.linspace(0.5, 2, self.shape[1], device=device)

    def new_values(self, seed):
        g = helpers.generator(seed)
        values = torch.randn(self.shape, generator=g) * 3
        return values, torch.randint(self.shape[1], self.target.shape, generator=g)

    def load(self, values, labels):
        """Overwrites the buffers with tensors of their device, without waiting."""
        with torch.no_grad():
            self.logits.copy_(values)
        self.target.copy_(labels)

    def step(self):
        loss = ak.robust_loss(self.logits, self.target, self.criterion, **self.keywords)
        (grad,) = torch.autograd.grad(loss.sum(), self.logits)
        return loss.detach(), grad

    def expected(self, values, labels):
        """By the reference backend, in float64."""
        logits, keywords = values.double().requires_grad_(), dict(self.keywords, backend="reference")
        keywords = {k: v.double().cpu() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        keywords.pop("recompute", None)
        loss = ak.robust_loss(logits, labels, expression(EXPRESSIONS["anl_fl"]), **keywords)
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]

    def check(self, result, values, labels):
        loss, grad = self.expected(values, labels)
        torch.testing.assert_close(result[0].cpu().double(), loss, rtol=1e-5, atol=1e-6)
        size = grad.abs().max()
        torch.testing.assert_close(result[1].cpu().double() / size, grad / size, rtol=0, atol=1e-4)


def on_gpu(device, values, labels):
    return values.to(device), labels.to(device)


# ---- streams


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_another_stream(gpu_backend, gpu, shape, way):
    """The logits come late on that stream: kernels that run on another would read NaN."""
    problem = Problem(gpu_backend, shape, way)
    values, labels = problem.new_values(0)
    there = on_gpu(devices.GPU, values, labels)
    problem.step()  # compiles, where that is needed
    stream = gpu.Stream()
    stream.wait_stream(gpu.current_stream())
    with gpu.stream(stream):
        gpu._sleep(20_000_000)
        problem.load(*there)
        result = problem.step()
    gpu.current_stream().wait_stream(stream)
    problem.check(result, values, labels)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_streams_at_once(gpu_backend, gpu, shape):
    """Neither takes the other's scratch memory or tickets."""
    problems = [Problem(gpu_backend, shape) for _ in range(2)]
    data = [problem.new_values(seed) for seed, problem in enumerate(problems)]
    for problem, values in zip(problems, data):
        problem.load(*on_gpu(devices.GPU, *values))
        problem.step()
    gpu.synchronize()
    streams, results = [gpu.Stream() for _ in problems], [[] for _ in problems]
    for _ in range(3 if devices.EMULATED else 20):
        for stream, problem, found in zip(streams, problems, results):
            with gpu.stream(stream):
                found.append(problem.step())
    gpu.synchronize()
    for problem, values, found in zip(problems, data, results):
        problem.check(found[0], *values)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


# ---- graphs


def capture(gpu, run):
    """(the results of `run`, a function that makes them anew from what the buffers then hold)."""
    if devices.EMULATED:
        results = run()
        return results, lambda: [old.copy_(new) for old, new in zip(results, run())]
    stream = gpu.Stream()
    stream.wait_stream(gpu.current_stream())
    with gpu.stream(stream):  # as PyTorch asks: first on another stream, where all is compiled and loaded
        for _ in range(3):
            run()
    gpu.current_stream().wait_stream(stream)
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        results = run()
    return results, graph.replay


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_captured_in_a_graph(gpu_backend, gpu, shape, way):
    """Forward and backward; every replay computes from the logits and labels that are in the buffers then."""
    problem = Problem(gpu_backend, shape, way)
    problem.load(*on_gpu(devices.GPU, *problem.new_values(0)))
    results, replay = capture(gpu, problem.step)
    for seed in (1, 2):
        values, labels = problem.new_values(seed)
        problem.load(*on_gpu(devices.GPU, values, labels))
        replay()
        gpu.synchronize()
        problem.check(results, values, labels)


# ---- the host does not wait


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["small", "split", "spatial"])
def test_forward_and_backward_do_not_wait_for_the_device(gpu_backend, gpu, shape, way):
    problem = Problem(gpu_backend, shape, way)
    values, labels = problem.new_values(0)
    problem.load(*on_gpu(devices.GPU, values, labels))
    problem.step()
    gpu.set_sync_debug_mode("error")
    try:
        result = problem.step()
    finally:
        gpu.set_sync_debug_mode("default")
    problem.check(result, values, labels)


def test_waiting_would_be_noticed(gpu):
    gpu.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(3, device=devices.GPU).sum().item()
    finally:
        gpu.set_sync_debug_mode("default")


# ---- several devices


@pytest.mark.parametrize("shape", SHAPES)
def test_a_device_that_is_not_the_current_one(gpu_backend, gpu, shape):
    if gpu.device_count() < 2:
        pytest.skip("one GPU")
    current, other = gpu.current_device(), torch.device(devices.GPU, 1)
    problem = Problem(gpu_backend, shape, device=other)
    values, labels = problem.new_values(0)
    problem.load(*on_gpu(other, values, labels))
    result = problem.step()
    assert {tensor.device for tensor in result} == {other} and gpu.current_device() == current
    problem.check(result, values, labels)
