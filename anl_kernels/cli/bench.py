"""`python -m anl_kernels bench`: forward and backward of this package beside what a user would otherwise run."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

from . import timing, workloads
from .common import environment, progress, table
from .contenders import LOSSES, Contender, Run, contenders, promised_bytes, truth, verdict
from .workloads import Workload

OURS = "anl_kernels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: seconds, not minutes")
    parser.add_argument("--shapes", metavar="LIST", help="e.g. 512x32000,512x32000:bf16 (N x K, or N x K x H x W)")
    parser.add_argument("--loss", choices=LOSSES, default="anl_ce")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile (slow to start)")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--seconds", type=float, help="for the rounds of one shape (20; --quick 1)")
    parser.add_argument("--json", metavar="FILE", help="write the results with device, versions and date")
    parser.add_argument("--strict", action="store_true", help="exit 1 on a wrong or failed result or too much memory")


def run(args: argparse.Namespace) -> int:
    try:
        chosen = workloads.parse(args.shapes) if args.shapes else workloads.QUICK if args.quick else workloads.FULL
    except ValueError as error:
        sys.exit(f"anl_kernels: {error}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("torch").setLevel(logging.ERROR)
    seconds = args.seconds or (1.0 if args.quick else 20.0)
    facts, results = environment(), []
    print(f"{args.loss}, forward + backward; {facts['device']}, {facts['threads']} threads, torch {facts['torch']}")
    if facts["load_average"] and facts["load_average"] > 0.5:
        print(f"note: load average {facts['load_average']:.1f}: times mislead while other programs use the cores")
    with progress(len(chosen), "shape") as bar:
        for workload in chosen:
            bar.set_description(str(workload))
            measured = measure(workload, contenders(args.loss, not args.no_compile), seconds)
            results += [{"shape": workload.name, "dtype": workload.dtype, "loss": args.loss, **m} for m in measured]
            bar.write(report(workload, measured), file=sys.stdout)
            sys.stdout.flush()
            bar.update()
    if args.json:
        Path(args.json).write_text(json.dumps({"environment": facts, "results": results}, indent=1, default=str) + "\n")
    problems = [p for result in results for p in problems_of(result)]
    if problems:
        print("\n" + "\n".join(problems), file=sys.stderr)
    return 1 if args.strict and problems else 0


def measure(workload: Workload, entrants: list[Contender], seconds: float) -> list[dict]:
    """One dict a contender: checked against float64 first, then timed in turns with the others, then its memory."""
    logits, target = workload.tensors()
    runs, results, truths = [], [], {}
    for contender in entrants:
        result: dict = {"contender": contender.name}
        results.append(result)
        try:
            run = contender.prepare(logits, target)
            if contender.formula and contender.formula not in truths:
                truths.clear()  # one at a time: float64 is twice the logits
                truths[contender.formula] = truth(contender.formula, logits, target)
            right, errors = verdict(run, logits, truths.get(contender.formula))
        except Exception as error:  # a contender that cannot run here is reported, not fatal
            result["state"] = f"failed: {type(error).__name__}: {first_line(error)}"
            continue
        result.update(state="ok" if right else "wrong", **{f"error_{k}": v for k, v in errors.items()})
        runs.append((run, result, contender))
    truths.clear()
    for (_, result, _), times in zip(runs, timing.interleaved([r for r, _, _ in runs], workload.bytes, seconds)):
        result.update(median_s=times.median, low_s=times.low, high_s=times.high, samples=times.samples)
    for run, result, contender in runs:
        measure_memory(run, result, contender, workload)
    return results


def measure_memory(run: Run, result: dict, contender: Contender, workload: Workload) -> None:
    result["peak_bytes"] = timing.peak_bytes(run)
    result["promised_bytes"] = promised_bytes(contender, workload)
    if workload.bytes >= 1 << 24:  # below, resident memory is too coarse
        result["resident_bytes"] = timing.peak_resident(run)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def problems_of(result: dict) -> list[str]:
    """What is exact and not as promised: never a time."""
    where = f"{result['shape']}:{result['dtype']} {result['contender']}"
    if result["state"] == "wrong":
        errors = f"loss {result.get('error_loss')}, gradient {result.get('error_grad')}"
        return [f"{where}: wrong, relative error of {errors}"]
    if result["state"] != "ok":
        return [f"{where}: {result['state']}"]
    promised = result["promised_bytes"]
    if promised is not None and result["peak_bytes"] > promised:
        return [f"{where}: holds {result['peak_bytes']} bytes above its inputs, promised {promised}"]
    return []


def report(workload: Workload, measured: list[dict]) -> str:
    ours = next((m.get("median_s") for m in measured if m["contender"] == OURS), None)
    rows = []
    for m in measured:
        if "median_s" not in m:
            rows.append([m["contender"], m["state"][:60]])
            continue
        ratio = f"{m['median_s'] / ours:.2f}" if ours else ""
        spread = f"{show_time(m['low_s'])} .. {show_time(m['high_s'])}"
        memory = m["peak_bytes"] / workload.bytes
        errors = f"{m['error_loss']:.0e} / {m['error_grad']:.0e}" if "error_loss" in m else ""
        state = m["state"] if m["state"] == "ok" else m["state"].upper()
        rows.append([m["contender"], show_time(m["median_s"]), spread, ratio, f"{memory:.2f}", errors, state])
    headers = ["", "median", "10 % .. 90 %", "times ours", "peak memory / logits", "error loss / grad", ""]
    return f"\n{workload}\n" + table(rows, headers, colalign=("left", *["right"] * 5, "left"))


def show_time(seconds: float) -> str:
    unit, scale = next((u for u in (("s", 1.0), ("ms", 1e-3)) if seconds >= u[1]), ("us", 1e-6))
    value = seconds / scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
