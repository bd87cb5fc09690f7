"""Scores that ``flash_attention`` takes as ``score_mod``, ready made.

Each is an ordinary function ``(score, b, h, q_idx, kv_idx) -> score`` over the scaled score; the
floating-point arrays that they close over have gradients.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

ScoreMod = Callable[..., Any]


def compose(*scores: ScoreMod) -> ScoreMod:
    """One after the other, from the left."""

    def score_mod(score, *indices):
        for function in scores:
            score = function(score, *indices)
        return score

    return score_mod


def softcap(cap: float) -> ScoreMod:
    """``cap * tanh(score / cap)``; as ``logits_soft_cap``, but composable."""
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"cap must be a positive number; got {cap}")
    return lambda score, b, h, q, kv: cap * jnp.tanh(score / cap)


def alibi_slopes(heads: int) -> jax.Array:
    """(N,) float32 slopes of attention with linear biases (Press et al., 2022), for any N.

    For a power of two, ``2 ** (-8 i / N)`` for i = 1..N; otherwise those of the power of two
    below, then every other one of the power of two above.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1; got {heads}")

    def slopes(n: int) -> list[float]:
        return [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]

    below = 2 ** int(math.log2(heads))
    return jnp.asarray(slopes(below) + slopes(2 * below)[::2][: heads - below], jnp.float32)


def alibi(slopes: ArrayLike) -> ScoreMod:
    """``score - slopes[h] * |q - kv|``, with (N,) floating-point slopes."""
    slopes = _floating("slopes", slopes, 1)
    return lambda score, b, h, q, kv: score - slopes[h] * jnp.abs(q - kv)


def relative_bias(
    table: ArrayLike, *, bidirectional: bool = True, max_distance: int = 128
) -> ScoreMod:
    """The bucketed relative position bias of T5 (Raffel et al., 2020).

    Args:
      table: (N, buckets) floating point, added by head and bucket.
      bidirectional: half of the buckets are for keys after the position; otherwise these share
        bucket 0.
      max_distance: distances from here on share the last bucket.
    """
    table = _floating("table", table, 2)
    buckets = table.shape[1]
    if buckets < 4 or max_distance <= buckets // (4 if bidirectional else 2):
        raise ValueError(
            "table must have at least 4 buckets and max_distance must exceed those of single "
            f"distances; got {buckets} buckets and max_distance={max_distance}"
        )
    return lambda score, b, h, q, kv: (
        score + table[h, relative_bucket(kv - q, buckets, bidirectional, max_distance)]
    )


def relative_bucket(distance, buckets: int, bidirectional: bool, max_distance: int):
    """T5's bucket of ``kv - q``: one for each small distance, then ever wider ones."""
    side = 0
    if bidirectional:
        buckets //= 2
        side = jnp.where(distance > 0, buckets, 0)
        magnitude = jnp.abs(distance)
    else:
        magnitude = jnp.maximum(-distance, 0)
    single = buckets // 2
    ratio = jnp.maximum(magnitude, single).astype(jnp.float32) / single
    steps = jnp.log(ratio) / math.log(max_distance / single) * (buckets - single)
    wide = jnp.minimum(single + steps.astype(jnp.int32), buckets - 1)
    return side + jnp.where(magnitude < single, magnitude, wide)


def head_bias(bias: ArrayLike) -> ScoreMod:
    """Adds (N,) ``bias[h]``."""
    bias = _floating("bias", bias, 1)
    return lambda score, b, h, q, kv: score + bias[h]


def query_bias(bias: ArrayLike) -> ScoreMod:
    """Adds (N, T) ``bias[h, q]``, by position."""
    bias = _floating("bias", bias, 2)
    return lambda score, b, h, q, kv: score + bias[h, q]


def key_bias(bias: ArrayLike) -> ScoreMod:
    """Adds (N, S) ``bias[h, kv]``."""
    bias = _floating("bias", bias, 2)
    return lambda score, b, h, q, kv: score + bias[h, kv]


def _floating(name: str, array: ArrayLike, rank: int) -> jax.Array:
    array = jnp.asarray(array)
    if array.ndim != rank or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating point with {rank} dimensions; "
            f"got {array.dtype.name} of shape {array.shape}"
        )
    return array
