"""Runs Python with the emulated device as its GPU: python rehearse.py -m MODULE [ARGUMENT...] | SCRIPT [ARGUMENT...]"""

import os
import runpy
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.update(ANL_TEST_DEVICE="emulated", TRITON_INTERPRET="1")
sys.path[:1] = [os.getcwd(), str(HERE.parent), str(HERE.parent / "support")]

import devices  # noqa: E402

devices.emulate()

from anl_kernels.cli import verify  # noqa: E402

verify.COMMAND = [sys.executable, __file__, "-m", "anl_kernels"]


def run():
    if sys.argv[1] == "-m":
        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        del sys.argv[0]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


code = 0
try:
    run()
except SystemExit as end:
    code = end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
except BaseException:
    traceback.print_exc()
    code = 1
# Autograd's thread of the device may still hand Python objects back, which a Python that takes itself down aborts.
sys.stdout.flush()
sys.stderr.flush()
os._exit(code or 0)
