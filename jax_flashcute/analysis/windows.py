"""Sets of keys that kernels find tiles of: windows, rising intervals, one interval for each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_flashcute.analysis.integers import (
    POSITION_LIMIT,
    Atom,
    Extreme,
    Index,
    Linear,
    Opaque,
    Quotient,
    bounds,
    evaluate,
    ordered,
)
from jax_flashcute.analysis.key_sets import Interval, KeySet
from jax_flashcute.analysis.programs import Program


def window(keys: KeySet | None) -> tuple[int | None, int | None] | None:
    """``(left, right)`` if the keys are just ``q - left <= kv <= q + right``; None is open."""
    if keys is None or len(keys) != 1 or keys[0].guards:
        return None
    sides = []
    for bound, sign, shift in ((keys[0].low, -1, 0), (keys[0].high, 1, -1)):
        if bound is None or _is_open(bound, sign):
            sides.append(None)
        elif bound.terms == frozenset([(Index("q"), 1)]):
            sides.append(sign * bound.constant + shift)
        else:
            return None
    return sides[0], sides[1]


def _is_open(bound: Linear, sign: int) -> bool:
    """Whether every key is on the right side of a bound anyway."""
    low, high = bounds(bound)
    return high <= 0 if sign < 0 else low >= POSITION_LIMIT


def window_interval(left: int | None, right: int | None) -> Interval:
    """``q - left <= kv <= q + right`` as an interval; None is open."""
    q = Linear.of(Index("q"))
    low = None if left is None else q - left
    return Interval(low, None if right is None else q + (right + 1))


def rising_interval(keys: KeySet | None) -> Interval | None:
    """The one interval that ``keys`` is, if its bounds rise with q and depend on nothing else.

    Such a bound can be inverted, so that it tells tiles of queries from keys too.
    """
    if keys is None or len(keys) != 1 or keys[0].guards:
        return None
    bounds = [bound for bound in (keys[0].low, keys[0].high) if bound is not None]
    return keys[0] if all(_is_invertible(b, POSITION_LIMIT + 1) for b in bounds) else None


def rising_union(keys: KeySet | None, most: int) -> tuple[Interval, ...] | None:
    """The intervals that ``keys`` is the union of, if each is a ``rising_interval``.

    None also where they are more than ``most``.
    """
    if keys is None or len(keys) > most:
        return None
    found = [rising_interval((interval,)) for interval in keys]
    return None if None in found else tuple(x for x in found if x is not None)


@dataclass(frozen=True)
class RowInterval:
    """One interval of keys for each batch entry and position, whatever its bounds are made of.

    Attributes:
      program: the mask.
      interval: of values of the program that depend on neither ``kv`` nor ``h``.
    """

    program: Program
    interval: Interval

    def at(self, arrays: Sequence[jax.Array], b: jax.Array, q: jax.Array):
        """``(low, high, seen)`` at a position, int32, None for open, and whether guards hold.

        Args:
          arrays: those that the mask closes over.
          b, q: int32 scalars.
        """
        interval = self.interval
        wanted = sorted(_values_of(interval))
        zero = jnp.zeros((), jnp.int32)
        values = self.program.evaluate(wanted, arrays, (b, zero, q, zero))
        known = dict(zip(wanted, values, strict=True))
        numbers = {i: x.astype(jnp.int32) for i, x in known.items()}

        def of(bound: Linear):
            return jnp.asarray(
                evaluate(bound, {"b": b, "q": q}, numbers, jnp.minimum, jnp.maximum), jnp.int32
            )

        seen = jnp.ones((), bool)
        for guard in ordered(interval.guards):
            held = of(guard.value) >= 0 if isinstance(guard.value, Linear) else known[guard.value]
            seen = seen & (held == guard.holds)
        low, high = (None if x is None else of(x) for x in (interval.low, interval.high))
        return low, high, seen


def row_interval(program: Program, keys: KeySet | None) -> RowInterval | None:
    """The one interval that ``keys`` of a mask is, if its bounds are the same for all heads."""
    if keys is None or len(keys) != 1:
        return None
    (interval,) = keys
    of_head = {program.arguments[1]}
    for step in program.steps:
        if of_head & set(step.inputs):
            of_head |= set(step.outputs)
    indices = {atom.name for atom in _atoms_of(interval) if isinstance(atom, Index)}
    if of_head & _values_of(interval) or indices - {"b", "q"}:
        return None
    return RowInterval(program, interval)


def _atoms_of(value: Interval | Linear | Atom) -> set[Atom]:
    match value:
        case Interval():
            guards = [g.value for g in value.guards if isinstance(g.value, Linear)]
            inner = [x for x in (value.low, value.high, *guards) if x is not None]
        case Linear():
            inner = [atom for atom, _ in value.terms]
        case Quotient():
            inner = [value.dividend]
        case Extreme():
            inner = list(value.operands)
        case _:
            return {value}
    return set().union(*map(_atoms_of, inner))


def _values_of(interval: Interval) -> set[int]:
    """The values of the program that an interval is made of."""
    opaque = {atom.value for atom in _atoms_of(interval) if isinstance(atom, Opaque)}
    return opaque | {g.value for g in interval.guards if isinstance(g.value, int)}


def _is_invertible(value: Linear, reach: int) -> bool:
    """Whether the least q with ``value >= target`` can be computed for targets up to ``reach``."""
    if not value.terms:
        return True
    if len(value.terms) > 1:
        return False
    ((atom, coefficient),) = value.terms
    if coefficient <= 0:
        return False
    reach = (reach + abs(value.constant)) // coefficient + 1
    match atom:
        case Index():
            return atom.name == "q"
        case Quotient():
            reach *= atom.divisor
            return reach < 2**31 - 2 * POSITION_LIMIT and _is_invertible(atom.dividend, reach)
        case Extreme():
            return all(_is_invertible(x, reach) for x in atom.operands)
    return False
