"""Runs the blocks of a cluster, group after group.

Groups split at branches and join again at labels and barriers; vectorising over a group instead of
a warp is what makes the simulator fast, and the schedule may forbid it.
"""

from dataclasses import dataclass, field

import numpy as np

from .block import Block, ConvergeWait, Group, MbarrierWait
from .findings import FindingLog
from .memory import GlobalMemory
from .ordering import CELL, TENSOR_ACCESSES, Ordering
from .program import BRANCH, BRANCH_TABLE, EFFECT, RETURN
from .registers import P, RegisterFile

# What an effect may ask of the machine.
BLOCK = "block"  # the group waits; the instruction runs again when it wakes
YIELD = "yield"  # go on, but let others run first
SPLIT = "split"  # run the instruction again, a warp at a time

SPIN = 5_000
"""Instructions without any progress after which a cluster lets other clusters run."""
_PATIENCE = 12
"""Rounds in which every waiting try_wait may time out before that counts as deadlock."""


@dataclass
class Dependence:
    """What the threads of a launch did by griddepcontrol.

    Attributes:
      waited: whether any waited for the launches before.
      triggers: of each launch_dependents that ran, whether a wait was behind it.
    """

    waited: bool = False
    triggers: set[bool] = field(default_factory=set)


class Machine:
    """Runs one cluster of a launch.

    Attributes:
      launch, program, parameters: what is run.
      memory: the arrays.
      schedule: decides who runs next and when asynchronous work completes.
      ordering: the happens-before checker, or None.
      log: the findings.
      launch_index, overlaps_from: its number, and that of the first launch that may overlap it.
      dependence: what threads of the launch did by griddepcontrol.
      coverage: where set, collects the PTX lines of memory and synchronisation that ran.
    """

    def __init__(
        self, launch, program, memory: GlobalMemory, schedule, log: FindingLog, *,
        check_ordering=True, poison=0, num_sms=132, trace=None,
    ):  # fmt: skip
        self.launch, self.program, self.memory = launch, program, memory
        self.schedule, self.log, self.num_sms, self.tracer = schedule, log, num_sms, trace
        self.poison = poison
        self.check_ordering = check_ordering
        self.parameters = pack_parameters(launch, program)
        self.tensor_maps: dict = {}
        self.cluster_size = int(np.prod(launch.cluster))
        threads = -(-int(np.prod(launch.block)) // 32) * 32
        self.register_files = [
            RegisterFile(program.counts, program.constants, threads)
            for _ in range(self.cluster_size)
        ]
        self.shared_cells = (program.shared_static + launch.shared_bytes) // CELL + 64
        # Tensor memory has a cell for each 32 lanes of a column.
        self.cells_per_block = self.shared_cells + (4 * 512 if program.uses_tensor_memory else 0)
        self.steps = 0
        self.executed = 0
        self.coverage: set[int] | None = None
        self.launch_index = self.overlaps_from = 0
        self.dependence = Dependence()

    # ---- one cluster

    def run_cluster(self, block_indices):
        """Run the blocks of one cluster to their end; yields where they seem to spin."""
        warps = self.register_files[0].num_threads // 32
        self.ordering = None
        if self.check_ordering:
            self.ordering = Ordering(
                warps * self.cluster_size, self.cells_per_block * self.cluster_size, self.log,
                tensor_memory=self.program.uses_tensor_memory,
            )  # fmt: skip
            self.ordering.statements = self.program.kernel.statements
        self.blocks = [
            Block(self, index, rank, rank * warps) for rank, index in enumerate(block_indices)
        ]
        self.groups: list[Group] = []
        self.pending: list = []
        self.progress = 0
        self._expiries, self._expired_at = 0, -1
        for block in self.blocks:
            for lo in range(0, block.num_threads, 128):
                hi = min(lo + 128, block.num_threads)
                mask = block.live[lo:hi]
                if mask.all():
                    self.groups.append(Group(block, lo, hi, None, 0))
                else:
                    for w in range(lo, hi, 32):
                        m = block.live[w : w + 32]
                        self.groups.append(
                            Group(block, w, w + 32, None if m.all() else m.copy(), 0)
                        )
        self.schedule.start(self)
        self.trace = self.tracer
        if self.tracer and not self.tracer.begin(self.blocks[0]):
            self.trace = None
        last_progress, last_executed = 0, self.executed
        while self.groups:
            self.schedule.complete_some(self)
            ready = [g for g in self.groups if g.blocked is None]
            if not ready:
                self._unblock()
                continue
            if len(ready) > 1:
                ready = self._join(ready)
            group, budget = self.schedule.pick(ready)
            group.last_run = self.steps = self.steps + 1
            self._run(group, budget)
            if self.progress != last_progress:
                last_progress, last_executed = self.progress, self.executed
            elif self.executed - last_executed > SPIN:
                last_executed = self.executed
                self.schedule.stall(group)
                yield
        for block in self.blocks:
            self._check_exit(block)
        if self.trace:
            self.trace.end(self.blocks[0])

    def _unblock(self):
        """Nobody can run: complete asynchronous work, let waits time out, or report deadlock."""
        if self.pending:
            self.complete(self.schedule.choose_pending(self.pending))
            return
        if self._expired_at != self.progress:
            self._expiries, self._expired_at = 0, self.progress
        waiting = [g for g in self.groups if isinstance(g.blocked, MbarrierWait)]
        if waiting and self._expiries < _PATIENCE:
            self._expiries += 1
            for group in waiting:
                group.blocked, group.expired = None, True
            return
        statement = self.program.operations[self.groups[0].pc].statement
        lines = "\n      ".join(g.describe() for g in self.groups)
        self.log.fatal("deadlock", statement, f"no warp can run:\n      {lines}")

    def submit(self, operation) -> None:
        """Start an asynchronous operation: an object with ``complete()``."""
        if self.schedule.immediate:
            if self.trace:
                self.trace.completing(operation)
            operation.complete()
            self.progress += 1
        else:
            self.pending.append(operation)

    def complete(self, operation) -> None:
        self.pending.remove(operation)
        if self.trace:
            self.trace.completing(operation)
        operation.complete()
        self.progress += 1

    # ---- groups

    def _join(self, ready):
        """Merge groups that stand at the same instruction."""
        by_place: dict = {}
        for group in ready:
            by_place.setdefault((group.pc, group.block.cluster_rank), []).append(group)
        if len(by_place) == len(ready):
            return ready
        out = []
        for groups in by_place.values():
            if len(groups) > 1:
                groups = self._merge(groups)
            out.extend(groups)
        return out

    def _merge(self, groups):
        groups.sort(key=lambda g: g.lo)
        merged = [groups[0]]
        for group in groups[1:]:
            last = merged[-1]
            if last.expired != group.expired:
                merged.append(group)
                continue
            if last.lo == group.lo and last.hi == group.hi:  # parts of one warp
                mask = last.mask | group.mask
                last.mask = None if mask.all() else mask
                last.touched |= group.touched
                last.written |= group.written
                self.groups.remove(group)
            elif (
                self.schedule.convoys
                and last.mask is None and group.mask is None
                and last.hi == group.lo
                and last.solo != last.pc and group.solo != group.pc
                and last.lo // 128 == (group.hi - 1) // 128
            ):  # fmt: skip
                both = Group(last.block, last.lo, group.hi, None, last.pc)
                both.last_run = min(last.last_run, group.last_run)
                both.expired = last.expired
                both.touched = last.touched | group.touched
                both.written = last.written | group.written
                self.groups.remove(group)
                self.groups[self.groups.index(last)] = both
                merged[-1] = both
            else:
                merged.append(group)
        return merged

    def _run(self, g: Group, budget: int) -> None:
        program = g.block.program
        operations, runs, joins = program.operations, program.runs, program.joins
        alone = g.mask is None and (g.n == 128 or not self.schedule.convoys)
        while True:
            run = runs[g.pc]
            if run is not None:
                if run.touches & g.accumulators or run.writes & g.fragments:
                    self._check_in_flight(g, run)
                v, m = g.v, g.mask
                for function in run.functions:
                    function(v, m)
                g.touched |= run.touches
                g.written |= run.writes
                if self.trace:
                    self.trace.advance(g, len(run.functions))
                self.executed += len(run.functions)
                g.pc = run.next
            else:
                op = operations[g.pc]
                kind = op.kind
                self.executed += 1
                budget -= 1
                if kind == EFFECT:
                    if not self._effect(g, op):
                        return
                elif kind == BRANCH:
                    if op.guard is None:
                        g.pc = op.targets[0]
                    elif not self._branch(g, op):
                        return
                elif kind == RETURN:
                    if self._return(g, op):
                        return
                elif kind == BRANCH_TABLE:
                    if not self._branch_table(g, op):
                        return
            if budget < 0 or (not alone and g.pc in joins):
                return

    def _guard(self, g, op):
        """The mask of threads whose guard holds: None for all of the group's slice."""
        negated, row = op.guard
        p = g.v[P][row]
        p = ~p if negated else p
        if g.mask is not None:
            return p & g.mask
        return p

    def _effect(self, g, op) -> bool:
        """Run an effect; False when the group must stop."""
        m = g.mask
        if op.converge and m is not None and not self._converged(g, op):
            return False
        if op.guard is not None:
            p = self._guard(g, op)
            if not p.any():
                g.pc += 1
                return True
            m = None if p.all() else p.copy()
        if (op.reads | op.writes) & g.accumulators or op.writes & g.fragments:
            if self.program.uses_tensor_memory:
                self.deliver_loads(g)
            elif not op.is_wgmma:
                self.report_in_flight(g, op)
        if self.coverage is not None:
            self.coverage.add(op.statement.line)
        if self.trace:
            self.trace.effect(self, g, op)
        if not op.is_wgmma:
            g.touched |= op.reads | op.writes
            g.written |= op.writes
        action = op.run(g.block, g, m)
        if action is None:
            g.pc += 1
            return True
        if action is YIELD:
            g.pc += 1
            return False
        if action is SPLIT:
            self._split_warps(g)
            return False
        return False  # BLOCK

    def _split_warps(self, g):
        self.groups.remove(g)
        for lo in range(g.lo, g.hi, 32):
            mask = None if g.mask is None else g.mask[lo - g.lo : lo - g.lo + 32].copy()
            if mask is not None and not mask.any():
                continue
            if mask is not None and mask.all():
                mask = None
            part = Group(g.block, lo, lo + 32, mask, g.pc)
            part.expired = g.expired
            part.solo = g.pc
            part.touched, part.written = g.touched, g.written
            self.groups.append(part)

    def _converged(self, g, op) -> bool:
        if g.n > 32:
            if (g.mask == g.block.live[g.lo : g.hi]).all():
                return True
            self._split_warps(g)
            return False
        live = g.block.live[g.lo : g.hi]
        if (g.mask == live).all():
            return True
        for other in [o for o in self.groups if o is not g and o.pc == g.pc]:
            if (other.block, other.lo, other.hi) == (g.block, g.lo, g.hi):
                g.mask = g.mask | other.mask
                g.touched |= other.touched
                g.written |= other.written
                self.groups.remove(other)
        if (g.mask == live).all():
            if live.all():
                g.mask = None
            return True
        g.blocked = ConvergeWait()
        return False

    def _branch(self, g, op) -> bool:
        negated, row = op.guard
        p = g.v[P][row]
        if g.mask is None:
            taken = int(np.count_nonzero(p))
            total = g.n
        else:
            p = p & g.mask if not negated else p | ~g.mask
            total = int(np.count_nonzero(g.mask))
            taken = int(np.count_nonzero(p))
            if negated:
                taken -= g.n - total
        if negated:
            taken = total - taken
        if taken == total:
            g.pc = op.targets[0]
            return True
        if taken == 0:
            g.pc += 1
            return True
        self._diverge(g, [(~p if negated else p.copy(), op.targets[0])], g.pc + 1)
        return False

    def _branch_table(self, g, op) -> bool:
        view, row = op.run
        index = g.v[view][row]
        active = g.active()
        values = np.unique(index[active])
        if len(values) == 1:
            g.pc = op.targets[int(values[0])]
            return True
        self._diverge(g, [((index == x) & active, op.targets[int(x)]) for x in values], None)
        return False

    def _diverge(self, g, ways, otherwise):
        """Replace a group by the parts that go each way, whole warps kept together."""
        self.groups.remove(g)
        active = g.active()
        if otherwise is not None:
            rest = active.copy()
            for mask, _ in ways:
                rest &= ~mask
            ways = [*ways, (rest, otherwise)]
        for mask, pc in ways:
            mask = mask & active
            warps = range(0, g.n, 32)
            full = [bool(mask[w : w + 32].all()) for w in warps]
            some = [bool(mask[w : w + 32].any()) for w in warps]
            start = None
            for i, w in enumerate([*warps, g.n]):
                whole = w < g.n and full[i] and self.schedule.convoys
                if whole and start is None:
                    start = w
                if not whole and start is not None:
                    self._add_part(g, start, w, None, pc)
                    start = None
                if w < g.n and not whole and some[i]:
                    m = None if full[i] else mask[w : w + 32].copy()
                    self._add_part(g, w, w + 32, m, pc)

    def _add_part(self, g, start, end, mask, pc):
        part = Group(g.block, g.lo + start, g.lo + end, mask, pc)
        part.touched, part.written = g.touched, g.written
        self.groups.append(part)

    def _return(self, g, op) -> bool:
        mask = g.active() if op.guard is None else self._guard(g, op)
        if not mask.any():
            g.pc += 1
            return False
        block = g.block
        block.live[g.lo : g.hi] &= ~mask
        self.progress += 1
        rest = g.active() & ~mask
        self.groups.remove(g)
        if rest.any():
            for w in range(0, g.n, 32):
                m = rest[w : w + 32]
                if m.any():
                    self._add_part(g, w, w + 32, None if m.all() else m.copy(), g.pc + 1)
        for other in self.groups:
            if other.block is block and isinstance(other.blocked, ConvergeWait):
                other.blocked = None
        for warp in range(g.lo >> 5, g.hi >> 5):
            state = block.wgmma[warp]
            if (state.open or state.committed) and not block.live[warp * 32 : warp * 32 + 32].any():
                self.log.add(
                    "unfinished wgmma", op.statement,
                    f"warp {warp} exits with wgmmas that it never waited for",
                )  # fmt: skip
        return True

    # ---- checks

    def deliver_loads(self, g):
        """Tensor-memory loads of a group's warps end: their registers hold the data."""
        rows = g.block.registers.rows["r"]
        for warp in range(g.lo >> 5, g.hi >> 5):
            state = g.block.wgmma[warp]
            for registers, values, _ in state.loads:
                rows[registers, 32 * warp : 32 * warp + 32] = values
            if state.loads and self.ordering and not state.stores:
                self.ordering.wgmma_commit(warp + g.block.first_warp, TENSOR_ACCESSES)
                self.ordering.wgmma_wait(warp + g.block.first_warp, 0, TENSOR_ACCESSES)
            if state.loads:
                state.loads.clear()
                state.accumulators = 0
        g.refresh()

    def _check_in_flight(self, g, run):
        if self.program.uses_tensor_memory:
            self.deliver_loads(g)
            return
        for i in range(len(run.functions)):
            op = g.block.program.operations[run.first + i]
            if (op.reads | op.writes) & g.accumulators or op.writes & g.fragments:
                self.report_in_flight(g, op)

    def report_in_flight(self, g, op):
        verb = "reads" if op.reads & g.accumulators else "writes"
        self.log.add(
            "register of a wgmma in flight",
            op.statement,
            f"warp {g.lo >> 5} {verb} a register that a wgmma still uses: no wgmma.wait_group "
            "covers it",
        )

    def _check_exit(self, block):
        for bar in block.bars.values():
            if bar.arrived:
                self.log.add(
                    "unbalanced barrier at exit", bar.statement,
                    f"{bar.describe()} in block {block.block_index}",
                )  # fmt: skip
        for barrier in block.mbarriers.values():
            if barrier.transactions:
                self.log.add(
                    "transaction count mismatch", barrier.initialiser,
                    f"at exit {barrier.describe()}",
                )  # fmt: skip
        for thread, groups in block.bulk_groups.items():
            if any(not op.read_done for group in groups.all() for op in group):
                self.log.add(
                    "shared memory released in use", groups.statement,
                    f"thread {thread} exits while its bulk copies may still read shared memory",
                )  # fmt: skip
        if self.program.uses_tensor_memory:
            tensor_memory_check(block)
        while self.pending:
            self.complete(self.pending[0])


def tensor_memory_check(block):
    """At exit every column must have been deallocated."""
    memory = block.extensions.get("tensor memory")
    if memory and memory.allocated:
        block.machine.log.add(
            "tensor memory not deallocated", None, f"columns {memory.allocated} at exit"
        )


def pack_parameters(launch, program) -> np.ndarray:
    """The parameter space of a launch, laid out as the PTX declares it."""
    offsets = list(program.kernel.parameters.values())
    size = max((o + s for o, s in offsets), default=0)
    data = np.zeros(-(-size // 64) * 64 + 64, np.uint8)
    for (offset, width), value in zip(offsets, launch.parameters, strict=True):
        data[offset : offset + width] = np.frombuffer(value, np.uint8)
    return data
