"""Gradients that a deterministic kernel sums in fixed point: how large they may be, and as floats.

A score's gradient is ``P (dP - delta)`` where a row's P sum to 1 and ``|dP| <= |dO|_1 max|V|``, so
those of a row sum to at most ``|dO|_1 max|V| + |delta|`` in magnitude, and what an element of an
array gets is bounded by the sum over the rows that may add to it.  ``delta`` is not finite where
anything is not that a row depends on: then the bound is not, and the whole array becomes NaN.

The kernel computes P anew, from products that were rounded otherwise than those of the LSE: what
that may come to where scores are large, a factor of ``exp(doubt)`` allows for.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashcute.kernels.elements import (
    SHIFTS,
    SUM_BITS,
    Addends,
    ElementFunctions,
    in_fixed_point,
    measures,
    summed_arrays,
)
from jax_flashcute.spec import AttentionSpec, Operands, Residuals
from jax_flashcute.visibility import zero_beyond

MOST_DOUBT = 20.0
"""Beyond it there would be too few bits left for what is summed: the array becomes NaN."""


def exponents(
    functions: ElementFunctions,
    spec: AttentionSpec,
    operands: Operands,
    residuals: Residuals,
    dout: jax.Array,
    dlse: jax.Array,
) -> jax.Array:
    """(sums,) int32: each element of a sum is below 2 to its power in magnitude.

    Where a kernel measures what is added, the number of addends is.
    """
    of_rows = None
    found = []
    arrays = [x for group in summed_arrays(spec, operands) for x in group]
    for addends, array in zip(functions.summed, arrays, strict=True):
        if addends.factor is None:
            sizes = (*operands.query.shape[:3], operands.kv_length, addends.reads)
            bound = math.prod((jnp.asarray(x, jnp.float32) for x in sizes), start=jnp.float32(1))
        else:
            if of_rows is None:
                of_rows = _of_rows(spec, operands, residuals, dout, dlse)
            # Twice, for what sums are rounded by.
            bound = 2.0 * addends.factor * addends.reads * _over_rows(of_rows, addends, array)
        found.append(_exponent_of(bound))
    return jnp.stack(found)


def raw(functions: ElementFunctions, sums: Sequence) -> list[jax.ShapeDtypeStruct]:
    """What the kernel leaves in place of gradients of these shapes: see ``launchers``."""
    found = []
    for x, is_fixed in zip(sums, in_fixed_point(functions, deterministic=True), strict=True):
        shape, dtype = ((*x.shape, 2), jnp.uint32) if is_fixed else (x.shape, jnp.float32)
        found.append(jax.ShapeDtypeStruct(shape, dtype))
    largest = jax.ShapeDtypeStruct((len(found),), jnp.uint32)
    return found + [largest] * measures(functions, deterministic=True)


def as_floats(
    functions: ElementFunctions, exponents: jax.Array, sums: Sequence[jax.Array]
) -> list[jax.Array]:
    """The gradients in float32, from what the kernel leaves and the ``exponents`` it was given."""
    found = []
    fixed = in_fixed_point(functions, deterministic=True)
    for i, addends in enumerate(functions.summed):
        if not fixed[i]:
            found.append(sums[i])
            continue
        exponent, of_addends = exponents[i], jnp.int32(0)
        if addends.factor is None:
            of_addends = _exponent_of_bits(sums[-1][i])
        is_finite = (exponent < _INFINITE) & (of_addends < _INFINITE)
        floats = _as_float(sums[i], jnp.clip(SUM_BITS - exponent - of_addends, *SHIFTS))
        found.append(jnp.where(is_finite, floats, jnp.nan))
    return found


_INFINITE = 129
"""The exponent of what is infinite or not a number."""


def _of_rows(
    spec: AttentionSpec, operands: Operands, residuals: Residuals, dout, dlse
) -> jax.Array:
    """(B, T, N): a bound on the sum of the magnitudes of a row's gradients of scores."""
    dout, lse, delta = residuals.row_statistics(dout, dlse, jnp.float32)
    keys = operands.key_value_seq_lengths
    value = jnp.max(_finite(zero_beyond(operands.value, keys)), initial=0)
    of_rows = jnp.sum(jnp.abs(dout.astype(jnp.float32)), axis=-1) * value + jnp.abs(delta)
    is_empty = lse == jnp.inf
    query = jnp.where(is_empty[..., None], 0, operands.query)
    products = _largest_norm(query) * _largest_norm(_finite(zero_beyond(operands.key, keys)))
    products *= abs(spec.scale)
    largest = jnp.max(jnp.where(is_empty, 0, jnp.abs(lse)), initial=0)
    largest += 0.0 if spec.logits_soft_cap is None else spec.logits_soft_cap
    doubt = products * 2.0**-18 + largest * 2.0**-20
    return of_rows * jnp.where(doubt < MOST_DOUBT, jnp.exp(doubt), jnp.nan)


def _largest_norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1), initial=0))


def _finite(x: jax.Array) -> jax.Array:
    """Magnitudes, 0 for what is not finite: keys that nobody sees may hold anything."""
    x = jnp.abs(x.astype(jnp.float32))
    return jnp.where(jnp.isfinite(x), x, 0)


def _over_rows(of_rows: jax.Array, addends: Addends, array: jax.Array) -> jax.Array:
    """The largest sum over rows that may add to one element."""
    if addends.axes is not None:
        of_rows = jnp.moveaxis(of_rows, 1, 2)
        lacking = tuple(i for i, axis in enumerate("bnt") if axis not in addends.axes)
        return jnp.max(jnp.sum(of_rows, axis=lacking), initial=0)
    if array.shape[0] == of_rows.shape[0]:
        return jnp.max(jnp.sum(of_rows, axis=(1, 2)), initial=0)
    return jnp.sum(of_rows)


def _exponent_of(bound: jax.Array) -> jax.Array:
    return _exponent_of_bits(lax.bitcast_convert_type(bound.astype(jnp.float32), jnp.uint32))


def _exponent_of_bits(bits: jax.Array) -> jax.Array:
    """As ``fixed_point.exponent_of`` in a kernel has it."""
    return (bits >> 23).astype(jnp.int32) - 126


def _as_float(words: jax.Array, shift: jax.Array) -> jax.Array:
    """(..., 2) uint32, the low and the high words of integers, in units of 2**-shift."""
    low, high = words[..., 0], words[..., 1]
    is_negative = (high >> 31) == 1
    high = jnp.where(is_negative, ~high + (low == 0), high)
    low = jnp.where(is_negative, ~low + 1, low)
    size = high.astype(jnp.float32) * 2.0**32 + low.astype(jnp.float32)
    # Twice, for 2**-shift may be no normal number.
    for part in (shift // 2, shift - shift // 2):
        size *= lax.bitcast_convert_type((127 - part) << 23, jnp.float32)
    return jnp.where(is_negative, -size, size)
