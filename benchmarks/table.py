"""The ratios of a `bench --json` file as tables: python benchmarks/table.py RESULT.json --into README.md.

README gets a few rows, the page that it links to all of them: each file has a place for its table between two marks.
Without --into the whole table is printed.
"""

import argparse
import json
import re
from pathlib import Path

# What README shows: (loss, shape, dtype). The losses' names are those of the first column.
IN_BRIEF = (
    ("anl_ce", "128x100", "fp32"),
    ("anl_ce", "4096x1000", "fp32"),
    ("anl_ce", "256x100000", "bf16"),
    ("anl_ce", "64x1000000", "fp32"),
    ("anl_ce", "1x21x512x512", "fp32"),
)
WHOLE = "docs/benchmarks.md"  # beside the file that --into names
OURS = ("anl_kernels", "anl_kernels inplace")
OTHERS = {
    "logits.clone()": "`logits.clone()`",
    "out.copy_(logits)": "`out.copy_(logits)`",
    "F.cross_entropy": "`F.cross_entropy`",
    "formulas, eager": "formulas",
    "formulas, torch.compile": "`torch.compile`",
}
MARKED = re.compile(r"(<!-- measured[^>]*-->\n).*?(<!-- /measured -->)", re.DOTALL)


def table(document: dict, only: tuple[tuple[str, str, str], ...] = ()) -> str:
    """All rows, or only those."""
    cases: dict = {}
    for result in document["results"]:
        if result.get("phase", "both") != "both":
            continue
        cases.setdefault((result["loss"], result["shape"], result["dtype"]), {})[result["contender"]] = result
    facts = document["environment"]
    where = f"{facts['device']}, {facts['threads']} threads, PyTorch {facts['torch']}, {facts['date'][:10]}"
    lines = [
        f"{where}. A column is the other's time divided by ours (2.0: ours takes half as long);",
        "memory is the peak above the inputs, in units of the logits.",
        "",
        "| loss | logits | ours | " + " | ".join(OTHERS.values()) + " | memory: ours | formulas |",
        "|---|---|" + "---:|" * (len(OTHERS) + 3),
    ]
    for (loss, shape, dtype), found in cases.items():
        for name in OURS:
            if "median_s" in found.get(name, {}):
                label = f"{loss}{name.removeprefix('anl_kernels')}"
                if not only or (label, shape, dtype) in only:
                    lines.append(line(label, f"{shape} {dtype}", found[name], found))
    return "\n".join(lines)


def line(loss: str, logits: str, ours: dict, found: dict) -> str:
    cells = [loss, logits, milliseconds(ours["median_s"])]
    for name in OTHERS:
        other = found.get(name, {})
        state = other.get("state", "not run").split(":")[0]
        cells.append(f"{other['median_s'] / ours['median_s']:.2f}" if state == "ok" else state)
    cells += [in_logits(ours, found), in_logits(found.get("formulas, eager", {}), found)]
    return "| " + " | ".join(cells) + " |"


def in_logits(result: dict, found: dict) -> str:
    copy = found.get("logits.clone()", {}).get("peak_bytes")
    return f"{result['peak_bytes'] / copy:.2f}" if copy and "peak_bytes" in result else ""


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--into", type=Path, metavar="README", help=f"write README's table, and the one of {WHOLE}")
    args = parser.parse_args()
    document = json.loads(args.result.read_text())
    if not args.into:
        print(table(document))
        return
    source = f"From `{args.result}`."
    write(args.into, f"{table(document, IN_BRIEF)}\n\n{source}")
    write(args.into.parent / WHOLE, f"{table(document)}\n\n{source}")


def write(file: Path, text: str) -> None:
    """Replaces what stands between the marks of the file."""
    content = file.read_text()
    if not MARKED.search(content):
        raise SystemExit(f"{file} has no place marked 'measured'")
    file.write_text(MARKED.sub(lambda found: f"{found[1]}{text}\n{found[2]}", content))


if __name__ == "__main__":
    main()
