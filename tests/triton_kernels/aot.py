"""Every Triton kernel compiled without a GPU, in the configurations that calls really pick, and what came out.

    python tests/triton_kernels/aot.py [--targets sm_90 gfx942] [--only loss] [--gated | --stock] [--json]
        [--sass FOLDER]

Calls run on tensors without memory (device "meta") as far as the launch of each kernel; there it is compiled for the
target, and the machine code is read: registers, spills, instructions, how wide memory is accessed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import offline
from offline import TARGETS


@dataclass
class Facts:
    """What one compiled kernel is made of. Counts of instructions are those of the text, both sides of every branch."""

    scenario: str
    kernel: str
    target: str
    block_n: int
    block_k: int
    num_warps: int
    registers: int
    shared: int
    spills: int  # bytes of local memory, or instructions that access it, or registers said to be spilled
    instructions: int
    transcendental: int
    shared_stores: int  # instructions that store to shared memory, whole kernel
    barriers: int  # of all warps
    loads: dict = field(default_factory=dict)  # bits a thread moves -> instructions, whole kernel
    stores: dict = field(default_factory=dict)
    loops: list = field(default_factory=list)  # innermost: {"instructions", "transcendental", "loads", "stores"}

    @property
    def elements(self) -> float:
        """The part of a tile that one thread has."""
        threads = self.num_warps * (64 if self.target.startswith("gfx") else 32)
        return self.block_n * self.block_k / threads


# ---- calls


def scenarios():
    """name -> function that makes the call. Small enough a list to compile in minutes; it has every kernel in it."""
    import bad_kernel
    import torch

    import anl_kernels as ak
    from anl_kernels.backends import triton as backend
    from anl_kernels.functional import checked_call
    from anl_kernels.layout import as_rows
    from anl_kernels.triton_kernels import columns, reduce, row_math

    num_coefs = row_math.NUM_COEFS.value
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    losses = {
        "anl_ce": 5 * ak.NCE() + 5 * ak.NNCE(),
        "anl_fl": ak.NFL() + ak.NNFL(),
        "ce": 1.0 * ak.CE(),
        "nce_rce": ak.NCE() + ak.RCE(),
    }

    def empty(shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def call_of(name, reduction="mean", gamma=None):
        return checked_call(losses[name], -100, reduction, 0.0, 1e-7, False, None, "triton")

    def label_of(logits):
        return torch.empty(logits.shape[:1] + logits.shape[2:], dtype=torch.int64, device="meta")

    def loss(name, shape, dtype, made="grad", reduction="mean", trust="all"):
        def run():
            with mock.patch.dict(os.environ, ANL_KERNELS_TRUST=trust):
                launched()

        def launched():
            logits = empty(shape, dtype)
            target = label_of(logits)
            acc = fp64 if dtype == fp64 else fp32
            grad = torch.empty_like(logits) if made == "grad" else None
            coefs = empty((num_coefs, *target.shape), acc) if made == "coefs" else None
            backend.row_loss(call_of(name, reduction), logits, target, None, grad, coefs)

        return run

    def stats(name, shape, dtype):
        def run():
            logits = empty(shape, dtype)
            backend.row_stats(call_of(name), logits, label_of(logits))

        return run

    def gradient(name, shape, dtype, entropy=False):
        def run():
            logits = empty(shape, dtype)
            target = label_of(logits)
            coefs = empty((num_coefs, *target.shape), fp32)
            pair = (empty((shape[1],), fp32), empty((), fp32)) if entropy else None
            backend.row_grad(call_of(name), logits, target, coefs, empty((), fp32), pair)

        return run

    def sums(shape, dtype):
        def run():
            logits, shape_, strides = as_rows(empty(shape, dtype))
            columns.column_sums(logits, shape_, strides, empty((num_coefs, shape[0] * logits[0, 0].numel()), fp32))

        return run

    def scaling(shape, dtype):
        return lambda: reduce.scale_(empty(shape, dtype), empty((), fp32))

    found = {}
    for dtype, kind in ((bf16, "bf16"), (fp32, "fp32")):
        found |= {
            f"loss anl_ce {kind} 128x10": loss("anl_ce", (128, 10), dtype),
            f"loss anl_ce {kind} 8192x1000": loss("anl_ce", (8192, 1000), dtype),
            f"loss anl_ce {kind} 8192x8192": loss("anl_ce", (8192, 8192), dtype),
            f"loss anl_ce {kind} 8192x32768": loss("anl_ce", (8192, 32768), dtype),
            f"loss anl_ce {kind} 8192x131072": loss("anl_ce", (8192, 131072), dtype),
            f"loss anl_ce {kind} 16x1048576": loss("anl_ce", (16, 1048576), dtype),
            f"loss anl_ce {kind} 8x19x512x512": loss("anl_ce", (8, 19, 512, 512), dtype),
            f"loss anl_ce {kind} 8x150x512x512": loss("anl_ce", (8, 150, 512, 512), dtype),
            f"gradient anl_ce {kind} 8192x1000": gradient("anl_ce", (8192, 1000), dtype),
            f"gradient anl_ce {kind} 8192x131072": gradient("anl_ce", (8192, 131072), dtype),
            f"gradient anl_ce {kind} 8x19x512x512": gradient("anl_ce", (8, 19, 512, 512), dtype),
            f"gradient entropy {kind} 8192x131072": gradient("anl_ce", (8192, 131072), dtype, True),
            f"columns {kind} 8192x131072": sums((8192, 131072), dtype),
            f"columns {kind} 8x19x512x512": sums((8, 19, 512, 512), dtype),
            f"scale {kind}": scaling((8192, 131072), dtype),
        }
    return found | {
        "deliberately bad bf16": bad_kernel.call,
        "loss anl_fl bf16 8192x8192": loss("anl_fl", (8192, 8192), bf16),
        "loss anl_fl bf16 8192x131072": loss("anl_fl", (8192, 131072), bf16),
        "loss ce bf16 8192x131072": loss("ce", (8192, 131072), bf16),
        "loss nce_rce bf16 8192x131072": loss("nce_rce", (8192, 131072), bf16),
        "loss anl_ce fp64 8192x1000": loss("anl_ce", (8192, 1000), fp64),
        "loss anl_ce bf16 8192x50257": loss("anl_ce", (8192, 50257), bf16),
        "loss anl_ce bf16 16x1048576 in launches": loss("anl_ce", (16, 1048576), bf16, trust="none"),
        "coefs anl_ce bf16 8192x131072": loss("anl_ce", (8192, 131072), bf16, "coefs"),
        "stats anl_fl fp32 8192x1000": stats("anl_fl", (8192, 1000), fp32),
        "gradient anl_fl bf16 8192x131072": gradient("anl_fl", (8192, 131072), bf16),
        "gradient anl_ce bf16 8192x50257": gradient("anl_ce", (8192, 50257), bf16),
    }


# What test_aot.py looks at, on every target: all kernels, both ends of every choice among them.
GATED = [
    *(f"loss anl_ce bf16 {shape}" for shape in ("128x10", "8192x1000", "8192x32768", "8192x131072", "8x19x512x512")),
    *(f"loss anl_ce fp32 {shape}" for shape in ("128x10", "8192x8192", "8192x131072", "8x150x512x512")),
    "loss anl_ce bf16 8192x50257",
    "loss anl_ce bf16 16x1048576 in launches",
    "loss anl_fl bf16 8192x8192",
    "stats anl_fl fp32 8192x1000",
    *(f"gradient anl_ce bf16 {shape}" for shape in ("8192x1000", "8192x131072", "8192x50257", "8x19x512x512")),
    "gradient anl_ce fp32 8192x131072",
    "gradient anl_fl bf16 8192x131072",
    "gradient entropy bf16 8192x131072",
    *(f"columns {kind} {shape}" for kind, shape in (("bf16", "8192x131072"), ("fp32", "8x19x512x512"))),
    "scale bf16",
]
# What it looks at with the Tritons that stock PyTorch brings: every kernel once.
STOCK = [
    *(f"loss anl_ce bf16 {shape}" for shape in ("8192x1000", "8192x32768", "8192x131072", "8192x50257")),
    "loss anl_ce bf16 16x1048576 in launches",
    *(f"gradient anl_ce bf16 {shape}" for shape in ("8192x131072", "8192x50257")),
    "columns bf16 8192x131072",
    "scale bf16",
]

# ---- machine code


def facts_of(scenario: str, target: str, name: str, config, compiled) -> Facts:
    facts = Facts(
        scenario, name, target, config.BLOCK_N, config.BLOCK_K, config.num_warps, registers=0,
        shared=compiled.metadata.shared, spills=0, instructions=0, transcendental=0, shared_stores=0, barriers=0,
    )  # fmt: skip
    read = read_amdgcn if target.startswith("gfx") else read_sass
    read(compiled, facts)
    return facts


def nvidia_tool(name: str, *args: str) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def sass_of(compiled) -> tuple[str, str]:
    """(the disassembly, what it uses) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return nvidia_tool("cuobjdump", "-sass", file.name), nvidia_tool("cuobjdump", "-res-usage", file.name)


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")


def read_sass(compiled, facts: Facts) -> None:
    text, usage = sass_of(compiled)
    used = dict(re.findall(r"(\w+):(\d+)", usage))
    facts.registers = int(used["REG"])
    code = [(int(at, 16), opcode, operands) for at, opcode, operands in INSTRUCTION.findall(text)]
    code = [line for line in code if line[1] != "NOP"]
    facts.spills = int(used["STACK"]) + int(used["LOCAL"]) + sum(op.startswith(("LDL", "STL")) for _, op, _ in code)
    branches = []
    for at, opcode, operands in code:
        found = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        if found and int(found[1], 16) < at:
            branches.append((int(found[1], 16), at))
    facts.shared_stores = sum(op.startswith("STS") for _, op, _ in code)
    facts.barriers = sum(op.split(".")[0] == "BAR" for _, op, _ in code)
    count_all(facts, code, branches, sass_access, lambda op: op.startswith("MUFU"))


def sass_access(opcode: str) -> tuple[str, int] | None:
    """("loads" or "stores", bits) of an access to global memory."""
    kind = {"LDG": "loads", "STG": "stores"}.get(opcode.split(".")[0])
    if kind is None:
        return None
    parts = opcode.split(".")
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return kind, next((bits for name, bits in sizes.items() if name in parts), 32)


def read_amdgcn(compiled, facts: Facts) -> None:
    text = compiled.asm["amdgcn"]
    said = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)", text)}
    facts.registers = said["vgpr_count"]
    facts.spills = said["vgpr_spill_count"] + said["private_segment_fixed_size"]
    code, labels, branches = [], {}, []
    for line in text.split(".section")[0].splitlines():
        line = line.split(";")[0].rstrip()
        if re.match(r"^[.\w$]+:$", line):
            labels[line[:-1]] = len(code)
        elif re.match(r"^\s+[a-z]\w+", line):
            opcode, _, operands = line.strip().partition(" ")
            if opcode.startswith("s_cbranch") or opcode == "s_branch":
                if operands.strip() in labels:
                    branches.append((labels[operands.strip()], len(code)))
            code.append((len(code), opcode, operands))
    mathematics = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")
    facts.shared_stores = sum(op.startswith(("ds_write", "ds_store")) for _, op, _ in code)
    facts.barriers = sum(op == "s_barrier" for _, op, _ in code)
    count_all(facts, code, branches, amdgcn_access, lambda op: op.startswith(mathematics))


def amdgcn_access(opcode: str) -> tuple[str, int] | None:
    found = re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode)
    if found is None:
        return None
    kind, size = found[1] + "s", found[2]
    words = re.search(r"dwordx(\d)", size)
    if words:
        return kind, 32 * int(words[1])
    return kind, 32 if "dword" in size else 16 if "short" in size or "b16" in size else 8


def count_all(facts: Facts, code, branches, access, transcendental) -> None:
    """Fills in the counts: of the whole kernel, and of each loop that has no other in it."""
    whole = counted(code, access, transcendental)
    facts.instructions, facts.transcendental = whole["instructions"], whole["transcendental"]
    facts.loads, facts.stores = whole["loads"], whole["stores"]
    innermost = [a for a in branches if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in branches)]
    for first, last in sorted(set(innermost)):
        facts.loops.append(counted([line for line in code if first <= line[0] <= last], access, transcendental))


def counted(code, access, transcendental) -> dict:
    result = {"instructions": len(code), "transcendental": 0, "loads": {}, "stores": {}}
    for _, opcode, _ in code:
        result["transcendental"] += transcendental(opcode)
        found = access(opcode)
        if found:
            kind, bits = found
            result[kind][str(bits)] = result[kind].get(str(bits), 0) + 1
    return result


# ---- all of them


def compile_one(job) -> list[dict]:
    scenario, target, folder = job
    results = []
    for name, config, compiled in offline.compiled_by(scenarios()[scenario], target):
        results.append(asdict(facts_of(scenario, target, name, config, compiled)))
        if folder:
            text = compiled.asm["amdgcn"] if target.startswith("gfx") else sass_of(compiled)[0]
            path = Path(folder) / f"{scenario.replace(' ', '_')}.{name}.{target}.txt"
            path.write_text(text)
    return results


def compile_all(targets, names, folder=None) -> list[Facts]:
    jobs = [(name, target, folder) for name in names for target in targets]
    processes = min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(processes) as pool:
        found = [Facts(**facts) for results in pool.map(compile_one, jobs) for facts in results]
    unique = {json.dumps({**asdict(f), "scenario": ""}): f for f in reversed(found)}
    return list(reversed(unique.values()))


def in_a_process(targets, *names: str, triton: Path | None = None) -> list[Facts]:
    """compile_all in a process of its own, where the kernels are not the interpreter's. triton: as offline has it."""
    arguments = ["--json", "--targets", *targets, "--calls", *names]
    return [Facts(**facts) for facts in offline.in_a_process(__file__, *arguments, triton=triton)]


def wide(accesses: dict) -> str:
    """Widths in bits, with how many instructions of each."""
    return " ".join(f"{n}x{bits}" for bits, n in sorted(accesses.items(), key=lambda item: -int(item[0]))) or "-"


def table(found: list[Facts]) -> str:
    """A line a kernel, then one for each of its loops."""
    head = f"{'call':39} {'kernel':16} {'target':7} {'tile':>10} {'warps':>5} {'regs':>4} {'smem':>6} "
    head += f"{'STS':>5} {'BAR':>4} {'spill':>5} "
    lines = [head + f"{'instr':>6} {'/elem':>6} {'exp/el':>6}  loads, stores (instructions x bits)"]
    for f in found:
        for part, of in [("", asdict(f)), *(("  loop", loop) for loop in f.loops if loop["loads"] or loop["stores"])]:
            left = f"{f.scenario:39} {f.kernel:16} {f.target:7} {f.block_n:>4}x{f.block_k:<5} {f.num_warps:>5} "
            left += f"{f.registers:>4} {f.shared:>6} {f.shared_stores:>5} {f.barriers:>4} {f.spills:>5} "
            left = left if not part else " " * 30 + f"{part:{len(left) - 30}}"
            each = of["instructions"] / f.elements, of["transcendental"] / f.elements
            left += f"{of['instructions']:>6} {each[0]:>6.1f} {each[1]:>6.2f}"
            lines.append(f"{left}  {wide(of['loads'])}, {wide(of['stores'])}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--only", default="", help="calls whose name has this in it")
    parser.add_argument("--calls", nargs="+", help="calls by their names")
    parser.add_argument("--gated", dest="calls", action="store_const", const=GATED, help="those test_aot.py looks at")
    parser.add_argument("--stock", dest="calls", action="store_const", const=STOCK, help="and with PyTorch's Tritons")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sass", help="a folder for the machine code")
    arguments = parser.parse_args()
    if arguments.sass:
        Path(arguments.sass).mkdir(parents=True, exist_ok=True)
    names = [name for name in arguments.calls or scenarios() if arguments.only in name]
    found = compile_all(arguments.targets, names, arguments.sass)
    print(json.dumps([asdict(f) for f in found]) if arguments.json else table(found))


if __name__ == "__main__":
    main()
