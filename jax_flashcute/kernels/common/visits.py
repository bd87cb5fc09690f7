"""Which tiles a block visits: what the kernels of all architectures have in common.

From the intervals of the mask, from bounds in arrays, or by name from lists.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from jax_flashcute.bounds import TILE_FIELDS, RowBounds
from jax_flashcute.kernels.common.intervals import IntervalMask, UnionMask, tiles_of
from jax_flashcute.kernels.common.lists import TileLists
from jax_flashcute.kernels.common.splits import splits_of_entry
from jax_flashcute.kernels.primitives import select


class KeyTiles:
    """Base of forward kernels: the key tiles that a tile of query rows visits."""

    config: Any
    mask: IntervalMask | UnionMask
    union: UnionMask | None = None
    row_bounds: RowBounds | None
    compares_ids: bool
    tile_tokens: int
    heads_packed: int
    num_sms: int
    lengths_vary: bool
    kv_tiles: Any
    smem_h: int
    smem_hv: int

    @cute.jit
    def visited_tiles(self, m_block: Int32, batch: Int32, lengths, mBounds: tuple):
        """The key tiles that a query tile visits, as ``IntervalMask.block_range`` has them.

        One number more where ids are compared: whether those of this tile's rows have to be.  Where
        the mask has several intervals, its ranges one after the other.
        """
        if const_expr(self.union is not None):
            return self.key_ranges(m_block, *lengths)
        if const_expr(self.row_bounds is None):
            return self.key_tiles(m_block, *lengths)
        fields = [mBounds[2][batch, m_block, i] for i in range(TILE_FIELDS)]
        return tuple(fields if self.compares_ids else fields[:-1])

    @cute.jit
    def key_tiles(self, m_block: Int32, offset: Int32, queries: Int32, keys: Int32):
        """``IntervalMask.block_range`` of a query tile; empty where it holds no valid row."""
        first = m_block * self.tile_tokens
        last = cutlass.min(first + self.tile_tokens, queries) - 1
        n_min, n_max, full_min, full_max = self.mask.block_range(
            first + offset, last + offset, keys, self.config.tile_n
        )
        n_max = n_max if first < queries else Int32(0)
        return n_min, n_max, full_min, full_max

    def key_ranges(self, m_block: Int32, offset: Int32, queries: Int32, keys: Int32) -> tuple:
        """``UnionMask.block_ranges`` of a query tile; empty where it holds no valid row."""
        first = m_block * self.tile_tokens
        last = cutlass.min(first + self.tile_tokens, queries) - 1
        ranges = self.union.block_ranges(first + offset, last + offset, keys, self.config.tile_n)
        return tuple(
            field
            for begin, end, *full in ranges
            for field in (begin, select(first < queries, end, begin), *full)
        )

    def splits_of_entry(self, lengths, partials: tuple):
        """``splits.splits_of_entry`` for entries of these lengths."""
        return splits_of_entry(
            lambda entry: self.key_tiles(Int32(0), *lengths(entry))[:2],
            partials,
            self.heads_packed,
            self.num_sms if self.lengths_vary else None,
        )

    def loaders(
        self, k_copy, v_copy, mPageTable, warp: Int32, kv_head: Int32, batch: Int32, keys: Int32
    ) -> tuple[Callable, Callable, Callable]:
        """Where a key tile lies, and what starts the copies of its K and its V, for one warp."""
        ring = (self.config.kv_stages, kv_head, batch, keys)
        return (
            partial(self.kv_tiles.places, mPageTable, batch, keys, warp),
            self.kv_tiles.loader(k_copy, self.smem_h, *ring, warp),
            self.kv_tiles.loader(v_copy, self.smem_hv, *ring, warp),
        )


class QueryTiles:
    """Base of backward kernels: the query tiles that a block of keys visits."""

    config: Any
    group: int
    mask: IntervalMask | UnionMask
    union: UnionMask | None = None
    row_bounds: RowBounds | None
    has_lists: bool
    has_low: bool

    @cute.jit
    def query_tiles(self, n_block: Int32, batch: Int32, lengths, mBounds: tuple):
        """The query tiles that a block visits, as ``IntervalMask.query_range`` has them.

        And whether ids have to be compared in those that need a mask.  Where the mask has several
        intervals, a tuple of ranges.
        """
        cfg = self.config
        offset, queries, keys = lengths
        compares = Int32(0)
        if const_expr(self.union is not None):
            return self.query_ranges(n_block, *lengths), compares
        if const_expr(self.row_bounds is None):
            first_key = n_block * cfg.tile_n
            last_key = cutlass.min(first_key + cfg.tile_n, keys) - 1
            m_min, m_max, full_min, full_max = self.mask.query_range(
                first_key, last_key, offset, queries, cfg.tile_m
            )
            m_max = m_max if first_key < keys else Int32(0)
            # Where keys beyond the length share the block they are hidden in every tile.
            full_min = full_min if first_key + cfg.tile_n <= keys else m_max
        else:
            m_min, m_max, full_min, full_max, compares = (
                mBounds[2][batch, n_block, i] for i in range(TILE_FIELDS)
            )
        return (m_min, m_max, full_min, full_max), compares

    def query_ranges(self, n_block: Int32, offset: Int32, queries: Int32, keys: Int32) -> tuple:
        """``UnionMask.query_ranges`` of a block; empty where it holds no valid key."""
        cfg = self.config
        first_key = n_block * cfg.tile_n
        last_key = cutlass.min(first_key + cfg.tile_n, keys) - 1
        ranges = self.union.query_ranges(first_key, last_key, offset, queries, cfg.tile_m)
        # Where keys beyond the length share the block they are hidden in every tile.
        is_whole = first_key + cfg.tile_n <= keys
        return tuple(
            (
                begin,
                select(first_key < keys, end, begin),
                select(is_whole, full_min, full_max),
                full_max,
            )
            for begin, end, full_min, full_max in ranges
        )

    def visits(self, tiles, mLists: tuple, block, keys: Int32, g: Int32):
        """The query tiles of the g-th head of the group: how many, the i-th, and both by stretch.

        Stretches are boundary tiles, full ones and boundary tiles of a range; or the two lists; or
        all tiles of several ranges, where each is looked at.
        """
        n_block, kv_head, batch = block
        if self.has_lists:
            head = kv_head * self.group + g
            has_keys = n_block * self.config.tile_n < keys
            lists = TileLists(mLists, batch, head, n_block, has_keys, backwards=False)
            return lists.count, lists.tile, lists.stretches(0)
        if self.union is not None:
            count, nth = tiles_of(tiles)
            return count, nth, [(count, nth)]
        m_min, m_max, full_min, full_max = tiles
        full_begin = cutlass.min(cutlass.max(full_min, m_min), m_max)
        full_end = m_max
        if self.has_low:
            full_end = cutlass.max(cutlass.min(full_max, m_max), full_begin)
        ends = [(m_min, full_begin), (full_begin, full_end), (full_end, m_max)]

        def after(begin: Int32):
            return lambda i: begin + i

        stretches = [(end - begin, after(begin)) for begin, end in ends]
        return m_max - m_min, after(m_min), stretches[: 3 if self.has_low else 2]

    @cute.jit
    def all_steps(self, visits: cutlass.Constexpr) -> Int32:
        """Query tiles that a block visits, of all heads of the group."""
        steps = Int32(0)
        if const_expr(self.has_lists):
            for g in cutlass.range(self.group, unroll=1):
                steps += visits(g)[0]
        else:
            steps = cutlass.max(visits(Int32(0))[0], Int32(0)) * self.group
        return steps
