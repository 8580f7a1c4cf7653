"""What instructions that move numbers do to what is known: memory, lanes to lanes, special registers, conversions."""

from __future__ import annotations

from machine import Lanes, effect, forget, nothing, width
from opcodes import float_bits, float_up, lift, reciprocal, tidy, truncated

# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_operand(op):
    return next(o for o in op.operands if o.kind == "memory")


def place_of(state, op, wide=False):
    base, of_64, uniform, offset = memory_operand(op).name
    return state.place(base, of_64 or wide, uniform, offset)


def put_loaded(state, op, mask, read):
    """read(address, bytes) -> number or None, word by word."""
    size, words = width(op.opcode), op.opcode.split(".")
    place = place_of(state, op)
    kind, name = op.results[-1]
    if name != "RZ":
        for i in range(max(1, size // 4)):
            value = lift(lambda a, i=i: read(a + 4 * i, min(size, 4)), place)
            if value is not None and ("S8" in words or "S16" in words):
                bits = 8 * size
                value = lift(lambda x, b=bits: x | (0xFFFFFFFF >> b << b if x >> (b - 1) & 1 else 0), value)
            state.put(op, mask, kind, name + i, value)
    for kind, name in op.results[:-1]:
        state.put(op, mask, kind, name, None)
    return size * state.active(op, mask).bit_count()


@effect("LDG", "LD")
def load_global(state, op, mask):
    return put_loaded(state, op, mask, state.load)


@effect("LDS")
def load_shared(state, op, mask):
    def read(address, count):
        found = [state.shared.get(address + i) for i in range(count)]
        return None if None in found else sum(byte << 8 * i for i, byte in enumerate(found))

    return put_loaded(state, op, mask, read)


@effect("STS")
def store_shared(state, op, mask):
    size, place, active = width(op.opcode), place_of(state, op), state.active(op, mask)
    source = op.sources[-1]
    lanes = place if type(place) is list else [place] * 32
    for i in range(max(1, size // 4)):
        high = state.word(source, i) if source.name != "RZ" else 0
        values = high if type(high) is list else [high] * 32
        for lane in range(32):
            if not active >> lane & 1:
                continue
            if type(lanes[lane]) is not int:  # it may be anywhere
                state.shared.clear()
                break
            for j in range(min(size, 4)):
                byte = values[lane] >> 8 * j & 255 if type(values[lane]) is int else None
                state.shared[lanes[lane] + 4 * i + j] = byte
    return size * active.bit_count()


@effect("STG", "ST", "RED", "LDGSTS")
def store_global(state, op, mask):
    return width(op.opcode) * state.active(op, mask).bit_count()


@effect("ATOMG", "ATOM")
def add_and_fetch(state, op, mask):
    """One lane that adds one to a counter, of which no other CTA knows: it begins at what a CAS wrote, or at zero."""
    place, active = place_of(state, op), state.active(op, mask)
    brought = [state.first(state.word(op.sources[-1], i), active) for i in (0, 1)]
    forget(state, op, mask)
    if active.bit_count() != 1 or (at := state.first(place, active)) is None:
        return
    if "CAS" in op.words:
        state.arrived.began[at & 0xFFFFFFFF] = brought
    if "ADD" in op.words:
        low, high = state.arrived.began.get(at & 0xFFFFFFFF, (0, 0))
        kind, name = op.results[-1]
        state.put(op, mask, kind, name, None if low is None else low + state.arrived[at] & 0xFFFFFFFF)
        if "64" in op.words:
            state.put(op, mask, kind, name + 1, high)
        state.arrived[at] += 1


@effect("LDC", "LDCU")
def load_constant(state, op, mask):
    bank, (base, _, uniform, offset) = op.sources[0].name
    size, place = width(op.opcode), state.place(base, False, uniform, offset)
    kind, name = op.results[0]
    for i in range(max(1, size // 4)):
        state.put(op, mask, kind, name + i, lift(lambda a, i=i: state.constant(bank, a + 4 * i, min(size, 4)), place))


# ---- special registers -----------------------------------------------------------------------------------------------


@effect("S2R", "S2UR")
def read_special(state, op, mask):
    state.put(op, mask, *op.results[0], state.special.get(op.sources[0].name))


@effect("CS2R")
def read_special_pair(state, op, mask):
    zero = 0 if op.sources[0].name == "RZ" else None
    kind, name = op.results[0]
    for high in range(1 if "32" in op.words else 2):
        state.put(op, mask, kind, name + high, zero)


@effect("P2R")
def predicates_to_register(state, op, mask):
    if op.words or op.operands[1].name != "PR" or op.operands[2].name != "RZ":
        return forget(state, op, mask)
    wanted = op.operands[3].name
    bits = [state.files["P"][i] if i < 7 else 1 for i in range(8) if wanted >> i & 1]
    places = [i for i in range(8) if wanted >> i & 1]
    state.put(op, mask, *op.results[0], lift(lambda *b: sum(x << i for x, i in zip(b, places)), *bits))


@effect("R2P")
def register_to_predicates(state, op, mask):
    for i in range(7):
        if op.operands[-1].name >> i & 1:
            value = None if op.words else lift(lambda x, i=i: x >> i & 1, state.word(op.operands[1]))
            state.put(op, mask, "P", i, value)


# ---- lanes -----------------------------------------------------------------------------------------------------------


@effect("SHFL")
def shuffle(state, op, mask):
    value = state.word(op.sources[0])
    state.put(op, mask, *op.results[-1], value if type(value) is int else None)
    if len(op.results) > 1:
        state.put(op, mask, *op.results[0], None)


@effect("VOTE", "VOTEU")
def vote(state, op, mask):
    yes, no, unknown = Lanes.split(state.predicate(op.sources[-1]), state.active(op, mask))
    value = 1 if yes and not unknown else 0 if not yes and not unknown else None
    if "ANY" in op.words and yes:
        value = 1
    if "ALL" in op.words:
        value = 0 if no else 1 if not unknown else None
    for kind, name in op.results:
        ballot = None if unknown or "ANY" not in op.words else yes
        state.put(op, mask, kind, name, ballot if kind in ("R", "UR") else value)


@effect("ELECT")
def elect(state, op, mask):
    yes, _, unknown = Lanes.split(state.predicate(op.sources[-1]), state.active(op, mask))
    one = yes & -yes
    for kind, name in op.results:
        value = None if unknown else tidy([int(one >> lane & 1) for lane in range(32)]) if kind in ("P", "UP") else (
            one.bit_length() - 1 if one else None)  # fmt: skip
        state.put(op, mask, kind, name, value)


# ---- conversions, as divisions of integers make them -----------------------------------------------------------------


@effect("I2F", "I2FP")
def to_float(state, op, mask):
    kind, name = op.results[0]
    source = op.sources[0]
    if op.words[:2] == ["U64", "RP"]:
        value = lift(lambda low, high: float_up(low | high << 32), state.word(source), state.word(source, 1))
    elif op.words in (["U32", "RP"], ["RP"]):
        value = lift(lambda x: float_up(x if "U32" in op.words or x < 1 << 31 else x - (1 << 32)), state.word(source))
    elif op.words == ["F32", "S32"]:
        value = lift(lambda x: float_bits(repr(float(x if x < 1 << 31 else x - (1 << 32)))), state.word(source))
    else:
        return forget(state, op, mask)
    state.put(op, mask, kind, name, value)


@effect("F2I")
def to_integer(state, op, mask):
    kind, name = op.results[0]
    if "U64" in op.words and "TRUNC" in op.words:
        value = lift(lambda x: truncated(x, 64), state.word(op.sources[0]))
        state.put(op, mask, kind, name, lift(lambda x: x & 0xFFFFFFFF, value))
        state.put(op, mask, kind, name + 1, lift(lambda x: x >> 32, value))
    elif "U32" in op.words and "TRUNC" in op.words:
        state.put(op, mask, kind, name, lift(lambda x: truncated(x, 32), state.word(op.sources[0])))
    else:
        forget(state, op, mask)


@effect("MUFU")
def special_function(state, op, mask):
    kind, name = op.results[0]
    value = lift(reciprocal, state.raw(op.sources[0])) if op.words == ["RCP"] else None
    state.put(op, mask, kind, name, value)


@effect("HFMA2")
def packed_constant(state, op, mask):
    """-0 x 0 + two numbers of half precision: how the compiler loads a constant."""
    floats = [o for o in op.sources[2:] if o.kind in ("float", "int")]
    if [o.name for o in op.sources[:2]] != ["RZ", "RZ"] or len(floats) != 2 or "BF16_V2" in op.words:
        return forget(state, op, mask)
    high, low = (half_bits(o) for o in floats)
    state.put(op, mask, *op.results[0], high << 16 | low)


def half_bits(operand) -> int:
    if operand.kind == "int":
        return operand.name & 0xFFFF
    return float_bits(operand.name, "e") ^ (0x8000 if operand.minus else 0)


for opcode in ("FENCE", "MEMBAR"):
    effect(opcode)(nothing)
