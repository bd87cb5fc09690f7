"""The softmax warpgroups of the Blackwell forward: S to P in tensor memory, and the log-sum-exp."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from jax_flashcute.kernels.common.elements import Elements
from jax_flashcute.kernels.common.intervals import limit_words, within
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.packed import PackedMask
from jax_flashcute.kernels.common.softmax import OnlineSoftmax
from jax_flashcute.kernels.common.tiles import CHUNK, chunks, round_pairs
from jax_flashcute.kernels.sm100.pipeline import take_work
from jax_flashcute.kernels.sm100.tensor_memory import (
    compared_word,
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
        mLSE: cute.Tensor,
        mLSEPartial: cute.Tensor | None,
        pipelines,
        work: cute.Tensor,
        array_lengths: tuple,
        mElements: tuple,
        mBounds: tuple,
        mLists: tuple,
        mPacked: tuple,
    ):
        """One warpgroup for each query tile; its thread t owns row t."""
        cfg = self.kernel.config
        q_length, _ = array_lengths
        _, _, _, pipeline_s, _, pipeline_factor, pipeline_tile = pipelines
        warps = 4 * cfg.query_tiles
        thread = cute.arch.thread_idx()[0] % 128
        slab = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128)
        place = tensor_memory + self.kernel.s_column(slab)
        turn = (pipeline_s, slab, place, thread)
        scores = cute.make_rmem_tensor((1, cfg.tile_n), Float32)
        # Scores that are looked at one by one are scaled there.
        scale = 1.0 if self.kernel.by_element else self.kernel.scale
        softmax = OnlineSoftmax(
            *(1, scale, cfg.rescale_threshold),
            lanes_per_row=1,
            any_scores=self.kernel.by_element and self.kernel.functions.changes_scores,
        )
        row_scale = cute.make_rmem_tensor(1, Float32)
        lse = cute.make_rmem_tensor(1, Float32)
        s_phase, f_phase, t_stage, t_phase = (Int32(0) for _ in range(4))

        fields = take_work(work, pipeline_tile, t_stage, t_phase, warps, "softmax")
        while fields[0] >= 0:
            t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
            m_block, head, batch, offset, queries = fields[:5]
            n_min, n_max = fields[6:8]
            token = self.kernel.token(m_block, slab, thread)
            q_head = self.kernel.query_head(head, thread)
            modify = self.element_step(mElements, (batch, offset, array_lengths), q_head, token)
            hide = self.mask_step(mBounds, fields, token, array_lengths)
            softmax.reset()
            if n_min < n_max:
                lists = self.kernel.lists_of(mLists, fields)
                _, nth = self.kernel.key_order(fields, lists)
                # Of lists, the first tile may be from either.
                is_full = False if const_expr(lists is None) else lists.partial_count == 0
                steps = (modify, hide, self.packed_step(mPacked, batch, q_head, token, q_length))
                base, factor = self.take_scores(
                    softmax, scores, turn, s_phase, steps, nth(0), (True, is_full, True)
                )
                self.leave_probabilities(softmax, scores, turn, base, factor, True, True)
                s_phase ^= 1
                stretches = self.kernel.stretches(fields, lists, array_lengths[1])
                for stretch in cutlass.range_constexpr(len(stretches)):
                    count, tile_of, is_masked, is_full = stretches[stretch]
                    for i in cutlass.range(count, unroll=1):
                        n = tile_of(i)
                        kind = (False, is_full, is_masked)
                        base, factor = self.take_scores(
                            softmax, scores, turn, s_phase, steps, n, kind
                        )
                        self.leave_factor(pipeline_factor, turn, factor)
                        f_phase ^= 1
                        self.leave_probabilities(
                            softmax, scores, turn, base, factor, False, is_masked
                        )
                        s_phase ^= 1
            sinks = None
            if const_expr(self.kernel.has_sinks):
                sinks = [Elements(self.kernel.functions, mElements).sink(batch, q_head)]
                if const_expr(self.kernel.split_kv):
                    # Where a row has several parts, its sink enters as they are added up.
                    is_whole = self.kernel.part_of(fields)[1] == 1
                    sinks = [select(is_whole, sinks[0], Float32(-Float32.inf))]
            softmax.finish(row_scale, lse, sinks)
            if n_min < n_max:
                # Nothing but this wait says that the factor of the last tile has been read.
                pipeline_factor.acquire(slab, f_phase)
                fence_after_sync()
                self.leave_factor(pipeline_factor, turn, row_scale[0])
                f_phase ^= 1
            if self.kernel.is_row(thread) and token < q_length:
                # Rows at or beyond the query length are as good as empty.
                row_lse = lse[0] if token < queries else -Float32.inf
                if const_expr(self.kernel.split_kv):
                    split, splits = self.kernel.part_of(fields)
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
        steps: cutlass.Constexpr,
        n: Int32,
        kind: cutlass.Constexpr,
    ):
        """Loads and masks a row's scores of key tile n; returns ``OnlineSoftmax.raise_max``.

        Args:
          steps: of ``element_step``, of ``mask_step`` and of ``packed_step``.
          kind: whether it is the first tile, whether lists have it as one that ``mask_mod`` hides
            nothing of (may be traced), whether the other masks may hide some.
        """
        pipeline_s, slab, place, thread = turn
        modify, hide, read_bits = steps
        is_first, is_full, is_hiding = kind
        # On their way from memory while the product is.
        bits = read_bits(n)
        pipeline_s.wait(slab, phase)
        fence_after_sync()
        if const_expr(self.kernel.by_element):
            if const_expr(isinstance(is_full, bool) or not self.kernel.has_mask_mod):
                self.change_scores(place, thread, modify, n, (is_hiding, is_full is True))
            else:
                if is_full:
                    self.change_scores(place, thread, modify, n, (is_hiding, True))
                else:
                    self.change_scores(place, thread, modify, n, (is_hiding, False))
        load_row(
            place, cute.make_tensor(scores.iterator, cute.make_layout(cute.size(scores))), thread
        )
        cute.arch.fence_view_async_tmem_load()
        words = self.visible(bits, hide(n) if is_hiding else [])
        if const_expr(len(words) > 0):
            hide_outside(scores, words)
        may_be_empty = const_expr(len(words) > 0 or self.kernel.by_element)
        return softmax.raise_max(scores, 0, is_first, may_be_empty)

    def visible(self, bits: list, limits: list) -> list:
        """The words that a mask in bits and the others leave; no words, where there are neither."""
        if bits and limits:
            return [bit & limit for bit, limit in zip(bits, limits, strict=True)]
        return bits or limits

    def packed_step(self, mPacked: tuple, batch: Int32, head: Int32, token: Int32, q_length: Int32):
        """The words of a mask in bits for a row and a tile of keys: a function of its number."""
        if self.kernel.packed_mask is None:
            return lambda n: []
        packed = PackedMask(self.kernel.packed_mask, *mPacked)
        row = packed.row(batch, head, cutlass.min(token, Int32(q_length) - 1))
        words = self.kernel.config.tile_n // 32
        return lambda n: [packed.word(row, n * words + w) for w in range(words)]

    def mask_step(self, mBounds: tuple, fields: tuple, token: Int32, array_lengths: tuple):
        """Which keys of a tile a row sees, as words: a function of the tile's number."""
        batch, offset, keys = fields[2], fields[3], fields[5]
        mask, tile_n = self.kernel.mask, self.kernel.config.tile_n
        spans = range(0, tile_n, 32)
        q_length, _ = array_lengths
        row = cutlass.min(token, Int32(q_length) - 1)
        bounds = compare = None
        if self.kernel.row_bounds is not None:
            pairs = self.kernel.row_bounds.limits(mBounds)
            bounds = [(low[batch, row], high[batch, row]) for low, high in pairs]
            if self.kernel.compares_ids:
                compare = self.comparison(mBounds, batch, row, offset, array_lengths)

        def hide(n: Int32) -> list:
            start = n * tile_n
            limits = bounds if bounds is not None else mask.row_limits(offset + token, keys)
            words = limit_words(limits, start, tile_n)
            if compare is not None:
                seen, is_needed = compare(start), fields[self.kernel.own_field]
                pairs = zip(words, spans, strict=True)
                words = [word & compared_word(is_needed, seen, w) for word, w in pairs]
            return words

        return hide

    def comparison(
        self, mBounds: tuple, batch: Int32, row: Int32, offset: Int32, array_lengths: tuple
    ):
        """For keys from ``start`` on, a function of a column: whether its segment is the row's.

        Scattered segments with positions of their own are compared with the window here too.
        """
        q_ids, kv_ids, *positions = self.kernel.row_bounds.compared(mBounds)
        _, kv_length = array_lengths

        def compare(start: Int32):
            # Read here and not once: scattered segments are rare, registers are too.
            q_id, window = q_ids[batch, row], (None, None)
            if positions:
                window = self.kernel.mask.limits(positions[0][batch, row] + offset)

            def seen(column: Int32) -> Boolean:
                key = cutlass.min(start + column, Int32(kv_length) - 1)
                place = positions[1][batch, key] if positions else Int32(0)
                return within(place, *window, kv_ids[batch, key] == q_id)

            return seen

        return compare

    def element_step(self, mElements: tuple, entry: tuple, head: Int32, token: Int32):
        """What is done to some of a row's scores: a function of these and of the first one's key.

        Then it is told whether some of their keys may lie beyond the last one, and whether lists
        have the tile as one that ``mask_mod`` hides nothing of.
        """
        if not self.kernel.by_element:
            return None
        elements = Elements(self.kernel.functions, mElements).of_entry(*entry)
        queries = [elements.queries(head, token)]

        def modify(scores: cute.Tensor, first: Int32, may_be_beyond: bool, is_full: bool) -> None:
            column = elements.along_keys(queries, first, may_be_beyond, CHUNK)
            for c in range(cute.size(scores)):
                (known,) = column(c)
                scores[c] = elements.element(known, scores[c], self.kernel.scale, is_full=is_full)

        return modify

    @cute.jit
    def change_scores(
        self,
        place: cute.Pointer,
        thread: Int32,
        modify: cutlass.Constexpr,
        n: Int32,
        kind: cutlass.Constexpr,
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
            modify(chunk, n * tile_n + i * CHUNK, *kind)
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
        is_boundary: cutlass.Constexpr[bool],
    ):
        """Stores exp2 of a row's scores as P over S and hands them to the products."""
        pipeline_s, slab, place, thread = turn
        # The polynomial would let hidden scores, which are -inf, count as a little.
        may_be_hidden = is_boundary or self.kernel.by_element or self.kernel.packed_mask is not None
        every = 0 if const_expr(may_be_hidden) else self.kernel.config.polynomial_every
        sums = []
        for first, size in chunks(cute.size(scores)):
            part = cute.make_tensor(scores.iterator + first, cute.make_layout(size))
            softmax.exponentiate_pairs(part, base, sums, every)
            pairs = round_pairs(self.kernel.dtype, part)
            store_row(place + first // 2, pairs, thread)
        softmax.add_to_sum(sums, factor, is_first)
        cute.arch.fence_view_async_tmem_store()
        fence_before_sync()
        cute.arch.sync_warp()
        pipeline_s.release(slab, 4, "softmax")

    @cute.jit
    def leave_factor(self, pipeline_factor, turn, factor: Float32):
        """Hands the correction what this row of O must be multiplied by.

        S must be in registers; the next one comes once O is rescaled, so the factor was read.
        """
        _, slab, place, thread = turn
        register = cute.make_rmem_tensor(1, Float32)
        register[0] = factor
        store_row(place + self.kernel.factor_column, register, thread)
        cute.arch.fence_view_async_tmem_store()
        fence_before_sync()
        cute.arch.sync_warp()
        pipeline_factor.commit(slab)
