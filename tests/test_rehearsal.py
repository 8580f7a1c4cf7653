"""A part of what `REHEARSE=1 benchmarks/gpu.sh` runs: tests of GPU backends with tensors on an emulated device.

The whole rehearsal takes minutes; this keeps it from rotting, and shows that it fails where a GPU would.
"""

import os
import subprocess
import sys
from pathlib import Path

import cuda_on_host.build
import devices
import pytest

import anl_kernels as ak

TESTS = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        devices.GPU is not None or not cuda_on_host.build.compiler(), reason="needs g++ on Linux, and no GPU"
    ),
]
# A test that forgets where its backend's tensors live, in two ways, and one that does not.
FORGETFUL = """
import helpers, pytest, torch
import anl_kernels as ak

def call(one_fused):
    return ak.anl_ce(torch.zeros(4, 6), torch.tensor([0, 1, 2, 3]), backend=one_fused.name)

def test_on_the_cpu(one_fused):
    call(one_fused)

@helpers.THERE
def test_on_the_device(one_fused):
    call(one_fused)

@helpers.THERE
def test_compared_with_the_cpu(one_fused):
    assert (torch.zeros(3) == torch.zeros(3, device="cpu")).all()

@helpers.THERE
def test_random_numbers_of_the_cpu(one_fused):
    torch.randn(3, generator=helpers.generator(0))
"""


def pytest_on_the_emulated_device(*arguments):
    folders = TESTS, TESTS / "support", Path(ak.__file__).parents[1]
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", str(TESTS.parent / "pyproject.toml"), "-m", "gpu", "-n", "0"),
            *("-q", "-rfE", "-p", "no:cacheprovider", *arguments),
        ],
        env={**os.environ, "ANL_TEST_DEVICE": "emulated", "PYTHONPATH": ":".join(map(str, folders))},
        cwd="/",
        capture_output=True,
        text=True,
    )


def test_a_tensor_that_is_left_on_the_cpu_fails(tmp_path):
    file = tmp_path / "test_forgetful.py"
    file.write_text(FORGETFUL)
    done = pytest_on_the_emulated_device("-p", "conftest", str(file), "-k", "cuda")
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {line.split("::")[1].split("[")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"test_on_the_cpu", "test_compared_with_the_cpu", "test_random_numbers_of_the_cpu"}, done.stdout
    assert "the logits are on cpu" in done.stdout and "1 passed" in done.stdout, done.stdout


def test_a_part_of_the_suite_on_the_emulated_device():
    """What only a GPU has, for one kernel, and one file of each kind of test."""
    files = [TESTS / name for name in ("backends/test_gpu.py", "test_functional.py", "test_layout.py", "test_terms.py")]
    names = "(test_gpu and small and not small_many and not triton) or (not test_gpu and cuda)"
    done = pytest_on_the_emulated_device(*map(str, files), "-k", names)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert " passed" in done.stdout.splitlines()[-1], done.stdout
