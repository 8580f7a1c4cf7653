"""The C++ sources of `_cpu`, compiled with sanitizers, on random shapes, strides, labels and values."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough
ROOT = Path(__file__).resolve().parents[1]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"


@pytest.fixture(scope="module")
def compiler():
    command = os.environ.get("CXX") or shutil.which("g++")
    if sys.platform != "linux" or command is None or not (ROOT / "setup.py").exists():
        pytest.skip("needs g++ on Linux and the source tree")
    return command


def runtime(compiler, name):
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def run(folder, calls, compiler):
    libraries = f"{runtime(compiler, 'libasan.so')} {runtime(compiler, 'libubsan.so')}"
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "sanitized_calls.py"), str(folder), str(calls)],
        env={**os.environ, "LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )


def build(folder, compiler, defines=""):
    flags = {"ANL_KERNELS_NO_CUDA": "1", "CXX": compiler, "CXXFLAGS": f"-O1 {SANITIZE} {defines}", "LDFLAGS": SANITIZE}
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-temp",
        f"{folder}/objects",
        "-b",
        f"{folder}",
    ]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder / "anl_kernels"


def test_no_access_out_of_bounds_and_no_undefined_behaviour(tmp_path, compiler):
    module = build(tmp_path, compiler)
    result = run(module, 150, compiler)
    assert result.returncode == 0, result.stderr[:4000]
    assert "clean: baseline" in result.stdout
