"""The compiled module of the CPU backend: instruction sets, no need of PyTorch, memory that it may not touch."""

import os
import subprocess
import sys
from pathlib import Path

import backends_under_test
import helpers
import pytest
import torch
from helpers import EXPRESSIONS
from tiers import thorough

import anl_kernels as ak


def test_instruction_sets(cpu):
    info = cpu.info()
    assert info["isa"] in info["isas"]
    assert "baseline" in info["isas"]
    with pytest.raises(ValueError, match="mmx"):
        cpu.set_isa("mmx")
    cpu.set_isa("baseline")
    assert cpu.info()["isa"] == "baseline"
    cpu.set_isa(info["isa"])


def test_instruction_sets_agree(cpu):
    """On what is exact, to the bit; on the rest, to rounding."""
    results = []
    before = cpu.info()["isa"]
    for backend in backends_under_test.BACKENDS:
        if backend.isa:
            cpu.set_isa(backend.isa)
            values, labels = helpers.batch(129, torch.float32)
            results.append(helpers.calculate(values, labels, helpers.expression(EXPRESSIONS["anl_fl"]), backend="cpu"))
    cpu.set_isa(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-5, atol=1e-7)


# ---- the module knows nothing of PyTorch


def python(code, **environment):
    package = Path(ak.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(package), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("anl_kernels._cpu", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def test_the_module_loads_without_torch(cpu):
    """Every symbol bound at once, nothing of torch among them, and it computes: on one thread."""
    code = LOAD.format(path=cpu.__file__) + (
        "import ctypes, os, array, math\n"
        f"ctypes.CDLL({cpu.__file__!r}, mode=os.RTLD_NOW)\n"
        "assert 'torch' not in sys.modules\n"
        "if os.path.exists('/proc/self/maps'):\n"
        "    text = open('/proc/self/maps').read()\n"
        "    assert 'torch' not in text.replace(module.__file__, '') and 'libc10' not in text\n"
        "z, g = array.array('f', [0.0] * 8), array.array('f', [7.0] * 8)\n"
        "y, l = array.array('q', [0, 1]), array.array('f', [7.0])\n"
        "address = lambda a: a.buffer_info()[0]\n"
        "program = module.Program([(0, 1.0, 0.0, 0.0)], 1e-7, 0.0, 0)\n"
        "z_view, g_view = (address(z), (4, 1, 0)), (address(g), (4, 1, 0))\n"
        "rest = address(y), 0, -100, 0, 1, address(l), 0, False\n"
        "bad = module.row_loss(program, 0, (2, 4, 1), *z_view, *g_view, *rest)\n"
        "assert bad == -1 and abs(l[0] - math.log(4)) < 1e-6, l\n"
        "assert abs(g[0] + 0.375) < 1e-6 and abs(g[1] - 0.125) < 1e-6, g\n"
        "print(module.info())\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_environment_chooses_the_instruction_set(cpu):
    code = LOAD.format(path=cpu.__file__) + "print(module.info()['isa'])"
    assert python(code, ANL_KERNELS_CPU_ISA="baseline").stdout.strip() == "baseline"


def test_the_best_instruction_set_is_the_default(cpu):
    code = LOAD.format(path=cpu.__file__) + "print(module.info()['isa'] == module.info()['isas'][0])"
    environment = {name: value for name, value in os.environ.items() if name != "ANL_KERNELS_CPU_ISA"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "True\n", result.stderr


def test_torchs_threads_are_used(cpu):
    torch.set_num_threads(2)
    assert cpu.info()["threads"] == "torch_parallel_for"


# ---- memory that may not be touched

GUARDED = """
import ctypes, mmap, sys
import torch
import anl_kernels as ak
from anl_kernels import _cpu

libc, PAGE = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
PAGES = 3

def guarded(elements, dtype, at_end):
    # A tensor of `elements` that begins or ends where a page begins that no one may touch.
    memory = mmap.mmap(-1, (PAGES + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, PAGES + 1):
        assert libc.mprotect(ctypes.c_void_p(address + page * PAGE), PAGE, 0) == 0
    size = elements * dtype.itemsize
    offset = PAGE + (PAGES * PAGE - size if at_end else 0)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[offset : offset + size].view(dtype)

cases = 0
for isa in {isas!r}:
    _cpu.set_isa(isa)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        buffers = dict()
        for shape in {shapes!r}:
            classes = shape[1]
            elements = shape[0] * classes * (shape[2] if len(shape) > 2 else 1)
            if elements * dtype.itemsize > PAGES * PAGE:
                continue
            for at_end in (True, False):
                memory = guarded(elements, dtype, at_end)
                target = guarded(elements // classes, torch.uint8, at_end).zero_().view(shape[0], *shape[2:])
                weight = guarded(classes, torch.float32, at_end).fill_(1.0)
                flat = memory.copy_(torch.linspace(-9, 9, elements))
                for tensor in (flat.view(shape), flat.view(shape[0], *shape[2:], classes).movedim(-1, 1)):
                    knobs = [dict(weight=weight), dict(recompute=True), dict(reduction="none"), dict(entropy_weight=1.)]
                    for keywords in knobs:
                        logits = tensor.detach().requires_grad_()
                        ak.anl_fl(logits, target, backend="cpu", **keywords).sum().backward()
                        cases += 1
                    ak.RowLoss(lambda s: s.lse)(tensor.detach().requires_grad_(), target, backend="cpu").backward()
                hidden = flat.view(shape).detach().requires_grad_()
                class Alias(torch.autograd.Function):
                    @staticmethod
                    def forward(ctx, x):
                        return x.detach()
                    @staticmethod
                    def backward(ctx, grad):
                        return grad
                ak.anl_fl(Alias.apply(hidden), target, inplace=True, backend="cpu").backward()
print(cases)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize(
    "shapes",
    [
        thorough([(1, k) for k in (2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200, 1000)]),
        [(5, k) for k in (2, 3, 10, 17, 33)] + [(2, 3, 5), (1, 5, 17), (3, 2, 33), (1, 9, 64), (2, 17, 7), (1, 2, 130)],
    ],
    ids=["one_row", "rows_and_spatial"],
)
def test_no_access_outside_the_tensors(cpu, shapes):
    """Logits, gradient (in place), labels and weights end or begin at a page that may not be touched: no crash."""
    isas = [b.isa for b in backends_under_test.BACKENDS if b.isa]
    result = python(GUARDED.format(isas=isas, shapes=shapes))
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr[-2000:]}"
    assert int(result.stdout) > 100 * len(isas)
