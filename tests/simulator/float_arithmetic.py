"""Floating-point arithmetic: PTX ISA, "Floating Point Instructions", also of half precision.

Where the hardware's answer is approximate (``ex2.approx`` and friends) the correctly rounded value
stands for it, which lies within the documented error.
"""

import numpy as np

from . import registers as R
from .elementwise import elementwise
from .number_types import FLOATS, UNSIGNED, elements, is_float, to_single
from .program import FormError, instruction
from .rounding import (
    directed_mode,
    flush,
    fma32,
    fma_to_odd,
    round_to_odd,
    rounded,
    saturate,
    to_float,
)

# ---- functions of singles, for other types and with modifiers


def _modified(function, parts):
    """Add ``.ftz`` and ``.sat`` to a single-precision function."""
    if "ftz" in parts:
        inner = function

        def function(*x):
            return flush(inner(*[flush(y) for y in x]))

    if "sat" in parts:
        unsaturated = function

        def function(*x):
            return saturate(unsaturated(*x))

    return function


def _on_halves(asm, st, function, count):
    """Apply a float32 function to f16, bf16 or their packed pairs, rounding once."""
    element, lanes = elements(st.parts[-1])
    dtype, bits = FLOATS[element], 16 * lanes

    def halves(*x):
        y = function(*[to_single(half, dtype) for half in x])
        return to_float(y, element, st.parts).view(UNSIGNED[bits])

    return elementwise(asm, st, halves, f"b{bits}", [f"b{bits}"] * count)


def _on_pairs(function):
    """Lift a float32 function to ``.f32x2``."""
    return lambda *x: function(*[y.view(np.float32) for y in x]).view(np.uint64)


def _approximate(function):
    """Evaluate in double and round once."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


# ---- addition, multiplication, division


def _single(name, parts):
    """The float32 function of add, sub, mul, fma with rounding and modifiers; and "is ufunc"."""
    mode = directed_mode(parts)
    if name == "fma":
        function = (
            (lambda a, b, c: rounded(fma_to_odd(a, b, c), np.float32, mode)) if mode else fma32
        )
        return _modified(function, parts), False
    if mode:

        def directed(a, b):
            a, b = a.astype(np.float64), b.astype(np.float64)
            exact = a * b if name == "mul" else round_to_odd(a, b if name == "add" else -b)
            return rounded(exact, np.float32, mode)

        return _modified(directed, parts), False
    ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    return _modified(ufunc, parts), not {"ftz", "sat"} & set(parts)


def _double(name):
    def fma(a, b, c):
        return (a.astype(np.longdouble) * b.astype(np.longdouble) + c).astype(np.float64)

    return {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma}[name]


def _half(name):
    """Of halves as singles, so precise that to round the result again is to round once."""
    return {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma_to_odd}[name]


def _mixed(asm, st, name, kind):
    """``.f32.f16`` and ``.f32.bf16``: half operands, a single addend and result."""
    if st.parts[1:-2] not in ([], ["rn"]):
        raise FormError("mixed-precision form")
    dtype = FLOATS[kind]
    single = {"add": np.add, "sub": np.subtract, "fma": fma32}[name]

    def function(*x):
        *halves, addend = x
        return single(*[to_single(y, dtype) for y in halves], addend)

    return elementwise(asm, st, function, "f32", [kind] * (2 if name == "fma" else 1) + ["f32"])


@instruction("add", "sub", "mul", "fma", "mad", types=is_float)
def _arithmetic(asm, st):
    parts, kind = st.parts, st.parts[-1]
    name = "fma" if parts[0] == "mad" else parts[0]
    count = 3 if name == "fma" else 2
    if kind == "f64":
        return elementwise(asm, st, _double(name), kind, [kind] * count, ufunc=count == 2)
    if kind in ("f32", "f32x2"):
        function, ufunc = _single(name, parts)
        if kind == "f32x2":
            function, ufunc = _on_pairs(function), False
        return elementwise(asm, st, function, kind, [kind] * count, ufunc=ufunc)
    if parts[-2] == "f32":
        return _mixed(asm, st, name, kind)
    return _on_halves(asm, st, _half(name), count)


@instruction("div", types=is_float)
def _divide(asm, st):
    parts, kind = st.parts, st.parts[-1]
    if kind == "f64":
        return elementwise(asm, st, np.divide, kind, [kind] * 2)
    mode = directed_mode(parts)

    def divide(a, b):
        return rounded(a.astype(np.longdouble) / b, np.float32, mode) if mode else a / b

    return elementwise(asm, st, _modified(divide, parts), kind, [kind] * 2)


# ---- signs, extrema, classes


@instruction("neg", "abs", types=is_float)
def _sign(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    if kind in ("f32", "f64"):
        function = np.negative if name == "neg" else np.abs
        if kind == "f32":
            function = _modified(function, parts)
        return elementwise(asm, st, function, kind, [kind])
    raw, mask = (
        ("b32", np.uint32(0x80008000)) if elements(kind)[1] == 2 else ("b16", np.uint16(0x8000))
    )
    function = (lambda x: x ^ mask) if name == "neg" else (lambda x: x & ~mask)
    return elementwise(asm, st, function, raw, [raw])


@instruction("copysign")
def _copysign(asm, st):
    """copysign d, a, b: the sign of a on the magnitude of b."""
    kind = st.parts[-1]
    return elementwise(asm, st, lambda a, b: np.copysign(b, a), kind, [kind] * 2)


@instruction("min", "max", types=is_float)
def _extremum(asm, st):
    """PTX: a NaN operand is ignored unless .NaN; -0 < +0."""
    parts, kind = st.parts, st.parts[-1]
    count = len(st.operands) - 1
    largest = parts[0] == "max"
    pick = (np.maximum if largest else np.minimum) if "NaN" in parts else (
        np.fmax if largest else np.fmin
    )  # fmt: skip

    def two(a, b):
        y = pick(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            y = np.where(zeros, np.where(np.signbit(a) ^ largest, a, b), y)
        if "xorsign" in parts:
            y = np.copysign(y, np.where(np.signbit(a) ^ np.signbit(b), -1, 1).astype(y.dtype))
        return y

    function = two if count == 2 else (lambda a, b, c: two(two(a, b), c))
    if kind not in ("f32", "f64"):
        return _on_halves(asm, st, function, count)
    if kind == "f32":
        function = _modified(function, parts)
    return elementwise(asm, st, function, kind, [kind] * count)


@instruction("testp")
def _testp(asm, st):
    test, kind = st.parts[1], st.parts[2]
    tiny = np.finfo(R.DTYPE[kind]).tiny
    function = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan, "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }[test]  # fmt: skip
    return elementwise(asm, st, function, "pred", [kind])


# ---- transcendental functions


@instruction("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")
def _transcendental(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    function = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
        "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    }[name]  # fmt: skip
    if kind == "f64":
        return elementwise(asm, st, function, kind, [kind])
    if kind != "f32":
        return _on_halves(asm, st, function, 1)
    if name == "ex2":
        # float32 exp2 is within the documented 2 ulp and far faster than the double one.
        return elementwise(asm, st, _modified(np.exp2, parts), kind, [kind])
    mode = directed_mode(parts)
    if mode:
        single = lambda x: rounded(function(x.astype(np.longdouble)), np.float32, mode)  # noqa: E731
    else:
        single = _approximate(function)
    return elementwise(asm, st, _modified(single, parts), kind, [kind])
