"""The protocols between CTAs (anl_kernels/trust.py), verified on this machine's GPU.

Each one runs in a process of its own with a time limit: one that hangs, or kills the context, costs that process.
"""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import anl_kernels as ak

from .. import formulas, trust
from ..backends import cuda, triton
from . import check, workloads

COMMAND = [sys.executable, "-m", "anl_kernels"]
SECONDS = 300  # of the process of one protocol, in which Triton may compile dozens of kernels
NEVER_USED = 3  # its exit code where no call on this GPU takes the protocol
ROWS = (1, 3, 300, 4096)
CLASSES = (64, 403, 1000, 3001, 10_007, 32_000, 50_257, 128_256, 300_001, 1_000_003)
ELEMENTS = 1 << 24  # of the logits of one case: the float64 formulas make ten times as many
CASES = 3  # of each kernel and dtype
DTYPES = ("fp32", "bf16")
LOSSES = ("ANL-CE", "ANL-FL", "2 NCE + 3 RCE + AGCE")
SLACK = 4  # times the tolerance of `check`, whose rows are a thousandth as long; a broken protocol is far beyond
REPEATS = 4  # the same bits every time, or it is a race
WAYS = ("mean", "inplace", "none")


class Outcome(NamedTuple):
    """How a process ended: its exit code, None if it was stopped; what it printed; in a word, why it failed."""

    code: int | None
    output: str
    reason: str


def in_a_process(arguments: list[str], seconds: float, **environment: str) -> Outcome:
    """`python -m anl_kernels ARGUMENTS`, stopped after so many seconds."""
    package = str(Path(ak.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        try:  # one that hangs in the driver may not even be killed
            output = process.communicate(timeout=10)[0]
        except subprocess.TimeoutExpired:
            output = ""
        return Outcome(None, output, f"no answer in {seconds:g} s")
    if process.returncode < 0:
        return Outcome(process.returncode, output, f"ended by {signal.Signals(-process.returncode).name}")
    last = (output.strip().splitlines() or ["no message"])[-1]
    return Outcome(process.returncode, output, last if process.returncode else "")


def verify(protocol: str, device: torch.device, seconds: float = SECONDS) -> tuple[str, str]:
    """("verified" | "never used" | "FAIL", why): what a process of its own found, which is remembered."""
    known = protocol.split(".")[1] in trust.PROTOCOLS[protocol.split(".")[0]]
    alone = {trust.VARIABLE: protocol if known else "none"}  # no other protocol takes part
    arguments = ["check", "--here", "--protocol", protocol, "--device", str(device)]
    outcome = in_a_process(arguments, seconds, **alone)
    if outcome.code == 0 and not known:
        return "verified", "every kernel that a call takes without them"
    if outcome.code == 0:
        facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "cases": outcome.output.strip()}
        kept = trust.record(protocol, device, facts)
        return "verified", "remembered" if kept else f"not remembered: {trust.FILE.path} cannot be written"
    if known:
        trust.forget(protocol, device)
    return ("never used", outcome.reason) if outcome.code == NEVER_USED else ("FAIL", outcome.reason)


# ---- in that process


def cases(protocol: str, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets of both dtypes: a few sizes, from the least to the largest, for every kernel concerned."""
    for dtype in map(workloads.DTYPES.get, DTYPES):
        shapes: dict[str, list[tuple[int, int]]] = {}
        for classes in CLASSES:
            for rows in ROWS:
                kernel = KERNEL_OF[protocol](rows, classes, dtype, device) if rows * classes <= ELEMENTS else None
                if kernel:
                    shapes.setdefault(kernel, []).append((rows, classes))
        for found in shapes.values():
            chosen = [found[i * (len(found) - 1) // (CASES - 1)] for i in range(CASES)]
            for rows, classes in dict.fromkeys(chosen):
                yield case(rows, classes, dtype, device)


def case(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Realistic logits, none of them near the clamp, where a rounding decides on a class's side."""
    logits, target = workloads.Workload((rows, classes), "fp32").tensors(rows + classes, str(device))
    for _ in range(8):
        logits = logits.to(dtype).float()
        near = (logits.double().log_softmax(1) + formulas.CLAMP_HEIGHT).abs() < 1e-3
        logits = torch.where(near, logits - 0.5 - 0.02 * logits.abs(), logits)
    return logits.to(dtype), target


def cuda_kernel(protocols: set[str], kernels: tuple[str, ...] = ()) -> Callable:
    """The kernel that a CUDA call with these protocols takes, if it has several CTAs and is one of `kernels`."""

    def kernel_of(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> str | None:
        plan = cuda.plan_for(rows, classes, dtype, device, protocols)
        return plan["kernel"] if plan["blocks"] > 1 and (not kernels or plan["kernel"] in kernels) else None

    return kernel_of


def split_kernel(*shape) -> str | None:
    kernel, waits = triton.plan_for(*shape)
    return kernel if waits else None


# protocol -> the kernel of (rows, classes, dtype, device) with it; None where that does not use it
KERNEL_OF = {
    "cuda.launches": cuda_kernel(set()),
    "cuda.tickets": cuda_kernel({"tickets"}),
    "cuda.split": cuda_kernel({"split"}, ("rows_split",)),
    "cuda.cluster": cuda_kernel({"cluster"}, ("rows_cluster",)),
    "triton.launches": lambda *shape: triton.plan_for(*shape, may_wait=False)[0],
    "triton.split": split_kernel,
}


def failures(protocol: str, device: torch.device) -> tuple[int, list[str]]:
    """How many calls were made, and what was wrong with which."""
    backend, made, wrong = protocol.split(".")[0], 0, []
    losses = [loss for loss in check.LOSSES if loss.name in LOSSES]
    for logits, target in cases(protocol, device):
        dtype = next(name for name, kind in workloads.DTYPES.items() if kind == logits.dtype)
        for loss in losses:
            expected = check.truth(loss, logits, target)
            about = f"{loss.name} {tuple(logits.shape)} {dtype}"
            for way in WAYS:
                errors = check.compare(loss, backend, logits, target, expected, way)
                if not errors.within(dtype, SLACK):
                    wrong.append(f"{about} {way}: error {errors.value:.1e} / {errors.grad:.1e}")
            if not same_bits(loss, backend, logits, target):
                wrong.append(f"{about}: other bits when it is repeated")
            made += len(WAYS) + REPEATS
    return made, wrong


def same_bits(loss, backend: str, logits: Tensor, target: Tensor) -> bool:
    """Whether repeated calls, on a GPU on two streams at a time, give the same bits."""
    streams = [torch.cuda.Stream(logits.device) for _ in range(2)] if logits.device.type == "cuda" else []
    results = []
    for i in range(REPEATS):
        if streams:
            streams[i % 2].wait_stream(torch.cuda.current_stream(logits.device))
        with torch.cuda.stream(streams[i % 2] if streams else None):
            leaf = logits.detach().requires_grad_()
            value = loss.ours(leaf, target, backend=backend)
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    if streams:
        torch.cuda.synchronize(logits.device)
    return all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


def run_here(protocol: str, device: torch.device) -> int:
    made, wrong = failures(protocol, device)
    if not made:
        print("no call on this GPU takes it")
        return NEVER_USED
    print("\n".join(wrong) or f"{made} calls agree with float64, and with themselves")
    return 1 if wrong else 0


def report(backend: str, again: bool) -> tuple[list[list[str]], bool]:
    """A line of the table for each protocol of the backend, and whether one failed."""
    device = ak.registry.device_of(backend)
    rows, failed = [], False
    for name, purpose in {"launches": "no protocol at all", **trust.PROTOCOLS[backend]}.items():
        protocol = f"{backend}.{name}"
        if not again and name != "launches" and trust.is_verified(protocol, device):
            state, why = "verified", "before"
        else:
            state, why = verify(protocol, device)
        failed |= state == "FAIL"
        rows.append([protocol, state, why, purpose])
    return rows, failed
