"""The Hopper forward in simulation on every feature: the edges that the GPU tests run, smaller."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import masks, reference
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.elements import element_operands
from jax_flashcute.kernels.key import OPTIONAL_OPERANDS
from jax_flashcute.spec import Operands
from tests.cases import Case
from tests.simulator import simulate
from tests.simulator.compiled import kernel_of as compiled

NUM_SMS = 2


def check(
    case: Case,
    dtype: str = "bfloat16",
    num_sms: int = NUM_SMS,
    arch: str = "sm_90a",
    **how,
):
    """Simulate the kernel that a call gets and compare with the dense reference."""
    arrays = case.arrays(jnp.dtype(dtype), poison=True)
    operands = Operands(**arrays, **case.batch_index())
    spec = case.spec()
    assert not registry.reasons_against(spec, operands, "fwd", arch)
    key = registry.kernel_key(spec, operands, "fwd", arch, num_sms)
    wide = {
        n: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for n, x in arrays.items()
    }
    want = jax.jit(lambda x: reference.attention(spec, Operands(**x)))(wide | case.batch_index())
    inputs = [operands.query, operands.key, operands.value]
    inputs += [arrays[n] for n in OPTIONAL_OPERANDS if n in arrays]
    inputs += [] if key.elements is None else element_operands(key.elements, operands)
    rows = (case.batch, case.seqlen_q, case.q_heads)
    outputs = [((*rows, case.head_dim_v), jnp.dtype(dtype)), (rows, np.dtype(np.float32))]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    out, lse, *_ = simulate(
        compiled(key), *(np.asarray(x) for x in inputs), outputs=outputs, **how
    )  # fmt: skip
    np.testing.assert_allclose(out.astype(np.float32), want.out, atol=0.02, rtol=0.02)
    np.testing.assert_allclose(lse, want.lse, atol=2e-4, rtol=1e-5)
    empty = np.isneginf(np.asarray(want.lse))
    assert (out[empty] == 0).all()
    return key


def sized(head_dim: int, head_dim_v: int | None = None, **kw) -> Case:
    shape = {"batch": 1, "kv_heads": 1, "seqlen_q": 150, "seqlen_k": 300} | kw
    return Case(head_dim=head_dim, head_dim_v=head_dim_v or head_dim, **shape)


EVERYTHING = {"batch": 3, "causal": True, "offset": True, "lengths": True}
# Masks of two and of three intervals, in several orders.
FIRST_KEYS = masks.Mask(lambda b, h, q, kv: kv < 70) | masks.sliding_window(40)
THREE = masks.Mask(
    lambda b, h, q, kv: (kv < 10) | ((kv >= q - 150) & (kv < q - 100)) | (kv >= q + 30)
)
CASES = {
    "64_first_keys": sized(64, mask_mod=FIRST_KEYS, seqlen_k=500, **EVERYTHING | {"causal": False}),
    "128_everything": sized(128, **EVERYTHING),
    "64_decode": sized(64, group=8, seqlen_q=1, seqlen_k=200, lengths=True, batch=2),
    "128_eight_rows": sized(128, group=4, seqlen_q=2, seqlen_k=600, **EVERYTHING),
    "72_40_window": sized(72, 40, window=(40, 10), offset=True),
    "64_chunked": sized(64, mask_mod=masks.chunked(80), causal=True, offset=True, batch=2),
}
SLOW_CASES = {
    "8": sized(8, kv_heads=2),
    "16_more_queries": sized(16, seqlen_q=300, seqlen_k=70, causal=True, offset=True),
    "64_everything": sized(64, group=3, **EVERYTHING),
    "64_256": sized(64, 256, causal=True),
    "96_lengths": sized(96, lengths=True, batch=3, group=2),
    "112_open_left": sized(112, window=(None, 5)),
    "128_open_right": sized(128, window=(70, None), lengths=True, batch=2),
    "128_groups_of_7": sized(128, group=7, seqlen_q=5, **EVERYTHING),
    "128_one_key": sized(128, seqlen_k=1),
    "128_one_row": sized(128, seqlen_q=1),
    "192_128": sized(192, 128, causal=True),
    "192": sized(192, **EVERYTHING),
    "256": sized(256, causal=True, group=2),
    "128_prefix": sized(128, mask_mod=masks.prefix_lm(140), group=2),
    "128_compressed": sized(128, mask_mod=masks.compressed_causal(3), seqlen_q=400, offset=True),
    "64_complete_only": sized(64, mask_mod=masks.compressed_causal(4, complete_only=True)),
    "256_prefix_window": sized(
        256, mask_mod=masks.prefix_lm(140), window=(90, None), lengths=True, batch=2
    ),
    "256_128_lengths": sized(256, 128, lengths=True, batch=2),
    "128_three": sized(128, mask_mod=THREE, seqlen_q=260, seqlen_k=500, group=2),
    "72_40_packed": sized(
        *(72, 40), mask_mod=~masks.sliding_window(60, 20), window=(200, 100), seqlen_q=5, group=7
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(c, id=n) for n, c in CASES.items()),
        *(pytest.param(c, id=n, marks=pytest.mark.slow) for n, c in SLOW_CASES.items()),
    ],
)
def test_feature(case: Case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("timing", "warps"), [("early", "adversarial"), ("shuffled", "seeded")])
def test_feature_under_any_timing(name: str, timing: str, warps: str):
    check(CASES[name], timing=timing, warps=warps, seed=3)


@pytest.mark.slow
def test_half_precision():
    check(dataclasses.replace(CASES["128_everything"], group=2), "float16")


EDGES = {"batch": 3, "offset": True, "lengths": True}
# Few queries and many keys: the keys are divided among blocks.
SPLIT_CASES = {
    "64_lengths": sized(64, group=8, seqlen_q=1, seqlen_k=1100, lengths=True, batch=4),
    "128_groups_of_7": sized(128, group=7, seqlen_q=3, seqlen_k=1300, causal=True, offset=True),
    "64_first_keys": sized(64, group=7, seqlen_q=3, seqlen_k=1700, mask_mod=FIRST_KEYS, **EDGES),
}
SLOW_SPLIT_CASES = {
    "128_groups_of_3": sized(128, group=3, seqlen_q=1, seqlen_k=1601, kv_heads=2),
    "128_groups_of_16": sized(128, group=16, seqlen_q=4, seqlen_k=1501, lengths=True, batch=3),
    "64_not_packed": sized(64, seqlen_q=64, seqlen_k=1100, causal=True, offset=True, kv_heads=2),
    "72_40_window": sized(72, 40, group=8, seqlen_q=2, seqlen_k=2000, window=(900, 20), **EDGES),
    "256": sized(256, group=3, seqlen_q=1, seqlen_k=900, lengths=True, batch=3),
    "192_128_many_entries": sized(
        192, 128, group=8, seqlen_q=1, seqlen_k=800, lengths=True, batch=40
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(c, id=n) for n, c in SPLIT_CASES.items()),
        *(pytest.param(c, id=n, marks=pytest.mark.slow) for n, c in SLOW_SPLIT_CASES.items()),
    ],
)
def test_split_kv(case: Case):
    assert check(case, num_sms=16).split_kv
