"""Backends as a fixture: every one that can run here, the CPU's once for each instruction set.

`-m gpu` selects what a machine with a GPU should run: the tests of the backends that run there, with tensors that live
there, and the tests marked so. Fresh memory is full of NaN while a test runs (poison).
"""

import importlib.util
import os
import types

import devices
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: `poison` asks for determinism
if devices.GPU != "cuda":  # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
if devices.EMULATED:
    devices.emulate()

from candidates import BACKENDS, ONCE, Backend, cpu_module


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted(**values): the parameters that slow kernels are tested with")
    config.addinivalue_line("markers", "forced: Triton takes a path that it would not choose itself")
    config.addinivalue_line("markers", "not_emulated(why): what only a real GPU has")
    if devices.GPU != "cuda" and importlib.util.find_spec("triton"):
        speed_up_interpreter()
    torch.set_num_threads(1)  # small tensors; what needs threads asks for them
    config.addinivalue_line("markers", "unpoisoned: fresh memory is left as the allocator gives it")


def pytest_report_header():
    import anl_kernels

    return f"anl_kernels: {os.path.dirname(anl_kernels.__file__)}, GPU: {devices.GPU}, backends: {BACKENDS}"


NO_CASES = types.SimpleNamespace(params={})


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` chooses
def pytest_collection_modifyitems(config, items):
    taken = without_repetition([item for item in items if interpreter_takes(item)])
    kept = set(taken)
    dropped = [item for item in items if item not in kept]
    items[:] = taken
    config.hook.pytest_deselected(items=dropped)
    for item in items:
        used = [v for v in getattr(item, "callspec", NO_CASES).params.values() if isinstance(v, Backend)]
        if any(value.on_gpu for value in used):
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not devices.GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
        if any(value.forced for value in used):
            item.add_marker("forced")
        mark = item.get_closest_marker("not_emulated")
        if mark and devices.EMULATED:
            item.add_marker(pytest.mark.skip(reason=f"no emulation of {mark.args[0]}"))


def interpreter_takes(item):
    """Whether a slow backend takes part in a test: with the values that its markers `interpreted` list.

    Slow are interpreted kernels, and compiled ones too: Triton compiles one for every loss, dtype and kind of shape.
    ANL_TEST_TRITON=full runs all that is compiled. A path that Triton is made to take, interpreted or not, takes part
    where the marker has forced=dict(...), further values.
    """
    values = getattr(item, "callspec", None) and item.callspec.params
    found = [v for v in (values or {}).values() if isinstance(v, Backend) and (v.limited or v.name == "triton")]
    if found and not found[0].limited and os.environ.get("ANL_TEST_TRITON") == "full":
        return True
    marks = list(item.iter_markers("interpreted"))
    if not found or not (marks or found[0].forced):
        return True
    for mark in marks:
        wanted = dict(mark.kwargs)
        forced = wanted.pop("forced", None)
        if found[0].forced:
            if forced is None:
                continue
            wanted.update(forced)
        if all(values[name] in allowed for name, allowed in wanted.items()):
            return True
    return False


def without_repetition(items):
    """Triton's "launches" does the arithmetic of "split": of the two grids of losses and layouts it takes both ends."""
    repeats = {}
    for item in items:
        values = getattr(item, "callspec", NO_CASES).params.values()
        if any(isinstance(value, Backend) and value.variant == "launches" for value in values):
            repeats.setdefault(item.originalname, []).append(item)
    grids = [repeats.pop(name, []) for name in ("test_every_loss", "test_every_layout")]
    dropped = {item for repeated in (*repeats.values(), *(grid[1:-1] for grid in grids)) for item in repeated}
    return [item for item in items if item not in dropped]


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


NOTHING_FUSED = [pytest.param(None, marks=pytest.mark.skip(reason="no fused backend is built here"))]


@pytest.fixture(params=BACKENDS, ids=repr)
def backend(request):
    """Every backend that runs here, every instruction set of the CPU's, and every path of Triton's."""
    with request.param.in_use():
        yield request.param


@pytest.fixture(params=[b for b in BACKENDS if b.fused] or NOTHING_FUSED, ids=repr)
def fused(request):
    """Every backend but the reference."""
    with request.param.in_use():
        yield request.param


@pytest.fixture(params=ONCE, ids=lambda b: b.name)
def one_backend(request):
    """Every backend once, with its best variant: for what does not depend on it."""
    with request.param.in_use():
        yield request.param


@pytest.fixture(params=[b for b in ONCE if b.fused] or NOTHING_FUSED, ids=lambda b: getattr(b, "name", "none"))
def one_fused(request):
    """Every fused backend once, with its best variant."""
    with request.param.in_use():
        yield request.param


@pytest.fixture
def device(request):
    """Where the tensors of the test's backend live."""
    names = [name for name in ("backend", "fused", "one_backend", "one_fused") if name in request.fixturenames]
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
