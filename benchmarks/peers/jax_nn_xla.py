"""jax.nn.dot_product_attention in plain XLA, which holds all scores in memory."""

import functools

import jax

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers.jax_step import jax_step


def available() -> str | None:
    return None


def build(case: Case, pass_: Pass) -> Step:
    attention = functools.partial(
        jax.nn.dot_product_attention, is_causal=case.causal, implementation="xla"
    )
    return jax_step(attention, case, pass_)
