"""Built-in masks and scores against dense NumPy predicates and formulas written out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import flash_attention, masks, scores, xla
from tests.arrays import random
from tests.compare import assert_close
from tests.unit.test_masks import B, K, N, results

SHAPES = [(37, 53), (70, 70), (65, 31)]
H = 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "_TILE_ELEMENTS_CPU", 1)


def inputs(t: int, s: int) -> dict:
    return {
        "query": random(0, B, t, N, H),
        "key": random(1, B, s, K, H),
        "value": random(2, B, s, K, H),
    }


RNG = np.random.default_rng(3)
IDS = RNG.integers(0, 4, (B, 70))
ROW_IDS = np.sort(RNG.integers(0, 9, 70))
OFFSETS = np.array([0, 7, 7, 20, 64])
LENGTHS = np.array([29, 0])
BITS = RNG.random((B, 1, 70, 96)) < 0.5
WORDS = np.packbits(BITS, axis=-1, bitorder="little").view(np.uint32)


def document_at(position):
    return np.searchsorted(OFFSETS, position, side="right")


MASKS = {
    "causal": (masks.causal, lambda b, h, q, k: k <= q),
    "sliding_window": (masks.sliding_window(9, 3), lambda b, h, q, k: (q - k <= 9) & (k - q <= 3)),
    "chunked": (masks.chunked(16), lambda b, h, q, k: np.floor(q / 16) == np.floor(k / 16)),
    "block_diagonal": (
        masks.block_diagonal(16, 5),
        lambda b, h, q, k: np.floor(q / 16) == np.floor(k / 5),
    ),
    "prefix_lm": (masks.prefix_lm(jnp.int32(11)), lambda b, h, q, k: (k < 11) | (k <= q)),
    "prefix_lm_each": (masks.prefix_lm(LENGTHS), lambda b, h, q, k: (k < LENGTHS[b]) | (k <= q)),
    "dilated": (
        masks.dilated(20, 3),
        lambda b, h, q, k: np.isin(q - k, [0, 3, 6, 9, 12, 15, 18]),
    ),
    "documents": (masks.documents(IDS), lambda b, h, q, k: IDS[b, q] == IDS[b, k]),
    "documents_of_both": (
        masks.documents(ROW_IDS, IDS),
        lambda b, h, q, k: ROW_IDS[q] == IDS[b, k],
    ),
    "documents_by_offsets": (
        masks.documents_by_offsets(OFFSETS, 70),
        lambda b, h, q, k: (document_at(q) == document_at(k)) & (q < 64) & (k < 64),
    ),
    "padding": (masks.padding(LENGTHS), lambda b, h, q, k: k < LENGTHS[b]),
    "compressed_causal": (masks.compressed_causal(4), lambda b, h, q, k: 4 * k <= q),
    "complete_only": (
        masks.compressed_causal(4, complete_only=True),
        lambda b, h, q, k: 4 * (k + 1) <= q + 1,
    ),
    "from_bits": (masks.from_bits(WORDS), lambda b, h, q, k: BITS[b, 0, q, k]),
    "composed": (
        masks.causal & ~masks.sliding_window(5) | (lambda b, h, q, kv: kv == 0),
        lambda b, h, q, k: ((k <= q) & (q - k > 5)) | (k == 0),
    ),
    "function_first": (
        (lambda b, h, q, kv: h != 1) & masks.causal,
        lambda b, h, q, k: (h != 1) & (k <= q),
    ),
}


def dense(predicate, t: int, s: int) -> np.ndarray:
    grid = np.meshgrid(*(np.arange(n) for n in (B, N, t, s)), indexing="ij")
    return np.broadcast_to(predicate(*grid), grid[0].shape)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_against_its_predicate(name: str) -> None:
    mask, predicate = MASKS[name]
    t, s = 70, 70
    rows = [x.ravel() for x in np.meshgrid(*(np.arange(n) for n in (B, N, t, s)), indexing="ij")]
    shown = jax.jit(jax.vmap(mask))(*(jnp.asarray(x, jnp.int32) for x in rows))
    expected = dense(predicate, t, s)
    np.testing.assert_array_equal(np.asarray(shown).reshape(B, N, t, s), expected)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_attention_with_a_mask(name: str, shape: tuple[int, int]) -> None:
    mask, predicate = MASKS[name]
    array = jnp.asarray(dense(predicate, *shape))
    expected = results("xla", inputs(*shape), lambda _: {"mask": array})
    # Both implementations, by turns: each mask meets both.
    for implementation in ("xla", "reference") if shape == SHAPES[0] else ("xla",):
        actual = results(implementation, inputs(*shape), lambda _: {"mask_mod": mask})
        assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("complete_only", [False, True])
@pytest.mark.parametrize("factor", [1, 3, 4, 64])
def test_compress_factor(factor: int, complete_only: bool) -> None:
    """More keys than blocks and fewer; the argument is the built-in mask."""
    mask = masks.compressed_causal(factor, complete_only=complete_only)
    for t, s in ((70, 30), (70, 1)):
        arrays = inputs(t, s)
        call = functools.partial(
            flash_attention,
            **arrays,
            compress_factor=factor,
            complete_only=complete_only,
            implementation="xla",
        )
        np.testing.assert_array_equal(
            call(), flash_attention(**arrays, mask_mod=mask, implementation="xla")
        )
    only = masks.padding(LENGTHS)
    np.testing.assert_array_equal(
        call(mask_mod=only),
        flash_attention(**arrays, mask_mod=mask & only, implementation="xla"),
    )


REFUSED = {
    "compress_factor must be an integer of at least 1": {"compress_factor": 0},
    "complete_only needs compress_factor": {"complete_only": True},
    "compress_factor excludes is_causal": {"compress_factor": 4, "is_causal": True},
    "compress_factor excludes local_window_size": {"compress_factor": 4, "local_window_size": 9},
}


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_that_do_not_go_with_compression(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention(**inputs(5, 5), **REFUSED[message])


BAD = {
    "left must be": lambda: masks.sliding_window(-1),
    "size|q_block must be": lambda: masks.chunked(0),
    "ids must be integers": lambda: masks.documents(np.ones((2, 3), np.float32)),
    "words must be uint32": lambda: masks.from_bits(np.ones((2, 3), np.uint32)),
    "a mask must be a function": lambda: masks.causal & np.ones(3),
    "cap must be a positive": lambda: scores.softcap(0.0),
    "table must be floating point": lambda: scores.relative_bias(np.ones((2, 8), int)),
    "heads must be at least 1": lambda: scores.alibi_slopes(0),
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_that_do_not_fit(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


# ---- scores ----------------------------------------------------------------------------------


def bucket(distance: int, buckets: int, bidirectional: bool, longest: int) -> int:
    """T5's definition, number by number."""
    side = 0
    if bidirectional:
        buckets //= 2
        side = buckets if distance > 0 else 0
        magnitude = abs(distance)
    else:
        magnitude = max(-distance, 0)
    single = buckets // 2
    if magnitude < single:
        return side + magnitude
    steps = math.log(magnitude / single) / math.log(longest / single) * (buckets - single)
    return side + min(single + int(steps + 1e-6), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20)])
def test_relative_buckets(buckets: int, longest: int, bidirectional: bool) -> None:
    distances = np.arange(-300, 301)
    actual = scores.relative_bucket(jnp.asarray(distances), buckets, bidirectional, longest)
    expected = [bucket(int(d), buckets, bidirectional, longest) for d in distances]
    # Powers of the ratio stand on an edge, where a rounding decides.
    differ = np.asarray(actual) != expected
    assert np.all(np.abs(np.asarray(actual) - expected)[differ] <= 1)
    assert np.mean(differ) <= 0.01
    assert np.max(actual) == buckets - 1


SLOPES = np.array([0.5, 0.25, 0.125, 0.1], np.float32)


def test_alibi_slopes() -> None:
    np.testing.assert_allclose(scores.alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-6)
    twelve = [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(scores.alibi_slopes(12), twelve, rtol=1e-6)


def additive(array) -> dict:
    return {"bias": array}


def alibi_bias(f, t: int, s: int):
    distance = np.abs(np.arange(t)[:, None] - np.arange(s)[None])
    return {"bias": -f["slopes"][None, :, None, None] * distance}


def bucketed_bias(f, t: int, s: int):
    index = [[bucket(k - q, 8, False, 20) for k in range(s)] for q in range(t)]
    return {"bias": f["table"][:, jnp.asarray(index)][None]}


SCORES = {
    "softcap": ({}, lambda f: scores.softcap(1.5), lambda f, t, s: {"logits_soft_cap": 1.5}),
    "alibi": ({"slopes": (N,)}, lambda f: scores.alibi(f["slopes"]), alibi_bias),
    "relative_bias": (
        {"table": (N, 8)},
        lambda f: scores.relative_bias(f["table"], bidirectional=False, max_distance=20),
        bucketed_bias,
    ),
    "biases": (
        {"head": (N,), "rows": (N, 70), "columns": (N, 70)},
        lambda f: scores.compose(
            scores.head_bias(f["head"]),
            scores.query_bias(f["rows"]),
            scores.key_bias(f["columns"]),
        ),
        lambda f, t, s: {
            "bias": f["head"][None, :, None, None]
            + f["rows"][None, :, :t, None]
            + f["columns"][None, :, None, :s]
        },
    ),
}


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_attention_with_a_score(name: str, shape: tuple[int, int]) -> None:
    """Out, LSE and the gradients of the arrays too, against what exists without a score_mod."""
    shapes, make, expected = SCORES[name]
    floating = inputs(*shape) | {n: random(9, *s) for n, s in shapes.items()}
    actual = results("xla", floating, lambda f: {"score_mod": make(f)})
    wanted = results("reference", floating, lambda f: expected(f, *shape))
    assert_close(actual, wanted, 5e-5)
