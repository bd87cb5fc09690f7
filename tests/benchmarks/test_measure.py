"""What is made of a timeline, and how implementations take turns."""

import pytest

from benchmarks.call_by_call import ratios
from benchmarks.cupti import Activity
from benchmarks.measure import (
    DeviceClock,
    HostClock,
    Step,
    busy_ms,
    busy_ms_per_call,
    fastest,
    measure,
)

MS = 1_000_000  # nanoseconds


def kernel(start_ms: float, end_ms: float, name: str = "k") -> Activity:
    return Activity(round(start_ms * MS), round(end_ms * MS), name)


@pytest.mark.parametrize(
    ("activities", "expected"),
    [
        ([kernel(1, 3)], 2.0),
        ([kernel(1, 3), kernel(5, 6)], 3.0),  # a gap does not count
        ([kernel(1, 3), kernel(2, 5)], 4.0),  # an overlap counts once
        ([kernel(1, 9), kernel(2, 3), kernel(8, 10)], 9.0),  # one inside another
        ([kernel(1, 2), kernel(2, 3)], 2.0),
    ],
)
def test_busy_time_is_the_union(activities: list[Activity], expected: float) -> None:
    assert busy_ms(activities) == pytest.approx(expected)


def test_calls_are_told_apart_by_their_kernels() -> None:
    activities = [
        kernel(0, 1, "pre"),
        kernel(1.5, 3, "main"),
        kernel(10, 11.5, "pre"),
        kernel(12, 14, "main"),
    ]
    assert busy_ms_per_call(activities, 2) == pytest.approx([2.5, 3.5])


@pytest.mark.parametrize("names", [["a", "b", "b", "a"], ["a", "a", "a"]])
def test_kernels_that_do_not_repeat_give_a_mean(names: list[str]) -> None:
    activities = [kernel(i, i + 0.5, name) for i, name in enumerate(names)]
    assert busy_ms_per_call(activities, 2) == pytest.approx([len(names) * 0.25])


class RecordedTimeline:
    """A timeline on which every call of a step takes a given time."""

    def __init__(self):
        self.now = 0.0
        self.activities: list[Activity] = []

    def step(self, ms: float, log: list[str] | None = None, name: str = "k") -> Step:
        def call():
            if log is not None:
                log.append(name)
            self.activities.append(kernel(self.now, self.now + ms, name))
            self.now += ms + 1  # the host is slow: gaps of a millisecond

        return Step(call, lambda _: None, "bfloat16")

    def read(self) -> list[Activity]:
        activities, self.activities = self.activities, []
        return activities


def test_device_clock_sees_only_its_own_calls() -> None:
    timeline = RecordedTimeline()
    timeline.step(50).run(3)
    assert DeviceClock(timeline).time(timeline.step(0.25), 4) == pytest.approx([0.25] * 4)


def test_calls_in_turns_are_told_apart_by_how_many_kernels_each_has() -> None:
    timeline, log = RecordedTimeline(), []
    one, other = timeline.step(2, log, "one"), timeline.step(3, log, "other")

    def twice():
        one.call()
        other.call()

    both = Step(twice, lambda _: None, "bfloat16")
    turns = DeviceClock(timeline).time_in_turns([both, one], 3)
    assert turns == [pytest.approx((5, 2))] * 3
    assert log[-3:] == ["one", "other", "one"]


def test_calls_whose_kernels_are_not_the_same_every_time_are_refused() -> None:
    timeline, calls = RecordedTimeline(), []
    one = timeline.step(1)

    def call():
        calls.append(one.call())
        if len(calls) == 3:
            one.call()

    with pytest.raises(RuntimeError, match="not the same every call"):
        DeviceClock(timeline).time_in_turns([Step(call, lambda _: None, "bfloat16"), one], 3)


def test_ratios_are_of_calls_right_after_each_other() -> None:
    timeline = RecordedTimeline()
    found = ratios(timeline.step(3), timeline.step(2), DeviceClock(timeline), pairs=5)
    assert found == {
        "ratio": 1.5,
        "ratio_quartiles": [1.5, 1.5],
        "ms": pytest.approx(3),
        "base_ms": pytest.approx(2),
        "pairs": 5,
    }


def test_device_clock_refuses_an_empty_timeline() -> None:
    step = Step(lambda: None, lambda _: None, "bfloat16")
    with pytest.raises(RuntimeError, match="no kernel"):
        DeviceClock(RecordedTimeline()).time(step, 4)


def test_implementations_take_turns_and_a_failing_one_leaves() -> None:
    timeline = RecordedTimeline()
    log: list[str] = []

    def fail():
        raise MemoryError("out of memory")

    steps = {
        "slow": timeline.step(2, log, "slow"),
        "broken": Step(fail, lambda _: None, "bfloat16"),
        "fast": timeline.step(1, log, "fast"),
    }
    failures = []
    timings = measure(
        steps, DeviceClock(timeline), 3, lambda name, error: failures.append((name, str(error)))
    )
    assert failures == [("broken", "out of memory")]
    assert list(timings) == ["slow", "fast"]
    assert timings["slow"].ms == pytest.approx(2)
    assert timings["fast"].ms == pytest.approx(1)
    assert timings["fast"].ms_spread == pytest.approx(0, abs=1e-9)
    turns = [name for i, name in enumerate(log) if i == 0 or log[i - 1] != name]
    # The order turns: slow first, then (broken and) fast first, then fast first.
    assert turns == ["slow", "fast", "slow", "fast", "slow"]


def test_warm_up_calls_are_not_timed() -> None:
    timeline = RecordedTimeline()
    log: list[str] = []
    measure({"k": timeline.step(1, log)}, DeviceClock(timeline), 1, lambda *_: None)
    cold = len(log)
    log.clear()
    timings = measure(
        {"k": timeline.step(1, log)}, DeviceClock(timeline), 1, lambda *_: None, warm_up_ms=1
    )
    assert len(log) > cold
    assert timings["k"].calls == 20
    assert timings["k"].ms == pytest.approx(1)


def test_a_long_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.LONG_MS", 0)
    timeline = RecordedTimeline()
    log: list[str] = []
    steps = {"k": timeline.step(1, log)}
    timings = measure(steps, DeviceClock(timeline), 3, lambda *_: None, warm_up_ms=100)
    assert timings["k"].calls == 1
    assert len(log) == 2  # one to see how long it takes


def test_host_clock_gives_one_mean() -> None:
    (ms,) = HostClock().time(Step(lambda: None, lambda _: None, "bfloat16"), 10)
    assert 0 <= ms < 100


def test_the_fastest_setting_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"a": 3.0, "b": 1.0, "c": 2.0}

    def step(name: str) -> Step:
        if name not in times:
            raise ValueError(f"no {name}")
        return Step(lambda: name, lambda _: None, "float32")

    monkeypatch.setattr(HostClock, "time", lambda self, step, calls: [times[step.call()]])
    found = fastest((name, lambda name=name: step(name)) for name in "xabc")
    assert (found.setting, found.call()) == ("b", "b")
    with pytest.raises(ValueError, match="no y"):
        fastest((name, lambda name=name: step(name)) for name in "xy")
