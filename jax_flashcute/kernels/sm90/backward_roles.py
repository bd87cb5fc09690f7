"""Consumers of the Hopper backward where two warpgroups share 64 keys by role.

So it is for head_dims above 128, and at 128 for lists of small tiles.  dK and dV of 64 keys and 256
columns would fill the registers of one warpgroup, so each holds one:

    first:   S^T = K Q^T,   P^T = exp2(scale log2(e) S^T - LSE2),   dV += P^T dO
    second:  dP^T = V dO^T,   dS^T = P^T (dP^T - dPsum),            dK += dS^T Q

and both compute dQ = dS K in chunks of 64 columns, the first the even ones.  The first issues S of
the next tile before it waits for dS of this one.  The producer and the dQ warps are those of
backward.py; there is a dQ warp for each warpgroup.

Where scores are changed, the second goes from their gradients to those of the products, and sums
those of arrays; it takes the products before P, where derivatives are functions of them.

    edge      producer   consumer   full                                          empty
    products  first      second     named barrier 10, 256 threads, first arrives  named barrier 11
    P         first      second     named barrier 8, 256 threads, first arrives   by dS
    dS        second     both       named barrier 9, 256 threads                  by P

Where dQ has a pass of its own (backward_dq.py), neither computes it: dS stays in the registers of
the second, and its barrier only says that P has been read.

All of them hold one tile, products and P in the same place: the first writes there again after the
second wrote dS, and so had read P; the second writes the next dS after it got the next P, which the
first makes once its dQ is done.
"""

from functools import partial
from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.tiles import transposed
from jax_flashcute.kernels.sm90.fragments import (
    ROWS_PER_THREAD,
    as_operand_a,
    convert_pairs,
    gemm,
    rows_and_columns,
    tiled_mma,
)

P_BARRIER = 8
DS_BARRIER = 9
PRODUCTS_BARRIER = 10
READ_BARRIER = 11

SMEM, RMEM = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
K_MAJOR, MN_MAJOR = OperandMajorMode.K, OperandMajorMode.MN


class RoleConsumers:
    """The two consumer warpgroups of a ``BackwardSm90`` whose configuration is ``by_role``."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.config = kernel.config
        self.apart = kernel.config.dq_pass is not None
        functions = kernel.functions
        self.hands_products = kernel.has_pullback and functions.derivatives_read_score
        # Where nothing is summed, derivatives are all there is to a pullback.
        self.derives_early = kernel.has_pullback and not functions.summed_ranks

    @cute.jit
    def consume(
        self,
        smem,
        dk_copy,
        dv_copy,
        barriers,
        block,
        tiles,
        mask_step: cutlass.Constexpr,
        elements,
    ):
        """Either warpgroup: the products of its role over all tiles, then its gradient."""
        first = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128) == 1
        if first:
            self.hold_values(smem, barriers, block, tiles, mask_step, elements)
        else:
            self.hold_keys(smem, barriers, block, tiles, elements)
        if const_expr(not self.kernel.is_measuring):
            sK, sV = smem[2], smem[3]
            cute.arch.fence_view_async_shared()
            self.kernel.meet()
            self.kernel.store_gradients(
                ((*dv_copy, sV, self.kernel.smem_hv), (*dk_copy, sK, self.kernel.smem_h)), block
            )

    # ---- the two roles -----------------------------------------------------------------------

    @cute.jit
    def hold_values(self, smem, barriers, block, tiles, mask_step: cutlass.Constexpr, elements):
        """The first warpgroup: S, P and dV."""
        cfg = self.config
        sQ, sdO, sK, sV, sdS, sdQ, sLSE, _, sP = smem
        pipeline_q, pipeline_do, kv_full = barriers
        n_block, _, _ = block
        visits, steps, ranges = tiles
        thread = cute.arch.thread_idx()[0] % 128
        mma_s, tSrK, tSrQ, acc_S = self.scores(sK, sQ)
        mma_dv, tVrO, acc_dV = self.gradient(sdO, self.kernel.smem_hv)
        query_gradient = self.query_gradients(sdS, sK, sdQ, thread, 0)
        scores = rows_and_columns(acc_S)
        tLSE = self.kernel.column_pairs(sLSE, thread)
        tP = sP[None, thread, None]
        flat = cute.make_tensor(acc_S.iterator, cute.make_layout((4, cute.size(acc_S) // 4)))
        mask_tile = mask_step(scores, thread, n_block * cfg.tile_n)
        mask_tile = partial(self.kernel.mask_tile, mask_tile, ranges)

        q_stage, q_phase, do_stage, do_phase = (Int32(0) for _ in range(4))
        left = steps
        if steps > 0:
            cute.arch.mbarrier_wait(kv_full, 0)
            pipeline_q.wait(q_stage, q_phase)
            gemm(mma_s, acc_S, tSrK, tSrQ[None, None, None, q_stage], False)
            warpgroup.wait_group(0)
            for g in cutlass.range(self.kernel.group, unroll=1):
                modify = self.kernel.elements_of_head(
                    elements, block, g, n_block * cfg.tile_n, thread
                )
                _, _, stretches = visits(g)
                for stretch in cutlass.range_constexpr(len(stretches)):
                    count, tile_of, is_masked, is_full = stretches[stretch]
                    for i in cutlass.range(count, unroll=1):
                        m = tile_of(i)
                        if const_expr(self.hands_products):
                            cute.autovec_copy(flat, tP)
                            cute.arch.barrier_arrive(
                                barrier_id=PRODUCTS_BARRIER, number_of_threads=256
                            )
                        if const_expr(modify is not None):
                            modify(m, scores, is_masked, is_full)
                        mask_tile(m, is_masked)
                        self.kernel.probabilities(scores, tLSE, q_stage)
                        pipeline_q.release(q_stage, self.kernel.consumer_warps, lanes_read=True)
                        rP = cute.make_rmem_tensor(acc_S.layout, self.kernel.dtype)
                        convert_pairs(acc_S, rP)
                        if const_expr(self.hands_products):
                            cute.arch.barrier(barrier_id=READ_BARRIER, number_of_threads=256)
                        cute.autovec_copy(flat, tP)
                        cute.arch.barrier_arrive(barrier_id=P_BARRIER, number_of_threads=256)
                        pipeline_do.wait(do_stage, do_phase)
                        if const_expr(not self.kernel.is_measuring):
                            gemm(
                                mma_dv,
                                acc_dV,
                                as_operand_a(rP),
                                tVrO[None, None, None, do_stage],
                                True,
                            )
                        # After the last tile its own S is computed once more, for nothing: a
                        # branch around a product would make ptxas wait for every one.
                        left -= 1
                        is_last = left == 0
                        next_stage, next_phase = pipeline_q.advance(q_stage, q_phase)
                        q_stage = q_stage if is_last else next_stage
                        q_phase = q_phase if is_last else next_phase
                        pipeline_q.wait(q_stage, q_phase)
                        gemm(mma_s, acc_S, tSrK, tSrQ[None, None, None, q_stage], False)
                        cute.arch.barrier(barrier_id=DS_BARRIER, number_of_threads=256)
                        query_gradient()
                        warpgroup.wait_group(0)
                        pipeline_do.release(do_stage, self.kernel.consumer_warps)
                        do_stage, do_phase = pipeline_do.advance(do_stage, do_phase)
        if const_expr(not self.kernel.is_measuring):
            # The second warpgroup reads V until it has written the last dS.
            self.kernel.meet()
            self.kernel.stage_gradient(acc_dV, mma_dv, sV[None, None, 0], thread, 1.0)

    @cute.jit
    def hold_keys(self, smem, barriers, block, tiles, elements):
        """The second warpgroup: dP, dS and dK."""
        cfg = self.config
        sQ, sdO, sK, sV, sdS, sdQ, _, sdPsum, sP = smem
        pipeline_q, pipeline_do, kv_full = barriers
        n_block, kv_head, _ = block
        visits, steps, _ = tiles
        thread = cute.arch.thread_idx()[0] % 128
        mma_s, tPrV, tPrO, acc_P = self.scores(sV, sdO)
        mma_dk, tKrQ, acc_dK = self.gradient(sQ, self.kernel.smem_h)
        query_gradient = self.query_gradients(sdS, sK, sdQ, thread, 1)
        tdPsum = self.kernel.column_pairs(sdPsum, thread)
        copy_ds, tSsS = None, None
        if const_expr(not self.apart):
            copy_ds = cute.make_tiled_copy_C(
                cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), self.kernel.dtype), mma_s
            ).get_slice(thread)
            tSsS = copy_ds.partition_D(
                cute.local_tile(transposed(sdS)[None, None, 0], (64, cfg.tile_m), (0, 0))
            )
        products = SimpleNamespace(
            mma_s=mma_s,
            tPrV=tPrV,
            tPrO=tPrO,
            acc_P=acc_P,
            mma_dk=mma_dk,
            tKrQ=tKrQ,
            acc_dK=acc_dK,
            tP=sP[None, thread, None],
            tdPsum=tdPsum,
            copy_ds=copy_ds,
            tSsS=tSsS,
            query_gradient=query_gradient,
        )

        # Stages and phases of Q and of dO.
        state = tuple(Int32(0) for _ in range(4))
        if steps > 0:
            cute.arch.mbarrier_wait(kv_full, 0)
            cute.arch.mbarrier_wait(kv_full + 1, 0)
            step = partial(self.keys_step, products, pipeline_q, pipeline_do)
            if const_expr(not self.kernel.has_pullback):
                for _ in cutlass.range(steps, unroll=1):
                    state = step(state)
            else:
                pullback = self.kernel.pullback(elements, block, n_block * cfg.tile_n, thread, None)
                start, add, finish = pullback.start, pullback.tile, pullback.finish
                for g in cutlass.range(self.kernel.group, unroll=1):
                    head = kv_head * self.kernel.group + g
                    start()
                    count, tile_of, _ = visits(g)
                    for i in cutlass.range(count, unroll=1):
                        state = step(state, partial(add, head, tile_of(i)))
                    finish(head)
        if const_expr(not self.kernel.is_measuring):
            # The first warpgroup reads K until its last dQ is done.
            self.kernel.meet()
            self.kernel.stage_gradient(acc_dK, mma_dk, sK[None, None, 0], thread, self.kernel.scale)

    def keys_step(self, products, pipeline_q, pipeline_do, state, differentiate=None):
        """One query tile of the second warpgroup; returns the next state.

        ``differentiate``: ``Pullback.tile`` of the products and the gradients of the scores.
        """
        c, warps = products, self.kernel.consumer_warps
        q_stage, q_phase, do_stage, do_phase = state
        pipeline_do.wait(do_stage, do_phase)
        gemm(c.mma_s, c.acc_P, c.tPrV, c.tPrO[None, None, None, do_stage], False)
        pipeline_q.wait(q_stage, q_phase)
        raw = self.take_products(c) if self.hands_products else None
        factors = None
        if differentiate is not None and self.derives_early:
            # While the first warpgroup makes P.
            factors = rows_and_columns(cute.make_rmem_tensor(c.acc_P.layout, Float32))
            factors.fill(1.0)
            differentiate(raw, factors)
        cute.arch.barrier(barrier_id=P_BARRIER, number_of_threads=256)
        warpgroup.wait_group(0)
        self.score_gradients(c.acc_P, c.tP, c.tdPsum, do_stage)
        pipeline_do.release(do_stage, warps, lanes_read=True)
        do_stage, do_phase = pipeline_do.advance(do_stage, do_phase)
        if factors is not None:
            self.multiply(rows_and_columns(c.acc_P), factors)
        elif differentiate is not None:
            differentiate(raw, rows_and_columns(c.acc_P))
        if self.kernel.is_measuring:
            cute.arch.barrier(barrier_id=DS_BARRIER, number_of_threads=256)
            pipeline_q.release(q_stage, warps)
            return *pipeline_q.advance(q_stage, q_phase), do_stage, do_phase
        rdS = cute.make_rmem_tensor(c.acc_P.layout, self.kernel.dtype)
        convert_pairs(c.acc_P, rdS)
        if self.apart:
            # To arrive would do for the first, but orders no read before its next write.
            cute.arch.barrier(barrier_id=DS_BARRIER, number_of_threads=256)
        else:
            cute.copy(c.copy_ds, c.copy_ds.retile(rdS), c.tSsS)
        gemm(c.mma_dk, c.acc_dK, as_operand_a(rdS), c.tKrQ[None, None, None, q_stage], True)
        if not self.apart:
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=DS_BARRIER, number_of_threads=256)
            c.query_gradient()
        warpgroup.wait_group(0)
        pipeline_q.release(q_stage, warps)
        return *pipeline_q.advance(q_stage, q_phase), do_stage, do_phase

    def multiply(self, dscores: cute.Tensor, factors: cute.Tensor) -> None:
        """``factors`` may be infinite where a gradient is 0, as beyond the last row and key."""
        for i in range(cute.size(dscores)):
            gradient = dscores[i]
            changed = gradient * factors[i]
            dscores[i] = select(gradient != Float32(0.0), changed, Float32(0.0))

    def take_products(self, c) -> cute.Tensor:
        """Those of a tile, which P takes the place of, by row and column."""
        kept = cute.make_rmem_tensor(c.acc_P.layout, Float32)
        flat = cute.make_tensor(kept.iterator, cute.make_layout((4, cute.size(kept) // 4)))
        cute.arch.barrier(barrier_id=PRODUCTS_BARRIER, number_of_threads=256)
        cute.autovec_copy(c.tP, flat)
        cute.arch.barrier(barrier_id=READ_BARRIER, number_of_threads=256)
        return rows_and_columns(kept)

    # ---- operands and steps --------------------------------------------------------------------

    def scores(self, keys: cute.Tensor, rows: cute.Tensor):
        """A product of the block's 64 keys with a tile of rows: (mma, A, B, accumulator)."""
        mma = tiled_mma(self.kernel.dtype, self.config.tile_m, K_MAJOR, SMEM)
        part = mma.get_slice(0)
        a = mma.make_fragment_A(part.partition_A(keys[None, None, 0]))
        b = mma.make_fragment_B(part.partition_B(rows))
        shape = mma.partition_shape_C((64, self.config.tile_m))
        return mma, a, b, cute.make_rmem_tensor(shape, Float32)

    def gradient(self, rows: cute.Tensor, width: int):
        """A sum over the rows of every tile, A from registers: (mma, B, accumulator of zeros)."""
        mma = tiled_mma(self.kernel.dtype, width, MN_MAJOR, RMEM)
        b = mma.make_fragment_B(mma.get_slice(0).partition_B(transposed(rows)))
        acc = cute.make_rmem_tensor(mma.partition_shape_C((64, width)), Float32)
        acc.fill(0.0)
        return mma, b, acc

    def dq_operands(self, sdS: cute.Tensor, sK: cute.Tensor, role: int):
        """(mma, A, list of B): dS and a role's chunks of K."""
        rows, columns = self.config.dq_part_shape(self.kernel.head_dim)
        mma = tiled_mma(self.kernel.dtype, columns, MN_MAJOR, SMEM)
        part = mma.get_slice(0)
        a = mma.make_fragment_A(part.partition_A(sdS[None, None, 0]))
        chunks = [
            mma.make_fragment_B(
                part.partition_B(
                    cute.local_tile(
                        transposed(sK)[None, None, 0], (columns, self.config.tile_n), (c, 0)
                    )
                )
            )
            for c in range(role, self.config.dq_parts(self.kernel.head_dim), 2)
        ]
        return mma, a, chunks, (rows, columns)

    def query_gradients(self, sdS, sK: cute.Tensor, sdQ, thread: Int32, role: int):
        """A function that computes a role's part of dQ of a tile; nothing where a pass does."""
        if self.apart or self.kernel.is_measuring:
            return lambda: None
        operands = self.dq_operands(sdS, sK, role)
        return partial(self.query_gradient, operands, sdQ, thread, role)

    def query_gradient(self, operands, sdQ: cute.Tensor, thread: Int32, role: int) -> None:
        """A role's chunks of dQ of a tile, handed to its dQ warp."""
        mma, a, chunks, shape = operands
        for b in chunks:
            acc_dQ = cute.make_rmem_tensor(mma.partition_shape_C(shape), Float32)
            gemm(mma, acc_dQ, a, b, False)
            warpgroup.wait_group(0)
            self.kernel.hand_over_dq(acc_dQ, sdQ, thread, role)

    @cute.jit
    def score_gradients(
        self, acc_P: cute.Tensor, tP: cute.Tensor, tdPsum: cute.Tensor, stage: Int32
    ):
        """P (dP - dPsum), in place of dP; P comes from the first warpgroup's same thread."""
        dscores = rows_and_columns(acc_P)
        pair = cute.make_rmem_tensor(2, Float32)
        probabilities = cute.make_rmem_tensor(4, Float32)
        for j in cutlass.range_constexpr(cute.size(dscores, mode=[1]) // 2):
            cute.autovec_copy(tdPsum[None, j, stage], pair)
            cute.autovec_copy(tP[None, j], probabilities)
            for b in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(ROWS_PER_THREAD):
                    c = 2 * j + b
                    dscores[r, c] = probabilities[2 * r + b] * (dscores[r, c] - pair[b])
