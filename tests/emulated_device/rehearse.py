"""Runs Python with the emulated device as its GPU: python rehearse.py -m MODULE [ARGUMENT...] | SCRIPT [ARGUMENT...]"""

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.update(ANL_TEST_DEVICE="emulated", TRITON_INTERPRET="1")
sys.path[:1] = [os.getcwd(), str(HERE.parent)]

import devices  # noqa: E402

devices.emulate()

from anl_kernels.cli import verify  # noqa: E402

verify.COMMAND = [sys.executable, __file__, "-m", "anl_kernels"]

if sys.argv[1] == "-m":
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
