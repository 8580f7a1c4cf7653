"""Time and peak memory of a linear head's losses, forward and backward: python benchmarks/linear.py --json RESULT.json

Contenders, in turns within one process: `linear_anl_ce` with its gradient made in forward, and with recompute=True;
the logits in full, F.linear and `anl_ce`; cross entropy by F.linear_cross_entropy in chunks (torch 2.13) and, on a GPU
where they are installed, by Liger and cut-cross-entropy. Every gradient of ours is compared with that of the full
logits before anything is timed, where there is memory for both. The table goes beside RESULT.json, as RESULT.md.
"""

import argparse
import importlib.util
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate

import anl_kernels as ak
from anl_kernels.cli.common import environment
from anl_kernels.cli.timing import Clock, Run, profile

OURS, RECOMPUTED, FULL, CHUNKED = "ours", "ours, recompute", "F.linear + ours", "F.linear_cross_entropy"
CLASSES, WIDTHS = (10_000, 100_000, 1_000_000), (128, 512, 2048)


def contenders(device: str, chunk: int) -> dict:
    """name -> loss(hidden, weight, target)."""

    def ours(x, w, y, recompute=None):
        return ak.linear_anl_ce(x, w, y, min_prob=1e-10, max_chunk_bytes=chunk, recompute=recompute)

    found = {
        OURS: ours,
        RECOMPUTED: lambda x, w, y: ours(x, w, y, True),
        FULL: lambda x, w, y: ak.anl_ce(F.linear(x, w), y, min_prob=1e-10, inplace=True),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found[CHUNKED] = lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options)
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["Liger"] = liger_fused_linear_cross_entropy
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = linear_cross_entropy
    return found


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def largest_error(loss, leaves) -> float:
    """The error of our gradients against those of the full logits, relative to the largest element."""
    grads = [torch.autograd.grad(loss[name](*leaves), leaves[:2]) for name in (OURS, RECOMPUTED, FULL)]
    *ours, full = grads
    return max(float((a - b).abs().max() / b.abs().max()) for some in ours for a, b in zip(some, full))


def measure(args, classes: int, width: int) -> list[dict]:
    dtype = getattr(torch, args.dtype)
    rows = max(16, args.logits // classes // (1 if width <= 512 else 2))
    chunk = max(args.chunk_mib << 20, 33 * classes * dtype.itemsize)
    weight_bytes = classes * width * 4
    case = {"classes": classes, "width": width, "rows": rows, "dtype": args.dtype, "max_chunk_bytes": chunk}
    found, clock = contenders(args.device, chunk), Clock(args.device)
    generator = torch.Generator(args.device).manual_seed(0)
    if 2.2 * weight_bytes > available_bytes(args.device):
        return [{**case, "contender": name, "state": "weight and gradient do not fit"} for name in found]
    make = lambda *shape: torch.randn(*shape, device=args.device, generator=generator).to(dtype)
    hidden, weight = make(rows, width).requires_grad_(), make(classes, width).requires_grad_()
    with torch.no_grad():
        weight *= width**-0.5
    target = torch.randint(classes, (rows,), device=args.device, generator=generator)
    leaves = (hidden, weight, target)

    def step(name):
        hidden.grad = weight.grad = None
        found[name](*leaves).backward()

    if 4.5 * weight_bytes < available_bytes(args.device):
        case["error"] = largest_error(found, leaves)
        assert case["error"] < (1e-4 if dtype == torch.float32 else 3e-2), case
    peaks, times = {}, {name: [] for name in found}
    for name in list(found):
        if name not in (OURS, RECOMPUTED, FULL) and 3.5 * weight_bytes > available_bytes(args.device):
            continue  # a gradient made in forward and scaled in backward: another copy of it
        hidden.grad = weight.grad = None
        begin = time.perf_counter()
        peaks[name] = profile(Run(lambda name=name: step(name)), args.device).peak_bytes
        if time.perf_counter() - begin > args.patience:
            times[name].append(time.perf_counter() - begin)
    patient = [name for name in peaks if not times[name]]
    for _ in range(args.rounds):
        for name in patient:
            hidden.grad = weight.grad = None
            times[name].append(clock.time(lambda name=name: step(name)))
    results = []
    for name in found:
        state = "ok" if name in peaks else "not run: a second gradient does not fit"
        result = {**case, "contender": name, "state": state}
        if name in peaks:
            took = times[name]
            result |= {"median_s": statistics.median(took), "samples": len(took), "peak_bytes": peaks[name]}
        results.append(result)
    return results


def table(results: list[dict]) -> str:
    """Times as the other's by ours, peaks above the inputs in units of the logits."""
    cases: dict = {}
    for result in results:
        cases.setdefault((result["classes"], result["width"], result["rows"]), {})[result["contender"]] = result
    others = list(dict.fromkeys(r["contender"] for r in results if r["contender"] != OURS))
    lines = [line(*case, found, others) for case, found in cases.items()]
    headers = ["K", "D", "N", "ours", *(f"time: {n}" for n in others), *(f"memory: {n}" for n in (OURS, *others))]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def line(classes: int, width: int, rows: int, found: dict, others: list[str]) -> list:
    itemsize = getattr(torch, found[OURS]["dtype"]).itemsize
    inputs, logits, ours = classes * width * itemsize, rows * classes * itemsize, found[OURS].get("median_s")

    def ratio(name):
        return f"{found[name]['median_s'] / ours:.2f}" if "median_s" in found[name] else "-"

    def memory(name):
        return f"{(found[name]['peak_bytes'] - inputs) / logits:.2f}" if "peak_bytes" in found[name] else "-"

    time = f"{ours * 1e3:.0f} ms" if ours else "-"
    return [f"{classes:,}", width, rows, time, *map(ratio, others), *map(memory, (OURS, *others))]


def report(document: dict) -> str:
    facts = document["environment"]
    device, date = facts["gpu"] or facts["device"], facts["date"][:10]
    chunk = f"{min(r['max_chunk_bytes'] for r in document['results']) >> 20} MiB"
    load = "" if facts["load_average"] is None else f", load {facts['load_average']:.1f} when it began"
    return f"""{device}, {facts["threads"]} threads, PyTorch {facts["torch"]}, {date}{load}.
Times are the other's divided by ours (2.0: ours takes half as long); memory is the peak above the inputs and dW, in
units of the logits (N K numbers). The last contender is plain cross entropy. Ours works in chunks of {chunk} or 33
rows. Who is slower than --patience runs once, in the order of the columns: the first also pays for memory that is new.

{table(document["results"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--logits", type=int, default=50_000_000, help="N K; half of it from D = 2048 on")
    parser.add_argument("--chunk-mib", type=int, default=32, help="max_chunk_bytes; at least 33 rows of logits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds; a slower contender runs once")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    document = {"environment": environment(), "results": []}
    for classes in args.classes:
        for width in args.width:
            document["results"] += measure(args, classes, width)
            if args.json:
                args.json.write_text(json.dumps(document, indent=1) + "\n")
                args.json.with_suffix(".md").write_text(report(document))
            print(table(document["results"][-len(contenders(args.device, 1)) :]), "\n", flush=True)
    print(report(document))


if __name__ == "__main__":
    main()
