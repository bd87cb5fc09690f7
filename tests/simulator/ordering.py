"""Happens-before on shared memory, across warps and across the generic and asynchronous proxies.

Every actor has a clock: each warp; each warp's wgmmas (or tcgen05 products and copies), which
finish in order; each warp's loads and stores of tensor memory; and two pools of slots, one for each
bulk copy in flight and one for each ``cp.async``, which is of the generic proxy.  A warp keeps two
vector clocks: what happened before it, and the part of that which a proxy fence has made visible to
the asynchronous proxy.  Barriers carry both from those who arrive to those who wait.  Shadow
memory, a cell for every four bytes, holds the last writer and every actor's last read.  An access
that is not ordered after the last conflicting one is a race; one that is ordered, but
generic-to-asynchronous without a proxy fence, is a missing fence.

Within a warp, ``bar.warp.sync`` (or a barrier, or an mbarrier wait) starts a new epoch.  A thread
that reads what another thread of its warp wrote in the same epoch races; and a release or a bulk
copy by some threads of a warp covers only what the warp did before the epoch, if other threads of
it accessed shared memory since.

Accesses to tensor memory by different warps need more than a barrier between them: the first one's
``tcgen05.fence::before_thread_sync`` (which ``tcgen05.commit`` implies) publishes it, barriers
carry what is published, and the second one's ``::after_thread_sync`` makes it seen.
"""

import numpy as np

CELL = 4
NUM_SLOTS = 24
"""Of each pool."""
ALWAYS = np.iinfo(np.int32).max
"""A clock that every operation of an actor lies before."""
ALL_LANES = 0xFFFFFFFF
PRODUCTS, TENSOR_ACCESSES = 0, 1
"""A warp's two actors for asynchronous work that finishes in order."""


class Ordering:
    """The clocks and the shadow memory of one cluster.

    Args:
      num_warps: warps of all its blocks together.
      cells: shadow cells of all its blocks together.
      log: where findings go.
      tensor_memory: whether warps load and store tensor memory.
    """

    def __init__(self, num_warps: int, cells: int, log, *, tensor_memory: bool = False):
        self.num_warps = num_warps
        self.first_slot = (3 if tensor_memory else 2) * num_warps
        self.first_generic_slot = self.first_slot + NUM_SLOTS
        # 1 where griddepcontrol.wait is behind.
        self.prerequisites = self.first_generic_slot + NUM_SLOTS
        self.num_actors = self.prerequisites + 1
        self.clock = np.zeros((num_warps, self.num_actors + 1), np.int32)
        self.fenced = np.zeros((num_warps, self.num_actors + 1), np.int32)
        warps = np.arange(num_warps)
        self.clock[warps, warps] = 1
        # Of the tensor memory work before a warp: what was fenced before a barrier, and after it.
        self.published = np.zeros_like(self.clock) if tensor_memory else None
        self.seen = np.zeros_like(self.clock) if tensor_memory else None
        self.wgmma_clock = np.zeros(self.first_slot - num_warps, np.int32)
        self.slot_clock = np.zeros(2 * NUM_SLOTS, np.int32)
        self.next_slot = [0, 0]
        self.writer = np.full(cells, self.num_actors, np.int16)  # one past the end: nobody
        self.write_clock = np.zeros(cells, np.int32)
        self.write_statement = np.zeros(cells, np.int32)
        self.read_clock = np.zeros((self.num_actors, cells), np.int32)
        self.written = np.zeros(cells, bool)
        self.writer_lane = np.full(cells, -1, np.int8)  # -1: a collective of the warp
        self.write_epoch = np.zeros(cells, np.int32)
        self.epoch = np.ones(num_warps, np.int32)
        self.epoch_start = np.ones(num_warps, np.int32)
        self.epoch_lanes = [0] * num_warps  # threads that accessed shared memory since
        self.log = log
        self.statements = []

    # ---- synchronisation

    def release(self, warp: int, lanes: int = ALL_LANES):
        """What a warp publishes when some of its threads arrive at a barrier."""
        pair = self.clock[warp].copy(), self.fenced[warp].copy()
        if self.published is not None:
            pair = (*pair, self.published[warp].copy())
        if self.epoch_lanes[warp] & ~lanes:
            before = self.epoch_start[warp] - 1
            pair[0][warp] = before
            pair[1][warp] = min(pair[1][warp], before)
        self.clock[warp, warp] += 1
        return pair

    def warp_sync(self, warp: int) -> None:
        """The threads of a warp met: what each did, all have."""
        self.epoch[warp] += 1
        self.clock[warp, warp] += 1
        self.epoch_start[warp] = self.clock[warp, warp]
        self.epoch_lanes[warp] = 0

    def acquire(self, warp: int, pair) -> None:
        np.maximum(self.clock[warp], pair[0], out=self.clock[warp])
        np.maximum(self.fenced[warp], pair[1], out=self.fenced[warp])
        if self.published is not None:
            np.maximum(self.published[warp], pair[2], out=self.published[warp])

    def nothing(self):
        views = 2 if self.published is None else 3
        return tuple(np.zeros(self.num_actors + 1, np.int32) for _ in range(views))

    @staticmethod
    def join(into, pair) -> None:
        for view, other in zip(into, pair, strict=True):
            np.maximum(view, other, out=view)

    def fence_proxy(self, warp: int) -> None:
        np.maximum(self.fenced[warp], self.clock[warp], out=self.fenced[warp])
        self.clock[warp, warp] += 1

    def fence_before_sync(self, warp: int) -> None:
        """What a warp did with tensor memory, and knows to be done, goes with its next arrival."""
        own = [self.num_warps + warp, 2 * self.num_warps + warp]
        self.published[warp, own] = self.clock[warp, own]

    def fence_after_sync(self, warp: int) -> None:
        np.maximum(self.seen[warp], self.published[warp], out=self.seen[warp])

    # ---- accesses by threads

    def _touch(self, warps, lanes) -> None:
        if lanes is None or len(lanes) % 32 == 0:
            for warp in set(warps.tolist()):
                self.epoch_lanes[warp] = ALL_LANES
            return
        for warp, lane in zip(warps.tolist(), lanes.tolist(), strict=True):
            self.epoch_lanes[warp] |= 1 << lane

    def read(self, warps, cells, statement, pc, lanes=None) -> None:
        """Threads of ``warps`` (n,) read ``cells`` (n, k); no ``lanes`` (n,): collectively."""
        column = warps[:, None]
        self._touch(warps, lanes)
        if lanes is not None:
            own = (self.writer[cells] == column) & (self.write_epoch[cells] == self.epoch[column])
            if own.any():
                lane = self.writer_lane[cells]
                own &= (lane >= 0) & (lane != lanes[:, None])
                if own.any():
                    self._within_warp(cells, own, lanes, statement)
        written = self.written[cells]
        if not written.all():
            self._uninitialised(cells, written, statement)
        ok = self.clock[column, self.writer[cells]] >= self.write_clock[cells]
        if not ok.all():
            self._race("reads", f"warp {int(warps[np.argwhere(~ok)[0][0]])}", cells, ok, statement)
        self.read_clock[column, cells] = self.clock[warps, warps][:, None]

    def write(self, warps, cells, statement, pc, lanes=None) -> None:
        """Threads of ``warps`` (n,) write ``cells`` (n, k); no ``lanes`` (n,): collectively."""
        column = warps[:, None]
        self._touch(warps, lanes)
        ok = self.clock[column, self.writer[cells]] >= self.write_clock[cells]
        if not ok.all():
            self._race("writes", f"warp {int(warps[np.argwhere(~ok)[0][0]])}", cells, ok, statement)
        seen = self.clock[warps, : self.num_actors].T[:, :, None]
        late = self.read_clock[:, cells] > seen
        if late.any():
            writer = int(warps[np.argwhere(late)[0][1]])
            self._overwritten(f"warp {writer}", late, cells, statement)
        self.writer[cells] = column
        self.writer_lane[cells] = -1 if lanes is None else lanes[:, None]
        self.write_epoch[cells] = self.epoch[column]
        self.write_clock[cells] = self.clock[warps, warps][:, None]
        self.write_statement[cells] = pc
        self.written[cells] = True

    # ---- accesses by the asynchronous proxy

    def begin(self, warp: int, lanes: int = ALL_LANES):
        """Start an asynchronous operation: (actor, clock, view for writers, view for readers)."""
        return (*self._next_slot(0), *self._views(warp, lanes))

    def begin_generic(self, warp: int):
        """The same of the generic proxy, to which no proxy fence need make anything visible."""
        everything = self._views(warp)[1]
        return (*self._next_slot(1), everything, everything)

    def _next_slot(self, pool: int) -> tuple[int, int]:
        """An actor and its clock."""
        slot = pool * NUM_SLOTS + self.next_slot[pool]
        self.next_slot[pool] = (self.next_slot[pool] + 1) % NUM_SLOTS
        self.slot_clock[slot] += 1
        return self.first_slot + slot, int(self.slot_clock[slot])

    def _views(self, warp, lanes=ALL_LANES):
        writers = self.clock[warp].copy()
        for generic in (
            slice(self.num_warps),
            slice(self.first_generic_slot, self.first_generic_slot + NUM_SLOTS),
        ):
            writers[generic] = self.fenced[warp, generic]
        everything = self.clock[warp].copy()
        if self.epoch_lanes[warp] & ~lanes:
            before = self.epoch_start[warp] - 1
            writers[warp] = min(writers[warp], before)
            everything[warp] = before
        return writers, everything

    def wgmma(self, warp: int, kind: int = PRODUCTS):
        """The warp's actor of a kind, for operations of the group not yet committed."""
        index = kind * self.num_warps + warp
        return (self.num_warps + index, int(self.wgmma_clock[index]) + 1, *self._views(warp))

    def wgmma_commit(self, warp: int, kind: int = PRODUCTS) -> None:
        self.wgmma_clock[kind * self.num_warps + warp] += 1

    def wgmma_wait(self, warp: int, pending: int, kind: int = PRODUCTS) -> None:
        index = kind * self.num_warps + warp
        actor = self.num_warps + index
        done = self.wgmma_clock[index] - pending
        self.clock[warp, actor] = max(self.clock[warp, actor], done)

    def finish(self, pair, token) -> None:
        """Publish an operation's completion through a barrier's clocks."""
        actor, clock = token[:2]
        is_generic = self.first_generic_slot <= actor < self.prerequisites
        for view in pair[:1] if is_generic else pair:
            view[actor] = max(view[actor], clock)

    def finish_with_history(self, pair, token, published) -> None:
        """Like ``finish``, and with the asynchronous work that was done when it was issued."""
        self.finish(pair, token)
        known = token[3].copy()
        known[: self.num_warps] = 0
        known[token[0]] = token[1]
        self.join(pair, (known, known, published))

    def observe(self, warp: int, token) -> None:
        """A warp waited for an operation of its own (bulk groups)."""
        actor, clock = token[:2]
        self.clock[warp, actor] = max(self.clock[warp, actor], clock)

    def tensor_read(self, token, warp, cells, statement, name) -> None:
        """A read of tensor memory, by an asynchronous operation that ``warp`` issued."""
        self._check_tensor_fences(token, warp, cells, statement, name, reads=True)
        self.async_read(token, cells, statement, name)

    def tensor_write(self, token, warp, cells, statement, pc, name) -> None:
        """A write of tensor memory, by an asynchronous operation that ``warp`` issued."""
        self._check_tensor_fences(token, warp, cells, statement, name, reads=False)
        self.async_write(token, cells, statement, pc, name)

    def _check_tensor_fences(self, token, warp, cells, statement, name, *, reads):
        """What a barrier orders before the operation, fences must order too."""
        ordered = token[3]
        actors = np.arange(self.num_warps, self.first_slot)
        actors = actors[actors % self.num_warps != warp]
        last = np.where(self.writer[cells] == actors[:, None], self.write_clock[cells], 0)
        if not reads:
            last = np.maximum(last, self.read_clock[actors][:, cells])
        bad = (last > self.seen[warp, actors, None]) & (last <= ordered[actors, None])
        if not bad.any():
            return
        row, column = np.argwhere(bad)[0]
        published = self.published[warp, actors[row]] >= last[row, column]
        self.log.add(
            "missing tcgen05.fence",
            statement,
            f"{name} {'reads' if reads else 'writes'} tensor memory that "
            f"{self.actor_name(int(actors[row]))} used before a barrier between them, with no "
            + ("tcgen05.fence::after_thread_sync after" if published
               else "tcgen05.fence::before_thread_sync before")
            + " the barrier",
        )  # fmt: skip

    def async_read(self, token, cells, statement, name) -> None:
        actor, clock, writers, everything = token
        written = self.written[cells]
        if not written.all():
            self._uninitialised(cells, written, statement)
        self._check_writers(name, "reads", writers, everything, cells, statement)
        self.read_clock[actor, cells] = clock

    def async_write(self, token, cells, statement, pc, name) -> None:
        actor, clock, writers, everything = token
        self._check_writers(name, "writes", writers, everything, cells, statement)
        late = self.read_clock[:, cells] > everything[: self.num_actors, None]
        if late.any():
            self._overwritten(name, late, cells, statement)
        self.writer[cells] = actor
        self.write_clock[cells] = clock
        self.write_statement[cells] = pc
        self.written[cells] = True

    def _check_writers(self, name, verb, writers, everything, cells, statement):
        who = self.writer[cells]
        clock = self.write_clock[cells]
        ok = writers[who] >= clock
        if ok.all():
            return
        ordered = everything[who] >= clock
        if not ordered.all():
            self._race(verb, name, cells, ordered, statement)
        else:
            cell = int(np.asarray(cells)[~ok].flat[0])
            self.log.add(
                "missing proxy fence",
                statement,
                f"{name} {verb} byte {cell * CELL} of shared memory, which {self._last(cell)} "
                "through the generic proxy, with no fence.proxy.async between",
            )

    # ---- reports

    def actor_name(self, actor: int) -> str:
        if actor < self.num_warps:
            return f"warp {actor}"
        if actor < 2 * self.num_warps:
            return f"a wgmma, or tcgen05 product or copy, of warp {actor - self.num_warps}"
        if actor < self.first_slot:
            return f"a tcgen05.ld or .st of warp {actor - 2 * self.num_warps}"
        return "a bulk copy" if actor < self.first_generic_slot else "a cp.async"

    def _last(self, cell):
        statement = self.statements[int(self.write_statement[cell])]
        return f"{self.actor_name(int(self.writer[cell]))} wrote at {statement.where()}"

    def _race(self, verb, who, cells, ok, statement):
        cell = int(np.asarray(cells)[~ok].flat[0])
        self.log.add(
            "shared-memory race",
            statement,
            f"{who} {verb} byte {cell * CELL} of shared memory, which {self._last(cell)}, with "
            "nothing that orders the two",
        )

    def _overwritten(self, who, late, cells, statement):
        first = np.argwhere(late)[0]
        cell = int(np.asarray(cells)[tuple(first[1:])])
        self.log.add(
            "shared-memory race",
            statement,
            f"{who} writes byte {cell * CELL} of shared memory while "
            f"{self.actor_name(int(first[0]))} may still read it",
        )

    def _within_warp(self, cells, bad, lanes, statement):
        row, column = np.argwhere(bad)[0]
        cell = int(np.broadcast_to(cells, bad.shape)[row, column])
        self.log.add(
            "shared-memory race",
            statement,
            f"lane {int(lanes[row])} reads byte {cell * CELL} of shared memory, which lane "
            f"{int(self.writer_lane[cell])} of its warp wrote, with no bar.warp.sync between",
        )

    def _uninitialised(self, cells, written, statement):
        cell = int(np.asarray(cells)[~written].flat[0])
        self.log.add(
            "uninitialised shared memory",
            statement,
            f"reads byte {cell * CELL} of shared memory, which nothing wrote",
        )
        self.written[np.asarray(cells)[~written]] = True
