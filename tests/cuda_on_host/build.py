"""Builds csrc/cuda for the host, as a module that anl_kernels.backends.cuda drives with CPU tensors; csrc/cpu likewise,
where tests need another module than the installed one.

    python tests/cuda_on_host/build.py [plain|address|thread]   prints the path of the module for CUDA

Every source is compiled once for each of its states, into build/cuda_on_host.
"""

import fcntl
import functools
import hashlib
import importlib.util
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_on_host"
VARIANTS = {  # name: (flags, the engine)
    "plain": (["-O1"], "engine_fibers.cpp"),
    "address": (["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], "engine_fibers.cpp"),
    "thread": (["-O1", "-g1", "-fsanitize=thread", "-DANL_HOST_THREADS"], "engine_threads.cpp"),
}
QUICKLY = {"module.cpp": ["-O0"]}  # bindings take longer to compile than to run
FLAGS = "-std=c++20 -fPIC -pthread -fvisibility=hidden -ffp-contract=fast -DANL_CUDA_ON_HOST -w".split()
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


class Unit(NamedTuple):
    """A source, and what the compiler is told besides where headers are."""

    source: Path
    flags: list


def compiler():
    """The C++ compiler, or None where the kernels cannot be built for the host."""
    if sys.platform != "linux" or not (ROOT / "csrc" / "cuda" / "module.cpp").exists():
        return None
    return shutil.which(os.environ.get("CXX") or "g++")


def sources(csrc):
    return sorted(csrc.glob("cuda/*.cu")) + sorted(csrc.glob("cuda/*.cpp"))


def digest(*what):
    return hashlib.sha256(repr((compiler(), what)).encode()).hexdigest()[:16]


def folders(csrc):
    """Where #include "..." looks."""
    return [csrc, csrc / "cuda", HERE, HERE / "include"]


def contents(path, csrc, seen):
    """`seen`, with the text of the file and of every header that it includes."""
    if path.name in seen:
        return seen
    seen[path.name] = text = path.read_text()
    for name in re.findall(r'#include [<"]([\w./]+)[">]', text):
        found = [folder / name for folder in [path.parent, *folders(csrc)] if (folder / name).is_file()]
        if found:
            contents(found[0], csrc, seen)
    return seen


def object_of(unit, csrc):
    """Named by all that it is compiled from: what a change does not reach is not compiled again."""
    seen = contents(HERE / "shim.h", csrc, {}) if "shim.h" in unit.flags else {}
    return BUILD / f"{unit.source.stem}-{digest(contents(unit.source, csrc, seen), unit.flags)}.o"


def cuda_units(variant, paths, csrc):
    """The sources, and the engine that runs them."""
    flags, engine = VARIANTS[variant]
    kernels = [path for path in paths if path.parent != HERE or path.name.endswith("_checks.cpp")]  # CUDA C++
    host = ("host_contexts.cpp", "host_devices.cpp", "host_runtime.cpp")
    engine = [HERE / name for name in ("engine.cpp", engine, *host)]
    units = [Unit(path, [*FLAGS, *flags, *QUICKLY.get(path.name, []), "-include", "shim.h"]) for path in kernels]
    return units + [Unit(path, [*FLAGS, *flags]) for path in engine]


def module_units(variant, csrc):
    return cuda_units(variant, sources(csrc), csrc)


@functools.cache
def setup_py():
    """What setup.py defines; it is asked for the package's name."""
    with mock.patch.object(sys, "argv", ["setup.py", "--quiet", "--name"]), redirect_stdout(io.StringIO()):
        return runpy.run_path(str(ROOT / "setup.py"))


def cpu_units(variant, csrc, isas):
    setup = setup_py()
    flags = [*setup["CXX_FLAGS"], *VARIANTS[variant][0], "-w"]
    have = [f"-DANL_HAVE_{isa.upper()}" for isa in isas if isa != "baseline"]
    units = [Unit(csrc / "cpu" / "module.cpp", [*flags, *have])]
    for isa in isas:
        kinds = [f"-DANL_ISA={isa}", *setup["ISA_FLAGS"][isa]]
        units += [Unit(csrc / "cpu" / name, [*flags, *kinds]) for name in setup["KERNEL_SOURCES"]]
    return units


def objects_of(units, csrc):
    """{its object: the unit}, by name."""
    return dict(sorted((object_of(unit, csrc), unit) for unit in units))


def build(variant="plain", csrc=ROOT / "csrc"):
    """The path of the module, of these sources (csrc: another copy of them, for tests that break it)."""
    return link(module_units(variant, csrc), csrc, f"_cuda{SUFFIX}", ["-shared", *VARIANTS[variant][0]])


def build_cpu(variant, csrc=ROOT / "csrc", isas=None):
    """Likewise, of anl_kernels._cpu; isas: None for all."""
    isas = isas or setup_py()["instruction_sets"]([compiler()])
    return link(cpu_units(variant, csrc, isas), csrc, f"_cpu{SUFFIX}", ["-shared", *VARIANTS[variant][0]])


def build_program(source):
    """The path of a program of its own that runs kernels."""
    csrc = ROOT / "csrc"
    return link(cuda_units("plain", [source], csrc), csrc, source.stem, VARIANTS["plain"][0])


STORAGE = {"FLOAT32": "float", "FLOAT64": "double", "FLOAT16": "H", "BFLOAT16": "B"}


def compile_only(csrc, dtypes):
    """Changes a copy of csrc so that its kernels exist for few dtypes (of call.h), and are compiled in less time."""
    cases = "".join(f"case {dtype}: return f(Stored<{STORAGE[dtype]}>()); " for dtype in dtypes)
    others = f"default: __builtin_trap(); return f(Stored<{STORAGE[dtypes[0]]}>());"
    replace(csrc / "call.h", r"switch \(dtype\) {[^}]*FLOAT64[^}]*}", f"switch (dtype) {{ {cases}{others} }}")


def replace(path, pattern, instead):
    text, count = re.subn(pattern, instead, path.read_text(), count=1)
    assert count == 1, f"{path.name} has no {pattern} any more"
    path.write_text(text)


def copy_for_races(folder):
    """A copy of csrc that ThreadSanitizer gets through in time: float32 alone, and CTAs of several warps and rows."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    compile_only(csrc, ["FLOAT32"])
    replace(csrc / "cuda" / "plans.h", r"LOSS_PARTS = [^;]*;", "LOSS_PARTS = 2;")
    replace(csrc / "cuda" / "rows_block.cu", r"MOST_CTAS = [^;]*;", "MOST_CTAS = 1;")
    replace(csrc / "cuda" / "rows_block.cu", r"PACKS_PER_THREAD = [^;]*;", "PACKS_PER_THREAD = 2;")  # several warps
    return csrc


def link(units, csrc, name, options):
    objects = objects_of(units, csrc)

    def make(target):
        compile_missing(objects, csrc)
        run([compiler(), "-pthread", *options, *map(str, objects), "-o", str(target)])

    return once(BUILD / digest(*(path.name for path in objects), *options) / name, make)


def once(target, make):
    """The file `target`, made if it is not there; other processes wait for what the first one makes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".tmp")
            make(partial)
            partial.replace(target)
    return target


def compile_missing(objects, csrc):
    import pybind11

    includes = [f"-I{path}" for path in (*folders(csrc), pybind11.get_include(), sysconfig.get_paths()["include"])]

    def compile_one(target):
        source, flags = objects[target]
        partial = target.with_suffix(".tmp")
        run([compiler(), *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(partial)])
        partial.replace(target)

    missing = [target for target in objects if not target.exists()]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, sorted(missing, key=lambda target: -objects[target].source.stat().st_size)))


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:6000]}")


def load(path):
    """The module, beside the one that nvcc built: pybind11 would hand that out again under its name."""
    spec = importlib.util.spec_from_file_location("anl_kernels_on_host._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
