"""Attention to one part of the keys after the other, forward and backward, merged by LSE.

Both passes are the same with all keys in one part, which is gathered.
"""

import functools

import jax
import jax.numpy as jnp

from jax_flashcute import autodiff, xla
from jax_flashcute.context.parts import PartCall
from jax_flashcute.context.steps import Arrays, Call, home, query_chunks, steps_of
from jax_flashcute.spec import Operands, Residuals


def attention_of(call: Call, arrays: Arrays) -> Residuals:
    arrays = jax.tree.map(autodiff.reverse_mode_only, autodiff.equally_varying(arrays))
    return _attention(call, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, arrays: Arrays) -> Residuals:
    return _forward(call, arrays)


def _attention_fwd(call: Call, arrays: Arrays):
    residuals = autodiff.named(_forward(call, arrays))
    return residuals, (arrays, residuals)


def _attention_bwd(call: Call, saved, cotangents: Residuals):
    arrays, residuals = saved
    return (_backward(call, arrays, residuals, cotangents),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(call: Call, arrays: Arrays) -> Residuals:
    """One part of the keys after the other, merged by LSE."""
    operands = arrays.operands
    parts = PartCall.of(call, operands)
    chunks = query_chunks(call, arrays)
    # Without segments, the first part of a chunk needs nothing to be merged with.
    results = [None if rows.ids is None else parts.nothing(rows) for rows in chunks]
    for _, keys, pairs in steps_of(call, arrays):
        for i, j in pairs:

            def attend(total: Residuals | None, part: Operands) -> Residuals:
                found = parts.forward(part)
                return found if total is None else _merged(total, found)

            results[i] = parts.unless_hidden(attend, results[i], chunks[i], keys[j])
    complete = [r or parts.nothing(rows) for r, rows in zip(results, chunks, strict=True)]
    whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *complete)
    return _with_sinks(call, operands, whole)


def _backward(call: Call, arrays: Arrays, residuals: Residuals, cotangents: Residuals):
    """Each part's gradients, from the LSE of whole rows; those of the keys go where they belong."""
    operands = arrays.operands
    parts = PartCall.of(call, operands)
    chunks = query_chunks(call, arrays)
    saved = [jax.tree.map(rows.of, (residuals, cotangents)) for rows in chunks]
    dquery: list = [parts.zeros(rows.of(operands.query)) for rows in chunks]
    dmod = [parts.zeros(x) for x in operands.score_mod_arrays]
    travelling, last_shift = None, 0
    for shift, keys, pairs in steps_of(call, arrays):
        dkeys: list = [(parts.zeros(k.key), parts.zeros(k.value)) for k in keys]
        for i, j in pairs:

            def accumulate(totals, part: Operands, i=i):
                found = parts.backward(part, *saved[i])
                more = (found.query, (found.key, found.value), parts.own(found.score_mod_arrays))
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), totals, more)

            totals = dquery[i], dkeys[j], dmod
            totals = parts.unless_hidden(accumulate, totals, chunks[i], keys[j])
            dquery[i], dkeys[j], dmod = totals
        here = tuple(jnp.concatenate(x, axis=1) for x in zip(*dkeys, strict=True))
        if travelling is not None:
            # On its way while the kernels run: it waits for none of this step's.
            arrived = (call.layout.step(x, shift - last_shift) for x in travelling)
            here = tuple(x + y for x, y in zip(arrived, here, strict=True))
        travelling, last_shift = here, shift
    dkey, dvalue = (home(call, x, last_shift) for x in travelling or ())
    dsinks = xla.sink_gradient(operands, residuals, cotangents.out, cotangents.lse)
    gradients = Operands(
        query=jnp.concatenate(dquery, axis=1).astype(operands.query.dtype),
        key=dkey.astype(operands.key.dtype),
        value=dvalue.astype(operands.value.dtype),
        sinks=dsinks,
        mask_mod_arrays=(None,) * len(operands.mask_mod_arrays),  # pyright: ignore
        score_mod_arrays=tuple(  # pyright: ignore
            None if d is None else d.astype(x.dtype)
            for d, x in zip(dmod, operands.score_mod_arrays, strict=True)
        ),
    )
    return Arrays(gradients)


def _merged(a: Residuals, b: Residuals) -> Residuals:
    """Attention to the keys of two parts, in the statistics' dtype."""
    lse = jnp.logaddexp(a.lse, b.lse)
    total = jnp.where(lse == -jnp.inf, 0, lse)
    weights = (jnp.exp(x.lse - total)[..., None] for x in (a, b))
    weighted = (weight * x.out for weight, x in zip(weights, (a, b), strict=True))
    return Residuals(out=functools.reduce(jnp.add, weighted), lse=lse)


def _with_sinks(call: Call, operands: Operands, found: Residuals) -> Residuals:
    """Sinks are in the normaliser of a row once, whatever the number of parts."""
    out, lse = found.out, found.lse
    if operands.sinks is not None:
        sinks = operands.sinks.astype(lse.dtype)[:, None]
        if operands.query_seq_lengths is not None:
            within = call.layout.positions(lse.shape[1]) < operands.query_seq_lengths[:, None]
            sinks = jnp.where(within[..., None], sinks, -jnp.inf)
        lse = jnp.logaddexp(lse, sinks)
        out = out * jnp.exp(found.lse - jnp.where(lse == -jnp.inf, 0, lse))[..., None]
    return Residuals(out=out.astype(operands.query.dtype), lse=lse)
