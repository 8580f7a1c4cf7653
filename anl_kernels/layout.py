"""Shapes, strides and dtypes: what a call is given, checked and seen as rows without copies."""

from __future__ import annotations

import logging
import sys

import torch
from torch import Tensor

from .row_math import NUM_COEFS

logger = logging.getLogger("anl_kernels")
_said = set()

LOGIT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def log_once(message: str, level: int = logging.WARNING) -> None:
    if torch.compiler.is_compiling():  # the tracer refuses loggers, so it calls one itself
        torch._dynamo.comptime.comptime(_log_while_tracing)
    elif message not in _said:
        _said.add(message)
        logger.log(level, message)


def _log_while_tracing(context) -> None:
    message, level = (context.get_local(name).as_python_constant() for name in ("message", "level"))
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the loss."""
    return torch.float64 if dtype == torch.float64 else torch.float32


WITH_MEMORY = (Tensor, torch.nn.Parameter)


def resolved(tensor):
    """`tensor` with its values in memory: collectives are waited for, lazy negation and zeros are written out.

    A subclass that is Python alone is taken off; one that wraps other tensors stays, for the operators to dispatch.
    """
    if not isinstance(tensor, Tensor):
        return tensor
    if tensor.is_nested:
        raise TypeError("nested tensors are not supported: give their values() as one batch of rows")
    if type(tensor) not in WITH_MEMORY:
        collectives = sys.modules.get("torch.distributed._functional_collectives")
        if collectives is not None and isinstance(tensor, collectives.AsyncCollectiveTensor):
            tensor = tensor.clone() if tensor.requires_grad else tensor.wait()
        elif not torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
            tensor = tensor.as_subclass(Tensor)
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def is_concrete(*tensors: Tensor | None) -> bool:
    """Whether `tensors` have memory to work on: no compiler, no fake tensors or tracing, no functorch transform."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in WITH_MEMORY:
            return False
    return not (is_compiling() or is_transformed() or _dispatch_modes() or _tracing_state())


# Looked up once: a small call asks all of them, and would notice the attribute lookups.
is_compiling = torch.compiler.is_compiling
is_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def check_inputs(logits: Tensor, target: Tensor, weight: Tensor | None, min_prob: float) -> None:
    """Raises if `logits`, `target` and `weight` cannot be a call's."""
    if not (isinstance(logits, Tensor) and isinstance(target, Tensor)):
        name, value = ("target", target) if isinstance(logits, Tensor) else ("logits", logits)
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {_dtype(logits)}")
    if target.dtype not in TARGET_DTYPES:
        hint = ": class indices are needed, probabilities are not supported" if target.is_floating_point() else ""
        raise TypeError(f"target must be int64, int32, int16 or uint8, got {_dtype(target)}{hint}")
    if logits.layout is not torch.strided:
        raise TypeError(f"logits must be a dense tensor, got layout {logits.layout}")
    shape = logits.shape
    if not shape:
        raise ValueError("logits must be (K,), (N, K) or (N, K, d1, ...), got a tensor without dimensions")
    classes, expected = (shape[1], (shape[0], *shape[2:])) if len(shape) > 1 else (shape[0], ())
    if target.shape != expected:
        raise ValueError(
            f"target must have the shape of logits without the classes, {expected} for logits of shape "
            f"{tuple(shape)}; got {tuple(target.shape)}"
        )
    if classes < 2:
        raise ValueError(f"at least 2 classes are needed, but logits of shape {tuple(shape)} have {classes}")
    if classes * min_prob >= 1.0:
        raise ValueError(
            f"min_prob={min_prob:g} clamps a uniform row of {classes} classes: choose it below 1/{classes} = "
            f"{1.0 / classes:.3g}"
        )
    if target.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, but target is on {target.device}: move one of them")
    if weight is not None:
        _check_weight(weight, logits, classes)


def _check_weight(weight: Tensor, logits: Tensor, classes: int) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {_dtype(weight)}")
    if weight.shape != (classes,):
        raise ValueError(f"weight must hold one number per class, shape ({classes},); got {tuple(weight.shape)}")
    if weight.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, but weight is on {weight.device}: move one of them")
    if weight.requires_grad:
        raise ValueError("weight is a constant of the loss, but it requires grad: pass weight.detach()")


def shape_and_strides(tensor: Tensor):
    """(outer, K, inner) and their strides in elements; None for both if no such view exists."""
    shape, strides = tensor.shape, tensor.stride()
    dims = len(shape)
    if dims == 2:
        return (shape[0], shape[1], 1), (strides[0], strides[1], 0)
    if dims == 1:
        return (1, shape[0], 1), (0, strides[0], 0)
    inner, step = 1, 0
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:])):
        if size == 1:
            continue
        if inner == 1:
            step = stride
        elif stride != step * inner:
            return None, None
        inner *= size
    return (shape[0], shape[1], inner), (strides[0], strides[1], step)


def as_rows(logits: Tensor):
    """The logits, their (outer, K, inner) shape and strides: a view if there is one."""
    shape, strides = shape_and_strides(logits)
    if shape is None:
        log_once("anl_kernels: the dimensions after the classes are not one run of memory: logits copied", logging.INFO)
        logits = logits.contiguous()
        shape, strides = shape_and_strides(logits)
    return logits, shape, strides


def new_grad(logits: Tensor) -> Tensor:
    """Memory for the gradient, in the logits' order."""
    grad = torch.empty_like(logits)
    if grad.dim() > 2 and shape_and_strides(grad)[0] is None:
        grad = logits.new_empty(logits.shape)
    return grad


def new_coefs(logits: Tensor, target: Tensor) -> Tensor:
    """Memory for what row_grad needs: (NUM_COEFS, *target.shape)."""
    return logits.new_empty((NUM_COEFS, *target.shape), dtype=acc_dtype(logits.dtype))


def with_step(grad_output: Tensor) -> tuple[Tensor, int]:
    """grad_output, and the elements from row to row: 0 for a number, or a number expanded to the rows."""
    return (grad_output.contiguous(), 1) if any(grad_output.stride()) else (grad_output, 0)


def refuse_leaf(logits: Tensor) -> None:
    """Raises if to overwrite these logits would overwrite a leaf that requires grad, such as a parameter."""
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise ValueError("inplace=True would overwrite a leaf that requires grad: it is for logits that a layer made")


def overwritten(logits: Tensor) -> Tensor:
    """The logits' memory, to hold the gradient; ValueError if it cannot."""
    if logits.dim() > 2 and shape_and_strides(logits)[0] is None:
        raise ValueError("inplace=True needs the dimensions after the classes to be one run of memory")
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(logits.stride(), logits.shape) if size > 1):
        if stride <= reach:
            raise ValueError(
                "inplace=True needs logits whose elements do not share memory, but with shape "
                f"{tuple(logits.shape)} and strides {logits.stride()} some do (expanded, or made by as_strided): leave "
                "inplace out, or clone them"
            )
        reach += stride * (size - 1)
    return logits.detach()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def bad_label(label: int) -> IndexError:
    return IndexError(f"Target {label} is out of bounds.")
