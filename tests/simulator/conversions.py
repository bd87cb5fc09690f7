"""Conversions between number types: PTX ISA, "Data Movement and Conversion Instructions: cvt"."""

import numpy as np

from . import registers as R
from .elementwise import elementwise
from .number_types import (
    FLOATS,
    UNSIGNED,
    dtype_of,
    elements,
    is_float,
    joined,
    raw_dtype,
    to_single,
)
from .program import FormError, instruction, put
from .rounding import directed_mode, flush, to_float

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def _cvt(asm, st):
    into, source = st.parts[-2:]
    (element, count), (source_element, source_count) = elements(into), elements(source)
    if st.parts[1] == "pack" or "rs" in st.parts:
        raise FormError("conversion of this form")
    if count == source_count == 1:
        return _scalar(asm, st, into, source)
    if count == 2 and {element, source_element} <= FLOATS.keys():
        if source_count == 2:
            return _repack(asm, st, element, FLOATS[source_element])
        if source == "f32":
            return _pack(asm, st, element)
    raise FormError("packed conversion of this form")


# ---- pairs


def _pack(asm, st, element):
    """d = {a, b}: a goes to the upper half."""
    raw = raw_dtype(FLOATS[element])
    bits = 16 * FLOATS[element].itemsize
    (_, high), (_, low) = (asm.source(x, "f32") for x in st.operands[1:])
    vd, d = asm.destination(st.operands[0], f"b{bits}")

    def pack(v, m):
        halves = [to_float(v[R.F32][row], element, st.parts) for row in (low, high)]
        put(v[vd][d], joined(halves, raw, UNSIGNED[bits]), m)

    return pack


def _repack(asm, st, element, source):
    bits = 16 * FLOATS[element].itemsize

    def convert(x):
        return to_float(to_single(x, source), element, st.parts).view(UNSIGNED[bits])

    return elementwise(asm, st, convert, f"b{bits}", [f"b{16 * source.itemsize}"])


# ---- single numbers


def _scalar(asm, st, into, source):
    load = _loader(asm, st.operands[1], source)
    if is_float(into):
        convert = (_between_floats if is_float(source) else _from_integer)(into, source, st.parts)
    else:
        convert = (_to_integer if is_float(source) else _between_integers)(into, source, st.parts)
    if st.operands[0] == "_":
        return lambda v, m: None
    view, row = asm.register_row(st.operands[0], write=True)
    signed = into[0] == "s"

    def run(v, m):
        put(v[view][row], R.extended(convert(load(v)), view, signed=signed), m)

    return run


def _loader(asm, text, kind):
    """Read a register as a PTX type that may be narrower than it; ``load(frame) -> array``."""
    if asm.statement.register(text) is None:
        view, row = asm.source(text, kind)
        return lambda v: v[view][row]
    view, row = asm.register_row(text, read=True)
    dtype = dtype_of(kind)
    raw = raw_dtype(dtype)
    return lambda v: v[view][row].astype(raw, copy=False).view(dtype)


def _flushed(source, parts):
    """What ``.ftz`` makes of operands, single-precision ones alone."""
    return flush if "ftz" in parts and source == "f32" else lambda x: x


def _between_floats(into, source, parts):
    wide = np.float64 if source == "f64" else np.float32
    to_integer = next((_TO_INTEGER[p] for p in parts if p in _TO_INTEGER), None)
    flushed = _flushed(source, parts)

    def convert(x):
        y = flushed(x).astype(wide)
        if to_integer:
            y = to_integer(y)
        bits = to_float(y, into, parts)
        if "ftz" in parts and into == "f32":
            bits = flush(bits.view(np.float32)).view(np.uint32)
        return bits

    return convert


def _from_integer(into, source, parts):
    if directed_mode(parts):
        exact = np.longdouble
    else:
        exact = np.float32 if into == "f32" else np.float64
    return lambda x: to_float(x.astype(exact), into, parts)


def _to_integer(into, source, parts):
    """PTX: what is out of range is clamped; NaN becomes 0, for 64-bit integers 2^63."""
    dtype = dtype_of(into)
    limits = np.iinfo(dtype)
    rounding = next((_TO_INTEGER[p] for p in parts if p in _TO_INTEGER), np.trunc)
    flushed = _flushed(source, parts)

    def convert(x):
        wide = rounding(flushed(x).astype(np.longdouble))
        nan = np.isnan(wide)
        y = np.clip(np.where(nan, 0, wide), limits.min, limits.max).astype(dtype)
        if limits.bits == 64:
            y = np.where(nan, np.uint64(1 << 63).view(dtype), y)
        return y

    return convert


def _between_integers(into, source, parts):
    dtype = dtype_of(into)
    if "sat" not in parts:
        return lambda x: x.astype(dtype)
    limits, given = np.iinfo(dtype), np.iinfo(dtype_of(source))
    low, high = max(limits.min, given.min), min(limits.max, given.max)
    return lambda x: np.clip(x, low, high).astype(dtype)
