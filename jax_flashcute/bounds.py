"""Intervals of keys that stand in arrays, as kernels take them: for each row, the keys it sees.

So it is with packed sequences, and with masks whose bounds are read from arrays.  The segments or
the mask, the window and the lengths are intersected here, once for each call, in O(T).  A tile of
rows visits the keys between the least and the greatest bound of its rows, and needs no mask
where all of them agree.  The backward has the same the other way round: for each key, its rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_flashcute.analysis import FAR, Interval, RowInterval, evaluate, first_reaching
from jax_flashcute.segments import Segments
from jax_flashcute.spec import Operands

TILE_FIELDS = 4
"""Numbers about a tile: its first column tile and one past the last; the first that needs no mask
and one past the last.  The first and the last of them may exceed the second: kernels compare them,
as here that would be a kernel more."""


@dataclass(frozen=True)
class RowBounds:
    """That bounds stand in arrays, as a part of a kernel's key.

    Attributes:
      compares_ids: segments may be scattered; there ids are compared, element by element.
      has_positions: positions start at 0 in every segment.
      compares_bounds: keys may be seen by rows with others between them; there the rows' own bounds
        are compared, element by element.  The backward of a mask.
      intervals: of keys that each row sees; of several the bounds stand in arrays of their own.
    """

    compares_ids: bool
    has_positions: bool
    compares_bounds: bool = False
    intervals: int = 1

    @staticmethod
    def of(segments: Segments | None) -> "RowBounds | None":
        """For the segments of a call."""
        if segments is None:
            return None
        return RowBounds(segments.kv_scattered is not None, segments.q_positions is not None)

    def arrays(self) -> int:
        """How many ``key_bound_arrays`` or ``query_bound_arrays``, each (B, n) int32."""
        pairs = self.compares_ids + (self.compares_ids and self.has_positions)
        pairs += self.compares_bounds + self._others
        return self._uncompared + 2 * pairs

    @property
    def _uncompared(self) -> int:
        """Of rows and of tiles."""
        return 2 + TILE_FIELDS + (self.compares_ids or self.compares_bounds)

    @property
    def _others(self) -> int:
        return self.intervals if self.intervals > 1 else 0

    def tiles(self, arrays: Sequence) -> list:
        """What there is about tiles: ``TILE_FIELDS``, and whether the others of a tile compare."""
        return list(arrays[2 : self._uncompared])

    def limits(self, arrays: tuple) -> list[tuple]:
        """The first of each interval and one past its last, of a kernel's arrays."""
        if not self._others:
            return [tuple(arrays[:2])]
        pairs = arrays[-2 * self._others :]
        return list(zip(pairs[::2], pairs[1::2], strict=True))

    def compared(self, arrays: tuple) -> tuple:
        """Those of a kernel's arrays that are compared, element by element."""
        return tuple(arrays[self._uncompared : len(arrays) - 2 * self._others])

    @property
    def of_keys(self) -> "RowBounds":
        """The forward's: the bounds of a mask are compared in the backward alone."""
        return dataclasses.replace(self, compares_bounds=False)

    def arrays_beside(self) -> int:
        """How many ``beside`` are."""
        return self.of_keys._uncompared + 2 * self._others

    def beside(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Of ``key_bound_arrays`` what a kernel takes behind ``query_bound_arrays``.

        All but those that are compared, which are there already.
        """
        uncompared = arrays[: self.of_keys._uncompared]
        return [*uncompared, *arrays[len(arrays) - 2 * self._others :]]


def key_bound_arrays(
    intervals: Sequence[Interval], operands: Operands, tile_rows: int, tile_n: int
) -> list[jax.Array]:
    """What the forward kernel takes.

    Args:
      intervals: the keys seen by position alone; of several, those of at least one.
      operands: of a call with segments.
      tile_rows: query rows of a tile.
      tile_n: keys of a tile.

    Returns:
      The first key of each row and one past the last, (B, T); ``TILE_FIELDS``, each (B, tiles);
      where ids are compared, whether those of a tile's rows have to be, (B, tiles), the ids and
      the positions that there are; and of several intervals the first two for each.
    """
    segments = _segments(operands)
    row = jnp.arange(operands.query.shape[1], dtype=jnp.int32)[None]
    position, origin, scattered = row, 0, segments.kv_scattered
    if segments.q_positions is not None:
        position, origin = segments.q_positions, segments.kv_start
    position = position + _offset(operands)

    def of_window(bound, open_side):
        """A bound by position; where segments have their own, scattered ones have none."""
        found = evaluate(bound, {"q": position}, {}, jnp.minimum, jnp.maximum) + origin
        if segments.q_positions is None or scattered is None:
            return found
        return jnp.where(scattered, open_side, found)

    def of_interval(interval: Interval) -> tuple[jax.Array, jax.Array]:
        low, high = segments.kv_start, segments.kv_end
        if interval.low is not None:
            low = jnp.maximum(low, of_window(interval.low, low))
        if interval.high is not None:
            high = jnp.minimum(high, of_window(interval.high, high))
        if operands.key_value_seq_lengths is not None:
            high = jnp.minimum(high, operands.key_value_seq_lengths[:, None])
        return _emptied(low, high, high > low)

    pairs = [of_interval(interval) for interval in intervals]
    low, high = _hull(pairs)
    counts = jnp.ones_like(low, bool)
    if operands.query_seq_lengths is not None:
        counts = row < operands.query_seq_lengths[:, None]
    tiles = _tile_fields(
        *(low, high, scattered, counts, tile_rows, tile_n), may_be_full=len(pairs) == 1
    )
    return [low, high, *tiles, *_compared(segments), *_others(pairs)]


def query_bound_arrays(
    intervals: Sequence[Interval], operands: Operands, tile_n: int, tile_m: int
) -> list[jax.Array]:
    """What the backward kernel takes: the same by keys, (B, S), with bounds of rows."""
    segments = _segments(operands)
    T, S = operands.query.shape[1], operands.key.shape[1]
    key = jnp.arange(S, dtype=jnp.int32)[None]
    position, origin, scattered = key, 0, segments.q_scattered
    if segments.kv_positions is not None:
        position, origin = segments.kv_positions, segments.q_start
    offset = _offset(operands)

    def of_window(bound, open_side):
        found = first_reaching(bound - 1, position, jnp.minimum, jnp.maximum) - offset + origin
        if segments.kv_positions is None or scattered is None:
            return found
        return jnp.where(scattered, open_side, found)

    length = jnp.full((1, 1), T, jnp.int32)
    if operands.query_seq_lengths is not None:
        length = operands.query_seq_lengths[:, None]

    def of_interval(interval: Interval) -> tuple[jax.Array, jax.Array]:
        low, high = segments.q_start, jnp.minimum(segments.q_end, length)
        if interval.high is not None:
            low = jnp.maximum(low, of_window(interval.high, low))
        if interval.low is not None:
            high = jnp.minimum(high, of_window(interval.low, high))
        is_seen = high > low
        if operands.key_value_seq_lengths is not None:
            is_seen &= key < operands.key_value_seq_lengths[:, None]
        return _emptied(low, high, is_seen)

    pairs = [of_interval(interval) for interval in intervals]
    low, high = _hull(pairs)
    counts = jnp.ones_like(low, bool)
    tiles = _tile_fields(
        *(low, high, scattered, counts, tile_n, tile_m),
        length=length,
        may_be_full=len(pairs) == 1,
    )
    return [low, high, *tiles, *_compared(segments), *_others(pairs)]


def mask_key_bound_arrays(
    rows: RowInterval, operands: Operands, tile_rows: int, tile_n: int
) -> list[jax.Array]:
    """``key_bound_arrays`` of a mask."""
    low, high = _mask_bounds(rows, operands)
    row = jnp.arange(operands.query.shape[1], dtype=jnp.int32)[None]
    counts = jnp.ones_like(low, bool)
    if operands.query_seq_lengths is not None:
        counts = row < operands.query_seq_lengths[:, None]
    return [low, high, *_tile_fields(low, high, None, counts, tile_rows, tile_n)]


def mask_query_bound_arrays(
    rows: RowInterval, operands: Operands, tile_n: int, tile_m: int
) -> list[jax.Array]:
    """``query_bound_arrays`` of a mask, and the bounds of each row, (B, T), to be compared."""
    low, high = _mask_bounds(rows, operands)
    T, S = operands.query.shape[1], operands.key.shape[1]
    length = jnp.full((1, 1), T, jnp.int32)
    if operands.query_seq_lengths is not None:
        length = operands.query_seq_lengths[:, None]
        row = jnp.arange(T, dtype=jnp.int32)[None]
        low, high = _emptied(low, high, (high > low) & (row < length))

    def up_to(bounds: jax.Array, weights=1) -> jax.Array:
        """For each key, how many of (B, T) bounds are not above it, by weight."""
        counts = jnp.zeros((bounds.shape[0], S + 1), jnp.int32)
        entry = jnp.arange(bounds.shape[0])[:, None]
        return jnp.cumsum(counts.at[entry, jnp.minimum(bounds, S)].add(weights), axis=1)[:, :S]

    # Rows before `first` end at or before the key, and those from `end` on begin after it.
    first = up_to(jax.lax.cummax(high, axis=1))
    is_seen = high > low
    end = up_to(jax.lax.cummin(jnp.where(is_seen, low, S), axis=1, reverse=True))
    seen_by = up_to(low) - up_to(high)
    first, end = _emptied(first, end, (end > first) & (seen_by > 0))
    counts = jnp.ones_like(first, bool)
    scattered = seen_by != end - first
    tiles = _tile_fields(first, end, scattered, counts, tile_n, tile_m, length=length)
    return [first, end, *tiles, low, high]


def _mask_bounds(rows: RowInterval, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The first key of each row and one past the last, (B, T) int32; 0 and 0 where there is none.

    Rows beyond the query length are as any other.
    """
    B, T = operands.query.shape[:2]
    S = operands.kv_length
    position = jnp.arange(T, dtype=jnp.int32)[None] + _offset(operands)
    position = jnp.broadcast_to(position, (B, T))
    arrays = operands.mask_mod_arrays
    is_shared = [isinstance(a.shape[0], int) and a.shape[0] == 1 for a in arrays]
    arrays = [a[0] if shared else a for a, shared in zip(arrays, is_shared, strict=True)]

    def at(arrays, b, q):
        low, high, seen = rows.at(arrays, b, q)
        low = jnp.zeros_like(q) if low is None else jnp.maximum(low, 0)
        high = jnp.full_like(q, S) if high is None else jnp.minimum(high, S)
        return low, high, seen

    of_entry = jax.vmap(at, in_axes=(None, None, 0))
    in_axes = ([None if shared else 0 for shared in is_shared], 0, 0)
    low, high, seen = jax.vmap(of_entry, in_axes)(arrays, operands.batch_index, position)
    if operands.key_value_seq_lengths is not None:
        high = jnp.minimum(high, operands.key_value_seq_lengths[:, None])
    return _emptied(low, high, seen & (high > low))


def visited_tiles(first: jax.Array, end: jax.Array, columns: int) -> jax.Array:
    """Which of so many column tiles a tile visits, (B, 1, tiles, columns) bool.

    ``first``, ``end``: (B, tiles), the first two ``TILE_FIELDS``.
    """
    column = jnp.arange(columns, dtype=jnp.int32)
    return (column >= first[:, None, :, None]) & (column < end[:, None, :, None])


def _segments(operands: Operands) -> Segments:
    if operands.segment_ids is None:
        raise ValueError("operands must have segment_ids")
    return operands.segment_ids


def _offset(operands: Operands):
    return 0 if operands.q_offset is None else operands.q_offset[:, None]


def _emptied(low, high, is_seen) -> tuple[jax.Array, jax.Array]:
    """Empty intervals at 0."""
    low, high = jnp.broadcast_arrays(low, high)
    return jnp.where(is_seen, low, 0), jnp.where(is_seen, high, 0)


def _hull(pairs: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """The least interval around those of some pairs of bounds that are not empty."""
    if len(pairs) == 1:
        return pairs[0]
    lows = [jnp.where(high > low, low, FAR) for low, high in pairs]
    low = functools.reduce(jnp.minimum, lows)
    high = functools.reduce(jnp.maximum, (high for _, high in pairs))
    return _emptied(low, high, high > low)


def _others(pairs: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """The bounds of each interval, where there are several."""
    return [bound for pair in pairs for bound in pair] if len(pairs) > 1 else []


def _compared(segments: Segments) -> list[jax.Array]:
    if segments.kv_scattered is None:
        return []
    arrays = [segments.q_ids, segments.kv_ids]
    if segments.q_positions is not None and segments.kv_positions is not None:
        arrays += [segments.q_positions, segments.kv_positions]
    return arrays


def _tile_fields(
    low, high, scattered, counts, rows: int, columns: int, *, length=None, may_be_full=True
) -> list[jax.Array]:
    """``TILE_FIELDS`` of tiles of ``rows``, each (B, tiles) int32.

    And whether a tile compares, unless there is nothing to be compared.  They have an array each:
    what put them together would be a kernel more.

    Args:
      low, high: (B, length) bounds; 0 and 0 where empty.
      scattered: (B, length) bool: not all within the bounds is seen; None for nowhere.
      counts: (B, length) bool: rows that matter; the tile may do anything to the others.
      rows: of a tile.
      columns: of the tiles that are visited.
      length: (1|B, 1) columns there are, where what lies beyond needs no mask.
      may_be_full: False where all tiles need a mask.
    """
    B, total = low.shape
    tiles = -(-total // rows)

    def in_tiles(array, beyond):
        padding = ((0, 0), (0, tiles * rows - total))
        return jnp.pad(array, padding, constant_values=beyond).reshape(B, tiles, rows)

    # Of rows those beyond the end do not count.  Of keys they do, gradients being sums over a tile:
    # with bounds of 0 they leave none full.
    low, high = in_tiles(low, 0), in_tiles(high, 0)
    counts = in_tiles(counts, length is not None)
    above = -(-high // columns)
    full = high // columns
    if length is not None:
        full = jnp.where(high >= length[..., None], above, full)
    if scattered is not None:
        scattered = in_tiles(scattered, False)
        full = jnp.where(scattered, 0, full)
    is_seen = counts & (high > low)
    n_min = jnp.min(jnp.where(is_seen, low // columns, FAR), axis=2)
    n_max = jnp.max(jnp.where(is_seen, above, 0), axis=2)
    full_min = jnp.max(jnp.where(counts, -(-low // columns), 0), axis=2)
    full_max = jnp.zeros((B, tiles), jnp.int32)
    if may_be_full:
        full_max = jnp.min(jnp.where(counts, full, FAR), axis=2)
    fields = [n_min, n_max, full_min, full_max]
    if scattered is not None:
        fields.append(jnp.max((counts & scattered).astype(jnp.int32), axis=2))
    return [field.astype(jnp.int32) for field in fields]
