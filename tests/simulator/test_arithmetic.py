"""Arithmetic, logic and conversions, against the statements of the PTX ISA.

Each heading names the section, by its number in PTX ISA 9.0.
"""

import math

import ml_dtypes
import numpy as np
import pytest

from tests.simulator.snippets import evaluate

RANDOM = np.random.default_rng(7)
WORDS = np.concatenate(
    [
        np.array([0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80000001], np.uint32),
        RANDOM.integers(0, 2**32, 55, dtype=np.uint64).astype(np.uint32),
    ]
)
OTHERS = RANDOM.permutation(WORDS)
FLOATS = np.concatenate(
    [
        np.array([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1e-40, 3e38], np.float32),
        np.array([np.inf, -np.inf, np.nan], np.float32),
        RANDOM.standard_normal(51).astype(np.float32) * 100,
    ]
)


def signed(x):
    return [int(v) for v in np.asarray(x).view(np.int32)]


def unsigned(x):
    return [int(v) for v in x]


def words(values):
    return np.array([v & 0xFFFFFFFF for v in values], np.uint32)


# ---- 9.7.1 Integer Arithmetic Instructions


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("add.s32 d, a, b", lambda a, b: a + b),
        ("sub.u32 d, a, b", lambda a, b: a - b),
        ("mul.lo.s32 d, a, b", lambda a, b: a * b),
        ("mul.hi.u32 d, a, b", lambda a, b: (a * b) >> 32),
        ("and.b32 d, a, b", lambda a, b: a & b),
        ("or.b32 d, a, b", lambda a, b: a | b),
        ("xor.b32 d, a, b", lambda a, b: a ^ b),
        ("min.u32 d, a, b", min),
        ("max.u32 d, a, b", max),
        ("sad.u32 d, a, b, 5", lambda a, b: 5 + abs(a - b)),
        ("mad.lo.u32 d, a, b, 77", lambda a, b: a * b + 77),
    ],
)
def test_unsigned_words(instruction, function):
    expected = words(function(a, b) for a, b in zip(unsigned(WORDS), unsigned(OTHERS), strict=True))
    np.testing.assert_array_equal(evaluate(instruction, WORDS, OTHERS, out=np.uint32), expected)


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("mul.hi.s32 d, a, b", lambda a, b: (a * b) >> 32),
        ("min.s32 d, a, b", min),
        ("max.s32 d, a, b", max),
        ("min.s32.relu d, a, b", lambda a, b: max(min(a, b), 0)),
        # "saturates to MININT..MAXINT"
        ("add.sat.s32 d, a, b", lambda a, b: max(-(2**31), min(2**31 - 1, a + b))),
        ("sub.sat.s32 d, a, b", lambda a, b: max(-(2**31), min(2**31 - 1, a - b))),
    ],
)
def test_signed_words(instruction, function):
    instruction = instruction.replace("min.s32.relu", "min.relu.s32")
    expected = words(function(a, b) for a, b in zip(signed(WORDS), signed(OTHERS), strict=True))
    np.testing.assert_array_equal(evaluate(instruction, WORDS, OTHERS, out=np.uint32), expected)


def test_division_truncates_toward_zero():
    nonzero = np.where(OTHERS == 0, np.uint32(3), OTHERS)
    quotients = evaluate("div.s32 d, a, b", WORDS, nonzero, out=np.uint32)
    remainders = evaluate("rem.s32 d, a, b", WORDS, nonzero, out=np.uint32)
    for a, b, q, r in zip(
        signed(WORDS), signed(nonzero), signed(quotients), signed(remainders), strict=True
    ):
        if (a, b) == (-(2**31), -1):
            continue  # overflows
        expected = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        assert q == expected
        assert r == a - b * expected
    np.testing.assert_array_equal(
        evaluate("div.u32 d, a, b", WORDS, nonzero, out=np.uint32), WORDS // nonzero
    )


def test_wide_products():
    expected = [a * b for a, b in zip(signed(WORDS), signed(OTHERS), strict=True)]
    assert evaluate("mul.wide.s32 d, a, b", WORDS, OTHERS, out=np.int64).tolist() == expected
    expected = [a * b for a, b in zip(unsigned(WORDS), unsigned(OTHERS), strict=True)]
    assert evaluate("mul.wide.u32 d, a, b", WORDS, OTHERS, out=np.uint64).tolist() == expected


def test_bit_counts():
    expected = [bin(w).count("1") for w in unsigned(WORDS)]
    assert evaluate("popc.b32 d, a", WORDS, out=np.uint32).tolist() == expected
    expected = [32 - w.bit_length() for w in unsigned(WORDS)]
    assert evaluate("clz.b32 d, a", WORDS, out=np.uint32).tolist() == expected
    expected = [int(f"{w:032b}"[::-1], 2) for w in unsigned(WORDS)]
    assert evaluate("brev.b32 d, a", WORDS, out=np.uint32).tolist() == expected
    # bfind: "0xffffffff if no non-sign bit is found"; for signed input the most significant
    # 0 of negative values.
    expected = [w.bit_length() - 1 & 0xFFFFFFFF for w in unsigned(WORDS)]
    assert evaluate("bfind.u32 d, a", WORDS, out=np.uint32).tolist() == expected
    expected = [(w if w >= 0 else ~w).bit_length() - 1 & 0xFFFFFFFF for w in signed(WORDS)]
    assert evaluate("bfind.s32 d, a", WORDS, out=np.uint32).tolist() == expected


def test_bit_fields():
    """bfe: "the sign bit of the extracted field"; bfi: "length zero: the result is b"."""
    x = np.array([0xFFFF8123] * 6, np.uint32)
    at = np.array([4, 4, 28, 40, 0, 8], np.uint32)
    length = np.array([8, 0, 8, 8, 32, 8], np.uint32)
    got = evaluate("bfe.u32 d, a, b, c", x, at, length, out=np.uint32)
    np.testing.assert_array_equal(got, [0x12, 0, 0xF, 0, 0xFFFF8123, 0x81])
    got = evaluate("bfe.s32 d, a, b, c", x, at, length, out=np.uint32)
    np.testing.assert_array_equal(got, [0x12, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFF8123, 0xFFFFFF81])
    got = evaluate("bfi.b32 d, a, b, 4, c", x, np.uint32(0), length, out=np.uint32)
    np.testing.assert_array_equal(got, [0x230, 0, 0x230, 0x230, 0xFFF81230, 0x230])


# ---- 9.7.8 Logic and Shift Instructions


def test_shift_amounts_are_clamped():
    """shl, shr: "Shift amounts greater than the register width N are clamped to N"."""
    amount = np.array([0, 1, 31, 32, 33, 255, 0xFFFFFFFF], np.uint32)
    x = np.uint32(0x80000001)
    np.testing.assert_array_equal(
        evaluate("shl.b32 d, a, b", x, amount, out=np.uint32), [x, 2, 0x80000000, 0, 0, 0, 0]
    )
    np.testing.assert_array_equal(
        evaluate("shr.u32 d, a, b", x, amount, out=np.uint32), [x, 0x40000000, 1, 0, 0, 0, 0]
    )
    np.testing.assert_array_equal(
        evaluate("shr.s32 d, a, b", x, amount, out=np.uint32),
        [x, 0xC0000000, *[0xFFFFFFFF] * 5],
    )
    np.testing.assert_array_equal(
        evaluate("shr.b64 d, a, b", np.uint64(1 << 63), amount, out=np.uint64),
        [1 << 63, 1 << 62, 1 << 32, 1 << 31, 1 << 30, 0, 0],
    )


def test_funnel_shift():
    """shf.l: the upper half of [b:a] << n; .wrap takes n modulo 32, .clamp at most 32."""
    a, b = np.uint32(0x11223344), np.uint32(0xAABBCCDD)
    n = np.array([0, 8, 32, 40], np.uint32)
    both = 0xAABBCCDD11223344
    for mode, take in (("wrap", lambda k: k & 31), ("clamp", lambda k: min(k, 32))):
        left = [(both << take(int(k)) >> 32) & 0xFFFFFFFF for k in n]
        right = [both >> take(int(k)) & 0xFFFFFFFF for k in n]
        got = evaluate(f"shf.l.{mode}.b32 d, a, b, c", a, b, n, out=np.uint32)
        np.testing.assert_array_equal(got, left)
        got = evaluate(f"shf.r.{mode}.b32 d, a, b, c", a, b, n, out=np.uint32)
        np.testing.assert_array_equal(got, right)


def test_permute_replicates_signs():
    """prmt: bit 3 of a selector replicates the sign bit of the byte."""
    a, b = np.uint32(0x83727160), np.uint32(0x17A6B5C4)
    got = evaluate(
        "prmt.b32 d, a, b, c", a, b, np.array([0x7531, 0xBF80], np.uint32), out=np.uint32
    )
    np.testing.assert_array_equal(got, [0x17B58371, 0xFF000060])


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xE2, 0x01])
def test_lop3(table):
    """lop3: the table is the function of a=0xF0, b=0xCC, c=0xAA."""
    third = RANDOM.permutation(WORDS)
    expected = []
    for a, b, c in zip(unsigned(WORDS), unsigned(OTHERS), unsigned(third), strict=True):
        value = 0
        for i in range(32):
            row = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
            value |= (table >> row & 1) << i
        expected.append(value)
    got = evaluate(f"lop3.b32 d, a, b, c, {table}", WORDS, OTHERS, third, out=np.uint32)
    np.testing.assert_array_equal(got, expected)


# ---- 9.7.6 Comparison and Selection Instructions


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_ordered_and_unordered_comparisons(name):
    """setp: ordered comparisons are false, unordered ones (-u) true, when an operand is NaN."""
    other = RANDOM.permutation(FLOATS)
    python = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }[name]  # fmt: skip
    for suffix in ("", "u"):
        got = evaluate(f"setp.{name}{suffix}.f32 p, a, b", FLOATS, other, out=np.uint32)
        for a, b, result in zip(FLOATS.tolist(), other.tolist(), got.tolist(), strict=True):
            has_nan = math.isnan(a) or math.isnan(b)
            assert result == (bool(suffix) if has_nan else python(a, b))
    got = evaluate("setp.nan.f32 p, a, b", FLOATS, other, out=np.uint32)
    np.testing.assert_array_equal(got, np.isnan(FLOATS) | np.isnan(other))


def test_signed_and_unsigned_comparisons():
    got = evaluate("setp.lt.s32 p, a, b", WORDS, OTHERS, out=np.uint32)
    np.testing.assert_array_equal(got, WORDS.view(np.int32) < OTHERS.view(np.int32))
    got = evaluate("setp.lo.u32 p, a, b", WORDS, OTHERS, out=np.uint32)
    np.testing.assert_array_equal(got, WORDS < OTHERS)


# ---- 9.7.3 to 9.7.5 Floating-Point Instructions, of half and of mixed precision too


def test_fma_rounds_once():
    """fma: "computed to infinite precision and then rounded once"."""
    a = np.array([1 + 2**-12, 1 + 2**-23, 3.0, 1.5], np.float32)
    b = np.array([1 + 2**-12, 1 - 2**-23, 5.0, 2.0**-149], np.float32)
    c = np.array([2**-60, -1.0, 2.0**-80, 2.0**-149], np.float32)
    from fractions import Fraction

    expected = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        expected.append(_nearest_single(exact))
    got = evaluate("fma.rn.f32 d, a, b, c", a, b, c, out=np.float32)
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


def test_fma_against_exact_arithmetic():
    from fractions import Fraction

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
    from fractions import Fraction

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
def test_approximations_stay_within_the_documented_error(name, function, error):
    x = np.abs(RANDOM.standard_normal(64).astype(np.float32)) * 8 + np.float32(0.01)
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


def test_packed_pairs():
    """add.f32x2 and fma.f16x2 work on each half; the lower half is the first element."""
    a, b = (RANDOM.standard_normal((8, 2)).astype(np.float32) for _ in range(2))
    got = evaluate(
        "add.rn.f32x2 d, a, b", a.view(np.uint64)[:, 0], b.view(np.uint64)[:, 0], out=np.uint64
    )
    np.testing.assert_array_equal(got.view(np.float32).reshape(-1, 2), a + b)
    h, k, c = (RANDOM.standard_normal((8, 2)).astype(np.float16) for _ in range(3))
    got = evaluate(
        "fma.rn.f16x2 d, a, b, c",
        *(x.view(np.uint32)[:, 0] for x in (h, k, c)),
        out=np.uint32,
    ).view(np.float16)
    exact = h.astype(np.float64) * k + c
    np.testing.assert_array_equal(got, exact.astype(np.float16).reshape(-1))


def test_mixed_precision():
    """fma.f32.abtype, add.f32.atype: half operands are widened, the addend is single."""
    a, b = (RANDOM.standard_normal(8).astype(ml_dtypes.bfloat16) for _ in range(2))
    c = RANDOM.standard_normal(8).astype(np.float32)
    raw = [x.view(np.uint16) for x in (a, b)]
    got = evaluate("fma.rn.f32.bf16 d, a, b, c", *raw, c, out=np.float32)
    exact = a.astype(np.float64) * b.astype(np.float64) + c
    np.testing.assert_array_equal(got, exact.astype(np.float32))
    got = evaluate("sub.f32.bf16 d, a, b", raw[0], c, out=np.float32)
    np.testing.assert_array_equal(got, a.astype(np.float32) - c)


# ---- 9.7.9 Data Movement and Conversion Instructions: cvt


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


def test_pack_half_pairs():
    """cvt.rn.bf16x2.f32 d, a, b: "a in the upper half of d, b in the lower half"."""
    high = np.concatenate([FLOATS, [np.float32(1 + 2**-8)]]).astype(np.float32)
    low = RANDOM.permutation(high)
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


def test_moves_pack_and_unpack():
    """mov.b64 d, {a, b}: a is the least significant part."""
    got = evaluate("mov.b64 d, {a, b}", WORDS, OTHERS, out=np.uint64)
    expected = OTHERS.astype(np.uint64) << np.uint64(32) | WORDS
    np.testing.assert_array_equal(got, expected)
