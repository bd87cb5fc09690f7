"""A copy on the device of as many bytes as a call that memory bounds: memory's own speed."""

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step


def available() -> str | None:
    return None


def build(case: Case, pass_: Pass) -> Step:
    if not case.is_memory_bound or (case.is_decode and pass_ == "bwd"):
        raise NotImplementedError("a copy compares with calls alone whose bytes set the pace")
    # Half of the bytes are read, half are written.
    source = jnp.ones((int(case.bytes(case.dtype, pass_)) // 8,), jnp.float32)
    copy = jax.jit(lambda x: jnp.copy(x))
    return Step(lambda: copy(source), jax.block_until_ready, case.dtype)
