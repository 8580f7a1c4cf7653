"""The public functions: one short function a loss, and the one they all call."""

from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import registry
from .layout import WITH_MEMORY, acc_dtype, check_inputs, is_compiling, resolved
from .sharding.class_group import sharded_loss
from .sharding.dtensor import of_dtensors
from .stats import ABOVE, ABOVE_MASS, FOCAL_ABOVE
from .terms import (
    AEL,
    AGCE,
    AUL,
    CE,
    FL,
    GCE,
    MAE,
    NCE,
    NFL,
    NNCE,
    NNFL,
    RCE,
    Algebra,
    Expression,
    RowLoss,
    coefficient,
    number,
)

REDUCTIONS = ("none", "mean", "sum")
MAX_KEPT = 256  # expressions by their parameters; calls by their keywords


class Call:
    """The checked keywords of a call, and what the kernels need to know of its expression."""

    __slots__ = (
        "backend", "batch_group", "built_in", "clamp", "class_group", "deferred", "entropy_weight", "expression",
        "gamma", "ignore_index", "inplace", "min_prob", "modules", "needs", "program", "recompute", "reduction",
        "terms", "variants",
    )  # fmt: skip

    @property
    def explicit(self) -> bool:
        """Whether somebody named the backend: then it takes protocols that nothing has verified here (trust.py)."""
        return self.backend != "auto" or os.environ.get("ANL_KERNELS_BACKEND", "auto") not in ("", "auto")

    def variant(self, **changes) -> Call:
        """This call with some fields changed; kept with it."""
        key = tuple(changes.items())
        if key not in self.variants:
            self.variants[key] = other = Call()
            for name in self.__slots__:
                setattr(other, name, changes.get(name, getattr(self, name)))
            other.program, other.modules, other.variants = None, {}, {}
        return self.variants[key]


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
            uses (README has the list).
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
        call = _known_call(expression, options)
    if class_group is not None:
        return sharded_loss(logits, target, weight, call)
    check_inputs(logits, target, weight, call.clamp)
    return registry.choose(logits, call).robust_loss(logits, target, weight, call)


robust_loss.__signature__ = inspect.signature(robust_loss)
robust_loss.__defaults__ = (None, None, None)  # logits may come as `input`; a missing target is then named below


def _known_call(expression: Algebra, options: tuple) -> Call:
    """The call of these keywords: checked when they are first seen, then kept with the expression."""
    if type(expression) is not Expression and isinstance(expression, Algebra):
        expression = expression.kept() if isinstance(expression, RowLoss) else _expression_of(expression)
    known = options, tuple(map(type, options))  # to tell True from 1
    try:
        return expression.calls[known]
    except (AttributeError, KeyError, TypeError):
        call = checked_call(expression, *options)
        call.expression = expression.without_calls()  # no cycle, which only the garbage collector would free
        if len(expression.calls) >= MAX_KEPT:
            expression.calls.clear()
        expression.calls[known] = call
        return call


def checked_call(
    expression,
    ignore_index,
    reduction,
    entropy_weight,
    min_prob,
    inplace,
    recompute,
    backend,
    class_group=None,
    batch_group=None,
) -> Call:
    if not isinstance(expression, Algebra):
        raise TypeError(f"expression must be a loss such as 5 * NCE() + NNCE(), got {type(expression).__name__}")
    if not isinstance(expression, Expression):
        expression = Expression(expression.terms_of())
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if type(ignore_index) is not int:
        if isinstance(ignore_index, (bool, Tensor)) or not hasattr(ignore_index, "__index__"):
            raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
        ignore_index = operator.index(ignore_index)
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be True or False, got {inplace!r}")
    if not (recompute is None or isinstance(recompute, bool)):
        raise TypeError(f"recompute must be True, False or None, got {recompute!r}")
    if backend != "auto":
        registry.check_name(backend, "backend")
    entropy_weight = number("entropy_weight", entropy_weight)
    min_prob = number("min_prob", min_prob)
    if not 0.0 < min_prob < 1.0:
        raise ValueError(f"min_prob must be between 0 and 1, got {min_prob:g}")
    if not -math.inf < entropy_weight < math.inf:
        raise ValueError(f"entropy_weight must be finite, got {entropy_weight}")
    if entropy_weight != 0.0 and reduction == "none":
        raise ValueError("the batch entropy couples the rows, so it has no value a row: use reduction='mean' or 'sum'")
    _check_group("class_group", class_group)
    _check_group("batch_group", batch_group)
    call = Call()
    call.expression = expression
    call.terms = [(term.kind, coef, *term.parameters) for coef, term in expression.terms]
    call.built_in, call.needs, call.gamma = expression.built_in, expression.needs, expression.gamma
    call.ignore_index, call.reduction, call.min_prob = ignore_index, reduction, min_prob
    # K * clamp must stay below 1, or a uniform row would be clamped; 0 for a loss that clamps nothing.
    call.clamp = min_prob if call.needs & (ABOVE | ABOVE_MASS | FOCAL_ABOVE) else 0.0
    call.entropy_weight, call.batch_group, call.class_group = entropy_weight, batch_group, class_group
    call.inplace, call.recompute, call.backend = inplace, recompute, backend
    call.deferred = bool(recompute) or reduction == "none" or entropy_weight != 0.0
    call.program, call.modules, call.variants = None, {}, {}  # filled by the backends and the choice among them
    return call


def _check_group(name: str, group) -> None:
    if group is None or (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        return
    raise ValueError(
        f"{name} must be a torch.distributed process group that this rank belongs to, got {type(group).__name__}"
    )


_SHARED = """

    Args:
        logits: (N, K), (K,) or (N, K, d1, ...), float16, bfloat16, float32 or float64.
        target: (N,), () or (N, d1, ...), class indices.
        weight, ignore_index, reduction, entropy_weight, min_prob, inplace, recompute, backend, class_group,
            batch_group, input: the keywords of `robust_loss`, whose documentation has shapes, results and errors."""


def _loss(function):
    """Documents the keywords that `function` hands on to robust_loss. Its logits may come as `input`."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [p for p in inspect.signature(robust_loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    function.__signature__ = inspect.Signature(own + shared, return_annotation=Tensor)
    function.__doc__ = function.__doc__.rstrip() + _SHARED
    function.__defaults__ = (None, None)
    return function


def _kept(build):
    """Keeps the expressions `build` makes, with their kernels' programs, by their parameters.

    Only sums of built-in terms with numbers: they hold nothing of the caller's.
    """
    known = {}

    def kept(*parameters):
        if torch.compiler.is_compiling():  # a compiled graph would guard on what is kept
            return build(*parameters)
        key = parameters, tuple(map(type, parameters))  # to tell True from 1
        try:
            return known[key]
        except (KeyError, TypeError):  # TypeError: no hash, so it is no number
            pass
        expression = build(*parameters)
        if expression.built_in:
            if len(known) >= MAX_KEPT:
                known.clear()
            known[key] = expression
        return expression

    return kept


@_kept
def _expression_of(term: Algebra) -> Expression:
    return Expression(term.terms_of())


@_kept
def _one(term_class, *parameters) -> Expression:
    return Expression(term_class(*parameters).terms_of())


@_kept
def _pair(alpha, first, beta, second, *parameters) -> Expression:
    alpha, beta = coefficient("alpha", alpha), coefficient("beta", beta)
    return Expression(((alpha, first(*parameters)), (beta, second(*parameters))))


@_loss
def anl_ce(logits: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 1.0, **options) -> Tensor:
    """Active negative loss on cross entropy: alpha NCE + beta NNCE. Ye et al., NeurIPS 2023.

    NCE = log p_y / sum_j log p_j, NNCE = 1 - (T + log p_y) / sum_j (T + log p_j), T = -log(min_prob), p clamped to
    min_prob in NNCE. Published (alpha, beta): MNIST 1, 1; CIFAR-10 5, 5; CIFAR-100 10, 1; WebVision 20, 1, each with an
    L1 penalty on the parameters (`l1_penalty`). alpha and beta are numbers, or tensors with one element, which get
    their gradient.
    """
    return robust_loss(logits, target, _pair(alpha, NCE, beta, NNCE), **options)


@_loss
def anl_fl(
    logits: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.5, **options
) -> Tensor:
    """Active negative loss on the focal loss: alpha NFL + beta NNFL. Ye et al., NeurIPS 2023.

    The focal weights (1 - p)^gamma are detached, as in the authors' code.
    """
    return robust_loss(logits, target, _pair(alpha, NFL, beta, NNFL, gamma), **options)


@_loss
def nce(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Normalized cross entropy: log p_y / sum_j log p_j. Ma et al., ICML 2020."""
    return robust_loss(logits, target, _one(NCE), **options)


@_loss
def nnce(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Normalized negative cross entropy: 1 - (T + log p_y) / sum_j (T + log p_j), p clamped to min_prob = exp(-T).

    Ye et al., NeurIPS 2023.
    """
    return robust_loss(logits, target, _one(NNCE), **options)


@_loss
def nfl(logits: Tensor, target: Tensor, *, gamma: float = 0.5, **options) -> Tensor:
    """Normalized focal loss: w_y log p_y / sum_j w_j log p_j, w = (1 - p)^gamma detached. Ma et al., ICML 2020."""
    return robust_loss(logits, target, _one(NFL, gamma), **options)


@_loss
def nnfl(logits: Tensor, target: Tensor, *, gamma: float = 0.5, **options) -> Tensor:
    """Normalized negative focal loss: 1 - (A + w_y log p_y) / sum_j (A + w_j log p_j), p clamped to min_prob.

    w = (1 - p)^gamma detached, A = -(1 - min_prob)^gamma log(min_prob). Ye et al., NeurIPS 2023.
    """
    return robust_loss(logits, target, _one(NNFL, gamma), **options)


@_loss
def cross_entropy(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Cross entropy: -log p_y, as F.cross_entropy with class indices (no label smoothing)."""
    return robust_loss(logits, target, _one(CE), **options)


@_loss
def focal(logits: Tensor, target: Tensor, *, gamma: float = 0.5, **options) -> Tensor:
    """Focal loss: -(1 - p_y)^gamma log p_y, the weight detached as in the ANL authors' code. Lin et al., 2017."""
    return robust_loss(logits, target, _one(FL, gamma), **options)


@_loss
def mae(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Mean absolute error, to its usual scale: 1 - p_y."""
    return robust_loss(logits, target, _one(MAE), **options)


@_loss
def rce(logits: Tensor, target: Tensor, *, floor: float = 1e-4, **options) -> Tensor:
    """Reverse cross entropy: -log(floor) sum_{k != y} max(p_k, min_prob). Wang et al., ICCV 2019."""
    return robust_loss(logits, target, _one(RCE, floor), **options)


@_loss
def sce(
    logits: Tensor, target: Tensor, *, alpha: float = 0.1, beta: float = 1.0, floor: float = 1e-4, **options
) -> Tensor:
    """Symmetric cross entropy: alpha CE + beta RCE. Wang et al., ICCV 2019 (CIFAR-10: 0.1, 1; CIFAR-100: 6, 0.1)."""
    return robust_loss(logits, target, _sce(alpha, beta, floor), **options)


@_kept
def _sce(alpha, beta, floor) -> Expression:
    return Expression(((coefficient("alpha", alpha), CE()), (coefficient("beta", beta), RCE(floor))))


@_loss
def gce(logits: Tensor, target: Tensor, *, q: float = 0.7, **options) -> Tensor:
    """Generalized cross entropy: (1 - p_y^q) / q. Zhang & Sabuncu, NeurIPS 2018."""
    return robust_loss(logits, target, _one(GCE, q), **options)


@_loss
def agce(logits: Tensor, target: Tensor, *, a: float = 0.6, q: float = 0.6, **options) -> Tensor:
    """Asymmetric generalized cross entropy: ((a + 1)^q - (a + p_y)^q) / q. Zhou et al., ICML 2021."""
    return robust_loss(logits, target, _one(AGCE, a, q), **options)


@_loss
def aul(logits: Tensor, target: Tensor, *, a: float = 5.5, q: float = 3.0, **options) -> Tensor:
    """Asymmetric unhinged loss: ((a - p_y)^q - (a - 1)^q) / q. Zhou et al., ICML 2021."""
    return robust_loss(logits, target, _one(AUL, a, q), **options)


@_loss
def ael(logits: Tensor, target: Tensor, *, a: float = 2.5, **options) -> Tensor:
    """Asymmetric exponential loss: exp(-p_y / a). Zhou et al., ICML 2021."""
    return robust_loss(logits, target, _one(AEL, a), **options)


def l1_penalty(parameters: Iterable[Tensor] | torch.nn.Module) -> Tensor:
    """Sum of |theta| over `parameters` (or a module's): ANL's term loss + delta * l1_penalty(model.parameters())."""
    if isinstance(parameters, torch.nn.Module):
        parameters = parameters.parameters()
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parts = [p.abs().sum(dtype=acc_dtype(p.dtype)) for p in parameters]
    return sum(parts[1:], start=parts[0]) if parts else torch.zeros(())
