"""FlashAttention-3's CUDA C++ kernels through flash-attn3-jax (its wheel: head_dim 128 only).

It takes its number of splits from the caller: for decode the best one is found by trying.
"""

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step, fastest
from benchmarks.peers import cannot_import
from benchmarks.peers.jax_step import jax_step, no_gpu

SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)


def available() -> str | None:
    return no_gpu() or cannot_import("flash_attn3_jax")


def build(case: Case, pass_: Pass) -> Step:
    if case.head_dim != 128 or case.head_dim_v != 128:
        raise NotImplementedError("the published wheel holds kernels for head_dim 128 alone")
    if case.is_decode or case.page_size is not None:
        if pass_ == "bwd":
            raise NotImplementedError("attention over a cache has no backward pass")
        splits = SPLITS if case.is_decode else (1,)
        return fastest((f"num_splits={n}", lambda n=n: _cached(case, n)) for n in splits)
    from flash_attn3_jax import flash_mha

    return jax_step(
        lambda q, k, v: flash_mha(q, k, v, is_causal=case.causal), case, pass_, aligns_ends=True
    )


def _cached(case: Case, num_splits: int) -> Step:
    from flash_attn3_jax import flash_mha_with_kvcache

    integers = (jnp.asarray(case.kv_lengths or [case.seqlen_k] * case.batch, jnp.int32),)
    if case.page_size is not None:
        integers += (jnp.asarray(case.page_table()),)

    def attention(query: jax.Array, key: jax.Array, value: jax.Array, lengths, table=None):
        return flash_mha_with_kvcache(
            query,
            key,
            value,
            cache_seqlens=lengths,
            page_table=table,
            is_causal=case.causal,
            num_splits=num_splits,
        )

    return jax_step(
        *(attention, case, "fwd"),
        integers=integers,
        takes_all=case.is_decode,
        takes_pages=True,
        aligns_ends=True,
    )
