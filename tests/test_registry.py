"""Backends: what runs where, by whose choice, and what is said when one cannot."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anl_kernels as ak
from anl_kernels import losses

LOGITS, TARGET = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
AVAILABLE = {b.name for b in ak.backends() if b.available}


def python(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1]), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")


def test_list_of_backends():
    found = ak.backends()
    assert {"cpu", "reference"} <= {b.name for b in found}
    for backend in found:
        assert backend.reason, backend.name
    assert "reference" in AVAILABLE


def test_the_compiled_module_is_there():
    """Without it most of these tests would be skipped: that must be meant."""
    if os.environ.get("ANL_KERNELS_NO_EXT", "") in ("", "0"):
        assert "cpu" in AVAILABLE, f"in {ak.__file__}: {[b for b in ak.backends() if b.name == 'cpu']}"


@pytest.mark.thorough
def test_a_built_module_is_used(cpu):
    """If it loads, it is a backend, and the one that auto takes."""
    assert "cpu" in AVAILABLE
    call = "ak.anl_ce(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))"
    assert python(used(call)).stdout.strip() == "cpu"


@pytest.mark.parametrize("name", ["nothing", "", "CPU", None, 3])
def test_unknown_backends(name):
    with pytest.raises((ValueError, TypeError), match="backend"):
        ak.anl_ce(LOGITS, TARGET, backend=name)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why(name):
    if name in AVAILABLE:
        pytest.skip("it can run here")
    with pytest.raises((RuntimeError, ValueError), match=name):
        ak.anl_ce(LOGITS, TARGET, backend=name)


@pytest.mark.thorough
@pytest.mark.parametrize(("environment", "reason"), [(dict(TRITON_INTERPRET="0"), "GPU"), (dict(), "Triton's device")])
def test_triton_says_why_it_does_not_run(environment, reason):
    """Without a GPU; and interpreted, where its tensors are the CPU's."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("it runs here")
    code = (
        "import torch, anl_kernels as ak\n"
        "device = 'cpu' if {b.name: b for b in ak.backends()}['triton'].available is False else 'meta'\n"
        "ak.anl_ce(torch.zeros(2, 3, device=device), torch.zeros(2, device=device).long(), backend='triton')"
    )
    result = python(code, **environment)
    assert result.returncode != 0 and reason in result.stderr.splitlines()[-1], result.stderr


@pytest.mark.thorough
def test_auto_never_interprets(cpu):
    """TRITON_INTERPRET=1 makes the triton backend available on the CPU, for tests: only by its name."""
    call = "ak.anl_ce(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))"
    assert python(used(call), TRITON_INTERPRET="1").stdout.strip() == "cpu"


def test_an_explicit_backend_that_cannot_run_this_call(cpu):
    """Never another in its place."""
    meta = torch.empty(4, 6, device="meta")
    with pytest.raises((RuntimeError, ValueError), match="cpu"):
        ak.anl_ce(meta, TARGET.to("meta"), backend="cpu")


def used(call):
    """Which backend a call went to."""
    code = (
        "import torch, anl_kernels as ak\n"
        "from anl_kernels.backends import cpu, reference\n"
        "seen = []\n"
        "def spy(module, name):\n"
        "    if hasattr(module, name):\n"
        "        old = getattr(module, name)\n"
        "        def new(*a, **k):\n"
        "            seen.append(module.NAME)\n"
        "            return old(*a, **k)\n"
        "        setattr(module, name, new)\n"
        "spy(cpu, 'row_loss'); spy(reference, 'loss_by_formulas')\n"
        f"{call}\n"
        "print(','.join(dict.fromkeys(seen)))\n"
    )
    return code


CALL = "ak.anl_ce(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]){})"


@pytest.mark.thorough
def test_auto_takes_the_fastest(cpu):
    assert python(used(CALL.format(""))).stdout.strip() == "cpu"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("value", "argument", "expected"),
    [
        ("reference", "", "reference"),
        ("reference", ", backend='cpu'", "cpu"),
        ("auto", "", "cpu"),
        ("", "", "cpu"),
    ],
)
def test_the_environment_overrides_auto(cpu, value, argument, expected):
    result = python(used(CALL.format(argument)), ANL_KERNELS_BACKEND=value)
    assert result.stdout.strip() == expected, result.stderr


def test_what_is_chosen_is_chosen_anew_where_something_changed(cpu, monkeypatch):
    """Another device, another ANL_KERNELS_BACKEND: what an earlier call of the same loss took does not count."""
    loss = ak.NCE() + 3 * ak.MAE()
    call = loss(LOGITS, TARGET)
    taken = lambda: ak.registry.choose(LOGITS, ak.functional._cached_call(loss, OPTIONS)).NAME
    assert taken() == "cpu"
    on_meta = loss(LOGITS.to("meta"), TARGET.to("meta"))
    assert on_meta.device.type == "meta" and on_meta.shape == call.shape
    monkeypatch.setenv("ANL_KERNELS_BACKEND", "reference")
    assert taken() == "reference"


OPTIONS = (-100, "mean", 0.0, 1e-7, False, None, "auto")


@pytest.mark.parametrize(("backend", "value", "named"), [
    ("auto", None, False), ("auto", "", False), ("auto", "auto", False), ("auto", "cpu", True), ("cpu", None, True),
])  # fmt: skip
def test_a_backend_is_named_by_the_caller_or_the_environment(monkeypatch, backend, value, named):
    monkeypatch.delenv("ANL_KERNELS_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("ANL_KERNELS_BACKEND", value)
    assert ak.call.checked_call(ak.NCE(), *OPTIONS[:-1], backend).explicit == named


@pytest.mark.thorough
def test_a_wrong_environment_is_an_error():
    result = python(used(CALL.format("")), ANL_KERNELS_BACKEND="nothing")
    assert result.returncode != 0 and "nothing" in result.stderr


@pytest.mark.thorough
def test_a_fallback_is_logged_once(cpu):
    """What the fused backend cannot do goes to the next, with one line that says why."""
    code = used(
        "import logging\n"
        "lines = []\n"
        "class Keep(logging.Handler):\n"
        "    def emit(self, record):\n"
        "        lines.append((record.levelname, record.getMessage()))\n"
        "logging.getLogger('anl_kernels').addHandler(Keep())\n"
        "from anl_kernels.backends import cpu\n"
        "ak.registry.FUSED_BY_DEVICE['cpu'] = ('cpu',)\n"
        "cpu.cannot_run = lambda logits, call: 'it is not its day'\n"
        "for reduction in ('mean', 'sum', 'none'):\n"
        "    ak.gce(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]), reduction=reduction)\n"
        "assert len(lines) == 1 and 'cpu' in lines[0][1] and 'day' in lines[0][1], lines\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("reference")


@pytest.mark.thorough
def test_without_the_compiled_module():
    """ANL_KERNELS_NO_EXT's package: everything runs on the reference, and says why."""
    code = (
        "import sys\n"
        "sys.modules['anl_kernels._cpu'] = None\n"
        "import torch, anl_kernels as ak\n"
        "found = {b.name: b for b in ak.backends()}\n"
        "assert not found['cpu'].available and found['cpu'].reason\n"
        "z = torch.randn(4, 6, requires_grad=True)\n"
        "ak.anl_ce(z, torch.tensor([0, 1, 2, 3])).backward()\n"
        "try:\n"
        "    ak.anl_ce(z, torch.tensor([0, 1, 2, 3]), backend='cpu')\n"
        "except RuntimeError as error:\n"
        "    assert found['cpu'].reason in str(error), error\n"
        "else:\n"
        "    raise AssertionError('ran')\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_one_kernel_call_for_any_sum(cpu, monkeypatch):
    """Forward and backward of all terms: one pass; by statistics, or with the gradient in backward: two."""
    from anl_kernels.backends import cpu as adapter

    calls = []

    class Counting:
        def __getattr__(self, name):
            function = getattr(cpu, name)
            if name not in ("row_loss", "row_stats", "row_grad", "column_sums"):
                return function
            return lambda *args: calls.append(name) or function(*args)

    monkeypatch.setattr(adapter, "_cpu", Counting())

    def count(criterion, **keywords):
        calls.clear()
        ak.robust_loss(LOGITS.clone().requires_grad_(), TARGET, criterion, backend="cpu", **keywords).sum().backward()
        return list(calls)

    everything = sum(term() for term in losses.BUILT_IN)
    assert count(everything) == ["row_loss"]
    assert count(everything, recompute=True) == ["row_loss", "row_grad"]
    assert count(everything, reduction="none") == ["row_loss", "row_grad"]
    assert count(everything, entropy_weight=1.0) == ["row_loss", "column_sums", "row_grad"]
    assert count(everything + ak.RowLoss(lambda s: s.lse)) == ["row_stats", "row_grad"]
    calls.clear()
    with torch.no_grad():
        ak.robust_loss(LOGITS, TARGET, everything, backend="cpu")
    assert calls == ["row_loss"]


# ---- the package


def test_import_is_light():
    """Neither Triton nor PyTorch's compiler, which take seconds, nor what only the command line needs."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import anl_kernels\n"
        "new = set(sys.modules) - before\n"
        "heavy = ('triton', 'torch._dynamo', 'torch._inductor', 'torch.distributed', 'sympy', 'numpy', 'sklearn')\n"
        "heavy += ('matplotlib', 'tqdm', 'tabulate', 'pytest')\n"
        "found = [h for h in heavy if any(name == h or name.startswith(h + '.') for name in new)]\n"
        "assert not found, found\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_every_public_name_exists_and_is_documented():
    for name in ak.__all__:
        assert getattr(ak, name).__doc__, name
    promised = (
        "anl_ce anl_fl nce nnce nfl nnfl cross_entropy focal mae rce sce gce agce aul ael mse amse jal_ce jal_fl "
        "eps_ce robust_loss l1_penalty backends CE NCE NNCE FL NFL NNFL MAE RCE GCE AGCE AUL AEL MSE AMSE EpsCE "
        "RowLoss ANLCELoss ANLFLLoss RobustLoss"
    )
    assert set(promised.split()) <= set(ak.__all__)


def test_version_is_the_packages():
    from importlib import metadata

    try:
        installed = metadata.version("anl_kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("run from the source tree, not installed")
    assert ak.__version__ == installed


def test_logging_is_silent_by_default(caplog):
    with caplog.at_level(logging.DEBUG, logger="anl_kernels"):
        ak.anl_ce(LOGITS, TARGET)
    assert not caplog.records
