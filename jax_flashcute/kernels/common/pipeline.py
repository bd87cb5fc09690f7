"""Shared-memory pipelines, with their arrive counts checked while tracing."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from jax_flashcute.kernels.common.traced import Traced


@cute.jit
def arrive_in_cluster(barrier: cute.Pointer, blocks: cutlass.Constexpr[int]):
    """Arrives at the barrier of that name in every block of the cluster; one warp."""
    lane = cute.arch.lane_idx()
    if lane < blocks:
        cute.arch.mbarrier_arrive(barrier, peer_cta_rank_in_cluster=lane)


class TmaPipeline(Traced):
    """A ring of shared-memory stages: a warp fills a stage by TMA, consumer warps empty it.

    Barriers: ``full[stage]`` completes after one arrival and ``tx_bytes`` bytes;
    ``empty[stage]`` completes after one arrival of each consumer warp.

    With ``copying_warps``, so many warps fill a stage, each a part: by TMA, where ``tx_bytes`` are
    those of a part and ``full[stage]`` completes after an arrival of each, or with ``threads_copy``
    by copies of their threads, each of which arrives once its own are done.

    With ``blocks``, of a cluster, each of them fills a part of a stage in all: an ``empty`` barrier
    completes after the arrivals of the consumers of all, and ``tx_bytes`` are what they bring
    together.

    The state of either end is a (stage, phase) pair that starts at (0, 0) and moves by
    ``advance``.  ``check_arrivals`` compares the arrivals that were traced releasing a stage, over
    all roles that release it, with the count the barrier was given; a mismatch would hang the GPU.
    """

    def __init__(
        self,
        name: str,
        barriers,
        stages: int,
        tx_bytes: int,
        consumer_warps: int,
        copying_warps: int = 0,
        blocks: int = 1,
        also_filling: int = 0,
        threads_copy: bool = False,
    ):
        """``barriers``: pointer to 2 * stages 64-bit words in shared memory, full ones first;
        ``also_filling``: warps that write to a stage beside those, each of which commits it."""
        self.name = name
        self.full = barriers
        self.empty = barriers + stages
        self.stages = stages
        self.tx_bytes = tx_bytes
        self.consumer_warps = consumer_warps
        self.threads_copy = threads_copy
        self.filling = (copying_warps or 1) * (32 if threads_copy else 1) + also_filling
        self.blocks = blocks
        self.releasing: dict[str, set[int]] = {}

    def init(self) -> None:
        """Initialises the barriers; called by one thread."""
        for stage in range(self.stages):
            cute.arch.mbarrier_init(self.full + stage, self.filling)
            cute.arch.mbarrier_init(self.empty + stage, self.consumer_warps * self.blocks)

    def acquire(self, stage: Int32, phase: Int32) -> None:
        """Producer: waits until the stage is empty."""
        cute.arch.mbarrier_wait(self.empty + stage, phase ^ 1)

    def expect(self, stage: Int32) -> None:
        """Producer: announces the bytes that the copies into this stage will bring."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full + stage, self.tx_bytes)

    def commit(self, stage: Int32) -> None:
        """Producer: marks a stage full that was filled without announced bytes."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.full + stage)

    def commit_copies(self, stage: Int32) -> None:
        """Producer: the stage is full once all threads' copies up to here are done."""
        cute.arch.cp_async_mbarrier_arrive_noinc(self.full + stage)

    def wait(self, stage: Int32, phase: Int32) -> None:
        """Consumer: waits until the stage is full."""
        cute.arch.mbarrier_wait(self.full + stage, phase)
        if self.threads_copy:
            # Copies of threads are not of the proxy through which products read.
            cute.arch.fence_view_async_shared()

    def release(
        self, stage: Int32, warps: int, role: str = "consumer", lanes_read: bool = False
    ) -> None:
        """Consumer: gives the stage back; ``warps`` warps of a role call it, each arriving once.

        ``lanes_read``: lanes have loaded from the stage since the warp last met; the one that
        arrives waits for the others, which no product or barrier has done.
        """
        self.releasing.setdefault(role, set()).add(warps)
        if lanes_read:
            cute.arch.sync_warp()
        if self.blocks > 1:
            arrive_in_cluster(self.empty + stage, self.blocks)
            return
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.empty + stage)

    def advance(self, stage: Int32, phase: Int32):
        """The (stage, phase) after this one."""
        if self.stages == 1:
            return stage, phase ^ 1
        following = stage + 1
        wrapped = Int32(following == self.stages)
        return following - self.stages * wrapped, phase ^ wrapped

    def check_arrivals(self) -> None:
        """Raises where the arrivals traced releasing a stage are not those its barrier counts."""
        counts = self.releasing.values()
        if any(len(c) > 1 for c in counts) or sum(map(sum, counts)) != self.consumer_warps:
            raise RuntimeError(
                f"pipeline {self.name}: the empty barrier counts {self.consumer_warps} warps, "
                f"but code was traced that releases it from {self.releasing}"
            )
