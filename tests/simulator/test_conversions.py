"""Conversions between number types, against PTX ISA 9.0, 9.7.9 "cvt"."""

import ml_dtypes
import numpy as np

from tests.simulator.operands import FLOATS
from tests.simulator.snippets import evaluate


def test_float_to_integer_rounds_and_clamps():
    """cvt: .rni to even, .rzi, .rmi, .rpi; out of range clamps, NaN is 0."""
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3e10, -3e10, np.nan, np.inf], np.float32)
    top, bottom = 2**31 - 1, -(2**31)
    table = {
        "rni": [0, 2, 2, 0, -2, top, bottom, 0, top],
        "rzi": [0, 1, 2, 0, -1, top, bottom, 0, top],
        "rmi": [0, 1, 2, -1, -2, top, bottom, 0, top],
        "rpi": [1, 2, 3, 0, -1, top, bottom, 0, top],
    }
    for mode, expected in table.items():
        got = evaluate(f"cvt.{mode}.s32.f32 d, a", x, out=np.int32)
        np.testing.assert_array_equal(got, expected, mode)
    got = evaluate("cvt.rzi.u32.f32 d, a", x, out=np.uint32)
    np.testing.assert_array_equal(got, [0, 1, 2, 0, 0, 2**32 - 1, 0, 0, 2**32 - 1])


def test_integer_widths():
    x = np.array([-1, 127, 128, -129, 40000], np.int32)
    got = evaluate("cvt.s64.s32 d, a", x, out=np.int64)
    np.testing.assert_array_equal(got, x)
    got = evaluate("cvt.u64.u32 d, a", x, out=np.uint64)
    np.testing.assert_array_equal(got, x.view(np.uint32))
    # A narrow result in a wide register is sign- or zero-extended.
    got = evaluate("cvt.s8.s32 d, a", x, out=np.int32)
    np.testing.assert_array_equal(got, x.astype(np.int8))
    got = evaluate("cvt.u8.u32 d, a", x, out=np.int32)
    np.testing.assert_array_equal(got, x.astype(np.uint8))
    got = evaluate("cvt.sat.s8.s32 d, a", x, out=np.int32)
    np.testing.assert_array_equal(got, np.clip(x, -128, 127))
    got = evaluate("cvt.sat.u8.s32 d, a", x, out=np.int32)
    np.testing.assert_array_equal(got, np.clip(x, 0, 255))


def test_integer_to_float():
    x = np.array([2**24 + 1, -(2**24) - 3, 2**31 - 1, 5], np.int32)
    got = evaluate("cvt.rn.f32.s32 d, a", x, out=np.float32)
    np.testing.assert_array_equal(got, x.astype(np.float32))
    got = evaluate("cvt.rz.f32.s32 d, a", x, out=np.float32)
    np.testing.assert_array_equal(got, [2**24, -(2**24) - 2, 2**31 - 128, 5])


def test_long_integers_to_doubles():
    x = np.array([2**60 + 1, -(2**60) - 1], np.int64)
    for mode, expected in (
        ("rn", [2**60, -(2**60)]), ("rz", [2**60, -(2**60)]),
        ("rm", [2**60, -(2**60) - 2**8]), ("rp", [2**60 + 2**8, -(2**60)]),
    ):  # fmt: skip
        got = evaluate(f"cvt.{mode}.f64.s64 d, a", x, out=np.float64)
        np.testing.assert_array_equal(got, np.array(expected, np.float64), mode)


def test_pack_half_pairs():
    """cvt.rn.bf16x2.f32 d, a, b: "a in the upper half of d, b in the lower half"."""
    high = np.concatenate([FLOATS, [np.float32(1 + 2**-8)]]).astype(np.float32)
    low = np.random.default_rng(2).permutation(high)
    for name, dtype in (("bf16x2", ml_dtypes.bfloat16), ("f16x2", np.float16)):
        got = evaluate(f"cvt.rn.{name}.f32 d, a, b", high, low, out=np.uint32)
        halves = got.view(np.uint16).reshape(-1, 2)
        for column, source in ((1, high), (0, low)):
            with np.errstate(over="ignore"):
                want = source.astype(dtype)
            nan = np.isnan(source)
            np.testing.assert_array_equal(halves[~nan, column], want[~nan].view(np.uint16))
            # "the canonical NaN 0x7fff"
            assert (halves[nan, column] == 0x7FFF).all()


def test_rounding_to_half():
    x = np.array([1 + 2**-12, -(1 + 2**-12), 70000, -70000, 1e-8], np.float32)
    got = evaluate("cvt.rz.f16.f32 d, a", x, out=np.float16)
    np.testing.assert_array_equal(got, np.array([1, -1, 65504, -65504, 0], np.float16))
    got = evaluate("cvt.rn.f16.f32 d, a", x, out=np.float16)
    np.testing.assert_array_equal(got, np.array([1, -1, np.inf, -np.inf, 0], np.float16))


def test_largest_finite_values():
    """.satfinite: what is out of range becomes the largest finite value; the rest is rounded."""
    x = np.array([1 + 2**-11 + 2**-12, 70000, -70000, np.nan], np.float32)
    for mode, first in (("rn", 1 + 2**-10), ("rz", 1)):
        got = evaluate(f"cvt.{mode}.satfinite.f16.f32 d, a", x, out=np.float16)
        np.testing.assert_array_equal(got, np.array([first, 65504, -65504, np.nan], np.float16))


def test_saturated_doubles():
    x = np.array([-1, -1e-300, 1 / 3, 2, np.nan])
    got = evaluate("cvt.sat.f64.f64 d, a", x, out=np.float64)
    np.testing.assert_array_equal(got, [0, 0, 1 / 3, 1, 0])
    assert not np.signbit(got).any()


def test_eight_bit_floats():
    """.satfinite: out-of-range values become the largest finite value; e4m3 NaN is 0x7f."""
    high = np.array([1.0, 500.0, -500.0, np.nan], np.float32)
    got = (
        evaluate("cvt.rn.satfinite.e4m3x2.f32 d, a, b", high, np.float32(0.5), out=np.uint16)
        .view(np.uint8)
        .reshape(-1, 2)
    )
    e4m3 = ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(got[:3, 1].view(e4m3).astype(np.float32), [1, 448, -448])
    assert got[3, 1] == 0x7F
    assert (got[:, 0].view(e4m3).astype(np.float32) == 0.5).all()
    # Whatever the NaN was, that of f16 is 0x7fff.
    got = evaluate("cvt.rn.f16x2.e4m3x2 d, a", np.array([0x38FF], np.uint16), out=np.uint32)
    assert got == 0x3C007FFF
