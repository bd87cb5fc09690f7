"""Packed sequences for native sparse attention: each at the start of a query tile and of a block.

Blocks and query tiles count from the start of a sequence, so that a packed sequence gets what it
would get alone.  Rows are moved to where that holds and back: one gather each way, whose gradient
is the other one.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jax_flashcute.nsa.config import NSAConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """Where packed rows stand, of T, once every sequence is aligned, of T'.

    Attributes:
      source: (B, T') int32: the row that stands there, -1 for none.
      target: (B, T) int32: where a row goes, -1 for padding and for sequences beyond the most.
      ids: (B, T') int32: number of the sequence, -1 for none.
      start, end: (B, T') int32: the place's sequence stands in ``start <= row < end``; both 0 where
        there is none.  Places behind a sequence, up to the next one, have its own.
      is_beyond: (B, T) bool: rows of sequences beyond the most that there can be.
    """

    source: jax.Array
    target: jax.Array
    ids: jax.Array
    start: jax.Array
    end: jax.Array
    is_beyond: jax.Array

    def aligned(self, x: jax.Array) -> jax.Array:
        """(B, T, ...) to (B, T', ...), 0 where no row stands."""
        return _moved(x, self.source, self.target)

    def packed(self, x: jax.Array) -> jax.Array:
        """(B, T', ...) to (B, T, ...): 0 in padding, NaN in sequences beyond the most."""
        x = _moved(x, self.target, self.source)
        return jnp.where(self.is_beyond.reshape(*self.is_beyond.shape, 1, 1), jnp.nan, x)


def pack(segment_ids: jax.Array, max_segments: int, config: NSAConfig) -> Packing:
    """From ids (B, T) int32: each run of equal ids is a sequence, negative ids are padding."""
    step = math.lcm(config.block, config.query_tile)
    T = segment_ids.shape[1]
    length = (T + max_segments * (step - 1)) // step * step

    def of_one(ids):
        row = jnp.arange(T, dtype=jnp.int32)
        is_row = ids >= 0
        changes = ids[1:] != ids[:-1]
        begins = is_row & jnp.concatenate([jnp.ones(1, bool), changes])
        ends = is_row & jnp.concatenate([changes, jnp.ones(1, bool)])
        number = jnp.cumsum(begins, dtype=jnp.int32) - 1
        (first,) = jnp.nonzero(begins, size=max_segments, fill_value=T)
        (last,) = jnp.nonzero(ends, size=max_segments, fill_value=T - 1)
        lengths = last + 1 - first
        after = jnp.cumsum(-(-lengths // step) * step)
        start = after + lengths // -step * step
        is_beyond = is_row & (number >= max_segments)
        mine = jnp.clip(number, 0, max_segments - 1)
        target = jnp.where(is_row & ~is_beyond, start[mine] + row - first[mine], -1)

        place = jnp.arange(length, dtype=jnp.int32)
        segment = jnp.searchsorted(after, place, side="right")
        exists = segment < max_segments
        segment = jnp.minimum(segment, max_segments - 1)
        start, end = start[segment], (start + lengths)[segment]
        is_taken = exists & (place < end)
        return Packing(
            source=jnp.where(is_taken, first[segment] + place - start, -1).astype(jnp.int32),
            target=target.astype(jnp.int32),
            ids=jnp.where(is_taken, segment, -1).astype(jnp.int32),
            start=jnp.where(exists, start, 0).astype(jnp.int32),
            end=jnp.where(exists, end, 0).astype(jnp.int32),
            is_beyond=is_beyond,
        )

    return jax.vmap(of_one)(segment_ids)


@jax.custom_vjp
def _moved(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Row ``source[b, i]`` of x at place i, 0 for -1; ``target`` is the inverse."""

    def of_one(x, source):
        source = jnp.where(source < 0, x.shape[0], source)
        return x.at[source].get(mode="fill", fill_value=0)

    return jax.vmap(of_one)(x, source)


def _moved_fwd(x, source, target):
    return _moved(x, source, target), (source, target)


def _moved_bwd(saved, gradient):
    source, target = saved
    return _moved(gradient, target, source), None, None


_moved.defvjp(_moved_fwd, _moved_bwd)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiling:
    """What the rows of each query tile may see, and how many keys each block has.

    Attributes:
      rows_end: (1|B, tiles) int32: the tile's rows end before it; at most its start for none.
      keys_start, keys_end: (1|B, tiles) int32: the keys of the tile's sequence.
      counts: (B, blocks) int32: keys of each block; None for all that there are.
    """

    rows_end: jax.Array
    keys_start: jax.Array
    keys_end: jax.Array
    counts: jax.Array | None = field(default=None)

    def row_counts(self, query_tile: int) -> jax.Array:
        """(1|B, tiles): rows of each tile."""
        first = query_tile * jnp.arange(self.rows_end.shape[1], dtype=jnp.int32)
        return jnp.maximum(self.rows_end - first, 0)


def _starts(length: int, step: int) -> jax.Array:
    """0, step, ... below length, int32."""
    return step * jnp.arange(-(-length // step), dtype=jnp.int32)


def whole(config: NSAConfig, q_length: int, kv_length: int) -> Tiling:
    """One sequence of full length."""
    first = _starts(q_length, config.query_tile)[None]
    return Tiling(
        rows_end=jnp.minimum(first + config.query_tile, q_length),
        keys_start=jnp.zeros_like(first),
        keys_end=jnp.full_like(first, kv_length),
    )


def of_lengths(config: NSAConfig, length: int, lengths: jax.Array) -> Tiling:
    """One sequence of ``lengths[b]`` (B,) int32 rows and keys, from 0 to ``length``."""
    tiles = whole(config, length, length)
    first = _starts(length, config.block)
    return Tiling(
        rows_end=jnp.minimum(tiles.rows_end, lengths[:, None]),
        keys_start=tiles.keys_start,
        keys_end=jnp.minimum(tiles.keys_end, lengths[:, None]),
        counts=jnp.clip(lengths[:, None] - first, 0, config.block),
    )


def of_packing(config: NSAConfig, packing: Packing) -> Tiling:
    """The sequences of aligned rows."""

    def at_starts(x, step):
        return x[:, ::step]

    length = packing.ids.shape[1]
    start, end = (at_starts(x, config.query_tile) for x in (packing.start, packing.end))
    first = _starts(length, config.query_tile)
    block = _starts(length, config.block)
    return Tiling(
        rows_end=jnp.minimum(first + config.query_tile, end),
        keys_start=start,
        keys_end=end,
        counts=jnp.clip(at_starts(packing.end, config.block) - block, 0, config.block),
    )
