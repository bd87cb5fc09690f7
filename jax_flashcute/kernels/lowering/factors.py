"""How many times an argument of a program a value may be, by rules for each operation.

Sums in fixed point need it of a derivative: a bound on what it adds, known before the kernel runs.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jax_flashcute.kernels.lowering.equations import Equation
from jax_flashcute.kernels.lowering.limits import Limits
from jax_flashcute.kernels.lowering.values import FLOATS
from jax_flashcute.kernels.lowering.vectors import SAME_ELEMENTS


def largest(
    equations: Sequence[Equation],
    limits: Mapping[int, Limits],
    argument: int,
    value: int | np.ndarray,
) -> float | None:
    """A bound on how many times ``argument`` the value is.

    None where it is not a multiple of the argument whose factor has limits known beforehand.

    Args:
      equations: of a program, in order.
      limits: of values that follow from the indices, by number.
      argument: its number.
      value: the number of a value, or a constant.
    """
    factors, sizes = {argument: 1.0}, _sizes(equations, limits)
    for equation in equations:
        found = _factor_of(equation, [_known_of(x, factors) for x in equation.inputs], sizes)
        if found is not None:
            factors[equation.output] = found
    return _known_of(value, factors)


def _sizes(equations: Sequence[Equation], limits: Mapping[int, Limits]) -> dict[int, float]:
    """A bound on the magnitude of each value that follows from those of the indices alone."""
    sizes = {x: float(max(map(abs, ends))) for x, ends in limits.items()}
    for equation in equations:
        given = [_size_of(x, sizes) for x in equation.inputs]
        rule = _SIZE_RULES.get(equation.primitive)
        if rule is not None and None not in given:
            sizes.setdefault(equation.output, rule(*given))
    return sizes


_SIZE_RULES: dict[str, Callable[..., float]] = {
    "convert_element_type": lambda x: x,
    "neg": lambda x: x,
    "abs": lambda x: x,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "max": max,
    "min": max,
    "clamp": lambda low, _, high: max(low, high),
    "select_n": lambda _, *cases: max(cases),
    **dict.fromkeys(SAME_ELEMENTS, lambda *x: max(x)),
}
"""Bounds on magnitudes from those of the inputs."""


def _size_of(source: int | np.ndarray, sizes: Mapping[int, float]) -> float | None:
    if isinstance(source, int):
        return sizes.get(source)
    return float(np.abs(source.astype(np.float64)).max(initial=0.0))


def _known_of(source: int | np.ndarray, factors: Mapping[int, float]) -> float | None:
    """That of a value, if it is a multiple; 0 is one of everything."""
    if isinstance(source, int):
        return factors.get(source)
    return None if source.any() else 0.0


def _factor_of(
    equation: Equation, given: Sequence[float | None], sizes: Mapping[int, float]
) -> float | None:
    """Of what an equation computes, from the inputs' where these are multiples."""
    name = equation.primitive
    if name == "select_n":
        given = given[1:]
    if equation.dtypes[-1] not in FLOATS or all(x is None for x in given):
        return None
    if name == "mul":
        others = [_size_of(x, sizes) for x in equation.inputs[::-1]]
        pairs = zip(given, others, strict=True)
        return min((f * x for f, x in pairs if f is not None and x is not None), default=None)
    known = [x for x in given if x is not None]
    if len(known) < len(given):
        return None
    if name in ("add", "sub", "add_any"):
        return sum(known)
    is_one = name in ("neg", "convert_element_type", "select_n", *SAME_ELEMENTS)
    return max(known) if is_one else None
