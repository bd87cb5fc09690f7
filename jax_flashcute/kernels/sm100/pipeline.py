"""Pipelines whose ends are tcgen05 products, and the tiles of work that a block goes through."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.dialects.nvvm import MemScopeKind
from cutlass.cute.nvgpu import tcgen05

from jax_flashcute.kernels.common.pipeline import TmaPipeline

BOTH = 0b11
"""Ranks in a cluster of two, as a mask."""


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
        copying_warps: int = 0,
    ):
        """As ``TmaPipeline``; ``producer_warps``: arrivals that fill a stage, besides the bytes;
        ``copying_warps``: those whose threads copy, in place of such."""
        ring = (name, barriers, stages, tx_bytes, consumer_warps, copying_warps)
        super().__init__(*ring, threads_copy=copying_warps > 0)
        if not copying_warps:
            self.filling = producer_warps

    def commit_products(self, stage) -> None:
        """Producer: the stage is full once the products issued so far are done; one warp."""
        with cute.arch.elect_one():
            tcgen05.commit(self.full + stage)

    def release_products(self, stage) -> None:
        """Consumer: the stage is empty once the products issued so far are done; one warp."""
        self.releasing.setdefault("products", set()).add(1)
        with cute.arch.elect_one():
            tcgen05.commit(self.empty + stage)


class PairPipeline(TensorPipeline):
    """A ring in each of two blocks, for products that the first block issues for both.

    What the first block commits reaches both blocks.  A stage of operands, which has bytes, is full
    in the first block once it is full in both: the second passes that on.  A stage of results is
    empty once the warps of both have told the first block.

    ``scope``: of that, the cluster where what they have written lies in the other's shared memory;
    what lies in a block's own tensor memory needs no more than the block.
    """

    def __init__(self, *ring, scope: MemScopeKind = MemScopeKind.CTA):
        super().__init__(*ring)
        self.scope = scope

    def init(self) -> None:
        is_first = 1 - cute.arch.block_idx_in_cluster()
        fillers, emptiers = self.filling, 2 * self.consumer_warps
        if self.tx_bytes:
            fillers, emptiers = fillers + is_first, self.consumer_warps
        for stage in range(self.stages):
            cute.arch.mbarrier_init(self.full + stage, fillers)
            cute.arch.mbarrier_init(self.empty + stage, emptiers)

    def commit_products(self, stage) -> None:
        commit_to_pair(self.full + stage)

    def release_products(self, stage) -> None:
        self.releasing.setdefault("products", set()).add(1)
        commit_to_pair(self.empty + stage)

    def release(
        self, stage: Int32, warps: int, role: str = "consumer", lanes_read: bool = False
    ) -> None:
        if self.tx_bytes:
            super().release(stage, warps, role, lanes_read)
            return
        self.releasing.setdefault(role, set()).add(warps)
        tell_first(self.empty + stage, self.scope)

    def pass_on(self, stage: Int32, phase: Int32) -> None:
        """The second block: tells the first once a stage of operands is full; one warp."""
        self.wait(stage, phase)
        tell_first(self.full + stage, MemScopeKind.CLUSTER)


def commit_to_pair(barrier: cute.Pointer) -> None:
    """One arrival in each block of a pair once the products issued so far are done; one warp."""
    with cute.arch.elect_one():
        tcgen05.commit(barrier, BOTH, tcgen05.CtaGroup.TWO)


def tell_first(barrier: cute.Pointer, scope: MemScopeKind) -> None:
    """Arrives at a barrier of the first block of a pair; one warp."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(barrier, 0, scope=scope)


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
