"""Integer, floating-point, logic, comparison, conversion and data-movement instructions.

Semantics follow the PTX ISA, "Instruction Set"; where the hardware's answer is approximate
(``ex2.approx`` and friends) the correctly rounded value stands for it, which lies within the
documented error.
"""

import ml_dtypes
import numpy as np

from . import registers as R
from .program import FormError, instruction, integer, put
from .ptx import split_operands

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
BF16 = ml_dtypes.bfloat16
_FLOATS = {
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64),
    "bf16": np.dtype(BF16), "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2), "tf32": np.dtype(np.float32),
}  # fmt: skip
_NAN_BITS = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def _bits(type_name: str) -> int:
    return int(type_name.lstrip("bfus"))


def elementwise(asm, statement, function, out_type, source_types, *, ufunc=False, first=1):
    """``destination = function(*sources)``; with ``ufunc`` the function writes in place."""
    sources = [
        asm.source(text, kind)
        for text, kind in zip(statement.operands[first:], source_types, strict=True)
    ]
    out = asm.destination(statement.operands[0], out_type)
    if out is None:
        return lambda v, m: None
    vd, d = out
    if ufunc and len(sources) == 2:
        (va, a), (vb, b) = sources

        def run(v, m):
            if m is None:
                function(v[va][a], v[vb][b], out=v[vd][d])
            else:
                np.copyto(v[vd][d], function(v[va][a], v[vb][b]), where=m, casting="unsafe")
    elif len(sources) == 1:
        ((va, a),) = sources

        def run(v, m):
            if m is None:
                v[vd][d][...] = function(v[va][a])
            else:
                np.copyto(v[vd][d], function(v[va][a]), where=m, casting="unsafe")
    elif len(sources) == 2:
        (va, a), (vb, b) = sources

        def run(v, m):
            if m is None:
                v[vd][d][...] = function(v[va][a], v[vb][b])
            else:
                np.copyto(v[vd][d], function(v[va][a], v[vb][b]), where=m, casting="unsafe")
    else:

        def run(v, m):
            put(v[vd][d], function(*[v[view][row] for view, row in sources]), m)

    return run


# ---- floating point


def flush(x):
    """Subnormal single-precision values become zero of the same sign (``.ftz``)."""
    small = np.abs(x) < np.float32(1.1754943508222875e-38)
    if small.any():
        return np.where(small, np.copysign(np.float32(0), x), x)
    return x


def _saturate(x):
    """``.sat``: clamp to [0, 1], NaN becomes +0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


def _relu(x):
    """``.relu``: negative becomes 0, NaN canonical NaN."""
    return np.where(x < 0, x.dtype.type(0), x)


def fma32(a, b, c):
    """Single-precision fused multiply-add, rounded once to nearest even."""
    product = a.astype(np.float64) * b
    total = product + c
    # The product is exact in double; the sum may round.  A result that then sits half-way between
    # two singles (or is subnormal) was perhaps rounded twice: redo it with round to odd.
    bits = total.view(np.uint64)
    risky = (bits & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    tiny = np.abs(total) < 1.2e-38
    if risky.any() or tiny.any():
        total = _round_to_odd(product, np.broadcast_to(np.asarray(c, np.float64), total.shape))
    return total.astype(np.float32)


def _round_to_odd(a, b):
    total = a + b
    bb = total - a
    error = (a - (total - bb)) + (b - bb)
    bits = total.view(np.int64).copy()
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    toward_zero = np.where(total > 0, error < 0, error > 0)
    bits = np.where(inexact, np.where(toward_zero, bits - 1, bits + 1), bits)
    return bits.view(np.float64)


def _directed(exact, mode):
    """Round doubles to singles toward -inf, +inf or zero."""
    x = exact.astype(np.float32)
    wide = x.astype(np.float64)
    if mode == "rm" or mode == "rz":
        down = (wide > exact) if mode == "rm" else (wide > exact) & (exact > 0)
        x = np.where(down, np.nextafter(x, np.float32(-np.inf)), x)
    if mode == "rp" or mode == "rz":
        up = (wide < exact) if mode == "rp" else (wide < exact) & (exact < 0)
        x = np.where(up, np.nextafter(x, np.float32(np.inf)), x)
    return x


def _rounding(parts):
    return next((p for p in parts if p in ("rn", "rz", "rm", "rp", "rna", "rs")), None)


def _finish32(function, parts):
    """Add ``.ftz`` and ``.sat`` to a single-precision function."""
    if "ftz" in parts:
        inner = function

        def function(*x):
            return flush(inner(*[flush(y) for y in x]))

    if "sat" in parts:
        unsaturated = function

        def function(*x):
            return _saturate(unsaturated(*x))

    return function


def _on_halves(function, kind, packed, parts=()):
    """Lift a float32 function to f16, bf16 or their packed pairs, rounding once."""
    dtype = np.float16 if kind == "f16" else BF16

    def run(*raw):
        wide = [np.ascontiguousarray(x).view(dtype).astype(np.float32) for x in raw]
        y = function(*wide)
        if "relu" in parts:
            y = _relu(y)
        if "sat" in parts:
            y = _saturate(y)
        narrow = np.asarray(y).astype(dtype)
        bits = np.where(np.isnan(y), np.uint16(0x7FFF), narrow.view(np.uint16))
        return np.ascontiguousarray(bits).view(np.uint32 if packed else np.uint16)

    return run


def _half_kind(type_name):
    """("f16" or "bf16", packed) of a half type, or None."""
    return {
        "f16": ("f16", False), "bf16": ("bf16", False),
        "f16x2": ("f16", True), "bf16x2": ("bf16", True),
    }.get(type_name)  # fmt: skip


def _packed32(function, parts):
    """Lift a float32 function to ``.f32x2``."""

    def run(*raw):
        wide = [np.ascontiguousarray(x).view(np.float32) for x in raw]
        return np.ascontiguousarray(function(*wide)).view(np.uint64)

    return run


def _single(name, parts):
    """The float32 function of add, sub, mul, fma with rounding and modifiers; and "is ufunc"."""
    mode = _rounding(parts)
    plain = not {"ftz", "sat"} & set(parts)
    if name in ("fma", "mad"):
        if mode in ("rm", "rp", "rz"):
            return _finish32(
                lambda a, b, c: _directed(
                    _round_to_odd(
                        a.astype(np.float64) * b,
                        np.broadcast_to(np.asarray(c, np.float64), np.shape(a * b)),
                    ),
                    mode,
                ),
                parts,
            ), False
        return _finish32(fma32, parts), False
    if mode in ("rm", "rp", "rz"):

        def directed(a, b):
            a, b = a.astype(np.float64), b.astype(np.float64)
            if name == "mul":
                return _directed(a * b, mode)
            return _directed(_round_to_odd(a, b if name == "add" else -b), mode)

        return _finish32(directed, parts), False
    ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    if plain:
        return ufunc, True
    return _finish32(ufunc, parts), False


def _mixed(asm, st, name, kind):
    """``.f32.f16`` and ``.f32.bf16``: half operands, a single addend and result."""
    if st.parts[1:-2] not in ([], ["rn"]):
        raise FormError("mixed-precision form")
    dtype = np.float16 if kind == "f16" else BF16

    def wide(x):
        return np.ascontiguousarray(x).view(dtype).astype(np.float32)

    function = {
        "add": lambda a, c: wide(a) + c,
        "sub": lambda a, c: wide(a) - c,
        "fma": lambda a, b, c: fma32(wide(a), wide(b), c),
    }[name]
    return elementwise(asm, st, function, "f32", [kind] * (2 if name == "fma" else 1) + ["f32"])


@instruction("add", "sub", "mul", "fma", "mad")
def _arithmetic(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    count = 3 if name in ("fma", "mad") else 2
    if kind == "cc" or "cc" in parts:
        return _carry(asm, st)
    if kind in ("f32", "f32x2"):
        function, ufunc = _single(name, parts)
        if kind == "f32x2":
            return elementwise(asm, st, _packed32(function, parts), kind, [kind] * count)
        return elementwise(asm, st, function, kind, [kind] * count, ufunc=ufunc)
    if kind == "f64":
        function = {
            "add": np.add, "sub": np.subtract, "mul": np.multiply,
            "fma": lambda a, b, c: (
                a.astype(np.longdouble) * b.astype(np.longdouble) + c
            ).astype(np.float64),
        }[name if name != "mad" else "fma"]  # fmt: skip
        return elementwise(asm, st, function, kind, [kind] * count, ufunc=count == 2)
    half = _half_kind(kind)
    if half:
        if parts[-2] == "f32":
            return _mixed(asm, st, name, kind)
        function = {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul": lambda a, b: a * b,
            # Exact in double; one rounding to single and one to half differ from a single rounding
            # only where the hardware's own result is half-way, so go through round to odd.
            "fma": lambda a, b, c: _round_to_odd(
                a.astype(np.float64) * b, np.asarray(c, np.float64)
            ),
        }[name]
        return elementwise(asm, st, _on_halves(function, *half, parts), kind, [kind] * count)
    if kind in ("u16x2", "s16x2"):
        ufunc = {"add": np.add}[name]
        return elementwise(
            asm, st,
            lambda a, b: ufunc(a.view(np.uint16), b.view(np.uint16)).view(np.uint32),
            kind, [kind] * 2,
        )  # fmt: skip
    return _integer_arithmetic(asm, st, name, parts, kind)


def _integer_arithmetic(asm, st, name, parts, kind):
    if name in ("add", "sub"):
        ufunc = np.add if name == "add" else np.subtract
        if "sat" in parts:
            limits = np.iinfo(np.int32)

            def saturated(a, b):
                return np.clip(ufunc(a.astype(np.int64), b), limits.min, limits.max)

            return elementwise(asm, st, saturated, kind, [kind] * 2)
        return elementwise(asm, st, ufunc, kind, [kind] * 2, ufunc=True)
    width = _bits(kind)
    signed = kind[0] == "s"
    if parts[1] == "lo":
        if name == "mul":
            return elementwise(asm, st, np.multiply, kind, [kind] * 2, ufunc=True)
        return elementwise(asm, st, lambda a, b, c: a * b + c, kind, [kind] * 3)
    if parts[1] == "wide":
        wide = kind[0] + str(2 * width)
        dtype = (_SIGNED if signed else _UNSIGNED)[2 * width]
        if name == "mul":
            return elementwise(
                asm, st, lambda a, b: a.astype(dtype) * b.astype(dtype), wide, [kind] * 2
            )
        return elementwise(
            asm, st, lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c, wide, [kind, kind, wide]
        )
    if parts[1] == "hi":
        high = _high(width, signed)
        if name == "mul":
            return elementwise(asm, st, high, kind, [kind] * 2)
        return elementwise(asm, st, lambda a, b, c: high(a, b) + c, kind, [kind] * 3)
    raise FormError("unknown multiplication")


def _high(width, signed):
    if width < 64:
        dtype = (_SIGNED if signed else _UNSIGNED)[2 * width]
        return lambda a, b: ((a.astype(dtype) * b.astype(dtype)) >> dtype(width)).astype(
            (_SIGNED if signed else _UNSIGNED)[width]
        )

    def high64(a, b):
        x, y = a.astype(object), b.astype(object)
        product = (x * y) >> 64
        return np.array([int(p) & (2**64 - 1) for p in np.atleast_1d(product)], np.uint64).view(
            np.int64 if signed else np.uint64
        )

    return high64


@instruction("mad24", "mul24")
def _mul24(asm, st):
    raise FormError("24-bit multiplication")


# The carry flag is a hidden row, one per thread.
@instruction("addc", "subc", "madc")
def _carry(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    multiplies = name.startswith("mad")
    if _bits(kind) != 32 or (multiplies and kind != "u32"):
        raise FormError("carry chain of this form")
    flag = asm.constant_row("p", "carry flag", lambda block: False)
    sources = [asm.source(x, "u32") for x in st.operands[1:]]
    out = asm.destination(st.operands[0], "u32")
    use, sets, subtract = name.endswith("c"), "cc" in parts, name.startswith("sub")
    product = np.multiply if "lo" in parts else _high(32, signed=False)

    def run(v, m):
        x, *others, y = (v[view][row] for view, row in sources)
        x, y = (product(x, *others) if multiplies else x).astype(np.int64), y.astype(np.int64)
        carry = v[R.P][flag].astype(np.int64) if use else 0
        total = x - y - carry if subtract else x + y + carry
        if out:
            put(v[out[0]][out[1]], (total & 0xFFFFFFFF).astype(np.uint32), m)
        if sets:
            put(v[R.P][flag], (total < 0) | (total > 0xFFFFFFFF), m)

    return run


@instruction("div", "rem")
def _divide(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    if kind in ("f32", "f64"):
        if name == "rem":
            raise FormError("remainder of floats")
        if kind == "f64":
            return elementwise(asm, st, np.divide, kind, [kind] * 2)
        mode = _rounding(parts)

        def divide(a, b):
            if mode in ("rm", "rp", "rz"):
                return _directed(a.astype(np.longdouble) / b, mode)
            return a / b

        return elementwise(asm, st, _finish32(divide, parts), kind, [kind] * 2)
    signed, width = kind[0] == "s", _bits(kind)
    dtype = (_SIGNED if signed else _UNSIGNED)[width]

    def integer_divide(a, b):
        # "Division by zero yields an unspecified, machine-specific value": all ones, as GPUs do.
        zero = b == 0
        safe = np.where(zero, dtype(1), b)
        if signed:
            quotient = np.floor_divide(a, safe)
            remainder = a - quotient * safe
            fix = (remainder != 0) & ((a < 0) != (safe < 0))
            quotient = quotient + fix
            remainder = a - quotient * safe
        else:
            quotient, remainder = np.floor_divide(a, safe), np.remainder(a, safe)
        if name == "rem":
            return np.where(zero, a, remainder)
        return np.where(zero, dtype(-1) if signed else ~dtype(0), quotient)

    return elementwise(asm, st, integer_divide, kind, [kind] * 2)


@instruction("neg", "abs")
def _sign(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    half = _half_kind(kind)
    if half:
        mask = np.uint32(0x80008000) if half[1] else np.uint16(0x8000)
        function = (lambda x: x ^ mask) if name == "neg" else (lambda x: x & ~mask)
        return elementwise(asm, st, function, kind, [kind])
    function = np.negative if name == "neg" else np.abs
    if kind == "f32":
        function = _finish32(function, parts)
    return elementwise(asm, st, function, kind, [kind])


@instruction("min", "max")
def _extremum(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    count = len(st.operands) - 1
    largest = name == "max"
    if kind in ("f32", "f64") or _half_kind(kind):
        # PTX: a NaN operand is ignored unless .NaN; -0 < +0.
        pick = (np.maximum if largest else np.minimum) if "NaN" in parts else (
            np.fmax if largest else np.fmin
        )  # fmt: skip
        sign = (lambda x, y: ~np.signbit(x)) if largest else (lambda x, y: np.signbit(x))

        def two(a, b):
            y = pick(a, b)
            zeros = (a == 0) & (b == 0)
            if zeros.any():
                y = np.where(zeros, np.where(sign(a, b), a, b), y)
            if "xorsign" in parts:
                y = np.copysign(y, np.where(np.signbit(a) ^ np.signbit(b), -1, 1).astype(y.dtype))
            return y

        function = two if count == 2 else (lambda a, b, c: two(two(a, b), c))
        half = _half_kind(kind)
        if half:
            function = _on_halves(function, *half, parts)
        elif kind == "f32":
            function = _finish32(function, parts)
        return elementwise(asm, st, function, kind, [kind] * count)
    ufunc = np.maximum if largest else np.minimum
    if kind in ("u16x2", "s16x2"):
        dtype = np.int16 if kind[0] == "s" else np.uint16
        return elementwise(
            asm, st, lambda a, b: ufunc(a.view(dtype), b.view(dtype)).view(np.uint32),
            kind, [kind] * 2,
        )  # fmt: skip
    if "relu" in parts:
        return elementwise(
            asm, st, lambda a, b: np.maximum(ufunc(a, b), a.dtype.type(0)), kind, [kind] * 2
        )
    if count == 3:
        return elementwise(asm, st, lambda a, b, c: ufunc(ufunc(a, b), c), kind, [kind] * 3)
    return elementwise(asm, st, ufunc, kind, [kind] * 2, ufunc=True)


def _approximate(function):
    """Evaluate in double and round once."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


@instruction("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")
def _transcendental(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    function = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
        "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    }[name]  # fmt: skip
    half = _half_kind(kind)
    if half:
        return elementwise(asm, st, _on_halves(function, *half, parts), kind, [kind])
    if kind == "f64":
        return elementwise(asm, st, function, kind, [kind])
    if name == "ex2":
        # float32 exp2 is within the documented 2 ulp and far faster than the double one.
        return elementwise(asm, st, _finish32(np.exp2, parts), kind, [kind])
    mode = _rounding(parts)
    if mode in ("rm", "rp", "rz"):
        rounded = lambda x: _directed(function(x.astype(np.longdouble)), mode)  # noqa: E731
    else:
        rounded = _approximate(function)
    return elementwise(asm, st, _finish32(rounded, parts), kind, [kind])


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


@instruction("copysign")
def _copysign(asm, st):
    """copysign d, a, b: the sign of a on the magnitude of b."""
    kind = st.parts[-1]
    return elementwise(asm, st, lambda a, b: np.copysign(b, a), kind, [kind] * 2)


# ---- logic and shifts


@instruction("and", "or", "xor")
def _logic(asm, st):
    kind = st.parts[-1]
    ufunc = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[st.parts[0]]
    return elementwise(asm, st, ufunc, kind, [kind] * 2, ufunc=True)


@instruction("not", "cnot")
def _not(asm, st):
    kind = st.parts[-1]
    if st.parts[0] == "cnot":
        return elementwise(asm, st, lambda x: x == 0, kind, [kind])
    return elementwise(asm, st, np.invert, kind, [kind])


@instruction("lop3")
def _lop3(asm, st):
    table = integer(st.operands[4])
    if st.parts[-1] != "b32" or len(st.parts) != 2:
        raise FormError("lop3 with a predicate")
    sources = [asm.source(x, "b32") for x in st.operands[1:4]]
    vd, d = asm.destination(st.operands[0], "b32")

    def run(v, m):
        a, b, c = (v[view][row] for view, row in sources)
        total = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
        for i in range(8):
            if table >> i & 1:
                total |= (
                    (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
                )  # fmt: skip
        put(v[vd][d], total, m)

    return run


@instruction("shl", "shr")
def _shift(asm, st):
    """PTX: "Shift amounts greater than the register width N are clamped to N"."""
    name, kind = st.parts[0], st.parts[-1]
    bits = _bits(kind)
    amount = st.operands[2]
    signed = name == "shr" and kind[0] == "s"
    dtype = R.DTYPE[kind].type

    def shift(x, n):
        clamped = np.minimum(n, np.uint32(bits - 1)).astype(dtype)
        if signed:
            return x >> clamped
        y = x << clamped if name == "shl" else x >> clamped
        return np.where(n >= bits, dtype(0), y)

    if asm.statement.register(amount) is None:
        n = integer(amount)
        if n < bits:
            fixed = dtype(n)
            ufunc = np.left_shift if name == "shl" else np.right_shift
            source = asm.source(st.operands[1], kind)
            vd, d = asm.destination(st.operands[0], kind)

            def run(v, m):
                if m is None:
                    ufunc(v[source[0]][source[1]], fixed, v[vd][d])
                else:
                    put(v[vd][d], ufunc(v[source[0]][source[1]], fixed), m)

            return run
    return elementwise(asm, st, shift, kind, [kind, "u32"])


@instruction("shf")
def _funnel(asm, st):
    """shf.l/.r: shift the 64 bits [b:a] and keep the high or the low half."""
    left, wrap = st.parts[1] == "l", st.parts[2] == "wrap"

    def shift(a, b, c):
        n = (c & np.uint32(31)) if wrap else np.minimum(c, np.uint32(32))
        n = n.astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        if left:
            return ((both << n) >> np.uint64(32)).astype(np.uint32)
        return (both >> n).astype(np.uint32)

    return elementwise(asm, st, shift, "u32", ["u32"] * 3)


@instruction("prmt")
def _permute(asm, st):
    if len(st.parts) != 2:
        raise FormError("prmt mode")

    def permute(a, b, c):
        n = np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c))
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        total = np.zeros(n, np.uint32)
        for i in range(4):
            selector = (c >> np.uint32(4 * i)) & np.uint32(15)
            byte = (
                both >> ((selector & np.uint32(7)).astype(np.uint64) * np.uint64(8))
            ) & np.uint64(0xFF)
            byte = byte.astype(np.uint32)
            sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
            total |= np.where(selector & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return total

    return elementwise(asm, st, permute, "b32", ["b32"] * 3)


@instruction("popc", "clz", "brev", "bfind")
def _bit_counts(asm, st):
    name, kind = st.parts[0], st.parts[-1]
    width = _bits(kind)
    unsigned = _UNSIGNED[width]

    def lengths(x):
        high = np.zeros(np.shape(x), np.uint32)
        rest = x.astype(unsigned).copy()
        for step in (32, 16, 8, 4, 2, 1):
            if step < width:
                big = rest >> unsigned(step) != 0
                high += np.where(big, np.uint32(step), np.uint32(0))
                rest = np.where(big, rest >> unsigned(step), rest)
        return np.where(x == 0, np.uint32(0), high + np.uint32(1))

    if name == "popc":
        return elementwise(asm, st, np.bitwise_count, "u32", [kind])
    if name == "clz":
        return elementwise(asm, st, lambda x: np.uint32(width) - lengths(x), "u32", [kind])
    if name == "brev":

        def reverse(x):
            data = np.ascontiguousarray(x).view(np.uint8).reshape(-1, width // 8)
            bits = np.unpackbits(data, axis=1, bitorder="little")[:, ::-1]
            return np.packbits(bits, axis=1, bitorder="little").reshape(-1).view(unsigned)

        return elementwise(asm, st, reverse, kind, [kind])
    shift_amount = "shiftamt" in st.parts

    def find(x):
        y = x.view(unsigned)
        if kind[0] == "s":
            y = np.where(x < 0, ~y, y)
        n = lengths(y)
        index = n - np.uint32(1)
        if shift_amount:
            index = np.uint32(width - 1) - index
        return np.where(n == 0, np.uint32(0xFFFFFFFF), index)

    return elementwise(asm, st, find, "u32", [kind])


@instruction("bfe")
def _bfe(asm, st):
    kind = st.parts[-1]
    width = _bits(kind)

    def extract(a, b, c):
        position = (b & np.uint32(0xFF)).astype(np.int64)
        length = (c & np.uint32(0xFF)).astype(np.int64)
        out = []
        for x, p, n in zip(
            *(np.atleast_1d(y).tolist() for y in np.broadcast_arrays(a, position, length)),
            strict=True,
        ):
            x &= (1 << width) - 1
            sign = 0
            if kind[0] == "s" and n:
                sign = x >> min(p + n - 1, width - 1) & 1
            field = x >> p & ((1 << n) - 1) if p < width else 0
            have = max(0, min(n, width - p))
            if sign:
                field |= ((1 << width) - 1) & ~((1 << have) - 1)
            out.append(field & ((1 << width) - 1))
        return np.array(out, _UNSIGNED[width]).view(R.DTYPE[kind])

    return elementwise(asm, st, extract, kind, [kind, "u32", "u32"])


@instruction("bfi")
def _bfi(asm, st):
    kind = st.parts[-1]
    width = _bits(kind)
    dtype = _UNSIGNED[width]

    def insert(a, b, c, d):
        position = np.minimum(c & np.uint32(0xFF), width).astype(object)
        length = np.minimum(d & np.uint32(0xFF), width).astype(object)
        mask = np.array(
            [
                (((1 << n) - 1) << p) & ((1 << width) - 1)
                for p, n in zip(position, length, strict=True)
            ],
            dtype,
        )
        shifted = np.array(
            [(int(x) << p) & ((1 << width) - 1) for x, p in zip(a, position, strict=True)], dtype
        )
        return (b & ~mask) | (shifted & mask)

    return elementwise(asm, st, insert, kind, [kind, kind, "u32", "u32"])


@instruction("bmsk")
def _bmsk(asm, st):
    """bmsk: ``b`` one bits from bit ``a``."""
    clamp = st.parts[1] == "clamp"

    def mask(a, b):
        p, n = a.astype(np.uint64), b.astype(np.uint64)
        if clamp:
            p, n = np.minimum(p, np.uint64(32)), np.minimum(n, np.uint64(32))
        else:
            p, n = p & np.uint64(31), n & np.uint64(31)
        return ((((np.uint64(1) << n) - np.uint64(1)) << p) & np.uint64(0xFFFFFFFF)).astype(
            np.uint32
        )

    return elementwise(asm, st, mask, "b32", ["u32", "u32"])


@instruction("szext")
def _szext(asm, st):
    kind = st.parts[-1]
    clamp = st.parts[1] == "clamp"

    def extend(a, n):
        n = np.minimum(n, np.uint32(32)) if clamp else n & np.uint32(31)
        shift = (np.uint32(32) - n).astype(np.int64)
        wide = a.astype(np.int64) & 0xFFFFFFFF
        if kind[0] == "s":
            y = (wide << (shift + 32)) >> (shift + 32)
        else:
            y = wide & ((np.int64(1) << n.astype(np.int64)) - 1)
        return np.where(n == 0, 0, y)

    return elementwise(asm, st, extend, kind, [kind, "u32"])


@instruction("sad")
def _sad(asm, st):
    kind = st.parts[-1]
    return elementwise(asm, st, lambda a, b, c: c + np.where(a < b, b - a, a - b), kind, [kind] * 3)


# ---- comparison and selection

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
_UNORDERED = {"equ": np.equal, "neu": np.not_equal, "ltu": np.less, "leu": np.less_equal,
              "gtu": np.greater, "geu": np.greater_equal}  # fmt: skip


def comparison(name: str, floating: bool):
    """The function of a comparison; unordered ones are true when an operand is NaN."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in _UNORDERED:
        ufunc = _UNORDERED[name]
        return lambda a, b: ufunc(a, b) | np.isnan(a) | np.isnan(b)
    ufunc = _COMPARE[name]
    if name == "ne" and floating:  # ordered: false on NaN, unlike numpy's
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return ufunc


@instruction("setp")
def _setp(asm, st):
    parts = st.parts
    kind = parts[-1]
    half = _half_kind(kind)
    floating = kind[0] == "f" or half is not None
    test = comparison(parts[1], floating)
    combine = parts[2] if parts[2] in ("and", "or", "xor") else None
    ftz = "ftz" in parts
    (va, a), (vb, b) = (asm.source(x, kind) for x in st.operands[1:3])
    names = [x.strip() for x in st.operands[0].split("|")]
    if half and half[1]:
        if len(names) != 2:
            raise FormError("packed comparison without two predicates")
    outs = [asm.destination(x, "pred") for x in names]
    third, negate = None, False
    if combine:
        text = st.operands[3]
        negate = text.startswith("!")
        third = asm.source(text.lstrip("!"), "pred")
    logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(combine)
    if not combine and len(outs) == 1 and outs[0] and not half and not ftz:
        d = outs[0][1]

        def run(v, m):
            if m is None:
                v[R.P][d][...] = test(v[va][a], v[vb][b])
            else:
                np.copyto(v[R.P][d], test(v[va][a], v[vb][b]), where=m)

        return run
    widen = None
    if half:
        dtype = np.float16 if half[0] == "f16" else BF16
        widen = lambda x: np.ascontiguousarray(x).view(dtype).astype(np.float32)  # noqa: E731

    def run(v, m):
        x, y = v[va][a], v[vb][b]
        if widen:
            x, y = widen(x), widen(y)
        elif ftz:
            x, y = flush(x), flush(y)
        result = test(x, y)
        if half and half[1]:
            pair = result.reshape(-1, 2)
            results = [pair[:, 0], pair[:, 1]]
        else:
            results = [result, ~result]
        for out, value in zip(outs, results, strict=False):
            if logic is not None:
                c = v[R.P][third[1]]
                value = logic(value, ~c if negate else c)
            if out:
                put(v[R.P][out[1]], value, m)

    return run


@instruction("set")
def _set(asm, st):
    kind, out = st.parts[-1], st.parts[-2]
    test = comparison(st.parts[1], kind[0] == "f")
    if out in ("u32", "s32"):
        return elementwise(
            asm, st, lambda a, b: np.where(test(a, b), np.uint32(0xFFFFFFFF), np.uint32(0)),
            "u32", [kind] * 2,
        )  # fmt: skip
    if out == "f32":
        return elementwise(asm, st, lambda a, b: test(a, b).astype(np.float32), out, [kind] * 2)
    raise FormError("set of this type")


@instruction("selp")
def _selp(asm, st):
    kind = st.parts[-1]
    return elementwise(
        asm, st, lambda a, b, p: np.where(p, a, b), kind, [kind, kind, "pred"]
    )  # fmt: skip


@instruction("slct")
def _slct(asm, st):
    kind, test = st.parts[-2], st.parts[-1]
    return elementwise(asm, st, lambda a, b, c: np.where(c >= 0, a, b), kind, [kind, kind, test])


# ---- moves and conversions


@instruction("mov")
def _mov(asm, st):
    kind = st.parts[-1]
    into, value = st.operands
    if kind == "b128":
        raise FormError("128-bit moves")
    if into.startswith("{"):
        parts = split_operands(into[1:-1])
        source = asm.source(value, kind)
        width = _bits(kind) // len(parts)
        outs = [asm.destination(p, f"b{width}") for p in parts]
        dtype = _UNSIGNED[width]

        def unpack(v, m):
            pieces = (
                np.ascontiguousarray(v[source[0]][source[1]]).view(dtype).reshape(-1, len(outs))
            )
            for i, out in enumerate(outs):
                if out:
                    put(v[out[0]][out[1]], pieces[:, i], m)

        return unpack
    if value.startswith("{"):
        parts = split_operands(value[1:-1])
        width = _bits(kind) // len(parts)
        sources = [asm.source(p, f"b{width}") for p in parts]
        vd, d = asm.destination(into, kind)
        dtype, wide = _UNSIGNED[width], R.DTYPE[kind]

        def pack(v, m):
            first = v[vd][d]
            pieces = np.empty((len(first), len(sources)), dtype)
            for i, (view, row) in enumerate(sources):
                pieces[:, i] = v[view][row]
            put(first, pieces.view(wide)[:, 0], m)

        return pack
    return elementwise(asm, st, lambda x: x, kind, [kind])


@instruction("cvta")
def _cvta(asm, st):
    """cvta.space generic, address; cvta.to.space address, generic."""
    from . import program

    kind = st.parts[-1]
    space = st.parts[2] if st.parts[1] == "to" else st.parts[1]
    space = space.split("::")[0]
    window = {
        "global": 0, "const": 0, "param": 0,
        "shared": program.SHARED_WINDOW, "local": program.LOCAL_WINDOW,
    }[space]  # fmt: skip
    if kind == "u32":
        window = 0
    text = st.operands[1]
    if asm.statement.register(text) is None:
        value = asm.symbol(text) if not text[0].isdigit() else integer(text)
        asm.constant_row("d", value, value)
    if st.parts[1] == "to":
        return elementwise(asm, st, lambda x: x - x.dtype.type(window), kind, [kind])
    return elementwise(asm, st, lambda x: x + x.dtype.type(window), kind, [kind])


@instruction("isspacep")
def _isspacep(asm, st):
    from . import program

    space = st.parts[1].split("::")[0]
    low, high = {
        "shared": (program.SHARED_WINDOW, program.LOCAL_WINDOW),
        "local": (program.LOCAL_WINDOW, program.PARAMETER_WINDOW),
        "global": (0, program.CONSTANT_WINDOW),
        "const": (program.CONSTANT_WINDOW, program.SHARED_WINDOW),
    }[space]
    return elementwise(
        asm, st, lambda x: (x >= np.uint64(low)) & (x < np.uint64(high)), "pred", ["u64"]
    )


def to_float(x, name: str, mode: str | None, parts=()):
    """Round float64 or float32 values to a float type named in PTX; returns its raw bits."""
    dtype = _FLOATS[name]
    if name in ("e4m3", "e5m2"):
        y = x.astype(np.float32)
        if "relu" in parts:
            y = _relu(y)
        if "satfinite" in parts:
            largest = np.float32(ml_dtypes.finfo(dtype).max)
            y = np.where(np.isnan(y), y, np.clip(y, -largest, largest))
        bits = y.astype(dtype).view(np.uint8)
        return np.where(np.isnan(y), np.uint8(0x7F), bits)
    if name == "tf32":
        bits = x.astype(np.float32).view(np.uint32)
        if mode == "rna":
            return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        if mode == "rz":
            return bits & np.uint32(0xFFFFE000)
        return (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(
            0xFFFFE000
        )
    if "relu" in parts:
        x = _relu(x)
    if mode in ("rz", "rm", "rp") and name in ("f16", "bf16"):
        y = x.astype(dtype)
        wide = y.astype(np.float64)
        exact = x.astype(np.float64)
        big = (wide > exact) & ((mode == "rm") | ((mode == "rz") & (exact > 0)))
        small = (wide < exact) & ((mode == "rp") | ((mode == "rz") & (exact < 0)))
        bits = y.view(np.int16).copy()
        # Away from or toward zero by one ulp, in sign-magnitude bits.
        step = np.where(big, np.where(bits < 0, 1, -1), 0) + np.where(
            small, np.where(bits < 0, -1, 1), 0
        )
        crosses = big & (bits == 0)
        bits = np.where(crosses, np.int16(-32767), bits + step.astype(np.int16))
        y = bits.view(dtype)
    elif mode in ("rz", "rm", "rp") and name == "f32":
        y = _directed(x.astype(np.float64), mode)
    else:
        y = x.astype(dtype)
    if "sat" in parts:
        y = _saturate(y.astype(np.float32)).astype(dtype)
    if "satfinite" in parts:
        largest = np.float32(ml_dtypes.finfo(dtype).max)
        y = np.clip(x, -largest, largest).astype(dtype)
    raw = y.view(_UNSIGNED[8 * dtype.itemsize])
    nan = np.isnan(y.astype(np.float32)) if name != "f64" else np.isnan(y)
    if name in _NAN_BITS and nan.any():
        raw = np.where(nan, raw.dtype.type(_NAN_BITS[name]), raw)
    return raw


_PACKED = {
    "f16x2": ("f16", 16), "bf16x2": ("bf16", 16), "e4m3x2": ("e4m3", 8), "e5m2x2": ("e5m2", 8),
}  # fmt: skip


@instruction("cvt")
def _cvt(asm, st):
    parts = st.parts
    into, source = parts[-2], parts[-1]
    if parts[1] == "pack":
        raise FormError("cvt.pack")
    if into in _PACKED and source == "f32":
        # d = {a, b}: a goes to the upper half.
        name, width = _PACKED[into]
        mode = _rounding(parts)
        if len(st.operands) != 3 or mode == "rs":
            raise FormError("packed conversion of this form")
        high, low = (asm.source(x, "f32") for x in st.operands[1:])
        vd, d = asm.destination(st.operands[0], "b32" if width == 16 else "b16")
        if name == "bf16" and mode == "rn" and not {"relu", "satfinite"} & set(parts):
            return _pack_bf16(high, low, vd, d)
        dtype = np.uint32 if width == 16 else np.uint16

        def pack(v, m):
            a = to_float(v[R.F32][high[1]], name, mode, parts).astype(dtype)
            b = to_float(v[R.F32][low[1]], name, mode, parts).astype(dtype)
            put(v[vd][d], (a << dtype(width)) | b, m)

        return pack
    if source in _PACKED and into == "f16x2":
        dtype = _FLOATS[_PACKED[source][0]]
        relu = "relu" in parts

        def widen(x):
            y = np.ascontiguousarray(x).view(dtype).astype(np.float16)
            return np.ascontiguousarray(_relu(y) if relu else y).view(np.uint32)

        return elementwise(asm, st, widen, "b32", ["b16"])
    if into in _PACKED and source in ("f16x2", "bf16x2"):
        name = _PACKED[into][0]
        wide = _FLOATS[_PACKED[source][0]]
        return elementwise(
            asm, st,
            lambda x: np.ascontiguousarray(
                to_float(np.ascontiguousarray(x).view(wide).astype(np.float32), name, "rn", parts)
            ).view(np.uint16),
            "b16", ["b32"],
        )  # fmt: skip
    if into in _PACKED or source in _PACKED:
        raise FormError("packed conversion of this form")
    return _scalar_cvt(asm, st, into, source)


def _pack_bf16(high, low, vd, d):
    def rounded(x):
        bits = x.view(np.uint32)
        y = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        nan = x != x
        if nan.any():
            y = np.where(nan, np.uint32(0x7FFF), y)
        return y

    def pack(v, m):
        value = (rounded(v[R.F32][high[1]]) << np.uint32(16)) | rounded(v[R.F32][low[1]])
        put(v[vd][d], value, m)

    return pack


def _loader(asm, text, kind):
    """Read a register as a PTX type that may be narrower than it; ``load(frame) -> array``."""
    if asm.statement.register(text) is None:
        view, row = asm.source(text, kind)
        return lambda v: v[view][row]
    view, row = asm.register_row(text, read=True)
    if kind in _FLOATS:
        width = 8 * _FLOATS[kind].itemsize
        dtype = _FLOATS[kind]
    else:
        width = _bits(kind)
        dtype = (_SIGNED if kind[0] == "s" else _UNSIGNED)[width]
    raw = _UNSIGNED[width]
    if {R.U16: 16, R.U32: 32, R.U64: 64}[view] == width:
        return lambda v: v[view][row].view(dtype)
    return lambda v: v[view][row].astype(raw).view(dtype)


def _storer(asm, text, kind):
    """Write a value of a PTX type to a register that may be wider (sign- or zero-extended)."""
    if text == "_":
        return lambda v, x, m: None
    view, row = asm.register_row(text, write=True)
    width = {R.U16: 16, R.U32: 32, R.U64: 64}[view]
    dtype = (_SIGNED if kind[0] == "s" else _UNSIGNED)[width]
    unsigned = _UNSIGNED[width]

    def store(v, x, m):
        put(v[view][row], x.astype(dtype).view(unsigned), m)

    return store


def _scalar_cvt(asm, st, into, source):
    parts = st.parts
    load = _loader(asm, st.operands[1], source)
    store = _storer(asm, st.operands[0], into if into not in _FLOATS else "u")
    from_float, to_is_float = source in _FLOATS, into in _FLOATS
    mode = _rounding(parts)
    to_integer = next((p for p in parts if p in ("rni", "rzi", "rmi", "rpi")), None)
    integer_rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    ftz = "ftz" in parts
    if from_float and to_is_float:

        def convert(x):
            if ftz and source == "f32":
                x = flush(x)
            y = x.astype(np.float64) if source == "f64" else x.astype(np.float32)
            if to_integer:
                y = integer_rounding[to_integer](y)
            bits = to_float(y, into, mode, parts)
            if ftz and into == "f32":
                bits = flush(bits.view(np.float32)).view(np.uint32)
            return bits

    elif to_is_float:

        def convert(x):
            if into == "f32" and mode in ("rz", "rm", "rp"):
                return _directed(x.astype(np.longdouble), mode).view(np.uint32)
            if into == "f32":
                return to_float(x.astype(np.float32), into, None, parts)
            if into == "f64":
                return x.astype(np.float64).view(np.uint64)
            return to_float(x.astype(np.float64), into, mode, parts)

    elif from_float:
        # PTX: out-of-range values clamp to the range of the destination; NaN becomes 0 for
        # integers narrower than 64 bits and 2^63 for 64-bit ones.
        bits, signed = _bits(into), into[0] == "s"
        low = -(1 << bits - 1) if signed else 0
        high = (1 << bits - 1) - 1 if signed else (1 << bits) - 1
        dtype = (_SIGNED if signed else _UNSIGNED)[bits]

        def convert(x):
            if ftz and source == "f32":
                x = flush(x)
            wide = integer_rounding[to_integer or "rzi"](x.astype(np.longdouble))
            nan = np.isnan(wide)
            clamped = np.clip(np.where(nan, 0, wide), low, high)
            out = clamped.astype(dtype)
            if bits == 64:
                out = np.where(nan, np.uint64(1 << 63).astype(np.uint64).view(dtype), out)
            return out

    else:
        bits, signed = _bits(into), into[0] == "s"
        dtype = (_SIGNED if signed else _UNSIGNED)[bits]
        if "sat" in parts:
            low = -(1 << bits - 1) if signed else 0
            high = (1 << bits - 1) - 1 if signed else (1 << bits) - 1
            source_info = np.iinfo((_SIGNED if source[0] == "s" else _UNSIGNED)[_bits(source)])
            low, high = max(low, int(source_info.min)), min(high, int(source_info.max))

            def convert(x):
                return np.clip(x, low, high).astype(dtype)

        else:

            def convert(x):
                return x.astype(dtype)

    def run(v, m):
        store(v, convert(load(v)), m)

    return run
