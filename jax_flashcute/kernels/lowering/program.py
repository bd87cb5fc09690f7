"""Masks and scores as element programs: what they depend on, and their values in a kernel.

``unsupported`` says, without a compiler, what cannot be lowered and where the user wrote it.  A
kernel evaluates a program in steps: what depends on the head or the row alone is computed when
these are known, once, and the rest for each element.

Along the columns of a tile an index is ``Affine``: a base and a step.  What is affine in it is
computed once a tile, and each column adds a constant.  What is read at such an index is
``ColumnReads``, where it is proven that elements of adjacent columns lie aligned to as many.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jax_flashcute.analysis import POSITION_LIMIT
from jax_flashcute.kernels.lowering import factors
from jax_flashcute.kernels.lowering.affine import AFFINE_RULES, SIGNED_RULES, Affine
from jax_flashcute.kernels.lowering.columns import ColumnReads, aligned_widths, read_along
from jax_flashcute.kernels.lowering.equations import Equation, FlatProgram, needed_for
from jax_flashcute.kernels.lowering.limits import (
    INDEX_LIMITS,
    is_within,
    limits_of,
    limits_of_values,
)
from jax_flashcute.kernels.lowering.pruning import needed_equations, without_decided
from jax_flashcute.kernels.lowering.rules import evaluate, why_not
from jax_flashcute.kernels.lowering.spans import BOUNDING, OVERFLOWING, SPAN_RULES, Span, span_of
from jax_flashcute.kernels.lowering.values import (
    FLOATS,
    SCALAR_DTYPES,
    View,
    as_number,
    number_type,
)
from jax_flashcute.kernels.lowering.vectors import READS, SAME_ELEMENTS, bounded

ALONG_COLUMNS = Affine, ColumnReads
"""What differs from column to column of a tile, and is computed for all of them at once."""


class ElementProgram:
    """Scalar functions of named arguments, and of the arrays that they close over."""

    def __init__(
        self,
        flat: FlatProgram,
        keys: int = POSITION_LIMIT,
        keeps_signs: bool = False,
        counts: Mapping[str, int] | None = None,
    ):
        """``keys``: ``kv_idx`` is below it; ``keeps_signs``: none of ``bends`` changes its sign
        over the columns of a tile, nor is 0; ``counts``: other arguments that are from 0 to below
        a number.
        """
        self._given = (flat, keys)
        self._affine_rules = SIGNED_RULES if keeps_signs else AFFINE_RULES
        self.arguments = tuple(flat.inputs)
        self.array_types = flat.array_types
        self.result_dtypes = flat.result_dtypes
        self._effects = flat.effects
        self._arrays, self._inputs = flat.arrays, flat.inputs
        equations = needed_equations(flat.equations, flat.results)
        known = {name: (0, count - 1) for name, count in (counts or {}).items()}
        of_indices = INDEX_LIMITS | {"kv_idx": (0, keys - 1)} | known
        of_inputs = {n: of_indices[name] for name, n in flat.inputs.items() if name in of_indices}
        self._limits = limits_of_values(equations, of_inputs)
        self._equations, self._results = without_decided(equations, flat.results, self._limits)
        self._continuous = self._reaching_result_continuously()

    @property
    def is_identity(self) -> bool:
        """Whether the first result is the first argument, untouched."""
        result = self._results[0]
        return isinstance(result, int) and result == self._inputs[self.arguments[0]]

    def is_zero(self, result: int) -> bool:
        """Whether a result, by its place among them, is the constant 0."""
        found = self._results[result]
        return isinstance(found, np.ndarray) and not found.any()

    def result(self, result: int) -> int | np.ndarray:
        """A result, by its place among them, as the number of its value or as a constant."""
        return self._results[result]

    def is_argument(self, result: int, name: str) -> bool:
        """Whether a result, by its place among them, is an argument, if in another shape."""
        found, _ = self._source_of(self._results[result], lambda equation: False)
        return isinstance(found, int) and found == self._inputs[name]

    def _source_of(
        self, value: int | np.ndarray, also: Callable[[Equation], bool]
    ) -> tuple[int | np.ndarray, Equation | None]:
        """What a single element is that only its shape, or ``also`` operations, made of.

        A value, and the operation that gives it, None for an argument or a constant.
        """
        for equation in reversed(self._equations):
            if not isinstance(value, int) or equation.output != value:
                continue
            is_single = all(math.prod(shape) == 1 for shape in equation.shapes)
            if not is_single or not (equation.primitive in SAME_ELEMENTS or also(equation)):
                return value, equation
            value = equation.inputs[0]
        return value, None

    def largest_factor(self, result: int, name: str) -> float | None:
        """A bound on how many times an argument a result, by its place among them, may be.

        None where it is not a multiple of the argument whose factor has limits known beforehand.
        """
        return factors.largest(
            self._equations, self._limits, self._inputs[name], self._results[result]
        )

    def depends_on(self, result: int) -> frozenset[str]:
        """The arguments that a result, by its place among them, is a function of."""
        return self.arguments_of(self._results[result])

    def arguments_of(self, value: int | np.ndarray) -> frozenset[str]:
        """The arguments that a value is a function of."""
        needed = needed_for([value], self._equations)
        return frozenset(name for name, number in self._inputs.items() if number in needed)

    def addends(self) -> list[tuple[int | np.ndarray, bool]] | None:
        """What the result is the first argument plus: values, and whether they are subtracted.

        None where it is more than a sum of float32.  None of the values depends on the argument.
        """
        name, found = self.arguments[0], []
        by_output = {equation.output: equation for equation in self._equations}
        at = self._results[0]
        while at != self._inputs[name]:
            equation = by_output.get(at) if isinstance(at, int) else None
            if equation is None or equation.primitive not in ("add", "sub"):
                return None
            if equation.dtypes != ("float32",) * 3 or any(equation.shapes):
                return None
            is_sum = equation.primitive == "add"
            of_score = [name in self.arguments_of(x) for x in equation.inputs]
            if of_score != [True, False] and not (is_sum and of_score == [False, True]):
                return None
            at, other = equation.inputs[:: 1 if of_score[0] else -1]
            found.append((other, not is_sum))
        return found

    def added_element(self) -> tuple[int, list[str | None]] | None:
        """The number of the array of which the result is the first argument plus one element.

        And the arguments, by name, that are its indices, None for others; all are inside.  None
        where the result is anything else.
        """
        addends = self.addends()
        if addends is None or [is_subtracted for _, is_subtracted in addends] != [False]:
            return None
        ((addend, _),) = addends
        _, equation = self._source_of(addend, _to_float32)
        if equation is None or equation.primitive != "dynamic_slice":
            return None
        array, *indices = equation.inputs
        is_single = math.prod(equation.shapes[-1]) == 1 and equation.params["inside"]
        if not is_single or array not in self._arrays or equation.dtypes[-1] not in FLOATS:
            return None
        names = {number: name for name, number in self._inputs.items()}
        named = [names.get(x) if isinstance(x, int) else None for x in indices]
        return self._arrays.index(array), named

    def kind_of(self, value: int | np.ndarray) -> str | None:
        """How one of ``addends`` varies.

        "row": not with the key; "affine": as ``Affine``; "tile": as ``reads_by_bounds`` has it;
        "key": otherwise, and not with the row, if heads are no matter; "distance": as
        ``is_of_distance`` has it; "bent": likewise, and as ``Affine`` between its ``bends``.
        """
        arguments = self.arguments_of(value)
        if "kv_idx" not in arguments:
            return "row"
        if self.is_affine(value):
            return "affine"
        if "q_idx" not in arguments:
            return "key"
        if self.reads_by_bounds(value):
            return "tile"
        if not self.is_of_distance(value):
            return None
        return "bent" if self.bends(value) else "distance"

    def is_of_distance(self, value: int | np.ndarray) -> bool:
        """Whether a value depends on ``q_idx`` and ``kv_idx`` by their difference alone."""
        places = {self._inputs["q_idx"], self._inputs["kv_idx"]}
        needed = {value} if isinstance(value, int) else set()
        for equation in reversed(self._equations):
            if equation.output not in needed:
                continue
            used = places & set(equation.inputs_known)
            if not used:
                needed.update(equation.inputs_known)
            elif equation.primitive != "sub" or used != places:
                return False
        return not places & needed

    def is_affine(self, value: int | np.ndarray) -> bool:
        """Whether a value is ``Affine`` where ``kv_idx`` is, and depends on no score."""
        affine, others = {self._inputs["kv_idx"]}, {self._inputs[self.arguments[0]]}
        for equation in self._equations:
            known = set(equation.inputs_known)
            if known & others or (known & affine and not self._keeps_affine(equation, affine)):
                others.add(equation.output)
            elif known & affine:
                affine.add(equation.output)
        return isinstance(value, int) and value in affine

    @functools.cached_property
    def between_bends(self) -> "ElementProgram":
        """The same program, where no value of ``bends`` changes its sign nor is 0."""
        return ElementProgram(*self._given, keeps_signs=True)

    def bends(self, value: int | np.ndarray) -> list[int]:
        """Values that have bounds to follow, and while whose signs last a value is ``Affine``.

        Empty where it never is.
        """
        if not isinstance(value, int) or not self.between_bends.is_affine(value):
            return []
        needed, found = needed_for([value], self._equations), []
        ranging = {self._inputs["kv_idx"]}
        for equation in self._equations:
            if equation.output not in needed or not ranging & set(equation.inputs_known):
                continue
            if not self._keeps_bounds(equation, ranging):
                return []
            ranging.add(equation.output)
            if equation.primitive == "abs":
                found.append(equation.inputs[0])
        return found

    def reads_by_bounds(self, value: int | np.ndarray) -> list[int]:
        """Indices by which alone a value depends on ``kv_idx``, where that has bounds to follow.

        The numbers of values that are indices of arrays, and that a choice or a limit may keep the
        same over all keys of a tile, as those of distances that are clipped; none where it is
        otherwise.
        """
        ranging, others = {self._inputs["kv_idx"]}, {self._inputs[self.arguments[0]]}
        indices: dict[int, set[int]] = {}
        is_bounded = False
        for equation in self._equations:
            known = set(equation.inputs_known)
            found = set().union(*(indices.get(x, set()) for x in known))
            if known & others:
                others.add(equation.output)
            elif known & ranging and not self._is_read(equation, ranging):
                keeps = self._keeps_bounds(equation, ranging)
                (ranging if keeps else others).add(equation.output)
                is_bounded |= equation.primitive in BOUNDING
            elif known & ranging:
                found |= known & ranging
            indices[equation.output] = found
        is_read = isinstance(value, int) and value not in ranging | others
        return sorted(indices.get(value, set())) if is_read and is_bounded else []

    def _is_read(self, equation: Equation, ranging: Collection[int]) -> bool:
        return equation.primitive in READS and equation.inputs[0] not in ranging

    def _keeps_bounds(self, equation: Equation, ranging: Collection[int]) -> bool:
        """Whether an operation makes a ``Span`` of inputs of which some are."""
        name, result = equation.primitive, equation.dtypes[-1]
        if not {"int32", "float32", "bool"}.issuperset(equation.dtypes):
            return False
        if name in OVERFLOWING and result == "int32" and equation.output not in self._limits:
            return False
        if name == "convert_element_type" and result == "bool" != equation.dtypes[0]:
            # Whether a number is not 0 does not rise with it.
            return False
        if name == "select_n" and equation.dtypes[0] != "bool":
            return False  # one of several
        if name in ("mul", "div"):
            first, *rest = (isinstance(x, int) and x in ranging for x in equation.inputs)
            is_divided = result == "float32" and not any(rest)
            return is_divided if name == "div" else not (first and any(rest))
        return name in SAME_ELEMENTS or name in SPAN_RULES

    def are_points(self, known: Mapping[int, Any], indices: Sequence[int], keys: Span) -> Any:
        """Whether all indices of ``reads_by_bounds`` are the same for all of some keys."""
        spans = self._spans(known, keys)
        found = [x for i in indices for x in np.ravel(np.asarray(spans[i], object))]
        points = [x.is_point for x in found if isinstance(x, Span)]
        return functools.reduce(lambda a, b: a & b, points)

    def have_signs(self, known: Mapping[int, Any], bends: Sequence[int], keys: Span) -> Any:
        """Whether each of ``bends`` is above 0 for all of some keys, or below it for all."""
        spans = self._spans(known, keys)
        signs = [(spans[i].low > 0) | (spans[i].high < 0) for i in bends]
        return functools.reduce(lambda a, b: a & b, signs)

    def _spans(self, known: Mapping[int, Any], keys: Span) -> dict[int, Any]:
        """What has bounds to follow, between those of some keys."""
        spans: dict[int, Any] = {self._inputs["kv_idx"]: keys}
        for equation in self._equations:
            ranges = any(x in spans for x in equation.inputs_known)
            if not ranges or self._is_read(equation, spans):
                continue
            if not all(x in spans or x in known for x in equation.inputs_known):
                continue
            if self._keeps_bounds(equation, spans):
                inputs = [
                    spans[x] if isinstance(x, int) and x in spans else as_number(x, known, dtype)
                    for x, dtype in zip(equation.inputs, equation.dtypes[:-1], strict=True)
                ]
                is_bounded = equation.output in self._limits or equation.dtypes[-1] != "int32"
                spans[equation.output] = span_of(equation, not is_bounded, *inputs)
        return spans

    def unsupported(self) -> list[str]:
        """Every reason why the program cannot be lowered, with the user's line."""
        reasons = list(self._effects)
        for dtype, shape in self.array_types:
            if dtype not in SCALAR_DTYPES:
                reasons.append(f"it closes over an array of {dtype}")
            if not all(isinstance(length, int) for length in shape):
                reasons.append(f"it closes over an array of symbolic shape {shape}")
            elif 0 in shape:
                reasons.append(f"it closes over an empty array, of shape {shape}")
        for equation in self._equations:
            why = why_not(equation)
            if why is not None:
                reasons.append(f"{why}, at {equation.source}")
        return list(dict.fromkeys(reasons))

    def start(self, arrays: Sequence[View]) -> dict[int, Any]:
        """The values that are known before any argument is."""
        return self._completed(dict(zip(self._arrays, arrays, strict=True)))

    def given(self, known: Mapping[int, Any], **arguments: Any) -> dict[int, Any]:
        """``known`` with more arguments, CuTe numbers or ``Affine``, and all that follows."""
        added = {self._inputs[name]: value for name, value in arguments.items()}
        return self._completed({**known, **added})

    def at_column(self, known: Mapping[int, Any], column: int) -> dict[int, Any]:
        """``known`` for one column of the tile: nothing is of ``ALONG_COLUMNS`` any more."""
        wanted = {i for e in self._equations if e.output not in known for i in e.inputs_known}
        wanted |= self._computed_results()
        at = {
            number: value.at(column) if isinstance(value, ALONG_COLUMNS) else value
            for number, value in known.items()
            if number in wanted or not isinstance(value, ALONG_COLUMNS)
        }
        return self._completed(at)

    def value(self, known: Mapping[int, Any], result: int = 0) -> Any:
        """A result, a CuTe number, once all arguments that it depends on are known."""
        return as_number(self._results[result], known, self.result_dtypes[result])

    def addend(self, known: Mapping[int, Any], value: int | np.ndarray) -> Any:
        """One of ``addends``, a CuTe number or ``Affine``, likewise."""
        found = known[value] if isinstance(value, int) else None
        return found if isinstance(found, Affine) else as_number(value, known, "float32")

    def _completed(self, known: dict[int, Any]) -> dict[int, Any]:
        for equation in self._equations:
            if equation.output in known or not all(i in known for i in equation.inputs_known):
                continue
            if any(isinstance(known[i], ALONG_COLUMNS) for i in equation.inputs_known):
                value = self._along_columns(equation, known)
                if value is not None:
                    known[equation.output] = value
            else:
                known[equation.output] = evaluate(equation, known)
        return known

    def _computed_results(self) -> set[int]:
        return {x for x in self._results if isinstance(x, int)}

    def _reaching_result_continuously(self) -> set[int]:
        """Values that go into the results by sums and products alone.

        Their rounding may differ by what a sum's does; elsewhere, as before a comparison, a
        value is what its own operations give.
        """
        reaching: set[Any] = self._computed_results()
        elsewhere: set[int] = set()
        for equation in reversed(self._equations):
            passes = equation.primitive in self._affine_rules
            passes = passes and equation.output in reaching - elsewhere
            (reaching if passes else elsewhere).update(equation.inputs_known)
        return reaching - elsewhere

    @functools.cached_property
    def _widths(self) -> dict[int, int]:
        return aligned_widths(self._given[0], self._equations)

    @functools.cached_property
    def reads_by_key(self) -> bool:
        """Whether an array is read at indices that depend on ``kv_idx``."""
        ranging = {self._inputs["kv_idx"]}
        for equation in self._equations:
            if ranging & set(equation.inputs_known):
                ranging.add(equation.output)
        reads = [equation for equation in self._equations if equation.primitive in READS]
        return any(x in ranging for read in reads for x in read.inputs[1:] if isinstance(x, int))

    def reads_at_column(
        self, known: Mapping[int, Any], column: int, where: Callable[[int], Any]
    ) -> dict[int, Any]:
        """What ``ColumnReads`` read for one column of the tile; ``where``: as there."""
        reads = {number: x for number, x in known.items() if isinstance(x, ColumnReads)}
        return {number: x.at(column, where) for number, x in reads.items()}

    def _along_columns(
        self, equation: Equation, known: Mapping[int, Any]
    ) -> Affine | ColumnReads | None:
        """What an operation makes of inputs of ``ALONG_COLUMNS``; None where that is none."""
        given = [known[i] for i in equation.inputs_known]
        if any(isinstance(x, ColumnReads) for x in given):
            return None
        if equation.primitive in READS:
            return self._read_along(equation, known)
        return self._affine(equation, known)

    def _read_along(self, equation: Equation, known: Mapping[int, Any]) -> ColumnReads | None:
        width, adjacent = self._widths.get(equation.output), known[self._inputs["kv_idx"]].adjacent
        if width is None or adjacent == 1 or math.prod(equation.shapes[-1]) > 1:
            return None
        starts, are_inside = [], []
        along = equation.inputs[1:], equation.dtypes[1:-1], equation.shapes[0]
        for source, dtype, length in zip(*along, strict=True):
            start = as_number(source, known, dtype)
            are_inside.append(is_within(limits_of(source, self._limits), length - 1))
            if not are_inside[-1] and not isinstance(start, Affine):
                start = bounded(start, dtype, length - 1)
            starts.append(start)
        if [isinstance(x, Affine) for x in starts].index(True) < len(starts) - 1:
            return None
        width, view = min(width, adjacent), known[equation.inputs[0]]
        return read_along(view, starts, width, are_inside[-1], equation.shapes[-1])

    def _affine(self, equation: Equation, known: Mapping[int, Any]) -> Affine | None:
        """What an operation makes of ``Affine`` inputs; None where that is not ``Affine``."""
        affine = {i for i in equation.inputs_known if isinstance(known[i], Affine)}
        if not self._keeps_affine(equation, affine):
            return None
        values = [
            as_number(x, known, dtype)
            for x, dtype in zip(equation.inputs, equation.dtypes[:-1], strict=True)
        ]
        if equation.primitive == "convert_element_type":
            return values[0].converted(number_type(equation.dtypes[-1]))
        return self._affine_rules[equation.primitive](*values)

    def _keeps_affine(self, equation: Equation, affine: Collection[int]) -> bool:
        """Whether an operation makes an ``Affine`` value of inputs of which some are."""
        name, result = equation.primitive, equation.dtypes[-1]
        if any(equation.shapes) or not {"int32", "float32"}.issuperset(equation.dtypes):
            return False
        if name == "convert_element_type":
            # Exact up to 2**24, and rounded once beyond, as the sum would be.
            limits = limits_of(equation.inputs[0], self._limits)
            return limits is not None and max(map(abs, limits)) <= 2 * POSITION_LIMIT
        if name == "mul" and all(isinstance(x, int) and x in affine for x in equation.inputs):
            return False
        is_float = result == "float32"
        is_rounded = is_float and equation.output not in self._continuous
        return name in self._affine_rules and not is_rounded


def _to_float32(equation: Equation) -> bool:
    return equation.primitive == "convert_element_type" and equation.dtypes[-1] == "float32"
