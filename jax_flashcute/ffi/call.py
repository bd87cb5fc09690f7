"""Calls the kernels from traced programs.

A call is a primitive of its own, so that its kernel is compiled when a program is lowered for
CUDA and not when it is traced.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_flashcute import plan
from jax_flashcute.block_mask import BlockMask, packed, visits_before
from jax_flashcute.bounds import (
    key_bound_arrays,
    mask_key_bound_arrays,
    mask_query_bound_arrays,
    query_bound_arrays,
    visited_tiles,
)
from jax_flashcute.ffi import fixed_point, store
from jax_flashcute.ffi.compile import CompiledKernel
from jax_flashcute.ffi.runtime import CALL_TARGET, register_call_target
from jax_flashcute.kernels.elements import ElementFunctions, element_operands, summed_arrays
from jax_flashcute.kernels.key import OPTIONAL_OPERANDS, AnyKey, KernelKey
from jax_flashcute.kernels.launchers import has_fixed_sums
from jax_flashcute.kernels.masking import rows_of, union_of
from jax_flashcute.kernels.nsa import NSAKernelKey
from jax_flashcute.kernels.registry import list_tile, scratch_shapes
from jax_flashcute.recording import plans
from jax_flashcute.spec import AttentionSpec, Operands, Residuals
from jax_flashcute.tile_kinds import HIDDEN, Tiling, classify, coarser
from jax_flashcute.visibility import packed_words

EXPORT_CHECKS = (jax.export.DisabledSafetyCheck.custom_call(CALL_TARGET),)
"""For ``jax.export.export(..., disabled_checks=EXPORT_CHECKS)``: the call target is stable."""


def forward(spec: AttentionSpec, operands: Operands) -> Residuals:
    """The forward kernel; lowers for CUDA only."""
    leaves, tree = jax.tree.flatten(operands)
    out, lse = _forward_p.bind(*leaves, spec=spec, tree=tree)
    return Residuals(out=out, lse=lse)


def backward(
    spec: AttentionSpec,
    operands: Operands,
    residuals: Residuals,
    dout: jax.Array,
    dlse: jax.Array,
) -> Operands:
    """The backward kernel: all gradients but that of sinks; lowers for CUDA only."""
    leaves, tree = jax.tree.flatten((operands, residuals, dout, dlse))
    query, key, value, *sums = _backward_p.bind(*leaves, spec=spec, tree=tree)
    biases, arrays = summed_arrays(spec, operands)
    found = [sums.pop(0).astype(x.dtype) for x in (*biases, *arrays)]
    bias = None
    if operands.bias is not None:
        bias = found.pop(0) if biases else jnp.zeros_like(operands.bias)

    def of_array(x: jax.Array) -> jax.Array | None:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        return found.pop(0) if arrays else jnp.zeros_like(x)

    return dataclasses.replace(
        Operands(query=query, key=key, value=value, bias=bias),
        mask_mod_arrays=(None,) * len(operands.mask_mod_arrays),
        score_mod_arrays=tuple(of_array(x) for x in operands.score_mod_arrays),
    )


def nsa_kernel(
    key: NSAKernelKey, shapes: Sequence[tuple[tuple, str]], *arrays: jax.Array
) -> list[jax.Array]:
    """A kernel of native sparse attention, on arrays in its order; lowers for CUDA only.

    Args:
      key: the kernel, without an architecture.
      shapes: shape and dtype name of each result.
      arrays: its inputs.
    """
    return _nsa_p.bind(*arrays, key=key, shapes=tuple(shapes))


def _forward_abstract(*avals, spec: AttentionSpec, tree):
    operands = jax.tree.unflatten(tree, avals)
    query, value = operands.query, operands.value
    B, T, N, _ = query.shape
    out = query.update(shape=(B, T, N, value.shape[3]), weak_type=False)
    return [out, query.update(shape=(B, T, N), dtype=jnp.dtype(jnp.float32), weak_type=False)]


def _backward_abstract(*avals, spec: AttentionSpec, tree):
    operands = jax.tree.unflatten(tree, avals)[0]
    main = [x.update(weak_type=False) for x in (operands.query, operands.key, operands.value)]
    biases, arrays = summed_arrays(spec, operands)
    sums = [*biases, *arrays]
    return main + [x.update(dtype=jnp.dtype(jnp.float32), weak_type=False) for x in sums]


def _nsa_abstract(*avals, key: NSAKernelKey, shapes):
    del key
    return [
        avals[0].update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)
        for shape, dtype in shapes
    ]


def _forward_lowering(ctx: mlir.LoweringRuleContext, *args, spec: AttentionSpec, tree):
    operands: Operands = jax.tree.unflatten(tree, ctx.avals_in)
    key = plan.make_plan(spec, operands)

    def inputs(operands: Operands):
        return [operands.query, operands.key, operands.value, *other_inputs(key, spec, operands)]

    call = plans.Call(spec, operands, "fwd")
    return _kernel_lowering(ctx, args, tree, inputs, key, call)


def _backward_lowering(ctx: mlir.LoweringRuleContext, *args, spec: AttentionSpec, tree):
    operands: Operands = jax.tree.unflatten(tree, ctx.avals_in)[0]
    key = plan.make_plan(spec, operands, "bwd")

    def inputs(saved):
        operands, residuals, dout, dlse = saved
        main = [operands.query, operands.key, operands.value]
        main += [residuals.out, residuals.lse, dout, dlse]
        return [*main, *other_inputs(key, spec, operands), *sum_exponents(key, spec, *saved)]

    call = plans.Call(spec, operands, "bwd")
    sums = key.elements if has_fixed_sums(key) else None
    return _kernel_lowering(ctx, args, tree, inputs, key, call, sums)


def sum_exponents(
    key: KernelKey,
    spec: AttentionSpec,
    operands: Operands,
    residuals: Residuals,
    dout: jax.Array,
    dlse: jax.Array,
) -> list[jax.Array]:
    """What a kernel that sums gradients in fixed point takes besides, after all other arrays."""
    if key.elements is None or not has_fixed_sums(key):
        return []
    return [fixed_point.exponents(key.elements, spec, operands, residuals, dout, dlse)]


def _nsa_lowering(ctx: mlir.LoweringRuleContext, *args, key: NSAKernelKey, shapes):
    del shapes
    kernel = _kernel(plan.make_nsa_plan(key), key)
    return _call(ctx, args, kernel, lambda *arrays: arrays, [])


def other_inputs(key: KernelKey, spec: AttentionSpec, operands: Operands) -> list[jax.Array]:
    """The arrays besides those of the products, in the order in which kernels take them."""
    given = (getattr(operands, name) for name in (*OPTIONAL_OPERANDS, "page_table"))
    elements = [] if key.elements is None else element_operands(key.elements, operands)
    bounds = []
    if key.row_bounds is not None:
        forward = key.direction == "fwd"
        rows = rows_of(spec, operands)
        if rows is None:
            intervals = union_of(spec, operands) or (key.interval,)
            of_keys = partial(key_bound_arrays, intervals, operands)
            of_queries = partial(query_bound_arrays, intervals, operands)
        else:
            of_keys = partial(mask_key_bound_arrays, rows, operands)
            of_queries = partial(mask_query_bound_arrays, rows, operands)
        bounds = (of_keys if forward else of_queries)(*key.tile)
        if key.visits_both_ways:
            bounds += key.row_bounds.beside(of_keys(*key.tile[::-1]))
    given = [x for x in given if x is not None]
    visits = _visits(key, spec, operands, bounds)
    return [*given, *elements, *bounds, *visits, *_words(key, operands)]


def _words(key: KernelKey, operands: Operands) -> list[jax.Array]:
    """The mask in bits that a kernel takes: as it was given, or packed here."""
    if key.packed_mask is None:
        return []
    if operands.packed_mask is not None:
        return [operands.packed_mask]
    if operands.mask is None:
        raise ValueError("words are made of a mask; got none")
    # XLA would evaluate a mask that is a constant of the program while it compiles: for minutes.
    return [packed_words(lax.optimization_barrier(operands.mask))]


def _visits(
    key: KernelKey, spec: AttentionSpec, operands: Operands, bounds: list[jax.Array]
) -> list[jax.Array]:
    """The lists of tiles that a kernel visits, and how many blocks visit a tile before another."""
    rows, columns = key.tile
    lists, both, visited = [], [], None
    if key.has_lists:
        given, T, S = operands.block_mask, operands.query.shape[1], operands.kv_length
        if key.direction == "fwd" and given is not None:
            return given.in_tiles(rows, columns).kernel_lists()
        if given is not None and not key.has_ranks:
            if key.visits_both_ways:
                both = given.in_tiles(columns, rows).kernel_lists()
            return [*given.transposed_lists(rows, columns), *both]
        lengths = T, S
        if key.direction == "fwd":
            kinds = _mask_kinds(key, spec, operands, rows, columns)
        else:
            lengths = S, T
            if given is not None:
                kinds = given.in_tiles(columns, rows).kinds()
            else:
                kinds = _mask_kinds(key, spec, operands, columns, rows)
            if key.visits_both_ways:
                both = BlockMask.from_kinds(
                    kinds, q_length=T, kv_length=S, tile_m=columns, tile_n=rows
                ).kernel_lists()
            kinds = jnp.swapaxes(kinds, 2, 3)
        visited = kinds != HIDDEN
        sizes = dict(zip(("q_length", "kv_length"), lengths, strict=True))
        lists = BlockMask.from_kinds(kinds, **sizes, tile_m=rows, tile_n=columns).kernel_lists()
        lists = [*(lists if key.direction == "fwd" else packed(lists)), *both]
    elif bounds:
        first, end = bounds[2:4]
        visited = visited_tiles(first, end, -(-operands.query.shape[1] // columns))
    return [*lists, *([visits_before(visited)] if key.has_ranks and visited is not None else [])]


def _mask_kinds(
    key: KernelKey, spec: AttentionSpec, operands: Operands, tile_m: int, tile_n: int
) -> jax.Array:
    """The kinds of tiles of so many rows and keys, (1|B, 1|N, M, key tiles), of a call's mask."""
    mask, batch, offset = spec.mask_mod, operands.batch_index, operands.q_offset
    if mask is None or batch is None:
        raise ValueError("lists are made of a mask_mod; got none")
    T, N = operands.query.shape[1:3]
    heads = jnp.arange(N, dtype=jnp.int32) if operands.head_index is None else operands.head_index
    offset = jnp.zeros(1, jnp.int32) if offset is None else offset
    common_m, common_n = list_tile(spec, operands, key.arch)
    kinds = classify(
        mask,
        operands.mask_mod_arrays,
        (batch, heads, offset),
        Tiling(T, operands.kv_length, common_m, common_n),
        key.interval,
    )
    kinds = coarser(kinds, tile_m // common_m, tile_n // common_n)
    for lengths, tile, axis in (
        (operands.query_seq_lengths, tile_m, 2),
        (operands.key_value_seq_lengths, tile_n, 3),
    ):
        if lengths is not None:
            first = lax.broadcasted_iota(jnp.int32, (1, *kinds.shape[1:]), axis) * tile
            kinds = jnp.where(first < lengths[:, None, None, None], kinds, HIDDEN)
    return kinds


def _kernel_lowering(
    ctx,
    args,
    tree,
    inputs: Callable,
    key: KernelKey,
    call: plans.Call,
    sums: ElementFunctions | None = None,
):
    """Lowers to one call of the plan's object; ``inputs`` orders the tree as the kernel does.

    ``sums``: those of ``_call``.
    """
    scratch = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for shape, dtype in scratch_shapes(key, call.operands)
    ]
    kernel = _kernel(key, call)

    def ordered(*leaves):
        return inputs(jax.tree.unflatten(tree, leaves))

    return _call(ctx, args, kernel, ordered, scratch, sums)


def _kernel(key: AnyKey, wanted: plans.Wanted) -> CompiledKernel:
    """The kernel of a plan, noted where plans are; an empty one where they are only collected."""
    if plans.note(key, wanted):
        return CompiledKernel(b"", key.arch)
    kernel = store.get(key)
    register_call_target()
    return kernel


def _call(
    ctx,
    args,
    kernel: CompiledKernel,
    inputs: Callable,
    scratch: list,
    sums: ElementFunctions | None = None,
):
    """``sums``: what is done to scores, where results after the third are in fixed point."""
    outputs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ctx.avals_out]
    if sums is not None:
        outputs[3:] = fixed_point.raw(sums, outputs[3:])

    def call(*leaves):
        given = inputs(*leaves)
        results = jax.ffi.ffi_call(CALL_TARGET, outputs + scratch)(
            *given, module=kernel.object, key=kernel.digest
        )
        results = list(results[: len(outputs)])
        if sums is not None:
            results[3:] = fixed_point.as_floats(sums, given[-1], results[3:])
        return results

    return mlir.lower_fun(call, multiple_results=True)(ctx, *args)


def _primitive(
    name: str,
    abstract_eval: Callable,
    lowering: Callable,
    static: tuple[str, ...] = ("spec", "tree"),
) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=static))

    def for_cuda(ctx: mlir.LoweringRuleContext, *args, **params):
        # A program for several platforms lowers each branch for all of them.  XLA drops the one
        # for CUDA elsewhere; where it is reached, the call target does not exist.
        platforms = ctx.module_context.platforms
        if "cuda" not in platforms:
            raise NotImplementedError(
                'implementation="cute" runs on CUDA only; this program is being lowered for '
                f"{', '.join(platforms)}"
            )
        return lowering(ctx, *args, **params)

    mlir.register_lowering(primitive, for_cuda)
    return primitive


_forward_p = _primitive("flash_attention_forward", _forward_abstract, _forward_lowering)
_backward_p = _primitive("flash_attention_backward", _backward_abstract, _backward_lowering)
_nsa_p = _primitive(
    "native_sparse_attention_kernel", _nsa_abstract, _nsa_lowering, ("key", "shapes")
)
