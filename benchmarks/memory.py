"""Peak memory of one forward and backward by number of classes, and where each contender runs out of a given memory.

    python benchmarks/memory.py --json memory.json              # 512 rows, up to a million classes, within 6 GiB
    python benchmarks/memory.py --rows 4096 --gib 80            # on a GPU

Every contender runs in a process of its own that may hold `--gib` above what it held before the logits were made.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from anl_kernels.cli import workloads
from anl_kernels.cli.common import environment, table
from anl_kernels.cli.contenders import contenders
from anl_kernels.cli.timing import profile

CLASSES = (10_000, 32_000, 128_000, 262_144, 1_000_000)
CHILD_SECONDS = 240


def limit_memory(size: int, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.get_device_properties(0).total_memory))
        return
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + size, held + size))


def one(name: str, workload: workloads.Workload, size: int, device: str) -> dict:
    """What `name` needed, run in this process."""
    contender = next(c for c in contenders("anl_ce", device=device) if c.name == name)
    tiny = workloads.Workload((4, 64), workload.dtype)
    contender.prepare(*tiny.tensors(device=device), "both").call()  # code and threads are not the call's memory
    limit_memory(size, device)
    try:
        logits, target = workload.tensors(device=device)
        run = contender.prepare(logits, target, "both")
        peak = profile(run, device).peak_bytes
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            return {"state": f"failed: {str(error).splitlines()[0][:120]}"}
        return {"state": "out of memory"}
    return {"state": "ok", "peak_bytes": peak}


def in_child(name: str, workload, gib: float, device: str) -> dict:
    words = ["--child", name, "--shape", str(workload), "--gib", str(gib), "--device", device]
    try:
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return {"state": f"stopped after {CHILD_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    memory = done.returncode in (-9, -6) or "memory" in done.stderr.lower() or "bad_alloc" in done.stderr
    return {"state": "out of memory" if memory else f"failed: exit {done.returncode}: {done.stderr.strip()[-120:]}"}


def report(results: list[dict]) -> str:
    names = list(dict.fromkeys(r["contender"] for r in results))
    shapes = list(dict.fromkeys((r["shape"], r["dtype"]) for r in results))
    found = {(r["contender"], r["shape"], r["dtype"]): r for r in results}
    rows = []
    for name in names:
        cells = [found.get((name, *shape), {"state": "not run"}) for shape in shapes]
        rows.append(
            [name, *(f"{c['peak_bytes'] / c['logits_bytes']:.2f}" if "peak_bytes" in c else c["state"] for c in cells)]
        )
    return table(rows, ["peak / logits", *(f"{shape} {dtype}" for shape, dtype in shapes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--classes", type=lambda text: [int(k) for k in text.split(",")], default=CLASSES)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--gib", type=float, default=6.0, help="logits included")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no further process after so many")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(one(args.child, workloads.parse(args.shape)[0], int(args.gib * 2**30), args.device)))
        return
    chosen = [workloads.Workload((args.rows, k), dtype) for k in args.classes for dtype in args.dtypes.split(",")]
    names = [c.name for c in contenders("anl_ce", device=args.device)]
    results = []
    document = {"environment": environment(), "limit_gib": args.gib, "memory": results}
    start = time.monotonic()
    for workload, name in tqdm([(w, n) for w in chosen for n in names], leave=False, disable=None):
        if time.monotonic() - start > args.seconds:
            print(f"stopped after {args.seconds:g} s, before {name}, {workload}")
            break
        about = {"contender": name, "shape": workload.name, "dtype": workload.dtype, "logits_bytes": workload.bytes}
        results.append({**about, **in_child(name, workload, args.gib, args.device)})
        if args.json:  # after every one: a run that is stopped leaves what it measured
            args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")
    print(report(results))


if __name__ == "__main__":
    main()
