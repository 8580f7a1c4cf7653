"""What Triton makes of the kernels before any target is chosen, for test_intermediate.py: prints JSON.

In a process of its own. Interpreted kernels have neither memory orders nor barriers nor integers that overflow.
"""

from __future__ import annotations

import json
import re
import sys

import aot
import offline

CALLS = [
    "loss anl_ce bf16 8192x1000",
    "loss anl_ce bf16 8192x32768",
    "loss anl_ce bf16 16x1048576",
    "gradient anl_ce bf16 8192x1000",
    "gradient entropy bf16 8192x131072",
    "columns bf16 8192x131072",
    "scale bf16",
]
DERIVED = re.compile(r"%(\S+) = tt\.(?:addptr|splat|broadcast|expand_dims|reshape) %(\w+)")


def meetings(text: str) -> list[str]:
    """Barriers and the orders of atomic operations, from the first line to the last."""
    found = re.findall(r"\b(?:gpu|ttg)\.(barrier)|tt\.atomic_rmw \w+, (\w+),", text)
    return [barrier or order for barrier, order in found]


def narrow(text: str) -> list[str]:
    """Arguments that 32-bit numbers are added to: as they are, or "name + more", to what 64 bits were added to."""
    origin, found = {}, set()
    for line in text.splitlines():
        derived = DERIVED.search(line)
        if derived is None:
            continue
        new, old = derived.groups()
        name, is_moved = origin.get(old, (old, False))
        if "tt.addptr" in line and re.search(r"\bi32>? loc|xi32> loc", line):
            found.add(f"{name} + more" if is_moved else name)
        origin[new] = name, is_moved or "tt.addptr" in line
    return sorted(found)


def widened(text: str) -> list[str]:
    """32-bit products that are widened to 64 bits, when they may have overflowed already: the variables' names.

    Those without a name are sizes and strides, as the arguments of a kernel have them.
    """
    products = set(re.findall(r"%(\w+) = arith\.muli [^:]*: (?:tensor<[\dx]+x)?i32\b", text))
    found = set(re.findall(r"arith\.extsi %(\w+) :", text)) & products
    return sorted({re.sub(r"_\d+$", "", name) for name in found if not name.isdigit()})


def main() -> dict:
    scenarios, found = aot.scenarios(), {}
    for call in sys.argv[1:] or CALLS:
        for name, _, compiled in offline.compiled_by(scenarios[call], "sm_90"):
            text = compiled.asm["ttir"]
            found.setdefault(name, {})[call] = {
                "meetings": meetings(text),
                "narrow": narrow(text),
                "widened": widened(text),
            }
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
