"""The load warp of the Blackwell forward: draws tiles of work, brings their Q, K and V.

By TMA; keys and values in pages too small for it are copied by threads, of the load warp and of
those that follow it through its tiles.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from jax_flashcute.kernels.common.paging import begin_stage, begin_values
from jax_flashcute.kernels.common.scheduler import draw_tile
from jax_flashcute.kernels.common.splits import split_range
from jax_flashcute.kernels.common.tiles import clear_rows, slab_tma_layout, tma_partition
from jax_flashcute.kernels.sm100.pipeline import TensorPipeline, write_work

COPYING_WARPS = 1
"""That copies K from small pages, the load warp; of two with nothing to do one copies V."""


class LoadWarp:
    """Draws tiles of work and fills the stages of Q, K and V."""

    def __init__(self, kernel):
        """``kernel``: the ``ForwardSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def load_tiles(
        self,
        q_copy,
        k_copy,
        v_copy,
        pipelines,
        tail_barrier,
        work: cute.Tensor,
        mCounter: cute.Tensor,
        mPageTable: cute.Tensor | None,
        order: cutlass.Constexpr,
        lengths: cutlass.Constexpr,
        has_kv_lengths: cutlass.Constexpr[bool],
        mBounds: tuple,
        mLists: tuple,
    ):
        """K of the next key tile goes ahead of V of this one, the order that products take."""
        cfg = self.kernel.config
        pipeline_q, pipeline_k, pipeline_v, _, _, _, pipeline_tile = pipelines
        tma_q, gQ, sQ = q_copy
        sV = v_copy[2]
        heads, tokens = self.kernel.heads_packed, self.kernel.slab_tokens
        # (heads, tokens, columns, slab): the slabs as TMA writes them.
        slab = slab_tma_layout(self.kernel.dtype, 128, self.kernel.smem_h, heads, tokens)
        slabs = cute.make_layout(cfg.query_tiles, stride=128 * self.kernel.smem_h)
        sQ_tma = cute.make_tensor(sQ.iterator, cute.append(slab.outer, slabs))
        if const_expr(tokens * heads < 128):
            # Rows of a slab that no token fills: TMA leaves them alone, and products read them.
            for w in cutlass.range_constexpr(cfg.query_tiles):
                clear_rows(sQ, self.kernel.smem_h, Int32(w), Int32(tokens * heads))
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
        tile = cute.arch.block_idx()[0]
        q_phase, k_stage, k_phase, v_stage, v_phase, t_stage, t_phase, tail_phase = (
            Int32(0) for _ in range(8)
        )
        split_kv = const_expr(self.kernel.split_kv)
        # Which part a tile is, and whether it is one at all, is found at once.
        place_of_part = tuple(Int32(0) for _ in range(5))
        if const_expr(split_kv):
            place_of_part = order.coordinates(tile)
        while place_of_part[2] < order.batch if const_expr(split_kv) else tile < order.num_tiles:
            part = ()
            if const_expr(split_kv):
                m_block = Int32(0)
                head, kv_head, batch = place_of_part[:3]
                part = place_of_part[3:]
            else:
                m_block, head, kv_head, batch = order.coordinates(tile)
            offset, queries, keys = lengths(batch)
            visited = self.kernel.visited_tiles(m_block, batch, (offset, queries, keys), mBounds)
            n_min, n_max = visited[:2]
            lists = self.kernel.lists_of(mLists, (m_block, head, batch, offset, queries))
            if const_expr(lists is not None):
                # For those who only count.
                n_min, n_max = Int32(0), lists.count
            if const_expr(split_kv):
                n_min, n_max = split_range(n_min, n_max, *part)
            pipeline_tile.acquire(t_stage, t_phase)
            fields = (m_block, head, batch, offset, queries, keys, n_min, n_max, *visited[2:])
            unused = (Int32(0),) * (self.kernel.work_fields - len(fields) - len(part))
            write_work(work[None, t_stage], fields + part + unused)
            pipeline_tile.commit(t_stage)
            t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
            gQ_tile = cute.local_tile(
                gQ[None, None, None, head, batch], (heads, tokens, self.kernel.smem_h), (0, None, 0)
            )  # (heads, tokens, columns, slabs)
            tQsQ, tQgQ = tma_partition(tma_q, sQ_tma, gQ_tile)
            locate, load_k, load_v = self.kernel.loaders(
                k_copy, v_copy, mPageTable, Int32(0), kv_head, batch, keys
            )
            visits, nth = self.kernel.key_order(fields, lists)
            # Where tiles lie comes from memory, and is asked for ahead of time.
            n, following = Int32(0), Int32(0)
            tiles = self.kernel.kv_tiles
            place = following_place = tiles.nowhere
            if visits > 0:
                n = nth(0)
                place = locate(n)
                following = nth(cutlass.min(Int32(1), visits - 1))
                following_place = locate(following)
                pipeline_k.acquire(k_stage, k_phase)
                begin_stage(pipeline_k, tiles, load_k, n, place, k_stage)
                for w in cutlass.range_constexpr(cfg.query_tiles):
                    m = m_block * cfg.query_tiles + w
                    load_stage(pipeline_q, tma_q, tQgQ, m, tQsQ, Int32(w), q_phase)
                q_phase ^= 1
                k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
            for i in cutlass.range(visits, unroll=1):
                ahead = nth(cutlass.min(i + 2, visits - 1))
                ahead_place = locate(ahead)
                if i + 1 < visits:
                    pipeline_k.acquire(k_stage, k_phase)
                    begin_stage(pipeline_k, tiles, load_k, following, following_place, k_stage)
                    k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
                # Another warp copies V, if threads do.
                if const_expr(tiles.copying_warps == 0):
                    pipeline_v.acquire(v_stage, v_phase)
                    tail_phase = begin_values(
                        *(pipeline_v, tiles, load_v, n, place, v_stage),
                        (sV, self.kernel.smem_hv),
                        keys,
                        (tail_barrier, tail_phase),
                        has_kv_lengths,
                        self.kernel.has_lists,
                    )
                v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)
                n, place = following, following_place
                following, following_place = ahead, ahead_place
            tile = draw_tile(mCounter, order.num_tiles)
            tile = cute.arch.shuffle_sync(tile, 0)
            if const_expr(split_kv):
                place_of_part = order.coordinates(tile)

        pipeline_tile.acquire(t_stage, t_phase)
        write_work(work[None, t_stage], (Int32(-1),) * self.kernel.work_fields)
        pipeline_tile.commit(t_stage)
        # The products signal once more for every stage: the block must not be gone by then.
        for _ in cutlass.range_constexpr(cfg.kv_stages):
            pipeline_k.acquire(k_stage, k_phase)
            k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
            pipeline_v.acquire(v_stage, v_phase)
            v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)
        for w in cutlass.range_constexpr(cfg.query_tiles):
            pipeline_q.acquire(Int32(w), q_phase)


@cute.jit
def load_stage(
    pipeline: TensorPipeline,
    tma: cute.CopyAtom,
    source: cute.Tensor,
    index: Int32,
    target: cute.Tensor,
    stage: Int32,
    phase: Int32,
):
    """Waits for a stage to be empty and has TMA fill it with a tile of ``source``."""
    pipeline.acquire(stage, phase)
    pipeline.expect(stage)
    cute.copy(tma, source[None, index], target[None, stage], tma_bar_ptr=pipeline.full + stage)
