"""Lists of tiles and packed sequences on a GPU, through ``flash_attention``.

Against the dense reference in float32 on the same 16-bit inputs; and for leaks, against itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_flashcute import BlockMask, explain, flash_attention, make_block_mask, masks
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config import sm90

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-2
"""Relative error in the Frobenius norm: bfloat16 inputs, probabilities and results."""

LENGTHS = [(113, 203), (128, 217), (383, 769), (1023, 1024), (700, 300)]


def inputs(lengths, heads=(2, 2), head_dim=128, batch=2, seed=0) -> dict[str, jax.Array]:
    draw = np.random.default_rng(seed).standard_normal
    (T, S), (N, K) = lengths, heads
    shapes = {"query": (T, N), "key": (S, K), "value": (S, K)}
    return {
        name: jnp.asarray(draw((batch, *shape, head_dim)), jnp.bfloat16)
        for name, shape in shapes.items()
    }


def results(main: dict, implementation, **call) -> dict[str, np.ndarray]:
    """Out, LSE and the gradients."""
    arrays = {
        n: x for n, x in call.items() if all(isinstance(y, jax.Array) for y in jax.tree.leaves(x))
    }
    static = {n: x for n, x in call.items() if n not in arrays}

    @jax.jit
    def run(main, arrays):
        def attend(main):
            return flash_attention(
                **main, **arrays, **static, implementation=implementation, return_residual=True
            )

        (out, lse), pull = jax.vjp(attend, main)
        rng = np.random.default_rng(1)
        d_out = jnp.asarray(rng.standard_normal(out.shape), jnp.bfloat16).astype(out.dtype)
        d_lse = jnp.asarray(rng.standard_normal(lse.shape), jnp.float32)
        (gradients,) = pull((d_out, jnp.where(jnp.isinf(lse), 0, d_lse)))
        return {"out": out, "lse": lse} | {f"d_{n}": g for n, g in gradients.items()}

    return {n: np.asarray(x, np.float64) for n, x in run(main, arrays).items()}


def check(main: dict, **call) -> dict[str, np.ndarray]:
    plan = explain(**main, **call)
    assert (plan.forward, plan.backward) == ("cute", "cute"), plan
    got = results(main, "cute", **call)
    want = results({n: x.astype(jnp.float32) for n, x in main.items()}, "reference", **call)
    for name, expected in want.items():
        seen = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(got[name]), seen, name)
        error = np.linalg.norm(np.where(seen, got[name] - expected, 0))
        assert error < TOLERANCE * max(np.linalg.norm(expected[seen]), 1e-2), (name, error)
    return got


def thresholds(b, h, q, kv):
    return kv >= 37 * (b + 1)


def over(limits: jax.Array):
    return lambda b, h, q, kv: kv >= limits[kv]


def narrowed(widths: jax.Array):
    return lambda b, h, q, kv: (kv <= q) & (kv > q - widths[q])


def ids_of(length: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).integers(0, 5, length), jnp.int32)


MASKS = {
    "causal": lambda T, S: masks.causal,
    "window": lambda T, S: masks.sliding_window(100, 20),
    "prefix": lambda T, S: masks.prefix_lm(150),
    "chunked": lambda T, S: masks.chunked(128),
    "mini_causal": lambda T, S: lambda b, h, q, kv: q % 128 >= kv % 128,
    "dilated": lambda T, S: lambda b, h, q, kv: (q >= kv) & (q - kv < 256) & ((q - kv) % 2 == 0),
    "documents": lambda T, S: masks.documents(ids_of(T), ids_of(S)),
    "thresholds": lambda T, S: thresholds,
    "thresholds_of_keys": lambda T, S: over(90 * ids_of(S)),
    "windows_of_queries": lambda T, S: narrowed(40 * ids_of(T)),
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_with_their_own_lists(name: str, lengths: tuple[int, int]) -> None:
    mask = MASKS[name](*lengths)
    # Heads of an even group load tiles in pairs.
    for tile, heads in ((128, (4, 1)), (64, (6, 2)), (64, (2, 1))):
        blocks = make_block_mask(mask, 2, heads[0], *lengths, tile_m=tile, tile_n=tile)
        check(inputs(lengths, heads), mask_mod=mask, block_mask=blocks)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lists_of_all_heads(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    """The gradients of keys go from head to head."""
    monkeypatch.setattr(sm90, "RESIDENT_BYTES", 1)
    kept = np.random.default_rng(3).random((36, 37)) < 0.6
    kept[4], kept[:, 5] = False, False
    sizes = {"q_length": 4500, "kv_length": 4700, "tile_m": 128, "tile_n": 128}
    blocks = BlockMask.from_blocks(kept, kept, **sizes)
    main = inputs((4500, 4700), (8, 2), head_dim, batch=1)
    first = check(main, block_mask=blocks)
    for _ in range(50):
        again = results(main, "cute", block_mask=blocks)
        for name in ("out", "lse", "d_key", "d_value"):
            np.testing.assert_array_equal(again[name], first[name], name)


def hide_some(b, h, q, kv):
    return (kv - 40 * h) % 400 < 300


MADE = {
    "mini_causal": MASKS["mini_causal"],
    "dilated": MASKS["dilated"],
    "documents": MASKS["documents"],
    "thresholds_of_heads": lambda T, S: hide_some,
    "half_hidden": lambda T, S: lambda b, h, q, kv: (q * kv) % 2 == (q // 300) * (kv // 200) % 2,
}


def make_lists_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "LEAST_SCORES_FOR_LISTS", 1)
    monkeypatch.setattr(registry, "LEAST_HEADS_FOR_A_LIST", 1)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_lists_made_in_the_call(monkeypatch, name: str, deterministic: bool) -> None:
    make_lists_always(monkeypatch)
    lengths = (1023, 1100)
    mask = MADE[name](*lengths)
    main = inputs(lengths, (6, 2), 64 if deterministic else 128)
    call = {"mask_mod": mask, "deterministic": deterministic}
    assert explain(**main, **call).lists == "made from mask_mod in the call"
    check(main, **call)
    lengths = {
        "query_seq_lengths": jnp.asarray([700, 1023]),
        "key_value_seq_lengths": jnp.asarray([1100, 333]),
    }
    check(main, **call, **lengths, is_causal=True, q_offset=jnp.asarray([0, 90]))


def test_lists_made_under_vmap(monkeypatch) -> None:
    """Each element's own arrays of the mask decide about its own lists."""
    make_lists_always(monkeypatch)
    examples = [inputs((600, 600), (4, 2), batch=1, seed=seed) for seed in range(3)]
    ids = jnp.stack([jnp.roll(ids_of(600), 50 * i) for i in range(3)])

    def attend(main, ids):
        def mask(b, h, q, kv):
            return ids[q] == ids[kv]

        return flash_attention(**main, mask_mod=mask, implementation="cute")

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *examples)
    mapped = jax.jit(jax.vmap(attend))(stacked, ids)
    for i, main in enumerate(examples):
        np.testing.assert_array_equal(mapped[i], jax.jit(attend)(main, ids[i]))


def test_two_layers_make_their_lists_once(monkeypatch) -> None:
    """In XLA's program for the GPU, forward and backward, however many layers there are."""
    make_lists_always(monkeypatch)
    main = inputs((1024, 1024), (4, 2))
    ids = ids_of(1024)

    def reductions(layers: int) -> int:
        def loss(main, ids):
            x = main["query"]
            for _ in range(layers):
                x = flash_attention(
                    x, main["key"], main["value"], implementation="cute",
                    mask_mod=lambda b, h, q, kv: ids[q] == ids[kv],
                )  # fmt: skip
            return jnp.sum(x.astype(jnp.float32))

        text = jax.jit(jax.grad(loss)).lower(main, ids).compile().as_text()
        return sum("classify" in line and " reduce(" in line for line in text.splitlines())

    assert reductions(1) == reductions(3) > 0


def random_kinds(tiles, batch, heads, seed=0) -> np.ndarray:
    kinds = np.random.default_rng(seed).integers(0, 3, (batch, heads, *tiles))
    kinds[:, :, 0] = 0
    kinds[:, :, -1] = 2
    kinds[..., 1:4] = 0
    return kinds


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (7, 1)], ids=str)
def test_lists_of_each_batch_entry_and_head(head_dim: int, heads: tuple[int, int]) -> None:
    main = inputs((500, 1100), heads, head_dim)
    kinds = random_kinds((4, 9), 2, heads[0])
    sizes = {"q_length": 500, "kv_length": 1100, "tile_m": 128, "tile_n": 128}
    blocks = BlockMask.from_blocks(kinds > 0, kinds == 2, **sizes)
    check(main, block_mask=blocks, mask_mod=MASKS["dilated"](0, 0), is_causal=True)


EMPTY_ROWS = {
    "first": [0],
    "several_in_a_row": [1, 2, 3],
    "first_and_last": [0, 1, 6, 7],
    "all_but_one": [0, 1, 2, 3, 5, 6, 7],
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_rows_and_columns_of_empty_lists(name: str, deterministic: bool) -> None:
    kinds = np.random.default_rng(3).integers(0, 3, (2, 3, 8, 8))
    sizes = {"q_length": 1000, "kv_length": 1000, "tile_m": 128, "tile_n": 128}
    for axis in (2, 3):
        hidden = kinds.copy()
        np.moveaxis(hidden, axis, 0)[EMPTY_ROWS[name]] = 0
        blocks = BlockMask.from_blocks(hidden > 0, hidden == 2, **sizes)
        call = {"block_mask": blocks, "deterministic": deterministic}
        check(inputs((1000, 1000), (3, 1)), mask_mod=MASKS["dilated"](0, 0), **call)


def test_shared_lists_are_expanded_ones() -> None:
    main = inputs((300, 400), (4, 2))
    kinds = random_kinds((3, 4), 1, 1)
    sizes = {"q_length": 300, "kv_length": 400, "tile_m": 128, "tile_n": 128}
    shared = BlockMask.from_blocks(kinds > 0, kinds == 2, **sizes)
    expanded = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 4, *x.shape[2:])), shared)
    one, other = (results(main, "cute", block_mask=b) for b in (shared, expanded))
    for name in ("out", "lse", "d_key", "d_value"):
        np.testing.assert_array_equal(one[name], other[name], name)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_all_tiles_full_are_the_dense_result(head_dim: int) -> None:
    main = inputs((1023, 1024), (2, 1), head_dim)
    every = np.ones((8, 8), bool)
    sizes = {"q_length": 1023, "kv_length": 1024, "tile_m": 128, "tile_n": 128}
    blocks = BlockMask.from_blocks(every, every, **sizes)
    listed, dense = (results(main, "cute", **c) for c in ({"block_mask": blocks}, {}))
    if head_dim == 128:  # below, lists have a configuration of their own
        for name in ("out", "lse", "d_key", "d_value"):
            np.testing.assert_array_equal(listed[name], dense[name], name)
    for name, x in dense.items():
        np.testing.assert_allclose(listed[name], x, atol=0.05, rtol=0.02)


def mismatches(main: dict, repeats: int, **call) -> int:
    """How often the gradients of repeated calls, on the device, differ from the first ones."""
    arrays = {n: x for n, x in call.items() if isinstance(x, (jax.Array, BlockMask, tuple))}
    static = {n: x for n, x in call.items() if n not in arrays}
    draw = np.random.default_rng(1).standard_normal
    shape = (*main["query"].shape[:3], main["value"].shape[3])
    d_out = jnp.asarray(draw(shape), jnp.bfloat16)

    def gradients(main, arrays):
        def attend(main):
            return flash_attention(
                **main, **arrays, **static, implementation="cute", deterministic=True
            )

        (found,) = jax.vjp(attend, main)[1](d_out)
        return jax.tree.map(lambda x: lax.bitcast_convert_type(x, jnp.uint16), found)

    @jax.jit
    def run(main, arrays):
        first = gradients(main, arrays)

        def repeat(i, count):
            # A barrier, so that the call is not taken out of the loop.
            again = gradients(*lax.optimization_barrier((main, arrays, i))[:2])
            differs = [jnp.any(again[name] != first[name]) for name in first]
            return count + jnp.any(jnp.stack(differs))

        return lax.fori_loop(0, repeats, repeat, jnp.int32(0))

    return int(run(main, arrays))


DETERMINISTIC = {
    "lists_64": ((6, 2), 64),
    "lists_128": ((3, 1), 128),
    "lists_256": ((2, 1), 256),
    "documents_128": ((7, 1), 128),
    "scattered_64": ((2, 2), 64),
    "scattered_256": ((2, 2), 256),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_gradients(name: str) -> None:
    """Right, and 1,000 times the same bits; a wrong turn would hang instead."""
    heads, head_dim = DETERMINISTIC[name]
    length = 2000
    main = inputs((length, length), heads, head_dim)
    call: dict = {"is_causal": True}
    if name.startswith("lists"):
        sizes = {"q_length": length, "kv_length": length, "tile_m": 128, "tile_n": 128}
        kinds = random_kinds((16, 16), 2, heads[0])
        call["block_mask"] = BlockMask.from_blocks(kinds > 0, kinds == 2, **sizes)
        call["mask_mod"] = MASKS["dilated"](0, 0)
    else:
        ids = np.random.default_rng(5).integers(-1, 9, (2, length))
        ids = np.sort(ids) if name.startswith("documents") else ids
        call["segment_ids"] = jnp.asarray(ids, jnp.int32)
    check(main, **call, deterministic=True)
    assert mismatches(main, 1000, **call) == 0


def test_no_tile_and_a_sink() -> None:
    main = inputs((300, 400))
    sizes = {"q_length": 300, "kv_length": 400, "tile_m": 128, "tile_n": 128}
    blocks = BlockMask.from_blocks(np.zeros((3, 4), bool), **sizes)
    sinks = jnp.asarray([0.5, -3.0])
    got = check(main, block_mask=blocks, sinks=sinks)
    assert not got["out"].any()
    np.testing.assert_allclose(got["lse"], np.broadcast_to(sinks, got["lse"].shape), rtol=1e-6)


# ---- packed sequences ----------------------------------------------------------------------


def boundaries(length: int, count: int, seed: int = 0) -> np.ndarray:
    """Of documents of all lengths, some empty, with padding behind the last."""
    ends = np.sort(np.random.default_rng(seed).integers(0, length - 5, count))
    return np.concatenate([[0], ends])


FEATURES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (70, 10)},
    "score": {"score_mod": lambda s, b, h, q, kv: s - 0.05 * jnp.abs(q - kv)},
    "mask": {"mask_mod": lambda b, h, q, kv: (q + kv) % 3 != 0, "is_causal": True},
}


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (7, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("positions", ["sequence", "segment"])
def test_packed(feature: str, positions: str, head_dim: int, heads: tuple[int, int]) -> None:
    main = inputs((1100, 1100), heads, head_dim)
    ends = jnp.asarray([boundaries(1100, 9), boundaries(1100, 9, 1)], jnp.int32)
    is_padding = (jnp.arange(1100) >= ends[:, -1:])[..., None, None]
    main = {name: jnp.where(is_padding, jnp.nan, x) for name, x in main.items()}
    check(main, cu_seqlens_q=ends, positions=positions, **FEATURES[feature])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("is_sorted", [True, False])
def test_pairs_of_ids(lengths: tuple[int, int], is_sorted: bool) -> None:
    rng = np.random.default_rng(4)
    ids = [rng.integers(-1, 4, (2, length)) for length in lengths]
    ids = tuple(jnp.asarray(np.sort(x) if is_sorted else x, jnp.int32) for x in ids)
    for features in ({}, {"is_causal": True}, {"local_window_size": (30, 9)}):
        for positions in ("sequence", "segment"):
            check(inputs(lengths, (3, 1)), segment_ids=ids, positions=positions, **features)


def test_a_row_of_padding_and_many_segments_of_one_token() -> None:
    main = inputs((4096, 4096), (2, 1), 64)
    ids = jnp.stack([jnp.full(4096, -1), jnp.arange(4096)]).astype(jnp.int32)
    got = results(main, "cute", segment_ids=ids, is_causal=True)
    assert not got["out"][0].any()
    assert np.isneginf(got["lse"][0]).all()
    value = np.repeat(np.asarray(main["value"], np.float64)[1], 2, axis=1)
    np.testing.assert_allclose(got["out"][1], value, rtol=1e-2)


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("features", [{}, {"is_causal": True, "deterministic": True}], ids=str)
def test_nothing_leaks_between_segments(features: dict, is_sorted: bool) -> None:
    length = 1500
    ids = np.random.default_rng(5).integers(0, 6, (2, length))
    ids = np.sort(ids) if is_sorted else ids
    call = {"segment_ids": jnp.asarray(ids, jnp.int32), **features}
    main, other = (inputs((length, length), (2, 1), seed=seed) for seed in (0, 7))
    changed = jnp.asarray(ids == 3)[..., None, None]
    mixed = {n: jnp.where(changed, other[n], main[n]) for n in main}
    before, after = (results(x, "cute", **call) for x in (main, mixed))
    kept = ids != 3
    # Elsewhere dQ is a sum whose order differs from run to run.
    names = ("d_query",) if features.get("deterministic") else ()
    for name in (*names, "out", "lse", "d_key", "d_value"):
        np.testing.assert_array_equal(before[name][kept], after[name][kept], name)
