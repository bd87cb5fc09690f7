"""Which keys a query row may see, by position and length: element by element, and as ranges.

The reference and the XLA path share these rules, so that they cannot disagree.  ``operands.mask``
is data, not a rule, and is applied by its users.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashcute.spec import AttentionSpec, Operands

_FAR = np.iinfo(np.int32).max


def visible(
    spec: AttentionSpec, operands: Operands, q_idx: jax.Array, kv_idx: jax.Array
) -> jax.Array:
    """Which keys which query rows see.

    Args:
      spec: the static part of the call.
      operands: its arrays; only the lengths and ``q_offset`` are read.
      q_idx: integer query row numbers (not positions), at least 1-d, broadcastable to ``kv_idx``.
      kv_idx: integer key numbers, of the same rank.

    Returns:
      Booleans (1|B, 1, ...) that end in the broadcast shape of ``q_idx`` and ``kv_idx``.
    """

    def per_batch(array: jax.Array) -> jax.Array:
        return array.reshape(array.shape + (1,) * (q_idx.ndim + 1))

    position, kv_position = q_idx[None, None], kv_idx[None, None]
    segments = operands.segment_ids
    seen = jnp.ones((1, 1, *jnp.broadcast_shapes(q_idx.shape, kv_idx.shape)), bool)
    if segments is not None:
        q_ids, kv_ids = _per_index(segments.q_ids, q_idx), _per_index(segments.kv_ids, kv_idx)
        seen = seen & ((q_ids == kv_ids) & (q_ids >= 0))[:, None]
        if segments.q_positions is not None and segments.kv_positions is not None:
            position = _per_index(segments.q_positions, q_idx)[:, None]
            kv_position = _per_index(segments.kv_positions, kv_idx)[:, None]
    if operands.q_offset is not None:
        position = position + per_batch(operands.q_offset)
    left, right = spec.reach
    if left is not None:
        seen = seen & (kv_position >= position - left)
    if right is not None:
        seen = seen & (kv_position <= position + right)
    if operands.query_seq_lengths is not None:
        seen &= q_idx < per_batch(operands.query_seq_lengths)
    if operands.key_value_seq_lengths is not None:
        seen &= kv_idx < per_batch(operands.key_value_seq_lengths)
    return seen


def packed_words(bits: jax.Array) -> jax.Array:
    """``operands.packed_mask`` of booleans: (..., S) to (..., ceil(S / 32)) uint32.

    Bits beyond the last key are 0.
    """
    *rows, S = bits.shape
    bits = jnp.pad(bits, [(0, 0)] * len(rows) + [(0, -S % 32)])
    in_words = bits.reshape(*rows, -(-S // 32), 32)
    # Not a sum along the last axis: XLA makes a reduction of that, which takes twice as long.
    parts = [in_words[..., j].astype(jnp.uint32) << j for j in range(32)]
    return functools.reduce(jnp.bitwise_or, parts)


def unpacked(words: jax.Array, rows: jax.Array, keys: jax.Array) -> jax.Array:
    """The booleans of a packed mask, (1|B, 1|N, 1|rows, keys); False beyond the last word.

    Args:
      words: ``operands.packed_mask``.
      rows, keys: (rows,) and (keys,) integers; beyond the last row, the last one's.
    """
    if not (isinstance(words.shape[2], int) and words.shape[2] == 1):
        words = jnp.take(words, rows, axis=2, mode="clip")
    words = jnp.take(words, keys // 32, axis=3, mode="fill", fill_value=0)
    return (words >> (keys % 32).astype(jnp.uint32)) & 1 == 1


def _per_index(array: jax.Array, index: jax.Array) -> jax.Array:
    """(B, length) at an index of any shape, (B, *shape); beyond the end, the last element."""
    return jnp.take(array, index, axis=1, mode="clip")


def element_indices(
    operands: Operands, head: jax.Array, q_idx: jax.Array, kv_idx: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What ``mask_mod`` and ``score_mod`` see of a block of elements.

    Args:
      operands: the arrays of the call; only ``batch_index``, ``head_index``, ``q_offset``, the
        segments' positions and shapes are read.
      head: integer query head numbers, among those of ``operands``.
      q_idx: integer query row numbers (not positions).
      kv_idx: integer key numbers.  The three broadcast to each other, without a batch dimension.

    Returns:
      ``(b, h, q_idx, kv_idx)``, int32, of one rank with the batch, 1|B, in front; q_idx holds
      positions, and so does kv_idx where segments have their own.  Padding beyond the last row and
      the last key has the index of that row or key.
    """
    rank = max(head.ndim, q_idx.ndim, kv_idx.ndim)

    def batched(array: jax.Array) -> jax.Array:
        array = array.astype(jnp.int32)
        return array.reshape((1,) * (rank + 1 - array.ndim) + array.shape)

    def per_batch(array: jax.Array) -> jax.Array:
        return array.reshape(array.shape + (1,) * rank)

    T, S = operands.query.shape[1], operands.kv_length
    position = jnp.clip(batched(q_idx), 0, jnp.maximum(T - 1, 0))
    kv = jnp.clip(batched(kv_idx), 0, jnp.maximum(S - 1, 0))
    segments = operands.segment_ids
    if segments is not None:
        if segments.q_positions is not None and segments.kv_positions is not None:
            position = _per_index(segments.q_positions, position[0])
            kv = _per_index(segments.kv_positions, kv[0])
    if operands.q_offset is not None:
        position = position + per_batch(operands.q_offset)
    if operands.batch_index is None:
        raise ValueError("operands must have a batch_index for mask_mod and score_mod")
    if operands.head_index is not None:
        head = operands.head_index[head]
    return per_batch(operands.batch_index), batched(head), position, kv


def zero_beyond(array: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Zeros where ``array`` (B, rows, ...) stands at or beyond ``lengths`` (B,): it may be NaN."""
    if lengths is None:
        return array
    row = jax.lax.broadcasted_iota(jnp.int32, array.shape, 1)
    keep = row < lengths.reshape(lengths.shape + (1,) * (array.ndim - 1))
    return jnp.where(keep, array, jnp.zeros((), array.dtype))


def paged_rows(pages: jax.Array, operands: Operands, rows: jax.Array) -> jax.Array:
    """Keys or values of tokens ``rows`` of every batch entry, through the page table.

    Args:
      pages: (num_pages, page_size, K, X).
      operands: the arrays of the call; the table and the key lengths are read.
      rows: (R,) integer token numbers.

    Returns:
      (B, R, K, X): zeros at and beyond the length, where neither table nor pages matter, and where
      a page's number is out of range.
    """
    table, lengths = operands.page_table, operands.key_value_seq_lengths
    if table is None or lengths is None:
        raise ValueError("paged operands must have a page_table and key_value_seq_lengths")
    num_pages, page_size = pages.shape[:2]
    page = jnp.take(table, rows // page_size, axis=1, mode="fill", fill_value=num_pages)
    is_used = (rows < lengths[:, None]) & (page >= 0)
    page = jnp.where(is_used, page, num_pages)
    return pages.at[page, rows % page_size].get(mode="fill", fill_value=0)


def key_block_range(spec, operands, first_q, last_q, block_kv, num_kv):
    """The key blocks that query rows ``first_q..last_q`` can see: ``(start, stop)``, half open.

    Taken over the whole batch, so a block in the range may be invisible to some of it; a block
    outside is invisible to all.  Rows and results are integers or int32 scalars.
    """
    left, right = _index_reach(spec, operands)
    low, high = _offset_bounds(operands)
    start, stop = 0, num_kv
    segments = operands.segment_ids
    if segments is not None:
        bounds = _bounds_over(segments.kv_start, segments.kv_end, first_q, last_q)
        start, stop = bounds[0] // block_kv, -(-bounds[1] // block_kv)
    if left is not None:
        start = jnp.maximum(start, jnp.clip((first_q + low - left) // block_kv, 0, num_kv))
    if right is not None:
        stop = jnp.minimum(stop, (last_q + high + right) // block_kv + 1)
    if operands.key_value_seq_lengths is not None:
        longest = jnp.max(operands.key_value_seq_lengths, initial=0)
        stop = jnp.minimum(stop, -(-longest // block_kv))
    if operands.query_seq_lengths is not None:
        longest = jnp.max(operands.query_seq_lengths, initial=0)
        stop = jnp.where(first_q < longest, stop, 0)
    return start, stop


def query_block_range(spec, operands, first_kv, last_kv, block_q, num_q):
    """The query blocks that can see keys ``first_kv..last_kv``; the inverse of key_block_range."""
    left, right = _index_reach(spec, operands)
    low, high = _offset_bounds(operands)
    start, stop = 0, num_q
    segments = operands.segment_ids
    if segments is not None:
        bounds = _bounds_over(segments.q_start, segments.q_end, first_kv, last_kv)
        start, stop = bounds[0] // block_q, -(-bounds[1] // block_q)
    if right is not None:
        start = jnp.maximum(start, jnp.clip((first_kv - right - high) // block_q, 0, num_q))
    if left is not None:
        stop = jnp.minimum(stop, (last_kv + left - low) // block_q + 1)
    if operands.query_seq_lengths is not None:
        longest = jnp.max(operands.query_seq_lengths, initial=0)
        stop = jnp.minimum(stop, -(-longest // block_q))
    if operands.key_value_seq_lengths is not None:
        longest = jnp.max(operands.key_value_seq_lengths, initial=0)
        stop = jnp.where(first_kv < longest, stop, 0)
    return start, stop


def _index_reach(spec: AttentionSpec, operands: Operands) -> tuple[int | None, int | None]:
    """``reach`` as far as it holds for the numbers of rows and keys."""
    segments = operands.segment_ids
    if segments is not None and segments.q_positions is not None:
        return None, None
    return spec.reach


def _bounds_over(start: jax.Array, end: jax.Array, first, last):
    """The smallest start and the largest end of (B, length) over ``first..last`` and all of B."""
    row = jnp.arange(start.shape[1])
    within = (row >= first) & (row <= last) & (end > start)
    low = jnp.min(jnp.where(within, start, _FAR), initial=_FAR)
    return low, jnp.max(jnp.where(within, end, 0), initial=0)


def _offset_bounds(operands: Operands):
    """The smallest and the largest ``q_offset`` of the batch."""
    if operands.q_offset is None:
        return 0, 0
    if operands.q_offset.shape[0] == 0:
        return 0, 0
    return jnp.min(operands.q_offset), jnp.max(operands.q_offset)
