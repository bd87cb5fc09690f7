"""The oracle: attention written densely in ``jnp``, in float32 (float64 for float64 operands).

Memory is O(B N T S).  Every other implementation is tested against this one, so it is written to
be read, and plain autodiff differentiates it any number of times, forward and reverse.
"""

import jax.numpy as jnp
from jax import lax

from jax_flashcute.spec import AttentionSpec, Operands, Residuals
from jax_flashcute.tile_kinds import FULL, HIDDEN
from jax_flashcute.visibility import (
    element_indices,
    paged_rows,
    unpacked,
    visible,
    zero_beyond,
)


def attention(spec: AttentionSpec, operands: Operands) -> Residuals:
    """Dense attention.

    Args:
      spec: the static part of the call.
      operands: its arrays.

    Returns:
      ``Residuals``: out (B, T, N, Hv) in the operands' dtype, lse (B, T, N).  A row that sees no
      key gives out 0, LSE -inf (the sink where there is one) and zero gradients; so does a padded
      row, whose LSE is always -inf.
    """
    dtype = jnp.promote_types(operands.query.dtype, jnp.float32)
    query = zero_beyond(operands.query, operands.query_seq_lengths).astype(dtype)
    key, value = operands.key, operands.value
    if operands.page_table is not None:
        rows = jnp.arange(operands.kv_length)
        key, value = (paged_rows(x, operands, rows) for x in (key, value))
    key = zero_beyond(key, operands.key_value_seq_lengths).astype(dtype)
    value = zero_beyond(value, operands.key_value_seq_lengths).astype(dtype)
    T, N = query.shape[1:3]
    S, K = key.shape[1:3]
    key = jnp.repeat(key, N // K, axis=2)
    value = jnp.repeat(value, N // K, axis=2)

    score = jnp.einsum("btnh,bsnh->bnts", query, key, precision=lax.Precision.HIGHEST)
    score = spec.scale * score
    row, column = jnp.arange(T)[:, None], jnp.arange(S)[None, :]
    head = jnp.arange(N)[:, None, None]
    if spec.score_mod is not None:
        indices = element_indices(operands, head, row, column)
        modified = spec.score_mod(operands.score_mod_arrays, score, *indices).astype(dtype)
        score = jnp.broadcast_to(modified, score.shape)
    if spec.logits_soft_cap is not None:
        score = spec.logits_soft_cap * jnp.tanh(score / spec.logits_soft_cap)
    if operands.bias is not None:
        score = score + operands.bias.astype(dtype)
    seen = visible(spec, operands, row, column)
    if operands.mask is not None:
        seen = seen & operands.mask
    if operands.packed_mask is not None:
        seen = seen & unpacked(operands.packed_mask, row[:, 0], column[0])
    kind = None
    if operands.block_mask is not None:
        blocks = operands.block_mask
        kind = blocks.kinds()[:, :, row // blocks.tile_m, column // blocks.tile_n]
        seen = seen & (kind != HIDDEN)
    if spec.mask_mod is not None:
        indices = element_indices(operands, head, row, column)
        shown = spec.mask_mod(operands.mask_mod_arrays, *indices)
        seen = seen & (shown if kind is None else shown | (kind == FULL))
    score = jnp.where(seen, score, -jnp.inf)

    row_max = jnp.max(score, axis=-1, keepdims=True, initial=-jnp.inf)
    if operands.sinks is not None:
        sink = operands.sinks.astype(dtype)[:, :, None, None]
        row_max = jnp.maximum(row_max, sink)
    # In a row without a visible key, exp(-inf - -inf) would be NaN, and so would its gradient.
    row_max = lax.stop_gradient(jnp.where(row_max == -jnp.inf, 0, row_max))
    weight = jnp.exp(score - row_max)
    row_sum = jnp.sum(weight, axis=-1, keepdims=True)
    if operands.sinks is not None:
        row_sum = row_sum + jnp.exp(sink - row_max)
    empty = row_sum == 0
    row_sum = jnp.where(empty, 1, row_sum)

    lse = jnp.where(empty, -jnp.inf, row_max + jnp.log(row_sum))[..., 0]
    lse = jnp.swapaxes(lse, 1, 2)
    if operands.query_seq_lengths is not None:
        padded = jnp.arange(T)[None, :, None] >= operands.query_seq_lengths[:, None, None]
        lse = jnp.where(padded, -jnp.inf, lse)
    out = jnp.einsum("bnts,bsnh->btnh", weight / row_sum, value, precision=lax.Precision.HIGHEST)
    return Residuals(out=out.astype(operands.query.dtype), lse=lse)
