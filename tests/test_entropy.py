"""The batch entropy term: against the oracle, over process groups, and under DDP."""

import os

import helpers
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import DTYPES, EXPRESSIONS, calculate, dtype_id, expression

import anl_kernels as ak

ANL_CE = EXPRESSIONS["anl_ce"]


@pytest.mark.few(dtype=[torch.float32], classes=[65], reduction=["mean"])
@pytest.mark.few(tier="thorough")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("classes", [2, 10, 65, 1001])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_entropy(backend, dtype, classes, reduction):
    """Added once to the mean or the sum; with masked classes and ignored rows, forward and recompute."""
    values, labels = helpers.batch(classes, dtype)
    for weight in (2.0, -0.3):
        for recompute in (False, True):
            keywords = dict(reduction=reduction, entropy_weight=weight)
            helpers.check(values, labels, ANL_CE, recompute=recompute, backend=backend.name, **keywords)


@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_entropy_alone(backend, layout):
    """No other term in its way."""
    values, labels = helpers.batch(33, torch.float64)
    logits, target = helpers.lay_out(layout, values, labels)
    terms = ((0.0, "ce", {}),)
    true = helpers.truth(values, labels, terms, entropy_weight=1.0)
    loss, grad = calculate(logits, target, expression(terms), entropy_weight=1.0, backend=backend.name)
    torch.testing.assert_close(loss, true.loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(oracle.as_rows(grad), true.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.few(tier="thorough")
def test_entropy_with_many_rows_and_classes(backend):
    """Enough for several threads and blocks of rows; once as wide as tall."""
    torch.set_num_threads(2)
    shapes = ((700, 17), (130, 140), (5, 9000)) if backend.interpreted else ((3000, 17), (700, 700), (5, 20_000))
    for rows, classes in shapes:
        values = torch.randn(rows, classes, generator=helpers.generator(rows)) * 3
        labels = torch.randint(classes, (rows,), generator=helpers.generator(1))
        helpers.check(values, labels, ANL_CE, entropy_weight=3.0, backend=backend.name)


def test_class_weights_do_not_enter_q(backend):
    values, labels = helpers.rows_of_every_kind(9, torch.float32)
    weight = torch.linspace(0.1, 3, 9)
    helpers.check(values, labels, ANL_CE, weight=weight, entropy_weight=2.0, backend=backend.name)


def test_a_class_nobody_predicts(backend):
    """q_j = 0 adds 0, and its gradient is 0: a column of -inf."""
    values, labels = helpers.rows_of_every_kind(9, torch.float32, kinds=("normal",) * 8)
    values[:, 4] = -torch.inf
    labels[labels == 4] = 3
    _, grad = helpers.check(values, labels, ANL_CE, entropy_weight=2.0, backend=backend.name)
    assert (grad[:, 4] == 0).all()


def test_entropy_without_rows(backend):
    """No valid row: the mean is NaN as ever, the sum 0."""
    logits, target = torch.randn(3, 4), torch.full((3,), -100)
    mean, grad = calculate(logits, target, expression(ANL_CE), entropy_weight=1.0, backend=backend.name)
    assert mean.isnan() and (grad == 0).all()
    for rows in (3, 0):
        loss, grad = calculate(
            logits[:rows], target[:rows], expression(ANL_CE), entropy_weight=1.0, reduction="sum", backend=backend.name
        )
        assert loss == 0 and (grad == 0).all()


def test_entropy_of_one_row(backend):
    for classes in (2, 1000):
        logits = torch.randn(classes, generator=helpers.generator(0)) * 2
        helpers.check(logits, torch.tensor(1), ANL_CE, entropy_weight=2.0, backend=backend.name)


def test_row_loss_with_entropy(backend):
    values, labels = helpers.batch(33, torch.float32)
    criterion = helpers.row_loss_expression(ANL_CE)
    helpers.check(values, labels, ANL_CE, criterion, entropy_weight=2.0, backend=backend.name)


# ---- several processes

CLASSES = 11
KNOBS = dict(entropy_weight=2.0)
SIZES = {"even": (8, 8, 8), "uneven": (3, 12, 9), "one_empty": (10, 14, 0)}


def data(sizes, ignored=True):
    g = helpers.generator(7)
    x = torch.randn(sum(sizes), 5, dtype=torch.float64, generator=g)
    y = torch.randint(CLASSES, (sum(sizes),), generator=g)
    if ignored:
        y[::5] = -100
    weight = torch.randn(CLASSES, 5, dtype=torch.float64, generator=g)
    return x, y, weight


def model_of(weight):
    model = torch.nn.Linear(5, CLASSES, bias=False, dtype=torch.float64)
    model.weight.data.copy_(weight)
    return model


def shard(tensor, sizes, rank):
    return tensor.split(sizes)[rank]


def check_worker(rank, world, path, backends):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        for backend in backends:
            check_ddp(rank, world, backend)
            for recompute in (False, True):
                for sizes in SIZES.values():
                    check_shared_entropy(rank, world, backend, sizes, recompute)
                    check_shared_mean(rank, world, backend, sizes, recompute=recompute)
            check_row_loss(rank, world, backend)
            check_subgroup(rank, backend)
    finally:
        dist.destroy_process_group()


def averaged(grad, world):
    total = grad.clone()
    dist.all_reduce(total)
    return total / world


def check_ddp(rank, world, backend):
    """DDP's averaged gradients are those of one process with all rows: with the shared entropy, and without
    a group, where the ranks have as many rows each."""
    sizes = SIZES["even"]
    x, y, weight = data(sizes, ignored=False)
    for name in ("anl_ce", "anl_fl"):
        single = model_of(weight)
        oracle.loss(single(x), y, EXPRESSIONS[name], **KNOBS).backward()
        ddp = torch.nn.parallel.DistributedDataParallel(model_of(weight))
        logits = ddp(shard(x, sizes, rank))
        loss = ak.robust_loss(
            logits,
            shard(y, sizes, rank),
            expression(EXPRESSIONS[name]),
            backend=backend,
            batch_group=dist.group.WORLD,
            **KNOBS,
        )
        loss.backward()
        torch.testing.assert_close(ddp.module.weight.grad, single.weight.grad, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(
            averaged(loss.detach(), world),
            oracle.loss(single(x), y, EXPRESSIONS[name], **KNOBS).detach(),
            rtol=1e-12,
            atol=0,
        )
        plain, alone = torch.nn.parallel.DistributedDataParallel(model_of(weight)), model_of(weight)
        local = ak.robust_loss(
            plain(shard(x, sizes, rank)), shard(y, sizes, rank), expression(EXPRESSIONS[name]), backend=backend
        )
        local.backward()
        oracle.loss(alone(x), y, EXPRESSIONS[name]).backward()
        torch.testing.assert_close(plain.module.weight.grad, alone.weight.grad, rtol=1e-10, atol=1e-13)


def check_shared_entropy(rank, world, backend, sizes, recompute):
    """Any split of the rows, ignored ones among them: the term, the same on every rank, and its averaged gradient."""
    x, y, weight = data(sizes)
    single = model_of(weight)
    truth = oracle.loss(single(x), y, ((0.0, "ce", {}),), reduction="sum", **KNOBS)
    truth.backward()
    model = model_of(weight)
    loss = ak.robust_loss(
        model(shard(x, sizes, rank)), shard(y, sizes, rank), 0.0 * ak.CE(), reduction="sum", backend=backend,
        recompute=recompute, batch_group=dist.group.WORLD, **KNOBS,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss.detach(), truth.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(averaged(model.weight.grad, world), single.weight.grad, rtol=1e-10, atol=1e-14)


def check_shared_mean(rank, world, backend, sizes, **keywords):
    """Any split of the rows: the average of the ranks' losses and gradients is the mean over all rows that count."""
    x, y, weight = data(sizes)
    single = model_of(weight)
    truth = oracle.loss(single(x), y, ANL_CE, **KNOBS)
    truth.backward()
    for criterion in (expression(ANL_CE), helpers.row_loss_expression(ANL_CE)):
        model = model_of(weight)
        logits, labels = model(shard(x, sizes, rank)), shard(y, sizes, rank)
        loss = criterion(logits, labels, backend=backend, batch_group=dist.group.WORLD, **KNOBS, **keywords)
        loss.backward()
        torch.testing.assert_close(averaged(loss.detach(), world), truth.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(averaged(model.weight.grad, world), single.weight.grad, rtol=1e-10, atol=1e-14)


def check_row_loss(rank, world, backend):
    sizes = SIZES["uneven"]
    x, y, weight = data(sizes)
    single = model_of(weight)
    oracle.loss(single(x), y, ((0.0, "ce", {}),), reduction="sum", **KNOBS).backward()
    model = model_of(weight)
    criterion = ak.RowLoss(lambda s: 0.0 * s.lse)
    loss = criterion(
        model(shard(x, sizes, rank)),
        shard(y, sizes, rank),
        reduction="sum",
        backend=backend,
        batch_group=dist.group.WORLD,
        **KNOBS,
    )
    loss.backward()
    torch.testing.assert_close(averaged(model.weight.grad, world), single.weight.grad, rtol=1e-10, atol=1e-14)


def check_subgroup(rank, backend):
    """Only the group's ranks share q and the mean's denominator; a rank outside has its own."""
    sizes, pair = SIZES["uneven"], dist.new_group([0, 1])
    x, y, weight = data(sizes)
    mine, labels = shard(x, sizes, rank) @ weight.t(), shard(y, sizes, rank)
    if rank < 2:
        loss = ak.anl_ce(mine, labels, backend=backend, batch_group=pair, **KNOBS)
        both = sum(sizes[:2])
        rows = (x[:both] @ weight.t())[y[:both] != -100]
        share = 2 * int((labels != -100).sum()) / len(rows)
    else:
        loss = ak.anl_ce(mine, labels, backend=backend, **KNOBS)
        rows, share = mine[labels != -100], 1.0
    expected = share * oracle.loss(mine, labels, ANL_CE) + 2.0 * oracle.batch_entropy(rows)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.thorough
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo")
@pytest.mark.unpoisoned
def test_entropy_over_three_processes(tmp_path):
    """gloo on the CPU: DDP, splits of any size, a subgroup; both backends."""
    names = [name for name in ("reference", "cpu") if name in {b.name for b in ak.backends() if b.available}]
    mp.start_processes(check_worker, args=(3, tmp_path / "rendezvous", names), nprocs=3, start_method="spawn")
