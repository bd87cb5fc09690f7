"""The steps of context parallelism: which keys a device holds at each, and which queries see them.

In a ring, keys travel on while those that have arrived are attended to; otherwise one step has all.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashcute import analysis
from jax_flashcute.context.order import Layout
from jax_flashcute.dispatch import Implementation
from jax_flashcute.spec import AttentionSpec, Operands

ContextParallel = Literal["ring", "all_gather"]
METHODS: tuple[ContextParallel, ...] = ("ring", "all_gather")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arrays:
    """The arrays of a call: segments as ids, (B, T) and (B, S), of which the keys' travel."""

    operands: Operands
    q_ids: jax.Array | None = None
    kv_ids: jax.Array | None = None

    @staticmethod
    def of(operands: Operands) -> "Arrays":
        segments = operands.segment_ids
        if segments is None:
            return Arrays(operands)
        operands = dataclasses.replace(operands, segment_ids=None)
        return Arrays(operands, segments.q_ids, segments.kv_ids)


@dataclass(frozen=True)
class Call:
    """The static part of a call."""

    spec: AttentionSpec
    implementation: Implementation
    method: ContextParallel
    layout: Layout

    def shifts(self, T: int, S: int) -> dict[int, list[tuple[int, int]]]:
        """The ring's steps: for a shift, the pairs of chunks of queries and keys to be computed.

        At shift s, device r holds the keys of device r - s.  Steps and pairs that the mask hides
        on every device are left out.
        """
        layout = self.layout
        steps = {}
        for shift in range(layout.devices):
            pairs = [
                (i, j)
                for i in range(layout.chunks)
                for j in range(layout.chunks)
                if any(self._may_see(r, i, T, (r - shift), j, S) for r in range(layout.devices))
            ]
            if pairs or shift == 0:
                steps[shift] = pairs
        return steps

    def _may_see(self, q_device: int, i: int, T: int, kv_device: int, j: int, S: int) -> bool:
        """Whether a query of one chunk may see a key of another, by the mask's intervals."""
        layout = self.layout
        first_q = layout.first(q_device, i, T)
        first_kv = layout.first(kv_device % layout.devices, j, S)
        last_q = first_q + layout.stride * (T - 1)
        last_kv = first_kv + layout.stride * (S - 1)
        for interval in _intervals(self.spec):
            low = _extreme(interval.low, first_q, last_q, "rising")
            high = _extreme(interval.high, first_q, last_q, "falling")
            if (low is None or low <= last_kv) and (high is None or high > first_kv):
                return True
        return False


@functools.lru_cache(maxsize=64)
def _intervals(spec: AttentionSpec) -> analysis.KeySet:
    """The keys that a position sees, as far as that is known."""
    window = (analysis.window_interval(*spec.reach),)
    if spec.mask_mod is None:
        return window
    found = analysis.analyse(spec.mask_mod.jaxpr).intervals()
    both = analysis.intersection(window, found)
    return window if both is None else both


def _extreme(bound: analysis.Linear | None, first_q: int, last_q: int, trend: str) -> int | None:
    """The least value of a bound over positions for ``"rising"``, the largest for ``"falling"``;
    None where it is open or not known."""
    if bound is None or any(analysis.depends_on(bound, name) for name in ("b", "h", "kv")):
        return None
    moves = analysis.trend(bound)
    if moves is None:
        return None
    q = first_q if moves in (trend, "constant") else last_q
    return analysis.evaluate(bound, {"q": q}, {}, min, max)


@dataclass(frozen=True)
class QueryChunk:
    """Rows ``start`` to ``stop`` of this device; the first is at position ``first``."""

    query: jax.Array
    ids: jax.Array | None
    start: int
    stop: int
    first: jax.Array

    def of(self, array: jax.Array) -> jax.Array:
        """The chunk's rows of (B, T / P, ...)."""
        return array[:, self.start : self.stop]


@dataclass(frozen=True)
class KeyChunk:
    """Some keys, their values and segments; the first is number ``first``."""

    key: jax.Array
    value: jax.Array
    ids: jax.Array | None
    first: Any

    @staticmethod
    def of(held, first) -> "KeyChunk":
        key, value, ids = held
        return KeyChunk(key, value, ids, first)


def query_chunks(call: Call, arrays: Arrays) -> list[QueryChunk]:
    layout, query = call.layout, arrays.operands.query
    device = lax.axis_index(layout.axis_name)
    length = query.shape[1] // layout.chunks
    chunks = []
    for i in range(layout.chunks):
        start, stop = i * length, (i + 1) * length
        ids = None if arrays.q_ids is None else arrays.q_ids[:, start:stop]
        first = layout.first(device, i, length)
        chunks.append(QueryChunk(query[:, start:stop], ids, start, stop, first))
    return chunks


def steps_of(call: Call, arrays: Arrays) -> Iterator[tuple[int, list[KeyChunk], list]]:
    """``(shift, chunks of keys, pairs of chunks of queries and keys)``, of every step.

    The next step's keys are sent for before those of this one are handed out.
    """
    operands, layout = arrays.operands, call.layout
    held = operands.key, operands.value, arrays.kv_ids
    if call.method == "all_gather":
        keys = _gathered(layout, held)
        yield 0, keys, [(i, j) for i in range(layout.chunks) for j in range(len(keys))]
        return
    device = lax.axis_index(layout.axis_name)
    rows, columns = (x.shape[1] // layout.chunks for x in (operands.query, operands.key))
    shifts = call.shifts(rows, columns)
    following = [*list(shifts)[1:], None]
    for (shift, pairs), next_shift in zip(shifts.items(), following, strict=True):
        coming = None
        if next_shift is not None:
            distance = next_shift - shift
            coming = jax.tree.map(functools.partial(layout.step, shift=distance), held)
        source = (device - shift) % layout.devices
        parts = (
            jax.tree.map(lambda x, j=j: x[:, j * columns : (j + 1) * columns], held)
            for j in range(layout.chunks)
        )
        firsts = (layout.first(source, j, columns) for j in range(layout.chunks))
        yield shift, [KeyChunk.of(x, first) for x, first in zip(parts, firsts, strict=True)], pairs
        held = coming


def _gathered(layout: Layout, held) -> list[KeyChunk]:
    """All keys: as one chunk in natural order, or striped, as one for each device."""
    every = jax.tree.map(lambda x: lax.all_gather(x, layout.axis_name, axis=0), held)
    if layout.order == "striped":
        devices = range(layout.devices)
        return [KeyChunk.of(jax.tree.map(lambda x, s=s: x[s], every), s) for s in devices]

    def natural(x: jax.Array) -> jax.Array:
        chunks = x.reshape(*x.shape[:2], layout.chunks, -1, *x.shape[3:])
        first, *second = (chunks[:, :, i] for i in range(layout.chunks))
        x = jnp.concatenate([first, *(half[::-1] for half in second)])
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    return [KeyChunk.of(jax.tree.map(natural, every), 0)]


def home(call: Call, dkeys: jax.Array, last_shift: int) -> jax.Array:
    """The gradient of the keys that this device holds, from what the steps have summed up."""
    layout = call.layout
    if call.method == "ring":
        return layout.step(dkeys, -last_shift)
    B = dkeys.shape[0]
    chunks = dkeys.reshape(B, layout.devices * layout.chunks, -1, *dkeys.shape[2:])
    if layout.order == "zigzag":
        halves = chunks[:, : layout.devices], chunks[:, layout.devices :][:, ::-1]
        chunks = jnp.stack(halves, axis=2)
    parts = jnp.moveaxis(chunks.reshape(B, layout.devices, -1, *dkeys.shape[2:]), 1, 0)
    return lax.psum_scatter(parts, layout.axis_name)
