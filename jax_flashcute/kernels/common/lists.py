"""Tiles that a block visits by name, from lists in memory, instead of a range that is computed.

A list's partial tiles come first, then its full ones; neither need ascend.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.stretches import Stretch


def row_of(array: cute.Tensor, batch: Int32, head: Int32, row: Int32) -> cute.Tensor:
    """A row's entries in (1|B, 1|N, rows) or (1|B, 1|N, 1|rows, width), as (1,) or (width,)."""
    shape = array.shape
    batch = cutlass.min(batch, Int32(shape[0]) - 1)
    head = cutlass.min(head, Int32(shape[1]) - 1)
    index = (Int64(batch) * shape[1] + head) * shape[2] + row
    width = shape[3] if len(shape) > 3 else 1
    return cute.make_tensor(array.iterator + index * width, cute.make_layout(width))


class TileLists:
    """The two lists of one row of tiles.

    ``arrays`` are those of ``BlockMask.kernel_lists``: counts (1|B, 1|N, rows) and indices (1|B,
    1|N, rows, at least 1) of the partial tiles, then of the full ones.  Or packed: counts and where
    a list starts (1|B, 1|N, rows, 2), and indices (1|B, 1|N, 1, at least 1).
    """

    def __init__(
        self,
        arrays: tuple,
        batch: Int32,
        head: Int32,
        row: Int32,
        exists: Boolean,
        *,
        backwards: bool,
        counts: tuple[Int32, Int32] | None = None,
    ):
        """``exists``: the row holds anything, or both lists are as good as empty; ``backwards``:
        each list is visited from its end; ``counts``: of both, where they have been read."""
        is_packed = len(arrays[0].shape) == 4
        rows = [row_of(c, batch, head, row) for c in (arrays[0], arrays[2])] if is_packed else []
        of_row = Int32(0) if is_packed else row
        self.partial, self.full = (row_of(i, batch, head, of_row) for i in (arrays[1], arrays[3]))
        if is_packed:
            self.partial, self.full = (
                cute.make_tensor(entries.iterator + counted[1], entries.layout)
                for entries, counted in zip((self.partial, self.full), rows, strict=True)
            )
        self.partial_count, self.full_count = counts or [
            select(exists, row_of(c, batch, head, row)[0], Int32(0)) for c in (arrays[0], arrays[2])
        ]
        self.backwards = backwards

    @property
    def count(self):
        """Tiles in both lists."""
        return self.partial_count + self.full_count

    def tile(self, i: Int32):
        """The i-th tile of all that are visited."""
        # Both lists are read, each at a place that it has.
        in_partial = cutlass.max(cutlass.min(i, self.partial_count - 1), Int32(0))
        in_full = cutlass.max(cutlass.min(i - self.partial_count, self.full_count - 1), Int32(0))
        of_partial = self.partial[self.place(in_partial, self.partial_count)]
        of_full = self.full[self.place(in_full, self.full_count)]
        return select(i < self.partial_count, of_partial, of_full)

    def place(self, i: Int32, count: Int32) -> Int32:
        """Where the i-th of ``count`` entries stands; 0 in a list without entries."""
        return cutlass.max(count - 1 - i, Int32(0)) if self.backwards else i

    def stretches(self, skipped: int) -> list[Stretch]:
        """The partial tiles, the full ones.

        ``skipped``: tiles at the start that are left out; there are at least so many.
        """
        of_partial = cutlass.min(Int32(skipped), self.partial_count)
        of_full = Int32(skipped) - of_partial

        def partial_tile(i: Int32):
            return self.partial[self.place(of_partial + i, self.partial_count)]

        def full_tile(i: Int32):
            return self.full[self.place(of_full + i, self.full_count)]

        return [
            Stretch(self.partial_count - of_partial, partial_tile),
            Stretch(self.full_count - of_full, full_tile, is_full=True),
        ]

    def stretches_by_mask(
        self, skipped: int, is_clear: Boolean, *, has_mask_mod: bool, splits_partial: bool = False
    ) -> list[Stretch]:
        """``stretches`` apart where positions and lengths hide something.

        Each is a loop without a branch: one between the products and the softmax of a tile makes
        the compiler put the softmax behind the wait for the products that it should run beside.

        Args:
          skipped: as for ``stretches``.
          is_clear: positions and lengths hide nothing in any tile that a list may name.
          has_mask_mod: full tiles are told from partial ones.
          splits_partial: partial tiles are split as well.
        """
        partial, full = self.stretches(skipped)
        full_clear = select(is_clear, full.count, Int32(0))
        clear = full._replace(count=full_clear, is_masked=False)
        if not has_mask_mod:
            masked = partial.count + full.count - full_clear
            return [Stretch(masked, lambda i: self.tile(skipped + i)), clear]
        full_tiles = [clear, full._replace(count=full.count - full_clear)]
        if not splits_partial:
            return [partial, *full_tiles]
        masked = select(is_clear, Int32(0), partial.count)
        clear = partial._replace(count=partial.count - masked, is_masked=False)
        return [partial._replace(count=masked), clear, *full_tiles]
