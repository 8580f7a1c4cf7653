"""Machine code of csrc/cuda for an architecture: out of what setup.py compiled, or compiled here and kept in build."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from disassembly import run, tool

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KEPT = ROOT / "build" / "cuda_gates"
ONE = ROOT / "tests" / "cuda_gates" / "one_kernel.cu"
FLAGS = ["-std=c++17", "-O3", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
ARCHS = (80, 90, 100)
PTX = 90  # what setup.py leaves as PTX for newer GPUs, and a driver compiles


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def headers_of_all() -> list[Path]:
    return [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/*.cuh")]


def digest(source: Path, arch: int, flags) -> str:
    headers = sorted(headers_of_all() + sources()) if CSRC in source.parents or source == ONE else []
    state = hashlib.sha256(repr((arch, flags)).encode() + run(tool("nvcc"), "--version").encode())
    for path in [source, *headers]:
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def cubin(source: Path, arch: int, *flags: str) -> Path:
    """The file of `source` compiled for sm_`arch`."""
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{source.stem}-sm_{arch}-{digest(source, arch, flags)}.cubin"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".tmp")
            compiled = None if flags else built_object(source)
            if not (compiled and extract(compiled, arch, partial)):
                run(tool("nvcc"), *FLAGS, *flags, f"-arch=sm_{arch}", "-cubin", source, "-o", partial)
            partial.replace(path)
    return path


def one_kernel(stem: str, arch: int, dtype: str, full: bool) -> Path:
    """csrc/cuda/`stem`.cu for one dtype and variant alone: compiled in seconds."""
    source = CSRC / "cuda" / f"{stem}.cu"
    if not source.exists():
        raise FileNotFoundError(source)
    what = (f'-DANL_SOURCE="{source.name}"', f"-DANL_DTYPE={dtype.upper()}", f"-DANL_FULL={str(full).lower()}")
    return cubin(ONE, arch, *what)


def cubins(arch: int) -> dict[str, Path]:
    """All of csrc/cuda: source's stem -> cubin; the longest are begun first."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        files = sorted(sources(), key=lambda path: -path.stat().st_size)
        return dict(zip((path.stem for path in files), pool.map(lambda path: cubin(path, arch), files)))


def built_object(source: Path) -> Path | None:
    """setup.py's object of `source`, if it is newer than everything it was made from, and has the lean kernels too."""
    newest = max(path.stat().st_mtime for path in [source, *headers_of_all()])
    builds = [path.parent for path in (ROOT / "build").glob("ninja-*/build.ninja")]
    whole = [build for build in builds if "ANL_FULL_KERNELS_ALONE" not in (build / "build.ninja").read_text()]
    objects = [build / "cuda" / f"{source.stem}.o" for build in whole]
    objects = [path for path in objects if path.exists() and path.stat().st_mtime > newest]
    return objects[0] if objects else None


def extract(compiled: Path, arch: int, to: Path) -> bool:
    """Machine code for `arch` out of an object, or of the PTX in it; False if it has neither."""
    with tempfile.TemporaryDirectory() as folder:
        run(tool("cuobjdump"), "-xelf", f"sm_{arch}", compiled, folder=folder)
        if found := sorted(Path(folder).glob("*.cubin")):
            shutil.copy(found[0], to)
            return True
        run(tool("cuobjdump"), "-xptx", f"sm_{min(arch, PTX)}", compiled, folder=folder)
        if found := sorted(Path(folder).glob("*.ptx")):
            run(tool("ptxas"), "-O3", f"-arch=sm_{arch}", found[0], "-o", to)
        return bool(found)
