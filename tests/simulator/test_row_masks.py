"""Masks whose interval of keys is read from arrays, forward and backward, in simulation."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import masks
from jax_flashcute.kernels import masking
from tests.simulator.test_backward_segments import check_backward
from tests.simulator.test_forward_segments import call_of, check_forward

rng = np.random.default_rng(5)
OFFSETS = jnp.asarray([0, 0, 3, 70, 131, 250, 280])
# Up and down and empty here and there, another for each batch entry.
LOWS = jnp.asarray(rng.integers(-9, 290, (2, 200)), jnp.int32)
WIDTHS = jnp.asarray(rng.integers(-20, 90, (2, 200)), jnp.int32)

CASES = {
    "documents": (
        (2, 270, 290),
        {
            "mask_mod": masks.documents_by_offsets(OFFSETS, 280), "is_causal": True,
            "heads": (3, 1), "q_offset": jnp.array([0, 9]),
            "key_value_seq_lengths": jnp.array([290, 100]),
            "query_seq_lengths": jnp.array([150, 270]),
        },
    ),
    "scattered": (
        (2, 200, 280),
        {"mask_mod": lambda b, h, q, kv: (kv >= LOWS[b, q]) & (kv < LOWS[b, q] + WIDTHS[b, q])},
    ),
    "prefixes": (
        (2, 130, 260),
        {
            "mask_mod": masks.prefix_lm(jnp.array([0, 140])) & masks.padding(jnp.array([250, 170])),
            "head_dim": 128,
        },
    ),
}  # fmt: skip
# Rows take turns in an order that is counted before the kernel.
CASES["in_turns"] = (CASES["documents"][0], {**CASES["documents"][1], "deterministic": True})
SLOW = {
    ("fwd", "in_turns"),
    ("bwd", "in_turns"),
    ("bwd", "documents"),
    ("fwd", "scattered"),
    ("fwd", "prefixes"),
    ("bwd", "prefixes"),
}


@pytest.mark.parametrize(
    ("direction", "name"),
    [
        pytest.param(direction, name, marks=[pytest.mark.slow] * ((direction, name) in SLOW))
        for direction in ("fwd", "bwd")
        for name in CASES
    ],
)
def test_rows(direction: str, name: str) -> None:
    lengths, arguments = CASES[name]
    spec, operands = call_of(lengths, **arguments)
    assert masking.rows_of(spec, operands) is not None
    {"fwd": check_forward, "bwd": check_backward}[direction](spec, operands)
