"""Which tiles of a mask hold something: lists of tiles, built on the device from the mask itself.

A tile is ``tile_m`` query rows by ``tile_n`` keys.  It is *full* if every one of its elements is
visible, *partial* if some are, and stands in no list otherwise.  The format is that of
FlashAttention's and FlexAttention's block sparsity: a count and compact indices of key tiles for
every tile row.  Tiles are classified by all of their elements; nothing is sampled.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_flashcute import masks
from jax_flashcute.analysis import POSITION_LIMIT
from jax_flashcute.given import whole
from jax_flashcute.promotion import of_any_rank
from jax_flashcute.tile_kinds import FULL, HIDDEN, PARTIAL, Tiling, classify, kind_of, num_tiles

_FEW_TILES = 128
"""Tiles of a row up to which a list is made by comparing each tile with each place in it."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["partial_counts", "partial_indices", "full_counts", "full_indices"],
    meta_fields=["q_length", "kv_length", "tile_m", "tile_n"],
)
@dataclass(frozen=True)
class BlockMask:
    """Lists of the key tiles that the query rows of each tile row see.

    M = ceil(q_length / tile_m) tile rows and ceil(kv_length / tile_n) key tiles, at least one
    each; B batch and N query heads, or 1 where all share one list.  A pytree: its arrays go
    through every transform of JAX, its sizes are static.

    A tile stands at most once in the two lists of a row.  Lists need not ascend; those that this
    module makes do.  Only the first ``counts`` entries of a list are read.

    Attributes:
      partial_counts: (1|B, 1|N, M) int32: length of each list of partial tiles.
      partial_indices: (1|B, 1|N, M, P) int32: their key tiles.
      full_counts: (1|B, 1|N, M) int32, likewise for the full tiles.
      full_indices: (1|B, 1|N, M, F) int32.
      q_length: T, query rows that the lists are about.
      kv_length: S, keys.
      tile_m: query rows of a tile.
      tile_n: keys of a tile.
    """

    partial_counts: jax.Array
    partial_indices: jax.Array
    full_counts: jax.Array
    full_indices: jax.Array
    q_length: int
    kv_length: int
    tile_m: int
    tile_n: int

    @property
    def num_q_tiles(self) -> int:
        return num_tiles(self.q_length, self.tile_m)

    @property
    def num_kv_tiles(self) -> int:
        return num_tiles(self.kv_length, self.tile_n)

    @staticmethod
    def from_indices(
        partial_counts: ArrayLike,
        partial_indices: ArrayLike,
        full_counts: ArrayLike | None = None,
        full_indices: ArrayLike | None = None,
        *,
        q_length: int,
        kv_length: int,
        tile_m: int,
        tile_n: int,
    ) -> "BlockMask":
        """From counts and indices, such as FlexAttention's ``kv_num_blocks`` and ``kv_indices``.

        Args:
          partial_counts: (1|B, 1|N, M) integers; FlexAttention's ``kv_num_blocks``.
          partial_indices: (1|B, 1|N, M, P) integers; ``kv_indices``.
          full_counts: likewise for the full tiles, ``full_kv_num_blocks``; None for no full tiles.
          full_indices: ``full_kv_indices``.
          q_length: query rows.
          kv_length: keys.
          tile_m: query rows of a tile.
          tile_n: keys of a tile.

        Raises:
          ValueError: shapes or sizes do not fit; or, where the values are known (not traced), a
            count exceeds its list, an index is no key tile, or a tile stands twice in a row.
        """
        sizes = _checked_sizes(q_length, kv_length, tile_m, tile_n)
        if (full_counts is None) != (full_indices is None):
            raise ValueError("full_counts and full_indices must be given together, or neither")
        counts = _integers("partial_counts", partial_counts)
        if full_counts is None or full_indices is None:
            full_counts = jnp.zeros_like(counts)
            full_indices = jnp.zeros((*counts.shape, 0), jnp.int32)
        block_mask = BlockMask(
            partial_counts=counts,
            partial_indices=_with_room(_integers("partial_indices", partial_indices)),
            full_counts=_integers("full_counts", full_counts),
            full_indices=_with_room(_integers("full_indices", full_indices)),
            **sizes,
        )
        _check_shapes(block_mask)
        _check_values(block_mask)
        return block_mask

    @staticmethod
    def from_lists(
        partial: Sequence[Sequence[int]],
        full: Sequence[Sequence[int]] | None = None,
        *,
        q_length: int,
        kv_length: int,
        tile_m: int,
        tile_n: int,
    ) -> "BlockMask":
        """From a Python list of key tiles for each tile row, shared by all batches and heads.

        Raises:
          ValueError: as for ``from_indices``.
        """

        def padded(lists):
            width = max(map(len, lists), default=0)
            rows = [[*row, *[0] * (width - len(row))] for row in lists]
            counts = np.array([len(row) for row in lists], np.int32)
            return counts[None, None], np.array(rows, np.int32).reshape(1, 1, len(rows), width)

        return BlockMask.from_indices(
            *padded(partial),
            *padded([[]] * len(partial) if full is None else full),
            q_length=q_length,
            kv_length=kv_length,
            tile_m=tile_m,
            tile_n=tile_n,
        )

    @staticmethod
    def from_blocks(
        partial: ArrayLike,
        full: ArrayLike | None = None,
        *,
        q_length: int,
        kv_length: int,
        tile_m: int,
        tile_n: int,
    ) -> "BlockMask":
        """From booleans per tile, (1|B, 1|N, M, key tiles); leading dimensions may be left out.

        Args:
          partial: which tiles are visited.
          full: which of them need no mask; it wins where both are set.  None for none.
          q_length: query rows.
          kv_length: keys.
          tile_m: query rows of a tile.
          tile_n: keys of a tile.

        Raises:
          ValueError: shapes or sizes do not fit.
        """
        sizes = _checked_sizes(q_length, kv_length, tile_m, tile_n)
        tiles = (num_tiles(q_length, tile_m), num_tiles(kv_length, tile_n))
        arrays = {"partial": partial} | ({} if full is None else {"full": full})
        for name, array in arrays.items():
            array = jnp.asarray(array)
            if array.dtype != jnp.bool_ or array.ndim > 4 or array.shape[-2:] != tiles:
                raise ValueError(
                    f"{name} must be booleans (1|B, 1|N, {tiles[0]}, {tiles[1]}), a value per "
                    f"tile; got {array.dtype.name} of shape {array.shape}"
                )
            arrays[name] = array.reshape((1,) * (4 - array.ndim) + array.shape)
        kinds = jnp.where(arrays["partial"], PARTIAL, HIDDEN)
        if full is not None:
            kinds = jnp.where(arrays["full"], FULL, kinds)
        return BlockMask.from_kinds(kinds, **sizes)

    @staticmethod
    def from_mask(mask: ArrayLike, *, tile_m: int, tile_n: int) -> "BlockMask":
        """From a dense mask, (1|B, 1|N, T, S) booleans; for sizes at which that fits.

        Raises:
          ValueError: shapes or sizes do not fit.
        """
        mask = jnp.asarray(mask)
        if mask.dtype != jnp.bool_ or not 2 <= mask.ndim <= 4:
            raise ValueError(
                "mask must be booleans (1|B, 1|N, T, S); "
                f"got {mask.dtype.name} of shape {mask.shape}"
            )
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        b, n, T, S = mask.shape
        sizes = _checked_sizes(T, S, tile_m, tile_n)
        M, tiles = num_tiles(T, tile_m), num_tiles(S, tile_n)
        if T == 0 or S == 0:
            return BlockMask.from_kinds(jnp.zeros((b, n, M, tiles), jnp.int8), **sizes)
        padding = ((0, 0), (0, 0), (0, M * tile_m - T), (0, tiles * tile_n - S))
        # The last row and key, repeated, change neither "some" nor "all".
        mask = jnp.pad(mask, padding, mode="edge").reshape(b, n, M, tile_m, tiles, tile_n)
        kinds = kind_of(jnp.sum(mask, axis=(3, 5), dtype=jnp.int32), tile_m * tile_n)
        return BlockMask.from_kinds(kinds, **sizes)

    @staticmethod
    def from_kinds(kinds: jax.Array, **sizes: int) -> "BlockMask":
        """From ``kinds()``, (1|B, 1|N, M, key tiles), and the four sizes."""
        return BlockMask(*compact(kinds == PARTIAL), *compact(kinds == FULL), **sizes)

    def kinds(self) -> jax.Array:
        """(1|B, 1|N, M, key tiles) int8: HIDDEN, PARTIAL or FULL for every tile."""
        batch = jnp.broadcast_shapes(self.partial_counts.shape[:2], self.full_counts.shape[:2])
        kinds = jnp.full((*batch, self.num_q_tiles, self.num_kv_tiles), HIDDEN, jnp.int8)
        for kind, counts, indices in (
            (PARTIAL, self.partial_counts, self.partial_indices),
            (FULL, self.full_counts, self.full_indices),
        ):
            kinds = jnp.maximum(kinds, kind * self._listed(counts, indices).astype(jnp.int8))
        return kinds

    def _listed(self, counts: jax.Array, indices: jax.Array) -> jax.Array:
        """(1|B, 1|N, M, key tiles) bool: which tiles stand in a list."""
        tiles = self.num_kv_tiles
        listed = (jnp.arange(indices.shape[-1]) < counts[..., None]) & (indices >= 0)
        indices = jnp.where(listed, indices, tiles)
        rows = indices.reshape(math.prod(counts.shape), indices.shape[-1])
        flags = jax.vmap(lambda row: jnp.zeros(tiles, bool).at[row].set(True, mode="drop"))(rows)
        return flags.reshape(*indices.shape[:-1], tiles)

    def in_tiles(self, tile_m: int, tile_n: int) -> "BlockMask":
        """The same mask by smaller tiles, which must divide these; the order stays.

        Of entries that are no key tile of this mask, nothing is left that shows a key.
        """
        if self.tile_m % tile_m or self.tile_n % tile_n:
            raise ValueError(
                f"tile_m and tile_n must divide ({self.tile_m}, {self.tile_n}); "
                f"got ({tile_m}, {tile_n})"
            )
        rows = num_tiles(self.q_length, tile_m)
        of_row = jnp.arange(rows, dtype=jnp.int32) * tile_m // self.tile_m
        parts = self.tile_n // tile_n

        def divided(counts: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
            is_tile = (indices >= 0) & (indices < self.num_kv_tiles)
            indices = jnp.where(is_tile, indices, self.num_kv_tiles)
            counts = jnp.clip(counts, 0, indices.shape[3])
            if parts > 1:
                part = jnp.arange(parts, dtype=jnp.int32)
                indices = (indices[..., None] * parts + part).reshape(*indices.shape[:3], -1)
            if self.tile_m != tile_m:
                counts, indices = counts[:, :, of_row], indices[:, :, of_row]
            return counts * parts, indices

        full = divided(self.full_counts, self.full_indices)
        tiles = num_tiles(self.kv_length, tile_n)
        if self.num_kv_tiles * parts > tiles:
            # Of a last tile that is cut off, some lie beyond; kernels take full ones as they are.
            full = _first(*full, full[1] < tiles)
        return BlockMask(
            *divided(self.partial_counts, self.partial_indices),
            *full,
            q_length=self.q_length,
            kv_length=self.kv_length,
            tile_m=tile_m,
            tile_n=tile_n,
        )

    def kernel_lists(self) -> list[jax.Array]:
        """The four arrays as kernels take them: with room for at least one index in each list."""
        partial, full = _with_room(self.partial_indices), _with_room(self.full_indices)
        return [self.partial_counts, partial, self.full_counts, full]

    def transposed_lists(self, tile_m: int, tile_n: int) -> list[jax.Array]:
        """``packed(transpose().in_tiles(tile_m, tile_n).kernel_lists())``, for the backward.

        In the memory of the lists themselves: entries are sorted by key tile, and none is left
        empty.  They ascend, and none lies beyond the last query row.
        """
        found = []
        of_row = jnp.arange(num_tiles(self.kv_length, tile_m), dtype=jnp.int32)
        of_row = of_row * tile_m // self.tile_n
        parts = self.tile_m // tile_n
        M, tiles = self.num_q_tiles, self.num_kv_tiles
        beyond = parts * M - num_tiles(self.q_length, tile_n)
        for counts, indices in (
            (self.partial_counts, self.partial_indices),
            (self.full_counts, self.full_indices),
        ):
            b, n, _, width = indices.shape
            is_tile = (jnp.arange(width) < counts[..., None]) & (indices >= 0) & (indices < tiles)
            # Rows come one after another, so a stable sort leaves those of a key tile ascending.
            keys = jnp.where(is_tile, indices, tiles).reshape(b, n, M * width)
            row = lax.broadcasted_iota(jnp.int32, indices.shape, 2).reshape(keys.shape)
            keys, rows = lax.sort((keys, row), num_keys=1, is_stable=True)
            places = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, jnp.arange(tiles + 1))))(keys)
            start, end = places[..., :-1].astype(jnp.int32), places[..., 1:].astype(jnp.int32)
            in_last_row = self._listed(counts[:, :, M - 1 :], indices[:, :, M - 1 :])[:, :, 0]
            counts = (end - start) * parts - beyond * in_last_row
            entries = rows[..., None] * parts + jnp.arange(parts, dtype=jnp.int32)
            entries = _with_room(entries.reshape(b, n, 1, M * width * parts))
            # Kernels read the first place of an empty list, too.
            start = jnp.minimum(start * parts, entries.shape[3] - 1)
            found += [jnp.stack([counts, start], axis=-1)[:, :, of_row], entries]
        return found

    def transpose(self) -> "BlockMask":
        """The same tiles by key tile: for each, the query tiles that see it; for the backward."""
        return BlockMask.from_kinds(
            jnp.swapaxes(self.kinds(), 2, 3),
            q_length=self.kv_length,
            kv_length=self.q_length,
            tile_m=self.tile_n,
            tile_n=self.tile_m,
        )


@of_any_rank
def make_block_mask(
    mask_mod: Callable[..., Any],
    B: int,
    N: int,
    T: int,
    S: int,
    *,
    tile_m: int,
    tile_n: int,
    q_offset: ArrayLike = 0,
) -> BlockMask:
    """The tiles of a mask, classified exactly, on the device, inside ``jit`` or not.

    Where ``mask_mod`` reduces to intervals of keys (``explain`` says), their bounds decide, in O(T)
    evaluations; of any other mask every element is evaluated, in chunks.  Memory is that of the
    lists, O(tiles).  Where ``mask_mod`` reads no batch index or no head, all share one list.

    Args:
      mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, as for ``flash_attention``.
      B: batch.
      N: query heads.
      T: query rows.
      S: keys.
      tile_m: query rows of a tile.
      tile_n: keys of a tile.
      q_offset: position of query row 0, a scalar or (B,), as for ``flash_attention``.

    Raises:
      ValueError: an argument does not fit; it is named.
      NotImplementedError: ``mask_mod`` closes over something that cannot be an operand.
    """
    sizes = _checked_sizes(T, S, tile_m, tile_n)
    B, N = whole("B", B, 0), whole("N", N, 0)
    mask, arrays = masks.trace_mask(mask_mod)
    offset = _integers("q_offset", q_offset)
    if offset.shape not in ((), (1,), (B,)):
        raise ValueError(f"q_offset must be a scalar or ({B},); got shape {offset.shape}")
    heads, batch = (jnp.arange(n, dtype=jnp.int32) for n in (N, B))
    is_near = not isinstance(q_offset, int) or abs(q_offset) + T < POSITION_LIMIT
    entries = batch, heads, offset.reshape(-1)
    kinds = classify(mask, arrays, entries, Tiling(**sizes), is_near=is_near)
    return BlockMask.from_kinds(kinds, **sizes)


@jax.jit
def packed(lists: list[jax.Array]) -> list[jax.Array]:
    """``kernel_lists()`` in the form of the backward's: lists of a head in one row of memory.

    Counts and starts (..., rows, 2), and indices (..., 1, entries), of the partial and full tiles.
    """
    found = []
    for counts, indices in (lists[:2], lists[2:]):
        b, n, rows, width = indices.shape
        start = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32) * width, counts.shape)
        found += [jnp.stack([counts, start], axis=-1), indices.reshape(b, n, 1, rows * width)]
    return found


@jax.jit
def compact(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lists of the set places of ``flags`` (..., X), ascending: counts (...) and indices (..., X).

    What stands in a list beyond its count is 0.
    """
    X = flags.shape[-1]
    before = jnp.cumsum(flags, axis=-1, dtype=jnp.int32)
    counts = jnp.sum(flags, axis=-1, dtype=jnp.int32)
    place = jnp.arange(X, dtype=jnp.int32)
    if X <= _FEW_TILES:
        is_jth = flags[..., None, :] & (before[..., None, :] == place[:, None] + 1)
        return counts, jnp.sum(jnp.where(is_jth, place, 0), axis=-1)
    lists = jax.vmap(lambda row: jnp.zeros(X, jnp.int32).at[row].set(place, mode="drop"))
    rows = jnp.where(flags, before - 1, X).reshape(math.prod(flags.shape[:-1]), X)
    return counts, lists(rows).reshape(flags.shape)


def _first(counts: jax.Array, indices: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lists of the wanted entries alone, in their order."""
    wanted &= jnp.arange(indices.shape[-1]) < counts[..., None]
    order = jnp.argsort(~wanted, axis=-1, stable=True)
    return jnp.sum(wanted, axis=-1, dtype=jnp.int32), jnp.take_along_axis(indices, order, axis=-1)


def visits_before(visited: jax.Array) -> jax.Array:
    """How many earlier rows of tiles visit a tile, of booleans (..., rows, tiles): int32."""
    counts = visited.astype(jnp.int32)
    return jnp.cumsum(counts, axis=-2) - counts


def _checked_sizes(q_length: int, kv_length: int, tile_m: int, tile_n: int) -> dict[str, int]:
    sizes = {"q_length": q_length, "kv_length": kv_length, "tile_m": tile_m, "tile_n": tile_n}
    return {
        name: whole(name, size, 1 if name.startswith("tile") else 0) for name, size in sizes.items()
    }


def _integers(name: str, array: ArrayLike) -> jax.Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers; got dtype {array.dtype.name}")
    return array.astype(jnp.int32)


def _with_room(indices: jax.Array) -> jax.Array:
    """Indices with room for at least one in each list.

    XLA (jaxlib 0.11.2) crashes where an array without elements goes into a ``shard_map``, as lists
    do in its gradient.
    """
    is_empty = indices.ndim == 4 and indices.shape[3] == 0
    return jnp.pad(indices, ((0, 0),) * 3 + ((0, 1),)) if is_empty else indices


def _check_shapes(block_mask: BlockMask) -> None:
    M = block_mask.num_q_tiles
    lists = {
        "partial": (block_mask.partial_counts, block_mask.partial_indices),
        "full": (block_mask.full_counts, block_mask.full_indices),
    }
    for name, (counts, indices) in lists.items():
        if counts.ndim != 3 or counts.shape[2] != M:
            raise ValueError(f"{name}_counts must be (1|B, 1|N, {M}); got shape {counts.shape}")
        if indices.ndim != 4 or indices.shape[:3] != counts.shape:
            raise ValueError(
                f"{name}_indices must be {name}_counts' shape, {counts.shape}, and one dimension "
                f"more; got {indices.shape}"
            )
    shapes = block_mask.partial_counts.shape[:2], block_mask.full_counts.shape[:2]
    for one, other in zip(*shapes, strict=True):
        if one != other and 1 not in (one, other):
            raise ValueError(
                "full_counts must have the batch and heads of partial_counts, or 1; "
                f"got {shapes[1]} and {shapes[0]}"
            )


def _check_values(block_mask: BlockMask) -> None:
    """Of lists whose values are known: counts and indices within bounds, no tile twice."""
    if any(isinstance(array, Tracer) for array in jax.tree.leaves(block_mask)):
        return
    tiles = block_mask.num_kv_tiles
    batch = jnp.broadcast_shapes(
        block_mask.partial_counts.shape[:2], block_mask.full_counts.shape[:2]
    )
    times = np.zeros((*batch, block_mask.num_q_tiles, tiles), np.int32)
    for name in ("partial", "full"):
        counts = np.asarray(getattr(block_mask, f"{name}_counts"))
        indices = np.asarray(getattr(block_mask, f"{name}_indices"))
        width = indices.shape[-1]
        if np.any((counts < 0) | (counts > width)):
            raise ValueError(
                f"{name}_counts must lie in 0..{width}, the width of {name}_indices; "
                f"got {counts.min()}..{counts.max()}"
            )
        listed = np.arange(width) < counts[..., None]
        if np.any(listed & ((indices < 0) | (indices >= tiles))):
            found = indices[listed]
            raise ValueError(
                f"{name}_indices must lie in 0..{tiles - 1} as far as {name}_counts says; "
                f"got {found.min()}..{found.max()}"
            )
        own = np.zeros((*counts.shape, tiles), np.int32)
        np.add.at(own, (*np.nonzero(listed)[:3], indices[listed]), 1)
        times += own
    if np.any(times > 1):
        raise ValueError(
            "a tile must stand at most once in the lists of a tile row; "
            f"(batch, head, tile row, key tile) {tuple(map(int, np.argwhere(times > 1)[0]))} "
            "stands there more often"
        )


# So that jax.export can serialise a function that takes a BlockMask.
export.register_pytree_node_serialization(
    BlockMask,
    serialized_name="jax_flashcute.BlockMask",
    serialize_auxdata=lambda sizes: json.dumps(sizes).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(data)),
)
