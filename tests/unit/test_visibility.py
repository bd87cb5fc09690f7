"""Block ranges against the element-wise rule, by brute force."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute.spec import AttentionSpec, Operands
from jax_flashcute.visibility import key_block_range, query_block_range, visible


def random_call(rng: np.random.Generator) -> tuple[AttentionSpec, Operands]:
    batch = int(rng.integers(1, 3))
    T, S = (int(n) for n in rng.integers(1, 60, 2))

    def side():
        return None if rng.random() < 0.3 else int(rng.integers(0, 40))

    def per_batch(low: int, high: int):
        if rng.random() < 0.5:
            return None
        return jnp.asarray(rng.integers(low, high + 1, batch), jnp.int32)

    spec = AttentionSpec(
        scale=1.0,
        is_causal=bool(rng.random() < 0.5),
        local_window_size=None if rng.random() < 0.4 else (side(), side()),
    )
    operands = Operands(
        query=jnp.zeros((batch, T, 1, 1)),
        key=jnp.zeros((batch, S, 1, 1)),
        value=jnp.zeros((batch, S, 1, 1)),
        q_offset=per_batch(-70, 70),
        query_seq_lengths=per_batch(0, T),
        key_value_seq_lengths=per_batch(0, S),
    )
    return spec, operands


@pytest.mark.parametrize("seed", range(60))
def test_block_ranges_leave_out_only_hidden_blocks(seed: int) -> None:
    """Every block with a visible element lies inside, in both directions."""
    rng = np.random.default_rng(seed)
    spec, operands = random_call(rng)
    batch, T = operands.query.shape[:2]
    S = operands.key.shape[1]
    seen = visible(spec, operands, jnp.arange(T)[:, None], jnp.arange(S)[None, :])
    seen = np.broadcast_to(seen, (batch, 1, T, S)).any((0, 1))
    block_q, block_kv = (int(n) for n in rng.integers(1, 20, 2))
    num_q, num_kv = -(-T // block_q), -(-S // block_kv)
    tiles = np.zeros((num_q, num_kv), bool)
    for i in range(num_q):
        for j in range(num_kv):
            tile = seen[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
            tiles[i, j] = tile.any()

    for i in range(num_q):
        first = i * block_q
        start, stop = key_block_range(spec, operands, first, first + block_q - 1, block_kv, num_kv)
        visible_blocks = np.flatnonzero(tiles[i])
        assert not len(visible_blocks) or start <= visible_blocks[0]
        assert not len(visible_blocks) or visible_blocks[-1] < stop
        assert 0 <= start
        assert stop <= num_kv
    for j in range(num_kv):
        first = j * block_kv
        start, stop = query_block_range(spec, operands, first, first + block_kv - 1, block_q, num_q)
        visible_blocks = np.flatnonzero(tiles[:, j])
        assert not len(visible_blocks) or start <= visible_blocks[0]
        assert not len(visible_blocks) or visible_blocks[-1] < stop
        assert 0 <= start
        assert stop <= num_q


def test_causal_ranges_are_half_of_the_tiles() -> None:
    spec = AttentionSpec(scale=1.0, is_causal=True)
    array = jnp.zeros((1, 1024, 1, 1))
    operands = Operands(query=array, key=array, value=array)
    stops = [
        int(key_block_range(spec, operands, i * 64, i * 64 + 63, 64, 16)[1]) for i in range(16)
    ]
    assert stops == list(range(1, 17))
    starts = [
        int(query_block_range(spec, operands, j * 64, j * 64 + 63, 64, 16)[0]) for j in range(16)
    ]
    assert starts == list(range(16))


def test_window_ranges_are_a_band() -> None:
    spec = AttentionSpec(scale=1.0, local_window_size=(64, 0))
    array = jnp.zeros((1, 1024, 1, 1))
    operands = Operands(query=array, key=array, value=array)
    for i in range(1, 16):
        start, stop = key_block_range(spec, operands, i * 64, i * 64 + 63, 64, 16)
        assert (int(start), int(stop)) == (i - 1, i + 1)
        start, stop = query_block_range(spec, operands, i * 64, i * 64 + 63, 64, 16)
        assert (int(start), int(stop)) == (i, min(i + 2, 16))


@pytest.mark.parametrize(
    ("causal", "window", "expected"),
    [
        (False, None, (None, None)),
        (True, None, (None, 0)),
        (False, (3, 5), (3, 5)),
        (True, (3, 5), (3, 0)),
        (True, (None, 5), (None, 0)),
        (False, (2, None), (2, None)),
    ],
)
def test_reach(causal: bool, window, expected) -> None:
    spec = AttentionSpec(scale=1.0, is_causal=causal, local_window_size=window)
    assert spec.reach == expected
