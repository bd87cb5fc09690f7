"""Packed sequences: which rows and keys belong together, as O(T) metadata made inside jit.

A segment is a set of query rows and keys with one id; a row sees keys of its own segment alone.
A negative id is padding: such a row sees nothing, such a key is seen by none.  Ids need not be
sorted; where they are, a row's keys are the interval ``kv_start <= kv < kv_end``, exactly.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

COMPARED_AT_MOST = 2**28
"""Pairs of a row and a boundary that are compared in one kernel; beyond, rows search."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """The segments of one call, made once for all layers that share it.

    Attributes:
      q_ids: (B, T) int32; negative is padding.
      kv_ids: (B, S) int32.
      kv_start, kv_end: (B, T) int32: the keys of a row's segment lie in ``kv_start <= kv <
        kv_end``; both 0 where it has none.
      q_start, q_end: (B, S) int32: likewise the rows of a key's segment.
      q_positions: (B, T) int32: how many rows of its segment stand before a row; None where
        positions count from the start of the sequence.
      kv_positions: (B, S) int32, likewise; both or neither.
      kv_scattered: (B, T) bool: not all keys in a row's ``kv_start <= kv < kv_end`` are of its
        segment; None where every segment is known to be one stretch.
      q_scattered: (B, S) bool, likewise for the rows of a key's segment; both or neither.
    """

    q_ids: jax.Array
    kv_ids: jax.Array
    kv_start: jax.Array
    kv_end: jax.Array
    q_start: jax.Array
    q_end: jax.Array
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None
    kv_scattered: jax.Array | None = None
    q_scattered: jax.Array | None = None


def segments_of_ids(q_ids: jax.Array, kv_ids: jax.Array, *, per_segment: bool) -> Segments:
    """Metadata from ids (B, T) and (B, S) int32, in O(T log T) time.

    ``per_segment``: positions start at 0 in every segment.
    """
    kv_start, kv_end, kv_scattered = key_ranges(q_ids, kv_ids)
    q_start, q_end, q_scattered = key_ranges(kv_ids, q_ids)
    return Segments(
        q_ids=q_ids,
        kv_ids=kv_ids,
        kv_start=kv_start,
        kv_end=kv_end,
        q_start=q_start,
        q_end=q_end,
        q_positions=positions_within(q_ids) if per_segment else None,
        kv_positions=positions_within(kv_ids) if per_segment else None,
        kv_scattered=kv_scattered,
        q_scattered=q_scattered,
    )


def segments_of_boundaries(
    cu_seqlens_q: jax.Array, cu_seqlens_k: jax.Array, T: int, S: int, *, per_segment: bool
) -> Segments:
    """Metadata of segments that are stretches, without sorting.

    Segment i is rows ``cu_seqlens_q[i] <= row < cu_seqlens_q[i + 1]`` and likewise keys; the rest
    is padding.  Both are (B, n + 1) int32, not decreasing; equal neighbours are an empty segment,
    so n may be a maximum, filled up with the last value.  ``per_segment``: positions start at 0
    in every segment.
    """
    q_ids, kv_ids = ids_of_boundaries(cu_seqlens_q, T), ids_of_boundaries(cu_seqlens_k, S)
    kv_start, kv_end = _stretch(cu_seqlens_k, q_ids, S)
    q_start, q_end = _stretch(cu_seqlens_q, kv_ids, T)
    return Segments(
        q_ids=q_ids,
        kv_ids=kv_ids,
        kv_start=kv_start,
        kv_end=kv_end,
        q_start=q_start,
        q_end=q_end,
        q_positions=_places(cu_seqlens_q, q_ids) if per_segment else None,
        kv_positions=_places(cu_seqlens_k, kv_ids) if per_segment else None,
    )


def _stretch(boundaries: jax.Array, ids: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Where the segments of ids begin and end among ``length`` elements; 0 and 0 for nowhere."""
    start = jnp.maximum(_at(boundaries, ids), 0)
    end = jnp.minimum(_at(boundaries, ids + 1), length)
    found = (ids >= 0) & (end > start)
    return jnp.where(found, start, 0), jnp.where(found, end, 0)


def _places(boundaries: jax.Array, ids: jax.Array) -> jax.Array:
    """How many elements of its segment stand before each; 0 in padding."""
    row = jnp.arange(ids.shape[1], dtype=jnp.int32)
    return jnp.where(ids >= 0, row - jnp.maximum(_at(boundaries, ids), 0), 0)


def _at(boundaries: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(boundaries, ids, axis=1, mode="clip")


def key_ranges(q_ids: jax.Array, kv_ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first key with each row's id, and one past the last: ``(start, end, is_scattered)``.

    Where equal ids of ``kv_ids`` (B, S) stand side by side (sorted ids, or any order of whole
    documents), a row's keys are exactly ``start <= kv < end``; else they lie within, and the row
    ``is_scattered``.  A row that is padding or has no key gets 0 and 0.  All are (B, T).
    """

    def of_one(q_ids, kv_ids):
        if kv_ids.shape[0] == 0:
            return jnp.zeros_like(q_ids), jnp.zeros_like(q_ids), jnp.zeros_like(q_ids, bool)
        order = jnp.argsort(kv_ids, stable=True).astype(jnp.int32)
        ids = kv_ids[order]
        first, after = _bounds_of(ids, q_ids)
        found = (after > first) & (q_ids >= 0)
        # A stable sort keeps the keys of an id in order.
        start = order.at[first].get(mode="clip")
        end = order.at[jnp.maximum(after - 1, 0)].get(mode="clip") + 1
        is_scattered = found & (end - start != after - first)
        return jnp.where(found, start, 0), jnp.where(found, end, 0), is_scattered

    return jax.vmap(of_one)(q_ids, kv_ids)


def _bounds_of(ids: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of the sorted ids are below each value, and how many at most it."""
    if isinstance(ids.shape[0], int):
        left, right = (jnp.searchsorted(ids, values, side=side) for side in ("left", "right"))
        return left, right

    # jnp.searchsorted takes no symbolic lengths: halved as often as any length needs.
    def bound(is_below):
        def halve(_, ends):
            low, high = ends
            middle = low + (high - low) // 2
            goes_on = (low < high) & is_below(ids.at[middle].get(mode="clip"), values)
            return jnp.where(goes_on, middle + 1, low), jnp.where(goes_on, high, middle)

        low = jnp.zeros_like(values)
        return lax.fori_loop(0, 32, halve, (low, jnp.full_like(values, ids.shape[0])))[0]

    return bound(jnp.less), bound(jnp.less_equal)


def positions_within(ids: jax.Array) -> jax.Array:
    """How many earlier elements of (B, T) have the same id: (B, T) int32."""

    def of_one(ids):
        order = jnp.argsort(ids, stable=True)
        ids = ids[order]
        place = jnp.arange(ids.shape[0], dtype=jnp.int32)
        is_first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])[: ids.shape[0]]
        start = lax.cummax(jnp.where(is_first, place, 0))
        return jnp.zeros_like(place).at[order].set(place - start, unique_indices=True)

    return jax.vmap(of_one)(ids)


def ids_of_boundaries(cu_seqlens: jax.Array, length: int) -> jax.Array:
    """Ids (B, length) of segments ``cu_seqlens[i] <= row < cu_seqlens[i + 1]``; -1 outside."""
    row = jnp.arange(length, dtype=jnp.int32)
    few = isinstance(length, int) and length * cu_seqlens.shape[1] <= COMPARED_AT_MOST
    method = "compare_all" if few else "scan"

    def of_one(boundaries):
        # All compared at once: a binary search is a loop of kernels to XLA.
        ids = jnp.searchsorted(boundaries, row, side="right", method=method).astype(jnp.int32) - 1
        return jnp.where(row < boundaries[-1], ids, -1)

    return jax.vmap(of_one)(cu_seqlens)


def rows_by_sequence(packed: jax.Array, cu_seqlens: jax.Array, length: int) -> jax.Array:
    """(B, length, ...) from rows (total, ...) of B sequences between boundaries (B + 1,).

    What stands beyond a sequence's rows is no matter.
    """
    rows = cu_seqlens[:-1, None] + jnp.arange(length, dtype=jnp.int32)
    return packed.at[rows].get(mode="clip")


def packed_rows(padded: jax.Array, cu_seqlens: jax.Array, total: int, fill: float) -> jax.Array:
    """The inverse of ``rows_by_sequence``; ``fill`` in rows that it left out."""
    entry = ids_of_boundaries(cu_seqlens[None], total)[0]
    B, length = padded.shape[:2]
    if any(isinstance(size, int) and size == 0 for size in (B, length)):
        return jnp.full((total, *padded.shape[2:]), fill, padded.dtype)
    entry_or_first = jnp.clip(entry, 0, B - 1)
    place = jnp.arange(total, dtype=jnp.int32) - cu_seqlens[entry_or_first]
    is_row = (entry >= 0) & (place < length)
    found = padded[entry_or_first, jnp.clip(place, 0, max(length - 1, 0))]
    return jnp.where(is_row.reshape(-1, *[1] * (padded.ndim - 2)), found, fill)
