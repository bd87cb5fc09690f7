"""Context parallelism: one sequence over the devices of a mesh axis, exactly.

Every device holds some rows of the queries and the keys of as many positions.  With ``"ring"``,
keys and values travel (Liu et al., Ring Attention, 2023): a device attends to the part that it
holds while the next one is on its way, and the parts' results are merged by their LSE in float32.
The backward pass is a ring as well: the gradients of keys and values travel with them, each part
taking the LSE of the whole row.  With ``"all_gather"``, keys and values are gathered first, and
their gradients are summed and scattered.

In ``"zigzag"`` order, a device holds one chunk from either end of the sequence, so that a causal
mask gives each as much to do (Brandon et al., Striped Attention, 2023, for ``"striped"``).  Parts
that no device can see, by the mask's interval of keys, are neither sent nor computed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_flashcute import arguments, masks
from jax_flashcute.context.order import Layout, Order
from jax_flashcute.context.ring import attention_of
from jax_flashcute.context.steps import METHODS, Arrays, Call, ContextParallel
from jax_flashcute.dispatch import Implementation
from jax_flashcute.sharding import LAYOUTS
from jax_flashcute.spec import Residuals

Axes = str | tuple[str, ...] | None


def context_parallel_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str,
    mesh: Mesh | None = None,
    batch_axes: Axes = None,
    head_axes: Axes = None,
    context_parallel: ContextParallel = "ring",
    order: Order = "zigzag",
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: arguments.Window = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    return_residual: bool = False,
    deterministic: bool | None = None,
    implementation: Implementation = None,
):
    """``flash_attention`` of sequences whose rows lie on the devices of a mesh axis.

    Called with ``mesh``, it takes whole arrays and maps over the mesh itself.  Without, it is
    called inside a ``jax.shard_map`` and takes this device's part.  The sequences are in the order
    that ``order`` names: see ``permute_sequence``.  Masks and scores see positions of the sequence
    in its natural order.

    Forward and backward are exact: equal to one device within rounding.  Each device holds its own
    part of everything; ``"all_gather"`` holds all keys and values of its heads besides, during a
    pass.  The kernels skip what a causal mask or a window hides; another ``mask_mod`` is evaluated
    element by element in a ring and in striped order, but keeps its interval of keys with
    ``"all_gather"``.

    Args:
      query: (B, T, N, H); with P devices along the axis, (B, T / P, N, H) inside a ``shard_map``.
      key: (B, S, K, H), or (B, S / P, K, H); same dtype.
      value: (B, S, K, Hv), or (B, S / P, K, Hv); same dtype.
      axis_name: the mesh axis that the sequence is spread over.
      mesh: the mesh to map over; None inside a ``shard_map``, which must map over all of its axes
        for kernels to serve the call.
      batch_axes: with ``mesh``, the axes that the batch is spread over besides.
      head_axes: with ``mesh``, those of the heads, which must divide K.
      context_parallel: ``"ring"`` or ``"all_gather"``.
      order: ``"zigzag"``, ``"striped"`` or ``"contiguous"``.  Zig-zag needs T and S that are
        multiples of 2 P, the others of P.  A window narrower than the keys is served with the
        least communication in contiguous order.
      scale: as for ``flash_attention``.
      is_causal: as for ``flash_attention``.
      query_seq_lengths: (B,) or scalar integers, of whole sequences.
      key_value_seq_lengths: likewise.
      local_window_size: as for ``flash_attention``.
      logits_soft_cap: as for ``flash_attention``.
      sinks: (N,); without ``mesh``, those of this device's heads.
      mask_mod: as for ``flash_attention``; without ``mesh``, ``b`` and ``h`` count this device's
        batch entries and heads.
      score_mod: likewise.
      segment_ids: (B, T) integers in the order of the sequences, or a pair for query and key, as
        for ``flash_attention``; this device's part inside a ``shard_map``.  Positions are those of
        the whole sequence.
      return_residual: also return the LSE, which is differentiable.
      deterministic: as for ``flash_attention``.
      implementation: ``"cute"``, ``"xla"`` or None.

    Returns:
      out, as query but with Hv features; with ``return_residual``, ``(out, lse)``, lse (B, T, N) or
      this device's part.

    Raises:
      ValueError: an argument does not fit; it is named.
      NotImplementedError: the implementation asked for cannot serve the call.
    """
    devices = _devices(axis_name, mesh)
    if context_parallel not in METHODS:
        raise ValueError(f"context_parallel must be one of {METHODS}; got {context_parallel!r}")
    if implementation not in (None, "cute", "xla"):
        why = ", which is computed on one device" if implementation == "reference" else ""
        raise ValueError(
            f'implementation must be "cute", "xla" or None; got {implementation!r}{why}'
        )
    if mesh is None and (batch_axes is not None or head_axes is not None):
        raise ValueError(
            f"batch_axes and head_axes are for a mesh, and mesh is None; got {batch_axes!r} and "
            f"{head_axes!r}; inside a shard_map its in_specs say so"
        )
    layout = Layout(axis_name, devices, order)
    if isinstance(mask_mod, masks.Mask) and mask_mod.words is not None:
        # A device has a part of the rows and of the keys, and words are of whole rows of keys.
        mask_mod = mask_mod.__call__
    spec, operands = arguments.checked_call(
        query,
        key,
        value,
        bias=None,
        mask=None,
        scale=scale,
        is_causal=is_causal,
        q_offset=0,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        mask_mod=mask_mod,
        score_mod=score_mod,
        block_mask=None,
        segment_ids=segment_ids,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        positions=None if segment_ids is None else "sequence",
        deterministic=deterministic,
    )
    if jnp.ndim(query) != 4:
        raise ValueError(f"query must be (batch, length, heads, head_dim); got {jnp.shape(query)}")
    arrays = Arrays.of(operands)
    T, S = operands.query.shape[1], operands.key.shape[1]
    parts = devices if mesh is not None else 1
    for name, length in (("query", T), ("key", S)):
        layout.check(name, length, parts)
    call = Call(spec, implementation, context_parallel, layout)
    if mesh is None:
        residuals = attention_of(call, arrays)
    else:
        B, _, N, _ = operands.query.shape
        K = operands.key.shape[2]
        over = {"batch_axes": (batch_axes, B), "head_axes": (head_axes, N if K == 1 else K)}
        _check_axes(mesh, axis_name, over)
        residuals = _on_mesh(call, arrays, mesh, batch_axes, head_axes)
    return (residuals.out, residuals.lse) if return_residual else residuals.out


def _devices(axis_name: str, mesh: Mesh | None) -> int:
    if mesh is not None:
        if axis_name not in mesh.axis_names:
            raise ValueError(
                f"axis_name must be one of mesh's axes, {mesh.axis_names}; got {axis_name!r}"
            )
        return mesh.shape[axis_name]
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name must be an axis of the jax.shard_map around the call; got {axis_name!r}; "
            "outside of one, pass mesh"
        ) from None


def _check_axes(mesh: Mesh, axis_name: str, over: dict[str, tuple[Axes, int]]) -> None:
    """Refuse axes that the mesh does not have, that are taken, or that divide no batch or heads."""
    taken = [axis_name]
    for name, (axes, length) in over.items():
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        for axis in names:
            if axis not in mesh.axis_names or axis in taken:
                free = tuple(x for x in mesh.axis_names if x not in taken)
                raise ValueError(f"{name} must be among mesh's other axes, {free}; got {axes!r}")
            taken.append(axis)
        parts = math.prod(mesh.shape[axis] for axis in names)
        # One batch entry or head is on every device.
        if length % parts and length != 1:
            what = "batch entries" if name == "batch_axes" else "heads"
            raise ValueError(
                f"{name} must divide {length} {what}; got {axes!r}, of {parts} devices"
            )


def _on_mesh(
    call: Call, arrays: Arrays, mesh: Mesh, batch_axes: Axes, head_axes: Axes
) -> Residuals:
    """The call on each device's part of whole arrays."""
    operands = arrays.operands
    N = operands.query.shape[2]
    if head_axes is not None and operands.batch_index is not None:
        # Masks and scores see the numbers of all heads.
        operands = dataclasses.replace(operands, head_index=jnp.arange(N, dtype=jnp.int32))
        arrays = dataclasses.replace(arrays, operands=operands)
    over = {"b": batch_axes, "n": head_axes, "k": head_axes}
    over |= dict.fromkeys("ts", call.layout.axis_name)
    layouts = {**LAYOUTS, "q_ids": "bt", "kv_ids": "bs"}

    def spec(path, array) -> PartitionSpec:
        name = next(k.name for k in path if getattr(k, "name", "") in layouts)
        letters = layouts[name].ljust(array.ndim)
        entries = zip(letters, array.shape, strict=True)
        return PartitionSpec(*(over.get(c) if size > 1 else None for c, size in entries))

    in_specs = jax.tree_util.tree_map_with_path(spec, arrays)
    if AxisType.Explicit in mesh.axis_types:
        arrays = jax.tree.map(
            lambda x, p: jax.sharding.reshard(x, NamedSharding(mesh, p)), arrays, in_specs
        )
    # As query lies: a batch entry or a head that is alone is on every device.
    rows: Any = PartitionSpec(*in_specs.operands.query[:3])
    return jax.shard_map(
        functools.partial(attention_of, call),
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=Residuals(out=rows, lse=rows),
    )(arrays)
