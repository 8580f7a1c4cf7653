"""A linear head's loss under autograd.

`InForward` makes the gradient in forward, with three products in all. `RowTable` keeps the rows' statistics alone and
makes the logits again in backward: four products, and any loss; by tiles of classes, if a few whole rows would not fit
into a chunk, or with classes split over processes, five where a loss needs the second sweep.

Second derivatives and forward mode go by the reference formulas, of all the logits.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..autograd import _keeps_graph, loss_of_table
from ..backends import reference
from ..derivatives import BATCHED_ONCE, differentiable, is_usual, times
from ..layout import acc_dtype, resolved
from ..reduction import mean_as_sum
from ..row_math import NUM_STATS, coefficients, softmax_coefs
from ..sharding import slices
from ..sharding.class_group import check_once, mean_over_classes, row_table
from .chunks import Job, Matrices, Products, WantsGrad


def head(matrices: Matrices, labels: Tensor, class_weight: Tensor | None, job: Job) -> Tensor:
    """The loss, reduced, of rows of which none is ignored (on a CPU)."""
    call, acc = job.call, acc_dtype(job.dtype)
    differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in matrices)
    if not _in_forward(job, differentiate):
        table, sums = RowTable.apply(*matrices, labels, job)
        return loss_of_table(table, sums, labels, class_weight, call, acc, job.shard.classes)
    if call.reduction != "mean":
        return InForward.apply(*matrices, labels, class_weight, job)
    class_weight, nan_if_empty = mean_as_sum(labels, class_weight, call, job.shard.classes, acc)
    job = job._replace(call=call.variant(reduction="sum"))
    return InForward.apply(*matrices, labels, class_weight, job) + nan_if_empty


def _in_forward(job: Job, differentiate: bool) -> bool:
    """Whether one sweep over the chunks makes the loss and, if wanted, its gradient."""
    call = job.call
    if not call.built_in or call.entropy_weight or job.shard.group is not None or job.in_tiles:
        return False
    if not differentiate:
        return True
    at_once = call.recompute is False or (call.recompute is None and job.dtype is not torch.float16)
    return at_once and call.reduction != "none"


def _eagerly(backward):
    """`backward`, left to Python where compiled autograd would trace it: its graph would break at every kernel."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        run_it = torch.compiler.disable(backward) if torch.compiler.is_compiling() else backward
        return run_it(ctx, *grads)

    return run


def _of_matrices(job: Job, matrices: Matrices, wants_grad: WantsGrad, of_logits):
    """(formulas, inputs): `of_logits` of all the logits, as a function of those matrices whose gradient is wanted."""

    def formulas(*inputs):
        given = iter(inputs)
        chosen = [next(given) if wanted else x for x, wanted in zip(matrices, wants_grad)]
        with torch.autocast(matrices.hidden.device.type, enabled=False):
            return of_logits(F.linear(*(None if x is None else x.to(job.dtype) for x in chosen)))

    return formulas, [x for x, wanted in zip(matrices, wants_grad) if wanted]


def _spread(grads, wants_grad: WantsGrad) -> list:
    """The gradients that are wanted, with None in the places of the others."""
    grads = iter(grads)
    return [next(grads) if wanted else None for wanted in wants_grad]


class InForward(Function):
    """The sum of the rows' losses ("none": each of them, without a gradient), the gradients made on the way."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, class_weight, job):
        ctx.job = job
        products = Products(Matrices(hidden, weight, bias), job, WantsGrad(*ctx.needs_input_grad[:3]))
        losses = _losses(products, labels, class_weight)
        grads = [grad for grad in products.finished() if grad is not None]
        ctx.save_for_backward(hidden, weight, bias, labels, class_weight, *grads)  # matrices: for second derivatives
        acc = acc_dtype(job.dtype)
        if job.call.reduction == "none":
            return torch.cat(losses) if losses else hidden.new_empty(0, dtype=acc)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for loss in losses:
            total += loss
        return total.to(acc)

    @staticmethod
    @_eagerly
    def backward(ctx, grad_output):
        hidden, weight, bias, labels, class_weight, *grads = ctx.saved_tensors
        job, wants_grad, usual = ctx.job, WantsGrad(*ctx.needs_input_grad[:3]), is_usual(grad_output)
        again = torch.is_grad_enabled()
        if usual:  # autograd may take the memory as .grad, unless the graph is kept
            keep = again or _keeps_graph()
            grads = [job.backend.scaled(grad, grad_output.detach(), keep) for grad in grads]
        if again:
            of_logits = lambda logits: reference.loss_by_formulas(logits, labels, class_weight, job.call)
            formulas, inputs = _of_matrices(job, Matrices(hidden, weight, bias), wants_grad, of_logits)
            seed = grad_output if usual else torch.ones((), dtype=acc_dtype(job.dtype), device=labels.device)
            grads = differentiable([grad.detach() for grad in grads], formulas, inputs, [seed])
        if not usual:
            grads = [times(grad, grad_output, 1) for grad in grads]
        return *_spread(grads, wants_grad), None, None, None


def _losses(products: Products, labels: Tensor, class_weight: Tensor | None) -> list[Tensor]:
    """Each chunk's loss; its gradient, where one is wanted, goes to `products`."""
    job, differentiate, losses = products.job, any(grad is not None for grad in products.grads), []
    call = job.call.variant(inplace=True) if differentiate else job.call
    with torch.autocast(labels.device.type, enabled=False):
        for rows in products.rows():
            for tile, logits in products.tiles(rows):
                grad = logits if differentiate else None
                losses.append(job.backend.row_loss(call, logits, labels[slice(*rows)], class_weight, grad, None))
                if differentiate:
                    products.add(grad, rows, tile)
    return losses


class RowTable(Function):
    """The rows' table (NUM_STATS, N) and, for the entropy, the column sums of p over this process's classes."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, job):
        call, ctx.job, acc = job.call, job, acc_dtype(job.dtype)
        table = torch.empty((NUM_STATS, len(labels)), dtype=torch.float64, device=hidden.device)
        sums = torch.zeros(len(weight) if call.entropy_weight else 0, dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            products = Products(Matrices(hidden, weight, bias), job)
            for rows in products.rows():
                tiles = products.sweeps(rows)
                some = slice(*rows)
                table[:, some] = _table(job, labels[some], tiles)
                if call.entropy_weight:
                    p_coefs = torch.stack(softmax_coefs(table[:, some])).to(acc)
                    for (begin, end), logits in tiles():
                        if end > begin:
                            sums[begin:end] += job.backend.column_sums(logits, p_coefs)
        ctx.save_for_backward(hidden, weight, bias, labels, table)
        return table, sums

    @staticmethod
    @_eagerly
    def backward(ctx, partials, g):
        *matrices, labels, table = ctx.saved_tensors
        job, wants_grad = ctx.job, WantsGrad(*ctx.needs_input_grad[:3])
        matrices = Matrices(*matrices)
        cotangents = [resolved(partials), resolved(g)] if job.call.entropy_weight else [resolved(partials)]
        if job.shard.group is not None:
            check_once(*cotangents)
        usual, again = all(map(is_usual, cotangents)), torch.is_grad_enabled()
        if again and not usual:
            raise RuntimeError(BATCHED_ONCE)
        make = _gradients if usual else _batched_gradients
        grads = make(job, matrices, labels, table, *cotangents, wants_grad=wants_grad)
        if again:
            of_logits = lambda logits: reference.stats_by_formulas(logits, labels, job.call)
            formulas, inputs = _of_matrices(job, matrices, wants_grad, of_logits)
            made = [grad for grad in grads if grad is not None]
            grads = _spread(differentiable(made, formulas, inputs, cotangents), wants_grad)
        return *grads, None, None


def _gradients(job, matrices, labels, table, partials, g=None, *, wants_grad):
    """The gradients by the matrices, from those by the table and the column sums of p (g), chunk by chunk."""
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        grad_coefs = coefficients(table, partials, job.call, acc_dtype(job.dtype))
        products = Products(matrices, job, wants_grad)
        for rows in products.rows():
            some = slice(*rows)
            for tile, grad in _by_tiles(job, products.sweeps(rows), labels[some], grad_coefs[:, some].contiguous(), g):
                products.add(grad, rows, tile)
        return products.finished()


def _batched_gradients(job, matrices, labels, table, partials, g=None, *, wants_grad):
    """The same for many gradients at once (is_grads_batched), of all the logits: each would be a matrix of its own."""
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        acc = acc_dtype(job.dtype)
        hidden, weight, bias = matrices.computed_in(job.dtype)
        grad_coefs = coefficients(table, partials, job.call, acc)
        grad = reference.gradient(job.call, F.linear(hidden, weight, bias), labels, grad_coefs, g).to(acc)
        makers = (lambda: grad @ weight.to(acc), lambda: grad.transpose(0, 1) @ hidden.to(acc), lambda: grad.sum(0))
        return [make().to(x.dtype) if wanted else None for make, x, wanted in zip(makers, matrices, wants_grad)]


def _table(job: Job, labels: Tensor, tiles) -> Tensor:
    if job.has_whole_rows:
        ((_, logits),) = tiles()
        return job.backend.row_stats(job.call, logits, labels)
    starts = lambda: ((begin, logits) for (begin, _), logits in tiles())
    return row_table(job.backend, job.call, job.shard, labels, starts)


def _by_tiles(job: Job, tiles, labels: Tensor, grad_coefs: Tensor, g: Tensor | None):
    """((begin, end), gradient) of the tiles of some rows, from their coefficients; g: of the column sums of p."""
    call, shard = job.call, job.shard
    inplace = call.variant(inplace=True)
    if job.has_whole_rows:
        ((tile, logits),) = tiles()
        entropy = None if g is None else (g, g.new_ones(()))
        yield tile, job.backend.row_grad(inplace, logits, labels, grad_coefs, None, entropy)
        return
    mean = None
    if g is not None:
        parts = [slices.moments(logits, grad_coefs, g[slice(*tile)]) for tile, logits in tiles()]
        mean = mean_over_classes(slices.added(torch.stack(parts)), shard.group)
    valid = labels != call.ignore_index
    for (begin, end), logits in tiles():
        local = slices.local_labels(labels, valid, shard.start + begin, end - begin)
        if g is None:
            yield (begin, end), slices.grad(job.backend, inplace, logits, local, grad_coefs)
        else:
            yield (begin, end), slices.grad(job.backend, call, logits, local, grad_coefs, (g[begin:end], mean))
