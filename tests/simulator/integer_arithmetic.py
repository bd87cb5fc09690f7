"""Integer arithmetic: PTX ISA, "Integer Arithmetic Instructions" and "Extended-Precision"."""

import numpy as np

from . import registers as R
from .elementwise import elementwise
from .number_types import dtype_of, elements, is_integer, width_of
from .program import FormError, instruction, put


def _on_pairs(ufunc, kind):
    """Lift a function to ``.u16x2`` and ``.s16x2``."""
    dtype = dtype_of(kind)
    return lambda a, b: ufunc(a.view(dtype), b.view(dtype)).view(np.uint32)


@instruction("add", "sub", types=is_integer)
def _sum(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    if "cc" in parts:
        return _carry(asm, st)
    ufunc = np.add if name == "add" else np.subtract
    if elements(kind)[1] == 2:
        return elementwise(asm, st, _on_pairs(ufunc, kind), kind, [kind] * 2)
    if "sat" in parts:
        limits = np.iinfo(np.int32)

        def saturated(a, b):
            return np.clip(ufunc(a.astype(np.int64), b), limits.min, limits.max)

        return elementwise(asm, st, saturated, kind, [kind] * 2)
    return elementwise(asm, st, ufunc, kind, [kind] * 2, ufunc=True)


@instruction("mul", "mad", types=is_integer)
def _product(asm, st):
    """The low or the high half of a product, or both halves; mad adds to it."""
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    if "cc" in parts:
        return _carry(asm, st)
    if parts[1] == "lo":
        product, out = np.multiply, kind
    elif parts[1] == "wide":
        out = f"{kind[0]}{2 * width_of(kind)}"
        product = _wide(dtype_of(out))
    elif parts[1] == "hi":
        product, out = _high(kind), kind
    else:
        raise FormError("unknown multiplication")
    if name == "mul":
        return elementwise(asm, st, product, out, [kind] * 2, ufunc=product is np.multiply)
    return elementwise(asm, st, lambda a, b, c: product(a, b) + c, out, [kind, kind, out])


def _wide(dtype):
    return lambda a, b: a.astype(dtype) * b.astype(dtype)


def _high(kind):
    width, dtype = width_of(kind), dtype_of(kind)
    if width < 64:
        wide = dtype_of(f"{kind[0]}{2 * width}")
        product = _wide(wide)
        return lambda a, b: (product(a, b) >> wide.type(width)).astype(dtype)

    def high64(a, b):
        product = (a.astype(object) * b.astype(object)) >> 64
        return np.array([int(p) & (2**64 - 1) for p in product], np.uint64).view(dtype)

    return high64


@instruction("mad24", "mul24")
def _mul24(asm, st):
    raise FormError("24-bit multiplication")


# The carry flag is a hidden row, one per thread.
@instruction("addc", "subc", "madc")
def _carry(asm, st):
    name, parts, kind = st.parts[0], st.parts, st.parts[-1]
    multiplies = name.startswith("mad")
    if width_of(kind) != 32 or (multiplies and kind != "u32"):
        raise FormError("carry chain of this form")
    flag = asm.constant_row("p", "carry flag", lambda block: False)
    sources = [asm.source(x, "u32") for x in st.operands[1:]]
    out = asm.destination(st.operands[0], "u32")
    use, sets, subtract = name.endswith("c"), "cc" in parts, name.startswith("sub")
    product = np.multiply if "lo" in parts else _high("u32")

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


@instruction("div", "rem", types=is_integer)
def _divide(asm, st):
    name, kind = st.parts[0], st.parts[-1]
    signed, dtype = kind[0] == "s", dtype_of(kind).type

    def divide(a, b):
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

    return elementwise(asm, st, divide, kind, [kind] * 2)


@instruction("neg", "abs", types=is_integer)
def _sign(asm, st):
    kind = st.parts[-1]
    return elementwise(asm, st, np.negative if st.parts[0] == "neg" else np.abs, kind, [kind])


@instruction("min", "max", types=is_integer)
def _extremum(asm, st):
    parts, kind = st.parts, st.parts[-1]
    ufunc = np.maximum if parts[0] == "max" else np.minimum
    if elements(kind)[1] == 2:
        return elementwise(asm, st, _on_pairs(ufunc, kind), kind, [kind] * 2)
    if "relu" in parts:
        return elementwise(
            asm, st, lambda a, b: np.maximum(ufunc(a, b), a.dtype.type(0)), kind, [kind] * 2
        )
    if len(st.operands) == 4:
        return elementwise(asm, st, lambda a, b, c: ufunc(ufunc(a, b), c), kind, [kind] * 3)
    return elementwise(asm, st, ufunc, kind, [kind] * 2, ufunc=True)


@instruction("sad")
def _sad(asm, st):
    kind = st.parts[-1]
    return elementwise(asm, st, lambda a, b, c: c + np.where(a < b, b - a, a - b), kind, [kind] * 3)
