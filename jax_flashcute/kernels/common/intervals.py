"""Masks made of intervals: which keys a query sees, which tiles a block visits, bits of a tile.

A query at position p sees the keys lo(p) <= kv < hi(p), or those of one of several such intervals;
all bounds grow with p, so the first and the last row of a tile of queries bound what the whole tile
sees.
"""

from collections.abc import Callable

import cutlass
from cutlass import Boolean, Int32, Uint32, const_expr

from jax_flashcute import analysis
from jax_flashcute.analysis import Interval, Linear, evaluate
from jax_flashcute.kernels.common.numbers import select


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

    @property
    def is_open(self) -> bool:
        """Whether all queries see all keys."""
        return self.high is None and self.low is None

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

    def row_limits(self, position: Int32, kv_length: Int32) -> list[tuple[Int32 | None, Int32]]:
        """The first key seen from a position (None: open) and one past the last."""
        return [
            (None if self.low is None else self.lower(position), self.upper(position, kv_length))
        ]

    def query_limits(
        self, key: Int32, offset: Int32, q_length: Int32
    ) -> list[tuple[Int32 | None, Int32]]:
        """The first row that sees a key (None: open) and one past the last."""
        first = None if self.high is None else self.first_query(key, offset)
        return [(first, self.end_query(key, offset, q_length))]

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


Range = tuple[Int32, Int32, Int32, Int32]
"""``(begin, end, full_min, full_max)`` of tiles, as ``IntervalMask.block_range`` has them."""


class UnionMask:
    """The keys of at least one of several intervals; these may overlap, in any order."""

    def __init__(self, intervals: tuple[Interval, ...]):
        self.parts = [IntervalMask(interval) for interval in intervals]

    @property
    def is_staircase(self) -> bool:
        """Whether later queries see more keys."""
        return any(part.is_staircase and part.high.terms for part in self.parts)

    def row_limits(self, position: Int32, kv_length: Int32) -> list[tuple[Int32 | None, Int32]]:
        """``IntervalMask.row_limits`` of each interval."""
        return [limits for part in self.parts for limits in part.row_limits(position, kv_length)]

    def query_limits(
        self, key: Int32, offset: Int32, q_length: Int32
    ) -> list[tuple[Int32 | None, Int32]]:
        """``IntervalMask.query_limits`` of each interval."""
        return [x for part in self.parts for x in part.query_limits(key, offset, q_length)]

    def block_ranges(
        self, first: Int32, last: Int32, kv_length: Int32, tile_n: cutlass.Constexpr[int]
    ) -> list[Range]:
        """The key tiles that queries at positions first..last visit, each in one range alone."""
        return disjoint([part.block_range(first, last, kv_length, tile_n) for part in self.parts])

    def query_ranges(
        self,
        first: Int32,
        last: Int32,
        offset: Int32,
        q_length: Int32,
        tile_m: cutlass.Constexpr[int],
    ) -> list[Range]:
        """The query tiles that see keys first..last, each in one range alone."""
        return disjoint(
            [part.query_range(first, last, offset, q_length, tile_m) for part in self.parts]
        )


def mask_of(interval: Interval, union: tuple[Interval, ...]) -> IntervalMask | UnionMask:
    """The mask of the union of some intervals, or where there is none of one interval."""
    return UnionMask(union) if union else IntervalMask(interval)


def disjoint(ranges: list[Range]) -> list[Range]:
    """Ranges that ascend, none of them negative in length, with the same tiles altogether.

    Full tiles stay as they are: they belong to no range in particular.
    """
    pairs = [(begin, end) for begin, end, _, _ in ranges]
    for last in range(len(pairs) - 1, 0, -1):
        for i in range(last):
            (a, a_end), (b, b_end) = pairs[i : i + 2]
            swap = b < a
            pairs[i] = select(swap, b, a), select(swap, b_end, a_end)
            pairs[i + 1] = select(swap, a, b), select(swap, a_end, b_end)
    reached, found = Int32(0), []
    for (begin, end), (_, _, *full) in zip(pairs, ranges, strict=True):
        begin = cutlass.max(begin, reached)
        reached = cutlass.max(begin, end)
        found.append((begin, reached, *full))
    return found


def tiles_of(ranges: list[Range]) -> tuple[Int32, Callable[[Int32], Int32]]:
    """How many tiles some ``disjoint`` ranges hold, and a function that gives the i-th."""
    counts = [end - begin for begin, end, _, _ in ranges]
    total = Int32(0)
    for count in counts:
        total = total + count

    def nth(i: Int32) -> Int32:
        found, before = ranges[0][0] + i, Int32(0)
        for (begin, _, _, _), count in zip(ranges[1:], counts, strict=False):
            before = before + count
            found = select(i < before, found, begin + (i - before))
        return found

    return total, nth


def is_full(ranges: list[Range], tile: Int32) -> Boolean:
    """Whether one of the intervals alone holds all of a tile."""
    found = Boolean(False)
    for _, _, full_min, full_max in ranges:
        found = found | ((tile >= full_min) & (tile < full_max))
    return found


def tiles_before(ranges: list[Range], tile: Int32) -> Int32:
    """How many tiles of some ``disjoint`` ranges come before one."""
    found = Int32(0)
    for begin, end, _, _ in ranges:
        found = found + cutlass.min(cutlass.max(tile - begin, Int32(0)), end - begin)
    return found


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


def limit_words(
    limits: list[tuple[Int32 | None, Int32]], start: Int32, columns: int
) -> list[Uint32]:
    """Which of so many columns lie in one of some intervals, 32 a word.

    Args:
      limits: the first of each interval (None: open) and one past its last.
      start: what column 0 stands for.
    """
    found: list[Uint32] = []
    for low, high in limits:
        words = [low_bits(high - start - w) for w in range(0, columns, 32)]
        if low is not None:
            hidden = [low_bits(low - start - w) for w in range(0, columns, 32)]
            words = [w & ~h for w, h in zip(words, hidden, strict=True)]
        found = [f | w for f, w in zip(found, words, strict=True)] if found else words
    return found


def low_bits(count: Int32) -> Uint32:
    """A word whose lowest ``count`` bits are set; count may lie outside 0..32."""
    count = cutlass.min(cutlass.max(count, Int32(0)), Int32(32))
    # Shift in two halves: a shift by 32 is not defined in the compiler's IR.
    half = Uint32(count) // Uint32(2)
    rest = Uint32(count) - half
    return ~((Uint32(0xFFFFFFFF) << half) << rest)
