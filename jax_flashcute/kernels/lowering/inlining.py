"""From a jaxpr to a flat list of equations.

Calls are inlined, and of a ``cond`` all branches, among whose results it chooses.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from jax_flashcute.kernels.lowering.equations import Equation, FlatProgram

PLAIN_CALLS = ("jit", "closed_call", "core_call", "checkpoint", "remat2")
"""Primitives whose derivative is that of the program they call."""

CALLS = (*PLAIN_CALLS, "custom_jvp_call", "custom_vjp_call")
"""Primitives that are replaced by the program they call."""


def flat_program(jaxpr: Jaxpr, arguments: Sequence[str]) -> FlatProgram:
    """``jaxpr``: its last inputs are the arguments; constants and inputs before are arrays."""
    variables = [*jaxpr.constvars, *jaxpr.invars]
    arrays = variables[: len(variables) - len(arguments)]
    inlining = _Inlining()
    numbers = [inlining.new_value() for _ in variables]
    constants = numbers[: len(jaxpr.constvars)]
    results = inlining.inline(jaxpr, constants, numbers[len(constants) :])
    return FlatProgram(
        array_types=tuple((str(v.aval.dtype), v.aval.shape) for v in arrays),
        arrays=tuple(numbers[: len(arrays)]),
        inputs=dict(zip(arguments, numbers[len(arrays) :], strict=True)),
        equations=tuple(inlining.equations),
        results=tuple(results),
        result_dtypes=tuple(str(v.aval.dtype) for v in jaxpr.outvars),
        effects=tuple(inlining.effects),
    )


class _Inlining:
    """Equations and side effects found so far."""

    def __init__(self):
        self.equations: list[Equation] = []
        self.effects: list[str] = []
        self._count = 0

    def new_value(self) -> int:
        self._count += 1
        return self._count - 1

    def inline(
        self, jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any], caller: str = ""
    ) -> list[Any]:
        """Appends the equations of ``jaxpr`` and of all that it calls; returns its results.

        ``caller``: the user's line, where the equations are JAX's own.
        """
        values: dict[Var, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            return np.asarray(atom.val) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            given = [read(atom) for atom in equation.invars]
            source = source_of(equation) or caller
            inner = inner_program(equation)
            if inner is not None:
                results = self._inline_closed(inner, given, source)
            elif equation.primitive.name == "cond":
                results = self._inline_branches(equation, given, source)
            else:
                results = self._append(equation, given, source)
                if equation.effects:
                    self.effects.append(f"{equation.primitive.name} has side effects, at {source}")
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _inline_closed(self, program: ClosedJaxpr, inputs: Sequence[Any], source: str) -> list[Any]:
        constants = [np.asarray(c) for c in program.consts]
        return self.inline(program.jaxpr, constants, inputs, source)

    def _inline_branches(self, equation, inputs: Sequence[Any], source: str) -> list[Any]:
        """The results of a ``cond``; what has side effects is refused in any branch."""
        index, *operands = inputs
        dtype = str(equation.invars[0].aval.dtype)
        found = [self._inline_closed(b, operands, source) for b in equation.params["branches"]]
        for made in self.equations if len(found) == 2 and isinstance(index, int) else ():
            if made.output == index and made.primitive == "convert_element_type":
                if made.dtypes[0] == "bool":
                    (index,), dtype = made.inputs, "bool"
        results = []
        for result, *cases in zip(equation.outvars, *found, strict=True):
            dtypes = (dtype, *[str(result.aval.dtype)] * (len(cases) + 1))
            shapes = ((), *[result.aval.shape] * (len(cases) + 1))
            chosen = (index, *cases), self.new_value(), dtypes, shapes, source
            self.equations.append(Equation("select_n", {}, *chosen))
            results.append(self.equations[-1].output)
        return results

    def _append(self, equation, inputs: Sequence[Any], source: str) -> list[int]:
        """An equation for each result, of which ``params["result"]`` is the place."""
        for place, result in enumerate(equation.outvars):
            atoms = [*equation.invars, result]
            self.equations.append(
                Equation(
                    equation.primitive.name,
                    {**equation.params, "result": place},
                    tuple(inputs),
                    self.new_value(),
                    tuple(str(a.aval.dtype) for a in atoms),
                    tuple(a.aval.shape for a in atoms),
                    source,
                )
            )
        return [e.output for e in self.equations[len(self.equations) - len(equation.outvars) :]]


def inner_program(equation) -> ClosedJaxpr | None:
    """The program that an equation calls, to be inlined."""
    if equation.primitive.name in CALLS:
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            inner = equation.params.get(name)
            if isinstance(inner, ClosedJaxpr):
                return inner
            if isinstance(inner, Jaxpr):
                return ClosedJaxpr(inner, ())
    return None


def source_of(equation) -> str:
    """File, line and function where the user wrote an equation of a jaxpr."""
    return source_info_util.summarize(equation.source_info).strip()
