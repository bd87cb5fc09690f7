"""How primitives of scalars become CuTe expressions; vectors take these element by element."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_flashcute.kernels.common.numbers import bits_of, float_of, select, tanh
from jax_flashcute.kernels.lowering.equations import Equation
from jax_flashcute.kernels.lowering.values import BITS, SCALAR_DTYPES, exact, mapped, number_type

Rule = Callable[..., Any]
"""Of an equation and the values of its inputs: what it computes."""


def _elementwise(function: Callable[..., Any]) -> Rule:
    """A rule from ``function(kind, *numbers)``, where kind is that of the first input."""

    def rule(equation: Equation, *values):
        kind, result = SCALAR_DTYPES[equation.dtypes[0]], equation.dtypes[-1]
        return mapped(lambda *x: exact(function(kind, *x), result), *values)

    return rule


def _plain(function: Callable[..., Any]) -> Rule:
    return _elementwise(lambda kind, *x: function(*x))


def _math(name: str) -> Rule:
    """A function of floats from CuTe's, at full precision."""

    def function(*x):
        import cutlass.cute as cute

        return getattr(cute.math, name)(*x, fastmath=False)

    return _plain(function)


def arith_op(name: str, x: Any, *others: Any) -> Any:
    """An operation of MLIR's ``arith`` on numbers of one type."""
    from cutlass._mlir.dialects import arith

    return type(x)(getattr(arith, name)(x.ir_value(), *(y.ir_value() for y in others)))


def _div(kind: str, x, y):
    if kind == "float":
        return x / y
    return _int_div(kind, x, y)[0]


def _rem(kind: str, x, y):
    if kind == "float":
        return arith_op("remf", x, y)
    return _int_div(kind, x, y)[1]


def _int_div(kind: str, x, y):
    """Quotient towards zero and remainder; by 0 they are -1 (all ones) and x, as XLA's are."""
    make = type(x)
    by_zero = y == make(0)
    divisor = select(by_zero, make(1), y)
    if kind == "unsigned":
        quotient, rest = arith_op("divui", x, divisor), arith_op("remui", x, divisor)
        return select(by_zero, make(2**32 - 1), quotient), select(by_zero, x, rest)
    # The smallest integer over -1 overflows.
    by_minus_one = divisor == make(-1)
    divisor = select(by_minus_one, make(1), divisor)
    quotient, rest = arith_op("divsi", x, divisor), arith_op("remsi", x, divisor)
    quotient = select(by_minus_one, make(0) - x, quotient)
    return select(by_zero, make(-1), quotient), select(by_zero, x, rest)


def maximum(kind: str, x, y):
    names = {"float": "maximumf", "signed": "maxsi", "unsigned": "maxui", "bool": "ori"}
    return arith_op(names[kind], x, y)


def minimum(kind: str, x, y):
    names = {"float": "minimumf", "signed": "minsi", "unsigned": "minui", "bool": "andi"}
    return arith_op(names[kind], x, y)


def _clamp(equation: Equation, low, x, high):
    kind = SCALAR_DTYPES[equation.dtypes[1]]
    return mapped(lambda low, x, high: minimum(kind, maximum(kind, x, low), high), low, x, high)


def _neg(kind: str, x):
    return arith_op("negf", x) if kind == "float" else type(x)(0) - x


def _abs(kind: str, x):
    import cutlass.cute as cute

    if kind == "float":
        return cute.math.absf(x)
    return x if kind == "unsigned" else select(x < type(x)(0), type(x)(0) - x, x)


def _sign(kind: str, x):
    zero, one = type(x)(0), type(x)(1)
    if kind == "unsigned":
        return select(x != zero, one, zero)
    # Not a number, and minus zero, stay what they are.
    return select(x > zero, one, select(x < zero, type(x)(-1), x))


def _logical(name: str) -> Rule:
    return _plain(lambda x, y: arith_op(name, x, y))


def _not(kind: str, x):
    import cutlass

    ones = (
        cutlass.Boolean(True) if kind == "bool" else type(x)(-1 if kind == "signed" else 2**32 - 1)
    )
    return arith_op("xori", x, ones)


def compare(name: str, x, y):
    import cutlass

    if isinstance(x, cutlass.Boolean):
        x, y = cutlass.Int32(x), cutlass.Int32(y)
    return getattr(x, f"__{name}__")(y)


def _comparison(name: str) -> Rule:
    return _plain(functools.partial(compare, name))


def _shift(name: str) -> Rule:
    def rule(equation: Equation, x, amount):
        dtype = equation.dtypes[0]

        def shift(x, amount):
            import cutlass

            make, bits = type(x), BITS.get(dtype, 32)
            count = cutlass.Uint32(amount)
            is_large = count >= cutlass.Uint32(bits)
            safe = make(select(is_large, cutlass.Uint32(bits - 1), count))
            if name == "shrui" and bits < 32:
                x = arith_op("andi", x, make(2**bits - 1))
            shifted = arith_op(name, x, safe)
            beyond = shifted if name == "shrsi" else make(0)
            return exact(select(is_large, beyond, shifted), dtype)

        return mapped(shift, x, amount)

    return rule


def _counted(name: str, counts_zeros: bool) -> Rule:
    """A count of bits of one kind; ``counts_zeros``: those above the dtype's are among them."""

    def rule(equation: Equation, x):
        from cutlass._mlir.dialects import math as mlir_math

        bits = BITS.get(equation.dtypes[0], 32)

        def count(x):
            make = type(x)
            if bits < 32:
                x = arith_op("andi", x, make(2**bits - 1))
            found = make(getattr(mlir_math, name)(x.ir_value()))
            return found - make(32 - bits) if counts_zeros else found

        return mapped(count, x)

    return rule


def _select_n(equation: Equation, which, *cases):
    import cutlass

    def pick(which, *cases):
        if isinstance(which, cutlass.Boolean):
            return select(which, cases[1], cases[0])
        picked = cases[-1]
        for i in reversed(range(len(cases) - 1)):
            picked = select(which <= type(which)(i), cases[i], picked)
        return picked

    return mapped(pick, which, *cases)


def _convert(equation: Equation, x):
    source, target = equation.dtypes
    return mapped(lambda x: convert(x, source, target), x)


def convert(x: Any, source: str, target: str) -> Any:
    """A number of dtype ``source`` as one of dtype ``target``."""
    make, kinds = number_type(target), (SCALAR_DTYPES[source], SCALAR_DTYPES[target])
    if kinds[1] == "bool":
        return x if kinds[0] == "bool" else x != type(x)(0)
    if kinds[0] == "bool":
        return select(x, make(1), make(0))
    if kinds[0] == "float" and kinds[1] != "float":
        return _float_to_integer(x, target)
    return exact(make(x), target)


def _bitcast(equation: Equation, x):
    """Between dtypes of 32 bits."""
    source, target = equation.dtypes

    def same_bits(x):
        if "float32" not in (source, target):
            return number_type(target)(x)
        from cutlass import Int32

        return number_type(target)(bits_of(x)) if source == "float32" else float_of(Int32(x))

    return x if source == target else mapped(same_bits, x)


def _float_to_integer(x, target: str):
    """Towards zero, to the nearest that the type holds; 0 for what is no number."""
    info = np.iinfo(target)
    make, wide = number_type(target), type(x)
    low, high = wide(float(info.min)), wide(float(info.max))
    is_low, is_high, is_nan = x <= low, x >= high, x != x
    inside = select(is_low, wide(0), select(is_high, wide(0), select(is_nan, wide(0), x)))
    found = select(is_high, make(int(info.max)), make(inside))
    return select(is_low, make(int(info.min)), found)


def _power(x, y):
    from cutlass._mlir.dialects import math as mlir_math

    # The exponent may be an integer.
    return type(x)(mlir_math.powf(x.ir_value(), type(x)(y).ir_value()))


def _integer_pow(equation: Equation, x):
    exponent, dtype = equation.params["y"], equation.dtypes[-1]
    kind = SCALAR_DTYPES[equation.dtypes[0]]

    def power(x):
        square, rest, found = x, abs(exponent), None
        while rest:
            if rest & 1:
                found = square if found is None else found * square
            square, rest = square * square if rest > 1 else square, rest >> 1
        found = type(x)(1) if found is None else found
        return exact(_div(kind, type(x)(1), found) if exponent < 0 else found, dtype)

    return mapped(power, x)


def _round(equation: Equation, x):
    import cutlass.cute as cute

    to_even = "EVEN" in str(equation.params["rounding_method"])
    function = cute.math.roundeven if to_even else cute.math.round
    return mapped(function, x)


def _logistic(x):
    import cutlass.cute as cute
    from cutlass import Float32

    return Float32(1.0) / (Float32(1.0) + cute.math.exp(Float32(0.0) - x, fastmath=False))


def _is_finite(x):
    import cutlass.cute as cute

    return cute.math.absf(x) < type(x)(math.inf)


SCALAR_RULES: dict[str, Rule] = {
    "add": _plain(lambda x, y: x + y),
    "add_any": _plain(lambda x, y: x + y),
    "sub": _plain(lambda x, y: x - y),
    "mul": _plain(lambda x, y: x * y),
    "div": _elementwise(_div),
    "rem": _elementwise(_rem),
    "neg": _elementwise(_neg),
    "abs": _elementwise(_abs),
    "sign": _elementwise(_sign),
    "max": _elementwise(maximum),
    "min": _elementwise(minimum),
    "clamp": _clamp,
    "square": _plain(lambda x: x * x),
    "one_minus_square": _plain(lambda x: type(x)(1) - x * x),
    "integer_pow": _integer_pow,
    "pow": _plain(_power),
    "exp": _math("exp"),
    "exp2": _math("exp2"),
    "log": _math("log"),
    "sqrt": _math("sqrt"),
    "rsqrt": _math("rsqrt"),
    "sin": _math("sin"),
    "cos": _math("cos"),
    **{
        name: _math(name)
        for name in (
            *("tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh"),
            *("erf", "erfc", "cbrt"),
        )
    },
    "log2": _math("log2"),
    "log1p": _math("log1p"),
    "expm1": _math("expm1"),
    "round": _round,
    "floor": _math("floor"),
    "ceil": _math("ceil"),
    "tanh": _plain(tanh),
    "logistic": _plain(_logistic),
    "is_finite": _plain(_is_finite),
    "and": _logical("andi"),
    "or": _logical("ori"),
    "xor": _logical("xori"),
    "not": _elementwise(_not),
    "eq": _comparison("eq"),
    "ne": _comparison("ne"),
    "lt": _comparison("lt"),
    "le": _comparison("le"),
    "gt": _comparison("gt"),
    "ge": _comparison("ge"),
    "shift_left": _shift("shli"),
    "shift_right_logical": _shift("shrui"),
    "shift_right_arithmetic": _shift("shrsi"),
    "population_count": _counted("ctpop", counts_zeros=False),
    "clz": _counted("ctlz", counts_zeros=True),
    "select_n": _select_n,
    "convert_element_type": _convert,
    "bitcast_convert_type": _bitcast,
}
