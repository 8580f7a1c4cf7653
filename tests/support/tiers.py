"""Which tests run, and on which backends.

By default, in minutes: the special cases, and one array of cases that covers every pair of loss, layout, dtype, number
of classes and mode; every backend once, its further variants with few cases. --thorough adds the full grids with every
variant, and what is marked `thorough`. --part I/N runs one part in N of what --thorough adds. A test that is named
("file::test") runs whatever it is.
"""

import zlib
from typing import NamedTuple

import devices
import pytest
from backends_under_test import BACKENDS, ONCE, Backend

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


def mainly(chosen, values):
    """All values, of which only --thorough has those that are not chosen."""
    return [value if value in chosen else thorough(value) for value in values]


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
        "variants: further variants of a backend take part by default too, with what `few` lists",
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
    own = [name for mark in metafunc.definition.iter_markers("parametrize") for name in names_of(mark.args[0])]
    variants = metafunc.definition.get_closest_marker("variants") or is_thorough(metafunc.config)
    for fixture in [name for name in FIXTURES if name in metafunc.fixturenames and name not in own]:
        chosen = FIXTURES[fixture]
        if fixture != "other" and not variants:
            chosen = [b for b in chosen if not b.few_cases]
        nothing = [pytest.param(None, marks=pytest.mark.skip(reason="no such backend is built here"))]
        metafunc.parametrize(fixture, chosen or nothing, indirect=True, ids=repr)


def names_of(names):
    """The parameters that pytest.mark.parametrize names, in either way."""
    return names.replace(" ", "").split(",") if isinstance(names, str) else names


def drop_calls(metafunc):
    """What `select` would drop, before tests are made of it: that takes a third of the time of a collection.

    `_calls` is private to pytest, which has no public place where a set of parameters can be left out before it is made
    an item; without it the tests are the same.
    """
    calls = getattr(metafunc, "_calls", [])
    marks = list(metafunc.definition.iter_markers())
    kept = [call for call in calls if runs(Case(call.params, [*marks, *call.marks]), metafunc.config)]
    calls[:] = kept or calls[:1]  # without any, pytest would make a test without parameters


class Case(NamedTuple):
    """A test with its parameters, before or after pytest has made an item of it."""

    params: dict
    marks: list

    @staticmethod
    def of(item):
        return Case(item.callspec.params if hasattr(item, "callspec") else {}, list(item.iter_markers()))

    @property
    def few(self):
        return [mark.kwargs for mark in self.marks if mark.name == "few"]

    @property
    def is_of_kernels(self):
        """Whether it is a test of the kernels; others are of what calls them."""
        return any(mark.name == "variants" for mark in self.marks)

    @property
    def backend(self):
        """(the backend, the fixture that hands it out); None for both where no backend is a parameter."""
        found = ((self.params[name], name) for name in FIXTURES if isinstance(self.params.get(name), Backend))
        return next(found, (None, None))


def runs(case, config):
    """Whether it is of the tiers asked for."""
    if config.option.part:
        return takes_part(case, full=True) and not is_default(case)
    return takes_part(case, full=True) if is_thorough(config) else is_default(case)


def is_default(case):
    return all(mark.name != "thorough" for mark in case.marks) and takes_part(case, full=False)


def takes_part(case, full):
    """Whether the backend takes part in the test, which it does with all values, with `few` of them, or not at all."""
    backend, fixture = case.backend
    if backend is None:
        return True
    if fixture == "other":
        return (full or not backend.repeats) and (not backend.forced or is_among_few(case, full))
    if backend.repeats:
        return False
    if (
        not full and backend.few_cases and not case.is_of_kernels
    ):  # by default one variant is enough for what calls them
        return False
    if has_all_values(case, backend, full):
        return True
    if case.few:
        return is_among_few(case, full)
    return not backend.forced if full else not (backend.few_cases or backend.interpreted)


def has_all_values(case, backend, full):
    """Whether the backend is quick enough for them; further variants only in thorough tests of kernels."""
    if backend.name == "triton":
        return full and not backend.limited  # compiled
    if backend.limited or (backend.few_cases and not (full and case.is_of_kernels)):
        return False
    return full or case.is_of_kernels or not backend.on_host


def is_among_few(case, full):
    """Whether one of the marks lists the values that the test has."""
    forced = case.backend[0].forced
    for mark in case.few:
        wanted = {**mark, **(mark.get("forced") or {})} if forced else dict(mark)
        if (wanted.pop("tier", None) == "thorough" and not full) or (forced and "forced" not in mark):
            continue
        wanted.pop("forced", None)
        if all(case.params[name] in allowed for name, allowed in wanted.items()):
            return True
    return False


def select(config, items):
    """What runs of what was collected."""
    taken = [item for item in items if runs(Case.of(item), config)]
    return in_part(taken, *config.option.part) if config.option.part else taken


def in_part(items, number, parts):
    """Part `number` of `parts`. Files that are thorough as a whole build what their tests share: they stay together,
    and are dealt out in the order of their names, which makes parts of similar length."""
    whole = sorted({item.path.name for item in items if is_whole(item)})
    return [
        item
        for item in items
        if (whole.index(item.path.name) if is_whole(item) else zlib.crc32(item.nodeid.encode())) % parts == number - 1
    ]


def is_whole(item):
    return any(mark.name == "thorough" for mark in item.getparent(pytest.Module).own_markers)


def mark(item):
    """What `-m gpu` and `-m forced` choose by, and what cannot run here."""
    backend, _ = Case.of(item).backend
    if backend is not None and backend.on_gpu:
        item.add_marker("gpu")
    if backend is not None and backend.forced:
        item.add_marker("forced")
    if item.get_closest_marker("gpu") and not devices.GPU:
        item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
    missing = item.get_closest_marker("not_emulated")
    if missing and devices.EMULATED:
        item.add_marker(pytest.mark.skip(reason=f"no emulation of {missing.args[0]}"))
