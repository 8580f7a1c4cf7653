"""What class_group refuses, on every rank and without any of them waiting for another."""

# ruff: noqa: B023  a lambda here is called before the loop goes on
import helpers
import torch
from helpers import EXPRESSIONS, expression, row_loss_expression
from ranks import CLASSES, SIZES, raises

import anl_kernels as ak


def check_one_derivative(ranks):
    """Second derivatives, forward mode and batched gradients: an error on every rank before any of them talks."""
    group, sizes = ranks.groups[4], SIZES[4][1]
    values, target = helpers.batch(CLASSES, torch.float64)
    mine = values.split(sizes, 1)[ranks.rank].clone().requires_grad_()
    g = helpers.generator(1)
    hidden = torch.randn(24, 8, generator=g).double().requires_grad_()
    weight = torch.randn(CLASSES, 8, generator=g).double().split(sizes)[ranks.rank].clone().requires_grad_()
    losses = (expression(EXPRESSIONS["anl_fl"]), row_loss_expression(EXPRESSIONS["anl_fl"]))
    for keywords in (dict(), dict(reduction="none"), dict(entropy_weight=0.4), dict(backend="reference")):
        calls = [(lambda z: ak.robust_loss(z, target, losses[0], class_group=group, **keywords), mine)]
        for limit in (None, 640):
            for loss in losses:
                options = dict(class_group=group, max_chunk_bytes=limit, **keywords)
                calls.append((lambda w: ak.linear_robust_loss(hidden, w, target, loss, **options), weight))
        for f, leaf in calls:
            total = lambda z: f(z).sum()
            raises(RuntimeError, "once", lambda: torch.autograd.grad(total(leaf), leaf, create_graph=True))
            raises(RuntimeError, "once", lambda: torch.autograd.functional.hvp(total, leaf, torch.ones_like(leaf)))
            seeds = torch.ones(2).double()
            raises(RuntimeError, "once", lambda: torch.autograd.grad(total(leaf), leaf, seeds, is_grads_batched=True))
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(leaf.detach(), torch.ones_like(leaf))
                raises(RuntimeError, "once", lambda: f(dual))
            raises(RuntimeError, "eager", lambda: torch.func.grad(total)(leaf.detach()))
    assert call_works(group)


def call_works(group):
    return ak.nce(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), class_group=group).isfinite()


def check_disagreement(ranks):
    group, odd = ranks.groups[4], ranks.rank == 2
    values, target = torch.randn(6, 5), torch.arange(6)
    loss, hidden, weight = ak.NNCE(), torch.randn(6, 3), torch.randn(5, 3)
    call = lambda z=values, y=target, e=loss, **k: ak.robust_loss(z, y, e, class_group=group, **k)
    head = lambda x=hidden, w=weight, y=target, **k: ak.linear_robust_loss(x, w, y, loss, class_group=group, **k)
    rows = 5 if odd else 6
    raises(ValueError, "number of rows", lambda: call(values[:rows], target[:rows]))
    raises(ValueError, "number of rows", lambda: head(hidden[:rows], y=target[:rows]))
    raises(ValueError, "dtype", lambda: call(values.double() if odd else values))
    shape = (2, 5, 3) if odd else (3, 5, 2)
    raises(ValueError, "shape", lambda: call(torch.randn(shape), torch.zeros(shape[0], shape[2], dtype=torch.long)))
    raises(ValueError, "targets", lambda: call(y=target.flip(0) if odd else target))
    for another in (ak.NCE(), 2 * loss, ak.NNFL(), ak.RowLoss(lambda s: s.above_sum)):
        raises(ValueError, "loss", lambda: call(e=another if odd else loss))
    for keywords in (dict(reduction="sum"), dict(ignore_index=-1), dict(entropy_weight=0.5)):
        raises(ValueError, "keyword", lambda: call(**keywords if odd else {}))
    raises(ValueError, "keyword", lambda: call(min_prob=1e-6 if odd else 1e-7))
    raises(ValueError, "gradient", lambda: call(values.clone().requires_grad_(odd)))
    raises(ValueError, "gradient", lambda: head(w=weight.clone().requires_grad_(odd)))
    raises(ValueError, "keyword", lambda: call(batch_group=group if odd else None))
    raises(ValueError, "keyword", lambda: head(max_chunk_bytes=100 if odd else 200))
    raises(ValueError, "keyword", lambda: head(hidden[:, :2], weight[:, :2]) if odd else head())
    raises(ValueError, "class weights", lambda: call(weight=torch.ones(20) if odd else None))
    # One rank's own mistake is its own error there, and ends the call on the others.
    other = lambda error, words: (error, words) if odd else (RuntimeError, "rank 2")
    raises(*other(ValueError, "target must have"), lambda: call(y=target[:5] if odd else target))
    raises(*other(TypeError, "class indices"), lambda: call(y=target.float() if odd else target))
    raises(*other(ValueError, "input must be"), lambda: head(w=weight[:, :2] if odd else weight))
    raises(*other(ValueError, "overwrite a leaf"), lambda: call(values.clone().requires_grad_(), inplace=odd))
    raises(*other(TypeError, "logits must be a tensor"), lambda: call([1.0] if odd else values))
    raises(*other(TypeError, "weight must be a tensor"), lambda: call(weight=[1.0] if odd else None))
    raises(*other(TypeError, "weight must be a tensor"), lambda: head(w=None if odd else weight))
    raises(*other(TypeError, "max_chunk_bytes"), lambda: head(max_chunk_bytes=0.5 if odd else None))
    # And what is wrong on all of them.
    raises(IndexError, "out of bounds", lambda: call(y=target + 15))
    raises(IndexError, "out of bounds", lambda: head(y=target + 15))
    raises(ValueError, "2 classes", lambda: call(values[:, : ranks.rank == 0], torch.zeros_like(target)))
    raises(ValueError, "min_prob", lambda: call(min_prob=0.06))
    raises(ValueError, "must hold one number", lambda: call(weight=torch.ones(7)))
    assert call().isfinite()  # the group still works
    if ranks.rank != 3:
        return
    raises(ValueError, "process group", lambda: ak.nce(values, target, class_group=ranks.groups[2]))
