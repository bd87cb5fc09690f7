"""Element programs as flat lists of equations."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Equation:
    """One operation.

    Attributes:
      primitive: its name, a key of ``RULES``.
      params: the primitive's.
      inputs: numbers of values, or numpy arrays that are constants.
      output: the number of the value it computes.
      dtypes, shapes: of the inputs, then of the output.
      source: file, line and function where the user wrote it.
    """

    primitive: str
    params: Mapping[str, Any]
    inputs: tuple[int | np.ndarray, ...]
    output: int
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    source: str

    @property
    def inputs_known(self) -> list[int]:
        """The inputs that are no constants."""
        return [x for x in self.inputs if isinstance(x, int)]


@dataclasses.dataclass(frozen=True)
class FlatProgram:
    """Equations from named arguments, and from arrays that are closed over, to results.

    Attributes:
      array_types: dtype and shape of each array.
      arrays: the numbers of their values.
      inputs: those of the arguments, by name.
      equations: in an order in which they can be computed.
      results: numbers of values, or numpy arrays that are constants.
      result_dtypes: of these.
      effects: side effects, which no kernel has, in words.
    """

    array_types: tuple[tuple[str, tuple[int, ...]], ...]
    arrays: tuple[int, ...]
    inputs: Mapping[str, int]
    equations: Sequence[Equation]
    results: Sequence[int | np.ndarray]
    result_dtypes: tuple[str, ...]
    effects: Sequence[str]


def needed_for(values: Iterable[int | np.ndarray], equations: Sequence[Equation]) -> set[int]:
    """The numbers of some values, and of all that they are computed from."""
    needed = {x for x in values if isinstance(x, int)}
    for equation in reversed(equations):
        if equation.output in needed:
            needed.update(equation.inputs_known)
    return needed
