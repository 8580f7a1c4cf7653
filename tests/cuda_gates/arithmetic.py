"""What integer instructions, comparisons and selections do to what is known."""

from __future__ import annotations

from machine import effect, forget
from opcodes import (
    COMBINE,
    COMPARE,
    WORD,
    as_double,
    as_float,
    float_bits,
    lift,
    lift_bits,
    lookup_bits,
    permute,  # fmt: skip
    shift,
    signed,
    tidy,
)


def single(function):
    """One word out of words."""

    def do(state, op, mask):
        kind, name = op.results[0]
        state.put(op, mask, kind, name, function(state, op))
        for more in op.results[1:]:
            state.put(op, mask, *more, None)

    return do


def words_of(state, op, count):
    return [state.word(operand) for operand in op.sources[:count]]


@effect("IADD3", "VIADD", "IADD", "IADD32I")
def add(state, op, mask):
    numbers = [o for o in op.sources if o.kind not in ("P", "UP")]
    carries = [state.predicate(o) for o in op.sources if o.kind in ("P", "UP")] if "X" in op.words else []

    def value(operand):  # -x is ~x + 1, which carries where x is 0
        raw = state.raw(operand)
        return lift(lambda x: (x ^ WORD) + 1, raw) if operand.minus else state.word(operand)

    total = lift(lambda *all: sum(all), *[value(o) for o in numbers], *carries)
    put_sum(state, op, mask, total)


def put_sum(state, op, mask, total):
    kind, name = op.results[0]
    state.put(op, mask, kind, name, lift(lambda x: x & WORD, total))
    for i, (kind, name) in enumerate(op.results[1:]):
        state.put(op, mask, kind, name, lift(lambda x, i=i: int(x >> 32 > i), total))


@effect("IMAD")
def multiply_add(state, op, mask):
    a, b, c = op.sources[:3]
    carries = [state.predicate(o) for o in op.sources[3:] if o.kind in ("P", "UP")] if "X" in op.words else []
    sign = (lambda x: x) if "U32" in op.words else signed
    kind, name = op.results[0]
    x, y = state.word(a), state.word(b)
    nothing = type(x) is not list and type(y) is not list and 0 in (x, y)  # whatever the other is
    product = 0 if nothing else lift(lambda p, q: sign(p) * sign(q), x, y)
    if "WIDE" in op.words or "HI" in op.words:
        high = (lambda w: 0 if "U32" in op.words or w < 1 << 31 else WORD) if c.kind == "int" else None
        low, top = state.word(c), lift(high, state.word(c)) if high else state.word(c, 1)
        total = lift(lambda p, q, r: p + q + (r << 32), product, low, top)
        parts = [1] if "HI" in op.words else [0, 1]
        for at, part in enumerate(parts):
            if name != "RZ":
                state.put(op, mask, kind, name + at, lift(lambda t, part=part: t >> 32 * part & WORD, total))
        for more in op.results[1:]:
            state.put(op, mask, *more, lift(lambda t: int(t >> 64 > 0), total))
        return
    put_sum(state, op, mask, lift(lambda p, *others: (p & WORD) + sum(others), product, state.word(c), *carries))


@effect("LEA")
def shift_add(state, op, mask):
    numbers = [o for o in op.sources if o.kind not in ("P", "UP")]
    carries = [state.predicate(o) for o in op.sources if o.kind in ("P", "UP")] if "X" in op.words else []
    by = numbers[-1].name if len(numbers) > 2 else 0
    a, b = state.word(numbers[0]), state.word(numbers[1])
    if "HI" not in op.words:
        total = lift(lambda x, y: (x << by & WORD) + y, a, b)
    elif "SX32" in op.words:
        total = lift(lambda x, y, *p: (signed(x) << by >> 32 & WORD) + y + sum(p), a, b, *carries)
    else:
        c = state.word(numbers[2]) if len(numbers) > 3 else 0
        total = lift(lambda x, y, z, *p: ((x | z << 32) << by >> 32 & WORD) + y + sum(p), a, b, c, *carries)
    put_sum(state, op, mask, total)


@effect("LOP3")
def logic(state, op, mask):
    numbers = [o for o in op.sources if o.kind not in ("P", "UP")]
    table = numbers[3].name
    values = [state.bits(operand) for operand in op.sources[:3]]
    result = lift_bits(lambda *known: lookup_bits(table, *known), *values)
    for kind, name in op.results:
        state.put(op, mask, kind, name, result if kind in ("R", "UR") else is_not_zero(result))


def is_not_zero(value):
    def one(x):
        return None if x is None else int(x != 0) if type(x) is int else 1 if x[0] else None

    return tidy([one(x) for x in value]) if type(value) is list else one(value)


@effect("SHF")
def funnel(state, op, mask):
    value = lift(lambda low, by, high: shift(op.words, low, by, high), *words_of(state, op, 3))
    state.put(op, mask, *op.results[0], value)


effect("MOV")(single(lambda s, o: s.word(o.sources[0])))
effect("PRMT")(single(lambda s, o: lift(permute, *words_of(s, o, 3))))
effect("IABS")(single(lambda s, o: lift(lambda x: abs(signed(x)), s.word(o.sources[0]))))


@effect("R2UR")
def make_uniform(state, op, mask):
    active = state.active(op, mask)
    if active:
        state.put(op, mask, *op.results[-1], state.first(state.word(op.sources[-1]), active))


def choose(state, op, a, b):
    p = state.predicate(op.sources[2])
    if type(p) is int:
        return a if p else b
    if p is None:
        return a if a == b else None
    columns = [v if type(v) is list else [v] * 32 for v in (a, b)]
    return tidy([columns[0][i] if p[i] == 1 else columns[1][i] if p[i] == 0 else None for i in range(32)])


effect("SEL")(single(lambda s, o: choose(s, o, *words_of(s, o, 2))))
effect("FSEL")(
    single(lambda s, o: choose(s, o, *[None if x.minus or x.absolute else s.word(x) for x in o.sources[:2]]))
)


def extreme_of(op):
    """(a, b, whether the least) -> a word."""
    sign = (lambda x: x) if "U32" in op.words else signed
    floor = [0] * ("RELU" in op.words)
    return lambda a, b, least: max([(min if least else max)(a, b, key=sign), *floor], key=sign)


@effect("VIMNMX", "IMNMX")
def extreme(state, op, mask):
    if len(op.sources) != 3 or op.sources[2].kind not in ("P", "UP"):
        return forget(state, op, mask)
    least = state.predicate(op.sources[2])
    a, b = words_of(state, op, 2)
    value = lift(extreme_of(op), a, b, least)
    state.put(op, mask, *op.results[0], value)


@effect("VIADDMNMX")
def add_extreme(state, op, mask):
    if len(op.sources) != 4:
        return forget(state, op, mask)
    a, b, c = words_of(state, op, 3)
    least, either = state.predicate(op.sources[3]), extreme_of(op)
    value = lift(lambda x, y, z, p: either(x + y & WORD, z, p), a, b, c, least)
    state.put(op, mask, *op.results[0], value)


def comparison(state, op, mask, value, combine):
    """Puts a comparison's result and its opposite, each with what the modifiers combine it with."""
    third = state.predicate(op.sources[2])
    for i, (kind, name) in enumerate(op.results):
        one = lift(lambda x, i=i: int(x) ^ i, value)
        short = {"AND": 0, "OR": 1}.get(combine)
        known = short if short is not None and short in (one, third) else lift(COMBINE[combine], one, third)
        state.put(op, mask, kind, name, known)


def combining(op):
    return next(word for word in op.words if word in COMBINE)


@effect("ISETP")
def compare(state, op, mask):
    name = op.words[0]
    if name not in COMPARE or len(op.sources) < 3:
        return forget(state, op, mask)
    sign = (lambda x: x) if "U32" in op.words else signed
    a, b = words_of(state, op, 2)
    compare = COMPARE[name]
    if "EX" in op.words:
        low = state.predicate(op.sources[3])
        if name in ("EQ", "NE"):
            value = lift(lambda x, y, p: int(x == y and p) if name == "EQ" else int(x != y or p), a, b, low)
        else:
            value = lift(lambda x, y, p: p if x == y else int(compare(sign(x), sign(y))), a, b, low)
    else:
        value = lift(lambda x, y: int(compare(sign(x), sign(y))), a, b)
    if value is None and "U32" in op.words and name == "GE" and b == 0 and "EX" not in op.words:
        value = 1
    comparison(state, op, mask, value, combining(op))


def float_comparison(state, op, mask, words, number):
    """Of floats: one that is not known is taken for an ordinary number, neither infinite nor NaN."""
    name, combine = op.words[0], combining(op)
    if name in ("NAN", "NUM"):
        known = [lift(number, *words(state, o)) for o in op.sources[:2]]
        value = int(name == "NUM") if all(x is None or (type(x) is float and x == x) for x in known) else None
        return comparison(state, op, mask, value, combine)
    compare = COMPARE[name.removesuffix("U")]
    infinite = float("inf")

    def one(a, b):
        if (a is None and b is None) or (None in (a, b) and abs(b if a is None else a) != infinite):
            return None
        if a != a or b != b:
            return int(name.endswith("U"))
        return int(compare(a or 0.0, b or 0.0))

    lanes = []
    for operand in op.sources[:2]:
        value = lift(number, *words(state, operand))
        lanes.append(value if type(value) is list else [value] * 32)
    if operand_is_same(op):
        return comparison(state, op, mask, None, combine)
    comparison(state, op, mask, tidy([one(a, b) for a, b in zip(*lanes)]), combine)


def operand_is_same(op) -> bool:
    return op.sources[0] == op.sources[1]


def float_words(state, operand):
    word = state.raw(operand)
    word = lift(lambda x: x & 0x7FFFFFFF, word) if operand.absolute else word
    return [lift(lambda x: x ^ 1 << 31, word) if operand.minus else word]


def double_words(state, operand):
    if operand.kind == "float":
        bits = float_bits(operand.name, "d")
        low, high = bits & WORD, bits >> 32
    elif operand.kind == "int":
        low, high = 0, operand.name
    else:
        low, high = state.raw(operand), state.raw(operand, 1)
    high = lift(lambda x: x & 0x7FFFFFFF, high) if operand.absolute else high
    return [low, lift(lambda x: x ^ 1 << 31, high) if operand.minus else high]


@effect("FSETP")
def compare_floats(state, op, mask):
    float_comparison(state, op, mask, float_words, as_float)


@effect("HSET2")
def compare_pairs(state, op, mask):
    """Of two 16-bit floats: known where one word is twice an infinity, the other ordinary numbers, or as infinite."""
    if op.words[:3] != ["BF16_V2", "BF", "GT"]:
        return forget(state, op, mask)
    a, b = [packed_infinity(state, o) for o in op.sources[:2]]
    value = None if a == b is None or not (a or b) else 0x3F803F80 if (a or 0) > (b or 0) else 0
    kind, name = op.results[0]
    state.put(op, mask, kind, name, value)


def packed_infinity(state, operand) -> float | None:
    """inf or -inf where that is all that the operand holds; None: it is not known to be."""
    if operand.kind == "float":
        minus = operand.minus or operand.name.startswith("-")
        return (float("-inf") if minus else float("inf")) if operand.name.strip("+- ").lower() == "inf" else None
    word = state.word(operand) if operand.kind in ("R", "UR", "int", "const") else None
    return {0x7F807F80: float("inf"), 0xFF80FF80: float("-inf")}.get(word) if type(word) is int else None


@effect("DSETP")
def compare_doubles(state, op, mask):
    float_comparison(state, op, mask, double_words, as_double)


@effect("FMNMX")
def extreme_of_floats(state, op, mask):
    """Known where an infinity decides it."""
    least = state.predicate(op.sources[2]) if len(op.sources) == 3 else None
    if type(least) is not int:
        return forget(state, op, mask)
    lanes = []
    for operand in op.sources[:2]:
        value = lift(as_float, *float_words(state, operand))
        lanes.append(value if type(value) is list else [value] * 32)
    decides = float("-inf") if least else float("inf")
    bits = 0xFF800000 if least else 0x7F800000
    value = tidy([bits if decides in (a, b) else 0xFF800000 + 0x7F800000 - bits if a == b == -decides else None
                  for a, b in zip(*lanes)])  # fmt: skip
    state.put(op, mask, *op.results[0], value)


@effect("PLOP3")
def predicate_logic(state, op, mask):
    a, b, c = [state.predicate(o) for o in op.sources[:3]]
    for (kind, name), table in zip(op.results, [o.name for o in op.sources[3:5]]):
        pairs = lift_bits(lambda *known, table=table: lookup_bits(table, *known), *(first_bit(p) for p in (a, b, c)))
        state.put(op, mask, kind, name, as_predicate(pairs))


def first_bit(value):
    """A predicate as a word whose other bits are 0."""
    one = lambda x: (0, 1) if x is None else x
    return [one(x) for x in value] if type(value) is list else one(value)


def as_predicate(value):
    one = lambda x: None if x is None or (type(x) is tuple and x[1] & 1) else (x[0] if type(x) is tuple else x) & 1
    return tidy([one(x) for x in value]) if type(value) is list else one(value)
