"""Backends as a fixture: every one that can run here, the CPU's once for each instruction set.

`-m gpu` selects what a machine with a GPU should run: the tests of the backends that run there, with tensors that live
there, and the tests marked so. Fresh memory is full of NaN while a test runs (poison).
"""

import gc
import importlib.util
import os

import devices
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: `poison` asks for determinism
if devices.GPU != "cuda":  # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
if devices.EMULATED:
    devices.emulate()

import tiers
from backends_under_test import cpu_module


def pytest_addoption(parser):
    tiers.add_options(parser)


def pytest_configure(config):
    tiers.add_markers(config)
    config.addinivalue_line("markers", "not_emulated(why): what only a real GPU has")
    config.addinivalue_line("markers", "unpoisoned: fresh memory is left as the allocator gives it")
    if devices.GPU != "cuda" and importlib.util.find_spec("triton"):
        speed_up_interpreter()
    torch.set_num_threads(1)  # small tensors; what needs threads asks for them


def pytest_report_header():
    import anl_kernels

    return f"anl_kernels: {os.path.dirname(anl_kernels.__file__)}, GPU: {devices.GPU}, backends: {tiers.BACKENDS}"


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector, name, obj):
    if name.startswith("test") and not tiers.takes_any(obj, collector.config):
        return []


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc):
    tiers.parametrize(metafunc)
    yield
    tiers.drop_calls(metafunc)


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` chooses
def pytest_collection_modifyitems(config, items):
    taken = tiers.select(config, items)
    kept = set(taken)
    dropped = [item for item in items if item not in kept]
    items[:] = taken
    config.hook.pytest_deselected(items=dropped)
    for item in items:
        tiers.mark(item)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Without the garbage collector, which afterwards leaves the collected tests alone: they live to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure():
    gc.unfreeze()


def speed_up_interpreter():
    """Triton's interpreter replaces the functions of triton.language whenever a kernel calls a function, which takes
    longer than the call: once is enough, as each launch begins with the same."""
    from triton.runtime.interpreter import InterpretedFunction

    slowly, known = InterpretedFunction.__call__, set()

    def call(self, *args, **keywords):
        if self.fn in known:
            return self.rewrite()(*args, **keywords)
        known.add(self.fn)
        return slowly(self, *args, **keywords)

    InterpretedFunction.__call__ = call


def backend_fixture(name, what):
    """A fixture that hands out the backends of tiers.FIXTURES[name], one after the other, each while it is in use."""

    def fixture(request):
        if request.param is None:  # skipped
            return
        with request.param.in_use():
            yield request.param

    fixture.__doc__ = what
    return pytest.fixture(fixture, name=name)


backend = backend_fixture("backend", "Every backend that runs here, every variant of the CPU's and of Triton's.")
fused = backend_fixture("fused", "Every backend but the reference.")
one_backend = backend_fixture(
    "one_backend", "Every backend once, with its best variant: for what does not depend on it."
)
one_fused = backend_fixture("one_fused", "Every fused backend once, with its best variant.")
gpu_backend = backend_fixture("gpu_backend", "The backends that run on this machine's GPU, or the emulated one.")
other = backend_fixture("other", "Every variant that is not the best, and every slow backend.")


@pytest.fixture
def device(request):
    """Where the tensors of the test's backend live."""
    names = [name for name in tiers.FIXTURES if name in request.fixturenames]
    return torch.device(request.getfixturevalue(names[0]).device)


@pytest.fixture
def on_device(device):
    """Tensors are made there by default: for a test that calls the package itself, not by helpers.calculate."""
    if device.type == "cpu":
        yield device
        return
    with device:
        yield device


@pytest.fixture
def cpu():
    """The compiled module; the test is skipped where it was not built."""
    module = cpu_module()
    if module is None:
        pytest.skip("anl_kernels._cpu is not built (ANL_KERNELS_NO_EXT, or no compiler)")
    return module


@pytest.fixture
def small_chunks(monkeypatch):
    """As few rows per chunk of a linear head as asked for, before a chunk becomes some classes of more rows."""
    from anl_kernels.linear import chunks

    monkeypatch.setattr(chunks, "MIN_ROWS", 8)
    monkeypatch.setattr(chunks, "TILE_ROWS", 16)


@pytest.fixture(autouse=True)
def poison(request):
    """Every torch.empty is full of NaN (integers: their largest), so that nothing unwritten goes unseen."""
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)  # CUDA has operators that no test should fail for
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(autouse=True)
def threads():
    """A test that changes the number of threads leaves no trace."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
