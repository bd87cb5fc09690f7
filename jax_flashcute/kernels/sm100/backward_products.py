"""The product warp of the Blackwell backward: the five products of every tile."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from jax_flashcute.kernels.common.tiles import transposed
from jax_flashcute.kernels.sm100.tensor_memory import (
    ROWS,
    accumulator,
    fence_after_sync,
    gemm,
    operand_a,
    tiled_mma,
)

SMEM, TMEM = tcgen05.OperandSource.SMEM, tcgen05.OperandSource.TMEM
K_MAJOR, MN_MAJOR = OperandMajorMode.K, OperandMajorMode.MN


class ProductWarp:
    """Issues the products of a block of keys with every tile of queries."""

    def __init__(self, kernel):
        """``kernel``: the ``BackwardSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def issue_products(
        self,
        smem,
        tensor_memory: cute.Pointer,
        pipelines,
        barriers,
        num_tiles: Int32,
    ):
        """dP, dV, dK and dQ of a tile; the S of the next is issued between dV and dK.

        It overwrites P, which products before it have read, and keeps the gradient warpgroups busy
        while dK and dQ are computed.  In turn, S waits for dQ to be read.
        """
        kernel, in_turn = self.kernel, self.kernel.config.in_turn
        shares_dq = kernel.dq_column == kernel.dp_column
        pipeline_q, pipeline_do, pipeline_s, pipeline_dp, pipeline_dq = pipelines
        key_barriers, done_barrier = barriers
        sQ, sdO, sK, sV, sdS = smem
        place = tensor_memory
        scores = self.scores(sK, sQ, place + kernel.s_column)
        dscores = self.scores(sV, sdO, place + kernel.dp_column)
        values = self.key_gradient(kernel.p_columns, sdO, place, kernel.dv_column)
        keys = self.key_gradient(kernel.ds_columns, sQ, place, kernel.dk_column)
        queries = self.query_gradient(sdS, sK, place + kernel.dq_column)

        q_stage, q_phase, do_stage, do_phase, phase = (Int32(0) for _ in range(5))
        cute.arch.mbarrier_wait(key_barriers, 0)
        if const_expr(not in_turn):
            pipeline_q.wait(q_stage, q_phase)
            self.issue(scores, 0, q_stage, False)
            pipeline_s.commit_products(0)
        cute.arch.mbarrier_wait(key_barriers + 1, 0)
        accumulate = Boolean(False)
        for i in cutlass.range(num_tiles, unroll=1):
            if const_expr(in_turn):
                pipeline_q.wait(q_stage, q_phase)
                pipeline_dq.acquire(0, phase)
                fence_after_sync()
                self.issue(scores, 0, q_stage, False)
                pipeline_s.commit_products(0)
                pipeline_s.acquire(0, phase ^ 1)
                fence_after_sync()
            pipeline_do.wait(do_stage, do_phase)
            if const_expr(shares_dq and not in_turn):
                pipeline_dq.acquire(0, phase)
                fence_after_sync()
            self.issue(dscores, 0, do_stage, False)
            pipeline_dp.commit_products(0)
            if const_expr(not in_turn):
                pipeline_s.acquire(0, phase ^ 1)
                fence_after_sync()
            self.issue_halves(values, do_stage, accumulate)
            pipeline_do.release_products(do_stage)
            do_stage, do_phase = pipeline_do.advance(do_stage, do_phase)
            next_stage, next_phase = pipeline_q.advance(q_stage, q_phase)
            if const_expr(not in_turn):
                if i + 1 < num_tiles:
                    pipeline_q.wait(next_stage, next_phase)
                    self.issue(scores, 0, next_stage, False)
                    pipeline_s.commit_products(0)
            # dS is stored, over dP as well.
            pipeline_dp.acquire(0, phase ^ 1)
            fence_after_sync()
            self.issue_halves(keys, q_stage, accumulate)
            pipeline_q.release_products(q_stage)
            if const_expr(not shares_dq):
                pipeline_dq.acquire(0, phase)
                fence_after_sync()
            self.issue(queries, 0, 0, False)
            pipeline_dq.commit_products(0)
            q_stage, q_phase = next_stage, next_phase
            phase ^= 1
            accumulate = Boolean(True)
        with cute.arch.elect_one():
            tcgen05.commit(done_barrier)

    def issue(self, product, a_stage, b_stage, accumulate) -> None:
        """Issues a product of ``scores`` or of ``query_gradient``."""
        mma, acc, a, b = product
        gemm(mma, acc, a[None, None, None, a_stage], b[None, None, None, b_stage], accumulate)

    def issue_halves(self, product, stage, accumulate) -> None:
        """Issues a ``key_gradient``, the two gradient warpgroups' queries one after the other."""
        mma, acc, halves, b = product
        first = 0
        for a in halves:
            gemm(mma, acc, a, b[None, None, None, stage], accumulate, first)
            first += cute.size(a, mode=[2])
            accumulate = True

    # Each of the following returns (mma, accumulator, A, B).

    def scores(self, keys: cute.Tensor, rows: cute.Tensor, place: cute.Pointer):
        """S^T = K Q^T, or dP^T = V dO^T."""
        mma = tiled_mma(self.kernel.dtype, ROWS, K_MAJOR, SMEM)
        part = mma.get_slice(0)
        a = mma.make_fragment_A(part.partition_A(keys))
        b = mma.make_fragment_B(part.partition_B(rows))
        return mma, accumulator(mma, ROWS, place), a, b

    def key_gradient(self, columns, rows: cute.Tensor, place: cute.Pointer, column: int):
        """dV += P^T dO, or dK += dS^T Q; A is in tensor memory, half by half."""
        n = cute.size(rows, mode=[1])
        mma = tiled_mma(self.kernel.dtype, n, MN_MAJOR, TMEM)
        halves = [operand_a(mma, n, ROWS // 2, self.kernel.dtype, place + c) for c in columns]
        b = mma.make_fragment_B(mma.get_slice(0).partition_B(transposed(rows)))
        return mma, accumulator(mma, n, place + column), halves, b

    def query_gradient(self, sdS: cute.Tensor, sK: cute.Tensor, place: cute.Pointer):
        """dQ = dS K."""
        n = self.kernel.smem_h
        mma = tiled_mma(self.kernel.dtype, n, MN_MAJOR, SMEM, MN_MAJOR)
        part = mma.get_slice(0)
        a = mma.make_fragment_A(part.partition_A(transposed(sdS)))
        b = mma.make_fragment_B(part.partition_B(transposed(sK)))
        return mma, accumulator(mma, n, place), a, b
