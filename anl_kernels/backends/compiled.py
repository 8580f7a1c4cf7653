"""What the compiled modules (csrc/) share: their codes for dtypes, and how tensors become pointers."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..call import Call
from ..layout import acc_dtype, as_rows, new_grad, overwritten, shape_and_strides, with_step

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
TARGETS = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.uint8: 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def load(name: str, hint: str):
    """The module anl_kernels.<name>, or None, and why not. hint: why it may not have been built."""
    try:
        return importlib.import_module(f"anl_kernels.{name}"), None
    except ModuleNotFoundError:
        return None, f"the compiled module anl_kernels.{name} was not built ({hint})"
    except ImportError as error:
        return None, f"the compiled module anl_kernels.{name} does not load: {error}"


def address(tensor: Tensor | None, name: str) -> int:
    """Where `tensor` lies; 0, "not given" to a kernel, for None. TypeError for a tensor that holds no memory."""
    if tensor is None:
        return 0
    return tensor.data_ptr() or _no_memory(tensor, name)


def _no_memory(tensor: Tensor, name: str) -> int:
    if tensor.numel() == 0:
        return 0
    kind = "ZeroTensor" if tensor._is_zerotensor() else type(tensor).__name__
    raise TypeError(
        f"{name} is a {kind} without memory of its own, and the compiled kernels need plain tensors: pass what it "
        'stands for (its local tensor, or its values), or backend="reference"'
    )


def of_logits(rows: Tensor, shape, strides) -> tuple:
    """A kernel's arguments for logits that `as_rows` has seen; the caller keeps the tensor alive."""
    return DTYPES[rows.dtype], shape, address(rows, "logits"), strides


def of_target(target: Tensor) -> tuple[int, int]:
    return address(target, "target"), TARGETS[target.dtype]


def row_grad(
    kernel, call: Call, logits: Tensor, target: Tensor, coefs: Tensor, grad_output: Tensor | None, entropy, last
) -> Tensor:
    """`Backend.row_grad` by a module's `kernel`, whose last argument is `last`."""
    acc = acc_dtype(logits.dtype)
    rows, shape, strides = as_rows(logits)
    grad = overwritten(logits) if call.inplace else new_grad(logits)
    target = target.contiguous()
    grad_output, step = with_step(logits.new_ones((), dtype=acc) if grad_output is None else grad_output)
    log_q, scale = (None, None) if entropy is None else (part.to(acc).contiguous() for part in entropy)
    kernel(
        *of_logits(rows, shape, strides),
        address(grad, "the gradient"),
        shape_and_strides(grad)[1],
        *of_target(target),
        call.min_prob,
        call.gamma or 0.0,
        call.needs,
        address(coefs, "coefs"),
        address(grad_output, "grad_output"),
        step,
        address(log_q, "log_q"),
        address(scale, "the entropy's scale"),
        last,
    )
    if call.inplace:
        torch.autograd.graph.increment_version(logits)
    return grad
