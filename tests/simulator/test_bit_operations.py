"""Logic, shifts, and counts and fields of bits, against PTX ISA 9.0, 9.7.1 and 9.7.8."""

import numpy as np
import pytest

from tests.simulator.operands import OTHERS, WORDS, signed, unsigned, words
from tests.simulator.snippets import evaluate


@pytest.mark.parametrize(
    ("name", "function"),
    [("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b)],
)
def test_logic(name, function):
    expected = words(function(a, b) for a, b in zip(unsigned(WORDS), unsigned(OTHERS), strict=True))
    got = evaluate(f"{name}.b32 d, a, b", WORDS, OTHERS, out=np.uint32)
    np.testing.assert_array_equal(got, expected)


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
    third = np.random.default_rng(3).permutation(WORDS)
    expected = []
    for a, b, c in zip(unsigned(WORDS), unsigned(OTHERS), unsigned(third), strict=True):
        value = 0
        for i in range(32):
            row = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
            value |= (table >> row & 1) << i
        expected.append(value)
    got = evaluate(f"lop3.b32 d, a, b, c, {table}", WORDS, OTHERS, third, out=np.uint32)
    np.testing.assert_array_equal(got, expected)
