"""Native sparse attention at more than 2^31 elements an array: its last rows against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute.nsa import (
    NSAConfig,
    attention,
    compress_kv,
    native_sparse_attention,
    select_blocks,
)
from jax_flashcute.nsa.compression import block_means
from jax_flashcute.recording import plans
from tests.kernels.gpu_cases import BF16, compile_in_parallel
from tests.nsa_cases import TOLERANCE

CONFIG = NSAConfig()
N, K, H = 32, 8, 128
ROWS = 9  # the last ones, to which alone the loss belongs


def random_arrays(T: int, dtype: str) -> list[jax.Array]:
    shapes = (1, T, N, H), (1, T, K, H), (1, T, K, H), (N, 3, H), (1, ROWS, N, H)

    @jax.jit
    def draw():
        keys = jax.random.split(jax.random.key(0), len(shapes))
        drawn = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
        return [*drawn[:3], drawn[3] / H**0.5, drawn[4]]

    return draw()


def whole(implementation, query, key, value, gate_weights, d_out):
    """The last rows' output, and the gradients of all four inputs."""

    def attend(query, key, value, gate_weights):
        out = native_sparse_attention(
            query, key, value, gate_weights=gate_weights, implementation=implementation
        )
        return out[:, -ROWS:]

    out, vjp = jax.vjp(attend, query, key, value, gate_weights)
    return out, *vjp(d_out)


def last_rows(visible, query, means, tokens, weights):
    """The definition for so many rows of all heads: (R, N, H).

    Args:
      visible: a branch each: (R, K, keys) booleans.
      query: (R, N, H).
      means: keys and values of the compressed branch, (blocks, K, H) each.
      tokens: those of the others, (S, K, H) each.
      weights: (N, 3, H).
    """
    grouped = query.reshape(-1, K, N // K, H)
    gates = jax.nn.sigmoid(jnp.einsum("rnh,nch->rnc", query, weights))
    out = jnp.zeros_like(query)
    for i, (keys, values) in enumerate((means, tokens, tokens)):
        scores = jnp.einsum("rkgh,skh->rkgs", grouped, keys) / H**0.5
        scores = jnp.where(visible[i][:, :, None], scores, -jnp.inf)
        branch = jnp.einsum("rkgs,skh->rkgh", jax.nn.softmax(scores), values)
        out = out + gates[..., i, None] * branch.reshape(query.shape)
    return out


def check_last_rows(T: int, dtype: str, implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, weights, d_out = random_arrays(T, dtype)

    @jax.jit
    def select(query, key, value):
        means, _ = compress_kv(key, value, CONFIG.block, implementation=implementation)
        return select_blocks(query, means, CONFIG, kv_length=T, scale=1.0)

    selection = select(query, key, value)
    monkeypatch.setattr(attention, "select_blocks", lambda *_, **__: selection)
    run = jax.jit(functools.partial(whole, implementation))
    out, d_query, *d_tokens, d_weights = run(query, key, value, weights, d_out)

    # What the rows see: blocks of their own tile's list, and the window.
    rows = np.arange(T - ROWS, T)
    chosen = np.zeros((ROWS, K, -(-T // CONFIG.block)), bool)
    for r, k in np.ndindex(ROWS, K):
        tile = rows[r] // CONFIG.query_tile
        count = int(selection.counts[0, k, tile])
        chosen[r, k, np.asarray(selection.indices[0, k, tile, :count])] = True
    blocks = np.flatnonzero(chosen.any((0, 1)))
    seen = (blocks[:, None] * CONFIG.block + np.arange(CONFIG.block)).ravel()
    seen = np.union1d(seen[seen < T], np.arange(T - ROWS - CONFIG.window, T))
    past = seen <= rows[:, None, None]
    visible = (
        np.broadcast_to(np.arange(chosen.shape[2]) <= rows[:, None, None] // CONFIG.block,
                        chosen.shape),
        chosen[:, :, seen // CONFIG.block] & past,
        np.broadcast_to((seen > rows[:, None, None] - CONFIG.window) & past,
                        (ROWS, K, len(seen))),
    )  # fmt: skip
    # The kernels' own rounding of means belongs to what is compared.
    means = [np.asarray(jax.jit(block_means, static_argnums=1)(x, CONFIG.block)[0])
             for x in (key, value)]  # fmt: skip
    few = [np.asarray(x[0, jnp.asarray(seen)]) for x in (key, value)]
    given = query[0, -ROWS:], means, few, weights
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), given)
        want, vjp = jax.vjp(functools.partial(last_rows, visible), *exact)
        gradients = vjp(jnp.asarray(np.asarray(d_out[0], np.float64)))
        want_query, want_means, want_few, want_weights = jax.tree.map(np.asarray, gradients)
    counts = np.minimum(CONFIG.block, T - np.arange(chosen.shape[2]) * CONFIG.block)
    of_means = [(x / counts[:, None, None])[seen // CONFIG.block] for x in want_means]
    compared = {
        "out": (out[0], want),
        "query": (d_query[0, -ROWS:], want_query),
        "key": (d_tokens[0][0, jnp.asarray(seen)], want_few[0] + of_means[0]),
        "value": (d_tokens[1][0, jnp.asarray(seen)], want_few[1] + of_means[1]),
        "gate_weights": (d_weights, want_weights),
    }
    for name, (got, exact_one) in compared.items():
        exact_one = np.asarray(exact_one)
        error = np.linalg.norm(np.asarray(got, np.float64) - exact_one)
        assert error < TOLERANCE[dtype] * np.linalg.norm(exact_one), (name, error)
    assert not jnp.any(d_query[:, :-ROWS])  # no other row has a gradient


@pytest.mark.slow
def test_the_formula_of_the_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU is compared with is what the XLA path computes."""
    check_last_rows(1100, "float32", "xla", monkeypatch)


@pytest.mark.gpu
@pytest.mark.slow
def test_last_rows_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every length has the same kernels.
    with plans.collecting() as wanted:
        arrays = jax.eval_shape(lambda: random_arrays(4096, BF16))
        run = jax.jit(functools.partial(whole, "cute"))
        run.trace(*arrays).lower(lowering_platforms=("cuda",))
    compile_in_parallel(wanted)
    check_last_rows(2**19 + 5, BF16, "cute", monkeypatch)
