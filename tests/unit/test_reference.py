"""The reference against jax.nn, against finite differences, and at every edge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_flashcute import flash_attention
from tests.cases import FEATURES, Case, differentiable
from tests.compare import assert_close, out_lse_and_gradients

reference = functools.partial(flash_attention, implementation="reference")


@pytest.mark.parametrize(
    "name",
    ["full", "causal", "window", "groups", "multi_query", "bias_full", "bias_relative"],
)
def test_agrees_with_jax_nn(name: str) -> None:
    """Where no row is empty, the two mean the same; gradients too."""
    case = FEATURES[name]
    arrays = case.arrays()
    static = {k: v for k, v in case.static.items() if v is not None}
    expected, peer_vjp = jax.vjp(
        lambda arrays: jax.nn.dot_product_attention(**arrays, **static), arrays
    )
    actual, vjp = jax.vjp(lambda arrays: reference(**arrays, **static), arrays)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    dout = jnp.asarray(np.random.default_rng(3).standard_normal(actual.shape), actual.dtype)
    assert_close(vjp(dout)[0], peer_vjp(dout)[0], 1e-5)


@pytest.mark.parametrize("name", ["full", "causal_offset", "sinks_empty_rows", "everything"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_are_finite_differences(name: str, implementation: str) -> None:
    """In float64, of out and LSE, for every float operand."""
    with jax.enable_x64(True):
        case = FEATURES[name]
        arrays = case.arrays(jnp.float64, poison=False)
        floating = differentiable(arrays)
        others = {k: v for k, v in arrays.items() if k not in floating}

        @jax.jit
        def outputs(floating):
            out, lse = flash_attention(
                **floating,
                **others,
                **case.static,
                implementation=implementation,
                return_residual=True,
            )
            assert lse.dtype == jnp.float64
            return out, jnp.where(lse == -jnp.inf, 0, lse)

        check_grads(outputs, (floating,), order=1, modes=("rev",), rtol=1e-6, atol=1e-6)


def test_is_differentiable_any_number_of_times() -> None:
    with jax.enable_x64(True):
        case = Case(batch=1, seqlen_q=5, seqlen_k=6, head_dim=3, head_dim_v=2, causal=True)
        arrays = case.arrays(jnp.float64)

        @jax.jit
        def loss(arrays):
            return jnp.sum(jnp.sin(reference(**arrays, is_causal=True, logits_soft_cap=2.0)))

        check_grads(loss, (arrays,), order=2, modes=("fwd", "rev"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_without_keys(implementation: str) -> None:
    """Output 0, LSE -inf, gradients exactly 0: first rows, whose positions are negative."""
    case = Case(batch=1, causal=True)
    arrays = case.arrays() | {"q_offset": jnp.asarray([-40], jnp.int32)}
    results = out_lse_and_gradients(case, arrays, implementation)
    assert np.all(results["out"][:, :40] == 0)
    assert np.all(np.isneginf(results["lse"][:, :40]))
    assert np.all(results["d_query"][:, :40] == 0)
    assert np.all(results["out"][:, 40:] != 0)
    assert np.all(np.isfinite(results["lse"][:, 40:]))
    visible_keys = case.seqlen_q - 40
    assert np.all(results["d_key"][:, visible_keys:] == 0)
    assert np.all(results["d_value"][:, visible_keys:] == 0)
    assert np.all(results["d_value"][:, :visible_keys] != 0)
    assert not any(np.isnan(array).any() for array in results.values())


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nothing_leaks_from_beyond_the_lengths(implementation: str) -> None:
    """NaN there changes no bit, forward or backward; padded rows are empty rows."""
    case = FEATURES["everything"]
    clean = case.arrays(poison=False)
    poisoned = case.arrays(poison=True)
    assert np.isnan(poisoned["key"]).any()
    expected = out_lse_and_gradients(case, clean, implementation)
    actual = out_lse_and_gradients(case, poisoned, implementation)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    for b in range(case.batch):
        q_length = int(clean["query_seq_lengths"][b])
        kv_length = int(clean["key_value_seq_lengths"][b])
        assert np.all(actual["out"][b, q_length:] == 0)
        assert np.all(np.isneginf(actual["lse"][b, q_length:]))
        assert np.all(actual["d_query"][b, q_length:] == 0)
        assert np.all(actual["d_key"][b, kv_length:] == 0)
        assert np.all(actual["d_value"][b, kv_length:] == 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_sinks_are_an_extra_key_without_value(implementation: str) -> None:
    case = Case(sinks=True, group=2, seqlen_q=20, seqlen_k=30)
    arrays = case.arrays()
    sinks = arrays.pop("sinks")
    out, lse = flash_attention(
        **arrays, sinks=sinks, implementation=implementation, return_residual=True
    )
    extended = {
        "query": arrays["query"],
        "key": jnp.pad(arrays["key"], ((0, 0), (0, 1), (0, 0), (0, 0))),
        "value": jnp.pad(arrays["value"], ((0, 0), (0, 1), (0, 0), (0, 0))),
    }
    column = jnp.zeros((1, case.q_heads, 1, 31)).at[..., 30].set(sinks[None, :, None])
    expected, expected_lse = reference(**extended, bias=column, return_residual=True)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_row_with_only_a_sink(implementation: str) -> None:
    """LSE is the sink, output 0; the LSE's gradient goes to the sink alone."""
    case = Case(sinks=True, batch=1, seqlen_q=4, seqlen_k=4, mask="s")
    arrays = case.arrays() | {"mask": jnp.zeros((1, 1, 1, 4), bool)}
    results = out_lse_and_gradients(case, arrays, implementation)
    sinks = np.broadcast_to(arrays["sinks"], (1, 4, 2))
    np.testing.assert_allclose(results["lse"], sinks, rtol=1e-6)
    assert np.all(results["out"] == 0)
    dlse = np.random.default_rng(2).standard_normal((1, 4, 2))
    np.testing.assert_allclose(results["d_sinks"], dlse.sum((0, 1)), rtol=1e-5)
    assert np.all(results["d_query"] == 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_causal_window_and_offset_show_these_keys(implementation: str) -> None:
    """A window sees ``left + 1 + right`` keys, q_offset shifts it, causal is ``kv <= q``."""
    T, S = 9, 12
    query = jnp.zeros((1, T, 1, 4))
    value = jnp.eye(S)[None, :, None, :]

    def seen(**kwargs):
        out = flash_attention(
            query, jnp.zeros((1, S, 1, 4)), value, implementation=implementation, **kwargs
        )
        return np.asarray(out[0, :, 0, :]) > 0

    q, kv = np.arange(T)[:, None], np.arange(S)[None, :]
    np.testing.assert_array_equal(seen(), np.ones((T, S), bool))
    np.testing.assert_array_equal(seen(is_causal=True), kv <= q)
    np.testing.assert_array_equal(seen(is_causal=True, q_offset=3), kv <= q + 3)
    np.testing.assert_array_equal(
        seen(local_window_size=(2, 1), q_offset=2), (kv >= q) & (kv <= q + 3)
    )
    np.testing.assert_array_equal(seen(local_window_size=1), abs(kv - q) <= 1)
    np.testing.assert_array_equal(seen(local_window_size=(None, 1)), kv <= q + 1)
    np.testing.assert_array_equal(
        seen(local_window_size=(3, 5), is_causal=True), (kv <= q) & (kv >= q - 3)
    )
