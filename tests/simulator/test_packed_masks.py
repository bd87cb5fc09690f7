"""Masks in bits, given or packed in the call, forward and backward on Hopper, in simulation.

Against the reference.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute.kernels import registry
from tests.simulator.test_backward_segments import check_backward
from tests.simulator.test_forward_segments import call_of, check_forward

rng = np.random.default_rng(6)


def words(*shape: int) -> jnp.ndarray:
    return jnp.asarray(rng.integers(0, 2**32, shape, np.uint32))


CASES = {
    "groups": (
        (2, 150, 300),
        {
            "packed_mask": words(2, 6, 150, 10).at[:, :, 7].set(0), "is_causal": True,
            "heads": (6, 2), "q_offset": jnp.array([150, 9]),
            "key_value_seq_lengths": jnp.array([300, 133]),
            "query_seq_lengths": jnp.array([150, 70]),
        },
    ),
    "one_row": (
        (2, 70, 290),
        {"packed_mask": words(2, 1, 1, 10), "head_dim": 128, "mask_mod": lambda b, h, q, kv: (
            (kv < 40) | (kv >= q + 70)
        )},
    ),
    "packed_heads": ((1, 9, 270), {"packed_mask": words(1, 7, 9, 9), "heads": (7, 1)}),
    # Key tiles that begin in the midst of a word.
    "192_128": ((1, 70, 250), {"packed_mask": words(1, 1, 70, 8), "head_dim": 192}),
}  # fmt: skip
SLOW = {
    ("fwd", "one_row"),
    ("fwd", "packed_heads"),
    ("bwd", "one_row"),
    ("bwd", "packed_heads"),
    ("bwd", "192_128"),
}


@pytest.mark.parametrize(
    ("direction", "name"),
    [
        pytest.param(direction, name, marks=[pytest.mark.slow] * ((direction, name) in SLOW))
        for direction in ("fwd", "bwd")
        for name in CASES
    ],
)
def test_words(direction: str, name: str) -> None:
    lengths, arguments = CASES[name]
    spec, operands = call_of(lengths, **arguments)
    assert not registry.reasons_against(spec, operands, direction, "sm_90a")
    {"fwd": check_forward, "bwd": check_backward}[direction](spec, operands)


def bits(*shape: int) -> jnp.ndarray:
    return jnp.asarray(rng.random(shape) < 0.5)


PACKED = {
    "groups": (
        (2, 150, 301),
        {
            "mask": bits(1, 6, 150, 301).at[:, :, 7].set(False), "is_causal": True,
            "heads": (6, 2), "q_offset": jnp.array([150, 9]),
            "key_value_seq_lengths": jnp.array([301, 133]),
            "query_seq_lengths": jnp.array([150, 70]),
        },
    ),
    "keys_of_heads": ((2, 129, 97), {"mask": bits(1, 2, 1, 97), "heads": (2, 1), "head_dim": 128}),
    "packed_heads": ((1, 65, 270), {"mask": bits(1, 7, 65, 270), "heads": (7, 1)}),
    # A bias whose tiles come to shared memory.
    "staged_bias": (
        (1, 140, 256),
        {
            "mask": bits(1, 1, 140, 256), "heads": (2, 2),
            "bias": jnp.asarray(rng.random((1, 1, 140, 256)), jnp.float32),
        },
    ),
    # What scores add is added by the product.
    "192_added": (
        (1, 70, 250),
        {
            "mask": bits(1, 1, 70, 250), "head_dim": 192,
            "score_mod": lambda score, b, h, q, kv: score - 0.125 * (q - kv),
        },
    ),
}  # fmt: skip
KEPT_BY_BACKWARD = {"keys_of_heads", "packed_heads", "192_added"}
SLOW_PACKED = {(d, n) for d in ("fwd", "bwd") for n in PACKED if n != "groups"}


@pytest.mark.parametrize(
    ("direction", "name"),
    [
        pytest.param(direction, name, marks=[pytest.mark.slow] * ((direction, name) in SLOW_PACKED))
        for direction in ("fwd", "bwd")
        for name in PACKED
    ],
)
def test_booleans_packed_in_the_call(
    monkeypatch: pytest.MonkeyPatch, direction: str, name: str
) -> None:
    monkeypatch.setattr(registry, "LEAST_SCORES_FOR_WORDS", 1)
    lengths, arguments = PACKED[name]
    spec, operands = call_of(lengths, **arguments)
    spec = dataclasses.replace(spec, constants=("bias",))
    key = registry.kernel_key(spec, operands, direction, "sm_90a", 132)
    of_elements = key.elements is not None and key.elements.mask is not None
    is_kept = direction == "bwd" and name in KEPT_BY_BACKWARD
    assert (key.packed_mask is None) == of_elements == is_kept
    {"fwd": check_forward, "bwd": check_backward}[direction](spec, operands)
