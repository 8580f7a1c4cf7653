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

from .folds import asked, by_row, merged, neutral, size
from .row_math import (
    FIRST_BITS,
    FIRST_FOLDS,
    IN_SECOND_SWEEP,
    NUM_FIRST,
    NUM_SECOND,
    SECOND_BITS,
    SECOND_FOLDS,
    FirstSums,
    SecondSums,
    gradient_row,
    row_statistics,
    uniform_if,
)
from .rows import NUMBERS, first_sweep, gradient_sweep, merged_first, needs_second_sweep, second_sweep
from .scalar_math import constants, exp
from .tiles import (
    Outputs,
    layout_of,
    rows_of,
    target_logit,
    with_second,
    write_results,
    write_statistics,
    write_target_gradient,
)

# Fields of a part: FirstSums, z_y, SecondSums, whether the second sweep was made.
_Z_Y = tl.constexpr(NUM_FIRST.value)
_SECOND = tl.constexpr(_Z_Y.value + 1)
_SWEPT = tl.constexpr(_SECOND.value + NUM_SECOND.value)
FIELDS = tl.constexpr(_SWEPT.value + 1)


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
def store_part(p, part, i: tl.constexpr, value):
    BLOCK_N: tl.constexpr = value.shape[0]
    tl.store(p.sums + (i * p.parts + part) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None], value)


@triton.jit
def store_sums(p, part, START: tl.constexpr, sums, BITS: tl.constexpr, NEEDS: tl.constexpr):
    """The sums of a part, those that NEEDS asks for, as its fields START, START + 1, ..."""
    for i in tl.static_range(size(BITS)):
        if asked(BITS[i], NEEDS):
            store_part(p, part, START + i, sums[i])


@triton.jit
def load_parts(p, i: tl.constexpr, other, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """[BLOCK_N, PARTS]: the i-th field of every part."""
    part = tl.arange(0, PARTS)[None, :]
    pointers = p.sums + (i * p.parts + part) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    return tl.load(pointers, mask=part < p.parts, other=other)


@triton.jit
def load_sums(
    p,
    START: tl.constexpr,
    FOLDS: tl.constexpr,
    BITS: tl.constexpr,
    NEEDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What store_sums stored of every part, each [BLOCK_N, PARTS]."""
    sums = ()
    for i in tl.static_range(size(BITS)):
        value = tl.zeros([BLOCK_N, PARTS], p.sums.dtype.element_ty)
        if asked(BITS[i], NEEDS):
            value = load_parts(p, START + i, neutral(FOLDS[i]), BLOCK_N, PARTS)
        sums += (value,)
    return sums


@triton.jit
def load_statistics(p, rows, K, c, NEEDS: tl.constexpr, STATS: tl.constexpr, PARTS: tl.constexpr):
    """RowStatistics from every part's FirstSums, once they are there; SecondSums as row_statistics knows them."""
    BLOCK_N: tl.constexpr = rows.label.shape[0]
    wait(p.first_done, p.parts)
    z_y = by_row(tl.load(p.sums + _Z_Y * p.parts * BLOCK_N + tl.arange(0, BLOCK_N)))
    f = merged_first(FirstSums(*load_sums(p, 0, FIRST_FOLDS, FIRST_BITS, NEEDS, BLOCK_N, PARTS)), z_y, NEEDS)
    if STATS:
        f = uniform_if(rows.ignored, f, K)
    return row_statistics(f, z_y, c)


@triton.jit
def load_second(p, NEEDS: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """The rows' SecondSums, which every part has."""
    parts = load_sums(p, _SECOND, SECOND_FOLDS, SECOND_BITS, NEEDS, BLOCK_N, PARTS)
    return SecondSums(*merged(parts, SECOND_FOLDS, SECOND_BITS, NEEDS))


@triton.jit
def was_swept(p, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Whether the second phase made the second sweep, once every part is through with that phase."""
    wait(p.second_done, p.parts)
    return tl.min(by_row(tl.min(load_parts(p, _SWEPT, 1.0, BLOCK_N, PARTS), 1))) > 0.0


@triton.jit(do_not_specialize=[*NUMBERS, "row_blocks", "parts", "blocks", "group"])
def split_kernel(
    Logits_ptr,
    Grad_ptr,
    Target_ptr,
    Weight_ptr,
    Denominator_ptr,
    Loss_ptr,
    Table_ptr,
    numbers,
    lanes,
    K,
    num_rows,
    so,
    sk,
    si,
    gso,
    gsk,
    gsi,
    ignore_index,
    Sums_ptr,
    Counters_ptr,
    row_blocks,
    parts,
    blocks,
    group,
    KINDS: tl.constexpr,
    NEEDS: tl.constexpr,
    REDUCTION: tl.constexpr,
    STATS: tl.constexpr,
    WHOLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """loop_kernel with each block of BLOCK_N rows split into `parts` of `blocks` blocks of classes.

    Sums (row_blocks, FIELDS, parts, BLOCK_N): memory of the arithmetic's type. PARTS: a power of two, at least `parts`.
    One launch, PHASE None: Counters (1 + 2 row_blocks,): int32 zeros; grid: phases * (groups + phases - 1) * group *
    parts. Launches of one PHASE each, in their order: Counters None; grid: row_blocks * parts.
    """
    acc: tl.constexpr = tl.float64 if Logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    PHASES: tl.constexpr = 3 if IN_SECOND_SWEEP & NEEDS else 2
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
            f = first_sweep(rows, v, begin, end, z_y, NEEDS, CONTIGUOUS, LANES, BLOCK_K)
            store_sums(p, part, 0, f, FIRST_BITS, NEEDS)
            store_part(p, part, _Z_Y, z_y)
            publish(p.first_done)
        elif (phase == 1) & (PHASES == 3):
            s = load_statistics(p, rows, v.K, c, NEEDS, STATS, PARTS)
            swept = needs_second_sweep(rows.known, s, c, NEEDS)
            if swept:
                second = second_sweep(rows, v, begin, end, s, c, NEEDS, CONTIGUOUS, LANES, BLOCK_K)
                store_sums(p, part, _SECOND, second, SECOND_BITS, NEEDS)
            store_part(p, part, _SWEPT, tl.zeros([BLOCK_N, 1], acc) + swept.to(acc))
            publish(p.second_done)
        elif (part == 0) | (Grad_ptr is not None):
            s = load_statistics(p, rows, v.K, c, NEEDS, STATS, PARTS)
            second = s.second
            if PHASES == 3:
                if was_swept(p, BLOCK_N, PARTS):
                    second = load_second(p, NEEDS, BLOCK_N, PARTS)
            s = with_second(s, second)
            out = Outputs(Weight_ptr, Denominator_ptr, Loss_ptr, Table_ptr, num_rows.to(tl.int64))
            if STATS:
                write_statistics(rows, s, c, out, NEEDS)
            else:
                g = write_results(rows, s, c, numbers, out, block, part == 0, KINDS, NEEDS, REDUCTION, WHOLE)
                if Grad_ptr is not None:
                    r = gradient_row(g, exp(-s.log_sum), c)
                    gradient_sweep(rows, v, begin, end, s.first, r, NEEDS, CONTIGUOUS, BLOCK_K)
                    write_target_gradient(rows, v, g, begin, end)
