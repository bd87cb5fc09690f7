"""Remove or weaken each synchronisation of a kernel in turn, in its PTX, and see who notices.

A mutant is killed when the simulator reports a finding, or the result differs, under one of the
schedules tried.  One that survives them all is either equivalent, and belongs on a list that says
why, or shows what the simulator cannot see.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .findings import SimulationError
from .ptx import PtxError
from .simulation import simulate

SCHEDULES = (
    {"timing": "late", "warps": "fair", "seed": 0},
    {"timing": "shuffled", "warps": "adversarial", "seed": 1},
    {"timing": "early", "warps": "seeded", "seed": 2},
    {"timing": "shuffled", "warps": "seeded", "seed": 3},
)


@dataclass(frozen=True)
class Mutant:
    """A changed line.

    Attributes:
      line: in the PTX, from 1.
      what: the change in words.
      before, after: the line's text.
    """

    line: int
    what: str
    before: str
    after: str

    def apply(self, ptx: str) -> str:
        lines = ptx.split("\n")
        lines[self.line - 1] = self.after
        return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: ``reason`` is None where it survived."""

    mutant: Mutant
    reason: str | None

    def __str__(self):
        verdict = f"killed by {self.reason}" if self.reason else "SURVIVED"
        line = self.mutant.before.strip()[:70]
        return f"{self.mutant.line:5d} {self.mutant.what:34s} {verdict}: {line}"


_REMOVED = (
    ("mbarrier.arrive", "remove mbarrier.arrive"),
    ("fence.", "remove fence"),
    ("membar", "remove fence"),
    ("wgmma.fence", "remove wgmma.fence"),
    ("wgmma.commit_group", "remove wgmma.commit_group"),
    ("wgmma.wait_group", "remove wgmma.wait_group"),
    ("bar.sync", "remove bar.sync"),
    ("bar.arrive", "remove bar.arrive"),
    ("barrier.sync", "remove barrier.sync"),
    ("barrier.arrive", "remove barrier.arrive"),
    ("barrier.cluster", "remove barrier.cluster"),
    ("bar.warp.sync", "remove bar.warp.sync"),
    ("cp.async.bulk.commit_group", "remove bulk commit_group"),
    ("cp.async.bulk.wait_group", "remove bulk wait_group"),
    ("cp.async.commit_group", "remove cp.async commit_group"),
    ("cp.async.wait_group", "remove cp.async wait_group"),
    ("cp.async.mbarrier.arrive", "remove cp.async.mbarrier.arrive"),
    ("mbarrier.init", "remove mbarrier.init"),
    ("tcgen05.commit", "remove tcgen05.commit"),
    ("tcgen05.wait", "remove tcgen05.wait"),
    ("tcgen05.fence", "remove tcgen05.fence"),
    ("setmaxnreg.dec", "remove setmaxnreg.dec"),
    ("griddepcontrol.wait", "remove griddepcontrol.wait"),
)

_GUARDED = re.compile(r"^(\s*)(@!?%\S+\s+)?(.*)$")


def mutants(ptx: str) -> list[Mutant]:
    """Every synchronisation removed, and waits and counts also weakened."""
    out = []
    for number, text in enumerate(ptx.split("\n"), 1):
        indent, guard, body = _GUARDED.match(text).groups()
        guard = guard or ""

        def add(what, after, number=number, text=text, indent=indent):
            out.append(Mutant(number, what, text, indent + after))

        wait = re.match(r"mbarrier\.(?:try|test)_wait\S*\s+(%?\w+),", body)
        if wait:
            add("ignore mbarrier wait", f"{guard}setp.eq.b32 {wait[1]}, 0, 0;")
            parity = re.match(r"(mbarrier\.\S*parity\S*\s+%?\w+, \[[^\]]*\], )(%\w+)(.*)", body)
            if parity:
                add(
                    "wait for the other parity",
                    f"{{ .reg .b32 flipped; xor.b32 flipped, {parity[2]}, 1; "
                    f"{guard}{parity[1]}flipped{parity[3]} }}",
                )
            continue
        for opcode, what in _REMOVED:
            if body.startswith(opcode):
                add(what, "")
                break
        group = re.match(r"((?:wgmma|cp\.async\.bulk|cp\.async)\.wait_group\S*\s+)(\d+);", body)
        if group:
            add("weaken wait_group by one", f"{guard}{group[1]}{int(group[2]) + 1};")
        count = re.match(r"(mbarrier\.init\S*\s+\[[^\]]*\], )(%\w+|\d+);", body)
        if count:
            for step in (1, -1):
                add(
                    f"mbarrier count {step:+d}",
                    f"{{ .reg .b32 changed; add.s32 changed, {count[2]}, {step}; "
                    f"{guard}{count[1]}changed; }}",
                )
        expect = re.match(
            r"(mbarrier\.arrive\.expect_tx\S*\s+[^,]+, \[[^\]]*\], )(%\w+|\d+);", body
        )
        expect = expect or re.match(
            r"(mbarrier\.arrive\.expect_tx\S*\s+\[[^\]]*\], )(%\w+|\d+);", body
        )
        if expect:
            add(
                "expect 16 bytes less",
                f"{{ .reg .b32 changed; add.s32 changed, {expect[2]}, -16; "
                f"{guard}{expect[1]}changed; }}",
            )
    return out


def sources(ptx: str, line: int, file: str, reach: int = 2) -> list[str]:
    """Text of the Python lines of ``file`` that line information names nearest to a PTX line."""
    files = dict(re.findall(r"^\s*\.file\s+(\d+)\s+\"([^\"]*)\"", ptx, re.M))
    lines = ptx.split("\n")
    found = []
    for numbers in (range(line - 1, 0, -1), range(line, len(lines) + 1)):
        nearest = []
        for number in numbers:
            loc = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", lines[number - 1])
            if loc and loc[2] != "0" and files.get(loc[1], "").endswith(file):
                nearest.append((files.get(loc[1], ""), int(loc[2])))
                if len(nearest) == reach:
                    break
        found += nearest
    texts = []
    for name, number in found:
        source = Path(name)
        if source.is_file():
            content = source.read_text().split("\n")
            if number <= len(content):
                texts.append(content[number - 1].strip())
    return texts


def unused_barriers(outcomes: Sequence[Outcome]) -> set[int]:
    """PTX lines that initialise an mbarrier which nothing uses: removing them changes nothing."""
    return {
        o.mutant.line
        for o in outcomes
        if o.reason is None and o.mutant.what == "remove mbarrier.init"
    }


def judge(
    kernel,
    mutant: Mutant,
    inputs: Sequence[np.ndarray],
    outputs,
    same: Callable[[list[np.ndarray]], bool],
    schedules=SCHEDULES,
    **options,
) -> Outcome:
    """Run a mutant under each schedule until something notices."""
    changed = dataclasses.replace(kernel, ptx=mutant.apply(kernel.ptx))
    for schedule in schedules:
        try:
            results = simulate(changed, *inputs, outputs=outputs, **schedule, **options)
        except SimulationError as error:
            return Outcome(mutant, error.findings[0].kind)
        except PtxError as error:
            return Outcome(mutant, f"the parser: {error}")
        if not same(results):
            return Outcome(mutant, "a different result")
    return Outcome(mutant, None)


def judge_all(
    kernel, inputs, outputs, same, *, select=None, report=None, workers: int = 1, **options
) -> list[Outcome]:
    """The outcome of every mutant (that ``select`` accepts) on a line that runs.

    Args:
      workers: processes; what several are given must be picklable.
    """
    reached: set[int] = set()
    simulate(kernel, *inputs, outputs=outputs, coverage=reached)
    chosen = [m for m in mutants(kernel.ptx) if m.line in reached and (not select or select(m))]
    judged = functools.partial(judge, kernel, inputs=inputs, outputs=outputs, same=same, **options)
    outcomes = []
    with contextlib.ExitStack() as stack:
        run: Callable = map
        if workers > 1:
            pool = ProcessPoolExecutor(
                workers, get_context("spawn"), initializer=_hold, initargs=(judged,)
            )
            judged, run = _judge_held, stack.enter_context(pool).map
        for outcome in run(judged, chosen):
            outcomes.append(outcome)
            if report:
                report(outcome)
    return outcomes


_held: list[Callable[[Mutant], Outcome]] = []
"""In a worker, ``judge`` of what it was started for."""


def _hold(judged: Callable[[Mutant], Outcome]) -> None:
    _held[:] = [judged]


def _judge_held(mutant: Mutant) -> Outcome:
    return _held[0](mutant)
