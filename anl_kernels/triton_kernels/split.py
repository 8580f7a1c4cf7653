"""The one pass over few rows of many classes: each row is split over programs.

The work is a list of items (phase, row block, part): the first sweep, the second where it is needed, and the end, which
writes losses and gradients. An item needs what the items of its rows' phase before have found. Sums of parts are merged
in the order of the parts: the same bits in every run, and both ways.

In one launch an item waits for those it needs. Programs take items in the order of a counter, the ticket, and the order
is such that what an item waits for has a smaller ticket, so was begun: nobody can wait for a program that is not
running. Row blocks go in groups, so few that their logits are still in the second-level cache when the next phase reads
them. Step t has the first phase of group t, the second of group t - 1, the end of group t - 2.

Where programs are not trusted to wait for one another, every phase is a launch of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .math import _INF, SecondSums, by_row, closed_form, constants, exp, gradient_row, merged_second, with_second
from .rows import (
    _NUMBERS,
    FirstSums,
    Outputs,
    first_statistics,
    first_sweep,
    gradient_sweep,
    layout_of,
    merged_first,
    needs_second_sweep,
    poison_of,
    rows_of,
    second_sweep,
    target_logit,
    write_results,
    write_statistics,
    write_target_gradient,
)

FIELDS = tl.constexpr(14)  # of a part: 5 sums of the first sweep and z_y, 7 sums of the second, whether it was made
_SWEPT = tl.constexpr(13)


class Parts(NamedTuple):
    """Memory in which the programs of a row block meet."""

    sums: tl.tensor  # pointer to (FIELDS, parts, BLOCK_N)
    first_done: tl.tensor  # pointers to counters; None where every phase is a launch of its own
    second_done: tl.tensor
    parts: tl.tensor


@triton.jit
def publish(pointer):
    """What this program has written is there for all who see the counter rise."""
    if pointer is not None:
        tl.debug_barrier()
        tl.atomic_add(pointer, 1, sem="release")


@triton.jit
def wait(pointer, count):
    """Until `count` programs have published."""
    if pointer is not None:
        done = tl.atomic_add(pointer, 0, sem="acquire")
        while done < count:
            done = tl.atomic_add(pointer, 0, sem="acquire")
        tl.debug_barrier()


@triton.jit
def store_part(p, part, i: tl.constexpr, value, BLOCK_N: tl.constexpr):
    tl.store(p.sums + (i * p.parts + part) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None], value)


@triton.jit
def load_parts(p, i: tl.constexpr, other, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """[BLOCK_N, PARTS]: the i-th field of every part."""
    part = tl.arange(0, PARTS)[None, :]
    pointers = p.sums + (i * p.parts + part) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    return tl.load(pointers, mask=part < p.parts, other=other)


@triton.jit
def load_first(p, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """The rows' FirstSums, and z_y, once every part has them."""
    wait(p.first_done, p.parts)
    z_y = by_row(tl.load(p.sums + 5 * p.parts * BLOCK_N + tl.arange(0, BLOCK_N)))
    parts = FirstSums(
        load_parts(p, 0, -_INF, BLOCK_N, PARTS), load_parts(p, 1, _INF, BLOCK_N, PARTS),
        load_parts(p, 2, 0.0, BLOCK_N, PARTS), load_parts(p, 3, 0.0, BLOCK_N, PARTS),
        load_parts(p, 4, 0.0, BLOCK_N, PARTS),
    )  # fmt: skip
    return merged_first(parts, z_y), z_y


@triton.jit
def load_second(p, NEEDS: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """The rows' SecondSums, which every part has."""
    parts = SecondSums(
        load_parts(p, 6, 0.0, BLOCK_N, PARTS), load_parts(p, 7, 0.0, BLOCK_N, PARTS),
        load_parts(p, 8, 0.0, BLOCK_N, PARTS), load_parts(p, 9, 0.0, BLOCK_N, PARTS),
        load_parts(p, 10, 0.0, BLOCK_N, PARTS), load_parts(p, 11, 0.0, BLOCK_N, PARTS),
        load_parts(p, 12, 0.0, BLOCK_N, PARTS),
    )  # fmt: skip
    return merged_second(parts, NEEDS)


@triton.jit
def was_swept(p, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Whether the second phase made the second sweep, once every part is through with that phase."""
    wait(p.second_done, p.parts)
    return tl.min(by_row(tl.min(load_parts(p, _SWEPT, 1.0, BLOCK_N, PARTS), 1))) > 0.0


@triton.jit(do_not_specialize=[*_NUMBERS, "row_blocks", "parts", "blocks", "group"])
def split_kernel(
    Logits_ptr, Grad_ptr, Target_ptr, Weight_ptr, Denominator_ptr, Loss_ptr, Table_ptr, numbers,
    lanes, K, num_rows, so, sk, si, gso, gsk, gsi, ignore_index,
    Sums_ptr, Counters_ptr, row_blocks, parts, blocks, group,
    KINDS: tl.constexpr, NEEDS: tl.constexpr, REDUCTION: tl.constexpr, STATS: tl.constexpr, WHOLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, PHASE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """loop_kernel with each block of BLOCK_N rows split into `parts` of `blocks` blocks of classes.

    Sums (row_blocks, FIELDS, parts, BLOCK_N): memory of the arithmetic's type. PARTS: a power of two, at least `parts`.
    One launch, PHASE None: Counters (1 + 2 row_blocks,): int32 zeros; grid: phases * (groups + phases - 1) * group *
    parts. Launches of one PHASE each, in their order: Counters None; grid: row_blocks * parts.
    """
    acc: tl.constexpr = tl.float64 if Logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    PHASES: tl.constexpr = 2 if NEEDS == 0 else 3
    if PHASE is None:
        item = tl.atomic_add(Counters_ptr, 1, sem="relaxed")
        part = item % parts
        place = item // parts
        phase = place // group % PHASES
        turn = place // group // PHASES - phase  # which group
        block = turn * group + place % group
        first_done = Counters_ptr + 1 + block
        second_done = first_done + row_blocks
    else:
        part = tl.program_id(0) % parts
        block = tl.program_id(0) // parts
        phase, turn = PHASE, 0
        first_done, second_done = None, None
    if (turn >= 0) & (block < row_blocks):
        v = layout_of(lanes, K, so, sk, si, gso, gsk, gsi, CONTIGUOUS, VEC)
        rows = rows_of(block, v, Logits_ptr, Grad_ptr, Target_ptr, ignore_index, BLOCK_N)
        begin = part * blocks * BLOCK_K
        end = tl.minimum(v.K, begin + blocks * BLOCK_K)
        c = constants(numbers, acc)
        sums = Sums_ptr + block.to(tl.int64) * (FIELDS * parts * BLOCK_N)
        p = Parts(sums, first_done, second_done, parts)
        if phase == 0:
            z_y = target_logit(rows, v, acc)
            f = merged_first(first_sweep(rows, v, begin, end, acc, CONTIGUOUS, LANES, BLOCK_N, BLOCK_K), z_y)
            fields = (f.max, f.low, f.tail, f.gap, f.count, z_y)
            for i in tl.static_range(6):
                store_part(p, part, i, fields[i], BLOCK_N)
            publish(p.first_done)
        elif (phase == 1) & (NEEDS > 0):
            f, z_y = load_first(p, BLOCK_N, PARTS)
            s = first_statistics(rows, f.max, f.tail, f.gap, f.count, z_y, v.K, STATS)
            swept = needs_second_sweep(rows, f, s, c, NEEDS)
            if swept:
                second = second_sweep(rows, v, begin, end, f.max, s, c, acc, NEEDS, CONTIGUOUS, LANES, BLOCK_N, BLOCK_K)
                for i in tl.static_range(7):
                    store_part(p, part, 6 + i, second[i], BLOCK_N)
            store_part(p, part, _SWEPT, swept.to(acc), BLOCK_N)
            publish(p.second_done)
        elif (part == 0) | (Grad_ptr is not None):
            f, z_y = load_first(p, BLOCK_N, PARTS)
            s = first_statistics(rows, f.max, f.tail, f.gap, f.count, z_y, v.K, STATS)
            second = closed_form(s, f.gap, c)
            if NEEDS > 0:
                if was_swept(p, BLOCK_N, PARTS):
                    second = load_second(p, NEEDS, BLOCK_N, PARTS)
            s = with_second(s, second)
            out = Outputs(Weight_ptr, Denominator_ptr, Loss_ptr, Table_ptr, num_rows.to(tl.int64))
            if STATS:
                write_statistics(rows, s, f.max, c, out, NEEDS)
            else:
                g = write_results(rows, s, f.max, c, numbers, out, block, part == 0, KINDS, NEEDS, REDUCTION, WHOLE)
                if Grad_ptr is not None:
                    r = gradient_row(g, s.log_sum, exp(-s.log_sum), c)
                    gradient_sweep(
                        rows, v, begin, end, f, r, poison_of(rows, s), acc, NEEDS, CONTIGUOUS, BLOCK_N, BLOCK_K
                    )
                    write_target_gradient(rows, v, g, begin, end)
