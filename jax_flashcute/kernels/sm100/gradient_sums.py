"""Gradients of a bias, and of arrays of floats that a score closes over, in the Blackwell backward.

Each score adds its part to one element of such an array.  A thread of the transposed scores holds
one key and a chunk of queries, so what it adds to

    an element of a head    is summed over all tiles of a head, then over the warp
    an element of a key     is summed over all tiles of a head
    an element of a query   is summed over the 32 lanes, each a key
    any element             is summed as long as the element stays the same

before it goes to the float32 sum in global memory by an atomic addition.  What is an element of a
head, a query and a key at once is stored.
"""

from collections.abc import Sequence

import cutlass.cute as cute
from cutlass import Int32

from jax_flashcute.kernels.common.elements import EntryElements
from jax_flashcute.kernels.common.gradient_sums import over_keys, over_lanes, sums_of

LANES = (16, 8, 4, 2, 1)


class Pullback:
    """From the gradients of a thread's scores to those of the products, and the thread's sums.

    Python that makes straight-line code.
    """

    def __init__(
        self,
        entry: EntryElements,
        tensors: Sequence[cute.Tensor],
        scale: float,
        key: Int32,
        thread: Int32,
    ):
        """
        Args:
          entry: of ``Elements`` that differentiate.
          tensors: float32, of ``ElementFunctions.summed_ranks``.
          scale: of the call.
          key: the thread's.
          thread: 0..127 of the warpgroup.
        """
        self.entry = entry
        self.scale = scale
        self.thread = thread
        self.reads_score = entry.reads_score
        self.key = entry.keys(key)
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
                each.add([known], [values], [d_score])
        for each in self.sums:
            if each.varies == "q":
                totals, column = over_keys(each.columns, self.thread, LANES)
                each.columns = []
                for i, total in enumerate(totals):
                    each.add_to(entry.queries(head, first + column + i), total)

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
