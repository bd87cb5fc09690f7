"""The backward on Blackwell in passes: dV, dK and dQ each by a kernel of its own.

For head_dims whose dV and dK leave no room in tensor memory for scores.  No Blackwell GPU has run
it: it is compiled for sm_100a and sm_103a and run in simulation.

A block owns 128 rows of one gradient, of keys or of queries, and goes over the tiles of 128 rows
of the other side, half a tile after the other:

    dV:  S^T = K Q^T                       P^T                    dV += P^T dO
    dK:  S^T = K Q^T     dP^T = V dO^T     dS^T                   dK += dS^T Q
    dQ:  S = Q K^T       dP = dO V^T       dS = P (dP - dPsum)    dQ += dS K

with P = exp2(scale log2(e) S - LSE2).  The gradient stays in tensor memory to the end, so nothing
is added up in global memory and sums have one order; in return the scores are computed three times.
A thread of the two gradient warpgroups owns a row, of key or of query, and one of a tile's halves.
P, or dS, goes back to tensor memory in 16 bits, over S or dP, where the product takes it.  Products
of one half are computed while the other's P and dS are.

Each role has its file; "first" and "second" are what a tile brings: Q and dO, for dQ K and V.

    edge    producer         consumer                      stages           full      empty
    own     TMA, load warp   product warp                  1 each           1 + tx    used once
    first   TMA, load warp   products, gradients (LSE2)    first_stages     1 + tx    products + 4
    second  TMA, load warp   products, gradients (dPsum)   second_stages    1 + tx    products + 4
    s       product warp     gradient warpgroups           2, one a half    products  4: S is read
    dp      product warp     gradient warpgroups           2, one a half    products  4: dS is there
    done    product warp     gradient warpgroups           1                1 + prod. used once

Counts as in backward.py; the gradient warps take part where statistics come with a tile, which for
dV is the first alone and for dQ neither.  For dV, an empty s says that P is stored.

Columns of tensor memory:

    0: S, then P, by halves    128: dP, then dS, by halves    256: the gradient
"""

from functools import partial

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from jax_flashcute.bounds import RowBounds
from jax_flashcute.kernels.common.intervals import (
    IntervalMask,
    UnionMask,
    disjoint,
    tiles_of,
)
from jax_flashcute.kernels.common.lengths import entry_lengths
from jax_flashcute.kernels.common.lists import TileLists
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.scheduler import TileOrder, section_size
from jax_flashcute.kernels.common.stretches import Stretch
from jax_flashcute.kernels.common.tiles import smem_layout, tile_tma
from jax_flashcute.kernels.common.visits import QueryTiles, tile_fields
from jax_flashcute.kernels.config.memory import round_up
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100, PassConfigSm100
from jax_flashcute.kernels.elements import ElementFunctions, measures
from jax_flashcute.kernels.extra.preprocess import Preprocess
from jax_flashcute.kernels.sm100.backward_load import KEY_BARRIERS
from jax_flashcute.kernels.sm100.passes_gradients import PassWarpgroups
from jax_flashcute.kernels.sm100.passes_load import PassLoadWarp
from jax_flashcute.kernels.sm100.passes_products import PassProductWarp
from jax_flashcute.kernels.sm100.pipeline import TensorPipeline
from jax_flashcute.kernels.sm100.tensor_memory import COLUMNS, ROWS

GRADIENT_WARPS = 8
LOAD_WARP = GRADIENT_WARPS
PRODUCT_WARP = LOAD_WARP + 1
ORDER_WARP = PRODUCT_WARP + 1
"""Waits for the kernel before this one, and lets the next begin."""


class BackwardInPassesSm100:
    """Compiles to one launcher (four kernels) for all batch sizes, lengths and head counts.

    A fifth, the first, measures how large addends of gradients of arrays are, where that is asked
    for: dK's without dK.
    """

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
        """As ``BackwardSm100``."""
        self.dtype = dtype
        self.head_dim_v = head_dim_v
        self.functions = functions
        self.passes = [
            GradientPassSm100(
                each,
                dtype,
                (head_dim, head_dim_v),
                group,
                scale,
                (mask, functions, row_bounds, has_lists, packed_mask),
                deterministic=config.deterministic,
            )
            for each in config.passes
        ]
        if measures(functions, config.deterministic):
            (summing,) = (each for each in self.passes if each.sums_gradients)
            self.passes.insert(0, summing.measuring())
        self.passes[0].is_first = True

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
        mdQAccum: None,
        mLSE2: cute.Tensor,  # (B, N, m_blocks * 128) float32, scratch
        mdPsum: cute.Tensor,  # (B, N, m_blocks * 128) float32, scratch
        mElements: tuple = (),  # arrays of ``functions``
        mBounds: tuple = (),  # of ``bounds.query_bound_arrays``, then three of keys
        mLists: tuple = (),  # of ``BlockMask.kernel_lists``, transposed, then as they are
        mGradients: tuple = (),  # of ``functions.summed_ranks``, as ``launchers`` has them
        mPacked: tuple = (),  # a mask in bits, (1|B, 1|N, 1|T, words) uint32
        mExponents: tuple = (),  # (sums,) int32, of ``fixed_point.exponents``
    ):
        m_blocks = cute.ceil_div(mQ.shape[1], ROWS)
        Preprocess(self.dtype, self.head_dim_v, ROWS, 0, 0, self.functions).launch(
            stream,
            m_blocks,
            mO,
            mdO,
            mLSE,
            mdLSE,
            mQLengths,
            (mLSE2, mdPsum, None, None),
            mGradients,
        )
        results = {"value": mdV, "key": mdK, "query": mdQ}
        for each in self.passes:
            each.launch(
                stream,
                (mQ, mdO, mK, mV),
                results[each.target],
                (mQOffset, mQLengths, mKVLengths),
                (mLSE2, mdPsum),
                (
                    mElements,
                    mBounds,
                    mLists,
                    mPacked,
                    (mGradients, mExponents) if each.sums_gradients else (),
                ),
            )


class GradientPassSm100(QueryTiles):
    """Compiles to one kernel, for one of the gradients."""

    def __init__(
        self,
        config: PassConfigSm100,
        dtype,
        head_dims: tuple[int, int],
        group: int,
        scale: float,
        masks: tuple,
        *,
        deterministic: bool,
    ):
        """Arguments as of ``BackwardInPassesSm100``; ``masks``: from ``mask`` on.

        ``deterministic``: of gradients of arrays, which are what blocks add to; those of scores are
        stored.
        """
        mask, functions, row_bounds, has_lists, packed_mask = masks
        self.config = config
        self.target = config.target
        self.of_keys = config.target != "query"
        self.dtype = dtype
        self.head_dims = head_dims
        self.smem_widths = tuple(round_up(h, 16) for h in head_dims)
        # Query heads that a key/value head serves, and of them those that a block goes over.
        self.query_heads = group
        self.group = group if self.of_keys else 1
        self.scale = scale
        self.mask = mask
        self.union = mask if isinstance(mask, UnionMask) else None
        self.functions = functions
        self.row_bounds = row_bounds
        self.compares_ids = row_bounds is not None and row_bounds.compares_ids
        compares_bounds = row_bounds is not None and row_bounds.compares_bounds
        self.compares = self.compares_ids or (compares_bounds and self.of_keys)
        self.has_lists = has_lists
        self.has_low = False
        self.packed_mask = packed_mask
        self.by_element = functions is not None and functions.by_element
        self.deterministic = deterministic
        # It waits for what wrote the statistics; those after it begin once its blocks have.
        self.is_first = False
        # One pass sums them: that whose threads own a key, as elsewhere.
        is_summed = functions is not None and bool(functions.summed_ranks)
        self.sums_gradients = is_summed and self.target == "key"
        # Of what a tile brings: which is an operand of the gradient's product.
        self.operand = 1 if config.target == "value" else 0
        # First columns in tensor memory.
        self.s_column, self.dp_column, self.gradient_column = 0, ROWS, 2 * ROWS

    # ---- host side -------------------------------------------------------------------------

    def launch(self, stream, operands, result, lengths, statistics, arrays) -> None:
        """Launches it after a kernel that waits for what wrote the statistics.

        Args:
          operands: query, dO, key, value.
          result: the gradient.
          lengths: offset, query lengths and key lengths; each may be None.
          statistics: LSE2 and dPsum, (B, N, m_blocks * 128).
          arrays: of ``functions``, bounds, lists, the mask in bits, and gradients that are summed.
        """
        cfg = self.config
        mQ, mdO, mK, mV = operands
        batch, q_length, kv_length, kv_heads = mQ.shape[0], mQ.shape[1], mK.shape[1], mK.shape[2]
        m_blocks, n_blocks = cute.ceil_div(q_length, ROWS), cute.ceil_div(kv_length, ROWS)
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()

        def tma(op, x, rows, i):
            return tile_tma(op, x, self.head_dims[i], self.dtype, (rows, self.smem_widths[i]))

        own, others = (mK, mV), (mQ, mdO)
        if not self.of_keys:
            own, others = others, own
        own_tma = [tma(load, x, ROWS, i) for i, x in enumerate(own)]
        if self.target == "value":
            own_tma[1] = (None, None)
        blocks = (n_blocks if self.of_keys else m_blocks) * kv_heads * batch
        self.kernel(
            *own_tma[0],
            *own_tma[1],
            *tma(load, others[0], cfg.half, 0),
            *tma(load, others[1], cfg.half, 1),
            *tma(store, result, cfg.half, self.operand),
            *lengths,
            *statistics,
            *arrays,
            m_blocks,
            n_blocks,
            self.section(q_length, kv_length, kv_heads, batch),
            q_length,
            kv_length,
            kv_heads,
            batch,
        ).launch(
            grid=[blocks * (self.query_heads // self.group), 1, 1],
            block=[cfg.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    def section(self, q_length: Int32, kv_length: Int32, kv_heads: Int32, batch: Int32) -> Int32:
        """Key/value heads that are worked on together: what their blocks go over stays in L2."""
        bytes_per_row = 2 * sum(self.head_dims)
        if self.of_keys:
            return section_size(q_length, self.query_heads * bytes_per_row, kv_heads, batch)
        # As in the forward: rows of equal length go head by head, others longest first.
        if self.mask.is_staircase:
            return section_size(kv_length, bytes_per_row, kv_heads, batch)
        return Int32(1)

    def shared_storage(self):
        cfg = self.config
        first_width, second_width = self.smem_widths

        def aligned(elements):
            return cute.struct.Align[cute.struct.MemRange[self.dtype, elements], 1024]

        def statistics(stages):
            return cute.struct.Align[cute.struct.MemRange[Float32, stages * cfg.half], 128]

        @cute.struct
        class SharedStorage:
            own_barriers: cute.struct.MemRange[Int64, KEY_BARRIERS]
            first_barriers: cute.struct.MemRange[Int64, 2 * cfg.first_stages]
            second_barriers: cute.struct.MemRange[Int64, 2 * cfg.second_stages]
            s_barriers: cute.struct.MemRange[Int64, 4]
            dp_barriers: cute.struct.MemRange[Int64, 4]
            done_barrier: cute.struct.MemRange[Int64, 1]
            tensor_memory: cute.struct.MemRange[Int32, 1]
            sLSE: statistics(cfg.first_stages)
            sdPsum: statistics(cfg.second_stages)
            sOwnFirst: aligned(ROWS * first_width)
            sOwnSecond: aligned(0 if self.target == "value" else ROWS * second_width)
            sFirst: aligned(cfg.first_stages * cfg.half * first_width)
            sSecond: aligned(cfg.second_stages * cfg.half * second_width)

        return SharedStorage

    @property
    def has_statistics(self) -> tuple[bool, bool]:
        """Whether LSE2 comes with the first of a tile, and dPsum with the second."""
        return self.of_keys, self.target == "key"

    def pipelines(self, storage) -> list[TensorPipeline]:
        """The edges first, second, s and, but for dV, dp of the table above."""
        cfg = self.config

        def stream(name, barriers, stages, i):
            with_rows = self.has_statistics[i]
            tx_bytes = cfg.half * (self.smem_widths[i] * 2 + 4 * with_rows)
            return TensorPipeline(
                name, barriers.data_ptr(), stages, tx_bytes, 1 + GRADIENT_WARPS // 2 * with_rows
            )

        scores = {"s": storage.s_barriers, "dp": storage.dp_barriers}
        if self.target == "value":
            del scores["dp"]
        return [
            stream("first", storage.first_barriers, cfg.first_stages, 0),
            stream("second", storage.second_barriers, cfg.second_stages, 1),
            *(
                TensorPipeline(name, barriers.data_ptr(), 2, 0, GRADIENT_WARPS // 2)
                for name, barriers in scores.items()
            ),
        ]

    # ---- device side -----------------------------------------------------------------------

    @cute.jit
    def tiles_of_block(self, block: Int32, batch: Int32, lengths, mBounds: tuple):
        """``QueryTiles.query_tiles``, or the same of the keys that a block of queries sees."""
        if const_expr(self.of_keys):
            return self.query_tiles(block, batch, lengths, mBounds)
        if const_expr(self.row_bounds is not None):
            of_rows = mBounds[self.row_bounds.arrays() :]
            fields = tile_fields(self.row_bounds.of_keys, of_rows, batch, block)
            return fields[:4], fields[4] if self.row_bounds.compares_ids else Int32(0)
        offset, queries, keys = lengths
        first = block * ROWS
        last = cutlass.min(first + ROWS, queries) - 1
        keys = select(first < queries, keys, Int32(0))
        bounds = (first + offset, last + offset, keys, ROWS)
        if const_expr(self.union is not None):
            return tuple(self.union.block_ranges(*bounds)), Int32(0)
        return self.mask.block_range(*bounds), Int32(0)

    def ranges(self, tiles: tuple) -> list:
        """Of ``tiles_of_block``, as ``intervals.is_full`` takes them."""
        return list(tiles) if self.union is not None else [tiles]

    def visits_of_block(self, tiles: tuple, mLists: tuple, place, lengths, g: Int32):
        """``QueryTiles.visits``, or the same of the keys of one query head.

        Stretches are the two lists, and without lists one: each tile is looked at.
        """
        block, head, kv_head, batch = place
        _, queries, keys = lengths
        if self.of_keys:
            found = self.visits(tiles, mLists[:4], (block, kv_head, batch), keys, g)
            count, nth, stretches = found
        elif self.has_lists:
            has_rows = block * ROWS < queries
            lists = TileLists(mLists[4:], batch, head, block, has_rows, backwards=False)
            count, nth, stretches = lists.count, lists.tile, lists.stretches(0)
        else:
            count, nth = tiles_of(disjoint(self.ranges(tiles)))
        return count, nth, stretches if self.has_lists else [Stretch(count, nth)]

    @cute.kernel
    def kernel(
        self,
        tma_own_first: cute.CopyAtom,
        gOwnFirst: cute.Tensor,
        tma_own_second: cute.CopyAtom | None,
        gOwnSecond: cute.Tensor | None,
        tma_first: cute.CopyAtom,
        gFirst: cute.Tensor,
        tma_second: cute.CopyAtom,
        gSecond: cute.Tensor,
        tma_result: cute.CopyAtom,
        gResult: cute.Tensor,
        mQOffset: cute.Tensor | None,
        mQLengths: cute.Tensor | None,
        mKVLengths: cute.Tensor | None,
        mLSE2: cute.Tensor,
        mdPsum: cute.Tensor,
        mElements: tuple,
        mBounds: tuple,
        mLists: tuple,
        mPacked: tuple,
        sums: tuple,  # of ``sums_in_memory``
        m_blocks: Int32,
        n_blocks: Int32,
        section: Int32,
        q_length: Int32,
        kv_length: Int32,
        kv_heads: Int32,
        batch_size: Int32,
    ):
        cfg = self.config
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.shared_storage())
        pipelines = self.pipelines(storage)
        own_barriers = storage.own_barriers.data_ptr()
        done_barrier = storage.done_barrier.data_ptr()
        if warp_index == LOAD_WARP:
            for atom in (tma_own_first, tma_own_second, tma_first, tma_second, tma_result):
                if const_expr(atom is not None):
                    cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                for pipeline in pipelines:
                    pipeline.init()
                for i in range(KEY_BARRIERS):
                    cute.arch.mbarrier_init(own_barriers + i, 1)
                cute.arch.mbarrier_init(done_barrier, 2)
            cute.arch.mbarrier_init_fence()
        if warp_index == PRODUCT_WARP:
            cute.arch.alloc_tmem(COLUMNS, storage.tensor_memory.data_ptr())
            cute.arch.relinquish_tmem_alloc_permit()
        cute.arch.sync_threads()
        tensor_memory = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tensor_memory.data_ptr())

        def staged(member, rows, i, stages):
            layout = smem_layout(self.dtype, rows, self.smem_widths[i], stages)
            return member.get_tensor(layout.outer, swizzle=layout.inner)

        sOwnFirst, sOwnSecond = staged(storage.sOwnFirst, ROWS, 0, 1), None
        own_copies = ((tma_own_first, gOwnFirst, sOwnFirst),)
        if const_expr(self.target != "value"):
            sOwnSecond = staged(storage.sOwnSecond, ROWS, 1, 1)
            own_copies = (*own_copies, (tma_own_second, gOwnSecond, sOwnSecond))
        sFirst = staged(storage.sFirst, cfg.half, 0, cfg.first_stages)
        sSecond = staged(storage.sSecond, cfg.half, 1, cfg.second_stages)
        sLSE = storage.sLSE.get_tensor(cute.make_layout((cfg.half, cfg.first_stages)))
        sdPsum = storage.sdPsum.get_tensor(cute.make_layout((cfg.half, cfg.second_stages)))

        own_blocks = n_blocks if const_expr(self.of_keys) else m_blocks
        heads_apart = self.query_heads // self.group
        order = TileOrder(own_blocks, kv_heads, batch_size, heads_apart, section)
        block, head, kv_head, batch = order.coordinates(cute.arch.block_idx()[0])
        if const_expr(self.of_keys):
            # Longest first: with a causal mask the first keys are seen by most queries.
            block = n_blocks - 1 - block
        lengths = entry_lengths(mQOffset, mQLengths, mKVLengths, q_length, kv_length, batch)
        tiles, compares = self.tiles_of_block(block, batch, lengths, mBounds)
        place = (block, head, kv_head, batch)
        visits = partial(self.visits_of_block, tiles, mLists, place, lengths)
        num_tiles = self.all_steps(visits)

        if warp_index >= LOAD_WARP:
            cute.arch.setmaxregister_decrease(cfg.other_registers)
            if warp_index == LOAD_WARP and num_tiles > 0:
                PassLoadWarp(self).load_tiles(
                    own_copies,
                    ((tma_first, gFirst, sFirst), (tma_second, gSecond, sSecond)),
                    ((mLSE2, sLSE), (mdPsum, sdPsum)),
                    pipelines,
                    own_barriers,
                    place,
                    (visits, m_blocks),
                    lengths,
                    (mQLengths is not None, mKVLengths is not None),
                )
            if warp_index == PRODUCT_WARP and num_tiles > 0:
                issuing = PassProductWarp(self)
                issue = issuing.issue_scores if self.is_measuring else issuing.issue_products
                issue(
                    (sOwnFirst, sOwnSecond, sFirst, sSecond),
                    tensor_memory,
                    pipelines,
                    (own_barriers, done_barrier),
                    num_tiles,
                )
            if warp_index == ORDER_WARP:
                # Passes need the statistics alone, which are there once the first pass has waited:
                # blocks of the next may begin where blocks of this one have ended.
                cute.arch.griddepcontrol_wait()
                cute.arch.griddepcontrol_launch_dependents()
        else:
            cute.arch.setmaxregister_increase(cfg.gradient_registers)
            PassWarpgroups(self).differentiate(
                tensor_memory,
                (sLSE, sdPsum),
                (mLSE2, mdPsum),
                (tma_result, gResult, (sFirst, sSecond)[self.operand]),
                pipelines,
                done_barrier,
                place,
                (visits, num_tiles, self.ranges(tiles)),
                lengths,
                (mElements, mBounds, compares, mPacked, sums, (q_length, kv_length)),
            )
        for pipeline in pipelines:
            pipeline.check_arrivals()
        cute.arch.sync_threads()
        if warp_index == PRODUCT_WARP:
            cute.arch.dealloc_tmem(tensor_memory, COLUMNS)
