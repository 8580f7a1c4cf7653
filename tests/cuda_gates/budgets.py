"""What a class may cost on an H200: instructions, exps, bytes in flight, and the loss sum's tail.

`most` is what test_budgets.py demands today. Where that is more than `must`, the kernel is still too slow: lower it
with the kernel, down to `must` and then to `aim`. The other limits likewise: 40 KB in flight, a tail of 2 us.
"""

from __future__ import annotations

from dataclasses import dataclass

from scenario import Case

LEAST_KB = 40.0  # in flight on a multiprocessor


@dataclass(frozen=True)
class Budget:
    name: str
    kernel: str
    case: Case
    most: float  # instructions per class, with everything of a row: today's limit
    must: float
    aim: float
    most_mufu: float = 3.0  # of a class
    most_tail: float = 2.0  # us


PIXELS = 512 * 512
BUDGETS = (
    Budget("cluster", "rows_cluster_kernel", Case(classes=128256), 20, 20, 15),
    Budget("cluster float32", "rows_cluster_kernel", Case("float32", classes=128256), 24, 24, 18),
    Budget("block", "rows_block_kernel", Case(classes=10000, rows=1 << 14), 24, 24, 18),
    Budget("split", "rows_split_kernel", Case(classes=2_000_000, rows=128), 22, 24, 18),
    Budget("small 1000", "rows_small_kernel", Case(classes=1000, rows=1 << 17), 22, 28, 20),
    Budget("small 2001", "rows_small_kernel", Case(classes=2001, rows=1 << 16), 23, 28, 20),
    Budget("small 100", "rows_small_kernel", Case(classes=100, rows=1 << 20), 28, 40, 28),
    Budget("small 10", "rows_small_kernel", Case(classes=10, rows=1 << 23), 95, 120, 60, 4),
    Budget("spatial 21", "spatial_kernel", Case(classes=21, rows=16 * PIXELS, pixels=PIXELS), 50, 50, 32),
    Budget("spatial 150", "spatial_kernel", Case(classes=150, rows=4 * PIXELS, pixels=PIXELS), 30, 50, 32),
    Budget(
        "spatial gradient",
        "spatial_gradient_kernel",
        Case(classes=21, rows=16 * PIXELS, pixels=PIXELS, gradient_alone=True),
        *(36, 40, 20),
    ),
    Budget("gradient", "rows_gradient_kernel", Case(classes=128256, gradient_alone=True), 12, 12, 8),
    Budget("gradient 1000", "rows_gradient_kernel", Case(classes=1000, rows=1 << 17, gradient_alone=True), 10, 12, 8),
    Budget("cluster ANL-FL", "rows_cluster_kernel", Case(loss="anl_fl", classes=128256), 32, 32, 24, 3.1),
)
# Other paths that have as much in flight.
ENOUGH_IN_FLIGHT = (
    *(Case(dtype, classes=2, rows=1 << 26, gradient_alone=True) for dtype in ("bfloat16", "float32")),
    Case("bfloat16", "anl_ce", 257, 1 << 18, gradient_alone=True),
    Case("bfloat16", "anl_fl", 1000, 1 << 17, gradient_alone=True),
    Case("bfloat16", "anl_fl", 21, 16 * PIXELS, PIXELS, gradient_alone=True),
    Case("float32", "anl_ce", 150, 4 * PIXELS, PIXELS, gradient_alone=True),
    Case("float32", "anl_ce", 150, 4 * PIXELS, PIXELS),
    Case("bfloat16", "anl_ce", 1000, PIXELS, PIXELS),
    Case("bfloat16", "anl_fl", 150, 4 * PIXELS, PIXELS),
)
# Paths that have less, and that take several times as long for their instructions: pixels of few classes, and 16-bit
# ones of which no two are an aligned word (images of odd sizes). To ask for the next tiles ahead, from memory into L2,
# would add instructions to what instructions bind.
ODD = 513 * 513
BOUND_BY_INSTRUCTIONS = (
    *(Case(dtype, "anl_ce", 2, 128 * PIXELS, PIXELS) for dtype in ("bfloat16", "float32")),
    Case("bfloat16", "anl_fl", 12, 32 * PIXELS, PIXELS),
    Case("bfloat16", "anl_ce", 21, 16 * ODD, ODD),
    Case("bfloat16", "anl_ce", 150, 4 * ODD, ODD),
)
MOST_AWAITED = 0.25  # of their time, what the bytes in flight would take
# (dtype, least share of a copy) -> classes, of 2^28 logits or some more: where plans change, and where classes are odd.
SHARES = {
    ("bfloat16", 0.85): (
        *(1000, 1001, 1106, 1501, 2445, 2800, 4001, 5113, 5915),
        *(8193, 14001, 24577, 50257, 128256, 262144),
    ),
    ("float32", 0.92): (1000, 1001, 2501, 4097, 10001, 16384, 20001, 50257, 128256, 262144),
}
MOST_GPU_MEMBARS = 0  # in rows_cluster's loops
