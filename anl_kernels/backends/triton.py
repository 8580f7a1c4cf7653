"""The Triton kernels: tensors become views of lanes here. Triton itself is imported when a call first needs it."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from ..call import Call
from ..layout import as_rows, new_grad, overwritten, shape_and_strides, with_step
from . import reference

NAME = "triton"
PURPOSE = "fused Triton kernels, for any GPU that Triton knows"
_MAX_CLASSES = 2**31 - 1


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (_interpreted() or torch.cuda.is_available() or torch.xpu.is_available()):
        return "there is no GPU that torch can use (with TRITON_INTERPRET=1 the kernels run on the CPU, for tests)"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def _device_type() -> str:
    if _interpreted():
        return "cpu"
    from triton.runtime import driver

    return driver.active.get_active_torch_device().type


def cannot_run(logits: Tensor, call: Call) -> str | None:
    if logits.device.type != _device_type():
        return f"the logits are on {logits.device}, and Triton's device here is {_device_type()}"
    if logits.dim() and logits.shape[min(logits.dim() - 1, 1)] > _MAX_CLASSES:
        return f"a row holds at most {_MAX_CLASSES} classes"
    return None


def target() -> str:
    """What the kernels are compiled for."""
    if _interpreted():
        return "the interpreter (TRITON_INTERPRET=1)"
    from triton.runtime import driver

    found = driver.active.get_current_target()
    return f"{found.backend} {found.arch}"


@lru_cache(maxsize=1)
def _kernels():
    from ..triton_kernels import columns, gradient, launch, passes, reduce

    return passes, launch, gradient, columns, reduce


def row_loss(
    call: Call, logits: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor | None, coefs: Tensor | None
) -> Tensor:
    passes, launch, *_ = _kernels()
    rows, shape, strides = as_rows(logits)
    grad_strides = strides if grad is None else shape_and_strides(grad)[1]
    view = launch.view_of(shape, logits.element_size(), strides, grad_strides)
    program = passes.program(call.terms, call.min_prob, call.gamma or 0.0, call.needs, logits.dtype is torch.float64)
    weight = None if weight is None else weight.contiguous()
    return passes.row_loss(program, call, rows, view, target.contiguous(), weight, grad, coefs)


def row_stats(call: Call, logits: Tensor, target: Tensor) -> Tensor:
    passes, launch, *_ = _kernels()
    rows, shape, strides = as_rows(logits)
    view = launch.view_of(shape, logits.element_size(), strides, strides)
    program = passes.program((), call.min_prob, call.gamma or 0.0, call.needs, logits.dtype is torch.float64)
    return passes.row_stats(program, call, rows, view, target.contiguous())


def slice_stats(call: Call, logits: Tensor, target: Tensor, lse: Tensor | None) -> Tensor:
    return reference.slice_stats_for(NAME, call, logits, target, lse)


def column_sums(logits: Tensor, coefs: Tensor) -> Tensor:
    columns = _kernels()[3]
    rows, shape, strides = as_rows(logits)
    return columns.column_sums(rows, shape, strides, coefs)


def row_grad(call: Call, logits: Tensor, target: Tensor, coefs: Tensor, grad_output: Tensor | None, entropy) -> Tensor:
    gradient = _kernels()[2]
    rows, shape, strides = as_rows(logits)
    grad = overwritten(logits) if call.inplace else new_grad(logits)
    grad_output, step = (None, 0) if grad_output is None else with_step(grad_output)
    log_q, scale = (None, None) if entropy is None else (part.to(coefs.dtype).contiguous() for part in entropy)
    gradient.row_grad(
        grad, rows, shape, strides, shape_and_strides(grad)[1], target.contiguous(), coefs, grad_output, step, log_q,
        scale, call.min_prob, call.gamma or 0.0, call.needs,
    )  # fmt: skip
    if call.inplace:
        torch.autograd.graph.increment_version(logits)
    return grad


def scaled(grad: Tensor, factor: Tensor, keep: bool) -> Tensor:
    reduce = _kernels()[4]
    return reduce.scale(grad, factor) if keep else reduce.scale_(grad, factor)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return _interpreted()


def device_type() -> str:
    return _device_type()


def plan_for(rows: int, classes: int, dtype: torch.dtype, device: torch.device, may_wait: bool = True):
    """The kernel that contiguous (rows, classes) logits take, and whether its programs wait for one another."""
    passes, launch, *_ = _kernels()
    strides = (classes, 1, 0)
    view = launch.view_of((rows, classes, 1), dtype.itemsize, strides, strides)
    p = passes.plan(view, dtype.itemsize, launch.target_of(device), may_wait)
    return p.kernel.fn.__name__, p.split is not None and p.split.one_launch
