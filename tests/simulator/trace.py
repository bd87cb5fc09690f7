"""A timeline of one block: who ran, who waited for whom, and what went on asynchronously.

Time is counted in instructions of a warp.  Every warp has its own clock; a wait moves it to the
time at which what it waits for happened, a copy takes ``COPY`` instructions and the tensor cores
one for every ``MACS`` multiplications of a column of 64 rows.  The costs are rough: the picture
shows the shape of a schedule and which edge stalls, not a duration.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COPY = 600
MACS = 32
"""An m64n128k16 wgmma keeps the tensor cores of an SM busy for 64 cycles."""

COLOURS = {
    "run": "#4c78a8",
    "wait mbarrier": "#e45756",
    "wait barrier": "#f58518",
    "wait wgmma": "#b279a2",
    "wait copy": "#9d755d",
    "copy": "#54a24b",
    "wgmma": "#72b7b2",
}


@dataclass(frozen=True)
class Segment:
    """A stretch of a row of the picture; ``label`` says which barrier or line."""

    row: str
    start: int
    end: int
    kind: str
    label: str


class Trace:
    """Records one block of one launch.

    Args:
      block: its index in the grid, (x, y, z).
      launch: number of the launch; None for the one with the most instructions so far.
      barriers: what the block's mbarriers are called, in the order of their addresses.
    """

    def __init__(
        self,
        block: tuple[int, int, int] = (0, 0, 0),
        launch: int | None = None,
        barriers: Sequence[str] = (),
    ):
        self.block, self.launch, self.barriers = block, launch, barriers
        self.names: dict[str, str] = {}
        self.segments: list[Segment] = []
        self.waits: dict = defaultdict(int)
        self.last = 0
        self._launches = -1
        self._kept = None
        self._active = False

    # ---- called by the machine

    def begin(self, block) -> bool:
        """Start a block; whether it is the one to record."""
        if self._active:
            return False
        self._launches += block.linear_id == 0
        self._active = block.block_index == self.block and self.launch in (None, self._launches)
        if self._active:
            self._kept = (self.segments, self.waits, self.last)
            self.segments, self.waits, self.last = [], defaultdict(int), 0
            self._tails: dict[str, int] = {}
            self.clock = [0] * block.num_warps
            self.now = 0
            self._tensor_free = 0
            self._open = defaultdict(int)
            self._committed = defaultdict(list)
        return self._active

    def end(self, block) -> None:
        """A block ended: of several candidates keep the longest."""
        if self._active:
            self.last = max(self.clock)
            addresses = [f"mbarrier {address:#x}" for address in sorted(block.mbarriers)]
            if self.barriers and len(addresses) == len(self.barriers):
                self.names = dict(zip(addresses, self.barriers, strict=True))
            if self._kept and self.launch is None and self._kept[2] > self.last:
                self.segments, self.waits, self.last = self._kept
        self._active = False

    def advance(self, g, count: int) -> None:
        for warp in g.warps.tolist():
            start = self.clock[warp]
            self.clock[warp] = start + count
            self._add(f"warp {warp}", start, start + count, "run", "")
        self.now = self.clock[int(g.warps[0])]

    def effect(self, machine, g, op) -> None:
        self.advance(g, 1)

    def asynchronous(self, machine, g, statement, copy) -> None:
        start = self.clock[int(g.warps[0])]
        copy.time = start + COPY
        self._add("bulk copies", start, copy.time, "copy", source(statement))

    def completing(self, operation) -> None:
        self.now = getattr(operation, "time", self.now)

    def settle(self, barrier, flipped: bool) -> None:
        barrier.time = max(getattr(barrier, "time", 0), self.now)
        if flipped:
            barrier.done_time, barrier.time = barrier.time, 0

    def arrived(self, bar) -> None:
        bar.time = max(getattr(bar, "time", 0), self.now)

    def waited(self, g, time: int, kind: str, label: str) -> None:
        """A group waited for something that happened at ``time``."""
        for warp in g.warps.tolist():
            start = self.clock[warp]
            if time > start:
                self._add(f"warp {warp}", start, time, kind, label)
                self.clock[warp] = time
                self.waits[label] += time - start

    def wgmma(self, machine, g, statement) -> None:
        shape = re.search(r"n(\d+)k(\d+)", statement.opcode)
        columns, depth = (int(shape[1]), int(shape[2])) if shape else (128, 16)
        cost = max(1, columns * depth // MACS * len(g.warps) // 4)
        start = max(self._tensor_free, self.clock[int(g.warps[0])])
        self._tensor_free = start + cost
        self._add("tensor cores", start, self._tensor_free, "wgmma", source(statement))
        for warp in g.warps.tolist():
            self._open[warp] = self._tensor_free

    def wgmma_commit(self, warp: int) -> None:
        self._committed[warp].append(self._open[warp])

    def wgmma_wait(self, g, pending: int, statement) -> None:
        for warp in g.warps.tolist():
            groups = self._committed[warp]
            done = groups[: max(0, len(groups) - pending)]
            if done:
                self.waited(_One(warp), max(done), "wait wgmma", f"wgmma at {source(statement)}")
            del groups[: len(done)]

    def _add(self, row, start, end, kind, label) -> None:
        if not self._active or end <= start:
            return
        index = self._tails.get(row)
        if kind == "run" and index is not None:
            segment = self.segments[index]
            if segment.kind == "run" and segment.end == start:
                self.segments[index] = Segment(row, segment.start, end, kind, label)
                return
        self._tails[row] = len(self.segments)
        self.segments.append(Segment(row, start, end, kind, label))

    # ---- reports

    def report(self) -> str:
        """How long warps waited at each place, in instructions, longest first."""
        lines = [f"{self.last} instructions on the longest warp; warps waited:"]
        for label, total in sorted(self.waits.items(), key=lambda item: -item[1]):
            barrier, at, place = label.partition(" at ")
            lines.append(f"  {total:8d}  {self.names.get(barrier, barrier)}{at}{place}")
        return "\n".join(lines)

    def roles(self) -> dict[str, str]:
        """Rows of the picture -> their label: warps that did the same share a row."""
        by_shape = defaultdict(list)
        for segment in self.segments:
            by_shape[segment.row].append((segment.start, segment.end, segment.kind))
        rows: dict = {}
        seen: dict = {}
        for row, shape in by_shape.items():
            key = (row.split()[0], tuple(shape))
            if key in seen:
                rows[seen[key]] += "," + row.split()[-1]
            else:
                seen[key] = row
                rows[row] = row
        return rows

    def draw(self, path) -> None:
        """Write the timeline as a picture."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        def order(name):
            number = re.search(r"\d+", name)
            return (number is None, int(number[0]) if number else 0, name)

        roles = self.roles()
        names = sorted(roles, key=order)
        figure, axis = plt.subplots(figsize=(16, 0.45 * len(names) + 1.6))
        for y, name in enumerate(names):
            by_kind = defaultdict(list)
            for segment in self.segments:
                if segment.row == name:
                    by_kind[segment.kind].append((segment.start, segment.end - segment.start))
            for kind, spans in by_kind.items():
                axis.broken_barh(
                    spans, (y - 0.4, 0.8), facecolors=COLOURS[kind],
                    edgecolor="white" if kind in ("wgmma", "copy") else "none", linewidth=0.3,
                )  # fmt: skip
        axis.set_yticks(range(len(names)), [roles[n] for n in names])
        axis.invert_yaxis()
        axis.set_xlabel("instructions")
        handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
        axis.legend(handles, COLOURS, ncol=len(COLOURS), loc="lower center", frameon=False,
                    bbox_to_anchor=(0.5, 1.0))  # fmt: skip
        figure.tight_layout()
        figure.savefig(path, dpi=130)
        plt.close(figure)


class _One:
    """A group of one warp, as ``waited`` takes it."""

    def __init__(self, warp):
        self.warps = np.array([warp])


def source(statement) -> str:
    if statement.source:
        return f"{statement.source[0].rsplit('/', 1)[-1]}:{statement.source[1]}"
    return f"PTX line {statement.line}"
