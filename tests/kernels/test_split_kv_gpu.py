"""Split-KV on a GPU: few queries and many keys, against float64 on the host."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import explain, flash_attention
from tests.cases import Case
from tests.kernels.gpu_cases import BF16, compile_in_parallel, host_arrays, key_of
from tests.kernels.test_elements_gpu import close
from tests.kernels.test_forward_gpu import exact_attention, run, what_is_wrong
from tests.user_functions import MASKS, SCORES

pytestmark = pytest.mark.gpu


def few_queries(
    batch: int, seqlen_q: int, seqlen_k: int, kv_heads: int, group: int, *dims: int, **features
) -> Case:
    return Case(batch, seqlen_q, seqlen_k, kv_heads, group, dims[0], dims[-1], **features)


CASES = [
    few_queries(1, 1, 131072, 2, 4, 128),
    few_queries(1, 1, 10001, 1, 1, 128, causal=True, offset=True),
    few_queries(7, 1, 9000, 2, 8, 128, lengths=True),
    few_queries(7, 4, 9000, 2, 16, 128, lengths=True, causal=True, offset=True),
    few_queries(3, 2, 5000, 2, 3, 64, lengths=True),
    few_queries(40, 1, 3000, 1, 7, 64, lengths=True),
    few_queries(2, 64, 5000, 1, 1, 128, causal=True, offset=True),
    few_queries(2, 1, 9000, 2, 8, 128, window=(6000, 100), offset=True),
    few_queries(2, 1, 4097, 1, 8, 256, lengths=True),
    few_queries(2, 1, 4097, 1, 8, 192, 128, lengths=True),
    few_queries(2, 1, 4097, 1, 8, 72, 40, lengths=True),
]


@pytest.fixture(scope="module")
def compiled() -> None:
    compile_in_parallel(key_of(case, BF16) for case in CASES)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    assert key_of(case, BF16).split_kv
    for seed in range(3):
        arrays = host_arrays(case, BF16, seed)
        out, lse = run(case, arrays)
        assert not what_is_wrong(case, BF16, exact_attention(case, arrays), out, lse)


DECODE = few_queries(
    *(4, 3, 4097, 2, 7, 128), lengths=True, causal=True, offset=True, window=(3900, None)
)
LONE = few_queries(1, 1, 30001, 1, 8, 64)
FEATURES = {
    "sinks": {"sinks": True},
    "soft_cap": {"soft_cap": 2.0},
    "bias": {"bias": "bns"},
    "mask": {"mask": "bnts"},
    "everything": {"soft_cap": 2.0, "bias": "ns", "mask": "bs", "sinks": True},
}
FUNCTIONS = {
    "score": ("relative_bias", None),
    "mask": (None, "documents"),
    "both": ("alibi", "boolean_table"),
}


def check_elements(case: Case, score_mod: str | None = None, mask_mod: str | None = None) -> None:
    """The kernel with splits against the dense reference in float32 on the same inputs."""
    arrays = case.arrays(jnp.bfloat16)
    functions = {
        "score_mod": None if score_mod is None else SCORES[score_mod](case),
        "mask_mod": None if mask_mod is None else MASKS[mask_mod](case),
    }
    features = case.static | functions
    assert (explain(**features, **arrays).splits or 1) > 1

    def attend(implementation, arrays):
        call = functools.partial(flash_attention, implementation=implementation, **features)
        return jax.jit(lambda arrays: call(return_residual=True, **arrays))(arrays)

    got = attend("cute", arrays)
    wide = {n: arrays[n].astype(jnp.float32) for n in ("query", "key", "value")}
    want = attend("reference", arrays | wide)
    close("out", got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("case", [DECODE, LONE], ids=["decode", "lone"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_operands(case: Case, features: dict) -> None:
    check_elements(dataclasses.replace(case, **features))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions(functions: tuple[str | None, str | None], sinks: bool) -> None:
    check_elements(dataclasses.replace(DECODE, sinks=sinks), *functions)
