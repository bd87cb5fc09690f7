"""A measured step from any JAX attention function of (query, key, value)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step


def no_gpu() -> str | None:
    """Why JAX cannot use a GPU, or None."""
    if jax.default_backend() != "gpu":
        return f"JAX runs on {jax.default_backend()}, not on a GPU"
    return None


def jax_step(
    attention: Callable[..., jax.Array],
    case: Case,
    pass_: Pass,
    dtype: str | None = None,
    *,
    integers: tuple[jax.Array, ...] = (),
    takes_all: bool = False,
    takes_pages: bool = False,
    aligns_ends: bool = False,
) -> Step:
    """One jitted pass of an attention function over random normal inputs.

    ``integers``: lengths and page tables, which it is given after (query, key, value): as constants
    of the program XLA would write some of them in each call.
    ``takes_all``: the function observes lengths, lists, documents and functions; others refuse.
    ``takes_pages``: likewise ``case.page_size``; it is given (num_pages, page_size, K, H).
    ``aligns_ends``: its causal mask aligns queries and keys at their ends.

    The backward pass is a jitted call of the function that ``jax.vjp`` gives, whose residuals are
    computed once, outside.
    """
    if not (case.is_plain or takes_all):
        raise NotImplementedError("this peer is not given lengths, lists, documents or functions")
    if case.page_size is not None and not takes_pages:
        raise NotImplementedError("this peer is not given a page table")
    if case.causal and case.seqlen_q != case.seqlen_k and not aligns_ends:
        raise NotImplementedError("this peer's causal mask aligns queries and keys at the start")
    dtype = dtype or case.dtype
    query_shape = (case.batch, case.seqlen_q, case.q_heads, case.head_dim)
    rows = (case.batch, case.seqlen_k)
    if case.page_size is not None:
        rows = (case.batch * case.seqlen_k // case.page_size, case.page_size)
    key_shape = (*rows, case.kv_heads, case.head_dim)
    value_shape = (*key_shape[:-1], case.head_dim_v)
    out_shape = (*query_shape[:-1], case.head_dim_v)

    @jax.jit
    def normal():
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = (query_shape, key_shape, value_shape, out_shape)
        return [
            jax.random.normal(key, shape, jnp.dtype(dtype))
            for key, shape in zip(keys, shapes, strict=True)
        ]

    query, key, value, out_gradient = normal()
    if pass_ == "fwd":
        forward = jax.jit(attention)
        return Step(lambda: forward(query, key, value, *integers), jax.block_until_ready, dtype)

    def linearized(*main):
        return jax.vjp(lambda *main: attention(*main, *integers), *main)

    _, vjp = jax.jit(linearized)(query, key, value)
    backward = jax.jit(lambda vjp, gradient: vjp(gradient))
    return Step(lambda: backward(vjp, out_gradient), jax.block_until_ready, dtype)
