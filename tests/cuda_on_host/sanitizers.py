"""calls.py on a build with a sanitizer, in a process of its own."""

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


def run(module, libraries, *arguments, seed=0, limit=600, **options):
    """With a sanitizer's runtime; every allocation is the sanitizer's, and no address is random."""
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    environment = {
        "ANL_HOST_SEED": str(seed),
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": " ".join(map(runtime, libraries)),
    }
    return subprocess.run(
        [*fixed, sys.executable, str(CALLS), str(module), *arguments],
        env={**os.environ, **environment, **options},
        capture_output=True,
        text=True,
        timeout=limit,
    )


def address(module, *arguments):
    return run(module, ("libasan.so", "libubsan.so"), *arguments, ASAN_OPTIONS="detect_leaks=0")


def races(module, cases, seed=0, limit=600, stop=False):
    """ThreadSanitizer's; stop: at the first."""
    options = f"exitcode={RACE} halt_on_error={int(stop)}"
    return run(module, ("libtsan.so",), cases, "--float32", seed=seed, limit=limit, TSAN_OPTIONS=options)
