"""Pictures of masks, and the tiles that ``explain`` counts."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import explain, make_block_mask, masks, scores, show_mask
from jax_flashcute.show import _COLORS

T, S = 150, 100
lengths = jnp.asarray([0, 70])
MASKS = {
    "causal": masks.causal,
    "window": masks.sliding_window(40),
    "batch": masks.padding(lengths),
    "head": lambda b, h, q, kv: (kv + h) % 2 == 0,
    "nothing": lambda b, h, q, kv: kv < 0,
}


def pixels_of(png: bytes) -> np.ndarray:
    image = pytest.importorskip("matplotlib.image").imread(io.BytesIO(png), format="png")
    return np.round(image[..., :3] * 255).astype(int)


@pytest.mark.parametrize("name", MASKS)
def test_tiles_are_those_of_a_block_mask(name: str) -> None:
    picture = show_mask(MASKS[name], T, S, tile_m=32, tile_n=48, batch=1, head=1, q_offset=3)
    kinds = make_block_mask(MASKS[name], 2, 2, T, S, tile_m=32, tile_n=48, q_offset=3).kinds()
    kinds = np.asarray(kinds)[-1, -1]
    np.testing.assert_array_equal(picture.kinds, kinds)
    q, kv = np.arange(T)[:, None] + 3, np.arange(S)[None, :]
    want = np.broadcast_to(MASKS[name](1, 1, q, kv), (T, S))
    np.testing.assert_array_equal(picture.elements, want)
    assert picture.share == want.mean()


def test_pixels_show_tiles_and_elements() -> None:
    picture = show_mask(masks.causal, 96, tile_m=32, tile_n=32)
    pixels = pixels_of(picture.png())
    scale = pixels.shape[0] // 96
    assert pixels.shape == (96 * scale, 96 * scale, 3)

    def color(q: int, kv: int) -> tuple:
        return tuple(pixels[q * scale + scale // 2, kv * scale + scale // 2])

    assert color(90, 5) == _COLORS["full"]
    assert color(5, 90) == _COLORS["skipped"]
    assert color(20, 5) == _COLORS["visible"]
    assert color(5, 20) == _COLORS["hidden"]
    assert picture._repr_png_() == picture.png()
    assert picture.counts == {"full": 3, "partial": 3, "skipped": 3}
    assert "keys seen: kv < q + 1" in str(picture)


def test_large_masks_are_tiles_alone(tmp_path) -> None:
    picture = show_mask(masks.causal, 1000, 600, tile_m=100)
    assert picture.elements is None
    assert picture.kinds.shape == (10, 5)
    picture.save(tmp_path / "mask.png")
    pixels = pixels_of((tmp_path / "mask.png").read_bytes())
    assert pixels.shape == (160, 80, 3)
    assert tuple(pixels[0, -1]) == _COLORS["skipped"]
    assert tuple(pixels[-1, 0]) == _COLORS["full"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="tile_n must be an integer of at least 1; got 0"):
        show_mask(masks.causal, 10, tile_n=0)
    with pytest.raises(ValueError, match="mask_mod must return one boolean"):
        show_mask(lambda b, h, q, kv: q, 10)


# ---- explain -------------------------------------------------------------------------------

INTERVALS = {
    "first_keys_and_window": masks.sliding_window(99) | (lambda b, h, q, kv: kv < 150),
    "full": lambda b, h, q, kv: kv >= 0,
    "causal": masks.causal,
    "window": masks.sliding_window(200, 30),
    "chunked": masks.chunked(300),
    "prefix": masks.prefix_lm(300),
    "compressed": masks.compressed_causal(4, complete_only=True),
}


def explained(q_length: int, kv_length: int, **options):
    query = jax.ShapeDtypeStruct((1, q_length, 2, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, kv_length, 2, 64), jnp.bfloat16)
    return explain(query, key, key, **options)


@pytest.mark.parametrize("name", INTERVALS)
@pytest.mark.parametrize("lengths", [(1000, 1000), (300, 1100)])
def test_explain_counts_the_tiles_of_an_interval(name: str, lengths) -> None:
    tiles = explained(*lengths, mask_mod=INTERVALS[name]).tiles
    assert tiles is not None
    sizes = {size: tiles.pop(size) for size in ("tile_m", "tile_n")}
    assert tiles == show_mask(INTERVALS[name], *lengths, **sizes).counts


def test_explain_says_what_is_read_and_how() -> None:
    ids = jnp.zeros(500, jnp.int32)
    explanation = explained(
        500, 500, mask_mod=masks.documents(ids), score_mod=scores.alibi(scores.alibi_slopes(2))
    )
    assert explanation.tiles is None
    assert explanation.loads == (
        "mask_mod reads int32[500]: uniform",
        "mask_mod reads int32[500]: contiguous, 4 aligned",
        "score_mod reads float32[2]: uniform",
    )
    assert "mask_mod reads int32[500]: contiguous, 4 aligned" in str(explanation)
    text = str(explained(500, 500, is_causal=True))
    assert "in a head:" in text
    assert explained(500, 500, is_causal=True, q_offset=jnp.asarray(3)).tiles is None
