"""Rows whose classes lie in slices, held by other processes or made one after the other: their sums, and the merge.

Sums leave the target out, wherever it lies, as the kernels do: with its part added by hand, what is equal in a loss and
its gradient cancels exactly. Logits here are (N, K_r, ...): the caller gives one row (K_r,) a dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import Backend, reference
from ..call import Call
from ..row_math import (
    ELSEWHERE,
    IGNORED,
    NUM_FIRST_SUMS,
    NUM_MERGED,
    NUM_SECOND_SUMS,
    OWNED,
    TARGET_LOGIT,
    CoefField,
    SliceField,
    added,
    class_gradient,
    merged,
    probabilities,
    second_fields,
    table_of_sums,
    target_of,
)

__all__ = ["added", "first_sums", "grad", "local_labels", "merged", "moments", "second_fields", "second_sums", "table"]

CHUNK_ELEMENTS = 1 << 22  # of logits at a time, where PyTorch's own operators make temporaries of them


def local_labels(target: Tensor, valid: Tensor, start: int, size: int) -> Tensor:
    """Labels of the slice [start, start + size), int64: ELSEWHERE and IGNORED besides those in [0, size)."""
    local = target.long() - start
    local = torch.where((local >= 0) & (local < size), local, ELSEWHERE)
    return torch.where(valid, local, IGNORED)


def first_sums(backend: Backend, call: Call, logits: Tensor, labels: Tensor) -> Tensor:
    """(NUM_MERGED, *labels.shape), float64: the kernel's sums, the target's logit, and 1 where it is here.

    The max is -inf where the slice has no class.
    """
    sums = torch.zeros((NUM_MERGED, *labels.shape), dtype=torch.float64, device=logits.device)
    if logits.shape[1] == 0:
        sums[SliceField.MAX] = -math.inf
        return sums
    sums[:NUM_FIRST_SUMS] = backend.slice_stats(call, logits, labels, None)
    here = labels >= 0
    target = logits.detach().gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1).double()
    sums[TARGET_LOGIT] = torch.where(here, target, 0.0)
    sums[OWNED] = here
    return sums


def second_sums(backend: Backend, call: Call, logits: Tensor, labels: Tensor, first: Tensor) -> Tensor:
    """(NUM_SECOND_SUMS, *labels.shape), float64, from the first sums of the whole rows. Those not needed are not
    specified."""
    if logits.shape[1] == 0:
        return torch.zeros((NUM_SECOND_SUMS, *labels.shape), dtype=torch.float64, device=logits.device)
    max_and_log_sum = torch.stack((first[SliceField.MAX], target_of(first)[0]))
    return backend.slice_stats(call, logits, labels, max_and_log_sum)


def table(first: Tensor, second: Tensor | None, valid: Tensor, classes: int, call: Call) -> Tensor:
    """The statistics' table of whole rows, as `row_stats` makes it."""
    rows = table_of_sums(first, second, call)
    uniform = reference.uniform_row(classes, call.min_prob, call.gamma or 0.0)
    uniform = torch.tensor(uniform, dtype=rows.dtype, device=rows.device)
    return torch.where(valid, rows, uniform.view(-1, *[1] * valid.dim()))


def grad(backend: Backend, call: Call, logits: Tensor, labels: Tensor, grad_coefs: Tensor, entropy=None) -> Tensor:
    """The gradient by a slice, from the coefficients (NUM_COEFS, *labels.shape) of whole rows.

    entropy: None, or (g (K_r,), mean (*labels.shape)): p_j (g_j - mean) is added. Not where call.inplace.
    """
    if logits.numel() == 0:
        return torch.zeros_like(logits)
    grad_coefs = _without_target(call, logits, labels, grad_coefs)
    out = backend.row_grad(call, logits.detach(), labels.clamp(min=0), grad_coefs, None, None)
    if entropy is not None:
        g, mean = entropy
        for rows, p in _probabilities(logits, grad_coefs):
            difference = _along_classes(g, p) - mean[rows].to(p.dtype).unsqueeze(1)
            part = out[rows]
            part.copy_(part + torch.where(p == 0.0, 0.0, p * difference))
    return out


def moments(logits: Tensor, grad_coefs: Tensor, g: Tensor) -> Tensor:
    """(2, *rows): sum_k p_k g_k and sum_k p_k over a slice's classes, float64."""
    result = torch.zeros((2, *grad_coefs.shape[1:]), dtype=torch.float64, device=logits.device)
    for rows, p in _probabilities(logits, grad_coefs) if logits.numel() else ():
        result[0, rows] = torch.where(p == 0.0, 0.0, p * _along_classes(g, p)).sum(1, dtype=torch.float64)
        result[1, rows] = p.sum(1, dtype=torch.float64)
    return result


def _along_classes(g: Tensor, p: Tensor) -> Tensor:
    return g.to(p.dtype).view(1, -1, *[1] * (p.dim() - 2))


def _probabilities(logits: Tensor, grad_coefs: Tensor):
    """(rows, p (n, K_r, ...)), at most CHUNK_ELEMENTS at a time, rows a slice of the first dimension."""
    step = max(1, CHUNK_ELEMENTS // logits[:1].numel())
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        yield rows, probabilities(logits.detach()[rows], grad_coefs[:, rows].unsqueeze(2))


def _without_target(call: Call, logits: Tensor, labels: Tensor, grad_coefs: Tensor) -> Tensor:
    """Coefficients for row_grad, whose label is 0 where the target is elsewhere: there "the gradient at the target" is
    that of any class, at class 0."""
    first_class = class_gradient(call, logits.detach().select(1, 0).double(), grad_coefs.double())
    grad_coefs = grad_coefs.clone()
    at_target = grad_coefs[CoefField.TARGET]
    grad_coefs[CoefField.TARGET] = torch.where(labels == ELSEWHERE, first_class.to(grad_coefs.dtype), at_target)
    return grad_coefs
