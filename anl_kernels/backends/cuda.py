"""The compiled CUDA kernels: tensors become pointers, a device and a stream here. Nothing waits for the device."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import trust
from ..call import Call, KernelTerm
from ..layout import acc_dtype, as_rows, log_once, shape_and_strides
from ..row_math import NUM_STATS
from . import LaunchRefused, check_device, compiled, reference
from .compiled import DTYPES, REDUCTIONS, TARGETS, address, of_logits, of_target

NAME = "cuda"
PURPOSE = "fused CUDA kernels for NVIDIA GPUs"

_cuda, _why_not = compiled.load("_cuda", "no nvcc where it was installed")

_DEVICE = "cuda"  # the type of the devices whose memory the kernels reach


def unavailable() -> str | None:
    if _why_not is not None:
        return _why_not
    if _DEVICE == "cuda" and not torch.cuda.is_available():
        return _refusal(-1) or "torch cannot use the GPU that is here: a build of torch for CUDA is needed"
    return _refusal(-1)


def _refusal(device: int) -> str | None:
    """Why the kernels do not run on that device (-1: the current one); None if they do."""
    return _cuda.why_not(device) or None


_refusal._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import the compiler


def cannot_run(logits: Tensor, call: Call) -> str | None:
    return check_device(logits, _DEVICE) or _refusal(_index(logits.device))


def device_type() -> str:
    return _DEVICE


def plan_for(rows: int, classes: int, dtype: torch.dtype, device: torch.device, protocols) -> dict:
    """How a loss of contiguous (rows, classes) logits would run with these protocols: its kernel, CTAs and so on."""
    bits = sum(_cuda.PROTOCOLS[name] for name in protocols)
    return _cuda.plan_for(DTYPES[dtype], (rows, classes, 1), (classes, 1, 0), _index(device), bits)


def info() -> dict:
    """What the kernels were compiled for, CUDA's versions, the compute capability of each device."""
    return _cuda.info()


def _index(device: torch.device) -> int:
    return -1 if device.index is None else device.index


def _where(logits: Tensor, protocols: int = 0):
    """The device, its current stream, memory to work in (a tensor that lives until the kernels are launched), and the
    bits of the protocols that they may use."""
    device, memory = logits.device, []

    def empty(size: int) -> int:
        memory.append(torch.empty(size, dtype=torch.uint8, device=device))
        return memory[-1].data_ptr()

    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    return _cuda.Where(_index(device), stream, empty, protocols)


def _protocols(call, logits: Tensor) -> int:
    return sum(_cuda.PROTOCOLS[name] for name in trust.trusted(NAME, logits.device, call.explicit))


def _launch(kernel, *arguments) -> None:
    """Runs one of the module's functions, which says what the device refused to launch before something else ran."""
    try:
        refused = kernel(*arguments)
    except _cuda.LaunchRefused as error:
        raise LaunchRefused(str(error)) from None
    if refused:
        log_once(f"anl_kernels: {refused} runs instead")


@functools.lru_cache(maxsize=256)
def _terms_program(terms: tuple[KernelTerm, ...], min_prob: float, gamma: float | None, needs: int):
    return _cuda.Program(terms, min_prob, gamma or 0.0, needs)


def row_loss(
    call: Call, logits: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor | None, coefs: Tensor | None
) -> Tensor:
    dtype = logits.dtype
    acc = acc_dtype(dtype)
    rows, shape, strides = as_rows(logits)
    loss = logits.new_empty(target.shape if call.reduction == "none" else (), dtype=acc)
    if target.numel() == 0:
        return loss.fill_(math.nan if call.reduction == "mean" else 0.0)
    grad_strides = strides if grad is None else shape_and_strides(grad)[1]
    target = target.contiguous()
    if weight is not None:
        weight = weight.to(acc).contiguous()
    _launch(
        _cuda.row_loss, _terms_program(call.terms, call.min_prob, call.gamma, call.needs), DTYPES[dtype], shape,
        address(rows, "logits"), strides, address(grad, "the gradient"), grad_strides,
        address(target, "target"), TARGETS[target.dtype], call.ignore_index, address(weight, "weight"),
        REDUCTIONS[call.reduction], loss.data_ptr(), address(coefs, "coefs"), _where(logits, _protocols(call, logits)),
    )  # fmt: skip
    return loss


def row_stats(call: Call, logits: Tensor, target: Tensor) -> Tensor:
    rows, shape, strides = as_rows(logits)
    target = target.contiguous()
    table = logits.new_empty((NUM_STATS, *target.shape), dtype=torch.float64)
    asked = call.ignore_index, call.min_prob, call.gamma or 0.0, call.needs
    where = _where(logits, _protocols(call, logits))
    _launch(_cuda.row_stats, *of_logits(rows, shape, strides), *of_target(target), *asked, table.data_ptr(), where)
    return table


def slice_stats(call: Call, logits: Tensor, target: Tensor, lse: Tensor | None) -> Tensor:
    return reference.slice_stats_for(NAME, call, logits, target, lse)


def column_sums(logits: Tensor, coefs: Tensor) -> Tensor:
    rows, shape, strides = as_rows(logits)
    if shape[0] * shape[2] == 0:
        return logits.new_zeros(shape[1], dtype=torch.float64)
    sums = logits.new_empty(shape[1], dtype=torch.float64)
    arguments = *of_logits(rows, shape, strides), address(coefs, "coefs"), sums.data_ptr()
    _launch(_cuda.column_sums, *arguments, _where(logits))
    return sums


def row_grad(call: Call, logits: Tensor, target: Tensor, coefs: Tensor, grad_output: Tensor | None, entropy) -> Tensor:
    kernel = functools.partial(_launch, _cuda.row_grad)
    return compiled.row_grad(kernel, call, logits, target, coefs, grad_output, entropy, _where(logits))


def scaled(grad: Tensor, factor: Tensor, keep: bool) -> Tensor:
    if keep:
        return grad * factor
    shape, strides = shape_and_strides(grad)
    factor = factor.to(acc_dtype(grad.dtype))
    arguments = DTYPES[grad.dtype], shape, address(grad, "the gradient"), strides, address(factor, "grad_output")
    _launch(_cuda.scale, *arguments, _where(grad))
    return grad
