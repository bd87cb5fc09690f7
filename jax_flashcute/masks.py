"""Masks and scores as plain JAX functions of positions: tracing and evaluation.

A mask is ``mask_mod(b, h, q_idx, kv_idx) -> bool`` and a score is ``score_mod(score, b, h, q_idx,
kv_idx) -> score``, of scalars.  Each is traced once per call; the arrays it closes over, traced or
not, become operands, and what is left is identified by its text.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun

from jax_flashcute import analysis


@dataclass(frozen=True)
class TracedFunction:
    """A traced mask or score: a static value that knows the program, not the arrays.

    Functions with the same text are equal, so a lambda that is made anew compiles nothing anew.

    Attributes:
      text: the program, as printed; its identity.
      jaxpr: the program; its constants are the arrays that the function closes over.
    """

    text: str
    jaxpr: Jaxpr = field(compare=False, repr=False)

    def __call__(self, arrays: Sequence[jax.Array], *arguments: jax.Array) -> jax.Array:
        """The function on a block.

        Args:
          arrays: those that the function closes over, (1|B, ...) each.
          arguments: ``(b, h, q_idx, kv_idx)``, preceded by the scores if it is a score: arrays of
            one rank that broadcast to each other and have the batch, 1|B, in front.

        Returns:
          An array of their rank; of length 1 in every dimension in which nothing that the
          function reads varies.

        Raises:
          NotImplementedError: inside a ``shard_map`` with ``check_vma``, whose types a program
            traced on scalars lacks.
        """
        if any(jax.typeof(x).manual_axis_type.varying for x in (*arrays, *arguments)):
            raise NotImplementedError(
                "mask_mod and score_mod inside a shard_map that checks varying axes: pass "
                "check_vma=False to jax.shard_map"
            )
        needed = {v for equation in self.jaxpr.eqns for v in equation.invars if isinstance(v, Var)}
        needed |= {v for v in self.jaxpr.outvars if isinstance(v, Var)}
        varies = [
            [v in needed and not _is_one(length) for length in x.shape]
            for v, x in zip(self.jaxpr.invars, arguments, strict=True)
        ]
        squeezed = [
            x[tuple(slice(None) if varying else 0 for varying in axes)]
            if v in needed
            else jnp.zeros((), x.dtype)
            for v, x, axes in zip(self.jaxpr.invars, arguments, varies, strict=True)
        ]
        batched = [not _is_one(array.shape[0]) for array in arrays]
        arrays = [a if per_batch else a[0] for a, per_batch in zip(arrays, batched, strict=True)]

        def of_scalars(arrays, arguments):
            (result,) = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, arrays))(*arguments)
            return result

        function, expanded = of_scalars, []
        for axis in reversed(range(arguments[0].ndim)):
            in_arrays = [0 if axis == 0 and per_batch else None for per_batch in batched]
            in_arguments = [0 if axes[axis] else None for axes in varies]
            if any(a == 0 for a in (*in_arrays, *in_arguments)):
                function = jax.vmap(function, in_axes=(in_arrays, in_arguments))
            else:
                expanded.append(axis)
        return jnp.expand_dims(function(arrays, squeezed), expanded)


def trace_mask(function: Callable[..., Any]) -> tuple[TracedFunction, tuple[jax.Array, ...]]:
    """``mask_mod`` as a program, and the arrays it closes over, (1, ...) each.

    Raises:
      ValueError: it does not return one boolean.
      NotImplementedError: it closes over something that cannot be an operand.
    """
    return _trace("mask_mod", function, [_INDEX] * 4, jnp.bool_, "boolean")


def trace_score(
    function: Callable[..., Any], dtype: jax.typing.DTypeLike
) -> tuple[TracedFunction, tuple[jax.Array, ...]]:
    """``score_mod`` as a program on scores of ``dtype``; likewise."""
    score = jax.ShapeDtypeStruct((), dtype)
    arguments = [score, *[_INDEX] * 4]
    return _trace("score_mod", function, arguments, jnp.floating, "floating-point number")


def split_window(
    mask: TracedFunction, arrays: tuple[jax.Array, ...]
) -> tuple[tuple[int | None, int | None], TracedFunction | None, tuple[jax.Array, ...]]:
    """The window that a mask is, or that it is part of, and what is left of it.

    Args:
      mask: from ``trace_mask``.
      arrays: those that it closes over.

    Returns:
      ``(window, rest, arrays)``: the mask shows what both show of which ``window``, ``(left,
      right)``, is ``q - left <= kv <= q + right`` with None for an open side (and may be negative),
      and ``rest`` is a mask that closes over ``arrays``; None where the window is all.
    """
    program = analysis.analyse(mask.jaxpr)
    whole = analysis.window(program.intervals())
    if whole is not None:
        return whole, None, ()
    windows, rest = [], []
    for conjunct in program.conjuncts():
        found = analysis.window(analysis.key_set(program, conjunct))
        if found is None:
            rest.append(conjunct)
        else:
            windows.append(found)
    if not windows:
        return (None, None), mask, arrays

    left, right = (smallest(sides) for sides in zip(*windows, strict=True))
    if not rest:
        return (left, right), None, ()
    closed_over = [array[0] for array in arrays]

    def remaining(*arguments):
        return functools.reduce(jnp.logical_and, program.evaluate(rest, closed_over, arguments))

    return (left, right), *trace_mask(remaining)


def smallest(sides: Sequence[int | None]) -> int | None:
    """The nearest of some sides of windows, None being open."""
    return min((s for s in sides if s is not None), default=None)


_INDEX = jax.ShapeDtypeStruct((), jnp.int32)


def _trace(name: str, function, arguments, kind, kind_name: str):
    if not callable(function):
        raise ValueError(f"{name} must be a function; got {function!r}")
    closed, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} must return one {kind_name}; got {jax.tree.structure(result)}")
    if result.shape != () or not jnp.issubdtype(result.dtype, kind):
        raise ValueError(
            f"{name} must return one {kind_name}, a scalar; "
            f"got {result.dtype.name} of shape {result.shape}"
        )
    arrays = []
    for constant in closed.consts:
        array = jnp.asarray(constant)
        if not any(jnp.issubdtype(array.dtype, k) for k in (jnp.bool_, jnp.integer, jnp.floating)):
            raise NotImplementedError(
                f"{name} can close over boolean, integer and floating-point arrays; "
                f"got {array.dtype}"
            )
        arrays.append(array[None])
    # Values that stay inside nested programs are not printed with them.
    text = "\n".join([str(closed.jaxpr), *_nested_constants(name, closed.jaxpr)])
    return TracedFunction(text, closed.jaxpr), tuple(arrays)


def _nested_constants(name: str, jaxpr: Jaxpr) -> Iterator[str]:
    """Digests of the constants of all programs within ``jaxpr``."""
    for equation in jaxpr.eqns:
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                if isinstance(inner, ClosedJaxpr):
                    for constant in inner.consts:
                        if isinstance(constant, Tracer):
                            raise NotImplementedError(
                                f"{name} closes over a traced array within "
                                f"{equation.primitive.name}; close over it outside of that"
                            )
                        value = np.asarray(constant)
                        digest = hashlib.sha256(value.tobytes()).hexdigest()
                        yield f"{value.dtype}{value.shape} {digest}"
                    yield from _nested_constants(name, inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from _nested_constants(name, inner)


def _is_one(length) -> bool:
    return isinstance(length, int) and length == 1
