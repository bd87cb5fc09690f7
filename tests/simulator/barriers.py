"""Barriers, mbarriers, fences and register reallocation: PTX ISA, "Parallel Synchronization"."""

import numpy as np

from . import registers as R
from .block import Mbarrier, MbarrierWait, NamedBarrier, RegisterWait
from .machine import BLOCK, SPLIT, YIELD
from .memory_access import (
    addresses,
    check_shared,
    lane_bits,
    shared_target,
    space_of,
    uniform,
)
from .program import FormError, effect, instruction, put
from .trace import source as trace_source

# ---- named barriers


@instruction("bar", "barrier")
def _bar(asm, st):
    parts = st.parts
    if parts[1] == "warp":
        return effect(_warp_sync, converge=True)
    if parts[1] == "cluster":
        return _cluster_barrier(asm, st)
    action = next(p for p in parts[1:] if p in ("sync", "arrive", "red"))
    operands = list(st.operands)
    out = operation = None
    if action == "red":
        operation = next(p for p in parts if p in ("popc", "and", "or"))
        kind = "u32" if operation == "popc" else "pred"
        out = asm.destination(operands.pop(0), kind)
        negate, vote = asm.predicate(operands.pop())
    index = asm.source(operands[0], "u32")
    count = asm.source(operands[1], "u32") if len(operands) > 1 else None
    aligned = parts[0] == "bar" or "aligned" in parts

    def run(block, g, m):
        ids = g.v[index[0]][index[1]]
        if g.n > 32 and ids.min() != ids.max():
            return SPLIT
        bar_id = int(uniform(g, m, *index))
        if count is None:
            expected = int(-(-int(block.live.sum()) // 32) * 32)
        else:
            expected = int(uniform(g, m, *count))
            if expected % 32 or expected == 0:
                block.machine.log.fatal(
                    "bad barrier count", st, f"{expected} threads: not a multiple of the warp size"
                )
        if not 0 <= bar_id < 16:
            block.machine.log.fatal("bad barrier index", st, f"barrier {bar_id} of 16")
        bar = block.bars.get(bar_id)
        if bar is None:
            bar = block.bars[bar_id] = NamedBarrier(bar_id, block.ordering)
        if bar.arrived and bar.expected != expected:
            block.machine.log.fatal(
                "barrier count mismatch", st,
                f"barrier {bar_id} expects {bar.expected} threads, this instruction {expected}",
            )  # fmt: skip
        bar.expected = expected
        bar.statement = st
        bar.arrived += g.n
        if bar.arrived > expected:
            block.machine.log.fatal(
                "barrier overrun", st,
                f"{bar.arrived} threads arrived at barrier {bar_id}, which expects {expected}",
            )  # fmt: skip
        if block.ordering:
            for warp in g.warps:
                block.ordering.join(bar.clocks, block.ordering.release(warp))
                block.ordering.warp_sync(warp)
        if action != "arrive":
            bar.waiting.append(g)
            g.blocked = bar
        if block.machine.trace:
            block.machine.trace.arrived(bar)
        if action == "red":
            p = g.v[R.P][vote[1]]
            p = ~p if negate else p
            bar.votes.append(np.broadcast_to(p, (g.n,))[g.active()])
        g.pc += 1
        block.machine.progress += 1
        if bar.arrived == expected:
            _open(block, bar, out, operation)
        if action == "arrive":
            g.pc -= 1
            return None
        return BLOCK

    return effect(run, converge=aligned)


def _warp_sync(block, g, m):
    if block.ordering:
        for warp in g.warps:
            block.ordering.warp_sync(warp)


def _open(block, bar, out, operation):
    """All threads arrived: wake those that wait and hand them what happened before."""
    votes = np.concatenate(bar.votes) if bar.votes else None
    for group in bar.waiting:
        group.blocked = None
        if block.machine.trace:
            block.machine.trace.waited(
                group,
                bar.time,
                "wait barrier",
                f"barrier {bar.index} at {trace_source(bar.statement)}",
            )
        if block.ordering:
            for warp in group.warps:
                block.ordering.acquire(warp, bar.clocks)
        if votes is not None and out:
            value = {
                "popc": lambda: int(votes.sum()), "and": lambda: bool(votes.all()),
                "or": lambda: bool(votes.any()),
            }[operation]()  # fmt: skip
            put(group.v[out[0]][out[1]], value, group.mask)
    del block.bars[bar.index]


def _cluster_barrier(asm, st):
    """barrier.cluster.arrive and .wait; one barrier for all threads of the cluster."""
    arrive = st.parts[2] == "arrive"
    relaxed = "relaxed" in st.parts

    def run(block, g, m):
        machine = block.machine
        state = machine.blocks[0].extensions.setdefault(
            "cluster barrier", {"phase": 0, "arrived": 0, "waiting": [], "seen": {}, "clocks": None}
        )
        ordering = machine.ordering
        if state["clocks"] is None and ordering:
            state["clocks"], state["done"] = ordering.nothing(), ordering.nothing()
        if arrive:
            for warp in g.warps:
                key = int(warp)
                if key in state["seen"] and state["seen"][key] == state["phase"]:
                    machine.log.fatal(
                        "cluster barrier overrun", st, f"warp {key} arrives twice without a wait"
                    )
                state["seen"][key] = state["phase"]
                if ordering and not relaxed:
                    ordering.join(state["clocks"], ordering.release(warp))
                    ordering.warp_sync(warp)
            state["arrived"] += len(g.warps)
            total = sum(int(b.live.reshape(-1, 32).any(1).sum()) for b in machine.blocks)
            machine.progress += 1
            if state["arrived"] >= total:
                state["arrived"] = 0
                state["phase"] += 1
                if ordering:
                    state["done"] = state["clocks"]
                    state["clocks"] = ordering.nothing()
                for group in state["waiting"]:
                    group.blocked = None
                state["waiting"] = []
            return None
        # Wait: for the completion of the phase that this warp last arrived in.
        if any(state["seen"].get(int(w), -1) >= state["phase"] for w in g.warps):
            g.blocked = _ClusterWait(state)
            state["waiting"].append(g)
            return BLOCK
        if ordering:
            for warp in g.warps:
                ordering.acquire(warp, state["done"])
        return None

    return effect(run, converge=True)


class _ClusterWait:
    def __init__(self, state):
        self.state = state

    def describe(self):
        return f"the cluster barrier ({self.state['arrived']} warps arrived)"


# ---- mbarriers


def find_mbarrier(block, address, statement) -> Mbarrier:
    owner, offset = shared_target(block, np.array([address]), statement)
    barrier = owner.mbarriers.get(int(offset[0]))
    if barrier is None:
        block.machine.log.fatal(
            "uninitialised mbarrier", statement, f"no mbarrier.init at {int(offset[0]):#x}"
        )
    return barrier


def _cluster_phase(block) -> int:
    """Completed phases of the cluster barrier."""
    state = block.machine.blocks[0].extensions.get("cluster barrier")
    return state["phase"] if state else 0


def _use(block, g, barrier, statement):
    """A thread uses an mbarrier: its initialisation must have happened before."""
    ordering = block.ordering
    if not ordering or barrier.initialiser is None:
        return
    if barrier.fenced and _cluster_phase(block) > barrier.fenced_phase:
        return  # a cluster barrier, even a relaxed one, lies between
    warp, clock = barrier.initialised_by
    for user in g.warps:
        if ordering.clock[user, warp] < clock:
            block.machine.log.add(
                "mbarrier used before its initialisation", statement,
                f"{barrier.describe()} was initialised by warp {warp} with nothing that orders "
                f"it before warp {int(user)}",
            )  # fmt: skip
            barrier.initialiser = None
            return


def use_asynchronously(block, token, barrier, statement):
    """The asynchronous proxy signals an mbarrier: its initialisation must have been fenced."""
    if not block.ordering or barrier.fenced or barrier.initialiser is None:
        return
    warp, clock = barrier.initialised_by
    if token[2][warp] < clock:
        block.machine.log.add(
            "mbarrier initialisation not fenced", statement,
            f"{barrier.describe()} was initialised at {barrier.initialiser.where()} with no "
            "fence.mbarrier_init or fence.proxy.async after it",
        )  # fmt: skip
        barrier.fenced = True


def _check_owner(block, barrier, statement):
    if not barrier.block.live.any():
        block.machine.log.add(
            "shared memory of an exited block", statement,
            f"signals {barrier.describe()}, all of whose threads have exited",
        )  # fmt: skip


def arrive(block, barrier, count, transactions, pairs, statement):
    """Arrive ``count`` times and expect ``transactions`` bytes; ``pairs`` are clocks to publish."""
    _check_owner(block, barrier, statement)
    barrier.transactions += transactions
    barrier.pending -= count
    if block.ordering:
        for pair in pairs:
            block.ordering.join(barrier.clocks, pair)
    if barrier.pending < 0:
        block.machine.log.fatal(
            "mbarrier overrun", statement,
            f"more arrivals than the {barrier.count} that {barrier.describe()} expects",
        )  # fmt: skip
    if abs(barrier.transactions) >= 1 << 20:
        block.machine.log.fatal("transaction count overflow", statement, barrier.describe())
    settle(block, barrier)


def complete_transactions(block, barrier, size, token, statement):
    """The asynchronous proxy delivered ``size`` bytes."""
    _check_owner(block, barrier, statement)
    barrier.transactions -= size
    if block.ordering and token is not None:
        block.ordering.finish(barrier.clocks, token)
    settle(block, barrier)


def settle(block, barrier):
    """Complete the phase if nothing is outstanding."""
    machine = block.machine
    machine.progress += 1
    flips = not (barrier.pending or barrier.transactions)
    if machine.trace:
        machine.trace.settle(barrier, flips)
    if not flips:
        return
    barrier.phase ^= 1
    barrier.pending = barrier.count
    if machine.ordering:
        barrier.done = barrier.clocks
        barrier.clocks = machine.ordering.nothing()
    for group in barrier.waiters:
        if isinstance(group.blocked, MbarrierWait):
            group.blocked = None
    barrier.waiters.clear()


@instruction("mbarrier")
def _mbarrier(asm, st):
    action = st.parts[1]
    compiler = {
        "init": _init, "inval": _invalidate, "arrive": _arrive, "arrive_drop": _arrive,
        "try_wait": _wait, "test_wait": _wait, "expect_tx": _expect, "complete_tx": _complete,
    }.get(action)  # fmt: skip
    if compiler is None:
        raise FormError(f"mbarrier.{action}")
    return compiler(asm, st)


def _init(asm, st):
    address = addresses(asm, st.operands[0])
    count = asm.source(st.operands[1], "u32")

    def run(block, g, m):
        a = address(g, m)
        counts = g.v[count[0]][count[1]]
        counts = counts if m is None else counts[m]
        warps = g.lanes if m is None else g.lanes[m]
        check_shared(block, a, 8, st)
        for where, n, warp in zip(a.tolist(), counts.tolist(), warps.tolist(), strict=True):
            if not 0 < n < 1 << 20:
                block.machine.log.fatal("bad mbarrier count", st, f"{n} arrivals")
            barrier = Mbarrier(block, where, n, block.ordering)
            barrier.initialiser = st
            old = block.mbarriers.get(where)
            if old is not None and (old.waiters or old.transactions):
                block.machine.log.add("mbarrier initialised in use", st, old.describe())
            block.mbarriers[where] = barrier
            if block.ordering:
                barrier.initialised_by = (warp, int(block.ordering.clock[warp, warp]))
                cells = block.cells(np.array([where]), 8)
                block.ordering.write(np.array([warp]), cells, st, g.pc)

    return effect(run)


def _invalidate(asm, st):
    address = addresses(asm, st.operands[0])

    def run(block, g, m):
        for where in address(g, m).tolist():
            find_mbarrier(block, where, st)
            del block.mbarriers[where]

    return effect(run)


def _arrive(asm, st):
    """mbarrier.arrive{.expect_tx}{.noComplete} state, [address], count."""
    parts, operands = st.parts, list(st.operands)
    if "noComplete" in parts:
        raise FormError("mbarrier.arrive.noComplete")
    drop = parts[1] == "arrive_drop"
    expects = "expect_tx" in parts
    state = None
    if not operands[0].startswith("["):
        state = asm.destination(operands.pop(0), "b64")
    address = addresses(asm, operands[0])
    operand = asm.source(operands[1], "u32") if len(operands) > 1 else None
    relaxed = "relaxed" in parts

    def run(block, g, m):
        a = address(g, m)
        if operand is None:
            numbers = [1] * len(a)
        else:
            values = g.v[operand[0]][operand[1]]
            numbers = (values if m is None else values[m]).tolist()
        warps = g.lanes if m is None else g.lanes[m]
        ordering = block.ordering
        pairs = {}
        if ordering and not relaxed:
            active = (g.active() if m is None else m).reshape(-1, 32)
            pairs = {
                int(w): ordering.release(w, lane_bits(active[i]))
                for i, w in enumerate(g.warps)
                if active[i].any()
            }
        phase = 0
        for where, number, warp in zip(a.tolist(), numbers, warps.tolist(), strict=True):
            barrier = find_mbarrier(block, where, st)
            _use(block, g, barrier, st)
            phase = barrier.phase
            if drop:
                barrier.count -= number if not expects else 1
            if expects:
                arrive(block, barrier, 1, number, [pairs[warp]] if pairs else [], st)
            else:
                arrive(block, barrier, number, 0, [pairs[warp]] if pairs else [], st)
        if state:
            put(g.v[state[0]][state[1]], phase, m)

    return effect(run)


def _expect(asm, st):
    address = addresses(asm, st.operands[0])
    size = asm.source(st.operands[1], "u32")

    def run(block, g, m):
        sizes = g.v[size[0]][size[1]]
        sizes = sizes if m is None else sizes[m]
        for where, n in zip(address(g, m).tolist(), sizes.tolist(), strict=True):
            barrier = find_mbarrier(block, where, st)
            _use(block, g, barrier, st)
            barrier.transactions += n
            block.machine.progress += 1

    return effect(run)


def _complete(asm, st):
    address = addresses(asm, st.operands[0])
    size = asm.source(st.operands[1], "u32")

    def run(block, g, m):
        sizes = g.v[size[0]][size[1]]
        sizes = sizes if m is None else sizes[m]
        for where, n in zip(address(g, m).tolist(), sizes.tolist(), strict=True):
            complete_transactions(block, find_mbarrier(block, where, st), n, None, st)

    return effect(run)


def _wait(asm, st):
    """test_wait and try_wait, by parity or by state.

    "A phaseParity value equal to that of the current phase waits for its completion": the wait
    is over when the barrier's phase differs.  try_wait may suspend the thread; here it does, until
    the phase completes or nothing else can happen, and then it returns false.
    """
    parts = st.parts
    patient = parts[1] == "try_wait"
    by_parity = "parity" in parts
    relaxed = "relaxed" in parts
    done = asm.destination(st.operands[0], "pred")
    address = addresses(asm, st.operands[1])
    phase = asm.source(st.operands[2], "u32" if by_parity else "b64")

    def run(block, g, m):
        a = address(g, m)
        wanted = g.v[phase[0]][phase[1]]
        wanted = (wanted if m is None else wanted[m]) & wanted.dtype.type(1)
        pairs, complete = {}, None
        low, first = int(a[0]), int(wanted[0])
        if (a == low).all() and (wanted == first).all():
            barrier = find_mbarrier(block, low, st)
            pairs[low, first] = barrier
            all_done = barrier.phase != first
        else:
            for key in set(zip(a.tolist(), wanted.tolist(), strict=True)):
                pairs[key] = find_mbarrier(block, key[0], st)
            complete = np.array(
                [pairs[k].phase != k[1] for k in zip(a.tolist(), wanted.tolist(), strict=True)]
            )
            all_done = complete.all()
        for barrier in pairs.values():
            _use(block, g, barrier, st)
        schedule = block.machine.schedule
        if not all_done and patient and not g.expired and not schedule.spurious_timeout():
            g.blocked = MbarrierWait([(b, k[1]) for k, b in pairs.items()])
            for (_, parity), barrier in pairs.items():
                if barrier.phase == parity:
                    barrier.waiters.append(g)
            return BLOCK
        g.expired = False
        if complete is None:
            result = all_done
        else:
            result = np.zeros(g.n, bool)
            result[g.active() if m is None else m] = complete
        if done:
            put(g.v[done[0]][done[1]], result, m)
        for (_, parity), barrier in pairs.items():
            if barrier.phase != parity:
                if block.ordering and not relaxed:
                    for warp in g.warps:
                        block.ordering.acquire(warp, barrier.done)
                        if m is None:
                            block.ordering.warp_sync(warp)
                if block.machine.trace:
                    block.machine.trace.waited(
                        g,
                        getattr(barrier, "done_time", 0),
                        "wait mbarrier",
                        f"mbarrier {barrier.address:#x} at {trace_source(st)}",
                    )
        return None if all_done else YIELD

    return effect(run)


# ---- fences


@instruction("fence", "membar")
def _fence(asm, st):
    opcode = st.opcode
    if "mbarrier_init" in opcode:

        def fence_init(block, g, m):
            if block.ordering:
                for barrier in block.mbarriers.values():
                    if barrier.initialised_by[0] in g.warps:
                        barrier.fenced = True
                        barrier.fenced_phase = _cluster_phase(block)

        return effect(fence_init)
    if opcode.startswith("fence.proxy.async"):
        space, _ = space_of(st.parts)
        if space == "global":
            return effect(lambda block, g, m: None)

        def fence_async(block, g, m):
            if block.ordering:
                for warp in g.warps:
                    block.ordering.fence_proxy(warp)

        return effect(fence_async)
    return effect(lambda block, g, m: None)


@instruction("griddepcontrol")
def _griddepcontrol(asm, st):
    """Launches run one after another; a use of what an earlier one used needs the wait.

    Where a launch lets its dependents start after its own wait alone, the next one starts when the
    launches before it have completed.
    """

    def launch_dependents(block, g, m):
        if block.ordering:
            waited = block.ordering.clock[g.warps, block.ordering.prerequisites].all()
            block.machine.dependence.triggers.add(bool(waited))

    def wait(block, g, m):
        if block.ordering:
            block.ordering.clock[g.warps, block.ordering.prerequisites] = 1
        block.machine.dependence.waited = True

    return effect(wait if st.parts[1] == "wait" else launch_dependents)


@instruction("nanosleep")
def _nanosleep(asm, st):
    return effect(lambda block, g, m: YIELD)


@instruction("trap", "brkpt")
def _trap(asm, st):
    return effect(lambda block, g, m: block.machine.log.fatal("trap", st, "the program trapped"))


@instruction("pmevent")
def _pmevent(asm, st):
    return lambda v, m: None


# ---- registers


@instruction("setmaxnreg")
def _setmaxnreg(asm, st):
    """Registers go to and come from a pool of the block; .inc waits until there are enough."""
    grow = st.parts[1] == "inc"
    value = int(st.operands[0])
    if not 24 <= value <= 256 or value % 8:
        raise FormError("setmaxnreg: the count must be in 24..256, a multiple of 8")

    def run(block, g, m):
        mine = slice(g.lo >> 5, g.hi >> 5)
        have = block.warp_registers[mine]
        if (value < have if grow else value > have).any():
            block.machine.log.add(
                "setmaxnreg", st, f".{st.parts[1]} to {value} registers from {int(have[0])}"
            )
        need = 32 * int((value - have).sum())
        if need > block.register_pool:
            g.blocked = RegisterWait(need)
            block.register_waiters.append(g)
            return BLOCK
        block.register_pool -= need
        block.warp_registers[mine] = value
        for group in block.register_waiters:
            group.blocked = None
        block.register_waiters.clear()
        block.machine.progress += 1
        return None

    return effect(run, converge=True)
