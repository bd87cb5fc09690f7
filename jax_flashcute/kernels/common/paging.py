"""Key tiles whose rows lie in pages: the boxes that a tile is made of, and the page of each."""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from jax_flashcute.kernels.common.tiles import slab_tma_layout, tma_partition


class PagedTiles:
    """Tiles of ``tile_n`` keys in pages of ``page_size``; each box of a tile lies in one page.

    Only table entries of keys below the length are read.  A page whose number is out of range
    reads as zeros.
    """

    def __init__(self, page_size: int, tile_n: int):
        self.page_size = page_size
        self.tile_n = tile_n
        self.box = math.gcd(page_size, tile_n)
        self.boxes = tile_n // self.box

    def tma_atom(self, dtype, pages: cute.Tensor, width: int):
        """The copy of a box from ``by_head``'s view of the pages, and what it reads."""
        layout = slab_tma_layout(dtype, self.tile_n, width, 1, self.box)
        load = cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(load, pages, layout, (1, self.box, width))

    def partition(self, copy: tuple, width: int, stages: int, head: Int32):
        """Shared and global boxes as the copy takes them: (copy, box, stage), (copy, box, page)."""
        atom, gX, sX = copy
        slab = slab_tma_layout(sX.element_type, self.tile_n, width, 1, self.box)
        row = slab.outer.stride[1]
        boxes = cute.make_layout((self.boxes, stages), stride=(self.box * row, self.tile_n * width))
        sX_boxes = cute.make_tensor(sX.iterator, cute.append(slab.outer, boxes))
        gX_boxes = cute.local_tile(
            gX[None, None, None, head, None], (1, self.box, width), (0, None, 0, None)
        )
        return tma_partition(atom, sX_boxes, cute.group_modes(gX_boxes, 3, 5))

    @cute.jit
    def pages(self, mPageTable: cute.Tensor, batch: Int32, keys: Int32, n: Int32) -> Int32:
        """The page of each box of tile n, box i in lane i; one warp.

        A box beyond the length has the page of the last key: its rows are hidden or cleared.
        """
        box = cutlass.min(cute.arch.lane_idx(), Int32(self.boxes - 1))
        key = cutlass.min(n * self.tile_n + box * self.box, keys - 1)
        return Int32(mPageTable[batch, key // self.page_size])

    @cute.jit
    def copy(
        self, atom: cute.CopyAtom, source, target, n: Int32, pages: Int32, stage: Int32, barrier
    ):
        """Starts the copies of tile n into a stage; ``source`` and ``target`` of ``partition``."""
        for i in cutlass.range(self.boxes, unroll=min(self.boxes, 4)):
            page = cute.arch.shuffle_sync(pages, i)
            row = (n * self.tile_n + i * self.box) % self.page_size
            cute.copy(
                atom,
                source[None, (row // self.box, page)],
                target[None, (i, stage)],
                tma_bar_ptr=barrier,
            )
