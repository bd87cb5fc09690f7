"""Masks that are an interval of each row: their bounds in arrays, against the mask itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import masks
from jax_flashcute.bounds import mask_key_bound_arrays, mask_query_bound_arrays
from jax_flashcute.kernels import masking
from jax_flashcute.visibility import visible
from tests.simulator.test_forward_segments import call_of

B, T, S = 2, 70, 90
RNG = np.random.default_rng(0)
STARTS = jnp.asarray(RNG.integers(0, S, (B, T)), jnp.int32)
ENDS = STARTS + jnp.asarray(RNG.integers(-3, 30, (B, T)), jnp.int32)
RISING = jnp.sort(STARTS, axis=1)
FLAGS = jnp.asarray(RNG.integers(0, 2, T), bool)

MASKS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "documents": (masks.documents_by_offsets([0, 1, 33, 33, 60, 90], 90) & masks.causal, {}),
    "rising": (lambda b, h, q, kv: (RISING[b, q] <= kv) & (kv < RISING[b, q] + 9), {}),
    "ragged": (lambda b, h, q, kv: (STARTS[b, q] <= kv) & (kv < ENDS[b, q]), {}),
    "causal_where_flagged": (lambda b, h, q, kv: FLAGS[q] & (kv <= q), {}),
    "falling": (lambda b, h, q, kv: kv < 80 - q, {"q_offset": [3, 0]}),
    "in_a_window": (
        lambda b, h, q, kv: kv < ENDS[b, q],
        {"local_window_size": (9, 4), "key_value_seq_lengths": [80, 0]},
    ),
    "lengths": (
        lambda b, h, q, kv: kv >= RISING[0, q],
        {"query_seq_lengths": [50, 70], "key_value_seq_lengths": [90, 61], "is_causal": True},
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_bounds_are_what_the_mask_shows(name: str) -> None:
    mask_mod, others = MASKS[name]
    spec, operands = call_of((B, T, S), mask_mod=mask_mod, **others)
    seen = what_is_seen(spec, operands, mask_mod)
    mask = masking.rows_of(spec, operands)
    assert mask is not None
    low, high, *tiles = (
        np.asarray(x) for x in jax.jit(lambda o: mask_key_bound_arrays(mask, o, 16, 8))(operands)
    )
    counts = np.arange(T) < np.asarray(others.get("query_seq_lengths", [T] * B))[:, None]
    key = np.arange(S)
    shown = (low[..., None] <= key) & (key < high[..., None])
    np.testing.assert_array_equal(shown & counts[..., None], seen)
    check_tiles(tiles, np.where(counts[..., None], seen, False), counts, 16, 8, always=True)

    first, end, *tiles, lows, highs = (
        np.asarray(x) for x in jax.jit(lambda o: mask_query_bound_arrays(mask, o, 16, 8))(operands)
    )
    row = np.arange(T)
    hull = (first[..., None] <= row) & (row < end[..., None])
    by_key = np.swapaxes(seen, 1, 2)
    assert not np.any(by_key & ~hull)
    compared = np.repeat(tiles[4], 16, axis=1)[:, :S, None] != 0
    np.testing.assert_array_equal((hull & ~compared), (by_key & ~compared))
    within = (lows[:, None] <= key[:, None]) & (key[:, None] < highs[:, None])
    np.testing.assert_array_equal(hull & within, by_key)
    check_tiles(tiles, by_key, np.ones((B, S), bool), 16, 8, always=False)


def what_is_seen(spec, operands, mask_mod) -> np.ndarray:
    """(B, T, S) booleans, element by element."""
    row, key = jnp.arange(T)[:, None], jnp.arange(S)[None]
    offset = 0 if operands.q_offset is None else operands.q_offset[:, None, None]
    of_mask = mask_mod(jnp.arange(B)[:, None, None], 0, row + offset, key)
    seen = visible(spec, operands, row, key)[:, 0] & of_mask
    return np.broadcast_to(np.asarray(seen), (B, T, S))


def check_tiles(tiles, seen, counts, rows: int, columns: int, *, always: bool) -> None:
    """Visited tiles hold all that is seen; full ones hide nothing from rows that count."""
    for b, tile in np.ndindex(tiles[0].shape):
        n_min, n_max, full_min, full_max = (field[b, tile] for field in tiles[:4])
        part = seen[b, tile * rows : (tile + 1) * rows]
        alive = counts[b, tile * rows : (tile + 1) * rows]
        for n in range(-(-seen.shape[2] // columns)):
            here = part[:, n * columns : (n + 1) * columns]
            assert n_min <= n < n_max or not here.any()
            if n_min <= n < n_max and full_min <= n < full_max:
                assert here[alive].all()
                assert here.shape[1] == columns or not always


@pytest.mark.parametrize(
    "mask_mod",
    [
        pytest.param(lambda b, h, q, kv: kv < STARTS[0, q] + h, id="heads"),
        pytest.param(lambda b, h, q, kv: kv < STARTS[0, kv % T], id="keys"),
        pytest.param(lambda b, h, q, kv: kv % 2 == 0, id="dilated"),
        pytest.param(lambda b, h, q, kv: kv <= q, id="causal"),
    ],
)
def test_what_is_no_interval_of_a_row_is_none(mask_mod: Callable[..., Any]) -> None:
    spec, operands = call_of((B, T, S), mask_mod=mask_mod)
    assert masking.rows_of(spec, operands) is None
