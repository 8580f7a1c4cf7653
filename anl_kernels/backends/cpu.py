"""The compiled CPU kernels: tensors become pointers, shapes and strides here, and nowhere else."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..call import Call, KernelTerm
from ..layout import as_rows, bad_label, shape_and_strides
from ..row_math import IGNORED, NUM_FIRST_SUMS, NUM_SECOND_SUMS, NUM_STATS
from . import check_device, compiled
from .compiled import DTYPES, REDUCTIONS, TARGETS, address, of_logits, of_target

NAME = "cpu"
PURPOSE = "fused C++ kernels on PyTorch's threads"

_cpu, _why_not = compiled.load("_cpu", "installed with ANL_KERNELS_NO_EXT=1?")


def unavailable() -> str | None:
    return _why_not


def cannot_run(logits: Tensor, call: Call) -> str | None:
    return check_device(logits, device_type())


def device_type() -> str:
    return "cpu"


def info() -> dict:
    """The instruction set in use and those compiled in, the compiler, the threads."""
    return _cpu.info()


@lru_cache(maxsize=256)
def _terms_program(terms: tuple[KernelTerm, ...], min_prob: float, gamma: float | None, needs: int):
    return _cpu.Program(terms, min_prob, gamma or 0.0, needs)


def row_loss(
    call: Call, logits: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor | None, coefs: Tensor | None
) -> Tensor:
    dtype = logits.dtype
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    rows, shape, strides = as_rows(logits)
    grad_strides, fresh = (strides, False) if grad is None else (shape_and_strides(grad)[1], not call.inplace)
    if not target.is_contiguous():
        target = target.contiguous()
    if weight is not None:
        weight = weight.to(acc).contiguous()
    loss = logits.new_empty(target.shape if call.reduction == "none" else (), dtype=acc)
    bad = _cpu.row_loss(
        _terms_program(call.terms, call.min_prob, call.gamma, call.needs), DTYPES[dtype], shape,
        address(rows, "logits"), strides,
        address(grad, "the gradient"), grad_strides, address(target, "target"), TARGETS[target.dtype],
        call.ignore_index, address(weight, "weight"), REDUCTIONS[call.reduction], loss.data_ptr(),
        address(coefs, "coefs"), fresh,
    )  # fmt: skip
    if bad >= 0:
        raise bad_label(int(target.view(-1)[bad]))
    return loss


def row_stats(call: Call, logits: Tensor, target: Tensor) -> Tensor:
    rows, shape, strides = as_rows(logits)
    target = target.contiguous()
    table = logits.new_empty((NUM_STATS, *target.shape), dtype=torch.float64)
    asked = call.ignore_index, call.min_prob, call.gamma or 0.0, call.needs
    bad = _cpu.row_stats(*of_logits(rows, shape, strides), *of_target(target), *asked, table.data_ptr())
    if bad >= 0:
        raise bad_label(int(target.view(-1)[bad]))
    return table


def slice_stats(call: Call, logits: Tensor, target: Tensor, lse: Tensor | None) -> Tensor:
    rows, shape, strides = as_rows(logits)
    target = target.contiguous()
    lse = None if lse is None else lse.contiguous()
    table = logits.new_empty((NUM_FIRST_SUMS if lse is None else NUM_SECOND_SUMS, *target.shape), dtype=torch.float64)
    asked = IGNORED, call.min_prob, call.gamma or 0.0, call.needs
    label = address(target, "target")
    _cpu.slice_stats(*of_logits(rows, shape, strides), label, *asked, address(lse, "lse"), table.data_ptr())
    return table


def column_sums(logits: Tensor, coefs: Tensor) -> Tensor:
    rows, shape, strides = as_rows(logits)
    sums = logits.new_empty(shape[1], dtype=torch.float64)
    _cpu.column_sums(*of_logits(rows, shape, strides), address(coefs, "coefs"), sums.data_ptr())
    return sums


def row_grad(call: Call, logits: Tensor, target: Tensor, coefs: Tensor, grad_output: Tensor | None, entropy) -> Tensor:
    return compiled.row_grad(_cpu.row_grad, call, logits, target, coefs, grad_output, entropy, not call.inplace)


def scaled(grad: Tensor, factor: Tensor, keep: bool) -> Tensor:
    factor = factor.item()
    if keep:
        return grad * factor
    return grad if factor == 1.0 else grad.mul_(factor)
