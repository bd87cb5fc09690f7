"""What a score adds by the distance of a key alone, in the Hopper backward.

Of a table that is read by clipped distances most tiles read one element.  Those before the first
tile that differs, and those after the last, are loops of their own: there the element is added to
the rows' LSE in place of each score, and its gradient is the sum of all gradients of the loop.  In
the tiles between, a warp computes what it adds by each distance once.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from jax_flashcute.kernels.common.elements import EntryElements
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.softmax import LOG2_E
from jax_flashcute.kernels.common.stretches import Stretch
from jax_flashcute.kernels.common.traced import Traced
from jax_flashcute.kernels.config.memory import round_up
from jax_flashcute.kernels.elements import ElementFunctions, program_of
from jax_flashcute.kernels.lowering.spans import Span
from jax_flashcute.kernels.sm90.fragments import (
    ROWS_PER_THREAD,
    column_step,
    first_column,
)
from jax_flashcute.kernels.sm90.gradient_sums import SLAB_KEYS, Pullback

ROWS_PER_WARP = 16


def distances(tile_m: int) -> int:
    """Room for the distances of a warp's keys from a tile's rows, in multiples of 32."""
    return round_up(tile_m + ROWS_PER_WARP - 1, 32)


def adds_by_distance(functions: ElementFunctions | None) -> bool:
    """Whether all that is done to scores is to add elements that many a tile has in common."""
    if functions is None or functions.score_mod is None or functions.bias is not None:
        return False
    if functions.hides or functions.added_kinds(False) != {"tile"}:
        return False
    # A custom derivative may change the gradients of scores that are only added to.
    if not functions.keeps_gradients:
        return False
    program = program_of(functions.score_mod, functions.keys)
    return all(program.is_of_distance(value) for value, _ in program.addends() or ())


class DistanceTerms(Traced):
    """Of a warpgroup's keys and a head: Python that makes straight-line code."""

    def __init__(
        self,
        entry: EntryElements,
        pullback: Pullback | None,
        scale: float,
        tile_m: int,
        numbers: cute.Tensor,
        head: Int32,
        first_key: Int32,
        thread: Int32,
    ):
        """
        Args:
          entry: of ``Elements`` of functions that ``adds_by_distance``.
          pullback: of the warpgroup; its sums all ``may_agree``.
          scale: of the call.
          tile_m: queries of a tile.
          numbers: of this warp, room for ``distances`` in shared memory.
          first_key: of the warpgroup's.
          thread: 0..127 of the warpgroup.
        """
        self.entry = entry
        self.pullback = pullback
        self.scale = scale
        self.tile_m = tile_m
        self.numbers = numbers
        self.head = head
        self.first_key = first_key
        self.thread = thread
        self.program = entry.elements.programs["score_mod"]

    def loops(self, stretches: list[Stretch]) -> list[tuple]:
        """``stretches``, and of each whether what is added differs in its tiles.

        One whose tiles need no mask falls into three.
        """
        found = []
        for stretch in stretches:
            if stretch.is_masked:
                found.append((stretch, True))
                continue
            count, tile_of = stretch[:2]
            low, high = self.differing(count, tile_of)
            for begin, end, differs in ((0, low, False), (low, high, True), (high, count, False)):
                part = stretch._replace(count=end - begin, tile=_after(begin, tile_of))
                found.append((part, differs))
        return found

    @cute.jit
    def differing(self, count: Int32, tile_of: cutlass.Constexpr):
        """How many tiles have what the first has; and past which all have what the last has."""
        low, high = Int32(count), Int32(0)
        first = self._of_tile(tile_of(Int32(0)))
        last = self._of_tile(tile_of(cutlass.max(count - 1, Int32(0))))
        for i in cutlass.range((count + 31) // 32, unroll=1):
            place = 32 * i + self.thread % 32
            here = self._of_tile(tile_of(cutlass.min(place, count - 1)))
            is_tile = place < count
            low = select(is_tile & _differ(here, first), cutlass.min(low, place), low)
            high = select(is_tile & _differ(here, last), cutlass.max(high, place + 1), high)
        low = cute.arch.make_warp_uniform(cute.arch.warp_redux_sync(low, kind="min"))
        high = cute.arch.make_warp_uniform(cute.arch.warp_redux_sync(high, kind="max"))
        return low, cutlass.max(low, high)

    def _of_tile(self, m: Int32) -> tuple[Boolean, Float32, list[Int32]]:
        """Whether all of a tile's scores have one element; what it adds; those of the gradients."""
        query = self.entry.queries(self.head, m * self.tile_m)
        addends = [value for value, _ in self.program.addends() or ()]
        indices = [i for value in addends for i in self.program.reads_by_bounds(value)]
        keys = Span(self.first_key - (self.tile_m - 1), self.first_key + (SLAB_KEYS - 1))
        is_same = self.program.are_points(query["score_mod"], indices, keys)
        numbers: list[Int32] = []
        if self.pullback is not None:
            agree, numbers = self.pullback.common_elements(self.head, m)
            is_same = is_same & agree
        return is_same, self._added(m), numbers

    def _added(self, m: Int32) -> Float32:
        query = self.entry.queries(self.head, m * self.tile_m)
        both = self.entry.both(query, self.entry.keys(self.first_key))
        return self.entry.modified(both, Float32(0.0))

    def common(self, tile_of) -> Float32:
        """What is added to all scores of a loop, in base 2."""
        return self._added(tile_of(Int32(0))) * Float32(LOG2_E)

    def add(self, m: Int32, scores: cute.Tensor, *_: bool) -> None:
        """Makes scores of tile m of its products."""
        first_key = self.first_key + ROWS_PER_WARP * (self.thread // 32)
        # Of the warp's last key and the tile's first row.
        least = self.entry.position(m * self.tile_m) - (first_key + ROWS_PER_WARP - 1)
        lane = self.thread % 32
        # The numbers of the tile before have been read.
        cute.arch.sync_warp()
        for place in range(0, distances(self.tile_m), 32):
            known = self.entry.at_distance(self.head, least + place + lane)
            self.numbers[place + lane] = self.entry.modified(known, Float32(0.0))
        cute.arch.sync_warp()
        own = ROWS_PER_WARP - 1 - lane // 4 + first_column(self.thread)
        found = {}
        for c in range(cute.size(scores, mode=[1])):
            for r in range(ROWS_PER_THREAD):
                step = column_step(c) - 8 * r
                if step not in found:
                    found[step] = self.numbers[own + step]
                scores[r, c] = cute.math.fma(scores[r, c], Float32(self.scale), found[step])


def _differ(
    here: tuple[Boolean, Float32, list[Int32]], other: tuple[Boolean, Float32, list[Int32]]
) -> Boolean:
    is_same = here[0] & (here[1] == other[1])
    for number, others in zip(here[2], other[2], strict=True):
        is_same = is_same & (number == others)
    return select(is_same, Int32(0), Int32(1)) != 0


def _after(begin, tile_of):
    """A function of i: the i-th tile from place ``begin`` on."""
    return lambda i: tile_of(begin + i)
