"""What the compiler made of the CUDA kernels: registers, stack, and the loops in the machine code.

Nothing here needs a GPU: nvcc (or its ptxas) and a cuobjdump, which Triton's wheel has too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

RESOURCES = re.compile(r"Function ([^:\s]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
FUNCTION = re.compile(r"^\s*Function : (\S+)", re.M)
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)
ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
RECONVERGENCE = re.compile(r"\bB(\d+)\b")


@cache
def tool(name: str) -> str | None:
    """Path of one of CUDA's tools: on PATH, in CUDA_HOME, or Triton's copy."""
    spec = importlib.util.find_spec("triton")
    homes = [os.environ[key] + "/bin" for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    triton = [str(Path(spec.origin).parent / "backends" / "nvidia" / "bin")] if spec and spec.origin else []
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *homes, *triton]))


def run(*words, folder=None) -> str:
    """The output of a command, run in `folder`; RuntimeError with its messages if it fails."""
    disassembler = tool("nvdisasm")  # cuobjdump looks for it on PATH
    path = os.environ.get("PATH", "") + (os.pathsep + str(Path(disassembler).parent) if disassembler else "")
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, cwd=folder, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "" or "@P0", ...
    opcode: str  # "LDG.E.128.CONSTANT"
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def wide(self) -> bool:
        return "128" in self.opcode.split(".")


@dataclass
class Loop:
    """A natural loop: the instructions that run again and again, inner loops' included."""

    instructions: list[Instruction]

    def count(self, opcode: str, wide: bool | None = None) -> int:
        """How many of its instructions are `opcode` (LDG, MUFU.EX2); wide: only those of 128 bits, or only others."""
        return sum(
            (i.opcode + ".").startswith(opcode + ".") and (wide is None or i.wide == wide) for i in self.instructions
        )

    @property
    def addresses(self) -> frozenset[int]:
        return frozenset(i.address for i in self.instructions)


@dataclass
class Kernel:
    name: str  # demangled, without arguments: anl::gpu::rows_cluster_kernel<anl::gpu::half_t, false>
    registers: int
    stack: int
    shared: int
    local: int
    instructions: list[Instruction] = field(repr=False, default_factory=list)
    symbol: str = ""  # mangled

    @property
    def spills(self) -> int:
        """Accesses to local memory: spilled registers, or arrays indexed at run time."""
        return sum(i.base in ("LDL", "STL") for i in self.instructions)

    @property
    def loops(self) -> list[Loop]:
        """The shortest first."""
        return natural_loops(self.instructions)

    @property
    def innermost_loops(self) -> list[Loop]:
        """Those that no other loop is within."""
        loops = self.loops
        return [loop for loop in loops if not any(other.addresses < loop.addresses for other in loops)]

    @property
    def base_name(self) -> str:
        """`rows_split_kernel` of `anl::gpu::(anonymous namespace)::rows_split_kernel<float, false>`."""
        return re.sub(r"<.*", "", self.name, flags=re.S).split("::")[-1]

    @property
    def parameters(self) -> list[str]:
        """Those of the template: ["float", "false"]."""
        inside = re.search(r"<(.*)>$", self.name, re.S)
        return [word.strip().split("::")[-1] for word in inside[1].split(",")] if inside else []


def kernels(binary) -> list[Kernel]:
    """The kernels of a cubin (or of an object that holds one architecture)."""
    usage = RESOURCES.findall(run(tool("cuobjdump"), "-res-usage", binary))
    text = run(tool("cuobjdump"), "-sass", binary)
    starts = list(FUNCTION.finditer(text))
    code = {
        start[1]: [
            Instruction(int(address, 16), predicate or "", opcode, operands.strip())
            for address, predicate, opcode, operands in INSTRUCTION.findall(text[start.end() : stop])
        ]
        for start, stop in zip(starts, [s.start() for s in starts[1:]] + [len(text)])
    }
    names = demangled([name for name, *_ in usage])
    arch = re.search(r"code for sm_(\d+)", text)
    reserved = 1024 if arch and int(arch[1]) >= 90 else 0  # CUDA's own, which these tools count from there on
    found = []
    for name, *sizes in usage:
        registers, stack, shared, local = map(int, sizes)
        found.append(Kernel(names[name], registers, stack, max(0, shared - reserved), local, code.get(name, []), name))
    return found


def demangled(names: list[str]) -> dict[str, str]:
    filter_ = tool("cu++filt") or shutil.which("c++filt")
    if not names or filter_ is None:
        return {name: name for name in names}
    plain = run(filter_, *names).splitlines()
    return {name: re.sub(r"^void ", "", without_arguments(text)) for name, text in zip(names, plain)}


def without_arguments(text: str) -> str:
    """`f<a(int)1>(x, y)` without the arguments at its end."""
    depth = 0
    for i in range(len(text) - 1, -1, -1):
        depth += (text[i] == ")") - (text[i] == "(")
        if depth == 0:
            return text[:i] if text.endswith(")") else text
    return text


# ---- control flow ----------------------------------------------------------------------------------------------------


def successors(code: list[Instruction]) -> list[list[int]]:
    """For every instruction, the indices of those that may run after it."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    meet = {}  # of each reconvergence register, where its threads go on
    for instruction in code:
        if instruction.base == "BSSY":
            where, register = ADDRESS.search(instruction.operands), RECONVERGENCE.search(instruction.operands)
            if where and register:
                meet.setdefault(register[1], []).append(int(where[1], 16))
    result = []
    for i, instruction in enumerate(code):
        after = [i + 1] if i + 1 < len(code) else []
        base, where = instruction.base, ADDRESS.search(instruction.operands)
        conditional = bool(instruction.predicate) or ", 0x" in instruction.operands
        if base in ("BRA", "JMP", "BRX") and where:
            target = [index[int(where[1], 16)]] if int(where[1], 16) in index else []
            after = target + (after if conditional else [])
        elif base == "BSYNC":
            register = RECONVERGENCE.search(instruction.operands)
            targets = [t for t in meet.get(register[1] if register else "", []) if t > instruction.address]
            after = [index[min(targets)]] if targets and min(targets) in index else after
        elif base in ("EXIT", "RET", "BRX", "JMX", "KILL"):
            after = after if instruction.predicate else []
        result.append(after)
    return result


def dominators(after: list[list[int]]) -> list[int]:
    """The immediate dominator of every instruction (-1: not reached), by Cooper, Harvey and Kennedy's iteration."""
    order, seen, stack = [], {0}, [(0, iter(after[0]))]
    while stack:
        node, rest = stack[-1]
        child = next((c for c in rest if c not in seen), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(child)
            stack.append((child, iter(after[child])))
    order.reverse()
    rank = {node: i for i, node in enumerate(order)}
    before = {node: [] for node in order}
    for node in order:
        for child in after[node]:
            before[child].append(node)
    immediate = [-1] * len(after)
    immediate[0] = 0
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            new = None
            for other in before[node]:
                if immediate[other] < 0:
                    continue
                if new is None:
                    new = other
                    continue
                a, b = new, other
                while a != b:
                    while rank[a] > rank[b]:
                        a = immediate[a]
                    while rank[b] > rank[a]:
                        b = immediate[b]
                new = a
            if immediate[node] != new:
                immediate[node], changed = new, True
    return immediate


def natural_loops(code: list[Instruction]) -> list[Loop]:
    """The loops of a function, one for each head, the innermost first."""
    if not code:
        return []
    after = successors(code)
    immediate = dominators(after)
    before = [[] for _ in code]
    for node, children in enumerate(after):
        for child in children:
            before[child].append(node)

    def dominates(a, b):
        while b != a and b != 0:
            b = immediate[b]
        return b == a

    bodies = {}
    for node, children in enumerate(after):
        if immediate[node] < 0:
            continue
        for head in children:
            if not dominates(head, node):
                continue
            body = bodies.setdefault(head, {head})
            stack = [node]
            while stack:
                x = stack.pop()
                if x not in body and immediate[x] >= 0:
                    body.add(x)
                    stack.extend(before[x])
    loops = [Loop([code[i] for i in sorted(body)]) for body in bodies.values() if len(body) > 1]
    return sorted(loops, key=lambda loop: len(loop.instructions))
