"""What the compiled modules (csrc/) share: their codes for dtypes, and how tensors become pointers."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..layout import acc_dtype, as_rows, new_grad, overwritten, shape_and_strides

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


def cannot_run(logits: Tensor, call, device_type: str) -> str | None:
    if logits.device.type != device_type:
        return f"the logits are on {logits.device}"
    return None


def row_grad(kernel, call, logits, target, coefs, grad_output, entropy, last) -> Tensor:
    """reference.row_grad by a module's `kernel`, whose last argument is `last`."""
    acc = acc_dtype(logits.dtype)
    rows, shape, strides = as_rows(logits)
    grad = overwritten(logits) if call.inplace else new_grad(logits)
    target = target.contiguous()
    if grad_output is None:
        grad_output = logits.new_ones((), dtype=acc)
    step = 1
    if not any(grad_output.stride()):  # a number, or a number expanded to the rows
        step = 0
    elif not grad_output.is_contiguous():
        grad_output = grad_output.contiguous()
    log_q, scale = (None, None) if entropy is None else (part.to(acc).contiguous() for part in entropy)
    kernel(
        DTYPES[logits.dtype], shape, rows.data_ptr(), strides, grad.data_ptr(), shape_and_strides(grad)[1],
        target.data_ptr(), TARGETS[target.dtype], call.min_prob, call.gamma or 0.0, call.needs, coefs.data_ptr(),
        grad_output.data_ptr(), step, 0 if log_q is None else log_q.data_ptr(),
        0 if scale is None else scale.data_ptr(), last,
    )  # fmt: skip
    if call.inplace:
        torch.autograd.graph.increment_version(logits)
    return grad
