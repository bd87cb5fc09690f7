"""Decode the 128-byte tensor maps that a launcher encodes inline.

The layout is not documented.  The fields below were found by encoding maps of known shapes, types
and swizzles and comparing words; anything not understood is refused, not guessed.

    bytes 0-7    global address
    word 2       bits 4-6 rank - 1, bits 7-10 element type, bits 11-12 interleave, 13-14 swizzle
    words 3-6    byte strides of dimensions 1 to 4, divided by 16 (low 32 bits)
    word 7       their high 4 bits, a nibble each
    words 8-12   extents - 1
    bytes 55-59  box extents - 1
"""

import struct
from dataclasses import dataclass

import ml_dtypes
import numpy as np

_DTYPES = {
    0: np.uint8,
    1: np.uint16,
    2: np.uint32,
    3: np.int32,
    4: np.uint64,
    5: np.int64,
    6: np.float16,
    7: np.float32,
    10: ml_dtypes.bfloat16,
}
SWIZZLE_BYTES = (0, 32, 64, 128)


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map.

    Attributes:
      address: of element (0, ..., 0).
      dtype: element type, as reductions see it.
      extents: elements in each dimension, fastest first.
      strides: bytes; ``strides[0]`` is the element size.
      box: elements in each dimension of the box.
      swizzle: 0, 32, 64 or 128 bytes.
    """

    address: int
    dtype: np.dtype
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @property
    def box_bytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.box:
            size *= extent
        return size


def encode(
    address: int,
    dtype,
    extents: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = 0,
) -> bytes:
    """The inverse of :func:`decode`, for tests; ``strides`` leaves out the innermost."""
    kind = next(k for k, v in _DTYPES.items() if np.dtype(v) == np.dtype(dtype))
    words = [0] * 32
    words[0], words[1] = address & 0xFFFFFFFF, address >> 32
    words[2] = (
        2 | (len(extents) - 1) << 4 | kind << 7 | SWIZZLE_BYTES.index(swizzle) << 13
    )  # fmt: skip
    for i, stride in enumerate(strides):
        words[3 + i] = stride // 16 & 0xFFFFFFFF
        words[7] |= (stride // 16 >> 32) << (4 * i)
    for i, extent in enumerate(extents):
        words[8 + i] = extent - 1
    raw = bytearray(struct.pack("<32I", *words))
    for i, extent in enumerate(box):
        raw[55 + i] = extent - 1
    return bytes(raw)


def decode(raw: bytes) -> TensorMap:
    """Decode 128 bytes; raises NotImplementedError for what is not understood."""
    if len(raw) != 128:
        raise ValueError(f"a tensor map has 128 bytes, not {len(raw)}")
    words = struct.unpack("<16I", raw[:64])
    head = words[2]
    rank = ((head >> 4) & 7) + 1
    kind, interleave, swizzle = (head >> 7) & 15, (head >> 11) & 3, (head >> 13) & 3
    if head & 15 != 2 or rank > 5:
        raise NotImplementedError(f"tensor map header {head:#x}: not a tiled map")
    if kind not in _DTYPES:
        raise NotImplementedError(f"tensor map header {head:#x}: element type {kind}")
    if interleave:
        raise NotImplementedError(f"tensor map header {head:#x}: interleave {interleave}")
    if words[13] & 0xFFFFFF:
        raise NotImplementedError(f"tensor map word 13 {words[13]:#x}: element strides")
    dtype = np.dtype(_DTYPES[kind])
    strides = [dtype.itemsize]
    for i in range(rank - 1):
        strides.append((words[3 + i] | ((words[7] >> (4 * i)) & 15) << 32) * 16)
    box = tuple(raw[55 + i] + 1 for i in range(rank))
    if SWIZZLE_BYTES[swizzle] and box[0] * dtype.itemsize > SWIZZLE_BYTES[swizzle]:
        raise ValueError(
            f"tensor map: inner box of {box[0] * dtype.itemsize} bytes exceeds the "
            f"{SWIZZLE_BYTES[swizzle]}-byte swizzle"
        )
    return TensorMap(
        words[0] | words[1] << 32,
        dtype,
        tuple(w + 1 for w in words[8 : 8 + rank]),
        tuple(strides),
        box,
        SWIZZLE_BYTES[swizzle],
    )
