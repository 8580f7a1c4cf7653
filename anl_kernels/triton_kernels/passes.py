"""Which kernel makes the one pass over the logits, and its launch."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..trust import trusted
from . import autotune, launch, reduce
from .row_math import IN_SECOND_SWEEP, NUM_STATS
from .rows import loop_kernel, tile_kernel
from .scalar_math import runtime_numbers
from .split import FIELDS, split_kernel


class Pass(NamedTuple):
    """What a pass is to find: the terms' kinds (none: statistics), and the numbers that go with them."""

    kinds: tuple[int, ...]
    needs: int
    numbers: tuple[float, ...]


@lru_cache(maxsize=1024)
def terms_program(terms: tuple, min_prob: float, gamma: float, needs: int, exact: bool) -> Pass:
    return Pass(tuple(term[0] for term in terms), needs, runtime_numbers(terms, min_prob, gamma, exact))


class Split(NamedTuple):
    """How rows are split: parts of each, blocks of classes of each part, row blocks in a group.

    one_launch: programs wait for one another; else each phase is a launch of its own, of all row blocks.
    """

    parts: int
    blocks: int
    group: int
    one_launch: bool = True


class Plan(NamedTuple):
    """A kernel, its blocks, how many blocks of rows there are, and whether one program takes the whole batch."""

    kernel: object
    config: launch.LaunchConfig
    row_blocks: int
    whole: bool
    split: Split | None = None


ON_CHIP = 16384  # classes of a row that a program's registers hold
ON_CHIP_PIXELS = 32  # of a pixel, that a thread's hold
MAX_PARTS = 256
_FULL = 4  # programs that keep a multiprocessor busy


def plan_of(call, logits: Tensor, view: launch.View) -> Plan:
    """The plan for a call: programs wait for one another only where that is trusted."""
    shape = (view, logits.element_size(), launch.target_of(logits.device))
    p = plan(*shape)
    if p.split is None or "split" in trusted("triton", logits.device, call.explicit):
        return p
    return plan(*shape, may_wait=False)


@lru_cache(maxsize=4096)
def plan(view: launch.View, itemsize: int, target: launch.Target, may_wait: bool = True) -> Plan:
    spatial = view.CONTIGUOUS == 2
    shape = (view.lanes, view.num_classes, spatial, itemsize, target)
    if view.num_classes <= (ON_CHIP_PIXELS if spatial else ON_CHIP):
        return planned(tile_kernel, view, launch.choose_tile(*shape))
    p = planned(loop_kernel, view, launch.choose_loop(*shape))
    size = p.config.BLOCK_N * view.num_classes * itemsize
    if p.row_blocks >= target.num_sms and min(p.row_blocks, 2 * target.num_sms) * size <= target.l2_bytes // 2:
        return p
    if not may_wait and p.row_blocks >= _FULL * target.num_sms:
        return p  # the rows alone fill the device, and launches of their own would find no more of them in its cache
    p = split(view, p.config, max(1, target.l2_bytes // 4 // size), _FULL * target.num_sms)
    return p if may_wait else in_launches(p)


def planned(kernel, view: launch.View, config: launch.LaunchConfig) -> Plan:
    row_blocks = view.batches * launch.cdiv(view.lanes, config.BLOCK_N)
    return Plan(kernel, config, row_blocks, row_blocks == 1)


def split(view: launch.View, config: launch.LaunchConfig, group: int, programs: int) -> Plan:
    """Rows in groups of at most `group` blocks, each group split over about so many programs."""
    p = planned(split_kernel, view, config)
    group = min(group, p.row_blocks)
    all_blocks = launch.cdiv(view.num_classes, config.BLOCK_K)
    blocks = launch.cdiv(all_blocks, max(1, min(MAX_PARTS, programs // group)))
    return p._replace(split=Split(launch.cdiv(all_blocks, blocks), blocks, group))


def in_launches(p: Plan) -> Plan:
    """`p` with a launch for each phase: the same parts, so the same bits."""
    return p._replace(split=p.split._replace(one_launch=False))


def row_loss(spec: Pass, call, logits: Tensor, view, target, weight, grad, coefs) -> Tensor:
    """The loss, reduced; fills `grad` and `coefs` where given. logits, grad: as `view` (launch.View) has them."""
    ignore_index, reduction = call.ignore_index, call.reduction
    acc = torch.float64 if logits.dtype is torch.float64 else torch.float32
    if not target.numel():
        shape, value = (target.shape, 0.0) if reduction == "none" else ((), float("nan" if reduction == "mean" else 0))
        return logits.new_full(shape, value, dtype=acc)
    p = plan_of(call, logits, view)
    denominator = None
    if reduction == "mean" and not p.whole:
        denominator = reduce.denominator(target, ignore_index, weight, view.num_classes, acc)
    if reduction == "none":
        loss = logits.new_empty(target.shape, dtype=acc)
    else:
        loss = logits.new_empty((() if p.whole else p.row_blocks), dtype=acc)
    overwrites = grad is not None and grad.data_ptr() == logits.data_ptr()  # once only, then
    if autotune.enabled() and not overwrites and not p.whole and p.split is None:
        p = _tuned(p, spec, logits, view, target, ignore_index, weight, denominator, reduction, grad, coefs)
        if reduction != "none":
            loss = logits.new_empty(p.row_blocks, dtype=acc)
    _launch(p, spec, logits, view, target, ignore_index, weight, denominator, reduction, grad, loss, coefs)
    return loss if p.whole or reduction == "none" else reduce.reduce_sum(loss, denominator)


def _tuned(p, spec, logits, view, target, ignore_index, weight, denominator, reduction, grad, coefs) -> Plan:
    """`p` with the blocks that are the fastest for its kind of call. What is timed writes the results again."""
    acc = torch.float64 if logits.dtype is torch.float64 else torch.float32
    loss = logits.new_empty(max(target.numel(), p.row_blocks), dtype=acc)

    def run(config):
        q = planned(p.kernel, view, config)
        _launch(q, spec, logits, view, target, ignore_index, weight, denominator, reduction, grad, loss, coefs)

    device = launch.target_of(logits.device).name
    kind = autotune.kind_of(p.kernel.fn.__name__, view, logits.dtype, spec.needs, device)
    return planned(p.kernel, view, autotune.best(kind, autotune.candidates(p.config, view.num_classes), run))


def row_stats(spec: Pass, call, logits: Tensor, view, target) -> Tensor:
    """The table of statistics, (NUM_STATS, *target.shape), float64."""
    table = logits.new_empty((NUM_STATS.value, *target.shape), dtype=torch.float64)
    if target.numel():
        p = plan_of(call, logits, view)
        _launch(p, spec, logits, view, target, call.ignore_index, None, None, "none", None, None, table)
    return table


def _launch(p, spec, logits, view, target, ignore_index, weight, denominator, reduction, grad, loss, table):
    pointers = (logits, grad, target, weight, denominator, loss, table)
    args = (*pointers, spec.numbers, view.lanes, view.num_classes, target.numel(), *view.strides, ignore_index)
    vec = 1 if view.CONTIGUOUS == 2 else view.VEC
    constexprs = {"KINDS": spec.kinds, "NEEDS": spec.needs, "REDUCTION": reduction, "STATS": loss is None}
    constexprs |= {"WHOLE": p.whole, "CONTIGUOUS": view.CONTIGUOUS, "VEC": vec}
    if p.kernel is not tile_kernel:
        constexprs["LANES"] = _lanes(view, p.config.BLOCK_K)
    if p.split is not None:
        _launch_split(p, spec.needs, args, constexprs, logits)
    else:
        launch.launch_first(p.kernel, (p.row_blocks, 1, 1), args, constexprs, p.config, logits.device)


def _launch_split(p: Plan, needs: int, args: tuple, constexprs: dict, logits: Tensor) -> None:
    parts, blocks, group, one_launch = p.split
    acc = torch.float64 if logits.dtype is torch.float64 else torch.float32
    sums = logits.new_empty(p.row_blocks * FIELDS.value * parts * p.config.BLOCK_N, dtype=acc)
    counters, phases = None, 3 if needs & IN_SECOND_SWEEP.value else 2
    if one_launch:
        counters = logits.new_zeros(1 + 2 * p.row_blocks, dtype=torch.int32)
        launches = [(None, phases * (launch.cdiv(p.row_blocks, group) + phases - 1) * group * parts)]
    else:
        launches = [(phase, p.row_blocks * parts) for phase in range(phases)]
    args += (sums, counters, p.row_blocks, parts, blocks, group)
    for phase, programs in launches:
        compiled_in = {**constexprs, "PARTS": launch.power_of_2(parts), "PHASE": phase}
        launch.launch_first(split_kernel, (programs, 1, 1), args, compiled_in, p.config, logits.device)


def _lanes(view, BLOCK_K: int) -> int:
    """How many sums of its own a row has: neighbours that one thread loads at once share one."""
    return 1 if view.CONTIGUOUS == 2 else BLOCK_K // view.VEC
