"""Into how many parts the keys of a row are divided, where there are few rows."""

MIN_SPLIT_TILES = 4
"""A row's keys are divided into one part for each so many key tiles, at most."""

MAX_SPLITS = 128

VARYING_SPLIT_TILES = 16
"""Key tiles of a part of the longest sequence, where lengths vary and are not known: a block that
draws its last part late keeps the others waiting for no longer than these take."""


def most_splits(tiles: int, key_tiles: int, num_sms: int, lengths_vary: bool) -> int:
    """Parts into which a row's keys are divided at most; 1 where splitting does not pay.

    Args:
      tiles: tiles there are without splits: batch entries times heads.
      key_tiles: of the longest row that the arrays can hold.
      num_sms: multiprocessors that share the work.
      lengths_vary: batch entries have lengths of their own, known on the device alone.
    """
    limit = max(1, min(key_tiles // MIN_SPLIT_TILES, MAX_SPLITS))

    def efficiency(splits: int) -> float:
        blocks = tiles * splits
        return blocks / (-(-blocks // num_sms) * num_sms)

    best = max(efficiency(splits) for splits in range(1, limit + 1))
    splits = next(s for s in range(1, limit + 1) if efficiency(s) >= 0.95 * best)
    if lengths_vary:
        splits = max(splits, min(limit, key_tiles // VARYING_SPLIT_TILES))
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
