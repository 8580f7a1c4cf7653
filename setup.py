"""Builds `anl_kernels._cpu` (pybind11 over raw pointers, no torch) with ninja; everything else is in pyproject.toml.

Environment: CXX, CPPFLAGS, CXXFLAGS, LDFLAGS as usual; ANL_KERNELS_NO_EXT=1 installs without the compiled module;
MAX_JOBS limits the number of compilers that run at once.
"""

import functools
import glob
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

HERE = Path(__file__).resolve().parent
CPU = Path("csrc", "cpu")
NO_EXT = os.environ.get("ANL_KERNELS_NO_EXT", "") not in ("", "0")
WAY_OUT = "set ANL_KERNELS_NO_EXT=1 to install without the compiled kernels (plain PyTorch then does the work)"

CXX_FLAGS = (
    "-std=c++17 -O3 -g0 -fPIC -pthread -fvisibility=hidden -Wall "
    "-fwrapv -fno-math-errno -fno-trapping-math -ffp-contract=fast"  # never -ffast-math
).split()
ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512".split(),
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "baseline": [],
}
KERNEL_SOURCES = ("rows.cpp", "spatial.cpp")  # compiled once for every instruction set; module.cpp only once

PROBE = '#include <Python.h>\n#include <vector>\nextern "C" int probe() { return (int)std::vector<int>(1).size(); }\n'


def flags_from_env(*names):
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]


def link_flags():
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"]
    return ["-shared", "-pthread", "-ldl"]


def python_includes():
    paths = sysconfig.get_paths()
    return sorted({paths["include"], paths["platinclude"]})


@functools.cache
def find_compiler():
    """The C++ compiler as a list of words; SetupError with one sentence if there is none that works."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    command = next((words for words in map(shlex.split, candidates) if words and shutil.which(words[0])), None)
    if command is None:
        what = f"the C++ compiler that CXX names ({named}) was not found" if named else "no C++ compiler was found"
        raise SetupError(f"{what}: install g++ or clang++ (C++17), or {WAY_OUT}.")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        includes = [f"-I{path}" for path in python_includes()]
        call = [*command, "-std=c++17", "-fPIC", *includes, str(source), "-o", f"{folder}/probe.so", *link_flags()]
        try:
            result = subprocess.run(call, capture_output=True, text=True, errors="replace")
            problem = "" if result.returncode == 0 else (result.stderr or result.stdout)
            failed = result.returncode != 0
        except OSError as error:
            problem, failed = str(error), True
    if failed:
        first = next((line.strip() for line in problem.splitlines() if "error" in line.lower()), problem.strip()[:200])
        if "Python.h" in problem:
            what = "Python's headers (Python.h) were not found: install them (python3-dev on Debian)"
        else:
            what = f"the C++ compiler '{shlex.join(command)}' cannot build a C++17 module ({first}): repair it"
        raise SetupError(f"{what}, or {WAY_OUT}.")
    return command


def instruction_sets(compiler):
    """Names of the instruction sets to compile for: all three on x86-64, else only the baseline."""
    result = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True)
    return list(ISA_FLAGS) if result.stdout.startswith(("x86_64", "amd64")) else ["baseline"]


def find_ninja():
    try:
        import ninja

        path = Path(ninja.BIN_DIR, "ninja")
        if path.exists():
            return str(path)
    except ImportError:
        pass
    path = shutil.which("ninja")
    if path is None:
        raise SetupError(f"ninja was not found: pip install ninja, or {WAY_OUT}.")
    return path


def quote(words):
    """Words of a shell command inside a build.ninja value."""
    return shlex.join(map(str, words)).replace("$", "$$")


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def objects(isas):
    """(object name, source, extra flags) of everything that is compiled."""
    import pybind11

    # -isystem: pybind11 is no dependency of the kernels, and its warnings are not ours.
    includes = [word for path in [pybind11.get_include(), *python_includes()] for word in ("-isystem", path)]
    have = [f"-DANL_HAVE_{isa.upper()}" for isa in isas if isa != "baseline"]
    yield "module.o", CPU / "module.cpp", [*includes, *have]
    for isa in isas:
        for source in KERNEL_SOURCES:
            yield f"{Path(source).stem}_{isa}.o", CPU / source, [f"-DANL_ISA={isa}", *ISA_FLAGS[isa]]


def ninja_file(compiler, isas, target):
    common = [*compiler, *CXX_FLAGS, f"-I{HERE / 'csrc'}", *flags_from_env("CPPFLAGS", "CXXFLAGS")]
    lines = [
        "ninja_required_version = 1.8",
        "rule compile",
        f"  command = {quote(common)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {quote(compiler)} $in -o $out {quote([*link_flags(), *flags_from_env('LDFLAGS')])}",
        "  description = $out",
    ]
    names = []
    for name, source, flags in objects(isas):
        names.append(name)
        lines += [f"build {name}: compile {escape(HERE / source)}", f"  flags = {quote(flags)}"]
    lines += [f"build {escape(target)}: link {' '.join(names)}", ""]
    return "\n".join(lines)


class BuildExt(build_ext):
    """Compiles with ninja: in parallel, and again only what changed since the last build in this folder."""

    def build_extensions(self):
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, ext):
        compiler = find_compiler()
        # A folder of its own, and not the temporary one of an editable install, so that objects are found again.
        folder = HERE / "build" / f"ninja-{self.plat_name}-{sys.implementation.cache_tag}"
        if os.environ.get("CXX"):
            folder = folder.with_name(f"{folder.name}-{Path(compiler[0]).name}")
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).name
        rules = ninja_file(compiler, instruction_sets(compiler), target)
        (folder / "build.ninja").write_text(rules)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if subprocess.run([find_ninja(), "-C", str(folder), "-j", jobs], stdin=subprocess.DEVNULL).returncode != 0:
            raise SetupError(f"compiling anl_kernels._cpu failed, the compiler's messages are above; {WAY_OUT}.")
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Replaced as a whole: a process that has the old file mapped keeps it.
        partial = destination.with_suffix(".tmp")
        shutil.copy2(folder / target, partial)
        partial.replace(destination)


def extensions():
    if NO_EXT:
        return []
    sources = [(CPU / name).as_posix() for name in ("module.cpp", *KERNEL_SOURCES)]
    headers = [Path(name).relative_to(HERE).as_posix() for name in glob.glob(f"{HERE}/csrc/**/*.h", recursive=True)]
    return [Extension("anl_kernels._cpu", sources=sources, depends=sorted(headers), language="c++")]


def main():
    if not NO_EXT and {"bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"} & set(sys.argv):
        try:
            find_compiler()  # before anything else is done, so that this sentence stands alone
        except SetupError as error:
            sys.exit(f"error: {error}")
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})


main()
