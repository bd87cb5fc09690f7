"""Split-KV: the keys of a row of queries divided among blocks, for calls with few queries.

A batch entry's own key tiles are divided evenly, whatever the others hold, so that one long
sequence among short ones occupies as many blocks as its length deserves.  How many parts there can
be at most follows from shapes (``config.most_splits``); how many there are, from the lengths, here.
"""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from jax_flashcute.kernels.common.traced import Traced
from jax_flashcute.kernels.config import MIN_SPLIT_TILES


def splits_of(n_min: Int32, n_max: Int32, most: Int32) -> Int32:
    """Parts into which key tiles n_min..n_max are divided: at least one, at most ``most``."""
    fitting = (n_max - n_min + (MIN_SPLIT_TILES - 1)) // MIN_SPLIT_TILES
    return cutlass.max(cutlass.min(fitting, most), Int32(1))


def split_range(n_min: Int32, n_max: Int32, split: Int32, splits: Int32):
    """First and one past the last key tile of part ``split`` of ``splits``."""
    tiles = cutlass.max(n_max - n_min, Int32(0))
    return n_min + tiles * split // splits, n_min + tiles * (split + 1) // splits


class SplitOrder(Traced):
    """Maps a tile's index to (head, kv_head, batch, split, splits).

    For calls whose queries fill one row of tiles.  The parts of a batch entry follow each other.
    ``splits_of_entry`` gives the parts of a batch entry; every method is for a whole warp.
    """

    def __init__(
        self,
        kv_heads: Int32,
        batch: Int32,
        heads_per_kv: int,
        splits_of_entry: Callable[[Int32], Int32],
    ):
        self.kv_heads = kv_heads
        self.batch = batch
        self.heads_per_kv = heads_per_kv
        self.splits_of_entry = splits_of_entry

    @cute.jit
    def running_splits(self, first: Int32):
        """This lane's entry first + lane: its parts, and those of the entries from first to it."""
        lane = cute.arch.lane_idx()
        entry = first + lane
        own = self.splits_of_entry(cutlass.min(entry, self.batch - 1))
        own = own if entry < self.batch else Int32(0)
        running = own
        for step in cutlass.range_constexpr(5):
            before = cute.arch.shuffle_sync_up(running, 1 << step, mask_and_clamp=0)
            running = running + (before if lane >= (1 << step) else Int32(0))
        return own, running

    @cute.jit
    def count(self) -> Int32:
        """Tiles in all."""
        total = Int32(0)
        for i in cutlass.range((self.batch + 31) // 32, unroll=1):
            _, running = self.running_splits(i * 32)
            total += cute.arch.shuffle_sync(running, 31)
        return total * self.kv_heads * self.heads_per_kv

    @cute.jit
    def coordinates(self, index: Int32):
        """(head, kv_head, batch, split, splits) of a tile index below ``count()``."""
        heads = self.kv_heads * self.heads_per_kv
        part = index // heads
        head = index - part * heads
        batch, split, splits = Int32(0), Int32(0), Int32(1)
        first = Int32(0)
        while first < self.batch:
            own, running = self.running_splits(first)
            before = cute.arch.popc(cute.arch.vote_ballot_sync(running <= part))
            if before < 32:
                batch = first + before
                splits = cute.arch.shuffle_sync(own, before)
                split = part - (cute.arch.shuffle_sync(running, before) - splits)
                first = self.batch
            else:
                part -= cute.arch.shuffle_sync(running, 31)
                first += 32
        return head, head // self.heads_per_kv, batch, split, splits
