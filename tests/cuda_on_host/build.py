"""Builds csrc/cuda for the host, as a module that anl_kernels.backends.cuda drives with CPU tensors.

    python tests/cuda_on_host/build.py [plain|address|thread]   prints the module's path

Every source is compiled once for each of its states, into build/cuda_on_host.
"""

import fcntl
import hashlib
import importlib.util
import os
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


def digest(paths, *more):
    state = hashlib.sha256(repr((compiler(), FLAGS, more)).encode())
    for path in paths:
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


def build(variant="plain", csrc=ROOT / "csrc"):
    """The path of the module, of these sources (csrc: another copy of them, for tests that break it)."""
    flags, engine = VARIANTS[variant]
    units = [*sources(csrc), HERE / "engine.cpp", HERE / engine, HERE / "host_runtime.cpp"]
    headers = sorted([*csrc.glob("*.h"), *csrc.glob("cuda/*.h"), *csrc.glob("cuda/*.cuh"), *HERE.glob("*.h")])
    objects = {BUILD / f"{unit.stem}-{digest([unit, *headers], variant, flags)}.o": unit for unit in units}
    module = BUILD / digest([], *objects) / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.parent.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait here for what the first one builds
        if not module.exists():
            compile_missing(objects, flags, csrc)
            partial = module.with_suffix(".tmp")
            run([compiler(), "-shared", "-pthread", *flags, *map(str, objects), "-o", str(partial)])
            partial.replace(module)
    return module


def compile_missing(objects, flags, csrc):
    import pybind11

    paths = [csrc, csrc / "cuda", HERE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    includes = [f"-I{path}" for path in paths]

    def compile_one(target):
        unit = objects[target]
        shim = ["-include", "shim.h"] if unit.parent != HERE else []
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
