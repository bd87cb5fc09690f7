"""What of a mask or a score depends on the key, and how: from a traced program, without running it.

Every value of a program is uniform over the keys, affine in ``kv`` with a constant coefficient, or
arbitrary; a mask is reduced, where it can be, to a union of intervals ``lo <= kv < hi`` whose
bounds do not depend on ``kv``.  Unknown means arbitrary: nothing is guessed.

Positions and key numbers are taken to be below ``POSITION_LIMIT`` in magnitude.  Arithmetic whose
result could then leave int32 is arbitrary, so the programs' wrap-around is never reasoned away.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.extend.core import Literal as JaxprLiteral

POSITION_LIMIT = 2**24
"""Positions, key numbers, batch entries and heads are below this; 64 times it fits int32."""

FAR = 2**29
"""Further than any position, and small enough to add to one."""

MAX_INTERVALS = 8
"""A mask of more pieces than this is not worth their bounds."""

_INT32 = -(2**31), 2**31 - 1
_WIDE = 2**29
_INDICES = ("b", "h", "q", "kv")


# ---- integers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """``b``, ``h``, ``q`` (a position) or ``kv``."""

    name: str


@dataclass(frozen=True)
class Opaque:
    """A value of the program that is known by its number alone; its range is its dtype's."""

    value: int
    depends_on_kv: bool
    low: int
    high: int


@dataclass(frozen=True)
class Quotient:
    """``floor(dividend / divisor)``; the divisor is positive."""

    dividend: "Linear"
    divisor: int


@dataclass(frozen=True)
class Extreme:
    """The smallest (``"min"``) or the largest (``"max"``) of several."""

    kind: Literal["min", "max"]
    operands: frozenset["Linear"]

    def __repr__(self) -> str:
        return f"Extreme({self.kind!r}, {sorted(map(repr, self.operands))})"


Atom = Index | Opaque | Quotient | Extreme


@dataclass(frozen=True)
class Linear:
    """``constant`` plus the sum of coefficient times atom."""

    terms: frozenset[tuple[Atom, int]] = frozenset()
    constant: int = 0

    @staticmethod
    def of(atom: Atom) -> "Linear":
        return Linear(frozenset([(atom, 1)]))

    def __add__(self, other: "Linear | int") -> "Linear":
        other = as_linear(other)
        terms = dict(self.terms)
        for atom, coefficient in other.terms:
            terms[atom] = terms.get(atom, 0) + coefficient
        kept = frozenset((atom, c) for atom, c in terms.items() if c)
        return Linear(kept, self.constant + other.constant)

    def __mul__(self, factor: int) -> "Linear":
        if factor == 0:
            return Linear()
        return Linear(frozenset((a, c * factor) for a, c in self.terms), self.constant * factor)

    def __neg__(self) -> "Linear":
        return self * -1

    def __sub__(self, other: "Linear | int") -> "Linear":
        return self + -as_linear(other)

    def __str__(self) -> str:
        return describe(self)

    def __repr__(self) -> str:
        # The same in every process: it is part of what compiled kernels are known by.
        return f"Linear({sorted(map(repr, self.terms))}, {self.constant})"


def as_linear(value: Linear | int) -> Linear:
    return value if isinstance(value, Linear) else Linear(constant=value)


KV = Index("kv")


@functools.cache
def bounds(value: Linear | Atom) -> tuple[int, int]:
    """The smallest and the largest value, both inclusive."""
    match value:
        case Index(name):
            return -POSITION_LIMIT if name == "q" else 0, POSITION_LIMIT - 1
        case Opaque():
            return value.low, value.high
        case Quotient():
            low, high = bounds(value.dividend)
            return low // value.divisor, high // value.divisor
        case Extreme():
            lows, highs = zip(*(bounds(x) for x in value.operands), strict=True)
            pick = min if value.kind == "min" else max
            return pick(lows), pick(highs)
    low = high = value.constant
    for atom, coefficient in value.terms:
        ends = [coefficient * end for end in bounds(atom)]
        low, high = low + min(ends), high + max(ends)
    return low, high


@functools.cache
def depends_on(value: Linear | Atom, name: str) -> bool:
    """Whether an index may change the value; an opaque one may depend on every index but kv."""
    match value:
        case Index():
            return value.name == name
        case Opaque():
            return value.depends_on_kv or name != "kv"
        case Quotient():
            return depends_on(value.dividend, name)
        case Extreme():
            return any(depends_on(x, name) for x in value.operands)
    return any(depends_on(atom, name) for atom, _ in value.terms)


def quotient(dividend: Linear, divisor: int) -> Linear:
    """``floor(dividend / divisor)``, the part that divides taken out."""
    even = frozenset((a, c) for a, c in dividend.terms if c % divisor == 0)
    whole = Linear(frozenset((a, c // divisor) for a, c in even), dividend.constant // divisor)
    rest = Linear(dividend.terms - even, dividend.constant % divisor)
    low, high = bounds(rest)
    if low // divisor == high // divisor:
        return whole + low // divisor
    if not _fits(rest):
        whole, rest = Linear(), dividend
    return whole + Linear.of(Quotient(rest, divisor))


def extreme(kind: Literal["min", "max"], *operands: Linear) -> Linear:
    """The smallest or largest of ``operands``; what another one beats everywhere is left out."""
    flat: list[Linear] = []
    for x in operands:
        nested = [a for a, c in x.terms if isinstance(a, Extreme) and a.kind == kind and c == 1]
        if nested and len(x.terms) == 1 and x.constant == 0:
            flat += nested[0].operands
        else:
            flat.append(x)
    sign = 1 if kind == "max" else -1
    kept: list[Linear] = []
    for x in dict.fromkeys(flat):
        # x is beaten by y where y - x is nowhere negative (max) or positive (min).
        if any(bounds((y - x) * sign)[0] >= 0 for y in kept):
            continue
        kept = [y for y in kept if bounds((x - y) * sign)[0] < 0]
        kept.append(x)
    return kept[0] if len(kept) == 1 else Linear.of(Extreme(kind, frozenset(kept)))


def _fits(value: Linear, limits: tuple[int, int] = _INT32) -> bool:
    low, high = bounds(value)
    return limits[0] <= low and high <= limits[1]


def trend(value: Linear, name: str = "q") -> Literal["constant", "rising", "falling"] | None:
    """How a value moves with an index where that can be proven, else None."""
    if not depends_on(value, name):
        return "constant"
    found = set()
    for atom, coefficient in value.terms:
        match atom:
            case Index():
                moves = ["rising"] if atom.name == name else []
            case Opaque():
                moves = [None] if depends_on(atom, name) else []
            case Quotient():
                moves = [trend(atom.dividend, name)]
            case Extreme():
                moves = [trend(x, name) for x in atom.operands]
        if coefficient < 0:
            moves = [_OPPOSITE[m] for m in moves]
        found |= set(moves) - {"constant"}
    return found.pop() if len(found) == 1 else None


_OPPOSITE = {"rising": "falling", "falling": "rising", "constant": "constant", None: None}


def evaluate(
    value: Linear,
    indices: Mapping[str, Any],
    opaque: Mapping[int, Any],
    minimum: Callable[[Any, Any], Any],
    maximum: Callable[[Any, Any], Any],
):
    """A value in any arithmetic with ``+``, ``*`` and a ``//`` that rounds down.

    Args:
      value: what to compute.
      indices: what stands for ``b``, ``h``, ``q`` and ``kv``, as far as they occur.
      opaque: what stands for each opaque value.
      minimum, maximum: of two.

    Intermediate sums may leave int32 and wrap; the result and every operand of a division or a
    comparison do not.
    """
    again = functools.partial(
        evaluate, indices=indices, opaque=opaque, minimum=minimum, maximum=maximum
    )
    total: Any = value.constant
    for atom, coefficient in _ordered(value.terms):
        match atom:
            case Index():
                x = indices[atom.name]
            case Opaque():
                x = opaque[atom.value]
            case Quotient():
                x = again(atom.dividend) // atom.divisor
            case Extreme():
                pick = minimum if atom.kind == "min" else maximum
                x = functools.reduce(pick, [again(o) for o in _ordered(atom.operands)])
        total = total + (x if coefficient == 1 else x * coefficient)
    return total


def first_reaching(
    value: Linear,
    target: Any,
    minimum: Callable[[Any, Any], Any],
    maximum: Callable[[Any, Any], Any],
):
    """The least q at which a bound of ``rising_interval`` is at least ``target``, in int32.

    Where the bound is constant: -``FAR`` if it is, ``FAR`` if it never is.
    """
    if not value.terms:
        return minimum(maximum(target - value.constant, 0), 1) * (2 * FAR) - FAR
    ((atom, coefficient),) = value.terms
    target = target - value.constant
    if coefficient != 1:
        target = (target + (coefficient - 1)) // coefficient
    match atom:
        case Quotient():
            return first_reaching(atom.dividend, target * atom.divisor, minimum, maximum)
        case Extreme():
            pick = minimum if atom.kind == "max" else maximum
            ends = [first_reaching(x, target, minimum, maximum) for x in _ordered(atom.operands)]
            return functools.reduce(pick, ends)
    return target


def _ordered(values):
    """A frozenset in an order that is the same in every process."""
    return sorted(values, key=repr)


def describe(value: Linear) -> str:
    """A value as text, such as ``q - 255`` or ``max(512, q + 1)``."""

    def of_atom(atom: Atom) -> str:
        match atom:
            case Index():
                return atom.name
            case Opaque():
                return f"v{atom.value}"
            case Quotient():
                inner = describe(atom.dividend)
                return (
                    f"({inner}) // {atom.divisor}" if " " in inner else f"{inner} // {atom.divisor}"
                )
            case Extreme():
                return f"{atom.kind}({', '.join(describe(o) for o in _ordered(atom.operands))})"

    text = ""
    for atom, c in _ordered(value.terms):
        part = of_atom(atom)
        if abs(c) != 1:
            part = (
                f"{abs(c)} * ({part})" if " " in part and "(" != part[0] else f"{abs(c)} * {part}"
            )
        text += (" - " if c < 0 else " + ") + part
    if value.constant or not text:
        text += (" - " if value.constant < 0 else " + ") + str(abs(value.constant))
    return text[3:] if text.startswith(" + ") else "-" + text[3:]


# ---- sets of keys --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """A condition that does not depend on kv: ``value >= 0``, or a boolean of the program."""

    value: Linear | int
    holds: bool = True

    def __invert__(self) -> "Guard":
        if isinstance(self.value, Linear):
            return Guard(-self.value - 1)
        return Guard(self.value, not self.holds)


@dataclass(frozen=True)
class Interval:
    """The keys ``low <= kv < high`` where all guards hold; None leaves a side open."""

    low: Linear | None = None
    high: Linear | None = None
    guards: frozenset[Guard] = frozenset()

    def __str__(self) -> str:
        ends = ("" if self.low is None else f"{self.low} <= ") + "kv"
        ends += "" if self.high is None else f" < {self.high}"
        return ends + (f" where {len(self.guards)} conditions hold" if self.guards else "")


KeySet = tuple[Interval, ...]
"""A union of intervals."""

EVERYTHING: KeySet = (Interval(),)
NOTHING: KeySet = ()


def union(a: KeySet | None, b: KeySet | None) -> KeySet | None:
    """All keys of both, or None where one is unknown or the pieces are too many."""
    if a is None or b is None:
        return None
    pieces = [*a]
    for x in b:
        for i, y in enumerate(pieces):
            joined = _joined(x, y)
            if joined is not None:
                pieces[i] = joined
                break
        else:
            pieces.append(x)
    return tuple(dict.fromkeys(pieces)) if len(pieces) <= MAX_INTERVALS else None


def _joined(x: Interval, y: Interval) -> Interval | None:
    """The union of two intervals that share a bound and the guards, or of one within the other."""
    for inner, outer in ((x, y), (y, x)):
        if outer.guards <= inner.guards and _within(inner, outer):
            return outer
    if x.guards != y.guards:
        return None
    if x.low == y.low and x.high is not None and y.high is not None:
        return Interval(x.low, extreme("max", x.high, y.high), x.guards)
    if x.high == y.high and x.low is not None and y.low is not None:
        return Interval(extreme("min", x.low, y.low), x.high, x.guards)
    return None


def _within(inner: Interval, outer: Interval) -> bool:
    def ordered(less: Linear | None, more: Linear | None) -> bool:
        return less is not None and more is not None and bounds(more - less)[0] >= 0

    low = outer.low is None or ordered(outer.low, inner.low)
    return low and (outer.high is None or ordered(inner.high, outer.high))


def intersection(a: KeySet | None, b: KeySet | None) -> KeySet | None:
    """The keys of both; nothing at all is known to be nothing."""
    if NOTHING in (a, b):
        return NOTHING
    if a is None or b is None:
        return None
    pieces: KeySet | None = NOTHING
    for x, y in itertools.product(a, b):
        guards = x.guards | y.guards
        if any(~g in guards for g in guards):
            continue
        lows = [e.low for e in (x, y) if e.low is not None]
        highs = [e.high for e in (x, y) if e.high is not None]
        low = extreme("max", *lows) if lows else None
        high = extreme("min", *highs) if highs else None
        if low is not None and high is not None and bounds(high - low)[1] <= 0:
            continue
        pieces = union(pieces, (Interval(low, high, guards),))
    return pieces


def complement(a: KeySet | None) -> KeySet | None:
    """All other keys."""
    if a is None:
        return None
    result: KeySet | None = EVERYTHING
    for x in a:
        outside: KeySet | None = NOTHING
        if x.low is not None:
            outside = union(outside, (Interval(high=x.low),))
        if x.high is not None:
            outside = union(outside, (Interval(low=x.high),))
        for guard in x.guards:
            outside = union(outside, (Interval(guards=frozenset([~guard])),))
        result = intersection(result, outside)
    return result


def where(guard: Guard) -> KeySet:
    """Every key where a condition holds, and none elsewhere."""
    if isinstance(guard.value, Linear):
        low, high = bounds(guard.value)
        if low >= 0:
            return EVERYTHING
        if high < 0:
            return NOTHING
    return (Interval(guards=frozenset([guard])),)


def at_least_zero(value: Linear) -> KeySet | None:
    """The keys for which ``value >= 0``, or None."""
    low, high = bounds(value)
    if low >= 0:
        return EVERYTHING
    if high < 0:
        return NOTHING
    varying = [(a, c) for a, c in value.terms if depends_on(a, "kv")]
    if not varying:
        # Only a number in int32 can be computed.
        narrow = value if _fits(value) else _narrowed(value, 0)
        return None if narrow is None else where(Guard(narrow))
    if len(varying) > 1:
        return None
    ((atom, coefficient),) = varying
    rest = value - Linear.of(atom) * coefficient
    if coefficient > 0:
        # atom >= ceil(-rest / coefficient)
        threshold = _threshold(atom, -rest, coefficient, up=True)
        return None if threshold is None else _reaches(atom, threshold)
    # atom <= floor(rest / -coefficient)
    threshold = _threshold(atom, rest, -coefficient, up=False)
    return None if threshold is None else complement(_reaches(atom, threshold + 1))


def _threshold(atom: Atom, total: Linear, divisor: int, *, up: bool) -> Linear | None:
    """``total / divisor`` rounded, in a form that can be computed and compared with ``atom``."""
    if not _fits(total, (-(2**30), 2**30)):
        reach = divisor * (max(abs(end) for end in bounds(atom)) + 2)
        narrow = _narrowed(total, reach)
        if narrow is None:
            return None
        total = narrow
    return quotient(total + (divisor - 1), divisor) if up else quotient(total, divisor)


def _narrowed(total: Linear, reach: int) -> Linear | None:
    """A value of int32 that compares with all of ``-reach..reach`` as ``total`` does, or None.

    Works where all but one atom are small and that one counts once: it is clamped.
    """
    wide = [(a, c) for a, c in total.terms if max(map(abs, bounds(a))) * abs(c) > _WIDE]
    if len(wide) != 1 or abs(wide[0][1]) != 1:
        return None
    ((atom, coefficient),) = wide
    rest = total - Linear.of(atom) * coefficient
    if max(map(abs, bounds(rest))) + reach >= _WIDE:
        return None
    clamped = extreme("max", Linear(constant=-_WIDE), Linear.of(atom))
    return rest + extreme("min", Linear(constant=_WIDE), clamped) * coefficient


def _reaches(atom: Atom, threshold: Linear) -> KeySet | None:
    """The keys for which ``atom >= threshold``."""
    match atom:
        case Index():
            return (Interval(low=threshold),)
        case Quotient():
            if not _fits(threshold * atom.divisor, (-_WIDE, _WIDE)):
                low, high = bounds(atom)
                threshold = extreme("max", Linear(constant=low), threshold)
                threshold = extreme("min", Linear(constant=high + 1), threshold)
            return at_least_zero(atom.dividend - threshold * atom.divisor)
        case Extreme():
            combine = intersection if atom.kind == "min" else union
            sets = [at_least_zero(x - threshold) for x in atom.operands]
            return functools.reduce(combine, sets)
    return None


# ---- programs ------------------------------------------------------------------------------------


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

    def new(self, aval) -> int:
        self.types.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
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
    arrays = [program.new(v.aval) for v in jaxpr.constvars]
    arguments = [program.new(v.aval) for v in jaxpr.invars]
    program.arrays, program.arguments = len(arrays), range(len(arrays), len(program.types))
    environment = dict(zip(jaxpr.constvars, arrays, strict=True))
    environment |= dict(zip(jaxpr.invars, arguments, strict=True))
    (program.result,) = _flatten(program, jaxpr, environment)
    varying = {arguments[-1]}
    if len(arguments) > len(_INDICES):
        varying.add(arguments[0])
    for name, value in zip(_INDICES, arguments[-4:], strict=True):
        program.integers[value] = Linear.of(Index(name))
    for step in program.steps:
        if varying & set(step.inputs):
            varying |= set(step.outputs)
    program.depends_on_kv = [i in varying for i in range(len(program.types))]
    for value, constant in program.constants.items():
        _know_constant(program, value, constant)
    for step in program.steps:
        _understand(program, step)
    return program


def _flatten(program: Program, jaxpr: Jaxpr, environment: dict) -> list[int]:
    def read(variable) -> int:
        if isinstance(variable, JaxprLiteral):
            value = program.new(variable.aval)
            program.constants[value] = np.asarray(variable.val, program.types[value].dtype)
            return value
        return environment[variable]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        name = equation.primitive.name
        known = _library_call(inner) if isinstance(inner, ClosedJaxpr) else None
        if known is None and name in _CALLS and isinstance(inner, ClosedJaxpr):
            nested = dict(zip(inner.jaxpr.invars, inputs, strict=True))
            for variable, constant in zip(inner.jaxpr.constvars, inner.consts, strict=True):
                value = program.new(variable.aval)
                program.constants[value] = constant
                nested[variable] = value
            outputs = _flatten(program, inner.jaxpr, nested)
        else:
            outputs = [program.new(v.aval) for v in equation.outvars]
            function = _runner(equation)
            step = Step(known or name, function, tuple(inputs), tuple(outputs), equation.params)
            program.steps.append(step)
        environment |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


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
        if found is not None and _fits(found, (int(limits.min), int(limits.max))):
            program.integers[output] = found


def _boolean(program: Program, step: Step, kinds) -> KeySet | None:
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
            case "select_n":
                which, no, yes = sets
                return union(intersection(which, yes), intersection(complement(which), no))
            case "convert_element_type" | "stop_gradient" | "copy":
                return sets[0]
        return None
    if step.name not in _COMPARISONS or not all(_is_signed(k) for k in kinds):
        return None
    a, b = (integer(program, i) for i in step.inputs)
    return _COMPARISONS[step.name](a, b)


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
            return extreme("max", a, -a) if _fits(-a) else None
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


# ---- loads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """One read of an array that the function closes over.

    Attributes:
      array: its number among those arrays.
      shape, dtype: the array's.
      kind: ``"uniform"`` (kv does not move it), ``"contiguous"`` (the next key reads the next
        element of the last axis), or ``"gather"``.
    """

    array: int
    shape: tuple[int, ...]
    dtype: str
    kind: Literal["uniform", "contiguous", "gather"]


def loads(program: Program) -> list[Load]:
    """Every read of a closed-over array, in program order.  An array read whole is not listed."""
    found = []
    for step in program.steps:
        if step.name not in ("dynamic_slice", "gather") or step.inputs[0] >= program.arrays:
            continue
        array, *indices = step.inputs
        shape = program.types[array].shape
        kind = "gather"
        if not any(program.depends_on_kv[i] for i in indices):
            kind = "uniform"
        elif step.name == "dynamic_slice":
            *others, last = indices
            strides = dict(integer(program, last).terms).get(KV)
            rest = integer(program, last) - Linear.of(KV) * (strides or 0)
            outer = any(program.depends_on_kv[i] for i in others)
            if strides == 1 and not outer and not depends_on(rest, "kv"):
                kind = "contiguous"
        found.append(Load(array, shape, str(program.types[array].dtype), kind))
    return found


# ---- windows -------------------------------------------------------------------------------------


def window(keys: KeySet | None) -> tuple[int | None, int | None] | None:
    """``(left, right)`` if the keys are just ``q - left <= kv <= q + right``; None is open."""
    if keys is None or len(keys) != 1 or keys[0].guards:
        return None
    sides = []
    for bound, sign, shift in ((keys[0].low, -1, 0), (keys[0].high, 1, -1)):
        if bound is None or _is_open(bound, sign):
            sides.append(None)
        elif bound.terms == frozenset([(Index("q"), 1)]):
            sides.append(sign * bound.constant + shift)
        else:
            return None
    return sides[0], sides[1]


def _is_open(bound: Linear, sign: int) -> bool:
    """Whether every key is on the right side of a bound anyway."""
    low, high = bounds(bound)
    return high <= 0 if sign < 0 else low >= POSITION_LIMIT


def window_interval(left: int | None, right: int | None) -> Interval:
    """``q - left <= kv <= q + right`` as an interval; None is open."""
    q = Linear.of(Index("q"))
    low = None if left is None else q - left
    return Interval(low, None if right is None else q + (right + 1))


def rising_interval(keys: KeySet | None) -> Interval | None:
    """The one interval that ``keys`` is, if its bounds rise with q and depend on nothing else.

    Such a bound can be inverted, so that it tells tiles of queries from keys too.
    """
    if keys is None or len(keys) != 1 or keys[0].guards:
        return None
    bounds = [bound for bound in (keys[0].low, keys[0].high) if bound is not None]
    return keys[0] if all(_is_invertible(b, POSITION_LIMIT + 1) for b in bounds) else None


def rising_union(keys: KeySet | None, most: int) -> tuple[Interval, ...] | None:
    """The intervals that ``keys`` is the union of, if each is a ``rising_interval``.

    None also where they are more than ``most``.
    """
    if keys is None or len(keys) > most:
        return None
    found = [rising_interval((interval,)) for interval in keys]
    return None if None in found else tuple(x for x in found if x is not None)


@dataclass(frozen=True)
class RowInterval:
    """One interval of keys for each batch entry and position, whatever its bounds are made of.

    Attributes:
      program: the mask.
      interval: of values of the program that depend on neither ``kv`` nor ``h``.
    """

    program: Program
    interval: Interval

    def at(self, arrays: Sequence[jax.Array], b: jax.Array, q: jax.Array):
        """``(low, high, seen)`` at a position, int32, None for open, and whether guards hold.

        Args:
          arrays: those that the mask closes over.
          b, q: int32 scalars.
        """
        interval = self.interval
        wanted = sorted(_values_of(interval))
        zero = jnp.zeros((), jnp.int32)
        values = self.program.evaluate(wanted, arrays, (b, zero, q, zero))
        known = dict(zip(wanted, values, strict=True))
        numbers = {i: x.astype(jnp.int32) for i, x in known.items()}

        def of(bound: Linear):
            return jnp.asarray(
                evaluate(bound, {"b": b, "q": q}, numbers, jnp.minimum, jnp.maximum), jnp.int32
            )

        seen = jnp.ones((), bool)
        for guard in _ordered(interval.guards):
            held = of(guard.value) >= 0 if isinstance(guard.value, Linear) else known[guard.value]
            seen = seen & (held == guard.holds)
        low, high = (None if x is None else of(x) for x in (interval.low, interval.high))
        return low, high, seen


def row_interval(program: Program, keys: KeySet | None) -> RowInterval | None:
    """The one interval that ``keys`` of a mask is, if its bounds are the same for all heads."""
    if keys is None or len(keys) != 1:
        return None
    (interval,) = keys
    of_head = {program.arguments[1]}
    for step in program.steps:
        if of_head & set(step.inputs):
            of_head |= set(step.outputs)
    indices = {atom.name for atom in _atoms_of(interval) if isinstance(atom, Index)}
    if of_head & _values_of(interval) or indices - {"b", "q"}:
        return None
    return RowInterval(program, interval)


def _atoms_of(value: Interval | Linear | Atom) -> set[Atom]:
    match value:
        case Interval():
            guards = [g.value for g in value.guards if isinstance(g.value, Linear)]
            inner = [x for x in (value.low, value.high, *guards) if x is not None]
        case Linear():
            inner = [atom for atom, _ in value.terms]
        case Quotient():
            inner = [value.dividend]
        case Extreme():
            inner = list(value.operands)
        case _:
            return {value}
    return set().union(*map(_atoms_of, inner))


def _values_of(interval: Interval) -> set[int]:
    """The values of the program that an interval is made of."""
    opaque = {atom.value for atom in _atoms_of(interval) if isinstance(atom, Opaque)}
    return opaque | {g.value for g in interval.guards if isinstance(g.value, int)}


def _is_invertible(value: Linear, reach: int) -> bool:
    """Whether the least q with ``value >= target`` can be computed for targets up to ``reach``."""
    if not value.terms:
        return True
    if len(value.terms) > 1:
        return False
    ((atom, coefficient),) = value.terms
    if coefficient <= 0:
        return False
    reach = (reach + abs(value.constant)) // coefficient + 1
    match atom:
        case Index():
            return atom.name == "q"
        case Quotient():
            reach *= atom.divisor
            return reach < 2**31 - 2 * POSITION_LIMIT and _is_invertible(atom.dividend, reach)
        case Extreme():
            return all(_is_invertible(x, reach) for x in atom.operands)
    return False
