"""A mask in bits: bit j, from the lowest, of word w is key 32 w + j; 0 hides."""

import jax
import jax.numpy as jnp


def packed_words(bits: jax.Array) -> jax.Array:
    """``operands.packed_mask`` of booleans: (..., S) to (..., ceil(S / 32)) uint32.

    Bits beyond the last key are 0.
    """
    *rows, S = bits.shape
    bits = jnp.pad(bits, [(0, 0)] * len(rows) + [(0, -S % 32)])
    in_words = bits.reshape(*rows, -(-S // 32), 32).astype(jnp.uint32)
    # A sum of distinct powers of two: XLA fuses it with whatever makes the booleans.
    return jnp.sum(in_words << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


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
