"""A mask as a picture: its tiles, and for small sizes its elements.

The PNG is written here, pixel by pixel, so that nothing need be installed for it.
"""

import functools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashcute import analysis, masks
from jax_flashcute.given import whole
from jax_flashcute.tile_kinds import FULL, HIDDEN, PARTIAL

LARGEST_WITH_ELEMENTS = 512
"""Up to so many rows and keys, elements are drawn; beyond, tiles alone."""

_PIXELS = 512
_COLORS = {
    "skipped": (238, 240, 243),
    "hidden": (255, 224, 178),
    "visible": (239, 108, 0),
    "full": (48, 63, 159),
    "line": (176, 182, 192),
}


@dataclass(frozen=True)
class MaskPicture:
    """What ``show_mask`` found; a notebook draws it.

    Queries run down and keys to the right.  Skipped tiles are grey and full ones blue; in partial
    ones (orange), elements that are hidden are pale.

    Attributes:
      kinds: (query tiles, key tiles): 0 where a tile is skipped, 1 partial, 2 full.
      elements: (T, S) booleans, True is visible; None where there are too many to draw.
      q_length, kv_length: T and S.
      tile_m, tile_n: query rows and keys of a tile.
      share: of all elements, those that are visible.
      keys: the intervals of keys that a position sees, as text; None where they are not known
        to be intervals.
    """

    kinds: np.ndarray = field(repr=False)
    elements: np.ndarray | None = field(repr=False)
    q_length: int
    kv_length: int
    tile_m: int
    tile_n: int
    share: float
    keys: str | None

    @property
    def counts(self) -> dict[str, int]:
        """How many tiles are full, partial and skipped."""
        kinds = {"full": FULL, "partial": PARTIAL, "skipped": HIDDEN}
        return {name: int(np.sum(self.kinds == kind)) for name, kind in kinds.items()}

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return (
            f"{self.q_length} queries, {self.kv_length} keys, {100 * self.share:.1f}% visible; "
            f"tiles of {self.tile_m} x {self.tile_n}: {counts}; "
            f"keys seen: {self.keys or 'not known to be intervals'}"
        )

    def png(self) -> bytes:
        """The picture as a PNG file."""
        return _png(self._pixels())

    def save(self, path: str | Path) -> None:
        """Write the picture to a PNG file."""
        Path(path).write_bytes(self.png())

    def _repr_png_(self) -> bytes:
        return self.png()

    def _pixels(self) -> np.ndarray:
        """(height, width, 3) bytes."""
        palette = np.array([_COLORS[n] for n in ("skipped", "visible", "full")], np.uint8)
        if self.elements is None:
            scale = max(1, min(16, _PIXELS // max(self.kinds.shape)))
            return palette[self.kinds].repeat(scale, axis=0).repeat(scale, axis=1)
        rows, columns = np.arange(self.q_length), np.arange(self.kv_length)
        kinds = self.kinds[rows[:, None] // self.tile_m, columns[None, :] // self.tile_n]
        pixels = palette[kinds]
        pixels[(kinds == PARTIAL) & ~self.elements] = _COLORS["hidden"]
        scale = max(1, _PIXELS // max(self.q_length, self.kv_length))
        pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
        if min(self.tile_m, self.tile_n) * scale >= 8:
            pixels[:: self.tile_m * scale] = _COLORS["line"]
            pixels[:, :: self.tile_n * scale] = _COLORS["line"]
        return pixels


def show_mask(
    mask_mod: Callable[..., Any],
    q_length: int,
    kv_length: int | None = None,
    *,
    tile_m: int = 128,
    tile_n: int = 128,
    batch: int = 0,
    head: int = 0,
    q_offset: int = 0,
) -> MaskPicture:
    """Evaluate a mask for one batch entry and head, and draw it.

    Args:
      mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, as for ``flash_attention``; built-in or not.
      q_length: T, query rows.
      kv_length: S, keys; T by default.
      tile_m: query rows of a tile.
      tile_n: keys of a tile.
      batch: the ``b`` that it sees.
      head: the ``h``.
      q_offset: position of query row 0.

    Returns:
      A ``MaskPicture``: drawn by notebooks, written by ``save``, counted by ``counts``.

    Raises:
      ValueError: an argument does not fit; it is named.
    """
    kv_length = q_length if kv_length is None else kv_length
    numbers = {"q_length": q_length, "kv_length": kv_length, "tile_m": tile_m, "tile_n": tile_n}
    q_length, kv_length, tile_m, tile_n = (whole(*item, 1) for item in numbers.items())
    function, arrays = masks.trace_mask(mask_mod)
    found = analysis.analyse(function.jaxpr).intervals()

    @jax.jit
    def rows_of(first: jax.Array) -> jax.Array:
        # The last tile repeats the last row.
        q = jnp.minimum(first + jnp.arange(tile_m), q_length - 1) + q_offset
        indices = ([[[batch]]], [[[head]]], q[None, :, None], np.arange(kv_length)[None, None])
        indices = (jnp.asarray(x, jnp.int32) for x in indices)
        return jnp.broadcast_to(function(arrays, *indices), (1, tile_m, kv_length))[0]

    with_elements = max(q_length, kv_length) <= LARGEST_WITH_ELEMENTS
    edges = np.arange(0, kv_length, tile_n)
    widths = np.diff(np.append(edges, kv_length))
    kinds, elements, visible = [], [], 0
    for first in range(0, q_length, tile_m):
        seen = np.asarray(rows_of(first))[: q_length - first]
        counts = np.add.reduceat(seen.sum(axis=0), edges)
        kinds.append(
            np.where(counts == widths * len(seen), FULL, np.where(counts, PARTIAL, HIDDEN))
        )
        visible += int(counts.sum())
        elements += [seen] if with_elements else []
    return MaskPicture(
        kinds=np.stack(kinds),
        elements=np.concatenate(elements) if with_elements else None,
        q_length=q_length,
        kv_length=kv_length,
        tile_m=tile_m,
        tile_n=tile_n,
        share=visible / (q_length * kv_length),
        keys=" or ".join(map(str, found)) if found else None,
    )


def _png(pixels: np.ndarray) -> bytes:
    """(height, width, 3) bytes as a PNG (ISO/IEC 15948): 8 bits, true colour, no filter."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))

    def chunk(file: bytes, part: tuple[bytes, bytes]) -> bytes:
        kind, content = part
        checksum = zlib.crc32(kind + content)
        return file + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    return functools.reduce(chunk, chunks, b"\x89PNG\r\n\x1a\n")
