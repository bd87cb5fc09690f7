"""The backward's pass for dQ on Hopper, for head_dims at which adding it up costs more.

A block owns 64 query rows a warpgroup and goes over the key tiles that they see, as the forward
does; the scores are computed once more, and dQ stays in registers:

    S = Q K^T      P = exp2(scale log2(e) S - LSE2)
    dP = dO V^T    dS = P (dP - dPsum)                  dQ += dS K

Where scores are changed one by one, P is multiplied by their derivatives in the products at once.

The products of a warpgroup follow each other as dQ of the last tile, S and dP of this one: P is
computed while dP is, dS while the other warpgroup's products are.  A key tile is given back early,
before it is needed again as the S of a warpgroup that is ahead.  Blocks begin before the kernel for
dK and dV has ended, of which they need nothing, and end after it.

    edge    producer             consumer          stages     full     empty
    q, dO   TMA, producer warp   every warpgroup   1 each     1 + tx   used once
    k       TMA, producer warp   every warpgroup   k_stages   1 + tx   4 W
    v       TMA, producer warp   every warpgroup   v_stages   1 + tx   4 W

Counts as in backward.py.
"""

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from jax_flashcute.kernels.common.elements import Elements
from jax_flashcute.kernels.common.intervals import (
    IntervalMask,
    UnionMask,
    disjoint,
    is_full,
    tiles_of,
)
from jax_flashcute.kernels.common.lengths import entry_lengths
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.pipeline import TmaPipeline
from jax_flashcute.kernels.common.scheduler import TileOrder, section_size
from jax_flashcute.kernels.common.softmax import LARGEST_SCORE, LOG2_E, exp2
from jax_flashcute.kernels.common.tiles import (
    clear_rows,
    smem_layout,
    tile_tma,
    tma_partition,
    transposed,
)
from jax_flashcute.kernels.config.memory import round_up
from jax_flashcute.kernels.config.sm90 import DqConfig
from jax_flashcute.kernels.elements import ElementFunctions
from jax_flashcute.kernels.sm90.fragments import (
    ROWS_PER_THREAD,
    as_operand_a,
    column_step,
    convert_pairs,
    first_column,
    gemm,
    hide_outside,
    interval_words,
    lines_of_quads,
    rounded_row,
    row_in_slab,
    rows_and_columns,
    store_lines,
    tiled_mma,
)

# Barriers in shared memory: Q, dO, one for loads whose tail is cleared, the two pipelines.
TAIL = 2
FIRST_PIPELINE = 3

SMEM, RMEM = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM


class QueryGradientSm90:
    """Compiles to one kernel; its arguments are those of ``BackwardSm90``."""

    def __init__(
        self,
        config: DqConfig,
        dtype,
        head_dim: int,
        head_dim_v: int,
        group: int,
        scale: float,
        mask: IntervalMask | UnionMask,
        functions: ElementFunctions | None = None,
    ):
        self.config = config
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.group = group
        self.scale = scale
        self.mask = mask
        self.functions = functions
        self.by_element = functions is not None and functions.by_element
        changes_scores = functions is not None and functions.changes_scores
        self.score_scale, self.element_scale = (1.0, scale) if changes_scores else (scale, 1.0)
        self.smem_h = round_up(head_dim, 16)
        self.smem_hv = round_up(head_dim_v, 16)
        self.consumer_threads = 128 * config.warpgroups
        self.consumer_warps = 4 * config.warpgroups

    def launch(self, stream, operands, lengths, mLSE2, mdPsum, mdQ, mElements=()) -> None:
        """Launches it after a kernel that waits for what wrote LSE2 and dPsum.

        Args:
          operands: query, dO, key, value.
          lengths: offset, query lengths and key lengths; each may be None.
          mLSE2, mdPsum: (B, N, rows), padded beyond the query length.
          mElements: arrays of ``functions``.
        """
        cfg = self.config
        mQ, mdO, mK, mV = operands
        batch, q_length, kv_length, kv_heads = mQ.shape[0], mQ.shape[1], mK.shape[1], mK.shape[2]
        load = cpasync.CopyBulkTensorTileG2SOp()

        def tma(x, rows, width, smem_width):
            return tile_tma(load, x, width, self.dtype, (rows, smem_width))

        m_blocks = cute.ceil_div(q_length, cfg.tile_m)
        # As in the forward: rows of equal length go head by head, others longest first.
        section = Int32(1)
        if self.mask.is_staircase:
            kv_bytes_per_key = (self.head_dim + self.head_dim_v) * 2
            section = section_size(kv_length, kv_bytes_per_key, kv_heads, batch)
        self.kernel(
            *tma(mQ, 64, self.head_dim, self.smem_h),
            *tma(mdO, 64, self.head_dim_v, self.smem_hv),
            *tma(mK, cfg.tile_n, self.head_dim, self.smem_h),
            *tma(mV, cfg.tile_n, self.head_dim_v, self.smem_hv),
            *lengths,
            mLSE2,
            mdPsum,
            mdQ,
            mElements,
            m_blocks,
            section,
            q_length,
            kv_length,
            kv_heads,
            batch,
        ).launch(
            grid=[m_blocks * kv_heads * batch * self.group, 1, 1],
            block=[self.consumer_threads + 128, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    def shared_storage(self):
        cfg = self.config

        def aligned(elements):
            return cute.struct.Align[cute.struct.MemRange[self.dtype, elements], 1024]

        @cute.struct
        class SharedStorage:
            barriers: cute.struct.MemRange[
                Int64, FIRST_PIPELINE + 2 * (cfg.k_stages + cfg.v_stages)
            ]
            sQ: aligned(cfg.tile_m * self.smem_h)
            sdO: aligned(cfg.tile_m * self.smem_hv)
            sK: aligned(cfg.k_stages * cfg.tile_n * self.smem_h)
            sV: aligned(cfg.v_stages * cfg.tile_n * self.smem_hv)

        return SharedStorage

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        gQ: cute.Tensor,
        tma_do: cute.CopyAtom,
        gdO: cute.Tensor,
        tma_k: cute.CopyAtom,
        gK: cute.Tensor,
        tma_v: cute.CopyAtom,
        gV: cute.Tensor,
        mQOffset: cute.Tensor | None,
        mQLengths: cute.Tensor | None,
        mKVLengths: cute.Tensor | None,
        mLSE2: cute.Tensor,
        mdPsum: cute.Tensor,
        mdQ: cute.Tensor,
        mElements: tuple,
        m_blocks: Int32,
        section: Int32,
        q_length: Int32,
        kv_length: Int32,
        kv_heads: Int32,
        batch_size: Int32,
    ):
        cfg = self.config
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.shared_storage())
        barriers = storage.barriers.data_ptr()
        pipeline_k = TmaPipeline(
            "k",
            barriers + FIRST_PIPELINE,
            cfg.k_stages,
            cfg.tile_n * self.smem_h * 2,
            self.consumer_warps,
        )
        pipeline_v = TmaPipeline(
            "v",
            barriers + FIRST_PIPELINE + 2 * cfg.k_stages,
            cfg.v_stages,
            cfg.tile_n * self.smem_hv * 2,
            self.consumer_warps,
        )
        if warp_index == 0:
            for atom in (tma_q, tma_do, tma_k, tma_v):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                pipeline_k.init()
                pipeline_v.init()
                for i in range(FIRST_PIPELINE):
                    cute.arch.mbarrier_init(barriers + i, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        def staged(member, rows, width, stages):
            layout = smem_layout(self.dtype, rows, width, stages)
            return member.get_tensor(layout.outer, swizzle=layout.inner)

        # A slab of Q and of dO for each warpgroup.
        sQ = staged(storage.sQ, 64, self.smem_h, cfg.warpgroups)
        sdO = staged(storage.sdO, 64, self.smem_hv, cfg.warpgroups)
        sK = staged(storage.sK, cfg.tile_n, self.smem_h, cfg.k_stages)
        sV = staged(storage.sV, cfg.tile_n, self.smem_hv, cfg.v_stages)

        order = TileOrder(m_blocks, kv_heads, batch_size, self.group, section)
        m_block, head, kv_head, batch = order.coordinates(cute.arch.block_idx()[0])
        offset, queries, keys = entry_lengths(
            mQOffset, mQLengths, mKVLengths, q_length, kv_length, batch
        )
        first = m_block * cfg.tile_m
        last = cutlass.min(first + cfg.tile_m, queries) - 1
        bounds = (first + offset, last + offset, keys, cfg.tile_n)
        if const_expr(isinstance(self.mask, UnionMask)):
            ranges = self.mask.block_ranges(*bounds)
        else:
            ranges = disjoint([self.mask.block_range(*bounds)])
        visits, nth = tiles_of(ranges)
        visits = visits if first < queries else Int32(0)
        tiles = (visits, nth, ranges)
        place = (m_block, head, kv_head, batch)
        if warp_index < 4:
            if const_expr(cfg.warpgroups > 1):
                cute.arch.setmaxregister_decrease(cfg.producer_registers)
            if warp_index == 0 and visits > 0:
                self.produce(
                    ((tma_q, gQ, sQ, self.smem_h), (tma_do, gdO, sdO, self.smem_hv)),
                    ((tma_k, gK, sK, self.smem_h), (tma_v, gV, sV, self.smem_hv)),
                    (pipeline_k, pipeline_v, barriers),
                    place,
                    tiles,
                    keys,
                    mKVLengths is not None,
                )
        else:
            if const_expr(cfg.warpgroups > 1):
                cute.arch.setmaxregister_increase(cfg.consumer_registers)
            self.consume(
                (sQ, sdO, sK, sV),
                (mLSE2, mdPsum, mdQ, mElements),
                (pipeline_k, pipeline_v, barriers),
                place,
                tiles,
                (offset, queries, keys, q_length, kv_length),
            )
        # Whatever comes after this kernel may use what the one before it writes.
        cute.arch.griddepcontrol_wait()
        pipeline_k.check_arrivals()
        pipeline_v.check_arrivals()

    @cute.jit
    def produce(
        self,
        rows,
        keys_and_values,
        pipelines,
        place,
        tiles,
        keys: Int32,
        has_kv_lengths: cutlass.Constexpr[bool],
    ):
        """The producer warp: Q and dO once, then K and V of every tile."""
        cfg = self.config
        m_block, head, kv_head, batch = place
        visits, nth, _ = tiles
        pipeline_k, pipeline_v, barriers = pipelines
        key_pipelines = (pipeline_k, pipeline_v)
        k_stage, k_phase, v_stage, v_phase, tail_phase = (Int32(0) for _ in range(5))
        for i in cutlass.range(visits, unroll=1):
            n = nth(visits - 1 - i)
            states = ((k_stage, k_phase), (v_stage, v_phase))
            for operand in cutlass.range_constexpr(2):
                if i == 0:
                    self.load_rows(rows[operand], barriers + operand, m_block, head, batch)
                atom, gX, sX, width = keys_and_values[operand]
                pipeline, (stage, phase) = key_pipelines[operand], states[operand]
                target, source = tma_partition(
                    atom,
                    sX,
                    cute.local_tile(gX[None, None, kv_head, batch], (cfg.tile_n, width), (None, 0)),
                )
                pipeline.acquire(stage, phase)
                is_tail = Boolean(False)
                if const_expr(has_kv_lengths):
                    is_tail = (n + 1) * cfg.tile_n > keys
                if is_tail:
                    # What lies beyond the length may be NaN, and 0 * NaN is NaN: clear it.
                    tail = barriers + TAIL
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(tail, pipeline.tx_bytes)
                    cute.copy(atom, source[None, n], target[None, stage], tma_bar_ptr=tail)
                    cute.arch.mbarrier_wait(tail, tail_phase)
                    clear_rows(sX, width, stage, keys - n * cfg.tile_n)
                    cute.arch.fence_view_async_shared()
                    cute.arch.sync_warp()
                    pipeline.commit(stage)
                    tail_phase ^= 1
                else:
                    pipeline.expect(stage)
                    cute.copy(
                        atom,
                        source[None, n],
                        target[None, stage],
                        tma_bar_ptr=pipeline.full + stage,
                    )
            k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
            v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)

    def load_rows(self, copy, barrier, m_block: Int32, head: Int32, batch: Int32) -> None:
        """Starts the copies of the slabs of Q or dO.

        Rows beyond the length may be NaN; they make nothing but their own dQ, which is not used.
        """
        atom, gX, sX, width = copy
        warpgroups = self.config.warpgroups
        target, source = tma_partition(
            atom, sX, cute.local_tile(gX[None, None, head, batch], (64, width), (None, 0))
        )
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, warpgroups * 64 * width * 2)
        for w in range(warpgroups):
            slab = m_block * warpgroups + w
            cute.copy(atom, source[None, slab], target[None, w], tma_bar_ptr=barrier)

    @cute.jit
    def consume(self, smem, arrays, pipelines, place, tiles, lengths):
        """A consumer warpgroup: dQ of its slab."""
        cfg = self.config
        sQ, sdO, sK, sV = smem
        mLSE2, mdPsum, mdQ, mElements = arrays
        pipeline_k, pipeline_v, barriers = pipelines
        m_block, head, _, batch = place
        visits, nth, ranges = tiles
        offset, queries, keys, q_length, kv_length = lengths
        warps = self.consumer_warps
        thread = cute.arch.thread_idx()[0] % 128
        slab = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128) - 1
        first_token = (m_block * cfg.warpgroups + slab) * 64

        mma_s = tiled_mma(self.dtype, cfg.tile_n, OperandMajorMode.K, SMEM)
        mma_dq = tiled_mma(self.dtype, self.smem_h, OperandMajorMode.MN, RMEM)
        part = mma_s.get_slice(0)
        tSrQ = mma_s.make_fragment_A(part.partition_A(sQ))[None, None, None, slab]
        tSrK = mma_s.make_fragment_B(part.partition_B(sK))
        tPrO = mma_s.make_fragment_A(part.partition_A(sdO))[None, None, None, slab]
        tPrV = mma_s.make_fragment_B(part.partition_B(sV))
        tQrK = mma_dq.make_fragment_B(mma_dq.get_slice(0).partition_B(transposed(sK)))
        acc_S = cute.make_rmem_tensor(mma_s.partition_shape_C((64, cfg.tile_n)), Float32)
        acc_P = cute.make_rmem_tensor(mma_s.partition_shape_C((64, cfg.tile_n)), Float32)
        acc_dQ = cute.make_rmem_tensor(mma_dq.partition_shape_C((64, self.smem_h)), Float32)
        acc_dQ.fill(0.0)
        rdS = cute.make_rmem_tensor(cute.make_layout(cute.size(acc_S)), self.dtype)
        tQrS = as_operand_a(rdS)
        scores, dscores = rows_and_columns(acc_S), rows_and_columns(acc_P)
        mask_tile = partial(self.mask_tile, scores, thread, (first_token + offset, keys), ranges)

        if visits > 0:
            lse2, dpsum = self.statistics(mLSE2, mdPsum, (batch, head), first_token, q_length)
            who = (thread, head, batch)
            places = (first_token, offset, (q_length, kv_length))
            weigh = self.weigh_step(mElements, scores, lse2, mask_tile, who, places)
            k_stage, k_phase, v_stage, v_phase = (Int32(0) for _ in range(4))
            cute.arch.mbarrier_wait(barriers, 0)
            pipeline_k.wait(k_stage, k_phase)
            gemm(mma_s, acc_S, tSrQ, tSrK[None, None, None, k_stage], False)
            cute.arch.mbarrier_wait(barriers + 1, 0)
            pipeline_v.wait(v_stage, v_phase)
            gemm(mma_s, acc_P, tPrO, tPrV[None, None, None, v_stage], False)
            warpgroup.wait_group(1)
            weigh(nth(visits - 1))
            warpgroup.wait_group(0)
            pipeline_v.release(v_stage, warps)
            v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)
            self.score_gradients(scores, dscores, dpsum)
            convert_pairs(acc_P, rdS)
            for i in cutlass.range(visits - 1, unroll=1):
                last_stage = k_stage
                k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
                gemm(mma_dq, acc_dQ, tQrS, tQrK[None, None, None, last_stage], True)
                pipeline_k.wait(k_stage, k_phase)
                gemm(mma_s, acc_S, tSrQ, tSrK[None, None, None, k_stage], False)
                pipeline_v.wait(v_stage, v_phase)
                gemm(mma_s, acc_P, tPrO, tPrV[None, None, None, v_stage], False)
                warpgroup.wait_group(2)
                pipeline_k.release(last_stage, warps)
                warpgroup.wait_group(1)
                weigh(nth(visits - 2 - i))
                warpgroup.wait_group(0)
                pipeline_v.release(v_stage, warps)
                v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)
                self.score_gradients(scores, dscores, dpsum)
                convert_pairs(acc_P, rdS)
            gemm(mma_dq, acc_dQ, tQrS, tQrK[None, None, None, k_stage], True)
            warpgroup.wait_group(0)
        self.store(rows_and_columns(acc_dQ), mdQ, (batch, head), first_token, (queries, q_length))

    def statistics(self, mLSE2, mdPsum, entry, first_token: Int32, q_length: Int32):
        """LSE2 and dPsum of a thread's rows; beyond the array as of rows without a key."""
        batch, head = entry
        thread = cute.arch.thread_idx()[0] % 128
        lse2, dpsum = [], []
        for r in range(ROWS_PER_THREAD):
            token = first_token + row_in_slab(thread, r)
            inside, token = token < q_length, cutlass.min(token, Int32(q_length) - 1)
            lse2.append(select(inside, mLSE2[batch, head, token], Float32(Float32.inf)))
            dpsum.append(mdPsum[batch, head, token])
        return lse2, dpsum

    @cute.jit
    def mask_tile(self, scores: cute.Tensor, thread: Int32, rows, ranges: list, n: Int32):
        """Hides keys of tile n outside each row's intervals, where there may be such.

        ``rows``: the position of the slab's first row, and how many keys there are.
        """
        position, keys = rows
        tile_n = self.config.tile_n
        if not is_full(ranges, n):
            for r in cutlass.range_constexpr(ROWS_PER_THREAD):
                limits = self.mask.row_limits(position + row_in_slab(thread, r), keys)
                hide_outside(scores, r, interval_words(limits, n * tile_n, thread, tile_n))

    def weigh_step(self, mElements: tuple, scores: cute.Tensor, lse2, mask_tile, who, places):
        """What makes P of the products of tile n, times derivatives, as a function of n.

        Args:
          who: thread, head and batch entry.
          places: the slab's first row, the first row's position, lengths of the arrays.
        """
        functions = self.functions
        if not self.by_element:

            def weigh(n: Int32) -> None:
                mask_tile(n)
                self.probabilities(scores, lse2)

            return weigh
        thread, head, batch = who
        first_token, *of_entry = places
        differentiates = not functions.keeps_gradients
        entries = [
            Elements(functions, mElements, differentiates=d).of_entry(batch, *of_entry)
            for d in (False, True)[: 1 + differentiates]
        ]
        tokens = [first_token + row_in_slab(thread, r) for r in range(ROWS_PER_THREAD)]
        rows = [[each.queries(head, token) for token in tokens] for each in entries]

        def weigh_changed(n: Int32) -> None:
            if differentiates:
                mask_tile(n)
            first = n * self.config.tile_n + first_column(thread)
            columns = [
                each.along_keys(q, first, True) for each, q in zip(entries, rows, strict=True)
            ]
            for c in range(cute.size(scores, mode=[1])):
                known = [column(column_step(c)) for column in columns]
                for r in range(ROWS_PER_THREAD):
                    product = scores[r, c]
                    score = entries[0].element(known[0][r], product, self.element_scale)
                    if differentiates:
                        weight = self.probability(score, lse2[r])
                        scale = self.element_scale
                        weight, _ = entries[1].gradient(known[1][r], product, weight, scale)
                        # Of a product that is hidden the score need not be.
                        is_hidden = product == -Float32.inf
                        score = select(is_hidden, Float32(0.0), weight)
                    scores[r, c] = score
            if not differentiates:
                mask_tile(n)
                self.probabilities(scores, lse2)

        return weigh_changed

    def probability(self, score: Float32, lse2: Float32) -> Float32:
        if self.functions is not None and self.functions.may_be_infinite:
            # Of rows beyond the last, whose LSE2 is infinite: infinity less it is NaN.
            score = cute.arch.fmin(score, Float32(LARGEST_SCORE))
        return exp2(score * (self.score_scale * LOG2_E) - lse2)

    @cute.jit
    def probabilities(self, scores: cute.Tensor, lse2):
        """exp2(scale log2(e) S - LSE2), in place."""
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            for r in cutlass.range_constexpr(ROWS_PER_THREAD):
                scores[r, c] = self.probability(scores[r, c], lse2[r])

    @cute.jit
    def score_gradients(self, scores: cute.Tensor, dscores: cute.Tensor, dpsum):
        """P (dP - dPsum), in place of dP."""
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            for r in cutlass.range_constexpr(ROWS_PER_THREAD):
                dscores[r, c] = scores[r, c] * (dscores[r, c] - dpsum[r])

    @cute.jit
    def store(self, rows: cute.Tensor, mdQ: cute.Tensor, entry, first_token: Int32, lengths):
        """Scales and rounds a slab's dQ and stores it from registers; 0 beyond the length."""
        batch, head = entry
        queries, q_length = lengths
        thread = cute.arch.thread_idx()[0] % 128
        for r in cutlass.range_constexpr(ROWS_PER_THREAD):
            token = first_token + row_in_slab(thread, r)
            words = rounded_row(rows, r, Float32(self.scale), self.dtype)
            words = [select(token < queries, word, Uint32(0)) for word in words]
            lines = lines_of_quads(words, thread)
            if token < q_length:
                start = cute.crd2idx((batch, token, head, 0), mdQ.layout)
                store_lines(lines, mdQ.iterator + start, self.head_dim, thread)
