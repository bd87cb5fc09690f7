"""Who runs next, and when asynchronous work completes."""

import numpy as np

TIMINGS = ("early", "late", "shuffled")
WARPS = ("fair", "adversarial", "seeded")


class Schedule:
    """A policy.

    Args:
      timing: asynchronous copies complete ``early`` (at issue), ``late`` (only when nothing else
        can happen), or ``shuffled`` (in any order at any time, by the seed).
      warps: ``fair`` takes turns; ``adversarial`` runs one warp as far as it gets, in an order of
        random priorities with a few random changes (probabilistic concurrency testing); ``seeded``
        picks at random.
      seed: of everything random.

    Attributes:
      convoys: warps of a warpgroup at the same instruction execute as one.
      immediate: asynchronous work completes at issue.
      late_reads: operands in shared memory are read as late as allowed.
    """

    def __init__(self, timing: str = "late", warps: str = "fair", seed: int = 0):
        if timing not in TIMINGS:
            raise ValueError(f"timing: expected one of {TIMINGS}, got {timing!r}")
        if warps not in WARPS:
            raise ValueError(f"warps: expected one of {WARPS}, got {warps!r}")
        self.timing, self.warps, self.seed = timing, warps, seed
        self.random = np.random.default_rng(seed)
        self.convoys = warps == "fair" or bool(seed & 1)
        self.immediate = timing == "early"
        self.late_reads = timing != "early"
        self._priority: dict = {}
        self._until_change = 0
        self._stalled = False

    def start(self, machine) -> None:
        self._priority = {}
        self._until_change = int(self.random.integers(20, 400))

    def elect(self, candidates: np.ndarray) -> int:
        """The lane that elect.sync picks; fixed for a mask, but need not be the first."""
        if self.warps == "fair":
            return int(candidates[0])
        return int(candidates[self.seed % len(candidates)])

    def spurious_timeout(self) -> bool:
        """Whether a try_wait that would suspend reports a time-out at once."""
        return self.warps == "seeded" and self.random.random() < 0.1

    def stall(self, group) -> None:
        """The group seems to wait for what others write to global memory: they have their turn."""
        self._stalled = True
        if self._priority:
            lowest = min(self._priority.values())
            self._priority[group.block.cluster_rank, group.lo >> 5] = lowest - self.random.random()

    def pick(self, ready) -> tuple:
        ready = _lowest_parts(ready)
        if self.warps == "fair":
            group = min(ready, key=lambda g: (g.last_run, g.pc))
            # Of the groups of its warpgroup, the one that is behind runs first, so they meet.
            same = [g for g in ready if g.block is group.block and g.lo // 128 == group.lo // 128]
            if self._stalled:
                self._stalled = False
                return group, 2000
            return min(same, key=lambda g: g.pc), 2000
        if self.warps == "seeded":
            return ready[int(self.random.integers(len(ready)))], int(self.random.integers(1, 60))
        for group in ready:
            key = (group.block.cluster_rank, group.lo >> 5)
            if key not in self._priority:
                self._priority[key] = self.random.random()
        group = max(ready, key=self._rank)
        budget = int(self.random.integers(1, 200))
        self._until_change -= budget
        if self._until_change < 0:
            self._until_change = int(self.random.integers(20, 2000))
            self._priority[group.block.cluster_rank, group.lo >> 5] = -self.random.random()
        return group, budget

    def _rank(self, group):
        # A group that just timed out has nothing to do: whoever else can run comes first.
        return (not group.expired, self._priority[group.block.cluster_rank, group.lo >> 5])

    def complete_some(self, machine) -> None:
        if self.timing != "shuffled":
            return
        while machine.pending and self.random.random() < 0.3:
            machine.complete(self.choose_pending(machine.pending))

    def choose_pending(self, pending):
        if self.timing == "shuffled" or self.warps != "fair":
            return pending[int(self.random.integers(len(pending)))]
        return pending[0]


def _lowest_parts(ready):
    """Of the parts of a diverged warp, only the one furthest behind."""
    if all(g.mask is None for g in ready):
        return ready
    first: dict = {}
    for group in ready:
        key = (group.block.cluster_rank, group.lo >> 5)
        if key not in first or group.pc < first[key].pc:
            first[key] = group
    return [g for g in ready if first[g.block.cluster_rank, g.lo >> 5] is g]
