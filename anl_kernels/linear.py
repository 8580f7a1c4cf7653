"""The losses of a linear head, whose logits never exist in full.

A chunk of logits is made, turned into its gradient in its own memory by the one-pass kernel, and consumed by two matrix
products; then the next chunk takes its place. What a gradient has in common over the classes of a row is part of the
dense chunk and costs its products nothing: as a rank-1 update of its own it would cost two more passes over a (K, D)
matrix. Tiles of small softmax are not skipped: for normalized losses their gradient is small in each class, not in sum.

`_InForward` makes the gradient in forward, with three products in all. `_Statistics` keeps the rows' statistics alone
and makes the logits again in backward: four products, and any loss; by tiles of classes, if a few whole rows would not
fit into a chunk, or with classes split over processes, five where a loss needs the second sweep.

Second derivatives and forward mode go by the reference formulas, of all the logits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function

from . import class_parallel, functional, registry, slices
from .autograd import _keeps_graph, loss_of_table
from .backends import LaunchRefused, reference
from .class_parallel import Slice
from .derivatives import BATCHED_ONCE, by_formulas, differentiable, is_usual, times
from .layout import WITH_MEMORY, acc_dtype, bad_label, check_inputs, is_concrete, log_once, resolved
from .losses import NCE, NFL, NNCE, NNFL
from .reduction import mean_as_sum
from .statistics import NUM_STATS, coefficients, softmax_coefs
from .terms import Algebra

# A chunk's memory if the caller does not say: products of so many rows run near full speed at a million classes.
CHUNK_BYTES = {"cpu": 256 << 20}
GPU_CHUNK_BYTES = 1 << 30
MIN_ROWS = 32  # rows of a chunk; if so many whole rows do not fit into it, it holds some classes of more rows
TILE_ROWS = 512
BLOCK_BYTES = 16 << 20  # temporaries in float32 of a half precision chunk


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
        recompute: False: the gradient is made in forward, where the loss allows. True: forward keeps 13 numbers a row,
            and backward makes the logits again, a fourth product. None: False, but for float16, where a GradScaler's
            factor must come before rounding.
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
    call = functional.checked_call(loss, *options, class_group, batch_group)
    given = (input, weight, target, bias, class_weight)
    if has_torch_function(given):
        values = (bias, class_weight, *options[:4], recompute, backend, class_group, batch_group, max_chunk_bytes)
        keywords = dict(zip(linear_robust_loss.__kwdefaults__, values))
        return handle_torch_function(linear_robust_loss, given, input, weight, target, loss, **keywords)
    if class_group is not None:
        class_parallel.check_eager()
    share, kernels, dtype, failure = None, None, None, None
    try:
        _check_types(input, weight, bias, target, class_weight, max_chunk_bytes)
        input, weight, bias, target, class_weight = _in_memory(input, weight, bias, target, class_weight)
        if class_group is not None:
            class_parallel.check_eager(input, weight, bias, target, class_weight)
        elif _is_transformed(input, weight, bias, target, class_weight):
            return _unfused(input, weight, bias, target, loss, class_weight, call)
        dtype = _dtype(input, weight, bias)
        _check(input, weight, bias, target, class_weight)
        kernels = registry.choose(_logits_shape(input, dtype, max(2, len(weight))), call)
        check_inputs(_logits_shape(input, dtype, max(2, len(weight)), target.numel()), target.reshape(-1), None, 0.0)
    except Exception as error:
        if class_group is None:
            raise
        failure = error
    if class_group is None:
        share = Slice(None, 0, len(weight), len(weight), len(weight))
    else:
        share = _agree(input, weight, bias, target, class_weight, call, dtype, max_chunk_bytes, failure)
    labels = target.reshape(-1).long()  # 8 and 16 bits do not hold every class, nor ignore_index
    check_inputs(_logits_shape(input, dtype, share.classes, len(labels)), labels, None, call.clamp)
    if class_weight is not None and class_weight.shape != (share.classes,):
        raise ValueError(
            f"class_weight must be ({share.classes},), one number a class; got {tuple(class_weight.shape)}"
        )
    if kernels is reference and class_group is None:
        return _unfused(input, weight, bias, target, loss, class_weight, call)
    _check_labels(labels, call, share.classes)
    hidden, kept, labels = _kept_rows(input.reshape(-1, input.shape[-1]), labels, call)
    plan = _plan(len(labels), share.largest, dtype, hidden.device.type, max_chunk_bytes)
    job = _Job(call, kernels, plan, share, dtype)
    try:
        result = _head(_Matrices(hidden, weight, bias), labels, class_weight, job)
    except LaunchRefused as refused:
        if call.explicit or class_group is not None:
            raise
        log_once(f"{refused}; a linear head's logits are made in full")
        return _unfused(input, weight, bias, target, loss, class_weight, call)
    if reduction != "none":
        return result
    if kept is not None:
        result = result.new_zeros(target.numel()).index_copy(0, kept, result)
    return result.view(target.shape)


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


# ---- arguments


def _dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """What F.linear would compute in, here and now."""
    given = [x for x in (input, weight, bias) if x is not None]
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not for meta tensors
    if autocast and not any(x.dtype is torch.float64 for x in given):
        return torch.get_autocast_dtype(device)
    if len({x.dtype for x in given}) > 1:
        raise TypeError(f"input, weight and bias must have one dtype, got {', '.join(str(x.dtype) for x in given)}")
    return input.dtype


def _check_types(input, weight, bias, target, class_weight, max_chunk_bytes) -> None:
    tensors = dict(input=input, weight=weight, target=target, bias=bias, class_weight=class_weight)
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and (x is not None or name in ("input", "weight", "target")):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x is not None and (x.is_nested or x.layout is not torch.strided):
            raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    if class_weight is not None and not class_weight.is_floating_point():
        raise TypeError(f"class_weight must be floating point, got {class_weight.dtype}")
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError("class_weight is a constant of the loss, but it requires grad: pass class_weight.detach()")
    if max_chunk_bytes is not None and (isinstance(max_chunk_bytes, bool) or not isinstance(max_chunk_bytes, int)):
        raise TypeError(f"max_chunk_bytes must be an int, got {type(max_chunk_bytes).__name__}")
    if max_chunk_bytes is not None and max_chunk_bytes <= 0:
        raise ValueError(f"max_chunk_bytes must be a positive int, got {max_chunk_bytes}")


def _in_memory(input, weight, bias, target, class_weight) -> list:
    """The tensors with their values in memory; of those that wrap others, only DTensors are taken off."""
    named = dict(input=input, weight=weight, bias=bias, target=target, class_weight=class_weight)
    tracing = torch.compiler.is_compiling()  # the compiler has its own view of lazy tensors
    is_lazy = lambda x: not tracing and (x.is_neg() or x._is_zerotensor())
    if not any(x is not None and (type(x) not in WITH_MEMORY or is_lazy(x)) for x in named.values()):
        return list(named.values())
    hints = dict(
        input="give input.to_local(), with batch_group where the ranks have different rows",
        weight="give weight.full_tensor() (FSDP), or weight.to_local() with class_group=mesh.get_group() where the "
        "classes are split over it",
    )
    hints["bias"] = hints["weight"].replace("weight", "bias")
    return [class_parallel.replicated(name, resolved(x), hints.get(name)) for name, x in named.items()]


def _is_transformed(*tensors) -> bool:
    """Whether PyTorch must see the formulas, and so all the logits."""
    if is_concrete(*tensors):
        return by_formulas(*tensors[:3])
    transforms = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    when = "under torch.compile and torch.func" if transforms else "for tensor subclasses, dispatch modes and tracing"
    log_once(f"anl_kernels: {when} a linear head's logits are made in full")
    return True


def _check(input, weight, bias, target, class_weight) -> None:
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must be (..., D) and weight (K, D), got {tuple(input.shape)}, {tuple(weight.shape)}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have input's shape without the last dimension, {tuple(input.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias), ("target", target), ("class_weight", class_weight)):
        if x is not None and x.device != input.device:
            raise ValueError(f"input is on {input.device}, but {name} is on {x.device}: move one of them")


def _agree(input, weight, bias, target, class_weight, call, dtype, max_chunk_bytes, failure) -> Slice:
    mine = None
    if failure is None:
        grads = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (input, weight, bias)]
        settings = (input.shape[-1], max_chunk_bytes, grads)
        mine = class_parallel.header(len(weight), dtype, target, class_weight, call, *settings)
    share = class_parallel.agree(call.class_group, input, mine)
    if failure is not None:
        raise failure
    return share


def _logits_shape(input: Tensor, dtype: torch.dtype, classes: int, rows: int = 0) -> Tensor:
    """A tensor like the logits, without their memory."""
    return torch.empty((), dtype=dtype, device=input.device).expand(rows, classes)


def _check_labels(labels: Tensor, call, classes: int) -> None:
    if labels.device.type == "cpu":
        bad = (labels != call.ignore_index) & ((labels < 0) | (labels >= classes))
        if bad.any():
            raise bad_label(int(labels[bad][0]))


def _kept_rows(hidden: Tensor, labels: Tensor, call):
    """Rows and labels without the ignored ones, and where they were (None: all are there)."""
    valid = labels != call.ignore_index
    if hidden.device.type != "cpu":
        return hidden.masked_fill(~valid.unsqueeze(1), 0.0), None, labels
    if valid.all():
        return hidden, None, labels
    kept = valid.nonzero().squeeze(1)
    return hidden.index_select(0, kept), kept, labels[kept]


def _unfused(input, weight, bias, target, loss, class_weight, call) -> Tensor:
    logits = F.linear(input, weight, bias)
    result = functional.robust_loss(
        logits.reshape(-1, logits.shape[-1]), target.reshape(-1), loss, weight=class_weight,
        ignore_index=call.ignore_index, reduction=call.reduction, entropy_weight=call.entropy_weight,
        min_prob=call.min_prob, recompute=call.recompute, backend=call.backend, batch_group=call.batch_group,
    )  # fmt: skip
    return result.view(target.shape) if call.reduction == "none" else result


# ---- chunks


class _Plan(NamedTuple):
    rows: int  # of a chunk
    classes: int  # of a chunk; all of them, if its rows are whole


def _plan(num_rows: int, classes: int, dtype: torch.dtype, device: str, max_bytes: int | None) -> _Plan:
    fits = (max_bytes or CHUNK_BYTES.get(device, GPU_CHUNK_BYTES)) // dtype.itemsize  # logits
    rows = fits // max(classes, 1)
    if rows >= min(num_rows, MIN_ROWS):
        return _Plan(_even(num_rows, rows), classes)
    rows = _even(num_rows, min(TILE_ROWS, fits))
    return _Plan(rows, _even(classes, max(1, fits // rows)))


def _even(total: int, most: int) -> int:
    """The size of the fewest equal parts of at most `most`."""
    parts = -(-total // max(most, 1))
    return max(1, -(-total // max(parts, 1)))


def _spans(total: int, size: int):
    """(begin, end) of parts of at most `size`; one empty part if there is nothing."""
    return [(begin, min(total, begin + size)) for begin in range(0, max(total, 1), size)]


class _Matrices(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (K, D)
    bias: Tensor | None  # (K,)


class _Job(NamedTuple):
    call: object
    kernels: object
    plan: _Plan
    share: Slice
    dtype: torch.dtype  # of the logits


class _Products:
    """Makes chunks of logits, and takes their gradients to those of the matrices. All chunks share one buffer."""

    def __init__(self, matrices: _Matrices, job: _Job, needs=(False, False, False)):
        self.given, self.plan, self.share = matrices, job.plan, job.share
        self.hidden, self.weight, self.bias = (None if x is None else x.detach().to(job.dtype) for x in matrices)
        self.acc = acc_dtype(job.dtype)
        rows, classes = self.plan
        self.buffer = self.hidden.new_empty(min(rows, len(self.hidden)) * min(classes, len(self.weight)))
        in_tiles = classes < len(self.weight)
        dtypes = (self.acc if in_tiles else job.dtype, self.acc, self.acc)
        # Every element of the gradients is written by the first chunk that has it.
        self.grads = [
            x.new_empty(x.shape, dtype=dtype) if need else None for x, need, dtype in zip(matrices, needs, dtypes)
        ]

    def rows(self):
        return _spans(len(self.hidden), self.plan.rows) if len(self.hidden) else []

    def tiles(self, rows):
        """((begin, end), logits) over the classes; the logits until the next are made."""
        for tile in _spans(len(self.weight), self.plan.classes):
            yield tile, self.logits(rows, tile)

    def logits(self, rows, tile) -> Tensor:
        x, w = self.hidden[slice(*rows)], self.weight[slice(*tile)]
        out = self.buffer[: len(x) * len(w)].view(len(x), len(w))
        if self.bias is None:
            return torch.mm(x, w.t(), out=out)
        return torch.addmm(self.bias[slice(*tile)], x, w.t(), out=out)

    def add(self, grad: Tensor, rows, tile) -> None:
        """The gradient of the chunk of these rows and classes."""
        by_hidden, by_weight, by_bias = self.grads
        x, w = self.hidden[slice(*rows)], self.weight[slice(*tile)]
        if by_hidden is not None:
            _add_product(by_hidden[slice(*rows)], grad, w, tile[0] == 0)
        if by_weight is not None:
            _add_product(by_weight[slice(*tile)], grad.t(), x, rows[0] == 0)
        if by_bias is not None:
            total = grad.sum(0, dtype=self.acc)
            part = by_bias[slice(*tile)]
            part.copy_(total) if rows[0] == 0 else part.add_(total)

    def finished(self) -> list[Tensor | None]:
        """The gradients in the dtypes of what they are of."""
        if not len(self.hidden):
            for grad in self.grads:
                grad is None or grad.zero_()
        by_hidden = self.grads[0]
        if by_hidden is not None and self.share.group is not None:
            by_hidden = by_hidden.to(self.acc)
            torch.distributed.all_reduce(by_hidden, group=self.share.group)
            self.grads[0] = by_hidden
        return [None if grad is None else grad.to(x.dtype) for grad, x in zip(self.grads, self.given)]


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a @ b, or += where it is not the first; summed in out's dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
        return
    if a.device.type == "cuda" and torch.version.hip is None:  # half precision in, float32 out
        for begin, end in _spans(len(out), max(1, BLOCK_BYTES // (4 * b.shape[1]))):
            part, product = out[begin:end], torch.mm(a[begin:end], b, out_dtype=out.dtype)
            part.copy_(product) if first else part.add_(product)
        return
    size = max(1, BLOCK_BYTES // (4 * max(b.shape[1], min(a.shape))))
    if len(a) < a.shape[1]:  # the longer of the two is cut: what is summed over, or the rows of the result
        for begin, end in _spans(a.shape[1], size):
            left, right = a[:, begin:end].to(out.dtype), b[begin:end].to(out.dtype)
            torch.mm(left, right, out=out) if first and begin == 0 else out.addmm_(left, right)
        return
    b = b.to(out.dtype)
    for begin, end in _spans(len(out), size):
        part, left = out[begin:end], a[begin:end].to(out.dtype)
        torch.mm(left, b, out=part) if first else part.addmm_(left, b)


# ---- autograd


def _head(matrices: _Matrices, labels: Tensor, class_weight: Tensor | None, job: _Job) -> Tensor:
    """The loss, reduced, of rows of which none is ignored (on a CPU)."""
    call = job.call
    differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in matrices)
    at_once = call.recompute is False or (call.recompute is None and job.dtype is not torch.float16)
    whole = job.share.group is None and job.plan.classes == job.share.size
    simple = call.built_in and not call.entropy_weight and whole
    if simple and not differentiate:
        at_once = True
    if simple and at_once and (call.reduction != "none" or not differentiate):
        nothing = None
        if call.reduction == "mean":
            acc = acc_dtype(job.dtype)
            class_weight, nothing = mean_as_sum(labels, class_weight, call, job.share.classes, acc)
            job = job._replace(call=call.variant(reduction="sum"))
        loss = _InForward.apply(*matrices, labels, class_weight, job)
        return loss if nothing is None else loss + nothing
    table, sums = _Statistics.apply(*matrices, labels, job)
    return loss_of_table(table, sums, labels, class_weight, call, acc_dtype(job.dtype), job.share.classes)


def _eagerly(backward):
    """`backward`, left to Python where compiled autograd would trace it: its graph would break at every kernel."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        run_it = torch.compiler.disable(backward) if torch.compiler.is_compiling() else backward
        return run_it(ctx, *grads)

    return run


def _of_needed(job, matrices: _Matrices, needs, of_logits):
    """(formulas, inputs): `of_logits` of all the logits, as a function of those matrices that need a gradient."""

    def formulas(*inputs):
        given = iter(inputs)
        chosen = [next(given) if need else x for x, need in zip(matrices, needs)]
        with torch.autocast(matrices.hidden.device.type, enabled=False):
            return of_logits(F.linear(*(None if x is None else x.to(job.dtype) for x in chosen)))

    return formulas, [x for x, need in zip(matrices, needs) if need]


def _spread(grads, needs) -> list:
    """The gradients of what needs one, with None for what does not."""
    grads = iter(grads)
    return [next(grads) if need else None for need in needs]


class _InForward(Function):
    """The sum of the rows' losses ("none": each of them, without a gradient), the gradients made on the way."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, class_weight, job):
        ctx.job, kernels, losses = job, job.kernels, []
        needs = ctx.needs_input_grad[:3]
        call = job.call.variant(inplace=True) if any(needs) else job.call
        with torch.autocast(hidden.device.type, enabled=False):
            products = _Products(_Matrices(hidden, weight, bias), job, needs)
            for rows in products.rows():
                for tile, logits in products.tiles(rows):
                    grad = logits if any(needs) else None
                    losses.append(kernels.row_loss(call, logits, labels[slice(*rows)], class_weight, grad, None))
                    if any(needs):
                        products.add(grad, rows, tile)
            grads = products.finished()
        # The matrices are for second derivatives.
        ctx.save_for_backward(hidden, weight, bias, labels, class_weight, *(g for g in grads if g is not None))
        acc = acc_dtype(job.dtype)
        if call.reduction == "none":
            return torch.cat(losses) if losses else hidden.new_empty(0, dtype=acc)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for loss in losses:
            total += loss
        return total.to(acc)

    @staticmethod
    @_eagerly
    def backward(ctx, grad_output):
        hidden, weight, bias, labels, class_weight, *grads = ctx.saved_tensors
        job, needs, usual = ctx.job, ctx.needs_input_grad[:3], is_usual(grad_output)
        again = torch.is_grad_enabled()
        if usual:  # autograd may take the memory as .grad, unless the graph is kept
            keep = again or _keeps_graph()
            grads = [job.kernels.scaled(grad, grad_output.detach(), keep) for grad in grads]
        if again:
            of_logits = lambda logits: reference.loss_by_formulas(logits, labels, class_weight, job.call)
            formulas, inputs = _of_needed(job, _Matrices(hidden, weight, bias), needs, of_logits)
            seed = grad_output if usual else torch.ones((), dtype=acc_dtype(job.dtype), device=labels.device)
            grads = differentiable([grad.detach() for grad in grads], formulas, inputs, [seed])
        if not usual:
            grads = [times(grad, grad_output, 1) for grad in grads]
        return *_spread(grads, needs), None, None, None


class _Statistics(Function):
    """The rows' table (NUM_STATS, N) and, for the entropy, the column sums of p over this process's classes."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, job):
        call, kernels = job.call, job.kernels
        ctx.job, acc = job, acc_dtype(job.dtype)
        table = torch.empty((NUM_STATS, len(labels)), dtype=torch.float64, device=hidden.device)
        sums = torch.zeros(len(weight) if call.entropy_weight else 0, dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            products = _Products(_Matrices(hidden, weight, bias), job)
            for rows in products.rows():
                tiles = _tiles(products, rows)
                some = slice(*rows)
                table[:, some] = _table(job, labels[some], tiles)
                if call.entropy_weight:
                    coefs = torch.stack(softmax_coefs(table[:, some])).to(acc)
                    for (begin, end), logits in tiles():
                        if end > begin:
                            sums[begin:end] += kernels.column_sums(logits, coefs)
        ctx.save_for_backward(hidden, weight, bias, labels, table)
        return table, sums

    @staticmethod
    @_eagerly
    def backward(ctx, partials, g):
        *matrices, labels, table = ctx.saved_tensors
        job, call, needs = ctx.job, ctx.job.call, ctx.needs_input_grad[:3]
        matrices = _Matrices(*matrices)
        cotangents = [resolved(partials), resolved(g)] if call.entropy_weight else [resolved(partials)]
        if job.share.group is not None:
            class_parallel.check_once(*cotangents)
        if not all(map(is_usual, cotangents)):
            if torch.is_grad_enabled():
                raise RuntimeError(BATCHED_ONCE)
            return *_batched_gradients(job, matrices, labels, table, *cotangents, needs=needs), None, None
        grads = _gradients(job, matrices, labels, table, *cotangents, needs=needs)
        if torch.is_grad_enabled():
            of_logits = lambda logits: reference.stats_by_formulas(logits, labels, call)
            formulas, inputs = _of_needed(job, matrices, needs, of_logits)
            grads = _spread(differentiable([x for x in grads if x is not None], formulas, inputs, cotangents), needs)
        return *grads, None, None


def _gradients(job, matrices, labels, table, partials, g=None, *, needs):
    """The gradients by the matrices, from those by the table and the column sums of p (g), chunk by chunk."""
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        coefs = coefficients(table, partials, job.call, acc_dtype(job.dtype))
        products = _Products(matrices, job, needs)
        for rows in products.rows():
            some = slice(*rows)
            for tile, grad in _by_tiles(job, _tiles(products, rows), labels[some], coefs[:, some].contiguous(), g):
                products.add(grad, rows, tile)
        return products.finished()


def _batched_gradients(job, matrices, labels, table, partials, g=None, *, needs):
    """The same for many gradients at once (is_grads_batched), of all the logits: each would be a matrix of its own."""
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        acc = acc_dtype(job.dtype)
        hidden, weight, bias = (None if x is None else x.detach().to(job.dtype) for x in matrices)
        coefs = coefficients(table, partials, job.call, acc)
        grad = reference.gradient(job.call, F.linear(hidden, weight, bias), labels, coefs, g).to(acc)
        makers = (lambda: grad @ weight.to(acc), lambda: grad.transpose(0, 1) @ hidden.to(acc), lambda: grad.sum(0))
        return [make().to(x.dtype) if need else None for make, x, need in zip(makers, matrices, needs)]


def _tiles(products: _Products, rows):
    """A function that yields the tiles of these rows, made again for every sweep unless there is but one."""
    if products.plan.classes < len(products.weight):
        return lambda: products.tiles(rows)
    made = list(products.tiles(rows))
    return lambda: made


def _is_whole(job: _Job) -> bool:
    """Whether a chunk holds whole rows, so that the kernels for these serve."""
    return job.share.group is None and job.plan.classes >= job.share.size and job.kernels is not reference


def _table(job: _Job, labels: Tensor, tiles) -> Tensor:
    if _is_whole(job):
        ((_, logits),) = tiles()
        return job.kernels.row_stats(job.call, logits, labels)
    starts = lambda: ((begin, logits) for (begin, _), logits in tiles())
    return class_parallel.row_table(job.kernels, job.call, job.share, labels, starts)


def _by_tiles(job: _Job, tiles, labels: Tensor, coefs: Tensor, g: Tensor | None):
    """((begin, end), gradient) of the tiles of some rows, from their coefficients; g: of the column sums of p."""
    kernels, call, share = job.kernels, job.call, job.share
    inplace = call.variant(inplace=True)
    if _is_whole(job):
        ((tile, logits),) = tiles()
        entropy = None if g is None else (g, g.new_ones(()))
        yield tile, kernels.row_grad(inplace, logits, labels, coefs, None, entropy)
        return
    mean = None
    if g is not None:
        parts = [slices.moments(logits, coefs, g[slice(*tile)]) for tile, logits in tiles()]
        mean = class_parallel.mean_over_classes(slices.added(torch.stack(parts)), share.group)
    valid = labels != call.ignore_index
    for (begin, end), logits in tiles():
        local = slices.local_labels(labels, valid, share.start + begin, end - begin)
        if g is None:
            yield (begin, end), slices.grad(kernels, inplace, logits, local, coefs)
        else:
            yield (begin, end), slices.grad(kernels, call, logits, local, coefs, (g[begin:end], mean))
