"""The Blackwell kernels over lists, packed sequences, bounds in arrays and masks in bits."""

import dataclasses

import jax.numpy as jnp
import pytest

from jax_flashcute.block_mask import BlockMask
from jax_flashcute.kernels import registry
from tests.simulator import test_block_lists as lists
from tests.simulator import test_packed_masks as packed
from tests.simulator import test_row_masks as rows
from tests.simulator.test_backward_segments import BACKWARD, check_backward
from tests.simulator.test_forward_segments import CASES, call_of, check_forward, scattered

ARCH = "sm_100a"
CHECKS = {"fwd": check_forward, "bwd": check_backward}
LENGTHS = (2, 200, 300)
TOGETHER = {
    "heads": (3, 1),
    "mask_mod": lists.odd,
    "block_mask": lists.random_lists(LENGTHS, 1, 3, seed=5),
    "segment_ids": (scattered(LENGTHS[:2], 2), scattered(LENGTHS[::2], 2)),
    "query_seq_lengths": jnp.array([200, 140]),
    "key_value_seq_lengths": jnp.array([90, 300]),
    "packed_mask": packed.words(2, 3, 200, 10),
    "sinks": jnp.array([0.3, -2.0, 1.0]),
    "positions": "segment",
    "deterministic": True,
}
NOT_SERVED = {"192_by_64", "small_tiles_of_a_mask", "128_small_tiles"}
"""Lists whose tiles Blackwell's do not divide."""
IN_PASSES = {
    **{"head_dim": 200, "local_window_size": (90, 60), "positions": "sequence"},
    "segment_ids": (scattered((1, 70), 2), scattered((1, 200), 2)),
    "block_mask": BlockMask.from_lists(
        [[1]], [[0]], q_length=70, kv_length=200, tile_m=128, tile_n=128
    ),
}
"""Of head_dims whose gradients have a kernel each; dQ's goes over keys by the lists as they are."""
# 128 rows hold 18 tokens of seven heads.
PACKED_HEADS = (
    (1, 5, 300),
    {
        "heads": (7, 1),
        "block_mask": BlockMask.from_lists(
            [[1]], [[2, 0]], q_length=5, kv_length=300, tile_m=128 * 18, tile_n=128
        ),
    },
)
LISTS = lists.CASES | {"packed_heads": PACKED_HEADS}
SLOW = [
    (direction, f"{kind}_{name}", case)
    for kind, direction, cases in (
        *(("lists", "fwd", LISTS), ("lists", "bwd", lists.BACKWARD)),
        *(("segments", "fwd", CASES), ("segments", "bwd", BACKWARD)),
        *(("rows", "fwd", rows.CASES), ("rows", "bwd", rows.CASES)),
        *(("packed", "fwd", packed.CASES), ("packed", "bwd", packed.CASES)),
        ("rows_256", "bwd", {n: (c[0], c[1] | {"head_dim": 256}) for n, c in rows.CASES.items()}),
    )
    for name, case in cases.items()
    if name not in NOT_SERVED
]
TIMINGS = [("early", "adversarial"), ("shuffled", "seeded")]


@pytest.mark.parametrize("direction", CHECKS)
def test_together(direction: str):
    CHECKS[direction](*call_of(LENGTHS, **TOGETHER), arch=ARCH)


def test_passes():
    check_backward(*call_of((1, 70, 200), **IN_PASSES), arch=ARCH)


@pytest.mark.parametrize(
    ("direction", "call"),
    [
        # A row that sees nothing of a tile that no interval cuts is a case of its own.
        pytest.param(
            d,
            c,
            id=f"{d}_{n}",
            marks=[] if (d, n) == ("fwd", "packed_groups") else pytest.mark.slow,
        )
        for d, n, c in SLOW
    ],
)
def test_each(direction: str, call):
    lengths, arguments = call
    CHECKS[direction](*call_of(lengths, **arguments), arch=ARCH)


@pytest.mark.parametrize("direction", CHECKS)
def test_lists_made_in_the_call(direction: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "LEAST_SCORES_FOR_LISTS", 1)
    monkeypatch.setattr(registry, "LEAST_HEADS_FOR_A_LIST", 1)
    lengths = {"key_value_seq_lengths": jnp.array([90, 300])}
    spec, operands = call_of((2, 200, 300), heads=(3, 1), mask_mod=lists.odd, **lengths)
    spec = dataclasses.replace(spec, may_make_lists=True)
    assert registry.kernel_key(spec, operands, direction, ARCH, 0).has_lists
    CHECKS[direction](spec, operands, arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize(("timing", "warps"), TIMINGS)
def test_passes_under_any_timing(timing: str, warps: str):
    call = call_of(LENGTHS, **TOGETHER, head_dim=200)
    check_backward(*call, arch=ARCH, timing=timing, warps=warps, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("direction", CHECKS)
@pytest.mark.parametrize(("timing", "warps"), TIMINGS)
def test_any_timing(direction: str, timing: str, warps: str):
    call = call_of(LENGTHS, **TOGETHER)
    CHECKS[direction](*call, arch=ARCH, timing=timing, warps=warps, seed=3)


def test_small_tiles_are_refused():
    lengths, arguments = lists.CASES["192_by_64"]
    spec, operands = call_of(lengths, **arguments)
    for direction in CHECKS:
        (reason,) = registry.reasons_against(spec, operands, direction, ARCH)
        assert reason.startswith("block_mask's tiles must be multiples of tiles that a kernel has")
