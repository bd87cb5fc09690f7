"""Timing steps in turns: every implementation once a round, several rounds.

A step's time is the time in which the GPU was busy with it: the union of its kernels' intervals,
without the host's gaps between them.  Where CUPTI is not to be had, the host's clock over many
asynchronous calls stands in, and says so.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.cupti import Activity, DeviceTimeline

MIN_CALLS, MAX_CALLS = 5, 20
ROUND_MS = 30.0  # about what one implementation takes in one round
LONG_MS = 1000.0  # a call that takes longer is timed once, in one round, without a warm-up


@dataclass(frozen=True)
class Step:
    """One call of an implementation, ready to run.

    Attributes:
      call: enqueues the call and returns its result without waiting.
      wait: waits for a result.
      dtype: the dtype it really runs in.
      setting: what was chosen by trying, in words; empty where nothing was.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], None]
    dtype: str
    setting: str = ""

    def run(self, calls: int) -> None:
        """Enqueue so many calls and wait for the last."""
        result = None
        for _ in range(calls):
            result = self.call()
        self.wait(result)


@dataclass(frozen=True)
class Timing:
    """Median over all calls, and the distance between the fastest and slowest round's median."""

    ms: float
    ms_spread: float
    calls: int


class Clock(Protocol):
    """Times calls; ``name`` goes into the result's row."""

    name: str

    def time(self, step: Step, calls: int) -> list[float]:
        """Milliseconds of each call, or one mean where single calls cannot be told apart."""
        ...

    def time_in_turns(self, steps: Sequence[Step], calls: int) -> list[tuple[float, ...]]:
        """Milliseconds of each call of some steps, each right after the one before.

        Args:
          steps: those of a turn, in order.
          calls: turns.

        Returns:
          For each turn the milliseconds of each step.
        """
        ...


class HostClock:
    """The host's clock over many asynchronous calls: dispatch counts where it is slower."""

    name = "host"

    def time(self, step: Step, calls: int) -> list[float]:
        start = time.perf_counter()
        step.run(calls)
        return [(time.perf_counter() - start) * 1e3 / calls]

    def time_in_turns(self, steps: Sequence[Step], calls: int) -> list[tuple[float, ...]]:
        return [tuple(self.time(step, 1)[0] for step in steps) for _ in range(calls)]


class DeviceClock:
    """The GPU's clock, through CUPTI."""

    name = "device"

    def __init__(self, timeline: DeviceTimeline):
        self.timeline = timeline

    def time(self, step: Step, calls: int) -> list[float]:
        self.timeline.read()
        step.run(calls)
        activities = self.timeline.read()
        if not activities:
            raise RuntimeError("CUPTI recorded no kernel of this step")
        return busy_ms_per_call(activities, calls)

    def time_in_turns(self, steps: Sequence[Step], calls: int) -> list[tuple[float, ...]]:
        counts = [self._activities_of_a_call(step) for step in steps]
        # Work of two frameworks would run side by side.
        following = [*steps[1:], steps[0]]
        waits = [a.wait is not b.wait for a, b in zip(steps, following, strict=True)]
        result = None
        for _ in range(calls):
            for step, waits_for in zip(steps, waits, strict=True):
                result = step.call()
                if waits_for:
                    step.wait(result)
        steps[-1].wait(result)
        activities = self.timeline.read()
        if len(activities) != calls * sum(counts):
            raise RuntimeError(
                f"CUPTI recorded {len(activities)} kernels of {calls} turns of {counts}"
            )
        left = iter(activities)
        return [
            tuple(busy_ms(list(itertools.islice(left, count))) for count in counts)
            for _ in range(calls)
        ]

    def _activities_of_a_call(self, step: Step) -> int:
        self.timeline.read()
        step.run(4)
        count, rest = divmod(len(self.timeline.read()), 4)
        if rest or not count:
            raise RuntimeError("CUPTI recorded no kernel of this step, or not the same every call")
        return count


def busy_ms(activities: Sequence[Activity]) -> float:
    """Milliseconds in which at least one of the activities, given by start, was running."""
    busy, covered = 0, 0
    for activity in activities:
        busy += max(0, activity.end - max(activity.start, covered))
        covered = max(covered, activity.end)
    return busy / 1e6


def busy_ms_per_call(activities: Sequence[Activity], calls: int) -> list[float]:
    """Busy time of each call; one mean where the kernels do not repeat from call to call."""
    per_call, rest = divmod(len(activities), calls)
    groups = [activities[i * per_call : (i + 1) * per_call] for i in range(calls)]
    names = [[activity.name for activity in group] for group in groups]
    if rest or any(group != names[0] for group in names):
        return [busy_ms(activities) / calls]
    return [busy_ms(group) for group in groups]


def call_ms(step: Step) -> float:
    """Milliseconds of one call on the host's clock, after two others unless the first is long."""
    ms = 0.0
    for _ in range(3):
        start = time.perf_counter()
        step.run(1)
        ms = (time.perf_counter() - start) * 1e3
        if ms > LONG_MS:
            break
    return ms


def fastest(steps: Iterable[tuple[str, Callable[[], Step]]], calls: int = 10) -> Step:
    """The fastest of several settings by the host's clock; one at a time is in memory beside it.

    Args:
      steps: a setting in words, and what builds its step; one that raises is passed over.
      calls: of each setting in a row, the better of two rows.

    Raises:
      Exception: that of the last setting, where none runs.
    """
    best, best_ms, failure = None, math.inf, ValueError("steps must not be empty; got none")
    for setting, build in steps:
        try:
            step = build()
            step.run(2)
            ms = min(HostClock().time(step, calls)[0] for _ in range(2))
        except Exception as error:  # a setting that does not fit must not stop the others
            failure = error
            continue
        if ms < best_ms:
            best, best_ms = dataclasses.replace(step, setting=setting), ms
    if best is None:
        raise failure
    return best


def measure(
    steps: dict[str, Step],
    clock: Clock,
    rounds: int,
    failed: Callable[[str, Exception], None],
    warm_up_ms: float = 0,
) -> dict[str, Timing]:
    """Time every step once a round, in an order that turns from round to round.

    Args:
      steps: what to time, by name.
      clock: what times it.
      rounds: how often each has its turn.
      failed: told of a step that raises, which is left out from there on.
      warm_up_ms: for how long a step runs before it is timed; at least one call, unless it is
        longer than ``LONG_MS``.
    """
    times: dict[str, list[list[float]]] = {}
    calls: dict[str, int] = {}
    warm_up: dict[str, int] = {}
    names = list(steps)
    for round_ in range(rounds):
        shift = round_ % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            if round_ and (name not in times or not warm_up[name]):
                continue
            try:
                if name not in calls:
                    ms = call_ms(steps[name])
                    is_long = ms > LONG_MS
                    calls[name] = max(MIN_CALLS, min(MAX_CALLS, round(ROUND_MS / ms)))
                    calls[name] = 1 if is_long else calls[name]
                    warm_up[name] = 0 if is_long else max(1, round(warm_up_ms / ms))
                if warm_up[name]:
                    steps[name].run(warm_up[name])
                times.setdefault(name, []).append(clock.time(steps[name], calls[name]))
            except Exception as error:  # a peer's failure must not stop the others
                times.pop(name, None)
                failed(name, error)
    return {name: summarize(rounds_, calls[name]) for name, rounds_ in times.items()}


def summarize(rounds: Sequence[Sequence[float]], calls: int) -> Timing:
    """Median of all calls and spread of the rounds' medians."""
    medians = [statistics.median(times) for times in rounds]
    return Timing(
        ms=statistics.median(ms for times in rounds for ms in times),
        ms_spread=max(medians) - min(medians),
        calls=calls * len(rounds),
    )
