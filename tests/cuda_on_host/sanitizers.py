"""Programs that call a build with a sanitizer, in a process of their own."""

import os
import platform
import shutil
import subprocess
import sys

from cuda_on_host import build

CALLS = build.HERE / "calls.py"
RACE = 66  # the exit code


def runtime(name):
    command = [build.compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def run(program, libraries, *arguments, limit=600, **environment):
    """With a sanitizer's runtime, and no random addresses."""
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*fixed, sys.executable, str(program), *map(str, arguments)],
        env={**os.environ, "LD_PRELOAD": " ".join(map(runtime, libraries)), **environment},
        capture_output=True,
        text=True,
        timeout=limit,
    )


def address(program, *arguments, **environment):
    libraries = ("libasan.so", "libubsan.so")
    return run(program, libraries, *arguments, ASAN_OPTIONS="detect_leaks=0", **environment)


def calls(module, *arguments):
    """CUDA's; every allocation is the sanitizer's."""
    return address(CALLS, module, *arguments, PYTHONMALLOC="malloc")


def races(module, cases, seed=0, limit=600, stop=False):
    """ThreadSanitizer's; stop: at the first."""
    options = f"exitcode={RACE} halt_on_error={int(stop)}"
    environment = dict(PYTHONMALLOC="malloc", ANL_HOST_SEED=str(seed), TSAN_OPTIONS=options)
    return run(CALLS, ("libtsan.so",), module, cases, "--float32", limit=limit, **environment)
