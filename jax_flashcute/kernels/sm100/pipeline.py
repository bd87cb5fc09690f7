"""Pipelines whose ends are tcgen05 products, and the tiles of work that a block goes through."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import tcgen05

from jax_flashcute.kernels.common.pipeline import TmaPipeline


class TensorPipeline(TmaPipeline):
    """A ring that is filled or emptied by tcgen05 products as well as by TMA and by warps.

    Products are asynchronous: the thread that issued them commits, and the barrier gets one
    arrival when all its products up to there are done.
    """

    def __init__(
        self,
        name: str,
        barriers,
        stages: int,
        tx_bytes: int,
        consumer_warps: int,
        producer_warps: int = 1,
        copying_threads: int = 0,
    ):
        """As ``TmaPipeline``; ``producer_warps``: arrivals that fill a stage, besides the bytes."""
        super().__init__(name, barriers, stages, tx_bytes, consumer_warps, copying_threads)
        self.producer_warps = producer_warps

    def init(self) -> None:
        for stage in range(self.stages):
            cute.arch.mbarrier_init(self.full + stage, self.copying_threads or self.producer_warps)
            cute.arch.mbarrier_init(self.empty + stage, self.consumer_warps)

    def commit_products(self, stage) -> None:
        """Producer: the stage is full once the products issued so far are done; one warp."""
        with cute.arch.elect_one():
            tcgen05.commit(self.full + stage)

    def release_products(self, stage) -> None:
        """Consumer: the stage is empty once the products issued so far are done; one warp."""
        self.releasing.setdefault("products", set()).add(1)
        with cute.arch.elect_one():
            tcgen05.commit(self.empty + stage)


@cute.jit
def write_work(slot: cute.Tensor, fields: tuple):
    """Leaves a tile's coordinates and ranges for the other roles; one warp."""
    if cute.arch.lane_idx() == 0:
        for i in cutlass.range_constexpr(len(fields)):
            slot[i] = fields[i]
    cute.arch.sync_warp()


@cute.jit
def take_work(
    work: cute.Tensor,
    pipeline: TensorPipeline,
    stage: Int32,
    phase: Int32,
    warps: cutlass.Constexpr[int],
    role: cutlass.Constexpr[str],
):
    """What the load warp left: m_block (negative at the end), head, batch, ...

    In uniform registers, where ptxas has room for them: in others, some spilled.
    """
    pipeline.wait(stage, phase)
    fields = [work[i, stage] for i in range(cute.size(work, mode=[0]))]
    cute.arch.sync_warp()
    pipeline.release(stage, warps, role)
    return tuple(cute.arch.make_warp_uniform(field) for field in fields)
