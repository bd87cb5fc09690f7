"""The backward kernel on Hopper: dQ, dK and dV in one pass over the keys.

A block owns ``tile_n`` keys of one key/value head and goes over the query tiles that see them, of
every query head of the group:

    S^T = K Q^T      P^T = exp2(scale log2(e) S^T - LSE2)      dV += P^T dO
    dP^T = V dO^T    dS^T = P^T (dP^T - dPsum)                 dK += dS^T Q      dQ += dS K

The scores are computed transposed, a warpgroup owning 64 keys, so that P^T and dS^T are in
registers just as the products dV and dK take them; only dS goes through shared memory, for dQ,
which needs all keys of the block.  dQ is summed in float32 in global memory by bulk reductions,
tile by tile in the order of the registers, and rounded to 16 bits later (query_sums.py), unless it
has a pass of its own (backward_dq.py); dK is multiplied by the scale at the end.  Sums of floats
depend on their order: a deterministic kernel counts the blocks that have added to a tile, and a
block waits for those of the keys before its own, which were launched before it.  How many those
are follows from the mask, or stands in an array where the tiles that are visited do.

Blocks with lists of their own meet the same queries at different times, and what a group's heads
need of L2 (Q, dO and dQ) is more than it holds.  A block may therefore be several, each of some of
the heads (``BwdConfig.resident_bytes``): each leaves dK and dV in float32 in global memory for the
next, which was launched later, so that blocks that run together work on the same heads.

    edge       producer             consumer               stages     full       empty
    k, v       TMA, producer warp   every warpgroup        1 each     1 + tx     used once
    q, LSE2    TMA, producer warp   every warpgroup        q_stages   1 + tx     4 W
    dO, dPsum  TMA, producer warp   every warpgroup        do_stages  1 + tx     4 W
    dS         every warpgroup      every warpgroup        ds_stages  named barrier 1, 128 W
    dQ full    warpgroup w          dQ warp (bulk reduce)  1          named barrier 2 + w, 160
    dQ empty   dQ warp              warpgroup w            1          named barrier 5 + w, 160

Counts are arrivals, threads for named barriers; "+ tx" means that the barrier also waits for the
copies' bytes; W is the number of consumer warpgroups, of four warps each.
"""

from functools import partial
from types import SimpleNamespace

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from jax_flashcute.bounds import RowBounds
from jax_flashcute.kernels.common.elements import Elements
from jax_flashcute.kernels.common.fixed_point import sums_in_memory
from jax_flashcute.kernels.common.intervals import (
    IntervalMask,
    UnionMask,
    is_full,
    within,
)
from jax_flashcute.kernels.common.lengths import entry_lengths
from jax_flashcute.kernels.common.lists import row_of
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.packed import PackedMask
from jax_flashcute.kernels.common.pipeline import TmaPipeline
from jax_flashcute.kernels.common.scheduler import section_size
from jax_flashcute.kernels.common.softmax import LARGEST_SCORE, LOG2_E, exp2
from jax_flashcute.kernels.common.stretches import Stretch
from jax_flashcute.kernels.common.tiles import (
    clear_rows,
    smem_layout,
    tile_tma,
    tma_partition,
    transposed,
)
from jax_flashcute.kernels.common.turns import (
    bulk_add,
    end_turn,
    pass_turn,
    section_in_turns,
    take_turn,
    turn_of,
)
from jax_flashcute.kernels.common.visits import QueryTiles
from jax_flashcute.kernels.config.memory import SMEM_BYTES, round_up
from jax_flashcute.kernels.config.sm90 import BwdConfig
from jax_flashcute.kernels.elements import ElementFunctions, measures
from jax_flashcute.kernels.extra.postprocess import Postprocess
from jax_flashcute.kernels.extra.preprocess import Preprocess
from jax_flashcute.kernels.sm90.backward_dq import QueryGradientSm90
from jax_flashcute.kernels.sm90.backward_roles import RoleConsumers
from jax_flashcute.kernels.sm90.distance_terms import DistanceTerms, adds_by_distance, distances
from jax_flashcute.kernels.sm90.fragments import (
    ROWS_PER_THREAD,
    as_operand_a,
    column_step,
    compared_words,
    convert_pairs,
    first_column,
    gemm,
    hide_outside,
    interval_words,
    row_in_slab,
    rows_and_columns,
    tiled_mma,
)
from jax_flashcute.kernels.sm90.gradient_sums import Pullback
from jax_flashcute.kernels.sm90.query_sums import QuerySums

CONSUMER_BARRIER = 1
DQ_FULL_BARRIER = 2
DQ_EMPTY_BARRIER = 5
LEAST_STEPS = 16
"""Query tiles that a part of a block visits at least, on average: to begin, and to carry dK and dV
over, takes about as long as four of them."""

# Barriers in shared memory: K, V, one for loads whose tail is cleared, the two pipelines.
TAIL = 2
FIRST_PIPELINE = 3


class Products(SimpleNamespace):
    """What a consumer warpgroup holds: products, their operands and accumulators, its place."""


class BackwardSm90(QueryTiles):
    """Compiles to one launcher (three kernels) for all batch sizes, lengths and head counts."""

    def __init__(
        self,
        config: BwdConfig,
        dtype,
        head_dim: int,
        head_dim_v: int,
        group: int,
        scale: float,
        mask: IntervalMask | UnionMask,
        functions: ElementFunctions | None = None,
        row_bounds: RowBounds | None = None,
        has_lists: bool = False,
        packed_mask: str | None = None,
    ):
        """``group``: query heads a key/value head serves; ``row_bounds``: the rows that see a key
        stand in arrays, ``mask`` among what they hold; ``has_lists``: a block visits the query
        tiles that lists name; ``packed_mask``: the axes along which a mask in bits varies, of
        "bnt"."""
        self.config = config
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.group = group
        self.scale = scale
        self.mask = mask
        self.row_bounds = row_bounds
        self.compares = row_bounds is not None and (
            row_bounds.compares_ids or row_bounds.compares_bounds
        )
        self.has_lists = has_lists
        self.packed_mask = packed_mask
        self.union = mask if isinstance(mask, UnionMask) else None
        # Of each consumer warp, by distance.
        self.numbers = 4 * config.warpgroups * distances(config.tile_m)
        self.adds_by_distance = (
            adds_by_distance(functions)
            and isinstance(mask, IntervalMask)
            and row_bounds is None
            and packed_mask is None
            and not has_lists
            and not config.by_role
            and self._has_room(self.numbers)
        )
        self.has_low = row_bounds is not None
        if isinstance(mask, IntervalMask):
            self.has_low |= mask.low is not None
        self.functions = functions
        self.by_element = functions is not None and functions.by_element
        self.has_pullback = self.by_element and not (
            functions.keeps_gradients and not functions.summed_ranks
        )
        # The heads of a group add to one bias: all of them visit a tile before any the next.
        self.heads_of_tile = group if self._heads_share_bias() else 1
        # Scores that are changed one by one are scaled there.
        changes_scores = functions is not None and functions.changes_scores
        self.may_be_infinite = functions is not None and functions.may_be_infinite
        # A first run of the kernel may have to find how large addends are: it leaves no gradients.
        self.measures = measures(functions, config.deterministic)
        self.score_scale, self.element_scale = (1.0, scale) if changes_scores else (scale, 1.0)
        self.smem_h = config.padded_head_dim(head_dim)
        self.smem_hv = round_up(head_dim_v, 16)
        self.consumer_threads = 128 * config.warpgroups
        self.consumer_warps = 4 * config.warpgroups
        self.query_sums = QuerySums(config, head_dim, group)

    def _heads_share_bias(self) -> bool:
        """Whether the heads of a group add to one gradient of a bias, and there is room for it."""
        functions, cfg = self.functions, self.config
        if self.group == 1 or functions is None or functions.bias is None:
            return False
        return (
            functions.summed_ranks == [4]
            and "bias" not in functions.constants
            and {"t", "s"} <= set(functions.bias.full) <= {"b", "t", "s"}
            and functions.keeps_gradients
            and not self.has_lists
            and not (cfg.by_role or cfg.resident_bytes)
            and self._has_room(cfg.tile_m * cfg.tile_n)
        )

    def _has_room(self, numbers: int) -> bool:
        """Whether so many float32 fit in shared memory beside operands and barriers."""
        smem = self.config.smem_bytes(self.head_dim, self.head_dim_v)
        return smem + 4 * numbers + 2048 <= SMEM_BYTES

    # ---- host side -------------------------------------------------------------------------

    @cute.jit
    def __call__(
        self,
        stream: cuda.CUstream,
        mQ: cute.Tensor,  # (B, T, N, H)
        mK: cute.Tensor,  # (B, S, K, H)
        mV: cute.Tensor,  # (B, S, K, Hv)
        mO: cute.Tensor,  # (B, T, N, Hv)
        mLSE: cute.Tensor,  # (B, T, N) float32
        mdO: cute.Tensor,  # (B, T, N, Hv)
        mdLSE: cute.Tensor | None,  # (B, T, N) float32
        mQOffset: cute.Tensor | None,  # (B,) int32
        mQLengths: cute.Tensor | None,  # (B,) int32
        mKVLengths: cute.Tensor | None,  # (B,) int32
        mdQ: cute.Tensor,  # (B, T, N, H)
        mdK: cute.Tensor,  # (B, S, K, H)
        mdV: cute.Tensor,  # (B, S, K, Hv)
        mdQAccum: cute.Tensor | None,  # (B, N, m_blocks * tile_m * smem_h) float32, scratch
        mLSE2: cute.Tensor,  # (B, N, m_blocks * tile_m) float32, scratch
        mdPsum: cute.Tensor,  # (B, N, m_blocks * tile_m) float32, scratch
        mCounts: cute.Tensor | None,  # of ``QuerySums``, scratch
        mTurns: cute.Tensor | None = None,  # (B, N, m_blocks * dq_warps) int32, scratch
        mCarried: tuple = (),  # scratch of blocks in parts: how many are done, dK and dV
        mElements: tuple = (),  # arrays of ``functions``
        mBounds: tuple = (),  # arrays of ``bounds.query_bound_arrays``
        mLists: tuple = (),  # arrays of ``BlockMask.kernel_lists``, transposed
        mRanks: tuple = (),  # (1|B, 1|N, n_blocks, m_blocks) int32: of ``visits_before``
        mGradients: tuple = (),  # of ``functions.summed_ranks``, as ``launchers`` has them
        mPacked: tuple = (),  # a mask in bits, (1|B, 1|N, 1|T, words) uint32
        mExponents: tuple = (),  # (sums,) int32, of ``fixed_point.exponents``
    ):
        cfg = self.config
        batch, q_length, heads = mQ.shape[0], mQ.shape[1], mQ.shape[2]
        kv_length, kv_heads = mK.shape[1], mK.shape[2]
        m_blocks = cute.ceil_div(q_length, cfg.tile_m)
        n_blocks = cute.ceil_div(kv_length, cfg.tile_n)

        # Queries, dO and a float32 dQ of the heads in flight should stay in L2.
        dq_bytes = 4 * self.head_dim if cfg.dq_pass is None else 0
        bytes_per_query = self.group * (2 * (self.head_dim + self.head_dim_v) + dq_bytes)
        section = section_size(q_length, bytes_per_query, kv_heads, batch)
        if const_expr(cfg.deterministic):
            section = section_in_turns(section, kv_heads, batch)
        heads_at_once, parts = None, Int32(1)
        if const_expr(cfg.resident_bytes > 0):
            of_head = Int64(q_length) * (bytes_per_query // self.group)
            fitting = Int64(cfg.resident_bytes) // cutlass.max(of_head, Int64(1))
            heads_at_once = Int32(cutlass.max(cutlass.min(fitting, Int64(self.group)), Int64(1)))
            parts = (self.group + heads_at_once - 1) // heads_at_once
            section = section if parts == 1 else Int32(1)

        ahead, cleared_heads, counters = None, None, ()
        if const_expr(mCounts is not None):
            kv_entries, counters = Int32(kv_heads * batch), (mCounts,)
            ahead = self.query_sums.distance(section, kv_entries, m_blocks, n_blocks)
            cleared_heads = ahead * self.group
        dq_warps = cfg.dq_warps(self.head_dim)
        Preprocess(
            self.dtype, self.head_dim_v, cfg.tile_m, self.smem_h, dq_warps, self.functions
        ).launch(
            stream,
            m_blocks,
            mO,
            mdO,
            mLSE,
            mdLSE,
            mQLengths,
            (mLSE2, mdPsum, mdQAccum, mTurns),
            (*mGradients, *mCarried[:1], *counters),
            cleared_heads,
        )

        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()

        def tma(op, x, rows, width, smem_width):
            return tile_tma(op, x, width, self.dtype, (rows, smem_width))

        tma_q = tma(load, mQ, cfg.tile_m, self.head_dim, self.smem_h)
        tma_do = tma(load, mdO, cfg.tile_m, self.head_dim_v, self.smem_hv)
        tma_k = tma(load, mK, cfg.tile_n, self.head_dim, self.smem_h)
        tma_v = tma(load, mV, cfg.tile_n, self.head_dim_v, self.smem_hv)
        tma_dk = tma(store, mdK, cfg.tile_n, self.head_dim, self.smem_h)
        tma_dv = tma(store, mdV, cfg.tile_n, self.head_dim_v, self.smem_hv)

        arguments = (
            *tma_q,
            *tma_do,
            *tma_k,
            *tma_v,
            *tma_dk,
            *tma_dv,
            mQOffset,
            mQLengths,
            mKVLengths,
            mLSE2,
            mdPsum,
            mdQAccum,
            mCounts,
            mTurns,
            mCarried,
            mElements,
            mBounds,
            mLists,
            mRanks,
            mGradients,
            mPacked,
            mExponents,
            m_blocks,
            n_blocks,
            section,
            ahead,
            heads_at_once,
            q_length,
            kv_length,
            heads,
            kv_heads,
            batch,
        )
        launch = {
            "grid": [n_blocks * kv_heads * batch * parts, 1, 1],
            "block": [self.consumer_threads + 128, 1, 1],
            "stream": stream,
            "min_blocks_per_mp": 1,
            "use_pdl": True,
        }
        if const_expr(self.measures):
            self.measuring().kernel(*arguments).launch(**launch)
        self.kernel(*arguments).launch(**launch)
        if const_expr(cfg.dq_pass is None):
            Postprocess(cfg, self.dtype, self.head_dim, self.scale, self.query_sums).launch(
                stream, m_blocks, mdQAccum, mdQ, (mCounts, n_blocks * parts)
            )
        else:
            QueryGradientSm90(
                cfg.dq_pass,
                self.dtype,
                self.head_dim,
                self.head_dim_v,
                self.group,
                self.scale,
                self.mask,
                self.functions,
            ).launch(
                stream,
                (mQ, mdO, mK, mV),
                (mQOffset, mQLengths, mKVLengths),
                mLSE2,
                mdPsum,
                mdQ,
                mElements,
            )

    def shared_storage(self):
        cfg = self.config

        def aligned(dtype, elements):
            return cute.struct.Align[cute.struct.MemRange[dtype, elements], 1024]

        @cute.struct
        class SharedStorage:
            barriers: cute.struct.MemRange[Int64, 3 + 2 * (cfg.q_stages + cfg.do_stages)]
            sLSE: cute.struct.Align[cute.struct.MemRange[Float32, cfg.q_stages * cfg.tile_m], 128]
            sdPsum: cute.struct.Align[
                cute.struct.MemRange[Float32, cfg.do_stages * cfg.tile_m], 128
            ]
            sK: aligned(self.dtype, cfg.tile_n * self.smem_h)
            sV: aligned(self.dtype, cfg.tile_n * self.smem_hv)
            sQ: aligned(self.dtype, cfg.q_stages * cfg.tile_m * self.smem_h)
            sdO: aligned(self.dtype, cfg.do_stages * cfg.tile_m * self.smem_hv)
            sdS: aligned(self.dtype, cfg.ds_stages * cfg.tile_m * cfg.tile_n)
            sP: aligned(Float32, cfg.p_values)
            sdQ: aligned(Float32, cfg.dq_values(self.head_dim))
            sB: aligned(Float32, cfg.tile_m * cfg.tile_n * (self.heads_of_tile > 1))
            sN: aligned(Float32, self.numbers * self.adds_by_distance)

        return SharedStorage

    # ---- device side -----------------------------------------------------------------------

    def visits(self, tiles, mLists: tuple, block, keys: Int32, g: Int32, q_length: Int32):
        """``QueryTiles.visits``, with lists in stretches of ``TileLists.stretches_by_mask``."""
        if not self.has_lists:
            return super().visits(tiles, mLists, block, keys, g)
        _, _, full_min, full_max = tiles
        is_clear = (full_min <= 0) & (full_max * self.config.tile_m >= q_length)
        lists = self.lists_of(mLists, block, keys, g)
        has_mask_mod = self.functions is not None and self.functions.mask_mod is not None
        stretches = lists.stretches_by_mask(0, is_clear, has_mask_mod=has_mask_mod)
        return lists.count, lists.tile, stretches

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
        tma_dk: cute.CopyAtom,
        gdK: cute.Tensor,
        tma_dv: cute.CopyAtom,
        gdV: cute.Tensor,
        mQOffset: cute.Tensor | None,
        mQLengths: cute.Tensor | None,
        mKVLengths: cute.Tensor | None,
        mLSE2: cute.Tensor,
        mdPsum: cute.Tensor,
        mdQAccum: cute.Tensor | None,
        mCounts: cute.Tensor | None,
        mTurns: cute.Tensor | None,
        mCarried: tuple,
        mElements: tuple,
        mBounds: tuple,
        mLists: tuple,
        mRanks: tuple,
        mGradients: tuple,
        mPacked: tuple,
        mExponents: tuple,
        m_blocks: Int32,
        n_blocks: Int32,
        section: Int32,
        ahead: Int32 | None,
        heads_at_once: Int32 | None,
        q_length: Int32,
        kv_length: Int32,
        heads: Int32,
        kv_heads: Int32,
        batch_size: Int32,
    ):
        cfg = self.config
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.shared_storage())
        kv_full = storage.barriers.data_ptr()
        pipeline_q = TmaPipeline(
            "q",
            kv_full + FIRST_PIPELINE,
            cfg.q_stages,
            cfg.tile_m * (self.smem_h * 2 + 4),
            self.consumer_warps,
        )
        pipeline_do = TmaPipeline(
            "dO",
            kv_full + FIRST_PIPELINE + 2 * cfg.q_stages,
            cfg.do_stages,
            cfg.tile_m * (self.smem_hv * 2 + 4),
            self.consumer_warps,
        )
        if warp_index == 0:
            for atom in (tma_q, tma_do, tma_k, tma_v, tma_dk, tma_dv):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                pipeline_q.init()
                pipeline_do.init()
                cute.arch.mbarrier_init(kv_full, 1)
                cute.arch.mbarrier_init(kv_full + 1, 1)
                cute.arch.mbarrier_init(kv_full + TAIL, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        def staged(storage_member, rows, width, stages):
            layout = smem_layout(self.dtype, rows, width, stages)
            return storage_member.get_tensor(layout.outer, swizzle=layout.inner)

        sQ = staged(storage.sQ, cfg.tile_m, self.smem_h, cfg.q_stages)
        sdO = staged(storage.sdO, cfg.tile_m, self.smem_hv, cfg.do_stages)
        sK = staged(storage.sK, cfg.tile_n, self.smem_h, 1)
        sV = staged(storage.sV, cfg.tile_n, self.smem_hv, 1)
        sdS = None
        if const_expr(cfg.ds_stages > 0):
            sdS = staged(storage.sdS, cfg.tile_m, cfg.tile_n, cfg.ds_stages)
        sLSE = storage.sLSE.get_tensor(cute.make_layout((cfg.tile_m, cfg.q_stages)))
        sdPsum = storage.sdPsum.get_tensor(cute.make_layout((cfg.tile_m, cfg.do_stages)))
        sdQ, parts, part_values = None, cfg.dq_parts(self.head_dim), 0
        if const_expr(parts > 0):
            part_values = cfg.tile_m * self.smem_h // parts
            sdQ = storage.sdQ.get_tensor(
                cute.make_layout(
                    (4, 128, part_values // 512, min(parts, cfg.warpgroups)),
                    stride=(1, 4, 512, part_values),
                )
            )

        # Longest first: with a causal mask the first keys are seen by most queries.
        per_section = section * n_blocks
        block_parts = Int32(1)
        if const_expr(cfg.resident_bytes > 0):
            block_parts = (self.group + heads_at_once - 1) // heads_at_once
            per_section = per_section * block_parts
        tile = cute.arch.block_idx()[0]
        first_entry = tile // per_section * section
        within = tile - tile // per_section * per_section
        width = cutlass.min(section, kv_heads * batch_size - first_entry)
        n_block = within // width
        entry = first_entry + within - n_block * width
        part = Int32(0)
        if const_expr(cfg.resident_bytes > 0):
            part = n_block // n_blocks
            n_block = n_block - part * n_blocks
        batch = entry // kv_heads
        kv_head = entry - batch * kv_heads
        of_keys = (entry, n_block, n_blocks)

        offset, queries, keys = entry_lengths(
            mQOffset, mQLengths, mKVLengths, q_length, kv_length, batch
        )
        tiles, compares = self.query_tiles(n_block, batch, (offset, queries, keys), mBounds)
        block = (n_block, kv_head, batch)
        visits = partial(self.visits, tiles, mLists, block, keys, q_length=q_length)
        steps = self.all_steps(visits)
        heads_here, carried = (0, self.group // self.heads_of_tile), None
        if const_expr(cfg.resident_bytes > 0):
            if steps < block_parts * LEAST_STEPS:
                block_parts = Int32(1)
                heads_at_once = Int32(self.group)
            # Where there are fewer parts than blocks for them, the others have nothing to do.
            steps = steps if part < block_parts else Int32(0)
            first_head = cutlass.min(part * heads_at_once, Int32(self.group))
            heads_here = (first_head, cutlass.min(first_head + heads_at_once, Int32(self.group)))
            carried = (mCarried, entry * n_blocks + n_block, part, block_parts)

        if warp_index < 4:
            if const_expr(cfg.reallocates_registers):
                cute.arch.setmaxregister_decrease(cfg.producer_registers)
            if warp_index == 0 and steps > 0:
                self.produce(
                    (tma_q, gQ, sQ, sLSE),
                    (tma_do, gdO, sdO, sdPsum),
                    (tma_k, gK, sK),
                    (tma_v, gV, sV),
                    (mLSE2, mdPsum),
                    (pipeline_q, pipeline_do, kv_full),
                    block,
                    (visits, heads_here, m_blocks),
                    (queries, keys),
                    (mQLengths is not None, mKVLengths is not None),
                )
            if const_expr(cfg.dq_pass is not None):
                if warp_index == 1:
                    # Row statistics are all that the pass for dQ needs: once they are there, its
                    # blocks may begin where blocks of this kernel have ended.
                    cute.arch.griddepcontrol_wait()
                    cute.arch.griddepcontrol_launch_dependents()
            # Where the parts of dQ come independently of each other, each has a warp of its own.
            dq_warps = 0 if self.is_measuring else cfg.dq_warps(self.head_dim)
            for w in cutlass.range_constexpr(dq_warps):
                if warp_index == 1 + w:
                    # Nothing may be added before sums are clear, or counted before counters are.
                    cute.arch.griddepcontrol_wait()
                    if const_expr(w == 0):
                        cute.arch.griddepcontrol_launch_dependents()
                    self.query_sums.wait_until_cleared(mCounts, of_keys, ahead)
                    self.reduce_dq(
                        sdQ,
                        (mdQAccum, mTurns, mRanks),
                        (n_block, kv_head, batch, heads),
                        (visits, heads_here, m_blocks, offset),
                        (part_values, tuple(range(w, parts, dq_warps))),
                    )
                    self.query_sums.end_adding(mCounts, of_keys)
            if const_expr(dq_warps > 0):
                if warp_index == self.query_sums.idle_warp and part == 0:
                    cute.arch.griddepcontrol_wait()
                    self.query_sums.clear(mdQAccum, mCounts, of_keys, ahead, m_blocks)
        else:
            if const_expr(cfg.reallocates_registers):
                cute.arch.setmaxregister_increase(cfg.consumer_registers)
            smem, sB, sN = (sQ, sdO, sK, sV, sdS, sdQ, sLSE, sdPsum), None, None
            if const_expr(self.adds_by_distance):
                warps = self.consumer_warps
                sN = storage.sN.get_tensor(cute.make_layout((self.numbers // warps, warps)))
            if const_expr(self.heads_of_tile > 1):
                threads = self.consumer_threads
                sB = storage.sB.get_tensor(
                    cute.make_layout((4, threads, cfg.tile_m // 8), stride=(1, 4, 4 * threads))
                )
            bounds = (mBounds, batch, (q_length, kv_length), compares)
            mask_step = partial(self.mask_step, (offset, queries, keys), bounds)
            barriers = (pipeline_q, pipeline_do, kv_full)
            sums = (mGradients, mExponents)
            elements = (mElements, offset, (q_length, kv_length), sums, mPacked)
            if const_expr(cfg.by_role):
                sP = storage.sP.get_tensor(
                    cute.make_layout((4, 128, cfg.p_values // 512), stride=(1, 4, 512))
                )
                RoleConsumers(self).consume(
                    (*smem, sP),
                    (tma_dk, gdK),
                    (tma_dv, gdV),
                    barriers,
                    block,
                    (visits, steps, tiles),
                    mask_step,
                    elements,
                )
            else:
                self.consume(
                    (*smem, sB, sN),
                    (tma_dk, gdK),
                    (tma_dv, gdV),
                    barriers,
                    block,
                    (visits, heads_here, steps, tiles),
                    carried,
                    mask_step,
                    elements,
                )
        pipeline_q.check_arrivals()
        pipeline_do.check_arrivals()

    @cute.jit
    def produce(
        self,
        q_copy,
        do_copy,
        k_copy,
        v_copy,
        statistics,
        barriers,
        block,
        tiles,
        lengths,
        has_lengths: cutlass.Constexpr,
    ):
        """The producer warp: K and V once, then Q and dO of every tile with their statistics."""
        cfg = self.config
        tma_q, _, sQ, sLSE = q_copy
        tma_do, _, sdO, sdPsum = do_copy
        mLSE2, mdPsum = statistics
        pipeline_q, pipeline_do, kv_full = barriers
        n_block, kv_head, batch = block
        visits, heads_here, m_blocks = tiles
        queries, keys = lengths
        has_q_lengths, has_kv_lengths = has_lengths
        padded = Int64(m_blocks) * cfg.tile_m
        gLSE, gdPsum = (
            cute.make_tensor(
                x.iterator.align(16),
                cute.make_layout(
                    (cfg.tile_m, m_blocks, self.group),
                    stride=(1, cfg.tile_m, cute.assume(padded, 16)),
                ),
            )
            for x in (
                cute.domain_offset((batch, kv_head * self.group, 0), mLSE2),
                cute.domain_offset((batch, kv_head * self.group, 0), mdPsum),
            )
        )
        copy_row = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)

        tail_phase = Int32(0)
        keys_here = keys - n_block * cfg.tile_n
        has_key_tail = Boolean(False)
        if const_expr(has_kv_lengths):
            has_key_tail = keys_here < cfg.tile_n
        for operand, (copy, width) in enumerate(((k_copy, self.smem_h), (v_copy, self.smem_hv))):
            tail_phase = self.load_keys(
                copy, width, kv_full, operand, block, (has_key_tail, tail_phase, keys_here)
            )

        # The statistics come from the kernel before this one.
        cute.arch.griddepcontrol_wait()
        q_stage, q_phase, do_stage, do_phase = (Int32(0) for _ in range(4))
        for g in cutlass.range(heads_here[0], heads_here[1], unroll=1):
            copies_of = self.head_copies(q_copy, do_copy, kv_head, batch, g)
            count, tile_of, _ = visits(g)
            for i in cutlass.range(self.turns(count), unroll=1):
                m, turn = self.tile_and_turn(tile_of, i)
                tQsQ, tQgQ, tOsO, tOgO, here = copies_of(turn)
                rows_here = queries - m * cfg.tile_m
                if const_expr(self.has_lists):
                    # A list may hold tiles that lie beyond the length altogether.
                    rows_here = cutlass.max(rows_here, Int32(0))
                has_tail = Boolean(False)
                if const_expr(has_q_lengths):
                    has_tail = rows_here < cfg.tile_m
                pipeline_q.acquire(q_stage, q_phase)
                tail_phase = self.load_rows(
                    (tma_q, tQgQ[None, m], tQsQ, sQ, self.smem_h),
                    (copy_row, gLSE[None, m, here], sLSE[None, q_stage]),
                    (pipeline_q, kv_full, FIRST_PIPELINE),
                    q_stage,
                    (has_tail, tail_phase, rows_here),
                )
                pipeline_do.acquire(do_stage, do_phase)
                tail_phase = self.load_rows(
                    (tma_do, tOgO[None, m], tOsO, sdO, self.smem_hv),
                    (copy_row, gdPsum[None, m, here], sdPsum[None, do_stage]),
                    (pipeline_do, kv_full, FIRST_PIPELINE + 2 * cfg.q_stages),
                    do_stage,
                    (has_tail, tail_phase, rows_here),
                )
                q_stage, q_phase = pipeline_q.advance(q_stage, q_phase)
                do_stage, do_phase = pipeline_do.advance(do_stage, do_phase)

    def head_copies(self, q_copy, do_copy, kv_head: Int32, batch: Int32, g: Int32):
        """Of a turn: where tiles of Q and dO lie and go, and the place of the head in the group."""
        cfg = self.config

        def copies_of(g: Int32):
            head = kv_head * self.group + g
            tma_q, gQ, sQ, _ = q_copy
            tma_do, gdO, sdO, _ = do_copy
            gQ_tile = cute.local_tile(
                gQ[None, None, head, batch], (cfg.tile_m, self.smem_h), (None, 0)
            )
            gdO_tile = cute.local_tile(
                gdO[None, None, head, batch], (cfg.tile_m, self.smem_hv), (None, 0)
            )
            of_q, of_do = tma_partition(tma_q, sQ, gQ_tile), tma_partition(tma_do, sdO, gdO_tile)
            return *of_q, *of_do, g

        if self.heads_of_tile > 1:
            return copies_of
        found = copies_of(g)
        return lambda turn: found

    def turns(self, count: Int32) -> Int32:
        """How often a block visits so many tiles."""
        return count if self.heads_of_tile == 1 else count * self.heads_of_tile

    def tile_and_turn(self, tile_of, i: Int32) -> tuple:
        """The tile of a visit, and the head's place in the group; None where heads do not turn."""
        if self.heads_of_tile == 1:
            return tile_of(i), None
        place = i // self.heads_of_tile
        return tile_of(place), i - place * self.heads_of_tile

    @cute.jit
    def load_keys(self, operand_copy, width: cutlass.Constexpr[int], kv_full, operand, block, tail):
        """Loads the block's K or V and clears what lies beyond the length."""
        cfg = self.config
        tma_x, gX, sX = operand_copy
        n_block, kv_head, batch = block
        has_tail, tail_phase, keys_here = tail
        gX_tile = cute.local_tile(gX[None, None, kv_head, batch], (cfg.tile_n, width), (None, 0))
        tXsX, tXgX = tma_partition(tma_x, sX, gX_tile)
        index = Int32(TAIL) if has_tail else Int32(operand)
        bar = kv_full + index
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, cfg.tile_n * width * 2)
        cute.copy(tma_x, tXgX[None, n_block], tXsX[None, 0], tma_bar_ptr=bar)
        if has_tail:
            cute.arch.mbarrier_wait(bar, tail_phase)
            clear_rows(sX, width, Int32(0), keys_here)
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(kv_full + operand)
            tail_phase ^= 1
        return tail_phase

    @cute.jit
    def load_rows(self, tile_copy, row_copy, barriers, stage: Int32, tail):
        """Loads a tile and its row statistics into a stage, and clears the tile's tail."""
        tma_x, source, target, smem, width = tile_copy
        copy_row, row_source, row_target = row_copy
        pipeline, first_of_all, first_of_pipeline = barriers
        has_tail, tail_phase, rows_here = tail
        index = Int32(TAIL) if has_tail else stage + first_of_pipeline
        bar = first_of_all + index
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, pipeline.tx_bytes)
        cute.copy(tma_x, source, target[None, stage], tma_bar_ptr=bar)
        with cute.arch.elect_one():
            cute.copy(copy_row, row_source, row_target, mbar_ptr=bar)
        if has_tail:
            # What lies beyond the length may be NaN, and 0 * NaN is NaN: clear it.
            cute.arch.mbarrier_wait(bar, tail_phase)
            clear_rows(smem, width, stage, rows_here)
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            pipeline.commit(stage)
            tail_phase ^= 1
        return tail_phase

    @cute.jit
    def reduce_dq(
        self,
        sdQ: cute.Tensor,
        sums,
        block,
        tiles,
        parts: cutlass.Constexpr,
    ):
        """A dQ warp: adds every tile's dQ, or its parts of it, to the sum in global memory."""
        cfg = self.config
        part_values, mine = parts
        buffers = 1 if cfg.by_role else len(mine)
        mdQAccum, mTurns, mRanks = sums
        n_block, kv_head, batch, heads = block
        visits, heads_here, m_blocks, offset = tiles
        dq_warps = cfg.dq_warps(self.head_dim)
        threads = 128 + 32
        values = cfg.tile_m * self.smem_h
        for g in cutlass.range(heads_here[0], heads_here[1], unroll=1):
            entry = Int64(batch) * heads + kv_head * self.group + g
            count, tile_of, _ = visits(g)
            turn_at = partial(self.turn, mRanks, (n_block, kv_head, batch), g, offset)
            for j in cutlass.range(self.turns(count), unroll=1):
                m, turn = self.tile_and_turn(tile_of, j)
                head_entry = entry if const_expr(turn is None) else entry + turn
                first = (head_entry * m_blocks + m) * values
                for i in cutlass.range_constexpr(len(mine)):
                    part = mine[i]
                    buffer = part % 2 if cfg.by_role else part
                    # The reduction that read this buffer last is the oldest in flight.
                    cute.arch.cp_async_bulk_wait_group(buffers - 1, read=True)
                    cute.arch.barrier_arrive(
                        barrier_id=DQ_EMPTY_BARRIER + buffer, number_of_threads=threads
                    )
                    cute.arch.barrier(
                        barrier_id=DQ_FULL_BARRIER + buffer, number_of_threads=threads
                    )
                    if const_expr(cfg.deterministic and i == 0):
                        index = (head_entry * m_blocks + m) * dq_warps + mine[0]
                        take_turn(mTurns.iterator + index, turn_at(m))
                    if cute.arch.lane_idx() == 0:
                        bulk_add(
                            mdQAccum.iterator + (first + part * part_values),
                            sdQ[None, None, None, buffer].iterator,
                            part_values * 4,
                        )
                        cute.arch.cp_async_bulk_commit_group()
                if const_expr(cfg.deterministic):
                    pass_turn(mTurns.iterator + (head_entry * m_blocks + m) * dq_warps + mine[0])
        cute.arch.cp_async_bulk_wait_group(0)

    def turn(self, mRanks: tuple, block, g: Int32, offset: Int32, m: Int32):
        """How many blocks add to a query tile of the g-th head before this one."""
        cfg = self.config
        n_block, kv_head, batch = block
        if not mRanks:
            return turn_of(self.mask, n_block, m, offset, cfg.tile_m, cfg.tile_n)
        return row_of(mRanks[0], batch, kv_head * self.group + g, n_block)[m]

    @cute.jit
    def consume(
        self,
        smem,
        dk_copy,
        dv_copy,
        barriers,
        block,
        tiles,
        carried,
        mask_step: cutlass.Constexpr,
        elements,
    ):
        """A consumer warpgroup: the products of its 64 keys, and its part of dQ."""
        cfg = self.config
        sQ, sdO, sK, sV, sdS, sdQ, sLSE, sdPsum, sB, sN = smem
        tma_dk, gdK = dk_copy
        tma_dv, gdV = dv_copy
        pipeline_q, pipeline_do, kv_full = barriers
        n_block, kv_head, _ = block
        visits, heads_here, steps, ranges = tiles
        thread = cute.arch.thread_idx()[0] % 128
        slab = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128) - 1
        smem_source, register_source = (
            warpgroup.OperandSource.SMEM,
            warpgroup.OperandSource.RMEM,
        )
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN

        # S^T and dP^T: (64 keys, tile_m).
        mma_s = tiled_mma(self.dtype, cfg.tile_m, k_major, smem_source)
        wg_s = mma_s.get_slice(0)
        sK_slab = cute.local_tile(sK[None, None, 0], (64, self.smem_h), (slab, 0))
        sV_slab = cute.local_tile(sV[None, None, 0], (64, self.smem_hv), (slab, 0))
        tSrK = mma_s.make_fragment_A(wg_s.partition_A(sK_slab))
        tSrQ = mma_s.make_fragment_B(wg_s.partition_B(sQ))
        tPrV = mma_s.make_fragment_A(wg_s.partition_A(sV_slab))
        tPrO = mma_s.make_fragment_B(wg_s.partition_B(sdO))
        # dV: (64 keys, Hv) and dK: (64 keys, H), over the rows of the tile.
        mma_dv = tiled_mma(self.dtype, self.smem_hv, mn_major, register_source)
        mma_dk = tiled_mma(self.dtype, self.smem_h, mn_major, register_source)

        tVrO = mma_dv.make_fragment_B(mma_dv.get_slice(0).partition_B(transposed(sdO)))
        tKrQ = mma_dk.make_fragment_B(mma_dk.get_slice(0).partition_B(transposed(sQ)))
        # dQ: (64 rows, columns), over the keys of the block.
        columns = cfg.dq_part_shape(self.head_dim)[1]
        mma_dq = tiled_mma(self.dtype, columns, mn_major, smem_source, k_major)
        wg_dq = mma_dq.get_slice(0)
        column_part = slab if const_expr(cfg.dq_split == "columns") else 0
        sKt_part = cute.local_tile(
            transposed(sK)[None, None, 0], (columns, cfg.tile_n), (column_part, 0)
        )
        tQrA = mma_dq.make_fragment_A(wg_dq.partition_A(sdS))
        tQrB = mma_dq.make_fragment_B(wg_dq.partition_B(sKt_part))

        acc_S = cute.make_rmem_tensor(mma_s.partition_shape_C((64, cfg.tile_m)), Float32)
        acc_P = cute.make_rmem_tensor(mma_s.partition_shape_C((64, cfg.tile_m)), Float32)
        acc_dV = cute.make_rmem_tensor(mma_dv.partition_shape_C((64, self.smem_hv)), Float32)
        acc_dK = cute.make_rmem_tensor(mma_dk.partition_shape_C((64, self.smem_h)), Float32)
        acc_dV.fill(0.0)
        acc_dK.fill(0.0)

        copy_ds = cute.make_tiled_copy_C(
            cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), self.dtype), mma_s
        ).get_slice(thread)
        tSsS = copy_ds.partition_D(
            cute.local_tile(transposed(sdS), (64, cfg.tile_m), (slab, 0, None))
        )
        tLSE, tdPsum = (self.column_pairs(x, thread) for x in (sLSE, sdPsum))
        mask_tile = mask_step(rows_and_columns(acc_S), thread, n_block * cfg.tile_n + slab * 64)

        products = Products(
            mma_s=mma_s,
            mma_dv=mma_dv,
            mma_dk=mma_dk,
            mma_dq=mma_dq,
            tSrK=tSrK,
            tSrQ=tSrQ,
            tPrV=tPrV,
            tPrO=tPrO,
            tVrO=tVrO,
            tKrQ=tKrQ,
            tQrA=tQrA,
            tQrB=tQrB,
            acc_S=acc_S,
            acc_P=acc_P,
            acc_dV=acc_dV,
            acc_dK=acc_dK,
            tLSE=tLSE,
            tdPsum=tdPsum,
            copy_ds=copy_ds,
            tSsS=tSsS,
            sdQ=sdQ,
            thread=thread,
            slab=slab,
            mask_tile=partial(self.mask_tile, mask_tile, ranges),
        )
        step = partial(self.step, products, pipeline_q, pipeline_do)

        # Stages and phases of Q and of dO, and the buffer of dS.
        state = tuple(Int32(0) for _ in range(5))
        if steps > 0:
            if const_expr(carried is not None):
                # While K and V are on their way.
                self.take_over(carried, (acc_dV, acc_dK), thread, slab)
            cute.arch.mbarrier_wait(kv_full, 0)
            cute.arch.mbarrier_wait(kv_full + 1, 0)
            held = None
            if const_expr(self.heads_of_tile > 1):
                held = sB[None, slab * 128 + thread, None]
            pullback = self.pullback(
                elements, block, n_block * cfg.tile_n + slab * 64, thread, held
            )
            sums = [] if pullback is None else [pullback.start, pullback.finish]
            for g in cutlass.range(heads_here[0], heads_here[1], unroll=1):
                first_key, head = n_block * cfg.tile_n + slab * 64, kv_head * self.group + g
                place = (head, first_key, thread)
                terms = self.distance_terms(elements, block, sN, slab, pullback, place)
                modify = self.elements_of_head(elements, block, g, first_key, thread, terms)
                if const_expr(sums):
                    sums[0]()
                _, _, stretches = visits(g)
                loops = self.loops(stretches, terms)
                for loop in cutlass.range_constexpr(len(loops)):
                    (count, tile_of, *kind), differs = loops[loop]
                    of_loop = self.enter_loop(terms, pullback, tile_of, differs)
                    of_loop = modify, pullback, head, differs, of_loop
                    for i in cutlass.range(self.turns(count), unroll=1):
                        m, turn = self.tile_and_turn(tile_of, i)
                        here = of_loop
                        if const_expr(turn is not None):
                            # Blocks visit the group's heads in turn, from the first on.
                            here = self.elements_of_head(elements, block, turn, first_key, thread)
                            here = here, *of_loop[1:]
                        state = step(m, state, kind, here, turn)
                    self.leave_loop(pullback, head, tile_of, count, differs)
                if const_expr(sums):
                    sums[1](head)

        stores = ((tma_dv, gdV, sV, self.smem_hv), (tma_dk, gdK, sK, self.smem_h))
        gradients = ((acc_dV, mma_dv, sV_slab, 1.0), (acc_dK, mma_dk, sK_slab, self.scale))
        if const_expr(self.is_measuring):
            pass
        elif const_expr(carried is None):
            self.round_gradients(gradients, stores, block, thread)
        else:
            _, _, part, parts = carried
            if part + 1 < parts:
                self.hand_on(carried, (acc_dV, acc_dK), thread, slab)
            elif part + 1 == parts:
                self.round_gradients(gradients, stores, block, thread)

    def round_gradients(self, gradients: tuple, stores: tuple, block, thread: Int32) -> None:
        """Stores dV and dK in 16 bits; called by every consumer."""
        # Nobody reads K and V any more: they give their place to dK and dV.
        self.meet()
        for acc, mma, target, scale in gradients:
            self.stage_gradient(acc, mma, target, thread, scale)
        cute.arch.fence_view_async_shared()
        self.meet()
        self.store_gradients(stores, block)

    def carried_values(self, carried, accumulators, thread: Int32, slab: Int32) -> list:
        """A thread's dV and dK in registers and where they stand between parts of a block."""
        (_, mValues), block, _, _ = carried
        threads = self.consumer_threads
        first = Int64(block) * (self.config.tile_n * (self.smem_h + self.smem_hv))
        found = []
        for acc in accumulators:
            values = cute.size(acc)
            there = cute.make_tensor(
                (mValues.iterator + first).align(16),
                cute.make_layout((4, threads, values // 4), stride=(1, 4, 4 * threads)),
            )
            here = cute.make_tensor(acc.iterator, cute.make_layout((4, values // 4)))
            found.append((here, there[None, slab * 128 + thread, None]))
            first += threads * values
        return found

    @cute.jit
    def take_over(self, carried, accumulators, thread: Int32, slab: Int32):
        """Loads dV and dK as the part of the block before this one left them, once it is done."""
        (mDone, _), block, part, _ = carried
        if part > 0:
            # The kernel before this one clears the counters.
            cute.arch.griddepcontrol_wait()
            take_turn(mDone.iterator + block, part)
            pairs = self.carried_values(carried, accumulators, thread, slab)
            for i in cutlass.range_constexpr(len(pairs)):
                here, there = pairs[i]
                cute.autovec_copy(there, here)

    @cute.jit
    def hand_on(self, carried, accumulators, thread: Int32, slab: Int32):
        """Leaves dV and dK to the part of the block that comes after this one."""
        mDone, block = carried[0][0], carried[1]
        pairs = self.carried_values(carried, accumulators, thread, slab)
        for i in cutlass.range_constexpr(len(pairs)):
            here, there = pairs[i]
            cute.autovec_copy(here, there)
        cute.arch.griddepcontrol_wait()
        self.meet()
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4:
            end_turn(mDone.iterator + block)

    def stage_gradient(
        self, acc: cute.Tensor, mma: cute.TiledMma, target: cute.Tensor, thread: Int32, scale: float
    ) -> None:
        """Scales and rounds dK or dV and puts it in shared memory; one warpgroup."""
        if scale != 1.0:
            for i in range(cute.size(acc)):
                acc[i] = acc[i] * scale
        rounded = cute.make_rmem_tensor(acc.layout, self.dtype)
        convert_pairs(acc, rounded)
        copy = cute.make_tiled_copy_C(
            cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), mma
        ).get_slice(thread)
        cute.copy(copy, copy.retile(rounded), copy.partition_D(target))

    @cute.jit
    def store_gradients(self, stores, block):
        """Copies dK and dV from shared to global memory; called by every consumer."""
        n_block, kv_head, batch = block
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4:
            for i in cutlass.range_constexpr(len(stores)):
                tma_x, gX, sX, width = stores[i]
                gX_tile = cute.local_tile(
                    gX[None, None, kv_head, batch], (self.config.tile_n, width), (None, 0)
                )
                tXsX, tXgX = tma_partition(tma_x, sX, gX_tile)
                cute.copy(tma_x, tXsX[None, 0], tXgX[None, n_block])
            cute.arch.cp_async_bulk_commit_group()
            # Shared memory must outlive the stores that read it.
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def distance_terms(
        self, elements, block, sN: cute.Tensor | None, slab, pullback: Pullback | None, place
    ) -> DistanceTerms | None:
        """What a head adds to scores by distance, where that is all and tiles have it in common.

        ``place``: the head, the warpgroup's first key and the thread.
        """
        may_agree = pullback is None or all(each.may_agree for each in pullback.sums)
        if not self.adds_by_distance or not may_agree:
            return None
        mElements, offset, array_lengths, *_ = elements
        entry = Elements(self.functions, mElements).of_entry(block[2], offset, array_lengths)
        scale, tile_m, numbers = (
            self.element_scale,
            self.config.tile_m,
            sN[None, slab * 4 + place[2] // 32],
        )
        return DistanceTerms(entry, pullback, scale, tile_m, numbers, *place)

    def loops(self, stretches: list[Stretch], terms: DistanceTerms | None) -> list[tuple]:
        """``stretches``, and ``differs`` of ``DistanceTerms.loops`` of each."""
        if terms is None:
            return [(stretch, None) for stretch in stretches]
        return terms.loops(stretches)

    def enter_loop(
        self, terms: DistanceTerms | None, pullback: Pullback | None, tile_of, differs: bool | None
    ) -> Float32 | None:
        """What a loop adds to all scores, in base 2; None where it changes them one by one."""
        if terms is None or differs:
            return None
        if pullback is not None:
            pullback.start_common()
        return terms.common(tile_of)

    def leave_loop(
        self, pullback: Pullback | None, head: Int32, tile_of, count: Int32, differs: bool | None
    ) -> None:
        """After a loop of so many tiles."""
        if pullback is not None and differs is False:
            pullback.finish_common(head, tile_of(Int32(0)), count > 0)

    def elements_of_head(
        self,
        elements,
        block,
        g: Int32,
        first_key: Int32,
        thread: Int32,
        terms: DistanceTerms | None = None,
    ):
        """What is done to each score of a tile of the g-th head of the group.

        Returns:
          ``modify(m, scores, is_masked, is_full)``, which changes a tile's products to scores; or
          None.
        """
        if not self.by_element and self.packed_mask is None:
            return None
        if terms is not None:
            return terms.add
        mElements, offset, array_lengths, _, mPacked = elements
        _, kv_head, batch = block
        head = kv_head * self.group + g
        scale, tile_m = self.element_scale, self.config.tile_m

        def first_query(m: Int32) -> Int32:
            return m * tile_m + first_column(thread)

        hide_bits = self.packed_step(mPacked, (batch, head, array_lengths[0]), first_key, thread)
        if not self.by_element:
            return lambda m, scores, *_: hide_bits(first_query(m), scores)
        entry = Elements(self.functions, mElements).of_entry(batch, offset, array_lengths)
        keys = [entry.keys(first_key + row_in_slab(thread, r)) for r in range(ROWS_PER_THREAD)]

        in_bounds = self.functions.bias is not None and isinstance(self.mask, IntervalMask)
        in_bounds = in_bounds and self.row_bounds is None and not self.has_lists

        def modify(m: Int32, scores: cute.Tensor, is_masked: bool, is_full: bool) -> None:
            # Where a block has tiles that need no mask, all of its keys are there.
            steps = in_bounds and not is_masked
            for c in range(cute.size(scores, mode=[1])):
                query = entry.queries(head, first_query(m) + column_step(c))
                first = entry.both(query, keys[0])
                for r in range(ROWS_PER_THREAD):
                    known = entry.both(query, keys[r])
                    if steps and r:
                        known = known | {"beside": (first, 8 * r)}
                    scores[r, c] = entry.element(known, scores[r, c], scale, is_full=is_full)
            hide_bits(first_query(m), scores)

        return modify

    def pullback(
        self, elements, block, first_key: Int32, thread: Int32, held: cute.Tensor | None
    ) -> Pullback | None:
        """What the gradients of a thread's scores go through; None where they stay as they are.

        ``held``: that of ``Pullback``.
        """
        functions = self.functions
        if not self.has_pullback:
            return None
        mElements, offset, array_lengths, sums, _ = elements
        derivatives = Elements(functions, mElements, differentiates=True)
        entry = derivatives.of_entry(block[2], offset, array_lengths)
        if functions.summed_ranks:
            # The kernel before this one clears the sums.
            cute.arch.griddepcontrol_wait()
        place = (self.config.tile_m, first_key, thread)
        heads = (held, self.heads_of_tile)
        in_memory = sums_in_memory(
            functions, self.config.deterministic, *sums, is_measuring=self.is_measuring
        )
        return Pullback(entry, in_memory, self.scale, *place, *heads)

    def packed_step(self, mPacked: tuple, place, first_key: Int32, thread: Int32):
        """What a mask in bits does to a tile: a function of a thread's first query and the scores.

        A thread's keys share their words: they are 8 apart, among 16 that 16 divides.
        """
        if self.packed_mask is None:
            return lambda first, scores: None
        batch, head, q_length = place
        packed = PackedMask(self.packed_mask, *mPacked)
        key = first_key + row_in_slab(thread, 0)
        shift = Uint32(key % 32)

        def hide(first: Int32, scores: cute.Tensor) -> None:
            last = Int32(q_length) - 1
            columns = cute.size(scores, mode=[1])
            rows = [
                packed.row(batch, head, cutlass.min(first + column_step(c), last))
                for c in range(columns)
            ]
            words = [packed.word(row, key // 32) for row in rows]
            for c in range(columns):
                bits = words[c] >> shift
                for r in range(ROWS_PER_THREAD):
                    is_seen = (bits & Uint32(1 << (8 * r))) != Uint32(0)
                    scores[r, c] = select(is_seen, scores[r, c], Float32(-Float32.inf))

        return hide

    def step(self, products, pipeline_q, pipeline_do, m: Int32, state, kind, of_loop, turn):
        """One query tile; returns the next state.

        Args:
          state: stage and phase of Q, stage and phase of dO, buffer of dS.
          kind: of a ``Stretch``, ``is_masked`` and ``is_full``.
          of_loop: of ``elements_of_head``, of ``pullback``, the head, and of a loop of ``loops``
            ``differs`` and ``enter_loop``.
          turn: of ``tile_and_turn``.
        """
        cfg, c, warps = self.config, products, self.consumer_warps
        q_stage, q_phase, do_stage, do_phase, ds_stage = state
        pipeline_q.wait(q_stage, q_phase)
        gemm(c.mma_s, c.acc_S, c.tSrK, c.tSrQ[None, None, None, q_stage], False)
        pipeline_do.wait(do_stage, do_phase)
        gemm(c.mma_s, c.acc_P, c.tPrV, c.tPrO[None, None, None, do_stage], False)
        warpgroup.wait_group(1)
        scores, dscores = rows_and_columns(c.acc_S), rows_and_columns(c.acc_P)
        modify, pullback, head, differs, common = of_loop
        raw = None
        if pullback is not None and pullback.reads_score:
            raw = cute.make_rmem_tensor(c.acc_S.layout, Float32)
            for i in range(cute.size(raw)):
                raw[i] = c.acc_S[i]
        if modify is not None and common is None:
            modify(m, scores, *kind)
        c.mask_tile(m, kind[0])
        self.probabilities(scores, c.tLSE, q_stage, common)
        rP = cute.make_rmem_tensor(c.acc_S.layout, self.dtype)
        rdS = cute.make_rmem_tensor(c.acc_S.layout, self.dtype)
        convert_pairs(c.acc_S, rP)
        rP, tVrO = as_operand_a(rP), c.tVrO[None, None, None, do_stage]
        warpgroup.wait_group(0)
        self.score_gradients(scores, dscores, c.tdPsum, do_stage)
        if pullback is not None and common is not None:
            pullback.tile_of_common(dscores)
        elif pullback is not None:
            raw = None if raw is None else rows_and_columns(raw)
            pullback.tile(head, m, raw, dscores, differs=bool(differs), turn=turn)
        if self.is_measuring:
            # All lanes have read the rows' statistics.
            cute.arch.sync_warp()
            pipeline_do.release(do_stage, warps)
            pipeline_q.release(q_stage, warps)
            following_q = pipeline_q.advance(q_stage, q_phase)
            return *following_q, *pipeline_do.advance(do_stage, do_phase), ds_stage
        convert_pairs(c.acc_P, rdS)
        if cfg.ds_stages == 1:
            # Every warpgroup has read the dS of the tile before.
            self.meet()
        cute.copy(c.copy_ds, c.copy_ds.retile(rdS), c.tSsS[None, None, None, ds_stage])
        gemm(c.mma_dv, c.acc_dV, rP, tVrO, True)
        cute.arch.fence_view_async_shared()
        self.meet()
        shape = cfg.dq_part_shape(self.head_dim)
        acc_dQ = None
        if cfg.dq_split == "none":
            self.query_gradient(c.mma_dq, c.tQrA, c.tQrB, ds_stage, c.sdQ, c.thread, c.slab, shape)
            warpgroup.wait_group(0)
        else:
            acc_dQ = cute.make_rmem_tensor(c.mma_dq.partition_shape_C(shape), Float32)
            gemm(c.mma_dq, acc_dQ, c.tQrA[None, None, None, ds_stage], c.tQrB, False)
            warpgroup.wait_group(1)
        pipeline_do.release(do_stage, warps)
        gemm(c.mma_dk, c.acc_dK, as_operand_a(rdS), c.tKrQ[None, None, None, q_stage], True)
        if acc_dQ is not None:
            warpgroup.wait_group(1)
            self.hand_over_dq(acc_dQ, c.sdQ, c.thread, c.slab)
        warpgroup.wait_group(0)
        pipeline_q.release(q_stage, warps)
        if cfg.ds_stages > 1:
            following = ds_stage + 1
            ds_stage = following - cfg.ds_stages * Int32(following == cfg.ds_stages)
        following_q = pipeline_q.advance(q_stage, q_phase)
        return *following_q, *pipeline_do.advance(do_stage, do_phase), ds_stage

    def meet(self) -> None:
        """All consumers wait for each other."""
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=self.consumer_threads)

    def column_pairs(self, row: cute.Tensor, thread: Int32) -> cute.Tensor:
        """This thread's columns of (tile_m, stages) as (2, tile_m / 8, stages)."""
        tile_m, stages = self.config.tile_m, cute.size(row, mode=[1])
        view = cute.make_tensor(
            row.iterator,
            cute.make_layout((2, 4, tile_m // 8, stages), stride=(1, 2, 8, tile_m)),
        )
        return view[None, thread % 4, None, None]

    @cute.jit
    def probabilities(
        self, scores: cute.Tensor, tLSE: cute.Tensor, stage: Int32, common: Float32 | None = None
    ):
        """exp2(scale log2(e) S - LSE2), in place; ``common``: of ``enter_loop``."""
        pair = cute.make_rmem_tensor(2, Float32)
        scale = self.score_scale
        if const_expr(common is not None):
            scale = self.element_scale
        for j in cutlass.range_constexpr(cute.size(scores, mode=[1]) // 2):
            cute.autovec_copy(tLSE[None, j, stage], pair)
            if const_expr(common is not None):
                for b in cutlass.range_constexpr(2):
                    pair[b] = pair[b] - common
            for b in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(ROWS_PER_THREAD):
                    score = scores[r, 2 * j + b]
                    if const_expr(self.may_be_infinite):
                        # Of rows beyond the last, whose LSE2 is infinite: infinity less it is NaN.
                        score = cute.arch.fmin(score, Float32(LARGEST_SCORE))
                    scores[r, 2 * j + b] = exp2(score * (scale * LOG2_E) - pair[b])

    @cute.jit
    def score_gradients(
        self, scores: cute.Tensor, dscores: cute.Tensor, tdPsum: cute.Tensor, stage: Int32
    ):
        """P (dP - dPsum), in place of dP."""
        pair = cute.make_rmem_tensor(2, Float32)
        for j in cutlass.range_constexpr(cute.size(scores, mode=[1]) // 2):
            cute.autovec_copy(tdPsum[None, j, stage], pair)
            for b in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(ROWS_PER_THREAD):
                    c = 2 * j + b
                    dscores[r, c] = scores[r, c] * (dscores[r, c] - pair[b])

    def mask_step(self, lengths, bounds, scores: cute.Tensor, thread: Int32, first_key: Int32):
        """What hides the query columns of a tile that do not see a thread's keys.

        Args:
          lengths: offset, queries and keys of the batch entry.
          bounds: their arrays, the batch entry, the arrays' lengths, whether ids are compared.
          scores: of the tile; a function of the tile's number is returned.
        """
        row_limits, compare = partial(self.row_limits, lengths, thread, first_key), None
        if self.row_bounds is not None:
            mBounds, batch, (_, kv_length), compares = bounds
            places = [first_key + row_in_slab(thread, r) for r in range(ROWS_PER_THREAD)]
            keys = [cutlass.min(place, Int32(kv_length) - 1) for place in places]
            # Keys beyond the array are hidden: their zeros may be a score far above the LSE.
            limits = [
                [
                    (low[batch, key], select(place == key, high[batch, key], Int32(0)))
                    for low, high in self.row_bounds.limits(mBounds)
                ]
                for place, key in zip(places, keys, strict=True)
            ]

            def row_limits(r):
                return limits[r]

            if self.compares:
                compare = compares, self.comparison(bounds, keys, lengths[0])
        return partial(self.apply_mask, scores, thread, row_limits, compare)

    def row_limits(self, lengths, thread: Int32, first_key: Int32, r: int) -> list:
        """The intervals of rows that see a thread's key, by position.

        Of each, its first row (None: the first of all) and one past the last.
        """
        offset, queries, keys = lengths
        key = first_key + row_in_slab(thread, r)
        limits = self.mask.query_limits(key, offset, queries)
        return [(first, select(key < keys, end, Int32(0))) for first, end in limits]

    def comparison(self, bounds, keys: list[Int32], offset: Int32):
        """For tile m, a function of a column: whether its row's segment is that of each key.

        Scattered segments with positions of their own are compared with the window here too.  Of a
        mask: whether the row's interval holds each key.
        """
        mBounds, batch, (q_length, _), _ = bounds
        compared = self.row_bounds.compared(mBounds)
        if self.row_bounds.compares_bounds:
            return self.comparison_of_bounds(*compared, batch, keys, q_length)
        q_ids, kv_ids, *positions = compared

        def compare(m: Int32):
            # Read here and not once: scattered segments are rare, registers are too.
            ids = [kv_ids[batch, key] for key in keys]
            places = [Int32(0)] * ROWS_PER_THREAD
            if positions:
                q_positions, kv_positions = positions
                places = [kv_positions[batch, key] for key in keys]

            def seen(column: Int32) -> list[Boolean]:
                row = cutlass.min(m * self.config.tile_m + column, Int32(q_length) - 1)
                q_id, window = q_ids[batch, row], (None, None)
                if positions:
                    window = self.mask.limits(q_positions[batch, row] + offset)
                return [within(places[r], *window, q_id == ids[r]) for r in range(len(ids))]

            return seen

        return compare

    def comparison_of_bounds(self, lows, highs, batch: Int32, keys: list[Int32], q_length: Int32):
        """For tile m, a function of a column: whether its row's interval holds each key."""

        def compare(m: Int32):
            def seen(column: Int32) -> list[Boolean]:
                row = cutlass.min(m * self.config.tile_m + column, Int32(q_length) - 1)
                low, high = lows[batch, row], highs[batch, row]
                return [(key >= low) & (key < high) for key in keys]

            return seen

        return compare

    @cute.jit
    def mask_tile(
        self,
        apply: cutlass.Constexpr,
        ranges,
        m: Int32,
        is_masked: cutlass.Constexpr[bool],
    ):
        """``apply`` of a tile, where it may hide something."""
        if const_expr(self.union is not None):
            if not is_full(ranges, m):
                apply(m)
        elif const_expr(is_masked):
            apply(m)

    @cute.jit
    def apply_mask(
        self,
        scores: cute.Tensor,
        thread: Int32,
        row_limits: cutlass.Constexpr,
        compare: cutlass.Constexpr,
        m: Int32,
    ):
        """Hides the query columns of tile m outside the intervals of rows of each thread's key.

        Args:
          row_limits: gives the intervals of rows of a thread's key.
          compare: where ids may have to be compared, whether they have, and ``comparison``.
        """
        tile_m = self.config.tile_m
        if const_expr(compare is not None):
            compared = compared_words(compare[0], compare[1](m), thread, tile_m)
        for r in cutlass.range_constexpr(ROWS_PER_THREAD):
            words = interval_words(row_limits(r), m * tile_m, thread, tile_m)
            if const_expr(compare is not None):
                words = [w & c for w, c in zip(words, compared[r], strict=True)]
            hide_outside(scores, r, words)

    @cute.jit
    def query_gradient(
        self,
        mma_dq: cute.TiledMma,
        tQrA: cute.Tensor,
        tQrB: cute.Tensor,
        ds_stage: Int32,
        sdQ: cute.Tensor,
        thread: Int32,
        slab: Int32,
        shape: cutlass.Constexpr,
    ):
        """All of a tile's dQ = dS K, by the first warpgroup."""
        if slab == 0:
            acc_dQ = cute.make_rmem_tensor(mma_dq.partition_shape_C(shape), Float32)
            gemm(mma_dq, acc_dQ, tQrA[None, None, None, ds_stage], tQrB, False)
            warpgroup.wait_group(0)
            self.hand_over_dq(acc_dQ, sdQ, thread, slab)

    @cute.jit
    def hand_over_dq(self, acc_dQ: cute.Tensor, sdQ: cute.Tensor, thread: Int32, part: Int32):
        """Puts this warpgroup's dQ where the dQ warp takes it."""
        threads = 128 + 32
        values = cute.size(acc_dQ)
        flat = cute.make_tensor(acc_dQ.iterator, cute.make_layout((4, values // 4), stride=(1, 4)))
        cute.arch.barrier(barrier_id=DQ_EMPTY_BARRIER + part, number_of_threads=threads)
        cute.autovec_copy(flat, sdQ[None, thread, None, part])
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=DQ_FULL_BARRIER + part, number_of_threads=threads)
