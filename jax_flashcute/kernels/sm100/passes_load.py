"""The load warp of the Blackwell backward in passes: a block's rows, then tiles by halves."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from jax_flashcute.kernels.sm100.backward_load import TAIL, LoadWarp
from jax_flashcute.kernels.sm100.tensor_memory import ROWS


class PassLoadWarp(LoadWarp):
    """``kernel`` is a ``GradientPassSm100``."""

    @cute.jit
    def load_tiles(
        self,
        own_copies,
        tile_copies,
        statistics,
        pipelines,
        own_barriers: cute.Pointer,
        place,
        tiles,
        lengths,
        has_lengths: cutlass.Constexpr,
    ):
        """Each half of every tile, of every head of the group where rows are keys."""
        kernel = self.kernel
        of_keys, half_rows = kernel.of_keys, kernel.config.half
        block, head, kv_head, batch = place
        visits, m_blocks = tiles
        _, queries, keys = lengths
        own_length, other_length = (keys, queries) if of_keys else (queries, keys)
        has_q_lengths, has_kv_lengths = has_lengths
        own_may_end = has_kv_lengths if of_keys else has_q_lengths
        others_may_end = has_q_lengths if of_keys else has_kv_lengths
        tail_bar = own_barriers + TAIL
        tail_phase = Int32(0)
        own_here = own_length - block * ROWS
        has_own_tail = Boolean(False)
        if const_expr(own_may_end):
            has_own_tail = own_here < ROWS
        own_head = kv_head if const_expr(of_keys) else head
        for i in cutlass.range_constexpr(len(own_copies)):
            tma, source, smem = own_copies[i]
            tXsX, tXgX = self.partition(tma, source, smem, own_head, batch)
            tail_phase = self.load(
                (tma, tXgX[None, block], tXsX, smem),
                None,
                (own_barriers + i, tail_bar),
                Int32(0),
                (has_own_tail, tail_phase, own_here),
            )

        if const_expr(kernel.is_first):
            # The statistics come from the kernel before it.
            cute.arch.griddepcontrol_wait()
        states = ((Int32(0), Int32(0)), (Int32(0), Int32(0)), tail_phase)
        for g in cutlass.range(kernel.group, unroll=1):
            query_head = kv_head * kernel.group + g if const_expr(of_keys) else head
            other_head = query_head if const_expr(of_keys) else kv_head
            parts = [self.partition(*copy, other_head, batch) for copy in tile_copies]
            rows = [
                (self.rows(x, m_blocks, query_head, batch, half_rows), kept) if with_rows else None
                for (x, kept), with_rows in zip(statistics, kernel.has_statistics, strict=True)
            ]
            copies = [
                (copy[0], *part, copy[2], row)
                for copy, part, row in zip(tile_copies, parts, rows, strict=True)
            ]
            count, tile_of, _ = visits(g)
            for i in cutlass.range(count, unroll=1):
                m = tile_of(i)
                for h in cutlass.range_constexpr(2):
                    # A half may lie beyond the length altogether.
                    beyond = (others_may_end, other_length - (2 * m + h) * half_rows)
                    states = self.load_half(copies, pipelines, tail_bar, 2 * m + h, states, beyond)

    @cute.jit
    def load_half(self, copies, pipelines, tail_bar: cute.Pointer, m: Int32, states, rows_here):
        """Half m of what tiles bring; returns the next stages and phases."""
        may_end, rows_here = rows_here
        first_state, second_state, tail_phase = states
        has_tail = Boolean(False)
        if const_expr(may_end):
            has_tail = rows_here < self.kernel.config.half
            rows_here = cutlass.max(rows_here, Int32(0))
        next_states = []
        for copy, pipeline, (stage, phase) in zip(
            copies, pipelines[:2], (first_state, second_state), strict=True
        ):
            tma, target, source, smem, rows = copy
            pipeline.acquire(stage, phase)
            row_copy = None if rows is None else (rows[0][None, m], rows[1][None, stage])
            tail_phase = self.load(
                (tma, source[None, m], target, smem),
                row_copy,
                (pipeline.full + stage, tail_bar),
                stage,
                (has_tail, tail_phase, rows_here),
            )
            next_states.append(pipeline.advance(stage, phase))
        return *next_states, tail_phase
