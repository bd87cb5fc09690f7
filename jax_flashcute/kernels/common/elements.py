"""Scores one by one in registers: ``score_mod``, soft cap, bias, and masks that are no intervals.

What depends on a row alone, or on a column alone, is computed once for it, and what is affine in
the column once a tile.  "Row" and "column" are those of a thread's registers: rows are queries in
the forward, keys in the backward.
"""

import math
from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8

from jax_flashcute.kernels.common.numbers import select, tanh
from jax_flashcute.kernels.common.softmax import LOG2_E, exp2
from jax_flashcute.kernels.elements import ElementArray, ElementFunctions, derivative_of, program_of
from jax_flashcute.kernels.lowering.affine import Affine
from jax_flashcute.kernels.lowering.columns import ColumnReads
from jax_flashcute.kernels.lowering.scalars import convert
from jax_flashcute.kernels.lowering.values import aligned_elements, arrays_as_views, numbered_view


def capped(score: Float32, scale: float, cap: float) -> Float32:
    """``cap * tanh(scale * score / cap)``, within ``2**-22 cap``."""
    grown = exp2(score * (2 * LOG2_E * scale / cap))
    return cap - (2 * cap) * cute.arch.rcp_approx(Float32(1.0) + grown)


def sinks_among(functions: ElementFunctions | None, arrays: tuple) -> cute.Tensor | None:
    """The array of sinks among those of ``functions``, if there is one."""
    return None if functions is None else Elements(functions, arrays).sinks


def sink_of(sinks: cute.Tensor, entry: Int32, head: Int32) -> Float32:
    """The sink of a query head in a (1|B, N) array."""
    return Float32(sinks[cutlass.min(entry, Int32(sinks.shape[0]) - 1), head])


class Elements:
    """What a call does to single scores, with its arrays."""

    def __init__(
        self,
        functions: ElementFunctions,
        tensors: tuple,
        *,
        differentiates: bool = False,
        only_hides: bool = False,
    ):
        """``tensors``: as ``functions.array_types`` has them.

        ``differentiates``: for ``EntryElements.gradient`` instead of ``element``;
        ``only_hides``: ``element`` leaves scores that it does not hide as they are.
        """
        self.functions = functions
        self.only_hides = only_hides
        self.derivative = None
        rest = list(tensors)
        self.programs = {}
        self.arrays: dict[str, Any] = {}
        mods = {"mask_mod": functions.mask_mod, "score_mod": functions.score_mod}
        self.batch_index = rest.pop(0) if any(f is not None for f in mods.values()) else None
        self.positions = None
        if functions.positions:
            self.positions, rest = rest[:2], rest[2:]
        for name, function in mods.items():
            if function is not None:
                program = self.programs[name] = program_of(function, functions.keys)
                count = len(program.array_types)
                self.arrays[name], rest = rest[:count], rest[count:]
        self.bias = rest.pop(0) if functions.bias is not None else None
        self.mask = rest.pop(0) if functions.mask is not None else None
        self.sinks = rest.pop(0) if functions.sinks else None
        if only_hides:
            self.programs.pop("score_mod", None)
        if differentiates:
            self._prepare_derivative()

    def _prepare_derivative(self) -> None:
        score_mod = self.functions.score_mod
        self.programs.pop("mask_mod", None)
        if self.functions.soft_cap is None:
            self.programs.pop("score_mod", None)
        if score_mod is not None:
            self.derivative = derivative_of(score_mod, self.functions.keys)
            self.programs["derivative"] = self.derivative.program
            self.arrays["derivative"] = self.arrays["score_mod"]

    def of_entry(self, entry: Int32, offset: Int32, lengths: tuple) -> "EntryElements":
        """For a batch entry whose first query is at ``offset``; lengths of the arrays."""
        return EntryElements(self, entry, offset, lengths)

    def sink(self, entry: Int32, head: Int32) -> Float32:
        """The sink of a query head."""
        return sink_of(self.sinks, entry, head)


class EntryElements:
    """The same for one batch entry: Python that makes straight-line code."""

    def __init__(self, elements: Elements, entry: Int32, offset: Int32, lengths: tuple):
        self.elements = elements
        self.entry = entry
        self.offset = offset
        self.q_length, self.kv_length = lengths
        self.known = {}
        for name, program in elements.programs.items():
            arrays = elements.arrays[name]
            views = arrays_as_views(program.array_types[: len(arrays)], arrays, entry)
            views += [numbered_view(shape) for _, shape in program.array_types[len(arrays) :]]
            known = program.start(views)
            self.known[name] = program.given(known, b=elements.batch_index[entry])

    def known_of(self, *, head=None, token=None, key=None) -> dict[str, Any]:
        """What follows from some of a query head, a row and a key; rows and keys within bounds."""
        given = {} if head is None else {"h": head}
        given |= {} if token is None else {"q_idx": self.position(token)}
        given |= {} if key is None else {"kv_idx": self.key_position(key)}
        found = {
            name: program.given(self.known[name], **given)
            for name, program in self.elements.programs.items()
        }
        return found | {"n": head, "t": token, "s": key}

    def position(self, token: Int32) -> Int32:
        """What a mask or a score sees as ``q_idx``."""
        positions = self.elements.positions
        return (token if positions is None else positions[0][self.entry, token]) + self.offset

    def key_position(self, key: Int32) -> Int32:
        """What a mask or a score sees as ``kv_idx``."""
        positions = self.elements.positions
        return key if positions is None else positions[1][self.entry, key]

    def queries(self, head: Int32, token: Int32) -> dict[str, Any]:
        """What follows from a query row of a head; beyond the last row, the last row's."""
        return self.known_of(head=head, token=cutlass.min(token, Int32(self.q_length) - 1))

    def keys(self, key: Int32) -> dict[str, Any]:
        """What follows from a key, likewise."""
        return self.known_of(key=cutlass.min(key, Int32(self.kv_length) - 1))

    def at_distance(self, head: Int32, distance: Int32) -> dict[str, Any]:
        """What follows from a head and ``q_idx - kv_idx`` alone, from the nearest that a row has.

        Of rows and keys that are not numbered by arrays.
        """
        least = self.offset - (Int32(self.kv_length) - 1)
        most = self.offset + (Int32(self.q_length) - 1)
        given = {"q_idx": cutlass.min(cutlass.max(distance, least), most), "kv_idx": Int32(0)}
        return {
            name: program.given(known, h=head, **given)
            for (name, program), known in zip(
                self.elements.programs.items(), self.known.values(), strict=True
            )
        }

    def both(self, query: dict[str, Any], key: dict[str, Any]) -> dict[str, Any]:
        """What follows from a query and a key together."""
        programs = self.elements.programs.items()
        found = {name: program.given({**query[name], **key[name]}) for name, program in programs}
        place = {d: query[d] if query[d] is not None else key[d] for d in "nts"}
        return query | key | found | place

    def at_column(self, known: dict[str, Any], column: int) -> dict[str, Any]:
        """What is known of one of a tile's columns."""
        programs = self.elements.programs.items()
        found = {name: program.at_column(known[name], column) for name, program in programs}
        reads = {n: x.at(column) for n, x in known.items() if isinstance(x, ColumnReads)}
        return known | found | reads | {"column": column}

    def along_keys(
        self, queries: list[dict[str, Any]], first: Int32, may_be_beyond: bool, adjacent: int = 1
    ) -> Callable[[int], list[dict[str, Any]]]:
        """A function of a column: what is known of its key with each query.

        What it reads for adjacent columns at once is read where the first of them is asked for: no
        branch may lie between.

        Args:
          queries: of ``queries``.
          first: the key of column 0.
          may_be_beyond: a column's key may lie beyond the last one.
          adjacent: ``first`` is a multiple of this power of two, and columns come in runs of so
            many, each from a multiple of it on.
        """

        def bounded(column: int):
            key = self.keys(first + column)
            return [self.both(query, key) for query in queries]

        # What is computed beyond the last key is hidden; what is read has to be there.
        may_be_beyond = may_be_beyond and self._reads_by_key
        if self.elements.positions is not None or (may_be_beyond and adjacent == 1):
            return bounded
        tile, rows = self.along(queries, first, adjacent)

        def stepped(column: int):
            key = self.at_column(tile, column)
            return [self.both(self.at_column(row, column), key) for row in rows]

        keys = Int32(self.kv_length) - first

        def bounded_but_for_reads(column: int):
            key = self.keys(first + column)
            pairs = zip(queries, rows, strict=True)
            return [
                self.both(self.with_reads(query, row, column, lambda c: keys > c), key)
                for query, row in pairs
            ]

        return bounded_but_for_reads if may_be_beyond else stepped

    def along(self, queries: list[dict[str, Any]], first: Int32, adjacent: int = 1):
        """What is known of all columns of a tile at once: of their keys, and with each query.

        ``adjacent``: that of ``along_keys``.
        """
        tile = self.known_of(key=Affine(first, Int32(1), adjacent))
        rows = [self.both(query, tile) for query in queries]
        if adjacent > 1:
            rows = [row | self._reads_of(row) for row in rows]
        return tile, rows

    def with_reads(
        self,
        query: dict[str, Any],
        row: dict[str, Any],
        column: int,
        where: Callable[[int], Boolean],
    ) -> dict[str, Any]:
        """``query`` with what is read of arrays for one of a tile's columns.

        Args:
          query, row: of one query, what is known of it, and what with all columns.
          where: of ``ColumnReads.at``.
        """
        found = {
            name: query[name] | program.reads_at_column(row[name], column, where)
            for name, program in self.elements.programs.items()
        }
        reads = {name: row[name].at(column, where) for name in self._arrays_by_key()}
        return query | found | reads

    def _arrays_by_key(self) -> dict[str, ElementArray]:
        """The bias and the mask, as far as ``element`` reads them for each key."""
        functions = self.elements.functions
        bias = None if self.elements.only_hides else functions.bias
        arrays = {"bias": bias, "mask": functions.mask}
        return {name: a for name, a in arrays.items() if a is not None and "s" in a.full}

    @property
    def _reads_by_key(self) -> bool:
        programs = self.elements.programs.values()
        return bool(self._arrays_by_key()) or any(program.reads_by_key for program in programs)

    def _reads_of(self, row: dict[str, Any]) -> dict[str, ColumnReads]:
        """What a row of a tile reads of the bias and the mask."""

        def reads(name: str, array: ElementArray) -> ColumnReads:
            tensor, width = getattr(self.elements, name), 2 if array.in_pairs else 1

            def read(column: int, where) -> list:
                place = self.place(tensor, array, row | {"column": column})
                return aligned_elements(tensor.iterator + place, width, where)

            return ColumnReads(width, read)

        return {name: reads(name, array) for name, array in self._arrays_by_key().items()}

    def element(
        self,
        known: dict[str, Any],
        score: Float32,
        scale: float,
        *,
        is_full: bool = False,
        bias: Float32 | None = None,
    ) -> Float32:
        """The score of a query and a key, times ``scale``; -inf where it is hidden.

        Args:
          known: of ``both``.
          score: the product, not scaled.
          scale: of the call; 1 where what follows scales scores that are hidden or not changed.
          is_full: the tile is listed as one that ``mask_mod`` hides nothing of.
          bias: that of the score; None: it is read from its array.
        """
        functions, programs = self.elements.functions, self.elements.programs
        if self.elements.only_hides:
            pass
        elif functions.soft_cap is None:
            score = self.modified(known, score * scale)
        elif functions.score_mod is None:
            score = capped(score, scale, functions.soft_cap)
        else:
            score = capped(self.modified(known, score * scale), 1.0, functions.soft_cap)
        if functions.bias is not None and not self.elements.only_hides:
            if bias is None:
                bias = Float32(self.of_element("bias", functions.bias, known))
            score = score + bias
        if functions.mask is not None:
            byte = self.of_element("mask", functions.mask, known)
            score = select(byte != Uint8(0), score, Float32(-math.inf))
        if "mask_mod" in programs and not is_full:
            seen = programs["mask_mod"].value(known["mask_mod"])
            score = select(Boolean(seen), score, Float32(-math.inf))
        return score

    def modified(self, known: dict[str, Any], score: Float32) -> Float32:
        """``score_mod`` of a scaled score; ``known``: of ``both``."""
        program = self.elements.programs.get("score_mod")
        if program is None:
            return score
        value = program.value(program.given(known["score_mod"], score=score))
        return convert(value, program.result_dtypes[0], "float32")

    def gradient(
        self, known: dict[str, Any], score: Float32 | None, d_score: Float32, scale: float
    ) -> tuple[Float32, dict[int, Any]]:
        """Derivatives of what ``element`` made of a score, times ``d_score``.

        Args:
          known: of ``both``.
          score: the product, not scaled; may be None where ``reads_score`` is False.
          d_score: the gradient of the result.
          scale: of the call.

        Returns:
          The gradient of the scaled score, and all values of ``Derivative.program``.
        """
        functions, derivative = self.elements.functions, self.elements.derivative
        given = {} if score is None else {"score": score * scale}
        if functions.soft_cap is not None:
            bounded = tanh(self.modified(known, given["score"]) * (1.0 / functions.soft_cap))
            d_score = d_score * (Float32(1.0) - bounded * bounded)
        if derivative is None:
            return d_score, {}
        values = derivative.program.given(known["derivative"], cotangent=d_score, **given)
        gradient = derivative.program.value(values)
        if self.reads_score:
            # Beyond the last row and key scores are 0, where a derivative may be infinite.
            gradient = select(d_score != Float32(0.0), gradient, Float32(0.0))
        return gradient, values

    @property
    def reads_score(self) -> bool:
        """Whether ``gradient`` is a function of the score too."""
        return self.elements.functions.derivatives_read_score

    def of_element(self, name: str, array: ElementArray, known: dict[str, Any]):
        """That of the bias or of the mask; ``known``: of ``both``."""
        if name in known:
            return known[name]
        return self.load(getattr(self.elements, name), array, known)

    def load(self, tensor: cute.Tensor, array: ElementArray, known: dict[str, Any]):
        """An element of a (1|B, 1|N, 1|T, 1|S) array; ``known``: of ``both``."""
        place = tensor.iterator + self.place(tensor, array, known)
        return cute.make_tensor(place, cute.make_layout(1))[0]

    def place(self, tensor: cute.Tensor, array: ElementArray, known: dict[str, Any]) -> Int64:
        """How far from its first element that of ``load`` lies.

        ``known["beside"]``: what is known of a key, and how far to the right of it this one lies.
        """
        if "beside" in known and "s" in array.full:
            first, keys = known["beside"]
            return self.place(tensor, array, first) + keys
        index = Int64(0)
        lengths = [Int64(tensor.shape[axis]) for axis in range(4)]
        if "b" in array.full:
            index = Int64(cutlass.min(self.entry, Int32(tensor.shape[0]) - 1)) * math.prod(
                lengths[1:], start=Int64(1)
            )
        step = 0
        for axis, letter in enumerate("nts", 1):
            if letter in array.full:
                place = known[letter]
                stride = math.prod(lengths[axis + 1 :], start=Int64(1))
                if isinstance(place, Affine):
                    # Keys are the last axis: columns lie at constant distances.
                    place, step = place.base, known["column"]
                index = index + Int64(place) * stride
        return index + step
