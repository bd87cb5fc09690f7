"""Sets of keys: unions of intervals whose bounds do not depend on the key."""

import functools
import itertools
from dataclasses import dataclass

from jax_flashcute.analysis.integers import (
    Atom,
    Extreme,
    Index,
    Linear,
    Quotient,
    bounds,
    depends_on,
    extreme,
    fits,
    quotient,
)

MAX_INTERVALS = 8
"""A mask of more pieces than this is not worth their bounds."""

_WIDE = 2**29


@dataclass(frozen=True)
class Guard:
    """A condition that does not depend on kv: ``value >= 0``, or a boolean of the program."""

    value: Linear | int
    holds: bool = True

    def __invert__(self) -> "Guard":
        if isinstance(self.value, Linear):
            return Guard(-self.value - 1)
        return Guard(self.value, not self.holds)


@dataclass(frozen=True)
class Interval:
    """The keys ``low <= kv < high`` where all guards hold; None leaves a side open."""

    low: Linear | None = None
    high: Linear | None = None
    guards: frozenset[Guard] = frozenset()

    def __str__(self) -> str:
        ends = ("" if self.low is None else f"{self.low} <= ") + "kv"
        ends += "" if self.high is None else f" < {self.high}"
        return ends + (f" where {len(self.guards)} conditions hold" if self.guards else "")


KeySet = tuple[Interval, ...]
"""A union of intervals."""

EVERYTHING: KeySet = (Interval(),)
NOTHING: KeySet = ()


def union(a: KeySet | None, b: KeySet | None) -> KeySet | None:
    """All keys of both, or None where one is unknown or the pieces are too many."""
    if a is None or b is None:
        return None
    pieces = [*a]
    for x in b:
        for i, y in enumerate(pieces):
            joined = _joined(x, y)
            if joined is not None:
                pieces[i] = joined
                break
        else:
            pieces.append(x)
    return tuple(dict.fromkeys(pieces)) if len(pieces) <= MAX_INTERVALS else None


def _joined(x: Interval, y: Interval) -> Interval | None:
    """The union of two intervals that share a bound and the guards, or of one within the other."""
    for inner, outer in ((x, y), (y, x)):
        if outer.guards <= inner.guards and _within(inner, outer):
            return outer
    if x.guards != y.guards:
        return None
    if x.low == y.low and x.high is not None and y.high is not None:
        return Interval(x.low, extreme("max", x.high, y.high), x.guards)
    if x.high == y.high and x.low is not None and y.low is not None:
        return Interval(extreme("min", x.low, y.low), x.high, x.guards)
    return None


def _within(inner: Interval, outer: Interval) -> bool:
    def ordered(less: Linear | None, more: Linear | None) -> bool:
        return less is not None and more is not None and bounds(more - less)[0] >= 0

    low = outer.low is None or ordered(outer.low, inner.low)
    return low and (outer.high is None or ordered(inner.high, outer.high))


def intersection(a: KeySet | None, b: KeySet | None) -> KeySet | None:
    """The keys of both; nothing at all is known to be nothing."""
    if NOTHING in (a, b):
        return NOTHING
    if a is None or b is None:
        return None
    pieces: KeySet | None = NOTHING
    for x, y in itertools.product(a, b):
        guards = x.guards | y.guards
        if any(~g in guards for g in guards):
            continue
        lows = [e.low for e in (x, y) if e.low is not None]
        highs = [e.high for e in (x, y) if e.high is not None]
        low = extreme("max", *lows) if lows else None
        high = extreme("min", *highs) if highs else None
        if low is not None and high is not None and bounds(high - low)[1] <= 0:
            continue
        pieces = union(pieces, (Interval(low, high, guards),))
    return pieces


def complement(a: KeySet | None) -> KeySet | None:
    """All other keys."""
    if a is None:
        return None
    result: KeySet | None = EVERYTHING
    for x in a:
        outside: KeySet | None = NOTHING
        if x.low is not None:
            outside = union(outside, (Interval(high=x.low),))
        if x.high is not None:
            outside = union(outside, (Interval(low=x.high),))
        for guard in x.guards:
            outside = union(outside, (Interval(guards=frozenset([~guard])),))
        result = intersection(result, outside)
    return result


def where(guard: Guard) -> KeySet:
    """Every key where a condition holds, and none elsewhere."""
    if isinstance(guard.value, Linear):
        low, high = bounds(guard.value)
        if low >= 0:
            return EVERYTHING
        if high < 0:
            return NOTHING
    return (Interval(guards=frozenset([guard])),)


def at_least_zero(value: Linear) -> KeySet | None:
    """The keys for which ``value >= 0``, or None."""
    low, high = bounds(value)
    if low >= 0:
        return EVERYTHING
    if high < 0:
        return NOTHING
    varying = [(a, c) for a, c in value.terms if depends_on(a, "kv")]
    if not varying:
        # Only a number in int32 can be computed.
        narrow = value if fits(value) else _narrowed(value, 0)
        return None if narrow is None else where(Guard(narrow))
    if len(varying) > 1:
        return None
    ((atom, coefficient),) = varying
    rest = value - Linear.of(atom) * coefficient
    if coefficient > 0:
        # atom >= ceil(-rest / coefficient)
        threshold = _threshold(atom, -rest, coefficient, up=True)
        return None if threshold is None else _reaches(atom, threshold)
    # atom <= floor(rest / -coefficient)
    threshold = _threshold(atom, rest, -coefficient, up=False)
    return None if threshold is None else complement(_reaches(atom, threshold + 1))


def _threshold(atom: Atom, total: Linear, divisor: int, *, up: bool) -> Linear | None:
    """``total / divisor`` rounded, in a form that can be computed and compared with ``atom``."""
    if not fits(total, (-(2**30), 2**30)):
        reach = divisor * (max(abs(end) for end in bounds(atom)) + 2)
        narrow = _narrowed(total, reach)
        if narrow is None:
            return None
        total = narrow
    return quotient(total + (divisor - 1), divisor) if up else quotient(total, divisor)


def _narrowed(total: Linear, reach: int) -> Linear | None:
    """A value of int32 that compares with all of ``-reach..reach`` as ``total`` does, or None.

    Works where all but one atom are small and that one counts once: it is clamped.
    """
    wide = [(a, c) for a, c in total.terms if max(map(abs, bounds(a))) * abs(c) > _WIDE]
    if len(wide) != 1 or abs(wide[0][1]) != 1:
        return None
    ((atom, coefficient),) = wide
    rest = total - Linear.of(atom) * coefficient
    if max(map(abs, bounds(rest))) + reach >= _WIDE:
        return None
    clamped = extreme("max", Linear(constant=-_WIDE), Linear.of(atom))
    return rest + extreme("min", Linear(constant=_WIDE), clamped) * coefficient


def _reaches(atom: Atom, threshold: Linear) -> KeySet | None:
    """The keys for which ``atom >= threshold``."""
    match atom:
        case Index():
            return (Interval(low=threshold),)
        case Quotient():
            if not fits(threshold * atom.divisor, (-_WIDE, _WIDE)):
                low, high = bounds(atom)
                threshold = extreme("max", Linear(constant=low), threshold)
                threshold = extreme("min", Linear(constant=high + 1), threshold)
            return at_least_zero(atom.dividend - threshold * atom.divisor)
        case Extreme():
            combine = intersection if atom.kind == "min" else union
            sets = [at_least_zero(x - threshold) for x in atom.operands]
            return functools.reduce(combine, sets)
    return None
