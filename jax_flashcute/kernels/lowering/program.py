"""Masks and scores as element programs: a jaxpr of scalars, lowered to CuTe expressions.

A program is a flat list of equations, calls inlined, and of a ``cond`` all branches, among whose
results it chooses.  ``unsupported`` says, without a compiler, what cannot be lowered and where the
user wrote it.  A kernel evaluates a program in steps: what depends on the head or the row alone is
computed when these are known, once, and the rest for each element.

Along the columns of a tile an index is ``Affine``: a base and a step.  What is affine in it is
computed once a tile, and each column adds a constant.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from jax_flashcute.analysis import POSITION_LIMIT
from jax_flashcute.kernels.lowering import factors
from jax_flashcute.kernels.lowering.affine import AFFINE_RULES, SIGNED_RULES, Affine
from jax_flashcute.kernels.lowering.limits import INDEX_LIMITS, LIMIT_RULES, Limits, holds
from jax_flashcute.kernels.lowering.scalars import (
    RULES,
    SCALAR_DTYPES,
    VIEWS,
    Equation,
    View,
    as_number,
    evaluate,
    number_type,
)
from jax_flashcute.kernels.lowering.spans import (
    BOUNDING,
    OVERFLOWING,
    SAME_ELEMENTS,
    SPAN_RULES,
    Span,
    span_of,
)

LARGEST_VECTOR = 16
"""Elements of a value that is no view of an array."""


class ElementProgram:
    """Scalar functions of named arguments, and of the arrays that they close over."""

    def __init__(
        self,
        jaxpr: Jaxpr,
        arguments: Sequence[str],
        keys: int = POSITION_LIMIT,
        keeps_signs: bool = False,
    ):
        """``jaxpr``: its last inputs are the arguments; constants and inputs before are arrays.

        ``keys``: ``kv_idx`` is below it; ``keeps_signs``: none of ``bends`` changes its sign over
        the columns of a tile, nor is 0.
        """
        self._given = (jaxpr, arguments, keys)
        self._affine_rules = SIGNED_RULES if keeps_signs else AFFINE_RULES
        variables = [*jaxpr.constvars, *jaxpr.invars]
        arrays = variables[: len(variables) - len(arguments)]
        self.arguments = tuple(arguments)
        self.array_types = tuple((str(v.aval.dtype), v.aval.shape) for v in arrays)
        self.result_dtypes = tuple(str(v.aval.dtype) for v in jaxpr.outvars)
        self._equations: list[Equation] = []
        self._effects: list[str] = []
        self._count = 0
        self._arrays = tuple(self._new_value() for _ in arrays)
        self._inputs = {name: self._new_value() for name in arguments}
        numbers = [*self._arrays, *self._inputs.values()]
        constants = numbers[: len(jaxpr.constvars)]
        self._results = self._inline(jaxpr, constants, numbers[len(constants) :])
        self._equations = self._needed()
        self._limits = self._limits_of_values(INDEX_LIMITS | {"kv_idx": (0, keys - 1)})
        self._equations = self._without_decided()
        self._continuous = self._reaching_result_continuously()

    def _new_value(self) -> int:
        self._count += 1
        return self._count - 1

    def _inline(
        self, jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any], caller: str = ""
    ) -> list[Any]:
        """Appends the equations of ``jaxpr`` and of all that it calls; returns its results.

        ``caller``: the user's line, where the equations are JAX's own.
        """
        values: dict[Var, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            return np.asarray(atom.val) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            given = [read(atom) for atom in equation.invars]
            source = source_info_util.summarize(equation.source_info).strip() or caller
            inner = _inner_program(equation)
            if inner is not None:
                results = self._inline_closed(inner, given, source)
            elif equation.primitive.name == "cond":
                results = self._inline_branches(equation, given, source)
            else:
                results = self._append(equation, given, source)
                if equation.effects:
                    self._effects.append(f"{equation.primitive.name} has side effects, at {source}")
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _inline_closed(self, program: ClosedJaxpr, inputs: Sequence[Any], source: str) -> list[Any]:
        constants = [np.asarray(c) for c in program.consts]
        return self._inline(program.jaxpr, constants, inputs, source)

    def _inline_branches(self, equation, inputs: Sequence[Any], source: str) -> list[Any]:
        """The results of a ``cond``; what has side effects is refused in any branch."""
        index, *operands = inputs
        dtype = str(equation.invars[0].aval.dtype)
        found = [self._inline_closed(b, operands, source) for b in equation.params["branches"]]
        for made in self._equations if len(found) == 2 and isinstance(index, int) else ():
            if made.output == index and made.primitive == "convert_element_type":
                if made.dtypes[0] == "bool":
                    (index,), dtype = made.inputs, "bool"
        results = []
        for result, *cases in zip(equation.outvars, *found, strict=True):
            dtypes = (dtype, *[str(result.aval.dtype)] * (len(cases) + 1))
            shapes = ((), *[result.aval.shape] * (len(cases) + 1))
            chosen = (index, *cases), self._new_value(), dtypes, shapes, source
            self._equations.append(Equation("select_n", {}, *chosen))
            results.append(self._equations[-1].output)
        return results

    def _append(self, equation, inputs: Sequence[Any], source: str) -> list[int]:
        """An equation for each result, of which ``params["result"]`` is the place."""
        for place, result in enumerate(equation.outvars):
            atoms = [*equation.invars, result]
            self._equations.append(
                Equation(
                    equation.primitive.name,
                    {**equation.params, "result": place},
                    tuple(inputs),
                    self._new_value(),
                    tuple(str(a.aval.dtype) for a in atoms),
                    tuple(a.aval.shape for a in atoms),
                    source,
                )
            )
        return [e.output for e in self._equations[len(self._equations) - len(equation.outvars) :]]

    def _needed(self) -> list[Equation]:
        """The equations that the results depend on."""
        needed = self._computed_results()
        kept = []
        for equation in reversed(self._equations):
            if equation.output in needed:
                kept.append(equation)
                needed.update(equation.inputs_known)
        return kept[::-1]

    def _computed_results(self) -> set[int]:
        return {x for x in self._results if isinstance(x, int)}

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
        found = self._results[result]
        for equation in reversed(self._equations):
            if equation.output == found and equation.primitive in SAME_ELEMENTS:
                is_single = all(math.prod(shape) == 1 for shape in equation.shapes)
                found = equation.inputs[0] if is_single else found
        return isinstance(found, int) and found == self._inputs[name]

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
        needed = {value} if isinstance(value, int) else set()
        for equation in reversed(self._equations):
            if equation.output in needed:
                needed.update(equation.inputs_known)
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
        needed, found = {value}, []
        for equation in reversed(self._equations):
            if equation.output in needed:
                needed.update(equation.inputs_known)
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
        reads = equation.primitive in ("gather", "dynamic_slice")
        return reads and equation.inputs[0] not in ranging

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
            why = _why_not(equation)
            if why is not None:
                reasons.append(f"{why}, at {equation.source}")
        return list(dict.fromkeys(reasons))

    def start(self, arrays: Sequence["View"]) -> dict[int, Any]:
        """The values that are known before any argument is."""
        return self._completed(dict(zip(self._arrays, arrays, strict=True)))

    def given(self, known: Mapping[int, Any], **arguments: Any) -> dict[int, Any]:
        """``known`` with more arguments, CuTe numbers or ``Affine``, and all that follows."""
        added = {self._inputs[name]: value for name, value in arguments.items()}
        return self._completed({**known, **added})

    def at_column(self, known: Mapping[int, Any], column: int) -> dict[int, Any]:
        """``known`` for one column of the tile: nothing is ``Affine`` any more."""
        wanted = {i for e in self._equations if e.output not in known for i in e.inputs_known}
        wanted |= self._computed_results()
        at = {
            number: value.at(column) if isinstance(value, Affine) else value
            for number, value in known.items()
            if number in wanted or not isinstance(value, Affine)
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
            if any(isinstance(known[i], Affine) for i in equation.inputs_known):
                value = self._affine(equation, known)
                if value is not None:
                    known[equation.output] = value
            else:
                known[equation.output] = evaluate(equation, known)
        return known

    # ---- what is known of values beforehand ------------------------------------------------------

    def _limits_of_values(self, of_inputs: Mapping[str, Limits]) -> dict[int, Limits]:
        """The least and the greatest of each integer and boolean about which that is known."""
        numbers = self._inputs.items()
        limits = {number: of_inputs[name] for name, number in numbers if name in of_inputs}
        for equation in self._equations:
            given = [self._limits_of(x, limits) for x in equation.inputs]
            rule = LIMIT_RULES.get(equation.primitive)
            found = rule(*given) if rule is not None and None not in given else None
            if found is not None and holds(equation.dtypes[-1], found):
                limits[equation.output] = found
        return limits

    @staticmethod
    def _limits_of(source: int | np.ndarray, limits: Mapping[int, Limits]) -> Limits | None:
        if isinstance(source, int):
            return limits.get(source)
        if source.dtype.kind in "iub" and source.size:
            return int(source.min()), int(source.max())
        return None

    def _without_decided(self) -> list[Equation]:
        """The equations without choices that always fall the same way, and bounds never met."""
        same: dict[int, int | np.ndarray] = {}
        kept = []
        for equation in self._equations:
            inputs = tuple(same.get(x, x) if isinstance(x, int) else x for x in equation.inputs)
            equation = dataclasses.replace(equation, inputs=inputs)
            if equation.primitive == "select_n":
                limits = self._limits_of(inputs[0], self._limits)
                if limits is not None and limits[0] == limits[1]:
                    same[equation.output] = inputs[1 + limits[0]]
                    continue
            inside = self._is_inside(equation)
            kept.append(dataclasses.replace(equation, params={**equation.params, "inside": inside}))
        self._results = [same.get(x, x) if isinstance(x, int) else x for x in self._results]
        self._equations = kept
        return self._needed()

    def _is_inside(self, equation: Equation) -> bool:
        """Whether the indices of a gather or a slice always lie within the array."""
        if equation.primitive not in ("gather", "dynamic_slice"):
            return False
        if not all(isinstance(length, int) for length in equation.shapes[0]):
            return False  # of symbolic shape, which is refused in words
        sizes, indices = equation.params["slice_sizes"], equation.inputs[1:]
        lasts = [length - size for length, size in zip(equation.shapes[0], sizes, strict=True)]
        if equation.primitive == "gather":
            axes = equation.params["dimension_numbers"].start_index_map
            lasts = [min((lasts[axis] for axis in axes), default=0)]
        limits = [self._limits_of(x, self._limits) for x in indices]
        pairs = zip(limits, lasts, strict=True)
        return all(found is not None and 0 <= found[0] and found[1] <= n for found, n in pairs)

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

    def _affine(self, equation: Equation, known: Mapping[int, Any]) -> "Affine | None":
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
            limits = self._limits_of(equation.inputs[0], self._limits)
            return limits is not None and max(map(abs, limits)) <= 2 * POSITION_LIMIT
        if name == "mul" and all(isinstance(x, int) and x in affine for x in equation.inputs):
            return False
        is_float = result == "float32"
        is_rounded = is_float and equation.output not in self._continuous
        return name in self._affine_rules and not is_rounded


@dataclasses.dataclass(frozen=True)
class Derivative:
    """The transposed derivative of a score.

    Attributes:
      program: of ``("cotangent", *arguments)``, of the arrays of the score, and of an int32 array
        of the shape of each of ``numbered`` that holds its elements' numbers.  Its results: the
        cotangent of the score that was given, from that of the result; then, for each element that
        is read from an array of floats, its number, negative for none, and its cotangent.
      numbered: the arrays of floats, by their places among the score's.
      reads: of each element that is read, the array, likewise.
    """

    program: ElementProgram
    numbered: tuple[int, ...]
    reads: tuple[int, ...]

    def cotangents(self) -> list[tuple[int, int]]:
        """Of each read that has a gradient: the array, and the place of its number in results."""
        places = [(array, 1 + 2 * i) for i, array in enumerate(self.reads)]
        return [(array, at) for array, at in places if not self.program.is_zero(at + 1)]


def derivative(jaxpr: Jaxpr, arguments: Sequence[str], keys: int = POSITION_LIMIT) -> Derivative:
    """The transposed derivative of a score in its first argument and in its arrays of floats.

    Raises:
      NotImplementedError: it does more with such an array than to read single elements.
    """
    arrays = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.constvars]
    floats = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
    reads: list[int] = []

    def pulled_back(arrays, numbers, cotangent, score, *indices):
        numbers = {i: (i, x) for i, x in zip(floats, numbers, strict=True)}
        numbers = [numbers.get(i) for i in range(len(arrays))]
        found = []

        def of(score, read):
            given = [(x, n) for x, n in zip(arrays, numbers, strict=True)]
            given += [(x, None) for x in (score, *indices)]
            return _with_reads(jaxpr, given, read)[0][0]

        def noted(value, number):
            found.append((value.reshape(()), number))
            return value

        of(score, noted)

        def of_reads(score, values):
            rest = iter(values)
            return of(score, lambda value, _: next(rest).reshape(value.shape))

        result, pull = jax.vjp(of_reads, score, [value for value, _ in found])
        d_score, d_values = pull(cotangent.astype(result.dtype))
        reads[:] = [array for _, (array, _) in found]
        pairs = zip(found, d_values, strict=True)
        return d_score, [(number.reshape(()), d) for (_, (_, number)), d in pairs]

    given = [jax.ShapeDtypeStruct((), v.aval.dtype) for v in jaxpr.invars]
    numbers = [jax.ShapeDtypeStruct(arrays[i].shape, jnp.int32) for i in floats]
    closed = jax.make_jaxpr(pulled_back)(arrays, numbers, given[0], *given)
    if closed.consts:
        raise NotImplementedError("it closes over arrays of its own")
    program = ElementProgram(closed.jaxpr, ("cotangent", *arguments), keys)
    return Derivative(program, tuple(floats), tuple(reads))


def _with_reads(jaxpr: Jaxpr, given: Sequence[tuple], read: Callable) -> list[tuple]:
    """Evaluates a jaxpr, each element that is read from some arrays replaced.

    Args:
      given: for each constant and input its value, and for those arrays ``(name, numbers of the
        elements)``, else None.
      read: of a value of one element and its ``(name, number)``: what to put in its place.

    Returns:
      The results, likewise.
    """

    def replaced(value, number):
        if number is None or math.prod(value.shape) != 1:
            return value, number
        return read(value, number), None

    variables = [*jaxpr.constvars, *jaxpr.invars]
    # An array of one element may yet be indexed, out of its bounds too.
    known = {
        v: replaced(*pair) if jnp.ndim(pair[0]) == 0 else pair
        for v, pair in zip(variables, given, strict=True)
    }

    def of(atom):
        return (atom.val, None) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        inputs = [of(atom) for atom in equation.invars]
        values = [value for value, _ in inputs]
        if all(number is None for _, number in inputs):
            results = [(x, None) for x in _bound(equation, values, equation.params)]
        elif equation.primitive.name in PLAIN_CALLS:
            inner = _inner_program(equation)
            assert inner is not None
            constants = [(x, None) for x in inner.consts]
            results = _with_reads(inner.jaxpr, [*constants, *inputs], read)
        elif equation.primitive.name == "cond":
            results = _cond_with_reads(equation, inputs, read)
        elif equation.primitive.name in VIEWS and all(number is None for _, number in inputs[1:]):
            name, numbers = inputs[0][1] or (None, None)
            # Beyond the array there is no element: the least integer.
            params = equation.params
            params = params | {"fill_value": None} if "fill_value" in params else params
            (value,) = _bound(equation, values, equation.params)
            (number,) = _bound(equation, [numbers, *values[1:]], params)
            results = [replaced(value, (name, number))]
        elif all(number is None or math.prod(value.shape) == 1 for value, number in inputs):
            values = [replaced(*pair)[0] for pair in inputs]
            results = [(x, None) for x in _bound(equation, values, equation.params)]
        else:
            raise _as_a_whole(equation)
        known.update(zip(equation.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _cond_with_reads(equation, inputs: Sequence[tuple], read: Callable) -> list[tuple]:
    """The results of a ``cond``, as of ``_with_reads``.

    What any branch reads is read before; the cotangent of what is not chosen is 0.
    """

    def of_branch(branch, read):
        constants = [(x, None) for x in branch.consts]
        return _with_reads(branch.jaxpr, [*constants, *inputs[1:]], read)

    def chosen(branch, values):
        rest = iter(values)
        results = []
        for value, number in of_branch(branch, lambda value, _: next(rest).reshape(value.shape)):
            if number is not None:
                raise _as_a_whole(equation)
            results.append(value)
        return results

    choices = []
    for branch in equation.params["branches"]:
        values: list[Any] = []

        def kept(value, number, values=values):
            values.append(read(value, number))
            return values[-1]

        of_branch(branch, kept)
        choices.append(functools.partial(chosen, branch, values))
    return [(x, None) for x in jax.lax.switch(inputs[0][0], choices)]


def _as_a_whole(equation) -> NotImplementedError:
    return NotImplementedError(
        f"{equation.primitive.name} of an array of floats as a whole, at "
        f"{source_info_util.summarize(equation.source_info).strip()}"
    )


def _bound(equation, values: Sequence[Any], params: Mapping[str, Any]) -> Sequence[Any]:
    """The results of an equation's primitive, of other values."""
    params = equation.primitive.get_bind_params(dict(params))
    results = equation.primitive.bind(*values, **params)
    return results if equation.primitive.multiple_results else [results]


PLAIN_CALLS = ("jit", "closed_call", "core_call", "checkpoint", "remat2")
"""Primitives whose derivative is that of the program they call."""

CALLS = (*PLAIN_CALLS, "custom_jvp_call", "custom_vjp_call")
"""Primitives that are replaced by the program they call."""


def _inner_program(equation) -> ClosedJaxpr | None:
    """The program that an equation calls, to be inlined."""
    if equation.primitive.name in CALLS:
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            inner = equation.params.get(name)
            if isinstance(inner, ClosedJaxpr):
                return inner
            if isinstance(inner, Jaxpr):
                return ClosedJaxpr(inner, ())
    return None


def _why_not(equation: Equation) -> str | None:
    """Why an equation cannot be lowered; None where it can."""
    name = equation.primitive
    if name not in RULES:
        return f"the primitive {name} has no rule"
    for dtype in equation.dtypes:
        if dtype not in SCALAR_DTYPES:
            return f"{name} on {dtype}"
    *inputs, result = equation.shapes
    if name == "bitcast_convert_type" and not {"float32", "int32", "uint32"}.issuperset(
        equation.dtypes
    ):
        return f"{name} of {' to '.join(equation.dtypes)}"
    if name == "gather" and not _gather_is_plain(equation):
        return "a gather of more than one element at each index"
    sizes = [math.prod(shape) for shape in (() if name in VIEWS else inputs)]
    sizes += [] if name in VIEWS and name != "gather" else [math.prod(result)]
    if any(size > LARGEST_VECTOR for size in sizes):
        return f"{name} on more than {LARGEST_VECTOR} elements, {inputs} -> {result}"
    kinds = {SCALAR_DTYPES[dtype] for dtype in equation.dtypes}
    if kinds == {"bool"} and name in ("add", "sub", "mul", "div", "rem", "neg"):
        return f"{name} of booleans"
    return None


def _gather_is_plain(equation: Equation) -> bool:
    numbers = equation.params["dimension_numbers"]
    rank = len(equation.shapes[0])
    return (
        all(size == 1 for size in equation.params["slice_sizes"])
        and tuple(numbers.collapsed_slice_dims) == tuple(range(rank))
        and not numbers.operand_batching_dims
    )
