"""Tiles in shared memory that TMA writes and matrix products read; 16-bit rounding of results."""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum

CHUNK = 32
"""Columns of a row that a thread holds at once, where it owns the row."""


def chunks(columns: int) -> list[tuple[int, int]]:
    """(first, size) of the pieces that cover some columns, each a power of two."""
    found, first = [], 0
    while first < columns:
        size = CHUNK
        while size > columns - first:
            size //= 2
        found.append((first, size))
        first += size
    return found


def smem_layout(
    dtype, rows: int, columns: int, stages: int | None = None, columns_first: bool = False
):
    """Row-major tile(s) in shared memory with the widest swizzle that divides the columns.

    Atoms of 8 rows follow each other along the rows, or with ``columns_first`` along the columns.
    """
    atom = warpgroup.make_smem_layout_atom(
        hopper.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, columns), dtype
    )
    shape = (rows, columns) if stages is None else (rows, columns, stages)
    order = (1, 0, 2) if columns_first else (0, 1, 2)
    return cute.tile_to_shape(atom, shape, order=order[: len(shape)])


def swizzle_width(dtype, columns: int) -> int:
    """Columns of one swizzle atom of ``smem_layout``."""
    for width in (64, 32, 16, 8):
        if columns % (width * 16 // dtype.width) == 0:
            return width * 16 // dtype.width
    raise ValueError(f"columns must be a multiple of 8, got {columns}")


def swizzle_bits(row, atom: int):
    """What the swizzle of atoms of so many columns flips in the offset of a row's bytes."""
    return row * (2 * atom) // 128 % (atom // 8) * 16


def by_head(x: cute.Tensor, width: int, packed: int) -> cute.Tensor:
    """(B, T, heads, width) as (packed, T, width, heads / packed, B)."""
    b, t, heads = x.shape[0], x.shape[1], x.shape[2]
    row = Int64(heads) * width
    return cute.make_tensor(
        x.iterator,
        cute.make_layout(
            (packed, t, width, heads // packed, b),
            stride=(width, row, 1, packed * width, row * t),
        ),
    )


def tile_tma(op, x: cute.Tensor, width: int, dtype, shape: tuple[int, int]):
    """The TMA copy of tiles of one head of (B, T, heads, width), and what it reads or writes.

    ``shape``: rows and columns in shared memory; columns beyond the width are read as zeros.
    """
    rows = by_head(x, width, 1)[0, None, None, None, None]
    return cpasync.make_tiled_tma_atom(op, rows, smem_layout(dtype, *shape), shape)


def transposed(x: cute.Tensor) -> cute.Tensor:
    """(rows, columns, stages) as (columns, rows, stages)."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0, 2]))


def slab_tma_layout(dtype, rows: int, width: int, heads: int, tokens: int):
    """The part of a slab of ``rows`` that TMA writes, as (heads, tokens, columns)."""
    atom = swizzle_width(dtype, width)
    layout = smem_layout(dtype, rows, width)
    return cute.make_composed_layout(
        layout.inner,
        0,
        cute.make_layout(
            (heads, tokens, (atom, width // atom)),
            stride=(atom, atom * heads, (1, rows * atom)),
        ),
    )


def tma_partition(
    atom: cute.CopyAtom,
    smem: cute.Tensor,
    gmem: cute.Tensor,
    rank: Int32 | int = 0,
    blocks: int = 1,
):
    """Shared and global tiles as the copy takes them: (copy, stages) and (copy, tiles).

    Of a copy that the blocks of a cluster share, the part of the block of that rank.
    """
    return cpasync.tma_partition(
        atom,
        rank,
        cute.make_layout(blocks),
        cute.group_modes(smem, 0, cute.rank(gmem) - 1),
        cute.group_modes(gmem, 0, cute.rank(gmem) - 1),
    )


@cute.jit
def clear_rows(
    tile: cute.Tensor,
    width: cutlass.Constexpr[int],
    stage: Int32,
    first: Int32,
    columns_first: cutlass.Constexpr[bool] = False,
    end: Int32 | None = None,
):
    """Zeroes rows first.. of a stage of a ``smem_layout`` of (rows, width, stages); one warp.

    ``end``: the row to end before; None: there is none.

    A row's swizzle permutes inside the row of its atom, so whole atom rows can be cleared.
    """
    rows = cute.size(tile, mode=[0])
    stages = cute.size(tile, mode=[2])
    atom = swizzle_width(tile.element_type, width)
    words, atoms = atom // 4, width // atom
    shape, stride = rows, words
    right = words * rows
    if const_expr(columns_first):
        shape, stride = (8, rows // 8), (words, 8 * words * atoms)
        right = 8 * words
    linear = cute.make_tensor(
        cute.recast_ptr(tile.iterator, swizzle_=cute.make_swizzle(0, 4, 3), dtype=Int64),
        cute.make_layout(
            (words, shape, atoms, stages), stride=(1, stride, right, words * rows * atoms)
        ),
    )
    lane = cute.arch.lane_idx()
    last = Int32(rows * words) if const_expr(end is None) else end * words
    for a in cutlass.range_constexpr(atoms):
        for i in cutlass.range(first * words + lane, last, Int32(32), unroll=1):
            linear[i % words, i // words, a, stage] = Int64(0)


def round_pair(dtype, low: Float32, high: Float32) -> Uint32:
    """Two numbers rounded to a 16-bit type and packed in a word."""
    kind = {cutlass.BFloat16: "bf16x2", cutlass.Float16: "f16x2"}[dtype]
    return cute.arch.inline_ptx(
        "cvt.rn." + kind + ".f32 {$w0}, {$r0}, {$r1};",
        write_only_types=[Uint32],
        read_only_args=[high, low],
    )


def round_pairs(dtype, values: cute.Tensor) -> cute.Tensor:
    """A thread's float32 values as 16-bit pairs, in half as many float32 registers."""
    count = cute.size(values)
    pairs = cute.make_rmem_tensor(count // 2, Float32)
    words = cute.make_tensor(
        cute.recast_ptr(pairs.iterator, dtype=Uint32), cute.make_layout(count // 2)
    )
    for i in range(count // 2):
        words[i] = round_pair(dtype, values[2 * i], values[2 * i + 1])
    return pairs


def store_pairs(tile: cute.Tensor, row: Int32, first, pairs: cute.Tensor) -> None:
    """Stores ``round_pairs`` to a row of a ``smem_layout`` tile, 16 bytes at a time.

    ``first``: where they begin in the row, in vectors of 8.
    """
    for v in range(cute.size(pairs) // 4):
        vector = cute.make_tensor(
            cute.recast_ptr(pairs.iterator + 4 * v, dtype=tile.element_type),
            cute.make_layout((1, 8)),
        )
        cute.autovec_copy(vector, cute.local_tile(tile, (1, 8), (row, first + v)))
