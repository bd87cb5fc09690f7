"""A copy on the device that reads and writes as many bytes as a decode call: memory's own speed."""

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step


def available() -> str | None:
    return None


def build(case: Case, pass_: Pass) -> Step:
    if not case.is_decode or pass_ == "bwd":
        raise NotImplementedError("a copy compares with decode calls alone")
    # Half of the bytes are read, half are written.
    source = jnp.ones((int(case.bytes(case.dtype)) // 8,), jnp.float32)
    copy = jax.jit(lambda x: jnp.copy(x))
    return Step(lambda: copy(source), jax.block_until_ready, case.dtype)
