"""The model of every kernel on several GPUs as a Markdown table (model.py prints it)."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from os import cpu_count

from counts import count
from predict import COPY, GPUS, SUSTAINED, Gpu, predict
from scenario import Case, host_build, launch_of
from walk import Lost

PIXELS = 512 * 512
SHAPES = (  # the losses with their gradient; about 2^27 logits or more
    Case(classes=10, rows=1 << 23),
    Case(classes=100, rows=1 << 20),
    Case(classes=1000, rows=1 << 17),
    Case(classes=10000, rows=1 << 14),
    Case(classes=32000, rows=1 << 14),
    Case(classes=128256, rows=1 << 13),
    Case(classes=262144, rows=1 << 12),
    Case(classes=21, rows=16 * PIXELS, pixels=PIXELS),
    Case(classes=128256, rows=1 << 13, gradient_alone=True),
)
FOCAL = ("anl_fl", (1000, 128256))  # a loss of the full kernels, for those numbers of classes
HEADINGS = (
    "GPU,kernel,dtype,loss,rows x classes,instructions a class,EX2,registers,threads x cluster,shared KB,warps an SM,"
    "KB in flight an SM,bound,us,share of a copy"
).split(",")
ABOUT = f"""# Model, not measured

What every kernel's warps issue, counted in the machine code of the GPU's architecture along the plain path
(tests/cuda_gates/walk.py), with everything of a row divided by its classes; and the time that follows: the largest of
several bounds (tests/cuda_gates/predict.py), with a copy at {100 * COPY:.0f} % of the data sheet's bandwidth and long
loops at {100 * SUSTAINED:.0f} % of the issue rate. No GPU was there. Written by `python tests/cuda_gates/model.py`.
rows_split reads a row up to three times, of which its memory bound counts one: the others find it in L2, whose
bandwidth is not in the model; nor are its tickets.
"""


def cases() -> list[Case]:
    found = [replace(case, dtype=dtype) for case in SHAPES for dtype in ("bfloat16", "float32")]
    loss, classes = FOCAL
    return found + [replace(c, loss=loss) for c in found if c.classes in classes and not c.gradient_alone]


@dataclass(frozen=True)
class Line:
    gpu: Gpu
    case: Case

    def __call__(self) -> tuple[str, ...]:
        case = replace(self.case, device=self.gpu.device)
        what = "gradient alone" if case.gradient_alone else case.loss
        shape = f"{case.rows} x {case.classes}" + " (pixels)" * (case.pixels > 1)
        kernel = launch_of(case).kernel.removesuffix("_kernel")
        head = (self.gpu.name, kernel, case.dtype, what, shape)
        try:
            counts = count(case, self.gpu.arch)
        except Lost as lost:
            return (*head, f"not found: {lost}", *[""] * (len(HEADINGS) - 6))
        p = predict(counts, self.gpu)
        memory = (counts.launch.shared_bytes + counts.kernel.shared) / 1024
        plan = f"{counts.launch.block} x {counts.launch.cluster}"
        counted = f"{counts.total:.1f}", f"{counts.opcode('MUFU.EX2'):.2f}", f"{counts.kernel.registers}"
        held = f"{memory:.1f}", f"{p.warps}", f"{p.in_flight / 1024:.0f}"
        return (*head, *counted, plan, *held, p.bound, f"{1e6 * p.seconds:.0f}", f"{100 * p.share:.0f} %")


def line(of: Line) -> tuple[str, ...]:
    return of()


def main(gpus=GPUS) -> None:
    host_build()
    lines = [Line(gpu, case) for gpu in gpus for case in cases()]
    with ProcessPoolExecutor(min(2, cpu_count() or 1)) as pool:
        rows = list(pool.map(line, lines))
    print(ABOUT)
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
