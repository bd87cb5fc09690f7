"""A mask in bits, in global memory: bit j, from the lowest, of word w of a row is key 32 w + j."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32


class PackedMask:
    """(1|B, 1|N, 1|T, words) uint32; ``full`` are the axes of "bnt" that are not of length 1."""

    def __init__(self, full: str, words: cute.Tensor):
        self.full = full
        self.words = words
        self.width = Int32(words.shape[3])

    def row(self, batch: Int32, head: Int32, token: Int32) -> Int64:
        """Where the words of a query row start; the row must be there."""
        index = Int64(0)
        for axis, (letter, place) in enumerate(zip("bnt", (batch, head, token), strict=True)):
            if letter in self.full:
                index = index * Int64(self.words.shape[axis]) + place
        return index * self.width

    def word(self, row: Int64, index: Int32) -> Uint32:
        """A word of a row; beyond the last one, that one."""
        place = row + cutlass.min(index, self.width - 1)
        return cute.make_tensor(self.words.iterator + place, cute.make_layout(1))[0]


def transposed_bits(word: Uint32) -> Uint32:
    """A word whose bit c is, in lane l, bit l of lane c's ``word``; one warp."""
    lane = Uint32(cute.arch.lane_idx())
    found = Uint32(0)
    for c in range(32):
        bit = (cute.arch.shuffle_sync(word, c) >> lane) & Uint32(1)
        found = found | (bit << Uint32(c))
    return found
