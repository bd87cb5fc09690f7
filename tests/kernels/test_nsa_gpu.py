"""Native sparse attention on a GPU: the kernels of its stages, and the whole, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute.nsa import NSAConfig, compress_kv, gate
from tests.arrays import random
from tests.kernels.gpu_cases import BF16, FP16, UNIT_ROUNDOFF
from tests.nsa_cases import CASES, Case, check, check_future, check_ties

pytestmark = pytest.mark.gpu


def assert_rounded(actual, exact, dtype: str, magnitude: float = 1.0) -> None:
    """Within the result's rounding and float32's error of sums of this magnitude."""
    exact = np.asarray(exact, np.float64)
    bound = UNIT_ROUNDOFF[dtype] * np.abs(exact) + 2e-6 * magnitude
    assert (np.abs(np.asarray(actual, np.float64) - exact) <= 1.01 * bound).all()


def in_float64(function, *arrays):
    """The results on the CPU in float64, of the same numbers."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        return jax.tree.map(np.asarray, jax.jit(function)(*exact))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "shape", [(2, 333, 12, 64, 64), (1, 100, 5, 96, 40), (3, 1, 33, 128, 128), (1, 77, 2, 8, 256)]
)
def test_gates(shape: tuple[int, ...], dtype: str) -> None:
    B, T, N, H, Hv = shape
    query, weights = random(0, B, T, N, H, dtype=dtype), random(1, N, 3, H) / H**0.5
    outputs = [random(2 + i, B, T, N, Hv, dtype=dtype) for i in range(3)]
    d_out = random(5, B, T, N, Hv, dtype=dtype)

    def run(implementation, query, weights, d_out, *outputs):
        def gated(query, weights, *outputs):
            return gate(query, outputs, weights, implementation=implementation)

        out, vjp = jax.vjp(gated, query, weights, *outputs)
        return out, *vjp(d_out)

    arguments = (query, weights, d_out, *outputs)
    out, d_query, d_weights, *d_outputs = jax.jit(functools.partial(run, "cute"))(*arguments)
    want, want_query, want_weights, *want_outputs = in_float64(
        functools.partial(run, "reference"), *arguments
    )
    assert_rounded(out, want, dtype)
    assert_rounded(d_query, want_query, dtype, Hv)
    for got, want in zip(d_outputs, want_outputs, strict=True):
        assert_rounded(got, want, dtype)
    np.testing.assert_allclose(d_weights, want_weights, rtol=1e-5, atol=2e-6 * Hv * T)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1000, 3, 64, 96, 64),
        (1, 3, 1, 128, 128, 64),
        (2, 500, 5, 8, 16, 7),
        (1, 999, 2, 96, 64, 256),
    ],
)
def test_compression(shape: tuple[int, ...], dtype: str) -> None:
    B, S, K, H, Hv, block = shape
    key, value = random(0, B, S, K, H, dtype=dtype), random(1, B, S, K, Hv, dtype=dtype)
    blocks = -(-S // block)
    d_key, d_value = (
        random(seed, B, blocks, K, width, dtype=dtype) for seed, width in ((2, H), (3, Hv))
    )

    def run(implementation, key, value, d_key, d_value):
        compress = functools.partial(compress_kv, block=block, implementation=implementation)
        means, vjp = jax.vjp(compress, key, value)
        return *means, *vjp((d_key, d_value))

    arguments = (key, value, d_key, d_value)
    actual = jax.jit(functools.partial(run, "cute"))(*arguments)
    expected = in_float64(functools.partial(run, "reference"), *arguments)
    for got, want in zip(actual, expected, strict=True):
        assert_rounded(got, want, dtype)


def test_counts_hide_what_is_not_a_number() -> None:
    key = random(0, 2, 150, 2, 64, dtype=BF16)
    counts = jnp.asarray([[64, 3, 0], [10, 64, 22]])
    is_counted = jnp.arange(150) % 64 < jnp.repeat(counts, 64, axis=1)[:, :150]
    given = jnp.where(is_counted[..., None, None], key, jnp.nan)
    actual, _ = compress_kv(given, given, 64, counts=counts, implementation="cute")
    zeroed = jnp.where(is_counted[..., None, None], key, 0)
    sums = np.asarray(jnp.pad(zeroed, ((0, 0), (0, 42), (0, 0), (0, 0))), np.float64)
    sums = sums.reshape(2, 3, 64, 2, 64).sum(2)
    assert_rounded(actual, sums / np.maximum(counts, 1)[..., None, None], BF16)


@pytest.mark.slow
def test_beyond_two_to_the_31_elements() -> None:
    """The last rows of arrays of more than 2^31 elements (4 GiB each)."""
    T, N, H = 2**19 + 5, 32, 128

    @jax.jit
    def fill(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        return [jax.random.normal(k, (1, T, N, H), BF16) for k in keys]

    query, *outputs = fill(0)
    weights = random(1, N, 3, H) / H**0.5
    out = jax.jit(functools.partial(gate, implementation="cute"))(query, outputs, weights)
    last = slice(T - 9, T)
    exact = in_float64(
        lambda q, w, *o: gate(q, o, w, implementation="reference"),
        query[:, last], weights, *(x[:, last] for x in outputs),
    )  # fmt: skip
    assert_rounded(out[:, last], exact, BF16)
    del out
    means, _ = jax.jit(functools.partial(compress_kv, block=64, implementation="cute"))(
        query, outputs[0]
    )
    tail = np.asarray(query[:, T // 64 * 64 :], np.float64)
    assert_rounded(means[:, -1], tail.mean(1), BF16)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_against_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels where they serve a stage, by XLA where they do not."""
    check(CASES[name], BF16, None, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 5])
def test_every_group_and_head_dim(
    group: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = NSAConfig(64, 3, 100, 128, complete_only=group % 2 == 0)
    case = Case(500 + head_dim + group, 2, group, head_dim, config)
    check(case, BF16, None, monkeypatch)


def test_ties_go_to_the_lowest_index() -> None:
    check_ties()


@pytest.mark.parametrize("complete_only", [False, True])
def test_the_future_does_not_leak(complete_only: bool) -> None:
    case = Case(1000, 2, 4, 128, NSAConfig(64, 4, 100, 128, complete_only=complete_only))
    check_future(case, 700, BF16, "cute")
