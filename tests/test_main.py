"""`python -m anl_kernels` as it is typed; what the commands do is in test_cli.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import anl_kernels as ak
from anl_kernels.__main__ import main


def run(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1]), **environment}
    command = [sys.executable, "-m", "anl_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", timeout=300)


@pytest.mark.thorough
def test_info_names_every_backend_and_the_instruction_set():
    result = run("info", ANL_KERNELS_CPU_ISA="baseline")
    assert result.returncode == 0, result.stderr
    for backend in ak.backends():
        assert backend.name in result.stdout
        assert backend.reason in result.stdout
        if backend.name == "cpu" and backend.available:
            assert "baseline" in result.stdout
    assert ak.__version__ in result.stdout


@pytest.mark.thorough
def test_check_passes():
    result = run("check", TRITON_INTERPRET="0")  # interpreted it would take minutes
    assert result.returncode == 0, result.stdout + result.stderr
    for backend in ak.backends():
        if backend.available and not (backend.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            assert f"backend {backend.name}" in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"anl_kernels {ak.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["info", "--nothing"]], ids=str)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err
