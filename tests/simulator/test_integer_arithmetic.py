"""Integer arithmetic, against the statements of PTX ISA 9.0, 9.7.1 and 9.7.2."""

import numpy as np
import pytest

from tests.simulator.operands import OTHERS, WORDS, signed, unsigned, words
from tests.simulator.snippets import evaluate, per_thread


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("add.s32 d, a, b", lambda a, b: a + b),
        ("sub.u32 d, a, b", lambda a, b: a - b),
        ("mul.lo.s32 d, a, b", lambda a, b: a * b),
        ("mul.hi.u32 d, a, b", lambda a, b: (a * b) >> 32),
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


def test_carry_chain():
    """add.cc / addc: 64-bit addition from 32-bit halves."""
    a = np.array([0xFFFFFFFF, 1, 0x80000000], np.uint32)
    got = evaluate("add.cc.u32 d, a, b", a, a, out=np.uint32)
    np.testing.assert_array_equal(got, a + a)
    carries = per_thread("""
      mov.u32 %r1, 0xFFFFFFFF;
      add.cc.u32 %r2, %r1, %tid;
      addc.u32 %r0, 0, 0;
    """)
    np.testing.assert_array_equal(carries, np.arange(32) > 0)
