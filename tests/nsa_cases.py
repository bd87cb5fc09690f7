"""Native sparse attention against float64 with the selection frozen: cases, and how to check one.

The selection is made once, from what is computed in the dtype under test; where it differs from
float64's, the scores are within that dtype's rounding of each other.  Outputs and gradients of all
inputs are then compared for the same selection.
"""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute.nsa import NSAConfig, attention, compress_kv, native_sparse_attention
from jax_flashcute.nsa import select_blocks as select_blocks_
from jax_flashcute.nsa.selection import Selection

# Relative error in the Frobenius norm: three branches' roundings, and those of their gradients.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.5e-2, "float16": 2e-3}
# Of scores, over the root mean square of the largest: what rounding the compressed keys moves.
SCORE_ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Case:
    """A call: (batch, length, kv_heads * group, head_dim), and the sizes."""

    length: int
    kv_heads: int
    group: int
    head_dim: int
    config: NSAConfig = field(default_factory=lambda: NSAConfig(64, 4, 100, 128))
    batch: int = 1

    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.length)
        B, T, K, H = self.batch, self.length, self.kv_heads, self.head_dim
        N = K * self.group
        shapes = {
            "query": (B, T, N, H),
            "key": (B, T, K, H),
            "value": (B, T, K, H),
            "gate_weights": (N, 3, H),
            "key_weight": (K, H, H),
            "value_weight": (K, H, H),
            "cotangent": (B, T, N, H),
        }
        scale = dict.fromkeys(("gate_weights", "key_weight", "value_weight"), H ** (-0.5))
        return {n: rng.standard_normal(s) * scale.get(n, 1) for n, s in shapes.items()}


CASES = {
    "group_1": Case(1000, 2, 1, 64),
    "group_3": Case(777, 2, 3, 96, batch=2),
    "group_4": Case(1537, 2, 4, 128, NSAConfig(complete_only=True, num_selected=6, window=300)),
    "group_5": Case(300, 1, 5, 128),
    "below_a_tile": Case(100, 2, 4, 64),
    "below_a_block": Case(40, 1, 3, 96),
    "more_selected_than_there_are": Case(500, 1, 4, 128, NSAConfig(num_selected=99)),
}


def check(
    case: Case,
    dtype: str,
    implementation,
    monkeypatch: pytest.MonkeyPatch,
    *,
    backward: bool = True,
) -> None:
    """``implementation`` in ``dtype`` against the dense reference in float64 on the CPU."""
    given = {n: jnp.asarray(x, dtype) for n, x in case.arrays().items()}
    selection = jax.jit(functools.partial(_selected, case.config, implementation))(
        *(given[n] for n in ("query", "key", "value", "key_weight"))
    )
    selection = jax.tree.map(np.asarray, selection)
    monkeypatch.setattr(attention, "select_blocks", lambda *_, **__: selection)
    actual = jax.jit(functools.partial(_run, case.config, implementation, backward))(given)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in given.items()}
        expected = jax.jit(functools.partial(_run, case.config, "reference", backward))(exact)
        expected = jax.tree.map(np.asarray, expected)
    _check_selection(case, {n: np.asarray(x) for n, x in exact.items()}, selection, dtype)
    for name, want in expected.items():
        got = np.asarray(actual[name], np.float64)
        assert np.isfinite(got).all(), name
        # A single block's weight is 1 whatever its key is: the key's weights have no gradient.
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 0.1)
        assert error < TOLERANCE[dtype], (name, error)


def check_ties() -> None:
    """Equal scores: the lowest indices, besides the blocks that are forced in."""
    query, key = jnp.ones((1, 800, 1, 4)), jnp.ones((1, 100, 1, 4))
    config = NSAConfig(block=8, num_selected=5, window=8, query_tile=16)
    found = jax.jit(functools.partial(select_blocks_, config=config, kv_length=800, scale=1.0))(
        query, key
    )
    np.testing.assert_array_equal(found.indices[0, 0, -1], [0, 1, 2, 98, 99])
    np.testing.assert_array_equal(found.counts[0, 0], [2, 4, *[5] * 48])


def check_future(case: Case, t: int, dtype: str, implementation) -> None:
    """New values from position t on move nothing before t in the branches without a selection;

    with the selection, nothing before t's tile, whose mean query holds row t.  Without
    ``complete_only``, the block of t is seen by its own rows before t, and by none before it.
    """
    config, tokens = case.config, ("query", "key", "value")
    given = {n: jnp.asarray(case.arrays()[n], dtype) for n in tokens}
    changed = {n: x.at[:, t:].set(3 * jnp.sin(9 * x[:, t:])) for n, x in given.items()}

    @jax.jit
    def attend(arrays, gates):
        gates = jnp.broadcast_to(gates, (*arrays["query"].shape[:3], 3)).astype(dtype)
        return native_sparse_attention(
            **arrays, config=config, gates=gates, implementation=implementation
        )

    def first_moved(*gates: float) -> int:
        before, after = (attend(arrays, jnp.asarray(gates)) for arrays in (given, changed))
        return int(np.flatnonzero(np.any(before != after, axis=(0, 2, 3)))[0])

    in_means = t if config.complete_only else t // config.block * config.block
    assert first_moved(1, 0, 0) == in_means
    assert first_moved(0, 0, 1) == t
    assert first_moved(1, 1, 1) >= min(in_means, t // config.query_tile * config.query_tile)


def _selected(config: NSAConfig, implementation, query, key, value, key_weight) -> Selection:
    compressed, _ = compress_kv(
        key, value, config.block, key_weight=key_weight, implementation=implementation
    )
    return select_blocks_(query, compressed, config, kv_length=key.shape[1], scale=1.0)


def _run(config: NSAConfig, implementation, backward: bool, arrays: dict) -> dict:
    arrays = dict(arrays)
    cotangent = arrays.pop("cotangent")

    def attend(arrays):
        return native_sparse_attention(**arrays, config=config, implementation=implementation)

    if not backward:
        return {"out": attend(arrays)}
    out, vjp = jax.vjp(attend, arrays)
    return {"out": out} | vjp(cotangent)[0]


def _check_selection(case: Case, exact: dict, selection: Selection, dtype: str) -> None:
    """Own blocks and the first are there; of the others none that is clearly below one left out."""
    config, T = case.config, case.length
    starts = range(0, T, config.block)
    means = np.stack([exact["key"][:, s : s + config.block].mean(1) for s in starts], 1)
    keys = np.einsum("bjkh,khe->bjke", means, exact["key_weight"])
    for b, k, i in np.ndindex(*selection.counts.shape):
        first, after = i * config.query_tile, min((i + 1) * config.query_tile, T)
        heads = slice(k * case.group, (k + 1) * case.group)
        scores = keys[b, :, k] @ exact["query"][b, first:after, heads].mean((0, 1))
        candidates = {j for j in range(len(starts)) if starts[j] < after}
        forced = {0} | {j for j in candidates if starts[j] + config.block > first}
        chosen = list(selection.indices[b, k, i, : selection.counts[b, k, i]])
        assert chosen == sorted(set(chosen))
        assert forced <= set(chosen) <= candidates
        assert len(chosen) == min(len(candidates), max(len(forced), config.num_selected))
        free, left = set(chosen) - forced, candidates - set(chosen)
        if free and left:
            slack = SCORE_ROUNDING[dtype] * np.sqrt(np.mean(scores**2))
            assert min(scores[list(free)]) >= max(scores[list(left)]) - slack
