"""What a program need not compute: values of no use, choices that are decided, bounds never met."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jax_flashcute.kernels.lowering.equations import Equation, needed_for
from jax_flashcute.kernels.lowering.limits import Limits, is_within, limits_of
from jax_flashcute.kernels.lowering.vectors import READS


def needed_equations(
    equations: Sequence[Equation], results: Sequence[int | np.ndarray]
) -> list[Equation]:
    """Those that the results depend on."""
    needed = needed_for(results, equations)
    return [equation for equation in equations if equation.output in needed]


def without_decided(
    equations: Sequence[Equation],
    results: Sequence[int | np.ndarray],
    limits: Mapping[int, Limits],
) -> tuple[list[Equation], list[int | np.ndarray]]:
    """Equations and results without choices that always fall the same way.

    ``params["inside"]`` says of each whether its indices need no bounds.
    """
    same: dict[int, int | np.ndarray] = {}
    kept = []
    for equation in equations:
        inputs = tuple(same.get(x, x) if isinstance(x, int) else x for x in equation.inputs)
        equation = dataclasses.replace(equation, inputs=inputs)
        if equation.primitive == "select_n":
            which = limits_of(inputs[0], limits)
            if which is not None and which[0] == which[1]:
                same[equation.output] = inputs[1 + which[0]]
                continue
        inside = _is_inside(equation, limits)
        kept.append(dataclasses.replace(equation, params={**equation.params, "inside": inside}))
    results = [same.get(x, x) if isinstance(x, int) else x for x in results]
    return needed_equations(kept, results), results


def _is_inside(equation: Equation, limits: Mapping[int, Limits]) -> bool:
    """Whether the indices of a gather or a slice always lie within the array."""
    if equation.primitive not in READS:
        return False
    if not all(isinstance(length, int) for length in equation.shapes[0]):
        return False  # of symbolic shape, which is refused in words
    sizes, indices = equation.params["slice_sizes"], equation.inputs[1:]
    lasts = [length - size for length, size in zip(equation.shapes[0], sizes, strict=True)]
    if equation.primitive == "gather":
        axes = equation.params["dimension_numbers"].start_index_map
        lasts = [min((lasts[axis] for axis in axes), default=0)]
    pairs = zip([limits_of(x, limits) for x in indices], lasts, strict=True)
    return all(is_within(*pair) for pair in pairs)
