"""What machine instructions do to integers, as far as a walk through a kernel needs it (walk.py).

A value is an int (32 bits, the same in every lane), None (not known), a pair (the bits that are known, and which are
not), or a list of 32 such, one per lane. What stands here is only what decides addresses, loops and branches:
everything else leaves a value that is not known.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

WORD = 0xFFFFFFFF
UNSURE = {type(None), tuple}
TRUE = {"PT", "UPT"}
ZERO = {"RZ", "URZ", "SRZ"}


@dataclass(frozen=True)
class Operand:
    kind: str  # R, UR, P, UP, int, const, memory, special, other
    name: str | int | tuple
    minus: bool = False
    inverted: bool = False  # ~ of a register, ! of a predicate
    absolute: bool = False


REGISTER = re.compile(r"^(UR|R|UP|P)(\d+)$")
NUMBER = re.compile(r"^0x[0-9a-f]+$")
FLOAT = re.compile(r"^(\+?INF|\+?QNAN|\d+(\.\d+)?(e[+-]?\d+)?)$")
CONSTANT = re.compile(r"^c\[(0x[0-9a-f]+)\]\[([^\]]+)\]$")


def float_bits(text: str, kind: str = "f") -> int | None:
    """A number's bits as a float (e: of half precision, d: a double); None where it is none."""
    number = {"INF": float("inf"), "QNAN": float("nan")}.get(text.lstrip("+"), None)
    try:
        return int.from_bytes(struct.pack(f"<{kind}", float(text) if number is None else number), "little")
    except OverflowError:
        return None


def address_parts(text: str) -> tuple:
    """("R4", "64", "UR3", 16): base register, whether 64 bits of it, uniform register, offset."""
    base, wide, uniform, offset = None, False, None, 0
    for part in text.replace("+-", "+ -").replace(" ", "").split("+"):
        name, _, suffix = part.partition(".")
        if REGISTER.match(name) or name in ZERO:
            if name.startswith("U"):
                uniform = name
            else:
                base, wide = name, "64" in suffix.split(".")
        elif part:
            offset += int(part, 0)
    return base, wide, uniform, offset


def parse_operand(text: str) -> Operand:
    minus = inverted = absolute = False
    text = text.strip().replace(".reuse", "")
    while text[:1] in "-~!|" and not (text[0] == "-" and len(text) > 1 and text[1].isdigit()):
        minus |= text[0] == "-"
        inverted |= text[0] in "~!"
        absolute |= text[0] == "|"
        text = text[1:]
    text = text.replace("|", "")
    negative = text.startswith("-")
    bare = text.lstrip("-").split(".H")[0].strip()
    if bare in TRUE:
        return Operand("P", "PT", inverted=inverted)
    if bare in ZERO:
        return Operand("R", "RZ", minus, inverted, absolute)
    if NUMBER.match(bare):
        number = int(bare, 16)
        return Operand("int", (-number if negative else number) & WORD, minus, inverted)
    if match := REGISTER.match(bare.split(".")[0]):
        return Operand(match[1], int(match[2]), minus, inverted, absolute)
    if match := CONSTANT.match(bare):
        return Operand("const", (int(match[1], 16), address_parts(match[2])), minus, inverted, absolute)
    if FLOAT.match(bare):
        return Operand("float", text, minus)
    if "[" in bare:
        return Operand("memory", address_parts(bare[bare.rindex("[") + 1 : bare.rindex("]")]))
    return Operand("special", bare)


def split_operands(text: str) -> list[Operand]:
    return [parse_operand(part) for part in text.split(",")] if text.strip() else []


# ---- values ----------------------------------------------------------------------------------------------------------


def tidy(lanes: list):
    first = lanes[0]
    return first if all(x == first for x in lanes) else lanes


def lift(function, *values):
    """function of ints, over values."""
    kinds = {type(value) for value in values}
    if list not in kinds:
        return function(*values) if UNSURE.isdisjoint(kinds) else None
    columns = [value if type(value) is list else [value] * 32 for value in values]
    return tidy([function(*row) if UNSURE.isdisjoint(map(type, row)) else None for row in zip(*columns)])


def lift_bits(function, *values):
    """function of (number, bits that are not known) pairs, over values; gives such a pair."""

    def one(*row):
        number, unsure = function(*[x if type(x) is tuple else (0, WORD) if x is None else (x, 0) for x in row])
        return number if not unsure else None if unsure == WORD else (number & ~unsure, unsure)

    if not any(type(value) is list for value in values):
        return one(*values)
    columns = [value if type(value) is list else [value] * 32 for value in values]
    return tidy([one(*row) for row in zip(*columns)])


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


COMPARE = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}
COMBINE = {"AND": lambda a, b: a & b, "OR": lambda a, b: a | b, "XOR": lambda a, b: a ^ b}


def lookup_bits(table: int, *inputs: tuple[int, int]) -> tuple[int, int]:
    """LOP3's three-input function of (known bits, bits that are not known), and such a pair."""
    can = [[~x & WORD | u, x | u] for x, u in inputs]  # where a bit can be 0, 1
    zero = one = 0
    for i in range(8):
        here = can[0][i >> 2 & 1] & can[1][i >> 1 & 1] & can[2][i & 1]
        zero, one = (zero, one | here) if table >> i & 1 else (zero | here, one)
    return one & ~zero, one & zero


def permute(a: int, selector: int, b: int) -> int:
    data, result = (a | b << 32).to_bytes(8, "little"), 0
    for i in range(4):
        s = selector >> 4 * i & 15
        byte = data[s & 7]
        result |= (0xFF if byte & 0x80 else 0) << 8 * i if s & 8 else byte << 8 * i
    return result


def shift(words: list[str], low: int, by: int, high: int) -> int:
    """SHF: the pair high:low moved by so many bits, and the word of it that the modifiers name."""
    wide = "U64" in words or "S64" in words
    by = by & 63 if wide and "W" in words else min(by, 63 if wide else 32)
    arithmetic = "S32" in words or "S64" in words
    pair = low | high << 32
    if "R" in words:
        pair = (signed(pair, 64) if arithmetic else pair) >> by
    else:
        pair <<= by
        if not wide and "HI" not in words:
            return (low << by) & WORD
    return pair >> 32 & WORD if "HI" in words else pair & WORD


def as_float(x: int) -> float:
    return struct.unpack("<f", struct.pack("<I", x))[0]


def as_double(low: int, high: int) -> float:
    return struct.unpack("<d", struct.pack("<II", low, high))[0]


def float_up(number: int) -> int:
    """The smallest float that is not below an integer."""
    bits = float_bits(repr(float(number)))
    return bits if as_float(bits) >= number else bits + 1


def reciprocal(x: int) -> int | None:
    number = as_float(x)
    return float_bits(repr(1.0 / number)) if number and abs(number) != float("inf") else None


def truncated(x: int, bits: int) -> int | None:
    number = as_float(x)
    return max(0, min(int(number), (1 << bits) - 1)) if abs(number) < 1e30 else None
