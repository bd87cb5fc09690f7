"""How primitives of short vectors, and of arrays that are indexed, become CuTe expressions.

Vectors are taken apart and put together while a kernel is traced; a place in one that is known only
at run time is found by comparisons.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.lowering.equations import Equation
from jax_flashcute.kernels.lowering.scalars import Rule, arith_op, compare, maximum, minimum
from jax_flashcute.kernels.lowering.values import (
    SCALAR_DTYPES,
    View,
    array_of,
    constant,
    exact,
    mapped,
    number_type,
    row_major,
    unwrapped,
)


def _broadcast_in_dim(equation: Equation, x, *_):
    array, shape = array_of(x), equation.shapes[-1]
    axes = equation.params["broadcast_dimensions"]
    spread = [1] * len(shape)
    for axis, length in zip(axes, array.shape, strict=True):
        spread[axis] = length
    return unwrapped(np.broadcast_to(array.reshape(spread), shape))


def _reshape(equation: Equation, x, *_):
    shape = equation.shapes[-1]
    if not isinstance(x, View):
        return unwrapped(array_of(x).reshape(shape))
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
    return np.concatenate([array_of(x) for x in parts], axis=equation.params["dimension"])


def _stack(equation: Equation, *parts):
    return np.stack([array_of(x) for x in parts], axis=equation.params["axis"])


def _unstack(equation: Equation, x):
    return np.moveaxis(array_of(x), equation.params["axis"], 0)[equation.params["result"]]


def _split(equation: Equation, x):
    ends = np.cumsum(equation.params["sizes"])[:-1]
    return np.split(array_of(x), ends, axis=equation.params["axis"])[equation.params["result"]]


def _pad(equation: Equation, x, value):
    array, found = array_of(x), np.full(equation.shapes[-1], value, object)
    for index in np.ndindex(*array.shape):
        sides = zip(index, equation.params["padding_config"], strict=True)
        place = tuple(low + i * (interior + 1) for i, (low, _, interior) in sides)
        if all(0 <= i < n for i, n in zip(place, found.shape, strict=True)):
            found[place] = array[index]
    return unwrapped(found)


def _slice(equation: Equation, x):
    starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
    steps = equation.params["strides"] or (1,) * len(starts)
    if isinstance(x, View):
        first = sum(i * s for i, s in zip(starts, x.strides, strict=True))
        strides = tuple(s * step for s, step in zip(x.strides, steps, strict=True))
        return dataclasses.replace(
            x, offset=x.offset + first, shape=equation.shapes[-1], strides=strides
        )
    return array_of(x)[tuple(map(slice, starts, stops, steps))]


def _dynamic_slice(equation: Equation, x, *starts):
    import cutlass

    sizes = equation.params["slice_sizes"]
    if not isinstance(x, View):
        x = _view_of_numbers(array_of(x))
    offset = x.offset
    for axis, (start, dtype) in enumerate(zip(starts, equation.dtypes[1:-1], strict=True)):
        if equation.params["inside"]:
            start = cutlass.Int32(start)
        else:
            start = bounded(start, dtype, x.shape[axis] - sizes[axis])
        offset = offset + start * x.strides[axis]
    return dataclasses.replace(x, offset=offset, shape=tuple(sizes))


def _dynamic_update_slice(equation: Equation, x, update, *starts):
    found, update = array_of(x).copy(), array_of(update)
    dtypes = equation.dtypes[2:-1]
    room = [n - m for n, m in zip(found.shape, update.shape, strict=True)]
    starts = [bounded(i, *of) for i, *of in zip(starts, dtypes, room, strict=True)]
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


def bounded(index, dtype: str, last: int):
    """An index as Int32 within 0..last."""
    import cutlass

    if SCALAR_DTYPES[dtype] == "unsigned":
        return cutlass.Int32(minimum("unsigned", index, cutlass.Uint32(last)))
    return minimum("signed", maximum("signed", index, cutlass.Int32(0)), cutlass.Int32(last))


def _gather(equation: Equation, x, indices):
    """Of each index a slice, which ends where the array does at the latest."""
    import cutlass

    numbers, mode = equation.params["dimension_numbers"], str(equation.params["mode"])
    sizes, shape = equation.params["slice_sizes"], equation.shapes[-1]
    if not isinstance(x, View):
        x = _view_of_numbers(array_of(x))
    index_dtype, dtype = equation.dtypes[1], equation.dtypes[-1]
    fill = constant(np.asarray(_fill_value(equation.params["fill_value"], dtype)), dtype)
    indices = array_of(indices)
    kept = [axis for axis in range(len(sizes)) if axis not in numbers.collapsed_slice_dims]
    of_one, strides = (tuple(of[axis] for axis in kept) for of in (sizes, x.strides))
    slices = np.empty((*indices.shape[:-1], *of_one), object)
    for place in np.ndindex(*indices.shape[:-1]):
        offset, inside = x.offset, None
        for i, axis in enumerate(numbers.start_index_map):
            index, last = indices[(*place, i)], x.shape[axis] - sizes[axis]
            if equation.params["inside"]:
                offset = offset + cutlass.Int32(index) * x.strides[axis]
                continue
            near = bounded(index, index_dtype, last)
            offset = offset + near * x.strides[axis]
            hit = near == type(near)(index)
            inside = hit if inside is None else arith_op("andi", inside, hit)
        found = View(x.load, offset, of_one, strides).elements()
        if "FILL" in mode and inside is not None:
            found = mapped(select, inside, found, fill)
        slices[place] = found
    # Dimensions of indices and of slices may stand in any order.
    of_slices = numbers.offset_dims
    of_indices = [axis for axis in range(len(shape)) if axis not in of_slices]
    return unwrapped(slices.transpose(np.argsort([*of_indices, *of_slices])))


def _dot_general(equation: Equation, x, y):
    """Products of short vectors and matrices, each sum rounded once."""
    (of_x, of_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    dtype = equation.dtypes[-1]

    def flat(array, contracted, batch):
        rest = [a for a in range(array.ndim) if a not in (*contracted, *batch)]
        moved = array.transpose(*batch, *rest, *contracted)
        shape = [array.shape[a] for a in batch], [array.shape[a] for a in rest]
        return moved.reshape(*(math.prod(s) for s in shape), -1)

    x, y = flat(array_of(x), of_x, batch_x), flat(array_of(y), of_y, batch_y)
    found = np.empty((x.shape[0], x.shape[1], y.shape[1]), object)
    for batch, row, column in np.ndindex(*found.shape):
        pairs = zip(x[batch, row], y[batch, column], strict=True)
        total = functools.reduce(lambda a, b: a + b, [a * b for a, b in pairs])
        found[batch, row, column] = exact(total, dtype)
    return unwrapped(found.reshape(equation.shapes[-1]))


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
    return constant(np.indices(shape)[axis], equation.dtypes[-1])


def _reduce(combine: Callable[..., Any]) -> Rule:
    def rule(equation: Equation, x):
        kind, dtype = SCALAR_DTYPES[equation.dtypes[0]], equation.dtypes[-1]
        array, axes = array_of(x), equation.params["axes"]
        kept = [a for a in range(array.ndim) if a not in axes]
        moved = array.transpose(*kept, *axes).reshape(*(array.shape[a] for a in kept), -1)
        found = np.empty(moved.shape[:-1], object)
        for place in np.ndindex(*found.shape):
            found[place] = functools.reduce(
                lambda a, b: exact(combine(kind, a, b), dtype), list(moved[place])
            )
        return unwrapped(found)

    return rule


def _cumulative(combine: Callable[..., Any]) -> Rule:
    def rule(equation: Equation, x):
        kind, dtype = SCALAR_DTYPES[equation.dtypes[0]], equation.dtypes[-1]
        steps = slice(None, None, -1 if equation.params["reverse"] else 1)
        found = np.moveaxis(array_of(x).copy(), equation.params["axis"], 0)[steps]
        for place in range(1, len(found)):
            pairs = found[place - 1], found[place]
            found[place] = mapped(lambda a, b: exact(combine(kind, a, b), dtype), *pairs)
        return np.moveaxis(found[steps], 0, equation.params["axis"])

    return rule


def _place_of(comparison: str) -> Rule:
    """Where the first of the largest or of the smallest is; of what is no number, before all."""

    def rule(equation: Equation, x):
        (axis,), make = equation.params["axes"], number_type(equation.dtypes[-1])
        kind = SCALAR_DTYPES[equation.dtypes[0]]
        first, *others = np.moveaxis(array_of(x), axis, 0)

        def better(a, b):
            found = compare(comparison, a, b)
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
    return constant(np.zeros(equation.shapes[-1]), equation.dtypes[-1])


def _copy(equation: Equation, x):
    return x


VIEWS = frozenset(("dynamic_slice", "squeeze", "reshape", "slice", "gather", "expand_dims", "copy"))
"""Primitives that take an array as it is, without reading it."""

READS = frozenset(("dynamic_slice", "gather"))
"""Primitives that take elements at indices that are operands."""

SAME_ELEMENTS = frozenset(
    ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "concatenate", "stack", "copy")
)
"""Primitives whose results are their operands' elements in another shape."""

VECTOR_RULES: dict[str, Rule] = {
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
    "rev": lambda equation, x: np.flip(array_of(x), equation.params["dimensions"]),
    "transpose": lambda equation, x: array_of(x).transpose(equation.params["permutation"]),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "dot_general": _dot_general,
    "iota": _iota,
    "reduce_sum": _reduce(lambda kind, a, b: a + b),
    "reduce_prod": _reduce(lambda kind, a, b: a * b),
    "reduce_max": _reduce(maximum),
    "reduce_min": _reduce(minimum),
    "reduce_and": _reduce(lambda kind, a, b: arith_op("andi", a, b)),
    "reduce_or": _reduce(lambda kind, a, b: arith_op("ori", a, b)),
    "argmax": _place_of("gt"),
    "argmin": _place_of("lt"),
    "cumsum": _cumulative(lambda kind, a, b: a + b),
    "cumprod": _cumulative(lambda kind, a, b: a * b),
    "cummax": _cumulative(maximum),
    "cummin": _cumulative(minimum),
    "empty2": _undefined,
}
