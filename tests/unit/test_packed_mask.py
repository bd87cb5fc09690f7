"""A mask in bits is the mask of booleans that it stands for, on every path without a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_flashcute import BlockMask, explain, flash_attention, masks
from jax_flashcute.arguments import checked_call
from jax_flashcute.ffi.call import other_inputs
from jax_flashcute.kernels import registry
from jax_flashcute.visibility import packed_words, unpacked
from tests.compare import assert_close
from tests.simulator.test_forward_segments import call_of
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


@given(
    st.tuples(*(st.integers(1, n) for n in (2, 3, 5, 131))),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_packing_is_the_inverse_of_unpacking(shape, density: float, seed: int) -> None:
    bits = np.random.default_rng(seed).random(shape) < density
    words = packed_words(jnp.asarray(bits))
    rows, S = shape[2:]
    assert (words.dtype, words.shape) == (jnp.uint32, (*shape[:3], -(-S // 32)))
    keys = np.arange(32 * words.shape[3])
    found = np.asarray(unpacked(words, jnp.arange(rows), jnp.asarray(keys)))
    np.testing.assert_array_equal(found[..., :S], bits)
    assert not found[..., S:].any()


LARGE = {"query": (2, 1024, 16, 64), "key": (2, 1024, 4, 64), "value": (2, 1024, 4, 64)}


def bits_said(arch: str, mask: tuple, monkeypatch: pytest.MonkeyPatch, dims=LARGE, **call) -> str:
    """What is said of bits in a call of these shapes."""
    monkeypatch.setenv("JAX_FLASHCUTE_ARCH", arch)
    arrays = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in dims.items()}
    explained = explain(**arrays, mask=jax.ShapeDtypeStruct(mask, jnp.bool_), **call)
    assert all(line in str(explained).splitlines() for line in explained.bits)
    return "; ".join(explained.bits)


def test_where_booleans_are_packed_in_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    T, made = 1024, "mask: as bits, packed in the call"
    forward = "mask: as bits in the forward, packed in the call"

    def said(mask=(1, 1, T, T), arch="sm_90a", **call) -> str:
        return bits_said(arch, mask, monkeypatch, **call)

    assert said() == said((1, 16, T, T)) == said((2, 1, T, T)) == made
    # To the backward, of which no two heads share a mask, and one of keys alone.
    assert said((2, 16, T, T)) == said((1, 1, 1, T)) == forward
    assert said((T, T)) == said(is_causal=True, logits_soft_cap=3.0, deterministic=True) == made
    assert said((1, 1, T, 1)) == ""
    assert said(arch="sm_100a") == ""
    # What else is given may skip tiles at run time, or is packed already.
    blocks = BlockMask.from_lists(
        [[0]], [[]], q_length=T, kv_length=T, tile_m=T, tile_n=T
    )  # fmt: skip
    for call in (
        {"packed_mask": jax.ShapeDtypeStruct((1, 1, T, T // 32), jnp.uint32)},
        {"block_mask": blocks},
        {"segment_ids": jax.ShapeDtypeStruct((2, T), jnp.int32)},
        {"mask_mod": lambda b, h, q, kv: (q + kv) % 3 == 0},
    ):
        assert said(**call) == ""
    # A window leaves fewer scores than the mask has elements.
    assert said((2, 16, T, T), local_window_size=(500, 400)) == ""
    assert said((1, 16, T, T), local_window_size=(500, 400)) == forward
    # Half as many rows, heads and keys each are too few scores; so are few rows.
    half = {n: (2, 512, heads // 2, 64) for n, (_, _, heads, _) in LARGE.items()}
    assert said((1, 1, 512, 512), dims=half) == ""
    decode = {n: (64, rows, *LARGE[n][2:]) for n, rows in zip(LARGE, (64, T, T), strict=True)}
    assert said((1, 1, 64, T), dims=decode) == ""
    wide = {n: (*x[:3], 192) for n, x in LARGE.items()}
    assert said(dims=wide) == forward


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_nothing_else_changes_where_booleans_are_packed(monkeypatch, direction) -> None:
    spec, operands = call_of(
        (1, 70, 90), (2, 1), mask=np.ones((1, 1, 70, 90), bool), is_causal=True, q_offset=3
    )

    def key():
        return registry.kernel_key(spec, operands, direction, "sm_90a", 132)

    by_element = key()
    monkeypatch.setattr(registry, "LEAST_SCORES_FOR_WORDS", 1)
    of_words = key()
    assert by_element.elements is not None
    assert of_words.elements is None
    assert of_words.packed_mask == "t"
    changes = {"elements": None, "packed_mask": "t"}
    assert dataclasses.replace(by_element, **changes) == of_words


def test_layers_pack_their_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a program, forward and backward; and not while it is compiled, where it is a constant."""
    monkeypatch.setattr(registry, "LEAST_SCORES_FOR_WORDS", 1)
    spec, operands = call_of((1, 70, 90), (2, 1), mask=np.ones((1, 1, 70, 90), bool))

    def words(mask, layers: int) -> list:
        found = []
        for _ in range(layers):
            given = dataclasses.replace(operands, mask=mask)
            for direction in ("fwd", "bwd"):
                key = registry.kernel_key(spec, given, direction, "sm_90a", 132)
                found += other_inputs(key, spec, given)
        return found

    def shifts(program: jax.stages.Lowered) -> int:
        return program.compile().as_text().count(" shift-left(")

    once = shifts(jax.jit(packed_words).lower(operands.mask))

    def packings(program: jax.stages.Lowered) -> float:
        return shifts(program) / once

    of_layers = [
        packings(jax.jit(functools.partial(words, layers=n)).lower(operands.mask)) for n in (1, 3)
    ]
    assert of_layers == [1, 1]
    assert packings(jax.jit(lambda: words(operands.mask, 1)).lower()) == 1
