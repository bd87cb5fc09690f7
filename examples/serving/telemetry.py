"""Tokens per second, time to first token and page use: recorded, printed, plotted."""

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from serving.scheduler import Request


LATEST = 100_000


@dataclass
class Step:
    """What one step of the scheduler left behind."""

    seconds: float  # since the start
    tokens: int
    held_pages: int  # by requests
    kept_pages: int  # for prefixes alone
    active: int
    waiting: int


@dataclass
class Telemetry:
    """Counts of a run; times are seconds since its first step's start.

    The `LATEST` steps and requests are kept, and figures are of them: a server runs for long.
    """

    num_pages: int
    tokens: int = 0
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=LATEST))
    requests: deque["Request"] = field(default_factory=lambda: deque(maxlen=LATEST))
    start: float = field(default_factory=time.perf_counter)

    def record_step(self, **counts: int) -> None:
        self.steps.append(Step(seconds=time.perf_counter() - self.start, **counts))

    def record_request(self, request: "Request") -> None:
        self.requests.append(request)

    def times_to_first_token(self) -> np.ndarray:
        """Seconds, of the requests that have ended."""
        return np.array([r.first_token - r.arrived for r in list(self.requests) if r.first_token])

    def summary(self) -> dict[str, float]:
        """Figures of the run so far; empty before the first request has ended."""
        first = self.times_to_first_token()
        if not len(first) or not self.steps:
            return {}
        # Copied at once: the worker's thread goes on recording.
        requests, steps = list(self.requests), list(self.steps)
        seconds = max(r.ended for r in requests) - min(r.arrived for r in requests)
        prompt_tokens = sum(len(r.prompt) for r in requests)
        held = [step.held_pages for step in steps]
        return {
            "requests": len(requests),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(sum(len(r.output) for r in requests) / seconds, 1),
            "first_token_ms_median": round(float(np.median(first)) * 1e3, 1),
            "first_token_ms_p95": round(float(np.quantile(first, 0.95)) * 1e3, 1),
            "prompt_tokens": prompt_tokens,
            "shared_tokens": sum(r.shared_tokens for r in requests),
            "preemptions": sum(r.preemptions for r in requests),
            "pages_held_mean": round(float(np.mean(held)), 1),
            "pages_held_most": max(held),
            "pages": self.num_pages,
        }

    def describe(self) -> str:
        figures = self.summary()
        if not figures:
            return "No request has ended."
        return (
            "{requests} requests in {seconds:.1f} s: {tokens_per_second:,.0f} tokens per second\n"
            "Time to first token: median {first_token_ms_median} ms, "
            "95th percentile {first_token_ms_p95} ms\n"
            "Pages held by requests: {pages_held_mean} on average, {pages_held_most} at most, "
            "of {pages}\n"
            "Prompt tokens: {prompt_tokens:,}; taken from shared prefixes, after preemptions too: "
            "{shared_tokens:,}; preemptions: {preemptions}"
        ).format(**figures)

    def plot(self, path: Path) -> None:
        """Three panels over time, or over requests, as a PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        seconds = np.array([step.seconds for step in self.steps])
        tokens = np.array([step.tokens for step in self.steps])
        origin = min((r.arrived for r in self.requests), default=self.start) - self.start
        seconds = seconds - origin
        edges = np.linspace(0, max(seconds.max(), 1e-3), 41)
        rate = np.histogram(seconds, edges, weights=tokens)[0] / np.diff(edges)

        figure, (top, middle, bottom) = pyplot.subplots(3, figsize=(8, 8), layout="constrained")
        top.stairs(rate, edges, fill=True, alpha=0.6)
        top.set(xlabel="seconds", ylabel="tokens per second")
        middle.scatter(
            [r.arrived - self.start - origin for r in self.requests if r.first_token],
            self.times_to_first_token() * 1e3,
            s=12,
        )
        middle.set(xlabel="arrival, seconds", ylabel="time to first token, ms", ylim=(0, None))
        bottom.stackplot(
            seconds,
            [step.held_pages for step in self.steps],
            [step.kept_pages for step in self.steps],
            labels=["held by requests", "kept for prefixes"],
            alpha=0.7,
            step="post",
        )
        bottom.axhline(self.num_pages, color="black", linewidth=0.8, linestyle="--")
        bottom.set(xlabel="seconds", ylabel=f"pages of {self.num_pages}")
        bottom.legend(loc="upper left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
