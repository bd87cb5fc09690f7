"""Masks and scores written at random on a GPU, against attention in numpy.

``OMP_NUM_THREADS=1 JAX_FLASHCUTE_RANDOM=2000 pytest -n 16 --dist worksteal
tests/kernels/test_random_functions_gpu.py`` runs so many, from ``JAX_FLASHCUTE_RANDOM_FIRST`` on;
every eighth has its gradients compared too.  Each is a kernel of its own, and compiling it is most
of a test: pytest's workers compile their own; where there are none, all are compiled first, by as
many processes as there are processors.  Kernels without gradients have smaller tiles, which compile
in half the time.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import flash_attention
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config.sm90 import FwdConfig
from jax_flashcute.plan import ARCH_VARIABLE, target
from tests.random_calls import numbers
from tests.unit.test_analysis import random_mask, random_number

pytestmark = pytest.mark.gpu

NUMBERS = numbers(32)
GRADIENTS_EVERY = 8
BATCH, HEADS, QUERIES, KEYS, HEAD_DIM = 2, 3, 130, 200, 64
SCALE = HEAD_DIM**-0.5
TABLE = np.random.default_rng(5).uniform(-4, 4, 65).astype(np.float32)
TOLERANCE = 1e-2
"""Relative error in the Frobenius norm: bfloat16 inputs, probabilities and results."""


class RandomCall:
    """A random mask, and for every other number a random score.

    Attributes:
      mask: ``(np or jnp, b, h, q, kv) -> bool``; None for none.
      factor, term: a score is multiplied by one and the other is added; None for none.
    """

    def __init__(self, number: int):
        rng = np.random.default_rng((5, number))
        depth = int(rng.integers(0, 4))
        self.mask = self.factor = self.term = None
        if number % 2 == 0 or rng.random() < 0.3:
            self.mask = random_mask(rng, depth)
        if number % 2:
            which = rng.choice(["term", "factor", "both"], p=[0.6, 0.2, 0.2])
            self.term = random_float(rng, depth) if which != "factor" else None
            self.factor = random_float(rng, depth) if which != "term" else None

    def arguments(self) -> dict:
        """``mask_mod`` and ``score_mod``, those there are."""
        mask, given = self.mask, {}
        if mask is not None:
            given["mask_mod"] = lambda *i: mask(jnp, *i)
        if self.term is not None or self.factor is not None:
            given["score_mod"] = lambda score, *i: self.changed(jnp, score, *i)
        return given

    def changed(self, m, score, *indices):
        if self.factor is not None:
            score = score * self.factor(m, *indices)
        return score if self.term is None else score + self.term(m, *indices)


def random_float(rng, depth: int):
    """A function ``(np or jnp, b, h, q, kv) -> float32``."""
    number, kind = random_number(rng, depth), rng.integers(0, 4)
    step = np.float32(rng.uniform(-0.1, 0.1))

    def value(m, b, h, q, kv):
        distance = q - kv if kind == 1 else number(m, b, h, q, kv)
        bounded = m.asarray(m.clip(distance, -32, 32))
        match kind:
            case 0:
                return (kv - q).astype(np.float32) * (m.asarray(TABLE)[h] * step)
            case 1 | 2:
                return m.asarray(TABLE)[bounded + 32]
            case _:
                return bounded.astype(np.float32) * np.float32(0.125)

    return value


def attention(call: RandomCall):
    """The call as a function of query, key and value: the output and the LSE."""
    return lambda *qkv: flash_attention(
        *qkv, **call.arguments(), implementation="cute", return_residual=True
    )


def step(call: RandomCall, with_gradients: bool):
    """A jitted function of query, key, value and the gradient of the output."""

    def forward(query, key, value, _):
        return *attention(call)(query, key, value), ()

    def both(query, key, value, d_out):
        (out, lse), pull = jax.vjp(attention(call), query, key, value)
        return out, lse, pull((d_out, jnp.zeros_like(lse)))

    return jax.jit(both if with_gradients else forward)


def has_gradients(number: int) -> bool:
    return number % GRADIENTS_EVERY == 0


@contextlib.contextmanager
def tiles_of(number: int):
    """Hopper kernels of a call are tiled so, save where its gradients are compared."""
    if has_gradients(number):
        yield
        return
    config = FwdConfig(2, 32 if number % 4 else 64, 2, takes_turns=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "forward_config", lambda *head_dims: config)
        yield


def shapes() -> list[tuple[int, ...]]:
    """Of query, key, value and the gradient of the output."""
    queries, keys = (BATCH, QUERIES, HEADS, HEAD_DIM), (BATCH, KEYS, 1, HEAD_DIM)
    return [queries, keys, keys, queries]


def compile_one(number: int, named: str) -> None:
    """Leaves the kernels of a call in the store, without a GPU."""
    os.environ[ARCH_VARIABLE] = named
    jax.config.update("jax_platforms", "cpu")
    jitted = step(RandomCall(number), has_gradients(number))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes()]
    with tiles_of(number):
        jitted.trace(*arrays).lower(lowering_platforms=("cuda",))


@pytest.fixture(scope="module")
def compiled() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    with concurrent.futures.ProcessPoolExecutor(
        min(len(NUMBERS), os.cpu_count() or 1), multiprocessing.get_context("spawn")
    ) as pool:
        for _ in pool.map(compile_one, NUMBERS, [str(target())] * len(NUMBERS)):
            pass


@pytest.mark.parametrize("number", NUMBERS)
def test_random_functions(number: int, compiled: None) -> None:
    rng = np.random.default_rng(number)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes()]
    call = RandomCall(number)
    with tiles_of(number):
        out, lse, gradients = step(call, has_gradients(number))(*arrays)
    want, want_lse, want_gradients = dense(call, *(np.asarray(x, np.float32) for x in arrays))
    close(out, want)
    np.testing.assert_allclose(lse, want_lse, atol=1e-3, rtol=1e-4)
    for got, gradient in zip(gradients, want_gradients, strict=False):
        close(got, gradient)


def close(got, want) -> None:
    """The error is relative to the norm."""
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / max(np.linalg.norm(want), 1e-2)
    assert error < TOLERANCE, error


def dense(call: RandomCall, query, key, value, d_out):
    """Attention in numpy: the output, the LSE, and the gradients of query, key and value."""
    indices = np.meshgrid(
        *(np.arange(n, dtype=np.int32) for n in (BATCH, HEADS, QUERIES, KEYS)), indexing="ij"
    )
    key, value = (np.repeat(x, HEADS, axis=2) for x in (key, value))
    with np.errstate(all="ignore"):
        scores = call.changed(np, SCALE * np.einsum("btnh,bsnh->bnts", query, key), *indices)
        if call.mask is not None:
            seen = np.broadcast_to(call.mask(np, *indices), scores.shape)
            scores = np.where(seen, scores, -np.inf)
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
        total = weights.sum(-1, keepdims=True)
        lse = (np.log(total) + largest)[..., 0]
        weights = weights / np.where(total > 0, total, 1)
        d_weights = np.einsum("btnh,bsnh->bnts", d_out, value)
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
        if call.factor is not None:
            d_scores = d_scores * call.factor(np, *indices)
    gradients = (
        SCALE * np.einsum("bnts,bsnh->btnh", d_scores, key),
        SCALE * np.einsum("bnts,btnh->bsnh", d_scores, query)[:, :, None].sum(3),
        np.einsum("bnts,btnh->bsnh", weights, d_out)[:, :, None].sum(3),
    )
    return np.einsum("bnts,bsnh->btnh", weights, value), lse.transpose(0, 2, 1), gradients
