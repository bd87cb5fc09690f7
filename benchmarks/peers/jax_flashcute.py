"""This library: its kernel on a GPU, its XLA path elsewhere."""

import functools

import jax
import jax.numpy as jnp

from benchmarks import functions, nsa
from benchmarks.cases import BUILDING, SPARSE_TILE, Case, Pass
from benchmarks.measure import Step
from benchmarks.peers.jax_step import jax_step
from jax_flashcute import (
    BlockMask,
    flash_attention,
    make_block_mask,
    masks,
    paged_attention,
)


def available() -> str | None:
    return None


def build(case: Case, pass_: Pass) -> Step:
    if case.name == BUILDING:
        return _building(case, pass_)
    # By name, so that a case without a kernel is refused and not measured as something else.
    implementation = "cute" if jax.default_backend() == "gpu" else "xla"
    if case.is_nsa:
        return nsa.build(case, pass_, implementation)
    if case.page_size is not None:
        paged = functools.partial(
            paged_attention, is_causal=case.causal, implementation=implementation
        )
        lengths = jnp.full((case.batch,), case.seqlen_k, jnp.int32)
        integers = jnp.asarray(case.page_table()), lengths
        return jax_step(paged, case, pass_, integers=integers, takes_pages=True, aligns_ends=True)
    attention = functools.partial(
        flash_attention,
        is_causal=case.causal,
        q_offset=case.seqlen_k - case.seqlen_q if case.causal else 0,
        implementation=implementation,
    )
    if case.has_function:
        attention = functools.partial(
            attention,
            mask_mod=functions.mask_mod(case.name, case.seqlen_k, jnp),
            score_mod=functions.score_mod(case.name, case.seqlen_k, case.q_heads, jnp),
        )
    if case.kept is not None:
        lists = case.tile_lists()
        blocks = BlockMask.from_lists(
            [[]] * len(lists),
            lists,
            q_length=case.seqlen_q,
            kv_length=case.seqlen_k,
            tile_m=SPARSE_TILE,
            tile_n=SPARSE_TILE,
        )
        attention = functools.partial(attention, block_mask=blocks)
    if case.documents is not None:
        ends = jnp.cumsum(jnp.asarray((0, *case.documents), jnp.int32))
        # In the timed step: what the boundaries become is a part of it.
        attention = functools.partial(attention, cu_seqlens_q=ends)
    integers = () if case.kv_lengths is None else (jnp.asarray(case.kv_lengths, jnp.int32),)

    def step(query: jax.Array, key: jax.Array, value: jax.Array, lengths=None) -> jax.Array:
        return attention(query, key, value, key_value_seq_lengths=lengths)

    return jax_step(step, case, pass_, integers=integers, takes_all=True, aligns_ends=True)


def _building(case: Case, pass_: Pass) -> Step:
    """Lists of a causal mask's tiles."""
    if pass_ == "bwd":
        raise NotImplementedError("lists have no backward pass")
    tile = {"tile_m": SPARSE_TILE, "tile_n": SPARSE_TILE}
    sizes = (case.batch, case.q_heads, case.seqlen_q, case.seqlen_k)
    make = jax.jit(lambda: make_block_mask(masks.causal, *sizes, **tile))
    return Step(make, jax.block_until_ready, case.dtype)
