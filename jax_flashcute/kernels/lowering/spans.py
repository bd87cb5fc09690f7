"""Numbers between bounds: what an element program computes of all keys of a tile at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.lowering.equations import Equation
from jax_flashcute.kernels.lowering.rules import RULES
from jax_flashcute.kernels.lowering.values import mapped
from jax_flashcute.kernels.lowering.vectors import SAME_ELEMENTS


@dataclasses.dataclass(frozen=True)
class Span:
    """All from ``low`` to ``high``, CuTe numbers of one type; of booleans False is the lower."""

    low: Any
    high: Any

    @property
    def is_point(self) -> Any:
        return self.low == self.high


def _ends(value: Any) -> tuple[Any, Any]:
    return (value.low, value.high) if isinstance(value, Span) else (value, value)


def _rising(equation: Equation, *values: Any) -> Span:
    """Of what grows with each operand, or stays."""
    lows, highs = zip(*map(_ends, values), strict=True)
    return Span(_plainly(equation, *lows), _plainly(equation, *highs))


def _falling_last(equation: Equation, *values: Any) -> Span:
    """Of what grows with the first operands and falls with the last."""
    *first, last = values
    low, high = _ends(last)
    return _rising(equation, *first, Span(high, low))


def _falling_first(equation: Equation, *values: Any) -> Span:
    """Of what falls with the first operand and grows with the others."""
    low, high = _ends(values[0])
    return _rising(equation, Span(high, low), *values[1:])


def _scaled(equation: Equation, x: Any, y: Any) -> Span:
    """Of a product or a quotient of which one operand is no ``Span``."""
    (x0, x1), (y0, y1) = _ends(x), _ends(y)
    a, b = _plainly(equation, x0, y0), _plainly(equation, x1, y1)
    return Span(select(a < b, a, b), select(a < b, b, a))


def _absolute(equation: Equation, x: Any) -> Span:
    low, high = _ends(x)
    zero = type(low)(0)
    a, b = _plainly(equation, low), _plainly(equation, high)
    near = select(a < b, a, b)
    return Span(select((low < zero) & (high > zero), zero, near), select(a < b, b, a))


def _choice(equation: Equation, which: Any, no: Any, yes: Any) -> Span:
    always, possibly = _ends(which)
    (no0, no1), (yes0, yes1) = _ends(no), _ends(yes)
    low = select(always, yes0, select(possibly, select(yes0 < no0, yes0, no0), no0))
    high = select(always, yes1, select(possibly, select(yes1 < no1, no1, yes1), no1))
    return Span(low, high)


def _plainly(equation: Equation, *values: Any) -> Any:
    return RULES[equation.primitive](equation, *values)


SPAN_RULES: dict[str, Callable[..., Span]] = {
    **dict.fromkeys(
        ("add", "max", "min", "clamp", "convert_element_type", "log", "exp", "sqrt", "floor"),
        _rising,
    ),
    **dict.fromkeys(("sub", "gt", "ge"), _falling_last),
    **dict.fromkeys(("neg", "lt", "le"), _falling_first),
    "mul": _scaled,
    "div": _scaled,
    "abs": _absolute,
    "select_n": _choice,
}
"""What each primitive makes of numbers between bounds."""

OVERFLOWING = frozenset(("mul", "neg", "abs"))
"""Primitives of integers that follow bounds where they do not overflow."""

BOUNDING = frozenset(("max", "min", "clamp"))
"""Primitives that make one number of many."""


def span_of(equation: Equation, may_overflow: bool, *values: Any) -> Any:
    """What an equation makes of values of which some are ``Span``."""
    if equation.primitive in SAME_ELEMENTS:
        return _plainly(equation, *values)
    overflows = may_overflow and equation.primitive in ("add", "sub")

    def span(*numbers):
        found = SPAN_RULES[equation.primitive](equation, *numbers)
        return _mended(found) if overflows else found

    return mapped(span, *values)


def _mended(span: Span) -> Span:
    """All integers, where one end alone has left them: what was between is at both of theirs."""
    is_torn = span.high < span.low
    low = select(is_torn, type(span.low)(-(2**31)), span.low)
    return Span(low, select(is_torn, type(span.high)(2**31 - 1), span.high))
