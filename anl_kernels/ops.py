"""The kernels as torch.library operators, for what must not look at memory: torch.compile, fake tensors, tracing.

Each operator takes numbers, not objects, so that a graph that holds one can be stored. The gradient is made in
backward, with grad_output folded in: one made in forward would cost another read and write to scale it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.library import custom_op

from . import registry
from .backends import FusedBackend
from .call import Call, KernelTerm
from .layout import acc_dtype, new_coefs, new_grad, resolved
from .reduction import loss_of_table
from .row_math import NUM_COEFS, NUM_STATS, coefficients, softmax_coefs


@functools.lru_cache(maxsize=256)
def _call(terms, min_prob, gamma, needs, ignore_index=-100, reduction="none", explicit_backend="auto") -> Call:
    """The call that an operator's numbers stand for. explicit_backend: "auto" where the caller named none."""
    flat = iter(terms)
    terms = tuple(KernelTerm(int(kind), *numbers) for kind, *numbers in zip(flat, flat, flat, flat))
    return Call(
        terms=terms,
        min_prob=min_prob,
        gamma=gamma,
        needs=needs,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=explicit_backend,
    )


@custom_op("anl_kernels::row_loss", mutates_args=())
def row_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    terms: list[float],
    min_prob: float,
    gamma: float,
    needs: int,
    ignore_index: int,
    reduction: str,
    backend: str,
    explicit: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of a sum of built-in terms (kind, factor, p0, p1, ...), and the coefficients that row_grad takes.

    explicit: the caller named the backend.
    """
    fused = registry.fused(backend, explicit)
    call = _call(tuple(terms), min_prob, gamma, needs, ignore_index, reduction, backend if explicit else "auto")
    logits, weight = resolved(logits), resolved(weight)
    coefs = new_coefs(logits, target)
    return fused.row_loss(call, logits, target, weight, None, coefs), coefs


@row_loss.register_fake
def _(logits, target, weight, terms, min_prob, gamma, needs, ignore_index, reduction, backend, explicit):
    dtype = acc_dtype(logits.dtype)
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty((NUM_COEFS, *target.shape), dtype=dtype)


@custom_op("anl_kernels::row_stats", mutates_args=())
def row_stats(
    logits: Tensor,
    target: Tensor,
    min_prob: float,
    gamma: float,
    needs: int,
    ignore_index: int,
    with_sums: bool,
    backend: str,
    explicit: bool,
) -> tuple[Tensor, Tensor]:
    """The statistics' table and the column sums of p (K,), or (0,) if not wanted."""
    fused = registry.fused(backend, explicit)
    call = _call((), min_prob, gamma, needs, ignore_index, "none", backend if explicit else "auto")
    logits = resolved(logits)
    table = fused.row_stats(call, logits, target)
    if not with_sums:
        return table, table.new_empty(0)
    coefs = torch.stack(softmax_coefs(table)).to(acc_dtype(logits.dtype))
    return table, fused.column_sums(logits, coefs)


@row_stats.register_fake
def _(logits, target, min_prob, gamma, needs, ignore_index, with_sums, backend, explicit):
    table = logits.new_empty((NUM_STATS, *target.shape), dtype=torch.float64)
    classes = logits.shape[1 if logits.dim() > 1 else 0]
    return table, table.new_empty(classes if with_sums else 0)


@custom_op("anl_kernels::row_grad", mutates_args=())
def row_grad(
    logits: Tensor,
    target: Tensor,
    coefs: Tensor,
    grad_output: Tensor | None,
    column_grad: Tensor | None,
    min_prob: float,
    gamma: float,
    needs: int,
    backend: str,
) -> Tensor:
    """The gradient by the logits, from row_loss's coefs; column_grad: the gradient by row_stats' column sums."""
    fused = registry.fused(backend, explicit=True)
    entropy = None if column_grad is None else (column_grad, column_grad.new_ones(()))
    call = _call((), min_prob, gamma, needs)
    return fused.row_grad(call, resolved(logits), target, coefs.contiguous(), resolved(grad_output), entropy)


@row_grad.register_fake
def _(logits, target, coefs, grad_output, column_grad, min_prob, gamma, needs, backend):
    return new_grad(logits)


def _only_once(ctx, *grads):
    raise RuntimeError(
        "under torch.compile, and for tensor subclasses, this loss is differentiated once and in reverse mode: for "
        'double backward use backend="reference", or plain tensors in eager mode'
    )


def _save_loss(ctx, inputs, output):
    logits, target, _, _, *ctx.numbers, _, _, ctx.backend, _ = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _grad_of_loss(ctx, grad_loss, _):
    grad = row_grad(*ctx.saved_tensors, grad_loss, None, *ctx.numbers, ctx.backend)
    return grad, *[None] * 10


def _save_stats(ctx, inputs, output):
    logits, target, *ctx.numbers, _, ctx.with_sums, ctx.backend, _ = inputs
    ctx.save_for_backward(logits, target, output[0])


def _grad_of_stats(ctx, partials, column_grad):
    logits, target, table = ctx.saved_tensors
    min_prob, gamma, needs = ctx.numbers
    call = Call(min_prob=min_prob, gamma=gamma, needs=needs)
    coefs = coefficients(table, partials, call, acc_dtype(logits.dtype))
    column_grad = column_grad if ctx.with_sums else None
    return row_grad(logits, target, coefs, None, column_grad, *ctx.numbers, ctx.backend), *[None] * 8


row_loss.register_autograd(_grad_of_loss, setup_context=_save_loss)
row_stats.register_autograd(_grad_of_stats, setup_context=_save_stats)
row_grad.register_autograd(_only_once)


def traced_loss(backend: FusedBackend, logits: Tensor, target: Tensor, weight: Tensor | None, call: Call) -> Tensor:
    """`autograd.fused_loss` through the operators."""
    gamma = 0.0 if call.gamma is None else call.gamma
    shared_mean = call.batch_group is not None and call.reduction == "mean"
    if call.built_in and not call.entropy_weight and not shared_mean:
        terms = [float(number) for term in call.terms for number in term]
        numbers = (call.min_prob, gamma, call.needs, call.ignore_index, call.reduction, backend.NAME, call.explicit)
        return row_loss(logits, target, weight, terms, *numbers)[0]
    with_sums = call.entropy_weight != 0.0
    numbers = (call.min_prob, gamma, call.needs, call.ignore_index, with_sums, backend.NAME, call.explicit)
    table, sums = row_stats(logits, target, *numbers)
    return loss_of_table(table, sums, target, weight, call, acc_dtype(logits.dtype))
