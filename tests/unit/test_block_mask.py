"""Block masks: classification against dense masks, round trips, and attention that visits lists."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_flashcute import BlockMask, explain, flash_attention, make_block_mask
from jax_flashcute.kernels.config.sm90 import (
    backward_config,
    dividing,
    dividing_backward,
    forward_config,
)
from jax_flashcute.tile_kinds import FULL, PARTIAL
from tests.arrays import random
from tests.compare import assert_close, cotangent

B, N = 2, 6
LIMITS = jnp.asarray([3, 0, 140, 60, 1000, 17])
IDS = jnp.asarray(np.random.default_rng(5).integers(0, 6, (B, 1200)))
DOCUMENTS = jnp.sort(IDS)


def prefix_lm(b, h, q, kv):
    return (kv <= q) | ((q < 50) & (kv < 50))


MASKS = {
    "causal": lambda b, h, q, kv: kv <= q,
    "window": lambda b, h, q, kv: (kv >= q - 30) & (kv <= q + 2),
    "narrow_and_far": lambda b, h, q, kv: (kv >= q + 64) & (kv <= q + 79),
    "prefix_lm": prefix_lm,
    "block_causal": lambda b, h, q, kv: kv // 16 <= q // 16,
    "chunked": lambda b, h, q, kv: kv // 128 == q // 128,
    "mini_causal": lambda b, h, q, kv: q % 128 >= kv % 128,
    "dilated": lambda b, h, q, kv: (q - kv >= 0) & (q - kv < 256) & ((q - kv) % 2 == 0),
    "documents": lambda b, h, q, kv: DOCUMENTS[b, q] == DOCUMENTS[b, kv],
    "unsorted_documents": lambda b, h, q, kv: IDS[b, q] == IDS[b, kv],
    "head_limits": lambda b, h, q, kv: kv < LIMITS[h],
    "far_rows_only": lambda b, h, q, kv: (q >= 100) & (kv <= q),
    "keys_only": lambda b, h, q, kv: kv % 2 == 0,
    "nothing": lambda b, h, q, kv: kv < 0,
    "everything": lambda b, h, q, kv: jnp.bool_(True),
}
LENGTHS = [(113, 203), (128, 217), (383, 769), (1023, 1024), (300, 90)]


def dense(function, t: int, s: int, offset=0) -> np.ndarray:
    b, h, q, kv = np.meshgrid(*map(np.arange, (B, N, t, s)), indexing="ij", sparse=True)
    q = q + np.broadcast_to(np.asarray(offset), B).reshape(B, 1, 1, 1)
    return np.broadcast_to(np.asarray(function(b, h, q, kv)), (B, N, t, s))


def kinds_of(mask: np.ndarray, tile_m: int, tile_n: int) -> np.ndarray:
    """Tile by tile, in plain loops over slices."""
    T, S = mask.shape[2:]
    M, tiles = math.ceil(T / tile_m), math.ceil(S / tile_n)
    kinds = np.zeros((*mask.shape[:2], M, tiles), np.int8)
    for m in range(M):
        for n in range(tiles):
            tile = mask[:, :, m * tile_m : (m + 1) * tile_m, n * tile_n : (n + 1) * tile_n]
            some, every = tile.any((2, 3)), tile.all((2, 3))
            kinds[:, :, m, n] = np.where(every, FULL, np.where(some, PARTIAL, 0))
    return kinds


@pytest.mark.parametrize("name", MASKS)
def test_tiles_are_classified_exactly(name: str) -> None:
    number = list(MASKS).index(name)
    for lengths, tile_m, tile_n in ((LENGTHS, 64, 128), (LENGTHS[2:], 128, 32)):
        t, s = lengths[number % len(lengths)]
        mask = dense(MASKS[name], t, s)
        made = make_block_mask(MASKS[name], B, N, t, s, tile_m=tile_m, tile_n=tile_n)
        expected = kinds_of(mask, tile_m, tile_n)
        kinds = np.broadcast_to(made.kinds(), expected.shape)
        np.testing.assert_array_equal(kinds, expected)
        from_mask = BlockMask.from_mask(mask, tile_m=tile_m, tile_n=tile_n)
        np.testing.assert_array_equal(from_mask.kinds(), expected)


def test_offsets_are_positions() -> None:
    offset = jnp.asarray([5, 64])
    made = make_block_mask(MASKS["window"], B, N, 100, 203, tile_m=16, tile_n=16, q_offset=offset)
    expected = kinds_of(dense(MASKS["window"], 100, 203, offset), 16, 16)
    np.testing.assert_array_equal(np.broadcast_to(made.kinds(), expected.shape), expected)


def test_lists_are_shared_where_the_mask_reads_no_batch_or_head() -> None:
    shapes = {"causal": (1, 1), "documents": (2, 1), "head_limits": (1, 6)}
    for name, shape in shapes.items():
        made = make_block_mask(MASKS[name], B, N, 90, 90, tile_m=32, tile_n=32)
        assert all(array.shape[:2] == shape for array in jax.tree.leaves(made))


def assert_same(one: BlockMask, other: BlockMask) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize(
    ("b", "n", "t", "s", "seed"), [(1, 1, 1, 1, 0), (2, 3, 70, 65, 1), (1, 2, 33, 17, 2)]
)
def test_round_trips(b: int, n: int, t: int, s: int, seed: int, density: float) -> None:
    sizes = {"q_length": t, "kv_length": s, "tile_m": 8, "tile_n": 16}
    rng = np.random.default_rng(seed)
    partial, full = rng.random((2, b, n, math.ceil(t / 8), math.ceil(s / 16))) < density
    made = BlockMask.from_blocks(partial, full, **sizes)
    kinds = np.where(full, FULL, np.where(partial, PARTIAL, 0))
    np.testing.assert_array_equal(made.kinds(), kinds)
    np.testing.assert_array_equal(made.transpose().kinds(), np.swapaxes(kinds, 2, 3))
    assert_same(made.transpose().transpose(), made)
    arrays = [np.array(x) for x in jax.tree.leaves(made)]
    # What stands beyond the counts is never read.
    for counts, indices in (arrays[:2], arrays[2:]):
        indices[np.arange(indices.shape[-1]) >= counts[..., None]] = -(2**31)
        for index in np.ndindex(counts.shape):
            rng.shuffle(indices[index][: counts[index]])
    again = BlockMask.from_indices(*arrays, **sizes)
    np.testing.assert_array_equal(again.kinds(), kinds)


def test_from_lists() -> None:
    sizes = {"q_length": 40, "kv_length": 64, "tile_m": 16, "tile_n": 16}
    made = BlockMask.from_lists([[2, 0], [], [3]], [[1], [], []], **sizes)
    expected = [[PARTIAL, FULL, PARTIAL, 0], [0, 0, 0, 0], [0, 0, 0, PARTIAL]]
    np.testing.assert_array_equal(made.kinds()[0, 0], expected)
    assert made.partial_indices.shape == (1, 1, 3, 2)
    # Without full tiles their lists have no width.
    made = BlockMask.from_indices(made.partial_counts, made.partial_indices, **sizes)
    assert np.all(made.kinds() == PARTIAL * (np.asarray(expected) == PARTIAL))


def inputs(t: int, s: int, kv_heads: int = 2) -> dict:
    shapes = {"query": (B, t, N, 8), "key": (B, s, kv_heads, 8), "value": (B, s, kv_heads, 8)}
    return {name: random(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def results(floating: dict, implementation: str, **call) -> dict:
    def attend(floating, call):
        return flash_attention(
            **floating, **call, implementation=implementation, return_residual=True
        )

    functions = {n: f for n, f in call.items() if callable(f) or isinstance(f, (bool, tuple))}
    arrays = {n: x for n, x in call.items() if n not in functions}

    @jax.jit
    def run(floating, arrays):
        with_call = functools.partial(attend, call=arrays | functions)
        (out, lse), vjp = jax.vjp(with_call, floating)
        (gradients,) = vjp((cotangent(out, 1), cotangent(lse, 2)))
        return {"out": out, "lse": lse} | {f"d_{n}": g for n, g in gradients.items()}

    return run(floating, arrays)


@pytest.mark.parametrize("name", MASKS)
def test_attention_over_lists_is_attention_under_the_mask(name: str) -> None:
    lengths = [(113, 203), (383, 450), (300, 90)]
    t, s = lengths[list(MASKS).index(name) % 3]
    floating, function = inputs(t, s), MASKS[name]
    blocks = make_block_mask(function, B, N, t, s, tile_m=64, tile_n=32)
    actual = results(floating, "xla", mask_mod=function, block_mask=blocks)
    expected = results(floating, "reference", mask=jnp.asarray(dense(function, t, s)))
    assert_close(actual, expected, 2e-5)


def test_the_longest_lengths() -> None:
    floating, function = inputs(1023, 1024), MASKS["unsorted_documents"]
    blocks = make_block_mask(function, B, N, 1023, 1024, tile_m=128, tile_n=128)
    actual = results(floating, "xla", mask_mod=function, block_mask=blocks)
    assert_close(actual, results(floating, "reference", mask_mod=function), 2e-5)


def tiles_of(block_mask: BlockMask, partial_is_visible: bool = True) -> np.ndarray:
    """(1|B, 1|N, T, S): the elements that stand in a listed tile."""
    kinds = np.asarray(block_mask.kinds()) >= (PARTIAL if partial_is_visible else FULL)
    mask = kinds.repeat(block_mask.tile_m, 2).repeat(block_mask.tile_n, 3)
    return mask[:, :, : block_mask.q_length, : block_mask.kv_length]


LISTS = {
    "empty_in_a_row": [[1, 3], [], [], [], [0]],
    "first_empty": [[], [0], [0, 1], [2], [3, 0]],
    "all_empty": [[], [], [], [], []],
    "descending": [[3, 2, 1, 0], [2, 0], [1], [3, 1], [0]],
    "all_full": [[0, 1, 2, 3]] * 5,
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "partial") for name in LISTS), ("empty_in_a_row", "full")]
)
def test_lists_alone(name: str, kind: str) -> None:
    """Without a mask_mod every element of a listed tile is visible; all other rules still hold."""
    t, s = 70, 100
    floating = inputs(t, s) | {"sinks": random(9, N), "bias": random(8, 1, N, t, s)}
    lists = {"partial": [[]] * 5, "full": [[]] * 5} | {kind: LISTS[name]}
    blocks = BlockMask.from_lists(**lists, q_length=t, kv_length=s, tile_m=16, tile_n=32)
    mask = jnp.asarray(tiles_of(blocks))
    more = {
        "query_seq_lengths": jnp.asarray([70, 33]),
        "key_value_seq_lengths": jnp.asarray([50, 100]),
        "q_offset": jnp.asarray([0, 40]),
        "local_window_size": (50, 30),
    }
    for extra in ({}, more):
        actual = results(floating, "xla", block_mask=blocks, **extra)
        expected = results(floating, "reference", mask=mask, **extra)
        assert_close(actual, expected, 2e-5)


def test_random_lists_per_batch_and_head_with_a_mask_and_a_score() -> None:
    t, s = 130, 150
    rng = np.random.default_rng(3)
    partial, full = rng.random((2, B, N, 9, 5)) < 0.4
    sizes = {"q_length": t, "kv_length": s, "tile_m": 16, "tile_n": 32}
    blocks = BlockMask.from_blocks(partial, full, **sizes)
    mask = dense(MASKS["dilated"], t, s) & tiles_of(blocks) | tiles_of(blocks, False)
    slopes = random(4, N)
    call = {"score_mod": lambda x, b, h, q, kv: x - slopes[h] * jnp.abs(q - kv)}
    for kv_heads in (2, 6):
        floating = inputs(t, s, kv_heads)
        expected = results(floating, "reference", mask=jnp.asarray(mask), **call)
        for implementation in ("xla", "reference"):
            more = {"block_mask": blocks, "mask_mod": MASKS["dilated"]}
            assert_close(results(floating, implementation, **more, **call), expected, 2e-5)


def test_broadcast_and_expanded_lists_are_the_same_bits() -> None:
    floating, function = inputs(100, 130), MASKS["causal"]
    shared = make_block_mask(function, B, N, 100, 130, tile_m=32, tile_n=32)
    expanded = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, N, *x.shape[2:])), shared)
    one = results(floating, "xla", mask_mod=function, block_mask=shared)
    other = results(floating, "xla", mask_mod=function, block_mask=expanded)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def attend(arrays: dict, ids: jax.Array, implementation: str = "xla", *, listed: bool = True):
    """Documents, their tiles found within the same program."""
    t, s = arrays["query"].shape[1], arrays["key"].shape[1]

    def mask_mod(b, h, q, kv):
        return ids[b, q] == ids[b, kv]

    blocks = None
    if listed:
        blocks = make_block_mask(mask_mod, B, N, t, s, tile_m=16, tile_n=32)
    out = flash_attention(
        **arrays, mask_mod=mask_mod, block_mask=blocks, implementation=implementation
    )
    return jnp.sum(jnp.sin(out))


@pytest.mark.parametrize("mapped", ["ids", "arrays"])
def test_vmap(mapped: str) -> None:
    arrays = [inputs(40, 70), jax.tree.map(jnp.cos, inputs(40, 70))]
    ids = jnp.stack([IDS[:, :70], IDS[:, 300:370]])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    given = {
        "ids": ((arrays[0], ids), (None, 0)),
        "arrays": ((stacked, ids[0]), (0, None)),
    }
    arguments, axes = given[mapped]
    actual = jax.jit(jax.vmap(jax.value_and_grad(attend), in_axes=axes))(*arguments)
    for i in range(2):
        one = (arrays[i if axes[0] == 0 else 0], ids[i if axes[1] == 0 else 0])
        reference = functools.partial(attend, implementation="reference", listed=False)
        value, gradients = jax.jit(jax.value_and_grad(reference))(*one)
        np.testing.assert_allclose(actual[0][i], value, rtol=1e-4)
        assert_close({n: g[i] for n, g in actual[1].items()}, gradients, 3e-5)


def test_scan_checkpoint_and_export() -> None:
    arrays, ids = inputs(40, 70), jnp.stack([IDS[:, :70], IDS[:, 300:370]])

    def total(arrays, ids, one):
        return jax.lax.scan(lambda carry, x: (carry + one(arrays, x), None), 0.0, ids)[0]

    reference = functools.partial(attend, implementation="reference", listed=False)
    expected = jax.jit(jax.grad(functools.partial(total, one=reference)))(arrays, ids)
    gradient = jax.jit(jax.grad(functools.partial(total, one=jax.checkpoint(attend))))
    assert_close(gradient(arrays, ids), expected, 3e-5)
    exported = export.deserialize(export.export(gradient)(arrays, ids).serialize())
    assert_close(exported.call(arrays, ids), gradient(arrays, ids), 1e-6)


def test_a_block_mask_is_an_argument_that_export_can_serialise() -> None:
    arrays = inputs(40, 70)
    blocks = make_block_mask(MASKS["window"], B, N, 40, 70, tile_m=16, tile_n=32)

    @jax.jit
    def run(arrays, blocks):
        return flash_attention(**arrays, block_mask=blocks, mask_mod=MASKS["window"])

    exported = export.deserialize(export.export(run)(arrays, blocks).serialize())
    np.testing.assert_allclose(exported.call(arrays, blocks), run(arrays, blocks), rtol=1e-6)


def largest_buffer(compiled: str) -> int:
    """Elements of the largest array that a compiled program names outside of its fusions."""
    fused = re.compile(r"^%?fused_computation.*?^}", re.MULTILINE | re.DOTALL)
    shapes = re.findall(r"\w+\[([\d,]+)\]", fused.sub("", compiled))
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_building_needs_memory_per_tile_alone() -> None:
    """At 65,536 by 65,536 with tiles of 128: 2^18 tiles, where there are 2^32 elements."""
    length = 65_536

    @jax.jit
    def build(width):
        return make_block_mask(
            lambda b, h, q, kv: (kv <= q) & (kv > q - width),
            1,
            8,
            length,
            length,
            tile_m=128,
            tile_n=128,
        )

    compiled = build.lower(jnp.int32(4096)).compile()
    assert largest_buffer(compiled.as_text()) <= 2**24
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 128 * 2**20
    assert memory.output_size_in_bytes < 2**22


def test_two_layers_build_their_lists_once() -> None:
    """Common subexpressions: the second layer's equal mask costs no second classification."""
    ids = IDS[:, :70]

    def reductions(*shifts: int) -> int:
        @jax.jit
        def run(ids):
            lists = []
            for shift in shifts:
                mask = make_block_mask(
                    lambda b, h, q, kv: ids[b, q] == ids[b, kv] + shift,  # noqa: B023
                    B, N, 40, 70, tile_m=16, tile_n=32,
                )  # fmt: skip
                lists.append(mask.partial_counts)
            return sum(lists)

        return run.lower(ids).compile().as_text().count(" reduce(")

    assert reductions(0, 0) == reductions(0) < reductions(0, 1)


SIZES = {"q_length": 40, "kv_length": 64, "tile_m": 16, "tile_n": 16}
ONE = np.ones((1, 1, 3), np.int32)
BAD = {
    "tile_m must be an integer of at least 1": lambda: make_block_mask(
        MASKS["causal"], 1, 1, 8, 8, tile_m=0, tile_n=8
    ),
    "B must be an integer": lambda: make_block_mask(
        MASKS["causal"], None, 1, 8, 8, tile_m=8, tile_n=8
    ),
    "q_offset must be a scalar": lambda: make_block_mask(
        MASKS["causal"], 2, 1, 8, 8, tile_m=8, tile_n=8, q_offset=jnp.zeros(3, jnp.int32)
    ),
    "mask_mod must return one boolean": lambda: make_block_mask(
        lambda b, h, q, kv: kv - q, 1, 1, 8, 8, tile_m=8, tile_n=8
    ),
    "partial must be booleans": lambda: BlockMask.from_blocks(np.ones((3, 5), bool), **SIZES),
    "partial must be booleans ": lambda: BlockMask.from_blocks(np.ones((3, 4)), **SIZES),
    "mask must be booleans": lambda: BlockMask.from_mask(np.ones((8, 8)), tile_m=8, tile_n=8),
    "partial_counts must be ": lambda: BlockMask.from_lists([[0]], **SIZES),
    "partial_indices must be integers": lambda: BlockMask.from_indices(
        ONE, np.ones((1, 1, 3, 2)), **SIZES
    ),
    "partial_indices must be partial_counts' shape": lambda: BlockMask.from_indices(
        ONE, np.ones((2, 1, 3, 2), np.int32), **SIZES
    ),
    "partial_counts must lie in 0..2": lambda: BlockMask.from_indices(
        3 * ONE, np.ones((1, 1, 3, 2), np.int32), **SIZES
    ),
    "partial_indices must lie in 0..3": lambda: BlockMask.from_lists([[4], [], []], **SIZES),
    "a tile must stand at most once": lambda: BlockMask.from_lists(
        [[1], [], []], [[1], [], []], **SIZES
    ),
    "must be given together": lambda: BlockMask.from_indices(
        ONE, np.ones((1, 1, 3, 2), np.int32), ONE, **SIZES
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message.strip()):
        BAD[message]()


def test_a_block_mask_that_does_not_fit_the_call_is_refused() -> None:
    arrays = inputs(40, 64)
    made = BlockMask.from_lists([[0]] * 3, **SIZES)
    with pytest.raises(ValueError, match="block_mask must be a BlockMask"):
        flash_attention(**arrays, block_mask=np.ones((3, 4), bool))
    with pytest.raises(ValueError, match="block_mask must be made for query length 40"):
        flash_attention(**arrays, block_mask=dataclasses.replace(made, q_length=41))
    wrong = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape[1:])), made)
    with pytest.raises(ValueError, match="block_mask must have batch 1 or 2"):
        flash_attention(**arrays, block_mask=wrong)


def test_what_the_kernels_serve() -> None:
    arrays = {n: x.astype(jnp.bfloat16) for n, x in inputs(40, 64).items()}
    made = BlockMask.from_lists([[0]], q_length=40, kv_length=64, tile_m=64, tile_n=128)
    explanation = explain(**arrays, block_mask=made)
    assert (explanation.forward_reasons, explanation.backward_reasons) == ((), ())
    explanation = explain(**arrays, block_mask=made, deterministic=True)
    assert (explanation.forward_reasons, explanation.backward_reasons) == ((), ())


@pytest.mark.parametrize(
    ("tile_n", "head_dim", "blocks"),
    [
        (None, 64, "in pairs, which share products"),
        (256, 64, "in pairs, which share products"),
        (128, 64, "each alone, for block_mask's tiles are not multiples of 256 keys"),
        (128, 40, "each alone"),
        (256, 256, "a kernel for each gradient"),
    ],
)
def test_blocks_pair_where_a_tile_has_the_keys_of_two(tile_n, head_dim, blocks, monkeypatch):
    arrays = {n: jnp.zeros((1, 300, 2, head_dim), jnp.bfloat16) for n in ("query", "key", "value")}
    made = None
    if tile_n is not None:
        made = BlockMask.from_blocks(
            np.ones((3, -(-300 // tile_n)), bool),
            q_length=300,
            kv_length=300,
            tile_m=128,
            tile_n=tile_n,
        )
    assert explain(**arrays, block_mask=made).backward_blocks is None
    monkeypatch.setenv("JAX_FLASHCUTE_ARCH", "sm_100a")
    told = explain(**arrays, block_mask=made)
    assert told.backward_blocks == blocks
    assert f"blocks of the backward: {blocks}" in str(told)


def test_tiles_that_no_kernel_has_are_refused() -> None:
    arrays = {n: x.astype(jnp.bfloat16) for n, x in inputs(40, 64).items()}
    made = BlockMask.from_lists([[0]] * 3, **SIZES)
    explanation = explain(**arrays, block_mask=made)
    reason = "block_mask's tiles must be multiples of tiles that a kernel has, such as 64 x 64 or "
    assert explanation.forward_reasons == (reason + "128 x 128, got 16 x 16",)
    assert explanation.backward_reasons == explanation.forward_reasons
    with pytest.raises(NotImplementedError, match="got 16 x 16"):
        flash_attention(**arrays, block_mask=made, implementation="cute")


def test_a_configuration_of_smaller_tiles_keeps_the_registers() -> None:
    config = forward_config(64, 64)
    want = dataclasses.replace(config, tile_n=64)
    assert dividing(config, config.tile_m, 64, 64, 64) == want
    assert want.reasons_invalid(64, 64) == []


def test_tiles_of_64_by_64_suit_every_head_dim() -> None:
    for dims in itertools.product(range(8, 257, 8), repeat=2):
        assert dividing(forward_config(*dims), 64, 64, *dims) is not None, dims
        assert dividing_backward(backward_config(*dims), 64, 64, *dims) is not None, dims


def test_smaller_tiles_are_the_same_tiles() -> None:
    rng = np.random.default_rng(0)
    full, partial = jnp.asarray(rng.random((2, 1, 3, 3, 8)) < 0.4)
    sizes = {"q_length": 300, "kv_length": 500, "tile_m": 128, "tile_n": 64}
    made = BlockMask.from_blocks(partial, full, **sizes)
    divided = made.in_tiles(64, 32)
    kinds = jnp.repeat(jnp.repeat(made.kinds(), 2, axis=2), 2, axis=3)
    np.testing.assert_array_equal(divided.kinds(), kinds[:, :, :5, :16])
    with pytest.raises(ValueError, match="must divide"):
        made.in_tiles(48, 64)


def test_no_full_tile_lies_beyond_the_last_key() -> None:
    """Kernels take full tiles as they are; of two columns of 256 keys, 384 exist."""
    made = BlockMask.from_lists(
        [[]] * 2, [[1, 0], [1]], q_length=256, kv_length=384, tile_m=128, tile_n=256
    )
    divided = made.in_tiles(128, 128)
    counts, indices = np.asarray(divided.full_counts)[0, 0], np.asarray(divided.full_indices)[0, 0]
    assert [list(indices[i, : counts[i]]) for i in range(2)] == [[2, 0, 1], [2]]


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (0, 5, 5)], ids=str)
def test_nothing_to_attend(shape: tuple[int, int, int]) -> None:
    batch, t, s = shape
    blocks = make_block_mask(MASKS["causal"], batch, N, t, s, tile_m=16, tile_n=16)
    arrays = (jnp.ones((batch, t, N, 8)), *[jnp.ones((batch, s, 2, 8))] * 2)
    for implementation in ("xla", "reference"):
        out = flash_attention(*arrays, block_mask=blocks, implementation=implementation)
        assert out.shape == (batch, t, N, 8)
        assert np.all(out == 0)


@pytest.mark.parametrize(
    ("t", "s", "given", "wanted"),
    [
        (300, 500, (128, 128), (64, 64)),
        (1000, 777, (256, 64), (64, 64)),
        (130, 65, (256, 128), (128, 64)),
    ],
)
def test_transposed_lists(t: int, s: int, given: tuple, wanted: tuple) -> None:
    """Lists of the backward, against the transposed kinds of the smaller tiles."""
    rng = np.random.default_rng(0)
    lengths = {"q_length": t, "kv_length": s, "tile_m": given[0], "tile_n": given[1]}
    kinds = rng.integers(0, 3, (2, 3, math.ceil(t / given[0]), math.ceil(s / given[1])))
    # Partial tiles are shared by batch entries and heads; full ones are not.
    partial = BlockMask.from_kinds(jnp.asarray(kinds[:1, :1] == PARTIAL, jnp.int8), **lengths)
    full = np.where((kinds == FULL) & (kinds[:1, :1] != PARTIAL), FULL, 0)
    full = BlockMask.from_kinds(jnp.asarray(full, jnp.int8), **lengths)
    block_mask = dataclasses.replace(
        full, partial_counts=partial.partial_counts, partial_indices=partial.partial_indices
    )
    rows, columns = wanted
    lists = block_mask.transposed_lists(rows, columns)
    transposed = np.swapaxes(block_mask.in_tiles(columns, rows).kinds(), 2, 3)
    assert lists[0].shape[:2] == (1, 1)
    for kind, counts, indices in ((PARTIAL, *lists[:2]), (FULL, *lists[2:])):
        flags = np.broadcast_to(transposed == kind, (2, 3, *transposed.shape[2:]))
        for place in np.ndindex(*flags.shape[:3]):
            mine = tuple(min(i, n - 1) for i, n in zip(place, counts.shape[:3], strict=True))
            count, start = np.asarray(counts)[mine]
            assert start < indices.shape[3]
            listed = np.asarray(indices)[(*mine[:2], 0)][start : start + count]
            np.testing.assert_array_equal(listed, np.flatnonzero(flags[place]))
