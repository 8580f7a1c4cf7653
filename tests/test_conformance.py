"""Every loss x backend x layout x dtype against the papers' formulas in float64: values and gradients.

The error may not exceed plain PyTorch's by more than a few roundings (helpers.assert_as_accurate).
`torch.empty` is full of NaN while these run (conftest.poison), and so is all memory around the views.
"""

import math
from functools import lru_cache

import helpers
import pytest
import torch
from allpairspy import AllPairs
from helpers import DTYPES, EXPRESSIONS, REPRESENTATIVE, dtype_id
from modes import MODES, compare_batch, modes, run, shared_keywords
from tiers import mainly, thorough

pytestmark = pytest.mark.variants
ALL = pytest.mark.parametrize("name", EXPRESSIONS)
SOME = pytest.mark.parametrize("name", REPRESENTATIVE)

# By default the one with focal weights and all sums over the classes.
ONE = pytest.mark.parametrize("name", mainly(["anl_fl"], REPRESENTATIVE))
TWO_DTYPES = pytest.mark.parametrize("dtype", mainly([torch.float32, torch.bfloat16], DTYPES), ids=dtype_id)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def pairs(**factors):
    """Cases with every pair of two factors' values: a mistake seldom needs three that meet."""
    cases = AllPairs(list(factors.values()), filter_func=exists)
    return [tuple(case) for case in cases]


def exists(case):
    """(name, layout, ...): what is no single view of its memory cannot be overwritten (test_cases has the refusal)."""
    return not {"spatial_permuted", "inplace"} <= set(case)


AWKWARD_CLASSES = (2, 3, 10, 37, 129, 1001)
FACTORS = dict(layout=tuple(helpers.LAYOUTS), dtype=DTYPES, classes=AWKWARD_CLASSES, mode=tuple(MODES))
PAIRS = pairs(name=tuple(EXPRESSIONS), **FACTORS)
FEW_PAIRS = pairs(name=REPRESENTATIVE, **FACTORS)


@pytest.mark.few(name=[])  # the others: test_few_pairs
@ALL
def test_every_pair(backend, name):
    for case in [case for case in PAIRS if case[0] == name]:
        compare_case(backend, *case)


@pytest.mark.few(forced=dict(layout=["spatial_hole"]))
@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_few_pairs(other, layout):
    quick = [case for case in FEW_PAIRS if case[1] == layout and (case[3] < 1000 or not other.interpreted)]
    for case in other.few(quick):
        compare_case(other, *case)


def compare_case(backend, name, layout, dtype, classes, mode):
    if mode == "inplace" and not backend.fused:
        mode = "forward"  # the reference keeps the logits
    try:
        compare_batch(classes, dtype, name, mode, backend, layout)
    except AssertionError as error:
        raise AssertionError(f"{name}, {layout}, {dtype}, {classes} classes, {mode}: {error}") from error


@pytest.mark.thorough
@pytest.mark.few(classes=[3, 37], dtype=[torch.float32], forced=dict(classes=[37]))
@pytest.mark.few(classes=[10], name=REPRESENTATIVE)
@ALL
@EVERY_DTYPE
@pytest.mark.parametrize("classes", [2, 3, 10, 37])
def test_every_loss(backend, name, dtype, classes):
    for mode in modes(backend):
        compare_batch(classes, dtype, name, mode, backend)


@pytest.mark.thorough
@pytest.mark.few(dtype=[torch.float32], name=["anl_fl"], forced=dict(name=["anl_ce"]))
@SOME
@EVERY_DTYPE
@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_every_layout(backend, name, dtype, layout):
    for classes in backend.few((10, 33), 1):
        for mode in modes(backend):
            if layout == "spatial_permuted" and mode == "inplace":
                continue  # no one view of its memory: test_cases has the refusal
            compare_batch(classes, dtype, name, mode, backend, layout)


@pytest.mark.few(name=["anl_fl"], dtype=[torch.float32, torch.bfloat16], tier="thorough")
@ONE
@TWO_DTYPES
def test_every_number_of_classes(backend, name, dtype):
    """Every tail of a vector loop."""
    few = (4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 47, 48, 49, 63, 64, 65, 95, 100)
    every = (*few, 127, 128, 129, 255, 257, 1001, 2003)
    for classes in backend.few(every, 4):
        for mode in ("forward", "recompute", "row_loss"):
            compare_batch(classes, dtype, name, mode, backend)


@pytest.mark.few(name=["anl_ce"], dtype=[torch.float32], layout=["rows"], tier="thorough")
@ONE
@TWO_DTYPES
@pytest.mark.parametrize("layout", ["rows", "transposed", "spatial_1d"])
def test_thousands_of_classes(backend, name, dtype, layout):
    for classes, mode in backend.few(((4097, "forward"), (16387, "recompute"), (16387, "forward"))):
        compare_batch(classes, dtype, name, mode, backend, layout)


@pytest.mark.few(name=["anl_fl"], dtype=[torch.float32], classes=[300_001], tier="thorough")
@pytest.mark.parametrize("classes", [thorough(65_536), thorough(300_000), 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@ONE
def test_few_long_rows(backend, name, dtype, classes):
    """So few that each is split over the threads; the clamp cuts through one row and spares the other."""
    torch.set_num_threads(2)
    values, labels = helpers.rows_of_every_kind(classes, dtype, kinds=("normal", "mixed", "wrong"))
    for mode in ("forward", "recompute"):
        loss, grad = run(values, labels, name, mode, backend)
        helpers.assert_as_accurate(loss, grad, labels, true_long(classes, dtype, name, mode))


@lru_cache(maxsize=64)
def true_long(classes, dtype, name, mode):
    values, labels = helpers.rows_of_every_kind(classes, dtype, kinds=("normal", "mixed", "wrong"))
    return helpers.truth(values, labels, EXPRESSIONS[name], **shared_keywords(mode, len(labels)))


@pytest.mark.few(name=["anl_fl"], mode=["forward", "row_loss", "entropy"], tier="thorough")
@ONE
@pytest.mark.parametrize("mode", MODES)
def test_one_row(backend, name, mode):
    """(K,) with a label without dimensions, and (1, K), short and long."""
    if mode not in modes(backend):
        pytest.skip("the reference keeps the logits")
    torch.set_num_threads(2)
    for classes in backend.few((2, 10, 1001, 200_003)):
        for kind in ("normal", "mixed"):
            values, labels = helpers.rows_of_every_kind(classes, torch.float32, kinds=(kind,))
            true = helpers.truth(values, labels, EXPRESSIONS[name], **shared_keywords(mode, 1))
            for logits, target in ((values[0], labels[0]), (values, labels)):
                loss, grad = run(logits.clone(), target, name, mode, backend)
                helpers.assert_as_accurate(loss.view(true.loss.shape), grad, labels, true)


@pytest.mark.few(name=["anl_ce"], dtype=[torch.float32, torch.bfloat16])
@SOME
@EVERY_DTYPE
def test_every_alignment_of_a_row(backend, name, dtype):
    """The view begins at each of 16 elements, and the rows' stride is odd, so every row is aligned in its own way."""
    values, labels = helpers.rows_of_every_kind(67, dtype)
    rows = len(labels)
    true = helpers.truth(values, labels, EXPRESSIONS[name])
    for start in backend.few(range(16), 3):
        room = torch.full((start + rows * 71,), math.nan, dtype=dtype)
        logits = room[start:].view(rows, 71)[:, :67].copy_(values)
        loss, grad = run(logits, labels, name, "forward", backend)
        helpers.assert_as_accurate(loss, grad, labels, true)


@pytest.mark.few(name=REPRESENTATIVE, dtype=[torch.float32])
@pytest.mark.few(name=["nce+rce"], dtype=[torch.float32], forced=dict(), tier="thorough")
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, thorough(torch.float64)], ids=dtype_id)
def test_around_the_clamp(backend, name, dtype):
    """Rows wholly above it (the closed form), rows it cuts through, all but one class below; several clamps."""
    spreads = (0.3, 3.0, 8.0, 40.0, 300.0)
    for min_prob in (1e-3, 1e-7, 1e-12):
        for classes in backend.few((10, 129), 1):
            values = torch.stack(
                [torch.randn(classes, generator=helpers.generator(5), dtype=torch.float64) * s for s in spreads]
            )
            values = helpers.away_from_clamp(values.to(dtype), min_prob)
            labels = torch.tensor(
                [int(row.argsort()[classes // 2]) for row in values]
            )  # mostly below the clamp themselves
            for target in (labels, values.argmax(1)):
                for recompute in (False, True):
                    helpers.check(
                        values,
                        target,
                        EXPRESSIONS[name],
                        reduction="sum",
                        min_prob=min_prob,
                        recompute=recompute,
                        backend=backend.name,
                    )


SEGMENTS = {  # what a stretch of classes looks like beside the row's largest, 0
    "top": lambda n, g: -torch.rand(n, generator=g, dtype=torch.float64),
    "above": lambda n, g: -6 - torch.rand(n, generator=g, dtype=torch.float64),
    "mixed": lambda n, g: -2 - 30 * torch.rand(n, generator=g, dtype=torch.float64),
    "below": lambda n, g: -40 - 5 * torch.rand(n, generator=g, dtype=torch.float64),
    "gone": lambda n, g: torch.full((n,), -math.inf, dtype=torch.float64),
}


def rows_of_segments(orders, length, dtype, min_prob):
    g = helpers.generator(length)
    rows, labels = [], []
    for order in orders:
        parts = [SEGMENTS[kind](length, g) for kind in order]
        rows.append(torch.cat(parts))
        choices = rows[-1].isfinite().nonzero().flatten()
        labels.append(choices[int(torch.randint(len(choices), (), generator=g))])
    return helpers.away_from_clamp(torch.stack(rows).to(dtype), min_prob), torch.stack(labels)


ORDERS = [
    ("top", "above", "mixed", "below", "gone"),
    ("gone", "below", "mixed", "above", "top"),
    ("below", "top", "gone", "mixed", "above"),
    ("mixed", "gone", "gone", "top", "below"),
    ("above", "above", "top", "above", "above"),
    ("below", "below", "below", "below", "top"),
]


@pytest.mark.few(length=[700], dtype=[torch.float32])
@pytest.mark.few(length=[700], dtype=[torch.float32], forced=dict(name=["nce+rce"]), tier="thorough")
@pytest.mark.parametrize("name", mainly(("anl_fl", "nce+rce"), (*REPRESENTATIVE, "mse")))
@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        *((torch.float32, length) for length in (700, 2311)),
        (torch.bfloat16, 2311),
        thorough(torch.float32, 2048),
        *(thorough(torch.float64, length) for length in (700, 2048, 2311)),
        *(thorough(torch.bfloat16, length) for length in (700, 2048)),
    ],
    ids=str,
)
def test_stretches_above_and_below_the_clamp(backend, name, dtype, length):
    """A kernel may take a stretch of classes wholly on one side of the clamp, or wholly masked, by a shorter way."""
    for min_prob in backend.few((1e-7, 1e-6), 1):
        values, labels = rows_of_segments(ORDERS, length, dtype, min_prob)
        true = helpers.truth(values, labels, EXPRESSIONS[name], reduction="sum", min_prob=min_prob)
        for criterion in (helpers.expression(EXPRESSIONS[name]), helpers.row_loss_expression(EXPRESSIONS[name])):
            for recompute in (False, True):
                keywords = dict(reduction="sum", min_prob=min_prob, recompute=recompute, backend=backend.name)
                helpers.assert_as_accurate(*helpers.calculate(values, labels, criterion, **keywords), labels, true)


@pytest.mark.few(dtype=[torch.float32])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_every_gamma(backend, gamma, dtype):
    values, labels = helpers.rows_of_every_kind(37, dtype)
    for name in ("fl", "nfl", "nnfl"):
        terms = helpers.single(name, gamma=gamma)
        helpers.check(values, labels, terms, reduction="sum", backend=backend.name)
        helpers.check(values, labels, terms, helpers.row_loss_expression(terms), reduction="sum", backend=backend.name)


@pytest.mark.parametrize(
    "terms",
    [
        helpers.single("gce", q=0.1),
        helpers.single("gce", q=1.0),
        helpers.single("rce", floor=1e-2),
        helpers.single("agce", a=6.0, q=1.5),
        helpers.single("agce", a=0.6, q=0.6),
        helpers.single("aul", a=1.5, q=0.9),
        helpers.single("aul", a=6.3, q=1.5),
        helpers.single("ael", a=0.5),
        helpers.single("ael", a=5.0),
        helpers.single("amse", a=0.5),
    ],
    ids=lambda terms: "-".join(map(str, (terms[0][1], *terms[0][2].values()))),
)
def test_every_parameter(backend, terms):
    values, labels = helpers.rows_of_every_kind(37, torch.float32)
    helpers.check(values, labels, terms, reduction="sum", backend=backend.name)
    helpers.check(values, labels, terms, helpers.row_loss_expression(terms), reduction="sum", backend=backend.name)


# ---- the same bits


@pytest.mark.few(name=["anl_fl"], shape=[(5, 30_000)], tier="thorough")
@ONE
@pytest.mark.parametrize(
    "shape", mainly([(1, 200_000), (5, 30_000)], [(1, 200_000), (5, 30_000), (3000, 129), (8, 19, 64, 33)]), ids=str
)
def test_the_same_bits_for_any_number_of_threads_and_every_run(backend, name, shape):
    logits = torch.randn(shape, generator=helpers.generator(1)) * 4
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=helpers.generator(2))
    criterion = helpers.expression(EXPRESSIONS[name])
    for keywords in (dict(), dict(recompute=True), dict(entropy_weight=0.3)):
        results = []
        for threads in (1, 2, 2, 3) if backend.name in ("cpu", "reference") else (1, 2):
            torch.set_num_threads(threads)
            results.append(helpers.calculate(logits, target, criterion, backend=backend.name, **keywords))
        for loss, grad in results[1:] if backend.fused else results[2:3]:
            first = results[0] if backend.fused else results[1]
            assert torch.equal(loss, first[0])
            assert torch.equal(grad, first[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_of_many_classes(fused, reduction):
    """Every kernel that takes rows."""
    for classes in fused.few((403, 3001, 40), 1):
        values, labels = helpers.rows_of_every_kind(classes, torch.float32)
        weight = torch.rand(classes, generator=helpers.generator(classes)) + 0.5
        helpers.check(values, labels, EXPRESSIONS["anl_ce"], weight=weight, reduction=reduction, backend=fused.name)
