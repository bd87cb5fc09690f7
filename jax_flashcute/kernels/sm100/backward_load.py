"""The load warp of the Blackwell backward: K and V once, then each tile's Q, dO and statistics."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from jax_flashcute.kernels.common.tiles import clear_rows, tma_partition
from jax_flashcute.kernels.sm100.tensor_memory import ROWS

KEY_BARRIERS = 4
"""For K, for V, of pairs for K^T, and for loads whose tail is cleared before anyone is told."""
TAIL = 3


class LoadWarp:
    """Fills shared memory by TMA, and clears what lies beyond the lengths."""

    def __init__(self, kernel):
        """``kernel``: the ``BackwardSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def load_tiles(
        self,
        tile_copies,
        key_copies,
        statistics,
        pipelines,
        key_barriers: cute.Pointer,
        block,
        tiles,
        lengths,
        has_lengths: cutlass.Constexpr,
    ):
        """Every tile of every head of the group; LSE2 comes with Q, dPsum with dO."""
        n_block, kv_head, batch, rank = block
        visits, m_blocks = tiles
        queries, keys = lengths
        has_q_lengths, has_kv_lengths = has_lengths
        tail_bar = key_barriers + TAIL
        tail_phase = Int32(0)
        keys_here = keys - n_block * self.kernel.config.tile_n
        # Of what pairs hold besides, a run that measures has no use.
        count = 2 if self.kernel.is_measuring else len(key_copies)
        for i in cutlass.range_constexpr(count):
            tail_phase = self.load_part(
                key_copies[i],
                None,
                (key_barriers + i, tail_bar),
                (n_block, self.kernel.config.tile_n, kv_head, batch, rank),
                Int32(0),
                (has_kv_lengths, tail_phase, keys_here),
            )

        # The statistics come from the kernel before this one.
        cute.arch.griddepcontrol_wait()
        # Q and dO; of pairs, then dO^T and Q^T.
        rings = (*pipelines[:2], *pipelines[6:])
        state = tuple((Int32(0), Int32(0)) for _ in rings)
        for g in cutlass.range(self.kernel.group, unroll=1):
            head = kv_head * self.kernel.group + g
            rows = [(self.rows(x, m_blocks, head, batch), smem) for x, smem in statistics]
            count, tile_of, _ = visits(g)
            for i in cutlass.range(count, unroll=1):
                m = tile_of(i)
                for r in cutlass.range_constexpr(len(rings)):
                    rings[r].acquire(*state[r])
                    tail_phase = self.load_part(
                        tile_copies[r],
                        rows[r] if r < len(rows) else None,
                        (rings[r].full + state[r][0], tail_bar),
                        (m, ROWS, head, batch, rank),
                        state[r][0],
                        (has_q_lengths, tail_phase, queries - m * ROWS),
                    )
                state = tuple(rings[r].advance(*state[r]) for r in range(len(rings)))

    @cute.jit
    def load_part(self, copy, rows, barriers, tile, stage: Int32, tail):
        """Loads what a block holds of a tile, into a stage.

        Args:
          rows: statistics that come with it, (128, tiles), and their stages; or None.
          tile: which it is, how many rows it has, its head and its batch entry; the block's rank.
          tail: as ``load`` with the rows of the tile, but whether any may lie beyond a length.
        """
        tma, source, smem = copy
        index, size, head, batch, rank = tile
        has_lengths, tail_phase, rows_here = tail
        held = cute.size(smem, mode=[0])
        # Of a pair, a block has half of the rows or half of the columns, or it is the pair's tile.
        row, column, first = index, 0, 0
        if const_expr(held < size):
            row, first = index * (size // held) + rank, rank * held
        elif const_expr(self.kernel.is_pair):
            column = rank
        tXsX, tXgX = self.partition(tma, source, smem, head, batch, column)
        has_tail, rows_here = Boolean(False), rows_here - first
        if const_expr(has_lengths):
            has_tail = rows_here < held
            # Even the first may lie beyond: of half a tile, or of one that a list names.
            rows_here = cutlass.max(rows_here, Int32(0))
        row_copy = None
        if const_expr(rows is not None):
            row_copy = rows[0][None, index], rows[1][None, stage]
        return self.load(
            (tma, tXgX[None, row], tXsX, smem),
            row_copy,
            barriers,
            stage,
            (has_tail, tail_phase, rows_here),
        )

    def partition(self, tma, source, smem, head: Int32, batch: Int32, column=0):
        """Stages in shared memory and tiles of one head's rows, as TMA copies them."""
        shape = tuple(cute.size(smem, mode=[i]) for i in range(2))
        tiles = cute.local_tile(source[None, None, head, batch], shape, (None, column))
        return tma_partition(tma, smem, tiles)

    def rows(
        self, x: cute.Tensor, m_blocks: Int32, head: Int32, batch: Int32, size: int = ROWS
    ) -> cute.Tensor:
        """One head's statistics as (size, tiles of so many rows)."""
        first = (Int64(batch) * x.shape[1] + head) * m_blocks * ROWS
        return cute.make_tensor(
            (x.iterator + first).align(16),
            cute.make_layout((size, m_blocks * (ROWS // size)), stride=(1, size)),
        )

    @cute.jit
    def load(self, tile_copy, row_copy, barriers, stage: Int32, tail):
        """Loads a tile, and its row statistics, into a stage, and clears the tile's tail."""
        tma, source, target, smem = tile_copy
        full, tail_bar = barriers
        has_tail, tail_phase, rows_here = tail
        rows, width = (cute.size(smem, mode=[i]) for i in range(2))
        tx_bytes = rows * width * 2
        if const_expr(row_copy is not None):
            tx_bytes += cute.size(row_copy[1]) * 4
        # Both barriers lie in one block of shared memory: a difference of bytes chooses.
        address = tail_bar.toint() if has_tail else full.toint()
        bar = cute.make_ptr(Int64, address, cute.AddressSpace.smem, assumed_align=8)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, tx_bytes)
        cute.copy(tma, source, target[None, stage], tma_bar_ptr=bar)
        if const_expr(row_copy is not None):
            copy_row = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
            with cute.arch.elect_one():
                cute.copy(copy_row, row_copy[0], row_copy[1], mbar_ptr=bar)
        if has_tail:
            # What lies beyond the length may be NaN, and 0 * NaN is NaN: clear it.
            cute.arch.mbarrier_wait(bar, tail_phase)
            clear_rows(smem, width, stage, rows_here)
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(full)
            tail_phase ^= 1
        return tail_phase
