"""The least and the greatest that an integer of an element program can be, before it runs."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jax_flashcute.analysis import POSITION_LIMIT
from jax_flashcute.kernels.lowering.equations import Equation
from jax_flashcute.kernels.lowering.vectors import SAME_ELEMENTS

Limits = tuple[int, int]

INDEX_LIMITS: Mapping[str, Limits] = {
    "b": (0, POSITION_LIMIT - 1),
    "h": (0, POSITION_LIMIT - 1),
    "q_idx": (-POSITION_LIMIT, POSITION_LIMIT - 1),
}


def holds(dtype: str, limits: Limits) -> bool:
    """Whether a dtype holds all between the limits."""
    if dtype == "bool":
        return 0 <= limits[0] and limits[1] <= 1
    return dtype.startswith(("int", "uint")) and (
        np.iinfo(dtype).min <= limits[0] and limits[1] <= np.iinfo(dtype).max
    )


def is_within(limits: Limits | None, last: int) -> bool:
    """Whether an index that has these limits, if any are known, lies within 0..last."""
    return limits is not None and 0 <= limits[0] and limits[1] <= last


def _corners(combine: Callable[[int, int], int]) -> Callable[..., Limits]:
    """Limits of what is monotone in each operand."""

    def rule(x: Limits, y: Limits) -> Limits:
        found = [combine(a, b) for a in x for b in y]
        return min(found), max(found)

    return rule


def _hull(*limits: Limits) -> Limits:
    return min(low for low, _ in limits), max(high for _, high in limits)


def _decided(always: Callable[[Limits, Limits], bool], never: Callable[[Limits, Limits], bool]):
    """Limits of a comparison."""
    return lambda x, y: (int(always(x, y)), int(not never(x, y)))


LIMIT_RULES: dict[str, Callable[..., Limits | None]] = {
    "add": _corners(lambda a, b: a + b),
    "sub": _corners(lambda a, b: a - b),
    "mul": _corners(lambda a, b: a * b),
    "max": _corners(max),
    "min": _corners(min),
    "neg": lambda x: (-x[1], -x[0]),
    "abs": lambda x: (max(0, x[0], -x[1]), max(abs(x[0]), abs(x[1]))),
    "clamp": lambda low, x, high: _corners(min)(_corners(max)(low, x), high),
    "lt": _decided(lambda x, y: x[1] < y[0], lambda x, y: x[0] >= y[1]),
    "le": _decided(lambda x, y: x[1] <= y[0], lambda x, y: x[0] > y[1]),
    "gt": _decided(lambda x, y: x[0] > y[1], lambda x, y: x[1] <= y[0]),
    "ge": _decided(lambda x, y: x[0] >= y[1], lambda x, y: x[1] < y[0]),
    "select_n": lambda which, *cases: _hull(*cases[which[0] : which[1] + 1]),
    "convert_element_type": lambda x: x,
    **dict.fromkeys(SAME_ELEMENTS, lambda *parts: _hull(*parts)),
}
"""Limits of a result from those of its inputs; arithmetic that may leave its dtype has none."""


def limits_of_values(
    equations: Sequence[Equation], of_inputs: Mapping[int, Limits]
) -> dict[int, Limits]:
    """The least and the greatest of each integer and boolean about which that is known."""
    limits = dict(of_inputs)
    for equation in equations:
        given = [limits_of(x, limits) for x in equation.inputs]
        rule = LIMIT_RULES.get(equation.primitive)
        found = rule(*given) if rule is not None and None not in given else None
        if found is not None and holds(equation.dtypes[-1], found):
            limits[equation.output] = found
    return limits


def limits_of(source: int | np.ndarray, limits: Mapping[int, Limits]) -> Limits | None:
    """Those of a value by its number, or of a constant."""
    if isinstance(source, int):
        return limits.get(source)
    if source.dtype.kind in "iub" and source.size:
        return int(source.min()), int(source.max())
    return None
