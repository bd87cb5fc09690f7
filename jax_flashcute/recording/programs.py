"""Masks and scores as values of a TOML file, and back.

A program is written as lists of equations, beside the text that identifies it; read back, it is
traced anew by binding the same primitives.  What is compiled from it is what was
compiled where it was written, so it keeps that text.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, Var, primitives

from jax_flashcute.masks import TracedFunction

_CALLS = {"closed_call", "core_call", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
_ENUMS = {x.__name__: x for x in (lax.GatherScatterMode, lax.RoundingMethod)}
_PRIMITIVES = {
    x.name: x
    for x in (*vars(primitives).values(), lax.stack_p, lax.unstack_p)
    if isinstance(x, Primitive)
}
_ARRAY = re.compile(r"(\w+)\[(.*)\]")


def array_text(array: Any) -> str:
    """An array's dtype and shape, as ``bfloat16[2,300,4,64]``."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def parse_array(text: str, scope: jax.export.SymbolicScope | None = None) -> jax.ShapeDtypeStruct:
    """The array that ``array_text`` describes; a length that is a name is a symbolic one.

    Arrays share such lengths where they are given one scope.

    Raises:
      ValueError: this is no such text.
    """
    match = _ARRAY.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f'an array must be given as "dtype[length,length,...]", got {text!r}')
    dtype, lengths = match.groups()
    if re.fullmatch(r"[\d,]*", lengths):
        shape = tuple(int(length) for length in lengths.split(",") if length)
    else:
        shape = jax.export.symbolic_shape(lengths, scope=scope)
    try:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    except TypeError:
        raise ValueError(f"{text!r}: {dtype!r} is no dtype") from None


def encode_program(function: TracedFunction) -> dict[str, Any]:
    """``function`` in numbers, texts, lists and dictionaries.

    Raises:
      NotImplementedError: a part of it cannot be written; it is named.
    """
    arrays = len(function.jaxpr.constvars)
    return {"text": function.text, "arrays": arrays, **_encode_jaxpr(function.jaxpr)}


def decode_program(program: dict[str, Any]) -> TracedFunction:
    """The function that ``encode_program`` wrote.

    Raises:
      ValueError: it uses an operation that this version of JAX does not have.
    """
    traced = _trace(program)
    # The first arguments are arrays that it closes over; kernels depend on their types alone.
    given = map(parse_array, program["arguments"][: program["arrays"]])
    closed = [jnp.zeros(a.shape, a.dtype) for a in given]
    return TracedFunction(program["text"], ClosedJaxpr(traced.jaxpr, closed).jaxpr)


def _encode_jaxpr(jaxpr: Jaxpr) -> dict[str, Any]:
    """Arguments by their types, equations and results, all values by number."""
    arguments = [*jaxpr.constvars, *jaxpr.invars]
    numbers: dict[Var, int] = {v: i for i, v in enumerate(arguments)}
    equations = []

    def read(atom):
        return _literal(atom.val) if isinstance(atom, Literal) else numbers[atom]

    for equation in jaxpr.eqns:
        written = {"of": equation.primitive.name, "inputs": [read(a) for a in equation.invars]}
        if equation.primitive.name == "jit":
            inner = equation.params["jaxpr"]
            if isinstance(inner, ClosedJaxpr):
                if inner.consts:
                    raise NotImplementedError("a jit with constants of its own cannot be written")
                inner = inner.jaxpr
            # The name is kept: the analysis of masks knows floor_divide by it.
            written |= {"name": equation.params["name"], "calls": _encode_jaxpr(inner)}
        elif equation.primitive.name in _PRIMITIVES.keys() - _CALLS:
            written["params"] = {k: _encode(v) for k, v in equation.params.items()}
        else:
            raise NotImplementedError(
                f"the operation {equation.primitive.name} cannot be written to a file"
            )
        written["outputs"] = [numbers.setdefault(v, len(numbers)) for v in equation.outvars]
        equations.append(written)
    return {
        "arguments": [array_text(v.aval) for v in arguments],
        "equations": equations,
        "results": [read(atom) for atom in jaxpr.outvars],
    }


def _literal(value: Any) -> dict[str, Any]:
    array = np.asarray(value)
    if array.shape:
        raise NotImplementedError(f"a constant of shape {array.shape} cannot be written to a file")
    kinds = ((bool, jnp.bool_), (int, jnp.integer), (float, jnp.floating))
    for kind, dtypes in kinds:
        if jnp.issubdtype(array.dtype, dtypes):
            return {"value": kind(array), "dtype": str(array.dtype)}
    raise NotImplementedError(f"a constant of {array.dtype} cannot be written to a file")


def _run(program: dict[str, Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(enumerate(arguments))

    def read(atom):
        if isinstance(atom, dict):
            return jnp.dtype(atom["dtype"]).type(atom["value"])
        return values[atom]

    for equation in program["equations"]:
        given = [read(atom) for atom in equation["inputs"]]
        primitive = _PRIMITIVES.get(equation["of"])
        if "calls" in equation:
            results = _call(equation["name"], equation["calls"], given)
        elif primitive is None:
            raise ValueError(f"JAX {jax.__version__} has no operation {equation['of']}")
        else:
            params = {k: _decode(v) for k, v in equation["params"].items()}
            results = primitive.bind(*given, **params)
            results = results if primitive.multiple_results else [results]
        values.update(zip(equation["outputs"], results, strict=True))
    return [read(atom) for atom in program["results"]]


def _trace(program: dict[str, Any]) -> ClosedJaxpr:
    given = [parse_array(text) for text in program["arguments"]]
    return jax.make_jaxpr(lambda *arguments: _run(program, arguments))(*given)


def _call(name: str, program: dict[str, Any], given: Sequence[Any]) -> list[Any]:
    def function(*arguments):
        return _run(program, arguments)

    function.__name__ = name
    return jax.jit(function)(*given)


def _encode(value: Any) -> Any:
    """A primitive's parameter."""
    kind = type(value).__name__
    match value:
        case None:
            return {"is": "None"}
        case bool() | int() | float() | str():
            return value
        case lax.GatherDimensionNumbers():
            return {"is": kind, **{k: _encode(v) for k, v in value._asdict().items()}}
        case tuple() | list():
            return [_encode(v) for v in value]
        case ClosedJaxpr():
            if value.consts:
                raise NotImplementedError("a branch with constants of its own cannot be written")
            return {"is": "program", **_encode_jaxpr(value.jaxpr)}
        case _ if kind in _ENUMS:
            return {"is": kind, "name": value.name}
    try:
        return {"is": "dtype", "name": jnp.dtype(value).name}
    except TypeError:
        raise NotImplementedError(f"{value!r} cannot be written to a file") from None


def _decode(value: Any) -> Any:
    match value:
        case {"is": "None"}:
            return None
        case {"is": "dtype", "name": name}:
            return jnp.dtype(name)
        case {"is": "GatherDimensionNumbers", **fields}:
            return lax.GatherDimensionNumbers(**{k: _decode(v) for k, v in fields.items()})
        case {"is": "program", **program}:
            return _trace(program)
        case {"is": kind, "name": name}:
            return _ENUMS[kind][name]
        case list():
            return tuple(map(_decode, value))
    return value
