"""The losses of a linear head, whose logits never exist in full.

A chunk of logits is made, turned into its gradient in its own memory by the one-pass kernel, and consumed by two matrix
products; then the next chunk takes its place (`chunks`, `autograd`). What a gradient has in common over the classes of
a row is part of the dense chunk and costs its products nothing: as a rank-1 update of its own it would cost two more
passes over a (K, D) matrix. Tiles of small softmax are not skipped: for normalized losses their gradient is small in
each class, not in sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import functional
from ..backends import LaunchRefused, reference
from ..call import Call, checked_call
from ..layout import log_once
from ..losses import NCE, NFL, NNCE, NNFL
from ..sharding.class_group import ClassShard, agree, check_eager, header
from ..terms import Algebra
from .arguments import Given, checked_labels, choose, in_memory, is_transformed, kept_rows
from .autograd import head
from .chunks import Job, Matrices, plan


def linear_robust_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: Algebra,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    entropy_weight: float = 0.0,
    min_prob: float = 1e-7,
    recompute: bool | None = None,
    backend: str = "auto",
    class_group=None,
    batch_group=None,
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """`robust_loss(F.linear(input, weight, bias), target, loss)`, without ever holding all the logits.

    Args:
        input: (..., D), float16, bfloat16, float32 or float64; under autocast computed in its dtype, as F.linear.
        weight: (K, D), bias: (K,) or None, in input's dtype (any under autocast).
        target: (...), class indices.
        loss: a term or a weighted sum of terms, e.g. `5 * NCE() + 5 * NNCE()`, `RowLoss` included.
        class_weight: (K,), the `weight` of robust_loss: a factor for the rows of each class.
        ignore_index: rows with this label are left out; their input is not read. (On a GPU, where to count them would
            wait for it, they stay in the products as zeros.)
        recompute: False: the gradient is made in forward, where the loss allows. True: forward keeps the statistics of
            each row, and backward makes the logits again, a fourth product. None: False, but for float16, where a
            GradScaler's factor must come before rounding.
        class_group: weight and bias are this rank's contiguous slice of the classes, (K_r, D) and (K_r,); input, target
            and class_weight are the same on all ranks. The gradient by input is that of all classes, the same on every
            rank: it is summed over them in backward.
        max_chunk_bytes: the memory for a chunk of logits: 256 MiB on a CPU, 1 GiB elsewhere, if None. Besides it there
            are the gradients (dW in float32 until the end), O(N + K) numbers and, for half precision, 16 MiB. Second
            derivatives, forward mode and backend="reference" keep all logits.
        reduction, entropy_weight, min_prob, backend, batch_group: as in robust_loss.

    Returns:
        The loss: float32 (float64 for float64 logits), a scalar, or target's shape with "none".

    Raises: as robust_loss.
    """
    options = (ignore_index, reduction, entropy_weight, min_prob, False, recompute, backend)
    call = checked_call(loss, *options, class_group, batch_group)
    given = Given(input, weight, target, bias, class_weight)
    if has_torch_function(given):
        values = (bias, class_weight, *options[:4], recompute, backend, class_group, batch_group, max_chunk_bytes)
        keywords = dict(zip(linear_robust_loss.__kwdefaults__, values))
        return handle_torch_function(linear_robust_loss, given, input, weight, target, loss, **keywords)
    if class_group is not None:
        check_eager()
        return _loss_of_shard(given, call, max_chunk_bytes)
    return _loss(given, loss, call, max_chunk_bytes)


def _loss(given: Given, loss: Algebra, call: Call, max_chunk_bytes: int | None) -> Tensor:
    given = in_memory(given, max_chunk_bytes)
    if is_transformed(given):
        return _unfused(given, loss, call)
    dtype, backend = choose(given, call)
    job = Job(call, backend, ClassShard.whole(len(given.weight)), dtype)
    labels = checked_labels(given, job)
    if backend is reference:
        return _unfused(given, loss, call)
    try:
        return _fused(given, labels, job, max_chunk_bytes)
    except LaunchRefused as refused:
        if call.explicit:
            raise
        log_once(f"{refused}; a linear head's logits are made in full")
        return _unfused(given, loss, call)


def _loss_of_shard(given: Given, call: Call, max_chunk_bytes: int | None) -> Tensor:
    """The same where the ranks of class_group share the classes: never by other means than theirs."""
    dtype = backend = None
    try:
        given = in_memory(given, max_chunk_bytes)
        check_eager(*given)
        dtype, backend = choose(given, call)
        matrices = (given.input, given.weight, given.bias)
        wants_grad = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in matrices]
        settings = (given.input.shape[-1], max_chunk_bytes, wants_grad)
        mine = header(len(given.weight), dtype, given.target, given.class_weight, call, *settings)
    except Exception as error:
        mine = error
    job = Job(call, backend, agree(call.class_group, given.input, mine), dtype)
    return _fused(given, checked_labels(given, job), job, max_chunk_bytes)


def _fused(given: Given, labels: Tensor, job: Job, max_chunk_bytes: int | None) -> Tensor:
    hidden, kept, labels = kept_rows(given.input.reshape(-1, given.input.shape[-1]), labels, job.call)
    job = job._replace(plan=plan(len(labels), job.shard.largest, job.dtype, hidden.device.type, max_chunk_bytes))
    result = head(Matrices(hidden, given.weight, given.bias), labels, given.class_weight, job)
    if job.call.reduction != "none":
        return result
    if kept is not None:
        result = result.new_zeros(given.target.numel()).index_copy(0, kept, result)
    return result.view(given.target.shape)


def _unfused(given: Given, loss: Algebra, call: Call) -> Tensor:
    logits = F.linear(given.input, given.weight, given.bias)
    result = functional.robust_loss(
        logits.reshape(-1, logits.shape[-1]),
        given.target.reshape(-1),
        loss,
        weight=given.class_weight,
        ignore_index=call.ignore_index,
        reduction=call.reduction,
        entropy_weight=call.entropy_weight,
        min_prob=call.min_prob,
        recompute=call.recompute,
        backend=call.backend,
        batch_group=call.batch_group,
    )
    return result.view(given.target.shape) if call.reduction == "none" else result


def _linear(function):
    function.__doc__ = (
        function.__doc__.rstrip() + "\n\n    The keywords, shapes and errors are those of `linear_robust_loss`."
    )
    return function


@_linear
def linear_anl_ce(
    input: Tensor, weight: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 1.0, **options
) -> Tensor:
    """`anl_ce(F.linear(input, weight, bias), target)` without the logits: alpha NCE + beta NNCE."""
    return linear_robust_loss(input, weight, target, alpha * NCE() + beta * NNCE(), **options)


@_linear
def linear_anl_fl(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.5,
    **options,
) -> Tensor:
    """`anl_fl(F.linear(input, weight, bias), target)` without the logits: alpha NFL + beta NNFL."""
    return linear_robust_loss(input, weight, target, alpha * NFL(gamma) + beta * NNFL(gamma), **options)
