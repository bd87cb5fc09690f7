"""This library's dense attention over no more than a sparse, packed or scored case needs.

Of lists: as many key tiles in a row as every list names.  Of documents: each one on its own, one
call after the other.  Of a score: the same call without it.  What a case takes above that, in the
same rounds and at the same clocks, is the price of its lists, its packing or its score.
"""

import dataclasses
from functools import partial

import jax

from benchmarks import functions
from benchmarks.cases import SPARSE_TILE, Case, Pass
from benchmarks.measure import Step
from benchmarks.peers.jax_step import jax_step
from jax_flashcute import flash_attention


def available() -> str | None:
    return None


def build(case: Case, pass_: Pass) -> Step:
    implementation = "cute" if jax.default_backend() == "gpu" else "xla"
    attention = partial(flash_attention, is_causal=case.causal, implementation=implementation)
    if case.kept is not None:
        keys = SPARSE_TILE * len(case.tile_lists()[0])
        return jax_step(attention, _dense(case, case.seqlen_q, keys), pass_)
    if case.documents is not None:
        steps = [jax_step(attention, _dense(case, n, n), pass_) for n in case.documents]
        return Step(lambda: [step.call() for step in steps], jax.block_until_ready, case.dtype)
    if case.name in functions.SCORES:
        return jax_step(attention, dataclasses.replace(case, name="full"), pass_)
    raise NotImplementedError("compares with lists, documents and scores alone")


def _dense(case: Case, queries: int, keys: int) -> Case:
    return dataclasses.replace(case, name="dense", seqlen_q=queries, seqlen_k=keys)
