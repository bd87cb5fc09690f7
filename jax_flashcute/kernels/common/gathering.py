"""Keys and values in pages, gathered into arrays beside the products that read them.

Each page is copied once for all tiles of queries that visit it.  Idle warps of every block copy
units of ``UNIT_KEYS`` keys of one key/value head, in the order in which tiles of work come to them,
and count what is done; who loads a key tile waits until all of its units are there.  No warp that
copies waits for another one, so this ends however few blocks run at a time.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr

from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.scheduler import TileOrder
from jax_flashcute.kernels.common.traced import Traced
from jax_flashcute.kernels.config.pages import UNIT_KEYS


class Gathering(Traced):
    """The pages, the arrays that they are gathered into, and how far that is.

    ``counts`` holds, one after the other, how many units were drawn, how many of each head of each
    batch entry are done, and how many of each of their key tiles; see
    ``config.pages.gathered_shapes``.
    """

    def __init__(
        self,
        pages: tuple[cute.Tensor, ...],
        arrays: tuple[cute.Tensor, ...],
        counts: cute.Tensor,
        mPageTable: cute.Tensor,
        page_size: int,
        widths: tuple[int, int],
        tile_n: int,
        section: Int32,
        loads_at_once: int,
    ):
        """``pages``: (num_pages, page_size, K, width) of K and of V; ``arrays``: (B, S, K, width),
        alike; ``widths``: of K and of V; ``section``: of the ``TileOrder`` of the tiles of work;
        ``loads_at_once``: of 16 bytes a lane, each of which takes four registers."""
        self.pages_k, self.pages_v = pages
        self.array_k, self.array_v = arrays
        self.counts = counts
        self.mPageTable = mPageTable
        self.page_size = page_size
        self.widths = widths
        self.tile_n = tile_n
        self.section = section
        self.loads_at_once = loads_at_once

    def heads(self) -> tuple[Int32, Int32]:
        """Batch entries, and key/value heads of each."""
        return Int32(self.array_k.shape[0]), Int32(self.array_k.shape[2])

    def key_tiles(self) -> Int32:
        return Int32(cute.ceil_div(Int32(self.array_k.shape[1]), self.tile_n))

    def of_head(self, batch: Int32, kv_head: Int32) -> cute.Pointer:
        """How many units of a head are done."""
        return self.counts.iterator + (1 + batch * self.heads()[1] + kv_head)

    def of_tile(self, batch: Int32, kv_head: Int32, n: Int32) -> cute.Pointer:
        """How many units of a key tile are done."""
        entries, kv_heads = self.heads()
        first = 1 + entries * kv_heads
        return self.counts.iterator + (first + (batch * kv_heads + kv_head) * self.key_tiles() + n)

    # ---- who loads tiles ---------------------------------------------------------------------

    @cute.jit
    def first_known(self, batch: Int32, kv_head: Int32) -> Int32:
        """``ready`` of ``wait`` to begin with: 0 where a head is gathered as a whole; one warp."""
        units = self.key_tiles() * (self.tile_n // UNIT_KEYS)
        done = cute.arch.load(self.of_head(batch, kv_head), Int32, sem="acquire", scope="gpu")
        cute.arch.fence_proxy("async.global")
        cute.arch.sync_warp()
        # Lanes that parted before may have read different counts.
        done = cute.arch.shuffle_sync(done, 0)
        return select(done == units, Int32(0), self.key_tiles())

    @cute.jit
    def wait(self, batch: Int32, kv_head: Int32, ready: Int32, n: Int32) -> Int32:
        """Waits until a key tile is gathered; one warp.

        Args:
          ready: tiles from here up to the last one asked for are known to be; they are asked for
            from right to left.
          n: the tile.

        Returns:
          The next ``ready``.
        """
        if n < ready:
            tile = self.of_tile(batch, kv_head, cutlass.max(n - cute.arch.lane_idx(), Int32(0)))
            missing = Uint32(1)
            while missing % 2 == 1:
                done = cute.arch.load(tile, Int32, sem="acquire", scope="gpu")
                is_done = done >= self.tile_n // UNIT_KEYS
                missing = ~Uint32(cute.arch.vote_ballot_sync(is_done))
            # As many tiles as lanes are done before the first that is not.
            ready = n + 1 - Int32(cute.arch.popc((missing & (~missing + 1)) - 1))
            # Units are written through the generic proxy and read by TMA.
            cute.arch.fence_proxy("async.global")
        cute.arch.sync_warp()
        return ready

    # ---- who gathers -------------------------------------------------------------------------

    @cute.jit
    def draw(self) -> Int32:
        """The next unit, in lane 0 alone."""
        unit = Int32(0)
        if cute.arch.lane_idx() == 0:
            unit = Int32(cute.arch.atomic_add(self.counts.iterator, Int32(1)))
        return unit

    @cute.jit
    def gather(self, lengths: cutlass.Constexpr):
        """One warp of several: copies units until all are drawn; ``lengths`` of a batch entry."""
        # The counts are cleared by the kernel before this one.
        cute.arch.griddepcontrol_wait()
        entries, kv_heads = self.heads()
        units_of_tile = self.tile_n // UNIT_KEYS
        order = TileOrder(self.key_tiles() * units_of_tile, kv_heads, entries, 1, self.section)
        unit = cute.arch.shuffle_sync(self.draw(), 0)
        while unit < order.num_tiles:
            nth, _, kv_head, batch = order.coordinates(unit)
            _, _, keys = lengths(batch)
            first = nth * UNIT_KEYS
            if first < keys:
                key = cutlass.min(first + cute.arch.lane_idx() % UNIT_KEYS, keys - 1)
                page = Int32(self.mPageTable[batch, key // self.page_size])
                number = page * self.page_size + key % self.page_size
                is_page = (page >= 0) & (page < Int32(self.pages_k.shape[0]))
                number = number if is_page else Int32(-1)
                place = (batch, kv_head, first, keys)
                self.copy_unit(self.pages_k, self.array_k, self.widths[0], place, number)
                self.copy_unit(self.pages_v, self.array_v, self.widths[1], place, number)
                cute.arch.fence_proxy("async.global")
            following = self.draw()
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                # One fence for both counts publishes what all lanes have written.
                cute.arch.fence_acq_rel_gpu()
                count_unit(self.of_tile(batch, kv_head, nth // units_of_tile))
                count_unit(self.of_head(batch, kv_head))
            unit = cute.arch.shuffle_sync(following, 0)

    @cute.jit
    def copy_unit(
        self,
        pages: cute.Tensor,
        array: cute.Tensor,
        width: cutlass.Constexpr[int],
        place: tuple,
        number: Int32,
    ):
        """Copies the rows of a unit's keys.

        Args:
          pages, array: of K or of V.
          place: batch entry, key/value head, first key and how many keys the entry has.
          number: in lane i, that of the row of key i in the pages; negative for a row of zeros.
        """
        batch, kv_head, first, keys = place
        vectors = width // 8
        row_bytes = Int32(pages.shape[2]) * (2 * width)
        # As many lanes share a row as divide its vectors, but no more rows than a unit has.
        lanes = max(math.gcd(vectors, 32), 32 // UNIT_KEYS)
        rows_at_once = 32 // lanes
        own_row, own_vector = cute.arch.lane_idx() // lanes, cute.arch.lane_idx() % lanes
        column = Int64(kv_head) * (2 * width) + own_vector * 16
        source = pages.iterator.toint() + column
        target = array.iterator.toint() + column
        target += (Int64(batch) * Int64(array.shape[1]) + Int64(first + own_row)) * Int64(row_bytes)
        columns = list(range(0, vectors, lanes))
        steps = UNIT_KEYS // rows_at_once
        most = max(1, self.loads_at_once // len(columns))
        # Both are powers of two.
        together = min(steps, 1 << (most.bit_length() - 1))
        for step in cutlass.range(0, steps, together, unroll=1):
            held = []
            for i in cutlass.range_constexpr(together):
                row = (step + i) * rows_at_once
                told = cute.arch.shuffle_sync(number, row + own_row)
                begin = source + Int64(cutlass.max(told, 0)) * Int64(row_bytes)
                for vector in columns:
                    offset = Int64(vector * 16)
                    if const_expr(vector + lanes > vectors):
                        # Of lanes that share a row, one may have no vector left.
                        left = cutlass.min(vectors - 1 - vector - own_vector, Int32(0))
                        offset = Int64(left * 16) + offset
                    words = load_vector(begin + offset)
                    held.append([select(told >= 0, word, Uint32(0)) for word in words])
            for i in cutlass.range_constexpr(together):
                row = (step + i) * rows_at_once
                for c, vector in enumerate(columns):
                    is_vector = first + row + own_row < keys
                    if const_expr(vector + lanes > vectors):
                        is_vector = is_vector & (vector + own_vector < vectors)
                    if is_vector:
                        store_vector(
                            target + Int64(row * row_bytes) + vector * 16,
                            held[i * len(columns) + c],
                        )


def count_unit(count: cute.Pointer) -> None:
    cute.arch.red(count, Int32(1), op="add", dtype="s32", sem="relaxed", scope="gpu")


def load_vector(address: Int64) -> tuple[Uint32, ...]:
    """16 bytes of global memory, past L1."""
    return cute.arch.inline_ptx(
        "ld.global.L1::no_allocate.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def store_vector(address: Int64, words: list[Uint32]) -> None:
    """Stores 16 bytes to global memory."""
    cute.arch.inline_ptx(
        "st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[address, *words],
    )
