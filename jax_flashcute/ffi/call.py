"""Calls the kernels from traced programs.

A call is a primitive of its own, so that its kernel is compiled when a program is lowered for
CUDA and not when it is traced.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_flashcute import plan
from jax_flashcute.ffi import store
from jax_flashcute.ffi.runtime import CALL_TARGET, register_call_target
from jax_flashcute.kernels.registry import OPTIONAL_OPERANDS
from jax_flashcute.spec import AttentionSpec, Operands, Residuals

EXPORT_CHECKS = (jax.export.DisabledSafetyCheck.custom_call(CALL_TARGET),)
"""For ``jax.export.export(..., disabled_checks=EXPORT_CHECKS)``: the call target is stable."""


def forward(spec: AttentionSpec, operands: Operands) -> Residuals:
    """The forward kernel; lowers for CUDA only."""
    leaves, tree = jax.tree.flatten(operands)
    out, lse = _forward_p.bind(*leaves, spec=spec, tree=tree)
    return Residuals(out=out, lse=lse)


def _forward_abstract(*avals, spec: AttentionSpec, tree):
    operands = jax.tree.unflatten(tree, avals)
    query, value = operands.query, operands.value
    B, T, N, _ = query.shape
    out = query.update(shape=(B, T, N, value.shape[3]), weak_type=False)
    return [out, query.update(shape=(B, T, N), dtype=jnp.dtype(jnp.float32), weak_type=False)]


def _forward_lowering(ctx: mlir.LoweringRuleContext, *args, spec: AttentionSpec, tree):
    operands: Operands = jax.tree.unflatten(tree, ctx.avals_in)
    kernel = store.get(plan.make_plan(spec, operands))
    register_call_target()

    def call(*leaves):
        given: Operands = jax.tree.unflatten(tree, leaves)
        optional = [getattr(given, name) for name in OPTIONAL_OPERANDS]
        counter = jax.ShapeDtypeStruct((1,), jnp.int32)
        out, lse, _ = jax.ffi.ffi_call(
            CALL_TARGET, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ctx.avals_out] + [counter]
        )(
            given.query,
            given.key,
            given.value,
            *(x for x in optional if x is not None),
            module=kernel.object,
            key=kernel.digest,
        )
        return out, lse

    return mlir.lower_fun(call, multiple_results=True)(ctx, *args)


def _refuse(ctx, *_, **__):
    platforms = ", ".join(ctx.module_context.platforms)
    raise NotImplementedError(
        f'implementation="cute" runs on CUDA only; this program is being lowered for {platforms}'
    )


_forward_p = Primitive("flash_attention_forward")
_forward_p.multiple_results = True
_forward_p.def_abstract_eval(_forward_abstract)
_forward_p.def_impl(jax.jit(_forward_p.bind, static_argnames=("spec", "tree")))
mlir.register_lowering(_forward_p, _forward_lowering, platform="cuda")
mlir.register_lowering(_forward_p, _refuse)
