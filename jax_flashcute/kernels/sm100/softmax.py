"""The softmax warpgroups of the Blackwell forward: S to P in tensor memory, and the log-sum-exp."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from jax_flashcute.kernels.common.elements import Elements
from jax_flashcute.kernels.common.intervals import low_bits
from jax_flashcute.kernels.common.softmax import OnlineSoftmax
from jax_flashcute.kernels.common.tiles import CHUNK, round_pairs
from jax_flashcute.kernels.primitives import select
from jax_flashcute.kernels.sm100.pipeline import WORK_FIELDS, take_work
from jax_flashcute.kernels.sm100.tensor_memory import (
    fence_after_sync,
    fence_before_sync,
    hide_outside,
    load_row,
    store_row,
)


class SoftmaxWarpgroups:
    """One warpgroup for each query tile; its thread t owns row t."""

    def __init__(self, kernel):
        """``kernel``: the ``ForwardSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def softmax_rows(
        self,
        tensor_memory: cute.Pointer,
        factors: cute.Tensor,  # (128, query_tiles) float32 in shared memory
        mLSE: cute.Tensor,
        mLSEPartial: cute.Tensor | None,
        pipelines,
        work: cute.Tensor,
        array_lengths: tuple,
        mElements: tuple,
    ):
        """One warpgroup for each query tile; its thread t owns row t."""
        cfg = self.kernel.config
        q_length, _ = array_lengths
        _, _, _, pipeline_s, _, pipeline_factor, pipeline_tile = pipelines
        warps = 4 * cfg.query_tiles
        thread = cute.arch.thread_idx()[0] % 128
        slab = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128)
        place = tensor_memory + self.kernel.s_column(slab)
        scores = cute.make_rmem_tensor((1, cfg.tile_n), Float32)
        # Scores that are looked at one by one are scaled there.
        scale = 1.0 if self.kernel.by_element else self.kernel.scale
        softmax = OnlineSoftmax(1, scale, cfg.rescale_threshold, lanes_per_row=1)
        row_scale = cute.make_rmem_tensor(1, Float32)
        lse = cute.make_rmem_tensor(1, Float32)
        s_phase, f_phase, t_stage, t_phase = (Int32(0) for _ in range(4))

        fields = take_work(work, pipeline_tile, t_stage, t_phase, warps, "softmax")
        while fields[0] >= 0:
            t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
            m_block, head, batch, offset, queries, keys = fields[:6]
            n_min, n_max, full_min, full_max = fields[6:WORK_FIELDS]
            token = self.kernel.token(m_block, slab, thread)
            q_head = self.kernel.query_head(head, thread)
            modify = self.element_step(mElements, (batch, offset, array_lengths), q_head, token)
            softmax.reset()
            if n_min < n_max:
                turn = (pipeline_s, slab, place, thread)
                bounds = (offset + token, keys)
                base, factor = self.take_scores(
                    softmax, scores, turn, s_phase, bounds, modify, n_max - 1, True, True
                )
                self.leave_probabilities(softmax, scores, turn, base, factor, True)
                s_phase ^= 1
                # Three stretches, right to left: boundary tiles, full tiles, boundary tiles.
                full_end = cutlass.max(cutlass.min(full_max, n_max - 1), n_min)
                full_begin = cutlass.min(cutlass.max(full_min, n_min), full_end)
                for stretch in cutlass.range_constexpr(
                    3 if self.kernel.mask.low is not None else 2
                ):
                    begin, end = (
                        (full_end, n_max - 1),
                        (full_begin, full_end),
                        (n_min, full_begin),
                    )[stretch]
                    if const_expr(stretch == 1 and self.kernel.mask.low is None):
                        begin = n_min
                    for i in cutlass.range(end - begin, unroll=1):
                        base, factor = self.take_scores(
                            softmax,
                            scores,
                            turn,
                            s_phase,
                            bounds,
                            modify,
                            end - 1 - i,
                            False,
                            stretch != 1,
                        )
                        send_factor(pipeline_factor, factors, slab, f_phase, thread, factor)
                        f_phase ^= 1
                        self.leave_probabilities(softmax, scores, turn, base, factor, False)
                        s_phase ^= 1
            sinks = None
            if const_expr(self.kernel.has_sinks):
                sinks = [Elements(self.kernel.functions, mElements).sink(batch, q_head)]
                if const_expr(self.kernel.split_kv):
                    # Where a row has several parts, its sink enters as they are added up.
                    is_whole = fields[WORK_FIELDS + 1] == 1
                    sinks = [select(is_whole, sinks[0], Float32(-Float32.inf))]
            softmax.finish(row_scale, lse, sinks)
            if n_min < n_max:
                send_factor(pipeline_factor, factors, slab, f_phase, thread, row_scale[0])
                f_phase ^= 1
            if self.kernel.is_row(thread) and token < q_length:
                # Rows at or beyond the query length are as good as empty.
                row_lse = lse[0] if token < queries else -Float32.inf
                if const_expr(self.kernel.split_kv):
                    split, splits = fields[WORK_FIELDS:]
                    if splits > 1:
                        mLSEPartial[split, batch, token, q_head] = row_lse
                    else:
                        mLSE[batch, token, q_head] = row_lse
                else:
                    mLSE[batch, token, q_head] = row_lse
            fields = take_work(work, pipeline_tile, t_stage, t_phase, warps, "softmax")

    @cute.jit
    def take_scores(
        self,
        softmax: OnlineSoftmax,
        scores: cute.Tensor,
        turn,
        phase: Int32,
        bounds,
        modify: cutlass.Constexpr,
        n: Int32,
        is_first: cutlass.Constexpr[bool],
        is_boundary: cutlass.Constexpr[bool],
    ):
        """Loads and masks a row's scores of key tile n; returns ``OnlineSoftmax.raise_max``.

        Args:
          modify: of ``element_step``.
        """
        pipeline_s, slab, place, thread = turn
        position, keys = bounds
        pipeline_s.wait(slab, phase)
        fence_after_sync()
        if const_expr(self.kernel.by_element):
            self.change_scores(place, thread, modify, n, is_boundary)
        load_row(
            place, cute.make_tensor(scores.iterator, cute.make_layout(cute.size(scores))), thread
        )
        cute.arch.fence_view_async_tmem_load()
        if const_expr(is_boundary):
            start = n * self.kernel.config.tile_n
            spans = range((self.kernel.config.tile_n + 31) // 32)
            upper = self.kernel.mask.upper(position, keys) - start
            words = [low_bits(upper - 32 * w) for w in spans]
            if const_expr(self.kernel.mask.low is not None):
                lower = self.kernel.mask.lower(position) - start
                words = [words[w] & ~low_bits(lower - 32 * w) for w in spans]
            hide_outside(scores, words)
        return softmax.raise_max(scores, 0, is_first, is_boundary or self.kernel.by_element)

    def element_step(self, mElements: tuple, entry: tuple, head: Int32, token: Int32):
        """What is done to some of a row's scores: a function of these and of the first one's key.

        Its third argument says whether some of their keys may lie beyond the last one.
        """
        if not self.kernel.by_element:
            return None
        elements = Elements(self.kernel.functions, mElements).of_entry(*entry)
        queries = [elements.queries(head, token)]

        def modify(scores: cute.Tensor, first: Int32, may_be_beyond: bool) -> None:
            column = elements.along_keys(queries, first, may_be_beyond)
            for c in range(cute.size(scores)):
                (known,) = column(c)
                scores[c] = elements.element(known, scores[c], self.kernel.scale)

        return modify

    @cute.jit
    def change_scores(
        self,
        place: cute.Pointer,
        thread: Int32,
        modify: cutlass.Constexpr,
        n: Int32,
        may_be_beyond: cutlass.Constexpr[bool],
    ):
        """Replaces a row's products of key tile n, in tensor memory, by its scores.

        A chunk at a time, in a loop that is not unrolled: beside a whole row in registers there is
        no room for what single scores need.
        """
        tile_n = self.kernel.config.tile_n
        for i in cutlass.range(tile_n // CHUNK, unroll=1):
            chunk = cute.make_rmem_tensor(CHUNK, Float32)
            load_row(place + i * CHUNK, chunk, thread)
            cute.arch.fence_view_async_tmem_load()
            modify(chunk, n * tile_n + i * CHUNK, may_be_beyond)
            store_row(place + i * CHUNK, chunk, thread)
        cute.arch.fence_view_async_tmem_store()

    @cute.jit
    def leave_probabilities(
        self,
        softmax: OnlineSoftmax,
        scores: cute.Tensor,
        turn,
        base: Float32,
        factor: Float32,
        is_first: cutlass.Constexpr[bool],
    ):
        """Stores exp2 of a row's scores as P over S and hands them to the products."""
        pipeline_s, slab, place, thread = turn
        softmax.exponentiate(scores, 0, base, factor, is_first)
        flat = cute.make_tensor(scores.iterator, cute.make_layout(cute.size(scores)))
        pairs = round_pairs(self.kernel.dtype, flat)
        store_row(place, pairs, thread)
        cute.arch.fence_view_async_tmem_store()
        fence_before_sync()
        cute.arch.sync_warp()
        pipeline_s.release(slab, 4, "softmax")


@cute.jit
def send_factor(
    pipeline_factor, factors: cute.Tensor, slab: Int32, phase: Int32, thread: Int32, factor: Float32
):
    """Hands the correction what this row of O must be multiplied by."""
    pipeline_factor.acquire(slab, phase)
    factors[thread, slab] = factor
    cute.arch.sync_warp()
    pipeline_factor.commit(slab)
