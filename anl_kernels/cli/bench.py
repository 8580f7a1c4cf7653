"""`python -m anl_kernels bench`: forward and backward of this package beside what a user would otherwise run."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from . import workloads
from .common import environment, output_file, progress, table
from .contenders import LOSSES, PHASES, Contender, contenders, promised_allocations, promised_bytes, truth, verdict
from .timing import interleaved, peak_resident, profile
from .workloads import Workload

OURS, COPY = "anl_kernels", "out.copy_(logits)"
LAUNCHES = 6  # on a GPU: denominator, loss and gradient, sum; grad_output made and looked at; one to spare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: seconds, not minutes")
    parser.add_argument("--shapes", metavar="LIST", help="e.g. 512x32000,512x32000:bf16 (N x K, or N x K x H x W)")
    parser.add_argument("--loss", choices=LOSSES, default="anl_ce")
    parser.add_argument(
        "--phase", choices=(*PHASES, "all"), default="both", help="what is timed (both: one after the other)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile (slow to start)")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--seconds", type=float, help="for the rounds of one shape (20; --quick 1)")
    parser.add_argument(
        "--json", metavar="FILE", type=output_file, help="write the results with device, versions and date"
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 on a wrong or failed result or too much memory")


def run(args: argparse.Namespace) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = workloads.parse(args.shapes) if args.shapes else default_workloads(args.quick, device)
    except ValueError as error:
        sys.exit(f"anl_kernels: {error}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("torch").setLevel(logging.ERROR)
    bench = Bench(
        device, args.seconds or (1.0 if args.quick else 20.0), PHASES if args.phase == "all" else (args.phase,)
    )
    facts, results = environment(), []
    where = facts["gpu"] if device == "cuda" else f"{facts['device']}, {facts['threads']} threads"
    print(f"{args.loss}; {where}, torch {facts['torch']}")
    if facts["load_average"] and facts["load_average"] > 0.5 and device == "cpu":
        print(f"note: load average {facts['load_average']:.1f}: times mislead while other programs use the cores")
    with progress(len(chosen), "shape") as bar:
        for workload in chosen:
            bar.set_description(str(workload))
            entrants = contenders(args.loss, not args.no_compile, device)
            for phase, measured in bench.measure(workload, entrants).items():
                about = {"shape": workload.name, "dtype": workload.dtype, "loss": args.loss, "phase": phase}
                results += [{**about, **m} for m in measured]
                bar.write(report(workload, phase, measured), file=sys.stdout)
            sys.stdout.flush()
            bar.update()
            if args.json:  # after every shape: a run that is stopped leaves what it measured
                document = {"environment": facts, "results": results}
                Path(args.json).write_text(json.dumps(document, indent=1, default=str) + "\n")
    problems = [p for result in results for p in problems_of(result)]
    if problems:
        print("\n" + "\n".join(problems), file=sys.stderr)
    return 1 if args.strict and problems else 0


def default_workloads(quick: bool, device: str) -> list[Workload]:
    return workloads.QUICK if quick else workloads.GPU if device == "cuda" else workloads.CPU


class Bench(NamedTuple):
    device: str
    seconds: float  # for the rounds of one shape and phase
    phases: tuple[str, ...]

    def measure(self, workload: Workload, entrants: list[Contender]) -> dict[str, list[dict]]:
        """By phase, one dict per contender: checked against float64 first, then timed in turns, then its memory."""
        logits, target = workload.tensors(device=self.device)
        checked, truths = [], {}
        for contender in entrants:
            result: dict = {"contender": contender.name}
            checked.append((contender, result))
            try:
                if contender.formula and contender.formula not in truths:
                    truths.clear()  # one at a time: float64 is twice the logits
                    truths[contender.formula] = truth(contender.formula, logits, target)
                right, errors = verdict(contender, logits, target, truths.get(contender.formula))
            except Exception as error:  # a contender that cannot run here is reported, not fatal
                result["state"] = f"failed: {type(error).__name__}: {first_line(error)}"
                continue
            result.update(state="ok" if right else "wrong", **{f"error_{k}": v for k, v in errors.items()})
        truths.clear()
        return {phase: self.timed(workload, phase, checked, logits, target) for phase in self.phases}

    def timed(self, workload: Workload, phase: str, checked, logits, target) -> list[dict]:
        results = [dict(result) for _, result in checked]
        entered = [(c, r) for (c, _), r in zip(checked, results) if r["state"] == "ok"]
        runs = [contender.prepare(logits, target, phase) for contender, _ in entered]
        for (_, result), times in zip(entered, interleaved(runs, workload.bytes, self.seconds, self.device)):
            result.update(median_s=times.median, low_s=times.low, high_s=times.high, samples=times.samples)
        copy = next((r["median_s"] for r in results if r["contender"] == COPY and "median_s" in r), None)
        for run, (contender, result) in zip(runs, entered):
            result.update(profile(run, self.device)._asdict())
            if phase == "both":
                result["promised_bytes"] = promised_bytes(contender, workload)
                result["promised_allocations"] = promised_allocations(contender, self.device)
                if copy:  # of one read and one write
                    result["share_of_copy_bandwidth"] = copy / result["median_s"]
            if self.device == "cpu" and workload.bytes >= 1 << 24:  # below, resident memory is too coarse
                result["resident_bytes"] = peak_resident(run)
        return results


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def problems_of(result: dict) -> list[str]:
    """What is exact and not as promised: never a time."""
    where = f"{result['shape']}:{result['dtype']} {result['phase']} {result['contender']}"
    if result["state"] == "wrong":
        errors = f"loss {result.get('error_loss')}, gradient {result.get('error_grad')}"
        return [f"{where}: wrong, relative error of {errors}"]
    if result["state"] != "ok":
        return [f"{where}: {result['state']}"]
    promised = result.get("promised_bytes")
    if promised is None:
        return []
    found = []
    if result["peak_bytes"] > promised:
        found.append(f"{where}: holds {result['peak_bytes']} bytes above its inputs, promised {promised}")
    if result["allocations"] > result["promised_allocations"]:
        found.append(
            f"{where}: {result['allocations']} allocations per call, promised {result['promised_allocations']}"
        )
    if (result["launches"] or 0) > LAUNCHES:
        found.append(f"{where}: {result['launches']} launches per call, promised {LAUNCHES}")
    return found


def report(workload: Workload, phase: str, measured: list[dict]) -> str:
    ours = next((m.get("median_s") for m in measured if m["contender"] == OURS), None)
    rows = []
    for m in measured:
        if "median_s" not in m:
            rows.append([m["contender"], m["state"][:60]])
            continue
        ratio = f"{m['median_s'] / ours:.2f}" if ours else ""
        share = f"{m['share_of_copy_bandwidth']:.0%}" if "share_of_copy_bandwidth" in m else ""
        spread = f"{show_time(m['low_s'])} .. {show_time(m['high_s'])}"
        memory = f"{m['peak_bytes'] / workload.bytes:.2f}"
        counts = f"{m['allocations']}" + ("" if m["launches"] is None else f" / {m['launches']}")
        errors = f"{m['error_loss']:.0e} / {m['error_grad']:.0e}" if "error_loss" in m else ""
        state = m["state"] if m["state"] == "ok" else m["state"].upper()
        rows.append([m["contender"], show_time(m["median_s"]), spread, ratio, share, memory, counts, errors, state])
    counted = "allocations" if not any(m.get("launches") is not None for m in measured) else "allocations / launches"
    times = ["median", "10 % .. 90 %", "times ours", "of copy bandwidth"]
    headers = ["", *times, "peak memory / logits", counted, "error loss / grad", ""]
    what = "forward + backward" if phase == "both" else phase
    return f"\n{workload}, {what}\n" + table(rows, headers, colalign=("left", *["right"] * 7, "left"))


def show_time(seconds: float) -> str:
    unit, scale = next((u for u in (("s", 1.0), ("ms", 1e-3)) if seconds >= u[1]), ("us", 1e-6))
    value = seconds / scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
