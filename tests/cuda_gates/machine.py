"""A warp's registers, and instructions as walk.py runs them; arithmetic.py and transfers.py have what they do."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from disassembly import Instruction
from opcodes import WORD, Operand, float_bits, lift, lift_bits, split_operands, tidy

CONTROL = {"BSSY": "meet_set", "BSYNC": "meet_reached", "EXIT": "exit", "KILL": "exit", "BPT": "exit", "RET": "ret",
           "CALL": "call", "BRX": "jump_table", "BRA": "branch", "JMP": "branch"}  # fmt: skip
NO_RESULT = set(
    "STG STS ST STL RED BAR MEMBAR FENCE ERRBAR CGAERRBAR CCTL UBLKCP UCGABAR_ARV UCGABAR_WAIT WARPSYNC ENDCOLLECTIVE "
    "YIELD NOP NANOSLEEP BREAK BMOV DEPBAR LDGDEPBAR LDGSTS PMTRIG ACQBULK PREEXIT STSM BSSY BSYNC".split()
)
EFFECTS: dict = {}  # opcode -> f(state, op, lanes): what it does to what is known; gives the bytes it moves, or None
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


class Lanes:
    ALL = 0xFFFFFFFF

    @staticmethod
    def where(test) -> int:
        return sum(1 << lane for lane in range(32) if test(lane))

    @staticmethod
    def split(value, mask: int) -> tuple[int, int, int]:
        if value is None:
            return 0, 0, mask
        if type(value) is int:
            return (mask, 0, 0) if value else (0, mask, 0)
        yes = Lanes.where(lambda lane: value[lane] == 1) & mask
        no = Lanes.where(lambda lane: value[lane] == 0) & mask
        return yes, no, mask & ~yes & ~no


@dataclass
class Op:
    """An instruction, read once."""

    address: int
    opcode: str
    base: str
    words: list[str]
    predicate: Operand | None
    operands: list[Operand]
    control: str | None = None
    target: int | None = None
    offset: int = 0
    register: str = ""
    conditions: list[Operand] = field(default_factory=list)  # more predicates of a branch
    results: list[tuple[str, int]] = field(default_factory=list)  # registers written
    sources: list[Operand] = field(default_factory=list)
    reads: frozenset = frozenset()  # registers
    execute: object = None


WIDTHS = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


def width(opcode: str) -> int:
    """Bytes that a lane loads or stores."""
    return next((WIDTHS[word] for word in opcode.split(".") if word in WIDTHS), 4)


def result_registers(op: Op) -> int:
    words = [op.base, *op.words]
    if op.base in ("DADD", "DMUL", "DFMA") or "WIDE" in words:
        return 2
    if op.base in ("LDG", "LDS", "LD", "LDC", "ULDC", "ATOMG", "ATOM", "LDL", "LDCU", "ATOMS"):
        return max(1, width(op.opcode) // 4)
    if op.base in ("HMMA", "IMMA"):
        return 4 if "F32" in words or op.base == "IMMA" else 2
    if op.base == "LDSM":
        return int(words[-1]) if words[-1].isdigit() else 1
    if op.base in ("F2F", "F2I", "I2F", "FRND"):
        wide = ("F64",) if op.base == "I2F" else ("F64", "S64", "U64")  # of what it makes
        return 2 if op.words[:1] and op.words[0] in wide else 1
    if op.base == "CS2R":
        return 1 if "32" in words else 2
    return 1


def compiled(code: list[Instruction]) -> list[Op]:
    return [compile_one(instruction) for instruction in code]


def compile_one(instruction: Instruction) -> Op:
    words = instruction.opcode.split(".")
    predicate = instruction.predicate.lstrip("@")
    control = CONTROL.get(words[0])
    if control == "call" and predicate:
        control = "branch"
    op = Op(instruction.address, instruction.opcode, words[0], words[1:],
            split_operands(predicate)[0] if predicate else None, [], control)  # fmt: skip
    text = instruction.operands
    if control:
        if control in ("branch", "call", "meet_set") and (match := TARGET.search(text)):
            op.target = int(match[1], 16)
            head = text[: match.start()].rstrip(" ,")
            op.conditions = [o for o in split_operands(head) if o.kind in ("P", "UP")] if control == "branch" else []
            if "DIV" in op.words:  # whether the lanes of a warp are apart: they are not
                op.control, op.execute = None, nothing
        if control in ("meet_set", "meet_reached"):
            op.register = re.search(r"B\d+", text)[0]
        if control == "jump_table":
            register, offset = text.split()[:2]
            op.operands, op.offset = split_operands(register), int(offset, 16)
        if control == "ret":
            op.operands = split_operands(text.split()[0])
        return op
    op.operands = split_operands(text)
    op.sources = list(op.operands)
    if op.base not in NO_RESULT:
        take_results(op)
    op.reads = frozenset((o.kind, o.name) for o in op.sources if o.kind in ("R", "UR") and o.name != "RZ")
    if memory := [o.name[0] for o in op.sources if o.kind == "memory" and o.name[0] not in (None, "RZ", "URZ")]:
        op.reads |= {("R", int(name[1:])) for name in memory}
    op.execute = EFFECTS.get(op.base) or EFFECTS.get(op.base[1:] if op.base.startswith("U") else "", forget)
    return op


# Opcodes with several results: their kinds, in order; of P there may be fewer.
RESULTS = {
    "PR": "LOP3 SHFL ATOMG ATOM R2UR ELECT MATCH",
    "RPP": "IADD3 VIMNMX",
    "RP": "LEA IMAD VIADD VOTE VOTEU B2R",
    "PP": "ISETP FSETP DSETP HSETP2 PLOP3",
}
RESULTS = {base: kinds for kinds, bases in RESULTS.items() for base in bases.split()}  # fmt: skip


def take_results(op: Op) -> None:
    """Moves what an instruction writes from its sources to its results."""
    base = op.base[1:] if op.base[0] == "U" and op.base[1:] in RESULTS else op.base
    votes = base in ("VOTE", "VOTEU")
    for wanted in RESULTS.get(base, "A"):
        if not op.sources or (votes and len(op.sources) == 1):
            return
        kind = op.sources[0].kind
        fits = kind in ("R", "UR", "P", "UP") if wanted == "A" or votes else kind in (wanted, "U" + wanted)
        if fits and not op.sources[0].inverted and not op.sources[0].minus:
            first = op.sources.pop(0)
            op.results.append((first.kind, first.name))
        elif wanted == "R" and base != "LOP3":
            return


def nothing(state, op, mask):
    return None


def forget(state, op, mask):
    """The results are not known."""
    for kind, name in op.results:
        if name in ("RZ", "PT"):
            continue
        for high in range(result_registers(op) if kind in ("R", "UR") else 1):
            state.put(op, mask, kind, name + high, None)


def effect(*opcodes: str):
    """Registers what some opcodes do."""

    def register(function):
        EFFECTS.update(dict.fromkeys(opcodes, function))
        return function

    return register


class State:
    """What a warp knows. constant(bank, offset, size) and load(address, size) give a number, or None; special: name ->
    value; shared: address -> byte; arrived: address -> how often an atomic instruction has been there."""

    def __init__(self, constant, load, special: dict, shared: dict, arrived: dict):
        # Registers that nothing was written to: the compiler sets single bits of such, so they are something.
        self.files = {"R": [0] * 256, "UR": [0] * 256, "P": [0] * 8, "UP": [0] * 8}
        self.constant, self.load, self.special = constant, load, special
        self.shared, self.arrived = shared, arrived

    @staticmethod
    def first(value, mask: int):
        return value if type(value) is not list else value[(mask & -mask).bit_length() - 1]

    def predicate(self, operand: Operand):
        value = 1 if operand.name == "PT" else self.files[operand.kind][operand.name]
        return lift(lambda x: x ^ 1, value) if operand.inverted else value

    def raw(self, operand: Operand, high: int = 0):
        """A word of an operand, without its sign."""
        if operand.kind in ("R", "UR"):
            return 0 if operand.name == "RZ" else self.files[operand.kind][operand.name + high]
        if operand.kind == "int":
            return operand.name if not high else 0
        if operand.kind == "const":
            bank, (base, _, uniform, offset) = operand.name
            at = self.place(base, False, uniform, offset + 4 * high)
            return lift(lambda a: self.constant(bank, a, 4), at) if at is not None else None
        if operand.kind == "float":
            return float_bits(operand.name)
        return None

    def word(self, operand: Operand, high: int = 0):
        value = self.raw(operand, high)
        if operand.absolute:
            return None
        if operand.minus:
            value = lift(lambda x: -x & WORD, value)
        return lift(lambda x: x ^ WORD, value) if operand.inverted else value

    def bits(self, operand: Operand):
        """A word of which some bits may be known."""
        value = None if operand.absolute or operand.minus else self.raw(operand)
        return lift_bits(lambda pair: (~pair[0] & WORD, pair[1]), value) if operand.inverted else value

    def register(self, name: str, high: int = 0):
        if name in ("RZ", "URZ"):
            return 0
        kind, number = ("UR", name[2:]) if name.startswith("U") else ("R", name[1:])
        return self.files[kind][int(number) + high]

    def pair(self, name: str):
        """The 64 bits of a register and the one after it."""
        return lift(lambda a, b: a | b << 32, self.register(name), self.register(name, 1))

    def place(self, base: str | None, wide: bool, uniform: str | None, offset: int):
        """An address."""
        parts = [0]
        if base:
            parts.append(self.pair(base) if wide else self.register(base))
        if uniform:
            parts.append(self.pair(uniform) if wide and not base else self.register(uniform))
        total = lift(lambda *all: sum(all) + offset, *parts)
        return lift(lambda x: x & (0xFFFFFFFFFFFFFFFF if wide else WORD), total)

    def put(self, op: Op, mask: int, kind: str, name, value) -> None:
        if name in ("RZ", "PT"):
            return
        file = self.files[kind]
        if op.predicate is not None:
            yes, _, unknown = Lanes.split(self.predicate(op.predicate), mask)
            if unknown:
                value = lift_bits(lambda a, b: (a[0], a[1] | b[1] | (a[0] ^ b[0])), value, file[name])
                yes |= unknown
            mask = yes
        if kind in ("UR", "UP"):
            if mask:
                file[name] = self.first(value, mask)
        elif mask == Lanes.ALL:
            file[name] = value
        elif mask and value is not file[name]:
            old, new = ([v] * 32 if type(v) is not list else v for v in (file[name], value))
            file[name] = tidy([new[lane] if mask >> lane & 1 else old[lane] for lane in range(32)])

    def active(self, op: Op, mask: int) -> int:
        if op.predicate is None:
            return mask
        yes, _, unknown = Lanes.split(self.predicate(op.predicate), mask)
        return yes | unknown
