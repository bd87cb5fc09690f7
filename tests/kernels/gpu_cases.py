"""What the tests of the kernels on a GPU share: arrays made on the host, kernels compiled first."""

import concurrent.futures
import math
import multiprocessing
import os
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashcute import plan
from jax_flashcute.ffi import store
from jax_flashcute.kernels.key import Direction, KernelKey
from jax_flashcute.spec import AttentionSpec, Operands
from tests.cases import Case

BF16, FP16 = "bfloat16", "float16"
UNIT_ROUNDOFF = {BF16: 2.0**-8, FP16: 2.0**-11}


def host_arrays(case: Case, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The case's arrays, made without a GPU kernel per shape."""
    with jax.default_device("cpu"):
        return jax.tree.map(np.asarray, case.arrays(dtype, seed))


def key_of(
    case: Case, dtype: str, direction: Direction = "fwd", *, deterministic: bool = False
) -> KernelKey:
    """The compile key of a case's kernel."""
    kv = (case.batch, case.seqlen_k, case.kv_heads)
    query = (case.batch, case.seqlen_q, case.q_heads, case.head_dim)
    integers = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    operands = Operands(
        query=jax.ShapeDtypeStruct(query, dtype),
        key=jax.ShapeDtypeStruct((*kv, case.head_dim), dtype),
        value=jax.ShapeDtypeStruct((*kv, case.head_dim_v), dtype),
        q_offset=integers if case.offset else None,
        query_seq_lengths=integers if case.lengths else None,
        key_value_seq_lengths=integers if case.lengths else None,
    )
    scale = 1 / math.sqrt(case.head_dim)
    spec = AttentionSpec(scale, case.causal, case.window, deterministic=deterministic)
    return plan.make_plan(spec, operands, direction)


def compile_in_parallel(keys: Iterable[KernelKey]) -> None:
    """Compiles kernels by several processes; the store hands them to this one.

    The workers of pytest-xdist share the processors, and each starts at another kernel, so that
    they wait for each other as little as can be.
    """
    missing = sorted((key for key in set(keys) if not store.contains(key)), key=repr)
    if not missing:
        return
    sharing = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = len(missing) * (own % sharing) // sharing
    workers = min(len(missing), max(1, (os.cpu_count() or 1) // sharing))
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn")
    ) as pool:
        for kernel in pool.map(store.get, missing[first:] + missing[:first]):
            assert kernel.object
