"""Reverse-mode derivatives: one spec for both directions, residuals with names.

``jax.checkpoint`` policies can keep ``flash_attention_out`` and ``flash_attention_lse``
(``jax.checkpoint_policies.save_only_these_names``), and the forward pass is then not run again.
Forward mode and second derivatives are refused, in words; ``implementation="reference"`` has both.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_flashcute import dispatch, sharding
from jax_flashcute.batching import fold_backward, fold_forward
from jax_flashcute.dispatch import Implementation
from jax_flashcute.spec import AttentionSpec, Operands, Residuals

_USE_REFERENCE = (
    'use implementation="reference", which plain autodiff differentiates any number of times in '
    "either mode (its memory is quadratic in the sequence length)"
)
_NO_FORWARD_MODE = (
    "flash_attention has no forward-mode derivative (jax.jvp, jax.jacfwd, jax.linearize): "
    f"{_USE_REFERENCE}, or reverse mode (jax.grad, jax.vjp, jax.jacrev)"
)
_NO_SECOND_ORDER = f"flash_attention has no second derivatives: {_USE_REFERENCE}"


def attention(spec: AttentionSpec, operands: Operands, implementation: Implementation) -> Residuals:
    """Attention that reverse mode can differentiate.

    Args:
      spec: the static part of the call.
      operands: its arrays.
      implementation: ``"cute"``, ``"xla"``, ``"reference"`` or None; see ``dispatch``.

    Returns:
      ``Residuals``: out and lse, both differentiable.

    Raises:
      NotImplementedError: ``"cute"`` cannot serve the call; or a forward-mode or second
        derivative was asked of anything but ``"reference"``.
    """
    if implementation == "reference":
        return named(dispatch.dense(spec, operands))
    operands = jax.tree.map(reverse_mode_only, equally_varying(operands))
    return _attention(spec, implementation, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    spec: AttentionSpec, implementation: Implementation, operands: Operands
) -> Residuals:
    return forward_pass(spec, implementation)(operands)


def _attention_fwd(spec: AttentionSpec, implementation: Implementation, primals: Operands):
    """``primals``: an array and whether anyone differentiates by it, for each operand."""
    operands = jax.tree.map(lambda x: x.value, primals, is_leaf=_is_primal)
    spec = dataclasses.replace(spec, constants=_constants(primals))
    if implementation == "cute":
        dispatch.refuse_unless_served(spec, operands, "bwd")
    residuals = named(forward_pass(spec, implementation)(operands))
    return residuals, (operands, residuals, _Static(spec))


def _attention_bwd(spec: AttentionSpec, implementation: Implementation, saved, cotangents):
    operands, residuals, static = saved
    d_out, d_lse = (
        jnp.zeros_like(primal) if isinstance(x, SymbolicZero) else x
        for x, primal in ((cotangents.out, residuals.out), (cotangents.lse, residuals.lse))
    )
    gradients = backward_pass(static.spec, implementation)(operands, residuals, d_out, d_lse)
    return (gradients,)


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """The static part of a call among the residuals: it says whose gradients are asked for."""

    spec: AttentionSpec


def _constants(primals: Operands) -> tuple[str, ...]:
    """Of the operands whose gradients are sums over scores those that have none, by name."""
    names = ("bias", "score_mod_arrays")
    leaves = {n: jax.tree.leaves(getattr(primals, n), is_leaf=_is_primal) for n in names}
    return tuple(n for n in names if leaves[n] and not any(x.perturbed for x in leaves[n]))


def _is_primal(x: object) -> bool:
    return isinstance(x, CustomVJPPrimal)


def equally_varying[Tree](operands: Tree) -> Tree:
    """Arrays that all vary over the same mesh axes, inside a ``shard_map`` that checks it.

    A gradient varies wherever any operand does, and must have its operand's type.  The cast of an
    operand that is replicated over some axis is, in reverse, the sum of its gradient over it.
    """

    def varying(x: jax.Array) -> frozenset[str]:
        return frozenset(jax.typeof(x).manual_axis_type.varying)

    axes = frozenset[str]().union(*(varying(x) for x in jax.tree.leaves(operands)))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, operands) if axes else operands


def named(residuals: Residuals) -> Residuals:
    return Residuals(
        out=checkpoint_name(residuals.out, "flash_attention_out"),
        lse=checkpoint_name(residuals.lse, "flash_attention_lse"),
    )


def forward_pass(spec: AttentionSpec, implementation: Implementation):
    return _underivable(fold_forward(functools.partial(sharding.forward, spec, implementation)))


def backward_pass(spec: AttentionSpec, implementation: Implementation):
    return _underivable(fold_backward(functools.partial(sharding.backward, spec, implementation)))


def paged_attention(
    spec: AttentionSpec, operands: Operands, implementation: Implementation
) -> Residuals:
    """``attention`` over paged keys and values, for inference: it has no derivatives."""
    if implementation == "reference":
        return dispatch.dense(spec, operands)
    forward = fold_forward(functools.partial(sharding.forward, spec, implementation))
    return _underivable(forward, "paged_attention has no derivatives")(operands)


def _underivable(function, reason: str = _NO_SECOND_ORDER):
    """``function``, which refuses to be differentiated for the reason given."""
    guarded = jax.custom_jvp(function)

    @guarded.defjvp
    def refuse(primals, tangents):  # pyright: ignore[reportUnusedFunction]
        raise NotImplementedError(reason)

    return guarded


# JAX refuses forward mode over a custom_vjp on its own, but cannot say what to do instead.  The
# tangent of this identity is a primitive that can be transposed and cannot be evaluated.


@jax.custom_jvp
def reverse_mode_only(x: jax.Array) -> jax.Array:
    return x


@reverse_mode_only.defjvp
def _(primals, tangents):
    (x,), (tangent,) = primals, tangents
    if tangent.dtype == jax.dtypes.float0:
        return x, tangent
    return x, _reverse_mode_tangent_p.bind(tangent)


def _refuse_forward_mode(*_, **__):
    raise NotImplementedError(_NO_FORWARD_MODE)


_reverse_mode_tangent_p = Primitive("flash_attention_reverse_mode_only")
_reverse_mode_tangent_p.def_impl(_refuse_forward_mode)
_reverse_mode_tangent_p.def_abstract_eval(lambda aval: aval)
ad.deflinear2(_reverse_mode_tangent_p, lambda cotangent, _: [cotangent])
batching.defvectorized(_reverse_mode_tangent_p)
mlir.register_lowering(_reverse_mode_tangent_p, _refuse_forward_mode)
