"""Packed sequences: metadata against loops, attention against each segment on its own, no leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import explain, flash_attention, xla
from jax_flashcute.segments import (
    ids_of_boundaries,
    key_ranges,
    positions_within,
    segments_of_boundaries,
    segments_of_ids,
)
from tests.arrays import random
from tests.compare import assert_close, cotangent

B, N, K, H = 2, 6, 2, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of at most 64, so that short sequences have several."""
    monkeypatch.setattr(xla, "_TILE_ELEMENTS_CPU", 1)


def random_ids(seed: int, *shape: int, kinds: int = 5, is_sorted: bool = False) -> jax.Array:
    ids = np.random.default_rng(seed).integers(-1, kinds, shape)
    return jnp.asarray(np.sort(ids) if is_sorted else ids, jnp.int32)


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("lengths", [(1, 1), (33, 60), (60, 33)], ids=str)
def test_ranges_are_the_first_and_the_last_key(lengths: tuple[int, int], is_sorted: bool) -> None:
    q_ids, kv_ids = (
        np.asarray(random_ids(i, B, length, is_sorted=is_sorted))
        for i, length in enumerate(lengths)
    )
    start, end, is_scattered = key_ranges(jnp.asarray(q_ids), jnp.asarray(kv_ids))
    for b, row in np.ndindex(q_ids.shape):
        found = np.flatnonzero(kv_ids[b] == q_ids[b, row]) if q_ids[b, row] >= 0 else np.array([])
        expected = (found[0], found[-1] + 1) if found.size else (0, 0)
        assert (start[b, row], end[b, row]) == expected
        assert is_scattered[b, row] == (end[b, row] - start[b, row] != found.size)
        assert not (is_sorted and is_scattered[b, row])


@pytest.mark.parametrize("is_sorted", [True, False])
def test_positions_count_what_stands_before(is_sorted: bool) -> None:
    ids = np.asarray(random_ids(3, B, 50, is_sorted=is_sorted))
    positions = positions_within(jnp.asarray(ids))
    for b, row in np.ndindex(ids.shape):
        assert positions[b, row] == np.sum(ids[b, :row] == ids[b, row])


def test_boundaries_with_empty_segments_and_padding() -> None:
    boundaries = jnp.asarray([[2, 4, 4, 7, 7, 7], [0, 0, 0, 9, 10, 10]], jnp.int32)
    expected = [[-1, -1, 0, 0, 2, 2, 2, -1, -1, -1], [2] * 9 + [3]]
    np.testing.assert_array_equal(ids_of_boundaries(boundaries, 10), expected)


def test_boundaries_say_what_their_ids_say() -> None:
    cu_q = jnp.asarray([[2, 4, 4, 7, 7, 7], [0, 0, 0, 9, 10, 10]], jnp.int32)
    cu_k = jnp.asarray([[0, 3, 5, 5, 8, 40], [1, 2, 3, 4, 5, 6]], jnp.int32)
    got = segments_of_boundaries(cu_q, cu_k, 10, 12, per_segment=True)
    want = segments_of_ids(got.q_ids, got.kv_ids, per_segment=True)
    for name in ("kv_start", "kv_end", "q_start", "q_end"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
    for ids, positions, expected in (
        (got.q_ids, got.q_positions, want.q_positions),
        (got.kv_ids, got.kv_positions, want.kv_positions),
    ):
        np.testing.assert_array_equal(positions, jnp.where(ids >= 0, expected, 0))
    assert not jnp.any(want.kv_scattered)
    assert not jnp.any(want.q_scattered)


def inputs(t: int, s: int, batch: int = B) -> dict:
    shapes = {"query": (batch, t, N, H), "key": (batch, s, K, H), "value": (batch, s, K, H)}
    return {name: random(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def results(floating: dict, implementation: str = "xla", *, weights: dict | None = None, **call):
    """Out, LSE and gradients; ``weights`` are the cotangents of out and lse."""
    static = {n: x for n, x in call.items() if callable(x) or isinstance(x, (bool, str))}
    static |= (
        {"local_window_size": call["local_window_size"]} if "local_window_size" in call else {}
    )
    arrays = {n: x for n, x in call.items() if n not in static}

    @jax.jit
    def run(floating, arrays, weights):
        def attend(floating):
            return flash_attention(
                **floating, **arrays, **static, implementation=implementation, return_residual=True
            )

        (out, lse), vjp = jax.vjp(attend, floating)
        given = weights or {"out": cotangent(out, 1), "lse": cotangent(lse, 2)}
        (gradients,) = vjp((given["out"], given["lse"]))
        return {"out": out, "lse": lse} | {f"d_{n}": g for n, g in gradients.items()}

    return run(floating, arrays, weights)


def as_mask(q_ids: jax.Array, kv_ids: jax.Array) -> jax.Array:
    same = (q_ids[:, :, None] == kv_ids[:, None]) & (q_ids[:, :, None] >= 0)
    return same[:, None]


EXTRAS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (20, 5)},
    "lengths": {
        "query_seq_lengths": jnp.asarray([100, 33]),
        "key_value_seq_lengths": jnp.asarray([0, 120]),
    },
    "offset": {"q_offset": jnp.asarray([7, -20]), "is_causal": True},
    "score": {"score_mod": lambda s, b, h, q, kv: s - 0.1 * (h + b) * jnp.abs(q - kv)},
    "mask": {"mask_mod": lambda b, h, q, kv: (q + kv) % 3 != 0, "local_window_size": (60, None)},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_ids_are_the_mask_that_they_describe(extra: str) -> None:
    t, s, is_sorted = 150, 170, extra in ("plain", "window", "lengths")
    pair = random_ids(1, B, t, is_sorted=is_sorted), random_ids(2, B, s, is_sorted=is_sorted)
    call, floating = EXTRAS[extra], inputs(t, s)
    expected = results(floating, "reference", mask=as_mask(*pair), **call)
    for implementation in ("xla", "reference"):
        actual = results(floating, implementation, segment_ids=pair, positions="sequence", **call)
        assert_close(actual, expected, 2e-5)


def test_boundaries_of_sorted_ids() -> None:
    """As the documentation of ``segment_ids`` makes them; some ids have no row."""
    ids = np.sort(np.random.default_rng(3).choice([0, 1, 4, 5, 7], 60))
    floating = inputs(60, 60, 1)
    boundaries = jnp.searchsorted(jnp.asarray(ids), jnp.arange(8))
    padding = jnp.asarray(np.where(ids == 7, -1, ids))
    got = results(floating, is_causal=True, cu_seqlens_q=boundaries)
    assert_close(got, results(floating, is_causal=True, segment_ids=padding), 1e-6)
    assert np.all(np.isneginf(got["lse"][0, ids == 7]))


Q_LENGTHS, K_LENGTHS = [40, 0, 1, 70, 5, 30], [10, 3, 1, 90, 0, 50]


def boundaries(lengths: list[int], segments: int) -> jax.Array:
    """Cumulative lengths, filled up to ``segments``."""
    ends = np.cumsum([0, *lengths])
    return jnp.asarray(np.pad(ends, (0, segments - len(lengths)), mode="edge"), jnp.int32)


@pytest.mark.parametrize("extra", ["plain", "causal", "window", "offset", "score", "mask"])
def test_every_segment_is_a_call_of_its_own(extra: str) -> None:
    """With positions of its own, of NaN-padded tails, and with sinks."""
    q, k = boundaries(Q_LENGTHS, 9), boundaries(K_LENGTHS, 9)
    t, s = int(q[-1]) + 9, int(k[-1]) + 4
    floating = inputs(t, s, 1)
    floating = {
        n: x.at[:, int(q[-1] if n == "query" else k[-1]) :].set(jnp.nan)
        for n, x in floating.items()
    }
    call = dict(EXTRAS[extra])
    if extra == "offset":
        call["q_offset"] = jnp.asarray(7)
    weights = {"out": random(5, 1, t, N, H), "lse": random(6, 1, t, N)}
    sinks = {"sinks": random(7, N)} if extra == "causal" else {}
    actual = results(
        floating | sinks,
        weights=weights,
        cu_seqlens_q=q,
        cu_seqlens_k=k,
        positions="segment",
        **call,
    )
    total = jax.tree.map(np.zeros_like, {n: x for n, x in actual.items() if n != "lse"})
    lse = np.full(actual["lse"].shape, -np.inf, np.float32)
    if sinks:
        lse[...] = sinks["sinks"]
    for i in range(len(Q_LENGTHS)):
        rows, keys = slice(q[i], q[i + 1]), slice(k[i], k[i + 1])
        one = {n: x[:, rows if n == "query" else keys] for n, x in floating.items()}
        cut = {n: w[:, rows] for n, w in weights.items()}
        expected = results(one | sinks, "reference", weights=cut, **call)
        lse[:, rows] = expected.pop("lse")
        for name, array in expected.items():
            if name == "d_sinks":
                total[name] += array
            else:
                total[name][:, rows if name in ("out", "d_query") else keys] = array
    if sinks:
        # Rows that are padding have the sink alone, and their LSE's cotangent is the sink's.
        total["d_sinks"] += np.asarray(weights["lse"][:, int(q[-1]) :].sum((0, 1)))
    assert_close(actual, total | {"lse": lse}, 3e-5)


@pytest.mark.parametrize("is_sorted", [True, False], ids=["sorted", "unsorted"])
def test_nothing_leaks_between_segments(is_sorted: bool) -> None:
    """New values in one segment change no bit of another, forward or backward."""
    ids = random_ids(8, B, 170, kinds=4, is_sorted=is_sorted)
    one, other = inputs(170, 170), jax.tree.map(lambda x: 3 * jnp.sin(9 * x), inputs(170, 170))

    @jax.jit
    def run(floating, weights):
        attend = functools.partial(
            flash_attention,
            segment_ids=ids,
            is_causal=True,
            positions="segment",
            return_residual=True,
        )
        outputs, vjp = jax.vjp(lambda x: attend(**x), floating)
        return {"outputs": outputs, "gradients": vjp(weights)}

    weights = random(5, B, 170, N, H), random(6, B, 170, N)
    before = run(one, weights)
    for changed in range(-1, 4):

        def swapped(x, y, changed=changed):
            return jnp.where((ids == changed).reshape(B, 170, *[1] * (x.ndim - 2)), y, x)

        new_weights = jax.tree.map(swapped, weights, jax.tree.map(jnp.cos, weights))
        after = run(jax.tree.map(swapped, one, other), new_weights)
        kept = np.asarray(ids != changed)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(np.asarray(x)[kept], np.asarray(y)[kept])


def test_many_segments_of_one_token() -> None:
    ids = jnp.arange(4096, dtype=jnp.int32)
    floating = {n: x[:, :, :2, :4] for n, x in inputs(4096, 4096, 1).items()}
    for given in ({"segment_ids": ids}, {"cu_seqlens_q": jnp.arange(4097)}):
        actual = results(floating, is_causal=True, **given)
        np.testing.assert_array_equal(actual["out"], floating["value"])


def test_padding_alone() -> None:
    ids = jnp.stack([jnp.full(100, -1), jnp.zeros(100, int)])
    floating = {n: x.at[0].set(jnp.nan) for n, x in inputs(100, 100).items()}
    actual = results(floating, segment_ids=ids)
    assert np.all(np.isneginf(actual.pop("lse")[0]))
    for array in actual.values():
        assert np.all(array[0] == 0)
        assert np.all(np.isfinite(array))


@pytest.mark.parametrize("mapped", ["ids", "arrays"])
def test_vmap(mapped: str) -> None:
    floating = inputs(40, 40)
    other = jax.tree.map(jnp.cos, floating)
    ids = jnp.stack([random_ids(i, B, 40) for i in range(2)])

    def loss(floating, ids, implementation="xla"):
        out = flash_attention(
            **floating, segment_ids=ids, is_causal=True, implementation=implementation
        )
        return jnp.sum(jnp.sin(out))

    stacked = jax.tree.map(lambda *x: jnp.stack(x), floating, other)
    arguments = (floating, ids) if mapped == "ids" else (stacked, ids[0])
    axes = (None, 0) if mapped == "ids" else (0, None)
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=axes))(*arguments)
    reference = jax.value_and_grad(functools.partial(loss, implementation="reference"))
    for i, one in enumerate((floating, other)):
        value, gradient = reference(*((floating, ids[i]) if mapped == "ids" else (one, ids[0])))
        np.testing.assert_allclose(values[i], value, rtol=1e-4)
        assert_close({n: g[i] for n, g in gradients.items()}, gradient, 3e-5)


def test_memory_is_linear_in_the_length() -> None:
    """At 65,536 by 65,536 a byte per element would be 4 GiB."""

    def loss(query, key, ids):
        out = flash_attention(query, key, key, segment_ids=ids, is_causal=True)
        return jnp.sum(out.astype(jnp.float32))

    query = jax.ShapeDtypeStruct((1, 65_536, 4, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((65_536,), jnp.int32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(query, query, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 400 * 2**20


IDS = jnp.zeros((B, 20), jnp.int32)
BAD = {
    "segment_ids must be integers": {"segment_ids": jnp.zeros((B, 20))},
    "segment_ids must be \\(2, 20\\)": {"segment_ids": jnp.zeros((B, 21), jnp.int32)},
    "segment_ids alone holds for": {"segment_ids": IDS, "short": True},
    "segment_ids must be one array or a pair": {"segment_ids": (IDS, IDS, IDS)},
    "cannot be given together": {"segment_ids": IDS, "cu_seqlens_q": jnp.arange(3)},
    "cu_seqlens_k must be given together with": {"cu_seqlens_k": jnp.arange(3)},
    "cu_seqlens_k must have as many": {
        "cu_seqlens_q": jnp.arange(3),
        "cu_seqlens_k": jnp.arange(4),
    },
    "cu_seqlens_q must be \\(segments": {"cu_seqlens_q": jnp.ones((3, 4), jnp.int32)},
    'positions must be "sequence"': {"positions": "document"},
    'positions="segment" needs': {"positions": "segment"},
    'positions must be "segment" or': {"segment_ids": (IDS, IDS), "is_causal": True},
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message: str) -> None:
    call = dict(BAD[message])
    arrays = inputs(20, 19 if call.pop("short", False) else 20)
    with pytest.raises(ValueError, match=message):
        flash_attention(**arrays, **call)


def test_boundaries_with_traced_numbers() -> None:
    arrays = inputs(20, 20)

    @jax.jit
    def attend(n):
        return flash_attention(**arrays, cu_seqlens_q=[0, n, 20], cu_seqlens_k=[0, n, 20])

    ends = np.array([0, 7, 20])
    want = flash_attention(**arrays, cu_seqlens_q=ends, cu_seqlens_k=ends)
    np.testing.assert_allclose(attend(7), want, atol=1e-6)


def test_what_the_kernels_serve() -> None:
    arrays = {n: x.astype(jnp.bfloat16) for n, x in inputs(20, 20).items()}
    for deterministic in (False, True):
        explanation = explain(**arrays, segment_ids=IDS, deterministic=deterministic)
        assert (explanation.forward_reasons, explanation.backward_reasons) == ((), ())


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)], ids=str)
def test_nothing_to_attend(lengths: tuple[int, int]) -> None:
    ids = tuple(jnp.zeros((B, length), jnp.int32) for length in lengths)
    for implementation in ("xla", "reference"):
        call = {"segment_ids": ids, "implementation": implementation}
        assert np.all(flash_attention(**inputs(*lengths), **call) == 0)
