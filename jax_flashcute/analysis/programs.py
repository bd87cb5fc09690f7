"""Programs: a traced mask or score without nested calls, and what is known of its values."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.extend.core import Literal as JaxprLiteral

from jax_flashcute.analysis.integers import (
    KV,
    Index,
    Linear,
    Opaque,
    bounds,
    depends_on,
    extreme,
    fits,
    quotient,
)
from jax_flashcute.analysis.key_sets import (
    EVERYTHING,
    NOTHING,
    Guard,
    KeySet,
    at_least_zero,
    complement,
    intersection,
    union,
    where,
)

_INDICES = ("b", "h", "q", "kv")


@dataclass(frozen=True)
class Step:
    """One operation of a flattened program; values are numbered."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: Mapping[str, Any]


@dataclass
class Program:
    """A traced function without nested calls, and what is known of its values.

    Values are numbered: first the arrays it closes over, then its arguments.

    Attributes:
      steps: operations in order.
      types: the shape and dtype of each value.
      constants: values that are known, by number.
      result: the number of the result.
      arrays: how many arrays it closes over.
      arguments: the numbers of its arguments.
      depends_on_kv: for each value, whether kv may change it.
      integers: the integers that are understood, by number.
      keys: for each boolean, the keys for which it is true, if that is known.
      stacked: of each vector of booleans, these.
      choices: of some selectors, the keys for which each is 0, 1 and so on, where that is known.
    """

    steps: list[Step] = field(default_factory=list)
    types: list[Any] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    result: int = -1
    arrays: int = 0
    arguments: range = range(0)
    depends_on_kv: list[bool] = field(default_factory=list)
    integers: dict[int, Linear] = field(default_factory=dict)
    keys: dict[int, KeySet | None] = field(default_factory=dict)
    stacked: dict[int, tuple[int, ...]] = field(default_factory=dict)
    choices: dict[int, list[KeySet | None]] = field(default_factory=dict)

    def new(self, shape: Sequence[Any], dtype: Any) -> int:
        """The number of one value more."""
        self.types.append(jax.ShapeDtypeStruct(shape, dtype))
        return len(self.types) - 1

    def evaluate(self, wanted: Sequence[int], arrays, arguments) -> list[Any]:
        """Some values for given arrays and scalar arguments, by running what they need."""
        values = dict(self.constants)
        values |= dict(enumerate(arrays)) | dict(zip(self.arguments, arguments, strict=True))
        needed, steps = set(wanted), []
        for step in reversed(self.steps):
            if needed & set(step.outputs):
                steps.append(step)
                needed |= set(step.inputs)
        for step in reversed(steps):
            outputs = step.function(*(values[i] for i in step.inputs))
            values |= dict(zip(step.outputs, outputs, strict=True))
        return [values[i] for i in wanted]

    def intervals(self) -> KeySet | None:
        """The keys a mask shows, as a union of intervals, if it reduces to one."""
        return key_set(self, self.result)

    def conjuncts(self) -> list[int]:
        """Booleans whose conjunction is the result, as many as there are."""
        by_output = {step.outputs[0]: step for step in self.steps if len(step.outputs) == 1}

        def parts(value: int) -> list[int]:
            step = by_output.get(value)
            if step is not None and step.name == "and" and _is_boolean(self.types[value].dtype):
                return [p for i in step.inputs for p in parts(i)]
            return [value]

        return list(dict.fromkeys(parts(self.result)))


def analyse(jaxpr: Jaxpr) -> Program:
    """Flatten and understand a traced mask (b, h, q, kv) or score (score, b, h, q, kv)."""
    program = Program()
    arrays = [_new(program, v.aval) for v in jaxpr.constvars]
    arguments = [_new(program, v.aval) for v in jaxpr.invars]
    program.arrays, program.arguments = len(arrays), range(len(arrays), len(program.types))
    environment = dict(zip(jaxpr.constvars, arrays, strict=True))
    environment |= dict(zip(jaxpr.invars, arguments, strict=True))
    (program.result,) = _flatten(program, jaxpr, environment)
    understand(program)
    return program


def understand(program: Program) -> None:
    """Fills in what is known of the values of a flattened program, of which (b, h, q, kv) are the
    last arguments.
    """
    *others, kv = program.arguments
    varying = {kv, *others[: 1 - len(_INDICES)]}
    for name, value in zip(_INDICES, program.arguments[-len(_INDICES) :], strict=True):
        program.integers[value] = Linear.of(Index(name))
    for step in program.steps:
        if varying & set(step.inputs):
            varying |= set(step.outputs)
    program.depends_on_kv = [i in varying for i in range(len(program.types))]
    for value, constant in program.constants.items():
        _know_constant(program, value, constant)
    for step in program.steps:
        _understand(program, step)


def _new(program: Program, aval) -> int:
    return program.new(aval.shape, aval.dtype)


def _flatten(program: Program, jaxpr: Jaxpr, environment: dict) -> list[int]:
    def read(variable) -> int:
        if isinstance(variable, JaxprLiteral):
            value = _new(program, variable.aval)
            program.constants[value] = np.asarray(variable.val, program.types[value].dtype)
            return value
        return environment[variable]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        name = equation.primitive.name
        known = _library_call(inner) if isinstance(inner, ClosedJaxpr) else None
        if known is None and name in _CALLS and isinstance(inner, ClosedJaxpr):
            outputs = _flatten_closed(program, inner, inputs)
        elif name == "cond" and not equation.effects:
            found = [_flatten_closed(program, b, inputs[1:]) for b in equation.params["branches"]]
            outputs = []
            for cases in zip(*found, strict=True):
                outputs.append(_new(program, program.types[cases[0]]))
                given = (inputs[0], *cases)
                program.steps.append(Step("select_n", _select_n, given, (outputs[-1],), {}))
        else:
            outputs = [_new(program, v.aval) for v in equation.outvars]
            function = _runner(equation)
            step = Step(known or name, function, tuple(inputs), tuple(outputs), equation.params)
            program.steps.append(step)
        environment |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _flatten_closed(program: Program, inner: ClosedJaxpr, inputs: Sequence[int]) -> list[int]:
    nested = dict(zip(inner.jaxpr.invars, inputs, strict=True))
    for variable, constant in zip(inner.jaxpr.constvars, inner.consts, strict=True):
        value = _new(program, variable.aval)
        program.constants[value] = constant
        nested[variable] = value
    return _flatten(program, inner.jaxpr, nested)


def _select_n(which, *cases):
    return [jax.lax.select_n(which, *cases)]


_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat")


def _runner(equation) -> Callable[..., Any]:
    if isinstance(equation.params.get("jaxpr"), ClosedJaxpr) and equation.primitive.name == "jit":
        return jaxpr_as_fun(equation.params["jaxpr"])

    def run(*values):
        outputs = equation.primitive.bind(*values, **equation.params)
        return outputs if equation.primitive.multiple_results else [outputs]

    return run


@functools.cache
def _library_calls() -> dict[str, str]:
    """The text of what jnp's rounding division and remainder trace to, as it is in this JAX."""
    found = {}
    for name, function in (("floor_divide", jnp.floor_divide), ("remainder", jnp.remainder)):
        x = jax.ShapeDtypeStruct((), jnp.int32)
        for call in (function, lambda a, f=function: f(a, 3)):
            arguments = [x, x] if call is function else [x]
            (equation,) = jax.make_jaxpr(call)(*arguments).jaxpr.eqns
            found[str(equation.params["jaxpr"].jaxpr)] = name
    return found


def _library_call(inner: ClosedJaxpr) -> str | None:
    """Which of jnp's functions a nested program is, judged by what it does, not by its name."""
    if len(inner.jaxpr.invars) != 2 or inner.consts:
        return None
    return _library_calls().get(str(inner.jaxpr))


def _know_constant(program: Program, value: int, constant) -> None:
    shape, dtype = program.types[value].shape, program.types[value].dtype
    if shape != () or isinstance(constant, Tracer):
        return
    if _is_boolean(dtype):
        program.keys[value] = EVERYTHING if bool(constant) else NOTHING
    elif _is_signed(dtype):
        program.integers[value] = Linear(constant=int(constant))


def _is_boolean(dtype) -> bool:
    return np.dtype(dtype).kind == "b"


def _is_signed(dtype) -> bool:
    """Integers of at most 32 bits, whose operations are those of int32 where they fit."""
    return np.issubdtype(dtype, np.signedinteger) and np.dtype(dtype).itemsize <= 4


def integer(program: Program, value: int) -> Linear:
    """An integer of the program; what is not understood is opaque."""
    if value not in program.integers:
        info = np.iinfo(program.types[value].dtype)
        atom = Opaque(value, program.depends_on_kv[value], int(info.min), int(info.max))
        program.integers[value] = Linear.of(atom)
    return program.integers[value]


def key_set(program: Program, value: int) -> KeySet | None:
    """The keys for which a boolean of the program is true."""
    if value not in program.keys:
        uniform = not program.depends_on_kv[value]
        program.keys[value] = where(Guard(value)) if uniform else None
    return program.keys[value]


def _understand(program: Program, step: Step) -> None:
    (output, *more), inputs = step.outputs, step.inputs
    types = [program.types[i] for i in (*inputs, output)]
    if step.name == "stack" and all(t.shape == () and _is_boolean(t.dtype) for t in types[:-1]):
        program.stacked[output] = inputs
    elif step.name == "argmax" and inputs[0] in program.stacked:
        program.choices[output] = _firsts([key_set(program, i) for i in program.stacked[inputs[0]]])
    elif step.name == "convert_element_type" and _is_boolean(types[0].dtype):
        yes = key_set(program, inputs[0]) if types[0].shape == () else None
        program.choices[output] = [complement(yes), yes]
    if more or any(t.shape != () for t in types):
        return
    *kinds, kind = [t.dtype for t in types]
    if _is_boolean(kind):
        found = _boolean(program, step, kinds)
        if found is not None:
            program.keys[output] = found
        elif program.depends_on_kv[output]:
            program.keys[output] = None
    elif _is_signed(kind):
        found = _number(program, step, kinds)
        limits = np.iinfo(kind)
        if found is not None and fits(found, (int(limits.min), int(limits.max))):
            program.integers[output] = found


def _boolean(program: Program, step: Step, kinds) -> KeySet | None:
    if step.name == "select_n":
        which, *cases = step.inputs
        chosen = zip(_choices(program, which, len(cases)), cases, strict=True)
        pieces = [intersection(keys, key_set(program, case)) for keys, case in chosen]
        return functools.reduce(union, pieces)
    if all(_is_boolean(k) for k in kinds):
        sets = [key_set(program, i) for i in step.inputs]
        match step.name:
            case "and":
                return intersection(*sets)
            case "or":
                return EVERYTHING if EVERYTHING in sets else union(*sets)
            case "not":
                return complement(*sets)
            case "xor" | "ne":
                a, b = sets
                return union(intersection(a, complement(b)), intersection(complement(a), b))
            case "eq":
                a, b = sets
                return union(intersection(a, b), intersection(complement(a), complement(b)))
            case "convert_element_type" | "stop_gradient" | "copy":
                return sets[0]
        return None
    if step.name not in _COMPARISONS or not all(_is_signed(k) for k in kinds):
        return None
    a, b = (integer(program, i) for i in step.inputs)
    return _COMPARISONS[step.name](a, b)


def _choices(program: Program, which: int, count: int) -> list[KeySet | None]:
    """The keys for which a selector says each of so many cases."""
    if _is_boolean(program.types[which].dtype):
        yes = key_set(program, which)
        return [complement(yes), yes]
    if len(program.choices.get(which, ())) == count:
        return program.choices[which]
    number, last = integer(program, which), count - 1
    between = [_COMPARISONS["eq"](number, Linear(constant=i)) for i in range(1, last)]
    return [at_least_zero(-number), *between, at_least_zero(number - last)]


def _firsts(sets: Sequence[KeySet | None]) -> list[KeySet | None]:
    """Of booleans, by the keys for which they are true: those for which each is the first.

    Where none is true, it is the one in front, as ``argmax`` has it.
    """
    first, *others = sets
    rest, found = complement(first), []
    for keys in others:
        found.append(intersection(rest, keys))
        rest = intersection(rest, complement(keys))
    return [union(first, rest), *found]


_COMPARISONS: dict[str, Callable[[Linear, Linear], KeySet | None]] = {
    "ge": lambda a, b: at_least_zero(a - b),
    "le": lambda a, b: at_least_zero(b - a),
    "gt": lambda a, b: at_least_zero(a - b - 1),
    "lt": lambda a, b: at_least_zero(b - a - 1),
    "eq": lambda a, b: intersection(at_least_zero(a - b), at_least_zero(b - a)),
    "ne": lambda a, b: union(at_least_zero(a - b - 1), at_least_zero(b - a - 1)),
}


def _number(program: Program, step: Step, kinds) -> Linear | None:
    if step.name == "select_n" and _is_boolean(kinds[0]) and len(kinds) == 3:
        which = key_set(program, step.inputs[0])
        if which in (EVERYTHING, NOTHING):
            return integer(program, step.inputs[2 if which == EVERYTHING else 1])
        return None
    if not kinds or not all(_is_signed(k) for k in kinds):
        return None
    inputs = [integer(program, i) for i in step.inputs]
    constants = [x.constant if not x.terms else None for x in inputs]
    match step.name, inputs, constants:
        case (("convert_element_type" | "copy" | "stop_gradient"), [a], _):
            return a
        case "add", [a, b], _:
            return a + b
        case "sub", [a, b], _:
            return a - b
        case "neg", [a], _:
            return -a
        case "mul", [a, _], [_, int(k)]:
            return a * k
        case "mul", [_, b], [int(k), _]:
            return b * k
        case "max", [a, b], _:
            return extreme("max", a, b)
        case "min", [a, b], _:
            return extreme("min", a, b)
        case "abs", [a], _:
            return extreme("max", a, -a) if fits(-a) else None
        case "clamp", [low, a, high], _:
            return extreme("min", high, extreme("max", low, a))
        case "floor_divide", [a, _], [_, int(k)] if k > 0:
            return quotient(a, k)
        case "remainder", [a, _], [_, int(k)] if k > 0:
            return a - quotient(a, k) * k
        case "div", [a, _], [_, int(k)] if k > 0 and bounds(a)[0] >= 0:
            return quotient(a, k)
        case "rem", [a, _], [_, int(k)] if k > 0 and bounds(a)[0] >= 0:
            return a - quotient(a, k) * k
        case "shift_right_arithmetic", [a, _], [_, int(k)] if 0 <= k < 31:
            return quotient(a, 2**k)
        case "shift_left", [a, _], [_, int(k)] if 0 <= k < 31:
            return a * 2**k
    return None


@dataclass(frozen=True)
class Load:
    """One read of an array that the function closes over.

    Attributes:
      array: its number among those arrays.
      shape, dtype: the array's.
      kind: ``"uniform"`` (kv does not move it), ``"contiguous"`` (the next key reads the next
        element of the last axis), or ``"gather"``.
      width: of a contiguous one, the largest power of two such that, for each key that is a
        multiple of it, this key's element lies at a multiple of it, in memory and in the last axis;
        no larger than ``LOAD_BYTES`` have elements.  1 of other kinds.
    """

    array: int
    shape: tuple[int, ...]
    dtype: str
    kind: Literal["uniform", "contiguous", "gather"]
    width: int = 1


LOAD_BYTES = 16
"""What one instruction loads at most."""


def loads(program: Program) -> list[Load]:
    """Every read of a closed-over array, in program order.  An array read whole is not listed."""
    found = [load_of(program, step) for step in program.steps]
    return [load for load in found if load is not None]


def load_of(program: Program, step: Step) -> Load | None:
    """What a step reads of a closed-over array; None where it does not."""
    if step.name not in ("dynamic_slice", "gather") or step.inputs[0] >= program.arrays:
        return None
    array, *indices = step.inputs
    kind, width = "gather", 1
    if not any(program.depends_on_kv[i] for i in indices):
        kind = "uniform"
    elif step.name == "dynamic_slice":
        *others, last = indices
        strides = dict(integer(program, last).terms).get(KV)
        rest = integer(program, last) - Linear.of(KV) * (strides or 0)
        outer = any(program.depends_on_kv[i] for i in others)
        if strides == 1 and not outer and not depends_on(rest, "kv"):
            kind, width = "contiguous", _aligned_width(rest, program.types[array])
    return Load(array, program.types[array].shape, str(program.types[array].dtype), kind, width)


def _aligned_width(rest: Linear, array) -> int:
    """The width of a load of an array at the index ``kv + rest`` of its last axis."""
    length = array.shape[-1]
    if not isinstance(length, int):
        return 1
    # Rows, and arrays of batch entries, begin at multiples of the last axis.
    numbers = [length, rest.constant, *(coefficient for _, coefficient in rest.terms)]
    width = max(1, LOAD_BYTES // np.dtype(array.dtype).itemsize)
    while any(number % width for number in numbers):
        width //= 2
    return width
