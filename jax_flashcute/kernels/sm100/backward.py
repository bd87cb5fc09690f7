"""The backward kernel on Blackwell: dQ, dK and dV in one pass over the keys.

No Blackwell GPU has run it: it is compiled for sm_100a and sm_103a and run in simulation.

A block owns 128 keys of one key/value head and goes over the tiles of 128 queries that see them,
of every query head of the group:

    S^T = K Q^T      P^T = exp2(scale log2(e) S^T - LSE2)      dV += P^T dO
    dP^T = V dO^T    dS^T = P^T (dP^T - dPsum)                 dK += dS^T Q      dQ = dS K

All products accumulate in tensor memory.  The scores are computed transposed: a thread of the two
gradient warpgroups owns a key and half of a tile's queries.  P^T and dS^T go back to tensor memory,
in 16 bits over S^T and dP^T, where the products dV and dK take them; dS^T also goes to shared
memory, where dQ reads it by columns.  Four warps read dQ and add it in float32 to the sum in global
memory by bulk reductions (extra/postprocess.py turns it into 16 bits).

Each role has its file; the edges between them:

    edge    producer            consumer                     stages     full      empty
    k, v    TMA, load warp      product warp                 1 each     1 + tx    used once
    q       TMA, load warp      products, gradients (LSE2)   q_stages   1 + tx    products + 8
    dO      TMA, load warp      products, gradients (dPsum)  do_stages  1 + tx    products + 8
    s       product warp        gradient warpgroups          1          products  8: P is stored
    dp      product warp        gradient warpgroups          1          products  8: dS is stored
    dq      product warp        dQ warps                     1          products  4: dQ is read
    done    product warp        gradient warpgroups          1          products  used once

and those of pairs of blocks, below:

    dO^T    TMA, load warp      products                     do_stages  1 + tx    products
    q^T     TMA, load warp      products                     q_stages   1 + tx    products
    k^T     TMA, load warp      product warp                 1          1 + tx    used once
    ds      product warp        gradient warpgroups          1          unused    16: dS is stored

Counts are arrivals of warps; "+ tx" means that the barrier also waits for the copies' bytes;
"products", one arrival that tcgen05.commit makes once the products before it are done.  Products
of one thread are done in order, so a full dp also says that the dQ before it has read dS, and dQ
may overwrite what dK takes.

With cta_group=2 two blocks, each with 128 keys of its own, share their products: of operand B each
holds half.  That is 64 queries of Q and dO for S and dP, and half the columns of all 128 for dK and
dV, which are loaded as q^T and dO^T; for dQ, half the columns of both blocks' K (k^T).  dQ of a
tile is one product over the keys of both: each block has 64 of its queries, in lanes 0 to 63 the
first half of the columns and in lanes 64 to 127 the second.  Gradient warpgroup i, whose queries
they are, stores dS^T to block i's shared memory.  The first block's product warp issues all; the
second's tells it when operands have arrived.  Counts of s, dp and dq are then of both blocks.

Columns of tensor memory, for head_dims up to 128 (dQ has its own where they suffice):

    0: S, then P    128: dP, dS, dQ    256: dV    256 + Hv: dK

and in turn, where a head_dim is above 128 and dP can only follow S:

    0: S, dP, dS    128: P    0: dQ, over both    192: dV    192 + Hv: dK
"""

from functools import partial

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass._mlir.dialects.nvvm import MemScopeKind
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from jax_flashcute.bounds import RowBounds
from jax_flashcute.kernels.common.intervals import IntervalMask, UnionMask
from jax_flashcute.kernels.common.lengths import entry_lengths
from jax_flashcute.kernels.common.scheduler import section_size
from jax_flashcute.kernels.common.tiles import CHUNK, smem_layout, tile_tma
from jax_flashcute.kernels.common.turns import section_in_turns
from jax_flashcute.kernels.common.visits import QueryTiles
from jax_flashcute.kernels.config.memory import round_up
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100
from jax_flashcute.kernels.elements import ElementFunctions, measures
from jax_flashcute.kernels.extra.postprocess import Postprocess
from jax_flashcute.kernels.extra.preprocess import Preprocess
from jax_flashcute.kernels.sm100.backward_gradients import GradientWarpgroups
from jax_flashcute.kernels.sm100.backward_load import KEY_BARRIERS, TAIL, LoadWarp
from jax_flashcute.kernels.sm100.backward_products import ProductWarp
from jax_flashcute.kernels.sm100.backward_reduce import DQ_BUFFERS, ReduceWarps
from jax_flashcute.kernels.sm100.pipeline import PairPipeline, TensorPipeline
from jax_flashcute.kernels.sm100.tensor_memory import COLUMNS, ROWS

GRADIENT_WARPS, DQ_WARPS = 8, 4
LOAD_WARP = GRADIENT_WARPS + DQ_WARPS
PRODUCT_WARP = LOAD_WARP + 1
LAUNCH_REGISTERS = 128
"""A thread's, before reallocation: a quarter of them for each of four warpgroups."""


class BackwardSm100(QueryTiles):
    """Compiles to one launcher (three kernels) for all batch sizes, lengths and head counts."""

    def __init__(
        self,
        config: BwdConfigSm100,
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
        """``group``: query heads a key/value head serves; ``functions``: what is done to single
        scores; ``row_bounds``: the rows that see a key stand in arrays, ``mask`` among what they
        hold; ``has_lists``: a block visits the query tiles that lists name; ``packed_mask``: the
        axes along which a mask in bits varies, of "bnt"."""
        self.config = config
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.group = group
        self.scale = scale
        self.mask = mask
        self.functions = functions
        self.row_bounds = row_bounds
        self.compares = row_bounds is not None and (
            row_bounds.compares_ids or row_bounds.compares_bounds
        )
        self.has_lists = has_lists
        self.packed_mask = packed_mask
        self.union = mask if isinstance(mask, UnionMask) else None
        self.has_low = row_bounds is not None
        if isinstance(mask, IntervalMask):
            self.has_low |= mask.low is not None
        self.by_element = functions is not None and functions.by_element
        self.deterministic = config.deterministic
        # As on Hopper, a first run may have to find how large addends are: it leaves no gradients.
        self.measures = measures(functions, config.deterministic)
        self.sums_gradients = functions is not None and bool(functions.summed_ranks)
        self.smem_h = config.padded_head_dim(head_dim)
        self.smem_hv = round_up(head_dim_v, 16)
        # What a block holds of an operand B, where a pair shares it.
        self.cta_group = config.cta_group
        self.is_pair = self.cta_group == 2
        self.held_rows = ROWS // self.cta_group
        self.held_h = self.smem_h // self.cta_group
        self.held_hv = self.smem_hv // self.cta_group
        # First columns in tensor memory.
        self.s_column = 0
        self.p_columns = (128, 160) if config.in_turn else (0, 64)
        self.dp_column = 0 if config.in_turn else 128
        self.ds_columns = (self.dp_column, self.dp_column + 64)
        self.dv_column = 192 if config.in_turn else 256
        self.dk_column = self.dv_column + self.smem_hv
        self.dq_column = (
            self.dp_column
            if config.shares_dq(head_dim, head_dim_v)
            else self.dk_column + self.smem_h
        )

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
        mdQAccum: cute.Tensor,  # (B, N, m_blocks * 128 * smem_h) float32, scratch
        mLSE2: cute.Tensor,  # (B, N, m_blocks * 128) float32, scratch
        mdPsum: cute.Tensor,  # (B, N, m_blocks * 128) float32, scratch
        mTurns: cute.Tensor | None = None,  # (B, N, m_blocks * 4) int32, scratch
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
        turns = cfg.dq_warps(self.head_dim)
        Preprocess(
            self.dtype, self.head_dim_v, cfg.tile_m, self.smem_h, turns, self.functions
        ).launch(
            stream,
            m_blocks,
            mO,
            mdO,
            mLSE,
            mdLSE,
            mQLengths,
            (mLSE2, mdPsum, mdQAccum, mTurns),
            mGradients,
        )

        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()

        def tma(op, x, width, rows, columns):
            return tile_tma(op, x, width, self.dtype, (rows, columns))

        h, hv = self.head_dim, self.head_dim_v
        tile_loads = (
            tma(load, mQ, h, self.held_rows, self.smem_h),
            tma(load, mdO, hv, self.held_rows, self.smem_hv),
        )
        key_loads = tma(load, mK, h, ROWS, self.smem_h), tma(load, mV, hv, ROWS, self.smem_hv)
        if const_expr(self.is_pair):
            tile_loads += (
                tma(load, mdO, hv, ROWS, self.held_hv),
                tma(load, mQ, h, ROWS, self.held_h),
            )
            key_loads += (tma(load, mK, h, cfg.tile_n, self.held_h),)

        # As on Hopper: queries, dO and dQ of the heads in flight should stay in L2.
        bytes_per_query = self.group * (6 * self.head_dim + 2 * self.head_dim_v)
        section = section_size(q_length, bytes_per_query, kv_heads, batch)
        if const_expr(cfg.deterministic):
            section = section_in_turns(section, kv_heads, batch)
        arguments = (
            tile_loads,
            key_loads,
            (tma(store, mdV, hv, ROWS, self.smem_hv), tma(store, mdK, h, ROWS, self.smem_h)),
            mQOffset,
            mQLengths,
            mKVLengths,
            mLSE2,
            mdPsum,
            mdQAccum,
            mTurns,
            mElements,
            mBounds,
            mLists,
            mRanks,
            mPacked,
            (mGradients, mExponents),
            m_blocks,
            n_blocks,
            section,
            q_length,
            kv_length,
            heads,
            kv_heads,
            batch,
        )
        launch = {
            "grid": [n_blocks * kv_heads * batch * self.cta_group, 1, 1],
            "block": [cfg.threads, 1, 1],
            "cluster": [2, 1, 1] if self.is_pair else None,
            "stream": stream,
            "min_blocks_per_mp": 1,
            "use_pdl": True,
        }
        if const_expr(self.measures):
            self.measuring().kernel(*arguments).launch(**launch)
        self.kernel(*arguments).launch(**launch)
        Postprocess(cfg, self.dtype, self.head_dim, self.scale).launch(
            stream, m_blocks, mdQAccum, mdQ
        )

    def shared_storage(self):
        cfg = self.config

        def aligned(dtype, elements):
            return cute.struct.Align[cute.struct.MemRange[dtype, elements], 1024]

        def statistics(stages):
            return cute.struct.Align[cute.struct.MemRange[Float32, stages * ROWS], 128]

        # What pairs alone have.
        t_stages = (cfg.q_stages, cfg.do_stages, 1) if self.is_pair else (0, 0, 0)

        @cute.struct
        class SharedStorage:
            key_barriers: cute.struct.MemRange[Int64, KEY_BARRIERS]
            q_barriers: cute.struct.MemRange[Int64, 2 * cfg.q_stages]
            do_barriers: cute.struct.MemRange[Int64, 2 * cfg.do_stages]
            qt_barriers: cute.struct.MemRange[Int64, 2 * t_stages[0]]
            dot_barriers: cute.struct.MemRange[Int64, 2 * t_stages[1]]
            s_barriers: cute.struct.MemRange[Int64, 2]
            dp_barriers: cute.struct.MemRange[Int64, 2]
            dq_barriers: cute.struct.MemRange[Int64, 2]
            ds_barriers: cute.struct.MemRange[Int64, 2 * t_stages[2]]
            done_barrier: cute.struct.MemRange[Int64, 1]
            tensor_memory: cute.struct.MemRange[Int32, 1]
            sLSE: statistics(cfg.q_stages)
            sdPsum: statistics(cfg.do_stages)
            sK: aligned(self.dtype, ROWS * self.smem_h)
            sV: aligned(self.dtype, ROWS * self.smem_hv)
            sQ: aligned(self.dtype, cfg.q_stages * self.held_rows * self.smem_h)
            sdO: aligned(self.dtype, cfg.do_stages * self.held_rows * self.smem_hv)
            sQt: aligned(self.dtype, t_stages[0] * ROWS * self.held_h)
            sdOt: aligned(self.dtype, t_stages[1] * ROWS * self.held_hv)
            sKt: aligned(self.dtype, t_stages[2] * cfg.tile_n * self.held_h)
            sdS: aligned(self.dtype, ROWS * ROWS)
            sdQ: aligned(Float32, DQ_BUFFERS * ROWS * CHUNK)

        return SharedStorage

    def pipelines(self, storage) -> tuple[TensorPipeline | None, ...]:
        """The edges q, dO, s, dp, dq and ds of the table above; of pairs, then dO^T and q^T.

        A run that measures has the first four alone.
        """
        cfg = self.config
        pipeline = PairPipeline if self.is_pair else TensorPipeline
        readers = GRADIENT_WARPS + 1
        # A tile's bytes, without statistics.
        q_bytes, do_bytes = (2 * self.held_rows * width for width in (self.smem_h, self.smem_hv))
        of_tile = (
            pipeline("q", storage.q_barriers.data_ptr(), cfg.q_stages, q_bytes + 4 * ROWS, readers),
            pipeline(
                "dO", storage.do_barriers.data_ptr(), cfg.do_stages, do_bytes + 4 * ROWS, readers
            ),
            pipeline("s", storage.s_barriers.data_ptr(), 1, 0, GRADIENT_WARPS),
            pipeline("dp", storage.dp_barriers.data_ptr(), 1, 0, GRADIENT_WARPS),
            pipeline("dq", storage.dq_barriers.data_ptr(), 1, 0, DQ_WARPS),
        )
        if self.is_measuring:
            return of_tile[:4]
        if not self.is_pair:
            return *of_tile, None
        return (
            *of_tile,
            PairPipeline(
                "ds",
                storage.ds_barriers.data_ptr(),
                1,
                0,
                GRADIENT_WARPS,
                scope=MemScopeKind.CLUSTER,
            ),
            pipeline("dO^T", storage.dot_barriers.data_ptr(), cfg.do_stages, do_bytes, 1),
            pipeline("q^T", storage.qt_barriers.data_ptr(), cfg.q_stages, q_bytes, 1),
        )

    # ---- device side -----------------------------------------------------------------------

    @cute.kernel
    def kernel(
        self,
        tile_loads: tuple,  # (atom, tensor) of Q and dO; of pairs, then of dO^T and Q^T
        key_loads: tuple,  # of K and V; of pairs, then of K^T
        key_stores: tuple,  # of dV and dK
        mQOffset: cute.Tensor | None,
        mQLengths: cute.Tensor | None,
        mKVLengths: cute.Tensor | None,
        mLSE2: cute.Tensor,
        mdPsum: cute.Tensor,
        mdQAccum: cute.Tensor,
        mTurns: cute.Tensor | None,
        mElements: tuple,
        mBounds: tuple,
        mLists: tuple,
        mRanks: tuple,
        mPacked: tuple,
        sums: tuple,  # of ``sums_in_memory``
        m_blocks: Int32,
        n_blocks: Int32,
        section: Int32,
        q_length: Int32,
        kv_length: Int32,
        heads: Int32,
        kv_heads: Int32,
        batch_size: Int32,
    ):
        cfg = self.config
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        # Of the block in its pair.
        rank = cute.arch.block_idx_in_cluster() if self.is_pair else Int32(0)
        storage = SmemAllocator().allocate(self.shared_storage())
        pipelines = self.pipelines(storage)
        edges = [pipeline for pipeline in pipelines if pipeline is not None]
        key_barriers = storage.key_barriers.data_ptr()
        done_barrier = storage.done_barrier.data_ptr()
        if warp_index == LOAD_WARP:
            for atom, _ in (*tile_loads, *key_loads, *key_stores):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                for pipeline in edges:
                    pipeline.init()
                for i in range(KEY_BARRIERS):
                    # The second block of a pair tells the first of its K, V and K^T.
                    is_told = 1 - rank if self.is_pair and i != TAIL else 0
                    cute.arch.mbarrier_init(key_barriers + i, 1 + is_told)
                cute.arch.mbarrier_init(done_barrier, 1)
            cute.arch.mbarrier_init_fence()
        if warp_index == PRODUCT_WARP:
            cute.arch.alloc_tmem(COLUMNS, storage.tensor_memory.data_ptr(), self.is_pair)
            cute.arch.relinquish_tmem_alloc_permit(self.is_pair)
        self.sync_blocks()
        tensor_memory = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tensor_memory.data_ptr())

        def staged(storage_member, rows, width, stages=1):
            layout = smem_layout(self.dtype, rows, width, stages)
            return storage_member.get_tensor(layout.outer, swizzle=layout.inner)

        sQ = staged(storage.sQ, self.held_rows, self.smem_h, cfg.q_stages)
        sdO = staged(storage.sdO, self.held_rows, self.smem_hv, cfg.do_stages)
        sK = staged(storage.sK, ROWS, self.smem_h)
        sV = staged(storage.sV, ROWS, self.smem_hv)
        sdS = staged(storage.sdS, cfg.tile_n, self.held_rows)
        sQt, sdOt, sKt = sQ, sdO, sK
        tiles_smem, keys_smem = (sQ, sdO), (sK, sV)
        if const_expr(self.is_pair):
            sQt = staged(storage.sQt, ROWS, self.held_h, cfg.q_stages)
            sdOt = staged(storage.sdOt, ROWS, self.held_hv, cfg.do_stages)
            sKt = staged(storage.sKt, cfg.tile_n, self.held_h)
            tiles_smem, keys_smem = (sQ, sdO, sdOt, sQt), (sK, sV, sKt)
        sLSE = storage.sLSE.get_tensor(cute.make_layout((ROWS, cfg.q_stages)))
        sdPsum = storage.sdPsum.get_tensor(cute.make_layout((ROWS, cfg.do_stages)))
        sdQ = storage.sdQ.get_tensor(
            cute.make_layout(
                (4, 32, CHUNK // 4, DQ_WARPS, DQ_BUFFERS),
                stride=(1, 4, 128, 32 * CHUNK, ROWS * CHUNK),
            )
        )

        # Longest first: with a causal mask the first keys are seen by most queries.
        per_section = section * n_blocks
        tile = cute.arch.block_idx()[0] // self.cta_group
        first_entry = tile // per_section * section
        within = tile - tile // per_section * per_section
        width = cutlass.min(section, kv_heads * batch_size - first_entry)
        n_block = within // width
        entry = first_entry + within - n_block * width
        batch = entry // kv_heads
        kv_head = entry - batch * kv_heads

        offset, queries, keys = entry_lengths(
            mQOffset, mQLengths, mKVLengths, q_length, kv_length, batch
        )
        tiles, compares = self.query_tiles(n_block, batch, (offset, queries, keys), mBounds)
        visits = partial(self.visits, tiles, mLists, (n_block, kv_head, batch), keys)
        block = (n_block, kv_head, batch, rank)
        num_tiles = self.all_steps(visits)

        if warp_index < GRADIENT_WARPS:
            cute.arch.setmaxregister_increase(cfg.gradient_registers)
            GradientWarpgroups(self).differentiate(
                tensor_memory,
                (sLSE, sdPsum, sdS),
                self.copies(key_stores, (sV, sK)),
                pipelines,
                done_barrier,
                block,
                (visits, num_tiles, tiles),
                (offset, queries, keys),
                (mElements, mBounds, compares, mPacked, sums, (q_length, kv_length)),
            )
        elif warp_index < LOAD_WARP:
            cute.arch.setmaxregister_decrease(cfg.reduce_registers)
            if const_expr(not self.is_measuring):
                ReduceWarps(self).add_query_gradients(
                    tensor_memory,
                    sdQ,
                    (mdQAccum, mTurns, mRanks),
                    pipelines,
                    block,
                    heads,
                    (visits, m_blocks, offset),
                )
        else:
            if const_expr(cfg.other_registers > LAUNCH_REGISTERS):
                cute.arch.setmaxregister_increase(cfg.other_registers)
            else:
                cute.arch.setmaxregister_decrease(cfg.other_registers)
            if warp_index == LOAD_WARP and num_tiles > 0:
                LoadWarp(self).load_tiles(
                    self.copies(tile_loads, tiles_smem),
                    self.copies(key_loads, keys_smem),
                    ((mLSE2, sLSE), (mdPsum, sdPsum)),
                    pipelines,
                    key_barriers,
                    block,
                    (visits, m_blocks),
                    (queries, keys),
                    (mQLengths is not None, mKVLengths is not None),
                )
            is_issuing = warp_index == PRODUCT_WARP and num_tiles > 0
            if is_issuing and rank == 0:
                barriers = (key_barriers, done_barrier)
                if const_expr(self.is_measuring):
                    ProductWarp(self).issue_scores(
                        (sQ, sdO, sK, sV), tensor_memory, pipelines, barriers, num_tiles
                    )
                else:
                    ProductWarp(self).issue_products(
                        (sQ, sdO, sK, sV, sdS, (sQt, sdOt, sKt)),
                        tensor_memory,
                        pipelines,
                        barriers,
                        num_tiles,
                    )
            if const_expr(self.is_pair):
                if is_issuing and rank == 1:
                    ProductWarp(self).pass_on_operands(pipelines, key_barriers, num_tiles)
        for pipeline in edges:
            pipeline.check_arrivals()
        self.sync_blocks()
        if warp_index == PRODUCT_WARP:
            cute.arch.dealloc_tmem(tensor_memory, COLUMNS, self.is_pair)

    def copies(self, atoms: tuple, smem: tuple) -> tuple:
        """(atom, tensor, shared memory) of copies."""
        return tuple((*atom, x) for atom, x in zip(atoms, smem, strict=True))

    def sync_blocks(self) -> None:
        """All threads of a block, or of a pair of blocks, meet."""
        if self.is_pair:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()
