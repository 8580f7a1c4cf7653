"""Backends as a fixture: every one that can run here, the CPU's once for each instruction set.

Fresh memory is full of NaN while a test runs (poison).
"""

import importlib.util
import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "2")

CPU_ISAS = ("avx512", "avx2", "baseline")
# A backend joins the conformance suite by its name here (and in helpers.DEVICES its device): (id, instruction set).
CANDIDATES = [("reference", None), *((f"cpu-{isa}", isa) for isa in CPU_ISAS)]


def pytest_configure(config):
    torch.set_num_threads(1)  # small tensors; what needs threads asks for them
    config.addinivalue_line("markers", "gpu: needs an NVIDIA or AMD GPU")
    config.addinivalue_line("markers", "slow: several seconds, or gigabytes of memory")
    config.addinivalue_line("markers", "unpoisoned: fresh memory is left as the allocator gives it")


def pytest_report_header():
    import anl_kernels

    return f"anl_kernels: {os.path.dirname(anl_kernels.__file__)}, backends: {', '.join(map(repr, BACKENDS))}"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


def cpu_module():
    """anl_kernels._cpu, or None where it is not built."""
    if importlib.util.find_spec("anl_kernels") is None or importlib.util.find_spec("anl_kernels._cpu") is None:
        return None
    return importlib.import_module("anl_kernels._cpu")


def runnable_isas():
    module = cpu_module()
    if module is None:
        return []
    in_use, runnable = module.info()["isa"], []
    for isa in module.info()["isas"]:
        try:
            module.set_isa(isa)
            runnable.append(isa)
        except ValueError:
            pass
    module.set_isa(in_use)
    return sorted(runnable, key=CPU_ISAS.index)


class Backend:
    """What a test needs to know of a backend: its name for `backend=`, and what only some of them do."""

    def __init__(self, identity, isa):
        self.identity, self.isa = identity, isa
        self.name = identity.split("-")[0]
        self.fused = self.name != "reference"

    def __repr__(self):
        return self.identity


def backends():
    import anl_kernels

    available, isas = {b.name for b in anl_kernels.backends() if b.available}, runnable_isas()
    found = [Backend(*candidate) for candidate in CANDIDATES if candidate[1] is None or candidate[1] in isas]
    return [backend for backend in found if backend.name in available]


BACKENDS = backends()


@pytest.fixture(params=BACKENDS, ids=repr)
def backend(request):
    """Every backend that runs here, and every instruction set of the CPU's."""
    yield from use(request.param)


# A backend that knows several instruction sets takes part with each, or (ONCE) with the best.
ONCE = [b for b in BACKENDS if b.isa is None or b.isa == runnable_isas()[0]]
NOTHING_FUSED = [pytest.param(None, marks=pytest.mark.skip(reason="no fused backend is built here"))]


@pytest.fixture(params=[b for b in BACKENDS if b.fused] or NOTHING_FUSED, ids=repr)
def fused(request):
    """Every backend but the reference."""
    yield from use(request.param)


@pytest.fixture(params=ONCE, ids=lambda b: b.name)
def one_backend(request):
    """Every backend once, with its best instruction set: for what does not depend on it."""
    yield from use(request.param)


@pytest.fixture(params=[b for b in ONCE if b.fused] or NOTHING_FUSED, ids=lambda b: getattr(b, "name", "none"))
def one_fused(request):
    """Every fused backend once, with its best instruction set."""
    yield from use(request.param)


@pytest.fixture
def cpu():
    """The compiled module; the test is skipped where it was not built."""
    module = cpu_module()
    if module is None:
        pytest.skip("anl_kernels._cpu is not built (ANL_KERNELS_NO_EXT, or no compiler)")
    return module


def use(backend):
    if backend.isa is None:
        yield backend
        return
    module = cpu_module()
    before = module.info()["isa"]
    module.set_isa(backend.isa)
    yield backend
    module.set_isa(before)


@pytest.fixture(autouse=True)
def poison(request):
    """Every torch.empty is full of NaN (integers: their largest), so that nothing unwritten goes unseen."""
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def threads():
    """A test that changes the number of threads leaves no trace."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
