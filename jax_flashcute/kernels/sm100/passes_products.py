"""The product warp of the Blackwell backward in passes: two or three products of a half tile."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from jax_flashcute.kernels.common.tiles import transposed
from jax_flashcute.kernels.sm100.tensor_memory import (
    accumulator,
    fence_after_sync,
    gemm,
    operand_a,
    tiled_mma,
)

SMEM, TMEM = tcgen05.OperandSource.SMEM, tcgen05.OperandSource.TMEM
K_MAJOR, MN_MAJOR = OperandMajorMode.K, OperandMajorMode.MN


class PassProductWarp:
    """Issues the products of a block's own rows with every tile of the other side."""

    def __init__(self, kernel):
        """``kernel``: the ``GradientPassSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def issue_products(
        self, smem, tensor_memory: cute.Pointer, pipelines, barriers, num_tiles: Int32
    ):
        """S and dP of a half, then what the half before it adds to the gradient.

        So a warpgroup has P and dS of its half to compute while the products of the other are
        computed.  S, and dP, overwrite what an earlier product of this warp has read.
        """
        kernel = self.kernel
        has_dp = kernel.target != "value"
        pipeline_first, pipeline_second, pipeline_s = pipelines[:3]
        own_barriers, done_barrier = barriers
        sOwnFirst, sOwnSecond, sFirst, sSecond = smem
        half = kernel.config.half
        places = [tensor_memory + half * h for h in range(2)]
        scores = [self.scores(sOwnFirst, sFirst, p + kernel.s_column) for p in places]
        if const_expr(has_dp):
            dscores = [self.scores(sOwnSecond, sSecond, p + kernel.dp_column) for p in places]
            gradient = [self.gradient(sFirst, tensor_memory, p + kernel.dp_column) for p in places]
        else:
            gradient = [self.gradient(sSecond, tensor_memory, p + kernel.s_column) for p in places]
        # Of what the gradient's product reads: P or dS, which warps store, and a ring of stages.
        pipeline_a = pipelines[-1]
        pipeline_b = pipeline_first if const_expr(has_dp) else pipeline_second

        first_stage, first_phase, second_stage, second_phase = (Int32(0) for _ in range(4))
        b_stage, b_phase, phase = (Int32(0) for _ in range(3))
        cute.arch.mbarrier_wait(own_barriers, 0)
        if const_expr(has_dp):
            cute.arch.mbarrier_wait(own_barriers + 1, 0)
        accumulate = Boolean(False)
        for i in cutlass.range(num_tiles, unroll=1):
            for h in cutlass.range_constexpr(2):
                pipeline_first.wait(first_stage, first_phase)
                if const_expr(has_dp):
                    pipeline_s.acquire(h, phase)
                    fence_after_sync()
                self.issue(scores[h], first_stage, False)
                pipeline_s.commit_products(h)
                if const_expr(has_dp):
                    pipeline_second.wait(second_stage, second_phase)
                    self.issue(dscores[h], second_stage, False)
                    pipeline_a.commit_products(h)
                    pipeline_second.release_products(second_stage)
                    second_stage, second_phase = pipeline_second.advance(second_stage, second_phase)
                else:
                    pipeline_first.release_products(first_stage)
                first_stage, first_phase = pipeline_first.advance(first_stage, first_phase)
                if const_expr(h == 1):
                    b_stage, b_phase = self.add(
                        gradient[0], (pipeline_a, 0, phase), (pipeline_b, b_stage, b_phase),
                        accumulate,
                    )  # fmt: skip
                    accumulate = Boolean(True)
                else:
                    if i > 0:
                        b_stage, b_phase = self.add(
                            gradient[1], (pipeline_a, 1, phase ^ 1), (pipeline_b, b_stage, b_phase),
                            accumulate,
                        )  # fmt: skip
            phase ^= 1
        self.add(gradient[1], (pipeline_a, 1, phase ^ 1), (pipeline_b, b_stage, b_phase), True)
        self.commit_done(done_barrier)

    @cute.jit
    def issue_scores(
        self, smem, tensor_memory: cute.Pointer, pipelines, barriers, num_tiles: Int32
    ):
        """S and dP of every half, for a run that leaves no gradient."""
        kernel = self.kernel
        own_barriers, done_barrier = barriers
        columns = kernel.s_column, kernel.dp_column
        products = [
            [self.scores(own, others, tensor_memory + (kernel.config.half * h + column))
             for h in range(2)]
            for own, others, column in zip(smem[:2], smem[2:], columns, strict=True)
        ]  # fmt: skip
        states, phase = ((Int32(0), Int32(0)), (Int32(0), Int32(0))), Int32(0)
        for i in cutlass.range_constexpr(2):
            cute.arch.mbarrier_wait(own_barriers + i, 0)
        for _ in cutlass.range(num_tiles, unroll=1):
            for h in cutlass.range_constexpr(2):
                following = []
                for ring, target, of_halves, (stage, b_phase) in zip(
                    pipelines[:2], pipelines[2:], products, states, strict=True
                ):
                    ring.wait(stage, b_phase)
                    target.acquire(h, phase)
                    fence_after_sync()
                    self.issue(of_halves[h], stage, False)
                    target.commit_products(h)
                    ring.release_products(stage)
                    following.append(ring.advance(stage, b_phase))
                states = tuple(following)
            phase ^= 1
        self.commit_done(done_barrier)

    def commit_done(self, done_barrier: cute.Pointer) -> None:
        """All products are done.

        The gradient leaves by stages that the load warp may have cleared, of which only this warp
        was told: hence an arrival of its own beside that of the products.
        """
        with cute.arch.elect_one():
            tcgen05.commit(done_barrier)
            cute.arch.mbarrier_arrive(done_barrier)

    @cute.jit
    def add(self, product, a_state, b_state, accumulate):
        """Adds a half's P or dS times its B to the gradient; returns B's next stage and phase."""
        pipeline_a, half, phase = a_state
        pipeline_b, stage, b_phase = b_state
        if const_expr(self.kernel.target == "value"):
            pipeline_b.wait(stage, b_phase)
        pipeline_a.acquire(half, phase ^ 1)
        fence_after_sync()
        mma, acc, a, b = product
        gemm(mma, acc, a, b[None, None, None, stage], accumulate)
        pipeline_b.release_products(stage)
        return pipeline_b.advance(stage, b_phase)

    def issue(self, product, stage, accumulate) -> None:
        """Issues a product of ``scores``."""
        mma, acc, a, b = product
        gemm(mma, acc, a[None, None, None, 0], b[None, None, None, stage], accumulate)

    # Each of the following returns (mma, accumulator, A, B).

    def scores(self, own: cute.Tensor, others: cute.Tensor, place: cute.Pointer):
        """S or dP of the block's rows with half a tile."""
        half = self.kernel.config.half
        mma = tiled_mma(self.kernel.dtype, half, K_MAJOR, SMEM)
        part = mma.get_slice(0)
        a = mma.make_fragment_A(part.partition_A(own))
        b = mma.make_fragment_B(part.partition_B(others))
        return mma, accumulator(mma, half, place), a, b

    def gradient(self, others: cute.Tensor, tensor_memory: cute.Pointer, place: cute.Pointer):
        """The gradient; A, which is P or dS of half a tile, is in tensor memory."""
        kernel, n = self.kernel, cute.size(others, mode=[1])
        mma = tiled_mma(kernel.dtype, n, MN_MAJOR, TMEM)
        a = operand_a(mma, n, kernel.config.half, kernel.dtype, place)
        b = mma.make_fragment_B(mma.get_slice(0).partition_B(transposed(others)))
        return mma, accumulator(mma, n, tensor_memory + kernel.gradient_column), a, b
