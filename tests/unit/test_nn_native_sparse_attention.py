"""The NNX module computes what its parameters and the function compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_flashcute.nn import NativeSparseAttention
from jax_flashcute.nsa import NSAConfig, native_sparse_attention

CONFIG = NSAConfig(block=4, num_selected=2, window=5, query_tile=8)


def test_against_the_function() -> None:
    module = NativeSparseAttention(
        24, 4, num_kv_heads=2, head_dim=8, config=CONFIG, project_compressed=True,
        positional=lambda x: 2 * x, implementation="reference", rngs=nnx.Rngs(0),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    module.gate_weights[...] = jnp.asarray(rng.standard_normal((4, 3, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 21, 24)), jnp.float32)
    lengths = jnp.asarray([21, 9])

    def expected(parameters, x):
        def heads(name):
            return (x @ parameters[name]["kernel"][...]).reshape(2, 21, -1, 8)

        out = native_sparse_attention(
            2 * heads("query"), 2 * heads("key"), heads("value"), config=CONFIG,
            **{n: parameters[n][...] for n in ("gate_weights", "key_weight", "value_weight")},
            key_value_seq_lengths=lengths, implementation="reference",
        )  # fmt: skip
        return out.reshape(2, 21, -1) @ parameters["out"]["kernel"][...]

    graph, parameters = nnx.split(module, nnx.Param)

    def actual(parameters, x):
        return nnx.merge(graph, parameters)(x, key_value_seq_lengths=lengths)

    def both(function):
        def loss(parameters):
            out = function(parameters, x)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)

    ((_, out), gradients), ((_, want), wanted) = both(actual), both(expected)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    flat = jax.tree.leaves_with_path(gradients)
    assert len(flat) == 7
    for (path, got), want in zip(flat, jax.tree.leaves(wanted), strict=True):
        assert np.any(got), path
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=str(path))


def test_refused() -> None:
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads, 4; got 3"):
        NativeSparseAttention(32, 4, num_kv_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_kv_heads must be an integer of at least 1; got 0"):
        NativeSparseAttention(32, 4, num_kv_heads=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_heads must divide in_features, 30"):
        NativeSparseAttention(30, 4, rngs=nnx.Rngs(0))
