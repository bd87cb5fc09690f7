"""The product warp of the Blackwell forward: issues S = Q K^T and O += P V for all query tiles."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from jax_flashcute.kernels.sm100.pipeline import take_work
from jax_flashcute.kernels.sm100.tensor_memory import (
    accumulator,
    fence_after_sync,
    gemm,
    operand_a,
    tiled_mma,
)


class ProductWarp:
    """Issues the products of all query tiles."""

    def __init__(self, kernel):
        """``kernel``: the ``ForwardSm100`` that this is a part of."""
        self.kernel = kernel

    @cute.jit
    def issue_products(
        self,
        sQ: cute.Tensor,
        sK: cute.Tensor,
        sV: cute.Tensor,
        tensor_memory: cute.Pointer,
        pipelines,
        work: cute.Tensor,
    ):
        """While one query tile's softmax runs, the other's products do.

        S and P of a key tile share their columns: O += P V is issued ahead of the next S, and
        products of one thread are done in order.  For the same reason O is up to date once the
        next S is, so the correction needs no signal of its own but the last.
        """
        cfg = self.kernel.config
        (
            pipeline_q,
            pipeline_k,
            pipeline_v,
            pipeline_s,
            pipeline_o,
            pipeline_factor,
            pipeline_tile,
        ) = pipelines
        mma_qk = tiled_mma(
            self.kernel.dtype, cfg.tile_n, OperandMajorMode.K, tcgen05.OperandSource.SMEM
        )
        mma_pv = tiled_mma(
            self.kernel.dtype, self.kernel.smem_hv, OperandMajorMode.MN, tcgen05.OperandSource.TMEM
        )
        block_qk, block_pv = mma_qk.get_slice(0), mma_pv.get_slice(0)
        tSrQ = mma_qk.make_fragment_A(block_qk.partition_A(sQ))
        tSrK = mma_qk.make_fragment_B(block_qk.partition_B(sK))
        sVt = cute.make_tensor(sV.iterator, cute.select(sV.layout, mode=[1, 0, 2]))
        tOrV = mma_pv.make_fragment_B(block_pv.partition_B(sVt))
        tiles = range(cfg.query_tiles)
        acc_S = [
            accumulator(mma_qk, cfg.tile_n, tensor_memory + self.kernel.s_column(w)) for w in tiles
        ]
        acc_O = [
            accumulator(mma_pv, self.kernel.smem_hv, tensor_memory + self.kernel.o_column(w))
            for w in tiles
        ]
        tOrP = [
            operand_a(
                mma_pv,
                self.kernel.smem_hv,
                cfg.tile_n,
                self.kernel.dtype,
                tensor_memory + self.kernel.s_column(w),
            )
            for w in tiles
        ]

        counted = self.kernel.counted
        q_phase, k_stage, k_phase, v_stage, v_phase, o_phase, t_stage, t_phase = (
            Int32(0) for _ in range(8)
        )
        # The first S of all overwrites nothing: no P is waited for.  There is a factor for each P.
        s_phase = Int32(1)
        fields = counted(take_work(work, pipeline_tile, t_stage, t_phase, 1, "products"))
        while fields[0] >= 0:
            t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
            n_min, n_max = fields[6], fields[7]
            if n_min < n_max:
                pipeline_k.wait(k_stage, k_phase)
                for w in cutlass.range_constexpr(cfg.query_tiles):
                    pipeline_q.wait(Int32(w), q_phase)
                    # The last factor of the tile of work before lies where S comes.
                    pipeline_factor.acquire(w, s_phase ^ 1)
                    fence_after_sync()
                    gemm(
                        mma_qk,
                        acc_S[w],
                        tSrQ[None, None, None, w],
                        tSrK[None, None, None, k_stage],
                        False,
                    )
                    pipeline_s.commit_products(w)
                pipeline_k.release_products(k_stage)
                k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
                accumulate = Boolean(False)
                for _ in cutlass.range(n_max - n_min - 1, unroll=1):
                    pipeline_v.wait(v_stage, v_phase)
                    pipeline_k.wait(k_stage, k_phase)
                    for w in cutlass.range_constexpr(cfg.query_tiles):
                        pipeline_s.acquire(w, s_phase)
                        pipeline_o.acquire(w, o_phase)
                        fence_after_sync()
                        gemm(
                            mma_pv,
                            acc_O[w],
                            tOrP[w],
                            tOrV[None, None, None, v_stage],
                            accumulate,
                        )
                        if cutlass.const_expr(w == cfg.query_tiles - 1):
                            pipeline_v.release_products(v_stage)
                        gemm(
                            mma_qk,
                            acc_S[w],
                            tSrQ[None, None, None, w],
                            tSrK[None, None, None, k_stage],
                            False,
                        )
                        pipeline_s.commit_products(w)
                    pipeline_k.release_products(k_stage)
                    k_stage, k_phase = pipeline_k.advance(k_stage, k_phase)
                    v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)
                    s_phase ^= 1
                    o_phase ^= 1
                    accumulate = Boolean(True)
                for w in cutlass.range_constexpr(cfg.query_tiles):
                    pipeline_q.release_products(Int32(w))
                q_phase ^= 1
                pipeline_v.wait(v_stage, v_phase)
                for w in cutlass.range_constexpr(cfg.query_tiles):
                    pipeline_s.acquire(w, s_phase)
                    pipeline_o.acquire(w, o_phase)
                    fence_after_sync()
                    gemm(mma_pv, acc_O[w], tOrP[w], tOrV[None, None, None, v_stage], accumulate)
                    pipeline_o.commit_products(w)
                pipeline_v.release_products(v_stage)
                v_stage, v_phase = pipeline_v.advance(v_stage, v_phase)
                s_phase ^= 1
                o_phase ^= 1
            fields = counted(take_work(work, pipeline_tile, t_stage, t_phase, 1, "products"))
