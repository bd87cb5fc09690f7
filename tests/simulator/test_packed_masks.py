"""Masks in bits, forward and backward on Hopper, in simulation, against the reference."""

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
