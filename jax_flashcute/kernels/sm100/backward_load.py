"""The load warp of the Blackwell backward: K and V once, then each tile's Q, dO and statistics."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from jax_flashcute.kernels.common.tiles import clear_rows, tma_partition
from jax_flashcute.kernels.sm100.tensor_memory import ROWS

KEY_BARRIERS = 3
"""For K, for V, and for loads whose tail is cleared before anyone is told of them."""
TAIL = 2


class LoadWarp:
    """Fills shared memory by TMA, and clears what lies beyond the lengths."""

    def __init__(self, kernel):
        """``kernel``: the ``BackwardSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def load_tiles(
        self,
        q_copy,
        do_copy,
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
        pipeline_q, pipeline_do = pipelines[:2]
        n_block, kv_head, batch = block
        visits, m_blocks = tiles
        queries, keys = lengths
        has_q_lengths, has_kv_lengths = has_lengths
        tail_bar = key_barriers + TAIL
        tail_phase = Int32(0)
        keys_here = keys - n_block * ROWS
        has_key_tail = Boolean(False)
        if const_expr(has_kv_lengths):
            has_key_tail = keys_here < ROWS
        for i in cutlass.range_constexpr(2):
            tma, source, smem = key_copies[i]
            tXsX, tXgX = self.partition(tma, source, smem, kv_head, batch)
            tail_phase = self.load(
                (tma, tXgX[None, n_block], tXsX, smem),
                None,
                (key_barriers + i, tail_bar),
                Int32(0),
                (has_key_tail, tail_phase, keys_here),
            )

        # The statistics come from the kernel before this one.
        cute.arch.griddepcontrol_wait()
        q_stage, q_phase, do_stage, do_phase = (Int32(0) for _ in range(4))
        for g in cutlass.range(self.kernel.group, unroll=1):
            head = kv_head * self.kernel.group + g
            tQsQ, tQgQ = self.partition(*q_copy, head, batch)
            tOsO, tOgO = self.partition(*do_copy, head, batch)
            gLSE, gdPsum = (self.rows(x, m_blocks, head, batch) for x, _ in statistics)
            sLSE, sdPsum = (smem for _, smem in statistics)
            count, tile_of, _ = visits(g)
            for i in cutlass.range(count, unroll=1):
                m = tile_of(i)
                rows_here = queries - m * ROWS
                if const_expr(self.kernel.has_lists):
                    # A list may hold tiles that lie beyond the length altogether.
                    rows_here = cutlass.max(rows_here, Int32(0))
                has_tail = Boolean(False)
                if const_expr(has_q_lengths):
                    has_tail = rows_here < ROWS
                pipeline_q.acquire(q_stage, q_phase)
                tail_phase = self.load(
                    (q_copy[0], tQgQ[None, m], tQsQ, q_copy[2]),
                    (gLSE[None, m], sLSE[None, q_stage]),
                    (pipeline_q.full + q_stage, tail_bar),
                    q_stage,
                    (has_tail, tail_phase, rows_here),
                )
                pipeline_do.acquire(do_stage, do_phase)
                tail_phase = self.load(
                    (do_copy[0], tOgO[None, m], tOsO, do_copy[2]),
                    (gdPsum[None, m], sdPsum[None, do_stage]),
                    (pipeline_do.full + do_stage, tail_bar),
                    do_stage,
                    (has_tail, tail_phase, rows_here),
                )
                q_stage, q_phase = pipeline_q.advance(q_stage, q_phase)
                do_stage, do_phase = pipeline_do.advance(do_stage, do_phase)

    def partition(self, tma, source, smem, head: Int32, batch: Int32):
        """Stages in shared memory and tiles of one head's rows, as TMA copies them."""
        rows, width = (cute.size(smem, mode=[i]) for i in range(2))
        tiles = cute.local_tile(source[None, None, head, batch], (rows, width), (None, 0))
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
            tx_bytes += rows * 4
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
