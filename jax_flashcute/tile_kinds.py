"""Which tiles of a mask hold something: every tile classified by all of its elements.

A mask that reduces to intervals of keys is classified by its rows' bounds; of any other, every
element is evaluated and counted.  Nothing is sampled, and memory is O(tiles).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashcute import analysis
from jax_flashcute.analysis import Guard, Interval, KeySet, Linear, Program
from jax_flashcute.masks import TracedFunction, on_block

HIDDEN, PARTIAL, FULL = 0, 1, 2
"""What is said of a tile: that none, some or all of its elements are visible."""

_ELEMENTS_AT_ONCE = 2**28
"""Elements of a mask that are evaluated at once.  They are counted as they are made, so they take
memory only where XLA does not fuse the two."""

_ROW_TILES_AT_ONCE = 2**24
"""Pairs of a row and a key tile that are compared at once; with more, XLA compiles for minutes."""


@dataclass(frozen=True)
class Tiling:
    """A mask of T rows and S keys in tiles, at least one of them each way."""

    q_length: int
    kv_length: int
    tile_m: int
    tile_n: int

    @property
    def num_q_tiles(self) -> int:
        return num_tiles(self.q_length, self.tile_m)

    @property
    def num_kv_tiles(self) -> int:
        return num_tiles(self.kv_length, self.tile_n)


def num_tiles(length: int, tile: int) -> int:
    """Tiles that ``length`` is cut into; at least one."""
    return max(1, -(-length // tile))


# Under jit, so that a call outside of any runs as one program.
@functools.partial(jax.jit, static_argnames=("mask", "tiling", "within", "is_near"))
def classify(
    mask: TracedFunction,
    arrays: Sequence[jax.Array],
    entries: tuple[jax.Array, jax.Array, jax.Array],
    tiling: Tiling,
    within: Interval | None = None,
    *,
    is_near: bool = True,
) -> jax.Array:
    """The kind of every tile.

    Args:
      mask: the mask.
      arrays: what it closes over, (1|B, ...) each.
      entries: batch indices (B,), heads (N,), and position of row 0 (1|B,), int32.
      tiling: the rows and keys, and how they are cut.
      within: bounds by q; nothing is visible outside of them.
      is_near: positions stay below ``analysis.POSITION_LIMIT``, as intervals need.

    Returns:
      (1|B, 1|N, M, key tiles) int8; 1 where nothing that decides depends on the batch or the head.
    """
    T, S = tiling.q_length, tiling.kv_length
    if T == 0 or S == 0:
        return jnp.zeros((1, 1, tiling.num_q_tiles, tiling.num_kv_tiles), jnp.int8)
    within = within or Interval()
    if is_near and max(T, S) < analysis.POSITION_LIMIT:
        program = analysis.analyse(mask.jaxpr)
        keys = analysis.intersection((within,), program.intervals())
        if keys is not None:
            has_window = within != Interval()
            reads = [mask.reads(0), mask.reads(1), mask.reads(2) or has_window, False]
            return _by_rows(_RowBounds(program, keys, S), reads, arrays, entries, tiling)
    return _by_elements(mask, arrays, entries, tiling, within)


def kind_of(visible: jax.Array, elements: int) -> jax.Array:
    """The kind of a tile of which so many of so many elements are visible."""
    kind = jnp.where(visible == 0, HIDDEN, jnp.where(visible == elements, FULL, PARTIAL))
    return kind.astype(jnp.int8)


def coarser(kinds: jax.Array, times_m: int, times_n: int) -> jax.Array:
    """Kinds (..., M, X) of tiles, of tiles so many times as high and as wide."""
    *batch, M, X = kinds.shape
    rows, columns = -(-M // times_m), -(-X // times_n)
    beyond = [(0, 0)] * len(batch) + [(0, rows * times_m - M), (0, columns * times_n - X)]

    def of_each(reduce, identity):
        padded = jnp.pad(kinds, beyond, constant_values=identity)
        return reduce(padded.reshape(*batch, rows, times_m, columns, times_n), axis=(-3, -1))

    some, every = of_each(jnp.max, HIDDEN), of_each(jnp.min, FULL)
    return jnp.where(some == HIDDEN, HIDDEN, jnp.where(every == FULL, FULL, PARTIAL)).astype(
        jnp.int8
    )


# ---- by the bounds of rows -----------------------------------------------------------------------


@dataclass(frozen=True)
class _RowBounds:
    """The first key and one past the last of each interval, as a function of scalars."""

    program: Program
    keys: KeySet
    kv_length: int

    def __call__(self, arrays, arguments) -> jax.Array:
        """(intervals, 2) int32 for ``(b, h, q, kv)``, of which kv has no effect."""
        indices: dict[str, Any] = dict(zip(("b", "h", "q"), arguments, strict=False))
        opaque: Any = _Opaque(self.program, arrays, arguments)

        def number(value: Linear):
            return analysis.evaluate(value, indices, opaque, jnp.minimum, jnp.maximum)

        def holds(guard: Guard):
            if isinstance(guard.value, Linear):
                found = number(guard.value) >= 0
            else:
                found = opaque[guard.value]
            return found == guard.holds

        rows = []
        for interval in self.keys:
            first = 0 if interval.low is None else number(interval.low)
            end = self.kv_length if interval.high is None else number(interval.high)
            for guard in interval.guards:
                end = jnp.where(holds(guard), end, first)
            rows.append(jnp.stack([jnp.asarray(x, jnp.int32) for x in (first, end)]))
        return jnp.stack(rows) if rows else jnp.zeros((1, 2), jnp.int32)


@dataclass(frozen=True)
class _Opaque:
    """Values of a program by their numbers, computed where they are asked for."""

    program: Program
    arrays: Sequence[jax.Array]
    arguments: Sequence[jax.Array]

    def __getitem__(self, value: int) -> jax.Array:
        return self.program.evaluate([value], self.arrays, self.arguments)[0]


def _by_rows(bounds: _RowBounds, reads, arrays, entries, tiling: Tiling) -> jax.Array:
    """Of a union of intervals in each row: which tiles they touch, and which they cover."""
    b, h, offset = entries
    start = jnp.arange(tiling.num_kv_tiles, dtype=jnp.int32)[:, None] * tiling.tile_n
    stop = jnp.minimum(start + tiling.tile_n, tiling.kv_length)

    def kinds(m: jax.Array) -> jax.Array:
        """Of tile row m: (1|B, 1|N, key tiles)."""
        row = m * tiling.tile_m + jnp.arange(tiling.tile_m, dtype=jnp.int32)
        # Padding repeats the last row, which changes neither "some" nor "all".
        row = jnp.minimum(row, tiling.q_length - 1)
        indices = (
            b.reshape(-1, 1, 1, 1),
            h.reshape(1, -1, 1, 1),
            row.reshape(1, 1, 1, -1) + offset.reshape(-1, 1, 1, 1),
            jnp.zeros((1, 1, 1, 1), jnp.int32),
        )
        # (1|B, 1|N, 1, 1|rows, intervals) each, beside key tiles in the third dimension.
        first, end = jnp.moveaxis(on_block(bounds, arrays, indices, reads), -1, 0)
        visible = _some(first, end, start, stop) + _every(first, end, start, stop)
        return kind_of(jnp.sum(visible, axis=-1, dtype=jnp.int32), 2 * visible.shape[-1])

    found = _for_each(
        kinds, tiling.num_q_tiles, tiling.num_kv_tiles * tiling.tile_m, _ROW_TILES_AT_ONCE
    )
    return jnp.moveaxis(found, 0, 2)


def _some(first, end, start, stop) -> jax.Array:
    """Whether an interval (..., intervals) touches the keys ``start <= kv < stop``: 0 or 1."""
    touches = [
        jnp.maximum(first[..., i], start) < jnp.minimum(end[..., i], stop)
        for i in range(first.shape[-1])
    ]
    return functools.reduce(jnp.logical_or, touches).astype(jnp.int32)


def _every(first, end, start, stop) -> jax.Array:
    """Whether intervals together cover them."""
    intervals, covered = range(first.shape[-1]), start
    for i in [*intervals] * len(intervals):  # in any order: each round gets past one at least
        reaches = (first[..., i] <= covered) & (end[..., i] > covered)
        covered = jnp.where(reaches, end[..., i], covered)
    return (covered >= stop).astype(jnp.int32)


# ---- by elements ---------------------------------------------------------------------------------


def _by_elements(mask, arrays, entries, tiling: Tiling, within: Interval) -> jax.Array:
    """Of any mask: how many elements of each tile are visible."""
    b, h, offset = entries
    M, tiles = tiling.num_q_tiles, tiling.num_kv_tiles

    def kind(tile: jax.Array) -> jax.Array:
        q = (tile // tiles) * tiling.tile_m + jnp.arange(tiling.tile_m, dtype=jnp.int32)
        kv = (tile % tiles) * tiling.tile_n + jnp.arange(tiling.tile_n, dtype=jnp.int32)
        # Padding repeats the last row and key, which changes neither "some" nor "all".
        q = jnp.minimum(q, tiling.q_length - 1)[:, None] + offset.reshape(-1, 1, 1, 1)
        kv = jnp.minimum(kv, tiling.kv_length - 1).reshape(1, 1, 1, -1)
        seen = mask(arrays, b.reshape(-1, 1, 1, 1), h.reshape(1, -1, 1, 1), q, kv)
        for bound, is_low in ((within.low, True), (within.high, False)):
            if bound is not None:
                end = analysis.evaluate(bound, {"q": q}, {}, jnp.minimum, jnp.maximum)
                seen = seen & ((kv >= end) if is_low else (kv < end))
        return kind_of(jnp.sum(seen, axis=(2, 3), dtype=jnp.int32), seen.shape[2] * seen.shape[3])

    shape = jax.eval_shape(kind, jax.ShapeDtypeStruct((), jnp.int32)).shape
    elements = tiling.tile_m * tiling.tile_n
    found = _for_each(kind, M * tiles, elements, _ELEMENTS_AT_ONCE)
    return jnp.moveaxis(found, 0, -1).reshape(*shape, M, tiles)


def _for_each(kind: Callable[..., jax.Array], count: int, elements: int, limit: int) -> jax.Array:
    """``kind(i)`` for i up to ``count``, in front; as many at once as have ``limit`` elements.

    ``elements``: those of one, for each batch entry and head of its result.
    """
    number = jax.ShapeDtypeStruct((), jnp.int32)
    batch = math.prod(jax.eval_shape(kind, number).shape[:2])
    at_once = max(1, limit // max(1, batch * elements))
    numbers = jnp.arange(count, dtype=jnp.int32)
    if at_once >= count:
        return jax.vmap(kind)(numbers)
    return lax.map(kind, numbers, batch_size=at_once)
