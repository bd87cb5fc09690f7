"""The gradient warpgroups of the Blackwell backward in passes: P, dS, and the gradient's store."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from jax_flashcute.kernels.common.elements import Elements
from jax_flashcute.kernels.common.intervals import is_full as is_full_tile
from jax_flashcute.kernels.common.intervals import limit_words
from jax_flashcute.kernels.common.packed import PackedMask
from jax_flashcute.kernels.common.tiles import (
    CHUNK,
    chunks,
    round_pairs,
    store_pairs,
    tma_partition,
)
from jax_flashcute.kernels.sm100.backward_gradients import (
    HALF,
    STORE_BARRIER,
    WARPS,
    GradientWarpgroups,
    quads,
)
from jax_flashcute.kernels.sm100.softmax import SoftmaxWarpgroups
from jax_flashcute.kernels.sm100.tensor_memory import (
    ROWS,
    compared_word,
    fence_after_sync,
    fence_before_sync,
    hide_outside,
    load_row,
    store_row,
)


class PassWarpgroups(GradientWarpgroups):
    """Two; a thread owns one of the block's rows and, by its warpgroup, a half of every tile.

    ``kernel`` is a ``GradientPassSm100``.
    """

    @cute.jit
    def differentiate(
        self,
        tensor_memory: cute.Pointer,
        tile_statistics,
        statistics,
        store,
        pipelines,
        done_barrier: cute.Pointer,
        place,
        tiles,
        lengths,
        arrays,
    ):
        """P or dS of every tile of every head; then the gradient."""
        kernel = self.kernel
        block, head, kv_head, batch = place
        visits, num_tiles, ranges = tiles
        mElements, mBounds, compares, mPacked, sums, array_lengths = arrays
        thread = cute.arch.thread_idx()[0] % 128
        half = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128)
        places = (
            tensor_memory + (kernel.s_column + half * HALF),
            tensor_memory + (kernel.dp_column + half * HALF),
        )
        row = block * ROWS + thread
        own = (thread, half, row, lengths)
        seen = self.mask_step(own, batch, (mBounds, compares), array_lengths)
        # Where rows are queries, their statistics are theirs throughout.
        of_row = None
        if const_expr(not kernel.of_keys):
            of_row = tuple(everywhere(x[batch, head, row]) for x in statistics)

        # Stages and phases of what a tile brings, at this warpgroup's half; the phase of S and dP.
        first_state, second_state = (Int32(0), Int32(0)), (Int32(0), Int32(0))
        pipeline_first, pipeline_second = pipelines[:2]
        if half == 1:
            first_state = pipeline_first.advance(*first_state)
            second_state = pipeline_second.advance(*second_state)
        state = (*first_state, *second_state, Int32(0))
        # Cleared before this pass began, as the statistics are there.
        pullback = self.pullback((mElements, array_lengths, batch, lengths[0]), sums, own)
        start_sums, finish_sums = self.around_heads(pullback)
        for g in cutlass.range(kernel.group, unroll=1):
            query_head = kv_head * kernel.group + g if const_expr(kernel.of_keys) else head
            entry = (mElements, array_lengths, batch, lengths[0])
            of_head = self.elements_of_head(entry, query_head, row)
            of_head = (*of_head, query_head, pullback)
            start_sums()
            read_bits = self.packed_step(mPacked, batch, query_head, row, array_lengths[0])
            _, _, stretches = visits(g)
            for stretch in cutlass.range_constexpr(len(stretches)):
                count, tile_of, _, is_full = stretches[stretch]
                for i in cutlass.range(count, unroll=1):
                    m = tile_of(i)
                    masks = (of_head, seen, read_bits, is_full, ~is_full_tile(ranges, m))
                    rows = (tile_statistics, of_row)
                    state = self.step(places, rows, pipelines, own, m, state, masks)
            finish_sums(query_head)

        is_empty = num_tiles == 0
        if not is_empty:
            cute.arch.mbarrier_wait(done_barrier, 0)
            fence_after_sync()
        target_head = kv_head if const_expr(kernel.of_keys) else head
        if const_expr(not kernel.is_measuring):
            target = (block, target_head, batch)
            self.store_rows(store, tensor_memory, (thread, half), target, is_empty)

    @cute.jit
    def step(self, places, statistics, pipelines, own, m: Int32, state, masks: cutlass.Constexpr):
        """A warpgroup's half of a tile; returns the next state.  ``masks``: as of the base."""
        kernel = self.kernel
        is_value = const_expr(kernel.target == "value")
        s_place, dp_place = places
        (sLSE, sdPsum), of_row = statistics
        pipeline_first, pipeline_second, pipeline_s = pipelines[:3]
        thread, half, _, _ = own
        (_, _, head, pullback), seen, read_bits, _, is_hiding = masks
        first_stage, first_phase, second_stage, second_phase, phase = state
        start = m * ROWS + half * HALF

        scores = cute.make_rmem_tensor((1, HALF), Float32)
        pipeline_s.wait(half, phase)
        fence_after_sync()
        flat = cute.make_tensor(scores.iterator, cute.make_layout(HALF))
        load_row(s_place, flat, thread)
        if const_expr(kernel.of_keys):
            # Full, as S is: the wait is for what it lets this thread read.
            pipeline_first.wait(first_stage, first_phase)
            tLSE = quads(sLSE, first_stage, Int32(0))
        else:
            tLSE = of_row[0]
        cute.arch.fence_view_async_tmem_load()
        if const_expr(not is_value):
            fence_before_sync()
            cute.arch.sync_warp()
            pipeline_s.release(half, WARPS // 2, "gradients")
        products = self.products_to_keep(pullback, flat)
        if const_expr(kernel.by_element):
            p_place = s_place if is_value else None
            self.change_scores(scores, p_place, tLSE, thread, start, masks)
        else:
            if const_expr(kernel.packed_mask is not None):
                hide_outside(scores, read_bits(start))
            if is_hiding:
                hide_outside(scores, seen(start))
            self.probabilities(scores, tLSE, kernel.scale)
            if const_expr(is_value):
                store_row(s_place, round_pairs(kernel.dtype, flat), thread)
        if const_expr(is_value):
            cute.arch.fence_view_async_tmem_store()
            fence_before_sync()
            cute.arch.sync_warp()
            pipeline_s.release(half, WARPS // 2, "gradients")
        if const_expr(kernel.of_keys):
            pipeline_first.release(first_stage, WARPS // 2, "gradients", lanes_read=True)

        if const_expr(not is_value):
            pipelines[3].wait(half, phase)
            fence_after_sync()
            if const_expr(kernel.of_keys):
                pipeline_second.wait(second_stage, second_phase)
                tdPsum = quads(sdPsum, second_stage, Int32(0))
            else:
                tdPsum = of_row[1]
            for c in cutlass.range_constexpr(0, HALF, CHUNK):
                dscores = cute.make_rmem_tensor(CHUNK, Float32)
                load_row(dp_place + c, dscores, thread)
                cute.arch.fence_view_async_tmem_load()
                self.score_gradients(scores, dscores, tdPsum, c)
                of_chunk = (pullback, head, start + c, self.chunk_of(products, c), dscores)
                self.pull_back(*of_chunk)
                if const_expr(not kernel.is_measuring):
                    # Over what this thread has read of dP.
                    store_row(dp_place + c // 2, round_pairs(kernel.dtype, dscores), thread)
                self.sum_kept(*of_chunk)
            cute.arch.fence_view_async_tmem_store()
            fence_before_sync()
            cute.arch.sync_warp()
            pipelines[3].release(half, WARPS // 2, "gradients")
            if const_expr(kernel.of_keys):
                pipeline_second.release(second_stage, WARPS // 2, "gradients")
        # The other warpgroup's half lies between.
        for _ in range(2):
            first_stage, first_phase = pipeline_first.advance(first_stage, first_phase)
            second_stage, second_phase = pipeline_second.advance(second_stage, second_phase)
        return first_stage, first_phase, second_stage, second_phase, phase ^ 1

    def elements_of_head(self, elements, head: Int32, row: Int32):
        """As of the base, where rows are queries as a function of the key."""
        if self.kernel.of_keys or not self.kernel.by_element:
            return super().elements_of_head(elements, head, row)
        functions, scale = self.kernel.functions, self.kernel.scale
        mElements, array_lengths, batch, offset = elements
        entry = Elements(functions, mElements).of_entry(batch, offset, array_lengths)
        of_query = entry.queries(head, row)

        def modify(key: Int32, product: Float32, is_full: bool) -> Float32:
            known = entry.both(of_query, entry.keys(key))
            return entry.element(known, product, scale, is_full=is_full)

        if functions.keeps_gradients:
            return modify, None
        pulling = Elements(functions, mElements, differentiates=True)
        pulling = pulling.of_entry(batch, offset, array_lengths)
        of_query_pulling = pulling.queries(head, row)

        def differentiate(key: Int32, product: Float32, d_score: Float32) -> Float32:
            known = pulling.both(of_query_pulling, pulling.keys(key))
            return pulling.gradient(known, product, d_score, scale)[0]

        return modify, differentiate

    def packed_step(self, mPacked: tuple, batch: Int32, head: Int32, row: Int32, q_length: Int32):
        """As of the base, where rows are queries as a function of the half's first key."""
        if self.kernel.of_keys or self.kernel.packed_mask is None:
            return super().packed_step(mPacked, batch, head, row, q_length)
        packed = PackedMask(self.kernel.packed_mask, *mPacked)
        words = packed.row(batch, head, cutlass.min(row, Int32(q_length) - 1))
        return lambda start: [packed.word(words, (start + w) // 32) for w in range(0, HALF, 32)]

    def mask_step(self, own, batch: Int32, bounds: tuple, array_lengths: tuple):
        """As of the base, where rows are queries as a function of the half's first key."""
        kernel = self.kernel
        mBounds, compares = bounds
        others = mBounds
        if kernel.row_bounds is not None:
            # The last arrays are those of the forward.
            first = kernel.row_bounds.arrays()
            others, of_rows = mBounds[:first], mBounds[first:]
        if kernel.of_keys:
            return super().mask_step(own, batch, (others, compares), array_lengths)
        _, _, row, (offset, _, keys) = own
        position, compare = row + offset, None
        if kernel.row_bounds is not None:
            inside = cutlass.min(row, Int32(array_lengths[0]) - 1)
            pairs = kernel.row_bounds.of_keys.limits(of_rows)
            limits = [(low[batch, inside], high[batch, inside]) for low, high in pairs]
            if kernel.compares:
                compare = SoftmaxWarpgroups(kernel).comparison(
                    others, batch, inside, offset, array_lengths
                )
        else:
            limits = kernel.mask.row_limits(position, keys)

        def seen(start: Int32) -> list:
            words = limit_words(limits, start, HALF)
            if compare is not None:
                pairs = zip(words, range(0, HALF, 32), strict=True)
                words = [word & compared_word(compares, compare(start), w) for word, w in pairs]
            return words

        return seen

    @cute.jit
    def store_rows(self, store, tensor_memory: cute.Pointer, own, place, is_empty):
        """Scales and rounds the gradient and stores it, through two stages of what tiles brought.

        The warpgroups take chunks of columns in turns.
        """
        kernel = self.kernel
        tma, target, smem = store
        thread, half = own
        block, head, batch = place
        width = cute.size(smem, mode=[1])
        scale = 1.0 if kernel.target == "value" else kernel.scale
        for first, size in chunks(width):
            if half == first // CHUNK % 2:
                values = cute.make_rmem_tensor(size, Float32)
                if is_empty:
                    values.fill(0.0)
                else:
                    column = kernel.gradient_column + first
                    load_row(tensor_memory + column, values, thread)
                    cute.arch.fence_view_async_tmem_load()
                if const_expr(scale != 1.0):
                    for c in cutlass.range_constexpr(size):
                        values[c] = values[c] * scale
                pairs = round_pairs(kernel.dtype, values)
                rows = smem[None, None, thread // HALF]
                store_pairs(rows, thread % HALF, Int32(first // 8), pairs)
        fence_before_sync()
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=STORE_BARRIER, number_of_threads=32 * WARPS)
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            tiles = cute.local_tile(target[None, None, head, batch], (HALF, width), (None, 0))
            tXsX, tXgX = tma_partition(tma, smem, tiles)
            for s in cutlass.range_constexpr(2):
                cute.copy(tma, tXsX[None, s], tXgX[None, 2 * block + s])
            cute.arch.cp_async_bulk_commit_group()
            # Shared memory must outlive the stores that read it.
            cute.arch.cp_async_bulk_wait_group(0, read=True)


def everywhere(value: Float32) -> cute.Tensor:
    """A row's statistic in the shape of ``quads``."""
    held = cute.make_rmem_tensor(1, Float32)
    held[0] = value
    return cute.make_tensor(held.iterator, cute.make_layout((4, HALF // 4), stride=(0, 0)))
