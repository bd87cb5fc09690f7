"""dQ in float32 in global memory: cleared ahead of blocks that add to it, rounded once they did.

Key/value heads come in sections that work on them together, and blocks are launched section by
section.  While the products are computed, an idle warp of each block clears its share of the dQ of
the section after its own, which then is in L2 and no memory traffic that nothing hides; that of the
first section is cleared by the kernel before (extra/preprocess.py).  Blocks wait for blocks that
were launched before them alone.  The kernel after (extra/postprocess.py) rounds a head as soon as
all has been added to it: its blocks begin where the last blocks have left room.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.turns import end_turn, take_turn
from jax_flashcute.kernels.config.sm90 import BwdConfig

MOST_TILES = 4
"""Query tiles that a block clears at most, of each head; more would be waited for."""


class QuerySums:
    """dQ of every query head, tile by tile, in the order of the registers of the products.

    ``mCounts``: (2, B * K) int32, of each key/value head how many blocks have cleared their share
    of it, and how many warps have added all that they have to add.
    """

    def __init__(self, config: BwdConfig, head_dim: int, group: int):
        self.group = group
        self.values = config.tile_m * config.padded_head_dim(head_dim)
        self.dq_warps = config.dq_warps(head_dim)
        # Of the warpgroup that loads: the first loads, and the dQ warps follow it.
        self.idle_warp = 1 + self.dq_warps

    def distance(self, section: Int32, kv_heads: Int32, m_blocks: Int32, n_blocks: Int32) -> Int32:
        """How many key/value heads after its own a block clears.

        So many of the first are left to the kernel before: all of them, ``kv_heads``, where heads
        have few blocks for their queries.
        """
        are_few = m_blocks > MOST_TILES * n_blocks
        return select(are_few, kv_heads, cutlass.min(section, kv_heads))

    @cute.jit
    def wait_until_cleared(self, mCounts: cute.Tensor, block, distance: Int32):
        """Before a dQ warp adds."""
        entry, _, n_blocks = block
        if entry >= distance:
            take_turn(mCounts.iterator + entry, n_blocks)

    @cute.jit
    def end_adding(self, mCounts: cute.Tensor, block):
        """After all additions of a dQ warp are done."""
        end_turn(mCounts.iterator + (mCounts.shape[1] + block[0]))

    @cute.jit
    def wait_until_added(self, mCounts: cute.Tensor, head_entry: Int32, blocks: Int32):
        """Before a query head's dQ is read, to which so many blocks add; one warp."""
        entry = head_entry // self.group
        take_turn(mCounts.iterator + (mCounts.shape[1] + entry), blocks * self.dq_warps)

    @cute.jit
    def clear(
        self, mdQAccum: cute.Tensor, mCounts: cute.Tensor, block, ahead: Int32, m_blocks: Int32
    ):
        """Clears a block's share of the dQ of a key/value head after its own; one warp."""
        entry, n_block, n_blocks = block
        if entry + ahead < mCounts.shape[1]:
            tiles = self.group * m_blocks
            each = (tiles + n_blocks - 1) // n_blocks
            first = cutlass.min(n_block * each, tiles)
            last = cutlass.min(first + each, tiles)
            before = Int64(entry + ahead) * tiles
            zeros = cute.make_rmem_tensor(4, Float32)
            zeros.fill(0.0)
            for i in cutlass.range(first, last, unroll=1):
                tile = cute.make_tensor(
                    (mdQAccum.iterator + (before + i) * self.values).align(16),
                    cute.make_layout((4, 32, self.values // 128), stride=(1, 4, 128)),
                )
                for j in cutlass.range(self.values // 128, unroll=8):
                    cute.autovec_copy(zeros, tile[None, cute.arch.lane_idx(), j])
            cute.arch.sync_warp()
            end_turn(mCounts.iterator + (entry + ahead))
