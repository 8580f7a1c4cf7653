"""The fused backends under autograd.

`FusedLoss` runs a sum of built-in terms in eager mode: one kernel call, the gradient made in forward or in backward.
`RowStats` runs any loss, and every loss under torch.func: kernel -> statistics -> f in PyTorch -> partials -> kernel.
`ops` has the same two for torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .entropy import batch_entropy, world_size
from .layout import acc_dtype, is_concrete, new_coefs, new_grad, overwritten
from .stats import VALID, TableStatistics, coefficients, mean_as_sum, reduce_rows, softmax_coefs

ONLY_ONCE = (
    "this loss is differentiated once and in reverse mode, since its gradient comes from a fused kernel: for double "
    'backward and forward mode (jvp) use backend="reference"'
)
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def robust_loss(kernels, logits: Tensor, target: Tensor, weight: Tensor | None, call) -> Tensor:
    """The loss of a checked call with the backend module `kernels`."""
    if not is_concrete(logits):
        return _transformed(kernels, logits, target, weight, call)
    differentiate = logits.requires_grad and torch.is_grad_enabled()
    if call.inplace and differentiate and logits.is_leaf:
        raise ValueError("inplace=True would overwrite a leaf that requires grad: it is for logits that a layer made")
    if not call.built_in:
        return stats_loss(kernels, logits, target, weight, call)
    if call.batch_group is not None and call.reduction == "mean":
        weight, nothing = mean_as_sum(
            target, weight, call, logits.shape[min(1, logits.dim() - 1)], acc_dtype(logits.dtype)
        )
        return robust_loss(kernels, logits, target, weight, call.variant(reduction="sum")) + nothing
    if differentiate or forward_ad._current_level >= 0:
        return _fused_loss(logits, target, weight, call, kernels)
    if call.entropy_weight:
        coefs = new_coefs(logits, target)
        return _with_entropy(kernels, logits, target, weight, call, coefs)[0]
    return kernels.row_loss(call, logits, target, weight, None, None)


def _transformed(kernels, logits, target, weight, call):
    if call.inplace:
        raise ValueError("inplace=True overwrites the logits of an eager call: not under torch.compile or torch.func")
    functorch = torch._C._are_functorch_transforms_active()
    if functorch and torch.compiler.is_compiling():  # an operator has no rules for torch.func
        from .backends import reference

        if call.backend not in ("auto", "reference"):
            raise RuntimeError(f"backend={call.backend!r} does not run torch.func transforms under torch.compile")
        return reference.robust_loss(logits, target, weight, call)
    if functorch:
        return stats_loss(kernels, logits, target, weight, call)
    from . import ops

    return ops.robust_loss(kernels, logits, target, weight, call)


class FusedLoss(Function):
    @staticmethod
    def forward(ctx, logits, target, weight, call, kernels):
        ctx.call, ctx.kernels = call, kernels
        if call.deferred or (call.recompute is None and logits.dtype is torch.float16):
            coefs = new_coefs(logits, target)
            if call.entropy_weight:
                loss, ctx.entropy = _with_entropy(kernels, logits, target, weight, call, coefs)
            else:
                loss, ctx.entropy = kernels.row_loss(call, logits, target, weight, None, coefs), None
            ctx.save_for_backward(logits, target, coefs)
            ctx.grad = None
            return loss
        ctx.grad = grad = overwritten(logits) if call.inplace else new_grad(logits)
        loss = kernels.row_loss(call, logits, target, weight, grad, None)
        if call.inplace:
            torch.autograd.graph.increment_version(logits)
            ctx.version = grad._version  # grad is a view of the logits
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad = ctx.grad
        if grad is not None:
            if ctx.call.inplace and grad._version != ctx.version:
                raise RuntimeError(
                    "the logits were written to after the loss, with inplace=True, had put their gradient there"
                )
            keep = _keeps_graph()
            if not keep:  # no reference is left here: autograd may take the memory as the leaf's .grad
                ctx.grad = None
            grad = ctx.kernels.scaled(grad, grad_output, keep)
        else:
            logits, target, coefs = ctx.saved_tensors
            entropy = ctx.entropy
            if entropy is not None:
                entropy = (entropy[0], entropy[1] * grad_output)
            grad = ctx.kernels.row_grad(ctx.call, logits.detach(), target, coefs, grad_output, entropy)
        return once(grad), None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(ONLY_ONCE)


def once(grad: Tensor) -> Tensor:
    """`grad`, which to differentiate is an error."""
    if torch.is_grad_enabled():
        grad = torch._C._functions.DelayedError(ONLY_ONCE.encode(), 1)(grad.detach().requires_grad_())
    return grad


# Function.apply does nothing but look for functorch transforms before this; small calls notice it.
_fused_loss = super(Function, FusedLoss).apply


def _with_entropy(kernels, logits, target, weight, call, coefs):
    """The loss with the batch entropy term, and what the term's gradient needs: (log_q, scale)."""
    loss = kernels.row_loss(call, logits, target, weight, None, coefs)
    rows = (coefs[1] != 0.0).sum(dtype=torch.float64)  # of an ignored row the kernels write 0 there
    entropy, log_q, rows = batch_entropy(kernels.column_sums(logits, coefs), rows, call)
    loss += call.entropy_weight * entropy
    return loss, (log_q, call.entropy_weight * world_size(call.batch_group) / rows)


def stats_loss(kernels, logits: Tensor, target: Tensor, weight: Tensor | None, call) -> Tensor:
    table, sums = RowStats.apply(logits, target, call, kernels)
    return loss_of_table(table, sums, target, weight, call, acc_dtype(logits.dtype))


def loss_of_table(table, sums, target, weight, call, dtype, classes=None) -> Tensor:
    """f of the statistics, reduced, with the entropy term; differentiable by `table` and `sums`.

    classes: how many there are, where `sums` are those of a slice of them.
    """
    s = TableStatistics(table, call.min_prob, call.gamma, call.needs)
    valid = table[VALID].detach() != 0.0
    label = torch.where(valid, target.long(), 0)
    loss = reduce_rows(call.expression.value(s), label, valid, weight, call)
    if call.entropy_weight:
        loss = loss + call.entropy_weight * batch_entropy(sums, valid.sum(), call, classes)[0]
    return loss.to(dtype)


class RowStats(Function):
    """(logits, target) -> the statistics' table (13, *target.shape) and, for the entropy, the column sums of p (K,)."""

    @staticmethod
    def forward(logits, target, call, kernels):
        table = kernels.row_stats(call, logits, target)
        if not call.entropy_weight:
            return table, table.new_empty(0)
        coefs = torch.stack(softmax_coefs(table)).to(acc_dtype(logits.dtype))
        return table, kernels.column_sums(logits, coefs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, ctx.call, ctx.kernels = inputs
        ctx.save_for_backward(logits, target, output[0])

    @staticmethod
    def backward(ctx, partials, log_q):
        logits, target, table = ctx.saved_tensors
        coefs = coefficients(table, partials, ctx.call, acc_dtype(logits.dtype))
        log_q = log_q if ctx.call.entropy_weight else None
        return RowGrad.apply(logits, target, coefs, log_q, ctx.call, ctx.kernels), None, None, None

    @staticmethod
    def vmap(info, in_dims, logits, target, call, kernels):
        logits, target = _batch_first(info, in_dims, logits, target)
        if call.entropy_weight:  # the sums are over the rows of one element of the batch
            parts = [RowStats.apply(*pair, call, kernels) for pair in zip(logits.unbind(), target.unbind())]
            return tuple(torch.stack(part) for part in zip(*parts)), (0, 0)
        table, sums = RowStats.apply(_fold(logits, logits.dim() > 2), _fold(target, target.dim() > 1), call, kernels)
        return (table.reshape(-1, *target.shape), sums), (1, None)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(ONLY_ONCE)


class RowGrad(Function):
    """The gradient of `RowStats`; differentiating it is an error that names the reference backend."""

    @staticmethod
    def forward(logits, target, coefs, log_q, call, kernels):
        # The gradient of sum_j g_j sum_i p_ij is what the kernels call the entropy's, with log_q = g.
        entropy = None if log_q is None else (log_q, log_q.new_ones(()))
        return kernels.row_grad(call, logits.detach(), target, coefs.contiguous(), None, entropy)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad_output):
        raise RuntimeError(ONLY_ONCE)

    @staticmethod
    def vmap(info, in_dims, logits, target, coefs, log_q, call, kernels):
        logits, target, coefs, log_q = _batch_first(info, in_dims, logits, target, coefs, log_q)
        if log_q is not None:
            parts = zip(logits.unbind(), target.unbind(), coefs.unbind(), log_q.unbind())
            return torch.stack([RowGrad.apply(*part, call, kernels) for part in parts]), 0
        folded = coefs.movedim(0, 1).reshape(coefs.shape[1], *_fold(target, target.dim() > 1).shape)
        grad = RowGrad.apply(
            _fold(logits, logits.dim() > 2), _fold(target, target.dim() > 1), folded, None, call, kernels
        )
        return grad.reshape(logits.shape), 0

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(ONLY_ONCE)


def _batch_first(info, in_dims, *tensors):
    """`tensors` with the vmapped dimension first; those that are not batched, repeated."""
    return [
        None if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims)
    ]


def _fold(batched: Tensor, has_rows: bool) -> Tensor:
    """(B, N, ...) -> (B N, ...): the rows of a batch are rows of one call."""
    return batched.flatten(0, 1) if has_rows else batched
