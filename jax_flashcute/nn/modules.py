"""A Flax NNX module of attention with grouped heads, rotary positions and a cache."""

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jax_flashcute.api import flash_attention
from jax_flashcute.given import extent, whole
from jax_flashcute.nn.attention_fn import check_input, check_options


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, of one layer.

    Attributes:
      key: (B, S, K, H), room for S tokens.
      value: (B, S, K, H).
      lengths: (B,) int32: tokens that each sequence has.
    """

    key: jax.Array
    value: jax.Array
    lengths: jax.Array

    def append(self, key: jax.Array, value: jax.Array) -> "KVCache":
        """The cache with T more tokens: key and value (B, T, K, H).

        Raises:
          ValueError: a shape does not fit the cache; there is no room for them, where the lengths
            are known; where they are traced, the lengths of a sequence that overflows become
            -1 - S or less, so that its attention is NaN and not wrong unseen.
        """
        room, tokens = self.key.shape[1], key.shape[1]
        for name, old, new in (("key", self.key, key), ("value", self.value, value)):
            expected = (old.shape[0], tokens, *old.shape[2:])
            if new.shape != expected:
                raise ValueError(f"{name} must be {expected} for this cache, got {new.shape}")
        if tokens > room:
            raise ValueError(f"the cache has room for {room} tokens, got {tokens} at once")
        known = 0 if isinstance(self.lengths, Tracer) else int(self.lengths.max(initial=0))
        if known + tokens > room:
            raise ValueError(f"the cache has room for {room} tokens, got {known} and {tokens} more")
        write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at, 0, 0)))
        lengths = self.lengths + tokens
        overflows = (lengths > room) | (self.lengths < 0)
        return KVCache(
            key=write(self.key, key.astype(self.key.dtype), self.lengths),
            value=write(self.value, value.astype(self.value.dtype), self.lengths),
            lengths=jnp.where(overflows, -1 - room, lengths),
        )


class FlashAttention(nnx.Module):
    """Self-attention with projections: (B, T, features) to (B, T, features).

    Args:
      features: of input and output.
      num_heads: N query heads.
      num_kv_heads: K key/value heads, by default N.
      head_dim: H, by default ``features // num_heads``.
      use_bias: of the projections.
      rope_theta: base of rotary positions; None for none.
      sinks: a learned extra logit per head that takes part in the normaliser only.
      dtype: of the computation; None is that of input and parameters.
      param_dtype: of the parameters.
      rngs: for the parameters.
      attention: further keyword arguments of ``flash_attention``, no arrays: ``is_causal``,
        ``local_window_size``, ``logits_soft_cap``, ``scale``, ``mask_mod``, ``implementation`` ...

    Raises:
      ValueError: sizes do not fit, ``flash_attention`` has no such option, or one is an array.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        use_bias: bool = False,
        rope_theta: float | None = None,
        sinks: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        features, num_heads = whole("features", features, 1), whole("num_heads", num_heads, 1)
        kv_heads = whole("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads, 1)
        check_options(attention)
        arrays = [name for name, x in attention.items() if isinstance(x, (jax.Array, np.ndarray))]
        if arrays:
            raise ValueError(f"options must hold no arrays, which calls take; got {arrays}")
        if num_heads % kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of {kv_heads} kv heads, got {num_heads}"
            )
        if head_dim is None and features % num_heads:
            raise ValueError(f"features must be a multiple of {num_heads} heads, got {features}")
        self.head_dim = whole(
            "head_dim", features // num_heads if head_dim is None else head_dim, 1
        )
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        self.features, self.kv_heads, self.rope_theta = features, kv_heads, rope_theta
        self.attention = nnx.static(attention)

        def project(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                features,
                (heads, self.head_dim),
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.query, self.key, self.value = project(num_heads), project(kv_heads), project(kv_heads)
        self.out = nnx.LinearGeneral(
            (num_heads, self.head_dim),
            features,
            axis=(-2, -1),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.sinks = nnx.Param(jnp.zeros(num_heads, param_dtype)) if sinks else None

    def init_cache(self, batch: int, max_length: int, dtype: Any = jnp.bfloat16) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``max_length`` tokens.

        Raises:
          ValueError: a size is no integer, or negative.
        """
        batch, max_length = extent("batch", batch, 0), extent("max_length", max_length, 0)
        shape = (batch, max_length, self.kv_heads, self.head_dim)
        return KVCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32)
        )

    def __call__(
        self, x: jax.Array, *, cache: KVCache | None = None, **attention: Any
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Attention of x to itself, or to what the cache holds and itself.

        Args:
          x: (B, T, features).
          cache: of the tokens before x; T may be 1, or a whole prompt.
          attention: keyword arguments of ``flash_attention`` for this call alone, such as
            ``segment_ids``.

        Returns:
          out, (B, T, features); with a cache ``(out, cache)``, the cache with the tokens of x.

        Raises:
          ValueError: x is no (B, T, features), the cache has no room or is of another batch, or an
            option is not ``flash_attention``'s or is the module's to give: ``return_residual``, and
            with a cache ``q_offset`` and ``key_value_seq_lengths``.
        """
        check_input(x, self.features)
        options = {**self.attention, **attention}
        check_options(options, *(() if cache is None else ("q_offset", "key_value_seq_lengths")))
        if cache is not None and cache.lengths.shape != x.shape[:1]:
            raise ValueError(
                f"cache must be of {x.shape[0]} sequences, as x is; got {cache.lengths.shape[0]}"
            )
        query, key, value = self.query(x), self.key(x), self.value(x)
        start = jnp.zeros(x.shape[0], jnp.int32) if cache is None else cache.lengths
        if self.rope_theta is not None:
            positions = start[:, None] + jnp.arange(x.shape[1])
            query, key = (rotate(y, positions, self.rope_theta) for y in (query, key))
        if self.sinks is not None:
            options["sinks"] = self.sinks[...]
        if cache is None:
            return self.out(cast(jax.Array, flash_attention(query, key, value, **options)))
        cache = cache.append(key, value)
        attended = flash_attention(
            query.astype(cache.key.dtype),
            cache.key,
            cache.value,
            q_offset=start,
            key_value_seq_lengths=jnp.maximum(cache.lengths, 0),
            **options,
        )
        out = cast(jax.Array, attended)
        out = jnp.where((cache.lengths < 0)[:, None, None, None], jnp.nan, out)
        return self.out(out.astype(query.dtype)), cache


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al., 2021) of x (B, T, N, H) at positions (B, T), in float32.

    Channel i and channel i + H/2 turn by ``position / theta ** (2 i / H)``.
    """
    half = x.shape[-1] // 2
    angles = positions[..., None] / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
