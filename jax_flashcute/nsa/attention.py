"""The whole: compressed keys, selected blocks and a window, gated together."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_flashcute import given
from jax_flashcute.api import flash_attention
from jax_flashcute.dispatch import Implementation
from jax_flashcute.nsa.compression import compress_kv
from jax_flashcute.nsa.config import NSAConfig
from jax_flashcute.nsa.gating import gate, weighted_sum
from jax_flashcute.nsa.packing import Packing, Tiling, of_lengths, of_packing, pack, whole
from jax_flashcute.nsa.selection import select_blocks, to_block_mask
from jax_flashcute.promotion import of_any_rank
from jax_flashcute.sharding import with_automatic_axes


@of_any_rank
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
    segment_ids: ArrayLike | None = None,
    max_segments: int | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
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
      segment_ids: (B, T) or (T,) integers, packed sequences: each run of equal ids is a sequence of
        its own and gets what it would get alone; blocks, query tiles and positions count from its
        start.  A negative id is padding, which may hold NaN and gives 0.
      max_segments: the most sequences that a batch entry can have, needed with ``segment_ids``:
        rows are spread over up to so many query tiles more.  Rows of sequences beyond it give NaN.
      key_value_seq_lengths: (B,) or scalar integers: rows and keys at or beyond are padding.
      implementation: as for ``flash_attention``, for each branch, the compression and the gates.

    Returns:
      (B, T, N, Hv) in the query's dtype.

    Raises:
      ValueError: an argument does not fit; it is named.
      NotImplementedError: the implementation asked for cannot serve a part.
    """
    config = NSAConfig() if config is None else config
    if not isinstance(config, NSAConfig):
        raise ValueError(f"config must be an NSAConfig or None; got {config!r}")
    B, T, _, H = _check(query, key, value, gates, gate_weights, key_weight, value_weight)
    lengths = _lengths(key_value_seq_lengths, B, T)
    if B == 0 or T == 0:
        return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    if segment_ids is not None:
        segment_ids = _segment_ids(segment_ids, B, T, lengths)
        max_segments = _most_segments(max_segments)
    elif max_segments is not None:
        raise ValueError("max_segments is for segment_ids, which are missing")
    scale = 1 / math.sqrt(H) if scale is None else scale
    is_causal = given.flag("is_causal", is_causal)
    function = functools.partial(
        _of_sequences, config, scale, is_causal, implementation, max_segments
    )
    weights = (gate_weights, key_weight, value_weight)
    arrays = (key, value, gates, weights, segment_ids, lengths)
    return with_automatic_axes(function, query, *arrays)


def _of_sequences(
    config: NSAConfig,
    scale: float,
    is_causal: bool,
    implementation: Implementation,
    max_segments: int | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gates: jax.Array | None,
    weights: tuple[jax.Array | None, ...],
    ids: jax.Array | None,
    lengths: jax.Array | None,
) -> jax.Array:
    """``native_sparse_attention`` of arguments that are complete; ``ids``: of segments."""
    T = query.shape[1]
    attend = functools.partial(_attend, config, scale, is_causal, implementation, weights)
    if ids is not None:
        assert max_segments is not None
        packing = pack(ids, max_segments, config)
        query, key, value = (packing.aligned(x) for x in (query, key, value))
        gates = None if gates is None else packing.aligned(gates)
        out = attend(query, key, value, gates, of_packing(config, packing), packing=packing)
        return packing.packed(out)
    if lengths is None:
        return attend(query, key, value, gates, whole(config, T, T))
    is_row = (jnp.arange(T) < lengths[:, None])[..., None, None]
    if gates is not None:
        gates = jnp.where(is_row, gates, 0)
    tiling = of_lengths(config, T, lengths)
    return attend(query, key, value, gates, tiling, lengths=lengths, is_row=is_row)


def _attend(
    config: NSAConfig,
    scale: float,
    is_causal: bool,
    implementation: Implementation,
    weights: tuple[jax.Array | None, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gates: jax.Array | None,
    tiling: Tiling,
    *,
    packing: Packing | None = None,
    lengths: jax.Array | None = None,
    is_row: jax.Array | None = None,
) -> jax.Array:
    """Sequences that begin where tiles and blocks do; ``is_row``: rows that are no padding."""
    gate_weights, key_weight, value_weight = weights
    T, N = query.shape[1:3]
    common: dict[str, Any] = {"scale": scale, "implementation": implementation}
    compressed_key, compressed_value = compress_kv(
        key,
        value,
        config.block,
        key_weight=key_weight,
        value_weight=value_weight,
        counts=tiling.counts,
        implementation=implementation,
    )
    tokens, blocks = _visibility(config, is_causal, packing, lengths)
    compressed = flash_attention(query, compressed_key, compressed_value, **blocks, **common)
    selection = select_blocks(
        query,
        compressed_key,
        config,
        kv_length=T,
        scale=scale,
        is_causal=is_causal,
        tiling=None if tiling.counts is None else tiling,
    )
    block_mask = to_block_mask(selection, config, q_heads=N, q_length=T, kv_length=T)
    selected = flash_attention(
        query, key, value, is_causal=is_causal, block_mask=block_mask, **tokens, **common
    )
    side = config.window - 1 if is_causal else config.window // 2
    window = (side, 0 if is_causal else side)
    near = flash_attention(query, key, value, local_window_size=window, **tokens, **common)
    branches: list[Any] = [compressed, selected, near]
    if gates is not None:
        return weighted_sum(gates, branches)
    if is_row is not None:
        query = jnp.where(is_row, query, 0)
    return gate(query, branches, gate_weights, implementation=implementation)


def _visibility(
    config: NSAConfig, is_causal: bool, packing: Packing | None, lengths: jax.Array | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What hides tokens and blocks of other sequences and padding, for ``flash_attention``."""
    tokens: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    if packing is not None:
        tokens["segment_ids"] = packing.ids
        # A block holds keys if its first place does.
        blocks["segment_ids"] = packing.ids, packing.ids[:, :: config.block]
        blocks["positions"] = "segment"
    elif lengths is not None:
        tokens["query_seq_lengths"] = tokens["key_value_seq_lengths"] = lengths
        blocks["query_seq_lengths"] = lengths
        blocks["key_value_seq_lengths"] = -(-lengths // config.block)
    if is_causal:
        blocks["compress_factor"] = config.block
        blocks["complete_only"] = config.complete_only
    return tokens, blocks


def _check(query, key, value, gates, gate_weights, key_weight, value_weight) -> tuple[int, ...]:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, length, heads, head_dim); got shape {array.shape}"
            )
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key must have query's length, {query.shape[1]}; got {key.shape[1]}")
    if gates is not None and gate_weights is not None:
        raise ValueError("gates and gate_weights cannot be given together")
    (N, H), K = query.shape[2:], key.shape[2]
    for name, array, shape in (
        ("gates", gates, (*query.shape[:3], 3)),
        ("gate_weights", gate_weights, (N, 3, H)),
        ("key_weight", key_weight, (K, H, H)),
        ("value_weight", value_weight, (K, value.shape[3], value.shape[3])),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be {shape}; got {array.shape}")
    return query.shape


def _lengths(lengths: ArrayLike | None, B: int, T: int) -> jax.Array | None:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape not in ((), (B,)):
        raise ValueError(
            f"key_value_seq_lengths must be integers of shape () or {(B,)}; got "
            f"{lengths.dtype.name}{lengths.shape}"
        )
    return jnp.broadcast_to(jnp.clip(lengths, 0, T).astype(jnp.int32), (B,))


def _segment_ids(ids: ArrayLike, B: int, T: int, lengths) -> jax.Array:
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape not in ((T,), (B, T)):
        raise ValueError(
            f"segment_ids must be integers of shape {(T,)} or {(B, T)}; got "
            f"{ids.dtype.name}{ids.shape}"
        )
    ids = jnp.broadcast_to(ids.astype(jnp.int32), (B, T))
    return ids if lengths is None else jnp.where(jnp.arange(T) < lengths[:, None], ids, -1)


def _most_segments(max_segments: int | None) -> int:
    if max_segments is None:
        raise ValueError(
            "max_segments must be the most segments that a batch entry can have; got None"
        )
    return given.whole("max_segments", max_segments, 1)
