"""Native sparse attention against loops in NumPy float64, piece by piece and whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute.nsa import (
    NSAConfig,
    Selection,
    compress_kv,
    gate,
    native_sparse_attention,
    query_tile_means,
    score_blocks,
    select_blocks,
    to_block_mask,
)
from jax_flashcute.nsa.packing import of_packing, pack
from tests.arrays import random
from tests.nsa_cases import Case, check_future, check_ties

SMALL = NSAConfig(block=8, num_selected=3, window=10, query_tile=16)


def inputs(length: int, kv_heads: int, group: int, head_dim: int, batch: int = 2) -> dict:
    N, K, H = kv_heads * group, kv_heads, head_dim
    return {
        "query": random(0, batch, length, N, H),
        "key": random(1, batch, length, K, H),
        "value": random(2, batch, length, K, H),
        "gate_weights": random(3, N, 3, H),
        "key_weight": random(4, K, H, H) / H**0.5,
        "value_weight": random(5, K, H, H) / H**0.5,
    }


def compressed(array: np.ndarray, weight: np.ndarray, block: int) -> np.ndarray:
    starts = range(0, array.shape[1], block)
    means = np.stack([array[:, s : s + block].mean(1) for s in starts], axis=1)
    return np.einsum("bjkh,khe->bjke", means, weight)


def chosen(query, compressed_key, config: NSAConfig, is_causal: bool) -> list:
    """``[b][k][tile]``: the selected blocks, ascending."""
    B, T, N, _ = query.shape
    blocks, K = compressed_key.shape[1:3]
    result = []
    for b in range(B):
        result.append([])
        for k in range(K):
            result[-1].append([])
            for first in range(0, T, config.query_tile):
                after = min(first + config.query_tile, T)
                heads = slice(k * (N // K), (k + 1) * (N // K))
                mean = query[b, first:after, heads].mean((0, 1))
                own = {j for j in range(blocks) if j * config.block < after}
                candidates = own if is_causal else set(range(blocks))
                forced = {j for j in own if (j + 1) * config.block > first} | {0}
                rest = sorted(
                    candidates - forced, key=lambda j: (-mean @ compressed_key[b, j, k], j)
                )
                more = max(0, config.num_selected - len(forced))
                result[-1][-1].append(sorted(forced | set(rest[:more])))
    return result


def expected_output(arrays: dict, config: NSAConfig, selection: list, is_causal: bool):
    """The definition, row by row."""
    a = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
    query, key, value = a["query"], a["key"], a["value"]
    B, T, N, H = query.shape
    K, cf = key.shape[2], config.block
    ck, cv = (compressed(a[n], a[f"{n}_weight"], cf) for n in ("key", "value"))
    out = np.zeros_like(query)
    for b, t, h in np.ndindex(B, T, N):
        k = h // (N // K)
        blocks = np.arange(ck.shape[1])
        seen = blocks < (t + 1) // cf if config.complete_only else blocks <= t // cf
        r = np.arange(T)
        listed = np.isin(r // cf, selection[b][k][t // config.query_tile])
        near = (r > t - config.window) & (r <= t)
        if is_causal:
            listed = listed & (r <= t)
        else:
            seen = np.ones(len(blocks), bool)
            near = np.abs(r - t) <= config.window // 2
        branches = [(ck, cv, seen), (key, value, listed), (key, value, near)]
        for i, (keys, values, visible) in enumerate(branches):
            if not visible.any():
                continue
            score = keys[b, visible, k] @ query[b, t, h] / np.sqrt(H)
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            opening = 1 / (1 + np.exp(-query[b, t, h] @ a["gate_weights"][h, i]))
            out[b, t, h] += opening * (weight @ values[b, visible, k])
    return out


CASES = {
    "group_3": (70, 2, 3, 16, {}),
    "group_1": (64, 2, 1, 16, {"complete_only": True}),
    "group_5_uneven": (45, 1, 5, 8, {"block": 7, "query_tile": 12}),
    "not_causal": (61, 2, 2, 16, {"is_causal": False}),
    "shorter_than_a_tile": (13, 1, 4, 8, {}),
    "shorter_than_a_block": (5, 1, 1, 8, {"complete_only": True}),
    "more_selected_than_there_are": (40, 1, 2, 8, {"num_selected": 99}),
    "nothing_but_forced": (70, 1, 2, 8, {"num_selected": 1}),
    "tile_below_block": (50, 1, 1, 8, {"block": 16, "query_tile": 8}),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_selection(name: str) -> None:
    *sizes, options = CASES[name]
    options = dict(options)
    is_causal = options.pop("is_causal", True)
    config = NSAConfig(
        **({"block": 8, "num_selected": 3, "window": 10, "query_tile": 16} | options)
    )
    arrays = inputs(*sizes)
    numbers = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
    ck = compressed(numbers["key"], numbers["key_weight"], config.block)
    selection = chosen(numbers["query"], ck, config, is_causal)
    found = select_blocks(
        arrays["query"],
        jnp.asarray(ck, jnp.float32),
        config,
        kv_length=sizes[0],
        scale=1.0,
        is_causal=is_causal,
    )
    for b, k, i in np.ndindex(found.counts.shape):
        count = int(found.counts[b, k, i])
        assert list(found.indices[b, k, i, :count]) == selection[b][k][i]
    attend = functools.partial(
        native_sparse_attention, config=config, is_causal=is_causal, implementation="xla"
    )
    actual = jax.jit(lambda arrays: attend(**arrays))(arrays)
    expected = expected_output(arrays, config, selection, is_causal)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("complete_only", [False, True])
def test_gradients_of_all_inputs(complete_only: bool) -> None:
    """Against autodiff of the dense reference, whose selection is the same."""
    config = NSAConfig(
        block=8, num_selected=3, window=10, query_tile=16, complete_only=complete_only
    )
    arrays = inputs(53, 2, 3, 16)
    weights = random(9, *arrays["query"].shape)

    def loss(arrays, implementation):
        out = native_sparse_attention(**arrays, config=config, implementation=implementation)
        return jnp.sum(out * weights)

    actual, expected = (
        jax.jit(jax.grad(functools.partial(loss, implementation=i)))(arrays)
        for i in ("xla", "reference")
    )
    for name, want in expected.items():
        scale = np.max(np.abs(want))
        assert scale > 0, name
        np.testing.assert_allclose(actual[name], want, rtol=2e-5, atol=2e-5 * scale, err_msg=name)


# ---- packed sequences ----------------------------------------------------------------------


def value_and_gradients(arrays: dict, **options):
    """Output and gradients of all inputs, for cotangents that depend on the position alone."""

    def attend(arrays):
        return native_sparse_attention(**arrays, config=SMALL, implementation="xla", **options)

    out, vjp = jax.vjp(attend, arrays)
    return out, vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))[0]


def alone(arrays: dict, b: int, first: int, after: int) -> dict:
    """Rows ``first`` to ``after`` of batch entry ``b``, as a batch of one."""
    rows = ("query", "key", "value", "gates")
    return {n: x[b : b + 1, first:after] if n in rows else x for n, x in arrays.items()}


def assert_as_alone(arrays: dict, sequences: list, **options) -> None:
    """What is packed gets what it would get alone; all else is 0, whatever it holds."""
    B, T = arrays["query"].shape[:2]
    is_row = np.zeros((B, T), bool)
    for b, first, after in sequences:
        is_row[b, first:after] = True
    rows = [n for n in arrays if n in ("query", "key", "value", "gates")]
    poisoned = arrays | {n: jnp.where(is_row.reshape(B, T, 1, 1), arrays[n], jnp.nan) for n in rows}
    run = functools.partial(jax.jit, static_argnames=("max_segments", "is_causal"))
    is_causal = options.get("is_causal", True)
    out, gradients = run(value_and_gradients)(poisoned, **options)

    # The sequences one by one, on the reference's dense attention, with the same cotangents.
    def one_by_one(arrays):
        whole = jnp.zeros_like(out)
        for b, first, after in sequences:
            part = native_sparse_attention(
                **alone(arrays, b, first, after),
                config=SMALL,
                implementation="reference",
                is_causal=is_causal,
            )
            whole = whole.at[b, first:after].set(part[0])
        return whole

    def expected(arrays):
        whole, vjp = jax.vjp(one_by_one, arrays)
        cotangent = jnp.cos(jnp.arange(whole.size, dtype=jnp.float32)).reshape(whole.shape)
        return whole, vjp(cotangent)[0]

    wanted, wanted_gradients = jax.jit(expected)(arrays)
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)
    for name, want in wanted_gradients.items():
        scale = np.max(np.abs(want))
        np.testing.assert_allclose(
            gradients[name], want, rtol=2e-5, atol=2e-5 * scale, err_msg=name
        )
    assert not np.any(np.asarray(out)[~is_row])


def test_packed_sequences_get_what_they_would_get_alone() -> None:
    """Below a block, below a tile, of several tiles, with padding between them and behind."""
    ids = np.full((2, 70), -1)
    sequences = [(0, 0, 5), (0, 5, 46), (1, 3, 44)]
    for i, (b, first, after) in enumerate(sequences):
        ids[b, first:after] = 7 - i
    assert_as_alone(inputs(70, 2, 3, 8), sequences, segment_ids=jnp.asarray(ids), max_segments=3)


@pytest.mark.parametrize("is_causal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lengths(is_causal: bool) -> None:
    arrays = inputs(40, 1, 2, 8)
    del arrays["gate_weights"]
    arrays["gates"] = jax.nn.sigmoid(random(8, 2, 40, 2, 3))
    sequences = [(0, 0, 27), (1, 0, 3)]
    lengths = jnp.asarray([27, 3])
    assert_as_alone(arrays, sequences, key_value_seq_lengths=lengths, is_causal=is_causal)


def test_selection_stays_within_a_sequence() -> None:
    """Not causal, where every block of the sequence is a candidate, and nothing else."""
    config = NSAConfig(block=8, num_selected=99, window=8, query_tile=16)
    ids = jnp.asarray(np.repeat([[3, 1, 4]], [20, 33, 17], axis=1))
    packing = pack(ids, 5, config)
    tiling = of_packing(config, packing)

    @jax.jit
    def select(query):
        query = packing.aligned(query)
        key, _ = compress_kv(query, query, 8, counts=tiling.counts)
        return select_blocks(
            query, key, config, kv_length=query.shape[1], scale=1.0, is_causal=False, tiling=tiling
        )

    found = select(random(0, 1, 70, 2, 8))
    # Sequences of 20, 33 and 17 rows take 2, 3 and 2 tiles, with 3, 5 and 3 blocks.
    starts, blocks = [0, 0, 4, 4, 4, 10, 10], [3, 3, 5, 5, 5, 3, 3]
    for i, (start, count) in enumerate(zip(starts, blocks, strict=True)):
        assert list(found.indices[0, 0, i, :count]) == list(range(start, start + count))
    assert list(found.counts[0, 0]) == blocks + [0] * (found.counts.shape[2] - 7)


def test_more_sequences_than_there_can_be_give_nan() -> None:
    packing = jax.jit(pack, static_argnums=(1, 2))(jnp.asarray([[0, 0, 5, 5, 2, -1]]), 2, SMALL)
    x = jnp.arange(6.0).reshape(1, 6, 1, 1)
    back = packing.packed(packing.aligned(x))
    np.testing.assert_array_equal(back.ravel(), [0, 1, 2, 3, np.nan, 0])


def test_ties_go_to_the_lowest_index() -> None:
    check_ties()


@pytest.mark.parametrize("complete_only", [False, True])
def test_the_future_does_not_leak(complete_only: bool) -> None:
    case = Case(64, 1, 2, 8, NSAConfig(8, 3, 10, 16, complete_only=complete_only))
    check_future(case, 44, "float32", "xla")


def test_pieces() -> None:
    query, key, value = random(0, 2, 50, 6, 8), random(1, 2, 50, 2, 8), random(2, 2, 50, 2, 4)
    ck, cv = compress_kv(key, value, 16)
    np.testing.assert_allclose(ck[:, 3], key[:, 48:].mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cv[:, 1], value[:, 16:32].mean(1), rtol=1e-5, atol=1e-6)
    # The mean of products is the product of means.
    products = jnp.einsum("bthd,bjhd->bhtj", query, jnp.repeat(ck, 3, axis=2))
    mean = products[:, :, 32:50].mean(2).reshape(2, 2, 3, 4).mean(2)
    scores = score_blocks(query_tile_means(query, 2, 32), ck, 0.5)
    np.testing.assert_allclose(scores[:, :, 1], 0.5 * mean, rtol=1e-4, atol=1e-5)
    outputs = [random(i, 2, 50, 6, 4) for i in range(3)]
    np.testing.assert_allclose(gate(query, outputs), sum(outputs) / 3, rtol=1e-5, atol=1e-6)


def test_lists_are_the_selected_blocks_cut_into_tiles() -> None:
    query, key = random(0, 1, 60, 4, 8), random(1, 1, 60, 2, 8)
    ck, _ = compress_kv(key, key, 8)
    selection = select_blocks(query, ck, SMALL, kv_length=60, scale=1.0)
    common = {"q_heads": 4, "q_length": 60, "kv_length": 60}
    whole = np.asarray(to_block_mask(selection, SMALL, **common).kinds())
    halves = np.asarray(to_block_mask(selection, SMALL, **common, tile_n=4).kinds())
    np.testing.assert_array_equal(halves, whole.repeat(2, axis=3)[..., :15])
    with pytest.raises(ValueError, match="tile_n must divide"):
        to_block_mask(selection, SMALL, **common, tile_n=16)
    with pytest.raises(ValueError, match="q_heads must be a multiple of the selection's 2 heads"):
        to_block_mask(selection, SMALL, **common | {"q_heads": 5})
    with pytest.raises(ValueError, match="multiple of compressed_key's 2 heads; got 3"):
        select_blocks(query[:, :, :3], ck, SMALL, kv_length=60, scale=1.0)


def test_memory_has_no_square() -> None:
    """At 131,072 a float32 per (query tile, block) and key/value head would be 32 MiB a head."""
    length = 131_072

    @jax.jit
    def select(query, key):
        ck, _ = compress_kv(key, key, 64)
        return select_blocks(query, ck, NSAConfig(query_tile=64), kv_length=length, scale=1.0)

    query = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.bfloat16)
    memory = select.lower(query, query).compile().memory_analysis()
    assert memory.output_size_in_bytes < 4 * 2048 * 17 * 4 + 2**10
    # Sums in float32 of the operands, and 64 tiles' scores of 2,048 blocks for four heads.
    assert memory.temp_size_in_bytes < 3 * length * 4 * 8 * 4 + 32 * 64 * 2048 * 4


def test_lists_of_the_backward_have_no_square() -> None:
    """At 1,048,576: room for what is listed, by query tiles of 64, and for nothing else."""
    T, N, K, config = 2**20, 32, 8, NSAConfig()
    tiles, width = T // config.query_tile, config.num_selected + 1
    selection = Selection(
        counts=jnp.zeros((1, K, tiles), jnp.int32),
        indices=jnp.zeros((1, K, tiles, width), jnp.int32),
    )

    def lists(selection):
        mask = to_block_mask(selection, config, q_heads=N, q_length=T, kv_length=T)
        return mask.transposed_lists(64, 64)

    memory = jax.jit(lists).lower(selection).compile().memory_analysis()
    listed = N * tiles * width * (config.query_tile // 64) * 4  # bytes
    assert memory.output_size_in_bytes < 1.25 * listed
    assert memory.temp_size_in_bytes < 4 * listed


def test_numpy_integers_and_an_empty_batch() -> None:
    assert NSAConfig(np.int64(8), window=np.int32(5)) == NSAConfig(8, window=5)
    query = jnp.zeros((0, 20, 2, 8))
    out = native_sparse_attention(
        query,
        query,
        query,
        segment_ids=jnp.zeros(20, int),
        max_segments=np.int64(2),
        config=NSAConfig(np.int64(8)),
    )
    assert out.shape == query.shape


BAD = {
    "block must be an integer": lambda a: NSAConfig(block=0),
    "window must be an integer": lambda a: NSAConfig(window=1.5),
    "gates must be": lambda a: native_sparse_attention(*a, gates=jnp.ones((2, 20, 2))),
    "cannot be given together": lambda a: native_sparse_attention(
        *a, gates=jnp.ones((2, 20, 2, 3)), gate_weights=jnp.ones((2, 3, 8))
    ),
    "weights must be": lambda a: native_sparse_attention(*a, gate_weights=jnp.ones((2, 8))),
    "key_weight must be": lambda a: native_sparse_attention(*a, key_weight=jnp.ones((8, 8))),
    "key must have query's length": lambda a: native_sparse_attention(a[0], a[1][:, :9], a[2]),
    "segment_ids must be integers": lambda a: native_sparse_attention(
        *a, segment_ids=jnp.ones((2, 9), int), max_segments=2
    ),
    "max_segments must be the most": lambda a: native_sparse_attention(
        *a, segment_ids=jnp.ones((2, 20), int)
    ),
    "max_segments must be an integer": lambda a: native_sparse_attention(
        *a, segment_ids=jnp.ones((2, 20), int), max_segments=2.0
    ),
    "config must be": lambda a: native_sparse_attention(*a, config={"block": 8}),
    "is_causal must be": lambda a: jax.jit(
        lambda causal: native_sparse_attention(*a, is_causal=causal)
    )(True),
    "max_segments is for segment_ids": lambda a: native_sparse_attention(*a, max_segments=3),
    "key_value_seq_lengths must be": lambda a: native_sparse_attention(
        *a, key_value_seq_lengths=jnp.ones(2)
    ),
    "outputs must be three": lambda a: gate(a[0], [a[0]]),
    "outputs must each be": lambda a: gate(a[0], [a[0], a[0], a[0][:, 1:]]),
    "counts must be": lambda a: compress_kv(a[1], a[2], 8, counts=jnp.ones((2, 2), int)),
    "query must be \\(batch": lambda a: native_sparse_attention(a[0][0], a[1], a[2]),
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message: str) -> None:
    arrays = inputs(20, 1, 2, 8)
    with pytest.raises(ValueError, match=message):
        BAD[message]([arrays[n] for n in ("query", "key", "value")])
