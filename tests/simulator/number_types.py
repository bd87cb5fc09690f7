"""PTX's number types as numpy's, and registers that hold several numbers."""

import ml_dtypes
import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64),
    "bf16": np.dtype(ml_dtypes.bfloat16), "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2), "tf32": np.dtype(np.float32),
}  # fmt: skip


def elements(kind: str) -> tuple[str, int]:
    """(type of an element, how many of them) of a type: ``bf16x2`` is two ``bf16``."""
    element, _, count = kind.partition("x")
    return element, int(count or 1)


def is_float(kind: str) -> bool:
    return elements(kind)[0] in FLOATS


def is_integer(kind: str) -> bool:
    return not is_float(kind)


def width_of(kind: str) -> int:
    """Bits of a type that is named for them."""
    return int(kind.lstrip("bfus"))


def dtype_of(kind: str) -> np.dtype:
    """The numpy type of a type's elements; ``b32`` and its like are unsigned."""
    element, _ = elements(kind)
    if element in FLOATS:
        return FLOATS[element]
    return np.dtype((SIGNED if element[0] == "s" else UNSIGNED)[width_of(element)])


def raw_dtype(dtype: np.dtype) -> type[np.unsignedinteger]:
    """The unsigned type as wide as ``dtype``."""
    return UNSIGNED[8 * dtype.itemsize]


def to_single(values, dtype: np.dtype) -> np.ndarray:
    """Values of ``dtype``, or registers that hold some, as float32."""
    return values.view(dtype).astype(np.float32)


def split(values, dtype) -> np.ndarray:
    """Registers as rows of their pieces, the least significant first."""
    return values.view(dtype).reshape(len(values), -1)


def joined(pieces, piece_dtype, dtype) -> np.ndarray:
    """Registers of these pieces, the least significant first."""
    rows = np.empty((len(pieces[0]), len(pieces)), piece_dtype)
    for i, piece in enumerate(pieces):
        rows[:, i] = piece
    return rows.view(dtype)[:, 0]
