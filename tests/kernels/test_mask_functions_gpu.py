"""Masks written as functions that the kernels take as intervals, on a GPU, against the reference.

That plain causal masks and windows written so are the kernels of ``is_causal`` and
``local_window_size`` is seen without a GPU (tests/unit/test_masks.py).
"""

import jax.numpy as jnp
import pytest

from jax_flashcute import explain, masks
from tests.cases import Case
from tests.compare import assert_close, out_lse_and_gradients

pytestmark = pytest.mark.gpu

CASES = {
    "chunked": Case(head_dim=64, head_dim_v=64, mask_mod=masks.chunked(80), group=3),
    "chunked_causal": Case(
        head_dim=128, head_dim_v=128, mask_mod=masks.chunked(100), causal=True, offset=True
    ),
    "blocks": Case(head_dim=128, head_dim_v=128, mask_mod=masks.block_diagonal(32, 50)),
    "prefix": Case(head_dim=64, head_dim_v=64, mask_mod=masks.prefix_lm(70), group=7),
    "prefix_window": Case(
        head_dim=256, head_dim_v=256, mask_mod=masks.prefix_lm(70), window=(90, None), lengths=True
    ),
    "compressed": Case(head_dim=128, head_dim_v=128, mask_mod=masks.compressed_causal(4), group=3),
    "complete_only": Case(
        head_dim=128,
        head_dim_v=128,
        mask_mod=masks.compressed_causal(4, complete_only=True),
        offset=True,
        lengths=True,
    ),
}
LENGTHS = [(129, 150), (1000, 257), (63, 1000), (1, 65)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, lengths: tuple[int, int]) -> None:
    seqlen_q, seqlen_k = lengths
    fields = {**vars(CASES[name]), "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    case = Case(**fields)
    arrays = case.arrays(jnp.bfloat16)
    explanation = explain(**arrays, **case.static, implementation="cute")
    assert (explanation.forward, explanation.backward) == ("cute", "cute")
    actual = out_lse_and_gradients(case, arrays, "cute")
    wide = {
        n: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for n, x in arrays.items()
    }
    assert_close(actual, out_lse_and_gradients(case, wide, "reference"), 3e-2)
