"""Masks made of intervals: which keys a query sees, which tiles a block visits, bits of a tile.

A query at position p sees the keys lo(p) <= kv < hi(p); both bounds grow with p, so the first and
the last row of a tile of queries bound what the whole tile sees.
"""

import cutlass
from cutlass import Boolean, Int32, Uint32, const_expr

from jax_flashcute import analysis
from jax_flashcute.analysis import Interval, Linear, evaluate


class IntervalMask:
    """``low(p) <= kv < high(p)`` with bounds that rise with p; ``None`` leaves that side open.

    Causal attention has ``high = p + 1``; a sliding window sets both; see
    ``analysis.rising_interval`` for the bounds there can be.
    """

    def __init__(self, interval: Interval):
        self.low = interval.low
        self.high = interval.high

    @property
    def is_staircase(self) -> bool:
        """Whether later queries see more keys."""
        return self.high is not None and self.low is None

    def lower(self, position: Int32) -> Int32:
        """First visible key; only where ``low`` is set."""
        return at_position(self.low, position)

    def upper(self, position: Int32, kv_length: Int32) -> Int32:
        """One past the last visible key."""
        if const_expr(self.high is None):
            return kv_length
        return cutlass.min(kv_length, at_position(self.high, position))

    def limits(self, position: Int32) -> tuple[Int32 | None, Int32 | None]:
        """The first key seen from a position and one past the last; None where that is open."""
        low, high = (None if b is None else at_position(b, position) for b in (self.low, self.high))
        return low, high

    def block_range(
        self, first: Int32, last: Int32, kv_length: Int32, tile_n: cutlass.Constexpr[int]
    ):
        """The key tiles that queries at positions first..last visit.

        Returns:
          ``(n_min, n_max, full_min, full_max)``: tiles n_min <= n < n_max hold a visible key;
          those with full_min <= n < full_max hold no hidden one.  An empty range has
          n_min >= n_max.
        """
        n_max = (self.upper(last, kv_length) + (tile_n - 1)) // tile_n
        full_max = self.upper(first, kv_length) // tile_n
        n_min = Int32(0)
        full_min = Int32(0)
        if const_expr(self.low is not None):
            n_min = cutlass.max(self.lower(first), Int32(0)) // tile_n
            full_min = (cutlass.max(self.lower(last), Int32(0)) + (tile_n - 1)) // tile_n
        # Nothing to visit where the window ends before key 0.
        n_max = cutlass.max(n_max, Int32(0))
        full_max = cutlass.min(cutlass.max(full_max, Int32(0)), n_max)
        return n_min, n_max, full_min, full_max

    def first_query(self, key: Int32, offset: Int32) -> Int32:
        """First query row that sees a key; only where ``high`` is set.  Row i is at i + offset."""
        return first_reaching(self.high - 1, key) - offset

    def end_query(self, key: Int32, offset: Int32, q_length: Int32) -> Int32:
        """One past the last query row that sees a key."""
        if const_expr(self.low is None):
            return q_length
        return cutlass.min(q_length, first_reaching(self.low - 1, key) - offset)

    def query_range(
        self,
        first: Int32,
        last: Int32,
        offset: Int32,
        q_length: Int32,
        tile_m: cutlass.Constexpr[int],
    ):
        """The query tiles that see keys first..last: ``block_range`` the other way round.

        Returns:
          ``(m_min, m_max, full_min, full_max)``: tiles m_min <= m < m_max hold a row that sees one
          of the keys; in those with full_min <= m < full_max every row below ``q_length`` sees
          all of them.  An empty range has m_min >= m_max.
        """
        m_max = (self.end_query(last, offset, q_length) + (tile_m - 1)) // tile_m
        m_max = cutlass.max(m_max, Int32(0))
        m_min = Int32(0)
        full_min = Int32(0)
        full_max = m_max
        if const_expr(self.high is not None):
            m_min = cutlass.max(self.first_query(first, offset), Int32(0)) // tile_m
            full_min = (
                cutlass.max(self.first_query(last, offset), Int32(0)) + (tile_m - 1)
            ) // tile_m
        if const_expr(self.low is not None):
            end = first_reaching(self.low - 1, first) - offset
            full_max = cutlass.min(cutlass.max(end, Int32(0)) // tile_m, m_max)
        return m_min, m_max, full_min, full_max


def at_position(bound: Linear, position: Int32) -> Int32:
    """A bound of the query at a position."""
    found = evaluate(bound, {"q": position}, {}, cutlass.min, cutlass.max)
    return Int32(found) if isinstance(found, int) else found


def within(key: Int32, low: Int32 | None, high: Int32 | None, seen: Boolean) -> Boolean:
    """Whether ``seen`` holds and a key lies within limits, of which None is open."""
    if low is not None:
        seen = seen & (key >= low)
    if high is not None:
        seen = seen & (key < high)
    return seen


def first_reaching(value: Linear, target: Int32) -> Int32:
    """The least position at which a rising ``value`` is at least ``target``."""
    return Int32(analysis.first_reaching(value, target, minimum, maximum))


def minimum(a, b) -> Int32:
    return cutlass.min(Int32(a), Int32(b))


def maximum(a, b) -> Int32:
    return cutlass.max(Int32(a), Int32(b))


def low_bits(count: Int32) -> Uint32:
    """A word whose lowest ``count`` bits are set; count may lie outside 0..32."""
    count = cutlass.min(cutlass.max(count, Int32(0)), Int32(32))
    # Shift in two halves: a shift by 32 is not defined in the compiler's IR.
    half = Uint32(count) // Uint32(2)
    rest = Uint32(count) - half
    return ~((Uint32(0xFFFFFFFF) << half) << rest)
