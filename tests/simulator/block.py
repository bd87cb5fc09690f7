"""Thread blocks, the groups that their threads run in, and what these may wait for.

A group is a run of whole warps of one warpgroup that stand at the same instruction, or a part of
one warp after a divergent branch.
"""

import numpy as np

from .memory import shared_memory
from .ordering import CELL
from .program import Program


class Group:
    """Threads that execute together.

    Attributes:
      lo, hi: the warps' threads in the block.
      mask: which of them; None for all.
      v: their frame of registers.
      warps: indices of the warps in the cluster.
      blocked: None, or a wait with a ``describe`` method.
      accumulators, fragments: registers of wgmmas in flight, as bit masks.
      expired: the next try_wait may report a time-out.
      solo: the instruction that its warps must execute one by one.
      touched, written: registers accessed since its last wgmma.fence, as bit masks.
    """

    __slots__ = (
        "accumulators",
        "block",
        "blocked",
        "expired",
        "fragments",
        "hi",
        "lanes",
        "last_run",
        "lo",
        "mask",
        "n",
        "pc",
        "solo",
        "touched",
        "v",
        "warps",
        "written",
    )  # fmt: skip

    def __init__(self, block, lo, hi, mask, pc):
        self.block, self.lo, self.hi, self.mask, self.pc = block, lo, hi, mask, pc
        self.n = hi - lo
        self.v = block.registers.frame(lo, hi)
        self.warps = np.arange(lo >> 5, hi >> 5) + block.first_warp
        self.lanes = block.warp_of_thread[lo:hi]
        self.blocked = None
        self.expired = False
        self.last_run = 0
        self.solo = -1
        self.touched = self.written = -1  # before the first fence: all of them
        self.refresh()

    def refresh(self):
        self.accumulators = self.fragments = 0
        for warp in range(self.lo >> 5, self.hi >> 5):
            state = self.block.wgmma[warp]
            self.accumulators |= state.accumulators
            self.fragments |= state.fragments

    def active(self) -> np.ndarray:
        return np.ones(self.n, bool) if self.mask is None else self.mask

    def describe(self) -> str:
        first, last = self.lo >> 5, (self.hi >> 5) - 1
        name = f"warp {first}" if first == last else f"warps {first}-{last}"
        if self.mask is not None:
            name += f" ({int(self.mask.sum())} threads)"
        operation = self.block.program.operations[self.pc]
        waits = f", waiting for {self.blocked.describe()}" if self.blocked else ""
        return f"block {self.block.block_index} {name}: {operation.statement.where()}{waits}"


class ConvergeWait:
    def describe(self):
        return "the other threads of its warp"


class NamedBarrier:
    """A ``bar``/``barrier`` resource."""

    def __init__(self, index, ordering):
        self.index = index
        self.arrived = 0
        self.expected = None
        self.waiting: list[Group] = []
        self.clocks = ordering.nothing() if ordering else None
        self.votes: list = []
        self.statement = None

    def describe(self):
        return f"barrier {self.index} ({self.arrived} of {self.expected} threads arrived)"


class Mbarrier:
    """An mbarrier object: PTX ISA, "mbarrier: phase, counts and transactions"."""

    def __init__(self, block, address, count, ordering):
        self.block, self.address = block, address
        self.count = self.pending = count
        self.phase = 0
        self.transactions = 0
        self.waiters: list[Group] = []
        self.fenced = False
        self.fenced_phase = 0
        self.initialiser = None
        if ordering:
            self.clocks, self.done = ordering.nothing(), ordering.nothing()

    def describe(self):
        return (
            f"mbarrier {self.address:#x} of block {self.block.block_index} (phase {self.phase}: "
            f"{self.pending} of {self.count} arrivals and {self.transactions} bytes outstanding)"
        )


class MbarrierWait:
    def __init__(self, pairs):
        self.pairs = pairs

    def describe(self):
        return "; ".join(f"parity {p} of {b.describe()}" for b, p in self.pairs)


class RegisterWait:
    def __init__(self, need):
        self.need = need

    def describe(self):
        return f"{self.need} registers of the block's pool"


class WgmmaState:
    """Wgmmas of one warp: the open group and the committed ones, oldest first."""

    __slots__ = ("accumulators", "committed", "fragments", "loads", "open", "stores")

    def __init__(self):
        self.loads, self.stores = [], []  # of tensor memory
        self.open, self.committed = [], []
        self.accumulators = self.fragments = 0


class Block:
    """One thread block: registers, shared memory, barriers."""

    def __init__(self, machine, index, rank, first_warp):
        launch = machine.launch
        self.machine = machine
        self.program: Program = machine.program
        self.block_index = index
        self.block_dim, self.grid_dim = launch.block, launch.grid
        self.cluster_dim = launch.cluster
        self.cluster_size = int(np.prod(launch.cluster))
        self.cluster_rank = rank
        self.cluster_index = tuple(i % c for i, c in zip(index, launch.cluster, strict=True))
        self.cluster_id = tuple(i // c for i, c in zip(index, launch.cluster, strict=True))
        self.num_clusters = tuple(
            -(-g // c) for g, c in zip(launch.grid, launch.cluster, strict=True)
        )
        self.dynamic_shared = launch.shared_bytes
        self.num_sms = machine.num_sms
        self.linear_id = index[0] + launch.grid[0] * (index[1] + launch.grid[1] * index[2])
        self.real_threads = int(np.prod(launch.block))
        self.num_threads = -(-self.real_threads // 32) * 32
        self.first_warp = first_warp
        self.num_warps = self.num_threads // 32
        self.warp_of_thread = np.arange(self.num_threads) // 32 + first_warp
        self.registers = machine.register_files[rank]
        self.registers.reset(machine.poison, self)
        size = self.program.shared_static - 1024 + launch.shared_bytes
        self.shared = shared_memory(size, machine.poison)
        self.cell_base = rank * machine.cells_per_block
        self.parameters = machine.parameters
        self.local = None
        if self.program.local_bytes:
            fill = machine.poison & 0xFF
            self.local = np.full((self.num_threads, self.program.local_bytes), fill, np.uint8)
        self.live = np.arange(self.num_threads) < self.real_threads
        self.wgmma = [WgmmaState() for _ in range(self.num_warps)]
        self.bars: dict[int, NamedBarrier] = {}
        self.mbarriers: dict[int, Mbarrier] = {}
        self.bulk_groups: dict = {}  # thread -> groups of bulk copies
        self.copy_groups: dict = {}  # warp -> groups of cp.async
        launched = self.program.kernel.max_registers or min(255, 65536 // self.num_threads // 8 * 8)
        self.register_pool = 0
        self.warp_registers = np.full(self.num_warps, launched)
        self.register_waiters: list[Group] = []
        self.done_warps = 0
        self.extensions: dict = {}  # state of instruction families that few kernels use

    def thread_index(self, axis):
        linear = np.arange(self.num_threads)
        x, y, _ = self.block_dim
        return (linear % x, linear // x % y, linear // (x * y))[axis]

    @property
    def ordering(self):
        return self.machine.ordering

    def cells(self, offsets, size):
        """Shadow cells of accesses of ``size`` bytes at offsets (n,): (n, k)."""
        first = (offsets >> 2) + self.cell_base
        k = max(1, size // CELL)
        return first[:, None] + np.arange(k) if k > 1 else first[:, None]
