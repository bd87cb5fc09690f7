"""How each primitive is lowered, and which cannot be."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_flashcute.kernels.lowering.equations import Equation
from jax_flashcute.kernels.lowering.scalars import SCALAR_RULES, Rule
from jax_flashcute.kernels.lowering.values import SCALAR_DTYPES, View, as_number
from jax_flashcute.kernels.lowering.vectors import VECTOR_RULES, VIEWS

RULES: dict[str, Rule] = {**SCALAR_RULES, **VECTOR_RULES}
"""Of each primitive, by name."""

LARGEST_VECTOR = 16
"""Elements of a value that is no view of an array."""


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


def why_not(equation: Equation) -> str | None:
    """Why an equation cannot be lowered; None where it can."""
    name = equation.primitive
    if name not in RULES:
        return f"the primitive {name} has no rule"
    for dtype in equation.dtypes:
        if dtype not in SCALAR_DTYPES:
            return f"{name} on {dtype}"
    *inputs, result = equation.shapes
    if name == "bitcast_convert_type" and not {"float32", "int32", "uint32"}.issuperset(
        equation.dtypes
    ):
        return f"{name} of {' to '.join(equation.dtypes)}"
    if name == "gather" and equation.params["dimension_numbers"].operand_batching_dims:
        return "a gather along dimensions of a batch"
    sizes = [math.prod(shape) for shape in (() if name in VIEWS else inputs)]
    sizes += [] if name in VIEWS and name != "gather" else [math.prod(result)]
    if any(size > LARGEST_VECTOR for size in sizes):
        return f"{name} on more than {LARGEST_VECTOR} elements, {inputs} -> {result}"
    kinds = {SCALAR_DTYPES[dtype] for dtype in equation.dtypes}
    if kinds == {"bool"} and name in ("add", "sub", "mul", "div", "rem", "neg"):
        return f"{name} of booleans"
    return None
