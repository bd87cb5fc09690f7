"""The Hopper forward over packed sequences, in simulation, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import masks, reference
from jax_flashcute.arguments import checked_call
from jax_flashcute.ffi.call import other_inputs
from jax_flashcute.kernels import registry
from tests.simulator import simulate
from tests.simulator.test_forward_elements import widened
from tests.simulator.test_forward_features import FIRST_KEYS, NUM_SMS, compiled

rng = np.random.default_rng(0)


def call_of(
    lengths, heads=(1, 1), head_dim=64, seed=0, dtype=jnp.bfloat16, head_dim_v=None, **arguments
):
    """The spec and the operands of a call; ``lengths``: batch, T, S."""
    draw = np.random.default_rng(seed).standard_normal
    (B, T, S), (N, K) = lengths, heads
    defaults = {
        "bias": None, "mask": None, "scale": None, "is_causal": False, "q_offset": 0,
        "query_seq_lengths": None, "key_value_seq_lengths": None, "local_window_size": None,
        "logits_soft_cap": None, "sinks": None, "mask_mod": None, "score_mod": None,
        "block_mask": None, "segment_ids": None, "cu_seqlens_q": None, "cu_seqlens_k": None,
        "positions": None, "deterministic": False,
    }  # fmt: skip
    main = [
        jnp.asarray(draw((B, rows, heads, width)), dtype)
        for rows, heads, width in (
            (T, N, head_dim),
            (S, K, head_dim),
            (S, K, head_dim_v or head_dim),
        )
    ]
    if "cu_seqlens_q" in arguments:
        q_ends = arguments["cu_seqlens_q"]
        k_ends = arguments.get("cu_seqlens_k", q_ends)
        ends = [np.asarray(e)[..., -1:] for e in (q_ends, k_ends, k_ends)]
        beyond = [np.arange(x.shape[1]) >= e for x, e in zip(main, ends, strict=True)]
        main = [
            jnp.where(b[..., None, None], jnp.nan, x) for x, b in zip(main, beyond, strict=True)
        ]
    return checked_call(*main, **defaults | arguments)


def check_forward(spec, operands, arch="sm_90a", **how):
    """Simulate the kernel that a call gets and compare with the dense reference."""
    assert not registry.reasons_against(spec, operands, "fwd", arch)
    key = registry.kernel_key(spec, operands, "fwd", arch, NUM_SMS)
    want = jax.jit(functools.partial(reference.attention, spec))(widened(operands))
    main = [operands.query, operands.key, operands.value]
    outputs = [(want.out.shape, jnp.dtype(jnp.bfloat16)), (want.lse.shape, np.dtype(np.float32))]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    arrays = [*main, *other_inputs(key, spec, operands)]
    out, lse, *_ = simulate(
        compiled(key), *(np.asarray(x) for x in arrays), outputs=outputs, **how
    )  # fmt: skip
    np.testing.assert_allclose(out.astype(np.float32), want.out, atol=0.02, rtol=0.02)
    np.testing.assert_allclose(lse, want.lse, atol=2e-4, rtol=1e-5)
    empty = (np.asarray(want.out) == 0).all(-1)
    assert (out[empty] == 0).all()
    return out, lse


# Segments of unequal lengths, empty ones and a tail of padding.
PACKED = {"cu_seqlens_q": [[0, 0, 1, 90, 90, 230, 290], [0, 64, 64, 128, 300, 300, 300]]}
PAIR = {
    "cu_seqlens_q": [0, 3, 3, 100, 333],
    "cu_seqlens_k": [0, 130, 150, 150, 262],
}


def scattered(shape, segments, padding=0.1):
    ids = rng.integers(0, segments, shape)
    return np.where(rng.random(shape) < padding, -1, ids)


CASES = {
    "causal": ((2, 300, 300), {"is_causal": True, **PACKED}),
    "pair_window": (
        (1, 340, 270),
        {**PAIR, "positions": "segment", "local_window_size": (40, 60), "q_offset": jnp.array([7])},
    ),
    "groups_lengths": (
        (2, 300, 300),
        {
            **PACKED, "heads": (4, 1), "head_dim": 128, "mask_mod": masks.chunked(70),
            "key_value_seq_lengths": jnp.array([100, 300]),
            "query_seq_lengths": jnp.array([250, 131]),
        },
    ),
    "first_keys": (
        (2, 300, 300),
        {
            **PACKED, "heads": (3, 1), "mask_mod": FIRST_KEYS,
            "key_value_seq_lengths": jnp.array([100, 300]),
            "query_seq_lengths": jnp.array([250, 131]),
        },
    ),
    "first_keys_pair": (
        (1, 340, 270), {**PAIR, "positions": "segment", "mask_mod": FIRST_KEYS},
    ),
    "first_keys_scattered": (
        (1, 150, 290),
        {
            "segment_ids": (scattered((1, 150), 3), scattered((1, 290), 3)),
            "positions": "sequence", "mask_mod": FIRST_KEYS, "q_offset": jnp.array([130]),
        },
    ),
    "packed_heads": (
        (1, 9, 260),
        {
            "heads": (7, 1), "positions": "sequence",
            "segment_ids": (np.repeat([0, 1, 5], 3)[None], np.repeat([0, 1, -1, 5], 65)[None]),
        },
    ),
    "scattered": (
        (1, 150, 290),
        {
            "segment_ids": (scattered((1, 150), 3), scattered((1, 290), 3)),
            "positions": "segment", "is_causal": True, "q_offset": jnp.array([3]),
        },
    ),
    "elements": (
        (1, 260, 260),
        {
            "segment_ids": np.repeat([[4, 2, 9, -1]], 65, axis=1), "positions": "segment",
            "score_mod": lambda s, b, h, q, kv: s - 0.1 * jnp.abs(q - kv),
            "mask_mod": lambda b, h, q, kv: (kv <= q) & ((q + kv) % 3 != 0),
        },
    ),
}  # fmt: skip


SLOW = {"causal", "packed_heads", "elements", "first_keys_pair", "first_keys_scattered"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_segments(name: str):
    lengths, arguments = CASES[name]
    check_forward(*call_of(lengths, **arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("timing", "warps"), [("early", "adversarial"), ("shuffled", "seeded")])
def test_segments_under_any_timing(name: str, timing: str, warps: str):
    lengths, arguments = CASES[name]
    check_forward(*call_of(lengths, **arguments), timing=timing, warps=warps, seed=3)
