"""Labels of every dtype, out of bounds and with strides; ignored rows, class weights and the mean's denominator."""

import math

import helpers
import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import EXPRESSIONS, REPRESENTATIVE, THERE, calculate, dtype_id, expression

import anl_kernels as ak

SOME = pytest.mark.parametrize("name", REPRESENTATIVE)
ANL_CE = EXPRESSIONS["anl_ce"]


def logits_of(rows, classes, seed=0, dtype=torch.float32):
    return (helpers.randn(rows, classes, generator=helpers.generator(seed)) * 2).to(dtype)


# ---- labels


@pytest.mark.few(name=["anl_ce"], classes=[300], dtype=[torch.uint8, torch.int64])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("classes", [2, 10, 256, 300])
@SOME
def test_label_dtypes(backend, name, dtype, classes):
    logits = logits_of(16, classes)
    target = torch.arange(16) * 37 % min(classes, 256)
    for recompute in (False, True):
        keywords = dict(recompute=recompute, backend=backend.name)
        expected = calculate(logits, target, expression(EXPRESSIONS[name]), **keywords)
        result = calculate(logits, target.to(dtype), expression(EXPRESSIONS[name]), **keywords)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@THERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_probabilities_as_targets_are_refused(one_backend, dtype):
    with pytest.raises(TypeError, match="class indices"):
        ak.anl_ce(torch.randn(4, 6), torch.rand(4, 6).to(dtype), backend=one_backend.name)
    with pytest.raises(TypeError, match="class indices"):
        ak.anl_ce(torch.randn(4, 6), torch.rand(4).to(dtype), backend=one_backend.name)


@THERE
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.complex64], ids=str)
def test_other_label_dtypes_are_refused(one_backend, dtype):
    with pytest.raises(TypeError, match="target"):
        ak.anl_ce(torch.randn(4, 6), torch.ones(4).to(dtype), backend=one_backend.name)


BAD = [
    (torch.int64, 6),
    (torch.int64, -1),
    (torch.int64, -99),
    (torch.int64, 2**40),
    (torch.int64, -(2**63)),
    (torch.int64, 2**32),
    (torch.int64, 2**32 + 1),
    (torch.int32, 6),
    (torch.int32, -1),
    (torch.int32, -(2**31)),
    (torch.int16, 6),
    (torch.int16, -2),
    (torch.uint8, 6),
    (torch.uint8, 255),
]


@pytest.mark.parametrize(("dtype", "label"), BAD, ids=str)
@pytest.mark.parametrize("layout", ["rows", "spatial"])
@pytest.mark.few(label=[2**32 + 1, 255], forced=dict(label=[2**32 + 1], layout=["rows"]))
def test_labels_out_of_bounds(backend, dtype, label, layout):
    """An IndexError that names the label, in every mode, and nothing written: in-place logits are untouched. Where it
    would have to wait for a device: that row's loss and gradient are NaN, the others' are as ever."""
    shape, labels = ((7, 6), 7) if layout == "rows" else ((2, 6, 5), 10)
    logits = helpers.randn(shape, generator=helpers.generator(0))
    target = torch.zeros(labels, dtype=dtype)
    target[labels // 2] = label
    target = target.view(shape[0], *shape[2:])
    for keywords in (
        dict(),
        dict(recompute=True),
        dict(reduction="none"),
        dict(entropy_weight=1.0),
        dict(inplace=True),
    ):
        if "inplace" in keywords and not backend.fused:
            continue
        if not backend.checks_labels:
            check_that_one_row_is_nan(backend, logits, target, labels // 2, keywords)
            continue
        for criterion in (expression(ANL_CE), ak.RowLoss(lambda s: s.lse)):
            for grad in (False, True):
                given = logits.clone().requires_grad_(grad)
                alias = helpers.Alias.apply(given) if grad else given
                with pytest.raises(IndexError, match=str(label)):
                    ak.robust_loss(alias, target, criterion, backend=backend.name, **keywords)
                assert torch.equal(given.detach(), logits)


def check_that_one_row_is_nan(backend, logits, target, row, keywords):
    good = target.clone()
    good.view(-1)[row] = 0
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    keywords = dict(keywords, weight=weight, backend=backend.name, leaf=False)
    for criterion in (expression(ANL_CE), ak.RowLoss(lambda s: s.lse)):
        loss, grad = calculate(logits, target, criterion, **keywords)
        expected_loss, expected = calculate(logits, good, criterion, **keywords)
        rows, expected = oracle.as_rows(grad), oracle.as_rows(expected)
        assert rows[row].isnan().all()
        if keywords.get("reduction") == "none":
            assert loss.view(-1).isnan().nonzero().tolist() == [[row]]
            assert torch.equal(
                loss.nan_to_num(0),
                expected_loss.clone().view(-1).index_fill_(0, torch.tensor(row), 0.0).view(loss.shape),
            )
        else:
            assert loss.isnan()
        if "entropy_weight" not in keywords:  # through which every row would see the other's NaN
            others = [i for i in range(len(rows)) if i != row]
            torch.testing.assert_close(rows[others], expected[others], rtol=1e-6, atol=1e-9)


@THERE
def test_the_last_label_is_within_bounds(backend):
    for classes in (2, 17, 256):
        target = torch.tensor([classes - 1, 0], dtype=torch.uint8)
        assert ak.anl_ce(torch.randn(2, classes), target, backend=backend.name).isfinite()


def test_bad_label_among_many(backend):
    """Found wherever it is, also in the last row of a batch that several threads share."""
    rows = 515 if backend.interpreted else 4099
    logits, target = torch.randn(rows, 10), torch.zeros(rows, dtype=torch.int64)
    for row in (0, 1, rows // 2, rows - 1):
        target[row] = 10
        if backend.checks_labels:
            with pytest.raises(IndexError):
                ak.anl_ce(logits, target, backend=backend.name)
        else:
            loss, _ = calculate(logits, target, expression(ANL_CE), reduction="none", backend=backend.name)
            assert loss.isnan().nonzero().tolist() == [[row]]
        target[row] = 0


def test_labels_with_strides(backend):
    logits, spatial = logits_of(8, 6), torch.randn(2, 6, 3, 5)
    room = torch.full((8, 3), 99)
    room[:, 1] = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    for z, target in (
        (logits, room[:, 1]),
        (logits, torch.tensor(3).expand(8)),
        (logits, torch.arange(64)[::8] % 6),
        (spatial, torch.randint(6, (2, 5, 3)).transpose(1, 2)),
    ):
        for recompute in (False, True):
            keywords = dict(recompute=recompute, backend=backend.name)
            expected = calculate(z, target.clone(memory_format=torch.contiguous_format), expression(ANL_CE), **keywords)
            torch.testing.assert_close(
                calculate(z, target, expression(ANL_CE), **keywords), expected, rtol=1e-6, atol=1e-9
            )


# ---- ignored rows, weights and the mean's denominator


@pytest.mark.few(name=["anl_ce"])
@pytest.mark.parametrize(
    ("dtype", "ignored"),
    [(torch.int64, -100), (torch.int64, 3), (torch.uint8, 255), (torch.int16, -1), (torch.int32, 77)],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@SOME
def test_ignore_index(backend, name, dtype, ignored, reduction):
    """Loss and gradient 0, the logits of the row not read (they are NaN), the mean over what remains."""
    values, _ = helpers.rows_of_every_kind(9, torch.float32, kinds=(*helpers.ROW_KINDS[:9], "normal"))
    values = values.clone()
    target = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 0, 1])
    target[[1, 5, 6]] = ignored
    values[[1, 5, 6]] = math.nan
    for recompute in (False, True):
        keywords = dict(reduction=reduction, ignore_index=ignored)
        loss, grad = helpers.check(
            values, target.to(dtype), EXPRESSIONS[name], recompute=recompute, backend=backend.name, **keywords
        )
        assert (grad[[1, 5, 6]] == 0).all()
        if reduction == "none":
            assert (loss[[1, 5, 6]] == 0).all()


@THERE
def test_ignore_index_out_of_the_labels_range(backend):
    """-100 is no uint8, nor is 256: then no row is ignored, and 156 (-100 mod 256) is a label like another."""
    target = torch.tensor([0, 156], dtype=torch.uint8)
    if backend.checks_labels:
        with pytest.raises(IndexError):
            ak.anl_ce(torch.randn(2, 6), target, backend=backend.name)
    else:
        assert calculate(torch.randn(2, 6), target, expression(ANL_CE), backend=backend.name)[0].isnan()
    assert ak.anl_ce(torch.randn(2, 200), target, backend=backend.name).isfinite()
    target = torch.tensor([0, 1], dtype=torch.uint8)
    expected = calculate(torch.ones(2, 6), target, expression(ANL_CE), backend=backend.name)
    torch.testing.assert_close(
        calculate(torch.ones(2, 6), target, expression(ANL_CE), ignore_index=256, backend=backend.name), expected
    )


@pytest.mark.few(name=["anl_ce"], dtype=[torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@SOME
def test_class_weights(backend, name, dtype, reduction):
    values, labels = helpers.rows_of_every_kind(9, dtype)
    weight = (helpers.rand(9, generator=helpers.generator(0)) * 3).to(dtype)
    weight[int(labels[1])] = 0
    for recompute in (False, True):
        for ignored in (-100, int(labels[0])):
            keywords = dict(weight=weight, reduction=reduction, ignore_index=ignored)
            helpers.check(values, labels, EXPRESSIONS[name], recompute=recompute, backend=backend.name, **keywords)
    criterion = helpers.row_loss_expression(EXPRESSIONS[name])
    helpers.check(
        values, labels, EXPRESSIONS[name], criterion, weight=weight, reduction=reduction, backend=backend.name
    )


def test_class_weights_of_another_dtype_or_stride(backend):
    """float64 or strided weights with float32 logits, as class counts come."""
    values, labels = helpers.rows_of_every_kind(9, torch.float32)
    weight = helpers.rand(9, 3, generator=helpers.generator(0), dtype=torch.float64)[:, 1]
    helpers.check(values, labels, ANL_CE, weight=weight, backend=backend.name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_row_ignored(backend, reduction, recompute):
    logits = torch.full((5, 7), math.nan)
    loss, grad = calculate(
        logits,
        torch.full((5,), -100),
        expression(ANL_CE),
        reduction=reduction,
        recompute=recompute,
        backend=backend.name,
    )
    if reduction == "mean":
        assert loss.isnan()  # as F.cross_entropy
    else:
        assert torch.equal(loss, torch.zeros(5) if reduction == "none" else torch.tensor(0.0))
    assert (grad == 0).all()


@THERE
def test_all_weight_zero_is_a_mean_of_nothing(backend):
    """As F.cross_entropy: 0 / 0."""
    logits, target, weight = logits_of(3, 4), torch.tensor([0, 0, 1]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert F.cross_entropy(logits, target, weight=weight).isnan()
    assert ak.anl_ce(logits, target, weight=weight, backend=backend.name).isnan()
