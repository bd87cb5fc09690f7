"""A bias over queries and keys in shared memory, in the Hopper forward.

Its tiles come by TMA, as K's do, ahead of the product that they are added to: one warp beside the
producer loads those of each warpgroup's rows, at that warpgroup's pace.

A thread reads two adjacent columns at once, its own, from rows whose swizzle is that of a matrix
product's operand.
"""

from collections.abc import Iterator

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int16, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from jax_flashcute.kernels.common.numbers import float_of
from jax_flashcute.kernels.common.pipeline import TmaPipeline
from jax_flashcute.kernels.common.tiles import (
    smem_layout,
    swizzle_bits,
    swizzle_width,
    tma_partition,
)
from jax_flashcute.kernels.common.traced import Traced
from jax_flashcute.kernels.config.sm90 import FwdConfig
from jax_flashcute.kernels.elements import ElementArray
from jax_flashcute.kernels.lowering.values import aligned_elements
from jax_flashcute.kernels.sm90.fragments import (
    ROWS_PER_THREAD,
    column_step,
    first_column,
    row_in_slab,
)

ROWS = 64
"""Of a slab."""


class StagedBias:
    """How tiles of a (1|B, 1|N, T, S) bias are staged; no traced values."""

    def __init__(self, array: ElementArray, config: FwdConfig):
        self.array = array
        self.config = config
        # Heads that blocks of a cluster work on have one bias: each block loads a part for all.
        self.blocks = 1 if "n" in array.full else config.cluster

    @property
    def barriers(self) -> int:
        """Words of 64 bits for those of all warpgroups."""
        return 2 * self.config.warpgroups

    def layout(self, dtype):
        """A tile of each warpgroup in shared memory, (rows, keys, warpgroup)."""
        return smem_layout(dtype, ROWS, self.config.tile_n, self.config.warpgroups)

    def source(self, bias: cute.Tensor):
        """The TMA copy of a slab's rows of a tile, and what it reads: (T, S, 1|N, 1|B)."""
        batch, heads, rows, keys = (bias.shape[axis] for axis in range(4))
        row = Int64(keys)
        view = cute.make_layout(
            (rows, keys, heads, batch), stride=(row, 1, row * rows, row * rows * heads)
        )
        load = cpasync.CopyBulkTensorTileG2SOp()
        if self.blocks > 1:
            load = cpasync.CopyBulkTensorTileG2SMulticastOp()
        return cpasync.make_tiled_tma_atom(
            load,
            cute.make_tensor(bias.iterator, view),
            smem_layout(bias.element_type, ROWS, self.config.tile_n),
            (ROWS, self.config.tile_n),
            self.blocks,
        )

    def allocate(self, allocator: SmemAllocator, dtype) -> cute.Tensor:
        layout = self.layout(dtype)
        return allocator.allocate_tensor(dtype, layout.outer, 1024, swizzle=layout.inner)

    def pipeline(self, barriers: cute.Pointer, dtype, slab: Int32 | int) -> TmaPipeline:
        """Of a warpgroup's tile, its one stage; ``barriers``: pointer to those of all."""
        tile_bytes = ROWS * self.config.tile_n * dtype.width // 8
        return TmaPipeline("bias", barriers + 2 * slab, 1, tile_bytes, 4, blocks=self.blocks)

    def loader(self, copy: tuple, place: tuple, slab: Int32):
        """A function (n, barrier) that starts the copy of a warpgroup's part of tile n.

        Args:
          copy: of ``source``, and the tensor of ``allocate``.
          place: the tile of query rows, the head and the batch entry.
        """
        atom, gB, sB = copy
        m_block, head, batch = place
        head = head if "n" in self.array.full else 0
        batch = batch if "b" in self.array.full else 0
        tiles = cute.local_tile(
            gB[None, None, head, batch],
            (ROWS, self.config.tile_n),
            (m_block * self.config.warpgroups + slab, None),
        )
        rank, to_all = 0, {}
        if self.blocks > 1:
            rank = cute.arch.block_idx_in_cluster()
            to_all = {"mcast_mask": Int16(2**self.blocks - 1)}
        target, source = tma_partition(atom, sB, tiles, rank, self.blocks)

        def load(n: Int32, barrier) -> None:
            cute.copy(atom, source[None, n], target[None, slab], tma_bar_ptr=barrier, **to_all)

        return load


class BiasTile(Traced):
    """What a thread reads of its warpgroup's tiles: its own columns, two adjacent ones at once."""

    def __init__(self, plan: StagedBias, tiles: tuple, slab: Int32, thread: Int32):
        """``tiles``: of ``StagedBias.allocate``, and the pointer to all barriers."""
        sB, barriers = tiles
        dtype = sB.element_type
        self.tile_n = plan.config.tile_n
        self.pipeline = plan.pipeline(barriers, dtype, slab)
        itemsize = dtype.width // 8
        self.atom = atom = swizzle_width(dtype, self.tile_n)
        start = cute.recast_ptr(sB.iterator, swizzle_=cute.make_swizzle(0, 4, 3), dtype=dtype)
        self.start = start + slab * (ROWS * self.tile_n)
        # Rows of a thread are 8 apart, which the swizzle does not tell from each other.
        row = row_in_slab(thread, 0)
        flipped = swizzle_bits(row, atom * itemsize // 2) // itemsize
        self.places = [
            row * atom + ((first_column(thread) + i) ^ flipped) for i in range(0, atom, 8)
        ]

    def wait(self, phase: Int32) -> None:
        """Waits for a tile; ``phase``: 0 for the first, and every other one."""
        self.pipeline.wait(Int32(0), phase)

    def release(self) -> None:
        """Gives the tile back, once all of it is read."""
        self.pipeline.release(Int32(0), 4, lanes_read=True)

    def columns(self) -> Iterator[list[Float32]]:
        """Of each of the thread's columns, in order, the numbers of its rows."""
        atom = self.atom
        for c in range(0, self.tile_n // 4, 2):
            column = column_step(c)
            place = self.start + (self.places[column % atom // 8] + column // atom * (ROWS * atom))
            pairs = [_pair(place + 8 * r * atom) for r in range(ROWS_PER_THREAD)]
            yield from map(list, zip(*pairs, strict=True))


def _pair(place: cute.Pointer) -> list[Float32]:
    """Two adjacent numbers, from shared memory."""
    if place.dtype != BFloat16:
        return [Float32(element) for element in aligned_elements(place, 2)]
    (pair,) = aligned_elements(cute.recast_ptr(place, dtype=Uint32), 1)
    # The upper halves of their float32: one operation each, where a conversion takes two.
    return [float_of(pair << Uint32(16)), float_of(pair & Uint32(0xFFFF0000))]
