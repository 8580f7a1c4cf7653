"""What `linear_robust_loss` is given: checked, with its values in memory, the ignored rows left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..backends import Backend
from ..call import Call
from ..derivatives import by_formulas
from ..layout import WITH_MEMORY, bad_label, check_inputs, is_concrete, log_once, resolved
from ..sharding.dtensor import replicated
from .chunks import Job


class Given(NamedTuple):
    input: Tensor  # (..., D)
    weight: Tensor  # (K, D)
    target: Tensor  # (...)
    bias: Tensor | None  # (K,)
    class_weight: Tensor | None  # (K,)


_FULL_WEIGHT = (
    "give weight.full_tensor() (FSDP), or weight.to_local() with class_group=mesh.get_group() where the classes are "
    "split over it"
)
_REMEDIES = {  # for DTensors that are not replicated
    "input": "give input.to_local(), with batch_group where the ranks have different rows",
    "weight": _FULL_WEIGHT,
    "bias": _FULL_WEIGHT.replace("weight", "bias"),
}


def in_memory(given: Given, max_chunk_bytes) -> Given:
    """The tensors with their values in memory; of those that wrap others, only DTensors are taken off."""
    _check_types(given, max_chunk_bytes)
    tracing = torch.compiler.is_compiling()  # the compiler has its own view of lazy tensors
    is_lazy = lambda x: not tracing and (x.is_neg() or x._is_zerotensor())
    if not any(x is not None and (type(x) not in WITH_MEMORY or is_lazy(x)) for x in given):
        return given
    return Given(*[replicated(name, resolved(x), _REMEDIES.get(name)) for name, x in zip(Given._fields, given)])


def _check_types(given: Given, max_chunk_bytes) -> None:
    for name, x in zip(Given._fields, given):
        if not isinstance(x, Tensor) and (x is not None or name in ("input", "weight", "target")):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x is not None and (x.is_nested or x.layout is not torch.strided):
            raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    class_weight = given.class_weight
    if class_weight is not None and not class_weight.is_floating_point():
        raise TypeError(f"class_weight must be floating point, got {class_weight.dtype}")
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError("class_weight is a constant of the loss, but it requires grad: pass class_weight.detach()")
    if max_chunk_bytes is not None and (isinstance(max_chunk_bytes, bool) or not isinstance(max_chunk_bytes, int)):
        raise TypeError(f"max_chunk_bytes must be an int, got {type(max_chunk_bytes).__name__}")
    if max_chunk_bytes is not None and max_chunk_bytes <= 0:
        raise ValueError(f"max_chunk_bytes must be a positive int, got {max_chunk_bytes}")


def is_transformed(given: Given) -> bool:
    """Whether PyTorch must see the formulas, and so all the logits."""
    if is_concrete(*given):
        return by_formulas(given.input, given.weight, given.bias)
    transforms = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    when = "under torch.compile and torch.func" if transforms else "for tensor subclasses, dispatch modes and tracing"
    log_once(f"anl_kernels: {when} a linear head's logits are made in full")
    return True


def choose(given: Given, call: Call) -> tuple[torch.dtype, Backend]:
    """The dtype of the logits and the backend, of arguments that are right by themselves."""
    dtype = _dtype(given)
    _check_shapes(given)
    few = max(2, len(given.weight))  # one process may have fewer of the classes
    backend = registry.choose(_logits_shape(given.input, dtype, few), call)
    check_inputs(_logits_shape(given.input, dtype, few, given.target.numel()), given.target.reshape(-1), None, 0.0)
    return dtype, backend


def _dtype(given: Given) -> torch.dtype:
    """What F.linear would compute in, here and now."""
    matrices = [x for x in (given.input, given.weight, given.bias) if x is not None]
    device = given.input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not for meta tensors
    if autocast and not any(x.dtype is torch.float64 for x in matrices):
        return torch.get_autocast_dtype(device)
    if len({x.dtype for x in matrices}) > 1:
        raise TypeError(f"input, weight and bias must have one dtype, got {', '.join(str(x.dtype) for x in matrices)}")
    return given.input.dtype


def _check_shapes(given: Given) -> None:
    input, weight, target, bias, _ = given
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must be (..., D) and weight (K, D), got {tuple(input.shape)}, {tuple(weight.shape)}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have input's shape without the last dimension, {tuple(input.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    for name, x in zip(Given._fields, given):
        if x is not None and x.device != input.device:
            raise ValueError(f"input is on {input.device}, but {name} is on {x.device}: move one of them")


def _logits_shape(input: Tensor, dtype: torch.dtype, classes: int, rows: int = 0) -> Tensor:
    """A tensor like the logits, without their memory."""
    return torch.empty((), dtype=dtype, device=input.device).expand(rows, classes)


def checked_labels(given: Given, job: Job) -> Tensor:
    """The labels (N,), int64: 8 and 16 bits do not hold every class, nor ignore_index."""
    call, classes, class_weight = job.call, job.shard.classes, given.class_weight
    labels = given.target.reshape(-1).long()
    check_inputs(_logits_shape(given.input, job.dtype, classes, len(labels)), labels, None, call.clamp)
    if class_weight is not None and class_weight.shape != (classes,):
        raise ValueError(f"class_weight must be ({classes},), one number per class; got {tuple(class_weight.shape)}")
    if labels.device.type == "cpu":
        bad = (labels != call.ignore_index) & ((labels < 0) | (labels >= classes))
        if bad.any():
            raise bad_label(int(labels[bad][0]))
    return labels


def kept_rows(hidden: Tensor, labels: Tensor, call: Call):
    """Rows and labels without the ignored ones, and where they were (None: all are there)."""
    valid = labels != call.ignore_index
    if hidden.device.type != "cpu":
        return hidden.masked_fill(~valid.unsqueeze(1), 0.0), None, labels
    if valid.all():
        return hidden, None, labels
    kept = valid.nonzero().squeeze(1)
    return hidden.index_select(0, kept), kept, labels[kept]
