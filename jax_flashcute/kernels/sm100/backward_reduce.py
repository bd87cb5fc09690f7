"""The dQ warps of the Blackwell backward: dQ from tensor memory to the sum in global memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from jax_flashcute.kernels.common.lists import row_of
from jax_flashcute.kernels.common.tiles import chunks
from jax_flashcute.kernels.common.turns import bulk_add, pass_turn, take_turn, turn_of
from jax_flashcute.kernels.sm100.tensor_memory import (
    ROWS,
    fence_after_sync,
    fence_before_sync,
    load_row,
)

DQ_BUFFERS = 2
"""Chunks of 32 columns on their way to global memory."""
WARPS = 4


class ReduceWarps:
    """Four, each with 32 rows of dQ and with bulk reductions of its own."""

    def __init__(self, kernel):
        """``kernel``: the ``BackwardSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def add_query_gradients(
        self,
        tensor_memory: cute.Pointer,
        sdQ: cute.Tensor,  # (4, 32 rows, 8, 4 warps, buffers) float32
        sums,
        pipelines,
        block,
        heads: Int32,
        tiles,
    ):
        """Adds every tile's dQ; 32 rows lie together, four columns of each row a time."""
        kernel = self.kernel
        pipeline_dq = pipelines[4]
        mdQAccum, mTurns, mRanks = sums
        n_block, kv_head, batch, rank = block
        visits, m_blocks, offset = tiles
        thread = cute.arch.thread_idx()[0] % 128
        warp = cute.arch.make_warp_uniform(thread // 32)
        place = tensor_memory + kernel.dq_column
        # Of the four times 32 rows of a tile, those that this warp has, from which column on.
        rows_of_warp, first_column, turn_of_warp = warp, Int32(0), warp
        if const_expr(kernel.is_pair):
            rows_of_warp, turn_of_warp = 2 * rank + warp % 2, WARPS * rank + warp
            first_column = warp // 2 * kernel.held_h
        pieces = chunks(kernel.held_h)
        turns = kernel.config.dq_warps(kernel.head_dim)
        is_deterministic = const_expr(kernel.config.deterministic)
        phase, buffer = Int32(0), Int32(0)
        # Nothing may be added before the kernel before this one has cleared the sums.
        cute.arch.griddepcontrol_wait()
        for g in cutlass.range(kernel.group, unroll=1):
            entry = Int64(batch) * heads + kv_head * kernel.group + g
            count, tile_of, _ = visits(g)
            for j in cutlass.range(count, unroll=1):
                m = tile_of(j)
                tile = entry * m_blocks + m
                rows = tile * (ROWS * kernel.smem_h) + rows_of_warp * (32 * kernel.smem_h)
                rows += first_column * 32
                pipeline_dq.wait(0, phase)
                fence_after_sync()
                for i in cutlass.range_constexpr(len(pieces)):
                    first, size = pieces[i]
                    values = cute.make_rmem_tensor(size, Float32)
                    load_row(place + first, values, thread)
                    cute.arch.fence_view_async_tmem_load()
                    if const_expr(i == len(pieces) - 1):
                        fence_before_sync()
                        cute.arch.sync_warp()
                        pipeline_dq.release(0, WARPS, "dQ")
                    # The reduction that read this buffer last is the oldest in flight.
                    cute.arch.cp_async_bulk_wait_group(DQ_BUFFERS - 1, read=True)
                    cute.arch.sync_warp()
                    target = sdQ[None, None, None, warp, buffer]
                    cute.autovec_copy(
                        cute.make_tensor(values.iterator, cute.make_layout((4, size // 4))),
                        cute.local_tile(target[None, thread % 32, None], (4, size // 4), (0, 0)),
                    )
                    cute.arch.fence_view_async_shared()
                    cute.arch.sync_warp()
                    if const_expr(is_deterministic and i == 0):
                        if const_expr(len(mRanks) > 0):
                            head = kv_head * kernel.group + g
                            turn = row_of(mRanks[0], batch, head, n_block)[m]
                        else:
                            sizes = ROWS, kernel.config.tile_n
                            turn = turn_of(kernel.mask, n_block, m, offset, *sizes)
                        take_turn(mTurns.iterator + (tile * turns + turn_of_warp), turn)
                    if cute.arch.lane_idx() == 0:
                        bulk_add(
                            mdQAccum.iterator + (rows + first * 32),
                            target.iterator,
                            size * 32 * 4,
                        )
                        cute.arch.cp_async_bulk_commit_group()
                    buffer ^= 1
                if const_expr(is_deterministic):
                    pass_turn(mTurns.iterator + (tile * turns + turn_of_warp))
                phase ^= 1
        cute.arch.cp_async_bulk_wait_group(0)
