"""Gradients of a bias, and of arrays of floats that a score closes over, in the Hopper backward.

Each score adds its part to one element of such an array.  A thread of the transposed scores holds
two keys and some columns of queries, so what it adds to

    an element of a head    is summed over all tiles of a head, then over the warp
    an element of a key     is summed over all tiles of a head, then over the four lanes of the key
    an element of a query   is summed over the thread's keys, then over the eight lanes of the query
    an element by distance  is summed over the warp's diagonals; where a clipped distance is the
                            same for all of a tile, over the tile, or over a loop of such tiles
    any element             is summed as long as the element stays the same

before it goes to the sum in global memory by an atomic addition.  What is an element of a
head, a query and a key at once is stored, and what heads have in common but for that is summed over
those of a group, which take turns at a tile.
"""

from collections.abc import Sequence

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from jax_flashcute.kernels.common.elements import EntryElements
from jax_flashcute.kernels.common.fixed_point import FixedPointSums
from jax_flashcute.kernels.common.gradient_sums import (
    GradientSum,
    exchanged,
    over_keys,
    over_lanes,
    sums_of,
)
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.lowering.spans import Span
from jax_flashcute.kernels.sm90.fragments import (
    ROWS_PER_THREAD,
    column_step,
    first_column,
    row_in_slab,
)

SLAB_KEYS = 64
"""Of a warpgroup."""


class Pullback:
    """From the gradients of a thread's scores to those of the products, and the thread's sums.

    Python that makes straight-line code.
    """

    def __init__(
        self,
        entry: EntryElements,
        tensors: Sequence[cute.Tensor | FixedPointSums],
        scale: float,
        tile_m: int,
        first_key: Int32,
        thread: Int32,
        held: cute.Tensor | None = None,
        turns: int = 1,
    ):
        """
        Args:
          entry: of ``Elements`` that differentiate.
          tensors: as ``sums_of`` takes them.
          scale: of the call.
          tile_m: queries of a tile.
          first_key: of the warpgroup's 64.
          thread: 0..127 of the warpgroup.
          held: (4, tile_m / 8) float32 of this thread in shared memory, for the sum of a tile over
            heads that take turns at it; None where none do.
          turns: how many heads do.
        """
        self.held = held
        self.turns = turns
        self.entry = entry
        self.scale = scale
        self.tile_m = tile_m
        self.thread = thread
        self.reads_score = entry.reads_score
        self.first_key = first_key
        self.keys = [entry.keys(first_key + row_in_slab(thread, r)) for r in range(ROWS_PER_THREAD)]
        self.common = cute.make_rmem_tensor(1, Float32)
        self.in_fixed_point = [x for x in tensors if isinstance(x, FixedPointSums)]
        self.sums = sums_of(entry, tensors, ROWS_PER_THREAD)

    def start(self) -> None:
        """At the first tile of a head."""
        for each in self.sums:
            each.start()
        for j in range(0 if self.held is None else cute.size(self.held, mode=[1])):
            self.clear_held(j)

    def tile(
        self,
        head: Int32,
        m: Int32,
        products: cute.Tensor | None,
        dscores: cute.Tensor,
        *,
        differs: bool = False,
        turn: Int32 | None = None,
    ):
        """Tile m: the gradients of its scaled products in place of those of its scores.

        ``products``, not scaled, may be None where ``reads_score`` is False; ``differs``: no use
        asking whether the tile adds to one element alone; ``turn``: of heads that take turns.
        """
        entry = self.entry
        # Plus 0, which the compiler cannot know: what scores were changed by is computed again, and
        # not kept in registers beside the products meanwhile, where it would spill.
        zero = Int32(entry.q_length) >> 31
        if turn is not None:
            self.add_in_turn(self.sums[0], head, m * self.tile_m + zero, dscores, turn)
            return
        first = m * self.tile_m + first_column(self.thread) + zero
        rows = range(ROWS_PER_THREAD)
        for c in range(cute.size(dscores, mode=[1])):
            query = entry.queries(head, first + column_step(c))
            known = [entry.both(query, key) for key in self.keys]
            d_scores, values = [dscores[r, c] for r in rows], []
            for r in rows:
                product = None if products is None else products[r, c]
                dscores[r, c], found = entry.gradient(known[r], product, d_scores[r], self.scale)
                values.append(found)
            for each in self.sums:
                if not each.may_agree:
                    each.add(known, values, d_scores)
        for each in self.sums:
            if each.may_agree and differs:
                self.add_diagonals(each, head, m * self.tile_m + zero, dscores)
            elif each.may_agree:
                self.add_by_distance(each, head, m * self.tile_m + zero, dscores)
            if each.varies == "q":
                totals, column = over_keys(each.columns, self.thread, (4, 8, 16))
                each.columns = []
                for i, total in enumerate(totals):
                    query = entry.queries(head, first + column_step(column + i))
                    each.add_to(query, total)

    @cute.jit
    def add_by_distance(
        self, each: cutlass.Constexpr, head: Int32, first: Int32, dscores: cute.Tensor
    ):
        """Adds a tile from query ``first`` on to a sum that ``may_agree``."""
        entry = self.entry
        query = entry.queries(head, first)
        if each.agrees(query, self.keys_of_distances()):
            self.add_at_once(each, query, dscores)
        else:
            self.add_diagonals(each, head, first, dscores)

    def add_at_once(self, each: GradientSum, query: dict, dscores: cute.Tensor) -> None:
        columns, rows = range(cute.size(dscores, mode=[1])), range(ROWS_PER_THREAD)
        totals = [sum((dscores[r, c] for c in columns), start=Float32(0.0)) for r in rows]
        both = self.entry.both(query, self.keys[0])
        each.add_element(0, *self.given(both, sum(totals, start=Float32(0.0))))

    def add_diagonals(
        self, each: GradientSum, head: Int32, first: Int32, dscores: cute.Tensor
    ) -> None:
        """Adds a tile's sums over the warp's scores of one distance each."""
        entry, warp = self.entry, self.thread // 32 % 4
        totals, place = _over_diagonals(dscores, self.thread)
        least = entry.position(first) - (self.first_key + 16 * warp) + place
        for i, total in enumerate(totals):
            known = entry.at_distance(head, least + 8 * i)
            each.add_totals(self.given(known, total)[1])

    # ---- loops of tiles that add to one element alone --------------------------------------------

    def start_common(self) -> None:
        self.common.fill(0.0)

    def tile_of_common(self, dscores: cute.Tensor) -> None:
        """A tile of such a loop."""
        for r in range(ROWS_PER_THREAD):
            values = [dscores[r, c] for c in range(cute.size(dscores, mode=[1]))]
            self.common[0] = self.common[0] + sum(values[1:], start=values[0])

    def finish_common(self, head: Int32, m: Int32, where: Boolean) -> None:
        """After such a loop ``where`` it had a tile, m among them."""
        total = over_lanes(self.common[0], (1, 2, 4, 8, 16))
        both = self.entry.both(self.entry.queries(head, m * self.tile_m), self.keys[0])
        for each in self.sums:
            each.add_total(self.given(both, total)[1], where & (self.thread % 32 == 0))

    def common_elements(self, head: Int32, m: Int32) -> tuple[Boolean, list[Int32]]:
        """Whether tile m adds to one element of each sum alone, and their numbers."""
        query = self.entry.queries(head, m * self.tile_m)
        both = self.entry.both(query, self.keys[0])
        agree = Boolean(True)
        for each in self.sums:
            agree = agree & each.agrees(query, self.keys_of_distances())
        return agree, [each.number(both) for each in self.sums]

    def keys_of_distances(self) -> Span:
        """Those that a tile's first query is as far from as any is from a key of the warpgroup."""
        return Span(self.first_key - (self.tile_m - 1), self.first_key + (SLAB_KEYS - 1))

    @cute.jit
    def add_in_turn(
        self,
        each: cutlass.Constexpr,
        head: Int32,
        first: Int32,
        dscores: cute.Tensor,
        turn: Int32,
    ):
        """Adds a tile to what the heads before have added; the last one's turn is memory's."""
        if turn + 1 < self.turns:
            self.hold(dscores)
        else:
            self.add_held(each, head, first, dscores)

    def hold(self, dscores: cute.Tensor) -> None:
        for j in range(cute.size(self.held, mode=[1])):
            cute.autovec_copy(self.with_held(j, dscores), self.held[None, j])

    def add_held(self, each: GradientSum, head: Int32, first: Int32, dscores: cute.Tensor) -> None:
        for j in range(cute.size(self.held, mode=[1])):
            values = self.with_held(j, dscores)
            self.clear_held(j)
            for b in range(2):
                place = first + first_column(self.thread) + column_step(2 * j + b)
                query = self.entry.queries(head, place)
                for r, key in enumerate(self.keys):
                    each.add_to(self.entry.both(query, key), values[2 * r + b])

    def with_held(self, j: int, dscores: cute.Tensor) -> cute.Tensor:
        """What is held of four scores, and what this head adds."""
        values = cute.make_rmem_tensor(4, Float32)
        cute.autovec_copy(self.held[None, j], values)
        for i in range(4):
            values[i] = values[i] + dscores[i // 2, 2 * j + i % 2]
        return values

    def clear_held(self, j: int) -> None:
        nothing = cute.make_rmem_tensor(4, Float32)
        nothing.fill(0.0)
        cute.autovec_copy(nothing, self.held[None, j])

    def given(self, known: dict, d_score: Float32) -> tuple[dict, dict, Float32]:
        """What ``GradientSum.add_element`` takes, of a score whose gradient stays as it is."""
        return known, self.entry.gradient(known, None, d_score, self.scale)[1], d_score

    def finish(self, head: Int32) -> None:
        """After the last tile of a head."""
        lane = self.thread % 32
        of_head = self.entry.known_of(head=head)
        for each in self.sums:
            match each.varies:
                case "":
                    total = over_lanes(each.totals[0], (1, 2, 4, 8, 16))
                    each.add_to(of_head, total, lane == 0)
                case "k":
                    for r, key in enumerate(self.keys):
                        total = over_lanes(each.totals[r], (1, 2))
                        each.add_to(self.entry.both(of_head, key), total, lane % 4 == 0)
                case _:
                    each.flush()
        for sums in self.in_fixed_point:
            sums.finish(lane)


def _over_diagonals(dscores: cute.Tensor, thread: Int32) -> tuple[list[Float32], Int32]:
    """Sums over a warp's 16 keys of what lies on one diagonal each: 160, of which some are halves.

    With p = lane % 4, e = lane // 8, f = lane // 4 % 2, a score of key row 2 e + f + 8 r and column
    8 j + 2 p + b lies 8 (j - r) + 2 (p - e) + b - f from the diagonal.

    Returns:
      Five sums of this lane, and how far the first lies; the others follow 8 apart.
    """
    p, e, f = thread % 4, thread % 32 // 8, thread // 4 % 2
    # Lanes of one (p - e) % 4 are brought together; where that wraps, sums move up by 8.
    wraps, source = p < e, thread % 32 - p + (p + e) % 4
    is_upper, is_odd = e >= 2, e % 2 != 0
    nothing, eighths = Float32(0.0), cute.size(dscores, mode=[1]) // 2
    halves = []
    for b in range(2):
        sums = [nothing, dscores[1, b]]
        sums += [dscores[0, 2 * j - 2 + b] + dscores[1, 2 * j + b] for j in range(1, eighths)]
        sums += [dscores[0, 2 * eighths - 2 + b], nothing]
        turned = [select(wraps, sums[i + 1], sums[i]) for i in range(eighths + 2)]
        turned = [cute.arch.shuffle_sync(x, offset=source) for x in turned]
        half = len(turned) // 2
        halves.append(exchanged(turned[:half], turned[half:], is_upper, 16))
    totals = exchanged(*halves, is_odd, 8)
    return totals, 8 * (select(is_upper, Int32(half), Int32(0)) - 2) + 2 * p + e % 2 - f
