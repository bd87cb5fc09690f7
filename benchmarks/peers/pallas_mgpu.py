"""The attention kernel that JAX ships in Pallas for Mosaic GPU.

It runs in float16, since its bfloat16 path fails to compile, and has no causal backward pass.
"""

import functools

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers import cannot_import
from benchmarks.peers.jax_step import jax_step, no_gpu

MODULE = "jax.experimental.pallas.ops.gpu.attention_mgpu"

# The largest key block whose two stages fit into shared memory.
KEY_BLOCK = {64: 256, 128: 128, 256: 64}


def available() -> str | None:
    return no_gpu() or cannot_import(MODULE)


def build(case: Case, pass_: Pass) -> Step:
    from jax.experimental.pallas.ops.gpu.attention_mgpu import TuningConfig, attention

    if case.head_dim not in KEY_BLOCK or case.head_dim_v != case.head_dim:
        raise NotImplementedError(f"no tile sizes for head_dim {case.head_dim}")
    backward = {}
    if pass_ == "bwd":
        backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
    config = TuningConfig(
        block_q=64,
        block_kv=KEY_BLOCK[case.head_dim],
        max_concurrent_steps=2,
        causal=case.causal,
        **backward,
    )
    return jax_step(functools.partial(attention, config=config), case, pass_, dtype="float16")
