"""Sums that the backward's threads keep of the gradients of a bias and of arrays of floats.

What a score adds goes to one element of an array.  A thread sums it as long as the element stays
the same; then it goes to the sum in global memory by an atomic addition: to a float32, or, where
the order of additions may not matter, to an integer (fixed_point.py).
"""

import functools
import math
import operator
from collections.abc import Sequence
from copy import copy as copied
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from jax_flashcute.kernels.common.elements import EntryElements
from jax_flashcute.kernels.common.fixed_point import FixedPointSums
from jax_flashcute.kernels.common.numbers import select, store_float_if
from jax_flashcute.kernels.lowering.spans import Span


class FloatSums:
    """An array of float32 sums in global memory."""

    def __init__(self, tensor: cute.Tensor):
        self.shape = tensor.shape
        self.start = tensor.iterator

    def moved(self, elements: Int64) -> "FloatSums":
        """The sums from one on."""
        made = copied(self)
        made.start = self.start + elements
        return made

    def add(self, place: Int32 | Int64, value: Float32, where: Boolean | None = None) -> None:
        """Adds to a sum."""
        _add(self.start + place, value, where)

    def add_if(self, place: Int32 | Int64, value: Float32, where: Boolean) -> None:
        """The same without a branch; ``where`` may not be a constant in disguise."""
        cute.arch.inline_ptx(
            "red.relaxed.gpu.global.add.f32 [{$r0}], {$r1};",
            read_only_args=[(self.start + place).toint(), value],
            predicate=where,
        )

    def store(self, place: Int64, value: Float32) -> None:
        """Stores what is not 0 in place of a sum."""
        store_float_if(self.start + place, value, value != Float32(0.0))

    def finish(self, lane: Int32) -> None:
        """After all that a warp has added."""


Sums = FloatSums | FixedPointSums


def sums_of(
    entry: EntryElements, tensors: Sequence[cute.Tensor | FixedPointSums], keys: int
) -> "list[GradientSum]":
    """The sums of a thread that owns so many keys.

    Args:
      entry: of ``Elements`` that differentiate.
      tensors: of ``ElementFunctions.summed_ranks``, those of float32 as they are.
    """
    rest = [x if isinstance(x, FixedPointSums) else FloatSums(x) for x in tensors]
    sums: list[GradientSum] = []
    functions, derivative = entry.elements.functions, entry.elements.derivative
    if functions.bias is not None and "bias" not in functions.constants:
        sums.append(BiasSum(entry, rest.pop(0), keys))
    if derivative is not None and "score_mod_arrays" not in functions.constants:
        of_array = dict(zip(derivative.numbered, rest, strict=True))
        for array, at in derivative.cotangents():
            sums.append(ReadSum(entry, of_array[array], array, at, keys))
    return sums


class GradientSum:
    """Sums that go into one array.

    Attributes:
      varies: "", "q", "k" or "qk": whether the element depends on the query and on the key.
      totals: what has been summed of a head; by the thread's keys where these matter.
      columns: likewise of a tile, by its queries.

      may_agree: many a tile adds to one element alone, the gradients of its scores.
    """

    varies: str
    may_agree = False

    def __init__(self, keys: int):
        """``keys``: of a thread."""
        self.totals = cute.make_rmem_tensor(1 if self.varies == "" else keys, Float32)
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
                self.totals[0] = self.totals[0] + total_of(parts)
            case "k":
                for r, part in enumerate(parts):
                    self.totals[r] = self.totals[r] + part
            case "q":
                self.columns.append(total_of(parts))
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


class BiasSum(GradientSum):
    """The gradient of a (1|B, 1|N, 1|T, 1|S) bias."""

    def __init__(self, entry: EntryElements, sums: Sums, keys: int):
        self.entry = entry
        self.sums = sums
        self.array = entry.elements.functions.bias
        self.varies = "".join(x for x, d in (("q", "t"), ("k", "s")) if d in self.array.full)
        super().__init__(keys)

    def parts(self, values: list[dict[int, Any]], d_scores: list[Float32]) -> list[Float32]:
        return d_scores

    def add_to(self, known: dict, total: Float32, where: Boolean | None = None) -> None:
        self.sums.add(self.entry.place(self.sums, self.array, known), total, where)

    def add_element(self, r: int, known: dict, values: dict[int, Any], part: Float32) -> None:
        if not (self.array.has_all_axes and isinstance(self.sums, FloatSums)):
            self.add_to(known, part)
            return
        # Each has one score.  What lies beyond the last row or key adds 0 to what is not its own.
        self.sums.store(self.entry.place(self.sums, self.array, known), part)


class ReadSum(GradientSum):
    """What one read of a score adds to the gradient of the array that it reads."""

    def __init__(self, entry: EntryElements, sums: Sums, array: int, at: int, keys: int):
        self.program = entry.elements.derivative.program
        self.reads_score = entry.reads_score
        self.at = at
        reads = self.program.depends_on(at)
        by_score = bool({"score", "cotangent"} & reads)
        by = (("q", "q_idx" in reads or by_score), ("k", "kv_idx" in reads or by_score))
        self.varies = "".join(letter for letter, varies in by if varies)
        size = math.prod(self.program.array_types[array][1])
        batch = cutlass.min(entry.entry, Int32(sums.shape[0]) - 1)
        self.sums = sums.moved(Int64(batch) * size)
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
        self.kept = cute.make_rmem_tensor(keys, Int32) if self.varies == "qk" else None
        super().__init__(keys)

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
        self.sums.add(number, total, is_inside if where is None else is_inside & where)

    def add_element(self, r: int, known: dict, values: dict[int, Any], part: Float32) -> None:
        number = self.program.value(values, self.at)
        kept, total = self.kept[r], self.totals[r]
        self.sums.add_if(kept, total, (number != kept) & (kept >= 0))
        self.totals[r] = select(number == kept, total + part, part)
        self.kept[r] = number

    def number(self, known: dict) -> Int32:
        """The element that follows from what is known, negative for none."""
        return Int32(self.program.value(known["derivative"], self.at))

    def add_total(self, values: dict[int, Any], where: Boolean) -> None:
        number, part = self._of(values)
        self.sums.add(number, part, (number >= 0) & where)

    def add_totals(self, values: dict[int, Any]) -> None:
        _add_over_halves(self.sums.add, *self._of(values))

    def _of(self, values: dict[int, Any]) -> tuple[Int32, Float32]:
        values_of = self.program.value
        return Int32(values_of(values, self.at)), Float32(values_of(values, self.at + 1))

    def flush(self) -> None:
        for r in range(0 if self.kept is None else cute.size(self.kept)):
            self.sums.add(self.kept[r], self.totals[r], self.kept[r] >= 0)


@cute.jit
def _add(pointer: cute.Pointer, value: Float32, where: Boolean | None = None):
    """Adds to a float32 in global memory."""
    if const_expr(where is None):
        where = Boolean(True)
    if where:
        cute.arch.red(pointer, value, op="add", dtype="f32", sem="relaxed", scope="gpu")


@cute.jit
def _add_over_halves(add: cutlass.Constexpr, number: Int32, value: Float32):
    """Adds each lane's value to its element, not below 0; at once where half a warp has one."""
    lane = cute.arch.lane_idx()
    of_first = cute.arch.shuffle_sync(number, offset=lane & 16)
    if cute.arch.vote_any_sync(number != of_first):
        add(number, value, number >= 0)
    else:
        total = over_lanes(value, (1, 2, 4, 8))
        add(number, total, (number >= 0) & (lane % 16 == 0))


def total_of(values: Sequence[Float32]) -> Float32:
    return functools.reduce(operator.add, values)


def over_lanes(value: Float32, offsets: Sequence[int]) -> Float32:
    for offset in offsets:
        value = value + cute.arch.shuffle_sync_bfly(value, offset=offset)
    return value


def over_keys(
    values: list[Float32], thread: Int32, offsets: Sequence[int]
) -> tuple[list[Float32], Int32]:
    """Sums over the lanes that hold the same columns, which lie ``offsets`` apart.

    Each exchange of two lanes halves the columns that a lane goes on with.

    Returns:
      The sums that this lane is left with, of neighbouring columns, and the first column.
    """
    first = Int32(0)
    for offset in offsets:
        is_upper = (thread & offset) != 0
        if len(values) % 2:
            totals = [over_lanes(x, (offset,)) for x in values]
            values = [select(is_upper, Float32(0.0), x) for x in totals]
            continue
        half = len(values) // 2
        values = exchanged(values[:half], values[half:], is_upper, offset)
        first = first + select(is_upper, Int32(half), Int32(0))
    return values, first


def exchanged(
    low: list[Float32], high: list[Float32], is_upper: Boolean, offset: int
) -> list[Float32]:
    """Sums with the lane ``offset`` away: of ``low``, or in the upper of the two of ``high``."""
    sums = []
    for x, y in zip(low, high, strict=True):
        given = cute.arch.shuffle_sync_bfly(select(is_upper, x, y), offset=offset)
        sums.append(select(is_upper, y, x) + given)
    return sums
