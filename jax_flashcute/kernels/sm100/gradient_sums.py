"""Gradients of a bias, and of arrays of floats that a score closes over, in the Blackwell backward.

Each score adds its part to one element of such an array.  A thread of the transposed scores holds
one key and a chunk of queries, so what it adds to

    an element of a head    is summed over all tiles of a head, then over the warp
    an element of a key     is summed over all tiles of a head
    an element of a query   is summed over the 32 lanes, each a key
    an element by distance  is summed over the warp's diagonals, or over a chunk where a clipped
                            distance is the same for all of it
    any element             is summed as long as the element stays the same

before it goes to the sum in global memory by an atomic addition.  What is an element of a
head, a query and a key at once is stored.
"""

from collections.abc import Sequence

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from jax_flashcute.kernels.common.elements import EntryElements
from jax_flashcute.kernels.common.fixed_point import FixedPointSums
from jax_flashcute.kernels.common.gradient_sums import (
    GradientSum,
    over_keys,
    over_lanes,
    sums_of,
    total_of,
)
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.lowering.spans import Span

LANES = (16, 8, 4, 2, 1)
"""How far apart lanes are that exchange sums."""


class Pullback:
    """From the gradients of a thread's scores to those of the products, and the thread's sums.

    Python that makes straight-line code.
    """

    def __init__(
        self,
        entry: EntryElements,
        tensors: Sequence[cute.Tensor | FixedPointSums],
        scale: float,
        key: Int32,
        thread: Int32,
    ):
        """
        Args:
          entry: of ``Elements`` that differentiate.
          tensors: as ``sums_of`` takes them.
          scale: of the call.
          key: the thread's.
          thread: 0..127 of the warpgroup.
        """
        self.entry = entry
        self.scale = scale
        self.thread = thread
        self.reads_score = entry.reads_score
        self.first_key = key - thread % 32
        self.key = entry.keys(key)
        self.in_fixed_point = [x for x in tensors if isinstance(x, FixedPointSums)]
        self.sums = sums_of(entry, tensors, 1)

    def start(self) -> None:
        """At the first tile of a head."""
        for each in self.sums:
            each.start()

    def chunk(
        self, head: Int32, first: Int32, products: cute.Tensor | None, dscores: cute.Tensor
    ) -> None:
        """Queries from ``first`` on: the gradients of their scaled products for those of scores.

        ``products``, not scaled, may be None where ``reads_score`` is False.
        """
        entry = self.entry
        # Plus 0, which the compiler cannot know: what scores were changed by is computed again, and
        # not kept in registers beside the products meanwhile.
        first = first + (Int32(entry.q_length) >> 31)
        for c in range(cute.size(dscores)):
            known = entry.both(entry.queries(head, first + c), self.key)
            product = None if products is None else products[c]
            d_score = dscores[c]
            dscores[c], values = entry.gradient(known, product, d_score, self.scale)
            for each in self.sums:
                if not each.may_agree:
                    each.add([known], [values], [d_score])
        for each in self.sums:
            if each.may_agree:
                self.add_by_distance(each, head, first, dscores)
            if each.varies == "q":
                totals, column = over_keys(each.columns, self.thread, LANES)
                each.columns = []
                for i, total in enumerate(totals):
                    each.add_to(entry.queries(head, first + column + i), total)

    @cute.jit
    def add_by_distance(
        self, each: cutlass.Constexpr, head: Int32, first: Int32, dscores: cute.Tensor
    ):
        """Adds a chunk from query ``first`` on to a sum that ``may_agree``."""
        query = self.entry.queries(head, first)
        # Those that this query is as far from as any of the chunk is from a key of the warp.
        keys = Span(self.first_key - (cute.size(dscores) - 1), self.first_key + 31)
        if each.agrees(query, keys):
            self.add_at_once(each, query, dscores)
        else:
            self.add_diagonals(each, head, first, dscores)

    def add_at_once(self, each: GradientSum, query: dict, dscores: cute.Tensor) -> None:
        total = total_of([dscores[c] for c in range(cute.size(dscores))])
        known = self.entry.both(query, self.key)
        each.add_element(0, known, self.entry.gradient(known, None, total, self.scale)[1], total)

    def add_diagonals(
        self, each: GradientSum, head: Int32, first: Int32, dscores: cute.Tensor
    ) -> None:
        """Adds a chunk's sums over the warp's scores of one distance each."""
        totals, least = over_diagonals([dscores[c] for c in range(cute.size(dscores))], self.thread)
        least = self.entry.position(first) - self.first_key + least
        for i, total in enumerate(totals):
            known = self.entry.at_distance(head, least + i)
            each.add_totals(self.entry.gradient(known, None, total, self.scale)[1])

    def finish(self, head: Int32) -> None:
        """After the last tile of a head."""
        of_head = self.entry.known_of(head=head)
        for each in self.sums:
            match each.varies:
                case "":
                    total = over_lanes(each.totals[0], LANES)
                    each.add_to(of_head, total, self.thread % 32 == 0)
                case "k":
                    each.add_to(self.entry.both(of_head, self.key), each.totals[0])
                case _:
                    each.flush()
        for sums in self.in_fixed_point:
            sums.finish(self.thread % 32)


def over_diagonals(columns: list[Float32], thread: Int32) -> tuple[list[Float32], Int32]:
    """Sums over a warp's scores that lie on one diagonal each; a lane has a row of columns.

    Two lanes ``offset`` apart shift their rows against each other by as much, and each goes on with
    half of the sums.

    Returns:
      The sums that this lane is left with, of neighbouring diagonals, and column less row of the
      first; where other lanes have some of a diagonal as well, they add up.
    """
    least = Int32(0)
    nothing = Float32(0.0)
    for offset in LANES:
        is_upper = (thread & offset) != 0
        half = -(-(len(columns) + offset) // 2)
        # The upper lane's first column has the place of the lower one's that is ``offset`` before.
        lower, upper = [nothing] * offset + columns, list(columns)
        lower += [nothing] * (2 * half - len(lower))
        upper += [nothing] * (2 * half - len(upper))
        sums = []
        for i in range(half):
            given = select(is_upper, upper[i], lower[half + i])
            kept = select(is_upper, upper[half + i], lower[i])
            sums.append(kept + cute.arch.shuffle_sync_bfly(given, offset=offset))
        columns = sums
        least = least + select(is_upper, Int32(half - offset), Int32(-offset))
    return columns, least
