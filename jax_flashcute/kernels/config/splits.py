"""Into how many parts the keys of a row are divided, where there are few rows."""

from jax_flashcute.kernels.config.sm90 import FEW_ROWS, FwdConfig
from jax_flashcute.kernels.config.sm100 import FwdConfigSm100

MIN_SPLIT_TILES = 4
"""A row's keys are divided into one part for each so many key tiles, at most."""

MAX_SPLITS = 128

VARYING_SPLIT_TILES = 16
"""Key tiles of a part of the longest sequence, where lengths vary and are not known: a block that
draws its last part late keeps the others waiting for no longer than these take.  Where rows are no
more than multiprocessors, longer sequences may have shorter parts, if all of these take no more
than ``VARYING_BYTES``."""

VARYING_BYTES = 64 * 1024 * 1024

PART_COST, COMBINE_COST = 8, 20
"""What a part takes beside its tiles, and adding parts up, in sixteenths of a tile's time.  From 32
x 8,192 keys on an H200, 0.236 ms in 256 parts and 0.249 in 1,024; and from calls of 10 to 60 us,
which are 1.6 to 3 us longer where parts are added up."""

H200_SMS = 132


def lone_tile_time(
    config: FwdConfig | FwdConfigSm100,
    head_dim: int,
    head_dim_v: int,
    num_sms: int,
    page_size: int | None = None,
) -> int:
    """What a key tile takes a block where others leave it memory, in 64ths of what it takes where
    all multiprocessors read: with so many fewer blocks keys are read as fast.

    From an H200, 8 to 132 blocks of 4,096 to 16,384 keys, head_dim 64 to 256: 0.37 us and 0.46 for
    each 64 KB, of 1.89 for each 64 KB; 0.17 more with more rows than one warp's softmax has.  From
    pages of 1 and 2 of head_dim 128 0.2 and 0.29 more, from larger ones 0.02 to 0.08.
    Fewer multiprocessors are taken to share as fast a memory.  On Blackwell nothing was measured:
    64.
    """
    if isinstance(config, FwdConfigSm100):
        return 64
    latency_bytes = 12_800 if config.query_rows <= FEW_ROWS else 18_700
    time = 17 + 64 * latency_bytes // config.key_tile_bytes(head_dim, head_dim_v)
    if page_size is not None:
        time += 10 if page_size < 4 else 6
    return min(64, time * H200_SMS // num_sms)


def parts_cost(
    length,
    parts,
    tiles,
    longest,
    most,
    num_sms: int,
    lone: int,
    least=min,
    largest=max,
):
    """How long a call takes with parts of ``length`` tiles, in sixteenths of a tile's time.

    In integers, because two kernels have to come to the same result.

    Args:
      length: key tiles of a part.
      parts: how many there are then.
      tiles: of all parts.
      longest: tiles of the longest entry.
      most: parts of an entry at most.
      num_sms: multiprocessors.
      lone: ``lone_tile_time``.
      least, largest: of two numbers.
    """
    mean = tiles * 16 // largest(parts, 1)
    last = largest(least(longest, length), (longest + most - 1) // most) * 16
    # As many parts as there are multiprocessors share memory; those that are left, fewer, have more
    # of it each, until a block is as fast as it can be.  Of 132, in 64ths of a tile's time: 64
    # blocks 33, 72 36, 96 48, 120 60, 128 62; somewhat more after others, which end one by one.
    waves = parts // num_sms
    rest = parts - waves * num_sms
    after = least(waves, 1)
    shared = least(rest * 64 // num_sms + 2 + 8 * after, 62)
    of_rest = least(largest(shared, least(lone + 12 * after, 64)), rest * 64)
    cost = waves * mean + mean * of_rest // 64 + (last - mean) // 2
    is_split = least(largest(longest - length, 0), 1)
    return cost + parts * PART_COST // num_sms + is_split * COMBINE_COST


def most_splits(
    tiles: int,
    key_tiles: int,
    num_sms: int,
    lengths_vary: bool,
    lone: int,
    part_bytes: int,
) -> int:
    """Parts into which a row's keys are divided at most; 1 where splitting does not pay.

    Args:
      tiles: tiles there are without splits: batch entries times heads.
      key_tiles: of the longest row that the arrays can hold.
      num_sms: multiprocessors that share the work.
      lengths_vary: batch entries have lengths of their own, known on the device alone.
      lone: ``lone_tile_time``.
      part_bytes: of O in float32, which each part takes.
    """
    limit = max(1, min(key_tiles // MIN_SPLIT_TILES, MAX_SPLITS))

    def cost(splits: int) -> int:
        length = -(-key_tiles // splits)
        every = tiles * key_tiles
        return parts_cost(length, tiles * splits, every, key_tiles, splits, num_sms, lone)

    costs = {splits: cost(splits) for splits in range(1, limit + 1)}
    # The fewest of those that come near the least.
    splits = next(s for s in costs if 50 * costs[s] <= 51 * min(costs.values()))
    if lengths_vary:
        varying = key_tiles // VARYING_SPLIT_TILES
        if varying and tiles <= num_sms:
            # All rows begin at once, and the longest is waited for.
            varying = max(varying, min(limit, VARYING_BYTES // part_bytes))
        splits = max(splits, min(limit, varying))
    return splits


def batch_invariant_splits(key_tiles: int) -> int:
    """``most_splits`` by the keys of a row alone: parts of ``MIN_SPLIT_TILES`` where they fit."""
    return max(1, min(-(-key_tiles // MIN_SPLIT_TILES), MAX_SPLITS))


JOINED_BYTES = 256 * 1024
"""Of the parts of a tile's rows: more are too many for one block to add up."""


def joining_pays(usual: int, part_bytes: int) -> bool:
    """Whether the block that stores the last part of a tile's rows had better add them up.

    Where only lengths that vary make parts, most rows have one, and a kernel that adds up would be
    launched for nothing: 1.5 us.  Where most rows have several, it is better: blocks that have to
    know whose part was the last wait for that after each; docs/lab-notebook.md.

    Args:
      usual: parts of a row at most, if all were as long as the arrays.
      part_bytes: of all parts of a tile's rows of O.
    """
    return usual == 1 and part_bytes <= JOINED_BYTES
