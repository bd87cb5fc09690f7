"""Floating-point arithmetic, against PTX ISA 9.0, 9.7.3 to 9.7.5."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tests.simulator.snippets import evaluate


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def test_fma_rounds_once():
    """fma: "computed to infinite precision and then rounded once"."""
    a = np.array([1 + 2**-12, 1 + 2**-23, 3.0, 1.5], np.float32)
    b = np.array([1 + 2**-12, 1 - 2**-23, 5.0, 2.0**-149], np.float32)
    c = np.array([2**-60, -1.0, 2.0**-80, 2.0**-149], np.float32)
    expected = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        expected.append(_nearest_single(exact))
    got = evaluate("fma.rn.f32 d, a, b, c", a, b, c, out=np.float32)
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


def test_fma_against_exact_arithmetic():
    random = np.random.default_rng(3)
    a, b = (random.standard_normal(64).astype(np.float32) for _ in range(2))
    # Sums close to a half-way point, where rounding twice goes wrong.
    c = (-(a.astype(np.float64) * b)).astype(np.float32) + random.choice([0, 1e-3, 1], 64).astype(
        np.float32
    )
    got = evaluate("fma.rn.f32 d, a, b, c", a, b, c, out=np.float32)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        assert result == _nearest_single(Fraction(x) * Fraction(y) + Fraction(z))


def _nearest_single(exact) -> float:
    """The float32 nearest to a fraction, ties to even."""
    guess = np.float32(float(exact))
    candidates = [
        guess,
        np.nextafter(guess, np.float32(np.inf)),
        np.nextafter(guess, np.float32(-np.inf)),
    ]
    return float(
        min(
            candidates,
            key=lambda x: (abs(Fraction(float(x)) - exact), int(np.float32(x).view(np.uint32)) & 1),
        )
    )


def test_directed_rounding():
    """.rz, .rm, .rp: toward zero, minus and plus infinity."""
    a, b = np.float32(1.0), np.array([2**-30, -(2**-30)], np.float32)
    up, down = (
        np.nextafter(np.float32(1), np.float32(2)),
        np.nextafter(np.float32(1), np.float32(0)),
    )
    for mode, expected in (("rz", [1, down]), ("rm", [1, down]), ("rp", [up, 1]), ("rn", [1, 1])):
        got = evaluate(f"add.{mode}.f32 d, a, b", a, b, out=np.float32)
        np.testing.assert_array_equal(got, np.array(expected, np.float32), mode)
    got = evaluate("add.rz.f32 d, a, b", np.float32(-1.0), b, out=np.float32)
    np.testing.assert_array_equal(got, np.array([-down, -1], np.float32))


def test_minimum_ignores_nan_unless_told():
    """min/max: "If one input is NaN, the result is the other"; .NaN propagates; -0.0 < +0.0."""
    a = np.array([np.nan, 1, np.nan, 0.0, -0.0], np.float32)
    b = np.array([2, np.nan, np.nan, -0.0, 0.0], np.float32)
    got = evaluate("max.f32 d, a, b", a, b, out=np.float32)
    np.testing.assert_array_equal(got, np.array([2, 1, np.nan, 0, 0], np.float32))
    assert not np.signbit(got[3:]).any()
    got = evaluate("min.f32 d, a, b", a, b, out=np.float32)
    assert np.signbit(got[3:]).all()
    got = evaluate("max.NaN.f32 d, a, b", a, b, out=np.float32)
    assert np.isnan(got[:3]).all()
    got = evaluate("max.f32 d, a, b, 3.0", a, b, out=np.float32)
    np.testing.assert_array_equal(got, np.full(5, 3, np.float32))


def test_flush_to_zero():
    """.ftz: "subnormal inputs and results are flushed to sign-preserving zero"."""
    tiny = np.array([1e-40, -1e-40, 2e-38], np.float32)
    got = evaluate("mul.ftz.f32 d, a, b", tiny, np.float32(1.0), out=np.float32)
    np.testing.assert_array_equal(got, [0, 0, tiny[2]])
    assert np.signbit(got[1])
    got = evaluate("mul.f32 d, a, b", tiny, np.float32(1.0), out=np.float32)
    np.testing.assert_array_equal(got, tiny)


def test_saturation_to_the_unit_interval():
    """.sat: "clamps the result to [0.0, 1.0]; NaN results are flushed to +0.0f"."""
    x = np.array([-1, 0.25, 3, np.nan], np.float32)
    got = evaluate("add.sat.f32 d, a, b", x, np.float32(0), out=np.float32)
    np.testing.assert_array_equal(got, np.array([0, 0.25, 1, 0], np.float32))


@pytest.mark.parametrize(
    ("name", "function", "error"),
    [
        ("ex2.approx.ftz.f32", np.exp2, 2**-22),
        ("lg2.approx.ftz.f32", np.log2, 2**-22),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 2**-23),
        ("rsqrt.approx.ftz.f32", lambda x: 1 / np.sqrt(x), 2**-22.4),
        ("sqrt.rn.f32", np.sqrt, 2**-24),
        ("tanh.approx.f32", np.tanh, 2**-11),
    ],
)
def test_approximations_stay_within_the_documented_error(name, function, error, random):
    x = np.abs(random.standard_normal(64).astype(np.float32)) * 8 + np.float32(0.01)
    got = evaluate(f"{name} d, a", x, out=np.float32).astype(np.float64)
    np.testing.assert_allclose(got, function(x.astype(np.float64)), rtol=error * 1.01)


def test_special_values_of_approximations():
    inf, nan = np.inf, np.nan
    x = np.array([0.0, -0.0, inf, -inf, nan], np.float32)
    table = {
        "ex2.approx.ftz.f32": [1, 1, inf, 0, nan],
        "lg2.approx.ftz.f32": [-inf, -inf, inf, nan, nan],
        "rcp.approx.ftz.f32": [inf, -inf, 0, -0.0, nan],
        "rsqrt.approx.ftz.f32": [inf, -inf, 0, nan, nan],
        "tanh.approx.f32": [0, -0.0, 1, -1, nan],
    }
    for name, expected in table.items():
        got = evaluate(f"{name} d, a", x, out=np.float32)
        np.testing.assert_array_equal(got, np.array(expected, np.float32), name)


def test_packed_pairs(random):
    """add.f32x2 and fma.f16x2 work on each half; the lower half is the first element."""
    a, b = (random.standard_normal((8, 2)).astype(np.float32) for _ in range(2))
    got = evaluate(
        "add.rn.f32x2 d, a, b", a.view(np.uint64)[:, 0], b.view(np.uint64)[:, 0], out=np.uint64
    )
    np.testing.assert_array_equal(got.view(np.float32).reshape(-1, 2), a + b)
    h, k, c = (random.standard_normal((8, 2)).astype(np.float16) for _ in range(3))
    got = evaluate(
        "fma.rn.f16x2 d, a, b, c",
        *(x.view(np.uint32)[:, 0] for x in (h, k, c)),
        out=np.uint32,
    ).view(np.float16)
    exact = h.astype(np.float64) * k + c
    np.testing.assert_array_equal(got, exact.astype(np.float16).reshape(-1))


def test_mixed_precision(random):
    """fma.f32.abtype, add.f32.atype: half operands are widened, the addend is single."""
    a, b = (random.standard_normal(8).astype(ml_dtypes.bfloat16) for _ in range(2))
    c = random.standard_normal(8).astype(np.float32)
    raw = [x.view(np.uint16) for x in (a, b)]
    got = evaluate("fma.rn.f32.bf16 d, a, b, c", *raw, c, out=np.float32)
    exact = a.astype(np.float64) * b.astype(np.float64) + c
    np.testing.assert_array_equal(got, exact.astype(np.float32))
    got = evaluate("sub.f32.bf16 d, a, b", raw[0], c, out=np.float32)
    np.testing.assert_array_equal(got, a.astype(np.float32) - c)


HALVES = [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), HALVES)
def test_single_halves(kind, dtype, random):
    """add.f16 and its like: one number a register, the result rounded to half precision."""
    a, b = (random.standard_normal(16).astype(dtype) for _ in range(2))
    raw = [x.view(np.uint16) for x in (a, b)]
    for name, expected in (
        ("add", a + b), ("sub", a - b), ("mul", a * b), ("max", np.maximum(a, b)),
    ):  # fmt: skip
        got = evaluate(f"{name}.{kind} d, a, b", *raw, out=np.uint16)
        np.testing.assert_array_equal(got.view(dtype), expected, name)
    got = evaluate(f"neg.{kind} d, a", raw[0], out=np.uint16)
    np.testing.assert_array_equal(got.view(dtype), -a)
    got = evaluate(f"abs.{kind} d, a", raw[0], out=np.uint16)
    np.testing.assert_array_equal(got.view(dtype), np.abs(a))


def test_fma_of_halves_rounds_once():
    """A product half-way between two numbers, and an addend that is less than a single shows."""
    dtype = ml_dtypes.bfloat16
    a, b, c = np.array([[7, 7], [37 / 256, 37 / 256], [2**-30, -(2**-30)]], dtype).view(np.uint16)
    got = evaluate("fma.rn.bf16 d, a, b, c", a, b, c, out=np.uint16).view(dtype)
    np.testing.assert_array_equal(got, np.array([130 / 128, 129 / 128], dtype))
