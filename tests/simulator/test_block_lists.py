"""The Hopper kernels over lists of tiles, in simulation, against the reference."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import masks
from jax_flashcute.block_mask import BlockMask, make_block_mask
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config import sm90
from jax_flashcute.kernels.sm90 import backward
from tests.simulator.test_backward_segments import check_backward
from tests.simulator.test_forward_segments import call_of, check_forward


def random_lists(lengths, batch, heads, tile=(128, 128), seed=0) -> BlockMask:
    """Lists in no order: some empty, some tiles full, some partial."""
    rng = np.random.default_rng(seed)
    _, T, S = lengths
    tiles = (-(-T // tile[0]), -(-S // tile[1]))
    lists = {}
    kinds = rng.choice([0, 1, 2], (batch, heads, *tiles), p=[0.4, 0.3, 0.3])
    kinds[0, 0, 0] = 0
    for name, kind in (("partial", 1), ("full", 2)):
        counts = (kinds == kind).sum(-1)
        indices = np.full((batch, heads, *tiles), 10**6, np.int32)
        for place in np.ndindex(counts.shape):
            found = rng.permutation(np.flatnonzero(kinds[place] == kind))
            indices[place][: len(found)] = found
        lists |= {f"{name}_counts": counts, f"{name}_indices": indices}
    sizes = dict(zip(("q_length", "kv_length", "tile_m", "tile_n"), (T, S, *tile), strict=True))
    return BlockMask.from_indices(**lists, **sizes)


def odd(b, h, q, kv):
    return (q + kv) % 3 != 0


CASES = {
    "64_unordered": (
        (2, 300, 400),
        {"mask_mod": odd, "heads": (3, 1), "block_mask": random_lists((2, 300, 400), 1, 3)},
    ),
    "128_everything": (
        (2, 300, 400),
        {
            "heads": (2, 2), "head_dim": 128, "is_causal": True, "mask_mod": odd,
            "q_offset": jnp.array([100, 40]), "local_window_size": (170, None),
            "query_seq_lengths": jnp.array([300, 100]),
            "key_value_seq_lengths": jnp.array([90, 400]),
            "block_mask": random_lists((2, 300, 400), 2, 1, seed=1),
            "sinks": jnp.array([0.3, -2.0]),
        },
    ),
    "packed_heads": (
        (1, 5, 300),
        {"heads": (7, 1), "block_mask": BlockMask.from_lists(
            [[1]], [[2, 0]], q_length=5, kv_length=300, tile_m=1728, tile_n=128)},
    ),
    "none_with_a_sink": (
        (1, 200, 140),
        {"sinks": jnp.array([1.5]), "head_dim": 128, "block_mask": BlockMask.from_blocks(
            np.zeros((2, 2), bool), q_length=200, kv_length=140, tile_m=128, tile_n=128)},
    ),
    "192_by_64": (
        (1, 200, 150),
        {"mask_mod": odd, "block_mask": random_lists((1, 200, 150), 1, 1, (192, 64), seed=3)},
    ),
    "pairs_of_heads": (
        (2, 380, 400),
        {
            "heads": (4, 2), "head_dim": 128, "mask_mod": odd, "q_offset": jnp.array([100, 40]),
            "is_causal": True, "query_seq_lengths": jnp.array([380, 100]),
            "block_mask": random_lists((2, 380, 400), 2, 1, seed=6),
        },
    ),
    "small_tiles_of_a_mask": (
        (1, 130, 200),
        {"mask_mod": masks.causal, "segment_ids": (np.arange(130)[None] // 50,
         np.arange(200)[None] // 70), "positions": "sequence", "block_mask": make_block_mask(
            masks.causal, 1, 1, 130, 200, tile_m=64, tile_n=64)},
    ),
}  # fmt: skip
BACKWARD = CASES | {
    "256": (
        (1, 200, 300),
        {
            "mask_mod": odd,
            "heads": (2, 1),
            "head_dim": 256,
            "block_mask": random_lists((1, 200, 300), 1, 2, seed=2),
        },
    ),
    "128_small_tiles": (
        (1, 130, 200),
        {
            "mask_mod": odd,
            "heads": (3, 1),
            "head_dim": 128,
            "block_mask": random_lists((1, 130, 200), 1, 3, (64, 64), seed=4),
        },
    ),
}
del BACKWARD["packed_heads"]
# Where blocks of 128 keys pair, such tiles are theirs.
BACKWARD["128_wide_tiles"] = (
    (1, 200, 700),
    {
        "mask_mod": odd,
        "heads": (2, 1),
        "head_dim": 128,
        "block_mask": random_lists((1, 200, 700), 1, 2, (128, 256), seed=6),
        "deterministic": True,
    },
)


SLOW = pytest.mark.slow
QUICK = {"forward": {"128_everything", "pairs_of_heads"}, "backward": {"64_unordered"}}


def marked(direction: str, cases) -> list:
    quick = QUICK[direction]
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in quick)) for n in cases]


@pytest.mark.parametrize("name", marked("forward", CASES))
def test_forward(name: str):
    lengths, arguments = CASES[name]
    check_forward(*call_of(lengths, **arguments))


@pytest.mark.parametrize("name", marked("backward", BACKWARD))
def test_backward(name: str):
    lengths, arguments = BACKWARD[name]
    spec, operands = call_of(lengths, **arguments)
    check_backward(spec, operands)


PARTS = {
    "64": BACKWARD["64_unordered"],
    "128": (
        (2, 300, 400),
        {
            **BACKWARD["128_everything"][1], "heads": (8, 2), "sinks": None,
            "block_mask": random_lists((2, 300, 400), 2, 8, seed=5),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "heads", "least", "how"),
    [
        ("64", 1, 1, {}),
        pytest.param("64", 2, 1, {}, marks=SLOW),
        pytest.param("64", 1, 2, {"timing": "early", "warps": "adversarial"}, marks=SLOW),
        pytest.param("128", 1, 1, {"timing": "shuffled", "warps": "seeded"}, marks=SLOW),
        pytest.param("128", 3, 4, {}, marks=SLOW),
    ],
)
def test_parts_of_heads(monkeypatch: pytest.MonkeyPatch, name, heads, least, how):
    """dK and dV go from part to part in float32: every bit is that of one block for all heads."""
    lengths, arguments = PARTS[name]
    spec, operands = call_of(lengths, **arguments)
    together = check_backward(spec, operands)
    per_head = lengths[1] * 8 * operands.query.shape[-1]
    monkeypatch.setattr(sm90, "RESIDENT_BYTES", heads * per_head)
    monkeypatch.setattr(backward, "LEAST_STEPS", least)
    apart = check_backward(spec, operands, **how)
    assert apart[-2].max() > 0
    if how:
        return  # its products are cut up otherwise, and then rounded otherwise
    for x, y in zip(together[1:3], apart[1:3], strict=True):
        np.testing.assert_array_equal(x, y)


DETERMINISTIC = {
    "64": (
        (1, 140, 300),
        {"mask_mod": odd, "heads": (3, 1), "block_mask": random_lists((1, 140, 300), 1, 3)},
    ),
    **{n: BACKWARD[n] for n in ("128_everything", "128_small_tiles", "256", "none_with_a_sink")},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "64")) for n in DETERMINISTIC]
)
def test_deterministic(name: str):
    """A block that waits for a turn that never comes, or has passed, is a deadlock."""
    lengths, arguments = DETERMINISTIC[name]
    check_backward(*call_of(lengths, **arguments, deterministic=True))


def holes(b, h, q, kv):
    """Some tiles full, some hidden, the rest partial; not the same for every head."""
    return ((q - 70) * (kv - 150) > 0) | ((kv + h) % 3 == 0) & (q > 40)


MADE = {
    "64": ((1, 190, 300), {"mask_mod": holes, "heads": (3, 1), "deterministic": True}),
    "128_lengths": (
        (2, 300, 400),
        {
            "mask_mod": holes, "heads": (2, 2), "head_dim": 128, "is_causal": True,
            "q_offset": jnp.array([100, 40]), "query_seq_lengths": jnp.array([300, 100]),
            "key_value_seq_lengths": jnp.array([90, 400]),
        },
    ),
    "256": ((1, 200, 300), {"mask_mod": holes, "heads": (2, 1), "head_dim": 256}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "64")) for n in MADE]
)
def test_lists_made_in_the_call(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(registry, "LEAST_SCORES_FOR_LISTS", 1)
    monkeypatch.setattr(registry, "LEAST_HEADS_FOR_A_LIST", 1)
    lengths, arguments = MADE[name]
    spec, operands = call_of(lengths, **arguments, block_mask="auto")
    for direction in ("fwd", "bwd"):
        assert registry.kernel_key(spec, operands, direction, "sm_90a", 132).has_lists
    check_forward(spec, operands)
    check_backward(spec, operands)


def test_all_tiles_are_the_dense_result_bit_for_bit():
    lengths = (1, 300, 300)
    every = np.ones((3, 3), bool)
    blocks = BlockMask.from_blocks(
        every, every, q_length=300, kv_length=300, tile_m=128, tile_n=128
    )
    spec, operands = call_of(lengths, head_dim=128, block_mask=blocks)
    listed = check_forward(spec, operands)
    dense = check_forward(spec, dataclasses.replace(operands, block_mask=None))
    for x, y in zip(listed, dense, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("timing", "warps"), [("early", "adversarial"), ("shuffled", "seeded")])
def test_under_any_timing(name: str, timing: str, warps: str):
    lengths, arguments = CASES[name]
    call = call_of(lengths, **arguments)
    check_forward(*call, timing=timing, warps=warps, seed=3)
    check_backward(*call, timing=timing, warps=warps, seed=3)
