"""Key tiles in global memory, dense or in pages: where a tile's parts are, how they are copied.

Table entries of keys beyond the length are not read, and a page whose number is out of range reads
as zeros.
"""

import math
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int16, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync

from jax_flashcute.kernels.common.pipeline import TmaPipeline
from jax_flashcute.kernels.common.tiles import (
    clear_rows,
    slab_tma_layout,
    smem_layout,
    swizzle_bits,
    swizzle_width,
    tma_partition,
)
from jax_flashcute.kernels.config.pages import loads_pages_by_tma

COPYING_WARPS = 2
"""That copy K on Hopper, and as many others that copy V."""


def tiles_in_pages(
    page_size: int | None,
    tile_n: int,
    copying_warps: int = COPYING_WARPS,
    boxes_at_once: int = 4,
    cluster: int = 1,
    columns_first: bool = False,
    shares_boxes: bool = False,
    read_once: bool = False,
) -> "DenseTiles | BoxedTiles | SharedBoxes | CopiedTiles":
    """How tiles of ``tile_n`` keys are loaded from pages of ``page_size``; None: from no pages.

    ``copying_warps``: that copy K, and as many V; ``boxes_at_once``: how far the loop over a tile's
    boxes is unrolled, which takes registers; ``cluster``: blocks that load the same tiles, each a
    part for all, from no pages; ``columns_first``: tiles may be a ``smem_layout`` with
    ``columns_first``, and are where the method of that name says so; ``shares_boxes``: boxes too
    many for one warp are issued by as many as would copy; ``read_once``: L2 need not keep what a
    block has read for another.
    """
    if page_size is None:
        tiles = DenseTiles(tile_n, cluster)
    elif loads_pages_by_tma(page_size):
        tiles = BoxedTiles(page_size, tile_n, boxes_at_once, columns_first)
    elif shares_boxes:
        tiles = SharedBoxes(page_size, tile_n, copying_warps)
    else:
        tiles = CopiedTiles(page_size, tile_n, copying_warps)
    tiles.read_once = read_once
    return tiles


def begin_stage(pipeline: TmaPipeline, tiles, load, n: Int32, place, stage: Int32) -> None:
    """Starts the copies of key tile n, by what ``loader`` gave, into an empty stage."""
    if tiles.threads_copy:
        load(n, place, stage)
        pipeline.commit_copies(stage)
    else:
        pipeline.expect(stage)
        load(n, place, stage, pipeline.full + stage)


@cute.jit
def begin_values(
    pipeline: TmaPipeline,
    tiles: cutlass.Constexpr,
    load: cutlass.Constexpr,
    n: Int32,
    place,
    stage: Int32,
    values,
    keys: Int32,
    tail,
    has_lengths: cutlass.Constexpr[bool],
    has_lists: cutlass.Constexpr[bool],
    columns_first: cutlass.Constexpr[bool] = False,
    warp: Int32 | int = 0,
) -> Int32:
    """``begin_stage`` of V, and what lies beyond the length cleared: it may be NaN, and 0 * NaN is.

    Args:
      values: shared memory of V and its width.
      tail: a barrier of its own for the copies of such a tile, and its phase.
      has_lengths: the length may end within a tile.
      has_lists: tiles may lie beyond the length altogether.
      columns_first: of their ``smem_layout``.
      warp: which of those that each bring an equal part of the rows.

    Returns:
      The next phase of ``tail``.
    """
    sV, width = values
    tail_barrier, tail_phase = tail
    is_tail = Boolean(False)
    if const_expr(has_lengths):
        is_tail = (n + 1) * tiles.tile_n > keys
    if is_tail:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(tail_barrier, pipeline.tx_bytes)
        load(n, place, stage, tail_barrier)
        cute.arch.mbarrier_wait(tail_barrier, tail_phase)
        inside = keys - n * tiles.tile_n
        if const_expr(has_lists):
            inside = cutlass.max(inside, Int32(0))
        end = None
        if const_expr(tiles.copying_warps > 0):
            rows = tiles.tile_n // tiles.copying_warps
            inside, end = cutlass.max(inside, warp * rows), warp * rows + rows
        clear_rows(sV, width, stage, inside, columns_first, end)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        pipeline.commit(stage)
        tail_phase ^= 1
    else:
        begin_stage(pipeline, tiles, load, n, place, stage)
    return tail_phase


@cute.jit
def follow_tiles(
    take: cutlass.Constexpr,
    loader: cutlass.Constexpr,
    heads_per_kv: cutlass.Constexpr[int],
    key_order: cutlass.Constexpr,
    tiles: cutlass.Constexpr,
    pipelines,
    values: cutlass.Constexpr = None,
):
    """A warp beside the one that draws tiles of work, which loads its rows of K or V of each.

    Args:
      take: gives the fields of a tile of work for (stage, phase).
      loader: gives for (kv_head, batch, keys) where a key tile lies and what copies it.
      heads_per_kv: heads of a tile's fields that a key/value head serves.
      key_order: ``KeyTiles.key_order`` of a tile's fields.
      tiles: the ``CopiedTiles`` or ``SharedBoxes``.
      pipelines: of K or V, and of tiles of work.
      values: of V by TMA, what ``begin_values`` takes: its shared memory and width, a barrier of
        this warp's own, and which warp it is.
    """
    pipeline, pipeline_tile = pipelines
    stage, phase, t_stage, t_phase, tail_phase = (Int32(0) for _ in range(5))
    fields = take(t_stage, t_phase)
    while fields[0] >= 0:
        t_stage, t_phase = pipeline_tile.advance(t_stage, t_phase)
        head, batch, keys = (fields[i] for i in (1, 2, 5))
        visits, nth = key_order(fields)
        locate, load = loader(head // heads_per_kv, batch, keys)
        place = tiles.nowhere
        if visits > 0:
            place = locate(nth(0))
        for i in cutlass.range(visits, unroll=1):
            following = locate(nth(cutlass.min(i + 1, visits - 1)))
            pipeline.acquire(stage, phase)
            if const_expr(values is None):
                begin_stage(pipeline, tiles, load, nth(i), place, stage)
            else:
                sV, width, tail_barrier, warp = values
                tail_phase = begin_values(
                    *(pipeline, tiles, load, nth(i), place, stage, (sV, width), keys),
                    (tail_barrier, tail_phase),
                    *(True, False),
                    warp=warp,
                )
            place = following
            stage, phase = pipeline.advance(stage, phase)
        fields = take(t_stage, t_phase)


def evict_first() -> Int64:
    """The cache policy of what L2 shall give up before anything else."""
    return cute.arch.inline_ptx(
        "createpolicy.fractional.L2::evict_first.b64 {$w0}, 1.0;", write_only_types=[Int64]
    )


class TilesInMemory:
    """Base: tiles of K or V in global memory."""

    read_once = False

    def cache_policy(self) -> dict[str, Int64]:
        """How L2 keeps what is copied by TMA, as ``cute.copy`` takes it."""
        return {"cache_policy": evict_first()} if self.read_once else {}


class OneWarpTiles(TilesInMemory):
    """Tiles that one warp loads by TMA."""

    copying_warps = 0
    threads_copy = False
    nowhere = 0

    def columns_first(self, dtype, head_dim: int, width: int) -> bool:
        """Whether tiles are laid out such that a box of all columns is one copy."""
        return False


class DenseTiles(OneWarpTiles):
    """Tiles of arrays (B, S, K, H), each copied at once by TMA.

    Where the blocks of a cluster visit the same tiles, each copies a part of a tile to all of them.
    """

    def __init__(self, tile_n: int, cluster: int):
        self.tile_n = tile_n
        self.cluster = cluster

    def source(self, dtype, x: cute.Tensor, width: int):
        """The copy of a tile from ``by_head``'s view of an array, and what it reads."""
        load = cpasync.CopyBulkTensorTileG2SOp()
        if self.cluster > 1:
            load = cpasync.CopyBulkTensorTileG2SMulticastOp()
        return cpasync.make_tiled_tma_atom(
            load,
            x[0, None, None, None, None],
            smem_layout(dtype, self.tile_n, width),
            (self.tile_n, width),
            self.cluster,
        )

    def places(self, mPageTable: None, batch: Int32, keys: Int32, warp: Int32, n: Int32):
        """What ``loader``'s function needs to know of tile n: nothing."""
        return Int32(0)

    def loader(
        self,
        copy: tuple,
        width: int,
        stages: int,
        head: Int32,
        batch: Int32,
        keys: Int32,
        warp: Int32,
    ):
        """A function (n, places, stage, barrier) that starts the copy of tile n."""
        atom, gX, sX = copy
        tiles = cute.local_tile(gX[None, None, head, batch], (self.tile_n, width), (None, 0))
        rank, to_all = 0, {}
        if self.cluster > 1:
            rank = cute.arch.block_idx_in_cluster()
            to_all = {"mcast_mask": Int16(2**self.cluster - 1)}
        target, source = tma_partition(atom, sX, tiles, rank, self.cluster)

        def load(n: Int32, places: Int32, stage: Int32, barrier) -> None:
            how = {"tma_bar_ptr": barrier, **to_all, **self.cache_policy()}
            cute.copy(atom, source[None, n], target[None, stage], **how)

        return load


class BoxedTiles(OneWarpTiles):
    """Tiles copied by TMA, in boxes of rows of one page; one warp issues them all."""

    def __init__(
        self, page_size: int, tile_n: int, boxes_at_once: int, columns_first: bool = False
    ):
        self.page_size = page_size
        self.tile_n = tile_n
        self.boxes_at_once = boxes_at_once
        self.box = math.gcd(page_size, tile_n)
        self.boxes = tile_n // self.box
        self.may_be_columns_first = columns_first

    def columns_first(self, dtype, head_dim: int, width: int) -> bool:
        is_whole = head_dim % swizzle_width(dtype, width) == 0
        return self.may_be_columns_first and is_whole

    def box_layout(self, dtype, width: int):
        """A box of a tile whose atoms follow each other along the columns, as (rows, columns)."""
        atom = swizzle_width(dtype, width)
        return cute.make_composed_layout(
            smem_layout(dtype, self.tile_n, width).inner,
            0,
            cute.make_layout(
                ((8, self.box // 8), (atom, width // atom)),
                stride=((atom, 8 * width), (1, 8 * atom)),
            ),
        )

    def source(self, dtype, pages: cute.Tensor, width: int):
        """The copy of a box from ``by_head``'s view of the pages, and what it reads."""
        load = cpasync.CopyBulkTensorTileG2SOp()
        head_dim, heads, num_pages = (pages.shape[i] for i in (2, 3, 4))
        if not self.columns_first(dtype, head_dim, width):
            layout = slab_tma_layout(dtype, self.tile_n, width, 1, self.box)
            return cpasync.make_tiled_tma_atom(load, pages, layout, (1, self.box, width))
        # Five dimensions in the order of shared memory: an atom's columns and rows, atoms along the
        # columns of all heads, atoms along the rows, pages.
        atom, row = swizzle_width(dtype, width), pages.stride[1]
        view = cute.make_layout(
            ((8, self.page_size // 8), (atom, head_dim // atom * heads), num_pages),
            stride=((row, 8 * row), (1, atom), pages.stride[4]),
        )
        view = cute.make_tensor(pages.iterator, view)
        return cpasync.make_tiled_tma_atom(
            load, view, self.box_layout(dtype, width), (self.box, width)
        )

    @cute.jit
    def places(self, mPageTable: cute.Tensor, batch: Int32, keys: Int32, warp: Int32, n: Int32):
        """The page of each box of tile n, box i in lane i; one warp.

        It comes from memory: to be asked for before the wait for an empty stage.
        A box beyond the length has the page of the last key: its rows are hidden or cleared.
        """
        box = cutlass.min(cute.arch.lane_idx(), Int32(self.boxes - 1))
        key = cutlass.min(n * self.tile_n + box * self.box, keys - 1)
        return Int32(mPageTable[batch, key // self.page_size])

    def loader(
        self,
        copy: tuple,
        width: int,
        stages: int,
        head: Int32,
        batch: Int32,
        keys: Int32,
        warp: Int32,
    ):
        """A function (n, places, stage, barrier) that starts the copies of tile n."""
        atom, gX, sX = copy
        ring = (self.boxes, stages)
        if const_expr(cute.rank(gX) == 3):
            boxes = cute.make_layout(ring, stride=(self.box * width, self.tile_n * width))
            layout = self.box_layout(sX.element_type, width).outer
            gX_boxes = cute.local_tile(gX, (self.box, width), (None, head, None))
        else:
            layout = slab_tma_layout(sX.element_type, self.tile_n, width, 1, self.box).outer
            stride = (self.box * layout.stride[1], self.tile_n * width)
            boxes = cute.make_layout(ring, stride=stride)
            gX_boxes = cute.local_tile(
                gX[None, None, None, head, None], (1, self.box, width), (0, None, 0, None)
            )
        sX_boxes = cute.make_tensor(sX.iterator, cute.append(layout, boxes))
        last = cute.rank(gX_boxes)
        target, source = tma_partition(atom, sX_boxes, cute.group_modes(gX_boxes, last - 2, last))
        return partial(self.copy, atom, source, target)

    @cute.jit
    def copy(
        self, atom: cute.CopyAtom, source, target, n: Int32, places: Int32, stage: Int32, barrier
    ):
        for i in cutlass.range(self.boxes, unroll=min(self.boxes, self.boxes_at_once)):
            page = cute.arch.shuffle_sync(places, i)
            row = (n * self.tile_n + i * self.box) % self.page_size
            cute.copy(
                atom,
                source[None, (row // self.box, page)],
                target[None, (i, stage)],
                tma_bar_ptr=barrier,
                **self.cache_policy(),
            )


class PartsOfTiles(TilesInMemory):
    """Tiles of which several warps load an equal part of the rows each, ``unit`` rows at a time.

    A lane looks up the page of a unit, and of that 32 further, and so on.
    """

    def __init__(self, page_size: int, tile_n: int, warps: int, unit: int):
        self.page_size = page_size
        self.tile_n = tile_n
        self.copying_warps = warps
        self.unit = unit
        self.units = tile_n // warps // unit

    def columns_first(self, dtype, head_dim: int, width: int) -> bool:
        return False

    @property
    def nowhere(self) -> tuple:
        return (0,) * -(-self.units // 32)

    @cute.jit
    def places(self, mPageTable: cute.Tensor, batch: Int32, keys: Int32, warp: Int32, n: Int32):
        """The pages of this warp's units of tile n, one a lane; a number for each 32 units.

        That of the last key beyond the length: its rows are hidden or cleared.
        """
        first = n * (self.tile_n // self.unit) + warp * self.units + cute.arch.lane_idx()
        last = (keys - 1) // self.unit
        held = [cutlass.min(first + i, last) for i in range(0, self.units, 32)]
        units = self.page_size // self.unit
        return tuple([Int32(mPageTable[batch, place // units]) for place in held])


class SharedBoxes(PartsOfTiles):
    """Tiles of pages smaller than an atom of the swizzle, copied by TMA from several warps.

    Each warp issues those of an equal part of the rows: an atom's columns of a page at once.
    """

    threads_copy = False
    # Pages whose copies are unrolled together: nine instructions each, with four pages ten.
    at_once = 8

    def __init__(self, page_size: int, tile_n: int, warps: int):
        super().__init__(page_size, tile_n, warps, page_size)
        if tile_n % (warps * page_size):
            raise ValueError(f"{tile_n} keys are not {warps} equal parts of pages of {page_size}")

    def source(self, dtype, pages: cute.Tensor, width: int):
        """The copy of an atom's columns of a page, and what it reads: (rows, columns, pages).

        The columns are those of all heads.
        """
        head_dim, heads, num_pages = (pages.shape[i] for i in (2, 3, 4))
        columns = swizzle_width(dtype, width)
        view = cute.make_layout(
            (self.page_size, head_dim * heads, num_pages),
            stride=(pages.stride[1], 1, pages.stride[4]),
        )
        layout = cute.make_composed_layout(
            smem_layout(dtype, self.tile_n, width).inner,
            0,
            cute.make_layout((self.page_size, columns), stride=(columns, 1)),
        )
        return cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(pages.iterator, view),
            layout,
            (self.page_size, columns),
        )

    def loader(
        self,
        copy: tuple,
        width: int,
        stages: int,
        head: Int32,
        batch: Int32,
        keys: Int32,
        warp: Int32,
    ):
        """A function (n, places, stage, barrier) that starts the copies of this warp's rows."""
        atom, gX, sX = copy
        rows, columns = self.page_size, swizzle_width(sX.element_type, width)
        parts = width // columns
        shape = (rows, columns, (self.tile_n // rows, parts, stages))
        stride = (columns, 1, (rows * columns, self.tile_n * columns, self.tile_n * width))
        sX_boxes = cute.make_tensor(sX.iterator, cute.make_layout(shape, stride=stride))
        gX_boxes = cute.local_tile(gX, (rows, columns), (0, None, None))
        target, source = tma_partition(atom, sX_boxes, cute.group_modes(gX_boxes, 2, 4))
        return partial(self.copy, atom, source, target, (head * parts, parts), warp * self.units)

    @cute.jit
    def copy(
        self,
        atom: cute.CopyAtom,
        source,
        target,
        columns: tuple,
        first: Int32,
        n: Int32,
        places: tuple,
        stage: Int32,
        barrier,
    ):
        """``columns``: the head's first part and how many it has; ``first``: page of the tile."""
        first_part, parts = columns
        for held in cutlass.range_constexpr(len(places)):
            pages = min(32, self.units - 32 * held)
            for i in cutlass.range(pages, unroll=min(pages, self.at_once)):
                page = cute.arch.shuffle_sync(places[held], i)
                for part in cutlass.range_constexpr(parts):
                    cute.copy(
                        atom,
                        source[None, (first_part + part, page)],
                        target[None, (first + 32 * held + i, part, stage)],
                        tma_bar_ptr=barrier,
                        **self.cache_policy(),
                    )


class CopiedTiles(PartsOfTiles):
    """Tiles that some warps copy, each an equal part of the rows, 16 bytes at a time.

    Of each 32 rows of a warp a lane looks up one; the lanes that copy a row ask it.  Rows beyond
    the length become zeros.
    """

    threads_copy = True

    def __init__(self, page_size: int, tile_n: int, warps: int):
        super().__init__(page_size, tile_n, warps, 1)
        if tile_n % (4 * warps):
            raise ValueError(f"{tile_n} keys are not {warps} equal parts in fours")

    def source(self, dtype, pages: cute.Tensor, width: int):
        """No TMA copy, and what is read: ``by_head``'s view of the pages."""
        return None, pages

    def loader(
        self,
        copy: tuple,
        width: int,
        stages: int,
        head: Int32,
        batch: Int32,
        keys: Int32,
        warp: Int32,
    ):
        """A function (n, places, stage) that starts the copies of this warp's rows."""
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
        places: tuple,
        stage: Int32,
    ):
        head_dim, heads, num_pages = (pages.shape[i] for i in (2, 3, 4))
        chunks, atom = width // 8, swizzle_width(sX.element_type, width)
        # As many lanes share a row as divide its lines of 16 bytes.
        lanes = math.gcd(chunks, 32)
        rows_at_once = 32 // lanes
        own_row, own_chunk = cute.arch.lane_idx() // lanes, cute.arch.lane_idx() % lanes
        # The row whose place a lane tells the others: that of step i is the i-th of those who ask.
        row_told = own_chunk * rows_at_once + own_row
        row_bytes = Int64(Int32(heads) * (2 * head_dim))
        origin = pages.iterator.toint() + Int64(head) * (2 * head_dim) + own_chunk * 16
        linear = cute.recast_ptr(sX.iterator, swizzle_=cute.make_swizzle(0, 4, 3), dtype=Int64)
        first = warp * self.units
        line = (own_chunk * 8 // atom * self.tile_n + first + own_row) * (2 * atom)
        line += own_chunk * 16 % (2 * atom)
        line ^= swizzle_bits(first + own_row, atom)
        line += linear.toint() + stage * (2 * self.tile_n * width)
        for held in cutlass.range_constexpr(len(places)):
            # Of this warp's rows, those whose pages one number of each lane names.
            begin = 32 * held
            rows = min(32, self.units - begin)
            key = n * self.tile_n + first + begin + row_told
            page = cute.arch.shuffle_sync(places[held], row_told)
            is_key = (key < keys) & (page >= 0) & (page < num_pages)
            number = page * self.page_size + key % self.page_size
            number = number if is_key else Int32(0)
            copy_step = partial(
                self.copy_step, (head_dim, width, atom), rows, line + begin * (2 * atom), origin,
                row_bytes, number,
            )  # fmt: skip
            steps = -(-rows // rows_at_once)
            if cute.arch.vote_all_sync(is_key):
                for i in cutlass.range_constexpr(steps):
                    copy_step(i, None)
            else:
                read = Uint32(cute.arch.vote_ballot_sync(is_key)) >> Uint32(own_row * lanes)
                for i in cutlass.range(steps, unroll=1):
                    copy_step(i, (read >> Uint32(i)) & Uint32(1) == Uint32(1))

    @cute.jit
    def copy_step(
        self,
        columns: cutlass.Constexpr[tuple],
        rows: cutlass.Constexpr[int],
        line: Int32,
        origin: Int64,
        row_bytes: Int64,
        number: Int32,
        i,
        is_read: Boolean | None,
    ):
        """Copies the i-th row of each group of lanes.

        Args:
          columns: head_dim, columns in shared memory and of an atom of its swizzle.
          rows: how many there are.
          line: address in shared memory of the lane's line of the first row.
          origin: address of the lane's line in row 0 of the pages.
          row_bytes: from one row of the pages to the next.
          number: of the row in the pages that the lane tells the others.
          i: which step.
          is_read: whether the row is a key's and not zeros; None: it is.
        """
        head_dim, width, atom = columns
        lanes = math.gcd(width // 8, 32)
        own_row, own_chunk = cute.arch.lane_idx() // lanes, cute.arch.lane_idx() % lanes
        row = i * (32 // lanes)
        told = cute.arch.shuffle_sync(number, i, mask_and_clamp=((32 - lanes) << 8) | 31)
        source = origin + Int64(told) * row_bytes
        # Bits of a sum, none of which carries: a warp's rows begin at a multiple of 4.
        target = (line ^ swizzle_bits(row, atom)) + row * (2 * atom)
        for c in cutlass.range_constexpr(0, width // 8, lanes):
            is_line = is_read
            if const_expr(head_dim < width):
                is_column = c + own_chunk < head_dim // 8
                is_line = is_column if is_read is None else is_read & is_column
            size = None
            if const_expr(is_line is not None):
                size = Int32(16) if is_line else Int32(0)
            copied = (target + c * 8 // atom * self.tile_n * (2 * atom), source + c * 16, size)
            if const_expr(rows % (32 // lanes) == 0):
                copy_line(*copied, self.read_once)
            else:
                if row + own_row < rows:
                    copy_line(*copied, self.read_once)


def copy_line(target: Int32, source: Int64, size: Int32 | None, read_once: bool) -> None:
    """Starts a copy of ``size`` bytes to 16 in shared memory, or of all; the rest become zeros."""
    kind, operands = "cp.async.cg.shared.global", "[{$r0}], [{$r1}], 16"
    given = [target, source]
    if size is not None:
        operands += ", {$r2}"
        given.append(size)
    if read_once:
        kind += ".L2::cache_hint"
        operands += f", {{$r{len(given)}}}"
        given.append(evict_first())
    cute.arch.inline_ptx(f"{kind} {operands};", read_only_args=given)
