"""Which tests run, and on which backends.

By default, in minutes: the special cases, and one array of cases that covers every pair of loss, layout, dtype, number
of classes and mode; every backend once, its further variants with few cases. --thorough adds the full grids with every
variant, and what is marked `thorough`. --part I/N runs one part in N of what --thorough adds. A test that is named
("file::test") runs whatever it is.
"""

import zlib

import devices
import pytest
from candidates import BACKENDS, ONCE, Backend

FIXTURES = {  # fixture: the backends that it hands out
    "backend": BACKENDS,
    "fused": [b for b in BACKENDS if b.fused],
    "one_backend": ONCE,
    "one_fused": [b for b in ONCE if b.fused],
    "gpu_backend": [b for b in ONCE if b.on_gpu],
    "other": [b for b in BACKENDS if b.few_cases or b.limited],
}


def thorough(*values):
    """A parameter that only --thorough has."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def add_options(parser):
    group = parser.getgroup("tiers")
    group.addoption("--thorough", action="store_true", help="all tests, on every variant of every backend")
    group.addoption("--part", type=part, metavar="I/N", help="part I of N of what --thorough adds to the default")


def part(text):
    number, parts = map(int, text.split("/"))
    if not 1 <= number <= parts:
        raise ValueError(text)
    return number, parts


def add_markers(config):
    for line in (
        "thorough: minutes, or a full grid; runs with --thorough",
        "few(**values): the parameters with which slow backends and further variants take part; with tier='thorough' "
        "only if --thorough is given; forced=dict(...): further values, for the paths that Triton is made to take",
        "forced: Triton takes a path that it would not choose itself",
    ):
        config.addinivalue_line("markers", line)


def is_thorough(config):
    return bool(config.option.thorough or config.option.part or any("::" in word for word in config.args))


def takes_any(function, config):
    """Whether a test function is of the tiers asked for: those that are not cost no time to collect."""
    return is_thorough(config) or all(mark.name != "thorough" for mark in marks_of(function))


def marks_of(function):
    marks = getattr(function, "pytestmark", [])
    return marks if isinstance(marks, list) else [marks]


def parametrize(metafunc):
    """The backends of a test, unless it names its own."""
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    for fixture in [name for name in FIXTURES if name in metafunc.fixturenames and name not in own]:
        chosen = FIXTURES[fixture]
        if fixture != "other" and not is_thorough(metafunc.config) and not few_marks(metafunc.definition):
            chosen = [b for b in chosen if not b.few_cases]
        nothing = [pytest.param(None, marks=pytest.mark.skip(reason="no such backend is built here"))]
        metafunc.parametrize(fixture, chosen or nothing, indirect=True, ids=repr)


def few_marks(item):
    return list(item.iter_markers("few"))


def backend_of(item):
    """(the backend that a test is parametrized with, or None; the fixture's name)"""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return next(((params[name], name) for name in FIXTURES if isinstance(params.get(name), Backend)), (None, None))


def takes_part(item, full):
    """Whether a test's backend takes part in it: a slow one, or a further variant, only with `few` of the values."""
    backend, fixture = backend_of(item)
    if backend is None:
        return True
    if backend.repeats or fixture == "other":
        return fixture == "other" and (not backend.forced or is_among_few(item, backend, full))
    if full and backend.name == "triton" and not backend.limited:  # compiled
        return True
    if not (backend.limited or backend.name == "triton" or (backend.few_cases and not full)):
        return True
    if few_marks(item):
        return is_among_few(item, backend, full)
    return not backend.forced and (full or not backend.few_cases)


def is_default(item):
    return not item.get_closest_marker("thorough") and takes_part(item, full=False)


def is_among_few(item, backend, full):
    """Whether one of the marks lists the values that the test has."""
    values = item.callspec.params
    for mark in few_marks(item):
        wanted = dict(mark.kwargs)
        tier, forced = wanted.pop("tier", None), wanted.pop("forced", None)
        if (tier == "thorough" and not full) or (backend.forced and forced is None):
            continue
        wanted.update(forced if backend.forced else {})
        if all(values[name] in allowed for name, allowed in wanted.items()):
            return True
    return False


def select(config, items):
    """What runs of what was collected."""
    if config.option.part:
        return in_part([i for i in items if takes_part(i, True) and not is_default(i)], *config.option.part)
    return [i for i in items if (takes_part(i, True) if is_thorough(config) else is_default(i))]


def in_part(items, number, parts):
    """Part `number` of `parts`. Files that are thorough as a whole build what their tests share: they stay together."""
    whole = sorted({str(item.path) for item in items if is_whole(item)})
    return [
        item
        for item in items
        if (whole.index(str(item.path)) if is_whole(item) else zlib.crc32(item.nodeid.encode())) % parts == number - 1
    ]


def is_whole(item):
    return any(mark.name == "thorough" for mark in item.getparent(pytest.Module).own_markers)


def mark(item):
    """What `-m gpu` and `-m forced` choose by, and what cannot run here."""
    backend, _ = backend_of(item)
    if backend is not None and backend.on_gpu:
        item.add_marker("gpu")
    if backend is not None and backend.forced:
        item.add_marker("forced")
    if item.get_closest_marker("gpu") and not devices.GPU:
        item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
    missing = item.get_closest_marker("not_emulated")
    if missing and devices.EMULATED:
        item.add_marker(pytest.mark.skip(reason=f"no emulation of {missing.args[0]}"))
