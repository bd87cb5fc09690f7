"""The correction warpgroup of the Blackwell forward: rescales O in tensor memory and stores it."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from jax_flashcute.kernels.common.tiles import chunks, round_pair
from jax_flashcute.kernels.sm100.pipeline import take_work
from jax_flashcute.kernels.sm100.tensor_memory import (
    fence_after_sync,
    fence_before_sync,
    load_row,
    store_row,
)


class CorrectionWarpgroup:
    """Its thread t owns row t of O of every query tile."""

    def __init__(self, kernel):
        """``kernel``: the ``ForwardSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def correct_outputs(
        self,
        tensor_memory: cute.Pointer,
        mO: cute.Tensor,
        mOPartial: cute.Tensor | None,
        pipelines,
        work: cute.Tensor,
        q_length: Int32,
    ):
        """Thread t owns row t of every query tile, as in the softmax warpgroups."""
        cfg = self.kernel.config
        _, _, _, _, pipeline_o, pipeline_factor, pipeline_tile = pipelines
        thread = cute.arch.thread_idx()[0] % 128
        counted = self.kernel.counted
        o_phase, f_phase, t_stage, t_phase = (Int32(0) for _ in range(4))

        fields = counted(take_work(work, pipeline_tile, t_stage, t_phase, 4, "correction"))
        while fields[0] >= 0:
            t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
            m_block, head, batch, _, queries, _, n_min, n_max = fields[:8]
            for _ in cutlass.range(n_max - n_min - 1, unroll=1):
                for w in cutlass.range_constexpr(cfg.query_tiles):
                    factor = self.take_factor(tensor_memory, pipeline_factor, w, f_phase, thread)
                    if cute.arch.vote_any_sync(factor != 1.0):
                        # O is up to date: the scores that gave this factor came after it.
                        self.rescale(tensor_memory + self.kernel.o_column(w), thread, factor)
                        fence_before_sync()
                    cute.arch.sync_warp()
                    pipeline_o.release(w, 4, "correction")
                f_phase ^= 1
            for w in cutlass.range_constexpr(cfg.query_tiles):
                token = self.kernel.token(m_block, w, thread)
                factor = Float32(0.0)
                place = tensor_memory + self.kernel.o_column(w)
                if n_min < n_max:
                    factor = self.take_factor(tensor_memory, pipeline_factor, w, f_phase, thread)
                    pipeline_o.wait(w, o_phase)
                    fence_after_sync()
                q_head = self.kernel.query_head(head, thread)
                is_stored = self.kernel.is_row(thread) and token < q_length
                place_in_o = (batch, token, q_head, 0)
                row = mO.iterator + cute.crd2idx(place_in_o, mO.layout)
                for first, size in chunks(self.kernel.smem_hv):
                    values = cute.make_rmem_tensor(size, Float32)
                    if n_min < n_max:
                        load_row(place + first, values, thread)
                        cute.arch.fence_view_async_tmem_load()
                    else:
                        values.fill(0.0)
                    if is_stored:
                        is_valid = token < queries
                        if const_expr(self.kernel.split_kv):
                            split, splits = fields[8:]
                            if splits > 1:
                                part = (split, *place_in_o)
                                self.store_partial(mOPartial, part, values, first, factor)
                            else:
                                self.store_columns(row, values, first, factor, is_valid)
                        else:
                            self.store_columns(row, values, first, factor, is_valid)
                if n_min < n_max:
                    fence_before_sync()
                    cute.arch.sync_warp()
                    pipeline_o.release(w, 4, "correction")
            if n_min < n_max:
                f_phase ^= 1
                o_phase ^= 1
            fields = counted(take_work(work, pipeline_tile, t_stage, t_phase, 4, "correction"))

    @cute.jit
    def take_factor(
        self, tensor_memory: cute.Pointer, pipeline_factor, slab, phase: Int32, thread: Int32
    ):
        """What the softmax warpgroup of a query tile left for this thread's row."""
        pipeline_factor.wait(slab, phase)
        fence_after_sync()
        factor = cute.make_rmem_tensor(1, Float32)
        load_row(
            tensor_memory + (self.kernel.s_column(slab) + self.kernel.factor_column), factor, thread
        )
        cute.arch.fence_view_async_tmem_load()
        fence_before_sync()
        cute.arch.sync_warp()
        pipeline_factor.release(slab, 4, "correction")
        return factor[0]

    @cute.jit
    def rescale(self, place: cute.Pointer, thread: Int32, factor: Float32):
        """Multiplies this thread's row of O by its factor."""
        for first, size in chunks(self.kernel.smem_hv):
            values = cute.make_rmem_tensor(size, Float32)
            load_row(place + first, values, thread)
            cute.arch.fence_view_async_tmem_load()
            for c in cutlass.range_constexpr(size):
                values[c] = values[c] * factor
            store_row(place + first, values, thread)
        cute.arch.fence_view_async_tmem_store()

    @cute.jit
    def store_columns(
        self,
        row: cute.Pointer,
        values: cute.Tensor,
        first: cutlass.Constexpr[int],
        factor: Float32,
        is_valid: Boolean,
    ):
        """Stores this thread's row of O from column ``first`` on, 16 bytes at a time."""
        for c in cutlass.range_constexpr(0, cute.size(values), 8):
            if const_expr(first + c < self.kernel.head_dim_v):
                line = cute.make_rmem_tensor(4, Uint32)
                for i in cutlass.range_constexpr(4):
                    low, high = values[c + 2 * i] * factor, values[c + 2 * i + 1] * factor
                    word = round_pair(self.kernel.dtype, low, high)
                    line[i] = word if is_valid else Uint32(0)
                target = cute.make_tensor(
                    cute.make_ptr(
                        Uint32,
                        (row + (first + c)).toint(),
                        cute.AddressSpace.gmem,
                        assumed_align=16,
                    ),
                    cute.make_layout(4),
                )
                cute.autovec_copy(line, target)

    @cute.jit
    def store_partial(
        self,
        mOPartial: cute.Tensor,
        place,
        values: cute.Tensor,
        first: cutlass.Constexpr[int],
        factor: Float32,
    ):
        """Stores columns of a row of one part in float32, normalised by the part's own LSE.

        O of a row whose LSE is -inf is never read, so what a padded row holds there is no matter.
        """
        row = mOPartial.iterator + cute.crd2idx(place, mOPartial.layout)
        for c in cutlass.range_constexpr(0, cute.size(values), 4):
            if const_expr(first + c < self.kernel.head_dim_v):
                line = cute.make_rmem_tensor(4, Float32)
                for i in cutlass.range_constexpr(4):
                    line[i] = values[c + i] * factor
                target = (row + (first + c)).align(16)
                cute.autovec_copy(line, cute.make_tensor(target, cute.make_layout(4)))
