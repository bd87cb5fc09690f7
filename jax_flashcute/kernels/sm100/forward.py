"""The forward kernel on Blackwell: O = softmax(scale Q K^T) V and the log-sum-exp of each row.

No Blackwell GPU has run it: it is compiled for sm_100a and sm_103a and run in simulation.

A block has up to two query tiles of 128 rows in flight, which take turns: the tensor cores work on
one while the softmax of the other runs.  Without packing a query tile is 128 tokens of one query
head; with packing it is 128 // G tokens of the G query heads that share a key/value head, row =
token * G + head.  S, P (over S, in 16 bits), each row's factor (beside P) and O live in tensor
memory.  Blocks are persistent and draw tiles of work from a counter (common/scheduler.py).

With ``split_kv``, for queries that fill one row of tiles, a tile of work is also one of several
parts of its keys (common/splits.py).  Parts of one row go to scratch in float32 and a second kernel
adds them up (extra/combine.py); where a row has one part alone, the output is written at once.

Keys and values may lie in pages (common/paging.py): a tile is then several copies, of the part of
each page that it holds.  Pages too small for TMA are copied by the threads of two warps; the second
one follows the load warp through its tiles.

Each role has its file; the edges between them are these, one stage for each query tile t where
nothing else is said:

    edge     producer              consumer            stages     full        empty
    q[t]     TMA, load warp        product warp                   1 + tx      products
    k        TMA, load warp        product warp        kv_stages  1 + tx      products
    v        TMA, load warp        product warp        kv_stages  1 + tx      products
    s[t]     product warp          softmax warpgroup t            products    4: P is stored
    o[t]     product warp          correction                     products    4: O is rescaled, read
    factor[t] softmax warpgroup t  correction                     4           4: it is read
    tile     load warp             all other roles     2          1           5 + 4 per query tile

Counts are arrivals of warps; "+ tx" means that the barrier also waits for the copies' bytes;
"products", one arrival that tcgen05.commit makes once the products before it are done.  ``o`` is
filled only after the last key tile; it must be empty for every O += P V.  A tile of work's first S
needs ``factor`` empty, the others come after an O that is rescaled.  Where threads copy, 64 of
them arrive at k and v, and one warp more takes a tile.
"""

from functools import partial

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from jax_flashcute.bounds import RowBounds
from jax_flashcute.kernels.common.elements import sinks_among
from jax_flashcute.kernels.common.intervals import IntervalMask, UnionMask
from jax_flashcute.kernels.common.lengths import entry_lengths
from jax_flashcute.kernels.common.paging import follow_tiles, tiles_in_pages
from jax_flashcute.kernels.common.scheduler import TileOrder, ready_counters, section_size
from jax_flashcute.kernels.common.tiles import by_head, slab_tma_layout, smem_layout
from jax_flashcute.kernels.common.visits import KeyTiles, work_fields
from jax_flashcute.kernels.config.memory import round_up
from jax_flashcute.kernels.config.sm100 import FwdConfigSm100
from jax_flashcute.kernels.elements import ElementFunctions
from jax_flashcute.kernels.extra.combine import Combine
from jax_flashcute.kernels.sm100.correction import CorrectionWarpgroup
from jax_flashcute.kernels.sm100.load import COPYING_WARPS, LoadWarp
from jax_flashcute.kernels.sm100.pipeline import TensorPipeline, take_work
from jax_flashcute.kernels.sm100.products import ProductWarp
from jax_flashcute.kernels.sm100.softmax import SoftmaxWarpgroups
from jax_flashcute.kernels.sm100.tensor_memory import COLUMNS, ROWS

TILE_STAGES = 2


class ForwardSm100(KeyTiles):
    """Compiles to one kernel for all batch sizes, lengths and head counts of a plan."""

    def __init__(
        self,
        config: FwdConfigSm100,
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
        ``functions``: what is done to single scores; ``page_size``: of keys and values in pages,
        with a page table and lengths of keys; ``row_bounds``: each row's keys stand in arrays,
        ``mask`` among what they hold; ``has_lists``: a tile visits the key tiles that lists name;
        ``packed_mask``: the axes along which a mask in bits varies, of "bnt"."""
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
        self.packed_mask = packed_mask
        self.union = mask if isinstance(mask, UnionMask) else None
        self.has_low = row_bounds is not None
        if isinstance(mask, IntervalMask):
            self.has_low |= mask.low is not None
        # With split-KV two more: which part of a row's keys it is, and of how many; where ids are
        # compared, one more: whether this tile's have to be.  An even number: of an odd one the
        # compiler reads one more, which belongs to the next stage.
        self.own_field = work_fields(mask)
        self.work_fields = round_up(self.own_field + 2 * split_kv + self.compares_ids, 2)
        self.functions = functions
        self.by_element = functions is not None and functions.by_element
        self.has_mask_mod = functions is not None and functions.mask_mod is not None
        self.has_sinks = functions is not None and functions.sinks
        self.page_size = page_size
        self.kv_tiles = tiles_in_pages(page_size, config.tile_n, COPYING_WARPS, boxes_at_once=2)
        self.copying_warps = self.kv_tiles.copying_warps
        # One copies K and draws the tiles of work, another copies V.
        self.following_warps = self.copying_warps
        # P, in 16 bits, leaves half of S's columns.
        self.factor_column = config.tile_n // 2
        self.smem_h = round_up(head_dim, 16)
        self.smem_hv = round_up(head_dim_v, 16)
        self.slab_tokens = ROWS // self.heads_packed
        self.tile_tokens = self.slab_tokens * config.query_tiles

    def s_column(self, query_tile):
        """First column in tensor memory of S, and of P, of a query tile."""
        return query_tile * self.config.tile_n

    def o_column(self, query_tile):
        """First column in tensor memory of O of a query tile."""
        return self.config.query_tiles * self.config.tile_n + query_tile * self.smem_hv

    def token(self, m_block: Int32, query_tile, row: Int32) -> Int32:
        """The token that a row of a query tile stands for."""
        return m_block * self.tile_tokens + query_tile * self.slab_tokens + row // self.heads_packed

    def query_head(self, head: Int32, row: Int32) -> Int32:
        """The query head that a row of a query tile belongs to."""
        return head * self.heads_packed + row % self.heads_packed

    def is_row(self, row: Int32):
        """Whether a token fills the row: where heads are packed, some rows may be left over."""
        return row < self.slab_tokens * self.heads_packed

    def part_of(self, fields: tuple) -> tuple:
        """Which part of a row's keys a tile of work is, and of how many."""
        return fields[self.own_field : self.own_field + 2]

    def counted(self, fields: tuple) -> tuple:
        """What those who only count key tiles need of a tile of work.

        Numbers that go from one tile to the next are kept in registers, used or not.
        """
        return fields[:8] + (self.part_of(fields) if self.split_kv else ())

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
        mElements: tuple = (),  # arrays of ``functions``
        mPageTable: cute.Tensor | None = None,  # (B, max_pages) int32
        mBounds: tuple = (),  # arrays of ``bounds.key_bound_arrays``
        mLists: tuple = (),  # arrays of ``BlockMask.kernel_lists``
        mPacked: tuple = (),  # a mask in bits, (1|B, 1|N, 1|T, words) uint32
    ):
        cfg = self.config
        batch, q_length, kv_length, kv_heads = (
            mQ.shape[0],
            mQ.shape[1],
            mK.shape[1],
            mK.shape[2],
        )
        if const_expr(self.page_size is not None):
            kv_length = mPageTable.shape[1] * self.page_size
        q_tensor = by_head(mQ, self.head_dim, self.heads_packed)
        tma_q = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            q_tensor,
            slab_tma_layout(self.dtype, ROWS, self.smem_h, self.heads_packed, self.slab_tokens),
            (self.heads_packed, self.slab_tokens, self.smem_h),
        )
        tma_k = self.kv_tiles.source(self.dtype, by_head(mK, self.head_dim, 1), self.smem_h)
        tma_v = self.kv_tiles.source(self.dtype, by_head(mV, self.head_dim_v, 1), self.smem_hv)
        m_blocks = cute.ceil_div(q_length, self.tile_tokens)
        kv_bytes_per_key = (self.head_dim + self.head_dim_v) * 2
        # As on Hopper: tiles of unequal length go longest first over the heads that L2 holds.
        section = Int32(1)
        if const_expr(self.mask.is_staircase):
            section = section_size(kv_length, kv_bytes_per_key, kv_heads, batch)
        num_tiles = m_blocks * kv_heads * batch * self.heads_per_kv
        if const_expr(self.split_kv):
            num_tiles = num_tiles * mOPartial.shape[0]
        blocks = cutlass.min(num_tiles, Int32(self.num_sms))
        follows = ready_counters(mCounter, None, blocks, num_tiles, stream)
        self.kernel(
            *tma_q,
            *tma_k,
            *tma_v,
            mQOffset,
            mQLengths,
            mKVLengths,
            mO,
            mLSE,
            mCounter,
            mOPartial,
            mLSEPartial,
            mElements,
            mPageTable,
            mBounds,
            mLists,
            mPacked,
            m_blocks,
            section,
            q_length,
            kv_length,
            kv_heads,
            batch,
        ).launch(
            grid=[blocks, 1, 1],
            block=[cfg.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=follows,
        )
        if const_expr(self.split_kv):
            Combine(self.dtype, self.head_dim_v, self.splits_of_entry).launch(
                stream, (mQOffset, mQLengths, mKVLengths), kv_length, mOPartial, mLSEPartial, mO,
                mLSE, sinks_among(self.functions, mElements),
            )  # fmt: skip

    def shared_storage(self):
        cfg = self.config
        work_fields = self.work_fields

        def aligned(elements):
            return cute.struct.Align[cute.struct.MemRange[self.dtype, elements], 1024]

        def barriers(stages):
            return cute.struct.MemRange[Int64, 2 * stages]

        @cute.struct
        class SharedStorage:
            q_barriers: barriers(cfg.query_tiles)
            k_barriers: barriers(cfg.kv_stages)
            v_barriers: barriers(cfg.kv_stages)
            s_barriers: barriers(cfg.query_tiles)
            o_barriers: barriers(cfg.query_tiles)
            factor_barriers: barriers(cfg.query_tiles)
            tile_barriers: barriers(TILE_STAGES)
            tail_barrier: cute.struct.MemRange[Int64, 1]
            tensor_memory: cute.struct.MemRange[Int32, 1]
            work: cute.struct.Align[cute.struct.MemRange[Int32, work_fields * TILE_STAGES], 16]
            sQ: aligned(cfg.tile_m * self.smem_h)
            sK: aligned(cfg.kv_stages * cfg.tile_n * self.smem_h)
            sV: aligned(cfg.kv_stages * cfg.tile_n * self.smem_hv)

        return SharedStorage

    def pipelines(self, storage) -> tuple[TensorPipeline, ...]:
        """The edges of the table above, in its order."""
        cfg = self.config
        h_bytes, hv_bytes = self.smem_h * 2, self.smem_hv * 2
        slab_bytes = self.heads_packed * self.slab_tokens * h_bytes
        tiles, stages = cfg.query_tiles, cfg.kv_stages
        takers = 5 + 4 * tiles + self.following_warps
        return (
            TensorPipeline("q", storage.q_barriers.data_ptr(), tiles, slab_bytes, 1),
            TensorPipeline(
                "k",
                storage.k_barriers.data_ptr(),
                stages,
                cfg.tile_n * h_bytes,
                1,
                copying_warps=self.copying_warps,
            ),
            TensorPipeline(
                "v",
                storage.v_barriers.data_ptr(),
                stages,
                cfg.tile_n * hv_bytes,
                1,
                copying_warps=self.copying_warps,
            ),
            TensorPipeline("s", storage.s_barriers.data_ptr(), tiles, 0, 4),
            TensorPipeline("o", storage.o_barriers.data_ptr(), tiles, 0, 4),
            TensorPipeline("factor", storage.factor_barriers.data_ptr(), tiles, 0, 4, 4),
            TensorPipeline("tile", storage.tile_barriers.data_ptr(), TILE_STAGES, 0, takers),
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
        mQOffset: cute.Tensor | None,
        mQLengths: cute.Tensor | None,
        mKVLengths: cute.Tensor | None,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mCounter: cute.Tensor,
        mOPartial: cute.Tensor | None,
        mLSEPartial: cute.Tensor | None,
        mElements: tuple,
        mPageTable: cute.Tensor | None,
        mBounds: tuple,
        mLists: tuple,
        mPacked: tuple,
        m_blocks: Int32,
        section: Int32,
        q_length: Int32,
        kv_length: Int32,
        kv_heads: Int32,
        batch: Int32,
    ):
        cfg = self.config
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.shared_storage())
        pipelines = self.pipelines(storage)
        tail_barrier = storage.tail_barrier.data_ptr()
        # Softmax warpgroups, correction, and one of the warps that load and issue.
        load_warp = 4 * cfg.query_tiles + 4
        product_warp = load_warp + 1
        if warp_index == load_warp:
            for atom in (tma_q, tma_k, tma_v):
                if const_expr(atom is not None):
                    cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                for pipeline in pipelines:
                    pipeline.init()
                cute.arch.mbarrier_init(tail_barrier, 1)
            cute.arch.mbarrier_init_fence()
        if warp_index == product_warp:
            cute.arch.alloc_tmem(COLUMNS, storage.tensor_memory.data_ptr())
            cute.arch.relinquish_tmem_alloc_permit()
        cute.arch.sync_threads()
        tensor_memory = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tensor_memory.data_ptr())

        q_layout = smem_layout(self.dtype, ROWS, self.smem_h, cfg.query_tiles)
        k_layout = smem_layout(self.dtype, cfg.tile_n, self.smem_h, cfg.kv_stages)
        v_layout = smem_layout(self.dtype, cfg.tile_n, self.smem_hv, cfg.kv_stages)
        sQ = storage.sQ.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sK = storage.sK.get_tensor(k_layout.outer, swizzle=k_layout.inner)
        sV = storage.sV.get_tensor(v_layout.outer, swizzle=v_layout.inner)
        work = storage.work.get_tensor(cute.make_layout((self.work_fields, TILE_STAGES)))

        order = TileOrder(m_blocks, kv_heads, batch, self.heads_per_kv, section)
        lengths = partial(entry_lengths, mQOffset, mQLengths, mKVLengths, q_length, kv_length)
        if const_expr(self.split_kv):
            length_arrays = (mQOffset, mQLengths, mKVLengths)
            order = self.split_order(lengths, length_arrays, kv_heads, batch, mOPartial.shape)

        if warp_index >= load_warp:
            cute.arch.setmaxregister_decrease(cfg.other_registers)
            if warp_index == load_warp:
                LoadWarp(self).load_tiles(
                    (tma_q, gQ, sQ),
                    (tma_k, gK, sK),
                    (tma_v, gV, sV),
                    pipelines,
                    tail_barrier,
                    work,
                    mCounter,
                    mPageTable,
                    order,
                    lengths,
                    mKVLengths is not None,
                    mBounds,
                    mLists,
                )
            if warp_index == product_warp:
                ProductWarp(self).issue_products(sQ, sK, sV, tensor_memory, pipelines, work)
            if const_expr(self.following_warps > 0):
                if warp_index == product_warp + 1:
                    _, _, pipeline_v, _, _, _, pipeline_tile = pipelines
                    follow_tiles(
                        partial(
                            take_work,
                            work,
                            pipeline_tile,
                            warps=self.following_warps,
                            role="following",
                        ),
                        partial(
                            self.one_loader,
                            *((tma_k, gK, sK), (tma_v, gV, sV), mPageTable, Int32(0), 1),
                        ),
                        self.heads_per_kv,
                        partial(self.key_order, lists=None),
                        self.kv_tiles,
                        (pipeline_v, pipeline_tile),
                    )
        if warp_index < 4 * cfg.query_tiles:
            cute.arch.setmaxregister_increase(cfg.softmax_registers)
            SoftmaxWarpgroups(self).softmax_rows(
                tensor_memory,
                mLSE,
                mLSEPartial,
                pipelines,
                work,
                (q_length, kv_length),
                mElements,
                mBounds,
                mLists,
                mPacked,
            )
        if warp_index >= 4 * cfg.query_tiles and warp_index < load_warp:
            cute.arch.setmaxregister_decrease(cfg.correction_registers)
            CorrectionWarpgroup(self).correct_outputs(
                tensor_memory, mO, mOPartial, pipelines, work, q_length
            )
        for pipeline in pipelines:
            pipeline.check_arrivals()
        cute.arch.sync_threads()
        if warp_index == product_warp:
            cute.arch.dealloc_tmem(tensor_memory, COLUMNS)
