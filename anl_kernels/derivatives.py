"""Second derivatives and forward mode, by the reference formulas. First derivatives are the kernels' alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .layout import is_compiling, is_transformed, log_once

ONLY_ONCE = (
    "this loss made its gradient in forward and keeps no logits, so that the gradient cannot be differentiated again "
    '(create_graph=True, a gradient penalty, hvp, MAML): use recompute=True, or backend="reference"'
)
BATCHED_ONCE = (
    "is_grads_batched=True and create_graph=True together are not for this loss: leave one out, or use "
    'backend="reference"'
)
_SLOWER = (
    "anl_kernels: second derivatives and forward mode go by the reference formulas, which keep tens of bytes per "
    "logit; first derivatives stay with the kernels"
)


def is_dual(*tensors: Tensor | None) -> bool:
    """Whether forward mode is on for one of `tensors`."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def by_formulas(*tensors: Tensor | None) -> bool:
    """Whether a call must be made of formulas: it is differentiated in forward mode, or twice by torch.func."""
    if is_dual(*tensors):
        log_once(_SLOWER)
        return True
    if is_transformed():
        kinds = [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack()]
        transform = torch._C._functorch.TransformType
        if transform.Jvp in kinds or kinds.count(transform.Grad) > 1:
            log_once(_SLOWER)
            return True
    return False


def differentiable(gradients, formulas, inputs, cotangents):
    """`gradients` of `inputs`, which kernels made: where autograd differentiates them, `formulas` are differentiated.

    gradients: one tensor for each input: the vector-Jacobian product of formulas(*inputs) and `cotangents`, a tensor
        for each output.
    """
    return _gradient(formulas, len(inputs), tuple(gradients), *inputs, *cotangents)


class Gradient(Function):
    """Hands on gradients that are made already; its own backward pass is that of the formulas' gradient."""

    @staticmethod
    def forward(ctx, formulas, num_inputs, gradients, *tensors):
        ctx.formulas, ctx.num_inputs = formulas, num_inputs
        ctx.save_for_backward(*tensors)
        return gradients

    @staticmethod
    def backward(ctx, *grads):
        tensors, n = ctx.saved_tensors, ctx.num_inputs
        return None, None, None, *second_vjp(ctx.formulas, tensors[:n], tensors[n:], grads)


# Function.apply would ask for torch.func's rules where a transform is active; no tensor given here is wrapped by one.
_gradient = super(Function, Gradient).apply


def second_vjp(formulas, inputs, cotangents, grads):
    """The gradients by `inputs` and `cotangents` of the vector-Jacobian product of `formulas`; differentiable again."""
    log_once(_SLOWER)

    def first(inputs, cotangents):
        outputs, pullback = torch.func.vjp(formulas, *inputs)
        return pullback(cotangents if isinstance(outputs, tuple) else cotangents[0])

    _, pullback = torch.func.vjp(first, tuple(inputs), tuple(cotangents))
    by_inputs, by_cotangents = pullback(tuple(grads))
    return *by_inputs, *by_cotangents


def times(gradient: Tensor, grad_output: Tensor, class_dim: int) -> Tensor:
    """A gradient made for grad_output = 1, times grad_output, a number or one per row, by PyTorch's operators."""
    if grad_output.dim():
        grad_output = grad_output.unsqueeze(class_dim)
    return (gradient * grad_output).to(gradient.dtype)


def is_usual(grad: Tensor) -> bool:
    """Whether a kernel can read what autograd hands to a backward pass: no batched gradient, no subclass."""
    return type(grad) is Tensor and not (
        is_compiling() or is_transformed() or is_batched(grad) or grad.is_neg() or grad._is_zerotensor()
    )


is_batched = torch._C._functorch.is_legacy_batchedtensor  # by is_grads_batched=True
