"""Sums in fixed point: their bounds against the dense reference, and their way back to floats."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import reference
from jax_flashcute.ffi import fixed_point
from jax_flashcute.kernels.elements import SHIFTS, SUM_BITS, element_functions
from jax_flashcute.masks import trace_score
from jax_flashcute.spec import Operands
from tests.cases import Case

CASE = Case(2, 30, 50, 2, 3, 16, 16, causal=True, lengths=True)


def call(case: Case, bias: str, scale: float = 1.0):
    """A call with a bias of these axes, of "bnts", its cotangents and the gradients of scores."""
    arrays = case.arrays(jnp.float32, poison=True)
    sizes = dict(zip("bnts", (case.batch, case.q_heads, case.seqlen_q, case.seqlen_k), strict=True))
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    arrays["query"] *= scale
    operands = Operands(**arrays, bias=normal(*(n if x in bias else 1 for x, n in sizes.items())))
    spec, rows = case.spec(), (case.batch, case.seqlen_q, case.q_heads)

    def attend(added):
        return reference.attention(spec, dataclasses.replace(operands, bias=operands.bias + added))

    residuals, pull = jax.vjp(jax.jit(attend), jnp.zeros([*sizes.values()]))
    dout, dlse = normal(*rows, case.head_dim_v), normal(*rows)
    inside = residuals.lse > -jnp.inf
    clean = jnp.where(inside[..., None], dout, 0), jnp.where(inside, dlse, 0)
    (gradients,) = pull(dataclasses.replace(residuals, out=clean[0], lse=clean[1]))
    dout = jnp.where(inside[..., None], dout, jnp.nan)
    return spec, operands, residuals, dout, dlse, gradients


def exponents_of(spec, operands, *others) -> jax.Array:
    exponents = functools.partial(fixed_point.exponents, element_functions(spec, operands), spec)
    return jax.jit(exponents)(operands, *others)


@pytest.mark.parametrize("bias", ["", "ts", "bs", "nt"])
def test_what_is_summed_stays_below_its_bound(bias: str) -> None:
    *given, gradients = call(CASE, bias)
    lacking = tuple(i for i, axis in enumerate("bnts") if axis not in bias)
    largest = float(np.abs(gradients).sum(axis=lacking).max())
    bound = 2.0 ** int(exponents_of(*given)[0])
    assert largest < bound < 2**10 * largest


def test_a_sum_of_what_is_not_finite_is_nan() -> None:
    spec, operands, residuals, dout, dlse, _ = call(CASE, "ts")
    functions = element_functions(spec, operands)
    sums = [jnp.ones((*operands.bias.shape, 2), jnp.uint32)]
    given = spec, operands, residuals, dout, dlse
    found = fixed_point.as_floats(functions, exponents_of(*given), sums)[0]
    assert jnp.isfinite(found).all()
    value = operands.value.at[1, 2, 0, 3].set(jnp.nan)
    spoilt = dataclasses.replace(operands, value=value)
    residuals = reference.attention(spec, spoilt)
    huge = call(CASE, "ts", scale=1e8)[:5]
    for bad in ((spec, spoilt, residuals, dout, dlse), huge):
        found = fixed_point.as_floats(functions, exponents_of(*bad), sums)[0]
        assert jnp.isnan(found).all()


@pytest.mark.parametrize("exponent", [-200, 0, 20, 128])
def test_integers_as_floats(exponent: int) -> None:
    functions = element_functions(CASE.spec(), Operands(**CASE.arrays(jnp.float32), bias=BIAS))
    bits = np.random.default_rng(0).integers(0, 60, 100)
    numbers = np.random.default_rng(1).integers(-(2**60), 2**60, 100) >> bits
    numbers[:3] = 0, -1, 2**32
    words = numbers.astype("<i8").view("<u4").reshape(1, 1, 1, 100, 2)
    (found,) = fixed_point.as_floats(functions, jnp.asarray([exponent]), [jnp.asarray(words)])
    shift = min(max(SUM_BITS - exponent, SHIFTS[0]), SHIFTS[1])
    want = numbers.astype(np.float64) * 2.0**-shift
    np.testing.assert_allclose(found.ravel(), want, rtol=2.0**-22, atol=2.0**-126)


BIAS = jnp.zeros((1, 1, 1, 100))
TABLE = jnp.ones((6, 40))
FACTORS = {
    "table": (lambda s, b, h, q, kv: s - TABLE[h, jnp.clip(q - kv, 0, 39)], (1.0, 1)),
    "twice": (lambda s, b, h, q, kv: s + 0.5 * TABLE[h, 0] + 3 * TABLE[h, kv], (3.0, 2)),
    "slopes": (lambda s, b, h, q, kv: s + TABLE[h, 0] * jnp.clip(kv - q, -9, 7), (9.0, 1)),
    "some": (lambda s, b, h, q, kv: s + jnp.where(kv > q, TABLE[h, 1], 0.0), (1.0, 1)),
    "product": (lambda s, b, h, q, kv: s + TABLE[h, 0] * TABLE[h, kv], (None, 2)),
    "of_score": (lambda s, b, h, q, kv: s * TABLE[h, 0], (None, 1)),
    "changed": (lambda s, b, h, q, kv: jnp.tanh(s) + TABLE[h, 0], (None, 1)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_how_often_a_gradient_is_added(name: str) -> None:
    score, want = FACTORS[name]
    traced, arrays = trace_score(score, jnp.float32)
    spec = dataclasses.replace(CASE.spec(), score_mod=traced)
    operands = Operands(**CASE.arrays(jnp.float32), **CASE.batch_index())
    functions = element_functions(spec, dataclasses.replace(operands, score_mod_arrays=arrays))
    (addends,) = functions.summed
    assert (addends.factor, addends.reads) == want
