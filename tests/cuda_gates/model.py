"""Instructions per class and a predicted time for every kernel, out of its machine code. Nothing is measured; no GPU.

    python tests/cuda_gates/model.py > benchmarks/results/cuda-model.md
    python tests/cuda_gates/model.py --dtype bfloat16 --loss anl_ce -K 128256 [-N 8192] [--arch 90] [--loops]

The second form compiles the kernel that csrc/cuda/select.cpp would take, for that dtype alone, and walks through it
(walk.py): everything of a row divided by its classes, on the plain path.
"""

from __future__ import annotations

import argparse

import table
from counts import DEVICE_OF_ARCH, Counts, count, loops_of
from predict import GPUS, predict, tail_seconds
from scenario import Case


def show(counts: Counts, with_loops: bool) -> None:
    case, launch, kernel = counts.case, counts.launch, counts.kernel
    pipes = ", ".join(f"{name} {n:.2f}" for name, n in counts.pipes().items())
    print(f"{kernel.name}, sm_{counts.arch}, {case.loss}, {case.rows} x {case.classes}")
    plan = f"{launch.grid} CTAs of {launch.block} threads, clusters of {launch.cluster}"
    memory = f"{launch.shared_bytes} + {kernel.shared} bytes of shared memory"
    print(f"  {plan}, {memory}, {kernel.registers} registers")
    exps = counts.opcode("MUFU.EX2")
    print(f"  instructions per class: {counts.total:.2f} ({pipes}); MUFU.EX2 {exps:.2f}")
    if gpu := next((gpu for gpu in GPUS if gpu.device == case.device), None):
        p = predict(counts, gpu)
        bounds = ", ".join(f"{name} {1e6 * s:.1f}" for name, s in sorted(p.bounds.items(), key=lambda x: -x[1])[:4])
        held = f"{p.resident} CTAs and {p.warps} warps an SM, {p.in_flight / 1024:.1f} KB in flight"
        print(f"  {gpu.name}: {held}; {100 * p.share:.0f} % of a copy; us: {bounds}")
        if not case.gradient_alone and launch.kernel != "rows_split_kernel":
            print(f"  the last CTA's tail: {1e6 * tail_seconds(counts, gpu):.1f} us")
    if with_loops:
        for where, share, what in loops_of(counts):
            print(f"  {share:7.2f}  {where}  {what}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-K", type=int, help="classes; without it, the table of all kernels")
    parser.add_argument("--gpu", help="one GPU's part of the table alone")
    parser.add_argument("-N", type=int, help="rows; else so many that there are 2^30 logits")
    parser.add_argument("--pixels", type=int, default=1, help="(N / pixels, K, pixels) instead of (N, K)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--loss", default="anl_ce")
    parser.add_argument("--gradient", action="store_true", help="the gradient alone, from saved coefficients")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--loops", action="store_true", help="by loop")
    options = parser.parse_args()
    if options.K is None:
        return table.main([gpu for gpu in GPUS if options.gpu in (None, gpu.name)])
    rows = options.N or max(1, (1 << 30) // options.K // options.pixels) * options.pixels
    device = DEVICE_OF_ARCH[options.arch]
    case = Case(options.dtype, options.loss, options.K, rows, options.pixels, device, options.gradient)
    show(count(case, options.arch), options.loops)


if __name__ == "__main__":
    main()
