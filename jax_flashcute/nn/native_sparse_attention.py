"""Native sparse attention as a Flax NNX module."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jax_flashcute.dispatch import Implementation
from jax_flashcute.given import whole
from jax_flashcute.nn.attention_fn import check_input
from jax_flashcute.nsa import NSAConfig, native_sparse_attention


class NativeSparseAttention(nnx.Module):
    """Self-attention through ``nsa.native_sparse_attention``, with projections and gates.

    Parameters: ``query``, ``key``, ``value`` and ``out`` (``nnx.Linear`` without bias),
    ``gate_weights`` (N, 3, H), and with ``project_compressed`` ``key_weight`` (K, H, H) and
    ``value_weight`` (K, H, H).

    Args:
      in_features: width of the input and the output.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads, a divisor of N; N by default.
      head_dim: H; ``in_features // num_heads`` by default.
      config: sizes of the three branches.
      project_compressed: compressed keys and values go through a matrix of each head, the identity
        at first.
      positional: applied to query (B, T, N, H) and key (B, T, K, H), such as rotary positions.
      dtype: of the computation; the input's by default.
      param_dtype: of the parameters.
      implementation: as for ``flash_attention``.
      rngs: for the parameters.

    Raises:
      ValueError: the heads do not divide, or there are none.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        config: NSAConfig | None = None,
        project_compressed: bool = False,
        positional: Callable[[jax.Array], jax.Array] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        in_features = whole("in_features", in_features, 1)
        num_heads = whole("num_heads", num_heads, 1)
        num_kv_heads = whole("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads, 1)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, {num_heads}; got {num_kv_heads}")
        if head_dim is None:
            if in_features % num_heads:
                raise ValueError(
                    f"num_heads must divide in_features, {in_features}, where head_dim is left "
                    f"out; got {num_heads}"
                )
            head_dim = in_features // num_heads
        head_dim = whole("head_dim", head_dim, 1)

        def linear(width_in: int, width_out: int) -> nnx.Linear:
            return nnx.Linear(
                width_in, width_out, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.query = linear(in_features, num_heads * head_dim)
        self.key = linear(in_features, num_kv_heads * head_dim)
        self.value = linear(in_features, num_kv_heads * head_dim)
        self.out = linear(num_heads * head_dim, in_features)
        # All gates are half open at first.
        self.gate_weights = nnx.Param(jnp.zeros((num_heads, 3, head_dim), param_dtype))
        if project_compressed:
            identity = jnp.broadcast_to(
                jnp.eye(head_dim, dtype=param_dtype), (num_kv_heads, head_dim, head_dim)
            )
            self.key_weight, self.value_weight = nnx.Param(identity), nnx.Param(identity)
        self.project_compressed = project_compressed
        self.head_dim = head_dim
        self.config = NSAConfig() if config is None else config
        self.positional = positional
        self.implementation: Implementation = implementation

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        max_segments: int | None = None,
        key_value_seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Causal self-attention.

        Args:
          x: (B, T, in_features).
          segment_ids: as for ``native_sparse_attention``.
          max_segments: likewise.
          key_value_seq_lengths: likewise.

        Returns:
          (B, T, in_features).

        Raises:
          ValueError: x is no (B, T, in_features), or as for ``native_sparse_attention``.
        """

        check_input(x, self.query.in_features)

        def heads(projected: jax.Array) -> jax.Array:
            width = projected.shape[-1]
            return projected.reshape(*x.shape[:2], width // self.head_dim, self.head_dim)

        query, key = heads(self.query(x)), heads(self.key(x))
        if self.positional is not None:
            query, key = self.positional(query), self.positional(key)
        attended = native_sparse_attention(
            query,
            key,
            heads(self.value(x)),
            config=self.config,
            gate_weights=self.gate_weights[...],
            key_weight=self.key_weight[...] if self.project_compressed else None,
            value_weight=self.value_weight[...] if self.project_compressed else None,
            segment_ids=segment_ids,
            max_segments=max_segments,
            key_value_seq_lengths=key_value_seq_lengths,
            implementation=self.implementation,
        )
        return self.out(attended.reshape(*x.shape[:2], self.out.in_features))
