"""`robust_loss`, which every function for a loss calls, and the L1 penalty of ANL."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import autograd, registry
from .backends import LaunchRefused, reference
from .call import Call, checked_call
from .layout import WITH_MEMORY, acc_dtype, check_inputs, is_compiling, log_once, resolved
from .sharding.class_group import sharded_loss
from .sharding.dtensor import of_dtensors
from .terms import Algebra, Expression, RowLoss

CACHE_SIZE = 256  # expressions by their parameters; calls by their keywords


def robust_loss(
    logits: Tensor,
    target: Tensor,
    expression: Algebra,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    entropy_weight: float = 0.0,
    min_prob: float = 1e-7,
    inplace: bool = False,
    recompute: bool | None = None,
    backend: str = "auto",
    class_group=None,
    batch_group=None,
    input: Tensor | None = None,
) -> Tensor:
    """The loss `expression` (a term or a weighted sum of terms) of every row of logits, reduced.

    Equivalent to, in PyTorch, with f the sum of the terms' formulas::

        log_p = logits.float().log_softmax(1)                       # float64 logits stay float64
        rows = f(log_p, target) * weight[target]                    # 0 where target == ignore_index
        loss = rows.sum() / weight[target][target != ignore_index].sum()      # "mean"
        q = log_p.exp().mean(0)                                     # over the rows that are not ignored
        loss = loss + entropy_weight * (math.log(K) + (q * q.log()).sum())

    Args:
        logits: (N, K), (K,) or (N, K, d1, ...), float16, bfloat16, float32 or float64, any strides. A class at -inf
            does not exist for that row.
        target: (N,), () or (N, d1, ...), class indices, int64, int32, int16 or uint8.
        expression: e.g. `5 * NCE() + 5 * NNCE()`.
        weight: (K,), floating point: a factor for the rows of each class, as in F.cross_entropy.
        ignore_index: rows with this label count nowhere; their logits are not read.
        reduction: "mean", "sum" or "none".
        entropy_weight: the factor of the batch entropy term R = log K + sum_j q_j log q_j (not with "none"; class
            weights do not enter q).
        min_prob: the clamp of NNCE, NNFL and RCE, for which K * min_prob must stay below 1.
        inplace: the gradient overwrites the logits' storage; they must not be used again. Autograd notices most later
            uses (docs/semantics.md has the list).
        recompute: True: forward keeps O(N) numbers and backward reads the logits again. False: forward makes the
            gradient. None: True for float16, where a GradScaler's factor must come before rounding.
        backend: "auto", or a name of `backends()`; ANL_KERNELS_BACKEND overrides "auto".
        class_group: a torch.distributed process group over whose ranks the classes are split: logits are this rank's
            contiguous slice (N, K_r), in the order of the ranks, of any size (0 too); targets and weight are those of
            all classes, the same on every rank, and so is the loss. The gradient is that of the slice. Logits that are
            DTensors, sharded along the classes, need no class_group: their gradient is a DTensor.
        batch_group: a torch.distributed process group whose ranks' rows share q and the denominator of "mean". The
            gradient is such that the average over ranks (DDP) is that of one process with all rows.
        input: another name of logits, F.cross_entropy's.

    Returns:
        The loss: float32 (float64 for float64 logits), a scalar, or target's shape with "none". An ignored row is 0;
        "mean" of no rows is NaN. A NaN or +inf logit, or -inf at the target, makes its row NaN and no other.

    Raises:
        IndexError: a label outside [0, K) that is not ignore_index, on the CPU.
        ValueError: shapes, devices, K < 2, K * min_prob >= 1, two focal exponents in one sum, an option's value; calls
            that differ between the ranks of class_group, on all of them.
        TypeError: dtypes, or an argument of the wrong type.
        RuntimeError: the backend asked for cannot run the call; in backward, with create_graph=True, the gradient was
            made in forward and so has no derivative (recompute=True keeps what it takes).

    Active negative loss: Ye et al., NeurIPS 2023; journal version arXiv 2412.02373.
    """
    if input is not None:
        if logits is not None:
            raise TypeError("the logits are given twice: as logits and as input")
        logits = input
    options = (ignore_index, reduction, entropy_weight, min_prob, inplace, recompute, backend)
    compiling = is_compiling()
    plain = type(logits) in WITH_MEMORY and type(target) in WITH_MEMORY and (compiling or not logits.is_neg())
    if weight is not None:
        plain = plain and type(weight) in WITH_MEMORY and (compiling or not weight.is_neg())
    if not plain:
        if not compiling:  # a compiler looks into subclasses by itself, and the operators see to lazy tensors
            given = (logits, target, weight)
            if has_torch_function(given):
                keywords = dict(zip(robust_loss.__kwdefaults__, (weight, *options, class_group, batch_group)))
                return handle_torch_function(robust_loss, given, logits, target, expression, **keywords)
            logits, target, weight = map(resolved, given)
        logits, target, weight, class_group = of_dtensors(logits, target, weight, class_group, inplace)
    if compiling or batch_group is not None or class_group is not None:
        call = checked_call(expression, *options, class_group, batch_group)
    else:
        call = _cached_call(expression, options)
    if class_group is not None:
        return sharded_loss(logits, target, weight, call)
    check_inputs(logits, target, weight, call.clamp)
    backend = registry.choose(logits, call)
    if backend is reference:
        return reference.loss_by_formulas(logits, target, weight, call)
    try:
        return autograd.fused_loss(backend, logits, target, weight, call)
    except LaunchRefused as refused:
        if call.explicit or reference.cannot_run(logits, call):
            raise
        log_once(f"{refused}; the reference backend runs it")
        return reference.loss_by_formulas(logits, target, weight, call)


robust_loss.__signature__ = inspect.signature(robust_loss)
robust_loss.__defaults__ = (None, None, None)  # logits may come as `input`; a missing target is then named below


def _cached_call(expression: Algebra, options: tuple) -> Call:
    """The call of these keywords: checked when they are first seen, then cached with the expression."""
    if type(expression) is not Expression and isinstance(expression, Algebra):
        expression = expression.cached() if isinstance(expression, RowLoss) else _expression_of(expression)
    known = options, tuple(map(type, options))  # to tell True from 1
    try:
        return expression.calls[known]
    except (AttributeError, KeyError, TypeError):
        if not isinstance(expression, Expression):
            checked_call(expression, *options)  # raises
        # Without its calls: no cycle, which only the garbage collector would free.
        call = checked_call(expression.without_calls(), *options)
        if len(expression.calls) >= CACHE_SIZE:
            expression.calls.clear()
        expression.calls[known] = call
        return call


def cached(build):
    """Caches the expressions that `build` makes, with their calls, by its parameters.

    Only sums of built-in terms with numbers: they hold nothing of the caller's.
    """
    known = {}

    def of(*parameters):
        if torch.compiler.is_compiling():  # a compiled graph would guard on what is kept
            return build(*parameters)
        key = parameters, tuple(map(type, parameters))  # to tell True from 1
        try:
            return known[key]
        except (KeyError, TypeError):  # TypeError: no hash, so it is no number
            pass
        expression = build(*parameters)
        if expression.built_in:
            if len(known) >= CACHE_SIZE:
                known.clear()
            known[key] = expression
        return expression

    return of


@cached
def _expression_of(term: Algebra) -> Expression:
    return Expression(term.terms_of())


def l1_penalty(parameters: Iterable[Tensor] | torch.nn.Module) -> Tensor:
    """Sum of |theta| over `parameters` (or a module's): ANL's term loss + delta * l1_penalty(model.parameters())."""
    if isinstance(parameters, torch.nn.Module):
        parameters = parameters.parameters()
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parts = [p.abs().sum(dtype=acc_dtype(p.dtype)) for p in parameters]
    return sum(parts[1:], start=parts[0]) if parts else torch.zeros(())
