"""How each primitive of JAX becomes CuTe expressions, and what the values on the way are.

Scalars are CuTe numbers: Boolean, Int32 (also narrower signed integers), Uint32 (likewise) and
Float32 (also bfloat16 and float16, rounded after each operation, as XLA does).  A few values that
are vectors on the way, as the indices of a gather are, are numpy arrays of such numbers.  Arrays
that the function closes over are views: they are indexed, and only what is indexed is read, always
within bounds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_flashcute.kernels.common.numbers import bits_of, float_of, select, tanh

SCALAR_DTYPES = {
    "bool": "bool",
    "int8": "signed",
    "int16": "signed",
    "int32": "signed",
    "uint8": "unsigned",
    "uint16": "unsigned",
    "uint32": "unsigned",
    "float16": "float",
    "bfloat16": "float",
    "float32": "float",
}
"""The dtypes that can be lowered, and what kind of number each is."""

BITS = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16}


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


# ---- values ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
    """Elements of an array in memory, of which some are read once their indices are known.

    Attributes:
      load: reads the element at an Int32 offset, as a CuTe number.
      offset: of the first element.
      shape, strides: in elements.
    """

    load: Callable[[Any], Any]
    offset: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def elements(self) -> Any:
        """All elements, read: a number, or a numpy array of numbers."""
        if self.shape == ():
            return self.load(self.offset)
        found = np.empty(self.shape, object)
        for index in np.ndindex(*self.shape):
            step = sum(i * s for i, s in zip(index, self.strides, strict=True))
            found[index] = self.load(self.offset + step)
        return found


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def number_type(dtype: str):
    """The CuTe type that a scalar of ``dtype`` is held in."""
    import cutlass

    return {
        "bool": cutlass.Boolean,
        "signed": cutlass.Int32,
        "unsigned": cutlass.Uint32,
        "float": cutlass.Float32,
    }[SCALAR_DTYPES[dtype]]


def _constant(value: np.ndarray, dtype: str) -> Any:
    python = {"bool": bool, "float": float}.get(SCALAR_DTYPES[dtype], int)
    make = number_type(dtype)
    if value.shape == ():
        return make(python(value))
    return mapped(lambda x: make(python(x)), value.astype(object))


def as_number(source: int | np.ndarray, known: Mapping[int, Any], dtype: str) -> Any:
    """A constant, or a value by its number, as a CuTe number."""
    if isinstance(source, np.ndarray):
        return _constant(source, dtype)
    value = known[source]
    return value.elements() if isinstance(value, View) else value


def evaluate(equation: Equation, known: Mapping[int, Any]) -> Any:
    """What an equation computes from the values of its inputs."""
    rule = RULES[equation.primitive]
    inputs = []
    for source, dtype in zip(equation.inputs, equation.dtypes[:-1], strict=True):
        is_view = not isinstance(source, np.ndarray) and isinstance(known[source], View)
        if is_view and equation.primitive in VIEWS:
            inputs.append(known[source])
        else:
            inputs.append(as_number(source, known, dtype))
    return rule(equation, *inputs)


def mapped(function: Callable[..., Any], *values: Any) -> Any:
    """``function`` of numbers on numbers and arrays of numbers, which broadcast."""
    if not any(isinstance(x, np.ndarray) for x in values):
        return function(*values)
    arrays = np.broadcast_arrays(*map(_array_of, values))
    found = np.empty(arrays[0].shape, object)
    for index in np.ndindex(*found.shape):
        found[index] = function(*(x[index] for x in arrays))
    return found


def _array_of(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    array = np.empty((), object)
    array[()] = value
    return array


def _unwrapped(array: np.ndarray) -> Any:
    return array[()] if array.shape == () else array


def arrays_as_views(
    array_types: Sequence[tuple[str, tuple[int, ...]]], tensors: Iterable[Any], entry: Any
) -> list[View]:
    """The arrays that a program closes over as a batch entry sees them.

    Args:
      array_types: of ``ElementProgram``.
      tensors: (1|B, ...) in global memory, row-major; booleans as bytes.
      entry: the number of the batch entry.
    """
    import cutlass

    views = []
    for tensor, (dtype, shape) in zip(tensors, array_types, strict=True):
        batch = _min("signed", entry, cutlass.Int32(tensor.shape[0]) - cutlass.Int32(1))
        base = tensor.iterator + cutlass.Int64(batch) * math.prod(shape)
        load = functools.partial(_load, base, dtype)
        views.append(View(load, cutlass.Int32(0), shape, row_major(shape)))
    return views


def numbered_view(shape: Sequence[int]) -> View:
    """An int32 array of its elements' numbers, which is in no memory."""
    import cutlass

    return View(lambda offset: offset, cutlass.Int32(0), tuple(shape), row_major(shape))


def _load(base: Any, dtype: str, offset: Any) -> Any:
    import cutlass
    import cutlass.cute as cute

    element = cute.make_tensor(base + offset, cute.make_layout(1))[0]
    if dtype == "bool":
        return element != cutlass.Uint8(0)
    return number_type(dtype)(element)


# ---- rules -------------------------------------------------------------------------------------

Rule = Callable[..., Any]


def _exact(value: Any, dtype: str) -> Any:
    """A number that an operation in 32 bits gave, brought to its dtype."""
    import cutlass

    if dtype in BITS:
        shift = 32 - BITS[dtype]
        return (value << shift) >> shift
    if dtype in ("bfloat16", "float16"):
        narrow = cutlass.BFloat16 if dtype == "bfloat16" else cutlass.Float16
        return cutlass.Float32(narrow(value))
    return value


def _elementwise(function: Callable[..., Any]) -> Rule:
    """A rule from ``function(kind, *numbers)``, where kind is that of the first input."""

    def rule(equation: Equation, *values):
        kind, result = SCALAR_DTYPES[equation.dtypes[0]], equation.dtypes[-1]
        return mapped(lambda *x: _exact(function(kind, *x), result), *values)

    return rule


def _plain(function: Callable[..., Any]) -> Rule:
    return _elementwise(lambda kind, *x: function(*x))


def _math(name: str) -> Rule:
    """A function of floats from CuTe's, at full precision."""

    def function(*x):
        import cutlass.cute as cute

        return getattr(cute.math, name)(*x, fastmath=False)

    return _plain(function)


def _arith(name: str, x: Any, *others: Any) -> Any:
    from cutlass._mlir.dialects import arith

    return type(x)(getattr(arith, name)(x.ir_value(), *(y.ir_value() for y in others)))


def _div(kind: str, x, y):
    if kind == "float":
        return x / y
    return _int_div(kind, x, y)[0]


def _rem(kind: str, x, y):
    if kind == "float":
        return _arith("remf", x, y)
    return _int_div(kind, x, y)[1]


def _int_div(kind: str, x, y):
    """Quotient towards zero and remainder; by 0 they are -1 (all ones) and x, as XLA's are."""
    make = type(x)
    by_zero = y == make(0)
    divisor = select(by_zero, make(1), y)
    if kind == "unsigned":
        quotient, rest = _arith("divui", x, divisor), _arith("remui", x, divisor)
        return select(by_zero, make(2**32 - 1), quotient), select(by_zero, x, rest)
    # The smallest integer over -1 overflows.
    by_minus_one = divisor == make(-1)
    divisor = select(by_minus_one, make(1), divisor)
    quotient, rest = _arith("divsi", x, divisor), _arith("remsi", x, divisor)
    quotient = select(by_minus_one, make(0) - x, quotient)
    return select(by_zero, make(-1), quotient), select(by_zero, x, rest)


def _max(kind: str, x, y):
    names = {"float": "maximumf", "signed": "maxsi", "unsigned": "maxui", "bool": "ori"}
    return _arith(names[kind], x, y)


def _min(kind: str, x, y):
    names = {"float": "minimumf", "signed": "minsi", "unsigned": "minui", "bool": "andi"}
    return _arith(names[kind], x, y)


def _clamp(equation: Equation, low, x, high):
    kind = SCALAR_DTYPES[equation.dtypes[1]]
    return mapped(lambda low, x, high: _min(kind, _max(kind, x, low), high), low, x, high)


def _neg(kind: str, x):
    return _arith("negf", x) if kind == "float" else type(x)(0) - x


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
    return _plain(lambda x, y: _arith(name, x, y))


def _not(kind: str, x):
    import cutlass

    ones = (
        cutlass.Boolean(True) if kind == "bool" else type(x)(-1 if kind == "signed" else 2**32 - 1)
    )
    return _arith("xori", x, ones)


def _compare(name: str, x, y):
    import cutlass

    if isinstance(x, cutlass.Boolean):
        x, y = cutlass.Int32(x), cutlass.Int32(y)
    return getattr(x, f"__{name}__")(y)


def _comparison(name: str) -> Rule:
    return _plain(functools.partial(_compare, name))


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
                x = _arith("andi", x, make(2**bits - 1))
            shifted = _arith(name, x, safe)
            beyond = shifted if name == "shrsi" else make(0)
            return _exact(select(is_large, beyond, shifted), dtype)

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
                x = _arith("andi", x, make(2**bits - 1))
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
    return _exact(make(x), target)


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
        return _exact(_div(kind, type(x)(1), found) if exponent < 0 else found, dtype)

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


def _broadcast_in_dim(equation: Equation, x, *_):
    array, shape = _array_of(x), equation.shapes[-1]
    axes = equation.params["broadcast_dimensions"]
    spread = [1] * len(shape)
    for axis, length in zip(axes, array.shape, strict=True):
        spread[axis] = length
    return _unwrapped(np.broadcast_to(array.reshape(spread), shape))


def _reshape(equation: Equation, x, *_):
    shape = equation.shapes[-1]
    if not isinstance(x, View):
        return _unwrapped(_array_of(x).reshape(shape))
    kept = [(n, s) for n, s in zip(x.shape, x.strides, strict=True) if n != 1]
    if [n for n, _ in kept] == [n for n in shape if n != 1]:
        steps = iter(s for _, s in kept)
        return dataclasses.replace(
            x, shape=shape, strides=tuple(next(steps) if n != 1 else 0 for n in shape)
        )
    if x.strides == row_major(x.shape):
        return dataclasses.replace(x, shape=shape, strides=row_major(shape))
    raise NotImplementedError(f"a reshape of a part of an array, at {equation.source}")


def _concatenate(equation: Equation, *parts):
    return np.concatenate([_array_of(x) for x in parts], axis=equation.params["dimension"])


def _stack(equation: Equation, *parts):
    return np.stack([_array_of(x) for x in parts], axis=equation.params["axis"])


def _unstack(equation: Equation, x):
    return np.moveaxis(_array_of(x), equation.params["axis"], 0)[equation.params["result"]]


def _split(equation: Equation, x):
    ends = np.cumsum(equation.params["sizes"])[:-1]
    return np.split(_array_of(x), ends, axis=equation.params["axis"])[equation.params["result"]]


def _pad(equation: Equation, x, value):
    array, found = _array_of(x), np.full(equation.shapes[-1], value, object)
    for index in np.ndindex(*array.shape):
        sides = zip(index, equation.params["padding_config"], strict=True)
        place = tuple(low + i * (interior + 1) for i, (low, _, interior) in sides)
        if all(0 <= i < n for i, n in zip(place, found.shape, strict=True)):
            found[place] = array[index]
    return _unwrapped(found)


def _slice(equation: Equation, x):
    starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
    steps = equation.params["strides"] or (1,) * len(starts)
    if isinstance(x, View):
        first = sum(i * s for i, s in zip(starts, x.strides, strict=True))
        strides = tuple(s * step for s, step in zip(x.strides, steps, strict=True))
        return dataclasses.replace(
            x, offset=x.offset + first, shape=equation.shapes[-1], strides=strides
        )
    return _array_of(x)[tuple(map(slice, starts, stops, steps))]


def _dynamic_slice(equation: Equation, x, *starts):
    import cutlass

    sizes = equation.params["slice_sizes"]
    if not isinstance(x, View):
        x = _view_of_numbers(_array_of(x))
    offset = x.offset
    for axis, (start, dtype) in enumerate(zip(starts, equation.dtypes[1:-1], strict=True)):
        if equation.params["inside"]:
            start = cutlass.Int32(start)
        else:
            start = _bounded(start, dtype, x.shape[axis] - sizes[axis])
        offset = offset + start * x.strides[axis]
    return dataclasses.replace(x, offset=offset, shape=tuple(sizes))


def _dynamic_update_slice(equation: Equation, x, update, *starts):
    found, update = _array_of(x).copy(), _array_of(update)
    dtypes = equation.dtypes[2:-1]
    room = [n - m for n, m in zip(found.shape, update.shape, strict=True)]
    starts = [_bounded(i, *of) for i, *of in zip(starts, dtypes, room, strict=True)]
    for shift in np.ndindex(*(n + 1 for n in room)):
        here = functools.reduce(
            lambda a, b: a & b, (start == i for start, i in zip(starts, shift, strict=True))
        )
        for index in np.ndindex(*update.shape):
            place = tuple(i + j for i, j in zip(index, shift, strict=True))
            found[place] = select(here, update[index], found[place])
    return found


def _view_of_numbers(array: np.ndarray) -> View:
    """A short vector in registers, indexed by comparisons."""
    flat = list(array.reshape(-1))

    def load(offset):
        picked = flat[-1]
        for i in reversed(range(len(flat) - 1)):
            picked = select(offset <= type(offset)(i), flat[i], picked)
        return picked

    import cutlass

    return View(load, cutlass.Int32(0), array.shape, row_major(array.shape))


def _bounded(index, dtype: str, last: int):
    """An index as Int32 within 0..last."""
    import cutlass

    if SCALAR_DTYPES[dtype] == "unsigned":
        return cutlass.Int32(_min("unsigned", index, cutlass.Uint32(last)))
    return _min("signed", _max("signed", index, cutlass.Int32(0)), cutlass.Int32(last))


def _gather(equation: Equation, x, indices):
    import cutlass

    numbers, mode = equation.params["dimension_numbers"], str(equation.params["mode"])
    if not isinstance(x, View):
        x = _view_of_numbers(_array_of(x))
    index_dtype, dtype = equation.dtypes[1], equation.dtypes[-1]
    fill = _constant(np.asarray(_fill_value(equation.params["fill_value"], dtype)), dtype)
    indices = _array_of(indices)
    found = np.empty(indices.shape[:-1], object)
    for place in np.ndindex(*found.shape):
        offset, inside = x.offset, None
        for i, axis in enumerate(numbers.start_index_map):
            index, last = indices[(*place, i)], x.shape[axis] - 1
            if equation.params["inside"]:
                offset = offset + cutlass.Int32(index) * x.strides[axis]
                continue
            near = _bounded(index, index_dtype, last)
            offset = offset + near * x.strides[axis]
            hit = near == type(near)(index)
            inside = hit if inside is None else _arith("andi", inside, hit)
        value = x.load(offset)
        if "FILL" in mode and inside is not None:
            value = select(inside, value, fill)
        found[place] = value
    return _unwrapped(found.reshape(equation.shapes[-1]))


def _fill_value(given, dtype: str):
    """What ``jnp`` takes for an index out of bounds where nothing is given."""
    if given is not None:
        return given
    match SCALAR_DTYPES[dtype]:
        case "float":
            return math.nan
        case "bool":
            return True
        case "signed":
            return np.iinfo(dtype).min
        case _:
            return np.iinfo(dtype).max


def _iota(equation: Equation):
    shape, axis = equation.shapes[-1], equation.params["dimension"]
    return _constant(np.indices(shape)[axis], equation.dtypes[-1])


def _reduce(combine: Callable[..., Any]) -> Rule:
    def rule(equation: Equation, x):
        kind, dtype = SCALAR_DTYPES[equation.dtypes[0]], equation.dtypes[-1]
        array, axes = _array_of(x), equation.params["axes"]
        kept = [a for a in range(array.ndim) if a not in axes]
        moved = array.transpose(*kept, *axes).reshape(*(array.shape[a] for a in kept), -1)
        found = np.empty(moved.shape[:-1], object)
        for place in np.ndindex(*found.shape):
            found[place] = functools.reduce(
                lambda a, b: _exact(combine(kind, a, b), dtype), list(moved[place])
            )
        return _unwrapped(found)

    return rule


def _cumulative(combine: Callable[..., Any]) -> Rule:
    def rule(equation: Equation, x):
        kind, dtype = SCALAR_DTYPES[equation.dtypes[0]], equation.dtypes[-1]
        steps = slice(None, None, -1 if equation.params["reverse"] else 1)
        found = np.moveaxis(_array_of(x).copy(), equation.params["axis"], 0)[steps]
        for place in range(1, len(found)):
            pairs = found[place - 1], found[place]
            found[place] = mapped(lambda a, b: _exact(combine(kind, a, b), dtype), *pairs)
        return np.moveaxis(found[steps], 0, equation.params["axis"])

    return rule


def _place_of(comparison: str) -> Rule:
    """Where the first of the largest or of the smallest is; of what is no number, before all."""

    def rule(equation: Equation, x):
        (axis,), make = equation.params["axes"], number_type(equation.dtypes[-1])
        kind = SCALAR_DTYPES[equation.dtypes[0]]
        first, *others = np.moveaxis(_array_of(x), axis, 0)

        def better(a, b):
            found = _compare(comparison, a, b)
            return found | ((a != a) & (b == b)) if kind == "float" else found

        best, place = first, mapped(lambda _: make(0), first)
        for i, other in enumerate(others, 1):
            is_better = mapped(better, other, best)
            best = mapped(select, is_better, other, best)
            place = mapped(lambda found, at, i=i: select(found, make(i), at), is_better, place)
        return place

    return rule


def _undefined(equation: Equation):
    """What no result depends on, as residuals that a branch of a ``cond`` does not have."""
    return _constant(np.zeros(equation.shapes[-1]), equation.dtypes[-1])


def _copy(equation: Equation, x):
    return x


VIEWS = frozenset(("dynamic_slice", "squeeze", "reshape", "slice", "gather", "expand_dims", "copy"))
"""The rules that take an array as it is, without reading it."""

RULES: dict[str, Rule] = {
    "add": _plain(lambda x, y: x + y),
    "add_any": _plain(lambda x, y: x + y),
    "sub": _plain(lambda x, y: x - y),
    "mul": _plain(lambda x, y: x * y),
    "div": _elementwise(_div),
    "rem": _elementwise(_rem),
    "neg": _elementwise(_neg),
    "abs": _elementwise(_abs),
    "sign": _elementwise(_sign),
    "max": _elementwise(_max),
    "min": _elementwise(_min),
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
    "copy": _copy,
    "stop_gradient": _copy,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "split": _split,
    "pad": _pad,
    "rev": lambda equation, x: np.flip(_array_of(x), equation.params["dimensions"]),
    "transpose": lambda equation, x: _array_of(x).transpose(equation.params["permutation"]),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "reduce_sum": _reduce(lambda kind, a, b: a + b),
    "reduce_prod": _reduce(lambda kind, a, b: a * b),
    "reduce_max": _reduce(_max),
    "reduce_min": _reduce(_min),
    "reduce_and": _reduce(lambda kind, a, b: _arith("andi", a, b)),
    "reduce_or": _reduce(lambda kind, a, b: _arith("ori", a, b)),
    "argmax": _place_of("gt"),
    "argmin": _place_of("lt"),
    "cumsum": _cumulative(lambda kind, a, b: a + b),
    "cumprod": _cumulative(lambda kind, a, b: a * b),
    "cummax": _cumulative(_max),
    "cummin": _cumulative(_min),
    "empty2": _undefined,
}
"""How each primitive is lowered."""
