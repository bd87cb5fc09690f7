"""This library: its kernel on a GPU, its XLA path elsewhere."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers.jax_step import jax_step
from jax_flashcute import flash_attention


def available() -> str | None:
    return None


def build(case: Case, pass_: Pass) -> Step:
    # By name, so that a case without a kernel is refused and not measured as something else.
    implementation = "cute" if jax.default_backend() == "gpu" else "xla"
    attention = functools.partial(
        flash_attention, is_causal=case.causal, implementation=implementation
    )
    if case.kv_lengths is not None:
        lengths = jnp.asarray(case.kv_lengths, jnp.int32)
        attention = functools.partial(attention, key_value_seq_lengths=lengths)
    return jax_step(attention, case, pass_, takes_lengths=True)
