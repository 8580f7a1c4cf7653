"""The fused backends under autograd.

`FusedLoss` runs a sum of built-in terms in eager mode: one kernel call, the gradient made in forward or in backward.
`RowStats` runs any loss, and every loss under torch.func: kernel -> statistics -> f in PyTorch -> partials -> kernel.
`ops` has the same two for torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import ops
from .backends import Backend, FusedBackend, reference
from .call import Call
from .derivatives import (
    BATCHED_ONCE,
    ONLY_ONCE,
    by_formulas,
    differentiable,
    is_batched,
    is_usual,
    second_vjp,
    times,
)
from .layout import (
    acc_dtype,
    is_compiling,
    is_concrete,
    is_transformed,
    new_coefs,
    new_grad,
    overwritten,
    refuse_leaf,
    resolved,
)
from .reduction import batch_entropy, loss_of_table, mean_as_sum, world_size
from .row_math import CoefField, coefficients, softmax_coefs

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def fused_loss(backend: FusedBackend, logits: Tensor, target: Tensor, weight: Tensor | None, call: Call) -> Tensor:
    """The loss of a checked call, by kernels wherever they can."""
    if not is_concrete(logits, target, weight):
        return _transformed(backend, logits, target, weight, call)
    if forward_ad._current_level >= 0 and by_formulas(logits):
        return reference.loss_by_formulas(logits, target, weight, call)
    differentiate = logits.requires_grad and torch.is_grad_enabled()
    if call.inplace and differentiate:
        refuse_leaf(logits)
    if not call.built_in:
        return loss_by_statistics(backend, logits, target, weight, call)
    if call.batch_group is not None and call.reduction == "mean":
        weight, nan_if_empty = mean_as_sum(
            target, weight, call, logits.shape[min(1, logits.dim() - 1)], acc_dtype(logits.dtype)
        )
        return fused_loss(backend, logits, target, weight, call.variant(reduction="sum")) + nan_if_empty
    if differentiate:
        return _apply_fused(logits, target, weight, call, backend)
    if call.entropy_weight:
        coefs = new_coefs(logits, target)
        return _with_entropy(backend, logits, target, weight, call, coefs)[0]
    return backend.row_loss(call, logits, target, weight, None, None)


def _transformed(backend: FusedBackend, logits, target, weight, call: Call) -> Tensor:
    if call.inplace:
        raise ValueError(
            "inplace=True overwrites the memory of plain tensors in an eager call: not under torch.compile, torch.func "
            "or a TorchDispatchMode, and not of a tensor subclass"
        )
    functorch = is_transformed()
    if functorch and is_compiling():  # an operator has no rules for torch.func
        if call.backend not in ("auto", "reference"):
            raise RuntimeError(f"backend={call.backend!r} does not run torch.func transforms under torch.compile")
        return reference.loss_by_formulas(logits, target, weight, call)
    if functorch:
        if by_formulas(logits):
            return reference.loss_by_formulas(logits, target, weight, call)
        return loss_by_statistics(backend, logits, target, weight, call)
    return ops.traced_loss(backend, logits, target, weight, call)


class FusedLoss(Function):
    @staticmethod
    def forward(ctx, logits, target, weight, call, backend):
        ctx.call, ctx.backend = call, backend
        ctx.made = not (call.deferred or (call.recompute is None and logits.dtype is torch.float16))
        if ctx.made:
            grad = overwritten(logits) if call.inplace else new_grad(logits)
            loss = backend.row_loss(call, logits, target, weight, grad, None)
            if call.inplace:
                _mark_overwritten(logits)
            ctx.save_for_backward(grad)
            return loss
        coefs = new_coefs(logits, target)
        if call.entropy_weight:
            loss, entropy = _with_entropy(backend, logits, target, weight, call, coefs)
        else:
            loss, entropy = backend.row_loss(call, logits, target, weight, None, coefs), ()
        ctx.save_for_backward(logits, target, weight, coefs, *entropy)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        usual = is_usual(grad_output)
        if ctx.made:
            if torch.is_grad_enabled():  # the backward pass is itself to be differentiated
                raise RuntimeError(ONLY_ONCE)
            (grad,) = ctx.saved_tensors
            # Unless the graph is kept, autograd may take the memory as the leaf's .grad.
            grad = ctx.backend.scaled(grad, grad_output, _keeps_graph()) if usual else times(grad, grad_output, 1)
            return grad, None, None, None, None
        logits, target, weight, coefs, *entropy = ctx.saved_tensors
        again, call = torch.is_grad_enabled(), ctx.call
        if again and call.inplace:  # the formulas will want the logits
            call = call.variant(inplace=False)
        seed = grad_output if usual else coefs.new_ones(target.shape if call.reduction == "none" else ())
        entropy = (entropy[0], entropy[1] * seed.detach()) if entropy else None
        grad = row_grad(ctx.backend, call, logits.detach(), target, coefs, seed.detach(), entropy)
        if again:
            formulas = lambda z: reference.loss_by_formulas(z, target, weight, call)
            (grad,) = differentiable([grad], formulas, [logits], [seed])
        return grad if usual else times(grad, grad_output, 1), None, None, None, None


# Function.apply does nothing but look for functorch transforms before this; small calls notice it.
_apply_fused = super(Function, FusedLoss).apply


def row_grad(backend: Backend, call: Call, logits, target, coefs, grad_output, entropy) -> Tensor:
    """The backend's row_grad, or its operator where compiled autograd traces a backward pass."""
    if not is_compiling():
        return backend.row_grad(call, logits, target, coefs, grad_output, entropy)
    column_grad = None if entropy is None else entropy[0] * entropy[1]
    numbers = (call.min_prob, call.gamma or 0.0, call.needs, backend.NAME)
    return ops.row_grad(logits, target, coefs, grad_output, column_grad, *numbers)


def _mark_overwritten(logits: Tensor) -> None:
    """Autograd's record that the logits are gone: what has saved them, and what uses them from now on, raises."""
    try:
        with torch.enable_grad():
            _Overwritten.apply(logits)
    except RuntimeError:  # outputs of split, chunk, unbind and of some Functions cannot be marked
        pass
    torch.autograd.graph.increment_version(logits)


class _Overwritten(Function):
    """Stands in the graph for logits whose memory holds their gradient: what flows back to them is an error."""

    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx, grad_output):
        if not grad_output.any():  # what was used is another part of the tensor that these logits are a slice of
            return grad_output
        raise RuntimeError(
            "logits were used after a loss with inplace=True had put their gradient into their memory: leave inplace "
            "out, or compute what needs the logits before the loss, or from a clone"
        )


def _with_entropy(backend: FusedBackend, logits, target, weight, call: Call, coefs):
    """The loss with the batch entropy term, and what the term's gradient needs: (log_q, scale)."""
    loss = backend.row_loss(call, logits, target, weight, None, coefs)
    rows = (coefs[CoefField.INV_SUM] != 0.0).sum(dtype=torch.float64)  # 0 for an ignored row
    entropy, log_q, rows = batch_entropy(backend.column_sums(logits, coefs), rows, call)
    loss += call.entropy_weight * entropy
    return loss, (log_q, call.entropy_weight * world_size(call.batch_group) / rows)


def loss_by_statistics(
    backend: FusedBackend, logits: Tensor, target: Tensor, weight: Tensor | None, call: Call
) -> Tensor:
    table, sums = RowStats.apply(logits, target, call, backend)
    return loss_of_table(table, sums, target, weight, call, acc_dtype(logits.dtype))


class RowStats(Function):
    """(logits, target) -> the statistics' table and, for the entropy, the column sums of p (K,)."""

    @staticmethod
    def forward(logits, target, call, backend):
        table = backend.row_stats(call, logits, target)
        if not call.entropy_weight:
            return table, table.new_empty(0)
        coefs = torch.stack(softmax_coefs(table)).to(acc_dtype(logits.dtype))
        return table, backend.column_sums(logits, coefs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, ctx.call, ctx.backend = inputs
        ctx.save_for_backward(logits, target, output[0])

    @staticmethod
    def backward(ctx, partials, log_q):
        logits, target, table = ctx.saved_tensors
        call = ctx.call.variant(inplace=False) if ctx.call.inplace and torch.is_grad_enabled() else ctx.call
        log_q = log_q if call.entropy_weight else None
        if is_compiling():
            return RowGrad.forward(logits, target, table, partials, log_q, call, ctx.backend), None, None, None
        partials = resolved(partials)
        if is_batched(partials) or type(partials) is not Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError(BATCHED_ONCE)
            coefs = coefficients(table, partials, call, acc_dtype(logits.dtype))
            return reference.gradient(call, logits, target, coefs, log_q), None, None, None
        grad = RowGrad.apply(logits, target, table.detach(), partials, log_q, call, ctx.backend)
        return grad, None, None, None

    @staticmethod
    def vmap(info, in_dims, logits, target, call, backend):
        logits, target = _batch_first(info, in_dims, logits, target)
        if call.entropy_weight:  # the sums are over the rows of one element of the batch
            parts = [RowStats.apply(*pair, call, backend) for pair in zip(logits.unbind(), target.unbind())]
            return tuple(torch.stack(part) for part in zip(*parts)), (0, 0)
        table, sums = RowStats.apply(_fold(logits, logits.dim() > 2), _fold(target, target.dim() > 1), call, backend)
        return (table.reshape(-1, *target.shape), sums), (1, None)


class RowGrad(Function):
    """The gradient of `RowStats` from those by its table and sums; the formulas are what autograd differentiates."""

    @staticmethod
    def forward(logits, target, table, partials, log_q, call, backend):
        coefs = coefficients(table, partials, call, acc_dtype(logits.dtype)).contiguous()
        # The gradient of sum_j g_j sum_i p_ij is what the kernels call the entropy's, with log_q = g.
        entropy = None if log_q is None else (log_q, log_q.new_ones(()))
        return row_grad(backend, call, logits.detach(), target, coefs, None, entropy)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, _, partials, log_q, ctx.call, _ = inputs
        ctx.save_for_backward(logits, target, partials, log_q)

    @staticmethod
    def backward(ctx, grad_output):
        logits, target, partials, log_q = ctx.saved_tensors
        formulas = lambda z: reference.stats_by_formulas(z, target, ctx.call)
        cotangents = [partials] if log_q is None else [partials, log_q]
        by_logits, by_partials, *by_log_q = second_vjp(formulas, [logits], cotangents, [grad_output])
        return by_logits, None, None, by_partials, *(by_log_q or [None]), None, None

    @staticmethod
    def vmap(info, in_dims, logits, target, table, partials, log_q, call, backend):
        batched = _batch_first(info, in_dims, logits, target, table, partials, log_q)
        if log_q is not None:
            parts = zip(*(part.unbind() for part in batched))
            return torch.stack([RowGrad.apply(*part, call, backend) for part in parts]), 0
        logits, target, table, partials, _ = batched
        rows = _fold(target, target.dim() > 1)
        table, partials = (x.movedim(0, 1).reshape(x.shape[1], *rows.shape) for x in (table, partials))
        grad = RowGrad.apply(_fold(logits, logits.dim() > 2), rows, table, partials, None, call, backend)
        return grad.reshape(logits.shape), 0


def _batch_first(info, in_dims, *tensors):
    """`tensors` with the vmapped dimension first; those that are not batched, repeated."""
    return [
        None if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims)
    ]


def _fold(batched: Tensor, has_rows: bool) -> Tensor:
    """(B, N, ...) -> (B N, ...): the rows of a batch are rows of one call."""
    return batched.flatten(0, 1) if has_rows else batched
