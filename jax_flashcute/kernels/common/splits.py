"""Split-KV: the keys of a row of queries divided among blocks, for calls with few queries.

A batch entry's own key tiles are divided evenly, whatever the others hold, so that one long
sequence among short ones occupies as many blocks as its length deserves.  How many parts there can
be at most follows from shapes (``config.splits.most_splits``); how many there are, from the
lengths, here: parts are as long as all entries' keys allow, so that there are no more of them than
it takes.
"""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.traced import Traced
from jax_flashcute.kernels.config.splits import MIN_SPLIT_TILES, parts_cost

MIN_PART_SHIFT = MIN_SPLIT_TILES.bit_length() - 1
PART_SHIFTS = (20, *(MIN_PART_SHIFT + i for i in reversed(range(5))))
PART_TILES = tuple(1 << shift for shift in PART_SHIFTS)
"""Lengths of parts to choose from, in key tiles; the first divides nothing."""


def splits_of_entry(
    tiles_of: Callable[[Int32], tuple],
    partials: tuple,
    heads_packed: int,
    num_sms: int | None,
    lone: int,
) -> Callable[[Int32], Int32]:
    """A function of a batch entry: the parts into which the keys of its row of tiles are divided.

    To be made and called by a whole warp.

    Args:
      tiles_of: of a batch entry, its first and one past its last key tile.
      partials: shape of the scratch for O, (splits, B, T, N, Hv): there are at most so many parts.
      heads_packed: query heads that share a tile.
      num_sms: multiprocessors that share the work; None where a sequence's parts must not follow
        from the others, or where all are alike.
      lone: ``config.splits.lone_tile_time``.
    """
    most, batch, _, heads, _ = partials
    # Lengths are powers of two: no division, for which a kernel's first load would have to wait.
    part_shift = Int32(MIN_PART_SHIFT)
    if num_sms is not None:
        part_shift = shared_part_shift(
            tiles_of, batch, Int32(heads // heads_packed), Int32(most), num_sms, lone
        )

    def splits(entry: Int32) -> Int32:
        n_min, n_max = tiles_of(entry)
        fitting = (n_max - n_min + ((Int32(1) << part_shift) - 1)) >> part_shift
        return cutlass.max(cutlass.min(fitting, Int32(most)), Int32(1))

    return splits


@cute.jit
def shared_part_shift(
    tiles_of: cutlass.Constexpr,
    batch: Int32,
    heads: Int32,
    most: Int32,
    num_sms: cutlass.Constexpr[int],
    lone: cutlass.Constexpr[int],
) -> Int32:
    """Key tiles of a part such that all parts are done soonest, as a power of two; a whole warp's.

    By an estimate, ``config.splits.parts_cost``.
    """
    total, longest = Int32(0), Int32(0)
    counts = [Int32(0) for _ in PART_TILES]
    for i in cutlass.range((batch + 31) // 32, unroll=1):
        entry = i * 32 + cute.arch.lane_idx()
        n_min, n_max = tiles_of(cutlass.min(entry, batch - 1))
        tiles = cutlass.max(n_max - n_min, Int32(0)) if entry < batch else Int32(0)
        total += tiles
        longest = cutlass.max(longest, tiles)
        counts = [
            count + cutlass.min((tiles + (length - 1)) // length, most)
            for count, length in zip(counts, PART_TILES, strict=True)
        ]
    for step in cutlass.range_constexpr(5):
        total += cute.arch.shuffle_sync_bfly(total, offset=1 << step)
        longest = cutlass.max(longest, cute.arch.shuffle_sync_bfly(longest, offset=1 << step))
        counts = [c + cute.arch.shuffle_sync_bfly(c, offset=1 << step) for c in counts]
    # A length a lane: blocks wait for this before they load anything.
    choice = cute.arch.lane_idx() % 8
    shift, count = Int32(PART_SHIFTS[0]), counts[0]
    for i, other, parts in zip(range(len(PART_SHIFTS)), PART_SHIFTS, counts, strict=True):
        shift, count = select(choice < i, shift, Int32(other)), select(choice < i, count, parts)
    found = (Int32(1) << shift, count * heads, total * heads, longest, most, num_sms, lone)
    cost = parts_cost(*found, cutlass.min, cutlass.max)
    # The first of the cheapest: lengths descend.
    for step in cutlass.range_constexpr(3):
        other_cost = cute.arch.shuffle_sync_bfly(cost, offset=1 << step)
        other = cute.arch.shuffle_sync_bfly(shift, offset=1 << step)
        is_better = (other_cost < cost) | ((other_cost == cost) & (other > shift))
        cost, shift = select(is_better, other_cost, cost), select(is_better, other, shift)
    return shift


@cute.jit
def is_last_part(
    count: cute.Pointer,
    splits: Int32,
    slot: cute.Tensor,
    thread: Int32,
    barrier_id: cutlass.Constexpr[int],
) -> Boolean:
    """Whether what a warpgroup has stored was the last of a row's parts; it sees all of them then.

    Args:
      count: how many of them are stored; set to 0 by the kernel before this one.
      splits: how many there are.
      slot: an Int32 in shared memory.
      thread: of the warpgroup.
      barrier_id: a named barrier, the warpgroup's own.
    """
    cute.arch.barrier(barrier_id=barrier_id, number_of_threads=128)
    if thread == 0:
        cute.arch.griddepcontrol_wait()
        cute.arch.fence_acq_rel_gpu()
        slot[0] = cute.arch.atomic_add(count, Int32(1), sem="relaxed", scope="gpu")
        cute.arch.fence_acq_rel_gpu()
    cute.arch.barrier(barrier_id=barrier_id, number_of_threads=128)
    return slot[0] == splits - 1


def split_range(n_min: Int32, n_max: Int32, split: Int32, splits: Int32):
    """First and one past the last key tile of part ``split`` of ``splits``."""
    tiles = cutlass.max(n_max - n_min, Int32(0))
    return n_min + tiles * split // splits, n_min + tiles * (split + 1) // splits


class SplitOrder(Traced):
    """Maps a tile's index to (head, kv_head, batch, split, splits).

    For calls whose queries fill one row of tiles.  The parts of a batch entry follow each other.
    Every method is for a whole warp.
    """

    def __init__(
        self,
        kv_heads: Int32,
        batch: Int32,
        heads_per_kv: int,
        most: Int32,
        splits_of_entry: Callable[[Int32], Int32],
        *,
        alike: bool,
    ):
        """``most``: parts of a batch entry, at most; ``splits_of_entry``: gives those of one;
        ``alike``: all entries have as many."""
        self.kv_heads = kv_heads
        self.batch = batch
        self.heads_per_kv = heads_per_kv
        self.most = most
        self.splits_of_entry = splits_of_entry
        self.alike = alike

    @property
    def num_tiles(self) -> Int32:
        """Tiles there are at most."""
        return self.kv_heads * self.batch * self.heads_per_kv * self.most

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
    def coordinates(self, index: Int32):
        """(head, kv_head, batch, split, splits) of a tile index.

        ``batch`` is the number of entries, or more, and no entry, past the last part.
        """
        heads = self.kv_heads * self.heads_per_kv
        part = index // heads
        head = index - part * heads
        if const_expr(self.alike):
            splits = self.splits_of_entry(Int32(0))
            batch = part // splits
            return head, head // self.heads_per_kv, batch, part - batch * splits, splits
        batch, split, splits = self.batch, Int32(0), Int32(1)
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
