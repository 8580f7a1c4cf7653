"""Every CUDA kernel on the host under AddressSanitizer and ThreadSanitizer, and the proof that each looks."""

import os
import platform
import shutil
import subprocess
import sys

import cuda_on_host.build as build
import pytest

CALLS = build.HERE / "calls.py"
pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++ on Linux and the source tree")


def runtime(name):
    command = [build.compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def run(module, libraries, *arguments):
    """calls.py with a sanitizer's runtime; every allocation is the sanitizer's, and no address is random."""
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66", "PYTHONMALLOC": "malloc"}
    return subprocess.run(
        [*fixed, sys.executable, str(CALLS), str(module), *arguments],
        env={**os.environ, **options, "LD_PRELOAD": " ".join(map(runtime, libraries))},
        capture_output=True,
        text=True,
        timeout=600,
    )


# ---- memory


@pytest.fixture(scope="module")
def address():
    module = build.build("address")
    return lambda *arguments: run(module, ("libasan.so", "libubsan.so"), *arguments)


def test_no_access_out_of_bounds_and_no_undefined_behaviour(address):
    result = address("all")
    assert result.returncode == 0, result.stderr[:4000]
    assert result.stdout.count("done") == 9


@pytest.mark.parametrize("buffer", ["logits", "grad", "target", "coefs"])
@pytest.mark.parametrize("case", ["small", "block", "cluster", "spatial"])
def test_one_element_too_many_is_seen(address, case, buffer):
    result = address(case, buffer)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr


# ---- races

RACES = "small,block,cluster,split,spatial"


def races(module, cases):
    return run(module, ("libtsan.so",), cases)


def test_no_race(tmp_path):
    result = races(build.build("thread"), RACES)
    assert result.returncode == 0, result.stderr[:6000]
    assert result.stdout.count("done") == RACES.count(",") + 1


BARRIER = "__syncthreads();\n"


@pytest.mark.parametrize(
    "source, line, which, case",
    [
        ("spatial.cu", BARRIER, 0, "spatial"),
        ("rows_block.cu", BARRIER, 0, "block"),
        ("rows_cluster.cu", "cluster_sync();\n", 1, "cluster"),
    ],
    ids=["spatial", "block", "cluster"],
)
def test_a_removed_barrier_is_seen(tmp_path, source, line, which, case):
    """Number `which` of its kind."""
    csrc = tmp_path / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    broken = csrc / "cuda" / source
    parts = broken.read_text().split(line)
    broken.write_text(line.join(parts[: which + 1]) + "\n" + line.join(parts[which + 1 :]))
    result = races(build.build("thread", csrc), case)
    assert result.returncode == 66 and "data race" in result.stderr
