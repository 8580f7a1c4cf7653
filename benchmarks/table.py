"""The ratios of a `bench --json` file as README's table: python benchmarks/table.py RESULT.json [--into README.md].

README's: --shapes 128x10,128x100,4096x1000,2560x10000,800x32000,509x50257,256x100000,64x1000000,1x21x512x512
"""

import argparse
import json
import re
from pathlib import Path

OURS = ("anl_kernels", "anl_kernels inplace")
OTHERS = {
    "logits.clone()": "`logits.clone()`",
    "out.copy_(logits)": "`out.copy_(logits)`",
    "F.cross_entropy": "`F.cross_entropy`",
    "formulas, eager": "formulas",
    "formulas, torch.compile": "`torch.compile`",
}


def table(document: dict, shapes: list[str] | None = None) -> str:
    cases: dict = {}
    for result in document["results"]:
        if result.get("phase", "both") != "both":
            continue
        if shapes and result["shape"] not in shapes:
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
                lines.append(line(f"{loss}{name.removeprefix('anl_kernels')}", f"{shape} {dtype}", found[name], found))
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
    parser.add_argument("--into", type=Path, help="replace what stands between the 'measured' marks of this file")
    parser.add_argument("--shapes", type=lambda text: text.split(","), help="only these")
    args = parser.parse_args()
    text = table(json.loads(args.result.read_text()), args.shapes)
    if not args.into:
        print(text)
        return
    marked = re.compile(r"(<!-- measured[^>]*-->\n).*?(<!-- /measured -->)", re.DOTALL)
    document = args.into.read_text()
    if not marked.search(document):
        parser.exit(1, f"{args.into} has no place marked 'measured'\n")
    args.into.write_text(marked.sub(lambda m: m[1] + text + f"\n\nFrom `{args.result}`.\n" + m[2], document))


if __name__ == "__main__":
    main()
