"""Comparisons, against PTX ISA 9.0, 9.7.6 "Comparison and Selection Instructions"."""

import math

import numpy as np
import pytest

from tests.simulator.operands import FLOATS, OTHERS, WORDS
from tests.simulator.snippets import evaluate


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_ordered_and_unordered_comparisons(name):
    """setp: ordered comparisons are false, unordered ones (-u) true, when an operand is NaN."""
    other = np.random.default_rng(2).permutation(FLOATS)
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
