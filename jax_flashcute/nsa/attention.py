"""The whole: compressed keys, selected blocks and a window, gated together."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashcute.api import flash_attention
from jax_flashcute.dispatch import Implementation
from jax_flashcute.nsa.compression import compress_kv
from jax_flashcute.nsa.config import NSAConfig
from jax_flashcute.nsa.gating import gate, weighted_sum
from jax_flashcute.nsa.selection import select_blocks, to_block_mask


def native_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    config: NSAConfig | None = None,
    gates: jax.Array | None = None,
    gate_weights: jax.Array | None = None,
    key_weight: jax.Array | None = None,
    value_weight: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    implementation: Implementation = None,
) -> jax.Array:
    """Native sparse attention (Yuan et al., 2025): three branches, gated.

    Query row t, in tile i = t // query_tile, sees in the

    - compressed branch: means of blocks j (``compress_kv``) with ``j <= t // block``;
    - selected branch: keys ``r <= t`` of the blocks that ``select_blocks`` chose for tile i;
    - window branch: keys ``t - window < r <= t``.

    ``out[t] = sum_i gates[t, i] * branch_i[t]``.  A branch without a visible key is 0.  Without
    ``is_causal`` the limits by t fall away and the window is ``window // 2`` to each side.  The
    selection is shared by the query heads of a key/value head and has no gradient; all arrays do.

    Args:
      query: (B, T, N, H).
      key: (B, T, K, H).
      value: (B, T, K, Hv).
      config: sizes; ``NSAConfig()`` by default.
      gates: (B, T, N, 3), used as they are; or
      gate_weights: (N, 3, H), whose gates are ``sigmoid(query . gate_weights)``.  Without either,
        the branches' mean.
      key_weight: (K, H, H), applied to the compressed keys.
      value_weight: (K, Hv, Hv), applied to the compressed values.
      scale: factor on the scores; 1 / sqrt(H) by default.
      is_causal: see above.
      implementation: as for ``flash_attention``, for each branch, the compression and the gates.

    Returns:
      (B, T, N, Hv) in the query's dtype.

    Raises:
      ValueError: an argument does not fit; it is named.
      NotImplementedError: the implementation asked for cannot serve a part.
    """
    config = NSAConfig() if config is None else config
    _check(query, key, value, gates, gate_weights)
    T, N, H = query.shape[1:]
    scale = 1 / math.sqrt(H) if scale is None else scale
    if T == 0:
        return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    common: dict[str, Any] = {"scale": scale, "implementation": implementation}
    compressed_key, compressed_value = compress_kv(
        key,
        value,
        config.block,
        key_weight=key_weight,
        value_weight=value_weight,
        implementation=implementation,
    )
    compressed_visibility: dict[str, Any] = {}
    if is_causal:
        compressed_visibility["compress_factor"] = config.block
        compressed_visibility["complete_only"] = config.complete_only
    compressed = flash_attention(
        query, compressed_key, compressed_value, **compressed_visibility, **common
    )
    selection = select_blocks(
        query, compressed_key, config, kv_length=T, scale=scale, is_causal=is_causal
    )
    blocks = to_block_mask(selection, config, q_heads=N, q_length=T, kv_length=T)
    selected = flash_attention(query, key, value, is_causal=is_causal, block_mask=blocks, **common)
    side = config.window - 1 if is_causal else config.window // 2
    window = flash_attention(
        query, key, value, local_window_size=(side, 0 if is_causal else side), **common
    )
    branches: list[Any] = [compressed, selected, window]
    if gates is not None:
        return weighted_sum(gates, branches)
    return gate(query, branches, gate_weights, implementation=implementation)


def _check(query, key, value, gates, gate_weights) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, length, heads, head_dim); got shape {array.shape}"
            )
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key must have query's length, {query.shape[1]}; got {key.shape[1]}")
    if gates is not None and gate_weights is not None:
        raise ValueError("gates and gate_weights cannot be given together")
    if gates is not None and gates.shape != (*query.shape[:3], 3):
        raise ValueError(f"gates must be {(*query.shape[:3], 3)}; got {gates.shape}")
