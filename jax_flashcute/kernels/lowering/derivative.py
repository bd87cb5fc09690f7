"""The transposed derivative of a score: of what it returns, and of the arrays that it reads."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from jax_flashcute.analysis import POSITION_LIMIT
from jax_flashcute.kernels.lowering.inlining import (
    PLAIN_CALLS,
    flat_program,
    inner_program,
    source_of,
)
from jax_flashcute.kernels.lowering.program import ElementProgram
from jax_flashcute.kernels.lowering.rules import LARGEST_VECTOR
from jax_flashcute.kernels.lowering.vectors import VIEWS


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
    program = ElementProgram(flat_program(closed.jaxpr, ("cotangent", *arguments)), keys)
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
            inner = inner_program(equation)
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
        else:
            values = [_one_by_one(equation, *pair, read) for pair in inputs]
            results = [(x, None) for x in _bound(equation, values, equation.params)]
        known.update(zip(equation.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _cond_with_reads(equation, inputs: Sequence[tuple], read: Callable) -> list[tuple]:
    """The results of a ``cond``, as of ``_with_reads``.

    What any branch reads is read before; the cotangent of what is not chosen is 0.
    """

    def of_branch(branch, read):
        constants = [(x, None) for x in branch.consts]
        results = _with_reads(branch.jaxpr, [*constants, *inputs[1:]], read)
        return [_one_by_one(equation, *pair, read) for pair in results]

    def chosen(branch, values):
        rest = iter(values)
        return of_branch(branch, lambda value, _: next(rest).reshape(value.shape))

    choices = []
    for branch in equation.params["branches"]:
        values: list[Any] = []

        def kept(value, number, values=values):
            values.append(read(value, number))
            return values[-1]

        of_branch(branch, kept)
        choices.append(functools.partial(chosen, branch, values))
    return [(x, None) for x in jax.lax.switch(inputs[0][0], choices)]


def _one_by_one(equation, value, number, read: Callable):
    """A value that an equation takes, each of its elements replaced if it is of such an array.

    Raises:
      NotImplementedError: it has too many.
    """
    if number is None:
        return value
    if math.prod(value.shape) > LARGEST_VECTOR:
        raise NotImplementedError(
            f"{equation.primitive.name} of an array of floats as a whole, at {source_of(equation)}"
        )
    name, numbers = number
    found = [read(value[i], (name, numbers[i])) for i in np.ndindex(*value.shape)]
    return jnp.stack(found).reshape(value.shape)


def _bound(equation, values: Sequence[Any], params: Mapping[str, Any]) -> Sequence[Any]:
    """The results of an equation's primitive, of other values."""
    params = equation.primitive.get_bind_params(dict(params))
    results = equation.primitive.bind(*values, **params)
    return results if equation.primitive.multiple_results else [results]
