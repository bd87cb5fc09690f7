"""Tokamax's Mosaic GPU kernels."""

import functools

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers import cannot_import
from benchmarks.peers.jax_step import jax_step, no_gpu


def available() -> str | None:
    return no_gpu() or cannot_import("tokamax")


def build(case: Case, pass_: Pass) -> Step:
    import tokamax

    attention = functools.partial(
        tokamax.dot_product_attention, is_causal=case.causal, implementation="mosaic"
    )
    return jax_step(attention, case, pass_)
