"""Walks a warp through a kernel's machine code with what is known of its arguments, and counts what it issues.

Integers that follow from the launch (parameters, thread and block numbers, labels) are computed; numbers that follow
from logits are not known, but are neither infinite nor NaN. Where a branch depends on those, the walk takes the *plain
path*, as rare cases are more work: a long side without a loop, where the other has one; else the side that reads memory
or exchanges numbers, if one alone does; of two loops, the one that uses tensor cores, or the shorter one; else the side
with fewer instructions. A loop that may be left is left. What cannot be followed so raises Lost.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import arithmetic  # noqa: F401
import transfers  # noqa: F401
from disassembly import Instruction, dominators, natural_loops, successors
from machine import TARGET, Lanes, State, compiled
from opcodes import tidy

MOST = 5_000_000  # instructions of a warp
SUBROUTINE = 30  # a call, where paths are compared
SHORT = 30  # instructions that are no alternative to a loop
TOGETHER = {"LDG", "LDS", "LD", "STG", "ST", "SHFL", "BAR", "LDSM", "LDGSTS", "RED", "ATOMG", "UCGABAR_WAIT"}
ENDS = {"EXIT", "KILL", "BPT", "RET"}


def works_together(instruction: Instruction) -> bool:
    """Whether all lanes read, write or exchange something here; 16 bits are a class that is taken alone."""
    return instruction.base in TOGETHER and ".U16" not in instruction.opcode


class Lost(Exception):
    """The walk does not know where to go on."""


@dataclass(frozen=True)
class Side:
    instructions: frozenset[int]
    least: int  # how many a warp issues there at least


class Graph:
    """A kernel's control flow: successors, where the two sides of a branch meet again, and what lies between."""

    def __init__(self, code: list[Instruction], tables: dict[int, list[int]]):
        self.code = code
        self.index = {instruction.address: i for i, instruction in enumerate(code)}
        self.after = successors(code)
        for i, instruction in enumerate(code):
            if instruction.base == "BRX":
                self.after[i] = sorted({self.index[t] for t in tables.get(instruction.address, [])})
            elif instruction.base == "CALL" and instruction.predicate:  # a loop is left so, without coming back
                self.after[i] = [self.index[int(TARGET.search(instruction.operands)[1], 16)], i + 1]
            elif instruction.opcode.startswith("BRA.DIV") or instruction.base in ("BPT", "WARPSYNC"):
                self.after[i] = [i + 1] if i + 1 < len(code) else []
        self._meet = self._post_dominators()
        self.loops = [frozenset(self.index[i.address] for i in loop.instructions) for loop in natural_loops(code)]
        self._sides: dict[tuple[int, int], Side] = {}

    def _post_dominators(self) -> list[int]:
        n = len(self.code)  # node 0 is the end of everything, node i + 1 instruction i
        before = [[] for _ in range(n + 1)]
        for i, children in enumerate(self.after):
            for child in children:
                before[child + 1].append(i + 1)
            if not children or self.code[i].base in ENDS:
                before[0].append(i + 1)
        return dominators(before)

    def meet(self, i: int) -> int | None:
        """The instruction that everything after i comes to; None: the end."""
        immediate = self._meet[i + 1]
        return immediate - 1 if immediate > 0 else None

    def side(self, branch: int, first: int) -> Side:
        """What lies between a successor of a branch and where its sides meet."""
        if (branch, first) not in self._sides:
            stop, least = self.meet(branch), 0 if first == self.meet(branch) else MOST
            far = {first: 1} if least else {}  # instruction -> how many there are up to it, at least
            level = list(far)
            while level:
                following = []
                for node in level:
                    if stop in self.after[node] or (stop is None and self.code[node].base in ENDS):
                        least = min(least, far[node])
                    here = far[node] + 1 + SUBROUTINE * (self.code[node].base == "CALL")
                    for child in self.after[node]:
                        if child != stop and here < far.get(child, MOST):
                            far[child] = here
                            following.append(child)
                level = following
            self._sides[branch, first] = Side(frozenset(far), least)
        return self._sides[branch, first]

    def choose(self, branch: int, taken: int, fallen: int) -> int:
        """Which side of a branch is the plain path."""
        sides = {node: self.side(branch, node) for node in (fallen, taken)}
        staying = [node for node in sides if branch in sides[node].instructions]
        if len(staying) == 1:
            if {self.code[i].base for i in sides[staying[0]].instructions} & {"STG", "HMMA", "LDSM"}:
                raise Lost(f"at {self.code[branch].address:#x}: it is not known how often a loop with stores runs")
            return taken + fallen - staying[0]
        own = {node: sides[node].instructions - sides[taken + fallen - node].instructions for node in sides}
        looped = {node: sum(len(loop) for loop in self.loops if loop <= own[node]) for node in sides}
        straight = min(sides, key=looped.get)
        if any(looped.values()) and not looped[straight] and len(own[straight]) >= SHORT:
            return straight
        working = [node for node in sides if any(works_together(self.code[i]) for i in own[node])]
        if len(working) == 1:
            return working[0]
        if len(working) == 2 and all(looped.values()):
            packed = [node for node in sides if any(self.code[i].base == "HMMA" for i in own[node])]
            return packed[0] if len(packed) == 1 else min(sides, key=looped.get)
        return min(sides, key=lambda node: sides[node].least)


@dataclass
class Trace:
    """What one warp issued: by instruction, and the bytes its lanes moved."""

    issued: Counter = field(default_factory=Counter)  # index of the instruction -> times
    moved: Counter = field(default_factory=Counter)  # index -> bytes, of all active lanes
    guessed: dict = field(default_factory=dict)  # index of a branch on what is not known -> index gone to
    waits: Counter = field(default_factory=Counter)  # instructions since it asked global memory -> times that it waits
    in_flight: int = 0  # bytes of global memory that it has asked for at a time, at most

    def add(self, other: Trace, times: int = 1) -> None:
        for mine, theirs in ((self.issued, other.issued), (self.moved, other.moved), (self.waits, other.waits)):
            for key, count in theirs.items():
                mine[key] += times * count
        self.guessed.update(other.guessed)
        self.in_flight = max(self.in_flight, other.in_flight)


def both(a, b):
    """Of two predicates that may not be known."""
    if type(a) is list or type(b) is list:
        columns = [value if type(value) is list else [value] * 32 for value in (a, b)]
        return tidy([both(x, y) for x, y in zip(*columns)])
    return 0 if 0 in (a, b) else None if None in (a, b) else 1


@dataclass
class Asked:
    """Bytes of global memory on their way, the last of them asked for by a warp's so many-th instruction."""

    bytes: int = 0
    step: int = 0


class Walk:
    def __init__(self, graph: Graph, state: State):
        self.graph, self.state = graph, state
        self.ops = compiled(graph.code)
        self.trace = Trace()
        self.alive = Lanes.ALL
        self.steps = 0
        self.calls: list[int | None] = []
        self.meetings: dict[str, int] = {}
        self.pending: set = set()  # registers that global memory has yet to fill
        self.asked = Asked()  # by loads to those
        self.copies: list[Asked] = [Asked()]  # groups of asynchronous copies to shared memory, the last one open
        self.at_barrier = lambda: None

    def run(self) -> Trace:
        self._run(0, Lanes.ALL, None)
        self._wait([self.asked, *self.copies])
        return self.trace

    def _condition(self, op, mask: int):
        """(lanes that branch, lanes that do not, lanes of which it is not known)."""
        value = 1
        for each in [op.predicate] * (op.predicate is not None) + op.conditions:
            value = both(value, self.state.predicate(each))
        if op.words[:2] == ["U", "ANY"] and type(value) is list:
            value = int(any(x for lane, x in enumerate(value) if mask >> lane & 1))
        return Lanes.split(value, mask)

    def _run(self, pc: int | None, mask: int, stop: int | None) -> None:
        state, trace, ops = self.state, self.trace, self.ops
        while pc is not None and pc != stop:
            mask &= self.alive
            if not mask:
                return
            if pc >= len(ops):
                raise Lost("the code ends without EXIT")
            op = ops[pc]
            self.steps += 1
            if self.steps > MOST:
                raise Lost(f"no end after {MOST} instructions, at {op.address:#x}")
            trace.issued[pc] += 1
            if op.base == "LDGDEPBAR":
                self.copies.append(Asked())
            if op.base == "DEPBAR" and len(self.copies) > 1:
                done = max(0, len(self.copies) - 1 - op.operands[-1].name)
                self._wait(self.copies[:done])
                del self.copies[:done]
            elif self.asked.bytes and (op.base == "DEPBAR" or not self.pending.isdisjoint(op.reads)):
                self._wait([self.asked])
                self.pending.clear()
            if op.base == "BAR":
                self.at_barrier()
            if op.control is None:
                moved = op.execute(state, op, mask)
                if moved:
                    trace.moved[pc] += moved
                    if op.base in ("LDG", "LDGSTS", "LD"):
                        asked = self.copies[-1] if op.base == "LDGSTS" else self.asked
                        asked.bytes += moved
                        asked.step = self.steps
                        self.pending.update(op.results)
                        on_its_way = self.asked.bytes + sum(group.bytes for group in self.copies)
                        trace.in_flight = max(trace.in_flight, on_its_way)
                pc += 1
                continue
            pc = getattr(self, "_" + op.control)(op, pc, mask)

    def _wait(self, asked: list[Asked]) -> None:
        """What was asked for has come."""
        waited_for = [each for each in asked if each.bytes]
        if waited_for:
            self.trace.waits[self.steps - max(each.step for each in waited_for)] += 1
        for each in waited_for:
            each.bytes = 0

    # ---- control flow: each gives the next instruction, or None where this part of the walk ends ------------------

    def _meet_set(self, op, pc, mask):
        self.meetings[op.register] = op.target
        return pc + 1

    def _meet_reached(self, op, pc, mask):
        target = self.meetings.get(op.register)
        return pc + 1 if target is None else self.graph.index[target]

    def _exit(self, op, pc, mask):
        yes, no, unknown = self._condition(op, mask)
        if unknown:
            self.trace.guessed[pc] = pc + 1
        self.alive &= ~yes
        return pc + 1 if no or unknown else None

    def _ret(self, op, pc, mask):
        _, no, unknown = self._condition(op, mask)
        if no or unknown:
            raise Lost(f"at {op.address:#x}: a return on a condition")
        where = self.state.first(self.state.word(op.operands[0]), mask)
        if self.calls:
            self.calls[-1] = where
        return None

    def _call(self, op, pc, mask):
        self.calls.append(None)
        self._run(self.graph.index[op.target], mask, None)
        where = self.calls.pop()
        return pc + 1 if where is None else self.graph.index.get(where, pc + 1)

    def _jump_table(self, op, pc, mask):
        where = self.state.word(op.operands[0])
        lanes = where if type(where) is list else [where] * 32
        places = {lanes[lane] for lane in range(32) if mask >> lane & 1}
        if None in places or any(place + op.offset + op.address + 16 not in self.graph.index for place in places):
            raise Lost(f"at {op.address:#x}: a jump through a table, to nobody knows where")
        meet = self.graph.meet(pc)
        for place in sorted(places):
            lanes_there = Lanes.where(lambda lane, place=place: lanes[lane] == place) & mask
            target = self.graph.index[place + op.offset + op.address + 16]
            if len(places) == 1:
                return target
            self._run(target, lanes_there, meet)
        return meet

    def _branch(self, op, pc, mask):
        yes, no, unknown = self._condition(op, mask)
        target, following = self.graph.index.get(op.target), pc + 1
        if target is None:
            raise Lost(f"at {op.address:#x}: a branch out of the kernel")
        if unknown:
            chosen = self.graph.choose(pc, target, following)
            self.trace.guessed[pc] = chosen
            if chosen == target:
                yes |= unknown
            else:
                no |= unknown
        if not no:
            return target
        if not yes:
            return following
        meet = self.graph.meet(pc)
        for first, lanes in ((following, no), (target, yes)):
            self._run(first, lanes, meet)
        return meet
