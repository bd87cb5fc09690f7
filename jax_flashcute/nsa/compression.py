"""Keys and values compressed to one per block."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashcute.autodiff import equally_varying
from jax_flashcute.dispatch import Implementation
from jax_flashcute.given import whole
from jax_flashcute.kernels.nsa import NSAKernelKey
from jax_flashcute.nsa.passes import Pass, run, served_by


def compress_kv(
    key: jax.Array,
    value: jax.Array,
    block: int,
    *,
    key_weight: jax.Array | None = None,
    value_weight: jax.Array | None = None,
    counts: jax.Array | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """The mean of each block of keys and of values, projected where weights are given.

    ``compressed[b, j, k] = mean(key[b, j * block : (j + 1) * block, k]) @ key_weight[k]``, summed
    in float32; the last block's mean is over the keys that it has.  Keys and values are compressed
    by one kernel on the GPUs that have it (head_dims that are multiples of 8 up to 256, 16-bit
    dtypes), forward and backward.

    Args:
      key: (B, S, K, H).
      value: (B, S, K, Hv).
      block: keys of a block.
      key_weight: (K, H, H), or None for none.
      value_weight: (K, Hv, Hv), or None for none.
      counts: (B, ceil(S / block)) integers: the mean is over so many first keys of each block, 0
        where there are none; the others may hold anything.  None for all that there are.
      implementation: as for ``flash_attention``, for the means; XLA projects them.

    Returns:
      (B, ceil(S / block), K, H) in key's dtype and (B, ceil(S / block), K, Hv) in value's.

    Raises:
      ValueError: an array's shape or ``block`` does not fit.
      NotImplementedError: ``implementation="cute"`` cannot serve it; every reason is given.
    """
    if key.ndim != 4:
        raise ValueError(f"key must be (B, S, K, H); got {key.shape}")
    block = whole("block", block, 1)
    B, S, K, H = key.shape
    if value.ndim != 4 or value.shape[:3] != (B, S, K):
        raise ValueError(f"value must be {(B, S, K)} and its head_dim; got {value.shape}")
    for name, weight, dim in (
        ("key_weight", key_weight, H),
        ("value_weight", value_weight, value.shape[3]),
    ):
        if weight is not None and weight.shape != (K, dim, dim):
            raise ValueError(f"{name} must be {(K, dim, dim)}; got {weight.shape}")
    if counts is not None:
        if counts.shape != (B, -(-S // block)):
            raise ValueError(f"counts must be {(B, -(-S // block))}; got {counts.shape}")
        counts = counts.astype(jnp.int32)
    is_projected = key_weight is not None or value_weight is not None
    mean_dtype = jnp.promote_types(key.dtype, jnp.float32) if is_projected else key.dtype
    arrays = [x for x in (key, value, counts) if x is not None]
    means: Any
    if implementation == "reference":
        means = _formula(block, mean_dtype.name, *arrays)
    else:
        means = _compressed(implementation, block, mean_dtype.name, *equally_varying(arrays))
    return (
        _projected(means[0], key_weight).astype(key.dtype),
        _projected(means[1], value_weight).astype(value.dtype),
    )


def _projected(means: jax.Array, weight: jax.Array | None) -> jax.Array:
    if weight is None:
        return means
    return jnp.einsum("bjkh,khe->bjke", means, weight.astype(means.dtype))


def block_counts(S: int, block: int) -> jax.Array:
    """(1, ceil(S / block)) int32: the keys that each block has."""
    first = block * jnp.arange(-(-S // block), dtype=jnp.int32)
    return jnp.minimum(block, S - first)[None]


def block_means(array: jax.Array, block: int, counts: jax.Array | None = None) -> jax.Array:
    """(B, S, heads, H) to (B, ceil(S / block), heads, H) in float32: means over what there is.

    ``counts``: (B, ceil(S / block)): the mean is over so many first elements of each block.
    """
    B, S, heads, H = array.shape
    blocks = -(-S // block)
    dtype = jnp.promote_types(array.dtype, jnp.float32)
    array = jnp.pad(array, ((0, 0), (0, blocks * block - S), (0, 0), (0, 0)))
    array = array.reshape(B, blocks, block, heads, H)
    if counts is None:
        counts = block_counts(S, block)
    else:
        counts = jnp.minimum(counts, block_counts(S, block))
        is_counted = jnp.arange(block) < counts[:, :, None]
        array = jnp.where(is_counted[..., None, None], array, 0)
    sums = jnp.sum(array, axis=2, dtype=dtype)
    return sums / jnp.maximum(counts, 1)[:, :, None, None].astype(dtype)


def _formula(block: int, mean_dtype: str, key, value, *counts):
    return tuple(block_means(x, block, *counts).astype(mean_dtype) for x in (key, value))


# Batch, tokens, blocks, key/value heads, head_dim of key, head_dim of value.
_TOKENS, _MEANS = ("bskh", "bskv"), ("bjkh", "bjkv")


@dataclass(frozen=True)
class _Forward(Pass):
    block: int
    mean_dtype: str

    inputs, results, local = (*_TOKENS, "bj"), _MEANS, "bk"

    def kernel(self, key, value, *counts):
        from jax_flashcute.ffi import call

        B, S, K, _ = key.shape
        blocks = -(-S // self.block)
        shapes = [((B, blocks, K, x.shape[3]), self.mean_dtype) for x in (key, value)]
        plan = _key("nsa_compress", key, value, self.block, self.mean_dtype, *counts)
        return call.nsa_kernel(plan, shapes, key, value, *counts)

    def formula(self, key, value, *counts):
        return _formula(self.block, self.mean_dtype, key, value, *counts)


@dataclass(frozen=True)
class _Backward(Pass):
    block: int
    length: Any
    dtype: str

    inputs, results, local = (*_MEANS, "bj"), _TOKENS, "bk"

    def kernel(self, d_key, d_value, *counts):
        from jax_flashcute.ffi import call

        B, _, K, _ = d_key.shape
        shapes = [((B, self.length, K, x.shape[3]), self.dtype) for x in (d_key, d_value)]
        tokens = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
        key, value = tokens
        plan = _key("nsa_compress_backward", key, value, self.block, d_key.dtype.name, *counts)
        return call.nsa_kernel(plan, shapes, d_key, d_value, *counts)

    def formula(self, d_key, d_value, *counts):
        there = block_counts(self.length, self.block)
        count = jnp.minimum(counts[0], there) if counts else there
        is_counted = (jnp.arange(self.block) < count[:, :, None])[..., None, None]

        def of_tokens(gradient):
            B, _, K, H = gradient.shape
            dtype = jnp.promote_types(gradient.dtype, jnp.float32)
            divisor = jnp.maximum(count, 1).astype(dtype)[:, :, None, None]
            share = gradient.astype(dtype) / divisor
            share = jnp.where(is_counted, share[:, :, None], 0).astype(self.dtype)
            return share.reshape(B, -1, K, H)[:, : self.length]

        return of_tokens(d_key), of_tokens(d_value)


def _key(kernel, key, value, block: int, mean_dtype: str, *counts) -> NSAKernelKey:
    dims = key.shape[3], value.shape[3]
    return NSAKernelKey(kernel, key.dtype.name, *dims, block, mean_dtype, bool(counts))


def _served_by(implementation: Implementation, kernel, block, mean_dtype, key, value, *counts):
    return served_by(
        implementation,
        "the compression" if kernel == "nsa_compress" else "the compression's gradients",
        (("key", key), ("value", value)),
        (key.shape[3], value.shape[3]),
        _key(kernel, key, value, block, mean_dtype, *counts),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _compressed(implementation: Implementation, block: int, mean_dtype: str, *arrays):
    served = _served_by(implementation, "nsa_compress", block, mean_dtype, *arrays)
    return run(_Forward(served, block, mean_dtype), *arrays)


def _compressed_fwd(implementation: Implementation, block: int, mean_dtype: str, *arrays):
    key, value, *counts = arrays
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)]
    means = _compressed(implementation, block, mean_dtype, *arrays)
    return means, (_Static(tuple(shapes)), counts)


def _compressed_bwd(implementation: Implementation, block: int, mean_dtype: str, saved, gradients):
    static, counts = saved
    key, value = static.shapes
    kernel = "nsa_compress_backward"
    served = _served_by(implementation, kernel, block, mean_dtype, key, value, *counts)
    one = _Backward(served, block, key.shape[1], key.dtype.name)
    return (*run(one, *gradients, *counts), *(None for _ in counts))


_compressed.defvjp(_compressed_fwd, _compressed_bwd)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Static:
    """What the backward knows of keys and values: it does not need them."""

    shapes: tuple[jax.ShapeDtypeStruct, ...] = field(metadata={"static": True})
