"""Full kernels, given losses that lean ones run, write the same to rounding: they take exps in another way."""

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


def sizes(csrc):
    command = [sys.executable, str(sanitizers.CALLS), str(build.build(csrc=csrc)), CASES, "--float32", "--sizes"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: [float(x) for x in sizes] for _, name, *sizes in map(str.split, lines)}


def test_full_kernels_write_what_lean_ones_do(tmp_path):
    for kind in ("lean", "full"):
        shutil.copytree(build.ROOT / "csrc", tmp_path / kind)
        build.compile_only(tmp_path / kind, ["FLOAT32"])
    # As where the package is installed without a GPU.
    build.replace(tmp_path / "full" / "call.h", "defined\\(ANL_FULL_KERNELS_ALONE\\)", "1")
    lean, full = sizes(tmp_path / "lean"), sizes(tmp_path / "full")
    assert list(lean) == list(full) == CASES.split(",")
    for name in lean:
        assert full[name] == pytest.approx(lean[name], rel=1e-5), name
