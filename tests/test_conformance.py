"""Every loss x backend x layout x dtype against the papers' formulas in float64: values and gradients.

The error may not exceed plain PyTorch's by more than a few roundings (helpers.assert_as_accurate).
`torch.empty` is full of NaN while these run (conftest.poison), and so is all memory around the views.
"""

import math
from functools import lru_cache

import helpers
import oracle
import pytest
import torch
from allpairspy import AllPairs
from helpers import DTYPES, EXPRESSIONS, REPRESENTATIVE, dtype_id
from tiers import mainly, thorough

pytestmark = pytest.mark.variants
ALL = pytest.mark.parametrize("name", EXPRESSIONS)
SOME = pytest.mark.parametrize("name", REPRESENTATIVE)
MOST = pytest.mark.parametrize("name", mainly(REPRESENTATIVE, EXPRESSIONS))  # by default, where kernels differ more
# By default the one with focal weights and all sums over the classes.
ONE = pytest.mark.parametrize("name", mainly(["anl_fl"], REPRESENTATIVE))
TWO_DTYPES = pytest.mark.parametrize("dtype", mainly([torch.float32, torch.bfloat16], DTYPES), ids=dtype_id)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@lru_cache(maxsize=64)
def row_weights(rows):
    return torch.rand(rows, generator=helpers.generator(rows)) * 4 - 2


# mode -> (keywords for package and oracle, keywords for the package alone)
MODES = {
    "forward": (dict(reduction="mean"), dict(recompute=False)),
    "recompute": (dict(reduction="sum"), dict(recompute=True)),
    "none": (dict(reduction="none"), dict()),
    "row_loss": (dict(reduction="mean"), dict()),
    "inplace": (dict(reduction="sum"), dict(inplace=True)),  # not on the reference, which keeps the logits
    "entropy": (dict(reduction="mean", entropy_weight=0.7), dict()),
}


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


def modes(backend):
    if backend.interpreted and backend.variant:  # one of each pass: gradient, coefficients, statistics
        return ["inplace", "recompute", "row_loss"]
    return [mode for mode in MODES if backend.fused or mode != "inplace"]


def shared_keywords(mode, rows):
    keywords = dict(MODES[mode][0])
    if mode == "none":
        keywords["grad_output"] = row_weights(rows)
    return keywords


def run(logits, target, name, mode, backend):
    """The package on one tensor; loss and gradient as rows."""
    terms = EXPRESSIONS[name]
    criterion = helpers.row_loss_expression(terms) if mode == "row_loss" else helpers.expression(terms)
    keywords = {**shared_keywords(mode, target.numel()), **MODES[mode][1], "backend": backend.name}
    if mode == "none":
        keywords["grad_output"] = keywords["grad_output"].to(helpers.acc(logits.dtype)).view(target.shape)
    if mode == "inplace":
        keywords["leaf"] = False
    loss, grad = helpers.calculate(logits, target, criterion, **keywords)
    return loss.reshape(-1) if loss.dim() else loss, oracle.as_rows(grad)


def compare_batch(classes, dtype, name, mode, backend, layout="rows"):
    values, labels = helpers.batch(classes, dtype)
    logits, target = helpers.lay_out(layout, values, labels)
    loss, grad = run(logits, target, name, mode, backend)
    true = helpers.truth(values, labels, EXPRESSIONS[name], **shared_keywords(mode, len(labels)))
    helpers.assert_as_accurate(loss, grad, labels, true)
    assert (grad[labels == -100] == 0).all()
    assert (grad[values == -math.inf] == 0).all()


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
    every = (4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 47, 48, 49, 63, 64, 65, 95, 100, 127, 128, 129, 255, 257, 1001)
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
@pytest.mark.parametrize("name", mainly(("anl_fl", "nce+rce"), REPRESENTATIVE))
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
    ],
    ids=lambda terms: "-".join(map(str, (terms[0][1], *terms[0][2].values()))),
)
def test_every_parameter(backend, terms):
    values, labels = helpers.rows_of_every_kind(37, torch.float32)
    helpers.check(values, labels, terms, reduction="sum", backend=backend.name)
    helpers.check(values, labels, terms, helpers.row_loss_expression(terms), reduction="sum", backend=backend.name)


# ---- confident rows: float64 itself cancels there, 120 digits do not

CONFIDENT = ("ce", "nce", "fl", "nfl", "mae", "rce", "gce", "agce", "aul", "anl_ce", "anl_fl", "nce+rce")


@pytest.mark.few(name=["anl_ce", "nfl"])
@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("name", CONFIDENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_no_cancellation_as_the_target_becomes_certain(backend, name, dtype):
    """Loss and gradient keep relative digits while 1 - p_y falls from 1e-2 to 1e-12."""
    terms, eps = EXPRESSIONS[name], helpers.EPS[dtype]
    relative = 3e-6 if dtype == torch.float32 else 1e-13
    # NNCE and NNFL are 1 minus a ratio near 1, by their definition: of them no more than roundings of 1 is asked.
    floor = 8 * eps if any(term.startswith("nn") for _, term, _ in terms) else 0.0
    for margin in (5.0, 9.0, 14.0, 20.0, 28.0):
        row = torch.tensor([0.25, -0.5, 0.0, 0.75, -1.25, 0.125, -0.25], dtype=dtype)
        label = 3
        row[label] += margin
        exact_loss, exact_grad = exact_row(tuple(row.tolist()), label, name)
        missing, _ = exact_row(tuple(row.tolist()), label, "mae")  # 1 - p_y: what the gradient is made of
        expected = torch.tensor(exact_grad, dtype=torch.float64)
        allowed = 2 * relative * expected.abs().max() + 100 * eps * missing + floor
        for recompute in (False, True):
            loss, grad = helpers.calculate(
                row, torch.tensor(label), helpers.expression(terms), recompute=recompute, backend=backend.name
            )
            assert abs(loss.item() - exact_loss) <= relative * abs(exact_loss) + floor, (
                margin,
                loss.item(),
                exact_loss,
            )
            assert ((grad.double() - expected).abs() <= allowed).all(), (margin, grad.tolist(), exact_grad)


@lru_cache(maxsize=512)
def exact_row(row, label, name):
    return oracle.exact(row, label, EXPRESSIONS[name])


@pytest.mark.few()
@pytest.mark.few(forced=dict(), tier="thorough")
def test_certain_rows(backend):
    """p_y = 1 to every digit: nothing divides by the zero that is left, and what 120 digits find is found."""
    margins, label = (60.0, 200.0, 3e4), 4
    logits = torch.zeros(len(margins), 10)
    logits[:, label] = torch.tensor(margins)
    exact = lambda name: zip(*(exact_row(tuple(row.tolist()), label, name) for row in logits))
    missing = torch.tensor(next(exact("mae")), dtype=torch.float64).view(-1, 1)
    smallest = torch.finfo(torch.float32).smallest_normal
    for name, terms in EXPRESSIONS.items():
        losses, grads = (torch.tensor(values, dtype=torch.float64) for values in exact(name))
        loss, grad = helpers.calculate(
            logits, torch.full((3,), label), helpers.expression(terms), reduction="sum", backend=backend.name
        )
        error = (grad.double() - grads).abs()
        assert abs(loss.item() - losses.sum()) <= 3e-6 * losses.sum() + smallest, name
        allowed = 3e-6 * (grads.abs().amax(1, keepdim=True) + 10 * missing) + smallest  # 10: RCE is -log(floor) p_j
        assert (error <= allowed).all(), name


# ---- rows that are no numbers

POISONS = (math.nan, math.inf)


@pytest.mark.few(name=["anl_ce"])
@pytest.mark.few(name=REPRESENTATIVE, forced=dict(name=["anl_ce"], layout=["rows"]), tier="thorough")
@MOST
@pytest.mark.parametrize("layout", ["rows", "spatial", "transposed"])
def test_a_row_of_nan_harms_no_other(backend, name, layout):
    values, labels = helpers.batch(33, torch.float32)
    values = values.clone()
    broken = [3, 11, 17]
    labels = labels.where(labels >= 0, torch.tensor(0))
    values[values.isnan().any(1)] = 0.5
    clean = helpers.truth(values, labels, EXPRESSIONS[name], reduction="none")
    values[3, 32], values[11, 0] = POISONS
    values[17, labels[17]] = math.nan
    logits, target = helpers.lay_out(layout, values, labels)
    others = torch.ones(len(labels), dtype=torch.bool)
    others[broken] = False
    criterion = helpers.expression(EXPRESSIONS[name])
    for extra in (dict(), dict(reduction="sum", recompute=False), dict(reduction="sum", recompute=True)):
        loss, grad = helpers.calculate(
            logits, target, criterion, **{"reduction": "none", **extra}, backend=backend.name
        )
        grad = oracle.as_rows(grad)
        assert grad[broken].isnan().all()
        if extra:
            assert loss.isnan()
        else:
            assert loss.reshape(-1)[broken].isnan().all()
            helpers.check_loss(loss.reshape(-1)[others], clean.of(others))
        helpers.check_grad(grad[others], labels[others], clean.of(others))


@pytest.mark.few(name=["anl_ce"])
@pytest.mark.few(name=REPRESENTATIVE, forced=dict(name=["anl_ce"]), tier="thorough")
@MOST
def test_a_target_that_does_not_exist_is_nan(backend, name):
    """Few classes and many: other kernels, each with its own test for it."""
    for classes in backend.few((7, 40, 5000)):
        logits = torch.randn(3, classes, generator=helpers.generator(0))
        logits[1, 2] = -math.inf
        target = torch.tensor([0, 2, 6])
        for build in (helpers.expression, helpers.row_loss_expression):
            criterion = build(EXPRESSIONS[name])
            for recompute in (False, True):
                total, grad = helpers.calculate(
                    logits, target, criterion, reduction="sum", recompute=recompute, backend=backend.name
                )
                assert total.isnan()
                assert grad[[0, 2]].isfinite().all()
            loss, _ = helpers.calculate(logits, target, criterion, reduction="none", backend=backend.name)
            assert loss.isnan().tolist() == [False, True, False]


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


@pytest.mark.few(layout=["rows"])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_a_nan_row_is_nan_where_it_is_masked_too(backend, layout):
    """Every way to the gradient: classes that do not exist get 0 in all other rows."""
    for classes in backend.few((5000, 7, 40), 1):
        values = torch.randn(3, classes, generator=helpers.generator(0))
        values[:, 4:6] = -math.inf
        values[1, 2] = math.nan
        logits, labels = helpers.lay_out(layout, values, torch.tensor([3, 0, 3]))
        for name in backend.few(REPRESENTATIVE, 1):
            for mode in ("forward", "recompute", "entropy"):
                _, grad = run(logits, labels, name, mode, backend)
                assert grad[1].isnan().all()
                if mode != "entropy":  # through which every row sees the NaN
                    assert (grad[[0, 2], 4:6] == 0).all()


@pytest.mark.parametrize("name", ["rce", "nce+rce", "nfl+rce"])
def test_a_stretch_just_below_the_clamp(backend, name):
    """Thousands of classes whose p is below min_prob each, and in sum is not: RCE sees it."""
    values = torch.zeros(3, 3 * 2048)
    values[:, 2048:] = -9 - torch.rand(3, 2 * 2048, generator=helpers.generator(0)) / 4
    labels = torch.tensor([5, 2047, 3000])
    for recompute in (False, True):
        helpers.check(values, labels, EXPRESSIONS[name], reduction="sum", recompute=recompute, backend=backend.name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_of_many_classes(fused, reduction):
    """Every kernel that takes rows."""
    for classes in fused.few((403, 3001, 40), 1):
        values, labels = helpers.rows_of_every_kind(classes, torch.float32)
        weight = torch.rand(classes, generator=helpers.generator(classes)) + 0.5
        helpers.check(values, labels, EXPRESSIONS["anl_ce"], weight=weight, reduction=reduction, backend=fused.name)
