"""The gradient from coefficients against its formula in float64, and against the CPU's kernel."""

import math
from types import SimpleNamespace

import helpers
import oracle
import pytest
import torch
from helpers import DTYPES, EPS, dtype_id
from tiers import mainly, thorough

from anl_kernels.backends import cpu
from anl_kernels.layout import as_rows, new_grad, shape_and_strides
from anl_kernels.triton_kernels import gradient
from anl_kernels.triton_kernels.row_math import NUM_COEFS

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # NumPy's, in NaN rows
MIN_PROB = 1e-7
T = -math.log(MIN_PROB)
MAX, INV_SUM, A, B, A_ABOVE, C, BW, CW, SQUARE, TARGET, LOG_SUM = range(NUM_COEFS.value)
NEEDS = (0, 1, 3, 4, 8, 16, 31)


class Case:
    """Rows of every kind, one of them NaN, with coefficients of the size that losses have."""

    def __init__(self, layout, classes, dtype, needs, gamma=0.5):
        acc = helpers.acc(dtype)
        values, labels = helpers.batch(classes, dtype)
        self.needs, self.gamma, self.dtype, self.acc = needs, gamma, dtype, acc
        rows = values.double()
        ignored = labels == -100
        bad = int(torch.nonzero(~ignored)[3])
        values[bad, 1 % classes] = math.nan
        coefs = torch.randn(NUM_COEFS.value, len(labels), generator=helpers.generator(needs), dtype=torch.float64)
        coefs[MAX] = rows.amax(1)
        coefs[LOG_SUM] = (rows - rows.amax(1, keepdim=True)).exp().sum(1).log()
        coefs[INV_SUM] = torch.exp(-coefs[LOG_SUM])
        if not needs & 1:
            coefs[C] = 0.0
        if not needs & 2:
            coefs[A_ABOVE] = coefs[A]
        coefs[BW] = coefs[BW] if needs & 4 else 0.0
        coefs[CW] = coefs[CW] if needs & 8 else 0.0
        coefs[SQUARE] = coefs[SQUARE] if needs & 16 else 0.0
        coefs[:, ignored] = math.nan  # nothing of an ignored row is looked at but this
        coefs[INV_SUM, ignored] = 0.0
        coefs[INV_SUM, bad] = math.nan
        self.values, self.labels, self.ignored, self.bad = values, labels, ignored, bad
        self.coefs = coefs.to(acc)
        self.logits, self.target = helpers.lay_out(layout, values, labels)

    def exact(self, factor=None, log_q=None, scale=None):
        """(gradient, what an error is measured by), (N, K) in float64."""
        z, coefs = self.values.double(), self.coefs.double()
        if factor is not None:
            coefs[A:LOG_SUM] *= factor.double()
        high, inv_sum, a, b, a_above, c, bw, cw, square, target, log_sum = coefs[:, :, None]
        x = z - high
        p, above = torch.exp(x) * inv_sum, x > log_sum - T
        w = (-torch.expm1(x - log_sum).clamp(max=0.0)) ** self.gamma if self.needs & 12 else torch.zeros_like(p)
        w = torch.nan_to_num(w)
        grad = (torch.where(above, a_above, a) + square * (p - inv_sum)) * p + b + c * above + (bw + cw * above) * w
        size = (a.abs() + a_above.abs() + square.abs() * inv_sum) * p + b.abs() + c.abs() + (bw.abs() + cw.abs()) * w
        label = self.labels.clamp(0)[:, None]
        grad.scatter_(1, label, target)
        size.scatter_(1, label, target.abs())
        if log_q is not None:
            lq = log_q.double()
            mean_of = lambda values: (p * values).sum(1, keepdim=True) / p.sum(1, keepdim=True)
            apart = lq - mean_of(lq)
            apart -= mean_of(apart)
            grad += scale.double() * p * apart
            size += scale.double().abs() * p * (mean_of(apart.abs()) + apart.abs())
        gone = z == -math.inf
        grad[gone], size[gone] = 0.0, 0.0
        grad[self.ignored], size[self.ignored] = 0.0, 0.0
        grad[self.bad] = math.nan
        return grad, size

    def run(self, device, grad_output=None, step=0, log_q=None, scale=None, inplace=False):
        logits, target = helpers.moved(self.logits, device.type), self.target.contiguous().to(device)
        rows, shape, strides = as_rows(logits)
        grad = rows if inplace else new_grad(logits).fill_(math.nan)
        move = lambda x: None if x is None else x.to(device)
        gradient.row_grad(
            grad, rows, shape, strides, shape_and_strides(grad)[1], target, self.coefs.to(device), move(grad_output),
            step, move(log_q), move(scale), MIN_PROB, self.gamma, self.needs,
        )  # fmt: skip
        return oracle.as_rows(grad.cpu())

    def second_opinion(self, **entropy):
        call = SimpleNamespace(inplace=False, min_prob=MIN_PROB, gamma=self.gamma, needs=self.needs)
        coefs = self.coefs.clone()
        coefs[:, self.ignored], coefs[:, self.bad] = 0.0, math.nan
        coefs = coefs.view(NUM_COEFS.value, *self.target.shape)
        pair = (entropy["log_q"], entropy["scale"]) if entropy else None
        return oracle.as_rows(cpu.row_grad(call, self.logits, self.target, coefs, None, pair))

    def check(self, result, exact, size):
        assert torch.equal(result.isnan(), exact.isnan())
        assert (result[self.ignored] == 0.0).all()
        # exp(x) loses digits with |x|; what is left is small beside the row's largest.
        allowed = EPS[self.acc] * (32 * size + size.amax(1, keepdim=True)) + torch.finfo(self.dtype).smallest_normal
        if self.dtype != self.acc:
            allowed += 1.001 * EPS[self.dtype] * exact.abs()
        error = (result.double() - exact).abs().nan_to_num(0)
        worst = (error / allowed.nan_to_num(0).clamp(min=1e-300)).max().item()
        assert worst <= 1.0, f"{worst} times what is allowed"


def log_q_of(classes, acc, spread=3.0):
    return (torch.randn(classes, generator=helpers.generator(7), dtype=torch.float64) * spread - 11.5).to(acc)


@pytest.mark.parametrize("dtype", mainly([torch.float32, torch.bfloat16], DTYPES), ids=dtype_id)
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("classes", [thorough(2), 10, 257])
def test_formula(classes, needs, dtype, device):
    case = Case("rows", classes, dtype, needs)
    exact, size = case.exact()
    case.check(case.run(device), exact, size)
    if cpu.unavailable() is None:
        case.check(case.second_opinion(), exact, size)


@pytest.mark.parametrize("dtype", [thorough(torch.float32), torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", helpers.LAYOUTS)
@pytest.mark.parametrize("classes", [thorough(16), 37])
@pytest.mark.parametrize("entropy", [thorough(False), True], ids=["", "entropy"])
def test_layouts(layout, classes, dtype, entropy, device):
    case = Case(layout, classes, dtype, 15)
    terms = dict(log_q=log_q_of(classes, case.acc), scale=torch.tensor(0.7, dtype=case.acc)) if entropy else {}
    case.check(case.run(device, **terms), *case.exact(**terms))
    case.check(case.run(device, inplace=True, **terms), *case.exact(**terms))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_focal_exponents(gamma, dtype, device):
    case = Case("rows", 33, dtype, 12, gamma)
    case.check(case.run(device), *case.exact())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
def test_grad_output(dtype, device):
    case = Case("spatial", 21, dtype, 15)
    factors = torch.randn(len(case.labels), generator=helpers.generator(5), dtype=torch.float64).to(case.acc)
    case.check(case.run(device, factors, 1), *case.exact(factors))
    factors[1:] = math.nan
    case.check(case.run(device, factors[0], 0), *case.exact(factors[0].expand(len(case.labels))))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("classes", [3, 300, thorough(9001)])
def test_entropy(classes, dtype, device):
    case = Case("rows", classes, dtype, 3)
    terms = dict(log_q=log_q_of(classes, case.acc), scale=torch.tensor(-1.3, dtype=case.acc))
    exact, size = case.exact(**terms)
    case.check(case.run(device, **terms), exact, size)
    if cpu.unavailable() is None:
        case.check(case.second_opinion(**terms), exact, size)


def test_entropy_of_nearly_equal_log_q(device):
    """log_q far from 0 and with little between its classes: the mean about 0 alone would have no digits left."""
    case = Case("rows", 1000, torch.float32, 0)
    case.coefs[A:LOG_SUM] = torch.where(case.coefs[A:LOG_SUM].isnan(), math.nan, 0.0)
    terms = dict(log_q=log_q_of(1000, torch.float32, 1e-4), scale=torch.tensor(1.0))
    case.check(case.run(device, **terms), *case.exact(**terms))


@pytest.mark.parametrize("offset", [thorough(0), thorough(1), 5, thorough(8)])
@pytest.mark.parametrize("dtype, classes", [thorough(torch.float32, 4095), (torch.bfloat16, 9001)], ids=dtype_id)
def test_long_rows_of_any_alignment(offset, dtype, classes, device):
    """Rows are cut where addresses are multiples of 16 bytes; what lies beside them is not touched."""
    case = Case("rows", classes, dtype, 3)
    wide = torch.full((24, classes + 11), math.nan, dtype=dtype)
    case.logits = wide[:, offset : offset + classes].copy_(case.values)
    case.check(case.run(device), *case.exact())
    untouched = wide.clone()
    case.check(case.run(device, inplace=True), *case.exact())
    if device.type == "cpu":
        wide[:, offset : offset + classes] = untouched[:, offset : offset + classes]
        assert torch.equal(wide.isnan(), untouched.isnan())


@pytest.mark.parametrize("classes, cut", [(37, False), (9001, True)])
def test_the_width_that_rows_are_cut_by_is_that_of_one_row(classes, cut, device, monkeypatch):
    """Where a program has several rows, only the first would begin where it is said to."""
    launch_it, found = gradient.launch_first, []

    def recorded(kernel, grid, args, constexprs, config, device):
        found.append((constexprs["WIDTH"] > 1, config.BLOCK_N == 1))
        launch_it(kernel, grid, args, constexprs, config, device)

    monkeypatch.setattr(gradient, "launch_first", recorded)
    case = Case("rows", classes, torch.float32, 3)
    case.check(case.run(device), *case.exact())
    assert found == [(cut, cut)]


def test_labels_that_are_no_class(device):
    """Their inv_sum is NaN, so the row is; nothing is read by them."""
    case = Case("rows", 20, torch.float32, 3)
    case.labels[:] = torch.tensor([-1, 20, 2**40, -(2**62), 2**63 - 1, -100]).repeat(4)
    case.coefs[INV_SUM] = math.nan
    assert case.run(device).isnan().all()


def test_no_rows(device):
    empty = torch.empty(0, 5, device=device)
    coefs = torch.empty(NUM_COEFS.value, 0, device=device)
    args = (empty, empty, (0, 5, 1), (5, 1, 0), (5, 1, 0), torch.empty(0, dtype=torch.long), coefs)
    assert gradient.row_grad(*args, None, 0, None, None, MIN_PROB, None, 0) is empty
