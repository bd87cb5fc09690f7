"""Split-KV on a GPU: few queries and many keys, against float64 on the host."""

import pytest

from tests.cases import Case
from tests.kernels.gpu_cases import BF16, compile_in_parallel, host_arrays, key_of
from tests.kernels.test_forward_gpu import exact_attention, run, what_is_wrong

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
