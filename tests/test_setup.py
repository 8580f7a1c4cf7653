"""setup.py: which nvcc, which architectures, what is said when something is wrong. Nothing is compiled here."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = '#!/bin/sh\nfor arch in 75 80 86 90 100; do echo "sm_$arch"; done\n'
ENVIRONMENT = ("CUDACXX", "CUDA_HOME", "ANL_KERNELS_NO_CUDA", "ANL_KERNELS_NO_EXT", "ANL_KERNELS_CUDA_ARCHS", "CXX")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """None of the variables set; on PATH an nvcc that knows five architectures, and no GPU."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    program(tmp_path / "bin" / "nvcc", NVCC)
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return monkeypatch


def setup_py(monkeypatch):
    """The functions of setup.py, which has printed the package's name."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--name"])
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


def architectures(monkeypatch):
    setup = setup_py(monkeypatch)
    return setup["architectures"](setup["find_nvcc"]())


def test_which_nvcc(environment, tmp_path):
    """CUDACXX before CUDA_HOME before PATH."""
    on_path = str(tmp_path / "bin" / "nvcc")
    assert setup_py(environment)["find_nvcc"]() == on_path
    home = program(tmp_path / "toolkit" / "bin" / "nvcc", NVCC)
    environment.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert setup_py(environment)["find_nvcc"]() == home
    environment.setenv("CUDACXX", on_path)
    assert setup_py(environment)["find_nvcc"]() == on_path


def test_extensions(environment, capsys):
    names = lambda: [extension.name for extension in setup_py(environment)["extensions"]()]
    assert names() == ["anl_kernels._cpu", "anl_kernels._cuda"]
    environment.setenv("ANL_KERNELS_NO_CUDA", "1")
    assert names() == ["anl_kernels._cpu"]
    assert "no nvcc" not in capsys.readouterr().out
    environment.delenv("ANL_KERNELS_NO_CUDA")
    environment.setenv("ANL_KERNELS_NO_EXT", "0")
    assert names() == ["anl_kernels._cpu", "anl_kernels._cuda"]
    environment.setenv("ANL_KERNELS_NO_EXT", "1")
    assert names() == []


def test_without_nvcc_the_install_says_so(environment, capsys):
    setup = setup_py(environment)
    setup["find_nvcc"].cache_clear()
    environment.setattr(shutil, "which", lambda name: None)
    assert [extension.name for extension in setup["extensions"]()] == ["anl_kernels._cpu"]
    assert "no nvcc was found" in capsys.readouterr().out


def test_architectures(environment, tmp_path):
    assert architectures(environment) == ("80+PTX",)  # no GPU: nothing is known of the one that may come
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 9.0\necho 8.6\necho 9.0\n")
    assert architectures(environment) == ("86", "90", "90+PTX")
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 10.0\necho 9.0\n")
    assert architectures(environment) == ("90", "100", "100+PTX")
    environment.setenv("ANL_KERNELS_CUDA_ARCHS", "8.0 90+PTX")
    assert architectures(environment) == ("80", "90+PTX")
    environment.setenv("ANL_KERNELS_CUDA_ARCHS", "all")
    assert architectures(environment) == ("80", "86", "90", "100", "100+PTX")  # what this nvcc knows of them


def test_flags_of_the_architectures(environment):
    flags = setup_py(environment)["code_flags"]
    machine_code, ptx = "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=compute_90"
    assert flags(("80", "90+PTX"), "rows_block.cu") == [machine_code, ptx]
    assert flags(("80+PTX",), "rows_block.cu") == ["-gencode=arch=compute_80,code=compute_80"]
    # Clusters: PTX for less than sm_90 would run on newer GPUs, and only trap there.
    assert flags(("80+PTX",), "rows_cluster.cu") == [ptx]
    assert flags(("80", "86+PTX", "90+PTX"), "rows_cluster.cu") == [machine_code, ptx]
    assert flags(("100+PTX",), "rows_cluster.cu") == ["-gencode=arch=compute_100,code=compute_100"]


def test_only_clusters_need_more_than_sm_80():
    """What is compiled differently for sm_90 would be lost in PTX for sm_80."""
    cuda = ROOT / "csrc" / "cuda"
    dependent = sorted(path.name for path in cuda.iterdir() if "__CUDA_ARCH__" in path.read_text())
    # packed.cuh: a comparison that takes longer on sm_80; two_floats.cuh: two instructions for one before sm_100
    assert dependent == ["packed.cuh", "primitives.cuh", "two_floats.cuh"]
    text = (cuda / "primitives.cuh").read_text()
    assert text.count("__CUDA_ARCH__") == 6  # a line each: ANL_SM90's, and two that are nothing in code for sm_80
    names = re.findall(r"^ANL_DEVICE \w+\*? (\w+)\([^{]*\{(?:[^}]|\n(?!\}))*?ANL_SM90", text, re.MULTILINE)
    assert {"barrier_init", "bulk_copy", "cluster_rank", "cluster_send16"} <= set(names)
    uses = {path.name for path in cuda.glob("*.cu*") if re.search(rf"\b({'|'.join(names)})\(", path.read_text())}
    assert uses == {"primitives.cuh", "cluster_rows.cuh"}
    assert [path.name for path in cuda.iterdir() if '"cluster_rows.cuh"' in path.read_text()] == ["rows_cluster.cu"]


def test_every_source_is_compiled_and_the_runtime_is_static(environment):
    setup = setup_py(environment)
    rules = setup["ninja_file"]([setup["cuda_module"]("_cuda.so")])
    for path in (ROOT / "csrc" / "cuda").iterdir():
        if path.suffix in (".cu", ".cpp"):
            assert f"{path}\n" in rules, path.name
    assert rules.count("-cudart=static") == 2
    assert 'ANL_CUDA_ARCHS="80+PTX"' in rules
    assert "torch" not in rules.replace(str(ROOT), "")


def test_lean_kernels_are_left_out_only_where_there_is_no_gpu_and_none_is_named(environment, tmp_path):
    def leaves_out():
        setup = setup_py(environment)
        return "-DANL_FULL_KERNELS_ALONE" in setup["cuda_module"]("_cuda.so").compile

    assert leaves_out()
    environment.setenv("ANL_KERNELS_CUDA_ARCHS", "80+PTX")
    assert not leaves_out()
    environment.delenv("ANL_KERNELS_CUDA_ARCHS")
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 9.0\n")
    assert not leaves_out()


def test_both_modules_are_compiled_at_once_the_longest_source_first(environment):
    setup = setup_py(environment)
    rules = setup["ninja_file"]([setup["cpu_module"]("_cpu.so"), setup["cuda_module"]("_cuda.so")])
    compiled = re.findall(r"^build ((?:cpu|cuda)/\w+\.o): compile_\w+ .*/(\w+\.\w+)$", rules, re.MULTILINE)
    assert len({name for name, _ in compiled}) == len(compiled)
    assert list(dict.fromkeys(source for _, source in compiled))[:5] == list(setup["COMPILED_FIRST"])  # all exist
    assert {"cpu/module.o", "cuda/module.o", "cpu/rows_baseline.o", "cuda/rows_small.o"} <= {
        name for name, _ in compiled
    }
    links = re.findall(r"^build (_\w+\.so): link_(\w+) (.*)$", rules, re.MULTILINE)
    assert [link[:2] for link in links] == [("_cpu.so", "cpu"), ("_cuda.so", "cuda")]
    assert sorted(f"{links[0][2]} {links[1][2]}".split()) == sorted(name for name, _ in compiled)


def test_a_second_install_finds_its_objects(environment):
    """With build isolation pybind11 is in a new folder each time: the environment names it, the command does not."""
    environment.setenv("CPLUS_INCLUDE_PATH", "/mine")
    setup = setup_py(environment)
    for module in (setup["cpu_module"]("_cpu.so"), setup["cuda_module"]("_cuda.so")):
        rules = setup["ninja_file"]([module])
        assert pybind11.get_include() not in rules and pybind11.__version__ in rules
    folders = setup["module_environment"]()["CPLUS_INCLUDE_PATH"].split(os.pathsep)
    assert folders[0] == pybind11.get_include() and folders[-1] == "/mine"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ANL_KERNELS_CUDA_ARCHS": "80;77"}, r"error: ANL_KERNELS_CUDA_ARCHS=80;77: .*'77'; it knows 75, 80"),
        ({"CUDACXX": "/nonexistent/nvcc"}, r"error: .*/nonexistent/nvcc.*ANL_KERNELS_NO_CUDA=1"),
        ({"CUDACXX": shutil.which("false") or "false"}, r"error: .*--list-gpu-code' fails.*ANL_KERNELS_NO_CUDA=1"),
    ],
    ids=["architecture", "missing", "broken"],
)
def test_what_is_wrong_is_said_before_anything_is_built(environment, tmp_path, variables, said):
    for name, value in variables.items():
        environment.setenv(name, value)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "-b", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(said, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
