"""The forward kernel on Hopper: O = softmax(scale Q K^T) V and the log-sum-exp of each row.

One producer warp feeds one to three consumer warpgroups through shared memory.  Each warpgroup
owns a slab of 64 query rows.  Without packing a slab is 64 tokens of one query head; with packing
it is 64 // G tokens of the G query heads that share a key/value head, row = token * G + head, so
that short queries of many heads still fill the rows.  Blocks are persistent: the producer draws
tiles from a counter (common/scheduler.py) and runs ahead into the next tile while the consumers
finish the last one.

Inside a warpgroup the product S = Q K^T of the next key tile is issued before O += P V of this
one, so softmax runs beside a product; between warpgroups named barriers make them take turns in
issuing products, so one's softmax runs beside the other's products.

Keys and values may lie in pages (common/paging.py): a tile is then several copies, of the part of
each page that it holds.  Pages too small for one warp to load by TMA are loaded by four, by TMA or
by copies of their threads: the producer warp and another load K, two more V; these three follow the
producer through its tiles.  Or the producer's three idle warps gather small pages into arrays as
the kernel goes (common/gathering.py), where many tiles visit them, and tiles are loaded from there.

Heads of a group that visit the same key tiles, by lists, may share what they load: two blocks of a
cluster take the same rows of two heads, and each loads half of a key tile for both.

With ``split_kv``, for queries that fill one row of tiles, a tile is also one of several parts of
its keys (common/splits.py).  Parts of one row go to scratch in float32 and a second kernel adds
them up (extra/combine.py), or, of few rows, the block that stores the last of them; where a row has
one part alone, the output is written at once.

    edge     producer             consumer                   stages     full      empty
    q        TMA, producer warp   every warpgroup            q_stages   1 + tx    4 W
    k        TMA, producer warp   every warpgroup            kv_stages  1 + tx    4 W
    v        TMA, producer warp   every warpgroup            kv_stages  1 + tx    4 W
    tile     producer warp        every warpgroup            2          1         4 W
    turn[w]  warpgroup w - 1      warpgroup w                named barrier 1 + w, 256 threads
    terms    warpgroup w          warpgroup w                named barrier 4 + w, 128 threads
    draw     first of a cluster   second one's producer      1          1         1
    lead     warpgroup 0          the others                 q_stages   4         -
    bias[w]  TMA, warp w + 1      warpgroup w                1            1 + tx  4
    part     a warpgroup          the same                   named barrier 1, 128 threads

"lead" comes with two query tiles in shared memory: the others' first product of a tile of work is
issued once warpgroup 0 has its own.  In step, all would do at once what no product runs beside: the
first softmax of a tile and its output.

There, too, rows are finished beside the last product, and O leaves through shared memory: each warp
writes its rows where their queries were, for TMA to store.  A query tile is given back once that
has been read, in the next tile of work; in the first one the second query tile is, which begins as
held.

"bias" is one over queries and keys, in shared memory (staged_bias.py); warps that load it take a
tile.

"terms" are what a score adds (added_terms.py), where it does.  Where some of it follows from the
key alone, two warps more arrive at k and take a tile.

Counts are arrivals; "+ tx" means that the barrier also waits for the copies' bytes; W is the
number of consumer warpgroups, of four warps each.  In a cluster k and v are empty after twice as
many arrivals, of both blocks.  Where four warps load pages, two arrive at k, two at v, and three
warps more take a tile.
"""

from functools import partial

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from jax_flashcute.bounds import RowBounds
from jax_flashcute.kernels.common.elements import Elements, sinks_among
from jax_flashcute.kernels.common.gathering import Gathering
from jax_flashcute.kernels.common.intervals import (
    IntervalMask,
    UnionMask,
    is_full,
    within,
)
from jax_flashcute.kernels.common.lengths import entry_lengths
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.packed import PackedMask
from jax_flashcute.kernels.common.paging import (
    begin_stage,
    begin_values,
    follow_tiles,
    tiles_in_pages,
)
from jax_flashcute.kernels.common.pipeline import TmaPipeline
from jax_flashcute.kernels.common.scheduler import (
    PairDraw,
    TileOrder,
    blocks_to_spread,
    draw_tile,
    ready_counters,
    section_size,
    spread_tile,
)
from jax_flashcute.kernels.common.softmax import OnlineSoftmax
from jax_flashcute.kernels.common.splits import is_last_part, split_range
from jax_flashcute.kernels.common.tiles import (
    by_head,
    clear_rows,
    slab_tma_layout,
    smem_layout,
    tma_partition,
)
from jax_flashcute.kernels.common.visits import KeyTiles, work_fields
from jax_flashcute.kernels.config.memory import round_up
from jax_flashcute.kernels.config.pages import shares_boxes
from jax_flashcute.kernels.config.sm90 import FEW_ROWS, FwdConfig, busy_producer
from jax_flashcute.kernels.elements import ElementFunctions
from jax_flashcute.kernels.extra.combine import Combine
from jax_flashcute.kernels.sm90.added_terms import (
    KEY_WARPS,
    AddedTerms,
    KeyTerms,
    NoTerms,
    WarpgroupTerms,
    clear_terms,
)
from jax_flashcute.kernels.sm90.fragments import (
    ADJACENT_COLUMNS,
    ROWS_PER_THREAD,
    as_operand_a,
    column_step,
    compared_words,
    convert_pairs,
    first_column,
    gemm,
    hide_outside,
    interval_words,
    own_bits,
    row_in_slab,
    rows_and_columns,
    tiled_mma,
)
from jax_flashcute.kernels.sm90.output import SlabOutput, SlabRows
from jax_flashcute.kernels.sm90.staged_bias import BiasTile, StagedBias

TURN_BARRIER = 1
# Of split-KV's one consumer warpgroup, which takes no turns.
PART_BARRIER = 1
TILE_STAGES = 2


class ForwardSm90(KeyTiles):
    """Compiles to one kernel for all batch sizes, lengths and head counts of a plan."""

    def __init__(
        self,
        config: FwdConfig,
        dtype,
        head_dim: int,
        head_dim_v: int,
        group: int,
        pack_gqa: bool,
        scale: float,
        mask: IntervalMask | UnionMask,
        num_sms: int,
        split_kv: bool = False,
        lengths_vary: bool = False,
        functions: ElementFunctions | None = None,
        page_size: int | None = None,
        row_bounds: RowBounds | None = None,
        has_lists: bool = False,
        packed_mask: str | None = None,
    ):
        """``group``: query heads a key/value head serves; ``num_sms``: blocks to launch at most;
        ``split_kv``: tiles are parts of a row's keys, and queries fill one row of tiles;
        ``lengths_vary``: how long these are follows from the lengths of all entries;
        ``page_size``: of keys and values in pages, with a page table and lengths of keys;
        ``row_bounds``: each row's keys stand in arrays, ``mask`` among what they hold;
        ``has_lists``: a tile visits the key tiles that lists name; ``packed_mask``: the axes along
        which a mask in bits varies, of "bnt"."""
        self.config = config
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.heads_packed = group if pack_gqa else 1
        self.heads_per_kv = 1 if pack_gqa else group
        self.scale = scale
        self.mask = mask
        self.num_sms = num_sms
        self.split_kv = split_kv
        self.lengths_vary = lengths_vary
        self.row_bounds = row_bounds
        self.compares_ids = row_bounds is not None and row_bounds.compares_ids
        self.has_lists = has_lists
        # Positions cut tiles of most rows, then; where nothing but lengths does, few.
        self.splits_partial = isinstance(mask, IntervalMask) and mask.is_open
        self.packed_mask = packed_mask
        self.union = mask if isinstance(mask, UnionMask) else None
        # With ``split_kv`` two more: which part of a row's keys it is, and of how many; where ids
        # are compared, one more: whether this tile's have to be.
        self.own_field = work_fields(mask)
        self.work_fields = self.own_field + 2 * split_kv + self.compares_ids
        self.has_low = row_bounds is not None
        if isinstance(mask, IntervalMask):
            self.has_low |= mask.low is not None
        self.functions = functions
        self.page_size = page_size
        self.kv_tiles = tiles_in_pages(
            None if config.gathers_pages else page_size,
            config.tile_n,
            cluster=config.cluster,
            columns_first=True,
            shares_boxes=page_size is not None and shares_boxes(page_size, head_dim, head_dim_v),
            read_once=config.reads_keys_once,
        )
        self.copying_warps = self.kv_tiles.copying_warps
        # Of warps that load V by TMA.
        self.tail_barriers = 1 if self.kv_tiles.threads_copy else max(self.copying_warps, 1)
        in_order = not (split_kv or has_lists or self.union)
        self.added = self.added_terms(in_order)
        self.has_key_terms = self.added is not None and self.added.is_staged
        # Such calls wait for memory.
        self.spreads_tiles = split_kv or config.reads_keys_once
        # What products add they add to all rows.
        self.has_few_rows = config.query_rows <= FEW_ROWS and self.added is None
        self.rows_per_thread = 1 if self.has_few_rows else ROWS_PER_THREAD
        if self.has_key_terms:
            self.config = config = busy_producer(config)
        self.changes_scores = functions is not None and functions.changes_scores
        self.changes_scores &= self.added is None
        self.by_element = self.changes_scores or (functions is not None and functions.hides)
        self.staged_bias = None
        if config.bias_itemsize and functions is not None and functions.bias is not None:
            self.staged_bias = StagedBias(functions.bias, config)
        self.has_sinks = functions is not None and functions.sinks
        self.has_mask_mod = functions is not None and functions.mask_mod is not None
        self.smem_h = round_up(head_dim, 16)
        self.smem_hv = round_up(head_dim_v, 16)
        self.slab_tokens = 64 // self.heads_packed
        self.tile_tokens = self.slab_tokens * config.warpgroups
        self.consumer_threads = 128 * config.warpgroups
        self.consumer_warps = 4 * config.warpgroups
        self.takes_turns = config.takes_turns and config.warpgroups > 1
        self.leads = config.q_stages > 1 and config.warpgroups > 1
        # Where a warp's 16 rows are whole tokens, and of O as wide as of Q.
        self.stages_output = self.leads and not (split_kv or self.has_sinks)
        self.stages_output &= self.smem_h == self.smem_hv and 16 % self.heads_packed == 0
        self.output = SlabOutput(self.dtype, head_dim_v, self.heads_packed, config, self.smem_hv)
        self.combine = Combine(self.dtype, head_dim_v, self.splits_of_entry)

    def added_terms(self, in_order: bool) -> AddedTerms | None:
        """What scores add, where that is done by a product; None for nothing."""
        if self.functions is None:
            return None
        packed = self.heads_packed > 1
        has_idle_warp = self.copying_warps == 0
        added = AddedTerms(self.functions, self.config, self.scale, packed, in_order, has_idle_warp)
        return added if added.serves(self.head_dim, self.head_dim_v) else None

    # ---- host side -------------------------------------------------------------------------

    @cute.jit
    def __call__(
        self,
        stream: cuda.CUstream,
        mQ: cute.Tensor,  # (B, T, N, H)
        mK: cute.Tensor,  # (B, S, K, H), or (num_pages, page_size, K, H)
        mV: cute.Tensor,  # (B, S, K, Hv), or (num_pages, page_size, K, Hv)
        mQOffset: cute.Tensor | None,  # (B,) int32
        mQLengths: cute.Tensor | None,  # (B,) int32
        mKVLengths: cute.Tensor | None,  # (B,) int32
        mO: cute.Tensor,  # (B, T, N, Hv)
        mLSE: cute.Tensor,  # (B, T, N) float32
        mCounter: cute.Tensor,  # (1,) int32, scratch
        mOPartial: cute.Tensor | None = None,  # (splits, B, T, N, Hv) float32, scratch
        mLSEPartial: cute.Tensor | None = None,  # (splits, B, T, N) float32, scratch
        mStored: cute.Tensor | None = None,  # (B, heads of tiles) int32, scratch
        mElements: tuple = (),  # arrays of ``functions``
        mPageTable: cute.Tensor | None = None,  # (B, max_pages) int32
        mBounds: tuple = (),  # arrays of ``bounds.key_bound_arrays``
        mLists: tuple = (),  # arrays of ``BlockMask.kernel_lists``
        mPacked: tuple = (),  # a mask in bits, (1|B, 1|N, 1|T, words) uint32
        mGathered: tuple = (),  # arrays of ``config.pages.gathered_shapes``, scratch
    ):
        batch, q_length, kv_length, kv_heads = (
            mQ.shape[0],
            mQ.shape[1],
            mK.shape[1],
            mK.shape[2],
        )
        if const_expr(self.page_size is not None):
            kv_length = mPageTable.shape[1] * self.page_size
        q_tensor = by_head(mQ, self.head_dim, self.heads_packed)
        tiled_k, tiled_v, gathered = mK, mV, ()
        if const_expr(self.config.gathers_pages):
            tiled_k, tiled_v, _ = mGathered
            gathered = (mK, mV, *mGathered)
        k_tensor = by_head(tiled_k, self.head_dim, 1)
        v_tensor = by_head(tiled_v, self.head_dim_v, 1)
        load = cpasync.CopyBulkTensorTileG2SOp()
        q_box = (self.heads_packed, self.slab_tokens, self.smem_h)
        tma_q = cpasync.make_tiled_tma_atom(
            load,
            q_tensor,
            slab_tma_layout(self.dtype, 64, self.smem_h, self.heads_packed, self.slab_tokens),
            q_box,
        )
        tma_k = self.kv_tiles.source(self.dtype, k_tensor, self.smem_h)
        tma_v = self.kv_tiles.source(self.dtype, v_tensor, self.smem_hv)

        tma_b: tuple = (None, None)
        if const_expr(self.staged_bias is not None):
            tma_b = self.staged_bias.source(Elements(self.functions, mElements).bias)
        tma_o: tuple = (None, None)
        if const_expr(self.stages_output):
            tma_o = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileS2GOp(),
                by_head(mO, self.head_dim_v, self.heads_packed),
                self.output.warp_rows(),
                self.output.warp_box,
            )

        m_blocks = cute.ceil_div(q_length, self.tile_tokens)
        kv_bytes_per_key = (self.head_dim + self.head_dim_v) * 2
        # Tiles of equal length go head by head: neighbours read the same keys at the same time,
        # and L2 serves them together.  Tiles of unequal length go longest first over many heads.
        section = Int32(1)
        if const_expr(self.mask.is_staircase):
            section = section_size(kv_length, kv_bytes_per_key, kv_heads, batch)
        num_tiles = m_blocks * kv_heads * batch * self.heads_per_kv
        if const_expr(self.split_kv):
            num_tiles = num_tiles * mOPartial.shape[0]
        if const_expr(self.spreads_tiles):
            blocks = blocks_to_spread(num_tiles, self.num_sms)
        else:
            most = self.num_sms - self.num_sms % self.config.cluster
            blocks = cutlass.min(num_tiles, Int32(most))
        mCounts = mGathered[2] if const_expr(self.config.gathers_pages) else mStored
        follows = ready_counters(mCounter, mCounts, blocks, num_tiles, stream)
        self.kernel(
            *tma_q,
            *tma_k,
            *tma_v,
            *tma_b,
            *tma_o,
            mQOffset,
            mQLengths,
            mKVLengths,
            mO,
            mLSE,
            mCounter,
            mOPartial,
            mLSEPartial,
            mStored,
            mElements,
            mPageTable,
            mBounds,
            mLists,
            mPacked,
            gathered,
            m_blocks,
            section,
            q_length,
            kv_length,
            kv_heads,
            batch,
        ).launch(
            grid=[blocks, 1, 1],
            block=[self.consumer_threads + 128, 1, 1],
            cluster=[self.config.cluster, 1, 1] if self.config.cluster > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=follows,
        )
        if const_expr(self.split_kv and not self.config.joins_parts):
            self.combine.launch(
                stream, (mQOffset, mQLengths, mKVLengths), kv_length, mOPartial, mLSEPartial, mO,
                mLSE, sinks_among(self.functions, mElements),
            )  # fmt: skip

    def shared_storage(self):
        cfg = self.config
        kv_words, work_fields = 2 * cfg.kv_stages, self.work_fields
        q_words, leads = 2 * cfg.q_stages, cfg.q_stages * self.leads
        draws = int(cfg.cluster > 1)
        bias_words = 0 if self.staged_bias is None else self.staged_bias.barriers

        def aligned(elements):
            return cute.struct.Align[cute.struct.MemRange[self.dtype, elements], 1024]

        @cute.struct
        class SharedStorage:
            q_barriers: cute.struct.MemRange[Int64, q_words]
            k_barriers: cute.struct.MemRange[Int64, kv_words]
            v_barriers: cute.struct.MemRange[Int64, kv_words]
            tile_barriers: cute.struct.MemRange[Int64, 2 * TILE_STAGES]
            tail_barriers: cute.struct.MemRange[Int64, self.tail_barriers]
            bias_barriers: cute.struct.MemRange[Int64, bias_words]
            lead_barrier: cute.struct.MemRange[Int64, leads]
            draw_barriers: cute.struct.MemRange[Int64, draws * 2]
            draw_slot: cute.struct.MemRange[Int32, draws]
            work: cute.struct.MemRange[Int32, work_fields * TILE_STAGES]
            part_slot: cute.struct.MemRange[Int32, int(cfg.joins_parts)]
            sQ: aligned(cfg.q_stages * cfg.tile_m * self.smem_h)
            sK: aligned(cfg.kv_stages * cfg.tile_n * self.smem_h)
            sV: aligned(cfg.kv_stages * cfg.tile_n * self.smem_hv)

        return SharedStorage

    def columns_first(self, head_dim: int) -> bool:
        """Whether tiles of K or V are such a ``smem_layout``."""
        return self.kv_tiles.columns_first(self.dtype, head_dim, round_up(head_dim, 16))

    def key_layout(self, head_dim: int):
        """Tiles of K or V in shared memory, the stage last."""
        return smem_layout(
            *(self.dtype, self.config.tile_n, round_up(head_dim, 16), self.config.kv_stages),
            columns_first=self.columns_first(head_dim),
        )

    # ---- device side -----------------------------------------------------------------------

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        gQ: cute.Tensor,
        tma_k: cute.CopyAtom | None,
        gK: cute.Tensor,
        tma_v: cute.CopyAtom | None,
        gV: cute.Tensor,
        tma_b: cute.CopyAtom | None,
        gB: cute.Tensor | None,
        tma_o: cute.CopyAtom | None,
        gO: cute.Tensor | None,
        mQOffset: cute.Tensor | None,
        mQLengths: cute.Tensor | None,
        mKVLengths: cute.Tensor | None,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mCounter: cute.Tensor,
        mOPartial: cute.Tensor | None,
        mLSEPartial: cute.Tensor | None,
        mStored: cute.Tensor | None,
        mElements: tuple,
        mPageTable: cute.Tensor | None,
        mBounds: tuple,
        mLists: tuple,
        mPacked: tuple,
        gathered: tuple,
        m_blocks: Int32,
        section: Int32,
        q_length: Int32,
        kv_length: Int32,
        kv_heads: Int32,
        batch: Int32,
    ):
        cfg = self.config
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        allocator = SmemAllocator()
        storage = allocator.allocate(self.shared_storage())
        term_operands: tuple = () if self.added is None else self.added.allocate(allocator)
        bias, sB, bias_pipelines = self.staged_bias, None, []
        if const_expr(bias is not None):
            sB = bias.allocate(allocator, Elements(self.functions, mElements).bias.element_type)
            bias_pipeline = partial(
                bias.pipeline, storage.bias_barriers.data_ptr(), sB.element_type
            )
            bias_pipelines = [bias_pipeline(slab) for slab in range(cfg.warpgroups)]
        h_bytes, hv_bytes = self.smem_h * 2, self.smem_hv * 2
        slab_rows = self.heads_packed * self.slab_tokens
        key_warps = KEY_WARPS if self.has_key_terms else 0
        pipeline_q = TmaPipeline(
            "q",
            storage.q_barriers.data_ptr(),
            cfg.q_stages,
            cfg.warpgroups * slab_rows * h_bytes,
            self.consumer_warps,
        )
        pipeline_k = TmaPipeline(
            "k",
            storage.k_barriers.data_ptr(),
            cfg.kv_stages,
            cfg.tile_n * h_bytes // max(self.copying_warps, 1),
            self.consumer_warps,
            self.copying_warps,
            cfg.cluster,
            also_filling=key_warps,
            threads_copy=self.kv_tiles.threads_copy,
        )
        pipeline_v = TmaPipeline(
            "v",
            storage.v_barriers.data_ptr(),
            cfg.kv_stages,
            cfg.tile_n * hv_bytes // max(self.copying_warps, 1),
            self.consumer_warps,
            self.copying_warps,
            cfg.cluster,
            threads_copy=self.kv_tiles.threads_copy,
        )
        # One of those that copy K draws the tiles of work.
        following_warps = max(2 * self.copying_warps - 1, 0) + key_warps + len(bias_pipelines)
        pipeline_tile = TmaPipeline(
            "tile",
            storage.tile_barriers.data_ptr(),
            TILE_STAGES,
            0,
            self.consumer_warps + following_warps,
        )
        pipelines = (pipeline_q, pipeline_k, pipeline_v, pipeline_tile)
        pair = None
        if const_expr(cfg.cluster > 1):
            pair = PairDraw(storage.draw_barriers.data_ptr(), storage.draw_slot.data_ptr())
        if warp_index == 0:
            for atom in (tma_q, tma_k, tma_v, tma_b, tma_o):
                if const_expr(atom is not None):
                    cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                for pipeline in (*pipelines, *bias_pipelines):
                    pipeline.init()
                for warp in range(self.tail_barriers):
                    cute.arch.mbarrier_init(storage.tail_barriers.data_ptr() + warp, 1)
                if const_expr(self.leads):
                    for stage in range(cfg.q_stages):
                        cute.arch.mbarrier_init(storage.lead_barrier.data_ptr() + stage, 4)
                if const_expr(pair is not None):
                    pair.init()
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(pair is not None):
            # Nothing may reach the other block before its barriers are there.
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()

        # One slab of Q per warpgroup and stage; the slab is the last mode.
        q_layout = smem_layout(self.dtype, 64, self.smem_h, cfg.warpgroups * cfg.q_stages)
        k_layout, v_layout = self.key_layout(self.head_dim), self.key_layout(self.head_dim_v)
        sQ = storage.sQ.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sK = storage.sK.get_tensor(k_layout.outer, swizzle=k_layout.inner)
        sV = storage.sV.get_tensor(v_layout.outer, swizzle=v_layout.inner)

        order = TileOrder(m_blocks, kv_heads, batch, self.heads_per_kv, section)
        work = storage.work.get_tensor(cute.make_layout((self.work_fields, TILE_STAGES)))
        lengths = partial(entry_lengths, mQOffset, mQLengths, mKVLengths, q_length, kv_length)
        if const_expr(self.split_kv):
            length_arrays = (mQOffset, mQLengths, mKVLengths)
            order = self.split_order(lengths, length_arrays, kv_heads, batch, mOPartial.shape)

        gathering = None
        if const_expr(cfg.gathers_pages):
            gathering = Gathering(
                *(gathered[:2], gathered[2:4], gathered[4], mPageTable),
                *(self.page_size, (self.head_dim, self.head_dim_v), cfg.tile_n, section),
                loads_at_once=8 if cfg.producer_registers >= 56 else 2,
            )
        if warp_index < 4:
            if const_expr(cfg.reallocates_registers):
                cute.arch.setmaxregister_decrease(cfg.producer_registers)
            if warp_index == 0:
                self.produce(
                    (tma_q, gQ, sQ),
                    (tma_k, gK, sK),
                    (tma_v, gV, sV),
                    pipelines,
                    storage.tail_barriers.data_ptr(),
                    work,
                    (mCounter, pair),
                    mPageTable,
                    order,
                    lengths,
                    mKVLengths is not None,
                    mBounds,
                    mLists,
                    gathering,
                )
            elif const_expr(gathering is not None):
                gathering.gather(lengths)
            elif const_expr(self.has_key_terms):
                if warp_index <= KEY_WARPS:
                    place = (mElements, (q_length, kv_length))
                    warp = warp_index - 1
                    self.write_key_terms(term_operands[1], *place, pipelines, work, warp)
            elif const_expr(bias is not None):
                if warp_index <= cfg.warpgroups:
                    slab = warp_index - 1
                    pipelines_b = (bias_pipeline(slab), pipeline_tile)
                    self.load_bias((tma_b, gB, sB), pipelines_b, work, mLists, slab)
            elif const_expr(following_warps):
                _, pipeline_k, pipeline_v, pipeline_tile = pipelines
                for copies_v in cutlass.range_constexpr(2):
                    first = copies_v * self.copying_warps
                    if first <= warp_index and warp_index < first + self.copying_warps:
                        values = None
                        if const_expr(copies_v and not self.kv_tiles.threads_copy):
                            warp = warp_index - first
                            tail = storage.tail_barriers.data_ptr() + warp
                            values = (sV, self.smem_hv, tail, warp)
                        follow_tiles(
                            partial(
                                self.take_work,
                                work,
                                pipeline_tile,
                                warps=following_warps,
                                role="following",
                            ),
                            partial(
                                self.one_loader,
                                *((tma_k, gK, sK), (tma_v, gV, sV), mPageTable),
                                *(warp_index - first, copies_v),
                            ),
                            self.heads_per_kv,
                            partial(self.key_order, lists=None),
                            self.kv_tiles,
                            (pipeline_v if copies_v else pipeline_k, pipeline_tile),
                            values,
                        )
        else:
            if const_expr(cfg.reallocates_registers):
                cute.arch.setmaxregister_increase(cfg.consumer_registers)
            if const_expr(self.split_kv and not cfg.joins_parts):
                if warp_index == 4:
                    # The parts' sum may be made ready while the last of them are computed.
                    cute.arch.griddepcontrol_wait()
                    cute.arch.griddepcontrol_launch_dependents()
            self.consume(
                sQ,
                sK,
                sV,
                term_operands,
                (sB, storage.bias_barriers.data_ptr()),
                (tma_o, gO),
                mO,
                mLSE,
                mOPartial,
                mLSEPartial,
                pipelines,
                storage.lead_barrier.data_ptr() if const_expr(self.leads) else None,
                work,
                (q_length, kv_length),
                mQLengths is not None,
                mElements,
                mBounds,
                mLists,
                mPacked,
                (mStored, storage.part_slot),
            )
        if const_expr(pair is not None):
            # Nor after a block is gone.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        for pipeline in pipelines:
            pipeline.check_arrivals()

    @cute.jit
    def produce(
        self,
        q_copy,
        k_copy,
        v_copy,
        pipelines,
        tail_barrier,
        work: cute.Tensor,
        draws,
        mPageTable: cute.Tensor | None,
        order: cutlass.Constexpr,
        lengths: cutlass.Constexpr,
        has_kv_lengths: cutlass.Constexpr[bool],
        mBounds: tuple,
        mLists: tuple,
        gathering: Gathering | None,
    ):
        """The producer warp: draws tiles and loads their Q, K and V."""
        cfg = self.config
        pipeline_q, pipeline_k, pipeline_v, pipeline_tile = pipelines
        tma_q, gQ, sQ = q_copy
        sV = v_copy[2]
        q_box = (self.heads_packed, self.slab_tokens, self.smem_h)
        slabs = cfg.warpgroups * cfg.q_stages
        # (heads, tokens, columns, slab): the slabs as TMA writes them.
        slab = slab_tma_layout(self.dtype, 64, self.smem_h, self.heads_packed, self.slab_tokens)
        sQ_tma = cute.make_tensor(
            sQ.iterator,
            cute.append(slab.outer, cute.make_layout(slabs, stride=64 * self.smem_h)),
        )
        if const_expr(self.slab_tokens * self.heads_packed < 64):
            # Rows of a slab that no token fills: TMA leaves them alone, and products read them.
            for w in cutlass.range_constexpr(slabs):
                clear_rows(sQ, self.smem_h, Int32(w), Int32(self.slab_tokens * self.heads_packed))
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
        if const_expr(gathering is not None):
            # What is gathered is counted from 0 once the kernel before this one is done.
            cute.arch.griddepcontrol_wait()
        if const_expr(self.spreads_tiles):
            tile = spread_tile(self.num_sms)
        else:
            tile = Int32(cute.arch.block_idx()[0])
        q_stage = Int32(0)
        q_phase, k_stage, k_phase, v_stage, v_phase, t_stage, t_phase, tail_phase, draw_phase = (
            Int32(0) for _ in range(9)
        )
        # Which part a tile is, and whether it is one at all, is found at once.
        place_of_part = tuple(Int32(0) for _ in range(5))
        if const_expr(self.split_kv):
            place_of_part = order.coordinates(tile)
        while (
            place_of_part[2] < order.batch if const_expr(self.split_kv) else tile < order.num_tiles
        ):
            part = ()
            if const_expr(self.split_kv):
                m_block = Int32(0)
                head, kv_head, batch = place_of_part[:3]
                part = place_of_part[3:]
            else:
                m_block, head, kv_head, batch = order.coordinates(tile)
            offset, queries, keys = lengths(batch)
            visited = self.visited_tiles(m_block, batch, (offset, queries, keys), mBounds)
            n_min, n_max = visited[:2]
            if const_expr(self.split_kv):
                n_min, n_max = split_range(n_min, n_max, *part)
            lists = self.lists_of(mLists, (m_block, head, batch, offset, queries))
            if const_expr(lists is not None):
                # Read ahead of time for the consumers too; a range has no use here.
                n_min, n_max = lists.partial_count, lists.full_count
            pipeline_tile.acquire(t_stage, t_phase)
            fields = (m_block, head, batch, offset, queries, keys, n_min, n_max, *visited[2:])
            self.write_work(work[None, t_stage], fields + part)
            pipeline_tile.commit(t_stage)
            t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
            gQ_tile = cute.local_tile(
                gQ[None, None, None, head, batch], q_box, (0, None, 0)
            )  # (heads, tokens, columns, slabs)
            tQsQ, tQgQ = tma_partition(tma_q, sQ_tma, gQ_tile)
            visits, nth = self.key_order(fields, lists)
            locate, load_k, load_v = self.loaders(
                k_copy, v_copy, mPageTable, Int32(0), kv_head, batch, keys
            )
            ready = Int32(0)
            if const_expr(gathering is not None):
                ready = gathering.first_known(batch, kv_head)
            await_tile = partial(self.await_gathered, gathering, batch, kv_head)
            # The consumers take K of the next tile before V of this one: load in that order, and
            # the first K before Q, whose place, if it has but one, is given back late.
            # Where tiles lie comes from memory, and is asked for ahead of time.
            n, following = Int32(0), Int32(0)
            place = following_place = self.kv_tiles.nowhere
            if visits > 0:
                n = nth(0)
                place = locate(n)
                ready = await_tile(ready, n)
                following = nth(cutlass.min(Int32(1), visits - 1))
                following_place = locate(following)
                ready = await_tile(ready, following)
                pipeline_k.acquire(k_stage, k_phase)
                begin_stage(pipeline_k, self.kv_tiles, load_k, n, place, k_stage)
                k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
            # The consumers begin by giving the second tile back.
            held = q_stage if const_expr(self.stages_output) else 0
            pipeline_q.acquire(q_stage, q_phase ^ held)
            pipeline_q.expect(q_stage)
            for w in cutlass.range_constexpr(cfg.warpgroups):
                cute.copy(
                    tma_q,
                    tQgQ[None, m_block * cfg.warpgroups + w],
                    tQsQ[None, q_stage * cfg.warpgroups + w],
                    tma_bar_ptr=pipeline_q.full + q_stage,
                )
            q_stage, q_phase = pipeline_q.advance(q_stage, q_phase)
            for i in cutlass.range(visits, unroll=1):
                ahead = nth(cutlass.min(i + 2, visits - 1))
                ahead_place = locate(ahead)
                ready = await_tile(ready, ahead)
                if i + 1 < visits:
                    pipeline_k.acquire(k_stage, k_phase)
                    begin_stage(
                        pipeline_k, self.kv_tiles, load_k, following, following_place, k_stage
                    )
                    k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
                else:
                    tile = self.draw(draws, order.num_tiles, draw_phase)
                # Other warps copy V, if threads do.
                if const_expr(self.copying_warps == 0):
                    pipeline_v.acquire(v_stage, v_phase)
                    tail_phase = begin_values(
                        *(pipeline_v, self.kv_tiles, load_v, n, place, v_stage),
                        (sV, self.smem_hv),
                        keys,
                        (tail_barrier, tail_phase),
                        has_kv_lengths,
                        self.has_lists,
                        self.columns_first(self.head_dim_v),
                    )
                    v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)
                n, place = following, following_place
                following, following_place = ahead, ahead_place

            if visits <= 0:
                tile = self.draw(draws, order.num_tiles, draw_phase)
            draw_phase ^= 1
            tile = cute.arch.shuffle_sync(tile, 0)
            if const_expr(self.split_kv):
                place_of_part = order.coordinates(tile)

        pipeline_tile.acquire(t_stage, t_phase)
        self.write_work(work[None, t_stage], (Int32(-1),) * self.work_fields)
        pipeline_tile.commit(t_stage)

    def await_gathered(self, gathering, batch: Int32, kv_head: Int32, ready: Int32, n: Int32):
        """``Gathering.wait``, where pages are gathered."""
        return ready if gathering is None else gathering.wait(batch, kv_head, ready, n)

    def draw(self, draws, num_tiles: Int32, phase: Int32) -> Int32:
        """The next tile, in lane 0 alone; ``phase``: 0 and 1 in turn."""
        mCounter, pair = draws
        if pair is None:
            return draw_tile(mCounter, num_tiles)
        return pair.draw(mCounter, num_tiles, phase)

    @cute.jit
    def write_key_terms(
        self,
        sY: cute.Tensor,
        mElements: tuple,
        array_lengths: tuple,
        pipelines,
        work: cute.Tensor,
        warp: Int32,
    ):
        """A warp beside the producer: what scores add by key, for its part of each tile of keys."""
        _, pipeline_k, _, pipeline_tile = pipelines
        take = partial(self.take_work, work, pipeline_tile, warps=KEY_WARPS, role="key terms")
        clear_terms(self.added, sY, warp)
        stage, phase, t_stage, t_phase = (Int32(0) for _ in range(4))
        fields = take(t_stage, t_phase)
        while fields[0] >= 0:
            t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
            m_block, head, batch, offset = fields[:4]
            elements = Elements(self.functions, mElements)
            of_entry = elements.of_entry(batch, offset, array_lengths)
            reference = m_block * self.tile_tokens + offset
            terms = KeyTerms(self.added, of_entry, head, reference, warp)
            visits, nth = self.key_order(fields, None)
            for i in cutlass.range(visits, unroll=1):
                found = terms.read(nth(i))
                pipeline_k.acquire(stage, phase)
                terms.write(found, sY, nth(i), stage)
                pipeline_k.commit(stage)
                stage, phase = pipeline_k.advance(stage, phase)
            fields = take(t_stage, t_phase)

    @cute.jit
    def load_bias(
        self,
        copy: tuple,
        pipelines: tuple,
        work: cute.Tensor,
        mLists: tuple,
        slab: Int32,
    ):
        """A warp beside the producer: a warpgroup's rows of the bias, for each tile of keys."""
        pipeline, pipeline_tile = pipelines
        warps = self.config.warpgroups
        take = partial(self.take_work, work, pipeline_tile, warps=warps, role="bias")
        phase, t_stage, t_phase = (Int32(0) for _ in range(3))
        fields = take(t_stage, t_phase)
        while fields[0] >= 0:
            t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
            lists = self.lists_of(mLists, fields, counts=fields[6:8])
            visits, nth = self.key_order(fields, lists)
            load = self.staged_bias.loader(copy, fields[:3], slab)
            for i in cutlass.range(visits, unroll=1):
                n = nth(i)
                pipeline.acquire(Int32(0), phase)
                pipeline.expect(Int32(0))
                load(n, pipeline.full)
                phase = phase ^ 1
            fields = take(t_stage, t_phase)

    @cute.jit
    def write_work(self, slot: cute.Tensor, fields: tuple):
        """Leaves a tile's coordinates and ranges for the consumers; one warp."""
        if cute.arch.lane_idx() == 0:
            for i in cutlass.range_constexpr(len(fields)):
                slot[i] = fields[i]
        cute.arch.sync_warp()

    @cute.jit
    def take_work(
        self,
        work: cute.Tensor,
        pipeline: TmaPipeline,
        stage: Int32,
        phase: Int32,
        warps: cutlass.Constexpr[int],
        role: cutlass.Constexpr[str] = "consumer",
    ):
        """What the producer left: m_block (negative at the end), head, batch, ..."""
        pipeline.wait(stage, phase)
        fields = [work[i, stage] for i in range(self.work_fields)]
        cute.arch.sync_warp()
        pipeline.release(stage, warps, role)
        return tuple(fields)

    @cute.jit
    def consume(
        self,
        sQ: cute.Tensor,
        sK: cute.Tensor,
        sV: cute.Tensor,
        term_operands: tuple,
        bias_tiles: tuple,
        o_copy: tuple,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mOPartial: cute.Tensor | None,
        mLSEPartial: cute.Tensor | None,
        pipelines,
        lead_barrier,
        work: cute.Tensor,
        array_lengths: tuple,
        has_query_lengths: cutlass.Constexpr[bool],
        mElements: tuple,
        mBounds: tuple,
        mLists: tuple,
        mPacked: tuple,
        stored: tuple,
    ):
        """A consumer warpgroup: products, softmax and output of its slab of every tile."""
        cfg = self.config
        pipeline_q, pipeline_k, pipeline_v, pipeline_tile = pipelines
        warps = self.consumer_warps
        q_length, kv_length = array_lengths
        thread = cute.arch.thread_idx()[0] % 128
        slab = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128 - 1)

        mma_qk = tiled_mma(self.dtype, cfg.tile_n, OperandMajorMode.K, warpgroup.OperandSource.SMEM)
        mma_pv = tiled_mma(
            self.dtype, self.smem_hv, OperandMajorMode.MN, warpgroup.OperandSource.RMEM
        )
        wg_qk, wg_pv = mma_qk.get_slice(0), mma_pv.get_slice(0)
        slabs = cute.logical_divide(sQ, (None, None, cfg.warpgroups))
        tSrQ = mma_qk.make_fragment_A(wg_qk.partition_A(slabs[None, None, (slab, None)]))
        tSrK = mma_qk.make_fragment_B(wg_qk.partition_B(sK))
        sVt = cute.make_tensor(
            sV.iterator, cute.select(sV.layout, mode=[1, 0, 2])
        )  # (columns, keys, stages)
        tOrV = mma_pv.make_fragment_B(wg_pv.partition_B(sVt))
        acc_S = cute.make_rmem_tensor(mma_qk.partition_shape_C((64, cfg.tile_n)), Float32)
        acc_O = cute.make_rmem_tensor(mma_pv.partition_shape_C((64, self.smem_hv)), Float32)
        rP = cute.make_rmem_tensor(cute.make_layout(cute.size(acc_S)), self.dtype)
        tOrP = as_operand_a(rP)
        scores = rows_and_columns(acc_S, self.rows_per_thread)
        out = rows_and_columns(acc_O, self.rows_per_thread)
        # All scores of a tile may be -inf.
        may_hide = const_expr(self.by_element or self.packed_mask is not None)
        # Scores that are changed one by one are scaled there.
        scale = 1.0 if self.changes_scores else self.scale
        softmax = OnlineSoftmax(
            *(self.rows_per_thread, scale, cfg.rescale_threshold),
            any_scores=self.changes_scores or self.added is not None,
        )
        row_scale = cute.make_rmem_tensor(self.rows_per_thread, Float32)
        lse = cute.make_rmem_tensor(self.rows_per_thread, Float32)

        who = (slab, thread)
        bias_tile = None
        if const_expr(self.staged_bias is not None):
            bias_tile = BiasTile(self.staged_bias, bias_tiles, slab, thread)

        finish = partial(self.output.finish, softmax, row_scale, lse, mLSE)

        if const_expr(self.takes_turns):
            # Warpgroup 0 goes first.
            if slab == cfg.warpgroups - 1:
                self.pass_turn(slab)

        q_stage, q_phase, k_stage, k_phase, v_stage, v_phase, t_stage, t_phase, b_phase = (
            Int32(0) for _ in range(9)
        )
        fields = self.take_work(work, pipeline_tile, t_stage, t_phase, warps)
        while fields[0] >= 0:
            t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
            m_block, head, batch, offset, queries, keys = fields[:6]
            first_token = (m_block * cfg.warpgroups + slab) * self.slab_tokens
            row_limits = partial(self.row_limits, thread, first_token + offset, keys)
            compare = None
            if const_expr(self.row_bounds is not None):
                tokens = self.clamped_tokens(thread, first_token, q_length)
                row_limits = self.listed_limits(mBounds, batch, tokens)
                if const_expr(self.compares_ids):
                    compare = (
                        fields[self.own_field],
                        self.comparison(mBounds, batch, tokens, array_lengths, offset),
                    )
            mask_tile = partial(self.apply_mask, scores, thread, row_limits, compare)
            if const_expr(self.union is not None):
                mask_tile = partial(self.unless_full, self.ranges_of(fields), mask_tile)
            modify = self.element_step(
                *(mElements, scores, thread, bias_tile),
                (batch, offset, array_lengths, first_token, head),
            )
            terms = self.terms_step(
                mElements,
                term_operands,
                who,
                (batch, offset, array_lengths, first_token, head),
            )
            read_bits, hide_bits = self.packed_step(
                mPacked, scores, thread, (batch, head, first_token, q_length)
            )
            rows = SlabRows(batch, head, first_token, queries, q_length, thread, self.heads_packed)
            softmax.reset()
            pipeline_q.wait(q_stage, q_phase)
            lists = self.lists_of(mLists, fields, counts=fields[6:8])
            visits, nth = self.key_order(fields, lists)
            if visits > 0:
                # S of the first tile (of a range, the rightmost), alone.
                n = nth(0)
                bits = read_bits(n)
                pipeline_k.wait(k_stage, k_phase)
                terms.start()
                if const_expr(self.leads):
                    if slab > 0:
                        cute.arch.mbarrier_wait(lead_barrier + q_stage, q_phase)
                self.take_turn(slab)
                ends = not terms.multiplies(terms.of_first)
                gemm(
                    mma_qk,
                    acc_S,
                    tSrQ[None, None, None, q_stage],
                    tSrK[None, None, None, k_stage],
                    False,
                    ends=ends,
                )
                terms.multiply(acc_S, k_stage, terms.of_first)
                self.pass_turn(slab)
                shifts, varies = terms.shifts(n, terms.of_first)
                terms.prepare(n, terms.of_first)
                warpgroup.wait_group(0)
                pipeline_k.release(k_stage, warps)
                k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
                if const_expr(self.leads):
                    if slab == 0:
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive(lead_barrier + q_stage)
                terms.vary(scores, n, varies, True, terms.of_first)
                if const_expr(lists is None or not self.has_mask_mod):
                    modify(n, b_phase, True)
                else:
                    if lists.partial_count > 0:
                        modify(n, b_phase, True)
                    else:
                        modify(n, b_phase, True, is_full=True)
                b_phase = b_phase ^ 1
                hide_bits(n, bits)
                mask_tile(n)
                self.softmax_step(softmax, scores, row_scale, thread, True, True, shifts)
                convert_pairs(acc_S, rP)
                if const_expr(self.stages_output):
                    self.output.release_sent(pipeline_q, q_stage ^ 1, warps)

                accumulate = Boolean(False)
                stretches = self.stretches(fields, lists, kv_length)
                loops = terms.loops(stretches, *fields[6:8])
                for loop in cutlass.range_constexpr(len(loops)):
                    (count, tile_of, is_masked, is_full), is_varying = loops[loop]
                    common = terms.enter(softmax, count, tile_of, is_varying)
                    may_be_empty = may_hide or bool(terms.may_hide(is_varying))
                    for i in cutlass.range(count, unroll=1):
                        n = tile_of(i)
                        # On their way from memory while the product is.
                        bits = read_bits(n)
                        terms.at_tile(common, n)
                        pipeline_k.wait(k_stage, k_phase)
                        self.take_turn(slab)
                        ends = not terms.multiplies(is_varying)
                        gemm(
                            mma_qk,
                            acc_S,
                            tSrQ[None, None, None, q_stage],
                            tSrK[None, None, None, k_stage],
                            False,
                            ends=ends,
                        )
                        terms.multiply(acc_S, k_stage, is_varying)
                        pipeline_v.wait(v_stage, v_phase)
                        gemm(mma_pv, acc_O, tOrP, tOrV[None, None, None, v_stage], accumulate)
                        self.pass_turn(slab)
                        shifts, varies = terms.shifts(n, is_varying)
                        terms.prepare(n, is_varying)
                        warpgroup.wait_group(1)
                        pipeline_k.release(k_stage, warps)
                        k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
                        terms.vary(scores, n, varies, is_masked, is_varying)
                        modify(n, b_phase, is_masked, is_full=is_full)
                        b_phase = b_phase ^ 1
                        hide_bits(n, bits)
                        if const_expr(is_masked):
                            mask_tile(n)
                        needs_rescale = self.softmax_step(
                            *(softmax, scores, row_scale, thread),
                            *(False, is_masked or may_be_empty, shifts),
                        )
                        warpgroup.wait_group(0)
                        pipeline_v.release(v_stage, warps)
                        v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)
                        convert_pairs(acc_S, rP)
                        self.rescale(out, row_scale, needs_rescale)
                        accumulate = Boolean(True)
                    if const_expr(common is not None):
                        common.restore()

                if const_expr(not self.stages_output):
                    pipeline_q.release(q_stage, warps)
                pipeline_v.wait(v_stage, v_phase)
                gemm(mma_pv, acc_O, tOrP, tOrV[None, None, None, v_stage], accumulate)
                if const_expr(self.stages_output):
                    finish(rows)
                warpgroup.wait_group(0)
                pipeline_v.release(v_stage, warps)
                v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)
            else:
                acc_O.fill(0.0)
                if const_expr(self.stages_output):
                    finish(rows)
                if const_expr(self.leads):
                    # A phase for each tile of work, as of Q: none can be two ahead of another.
                    if slab == 0:
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive(lead_barrier + q_stage)
                    else:
                        cute.arch.mbarrier_wait(lead_barrier + q_stage, q_phase)
                if const_expr(self.stages_output):
                    self.output.release_sent(pipeline_q, q_stage ^ 1, warps)
                else:
                    pipeline_q.release(q_stage, warps)

            own_stage = q_stage
            q_stage, q_phase = pipeline_q.advance(q_stage, q_phase)

            if const_expr(self.stages_output):
                own_slab = own_stage * cfg.warpgroups + slab
                target = (m_block * cfg.warpgroups + slab, head, batch)
                self.output.stage(acc_O, row_scale, mma_pv, sQ, own_slab, rows, has_query_lengths)
                self.output.send(*o_copy, sQ, own_slab, target)
            else:
                # Rows at or beyond the query length are as good as empty.
                sinks = None
                if const_expr(self.has_sinks):
                    sinks = self.sinks(mElements, batch, head, thread)
                    if const_expr(self.split_kv):
                        # Of a row in several parts, who adds them up takes the sink in.
                        is_whole = fields[self.own_field + 1] == 1
                        sinks = [select(is_whole, sink, Float32(-Float32.inf)) for sink in sinks]
                softmax.finish(row_scale, lse, sinks)
                found = (out, row_scale, lse)
                if const_expr(self.split_kv):
                    split, splits = fields[self.own_field :]
                    if splits > 1:
                        self.output.store_part(*found, mOPartial, mLSEPartial, split, rows)
                        if const_expr(cfg.joins_parts):
                            self.join_parts(
                                *(stored, mOPartial, mLSEPartial, mO, mLSE),
                                *(mElements, head, rows, splits),
                            )
                    else:
                        self.output.store(*found, mO, mLSE, rows)
                else:
                    self.output.store(*found, mO, mLSE, rows)

            fields = self.take_work(work, pipeline_tile, t_stage, t_phase, warps)
        if const_expr(self.stages_output):
            # Shared memory must outlive the stores that read it.
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        if const_expr(self.takes_turns):
            # The turn that was passed last has to be taken, or the barrier stays half full.
            if slab == 0:
                self.take_turn(slab)

    @cute.jit
    def join_parts(
        self,
        stored: tuple,
        mOPartial: cute.Tensor,
        mLSEPartial: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mElements: tuple,
        head: Int32,
        rows: SlabRows,
        splits: Int32,
    ):
        """Adds the parts of a tile's rows up where the warpgroup has stored the last of them.

        ``stored``: how many are, and a word of shared memory.
        """
        mStored, slot = stored
        count = mStored.iterator + cute.crd2idx((rows.batch, head), mStored.layout)
        slot = cute.make_tensor(slot.data_ptr(), cute.make_layout(1))
        if is_last_part(count, splits, slot, rows.thread, PART_BARRIER):
            mSinks = sinks_among(self.functions, mElements)
            self.combine.combine_tile(mOPartial, mLSEPartial, mO, mLSE, mSinks, rows, splits)

    def query_head(self, head: Int32, thread: Int32, r: int) -> Int32:
        """The query head of a thread's row."""
        return head * self.heads_packed + row_in_slab(thread, r) % self.heads_packed

    def sinks(self, mElements: tuple, batch: Int32, head: Int32, thread: Int32) -> list[Float32]:
        """The sink of each of a thread's rows."""
        elements = Elements(self.functions, mElements)
        heads = [self.query_head(head, thread, r) for r in range(self.rows_per_thread)]
        return [elements.sink(batch, head) for head in heads]

    def elements_of(self, mElements: tuple, thread: Int32, place, only_hides: bool):
        """What is done to single scores of a tile of work, and what is known of a thread's rows."""
        batch, offset, array_lengths, first_token, head = place
        elements = Elements(self.functions, mElements, only_hides=only_hides)
        of_entry = elements.of_entry(batch, offset, array_lengths)
        queries = [
            of_entry.queries(
                self.query_head(head, thread, r),
                first_token + row_in_slab(thread, r) // self.heads_packed,
            )
            for r in range(self.rows_per_thread)
        ]
        return of_entry, queries

    def element_step(
        self,
        mElements: tuple,
        scores: cute.Tensor,
        thread: Int32,
        bias_tile: BiasTile | None,
        place,
    ):
        """What is done to each score of a tile: a function of the tile's number.

        Its second argument is the phase of the bias's tile, its third says whether some of the
        tile's keys may lie beyond the last one.
        """
        if not self.by_element:
            return lambda n, b_phase, may_be_beyond, is_full=False: None
        only_hides = self.added is not None
        elements, queries = self.elements_of(mElements, thread, place, only_hides)
        scale = self.scale if self.changes_scores else 1.0

        def modify(n: Int32, b_phase: Int32, may_be_beyond: bool, is_full: bool = False) -> None:
            biases = None
            if bias_tile is not None:
                bias_tile.wait(b_phase)
                biases = bias_tile.columns()
            first = n * self.config.tile_n + first_column(thread)
            column = elements.along_keys(queries, first, may_be_beyond, ADJACENT_COLUMNS)
            for c in range(cute.size(scores, mode=[1])):
                bias = [None] * self.rows_per_thread if biases is None else next(biases)
                for r, known in enumerate(column(column_step(c))):
                    scores[r, c] = elements.element(
                        *(known, scores[r, c], scale), is_full=is_full, bias=bias[r]
                    )
            if bias_tile is not None:
                bias_tile.release()

        return modify

    def terms_step(self, mElements: tuple, operands: tuple, who: tuple, place):
        """What is added to a tile's scores otherwise than one by one."""
        if self.added is None:
            return NoTerms()
        slab, thread = who
        elements, queries = self.elements_of(mElements, thread, place, False)
        _, offset, _, first_token, head = place
        reference = first_token - slab * self.slab_tokens + offset
        places = (head, first_token, operands, slab, thread, reference)
        return WarpgroupTerms(self.added, elements, queries, *places)

    def packed_step(self, mPacked: tuple, scores: cute.Tensor, thread: Int32, place):
        """What a mask in bits does to a tile, in two parts.

        A function of the tile's number that reads its words, and one of the number and the words
        that hides scores.
        """
        if self.packed_mask is None:
            return lambda n: None, lambda n, words: None
        batch, head, first_token, q_length = place
        tile_n = self.config.tile_n
        packed = PackedMask(self.packed_mask, *mPacked)
        tokens = self.clamped_tokens(thread, first_token, q_length)
        rows = [
            packed.row(batch, self.query_head(head, thread, r), token)
            for r, token in enumerate(tokens)
        ]
        # Tiles begin with a word, or else in the midst of one.
        is_aligned = tile_n % 32 == 0
        count = -(-tile_n // 32) + (not is_aligned)

        def read(n: Int32):
            first = n * tile_n // 32
            return [[packed.word(row, first + i) for i in range(count)] for row in rows]

        def hide(n: Int32, words: list) -> None:
            first = None if is_aligned else n * tile_n % 32
            for r in range(self.rows_per_thread):
                hide_outside(scores, r, own_bits(words[r], first, thread, tile_n))

        return read, hide

    def row_limits(self, thread: Int32, position: Int32, keys: Int32, r: int) -> list:
        """The intervals of keys of a thread's row, by position.

        Of each, its first key (None: the first of all) and one past the last.  ``position`` is that
        of the slab's first row.
        """
        row_position = position + row_in_slab(thread, r) // self.heads_packed
        return self.mask.row_limits(row_position, keys)

    def clamped_tokens(self, thread: Int32, first_token: Int32, q_length: Int32) -> list[Int32]:
        """The tokens of a thread's rows; beyond the last one, that one."""
        last = Int32(q_length) - 1
        return [
            cutlass.min(first_token + row_in_slab(thread, r) // self.heads_packed, last)
            for r in range(self.rows_per_thread)
        ]

    def listed_limits(self, mBounds: tuple, batch: Int32, tokens: list[Int32]):
        """``row_limits`` from arrays."""
        pairs = self.row_bounds.limits(mBounds)
        limits = [
            [(low[batch, token], high[batch, token]) for low, high in pairs] for token in tokens
        ]
        return lambda r: limits[r]

    def comparison(self, mBounds: tuple, batch: Int32, tokens, lengths, offset):
        """For tile n, a function of a column: whether each row's segment is that of its key.

        Scattered segments with positions of their own are compared with the window here too.
        """
        q_ids, kv_ids, *positions = self.row_bounds.compared(mBounds)
        _, kv_length = lengths

        def compare(n: Int32):
            # Read here and not once: scattered segments are rare, registers are too.
            ids = [q_ids[batch, token] for token in tokens]
            window = [(None, None)] * self.rows_per_thread
            if positions:
                q_positions, kv_positions = positions
                window = [self.mask.limits(q_positions[batch, token] + offset) for token in tokens]

            def seen(column: Int32) -> list[Boolean]:
                key = cutlass.min(n * self.config.tile_n + column, Int32(kv_length) - 1)
                kv_id = kv_ids[batch, key]
                place = kv_positions[batch, key] if positions else Int32(0)
                return [within(place, *window[r], kv_id == ids[r]) for r in range(len(ids))]

            return seen

        return compare

    @cute.jit
    def apply_mask(
        self,
        scores: cute.Tensor,
        thread: Int32,
        row_limits: cutlass.Constexpr,
        compare: cutlass.Constexpr,
        n: Int32,
    ):
        """Hides keys of tile n outside each row's intervals.

        Args:
          row_limits: gives the intervals of a thread's row.
          compare: where ids may have to be compared, whether they have, and ``comparison``.
        """
        tile_n = self.config.tile_n
        if const_expr(compare is not None):
            compared = compared_words(compare[0], compare[1](n), thread, tile_n)
        for r in cutlass.range_constexpr(self.rows_per_thread):
            words = interval_words(row_limits(r), n * tile_n, thread, tile_n)
            if const_expr(compare is not None):
                words = [w & c for w, c in zip(words, compared[r], strict=True)]
            hide_outside(scores, r, words)

    @cute.jit
    def unless_full(self, ranges: list, apply: cutlass.Constexpr, n: Int32):
        """``apply`` of a tile that no interval alone holds all of."""
        if not is_full(ranges, n):
            apply(n)

    @cute.jit
    def softmax_step(
        self,
        softmax: OnlineSoftmax,
        scores: cute.Tensor,
        row_scale: cute.Tensor,
        thread: Int32,
        is_first: cutlass.Constexpr[bool],
        may_be_empty: cutlass.Constexpr[bool],
        shifts: list | None,
    ):
        """``softmax.step`` of warps that hold queries; others have nothing to rescale."""
        needs_rescale = Int32(0)
        if const_expr(not self.has_few_rows):
            needs_rescale = softmax.step(scores, row_scale, is_first, may_be_empty, shifts)
        else:
            if thread < 32:
                needs_rescale = softmax.step(scores, row_scale, is_first, may_be_empty, shifts)
        return needs_rescale

    @cute.jit
    def rescale(self, out: cute.Tensor, row_scale: cute.Tensor, needs_rescale: Int32):
        """Multiplies the accumulated O by its rows' factors, where a lane of the warp needs it."""
        if const_expr(self.config.rescale_threshold > 0):
            if cute.arch.vote_any_sync(needs_rescale != 0):
                for r in cutlass.range_constexpr(self.rows_per_thread):
                    for c in cutlass.range_constexpr(cute.size(out, mode=[1])):
                        out[r, c] = out[r, c] * row_scale[r]
        else:
            for r in cutlass.range_constexpr(self.rows_per_thread):
                for c in cutlass.range_constexpr(cute.size(out, mode=[1])):
                    out[r, c] = out[r, c] * row_scale[r]

    @cute.jit
    def take_turn(self, slab: Int32):
        """Waits until the warpgroup before this one has issued its products."""
        if const_expr(self.takes_turns):
            cute.arch.barrier(barrier_id=TURN_BARRIER + slab, number_of_threads=256)

    @cute.jit
    def pass_turn(self, slab: Int32):
        """Lets the next warpgroup issue its products."""
        if const_expr(self.takes_turns):
            following = slab + 1
            following = Int32(0) if following == self.config.warpgroups else following
            cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + following, number_of_threads=256)
