"""Key tiles whose rows lie in pages: where each part of a tile is, and how it is copied.

Table entries of keys beyond the length are not read, and a page whose number is out of range reads
as zeros.
"""

import math
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from jax_flashcute.kernels.common.tiles import slab_tma_layout, swizzle_width, tma_partition
from jax_flashcute.kernels.config import loads_pages_by_tma

COPYING_WARPS = 4


def paged_tiles(page_size: int, tile_n: int) -> "BoxedTiles | CopiedTiles":
    """How tiles of ``tile_n`` keys are loaded from pages of ``page_size``."""
    return (BoxedTiles if loads_pages_by_tma(page_size) else CopiedTiles)(page_size, tile_n)


class BoxedTiles:
    """Tiles copied by TMA, in boxes of rows of one page; one warp issues them all."""

    copying_threads = 0

    def __init__(self, page_size: int, tile_n: int):
        self.page_size = page_size
        self.tile_n = tile_n
        self.box = math.gcd(page_size, tile_n)
        self.boxes = tile_n // self.box

    def source(self, dtype, pages: cute.Tensor, width: int):
        """The copy of a box from ``by_head``'s view of the pages, and what it reads."""
        layout = slab_tma_layout(dtype, self.tile_n, width, 1, self.box)
        load = cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(load, pages, layout, (1, self.box, width))

    @cute.jit
    def places(self, mPageTable: cute.Tensor, batch: Int32, keys: Int32, warp: Int32, n: Int32):
        """The page of each box of tile n, box i in lane i; one warp.

        A box beyond the length has the page of the last key: its rows are hidden or cleared.
        """
        box = cutlass.min(cute.arch.lane_idx(), Int32(self.boxes - 1))
        key = cutlass.min(n * self.tile_n + box * self.box, keys - 1)
        return Int32(mPageTable[batch, key // self.page_size])

    def loader(self, copy: tuple, width: int, stages: int, head: Int32, keys: Int32, warp: Int32):
        """A function (n, places, stage, barrier) that starts the copies of tile n."""
        atom, gX, sX = copy
        slab = slab_tma_layout(sX.element_type, self.tile_n, width, 1, self.box)
        row = slab.outer.stride[1]
        boxes = cute.make_layout((self.boxes, stages), stride=(self.box * row, self.tile_n * width))
        sX_boxes = cute.make_tensor(sX.iterator, cute.append(slab.outer, boxes))
        gX_boxes = cute.local_tile(
            gX[None, None, None, head, None], (1, self.box, width), (0, None, 0, None)
        )
        target, source = tma_partition(atom, sX_boxes, cute.group_modes(gX_boxes, 3, 5))
        return partial(self.copy, atom, source, target)

    @cute.jit
    def copy(
        self, atom: cute.CopyAtom, source, target, n: Int32, places: Int32, stage: Int32, barrier
    ):
        for i in cutlass.range(self.boxes, unroll=min(self.boxes, 4)):
            page = cute.arch.shuffle_sync(places, i)
            row = (n * self.tile_n + i * self.box) % self.page_size
            cute.copy(
                atom,
                source[None, (row // self.box, page)],
                target[None, (i, stage)],
                tma_bar_ptr=barrier,
            )


class CopiedTiles:
    """Tiles that four warps copy, each an equal part of the rows, 16 bytes at a time.

    Rows beyond the length become zeros.
    """

    copying_threads = 32 * COPYING_WARPS

    def __init__(self, page_size: int, tile_n: int):
        self.page_size = page_size
        self.tile_n = tile_n
        self.rows = tile_n // COPYING_WARPS
        if tile_n % (COPYING_WARPS * page_size) or self.rows > 32 * page_size:
            raise ValueError(f"a quarter of {tile_n} keys is not at most 32 pages of {page_size}")

    def source(self, dtype, pages: cute.Tensor, width: int):
        """No TMA copy, and what is read: ``by_head``'s view of the pages."""
        return None, pages

    @cute.jit
    def places(self, mPageTable: cute.Tensor, batch: Int32, keys: Int32, warp: Int32, n: Int32):
        """The pages of this warp's rows of tile n, one a lane; that of the last key beyond it."""
        key = n * self.tile_n + warp * self.rows + cute.arch.lane_idx() * self.page_size
        return Int32(mPageTable[batch, cutlass.min(key, keys - 1) // self.page_size])

    def loader(self, copy: tuple, width: int, stages: int, head: Int32, keys: Int32, warp: Int32):
        """A function (n, places, stage, barrier) that starts the copies of this warp's rows.

        Every thread arrives at the barrier once its copies are done.
        """
        _, pages, sX = copy
        return partial(self.copy, pages, sX, width, head, keys, warp)

    @cute.jit
    def copy(
        self,
        pages: cute.Tensor,
        sX: cute.Tensor,
        width: cutlass.Constexpr[int],
        head: Int32,
        keys: Int32,
        warp: Int32,
        n: Int32,
        places: Int32,
        stage: Int32,
        barrier,
    ):
        head_dim, heads, num_pages = (pages.shape[i] for i in (2, 3, 4))
        chunks, atom = width // 8, swizzle_width(sX.element_type, width)
        row_bytes = Int64(heads) * (2 * head_dim)
        origin = pages.iterator.toint() + Int64(head) * (2 * head_dim)
        linear = cute.recast_ptr(sX.iterator, swizzle_=cute.make_swizzle(0, 4, 3), dtype=Int64)
        target = linear.toint() + stage * (2 * self.tile_n * width)
        first = warp * self.rows
        # Rows of this warp that are keys.
        valid = keys - n * self.tile_n - first
        places = places if (places >= 0) & (places < num_pages) else Int32(-1)
        # As many lanes share a row as divide its lines of 16 bytes.
        lanes = math.gcd(chunks, 32)
        rows_at_once = 32 // lanes
        own_row, own_chunk = cute.arch.lane_idx() // lanes, cute.arch.lane_idx() % lanes
        steps = -(-self.rows // rows_at_once)
        fills_steps = const_expr(self.rows % rows_at_once == 0)
        for i in cutlass.range(steps, unroll=min(steps, 4 if lanes == chunks else 2)):
            row = i * rows_at_once + own_row
            page = cute.arch.shuffle_sync(places, row // self.page_size)
            is_key = (page >= 0) & (row < valid)
            number = Int64(page) * self.page_size + row % self.page_size
            source = origin + number * row_bytes
            source = source if is_key else origin
            for c in cutlass.range_constexpr(0, chunks, lanes):
                chunk = c + own_chunk
                is_read = is_key
                if const_expr(head_dim < width):
                    is_read = is_key & (chunk < head_dim // 8)
                offset = (chunk * 8 // atom * self.tile_n + first + row) * (2 * atom)
                offset += chunk * 16 % (2 * atom)
                offset ^= (offset // 128 % (atom // 8)) * 16
                size = Int32(16) if is_read else Int32(0)
                line = (target + offset, source + chunk * 16, size)
                if const_expr(fills_steps):
                    copy_line(*line)
                else:
                    if row < self.rows:
                        copy_line(*line)
        cute.arch.cp_async_mbarrier_arrive_noinc(barrier)


def copy_line(target: Int32, source: Int64, size: Int32) -> None:
    """Starts a copy of ``size`` bytes to 16 in shared memory; the rest become zeros."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};",
        read_only_args=[target, source, size],
    )
