"""The command line: `info` and `check` run and say what they should."""

import os
import subprocess
import sys
from pathlib import Path

import anl_kernels as ak
import pytest


def run(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1]), **environment}
    command = [sys.executable, "-m", "anl_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", timeout=300)


def test_info_names_every_backend():
    result = run("info")
    assert result.returncode == 0, result.stderr
    for backend in ak.backends():
        assert backend.name in result.stdout
        assert backend.reason in result.stdout
    assert ak.__version__ in result.stdout


def test_info_names_the_instruction_set(cpu):
    assert cpu.info()["isa"] in run("info").stdout
    assert "baseline" in run("info", ANL_KERNELS_CPU_ISA="baseline").stdout


@pytest.mark.slow
def test_check_passes():
    pytest.importorskip("tabulate")
    result = run("check")
    assert result.returncode == 0, result.stdout + result.stderr
    for backend in ak.backends():
        if backend.available:
            assert backend.name in result.stdout


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("info", "--nothing")], ids=str)
def test_wrong_arguments(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert "usage" in result.stderr
