"""`python -m anl_kernels` where the GPU is the emulation: python cli.py DEVICE COMMAND...

DEVICE "dies" or "hangs": a GPU on which the process does that as soon as a protocol is verified.
"""

import os
import signal
import sys
import time
from pathlib import Path


def run(device, arguments):
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests.parent), str(tests / "support"), str(tests)]
    os.environ.pop("TRITON_INTERPRET", None)
    from cuda_on_host import adapter

    from anl_kernels.__main__ import main
    from anl_kernels.cli import verify

    # Enough for a small device, whose calls take half a second.
    verify.ROWS, verify.CLASSES, verify.CASES = (1, 24), (37, 403, 3001), 2
    verify.DTYPES, verify.LOSSES, verify.REPEATS = ("fp32",), ("ANL-CE",), 2
    with adapter.on_host(device):
        return main(arguments)


if __name__ == "__main__":
    device, *arguments = sys.argv[1:]
    verifies = "--protocol" in arguments
    if device == "dies" and verifies:
        os.kill(os.getpid(), signal.SIGABRT)
    if device == "hangs" and verifies:
        time.sleep(600)
    sys.exit(run("host" if device in ("dies", "hangs") else device, arguments))
