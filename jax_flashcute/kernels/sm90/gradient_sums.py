"""Gradients of a bias, and of arrays of floats that a score closes over, in the Hopper backward.

Each score adds its part to one element of such an array.  A thread of the transposed scores holds
two keys and some columns of queries, so what it adds to

    an element of a head    is summed over all tiles of a head, then over the warp
    an element of a key     is summed over all tiles of a head, then over the four lanes of the key
    an element of a query   is summed over the thread's keys, then over the eight lanes of the query
    an element by distance  is summed over the warp's diagonals; where a clipped distance is the
                            same for all of a tile, over the tile, or over a loop of such tiles
    any element             is summed as long as the element stays the same

before it goes to the float32 sum in global memory by an atomic addition.  What is an element of a
head, a query and a key at once is stored, and what heads have in common but for that is summed over
those of a group, which take turns at a tile.
"""

import math
from collections.abc import Sequence
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from jax_flashcute.kernels.common.elements import EntryElements
from jax_flashcute.kernels.primitives import select
from jax_flashcute.kernels.sm90.fragments import (
    ROWS_PER_THREAD,
    column_step,
    first_column,
    row_in_slab,
)
from jax_flashcute.kernels.spans import Span

SLAB_KEYS = 64
"""Of a warpgroup."""


class Pullback:
    """From the gradients of a thread's scores to those of the products, and the thread's sums.

    Python that makes straight-line code.
    """

    def __init__(
        self,
        entry: EntryElements,
        tensors: Sequence[cute.Tensor],
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
          tensors: float32, of ``ElementFunctions.summed_ranks``.
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
        rest = list(tensors)
        self.sums: list[_Sum] = []
        functions, derivative = entry.elements.functions, entry.elements.derivative
        if functions.bias is not None and "bias" not in functions.constants:
            self.sums.append(_BiasSum(entry, rest.pop(0)))
        if derivative is not None and "score_mod_arrays" not in functions.constants:
            of_array = dict(zip(derivative.numbered, rest, strict=True))
            for array, at in derivative.cotangents():
                self.sums.append(_ReadSum(entry, of_array[array], array, at))

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
                totals, column = _over_keys(each.columns, self.thread)
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

    def add_at_once(self, each: "_Sum", query: dict, dscores: cute.Tensor) -> None:
        columns, rows = range(cute.size(dscores, mode=[1])), range(ROWS_PER_THREAD)
        totals = [sum((dscores[r, c] for c in columns), start=Float32(0.0)) for r in rows]
        both = self.entry.both(query, self.keys[0])
        each.add_element(0, *self.given(both, sum(totals, start=Float32(0.0))))

    def add_diagonals(self, each: "_Sum", head: Int32, first: Int32, dscores: cute.Tensor) -> None:
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
        total = _over_lanes(self.common[0], (1, 2, 4, 8, 16))
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

    def add_held(self, each: "_Sum", head: Int32, first: Int32, dscores: cute.Tensor) -> None:
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
        """What ``_Sum.add_element`` takes, of a score whose gradient stays as it is."""
        return known, self.entry.gradient(known, None, d_score, self.scale)[1], d_score

    def finish(self, head: Int32) -> None:
        """After the last tile of a head."""
        lane = self.thread % 32
        of_head = self.entry.known_of(head=head)
        for each in self.sums:
            match each.varies:
                case "":
                    total = _over_lanes(each.totals[0], (1, 2, 4, 8, 16))
                    each.add_to(of_head, total, lane == 0)
                case "k":
                    for r, key in enumerate(self.keys):
                        total = _over_lanes(each.totals[r], (1, 2))
                        each.add_to(self.entry.both(of_head, key), total, lane % 4 == 0)
                case _:
                    each.flush()


class _Sum:
    """Sums that go into one array.

    Attributes:
      varies: "", "q", "k" or "qk": whether the element depends on the query and on the key.
      totals: what has been summed of a head; by the thread's keys where these matter.
      columns: likewise of a tile, by its queries.

      may_agree: many a tile adds to one element alone, the gradients of its scores.
    """

    varies: str
    may_agree = False

    def __init__(self):
        self.totals = cute.make_rmem_tensor(1 if self.varies == "" else ROWS_PER_THREAD, Float32)
        self.columns: list[Float32] = []

    def start(self) -> None:
        self.totals.fill(0.0)

    def add(self, known: list[dict], values: list[dict[int, Any]], d_scores: list[Float32]) -> None:
        """A column of a tile.

        Args:
          known: of its query with each of the thread's keys.
          values: of the derivative's program, for each key.
          d_scores: the gradients of the changed scores.
        """
        parts = self.parts(values, d_scores)
        match self.varies:
            case "":
                self.totals[0] = self.totals[0] + (parts[0] + parts[1])
            case "k":
                for r, part in enumerate(parts):
                    self.totals[r] = self.totals[r] + part
            case "q":
                self.columns.append(parts[0] + parts[1])
            case _:
                for r, part in enumerate(parts):
                    self.add_element(r, known[r], values[r], part)

    def parts(self, values: list[dict[int, Any]], d_scores: list[Float32]) -> list[Float32]:
        """What a column's scores add."""
        raise NotImplementedError

    def add_to(self, known: dict, total: Float32, where: Boolean | None = None) -> None:
        """Adds to the element that follows from what is known, in memory."""
        raise NotImplementedError

    def add_element(self, r: int, known: dict, values: dict[int, Any], part: Float32) -> None:
        """Adds what one score adds, for the thread's r-th key."""
        raise NotImplementedError

    def add_total(self, values: dict[int, Any], where: Boolean) -> None:
        """Adds what the sum of some scores adds, whose elements are the same."""
        raise NotImplementedError

    def add_totals(self, values: dict[int, Any]) -> None:
        """Likewise, of all lanes; neighbours are likely to have one element."""
        raise NotImplementedError

    def flush(self) -> None:
        """Adds what ``add_element`` has kept."""


class _BiasSum(_Sum):
    """The gradient of a (1|B, 1|N, 1|T, 1|S) bias."""

    def __init__(self, entry: EntryElements, tensor: cute.Tensor):
        self.entry = entry
        self.tensor = tensor
        self.array = entry.elements.functions.bias
        self.varies = "".join(x for x, d in (("q", "t"), ("k", "s")) if d in self.array.full)
        super().__init__()

    def parts(self, values: list[dict[int, Any]], d_scores: list[Float32]) -> list[Float32]:
        return d_scores

    def add_to(self, known: dict, total: Float32, where: Boolean | None = None) -> None:
        place = self.entry.place(self.tensor, self.array, known)
        _add(self.tensor.iterator + place, total, where)

    def add_element(self, r: int, known: dict, values: dict[int, Any], part: Float32) -> None:
        if not self.array.has_all_axes:
            self.add_to(known, part)
            return
        # Each has one score.  What lies beyond the last row or key adds 0 to what is not its own.
        cute.arch.inline_ptx(
            "st.global.f32 [{$r0}], {$r1};",
            read_only_args=[
                (self.tensor.iterator + self.entry.place(self.tensor, self.array, known)).toint(),
                part,
            ],
            predicate=part != Float32(0.0),
        )


class _ReadSum(_Sum):
    """What one read of a score adds to the gradient of the array that it reads."""

    def __init__(self, entry: EntryElements, tensor: cute.Tensor, array: int, at: int):
        self.program = entry.elements.derivative.program
        self.reads_score = entry.reads_score
        self.at = at
        reads = self.program.depends_on(at)
        by_score = bool({"score", "cotangent"} & reads)
        by = (("q", "q_idx" in reads or by_score), ("k", "kv_idx" in reads or by_score))
        self.varies = "".join(letter for letter, varies in by if varies)
        size = math.prod(self.program.array_types[array][1])
        batch = cutlass.min(entry.entry, Int32(tensor.shape[0]) - 1)
        self.base = tensor.iterator + Int64(batch) * size
        number = self.program.result(at)
        self.indices = self.program.reads_by_bounds(number)
        self.may_agree = (
            bool(self.indices)
            and entry.elements.positions is None
            and self.program.is_of_distance(number)
            and not self.reads_score
            and self.program.is_argument(0, "cotangent")
            and self.program.is_argument(at + 1, "cotangent")
        )
        self.kept = cute.make_rmem_tensor(ROWS_PER_THREAD, Int32) if self.varies == "qk" else None
        super().__init__()

    def start(self) -> None:
        super().start()
        if self.kept is not None:
            self.kept.fill(-1)

    def parts(self, values: list[dict[int, Any]], d_scores: list[Float32]) -> list[Float32]:
        parts = [Float32(self.program.value(of_key, self.at + 1)) for of_key in values]
        if not self.reads_score:
            return parts
        # Beyond the last row and key scores are 0, where a derivative may be infinite.
        return [
            select(d_score != Float32(0.0), part, Float32(0.0))
            for d_score, part in zip(d_scores, parts, strict=True)
        ]

    def agrees(self, query: dict, keys: Span) -> Boolean:
        """Whether a query and all of some keys read the same element."""
        return self.program.are_points(query["derivative"], self.indices, keys)

    def add_to(self, known: dict, total: Float32, where: Boolean | None = None) -> None:
        number = self.program.value(known["derivative"], self.at)
        is_inside = number >= 0
        _add(self.base + number, total, is_inside if where is None else is_inside & where)

    def add_element(self, r: int, known: dict, values: dict[int, Any], part: Float32) -> None:
        number = self.program.value(values, self.at)
        kept, total = self.kept[r], self.totals[r]
        _add_if((number != kept) & (kept >= 0), self.base + kept, total)
        self.totals[r] = select(number == kept, total + part, part)
        self.kept[r] = number

    def number(self, known: dict) -> Int32:
        """The element that follows from what is known, negative for none."""
        return Int32(self.program.value(known["derivative"], self.at))

    def add_total(self, values: dict[int, Any], where: Boolean) -> None:
        number, part = self._of(values)
        _add(self.base + number, part, (number >= 0) & where)

    def add_totals(self, values: dict[int, Any]) -> None:
        _add_over_halves(self.base, *self._of(values))

    def _of(self, values: dict[int, Any]) -> tuple[Int32, Float32]:
        values_of = self.program.value
        return Int32(values_of(values, self.at)), Float32(values_of(values, self.at + 1))

    def flush(self) -> None:
        for r in range(ROWS_PER_THREAD if self.kept is not None else 0):
            _add(self.base + self.kept[r], self.totals[r], self.kept[r] >= 0)


@cute.jit
def _add(pointer: cute.Pointer, value: Float32, where: Boolean | None = None):
    """Adds to a float32 in global memory."""
    if const_expr(where is None):
        where = Boolean(True)
    if where:
        cute.arch.red(pointer, value, op="add", dtype="f32", sem="relaxed", scope="gpu")


@cute.jit
def _add_over_halves(base: cute.Pointer, number: Int32, value: Float32):
    """Adds each lane's value to its element, not below 0; at once where half a warp has one."""
    lane = cute.arch.lane_idx()
    of_first = cute.arch.shuffle_sync(number, offset=lane & 16)
    if cute.arch.vote_any_sync(number != of_first):
        _add(base + number, value, number >= 0)
    else:
        total = _over_lanes(value, (1, 2, 4, 8))
        _add(base + number, total, (number >= 0) & (lane % 16 == 0))


def _add_if(where: Boolean, pointer: cute.Pointer, value: Float32) -> None:
    """The same without a branch; ``where`` may not be a constant in disguise."""
    cute.arch.inline_ptx(
        "red.relaxed.gpu.global.add.f32 [{$r0}], {$r1};",
        read_only_args=[pointer.toint(), value],
        predicate=where,
    )


def _over_lanes(value: Float32, offsets: Sequence[int]) -> Float32:
    for offset in offsets:
        value = value + cute.arch.shuffle_sync_bfly(value, offset=offset)
    return value


def _over_keys(values: list[Float32], thread: Int32) -> tuple[list[Float32], Int32]:
    """Sums over the eight lanes that hold the same columns.

    Each exchange of two lanes halves the columns that a lane goes on with.

    Returns:
      The sums that this lane is left with, of neighbouring columns, and the first column.
    """
    first = Int32(0)
    for offset in (4, 8, 16):
        is_upper = (thread & offset) != 0
        if len(values) % 2:
            totals = [_over_lanes(x, (offset,)) for x in values]
            values = [select(is_upper, Float32(0.0), x) for x in totals]
            continue
        half = len(values) // 2
        values = _exchanged(values[:half], values[half:], is_upper, offset)
        first = first + select(is_upper, Int32(half), Int32(0))
    return values, first


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
        halves.append(_exchanged(turned[:half], turned[half:], is_upper, 16))
    totals = _exchanged(*halves, is_odd, 8)
    return totals, 8 * (select(is_upper, Int32(half), Int32(0)) - 2) + 2 * p + e % 2 - f


def _exchanged(
    low: list[Float32], high: list[Float32], is_upper: Boolean, offset: int
) -> list[Float32]:
    """Sums with the lane ``offset`` away: of ``low``, or in the upper of the two of ``high``."""
    sums = []
    for x, y in zip(low, high, strict=True):
        given = cute.arch.shuffle_sync_bfly(select(is_upper, x, y), offset=offset)
        sums.append(select(is_upper, y, x) + given)
    return sums
