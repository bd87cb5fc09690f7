"""This library: its kernel on a GPU, its XLA path elsewhere."""

import functools

import jax
import jax.numpy as jnp

from benchmarks import nsa
from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers.jax_step import jax_step
from jax_flashcute import flash_attention, paged_attention


def available() -> str | None:
    return None


def build(case: Case, pass_: Pass) -> Step:
    # By name, so that a case without a kernel is refused and not measured as something else.
    implementation = "cute" if jax.default_backend() == "gpu" else "xla"
    if case.is_nsa:
        return nsa.build(case, pass_, implementation)
    if case.page_size is not None:
        table = jnp.asarray(case.page_table())
        lengths = jnp.full((case.batch,), case.seqlen_k, jnp.int32)

        def paged(query: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> jax.Array:
            return paged_attention(
                *(query, k_pages, v_pages, table, lengths),
                is_causal=case.causal,
                implementation=implementation,
            )

        return jax_step(paged, case, pass_, takes_pages=True, aligns_ends=True)
    attention = functools.partial(
        flash_attention,
        is_causal=case.causal,
        q_offset=case.seqlen_k - case.seqlen_q if case.causal else 0,
        implementation=implementation,
    )
    if case.kv_lengths is not None:
        lengths = jnp.asarray(case.kv_lengths, jnp.int32)
        attention = functools.partial(attention, key_value_seq_lengths=lengths)
    return jax_step(attention, case, pass_, takes_lengths=True, aligns_ends=True)
