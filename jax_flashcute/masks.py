"""Masks and scores as plain JAX functions of positions: tracing, evaluation, built-in masks.

A mask is ``mask_mod(b, h, q_idx, kv_idx) -> bool`` and a score is ``score_mod(score, b, h, q_idx,
kv_idx) -> score``, of scalars.  Each is traced once per call; the arrays it closes over, traced or
not, become operands, and what is left is identified by its text.

``causal``, ``sliding_window`` and the others are such functions, ready made, that compose with
``&``, ``|`` and ``~``.
"""

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.typing import ArrayLike

from jax_flashcute import analysis
from jax_flashcute.given import numbers, whole


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
        """
        needed = self._needed()

        def of_scalars(arrays, arguments):
            (result,) = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, arrays))(*arguments)
            return result

        return on_block(of_scalars, arrays, arguments, [v in needed for v in self.jaxpr.invars])

    def reads(self, argument: int) -> bool:
        """Whether the function depends on this one of its arguments."""
        return self.jaxpr.invars[argument] in self._needed()

    def _needed(self) -> set[Var]:
        """Variables that an equation or the result reads."""
        read = [v for equation in self.jaxpr.eqns for v in equation.invars]
        return {v for v in (*read, *self.jaxpr.outvars) if isinstance(v, Var)}


def on_block(
    of_scalars: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    arguments: Sequence[jax.Array],
    reads: Sequence[bool],
) -> jax.Array:
    """A function of arrays and scalars, ``of_scalars(arrays, arguments)``, on a block.

    Args:
      of_scalars: the function.
      arrays: (1|B, ...) each; the function takes them without the batch.
      arguments: as for ``TracedFunction``.
      reads: which of the arguments have an effect.

    Returns:
      As for ``TracedFunction``, followed by the dimensions of the function's result.
    """
    varies = [
        [is_read and not _is_one(length) for length in x.shape]
        for is_read, x in zip(reads, arguments, strict=True)
    ]
    squeezed = [
        x[tuple(slice(None) if varying else 0 for varying in axes)]
        if is_read
        else jnp.zeros((), x.dtype)
        for is_read, x, axes in zip(reads, arguments, varies, strict=True)
    ]
    batched = [not _is_one(array.shape[0]) for array in arrays]
    arrays = [a if per_batch else a[0] for a, per_batch in zip(arrays, batched, strict=True)]
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


def trace_over(
    function: Callable[[Sequence[jax.Array], Sequence[jax.Array]], jax.Array],
    closed_over: Sequence[jax.ShapeDtypeStruct],
    arguments: Sequence[jax.ShapeDtypeStruct],
) -> TracedFunction:
    """``function(closed_over, arguments)`` as a mask or a score that closes over those arrays.

    Of shapes alone; the arrays that the result is called with have a batch dimension besides.
    """
    closed = jax.make_jaxpr(function)(list(closed_over), list(arguments))
    variables, count = closed.jaxpr.invars, len(closed_over)
    jaxpr = closed.jaxpr.replace(constvars=variables[:count], invars=variables[count:])
    # In some releases of JAX, variables are constants only where values are attached to them.
    return _identified("function", ClosedJaxpr(jaxpr, list(closed_over)).jaxpr)


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
    _check_takes(name, function, len(arguments))
    # Inside a shard_map that checks what varies, values that are closed over need its mesh.
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    no_mesh = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
    with no_mesh if explicit else contextlib.nullcontext():
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
    return _identified(name, closed.jaxpr), tuple(arrays)


def _check_takes(name: str, function: Callable[..., Any], count: int) -> None:
    try:
        # Of the function itself: one that it wraps may take others.
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        # Some that are compiled do not tell; the call will.
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        expected = "(score, b, h, q_idx, kv_idx)" if count == 5 else "(b, h, q_idx, kv_idx)"
        raise ValueError(f"{name} must take {expected}; got one of {signature}") from error


def _identified(name: str, jaxpr: Jaxpr) -> TracedFunction:
    jaxpr = _without_casts(jaxpr)
    # Values that stay inside nested programs are not printed with them.
    text = "\n".join([str(jaxpr), *_nested_constants(name, jaxpr)])
    return TracedFunction(text, jaxpr)


def _without_casts(jaxpr: Jaxpr) -> Jaxpr:
    """``jaxpr`` without the casts that say over which mesh axes a value varies.

    They are there inside a ``shard_map`` that checks it; a device's part of a call has no mesh.
    On an explicit mesh, the equations forget it as well; nested programs whose types are bound to
    it, as those of arrays that are closed over, are refused.
    """
    renamed: dict[Var, Any] = {}
    # Inside a shard_map, all axes that it maps over are manual.
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types

    def nested(jaxpr: Jaxpr) -> Jaxpr:
        if explicit and _is_on_a_mesh(jaxpr):
            raise NotImplementedError(
                "on an explicit mesh, a mask or a score cannot call jitted functions of arrays "
                "that it closes over: call flash_attention inside a jax.shard_map"
            )
        return _without_casts(jaxpr)

    def of_parameter(parameter):
        match parameter:
            case ClosedJaxpr():
                return ClosedJaxpr(nested(parameter.jaxpr), parameter.consts)
            case Jaxpr():
                return nested(parameter)
            case Mesh() if explicit:
                return Mesh(np.empty((), object), ())
            case tuple() | list() if not hasattr(parameter, "_fields"):
                return type(parameter)(of_parameter(p) for p in parameter)
            case _:
                return parameter

    def current(v):
        return renamed.get(v, v) if isinstance(v, Var) else v

    equations = []
    for equation in jaxpr.eqns:
        inputs = [current(v) for v in equation.invars]
        if equation.primitive.name in ("pvary", "pcast"):
            renamed.update(zip(equation.outvars, inputs, strict=True))
            continue
        parameters = {name: of_parameter(p) for name, p in equation.params.items()}
        equation = equation.replace(invars=inputs, params=parameters)
        equations.append(equation.replace(ctx=_no_mesh()) if explicit else equation)
    if not (renamed or explicit) and all(
        new.params == old.params for new, old in zip(equations, jaxpr.eqns, strict=True)
    ):
        return jaxpr
    return jaxpr.replace(eqns=equations, outvars=[current(v) for v in jaxpr.outvars])


def _is_on_a_mesh(jaxpr: Jaxpr) -> bool:
    """Whether a value has the type of a mesh."""
    variables = [*jaxpr.constvars, *jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)]
    shardings = (getattr(v.aval, "sharding", None) for v in variables)
    return any(s.mesh.axis_names for s in shardings if s is not None)


@functools.cache
def _no_mesh():
    """The context of an equation that is traced without a mesh.

    Evaluated in that of an explicit mesh, its results would have the types of that mesh.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        (equation,) = jax.make_jaxpr(jnp.negative)(1.0).jaxpr.eqns
    return equation.ctx


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


# ---- built-in masks ------------------------------------------------------------------------------


class Mask:
    """A ``mask_mod`` that composes: ``&``, ``|`` and ``~`` with masks and with plain functions.

    ``Mask(function)`` makes one of any function ``(b, h, q_idx, kv_idx) -> bool``; ``words``, of
    ``from_bits``, are the same in bits.
    """

    def __init__(self, function: Callable[..., Any], words: jax.Array | None = None):
        if not callable(function):
            raise ValueError(f"a mask must be a function (b, h, q_idx, kv_idx); got {function!r}")
        self._function = function
        self.words = words

    def __call__(self, b, h, q_idx, kv_idx):
        return self._function(b, h, q_idx, kv_idx)

    def __and__(self, other: Callable[..., Any]) -> "Mask":
        return _combined(jnp.logical_and, self, other)

    def __or__(self, other: Callable[..., Any]) -> "Mask":
        return _combined(jnp.logical_or, self, other)

    def __invert__(self) -> "Mask":
        return Mask(lambda *indices: jnp.logical_not(self(*indices)))

    # Both operations commute, so a plain function may stand on the left.
    __rand__ = __and__
    __ror__ = __or__


def _combined(operation, a: Callable[..., Any], b: Callable[..., Any]) -> Mask:
    a, b = (x if isinstance(x, Mask) else Mask(x) for x in (a, b))
    return Mask(lambda *indices: operation(a(*indices), b(*indices)))


def _array(name: str, array, ranks: tuple[int, ...], kind, kind_name: str) -> jax.Array:
    array = numbers(name, array)
    if array.ndim not in ranks or not jnp.issubdtype(array.dtype, kind):
        shapes = " or ".join(str(rank) for rank in ranks)
        raise ValueError(
            f"{name} must be {kind_name} with {shapes} dimensions; "
            f"got {array.dtype.name} of shape {array.shape}"
        )
    return array


def _of_entries(name: str, lengths: ArrayLike) -> Callable[[Any], jax.Array]:
    """A function of a batch entry, of (B,) integers or of one for all."""
    array = _array(name, lengths, (0, 1), jnp.integer, "integers")
    return lambda b: array[b] if array.ndim else array


causal = Mask(lambda b, h, q, kv: kv <= q)
"""Position q sees keys ``kv <= q``."""


def sliding_window(left: int, right: int = 0) -> Mask:
    """Position q sees ``q - left <= kv <= q + right``: ``left + 1 + right`` keys."""
    left, right = whole("left", left, 0), whole("right", right, 0)
    return Mask(lambda b, h, q, kv: (kv >= q - left) & (kv <= q + right))


def chunked(size: int) -> Mask:
    """Query and key are in the same chunk of ``size`` positions."""
    return block_diagonal(size, size)


def block_diagonal(q_block: int, kv_block: int) -> Mask:
    """Block i of ``q_block`` positions sees block i of ``kv_block`` keys."""
    q_block, kv_block = whole("q_block", q_block, 1), whole("kv_block", kv_block, 1)
    return Mask(lambda b, h, q, kv: q // q_block == kv // kv_block)


def prefix_lm(length: ArrayLike) -> Mask:
    """The first ``length`` keys, and those at or before the position.

    Args:
      length: an integer, traced or not, or (B,) integers: one for each batch entry.
    """
    if isinstance(length, (int, np.integer)):
        length = whole("length", length, 0)
        return Mask(lambda b, h, q, kv: (kv < length) | (kv <= q))
    of_entry = _of_entries("length", length)
    return Mask(lambda b, h, q, kv: (kv < of_entry(b)) | (kv <= q))


def dilated(window: int, dilation: int) -> Mask:
    """Every ``dilation``-th of the ``window`` positions that end at the query's own."""
    window, dilation = whole("window", window, 1), whole("dilation", dilation, 1)

    def mask(b, h, q, kv):
        distance = q - kv
        return (distance >= 0) & (distance < window) & (distance % dilation == 0)

    return Mask(mask)


def documents(ids: ArrayLike, kv_ids: ArrayLike | None = None) -> Mask:
    """Query and key belong to the same document.

    Args:
      ids: (L,) or (B, L) integers: the document of each position, in any order.
      kv_ids: the documents of the keys, if they are others.
    """
    ids = _array("ids", ids, (1, 2), jnp.integer, "integers")
    kv_ids = ids if kv_ids is None else _array("kv_ids", kv_ids, (1, 2), jnp.integer, "integers")

    def at(array, b, position):
        return array[position] if array.ndim == 1 else array[b, position]

    return Mask(lambda b, h, q, kv: at(ids, b, q) == at(kv_ids, b, kv))


def documents_by_offsets(offsets: ArrayLike, length: int) -> Mask:
    """Query and key belong to the same of documents that lie one after the other.

    The mask is an interval of keys for each position, which ``documents`` is not known to be.

    Args:
      offsets: (D + 1,) integers that ascend: document d is ``offsets[d] <= position <
        offsets[d + 1]``.  What is before the first or from the last on sees nothing.
      length: of the sequence.
    """
    offsets = _array("offsets", offsets, (1,), jnp.integer, "integers").astype(jnp.int32)
    length = whole("length", length, 1)
    following = jnp.searchsorted(offsets, jnp.arange(length, dtype=jnp.int32), side="right")
    inside = (following > 0) & (following < offsets.shape[0])
    starts = offsets[jnp.maximum(following - 1, 0)]
    ends = jnp.where(inside, offsets[jnp.minimum(following, offsets.shape[0] - 1)], starts)
    return Mask(lambda b, h, q, kv: (kv >= starts[q]) & (kv < ends[q]))


def padding(lengths: ArrayLike) -> Mask:
    """Keys below ``lengths``, (B,) or one for all.

    As ``key_value_seq_lengths``, but padding may not be NaN.
    """
    of_entry = _of_entries("lengths", lengths)
    return Mask(lambda b, h, q, kv: kv < of_entry(b))


def compressed_causal(compress_factor: int, *, complete_only: bool = False) -> Mask:
    """Keys that stand for blocks of ``compress_factor`` positions, up to the query's own block.

    Args:
      compress_factor: positions that a key stands for: position q sees ``kv <= q //
        compress_factor``.
      complete_only: only blocks that end at or before the position: ``kv < (q + 1) //
        compress_factor``.  Without it a position sees its own block, in which what comes after it
        may have been mixed.  The first ``compress_factor - 1`` positions see nothing then.
    """
    factor = whole("compress_factor", compress_factor, 1)
    if complete_only:
        return Mask(lambda b, h, q, kv: kv < (q + 1) // factor)
    return Mask(lambda b, h, q, kv: kv <= q // factor)


def from_bits(words: ArrayLike) -> Mask:
    """A mask as bits: bit i, from the lowest, of word w is key ``32 w + i``.

    Alone, and where positions are those of rows, it is the argument ``packed_mask``.

    Args:
      words: (1|B, 1|N, T, ceil(S / 32)) uint32.
    """
    words = _array("words", words, (4,), jnp.uint32, "uint32")

    def mask(b, h, q, kv):
        b, h = (x if n > 1 else 0 for x, n in zip((b, h), words.shape[:2], strict=True))
        word = words[b, h, q, kv // 32]
        return (word >> (kv % 32).astype(jnp.uint32)) & 1 == 1

    return Mask(mask, words)
