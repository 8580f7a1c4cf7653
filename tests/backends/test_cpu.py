"""The compiled module by itself: raw pointers in, poisoned memory out, pages that may not be touched."""

import math

import backends_under_test
import helpers
import oracle
import pytest
import torch
from helpers import DTYPES, EXPRESSIONS, REPRESENTATIVE, dtype_id
from tiers import mainly

from anl_kernels import layout
from anl_kernels.row_math import NUM_STATS, StatField

TOP_GAP, VALID = StatField.TOP_GAP, StatField.VALID
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
TARGET_CODES = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.uint8: 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
ALL_STATISTICS = 15


@pytest.fixture(params=[b for b in backends_under_test.BACKENDS if b.name == "cpu"] or [None], ids=repr)
def kernels(request, cpu):
    """The module, with each instruction set that runs here."""
    if request.param is None:
        pytest.skip("the cpu backend does not run here")
    before = cpu.info()["isa"]
    cpu.set_isa(request.param.isa)
    yield cpu
    cpu.set_isa(before)


def program(kernels, terms, min_prob=1e-7):
    loss, built = helpers.expression(terms), []
    for factor, name, parameters in terms:
        term = helpers.term(name, **parameters)
        built.append((term.kind, factor, *term.parameters))
    return kernels.Program(built, min_prob, loss.gamma or 0.0, loss.needs)


def nan(*shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype)


def new_coefs(logits, target):
    return layout.new_coefs(logits, target).fill_(math.nan)


def row_loss(kernels, terms, logits, target, grad=None, reduction="sum", coefs=None, weight=None, ignore_index=-100):
    """`_cpu.row_loss` for logits of any strides, outputs poisoned."""
    acc = helpers.acc(logits.dtype)
    loss = nan(len(target), dtype=acc) if reduction == "none" else nan(1, dtype=acc)
    shape, strides = layout.shape_and_strides(logits)
    bad = kernels.row_loss(
        program(kernels, terms), CODES[logits.dtype], shape, logits.data_ptr(), strides,
        0 if grad is None else grad.data_ptr(), (0, 0, 0) if grad is None else layout.shape_and_strides(grad)[1],
        target.data_ptr(), TARGET_CODES[target.dtype], ignore_index, 0 if weight is None else weight.data_ptr(),
        REDUCTIONS[reduction], loss.data_ptr(), 0 if coefs is None else coefs.data_ptr(), False,
    )  # fmt: skip
    return bad, loss


def row_grad(kernels, terms, logits, target, grad, coefs, grad_output, step):
    p = program(kernels, terms)
    gammas = {q["gamma"] for _, _, q in terms if "gamma" in q} or {0.0}
    kernels.row_grad(
        CODES[logits.dtype], (*logits.shape, 1), logits.data_ptr(), (*logits.stride(), 0),
        grad.data_ptr(), (*grad.stride(), 0),
        target.data_ptr(), TARGET_CODES[target.dtype], 1e-7, gammas.pop(), p.needs, coefs.data_ptr(),
        grad_output.data_ptr(), step, 0, 0, False,
    )  # fmt: skip


NAMES = pytest.mark.parametrize("name", mainly(REPRESENTATIVE, EXPRESSIONS))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@NAMES
def test_nothing_outside_the_gradient_is_written(kernels, name, dtype):
    """The gradient is a view into poisoned memory: all of it is written, and not one element around it."""
    values, labels = helpers.batch(35, dtype)
    true = helpers.truth(values, labels, EXPRESSIONS[name], reduction="sum")
    for strides in ((35, 1), (51, 1), (1, 24), (90, 2), (1, 29)):
        memory = nan(4000, dtype=dtype)
        grad = memory.as_strided((24, 35), strides, 40)
        bad, loss = row_loss(kernels, EXPRESSIONS[name], values, labels, grad)
        assert bad == -1
        helpers.assert_as_accurate(loss[0], grad, labels, true)
        grad.fill_(math.nan)
        assert memory.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@NAMES
def test_coefficients_make_the_same_gradient_later(kernels, name, dtype):
    """row_loss without a gradient, then row_grad: into other strides, scaled by a number a row."""
    values, labels = helpers.batch(35, dtype)
    output = torch.linspace(-2, 3, 24, dtype=helpers.acc(dtype))
    true = helpers.truth(values, labels, EXPRESSIONS[name], reduction="none", grad_output=output)
    coefs = nan(10, 24, dtype=helpers.acc(dtype))
    _, loss = row_loss(kernels, EXPRESSIONS[name], values, labels, reduction="none", coefs=coefs)
    for strides in ((35, 1), (51, 1), (1, 24)):
        memory = nan(4000, dtype=dtype)
        grad = memory.as_strided((24, 35), strides, 40)
        row_grad(kernels, EXPRESSIONS[name], values, labels, grad, coefs, output, 1)
        helpers.assert_as_accurate(loss, grad, labels, true)
        grad.fill_(math.nan)
        assert memory.isnan().all()


def test_a_gradient_whose_rows_are_no_single_run(kernels):
    """The logits' are, and one stride will do for them; for the gradient's it will not."""
    values, labels = helpers.batch(35, torch.float32)
    true = helpers.truth(values, labels, EXPRESSIONS["anl_ce"], reduction="sum")
    logits = helpers.LAYOUTS["channels_last"](values).flatten(2)
    grad = nan(*logits.shape, dtype=torch.float32)
    _, loss = row_loss(kernels, EXPRESSIONS["anl_ce"], logits, labels, grad)
    helpers.assert_as_accurate(loss[0], oracle.as_rows(grad), labels, true)


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
BITS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)  # every number of 16 bits


@HALVES
@pytest.mark.parametrize("classes", [7, 40])
def test_every_number_of_half_precision_is_read(kernels, dtype, classes):
    """As the largest of a row of equal numbers."""
    values = BITS.view(dtype)
    logits, labels = values.unsqueeze(1).repeat(1, classes), torch.zeros(len(values), dtype=torch.int64)
    table = nan(NUM_STATS, len(values), dtype=torch.float64)
    kernels.row_stats(
        CODES[dtype], (*logits.shape, 1), logits.data_ptr(), (classes, 1, 0), labels.data_ptr(), 0, -100, 1e-7, 0.0, 0,
        table.data_ptr(),
    )  # fmt: skip
    finite = values.isfinite()
    assert torch.equal(table[0, finite], values[finite].double())
    assert table[0, ~finite].isnan().all()


@HALVES
@pytest.mark.parametrize("classes", [7, 40])
def test_gradients_are_rounded_to_the_nearest_number_of_half_precision(kernels, dtype, classes):
    """Ties to even, subnormals and what overflows included; a gradient of equal numbers is made from coefficients."""
    near = BITS[::3].view(dtype).float()
    near = near[near.isfinite()]
    tie = near + near.sign() * (near.abs().to(dtype).view(torch.int16) + 1).view(dtype).float().sub(near.abs()) / 2
    wanted = torch.cat([near, tie, tie * (1 - 2**-20), tie * (1 + 2**-20)])
    wanted = wanted[wanted.isfinite()]
    logits = torch.zeros(len(wanted), classes, dtype=dtype)
    coefs = torch.zeros(10, len(wanted))
    coefs[1], coefs[3], coefs[8] = 1.0, wanted, wanted  # the sum of exps, what every class gets, what the target gets
    grad, labels = torch.full_like(logits, math.nan), torch.zeros(len(wanted), dtype=torch.int64)
    row_grad(kernels, EXPRESSIONS["ce"], logits, labels, grad, coefs, torch.ones(1), 0)
    assert torch.equal(grad, wanted.to(dtype).unsqueeze(1).expand_as(grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("classes", [2, 9, 64, 1025])
def test_statistics(kernels, dtype, classes):
    """Every field of row_stats against its definition, in float64."""
    values, labels = helpers.batch(classes, dtype)
    gamma, min_prob = 0.7, 1e-7
    table = nan(NUM_STATS, 24, dtype=torch.float64)
    kernels.row_stats(
        CODES[dtype], (24, classes, 1), values.data_ptr(), (classes, 1, 0), labels.data_ptr(), 0, -100, min_prob, gamma,
        ALL_STATISTICS, table.data_ptr(),
    )  # fmt: skip
    valid = labels != -100
    assert torch.equal(table[VALID], valid.double())
    assert table[:, ~valid].isfinite().all()
    z, y, got = values[valid].double(), labels[valid], table[:, valid]
    l = z.log_softmax(1)
    p, exists, zero = l.exp(), z > -math.inf, torch.zeros((), dtype=torch.float64)
    floor, height = -math.log(min_prob), -((1 - min_prob) ** gamma) * math.log(min_prob)
    above, w = (l > -floor) & exists, (1 - p) ** gamma
    top = z.amax(1)
    expected = [
        top,
        (z - top.view(-1, 1)).exp().sort(1).values[:, :-1].sum(1).log1p(),
        oracle.take(l, y),
        exists.sum(1).double(),
        -l.where(exists, zero).sum(1),
        (floor + l).where(above, zero).sum(1),
        p.where(above, zero).sum(1),
        above.sum(1).double(),
        -(w * l).where(exists, zero).sum(1),
        w.where(exists, zero).sum(1),
        (height + w * l).where(above, zero).sum(1),
        w.where(above, zero).sum(1),
        top - oracle.take(z, y),
    ]
    relative, absolute = (1e-12, 1e-15) if dtype == torch.float64 else (3e-6, 1e-6)
    rounded = helpers.EPS[helpers.acc(dtype)] ** gamma  # the weight of a class with p = 1 but for a rounding
    for field, want in enumerate(expected):
        atol = absolute + 2 * rounded if field in (9, 11) else absolute
        torch.testing.assert_close(got[field], want, rtol=relative, atol=atol, msg=lambda m, f=field: f"field {f}: {m}")


@pytest.mark.parametrize("classes", [9, 40])
def test_every_statistic_of_a_nan_row_is_nan(kernels, classes):
    logits, table = torch.randn(3, classes, generator=helpers.generator(0)), nan(NUM_STATS, 3, dtype=torch.float64)
    logits[1, 5], labels = math.nan, torch.zeros(3, dtype=torch.int64)
    kernels.row_stats(
        0, (3, classes, 1), logits.data_ptr(), (classes, 1, 0), labels.data_ptr(), 0, -100, 1e-7, 0.5, ALL_STATISTICS,
        table.data_ptr(),
    )  # fmt: skip
    assert table[:VALID, 1].isnan().all() and table[VALID, 1] == 1
    assert table[:, [0, 2]].isfinite().all()


def test_logarithms_are_good_to_a_few_ulps(kernels):
    """Of two classes: log(1 + e^-d)."""
    for dtype, relative in ((torch.float32, 5e-7), (torch.float64, 1e-15)):
        gaps = torch.linspace(0, 12, 5000, dtype=dtype)
        logits, labels = torch.stack([torch.zeros_like(gaps), -gaps], 1), torch.zeros(5000, dtype=torch.int64)
        table = nan(NUM_STATS, 5000, dtype=torch.float64)
        kernels.row_stats(
            CODES[dtype], (5000, 2, 1), logits.data_ptr(), (2, 1, 0), labels.data_ptr(), 0, -100, 1e-7, 0.0, 0,
            table.data_ptr(),
        )  # fmt: skip
        torch.testing.assert_close(table[1], gaps.double().neg().exp().log1p(), rtol=relative, atol=0)


def test_a_sum_of_sixteen_terms(kernels):
    """And no more, as a call holds no more."""
    logits, labels = torch.randn(12, 9, generator=helpers.generator(0)), torch.arange(12) % 9
    _, loss = row_loss(kernels, EXPRESSIONS["ce"] * 16, logits, labels)
    torch.testing.assert_close(loss[0], 16 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    with pytest.raises(ValueError, match="at most 16 terms"):
        program(kernels, EXPRESSIONS["ce"] * 17)


@pytest.mark.parametrize("needs", range(16))
def test_only_the_statistics_asked_for(kernels, needs):
    values, labels = helpers.rows_of_every_kind(20, torch.float32)
    tables = []
    for asked in (needs, ALL_STATISTICS):
        table = torch.zeros(NUM_STATS, len(labels), dtype=torch.float64)
        kernels.row_stats(
            0, (len(labels), 20, 1), values.data_ptr(), (20, 1, 0), labels.data_ptr(), 0, -100, 1e-7, 0.5, asked,
            table.data_ptr(),
        )  # fmt: skip
        tables.append(table)
    fields = {1: (5, 7), 2: (6,), 4: (8, 9), 8: (10, 11)}
    always = [0, 1, 2, 3, 4, TOP_GAP, VALID]
    assert torch.equal(tables[0][always], tables[1][always])
    for bit, members in fields.items():
        for field in members:
            if needs & bit:
                torch.testing.assert_close(tables[0][field], tables[1][field], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (24, 35), (1000, 17), (1000, 70), (200, 4500), (3, 5000)])
def test_column_sums(kernels, dtype, rows, classes):
    values = torch.randn(rows, classes, generator=helpers.generator(0)).mul(3).to(dtype)
    labels = torch.zeros(rows, dtype=torch.int64)
    if rows > 2:
        labels[1], values[1] = -100, math.nan
    coefs, sums = nan(10, rows, dtype=helpers.acc(dtype)), nan(classes, dtype=torch.float64)
    row_loss(kernels, EXPRESSIONS["ce"], values, labels, reduction="none", coefs=coefs)
    kernels.column_sums(
        CODES[dtype], (rows, classes, 1), values.data_ptr(), (classes, 1, 0), coefs.data_ptr(), sums.data_ptr()
    )
    expected = values[labels >= 0].double().softmax(1).sum(0)
    torch.testing.assert_close(sums, expected, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=1e-15)


@pytest.mark.parametrize("transposed", [False, True])
def test_long_sums_of_equal_numbers(kernels, transposed):
    """Whose roundings all go the same way."""
    values = torch.zeros(12, 100_003)
    values[:, 5] = torch.linspace(0.1, 2.0, 12)
    logits, labels = values.t().contiguous().t() if transposed else values, torch.full((12,), 7)
    for name in ("ce", "nce"):
        grad = nan(12, 100_003, dtype=torch.float32)
        _, loss = row_loss(kernels, EXPRESSIONS[name], logits, labels, grad, reduction="none")
        helpers.assert_as_accurate(
            loss, grad, labels, helpers.truth(values, labels, EXPRESSIONS[name], reduction="none")
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_float64_sums_have_one_order_for_any_number_of_threads(kernels, transposed):
    """Float32 would not show it."""
    values = torch.randn(3000, 40, generator=helpers.generator(0), dtype=torch.float64)
    logits = values.t().contiguous().t() if transposed else values
    coefs, labels = nan(10, 3000, dtype=torch.float64), torch.arange(3000) % 40
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums = nan(40, dtype=torch.float64)
        _, loss = row_loss(kernels, EXPRESSIONS["anl_ce"], logits, labels, coefs=coefs)
        kernels.column_sums(
            CODES[torch.float64],
            (3000, 40, 1),
            logits.data_ptr(),
            (*logits.stride(), 0),
            coefs.data_ptr(),
            sums.data_ptr(),
        )
        found.append(torch.cat([loss, sums]))
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


@pytest.mark.parametrize("dtype", TARGET_CODES, ids=str)
def test_the_first_bad_label_is_named_and_nothing_computed(kernels, dtype):
    values = torch.randn(3000, 10)
    for row in (0, 1, 1500, 2999):
        labels = torch.zeros(3000, dtype=dtype)
        labels[row:] = 10
        grad = nan(3000, 10, dtype=torch.float32)
        bad, loss = row_loss(kernels, EXPRESSIONS["anl_ce"], values, labels, grad)
        assert bad == row
        assert grad.isnan().all() and loss.isnan().all()
