"""The Hopper backward over packed sequences, in simulation, against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import masks, reference
from jax_flashcute.ffi.call import other_inputs
from jax_flashcute.kernels import registry
from jax_flashcute.spec import Operands
from tests.simulator import simulate
from tests.simulator.test_forward_elements import widened
from tests.simulator.test_forward_features import compiled
from tests.simulator.test_forward_segments import CASES, PACKED, PAIR, call_of

MAIN = ("query", "key", "value")
TOLERANCE = 8e-3
"""Relative error of a gradient in the Frobenius norm: products of bfloat16 probabilities."""


def check_backward(spec, operands, arch="sm_90a", **how):
    """Simulate the kernel that a call gets and compare with the dense reference."""
    dtype = operands.query.dtype
    assert not registry.reasons_against(spec, operands, "bwd", arch)
    key = registry.kernel_key(spec, operands, "bwd", arch, 0)
    wide = widened(operands)
    main = {n: getattr(wide, n) for n in MAIN}
    others = {n: x for n, x in vars(wide).items() if n not in MAIN}

    @jax.jit
    def attend(main):
        found = reference.attention(spec, Operands(**main, **others))
        return found.out, found.lse

    (out, lse), pull = jax.vjp(attend, main)
    draw = np.random.default_rng(1).standard_normal
    d_out = jnp.asarray(draw(out.shape), dtype)
    d_lse = jnp.asarray(draw(lse.shape), jnp.float32)
    alive = ~jnp.isinf(lse)
    (want,) = pull(
        (jnp.where(alive[..., None], d_out.astype(jnp.float32), 0), jnp.where(alive, d_lse, 0))
    )
    inputs = [*(getattr(operands, n) for n in MAIN), out.astype(dtype), lse, d_out, d_lse]
    inputs += other_inputs(key, spec, operands)
    outputs = [(want[n].shape, dtype) for n in MAIN]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    found = simulate(compiled(key), *(np.asarray(x) for x in inputs), outputs=outputs, **how)
    for name, got in zip(MAIN, found, strict=False):
        expected = np.asarray(want[name], np.float64)
        got = np.asarray(got).astype(np.float64)
        assert np.isfinite(got).all(), name
        error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-2)
        assert error < TOLERANCE, (name, error)
        # Where nothing is seen gradients are zero, not merely small.
        assert (got[(expected == 0).all(-1)] == 0).all(), name
    return found


BACKWARD = CASES | {
    "pair_window_128": (
        (1, 340, 270),
        {**PAIR, "positions": "segment", "local_window_size": (40, 60), "head_dim": 128},
    ),
    "causal_256": ((2, 300, 300), {**PACKED, "is_causal": True, "head_dim": 256}),
    "compressed": (
        (1, 340, 270),
        {**PAIR, "positions": "segment", "mask_mod": masks.compressed_causal(2)},
    ),
}
FIRST = {"first_keys", "first_keys_pair", "first_keys_scattered"}
SLOW = FIRST | {"packed_heads", "compressed", "pair_window", "causal", "elements", "causal_256"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in BACKWARD]
)
def test_segments(name: str):
    lengths, arguments = BACKWARD[name]
    check_backward(*call_of(lengths, **arguments))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "scattered")) for n in BACKWARD]
)
def test_deterministic(name: str):
    """Blocks of keys that see no row of a query tile stand between some that do."""
    lengths, arguments = BACKWARD[name]
    check_backward(*call_of(lengths, **arguments, deterministic=True))


def test_keys_beyond_the_array_are_hidden():
    """Their zeros are scores far above these, of which dS would be infinite and dQ NaN."""
    ids = np.zeros((1, 40), np.int32), np.zeros((1, 130), np.int32)
    spec, operands = call_of((1, 40, 130), scale=0.6, segment_ids=ids, dtype=jnp.float16)
    signs = {"query": jnp.abs(operands.query), "key": -jnp.abs(operands.key)}
    check_backward(spec, dataclasses.replace(operands, **signs))


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize(("timing", "warps"), [("early", "adversarial"), ("shuffled", "seeded")])
def test_segments_under_any_timing(name: str, timing: str, warps: str):
    lengths, arguments = BACKWARD[name]
    check_backward(*call_of(lengths, **arguments), timing=timing, warps=warps, seed=3)
