"""Integers of a program: sums of the indices and of what is not understood, with their bounds."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

POSITION_LIMIT = 2**24
"""Positions, key numbers, batch entries and heads are below this; 64 times it fits int32."""

FAR = 2**29
"""Further than any position, and small enough to add to one."""

_INT32 = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class Index:
    """``b``, ``h``, ``q`` (a position) or ``kv``."""

    name: str


@dataclass(frozen=True)
class Opaque:
    """A value of the program that is known by its number alone; its range is its dtype's."""

    value: int
    depends_on_kv: bool
    low: int
    high: int


@dataclass(frozen=True)
class Quotient:
    """``floor(dividend / divisor)``; the divisor is positive."""

    dividend: "Linear"
    divisor: int


@dataclass(frozen=True)
class Extreme:
    """The smallest (``"min"``) or the largest (``"max"``) of several."""

    kind: Literal["min", "max"]
    operands: frozenset["Linear"]

    def __repr__(self) -> str:
        return f"Extreme({self.kind!r}, {sorted(map(repr, self.operands))})"


Atom = Index | Opaque | Quotient | Extreme


@dataclass(frozen=True)
class Linear:
    """``constant`` plus the sum of coefficient times atom."""

    terms: frozenset[tuple[Atom, int]] = frozenset()
    constant: int = 0

    @staticmethod
    def of(atom: Atom) -> "Linear":
        return Linear(frozenset([(atom, 1)]))

    def __add__(self, other: "Linear | int") -> "Linear":
        other = as_linear(other)
        terms = dict(self.terms)
        for atom, coefficient in other.terms:
            terms[atom] = terms.get(atom, 0) + coefficient
        kept = frozenset((atom, c) for atom, c in terms.items() if c)
        return Linear(kept, self.constant + other.constant)

    def __mul__(self, factor: int) -> "Linear":
        if factor == 0:
            return Linear()
        return Linear(frozenset((a, c * factor) for a, c in self.terms), self.constant * factor)

    def __neg__(self) -> "Linear":
        return self * -1

    def __sub__(self, other: "Linear | int") -> "Linear":
        return self + -as_linear(other)

    def __str__(self) -> str:
        return describe(self)

    def __repr__(self) -> str:
        # The same in every process: it is part of what compiled kernels are known by.
        return f"Linear({sorted(map(repr, self.terms))}, {self.constant})"


def as_linear(value: Linear | int) -> Linear:
    return value if isinstance(value, Linear) else Linear(constant=value)


KV = Index("kv")


@functools.cache
def bounds(value: Linear | Atom) -> tuple[int, int]:
    """The smallest and the largest value, both inclusive."""
    match value:
        case Index(name):
            return -POSITION_LIMIT if name == "q" else 0, POSITION_LIMIT - 1
        case Opaque():
            return value.low, value.high
        case Quotient():
            low, high = bounds(value.dividend)
            return low // value.divisor, high // value.divisor
        case Extreme():
            lows, highs = zip(*(bounds(x) for x in value.operands), strict=True)
            pick = min if value.kind == "min" else max
            return pick(lows), pick(highs)
    low = high = value.constant
    for atom, coefficient in value.terms:
        ends = [coefficient * end for end in bounds(atom)]
        low, high = low + min(ends), high + max(ends)
    return low, high


@functools.cache
def depends_on(value: Linear | Atom, name: str) -> bool:
    """Whether an index may change the value; an opaque one may depend on every index but kv."""
    match value:
        case Index():
            return value.name == name
        case Opaque():
            return value.depends_on_kv or name != "kv"
        case Quotient():
            return depends_on(value.dividend, name)
        case Extreme():
            return any(depends_on(x, name) for x in value.operands)
    return any(depends_on(atom, name) for atom, _ in value.terms)


def quotient(dividend: Linear, divisor: int) -> Linear:
    """``floor(dividend / divisor)``, the part that divides taken out."""
    even = frozenset((a, c) for a, c in dividend.terms if c % divisor == 0)
    whole = Linear(frozenset((a, c // divisor) for a, c in even), dividend.constant // divisor)
    rest = Linear(dividend.terms - even, dividend.constant % divisor)
    low, high = bounds(rest)
    if low // divisor == high // divisor:
        return whole + low // divisor
    if not fits(rest):
        whole, rest = Linear(), dividend
    return whole + Linear.of(Quotient(rest, divisor))


def extreme(kind: Literal["min", "max"], *operands: Linear) -> Linear:
    """The smallest or largest of ``operands``; what another one beats everywhere is left out."""
    flat: list[Linear] = []
    for x in operands:
        nested = [a for a, c in x.terms if isinstance(a, Extreme) and a.kind == kind and c == 1]
        if nested and len(x.terms) == 1 and x.constant == 0:
            flat += nested[0].operands
        else:
            flat.append(x)
    sign = 1 if kind == "max" else -1
    kept: list[Linear] = []
    for x in dict.fromkeys(flat):
        # x is beaten by y where y - x is nowhere negative (max) or positive (min).
        if any(bounds((y - x) * sign)[0] >= 0 for y in kept):
            continue
        kept = [y for y in kept if bounds((x - y) * sign)[0] < 0]
        kept.append(x)
    return kept[0] if len(kept) == 1 else Linear.of(Extreme(kind, frozenset(kept)))


def fits(value: Linear, limits: tuple[int, int] = _INT32) -> bool:
    low, high = bounds(value)
    return limits[0] <= low and high <= limits[1]


def trend(value: Linear, name: str = "q") -> Literal["constant", "rising", "falling"] | None:
    """How a value moves with an index where that can be proven, else None."""
    if not depends_on(value, name):
        return "constant"
    found = set()
    for atom, coefficient in value.terms:
        match atom:
            case Index():
                moves = ["rising"] if atom.name == name else []
            case Opaque():
                moves = [None] if depends_on(atom, name) else []
            case Quotient():
                moves = [trend(atom.dividend, name)]
            case Extreme():
                moves = [trend(x, name) for x in atom.operands]
        if coefficient < 0:
            moves = [_OPPOSITE[m] for m in moves]
        found |= set(moves) - {"constant"}
    return found.pop() if len(found) == 1 else None


_OPPOSITE = {"rising": "falling", "falling": "rising", "constant": "constant", None: None}


def evaluate(
    value: Linear,
    indices: Mapping[str, Any],
    opaque: Mapping[int, Any],
    minimum: Callable[[Any, Any], Any],
    maximum: Callable[[Any, Any], Any],
):
    """A value in any arithmetic with ``+``, ``*`` and a ``//`` that rounds down.

    Args:
      value: what to compute.
      indices: what stands for ``b``, ``h``, ``q`` and ``kv``, as far as they occur.
      opaque: what stands for each opaque value.
      minimum, maximum: of two.

    Intermediate sums may leave int32 and wrap; the result and every operand of a division or a
    comparison do not.
    """
    again = functools.partial(
        evaluate, indices=indices, opaque=opaque, minimum=minimum, maximum=maximum
    )
    total: Any = value.constant
    for atom, coefficient in ordered(value.terms):
        match atom:
            case Index():
                x = indices[atom.name]
            case Opaque():
                x = opaque[atom.value]
            case Quotient():
                x = again(atom.dividend) // atom.divisor
            case Extreme():
                pick = minimum if atom.kind == "min" else maximum
                x = functools.reduce(pick, [again(o) for o in ordered(atom.operands)])
        total = total + (x if coefficient == 1 else x * coefficient)
    return total


def first_reaching(
    value: Linear,
    target: Any,
    minimum: Callable[[Any, Any], Any],
    maximum: Callable[[Any, Any], Any],
):
    """The least q at which a bound of ``rising_interval`` is at least ``target``, in int32.

    Where the bound is constant: -``FAR`` if it is, ``FAR`` if it never is.
    """
    if not value.terms:
        return minimum(maximum(target - value.constant, 0), 1) * (2 * FAR) - FAR
    ((atom, coefficient),) = value.terms
    target = target - value.constant
    if coefficient != 1:
        target = (target + (coefficient - 1)) // coefficient
    match atom:
        case Quotient():
            return first_reaching(atom.dividend, target * atom.divisor, minimum, maximum)
        case Extreme():
            pick = minimum if atom.kind == "max" else maximum
            ends = [first_reaching(x, target, minimum, maximum) for x in ordered(atom.operands)]
            return functools.reduce(pick, ends)
    return target


def ordered(values):
    """A frozenset in an order that is the same in every process."""
    return sorted(values, key=repr)


def describe(value: Linear) -> str:
    """A value as text, such as ``q - 255`` or ``max(512, q + 1)``."""

    def of_atom(atom: Atom) -> str:
        match atom:
            case Index():
                return atom.name
            case Opaque():
                return f"v{atom.value}"
            case Quotient():
                inner = describe(atom.dividend)
                return (
                    f"({inner}) // {atom.divisor}" if " " in inner else f"{inner} // {atom.divisor}"
                )
            case Extreme():
                return f"{atom.kind}({', '.join(describe(o) for o in ordered(atom.operands))})"

    text = ""
    for atom, c in ordered(value.terms):
        part = of_atom(atom)
        if abs(c) != 1:
            part = (
                f"{abs(c)} * ({part})" if " " in part and "(" != part[0] else f"{abs(c)} * {part}"
            )
        text += (" - " if c < 0 else " + ") + part
    if value.constant or not text:
        text += (" - " if value.constant < 0 else " + ") + str(abs(value.constant))
    return text[3:] if text.startswith(" + ") else "-" + text[3:]
