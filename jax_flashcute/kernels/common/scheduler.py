"""Which tile a persistent block works on next: longest first, drawn from one counter.

Tiles are ordered by sections of key/value heads, small enough for the L2 cache; inside a section
the rows of queries with the most keys come first, so the last tiles to be drawn are short and
blocks finish together.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32, const_expr

from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.traced import Traced

L2_BYTES = 16 * 1024 * 1024
"""Keys and values in flight together.  Far less than the L2 (50 MB): it is two partitions, each of
which may hold a copy, and Q and O pass through it too.  Measured; see docs/lab-notebook.md."""


class TileOrder(Traced):
    """Maps a tile's index to (m_block, head, kv_head, batch).

    ``head`` counts query heads, or key/value heads where a group's heads are packed in a tile.
    """

    def __init__(
        self,
        m_blocks: Int32,
        kv_heads: Int32,
        batch: Int32,
        heads_per_kv: int,
        section: Int32,
    ):
        """``heads_per_kv``: query heads a key/value head serves (1 when packed); ``section``:
        key/value heads, over all batch entries, that are worked on together."""
        self.m_blocks = m_blocks
        self.kv_heads = kv_heads
        self.batch = batch
        self.heads_per_kv = heads_per_kv
        self.section = section

    @property
    def num_tiles(self) -> Int32:
        return self.m_blocks * self.kv_heads * self.batch * self.heads_per_kv

    @cute.jit
    def coordinates(self, index: Int32):
        """(m_block, head, kv_head, batch) of a tile index below ``num_tiles``."""
        per_section = self.section * self.heads_per_kv * self.m_blocks
        first = index // per_section * self.section
        within = index - index // per_section * per_section
        width = cutlass.min(self.section, self.kv_heads * self.batch - first) * self.heads_per_kv
        m_block = self.m_blocks - 1 - within // width
        column = within - within // width * width
        entry = first + column // self.heads_per_kv
        batch = entry // self.kv_heads
        kv_head = entry - batch * self.kv_heads
        head = (
            kv_head * self.heads_per_kv + column - column // self.heads_per_kv * self.heads_per_kv
        )
        return m_block, head, kv_head, batch


def section_size(kv_length: Int32, kv_bytes_per_key: int, kv_heads: Int32, batch: Int32) -> Int32:
    """Key/value heads whose keys and values fit in L2 together, at least two.

    With one, the last head's long rows would be drawn when the others are nearly done.
    """
    per_head = cutlass.Int64(kv_length) * kv_bytes_per_key
    fitting = cutlass.Int64(L2_BYTES) // cutlass.max(per_head, cutlass.Int64(1))
    fitting = cutlass.max(fitting, cutlass.Int64(2))
    return cutlass.Int32(cutlass.min(fitting, cutlass.Int64(kv_heads * batch)))


GPCS = 8
"""Graphics processing clusters of an H200, of 16 or 18 multiprocessors each."""


def blocks_apart(num_sms: int) -> int:
    """How many blocks on the next GPC begins, such that such steps come to every block in turn."""
    steps = (step for step in range(1, num_sms + 1) if math.gcd(step, num_sms) == 1)
    return min(steps, key=lambda step: abs(step * GPCS - num_sms))


def blocks_to_spread(num_tiles: Int32, num_sms: int) -> Int32:
    """Blocks for ``spread_tile``: one for each multiprocessor, and some may have no tile; or one
    for each tile where there are so few that the GPU spreads them itself."""
    return select(num_tiles * 2 <= num_sms, num_tiles, Int32(num_sms))


@cute.jit
def spread_tile(num_sms: cutlass.Constexpr[int]) -> Int32:
    """The tile a block begins with, such that tiles that follow each other are on different GPCs.

    Blocks, one a multiprocessor, are placed GPC by GPC, and a GPC does not read as fast as its
    multiprocessors could: 64 of 132 blocks took 41.7 us on four and 37.0 on eight;
    docs/lab-notebook.md.
    """
    block = Int32(cute.arch.block_idx()[0])
    if cute.arch.grid_dim()[0] == num_sms:
        # Tile i is that of block i * blocks_apart(num_sms).
        block = block * pow(blocks_apart(num_sms), -1, num_sms) % num_sms
    return block


CLEARING_THREADS = 256


@cute.jit
def ready_counters(
    counter: cute.Tensor, counts: cute.Tensor | None, blocks: Int32, num_tiles: Int32, stream
) -> Boolean:
    """Launches what sets the tile counter, and ``counts`` if there are any, to 0 ahead of a kernel.

    Nothing if there are none and no block has a tile to draw.  Returns whether it launched.
    """
    launches = Boolean(True)
    if const_expr(counts is not None):
        grid = cute.ceil_div(cute.size(counts), CLEARING_THREADS)
        clear_counts(counter, counts).launch(
            grid=[grid, 1, 1], block=[CLEARING_THREADS, 1, 1], stream=stream
        )
    else:
        launches = blocks < num_tiles
        if launches:
            reset_counter(counter).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream)
    return launches


@cute.kernel
def reset_counter(counter: cute.Tensor):
    """Sets the tile counter to 0 ahead of the kernel that draws from it, which begins at once."""
    cute.arch.griddepcontrol_launch_dependents()
    if cute.arch.thread_idx()[0] == 0:
        counter[0] = Int32(0)


@cute.kernel
def clear_counts(counter: cute.Tensor, counts: cute.Tensor):
    """``reset_counter``, and all ``counts`` at 0: of a ``Gathering``, or of stored parts."""
    cute.arch.griddepcontrol_launch_dependents()
    index = cute.arch.block_idx()[0] * CLEARING_THREADS + cute.arch.thread_idx()[0]
    if index == 0:
        counter[0] = Int32(0)
    if index < cute.size(counts):
        counts[index] = Int32(0)


@cute.jit
def draw_tile(mCounter: cute.Tensor, num_tiles: Int32, tiles: cutlass.Constexpr[int] = 1) -> Int32:
    """The next tile's index, or that of the first of so many, in lane 0 alone.

    ``num_tiles`` or more where none is left.

    Drawn while the last key tile of the one before is on its way: sooner, blocks in the midst
    of long tiles would take tiles that others come to first; later, the latency would show.
    """
    tile = num_tiles
    blocks = cute.arch.grid_dim()[0]
    if blocks < num_tiles:
        # The counter is reset by the kernel before this one.
        cute.arch.griddepcontrol_wait()
        if cute.arch.lane_idx() == 0:
            tile = cute.arch.atomic_add(mCounter.iterator, Int32(tiles)) + blocks
    return tile


class PairDraw(Traced):
    """How the two blocks of a cluster draw tiles that follow each other.

    The first block draws; it leaves the second one's in that one's shared memory and arrives at
    ``full`` there; the second reads it and arrives at ``empty`` of the first.
    """

    def __init__(self, barriers, slot):
        """``barriers``: pointer to two 64-bit words in shared memory; ``slot``: to an Int32."""
        self.full = barriers
        self.empty = barriers + 1
        self.slot = slot

    def init(self) -> None:
        """Initialises the barriers; called by one thread."""
        cute.arch.mbarrier_init(self.full, 1)
        cute.arch.mbarrier_init(self.empty, 1)

    @cute.jit
    def draw(self, mCounter: cute.Tensor, num_tiles: Int32, phase: Int32) -> Int32:
        """This block's next tile, in lane 0 alone; ``phase``: 0 and 1 in turn; one warp."""
        tile = Int32(0)
        if cute.arch.block_idx_in_cluster() == 0:
            tile = draw_tile(mCounter, num_tiles, 2)
            cute.arch.mbarrier_wait(self.empty, phase ^ 1)
            if cute.arch.lane_idx() == 0:
                cute.arch.inline_ptx(
                    """{
                    .reg .b32 slot, full;
                    mapa.shared::cluster.u32 slot, {$r0}, 1;
                    mapa.shared::cluster.u32 full, {$r1}, 1;
                    st.shared::cluster.b32 [slot], {$r2};
                    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [full];
                    }""",
                    read_only_args=[self.slot.toint(), self.full.toint(), tile + 1],
                )
        else:
            arrived = Uint32(0)
            while arrived == 0:
                arrived = cute.arch.inline_ptx(
                    """{
                    .reg .pred done;
                    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [{$r0}], {$r1};
                    selp.b32 {$w0}, 1, 0, done;
                    }""",
                    write_only_types=[Uint32],
                    read_only_args=[self.full.toint(), phase],
                )
            tile = cute.make_tensor(self.slot, cute.make_layout(1))[0]
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_arrive(self.empty, peer_cta_rank_in_cluster=0)
        return tile
