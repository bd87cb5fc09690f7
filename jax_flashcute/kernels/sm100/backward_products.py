"""The product warp of the Blackwell backward: the five products of every tile."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass._mlir.dialects.nvvm import MemScopeKind
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from jax_flashcute.kernels.common.tiles import transposed
from jax_flashcute.kernels.sm100.pipeline import commit_to_pair, tell_first
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
        pipeline_q, pipeline_do, pipeline_s, pipeline_dp, pipeline_dq, pipeline_ds = pipelines[:6]
        # Rings of their own for dV and dK, or Q and dO are kept for them.
        pipeline_dot, pipeline_qt = pipelines[6:] if kernel.is_pair else pipelines[1::-1]
        key_barriers, done_barrier = barriers
        sQ, sdO, sK, sV, sdS, (sQt, sdOt, sKt) = smem
        place = tensor_memory
        if const_expr(kernel.is_pair):
            changing = (sQ, sdO, sdOt, sQt, sdS, sKt)
            sQ, sdO, sdOt, sQt, sdS, sKt = (two_stages(x) for x in changing)
        scores = self.scores(sK, sQ, place + kernel.s_column)
        dscores = self.scores(sV, sdO, place + kernel.dp_column)
        values = self.key_gradient(kernel.p_columns, sdOt, place, kernel.dv_column)
        keys = self.key_gradient(kernel.ds_columns, sQt, place, kernel.dk_column)
        queries = self.query_gradient(sdS, sKt, place + kernel.dq_column)

        q_stage, q_phase, do_stage, do_phase, phase = (Int32(0) for _ in range(5))
        cute.arch.mbarrier_wait(key_barriers, 0)
        if const_expr(not in_turn):
            pipeline_q.wait(q_stage, q_phase)
            self.issue(scores, 0, q_stage, False)
            pipeline_s.commit_products(0)
            if const_expr(kernel.is_pair):
                pipeline_q.release_products(q_stage)
        cute.arch.mbarrier_wait(key_barriers + 1, 0)
        if const_expr(kernel.is_pair):
            cute.arch.mbarrier_wait(key_barriers + 2, 0)
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
            do_place = self.changing(pipeline_do, do_stage, do_phase, tensor_memory)
            q_place = self.changing(pipeline_q, q_stage, q_phase, tensor_memory)
            self.issue(dscores, 0, do_place, False)
            pipeline_dp.commit_products(0)
            if const_expr(not in_turn):
                pipeline_s.acquire(0, phase ^ 1)
                fence_after_sync()
            if const_expr(kernel.is_pair):
                pipeline_do.release_products(do_stage)
                pipeline_dot.wait(do_stage, do_phase)
            self.issue_halves(values, do_place, accumulate)
            pipeline_dot.release_products(do_stage)
            do_stage, do_phase = pipeline_do.advance(do_stage, do_phase)
            next_stage, next_phase = pipeline_q.advance(q_stage, q_phase)
            if const_expr(not in_turn):
                if i + 1 < num_tiles:
                    pipeline_q.wait(next_stage, next_phase)
                    next_place = self.changing(pipeline_q, next_stage, next_phase, tensor_memory)
                    self.issue(scores, 0, next_place, False)
                    pipeline_s.commit_products(0)
                    if const_expr(kernel.is_pair):
                        pipeline_q.release_products(next_stage)
            # dS is stored, over dP as well.
            pipeline_dp.acquire(0, phase ^ 1)
            fence_after_sync()
            if const_expr(kernel.is_pair):
                pipeline_qt.wait(q_stage, q_phase)
            self.issue_halves(keys, q_place, accumulate)
            pipeline_qt.release_products(q_stage)
            if const_expr(not shares_dq):
                pipeline_dq.acquire(0, phase)
                fence_after_sync()
            if const_expr(kernel.is_pair):
                pipeline_ds.acquire(0, phase ^ 1)
            ds_place = self.changing(pipeline_dq, 0, phase, tensor_memory)
            self.issue(queries, ds_place, ds_place, False)
            pipeline_dq.commit_products(0)
            q_stage, q_phase = next_stage, next_phase
            phase ^= 1
            accumulate = Boolean(True)
        self.commit_done(done_barrier)

    @cute.jit
    def issue_scores(
        self, smem, tensor_memory: cute.Pointer, pipelines, barriers, num_tiles: Int32
    ):
        """S and dP of every tile, for a run that leaves no gradients."""
        kernel = self.kernel
        pipeline_q, pipeline_do, pipeline_s, pipeline_dp = pipelines
        key_barriers, done_barrier = barriers
        sQ, sdO, sK, sV = smem
        if const_expr(kernel.is_pair):
            sQ, sdO = two_stages(sQ), two_stages(sdO)
        scores = self.scores(sK, sQ, tensor_memory + kernel.s_column)
        dscores = self.scores(sV, sdO, tensor_memory + kernel.dp_column)

        q_stage, q_phase, do_stage, do_phase, phase = (Int32(0) for _ in range(5))
        for i in cutlass.range_constexpr(2):
            cute.arch.mbarrier_wait(key_barriers + i, 0)
        for _ in cutlass.range(num_tiles, unroll=1):
            pipeline_q.wait(q_stage, q_phase)
            pipeline_s.acquire(0, phase)
            if const_expr(kernel.config.in_turn):
                pipeline_dp.acquire(0, phase)
            fence_after_sync()
            self.issue(scores, 0, q_stage, False)
            pipeline_s.commit_products(0)
            pipeline_q.release_products(q_stage)
            q_stage, q_phase = pipeline_q.advance(q_stage, q_phase)

            pipeline_do.wait(do_stage, do_phase)
            if const_expr(kernel.config.in_turn):
                # S is read, whose place dP takes.
                pipeline_s.acquire(0, phase ^ 1)
            else:
                pipeline_dp.acquire(0, phase)
            fence_after_sync()
            self.issue(dscores, 0, do_stage, False)
            pipeline_dp.commit_products(0)
            pipeline_do.release_products(do_stage)
            do_stage, do_phase = pipeline_do.advance(do_stage, do_phase)
            phase ^= 1
        self.commit_done(done_barrier)

    def commit_done(self, done_barrier: cute.Pointer) -> None:
        """All products are done."""
        if self.kernel.is_pair:
            commit_to_pair(done_barrier)
            return
        with cute.arch.elect_one():
            tcgen05.commit(done_barrier)

    @cute.jit
    def pass_on_operands(self, pipelines, key_barriers: cute.Pointer, num_tiles: Int32):
        """The second block of a pair: tells the first what has arrived, in the order of its use."""
        rings = (*pipelines[:2], *pipelines[6:])
        operands = 2 if self.kernel.is_measuring else 3
        for i in cutlass.range_constexpr(operands):
            cute.arch.mbarrier_wait(key_barriers + i, 0)
            tell_first(key_barriers + i, MemScopeKind.CLUSTER)
        state = tuple((Int32(0), Int32(0)) for _ in rings)
        for _ in cutlass.range(num_tiles, unroll=1):
            for r in cutlass.range_constexpr(len(rings)):
                rings[r].pass_on(*state[r])
            state = tuple(rings[r].advance(*state[r]) for r in range(len(rings)))

    def changing(self, ring, stage: Int32, phase: Int32, tensor_memory: cute.Pointer) -> Int32:
        """A stage of a ring, as a number that seems to change where there is but one.

        All of tensor memory begins at 0, which the compiler does not know: addresses that never
        change it would keep in registers, where there are not enough.
        """
        if ring.stages > 1 or not self.kernel.is_pair:
            return stage
        return phase & tensor_memory.toint()

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

    def product(self, m: int, n: int, *operands):
        """What makes the fragments of a block's operands, and what multiplies them.

        Args:
          m, n: rows and columns of what the block holds of A and of B; those of a pair follow each
            other.
          operands: majors and source, of ``tiled_mma``.
        """
        b_major, a_source, a_major = operands
        group = self.kernel.cta_group
        of_block = tiled_mma(self.kernel.dtype, n, b_major, a_source, a_major, m)
        if group == 1:
            return of_block, of_block
        shape = (n * group, b_major, a_source, a_major, m * group)
        return of_block, tiled_mma(self.kernel.dtype, *shape, cta_group=group)

    # Each of the following returns (mma, accumulator, A, B).

    def scores(self, keys: cute.Tensor, rows: cute.Tensor, place: cute.Pointer):
        """S^T = K Q^T, or dP^T = V dO^T."""
        of_block, mma = self.product(ROWS, cute.size(rows, mode=[0]), K_MAJOR, SMEM, K_MAJOR)
        part = of_block.get_slice(0)
        a = of_block.make_fragment_A(part.partition_A(keys))
        b = of_block.make_fragment_B(part.partition_B(rows))
        return mma, self.accumulator(mma, ROWS, cute.size(rows, mode=[0]), place), a, b

    def key_gradient(self, columns, rows: cute.Tensor, place: cute.Pointer, column: int):
        """dV += P^T dO, or dK += dS^T Q; A is in tensor memory, half by half."""
        n = cute.size(rows, mode=[1])
        of_block, mma = self.product(ROWS, n, MN_MAJOR, TMEM, K_MAJOR)
        halves = [operand_a(of_block, n, ROWS // 2, self.kernel.dtype, place + c) for c in columns]
        b = of_block.make_fragment_B(of_block.get_slice(0).partition_B(transposed(rows)))
        return mma, self.accumulator(mma, ROWS, n, place + column), halves, b

    def query_gradient(self, sdS: cute.Tensor, sK: cute.Tensor, place: cute.Pointer):
        """dQ = dS K."""
        m, n = cute.size(sdS, mode=[1]), cute.size(sK, mode=[1])
        of_block, mma = self.product(m, n, MN_MAJOR, SMEM, MN_MAJOR)
        part = of_block.get_slice(0)
        a = of_block.make_fragment_A(part.partition_A(transposed(sdS)))
        b = of_block.make_fragment_B(part.partition_B(transposed(sK)))
        return mma, self.accumulator(mma, m, n, place), a, b

    def accumulator(self, mma, m: int, n: int, place: cute.Pointer) -> cute.Tensor:
        """Of a product whose operands have ``m`` rows and ``n`` columns in each block."""
        group = self.kernel.cta_group
        return accumulator(mma, n * group, place, m * group)


def two_stages(x: cute.Tensor) -> cute.Tensor:
    """(rows, columns, stages) with a second stage, never used, where there is but one."""
    if cute.size(x, mode=[2]) > 1:
        return x
    tile = cute.select(x.layout, mode=[0, 1])
    stages = cute.make_layout(2, stride=cute.size(tile))
    return cute.make_tensor(x.iterator, cute.append(tile, stages))
