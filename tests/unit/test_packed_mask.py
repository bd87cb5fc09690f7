"""A mask in bits is the mask of booleans that it stands for, on every path without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import flash_attention, masks
from jax_flashcute.arguments import checked_call
from tests.compare import assert_close
from tests.unit.test_masks import inputs, results

B, N, T, S = 2, 4, 37, 70


def pair(*shape: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Words (..., T, ceil(S / 32)) and their booleans; what stands beyond S is set."""
    bits = np.random.default_rng(seed).random((*shape, S)) < 0.4
    ones = np.ones((*shape, -S % 32), bool)
    packed = np.packbits(np.concatenate([bits, ones], -1), axis=-1, bitorder="little")
    return jnp.asarray(packed.view("<u4").astype(np.uint32)), jnp.asarray(bits)


@pytest.mark.parametrize(
    ("implementation", "shape"),
    [("xla", (B, N, T)), ("xla", (1, N, 1)), ("reference", (B, 1, T)), ("reference", (1, 1, 1))],
    ids=str,
)
def test_words_are_booleans(implementation: str, shape: tuple[int, ...]) -> None:
    words, bits = pair(*shape)
    arrays = inputs(T, S)
    assert arrays["query"].shape[:3] == (B, T, N)
    more = {"is_causal": True, "q_offset": 40}
    actual = results(implementation, arrays, lambda _: {"packed_mask": words} | more)
    assert_close(actual, results(implementation, arrays, lambda _: {"mask": bits} | more), 1e-6)


def test_from_bits_alone_is_the_argument() -> None:
    words, _ = pair(B, 1, T)
    shapes = ((B, T, N, 8), (B, S, N, 8), (B, S, N, 8))
    call = functools.partial(
        checked_call, *(jnp.zeros(s) for s in shapes), **dict.fromkeys(ARGUMENTS), is_causal=False
    )
    spec, operands = call(mask_mod=masks.from_bits(words), q_offset=0)
    assert spec.mask_mod is None
    assert operands.packed_mask is words
    for other in ({"q_offset": 3}, {"q_offset": 0, "packed_mask": words}):
        spec, _ = call(mask_mod=masks.from_bits(words), **other)
        assert spec.mask_mod is not None
    spec, _ = call(mask_mod=masks.from_bits(words) & masks.causal, q_offset=0)
    assert spec.mask_mod is not None


ARGUMENTS = (
    *("bias", "mask", "scale", "query_seq_lengths", "key_value_seq_lengths", "local_window_size"),
    *("logits_soft_cap", "sinks", "score_mod", "block_mask", "segment_ids", "cu_seqlens_q"),
    *("cu_seqlens_k", "positions", "deterministic"),
)


def test_vmap() -> None:
    words, bits = pair(3, 1, 1, T)
    arrays = inputs(T, S)

    def loss(query, **mask):
        return (flash_attention(**arrays | {"query": query}, **mask) ** 2).sum()

    def gradients(name, array):
        of_one = jax.grad(lambda query, x: loss(query, **{name: x}))
        return jax.jit(jax.vmap(of_one, in_axes=(None, 0)))(arrays["query"], array)

    np.testing.assert_allclose(
        gradients("packed_mask", words), gradients("mask", bits), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "words",
    [np.zeros((B, N, T, 2), np.uint32), np.zeros((B, N, T, 3), np.int32), True],
    ids=["short", "signed", "scalar"],
)
def test_what_does_not_fit_is_named(words) -> None:
    with pytest.raises(ValueError, match=r"packed_mask must be uint32 of shape .* \(2, 4, 37, 3\)"):
        flash_attention(**inputs(T, S), packed_mask=words)
