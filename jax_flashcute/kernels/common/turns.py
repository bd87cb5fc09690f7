"""Blocks that add to one sum in global memory, by bulk reductions, in turns where order matters."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from jax_flashcute.analysis import FAR
from jax_flashcute.kernels.common.intervals import UnionMask, tiles_before

LEAST_SECTION = 16
"""Key/value heads that are worked on together at least, where there are so many."""


def bulk_add(target, source, size: int) -> None:
    """Adds ``size`` bytes of float32 in shared memory to global memory; one thread."""
    cute.arch.inline_ptx(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{$r0}], [{$r1}], {$r2};",
        read_only_args=[target.toint(), source.toint(), Int32(size)],
    )


def turn_of(mask, n_block: Int32, m: Int32, offset: Int32, tile_m: int, tile_n: int) -> Int32:
    """How many blocks of keys add to a query tile's dQ before one does, in the order of keys.

    Blocks of keys before the window of the tile's first row are not counted.
    """
    if isinstance(mask, UnionMask):
        first = m * tile_m + offset
        ranges = mask.block_ranges(first, first + (tile_m - 1), Int32(FAR), tile_n)
        return tiles_before(ranges, n_block)
    if mask.low is None:
        return n_block
    lower = mask.lower(m * tile_m + offset)
    return n_block - cutlass.max(lower, Int32(0)) // tile_n


def section_in_turns(section: Int32, kv_heads: Int32, batch: Int32) -> Int32:
    """Key/value heads to work on together, of ``section_size``, where blocks take turns.

    Blocks of one head follow each other tile by tile; with more heads at work there are fewer in
    the queue, which costs less than what L2 then misses.
    """
    return cutlass.min(cutlass.max(section, Int32(LEAST_SECTION)), kv_heads * batch)


@cute.jit
def take_turn(turns: cute.Pointer, turn: Int32):
    """Waits until ``turn`` blocks have added to a tile's dQ; one warp."""
    if cute.arch.lane_idx() == 0:
        done = cute.arch.load(turns, Int32, sem="acquire", scope="gpu")
        while done != turn:
            done = cute.arch.load(turns, Int32, sem="acquire", scope="gpu")
        # The additions before were the asynchronous proxy's, and so is the one that follows.
        cute.arch.fence_proxy("async.global")
    cute.arch.sync_warp()


@cute.jit
def pass_turn(turns: cute.Pointer):
    """Lets the next block add, once this warp's own additions are done; one warp."""
    cute.arch.cp_async_bulk_wait_group(0)
    end_turn(turns)


@cute.jit
def end_turn(turns: cute.Pointer):
    """Says that a turn is over, and publishes what was written in it; one warp."""
    if cute.arch.lane_idx() == 0:
        cute.arch.red(turns, Int32(1), op="add", dtype="s32", sem="release", scope="gpu")
