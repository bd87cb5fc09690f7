"""Masks made of intervals: which keys a query sees, which tiles a block visits, bits of a tile.

A query at position p sees the keys lo(p) <= kv < hi(p); both bounds grow with p, so the first and
the last row of a tile of queries bound what the whole tile sees.
"""

import cutlass
from cutlass import Int32, Uint32, const_expr


class IntervalMask:
    """``p - left <= kv <= p + right``; ``None`` leaves that side open.

    Causal attention is ``right=0``; a sliding window sets both.
    """

    def __init__(self, left: int | None, right: int | None):
        self.left = left
        self.right = right

    @property
    def is_staircase(self) -> bool:
        """Whether later queries see more keys."""
        return self.right is not None and self.left is None

    def lower(self, position: Int32) -> Int32:
        """First visible key; only where ``left`` is set."""
        return position - self.left

    def upper(self, position: Int32, kv_length: Int32) -> Int32:
        """One past the last visible key."""
        if const_expr(self.right is None):
            return kv_length
        return cutlass.min(kv_length, position + (self.right + 1))

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
        if const_expr(self.left is not None):
            n_min = cutlass.max(self.lower(first), Int32(0)) // tile_n
            full_min = (cutlass.max(self.lower(last), Int32(0)) + (tile_n - 1)) // tile_n
        # Nothing to visit where the window ends before key 0.
        n_max = cutlass.max(n_max, Int32(0))
        full_max = cutlass.min(cutlass.max(full_max, Int32(0)), n_max)
        return n_min, n_max, full_min, full_max

    def first_query(self, key: Int32, offset: Int32) -> Int32:
        """First query row that sees a key; only where ``right`` is set.  Row i is at i + offset."""
        return key - (self.right + offset)

    def end_query(self, key: Int32, offset: Int32, q_length: Int32) -> Int32:
        """One past the last query row that sees a key."""
        if const_expr(self.left is None):
            return q_length
        return cutlass.min(q_length, key + (self.left + 1) - offset)

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
        if const_expr(self.right is not None):
            m_min = cutlass.max(self.first_query(first, offset), Int32(0)) // tile_m
            full_min = (
                cutlass.max(self.first_query(last, offset), Int32(0)) + (tile_m - 1)
            ) // tile_m
        if const_expr(self.left is not None):
            end = first + (self.left + 1) - offset
            full_max = cutlass.min(cutlass.max(end, Int32(0)) // tile_m, m_max)
        return m_min, m_max, full_min, full_max


def low_bits(count: Int32) -> Uint32:
    """A word whose lowest ``count`` bits are set; count may lie outside 0..32."""
    count = cutlass.min(cutlass.max(count, Int32(0)), Int32(32))
    # Shift in two halves: a shift by 32 is not defined in the compiler's IR.
    half = Uint32(count) // Uint32(2)
    rest = Uint32(count) - half
    return ~((Uint32(0xFFFFFFFF) << half) << rest)
