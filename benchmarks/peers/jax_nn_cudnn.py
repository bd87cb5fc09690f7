"""cuDNN's attention through jax.nn.dot_product_attention."""

import functools

import jax

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers.jax_step import jax_step, no_gpu


def available() -> str | None:
    return no_gpu()


def build(case: Case, pass_: Pass) -> Step:
    attention = functools.partial(
        jax.nn.dot_product_attention, is_causal=case.causal, implementation="cudnn"
    )
    return jax_step(attention, case, pass_)
