"""Which tiles a block visits: what the kernels of all architectures have in common.

From the intervals of the mask, from bounds in arrays, or by name from lists.
"""

from collections.abc import Callable
from copy import copy as copied
from functools import partial
from typing import Any, Self

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from jax_flashcute.bounds import RowBounds
from jax_flashcute.kernels.common.intervals import IntervalMask, UnionMask, tiles_of
from jax_flashcute.kernels.common.lists import TileLists
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.splits import SplitOrder, splits_of_entry
from jax_flashcute.kernels.common.stretches import Stretch, leftwards
from jax_flashcute.kernels.config.splits import lone_tile_time


def work_fields(mask: IntervalMask | UnionMask) -> int:
    """How many numbers describe a forward kernel's tile of work.

    Its coordinates, its lengths and its range of key tiles; or, of a mask of several intervals, the
    first and the last of the tiles that these visit, counted, and the range of each interval.  With
    lists on Hopper, how many tiles either has, in place of the first and the last.
    """
    return 6 + (2 + 4 * len(mask.parts) if isinstance(mask, UnionMask) else 4)


def tile_fields(bounds: RowBounds, arrays: tuple, batch: Int32, tile: Int32) -> tuple:
    """What ``bounds.tiles`` tell of a tile, as ``IntervalMask.block_range`` has it.

    One number more where something is compared: whether this tile compares.
    """
    begin, end, full_min, full_max, *compares = (x[batch, tile] for x in bounds.tiles(arrays))
    return cutlass.min(begin, end), end, full_min, cutlass.min(full_max, end), *compares


class KeyTiles:
    """Base of forward kernels: the key tiles that a tile of query rows visits."""

    config: Any
    mask: IntervalMask | UnionMask
    union: UnionMask | None = None
    # Whether listed partial tiles that positions and lengths do not cut have a loop of their own.
    splits_partial = False
    row_bounds: RowBounds | None
    compares_ids: bool
    has_lists: bool
    has_low: bool
    tile_tokens: int
    heads_packed: int
    heads_per_kv: int
    num_sms: int
    page_size: int | None
    lengths_vary: bool
    has_mask_mod: bool
    kv_tiles: Any
    head_dim: int
    head_dim_v: int
    smem_h: int
    smem_hv: int

    @cute.jit
    def visited_tiles(self, m_block: Int32, batch: Int32, lengths, mBounds: tuple):
        """The key tiles that a query tile visits, as ``IntervalMask.block_range`` has them.

        One number more where ids are compared: whether those of this tile's rows have to be.  Where
        the mask has several intervals, 0, how many tiles they visit, and their ranges one after the
        other.
        """
        if const_expr(self.union is not None):
            return self.key_ranges(m_block, *lengths)
        if const_expr(self.row_bounds is None):
            return self.key_tiles(m_block, *lengths)
        return tile_fields(self.row_bounds, mBounds, batch, m_block)

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
        """``visited_tiles`` of several intervals; empty where a query tile holds no valid row."""
        first = m_block * self.tile_tokens
        last = cutlass.min(first + self.tile_tokens, queries) - 1
        ranges = self.union.block_ranges(first + offset, last + offset, keys, self.config.tile_n)
        ranges = [
            (begin, select(first < queries, end, begin), *full) for begin, end, *full in ranges
        ]
        count, _ = tiles_of(ranges)
        return Int32(0), count, *(field for fields in ranges for field in fields)

    def ranges_of(self, fields: tuple) -> list[tuple]:
        """The ranges of key tiles of a tile of work, one for each interval of the mask."""
        return [fields[8 + 4 * i : 12 + 4 * i] for i in range(len(self.union.parts))]

    def lists_of(
        self, mLists: tuple, fields: tuple, counts: tuple[Int32, Int32] | None = None
    ) -> TileLists | None:
        """The lists of a tile of work; empty where it holds no valid row.

        ``counts``: as for ``TileLists``.
        """
        if not self.has_lists:
            return None
        m_block, head, batch, _, queries = fields[:5]
        has_rows = m_block * self.tile_tokens < queries
        return TileLists(mLists, batch, head, m_block, has_rows, backwards=True, counts=counts)

    def key_order(self, fields: tuple, lists: TileLists | None):
        """How many key tiles a tile of work visits, and a function that gives the i-th."""
        if lists is not None:
            return lists.count, lists.tile
        n_min, n_max = fields[6:8]
        before = leftwards(n_max)
        if self.union is None:
            return n_max - n_min, before
        _, nth = tiles_of(self.ranges_of(fields))
        return n_max - n_min, lambda i: nth(before(i))

    def stretches(self, fields: tuple, lists: TileLists | None, kv_length: Int32) -> list[Stretch]:
        """What follows the first key tile.

        Masked tiles, others, masked ones: of a range, from right to left.  Or those of
        ``TileLists.stretches_by_mask``, or all tiles of several ranges.
        """
        if lists is not None:
            full_min, full_max = fields[8:10]
            is_clear = (full_min <= 0) & (full_max * self.config.tile_n >= kv_length)
            told = {"has_mask_mod": self.has_mask_mod, "splits_partial": self.splits_partial}
            return lists.stretches_by_mask(1, is_clear, **told)
        if self.union is not None:
            visits, nth = self.key_order(fields, None)
            return [Stretch(visits - 1, lambda i: nth(i + 1))]
        n_min, n_max, full_min, full_max = fields[6:10]
        full_end = cutlass.max(cutlass.min(full_max, n_max - 1), n_min)
        full_begin = n_min
        if self.has_low:
            full_begin = cutlass.min(cutlass.max(full_min, n_min), full_end)
        found = [
            Stretch(n_max - 1 - full_end, leftwards(n_max - 1)),
            Stretch(full_end - full_begin, leftwards(full_end), is_masked=False),
            Stretch(full_begin - n_min, leftwards(full_begin)),
        ]
        return found[: 3 if self.has_low else 2]

    def splits_of_entry(self, lengths, partials: tuple):
        """``splits.splits_of_entry`` for entries of these lengths."""
        return splits_of_entry(
            lambda entry: self.visited_tiles(Int32(0), entry, lengths(entry), ())[:2],
            partials,
            self.heads_packed,
            self.num_sms if self.lengths_vary else None,
            lone_tile_time(
                self.config, self.head_dim, self.head_dim_v, self.num_sms, self.page_size
            ),
        )

    def split_order(
        self, lengths, length_arrays: tuple, kv_heads: Int32, batch: Int32, partials: tuple
    ) -> SplitOrder:
        """The order of the parts of entries of these lengths, which follow from the arrays."""
        splits = self.splits_of_entry(lengths, partials)
        alike = all(array is None for array in length_arrays)
        return SplitOrder(kv_heads, batch, self.heads_per_kv, partials[0], splits, alike=alike)

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

    def one_loader(
        self,
        k_copy,
        v_copy,
        mPageTable,
        warp: Int32,
        copies_v: int,
        kv_head: Int32,
        batch: Int32,
        keys: Int32,
    ) -> tuple[Callable, Callable]:
        """Where a key tile lies, and what starts the copies of its K or its V, for one warp."""
        locate, *loads = self.loaders(k_copy, v_copy, mPageTable, warp, kv_head, batch, keys)
        return locate, loads[copies_v]


class QueryTiles:
    """Base of backward kernels: the query tiles that a block of keys visits."""

    config: Any
    group: int
    mask: IntervalMask | UnionMask
    union: UnionMask | None = None
    row_bounds: RowBounds | None
    has_lists: bool
    has_low: bool

    is_measuring = False

    def measuring(self) -> Self:
        """The same, but for gradients: finds how large addends of sums in fixed point are."""
        made = copied(self)
        made.is_measuring = True
        return made

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
            fields = tile_fields(self.row_bounds, mBounds, batch, n_block)
            m_min, m_max, full_min, full_max = fields[:4]
            if const_expr(len(fields) > 4):
                compares = fields[4]
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
        if self.has_lists:
            lists = self.lists_of(mLists, block, keys, g)
            return lists.count, lists.tile, lists.stretches(0)
        if self.union is not None:
            count, nth = tiles_of(tiles)
            return count, nth, [Stretch(count, nth)]
        m_min, m_max, full_min, full_max = tiles
        full_begin = cutlass.min(cutlass.max(full_min, m_min), m_max)
        full_end = m_max
        if self.has_low:
            full_end = cutlass.max(cutlass.min(full_max, m_max), full_begin)

        def after(begin: Int32):
            return lambda i: begin + i

        stretches = [
            Stretch(full_begin - m_min, after(m_min)),
            Stretch(full_end - full_begin, after(full_begin), is_masked=False),
            Stretch(m_max - full_end, after(full_end)),
        ]
        return m_max - m_min, after(m_min), stretches[: 3 if self.has_low else 2]

    def lists_of(self, mLists: tuple, block, keys: Int32, g: Int32) -> TileLists:
        """Those of a block for the g-th head of the group; empty where it holds no valid key."""
        n_block, kv_head, batch = block
        has_keys = n_block * self.config.tile_n < keys
        head = kv_head * self.group + g
        return TileLists(mLists, batch, head, n_block, has_keys, backwards=False)

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
