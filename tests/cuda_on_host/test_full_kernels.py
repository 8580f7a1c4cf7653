"""Full kernels, given losses that lean ones run, write the same bits: what few losses need costs the others nothing."""

import shutil
import subprocess
import sys

import pytest
from cuda_on_host import build, sanitizers

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(build.compiler() is None, reason="needs g++ on Linux and the source tree"),
]
CASES = "small,one_cta,block,block_apart,cluster,split,spatial_few,spatial,spatial_long"


def digests(csrc):
    command = [sys.executable, str(sanitizers.CALLS), str(build.build(csrc=csrc)), CASES, "--float32"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_full_kernels_write_what_lean_ones_do(tmp_path):
    for kind in ("lean", "full"):
        shutil.copytree(build.ROOT / "csrc", tmp_path / kind)
        build.compile_only(tmp_path / kind, ["FLOAT32"])
    # As where the package is installed without a GPU.
    build.replace(tmp_path / "full" / "call.h", "defined\\(ANL_FULL_KERNELS_ALONE\\)", "1")
    found = digests(tmp_path / "lean")
    assert found.count("done") == CASES.count(",") + 1
    assert digests(tmp_path / "full") == found
