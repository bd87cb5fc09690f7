"""What callers give as what it stands for, or a ValueError that names the argument."""

import operator
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def whole(name: str, value: Any, smallest: int) -> int:
    """An integer of at least ``smallest``, known while tracing; numpy's are integers too."""
    try:
        number = smallest - 1 if isinstance(value, bool) else operator.index(value)
    except (TypeError, jax.errors.InconclusiveDimensionOperation):
        number = smallest - 1
    if number < smallest:
        raise ValueError(f"{name} must be an integer of at least {smallest}; got {value!r}")
    return number


def extent(name: str, value: Any, smallest: int) -> int:
    """``whole``, or a length that ``jax.export`` leaves open."""
    if jax.export.is_symbolic_dim(value):
        return cast(int, value)  # counts as one for shapes
    return whole(name, value, smallest)


def flag(name: str, value: Any) -> bool:
    """A boolean, known while tracing."""
    if isinstance(value, Tracer) or np.ndim(value) != 0 or value not in (False, True):
        raise ValueError(f"{name} must be True or False, known while tracing; got {value!r}")
    return bool(value)


def numbers(name: str, value: Any) -> jax.Array:
    """An array of numbers, traced or not."""
    try:
        if value is not None:
            return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be an array of numbers; got {value!r}") from error
    raise ValueError(f"{name} must be an array of numbers; got None")
