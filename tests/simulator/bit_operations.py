"""Logic, shifts, and counts and fields of bits: PTX ISA, "Logic and Shift Instructions"."""

import numpy as np

from . import registers as R
from .elementwise import elementwise
from .number_types import UNSIGNED, width_of
from .program import FormError, instruction, integer, put

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
    bits = width_of(kind)
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


# ---- counts and fields


@instruction("popc", "clz", "brev", "bfind")
def _bit_counts(asm, st):
    name, kind = st.parts[0], st.parts[-1]
    width = width_of(kind)
    unsigned = UNSIGNED[width]

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
    width = width_of(kind)

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
        return np.array(out, UNSIGNED[width]).view(R.DTYPE[kind])

    return elementwise(asm, st, extract, kind, [kind, "u32", "u32"])


@instruction("bfi")
def _bfi(asm, st):
    kind = st.parts[-1]
    width = width_of(kind)
    dtype = UNSIGNED[width]

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
