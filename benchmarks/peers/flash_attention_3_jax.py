"""FlashAttention-3's CUDA C++ kernels through flash-attn3-jax (its wheel: head_dim 128 only)."""

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers import cannot_import
from benchmarks.peers.jax_step import jax_step, no_gpu


def available() -> str | None:
    return no_gpu() or cannot_import("flash_attn3_jax")


def build(case: Case, pass_: Pass) -> Step:
    from flash_attn3_jax import flash_mha

    if case.head_dim != 128 or case.head_dim_v != 128:
        raise NotImplementedError("the published wheel holds kernels for head_dim 128 alone")
    return jax_step(
        lambda q, k, v: flash_mha(q, k, v, is_causal=case.causal), case, pass_, aligns_ends=True
    )
