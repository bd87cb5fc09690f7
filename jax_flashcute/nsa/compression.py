"""Keys and values compressed to one per block."""

import jax
import jax.numpy as jnp


def compress_kv(
    key: jax.Array,
    value: jax.Array,
    block: int,
    *,
    key_weight: jax.Array | None = None,
    value_weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The mean of each block of keys and of values, projected where weights are given.

    ``compressed[b, j, k] = mean(key[b, j * block : (j + 1) * block, k]) @ key_weight[k]``, summed
    in float32; the last block's mean is over the keys that it has.

    Args:
      key: (B, S, K, H).
      value: (B, S, K, Hv).
      block: keys of a block.
      key_weight: (K, H, H), or None for none.
      value_weight: (K, Hv, Hv), or None for none.

    Returns:
      (B, ceil(S / block), K, H) in key's dtype and (B, ceil(S / block), K, Hv) in value's.

    Raises:
      ValueError: a weight's shape does not fit.
    """
    return (
        _compress("key_weight", key, block, key_weight),
        _compress("value_weight", value, block, value_weight),
    )


def _compress(name: str, array: jax.Array, block: int, weight: jax.Array | None) -> jax.Array:
    K, H = array.shape[2:]
    means = block_means(array, block)
    if weight is not None:
        if weight.shape != (K, H, H):
            raise ValueError(f"{name} must be {(K, H, H)}; got {weight.shape}")
        means = jnp.einsum("bjkh,khe->bjke", means, weight.astype(means.dtype))
    return means.astype(array.dtype)


def block_means(array: jax.Array, block: int) -> jax.Array:
    """(B, S, heads, H) to (B, ceil(S / block), heads, H) in float32: means over what there is."""
    B, S, heads, H = array.shape
    blocks = -(-S // block)
    dtype = jnp.promote_types(array.dtype, jnp.float32)
    array = jnp.pad(array, ((0, 0), (0, blocks * block - S), (0, 0), (0, 0)))
    sums = jnp.sum(array.reshape(B, blocks, block, heads, H), axis=2, dtype=dtype)
    count = jnp.minimum(block, S - block * jnp.arange(blocks))
    return sums / count[:, None, None].astype(dtype)
