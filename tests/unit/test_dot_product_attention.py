"""jax.nn.dot_product_attention, argument by argument."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import dot_product_attention
from tests.arrays import random


def inputs(dtype=jnp.float32):
    """Query, key and value."""
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return tuple(random(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))


B, T, S, N, K, H = 2, 40, 40, 4, 2, 16
LENGTHS = jnp.asarray([17, 40], jnp.int32)

CALLS = {
    "plain": {},
    "bias": {"bias": random(3, B, N, T, S)},
    "bias_broadcast": {"bias": random(3, 1, 1, T, S)},
    "bias_three_dimensions": {"bias": random(3, N, T, S)},
    "bias_integers": {"bias": jnp.arange(S).reshape(1, 1, 1, S) % 5},
    "mask": {"mask": (random(3, B, N, T, S) < 0.5).at[..., 0].set(True)},
    "mask_broadcast": {"mask": (random(3, B, 1, 1, S) < 0.5).at[..., 0].set(True)},
    "scale": {"scale": 0.3},
    "is_causal": {"is_causal": True},
    "query_seq_lengths": {"query_seq_lengths": LENGTHS},
    "key_value_seq_lengths": {"key_value_seq_lengths": LENGTHS},
    "both_lengths": {
        "query_seq_lengths": LENGTHS,
        "key_value_seq_lengths": LENGTHS,
        "is_causal": True,
    },
    "window_pair": {"local_window_size": (3, 2)},
    "window_integer": {"local_window_size": 5},
    "window_causal": {"local_window_size": (6, 6), "is_causal": True},
    "everything": {
        "bias": random(3, 1, N, T, S),
        "mask": jnp.ones((B, 1, T, S), bool),
        "scale": 0.2,
        "is_causal": True,
        "key_value_seq_lengths": LENGTHS,
        "local_window_size": 40,
    },
}


def visible_rows(arguments: dict) -> np.ndarray:
    """Rows whose results are defined alike: those that see a key."""
    rows = np.ones((B, T), bool)
    if "query_seq_lengths" in arguments:
        rows &= np.arange(T)[None] < np.asarray(LENGTHS)[:, None]
    return rows


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_jax_nn(name: str, implementation: str) -> None:
    arguments = CALLS[name]
    dout = random(4, B, T, N, H)
    rows = visible_rows(arguments)

    def results(attend, **own):
        @jax.jit
        def run(*inputs):
            def both(*inputs):
                return attend(*inputs, **arguments, **own, return_residual=True)

            (out, lse), vjp = jax.vjp(both, *inputs)
            return out, lse, vjp((dout, jnp.zeros_like(lse)))

        return run(*inputs())

    out, lse, gradients = results(dot_product_attention, implementation=implementation)
    peer_out, peer_lse, peer_gradients = results(jax.nn.dot_product_attention)
    # Padded rows included: both give 0.
    np.testing.assert_allclose(out, peer_out, atol=1e-5)
    for got, want in zip(gradients, peer_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    assert lse.dtype == peer_lse.dtype
    np.testing.assert_allclose(lse[rows], peer_lse[rows], atol=1e-5)


def test_same_signature() -> None:
    ours = inspect.signature(dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    described = [
        {name: (parameter.kind, parameter.default) for name, parameter in signature.items()}
        for signature in (ours, theirs)
    ]
    assert described[0] == described[1]
    assert list(ours) == list(theirs)


def test_positional_bias_and_mask() -> None:
    bias, mask = CALLS["bias"]["bias"], CALLS["mask"]["mask"]
    np.testing.assert_allclose(
        dot_product_attention(*inputs(), bias, mask),
        jax.nn.dot_product_attention(*inputs(), bias, mask),
        atol=1e-5,
    )


def test_gradient_of_bias() -> None:
    def gradient(attend):
        return jax.grad(lambda bias: jnp.sum(jnp.sin(attend(*inputs(), bias))))(
            CALLS["bias_broadcast"]["bias"]
        )

    np.testing.assert_allclose(
        gradient(dot_product_attention), gradient(jax.nn.dot_product_attention), atol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_without_a_batch(dtype) -> None:
    without_batch = [x[0] for x in inputs(dtype)]
    arguments = {"is_causal": True, "key_value_seq_lengths": jnp.asarray([30], jnp.int32)}
    arguments |= {"bias": random(3, N, T, S), "return_residual": True}
    actual, lse = dot_product_attention(*without_batch, **arguments)
    expected, peer_lse = jax.nn.dot_product_attention(*without_batch, **arguments)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert (lse.shape, lse.dtype) == (peer_lse.shape, peer_lse.dtype)
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}[jnp.dtype(dtype).name]
    np.testing.assert_allclose(
        np.float32(actual), np.float32(expected), atol=tolerance, rtol=tolerance
    )
    np.testing.assert_allclose(
        np.float32(lse), np.float32(peer_lse), atol=tolerance, rtol=tolerance
    )


def test_more_queries_than_keys_and_fewer() -> None:
    """Causal is aligned at the start in either case."""
    for lengths in ((50, 20), (20, 50)):
        query, key = random(0, 1, lengths[0], 2, 8), random(1, 1, lengths[1], 2, 8)
        np.testing.assert_allclose(
            dot_product_attention(query, key, key, is_causal=True),
            jax.nn.dot_product_attention(query, key, key, is_causal=True),
            atol=1e-5,
        )


def test_the_residual_has_no_gradient() -> None:
    query = random(0, 1, 8, 2, 4)

    def total(attend, query):
        return jnp.sum(attend(query, query, query, return_residual=True)[1])

    for attend in (dot_product_attention, jax.nn.dot_product_attention):
        np.testing.assert_array_equal(jax.grad(lambda q, f=attend: total(f, q))(query), 0)


def test_empty_rows_give_zero() -> None:
    """The one difference that is meant: jax.nn gives them the mean of all values."""
    query = random(0, 1, 8, 2, 4)
    mask = jnp.ones((1, 1, 8, 8), bool).at[:, :, 3].set(False)
    out, lse = dot_product_attention(query, query, query, mask=mask, return_residual=True)
    assert np.all(out[:, 3] == 0)
    assert np.all(np.isneginf(lse[:, 3]))


def test_another_value_head_dim_is_refused_as_in_jax_nn() -> None:
    query, value = random(0, 1, 8, 2, 4), random(1, 1, 8, 2, 6)
    with pytest.raises(ValueError, match="value"):
        jax.nn.dot_product_attention(query, query, value)
    with pytest.raises(ValueError, match=r"value must have the shape of key.*flash_attention"):
        dot_product_attention(query, query, value)


def test_cudnn_is_no_implementation_of_ours() -> None:
    query = random(0, 1, 8, 2, 4)
    with pytest.raises(ValueError, match="implementation must be one of"):
        dot_product_attention(query, query, query, implementation="cudnn")
