"""Rounding, and what opcodes add to it: ``.ftz``, ``.sat``, ``.satfinite``, ``.relu``."""

import ml_dtypes
import numpy as np

from .number_types import FLOATS, raw_dtype

_DIRECTED = {"rz", "rm", "rp"}
_NAN_BITS = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "e4m3": 0x7F, "e5m2": 0x7F}


def directed_mode(parts) -> str | None:
    """The rounding of an opcode toward zero, minus or plus infinity; None is to nearest."""
    return next(iter(_DIRECTED.intersection(parts)), None)


def flush(x):
    """Subnormal single-precision values become zero of the same sign (``.ftz``)."""
    small = np.abs(x) < np.float32(1.1754943508222875e-38)
    if small.any():
        return np.where(small, np.copysign(np.float32(0), x), x)
    return x


def saturate(x):
    """``.sat``: clamp to [0, 1], NaN becomes +0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


def relu(x):
    """``.relu``: negative becomes 0, NaN stays."""
    return np.where(x < 0, x.dtype.type(0), x)


def round_to_odd(a, b):
    """The sum of doubles, so rounded that to round it again to fewer bits is to round once."""
    total = a + b
    bb = total - a
    error = (a - (total - bb)) + (b - bb)
    bits = total.view(np.int64).copy()
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    toward_zero = np.where(total > 0, error < 0, error > 0)
    bits = np.where(inexact, np.where(toward_zero, bits - 1, bits + 1), bits)
    return bits.view(np.float64)


def fma_to_odd(a, b, c):
    """a * b + c of singles as a double rounded to odd; their product is exact in double."""
    return round_to_odd(a.astype(np.float64) * b, c.astype(np.float64))


def fma32(a, b, c):
    """Single-precision fused multiply-add, rounded once to nearest even."""
    total = a.astype(np.float64) * b + c
    # The product is exact in double; the sum may round.  A result that then sits half-way between
    # two singles (or is subnormal) was perhaps rounded twice: redo it with round to odd.
    bits = total.view(np.uint64)
    risky = (bits & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    tiny = np.abs(total) < 1.2e-38
    if risky.any() or tiny.any():
        total = fma_to_odd(a, b, c)
    return total.astype(np.float32)


def _single_to_odd(exact):
    """The single next to a double, of two the one with an odd last bit."""
    x = exact.astype(np.float32)
    toward = np.where(x > exact, np.float32(-np.inf), np.float32(np.inf))
    even = x.view(np.uint32) & np.uint32(1) == 0
    return np.where((x != exact) & even, np.nextafter(x, toward), x)


def rounded(exact, dtype, mode: str | None = None):
    """``exact`` in a narrower type: the nearest value, or that in the direction of ``mode``."""
    if dtype == FLOATS["bf16"] and exact.itemsize > 4:
        exact = _single_to_odd(exact)  # astype would round to a single and then again
    y = exact.astype(dtype)
    if mode is None:
        return y
    wide = y.astype(exact.dtype)
    if mode == "rm" or mode == "rz":
        down = (wide > exact) if mode == "rm" else (wide > exact) & (exact > 0)
        y = np.where(down, np.nextafter(y, y.dtype.type(-np.inf)), y)
    if mode == "rp" or mode == "rz":
        up = (wide < exact) if mode == "rp" else (wide < exact) & (exact < 0)
        y = np.where(up, np.nextafter(y, y.dtype.type(np.inf)), y)
    return y


def to_float(x, name: str, parts=()):
    """Round to a float type named in PTX, as the opcode's ``parts`` say; returns its raw bits."""
    dtype = FLOATS[name]
    if name == "tf32":
        return _to_tf32(x.astype(np.float32).view(np.uint32), parts)
    if "relu" in parts:
        x = relu(x)
    if "sat" in parts:
        x = saturate(x)
    if "satfinite" in parts:
        largest = np.float32(ml_dtypes.finfo(dtype).max)
        x = np.clip(x, -largest, largest)
    raw = rounded(x, dtype, directed_mode(parts)).view(raw_dtype(dtype))
    if name in _NAN_BITS:
        nan = np.isnan(x)
        if nan.any():
            raw = np.where(nan, raw.dtype.type(_NAN_BITS[name]), raw)
    return raw


def _to_tf32(bits, parts):
    """Singles without their low 13 bits."""
    if "rna" in parts:
        bits = bits + np.uint32(0x1000)
    elif "rz" not in parts:
        bits = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return bits & np.uint32(0xFFFFE000)
