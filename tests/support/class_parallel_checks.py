"""What four gloo processes check of class_group, each against one process with all classes: see test_class_parallel.

Every check is called on all ranks; `Ranks` has the groups of two, three and four of them. What is refused is checked in
class_parallel_refusals.
"""

# ruff: noqa: B023  a lambda here is called before the loop goes on
import math
import os

import class_parallel_refusals
import helpers
import oracle
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import EXPRESSIONS, expression, row_loss_expression
from ranks import CLASSES, KINDS, SIZES, Ranks, assert_close, compare, raises, with_gradient

import anl_kernels as ak
from anl_kernels.sharding.class_group import gathered


def worker(rank, world, path, names):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        ranks = Ranks()
        for name in names:
            CHECKS[name](ranks)
    finally:
        dist.destroy_process_group()


def check_every_loss(ranks):
    values, target = helpers.batch(CLASSES, torch.float64)
    for size, group in ranks.members():
        for name in EXPRESSIONS:
            compare(group, ranks.rank, SIZES[size][1], values, target, expression(EXPRESSIONS[name]))
        for dtype in helpers.DTYPES:  # the top in one slice, the target perhaps in another
            tied, labels, _ = helpers.near_ties(CLASSES, dtype)
            compare(group, ranks.rank, SIZES[size][1], tied, labels, expression(EXPRESSIONS["eps_ce3"]))


def check_every_kind(ranks):
    """Every dtype and kind of call; ignored rows full of NaN, masked classes; even, uneven and empty slices."""
    for dtype in helpers.DTYPES:
        values, target = helpers.batch(CLASSES, dtype)
        for size, group in ranks.members():
            for sizes in SIZES[size]:
                for keywords in KINDS.values():
                    for name in helpers.EVERY_STATISTIC:
                        compare(group, ranks.rank, sizes, values, target, expression(EXPRESSIONS[name]), **keywords)
                criterion = row_loss_expression(EXPRESSIONS["anl_fl"])
                compare(group, ranks.rank, sizes, values, target, criterion, entropy_weight=0.3)
                terms = expression(EXPRESSIONS["everything"])
                compare(group, ranks.rank, sizes, values, target, terms, backend="reference", entropy_weight=0.3)


def check_shapes(ranks):
    """Images, channels-last, one row, no row, thousands of classes, int16 labels, another ignore_index."""
    group, sizes = ranks.groups[4], SIZES[4][1]
    criterion = expression(EXPRESSIONS["anl_ce"])
    for layout in ("spatial", "channels_last", "spatial_3d", "padded", "transposed"):
        logits, target = helpers.lay_out(layout, *helpers.batch(CLASSES, torch.float64))
        for keywords in (dict(), dict(reduction="none"), dict(entropy_weight=0.4)):
            compare(group, ranks.rank, sizes, logits, target, criterion, **keywords)
    values, labels = helpers.rows_of_every_kind(CLASSES, torch.float32)
    for keywords in (dict(), dict(reduction="none"), dict(entropy_weight=0.4)):
        compare(group, ranks.rank, sizes, values[0], labels[0], criterion, **keywords)
    compare(group, ranks.rank, sizes, values[:0], labels[:0], criterion, reduction="sum")
    compare(group, ranks.rank, sizes, values, torch.full_like(labels, -100), criterion)
    compare(group, ranks.rank, sizes, values, labels.to(torch.int16), criterion, ignore_index=int(labels[0]))
    values, labels = helpers.rows_of_every_kind(9001, torch.float32)
    for name in helpers.EVERY_STATISTIC:
        compare(group, ranks.rank, (5000, 1, 4000, 0), values, labels, expression(EXPRESSIONS[name]))


def check_confident_rows(ranks):
    """1 - p_y from the sums without the target, wherever the target is: all digits, as in one process."""
    group = ranks.groups[4]
    for margin in (9.0, 20.0, 28.0):
        row = torch.tensor([[0.25, -0.5, 0.0, 0.75, -1.25, 0.125, -0.25]], dtype=torch.float64)
        row[0, 3] += margin
        target, sizes = torch.tensor([3]), (2, 3, 0, 2)
        for name in ("nce", "fl", "mae", "nce+rce", "anl_fl"):
            exact_loss, exact_grad = oracle.exact(row[0].tolist(), 3, EXPRESSIONS[name])
            loss, grad = with_gradient(
                lambda z: ak.robust_loss(z, target, expression(EXPRESSIONS[name]), reduction="sum", class_group=group),
                row.split(sizes, 1)[ranks.rank],
            )
            # What a table of float64 statistics loses of sums that 1 is taken from, as RowLoss does: roundings of 1.
            floor = 0.0 if name in ("nce", "fl", "mae") else 1e-15
            assert abs(loss.item() - exact_loss) <= 1e-12 * abs(exact_loss) + floor
            exact = torch.tensor([exact_grad], dtype=torch.float64)
            error = (grad - exact.split(sizes, 1)[ranks.rank]).abs()
            assert (error <= 1e-13 * exact.abs().max() + floor).all()


def check_bad_rows(ranks):
    """NaN, +inf, a target at -inf, a NaN among masked classes: that row is NaN on all ranks, and no other."""
    group, sizes = ranks.groups[3], (2100, 2100, 5)
    if ranks.rank >= 3:
        return
    values = torch.randn(6, sum(sizes), generator=helpers.generator(0))
    target = torch.tensor([5, 3000, 4203, 7, 8, 9])
    values[0, 2500], values[1, 0], values[2, 4203] = math.nan, math.inf, -math.inf
    values[3, 2100:4200], values[3, 2500] = -math.inf, math.nan
    for name in helpers.EVERY_STATISTIC:
        loss, grad = with_gradient(
            lambda z: ak.robust_loss(z, target, expression(EXPRESSIONS[name]), reduction="none", class_group=group),
            values.split(sizes, 1)[ranks.rank],
        )
        assert loss.isnan().tolist() == [True] * 4 + [False] * 2
        assert grad.isnan().all(1).tolist() == [True] * 4 + [False] * 2


def check_inplace(ranks):
    values, target = helpers.batch(CLASSES, torch.float32)
    group, sizes = ranks.groups[4], SIZES[4][0]
    for keywords in (dict(), dict(entropy_weight=0.5)):
        leaf = values.split(sizes, 1)[ranks.rank].clone().requires_grad_()
        mine = helpers.Alias.apply(leaf)
        loss = ak.anl_ce(mine, target, class_group=group, inplace=True, **keywords)
        (grad,) = torch.autograd.grad(loss, mine)
        _, expected = with_gradient(lambda z: ak.anl_ce(z, target, **keywords), values)
        assert_close(grad, expected.split(sizes, 1)[ranks.rank], torch.float32, expected)
        assert grad.data_ptr() == mine.data_ptr()


def check_the_same_bits(ranks):
    values, target = helpers.batch(CLASSES, torch.float32)
    for size, group in ranks.members():
        mine = values.split(SIZES[size][0], 1)[ranks.rank]
        results = [
            with_gradient(lambda z: ak.anl_fl(z, target, class_group=group, entropy_weight=0.3), mine) for _ in range(3)
        ]
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


class Traffic:
    """The bytes that this rank puts into collectives, and how many there are."""

    def __enter__(self):
        self.calls, self.kept = [], (dist.all_gather, dist.all_reduce)
        dist.all_gather = lambda every, part, **k: self.calls.append(part.nbytes) or self.kept[0](every, part, **k)
        dist.all_reduce = lambda total, **k: self.calls.append(total.nbytes) or self.kept[1](total, **k)
        return self

    def __exit__(self, *error):
        dist.all_gather, dist.all_reduce = self.kept


def check_traffic(ranks):
    """A fixed header, one all-gather of 48 bytes per row (56 with the squares), one more for what needs the second
    sweep; whatever K is."""
    group, rows = ranks.groups[4], 11
    target = torch.arange(rows)
    for classes in (48, 4800):
        sizes = (classes // 2, classes // 4, classes // 4, 0)
        values = torch.randn(rows, classes, generator=helpers.generator(0)).split(sizes, 1)[ranks.rank]
        for loss, *numbers in (
            (ak.NCE(), 48),
            (ak.MSE(), 56),
            (ak.NNCE(), 48, 16),
            (ak.RCE(), 48, 24),
            (ak.NFL() + ak.NNFL(), 48, 32),
        ):
            with Traffic() as forward:
                result = ak.robust_loss(values.clone().requires_grad_(), target, loss, class_group=group)
            header, *rest = forward.calls
            assert header == 80 and rest == [number * rows for number in numbers], forward.calls
            with Traffic() as backward:
                result.backward()
            assert backward.calls == []


def check_data_parallel_too(ranks):
    """A grid: two slices of the classes times two parts of the rows, of which some are ignored."""
    classes, batch = (ranks.pairs[ranks.rank // 2], ranks.pairs[2 + ranks.rank % 2])
    values, target = helpers.batch(CLASSES, torch.float64)
    row_sizes, sizes = (15, 9), (20, 17)
    part, slice_ = ranks.rank // 2, ranks.rank % 2
    for name in helpers.EVERY_STATISTIC:
        for keywords in (dict(), dict(entropy_weight=0.7), dict(weight=KINDS["weight"]["weight"], entropy_weight=0.7)):
            for build in (expression, row_loss_expression):
                criterion = build(EXPRESSIONS[name])
                expected = with_gradient(lambda z: ak.robust_loss(z, target, criterion, **keywords), values)
                mine = values.split(row_sizes)[part].split(sizes, 1)[slice_]
                labels, groups = target.split(row_sizes)[part], dict(class_group=classes, batch_group=batch)
                loss, grad = with_gradient(lambda z: ak.robust_loss(z, labels, criterion, **groups, **keywords), mine)
                total = gathered(loss, batch).mean()
                torch.testing.assert_close(total, expected[0], rtol=1e-12, atol=0)
                # DDP averages over the two ranks.
                exact = expected[1].split(row_sizes)[part].split(sizes, 1)[slice_]
                assert_close(grad / 2, exact, torch.float64, 4 * expected[1])


# ---- the linear head


def check_linear(ranks):
    """Whole slices, chunks of rows, tiles of the slice; input's gradient is that of all classes on every rank."""
    g = helpers.generator(1)
    hidden, weight = torch.randn(23, 8, generator=g).double(), torch.randn(CLASSES, 8, generator=g).double() * 2
    bias, target = torch.randn(CLASSES, generator=g).double(), torch.randint(CLASSES, (23,), generator=g)
    target[::5] = -100
    hidden[::5] = 0.0
    for size, group in ranks.members():
        for sizes in SIZES[size]:
            w, b = weight.split(sizes)[ranks.rank], bias.split(sizes)[ranks.rank]
            for kind, keywords in KINDS.items():
                options = {"class_weight" if key == "weight" else key: value for key, value in keywords.items()}
                for name in ("anl_ce", "nfl+rce"):
                    criterion = expression(EXPRESSIONS[name])
                    full = lambda x, w, b: ak.robust_loss(F.linear(x, w, b), target, criterion, **keywords)
                    expected = with_gradient(full, hidden, weight, bias)
                    for limit in (None, 40 * CLASSES * 8, 16 * 8 * 5):
                        given = dict(class_group=group, max_chunk_bytes=limit, **options)
                        head = lambda x, w, b: ak.linear_robust_loss(x, w, target, criterion, bias=b, **given)
                        got = with_gradient(head, hidden, w, b)
                        assert_close(got[0], expected[0], torch.float64)
                        assert_close(got[1], expected[1], torch.float64, 4 * expected[1])
                        assert_close(got[2], expected[2].split(sizes)[ranks.rank], torch.float64, 4 * expected[2])
                        assert_close(got[3], expected[3].split(sizes)[ranks.rank], torch.float64, 4 * expected[3])
                    if kind != "mean":
                        break


# ---- DTensor


def check_dtensor(ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    values, target = helpers.batch(CLASSES, torch.float64)  # 37 classes on 4 ranks: 10, 10, 10, 7
    mesh = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for placements, on in (([Shard(1)], mesh), ([Replicate()], mesh), ([Replicate(), Shard(1)], grid)):
        for keywords in (dict(), dict(entropy_weight=0.5), dict(reduction="none")):
            expected = with_gradient(lambda z: ak.anl_fl(z, target, **keywords), values)
            logits = distribute_tensor(values, on, placements).requires_grad_()
            labels = distribute_tensor(target, on, [Replicate()] * on.ndim) if keywords else target
            loss = ak.anl_fl(logits, labels, **keywords)
            (grad,) = torch.autograd.grad(
                loss, logits, torch.linspace(-1, 1, 24, dtype=torch.float64) if loss.dim() else None
            )
            assert isinstance(grad, DTensor) and grad.placements == logits.placements
            assert_close(loss.detach(), expected[0], torch.float64)
            assert_close(grad.full_tensor(), expected[1], torch.float64, 4 * expected[1])
    rows = distribute_tensor(values, mesh, [Shard(0)])
    raises(ValueError, "batch_group", lambda: ak.anl_fl(rows, target))
    raises(ValueError, "class group", lambda: ak.anl_fl(logits, target, class_group=ranks.groups[4]))


def check_dtensor_arguments(ranks):
    """Class weights and labels as DTensors, or still under way in a collective; labels in 8 bits; what is refused."""
    from torch.distributed import _functional_collectives as collectives
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    group, mesh = ranks.groups[4], init_device_mesh("cpu", (4,))
    sharded = lambda x: distribute_tensor(x, mesh, [Shard(min(1, x.dim() - 1))])
    replicated = lambda x: distribute_tensor(x, mesh, [Replicate()])
    under_way = lambda x: collectives.all_gather_tensor(x.chunk(4)[ranks.rank].contiguous(), 0, mesh)
    classes = 200
    values = torch.randn(8, classes, generator=helpers.generator(3)).double()
    target, weight = torch.tensor([156, 0, 199, 3, 156, 57, -100, 100]), torch.linspace(0.1, 2, classes)
    few_bits = torch.where(target == -100, 255, target).to(torch.uint8)
    mine = values.chunk(4, 1)[ranks.rank]
    for keywords in (dict(), dict(reduction="none"), dict(entropy_weight=0.5)):
        expected = with_gradient(lambda z: ak.anl_fl(z, target, weight=weight, **keywords), values)
        for make in (replicated, under_way):
            for labels, ignore_index in ((target, -100), (few_bits, 255)):
                options = dict(weight=make(weight), ignore_index=ignore_index, **keywords)
                got = with_gradient(lambda z: ak.anl_fl(z, make(labels), class_group=group, **options), mine)
                assert_close(got[0], expected[0], torch.float64)
                assert_close(got[1], expected[1].chunk(4, 1)[ranks.rank], torch.float64, 4 * expected[1])
                got = with_gradient(lambda z: ak.anl_fl(z, make(labels), **options), sharded(values))
                assert_close(got[0], expected[0], torch.float64)
                assert_close(got[1].full_tensor(), expected[1], torch.float64, 4 * expected[1])
    call = lambda z, **k: ak.anl_fl(z, target, **k)
    raises(ValueError, "weight.full_tensor()", lambda: call(sharded(values), weight=sharded(weight)))
    raises(ValueError, "weight.full_tensor()", lambda: call(mine, weight=sharded(weight), class_group=group))
    raises(ValueError, "target.full_tensor()", lambda: ak.anl_fl(sharded(values), sharded(target)))
    raises(ValueError, "overwrite a leaf", lambda: call(sharded(values).requires_grad_(), inplace=True))
    leaf = sharded(values).requires_grad_()
    expected = with_gradient(call, values)
    call(leaf * 1.0, inplace=True).backward()
    assert_close(leaf.grad.full_tensor(), expected[1], torch.float64, 4 * expected[1])


# ---- checkpoints


def check_checkpoint(ranks):
    """What is saved is made again in backward, by the same collectives on every rank."""
    from torch.utils.checkpoint import checkpoint

    group, sizes = ranks.groups[4], SIZES[4][1]
    values, target = helpers.batch(CLASSES, torch.float64)
    mine = values.split(sizes, 1)[ranks.rank].clone()
    g = helpers.generator(1)
    hidden, weight = torch.randn(24, 8, generator=g).double(), torch.randn(CLASSES, 8, generator=g).double()
    weight = weight.split(sizes)[ranks.rank].clone()
    for keywords in (dict(), dict(entropy_weight=0.4)):
        for f, *leaves in (
            (lambda z: ak.anl_fl(z, target, class_group=group, **keywords), mine),
            (lambda x, w: ak.linear_anl_ce(x, w, target, class_group=group, **keywords), hidden, weight),
        ):
            expected = with_gradient(f, *leaves)
            got = with_gradient(lambda *given: checkpoint(f, *given, use_reentrant=False), *leaves)
            assert all(torch.equal(a, b) for a, b in zip(got, expected))


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in {**vars(class_parallel_refusals), **globals()}.items()
    if name.startswith("check_")
}
