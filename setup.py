"""Builds `anl_kernels._cpu` and, where there is nvcc, `anl_kernels._cuda` with ninja; the rest is in pyproject.toml.

Both are pybind11 over raw pointers: no torch is needed to build them.

Environment: CXX, CPPFLAGS, CXXFLAGS, LDFLAGS as usual; ANL_KERNELS_NO_EXT=1 installs without the compiled modules;
MAX_JOBS limits the number of compilers that run at once. nvcc is CUDACXX, or CUDA_HOME's, or PATH's;
ANL_KERNELS_NO_CUDA=1 leaves _cuda out; ANL_KERNELS_CUDA_ARCHS is a list such as "80;90+PTX", or "all" (not set: the
architectures of the GPUs here; without a GPU a fraction of it, PTX of the kernels that run every loss).
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
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

HERE = Path(__file__).resolve().parent
CPU, CUDA = Path("csrc", "cpu"), Path("csrc", "cuda")


def is_set(name):
    return os.environ.get(name, "") not in ("", "0")


NO_EXT = is_set("ANL_KERNELS_NO_EXT")
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

NVCC_FLAGS = (  # host code at -O1: it only launches, and pybind11's templates take long; device code is as with -O3
    "-std=c++17 -Xcompiler=-O1,-fPIC,-fvisibility=hidden,-pthread -cudart=static -Xfatbin=-compress-all".split()
)
NO_CUDA = "set ANL_KERNELS_NO_CUDA=1 to install without the CUDA kernels"
ALL_ARCHS = ("80", "86", "89", "90", "100", "120")
WITHOUT_GPU = ("80+PTX",)  # +PTX: what a driver compiles for this architecture and whatever is newer
FULL_ALONE = ["-DANL_FULL_KERNELS_ALONE"]  # without the lean kernels, which leave out what few losses need
CLUSTER_SOURCE, CLUSTER_ARCH = "rows_cluster.cu", 90  # its kernels only trap where they are compiled for less
COMPILED_FIRST = ("rows_small.cu", "rows_split.cu", "rows_cluster.cu", "module.cpp", "rows.cpp")  # what takes longest

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


def module_flags():
    """In the compiler's command, so that another version of pybind11 compiles the modules anew."""
    import pybind11

    return [f"-DANL_PYBIND11={pybind11.__version__}"]


def module_environment():
    """Tells the compiler where the headers of pybind11 and Python are. With build isolation pip puts pybind11 into a
    new folder for each build; if the command named it, ninja would compile the modules each time."""
    import pybind11

    given = [path for path in [os.environ.get("CPLUS_INCLUDE_PATH")] if path]
    folders = [pybind11.get_include(), *python_includes(), *given]
    return {**os.environ, "CPLUS_INCLUDE_PATH": os.pathsep.join(folders)}


class Object(NamedTuple):
    name: str
    source: Path
    flags: list[str]


class Module(NamedTuple):
    """How one of the two extension modules is built."""

    name: str  # cpu or cuda: a folder of objects, and part of the names of ninja's rules
    compile: list[str]
    link: list[str]
    objects: list[Object]
    target: str

    def rules(self):
        return [
            f"rule compile_{self.name}",
            f"  command = {quote(self.compile)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            f"rule link_{self.name}",
            f"  command = {quote(self.link[:1])} $in -o $out {quote(self.link[1:])}",
            "  description = $out",
        ]

    def link_step(self):
        objects = " ".join(f"{self.name}/{one.name}" for one in self.objects)
        return f"build {escape(self.target)}: link_{self.name} {objects}"


def compile_order(source):
    """The longest first, so that no processor waits for a long one at the end; ninja keeps this order."""
    place = COMPILED_FIRST.index(source.name) if source.name in COMPILED_FIRST else len(COMPILED_FIRST)
    return place, -(HERE / source).stat().st_size


def ninja_file(modules):
    """One for all modules: they share the processors to the end."""
    lines = ["ninja_required_version = 1.8", *(line for module in modules for line in module.rules())]
    objects = [(module.name, one) for module in modules for one in module.objects]
    for name, one in sorted(objects, key=lambda pair: compile_order(pair[1].source)):
        lines += [f"build {name}/{one.name}: compile_{name} {escape(HERE / one.source)}"]
        lines += [f"  flags = {quote(one.flags)}"]
    return "\n".join([*lines, *(module.link_step() for module in modules), ""])


def cpu_module(target):
    compiler = find_compiler()
    isas = instruction_sets(compiler)
    have = [f"-DANL_HAVE_{isa.upper()}" for isa in isas if isa != "baseline"]
    objects = [Object("module.o", CPU / "module.cpp", ["-O1", *module_flags(), *have])]  # pybind11's templates
    for isa in isas:
        for source in KERNEL_SOURCES:
            flags = [f"-DANL_ISA={isa}", *ISA_FLAGS[isa]]
            objects.append(Object(f"{Path(source).stem}_{isa}.o", CPU / source, flags))
    compile_command = [*compiler, *CXX_FLAGS, f"-I{HERE / 'csrc'}", *flags_from_env("CPPFLAGS", "CXXFLAGS")]
    return Module("cpu", compile_command, [*compiler, *link_flags(), *flags_from_env("LDFLAGS")], objects, target)


# ---- CUDA


@functools.cache
def find_nvcc():
    """nvcc as CUDACXX, CUDA_HOME or PATH have it; None if there is none, or none is wanted."""
    if is_set("ANL_KERNELS_NO_CUDA"):
        return None
    named, home = os.environ.get("CUDACXX"), os.environ.get("CUDA_HOME")
    if named and shutil.which(named) is None:
        raise SetupError(f"the nvcc that CUDACXX names ({named}) was not found: correct it, or {NO_CUDA}.")
    candidates = [named] if named else [*([str(Path(home, "bin", "nvcc"))] if home else []), "nvcc"]
    candidates += [] if named else ["/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def nvcc_architectures(nvcc):
    """What this nvcc compiles for: ("75", "80", ...)."""
    try:
        result = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
        problem = result.stderr or result.stdout
    except OSError as error:
        result, problem = None, str(error)
    found = [line.removeprefix("sm_") for line in result.stdout.split() if line.startswith("sm_")] if result else []
    if not found:
        raise SetupError(f"'{nvcc} --list-gpu-code' fails ({problem.strip()[:200]}): repair it, or {NO_CUDA}.")
    return found


def present_architectures():
    """Those of the GPUs of this machine, and PTX of the newest; () without a GPU."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        result = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    words = {line.strip().replace(".", "") for line in result.stdout.splitlines()} if result.returncode == 0 else set()
    archs = sorted((word for word in words if word.isdigit()), key=int)
    return (*archs, f"{archs[-1]}+PTX") if archs else ()


def asked_architectures():
    return os.environ.get("ANL_KERNELS_CUDA_ARCHS", "").strip()


def architectures(nvcc):
    """("80", "90", "90+PTX"): machine code for each, and PTX that is compiled where the kernels first run."""
    known = nvcc_architectures(nvcc)
    asked = asked_architectures()
    if asked and asked != "all":
        archs = asked.replace(",", ";").replace(" ", ";").replace(".", "").split(";")
        for arch in archs:
            if arch.removesuffix("+PTX") not in known:
                raise SetupError(
                    f"ANL_KERNELS_CUDA_ARCHS={asked}: {nvcc} cannot compile for '{arch}'; it knows {', '.join(known)}."
                )
        return tuple(archs)
    if not asked:
        return present_architectures() or WITHOUT_GPU
    archs = [arch for arch in ALL_ARCHS if arch in known]
    return (*archs, f"{archs[-1]}+PTX")


def architecture_of_source(arch, source):
    """`arch`, or for clusters the oldest PTX that has them: a newer GPU would else run what only traps."""
    number, is_ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
    return f"{CLUSTER_ARCH}+PTX" if is_ptx and source == CLUSTER_SOURCE and int(number) < CLUSTER_ARCH else arch


def code_flags(archs, source):
    flags = []
    for arch in dict.fromkeys(architecture_of_source(arch, source) for arch in archs):
        number = arch.removesuffix("+PTX")
        kind = "compute" if arch.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def cuda_module(target):
    nvcc = find_nvcc()
    archs = architectures(nvcc)
    variants = [] if asked_architectures() or present_architectures() else FULL_ALONE
    print(f"anl_kernels: CUDA kernels for {', '.join(archs)}, by {nvcc}", flush=True)
    sources = sorted((HERE / CUDA).glob("*.cu"))
    objects = [Object(f"{path.stem}.o", CUDA / path.name, code_flags(archs, path.name)) for path in sources]
    objects += [Object(f"{name}.o", CUDA / f"{name}.cpp", []) for name in ("select", "device")]
    objects.append(Object("module.o", CUDA / "module.cpp", [*module_flags(), f'-DANL_CUDA_ARCHS="{";".join(archs)}"']))
    host = ["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
    folders = [Path(nvcc).resolve().parents[1] / name for name in ("lib64", "lib")]
    link = [nvcc, *host, "-shared", "-cudart=static", *(f"-L{folder}" for folder in folders if folder.is_dir())]
    return Module("cuda", [nvcc, *host, *NVCC_FLAGS, *variants, f"-I{HERE / 'csrc'}"], link, objects, target)


# ---- setuptools


class BuildExt(build_ext):
    """Compiles with ninja: in parallel, and again only what changed since the last build in this folder."""

    def build_extensions(self):
        # A folder of its own, and not the temporary one of an editable install, so that objects are found again.
        folder = HERE / "build" / f"ninja-{self.plat_name}-{sys.implementation.cache_tag}"
        if os.environ.get("CXX"):
            folder = folder.with_name(f"{folder.name}-{Path(find_compiler()[0]).name}")
        folder.mkdir(parents=True, exist_ok=True)
        files = {ext.name: Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions}
        modules = [(cuda_module if name.endswith("_cuda") else cpu_module)(file.name) for name, file in files.items()]
        (folder / "build.ninja").write_text(ninja_file(modules))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        build = [find_ninja(), "-C", str(folder), "-j", jobs]
        if subprocess.run(build, stdin=subprocess.DEVNULL, env=module_environment()).returncode != 0:
            way_out = f"if it is csrc/cuda, {NO_CUDA}; or {WAY_OUT}" if len(modules) > 1 else WAY_OUT
            raise SetupError(f"compiling {' and '.join(files)} failed, the compiler's messages are above; {way_out}.")
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)
            # Replaced as a whole: a process that has the old file mapped keeps it.
            partial = file.with_suffix(".tmp")
            shutil.copy2(folder / file.name, partial)
            partial.replace(file)


def extension(name, folder, sources):
    headers = {*glob.glob(f"{HERE}/csrc/*.h"), *glob.glob(f"{HERE / folder}/*.*h")}
    depends = sorted(Path(path).relative_to(HERE).as_posix() for path in headers)
    sources = [(folder / source).as_posix() for source in sources]
    return Extension(name, sources=sources, depends=depends, language="c++")


def extensions():
    if NO_EXT:
        return []
    found = [extension("anl_kernels._cpu", CPU, ["module.cpp", *KERNEL_SOURCES])]
    if find_nvcc():
        sources = sorted(path.name for path in (HERE / CUDA).glob("*.c*") if path.suffix in (".cu", ".cpp"))
        found.append(extension("anl_kernels._cuda", CUDA, sources))
    elif not is_set("ANL_KERNELS_NO_CUDA"):
        print("anl_kernels: no nvcc was found (CUDACXX, CUDA_HOME, PATH): without the CUDA kernels", flush=True)
    return found


def main():
    modules = []
    try:
        if not NO_EXT and {"bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"} & set(sys.argv):
            find_compiler()  # before anything else is done, so that this sentence stands alone
            if find_nvcc():
                architectures(find_nvcc())
        modules = extensions()
    except SetupError as error:
        sys.exit(f"error: {error}")
    setup(ext_modules=modules, cmdclass={"build_ext": BuildExt})


main()
