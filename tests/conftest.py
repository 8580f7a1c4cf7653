"""Backends as a fixture: every one that can run here, the CPU's once for each instruction set.

Fresh memory is full of NaN while a test runs (poison).
"""

import importlib.util
import os
import types

import cuda_on_host.build
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "2")
if not torch.cuda.is_available():  # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

CPU_ISAS = ("avx512", "avx2", "baseline")
TRITON_PATHS = ("tile", "loop", "split")
CUDA_HOSTS = (
    "host",
    "host-sm80",
    "host-warp",
)  # the CUDA kernels compiled for the CPU, as on devices that do not exist
# A backend joins the conformance suite by its name here (and in helpers.DEVICES its device): (id, variant), where a
# variant is the CPU's instruction set, or the kernel that Triton is made to take.
CANDIDATES = [
    ("reference", None),
    *((f"cpu-{isa}", isa) for isa in CPU_ISAS),
    ("triton", None),
    *((f"triton-{path}", path) for path in TRITON_PATHS),
    ("cuda", None),
    *((f"cuda-{host}", host) for host in CUDA_HOSTS),
]


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted(**values): the parameters that interpreted kernels are tested with")
    if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
        speed_up_interpreter()
    torch.set_num_threads(1)  # small tensors; what needs threads asks for them
    config.addinivalue_line("markers", "gpu: needs an NVIDIA or AMD GPU")
    config.addinivalue_line("markers", "slow: several seconds, or gigabytes of memory")
    config.addinivalue_line("markers", "unpoisoned: fresh memory is left as the allocator gives it")


def pytest_report_header():
    import anl_kernels

    return f"anl_kernels: {os.path.dirname(anl_kernels.__file__)}, backends: {', '.join(map(repr, BACKENDS))}"


NO_CASES = types.SimpleNamespace(params={})


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` chooses
def pytest_collection_modifyitems(config, items):
    dropped = [item for item in items if not interpreter_takes(item)]
    items[:] = [item for item in items if interpreter_takes(item)]
    config.hook.pytest_deselected(items=dropped)
    for item in items:
        if any(
            isinstance(value, Backend) and value.on_gpu for value in getattr(item, "callspec", NO_CASES).params.values()
        ):
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


def interpreter_takes(item):
    """Whether an interpreted backend takes part in a test: with the values that its markers `interpreted` list.

    A path that Triton is made to take does where the marker has forced=dict(...), further values.
    """
    values = getattr(item, "callspec", None) and item.callspec.params
    found = [v for v in (values or {}).values() if isinstance(v, Backend) and v.interpreted]
    marks = list(item.iter_markers("interpreted"))
    if not found or not (marks or found[0].variant):
        return True
    for mark in marks:
        wanted = dict(mark.kwargs)
        forced = wanted.pop("forced", None)
        if found[0].variant:
            if forced is None:
                continue
            wanted.update(forced)
        if all(values[name] in allowed for name, allowed in wanted.items()):
            return True
    return False


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


def variants(name):
    """The variants of a backend that run here; None: it has none, or runs as it is."""
    if name == "cpu":
        return runnable_isas()
    if name == "cuda":
        return [None] if torch.cuda.is_available() else CUDA_HOSTS if cuda_on_host.build.compiler() else []
    return [None, *TRITON_PATHS] if name == "triton" else [None]


class Backend:
    """What a test needs to know of a backend: its name for `backend=`, and what only some of them do."""

    def __init__(self, identity, variant):
        self.identity, self.variant = identity, variant
        self.name = identity.split("-")[0]
        self.fused = self.name != "reference"
        self.checks_labels = self.name in ("cpu", "reference")  # a GPU's would wait for the device
        self.isa = variant if self.name == "cpu" else None
        self.on_host = self.name == "cuda" and variant is not None
        self.on_gpu = self.name in ("cuda", "triton") and torch.cuda.is_available() and not self.on_host
        self.interpreted = self.name == "triton" and not torch.cuda.is_available()  # a thousand times slower

    def __repr__(self):
        return self.identity

    def few(self, cases, count=2):
        """All `cases`; where kernels are interpreted, the first and the last, `count` in all."""
        cases = list(cases)
        if not self.interpreted or len(cases) <= count:
            return cases
        return cases[: count - 1] + cases[-1:]


def backends():
    import anl_kernels

    available = {b.name for b in anl_kernels.backends() if b.available}
    found = [Backend(*candidate) for candidate in CANDIDATES]
    return [b for b in found if (b.name in available or b.on_host) and b.variant in variants(b.name)]


BACKENDS = backends()
# A backend that knows several variants takes part with each, or (ONCE) with the best.
ONCE = [b for b in BACKENDS if b.variant == variants(b.name)[0]]
NOTHING_FUSED = [pytest.param(None, marks=pytest.mark.skip(reason="no fused backend is built here"))]


@pytest.fixture(params=BACKENDS, ids=repr)
def backend(request):
    """Every backend that runs here, every instruction set of the CPU's, and every path of Triton's."""
    yield from use(request.param)


@pytest.fixture(params=[b for b in BACKENDS if b.fused] or NOTHING_FUSED, ids=repr)
def fused(request):
    """Every backend but the reference."""
    yield from use(request.param)


@pytest.fixture(params=ONCE, ids=lambda b: b.name)
def one_backend(request):
    """Every backend once, with its best variant: for what does not depend on it."""
    yield from use(request.param)


@pytest.fixture(params=[b for b in ONCE if b.fused] or NOTHING_FUSED, ids=lambda b: getattr(b, "name", "none"))
def one_fused(request):
    """Every fused backend once, with its best variant."""
    yield from use(request.param)


@pytest.fixture
def cpu():
    """The compiled module; the test is skipped where it was not built."""
    module = cpu_module()
    if module is None:
        pytest.skip("anl_kernels._cpu is not built (ANL_KERNELS_NO_EXT, or no compiler)")
    return module


def use(backend):
    if backend.isa:
        module = cpu_module()
        before = module.info()["isa"]
        module.set_isa(backend.isa)
        yield backend
        module.set_isa(before)
    elif backend.name == "triton" and backend.variant:
        from anl_kernels.kernels import passes

        before, passes.plan = passes.plan, triton_plan(backend.variant)
        yield backend
        passes.plan = before
    elif backend.on_host:
        from cuda_on_host import adapter

        with adapter.on_host(backend.variant):
            yield backend
    else:
        yield backend


def triton_plan(path):
    """A choice of kernels that always takes `path`, with blocks so small that few rows and classes are many blocks."""
    from anl_kernels.kernels import launch, passes, rows

    def plan(view, itemsize, target):
        if path == "tile":
            config = launch.LaunchConfig(16, launch.power_of_2(view.num_classes), 4)
            return passes.planned(rows.tile_kernel, view, config)
        classes = min(256, max(16, launch.power_of_2(view.num_classes // 3)))
        lanes = 1 if view.lanes <= 6 else 16  # one row a program takes ways that several do not
        if path == "loop":
            return passes.planned(rows.loop_kernel, view, launch.LaunchConfig(lanes, classes, 4))
        return passes.split(view, launch.LaunchConfig(lanes, classes, 4), group=1, programs=3)

    return plan


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
