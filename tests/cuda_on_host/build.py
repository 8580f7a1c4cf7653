"""Builds csrc/cuda for the host, as a module that anl_kernels.backends.cuda drives with CPU tensors.

    python tests/cuda_on_host/build.py [plain|address|thread]   prints the module's path

Every source is compiled once for each of its states, into build/cuda_on_host.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_on_host"
VARIANTS = {  # name: (flags, the engine)
    "plain": (["-O2"], "engine_fibers.cpp"),
    "address": (["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], "engine_fibers.cpp"),
    "thread": (["-O1", "-g1", "-fsanitize=thread", "-DANL_HOST_THREADS"], "engine_threads.cpp"),
}
FLAGS = "-std=c++20 -fPIC -pthread -fvisibility=hidden -ffp-contract=fast -DANL_CUDA_ON_HOST -w".split()


def compiler():
    """The C++ compiler, or None where the kernels cannot be built for the host."""
    if sys.platform != "linux" or not (ROOT / "csrc" / "cuda" / "module.cpp").exists():
        return None
    return shutil.which(os.environ.get("CXX") or "g++")


def sources(csrc):
    return sorted(csrc.glob("cuda/*.cu")) + sorted(csrc.glob("cuda/*.cpp"))


def digest(*what):
    return hashlib.sha256(repr((compiler(), FLAGS, what)).encode()).hexdigest()[:16]


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


def is_kernels(unit):
    """Whether it is CUDA C++."""
    return unit.parent != HERE or unit.name.endswith("_checks.cpp")


def object_of(unit, variant, csrc):
    """Named by all that it is compiled from: what a change does not reach is not compiled again."""
    seen = contents(HERE / "shim.h", csrc, {}) if is_kernels(unit) else {}
    return BUILD / f"{unit.stem}-{digest(contents(unit, csrc, seen), variant, VARIANTS[variant])}.o"


def engine_units(variant):
    return [HERE / name for name in ("engine.cpp", VARIANTS[variant][1], "host_devices.cpp", "host_runtime.cpp")]


def module_units(variant, csrc):
    return [*sources(csrc), *engine_units(variant)]


def objects_of(units, variant, csrc):
    """{its object: the unit}, by name."""
    return dict(sorted((object_of(unit, variant, csrc), unit) for unit in units))


def build(variant="plain", csrc=ROOT / "csrc"):
    """The path of the module, of these sources (csrc: another copy of them, for tests that break it)."""
    name = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    return link(module_units(variant, csrc), variant, csrc, name, ["-shared"])


def build_program(source):
    """The path of a program of its own that runs kernels."""
    return link([source, *engine_units("plain")], "plain", ROOT / "csrc", source.stem, [])


def copy_for_races(folder):
    """A copy of csrc that ThreadSanitizer gets through in time: float32 alone, and CTAs that take several rows."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    float32 = (r"switch \(dtype\) {[^}]*FLOAT64[^}]*}", "return f(Stored<float>());")
    few_parts = (r"LOSS_PARTS = [^;]*;", "LOSS_PARTS = 2;")
    for name, (pattern, instead) in (("call.h", float32), ("cuda/select.cpp", few_parts)):
        text, count = re.subn(pattern, instead, (csrc / name).read_text(), count=1)
        assert count == 1, f"{name} has no {pattern} any more"
        (csrc / name).write_text(text)
    return csrc


def link(units, variant, csrc, name, options):
    objects = objects_of(units, variant, csrc)
    target = BUILD / digest(*(path.name for path in objects), *options) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait here for what the first one builds
        if not target.exists():
            flags = VARIANTS[variant][0]
            compile_missing(objects, flags, csrc)
            partial = target.with_suffix(".tmp")
            run([compiler(), "-pthread", *options, *flags, *map(str, objects), "-o", str(partial)])
            partial.replace(target)
    return target


def compile_missing(objects, flags, csrc):
    import pybind11

    paths = [*folders(csrc), pybind11.get_include(), sysconfig.get_paths()["include"]]
    includes = [f"-I{path}" for path in paths]

    def compile_one(target):
        unit = objects[target]
        shim = ["-include", "shim.h"] if is_kernels(unit) else []
        partial = target.with_suffix(".tmp")
        run([compiler(), *FLAGS, *flags, *includes, *shim, "-x", "c++", "-c", str(unit), "-o", str(partial)])
        partial.replace(target)

    missing = [target for target in objects if not target.exists()]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, sorted(missing, key=lambda target: -objects[target].stat().st_size)))


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
