"""The table of cases, row by row: what happens with odd dtypes, labels, masks, sizes and empty batches."""

import math

import helpers
import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, EXPRESSIONS, REPRESENTATIVE, THERE, calculate, dtype_id, expression
from tiers import mainly

import anl_kernels as ak

SOME = pytest.mark.parametrize("name", REPRESENTATIVE)
ALL = pytest.mark.parametrize("name", EXPRESSIONS)

ANL_CE = EXPRESSIONS["anl_ce"]


def logits_of(rows, classes, seed=0, dtype=torch.float32):
    return (helpers.randn(rows, classes, generator=helpers.generator(seed)) * 2).to(dtype)


# ---- dtypes


@THERE
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "keywords", [dict(), dict(reduction="none"), dict(recompute=True), dict(entropy_weight=1.0)], ids=str
)
def test_dtypes_of_loss_and_gradient(one_backend, dtype, keywords):
    logits = logits_of(4, 6, dtype=dtype).requires_grad_()
    loss = ak.anl_ce(logits, torch.tensor([0, 1, 2, 3]), backend=one_backend.name, **keywords)
    loss.sum().backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.grad.dtype == dtype


@THERE
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=dtype_id)
def test_logits_that_are_no_floats_are_refused(one_backend, dtype):
    with pytest.raises(TypeError, match="logits"):
        ak.anl_ce(torch.ones(4, 6, dtype=dtype), torch.tensor([0, 1, 2, 3]), backend=one_backend.name)


# ---- sizes


@THERE
@pytest.mark.parametrize("shape", [(4, 1), (4, 0), (1,), (0,), (2, 1, 3)], ids=str)
def test_fewer_than_two_classes(one_backend, shape):
    target = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"2 classes|two classes"):
        ak.anl_ce(torch.zeros(shape), target, backend=one_backend.name)


@THERE
@pytest.mark.parametrize(("classes", "min_prob"), [(10, 0.1), (10, 0.2), (2, 0.5), (1000, 1e-3)])
def test_a_clamp_above_the_uniform_row(one_backend, classes, min_prob):
    with pytest.raises(ValueError, match="min_prob"):
        ak.anl_ce(
            torch.zeros(2, classes), torch.zeros(2, dtype=torch.int64), min_prob=min_prob, backend=one_backend.name
        )
    assert ak.anl_ce(
        torch.zeros(2, classes), torch.zeros(2, dtype=torch.int64), min_prob=min_prob / 2.01, backend=one_backend.name
    ).isfinite()


@THERE
@pytest.mark.parametrize("min_prob", [0.0, -1e-7, math.nan, 1.0])
def test_a_clamp_that_is_no_probability(one_backend, min_prob):
    with pytest.raises(ValueError, match="min_prob"):
        ak.anl_ce(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), min_prob=min_prob, backend=one_backend.name)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0), (2, 5, 0, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "keywords", [dict(), dict(recompute=True), dict(weight=torch.ones(5))], ids=["", "recompute", "weight"]
)
def test_empty_batch(backend, shape, reduction, keywords):
    logits, target = torch.randn(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    for criterion in (expression(ANL_CE), ak.RowLoss(lambda s: s.lse)):
        loss, grad = calculate(logits, target, criterion, reduction=reduction, backend=backend.name, **keywords)
        expected = F.cross_entropy(logits, target, reduction=reduction)
        assert loss.shape == expected.shape and torch.equal(loss.isnan(), expected.isnan())
        assert torch.equal(loss.nan_to_num(), expected.nan_to_num())
        assert grad.shape == logits.shape


@THERE
@pytest.mark.parametrize(
    ("logits", "target"),
    [
        ((4, 6), (5,)),
        ((4, 6), (4, 1)),
        ((4, 6), ()),
        ((6,), (1,)),
        ((6,), (6,)),
        ((4, 6, 3), (4,)),
        ((4, 6, 3), (4, 6)),
        ((4, 6, 3), (3, 4)),
        ((), ()),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(one_backend, logits, target):
    with pytest.raises(ValueError, match="logits"):
        ak.anl_ce(torch.zeros(logits), torch.zeros(target, dtype=torch.int64), backend=one_backend.name)


@THERE
@pytest.mark.parametrize(
    ("weight", "error"),
    [(torch.ones(5), ValueError), (torch.ones(6, 1), ValueError), (torch.ones(()), ValueError), ([1.0] * 6, TypeError)],
    ids=["length", "shape", "scalar", "list"],
)
def test_weights_that_do_not_fit(one_backend, weight, error):
    with pytest.raises(error, match="weight"):
        ak.anl_ce(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), weight=weight, backend=one_backend.name)


@THERE
def test_tensors_on_two_devices(one_backend):
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        ak.anl_ce(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64, device="meta"), backend=one_backend.name)


@pytest.mark.parametrize(
    "keywords",
    [
        dict(reduction="avg"),
        dict(reduction=None),
        dict(backend="nothing"),
        dict(class_group=object()),
        dict(reduction="none", entropy_weight=1.0),
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_keywords_without_meaning_are_refused(keywords):
    with pytest.raises(ValueError, match=r"\w"):
        ak.anl_ce(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), **keywords)


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError):
        ak.anl_ce(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), label_smoothing=0.1)


@pytest.mark.parametrize(
    ("logits", "target"), [([[1.0, 2.0]], torch.tensor([0])), (torch.zeros(1, 2), [0])], ids=["logits", "target"]
)
def test_lists_are_no_tensors(logits, target):
    with pytest.raises(TypeError):
        ak.anl_ce(logits, target)


# ---- masked classes


@pytest.mark.few(name=["anl_ce"], forced=dict(layout=["rows"]))
@SOME
@pytest.mark.parametrize("layout", ["rows", "spatial", "transposed"])
def test_padding_with_minus_infinity_changes_nothing(backend, name, layout):
    """A padded vocabulary whose last columns are -inf: the loss of the real classes, gradient 0 in the padding."""
    values, labels = helpers.rows_of_every_kind(21, torch.float32, kinds=helpers.ROW_KINDS[:9] + ("normal",) * 3)
    padded = torch.cat([values, torch.full((12, 11), -math.inf)], 1)
    logits, target = helpers.lay_out(layout, padded, labels)
    true = helpers.truth(values, labels, EXPRESSIONS[name])
    for criterion in (expression(EXPRESSIONS[name]), helpers.row_loss_expression(EXPRESSIONS[name])):
        for recompute in (False, True):
            loss, grad = calculate(logits, target, criterion, recompute=recompute, backend=backend.name)
            grad = oracle.as_rows(grad)
            assert (grad[:, 21:] == 0).all()
            helpers.assert_as_accurate(loss, grad[:, :21].contiguous(), labels, true)


def test_only_two_classes_left(backend):
    """Every other class masked: as with two classes."""
    few = torch.tensor([[0.5, -1.0]])
    many = torch.full((1, 300), -math.inf)
    many[0, [17, 255]] = few[0]
    for name in EXPRESSIONS:
        loss, grad = calculate(many, torch.tensor([255]), expression(EXPRESSIONS[name]), backend=backend.name)
        true = helpers.truth(few, torch.tensor([1]), EXPRESSIONS[name])
        helpers.assert_as_accurate(loss, grad[:, [17, 255]], torch.tensor([1]), true)
        assert grad.count_nonzero() <= 2


@pytest.mark.few(name=["anl_fl"], dtype=[torch.float32, torch.float16])
@ALL
@pytest.mark.parametrize("dtype", mainly([torch.float32, torch.float16], DTYPES), ids=dtype_id)
def test_masks_of_the_lowest_number(backend, name, dtype):
    """masked_fill(mask, finfo.min), as many write it: the class exists, its p is 0, and nothing overflows into NaN."""
    terms, target = EXPRESSIONS[name], torch.tensor([0, 3, 6, 9, 12, 15])
    logits = logits_of(6, 40, dtype=dtype)
    logits[:, 20:] = torch.finfo(dtype).min
    logits[1, 22:] = -torch.inf
    for reduction in ("sum", "none"):
        true = helpers.truth(logits, target, terms, reduction=reduction)
        for criterion in (expression(terms), helpers.row_loss_expression(terms)):
            for recompute in (False, True):
                keywords = dict(reduction=reduction, recompute=recompute, backend=backend.name)
                helpers.assert_as_accurate(*calculate(logits, target, criterion, **keywords), target, true)


# ---- expanded logits


@THERE
def test_expanded_rows(backend):
    """Rows that share memory are read as they lie; writing over them in place is refused, as torch refuses it."""
    row = helpers.randn(1, 11, generator=helpers.generator(0))
    logits, target = row.expand(5, 11), torch.tensor([0, 3, 10, 5, 5])
    expected = calculate(logits.clone(), target, expression(ANL_CE), backend=backend.name)
    result = calculate(logits, target, expression(ANL_CE), backend=backend.name)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
    column = helpers.randn(5, 1, generator=helpers.generator(0))  # one number for all classes of a row
    for name in EXPRESSIONS:
        helpers.check(column.expand(5, 40), target, EXPRESSIONS[name], backend=backend.name)
    before = row.clone()
    if not backend.fused:
        return
    with pytest.raises((RuntimeError, ValueError), match=r"overlap|single memory|expand|share"):
        ak.anl_ce(
            helpers.Alias.apply(row.clone().requires_grad_().expand(5, 11)), target, inplace=True, backend=backend.name
        )
    assert torch.equal(row, before)


@THERE
def test_inplace_where_no_view_exists(fused):
    """Trailing dimensions that are no single run of memory are copied, so the gradient has nowhere to go in place."""
    logits = torch.randn(2, 5, 4, 3).transpose(2, 3).requires_grad_()
    with pytest.raises(ValueError, match="inplace"):
        ak.anl_ce(
            helpers.Alias.apply(logits), torch.zeros(2, 3, 4, dtype=torch.int64), inplace=True, backend=fused.name
        )


@pytest.mark.few(layout=["transposed"])
@pytest.mark.parametrize("layout", ["transposed", "spatial"])
def test_masks_of_the_lowest_number_in_other_layouts(backend, layout):
    """Sums overflow there, of which the loss sees no more than that they are large."""
    values = torch.randn(12, 40, generator=helpers.generator(0))
    values[:, 20:] = torch.finfo(torch.float32).min
    values[1, 22:] = -math.inf
    logits, target = helpers.lay_out(layout, values, torch.arange(12))
    for name in backend.few(("ce", "nce", "nnce", "rce", "nnfl", "nfl"), 2):
        for recompute in (False, True):
            helpers.check(logits, target, EXPRESSIONS[name], recompute=recompute, backend=backend.name)
