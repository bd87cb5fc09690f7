"""What the columns of a tile read of an array where it lies as they do: adjacent ones at once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_flashcute.analysis import Program, Step, load_of, understand
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.lowering.equations import Equation, FlatProgram
from jax_flashcute.kernels.lowering.values import View, array_of


class ColumnReads:
    """Elements of a tile's columns, read when the first of some adjacent columns is asked for.

    What was read is kept for the others: all must be asked for where the first one was, in one
    stretch of code without branches.
    """

    def __init__(self, width: int, read: Callable[[int, Any], Sequence[Any]]):
        """``read``: the elements of ``width`` columns from one that is a multiple of it; anything
        where its second argument, a Boolean or None, is False.
        """
        self._width = width
        self._read = read
        self._found: dict[int, Sequence[Any]] = {}

    def at(self, column: int, where: Callable[[int], Any] | None = None) -> Any:
        """The element of a column; anything where ``where`` of the first one read with it is False.

        Without ``where`` all columns are those of keys.
        """
        place = column % self._width
        first = column - place
        if first not in self._found:
            self._found[first] = self._read(first, where and where(first))
        return self._found[first][place]


def read_along(
    view: View, starts: Sequence[Any], width: int, is_inside: bool, sizes: Sequence[int]
) -> ColumnReads:
    """Single elements of an array, of which the last index is ``Affine``.

    Args:
      view: all of the array, with ``load_aligned``.
      starts: Int32 indices, within the array but for the last.
      width: 1, or what divides the length of the last axis, and the last index at the columns that
        are multiples of it, where its step is 1.
      is_inside: the last index lies within the array too, for all keys; otherwise the nearest one
        that does is meant.
      sizes: the shape of what is read, of 1s.
    """
    load = view.load_aligned
    if load is None:
        raise TypeError("view: of numbers that are in no memory")
    *others, along = starts
    length = view.shape[-1]
    offset = view.offset
    for start, stride in zip(others, view.strides, strict=False):
        offset = offset + start * stride

    def read(column: int, where: Any) -> list[np.ndarray]:
        index = along.at(column)
        if is_inside:
            found = load(offset + index, width, where)
        else:
            # All of the columns lie inside or none does.
            first, last = type(index)(0), type(index)(length - width)
            is_before, is_beyond = index < first, index > last
            near = select(is_before, first, select(is_beyond, last, index))
            found = load(offset + near, width, None)
            ends = found[0], found[-1]
            found = [select(is_before, ends[0], select(is_beyond, ends[1], x)) for x in found]
        return [array_of(x).reshape(tuple(sizes)) for x in found]

    return ColumnReads(width, read)


def aligned_widths(flat: FlatProgram, equations: Sequence[Equation]) -> dict[int, int]:
    """Of each read of an array by key, by its equation's output, the ``width`` of its ``Load``.

    ``equations``: those of the program that are computed.
    """
    program, numbers = Program(arrays=len(flat.arrays)), {}

    def number(source: int | np.ndarray, dtype: str, shape: tuple[Any, ...]) -> int:
        found = numbers.get(source) if isinstance(source, int) else None
        if found is None:
            found = program.new(shape, dtype)
            if isinstance(source, int):
                numbers[source] = found
            else:
                program.constants[found] = source
        return found

    for array, (dtype, shape) in zip(flat.arrays, flat.array_types, strict=True):
        number(array, dtype, shape)
    # What a score is a function of beside the indices need not be known.
    arguments = [number(x, "int32", ()) for x in flat.inputs.values()]
    program.arguments = range(arguments[0], arguments[-1] + 1)
    for equation in equations:
        *inputs, output = [
            number(*of)
            for of in zip(
                (*equation.inputs, equation.output), equation.dtypes, equation.shapes, strict=True
            )
        ]
        name, parameters = equation.primitive, equation.params
        program.steps.append(Step(name, _not_run, tuple(inputs), (output,), parameters))
    understand(program)
    loads = [load_of(program, step) for step in program.steps]
    pairs = zip(equations, loads, strict=True)
    return {
        equation.output: load.width for equation, load in pairs if load and load.kind != "uniform"
    }


def _not_run(*values: Any) -> Any:
    raise NotImplementedError("a step that is analysed alone")
