"""The gradient warpgroups of the Blackwell backward: S to P, dP to dS, and the stores of dK, dV."""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from jax_flashcute.kernels.common.elements import Elements
from jax_flashcute.kernels.common.fixed_point import sums_in_memory
from jax_flashcute.kernels.common.intervals import is_full as is_full_tile
from jax_flashcute.kernels.common.intervals import limit_words, within
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.packed import PackedMask, transposed_bits
from jax_flashcute.kernels.common.softmax import LARGEST_SCORE, LOG2_E, exp2
from jax_flashcute.kernels.common.tiles import (
    CHUNK,
    chunks,
    round_pairs,
    store_pairs,
    tma_partition,
)
from jax_flashcute.kernels.sm100.gradient_sums import Pullback
from jax_flashcute.kernels.sm100.tensor_memory import (
    ROWS,
    compared_word,
    fence_after_sync,
    fence_before_sync,
    hide_outside,
    load_row,
    store_row,
)

WARPS = 8
HALF = ROWS // 2
"""Queries of a tile that a warpgroup works on."""
PART = 16
"""Scores that are changed together, one by one: with more, products and scores spilled."""
STORE_BARRIER = 1
"""Named barrier of the first warpgroup; the second has the one after it."""


class GradientWarpgroups:
    """Two; a thread owns one of the 128 keys and, by its warpgroup, half of a tile's queries."""

    def __init__(self, kernel):
        """``kernel``: the ``BackwardSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def differentiate(
        self,
        tensor_memory: cute.Pointer,
        smem,
        stores,
        pipelines,
        done_barrier: cute.Pointer,
        block,
        tiles,
        lengths,
        arrays,
    ):
        """P and dS of every tile of every head; then dV by one warpgroup, dK by the other."""
        kernel = self.kernel
        n_block, kv_head, batch, rank = block
        keys_tile = n_block * kernel.cta_group + rank
        visits, num_tiles, ranges = tiles
        mElements, mBounds, compares, mPacked, sums, array_lengths = arrays
        thread = cute.arch.thread_idx()[0] % 128
        half = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128)
        p_step = kernel.p_columns[1] - kernel.p_columns[0]
        places = (
            tensor_memory + (kernel.s_column + half * HALF),
            tensor_memory + (kernel.p_columns[0] + half * p_step),
            tensor_memory + (kernel.dp_column + half * HALF),
        )
        own = (thread, half, keys_tile * ROWS + thread, lengths)
        sLSE, sdPsum, sdS = smem
        # A row of dS^T, and the first of this thread's queries in it.
        target = sdS, thread, half * HALF, None
        if const_expr(kernel.is_pair):
            other = cute.arch.map_dsmem_ptr(sdS.iterator, half)
            # All of tensor memory begins at 0, which the compiler does not know.
            zero = tensor_memory.toint()
            target = cute.make_tensor(other, sdS.layout), rank * ROWS + thread, Int32(0), zero
        smem = sLSE, sdPsum, target

        # Stages and phases of Q and of dO, and the phase of S and of dP.
        state = tuple(Int32(0) for _ in range(5))
        seen = self.mask_step(own, batch, (mBounds, compares), array_lengths)
        if const_expr(kernel.sums_gradients):
            # Nothing may be added before the kernel before this one has cleared the sums, or found
            # how large what is added is.
            cute.arch.griddepcontrol_wait()
        pullback = self.pullback((mElements, array_lengths, batch, lengths[0]), sums, own)
        start_sums, finish_sums = self.around_heads(pullback)
        for g in cutlass.range(kernel.group, unroll=1):
            entry = (mElements, array_lengths, batch, lengths[0])
            head = kv_head * kernel.group + g
            of_head = self.elements_of_head(entry, head, own[2])
            of_head = (*of_head, head, pullback)
            start_sums()
            read_bits = self.packed_step(mPacked, batch, head, own[2], array_lengths[0])
            _, _, stretches = visits(g)
            for stretch in cutlass.range_constexpr(len(stretches)):
                count, tile_of, is_masked, is_full = stretches[stretch]
                for i in cutlass.range(count, unroll=1):
                    m = tile_of(i)
                    is_hiding = is_masked
                    if const_expr(is_full):
                        # Full to its mask function; the window and the lengths have no lists.
                        is_hiding = (m < ranges[2]) | (m >= ranges[3])
                    if const_expr(kernel.union is not None):
                        is_hiding = ~is_full_tile(ranges, m)
                    masks = (of_head, seen, read_bits, is_full, is_hiding)
                    state = self.step(places, smem, pipelines, own, m, state, masks)
            finish_sums(head)

        is_empty = num_tiles == 0
        if not is_empty:
            cute.arch.mbarrier_wait(done_barrier, 0)
            fence_after_sync()
        for i in cutlass.range_constexpr(0 if kernel.is_measuring else 2):
            if half == i:
                column, scale = ((kernel.dv_column, 1.0), (kernel.dk_column, kernel.scale))[i]
                place = (keys_tile, kv_head, batch)
                self.store_gradient(
                    stores[i], tensor_memory + column, (thread, i), place, scale, is_empty
                )

    @cute.jit
    def step(
        self,
        places,
        smem,
        pipelines,
        own,
        m: Int32,
        state,
        masks: cutlass.Constexpr,
    ):
        """One query tile; returns the next state.

        Args:
          masks: of ``elements_of_head`` with the head and its ``Pullback``; of ``mask_step`` and
            ``packed_step``; whether lists have the tile as one that ``mask_mod`` hides nothing of;
            whether the other masks may hide some (traced).
        """
        kernel = self.kernel
        s_place, p_place, dp_place = places
        sLSE, sdPsum, (sdS, ds_row, ds_first, zero) = smem
        pipeline_q, pipeline_do, pipeline_s, pipeline_dp = pipelines[:4]
        thread, half, _, _ = own
        (_, _, head, pullback), seen, read_bits, _, is_hiding = masks
        q_stage, q_phase, do_stage, do_phase, phase = state
        first = half * HALF

        scores = cute.make_rmem_tensor((1, HALF), Float32)
        pipeline_s.wait(0, phase)
        fence_after_sync()
        flat = cute.make_tensor(scores.iterator, cute.make_layout(HALF))
        load_row(s_place, flat, thread)
        pipeline_q.wait(q_stage, q_phase)
        cute.arch.fence_view_async_tmem_load()
        tLSE = quads(sLSE, q_stage, first)
        products = self.products_to_keep(pullback, flat)
        if const_expr(kernel.by_element):
            p_place = None if kernel.is_measuring else p_place
            self.change_scores(scores, p_place, tLSE, thread, m * ROWS + first, masks)
        else:
            if const_expr(kernel.packed_mask is not None):
                hide_outside(scores, read_bits(m * ROWS + first))
            if const_expr(is_hiding is True):
                hide_outside(scores, seen(m * ROWS + first))
            elif const_expr(is_hiding is not False):
                if is_hiding:
                    hide_outside(scores, seen(m * ROWS + first))
            self.probabilities(scores, tLSE, kernel.scale)
            store_row(p_place, round_pairs(kernel.dtype, flat), thread)
        cute.arch.fence_view_async_tmem_store()
        fence_before_sync()
        cute.arch.sync_warp()
        pipeline_s.release(0, WARPS, "gradients")
        pipeline_q.release(q_stage, WARPS, "gradients")

        pipeline_do.wait(do_stage, do_phase)
        pipeline_dp.wait(0, phase)
        fence_after_sync()
        tdPsum = quads(sdPsum, do_stage, first)
        if const_expr(kernel.is_pair):
            # Addresses of 64 bits, better made again for each tile than kept in registers.
            ds_row += phase & zero
        for c in cutlass.range_constexpr(0, HALF, CHUNK):
            dscores = cute.make_rmem_tensor(CHUNK, Float32)
            load_row(dp_place + c, dscores, thread)
            cute.arch.fence_view_async_tmem_load()
            self.score_gradients(scores, dscores, tdPsum, c)
            of_chunk = (pullback, head, m * ROWS + first + c, self.chunk_of(products, c), dscores)
            self.pull_back(*of_chunk)
            if const_expr(not kernel.is_measuring):
                pairs = round_pairs(kernel.dtype, dscores)
                # Over what this thread has read of dP.
                store_row(dp_place + c // 2, pairs, thread)
                store_pairs(sdS[None, None, 0], ds_row, ds_first // 8 + c // 8, pairs)
            self.sum_kept(*of_chunk)
        cute.arch.fence_view_async_tmem_store()
        if const_expr(not kernel.is_pair):
            cute.arch.fence_view_async_shared()
        fence_before_sync()
        cute.arch.sync_warp()
        pipeline_dp.release(0, WARPS, "gradients")
        pipeline_do.release(do_stage, WARPS, "gradients")
        if const_expr(kernel.is_pair and not kernel.is_measuring):
            # Stores to the other block take longer; dK, which needs none, has begun meanwhile.
            cute.arch.fence_proxy("async.shared", space="cluster")
            cute.arch.sync_warp()
            pipelines[5].release(0, WARPS, "gradients")
        following_q = pipeline_q.advance(q_stage, q_phase)
        return *following_q, *pipeline_do.advance(do_stage, do_phase), phase ^ 1

    def elements_of_head(self, elements, head: Int32, key: Int32):
        """What is done to a key's score with a query, and its derivative.

        Returns:
          ``(modify, differentiate)``: ``modify(row, product, is_full)`` is the score of a product
          with a query row; ``differentiate(row, product, d_score)`` the gradient of the scaled
          product from that of the score.  None for what does nothing, and where a ``Pullback`` does
          it.
        """
        functions, scale = self.kernel.functions, self.kernel.scale
        if not self.kernel.by_element:
            return None, None
        mElements, array_lengths, batch, offset = elements
        entry = Elements(functions, mElements).of_entry(batch, offset, array_lengths)
        of_key = entry.keys(key)
        if functions.keeps_gradients or self.kernel.sums_gradients:
            pulling = None
        else:
            pulling = Elements(functions, mElements, differentiates=True)
            pulling = pulling.of_entry(batch, offset, array_lengths)
        of_key_pulling = None if pulling is None else pulling.keys(key)

        def modify(row: Int32, product: Float32, is_full: bool) -> Float32:
            known = entry.both(entry.queries(head, row), of_key)
            return entry.element(known, product, scale, is_full=is_full)

        def differentiate(row: Int32, product: Float32, d_score: Float32) -> Float32:
            known = pulling.both(pulling.queries(head, row), of_key_pulling)
            return pulling.gradient(known, product, d_score, scale)[0]

        return modify, None if pulling is None else differentiate

    def pullback(self, elements, sums: tuple, own) -> Pullback | None:
        """What sums gradients of arrays; None where there are none.

        ``sums``: those, and the exponents of sums in fixed point.
        """
        if not self.kernel.sums_gradients:
            return None
        mElements, array_lengths, batch, offset = elements
        thread, _, key, _ = own
        entry = Elements(self.kernel.functions, mElements, differentiates=True)
        entry = entry.of_entry(batch, offset, array_lengths)
        kernel = self.kernel
        in_memory = sums_in_memory(
            kernel.functions, kernel.deterministic, *sums, is_measuring=kernel.is_measuring
        )
        return Pullback(entry, in_memory, kernel.scale, key, thread)

    def around_heads(self, pullback: Pullback | None) -> tuple[Callable, Callable]:
        """What is done before the first tile of a head, and of a head after the last."""
        if pullback is None:
            return lambda: None, lambda head: None
        return pullback.start, pullback.finish

    def products_to_keep(
        self, pullback: Pullback | None, products: cute.Tensor
    ) -> cute.Tensor | None:
        """Those of half a tile, for derivatives that are functions of them."""
        if pullback is None or not pullback.reads_score:
            return None
        kept = cute.make_rmem_tensor(HALF, Float32)
        for c in range(HALF):
            kept[c] = products[c]
        return kept

    def chunk_of(self, products: cute.Tensor | None, first: int) -> cute.Tensor | None:
        """Of those, the ones of a chunk that begins at column ``first``."""
        if products is None:
            return None
        return cute.make_tensor(products.iterator + first, cute.make_layout(CHUNK))

    def pull_back(self, pullback: Pullback | None, *of_chunk) -> None:
        """From gradients of scores to those of products, and sums; ``of_chunk``: of ``chunk``."""
        if pullback is not None and not self.kernel.functions.keeps_gradients:
            pullback.chunk(*of_chunk)

    def sum_kept(self, pullback: Pullback | None, *of_chunk) -> None:
        """Sums of what stays as it is: once dS is stored, which frees registers."""
        if pullback is not None and self.kernel.functions.keeps_gradients:
            pullback.chunk(*of_chunk)

    @cute.jit
    def change_scores(
        self,
        scores: cute.Tensor,
        p_place: cute.Pointer | None,
        tLSE: cute.Tensor,
        thread: Int32,
        start: Int32,
        masks: cutlass.Constexpr,
    ):
        """Products with queries from ``start`` on to probabilities, a few at a time.

        P goes to tensor memory, where it has a place; what stays in registers is multiplied by the
        derivative of the score, so that P (dP - dPsum) of it is the gradient of the scaled product.
        """
        (modify, differentiate, _, _), seen, read_bits, is_full, is_hiding = masks
        bits = read_bits(start)
        if const_expr(is_hiding is not False):
            words = seen(start)
        for first in cutlass.range_constexpr(0, HALF, PART):
            chunk = cute.make_tensor(scores.iterator + first, cute.make_layout((1, PART)))
            products = [chunk[0, c] for c in range(PART)]
            for c in cutlass.range_constexpr(PART):
                score = modify(start + first + c, products[c], is_full)
                if const_expr(self.kernel.functions.may_be_infinite):
                    # Of rows beyond the last, whose LSE2 is infinite: infinity less it is NaN.
                    score = cute.arch.fmin(score, Float32(LARGEST_SCORE))
                chunk[0, c] = score
            if const_expr(self.kernel.packed_mask is not None):
                hide_outside(chunk, [bits[first // 32] >> Uint32(first % 32)])
            if const_expr(is_hiding is not False):
                hide_outside(chunk, [words[first // 32] >> Uint32(first % 32)])
            self.probabilities(chunk, cute.domain_offset((0, first // 4), tLSE), 1.0)
            flat = cute.make_tensor(chunk.iterator, cute.make_layout(PART))
            if const_expr(p_place is not None):
                store_row(p_place + first // 2, round_pairs(self.kernel.dtype, flat), thread)
            if const_expr(differentiate is not None):
                for c in cutlass.range_constexpr(PART):
                    chunk[0, c] = differentiate(start + first + c, products[c], chunk[0, c])

    def packed_step(self, mPacked: tuple, batch: Int32, head: Int32, key: Int32, q_length: Int32):
        """The words of a mask in bits for a key and half a tile: a function of its first query.

        A warp's 32 keys share a word of each row: each lane reads that of one row.
        """
        if self.kernel.packed_mask is None:
            return lambda start: []
        packed = PackedMask(self.kernel.packed_mask, *mPacked)

        def word(first: Int32) -> Uint32:
            row = cutlass.min(first + cute.arch.lane_idx(), Int32(q_length) - 1)
            return transposed_bits(packed.word(packed.row(batch, head, row), key // 32))

        return lambda start: [word(start + w) for w in range(0, HALF, 32)]

    def mask_step(self, own, batch: Int32, bounds: tuple, array_lengths: tuple):
        """Which queries see a key, as words: a function of the first of them."""
        _, _, key, (offset, queries, keys) = own
        mBounds, compares = bounds
        mask = self.kernel.mask
        spans = range(0, HALF, 32)
        limits = compare = None
        if self.kernel.row_bounds is not None:
            place = cutlass.min(key, Int32(array_lengths[1]) - 1)
            # Keys beyond the array are hidden: their zeros may be a score far above the LSE.
            limits = [
                (low[batch, place], select(place == key, high[batch, place], Int32(0)))
                for low, high in self.kernel.row_bounds.limits(mBounds)
            ]
            if self.kernel.compares:
                compare = self.comparison(mBounds, batch, place, offset, array_lengths)

        def seen(start: Int32) -> list:
            of_rows = limits or mask.query_limits(key, offset, queries)
            if limits is None:
                of_rows = [(first, select(key < keys, end, Int32(0))) for first, end in of_rows]
            words = limit_words(of_rows, start, HALF)
            if compare is not None:
                is_seen, pairs = compare(start), zip(words, spans, strict=True)
                words = [word & compared_word(compares, is_seen, w) for word, w in pairs]
            return words

        return seen

    def comparison(
        self, mBounds: tuple, batch: Int32, key: Int32, offset: Int32, array_lengths: tuple
    ):
        """For rows from ``start`` on, a function of a column: whether its segment is the key's.

        Scattered segments with positions of their own are compared with the window here too.  Of a
        mask: whether the row's interval holds the key.
        """
        compared = self.kernel.row_bounds.compared(mBounds)
        if self.kernel.row_bounds.compares_bounds:
            return self.comparison_of_bounds(*compared, batch, key, array_lengths[0])
        q_ids, kv_ids, *positions = compared
        q_length, _ = array_lengths

        def compare(start: Int32):
            # Read here and not once: scattered segments are rare, registers are too.
            kv_id = kv_ids[batch, key]
            place = positions[1][batch, key] if positions else Int32(0)

            def seen(column: Int32) -> Boolean:
                row = cutlass.min(start + column, Int32(q_length) - 1)
                window = (None, None)
                if positions:
                    window = self.kernel.mask.limits(positions[0][batch, row] + offset)
                return within(place, *window, q_ids[batch, row] == kv_id)

            return seen

        return compare

    def comparison_of_bounds(
        self, lows: cute.Tensor, highs: cute.Tensor, batch: Int32, key: Int32, q_length: Int32
    ):
        """For rows from ``start`` on, a function of a column: whether its interval holds a key."""

        def compare(start: Int32):
            def seen(column: Int32) -> Boolean:
                row = cutlass.min(start + column, Int32(q_length) - 1)
                return (key >= lows[batch, row]) & (key < highs[batch, row])

            return seen

        return compare

    @cute.jit
    def probabilities(
        self, scores: cute.Tensor, tLSE: cute.Tensor, scale: cutlass.Constexpr[float]
    ):
        """exp2(scale log2(e) S - LSE2), in place."""
        scale_log2 = Float32(scale * LOG2_E)
        quad = cute.make_rmem_tensor(4, Float32)
        for j in cutlass.range_constexpr(cute.size(scores) // 4):
            cute.autovec_copy(tLSE[None, j], quad)
            for i in cutlass.range_constexpr(0, 4, 2):
                c = 4 * j + i
                pair = cute.arch.fma_packed_f32x2(
                    (scores[0, c], scores[0, c + 1]),
                    (scale_log2, scale_log2),
                    (-quad[i], -quad[i + 1]),
                )
                scores[0, c], scores[0, c + 1] = exp2(pair[0]), exp2(pair[1])

    @cute.jit
    def score_gradients(
        self,
        probabilities: cute.Tensor,
        dscores: cute.Tensor,
        tdPsum: cute.Tensor,
        first: cutlass.Constexpr[int],
    ):
        """P (dP - dPsum), in place of a chunk of dP that begins at column ``first``."""
        quad = cute.make_rmem_tensor(4, Float32)
        for j in cutlass.range_constexpr(CHUNK // 4):
            cute.autovec_copy(tdPsum[None, first // 4 + j], quad)
            for i in cutlass.range_constexpr(0, 4, 2):
                c = 4 * j + i
                pair = cute.arch.sub_packed_f32x2(
                    (dscores[c], dscores[c + 1]), (quad[i], quad[i + 1])
                )
                dscores[c], dscores[c + 1] = cute.arch.mul_packed_f32x2(
                    (probabilities[0, first + c], probabilities[0, first + c + 1]), pair
                )

    @cute.jit
    def store_gradient(self, store, place: cute.Pointer, own, place_of_keys, scale, is_empty):
        """Scales and rounds dK or dV and stores it, through the place of K or V; one warpgroup."""
        tma, target, smem = store
        thread, half = own
        keys_tile, kv_head, batch = place_of_keys
        width = cute.size(smem, mode=[1])
        for first, size in chunks(width):
            values = cute.make_rmem_tensor(size, Float32)
            if is_empty:
                values.fill(0.0)
            else:
                load_row(place + first, values, thread)
                cute.arch.fence_view_async_tmem_load()
            if const_expr(scale != 1.0):
                for c in cutlass.range_constexpr(size):
                    values[c] = values[c] * scale
            pairs = round_pairs(self.kernel.dtype, values)
            store_pairs(smem[None, None, 0], thread, Int32(first // 8), pairs)
        fence_before_sync()
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=STORE_BARRIER + half, number_of_threads=128)
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4 == 0:
            tiles = cute.local_tile(target[None, None, kv_head, batch], (ROWS, width), (None, 0))
            tXsX, tXgX = tma_partition(tma, smem, tiles)
            cute.copy(tma, tXsX[None, 0], tXgX[None, keys_tile])
            cute.arch.cp_async_bulk_commit_group()
            # Shared memory must outlive the stores that read it.
            cute.arch.cp_async_bulk_wait_group(0, read=True)


def quads(statistics: cute.Tensor, stage: Int32, first: Int32) -> cute.Tensor:
    """Half a tile's statistics from row ``first`` on, as (4, rows / 4)."""
    row = cute.domain_offset((first, stage), statistics).iterator.align(16)
    return cute.make_tensor(row, cute.make_layout((4, HALF // 4)))
