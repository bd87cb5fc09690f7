"""Packed sequences: which rows and keys belong together, as O(T) metadata made inside jit.

A segment is a set of query rows and keys with one id; a row sees keys of its own segment alone.
A negative id is padding: such a row sees nothing, such a key is seen by none.  Ids need not be
sorted; where they are, a row's keys are the interval ``kv_start <= kv < kv_end``, exactly.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """The segments of one call; made by ``make_segments``, once for all layers that share it.

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


def make_segments(
    q_ids: jax.Array, kv_ids: jax.Array, *, per_segment: bool, are_stretches: bool = False
) -> Segments:
    """Metadata from ids (B, T) and (B, S), in O(T log T) time.

    Args:
      q_ids: (B, T) int32.
      kv_ids: (B, S) int32.
      per_segment: positions start at 0 in every segment.
      are_stretches: equal ids are known to stand side by side.
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
        kv_scattered=None if are_stretches else kv_scattered,
        q_scattered=None if are_stretches else q_scattered,
    )


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
        first = jnp.searchsorted(ids, q_ids, side="left")
        after = jnp.searchsorted(ids, q_ids, side="right")
        found = (after > first) & (q_ids >= 0)
        # A stable sort keeps the keys of an id in order.
        start = order.at[first].get(mode="clip")
        end = order.at[jnp.maximum(after - 1, 0)].get(mode="clip") + 1
        is_scattered = found & (end - start != after - first)
        return jnp.where(found, start, 0), jnp.where(found, end, 0), is_scattered

    return jax.vmap(of_one)(q_ids, kv_ids)


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
    """Ids (B, length) of segments ``cu_seqlens[i] <= row < cu_seqlens[i + 1]``; -1 outside.

    ``cu_seqlens`` is (B, n + 1) int32, not decreasing.  Equal neighbours are an empty segment, so
    n may be a maximum, filled up with the last value.
    """
    row = jnp.arange(length, dtype=jnp.int32)

    def of_one(boundaries):
        ids = jnp.searchsorted(boundaries, row, side="right").astype(jnp.int32) - 1
        return jnp.where(row < boundaries[-1], ids, -1)

    return jax.vmap(of_one)(cu_seqlens)
