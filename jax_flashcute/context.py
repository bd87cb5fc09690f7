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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_flashcute import analysis, arguments, autodiff, masks, xla
from jax_flashcute.dispatch import Implementation
from jax_flashcute.masks import TracedFunction
from jax_flashcute.segments import segments_of_ids
from jax_flashcute.sharding import LAYOUTS
from jax_flashcute.spec import AttentionSpec, Operands, Residuals
from jax_flashcute.visibility import reach

ContextParallel = Literal["ring", "all_gather"]
Order = Literal["zigzag", "striped", "contiguous"]
Axes = str | tuple[str, ...] | None

METHODS: tuple[ContextParallel, ...] = ("ring", "all_gather")
ORDERS: tuple[Order, ...] = ("zigzag", "striped", "contiguous")


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
    layout = _Layout(axis_name, devices, order)
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
    arrays = _Arrays.of(operands)
    T, S = operands.query.shape[1], operands.key.shape[1]
    parts = devices if mesh is not None else 1
    for name, length in (("query", T), ("key", S)):
        layout.check(name, length, parts)
    call = _Call(spec, implementation, context_parallel, layout)
    if mesh is None:
        residuals = _attention_of(call, arrays)
    else:
        residuals = _on_mesh(call, arrays, mesh, batch_axes, head_axes)
    return (residuals.out, residuals.lse) if return_residual else residuals.out


def permute_sequence(array: ArrayLike, devices: int, *, order: Order = "zigzag", axis: int = 1):
    """A sequence in natural order, put into the order in which devices hold it.

    Best done once, to a model's tokens, labels and ``permuted_positions`` (for RoPE), where it
    costs next to nothing: everything but attention treats each position by itself.

    Args:
      array: any array.
      devices: P, of the mesh axis.
      order: as for ``context_parallel_attention``.
      axis: the sequence's.

    Raises:
      ValueError: the length does not divide.
    """
    array = jnp.asarray(array)
    return jnp.take(array, permuted_positions(array.shape[axis], devices, order=order), axis=axis)


def restore_sequence(array: ArrayLike, devices: int, *, order: Order = "zigzag", axis: int = 1):
    """The inverse of ``permute_sequence``."""
    array = jnp.asarray(array)
    positions = permuted_positions(array.shape[axis], devices, order=order)
    return jnp.take(array, np.argsort(positions), axis=axis)


def permuted_positions(length: int, devices: int, *, order: Order = "zigzag") -> np.ndarray:
    """The natural position of every element of a permuted sequence: (length,) int32."""
    layout = _Layout("", devices, order)
    layout.check("array", length, devices)
    rows = np.arange(length // devices // layout.chunks, dtype=np.int32)
    chunks = [
        layout.first(device, chunk, rows.size) + layout.stride * rows
        for device in range(devices)
        for chunk in range(layout.chunks)
    ]
    return np.concatenate(chunks).astype(np.int32)


# ---- who holds what ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where the rows of a sequence lie: every device holds one chunk, or two in zig-zag order."""

    axis_name: str
    devices: int
    order: Order

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}; got {self.order!r}")
        if self.devices < 1:
            raise ValueError(f"devices must be at least 1; got {self.devices}")

    @property
    def chunks(self) -> int:
        return 2 if self.order == "zigzag" else 1

    @property
    def stride(self) -> int:
        """From a row's position to that of the chunk's next row."""
        return self.devices if self.order == "striped" else 1

    def first(self, device, chunk: int, length: int):
        """The position of the first row of a device's chunk of ``length`` rows."""
        if self.order == "striped":
            return device
        return ((2 * self.devices - 1 - device) if chunk else device) * length

    def positions(self, length: int) -> jax.Array:
        """Of this device's ``length`` rows."""
        device, rows = lax.axis_index(self.axis_name), length // self.chunks
        firsts = [self.first(device, chunk, rows) for chunk in range(self.chunks)]
        return jnp.concatenate([first + self.stride * jnp.arange(rows) for first in firsts])

    def check(self, name: str, length: int, parts: int) -> None:
        """Refuse a length that ``parts`` devices' chunks do not divide."""
        unit = parts * self.chunks
        if length % unit or length == 0:
            what = "a device's part of it" if parts == 1 else f"{parts} devices"
            raise ValueError(
                f"{name} must have a positive multiple of {unit} rows for {what} in "
                f"{self.order} order; got {length}"
            )
        if length // parts * self.devices >= analysis.POSITION_LIMIT:
            raise ValueError(
                f"{name} must have fewer than {analysis.POSITION_LIMIT} rows over all devices; "
                f"got {length // parts * self.devices}"
            )

    def step(self, array: jax.Array, shift: int) -> jax.Array:
        """What device ``r - shift`` holds, to device r."""
        if shift % self.devices == 0:
            return array
        sends = [(r, (r + shift) % self.devices) for r in range(self.devices)]
        return lax.ppermute(array, self.axis_name, sends)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Arrays:
    """The arrays of a call: segments as ids, (B, T) and (B, S), of which the keys' travel."""

    operands: Operands
    q_ids: jax.Array | None = None
    kv_ids: jax.Array | None = None

    @staticmethod
    def of(operands: Operands) -> "_Arrays":
        segments = operands.segment_ids
        if segments is None:
            return _Arrays(operands)
        operands = dataclasses.replace(operands, segment_ids=None)
        return _Arrays(operands, segments.q_ids, segments.kv_ids)


@dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    spec: AttentionSpec
    implementation: Implementation
    method: ContextParallel
    layout: _Layout

    def shifts(self, T: int, S: int) -> dict[int, list[tuple[int, int]]]:
        """The ring's steps: for a shift, the pairs of chunks of queries and keys to be computed.

        At shift s, device r holds the keys of device r - s.  Steps and pairs that the mask hides
        on every device are left out.
        """
        layout = self.layout
        steps = {}
        for shift in range(layout.devices):
            pairs = [
                (i, j)
                for i in range(layout.chunks)
                for j in range(layout.chunks)
                if any(self._may_see(r, i, T, (r - shift), j, S) for r in range(layout.devices))
            ]
            if pairs or shift == 0:
                steps[shift] = pairs
        return steps

    def _may_see(self, q_device: int, i: int, T: int, kv_device: int, j: int, S: int) -> bool:
        """Whether a query of one chunk may see a key of another, by the mask's intervals."""
        layout = self.layout
        first_q = layout.first(q_device, i, T)
        first_kv = layout.first(kv_device % layout.devices, j, S)
        last_q = first_q + layout.stride * (T - 1)
        last_kv = first_kv + layout.stride * (S - 1)
        for interval in _intervals(self.spec):
            low = _extreme(interval.low, first_q, last_q, "rising")
            high = _extreme(interval.high, first_q, last_q, "falling")
            if (low is None or low <= last_kv) and (high is None or high > first_kv):
                return True
        return False


@functools.lru_cache(maxsize=64)
def _intervals(spec: AttentionSpec) -> analysis.KeySet:
    """The keys that a position sees, as far as that is known."""
    window = (analysis.window_interval(*reach(spec)),)
    if spec.mask_mod is None:
        return window
    found = analysis.analyse(spec.mask_mod.jaxpr).intervals()
    both = analysis.intersection(window, found)
    return window if both is None else both


def _extreme(bound: analysis.Linear | None, first_q: int, last_q: int, trend: str) -> int | None:
    """The least value of a bound over positions for ``"rising"``, the largest for ``"falling"``;
    None where it is open or not known."""
    if bound is None or any(analysis.depends_on(bound, name) for name in ("b", "h", "kv")):
        return None
    moves = analysis.trend(bound)
    if moves is None:
        return None
    q = first_q if moves in (trend, "constant") else last_q
    return analysis.evaluate(bound, {"q": q}, {}, min, max)


def _devices(axis_name: str, mesh: Mesh | None) -> int:
    if mesh is not None:
        if axis_name not in mesh.shape:
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


def _on_mesh(
    call: _Call, arrays: _Arrays, mesh: Mesh, batch_axes: Axes, head_axes: Axes
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
        functools.partial(_attention_of, call),
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=Residuals(out=rows, lse=rows),
    )(arrays)


# ---- forward and backward ------------------------------------------------------------------


def _attention_of(call: _Call, arrays: _Arrays) -> Residuals:
    arrays = jax.tree.map(autodiff.reverse_mode_only, autodiff.equally_varying(arrays))
    return _attention(call, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, arrays: _Arrays) -> Residuals:
    return _forward(call, arrays)


def _attention_fwd(call: _Call, arrays: _Arrays):
    residuals = autodiff.named(_forward(call, arrays))
    return residuals, (arrays, residuals)


def _attention_bwd(call: _Call, saved, cotangents: Residuals):
    arrays, residuals = saved
    return (_backward(call, arrays, residuals, cotangents),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(call: _Call, arrays: _Arrays) -> Residuals:
    """One part of the keys after the other, merged by LSE."""
    operands = arrays.operands
    parts = _PartCall.of(call, operands)
    chunks = _query_chunks(call, arrays)
    # Without segments, the first part of a chunk needs nothing to be merged with.
    results = [None if rows.ids is None else parts.nothing(rows) for rows in chunks]
    for _, keys, pairs in _steps(call, arrays):
        for i, j in pairs:

            def attend(total: Residuals | None, part: Operands) -> Residuals:
                found = parts.forward(part)
                return found if total is None else _merged(total, found)

            results[i] = parts.unless_hidden(attend, results[i], chunks[i], keys[j])
    complete = [r or parts.nothing(rows) for r, rows in zip(results, chunks, strict=True)]
    whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *complete)
    return _with_sinks(call, operands, whole)


def _backward(call: _Call, arrays: _Arrays, residuals: Residuals, cotangents: Residuals):
    """Each part's gradients, from the LSE of whole rows; those of the keys go where they belong."""
    operands = arrays.operands
    parts = _PartCall.of(call, operands)
    chunks = _query_chunks(call, arrays)
    saved = [jax.tree.map(rows.of, (residuals, cotangents)) for rows in chunks]
    dquery: list = [parts.zeros(rows.of(operands.query)) for rows in chunks]
    dmod = [parts.zeros(x) for x in operands.score_mod_arrays]
    travelling, last_shift = None, 0
    for shift, keys, pairs in _steps(call, arrays):
        dkeys: list = [(parts.zeros(k.key), parts.zeros(k.value)) for k in keys]
        for i, j in pairs:

            def accumulate(totals, part: Operands, i=i):
                found = parts.backward(part, *saved[i])
                more = (found.query, (found.key, found.value), parts.own(found.score_mod_arrays))
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), totals, more)

            totals = dquery[i], dkeys[j], dmod
            totals = parts.unless_hidden(accumulate, totals, chunks[i], keys[j])
            dquery[i], dkeys[j], dmod = totals
        here = tuple(jnp.concatenate(x, axis=1) for x in zip(*dkeys, strict=True))
        if travelling is not None:
            # On its way while the kernels run: it waits for none of this step's.
            arrived = (call.layout.step(x, shift - last_shift) for x in travelling)
            here = tuple(x + y for x, y in zip(arrived, here, strict=True))
        travelling, last_shift = here, shift
    dkey, dvalue = (_home(call, x, last_shift) for x in travelling or ())
    dsinks = xla.sink_gradient(operands, residuals, cotangents.out, cotangents.lse)
    gradients = Operands(
        query=jnp.concatenate(dquery, axis=1).astype(operands.query.dtype),
        key=dkey.astype(operands.key.dtype),
        value=dvalue.astype(operands.value.dtype),
        sinks=dsinks,
        mask_mod_arrays=(None,) * len(operands.mask_mod_arrays),  # pyright: ignore
        score_mod_arrays=tuple(  # pyright: ignore
            None if d is None else d.astype(x.dtype)
            for d, x in zip(dmod, operands.score_mod_arrays, strict=True)
        ),
    )
    return _Arrays(gradients)


def _merged(a: Residuals, b: Residuals) -> Residuals:
    """Attention to the keys of two parts, in the statistics' dtype."""
    lse = jnp.logaddexp(a.lse, b.lse)
    total = jnp.where(lse == -jnp.inf, 0, lse)
    weights = (jnp.exp(x.lse - total)[..., None] for x in (a, b))
    weighted = (weight * x.out for weight, x in zip(weights, (a, b), strict=True))
    return Residuals(out=functools.reduce(jnp.add, weighted), lse=lse)


def _with_sinks(call: _Call, operands: Operands, found: Residuals) -> Residuals:
    """Sinks are in the normaliser of a row once, whatever the number of parts."""
    out, lse = found.out, found.lse
    if operands.sinks is not None:
        sinks = operands.sinks.astype(lse.dtype)[:, None]
        if operands.query_seq_lengths is not None:
            within = call.layout.positions(lse.shape[1]) < operands.query_seq_lengths[:, None]
            sinks = jnp.where(within[..., None], sinks, -jnp.inf)
        lse = jnp.logaddexp(lse, sinks)
        out = out * jnp.exp(found.lse - jnp.where(lse == -jnp.inf, 0, lse))[..., None]
    return Residuals(out=out.astype(operands.query.dtype), lse=lse)


# ---- parts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _QueryChunk:
    """Rows ``start`` to ``stop`` of this device; the first is at position ``first``."""

    query: jax.Array
    ids: jax.Array | None
    start: int
    stop: int
    first: jax.Array

    def of(self, array: jax.Array) -> jax.Array:
        """The chunk's rows of (B, T / P, ...)."""
        return array[:, self.start : self.stop]


@dataclass(frozen=True)
class _KeyChunk:
    """Some keys, their values and segments; the first is number ``first``."""

    key: jax.Array
    value: jax.Array
    ids: jax.Array | None
    first: Any

    @staticmethod
    def of(held, first) -> "_KeyChunk":
        key, value, ids = held
        return _KeyChunk(key, value, ids, first)


def _query_chunks(call: _Call, arrays: _Arrays) -> list[_QueryChunk]:
    layout, query = call.layout, arrays.operands.query
    device = lax.axis_index(layout.axis_name)
    length = query.shape[1] // layout.chunks
    chunks = []
    for i in range(layout.chunks):
        start, stop = i * length, (i + 1) * length
        ids = None if arrays.q_ids is None else arrays.q_ids[:, start:stop]
        first = layout.first(device, i, length)
        chunks.append(_QueryChunk(query[:, start:stop], ids, start, stop, first))
    return chunks


def _steps(call: _Call, arrays: _Arrays) -> Iterator[tuple[int, list[_KeyChunk], list]]:
    """``(shift, chunks of keys, pairs of chunks of queries and keys)``, of every step.

    The next step's keys are sent for before those of this one are handed out.
    """
    operands, layout = arrays.operands, call.layout
    held = operands.key, operands.value, arrays.kv_ids
    if call.method == "all_gather":
        keys = _gathered(layout, held)
        yield 0, keys, [(i, j) for i in range(layout.chunks) for j in range(len(keys))]
        return
    device = lax.axis_index(layout.axis_name)
    rows, columns = (x.shape[1] // layout.chunks for x in (operands.query, operands.key))
    shifts = call.shifts(rows, columns)
    following = [*list(shifts)[1:], None]
    for (shift, pairs), next_shift in zip(shifts.items(), following, strict=True):
        coming = None
        if next_shift is not None:
            distance = next_shift - shift
            coming = jax.tree.map(functools.partial(layout.step, shift=distance), held)
        source = (device - shift) % layout.devices
        parts = (
            jax.tree.map(lambda x, j=j: x[:, j * columns : (j + 1) * columns], held)
            for j in range(layout.chunks)
        )
        firsts = (layout.first(source, j, columns) for j in range(layout.chunks))
        yield shift, [_KeyChunk.of(x, first) for x, first in zip(parts, firsts, strict=True)], pairs
        held = coming


def _gathered(layout: _Layout, held) -> list[_KeyChunk]:
    """All keys: as one chunk in natural order, or striped, as one for each device."""
    every = jax.tree.map(lambda x: lax.all_gather(x, layout.axis_name, axis=0), held)
    if layout.order == "striped":
        devices = range(layout.devices)
        return [_KeyChunk.of(jax.tree.map(lambda x, s=s: x[s], every), s) for s in devices]

    def natural(x: jax.Array) -> jax.Array:
        chunks = x.reshape(*x.shape[:2], layout.chunks, -1, *x.shape[3:])
        first, *second = (chunks[:, :, i] for i in range(layout.chunks))
        x = jnp.concatenate([first, *(half[::-1] for half in second)])
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    return [_KeyChunk.of(jax.tree.map(natural, every), 0)]


def _home(call: _Call, dkeys: jax.Array, last_shift: int) -> jax.Array:
    """The gradient of the keys that this device holds, from what the steps have summed up."""
    layout = call.layout
    if call.method == "ring":
        return layout.step(dkeys, -last_shift)
    B = dkeys.shape[0]
    chunks = dkeys.reshape(B, layout.devices * layout.chunks, -1, *dkeys.shape[2:])
    if layout.order == "zigzag":
        halves = chunks[:, : layout.devices], chunks[:, layout.devices :][:, ::-1]
        chunks = jnp.stack(halves, axis=2)
    parts = jnp.moveaxis(chunks.reshape(B, layout.devices, -1, *dkeys.shape[2:]), 1, 0)
    return lax.psum_scatter(parts, layout.axis_name)


@dataclass(frozen=True)
class _PartCall:
    """Attention of a chunk of queries to a chunk of keys, as a call of its own.

    A row's position and a key's number are those within the chunks, so that one ``q_offset`` says
    how causal masks and windows lie and the kernels skip what they hide.  What else depends on
    positions is a function of them and of where the chunks start.

    Attributes:
      call: the whole call.
      operands: this device's operands.
      spec: of every part.
    """

    call: _Call
    operands: Operands
    spec: AttentionSpec

    @staticmethod
    def of(call: _Call, operands: Operands) -> "_PartCall":
        spec, stride = call.spec, call.layout.stride
        left, right = reach(spec)
        window, beyond = spec.local_window_size, (None, None)
        if stride > 1 and window is not None:
            # Its edge lies between two strides, elsewhere for every pair of devices.
            beyond = left, None if spec.is_causal else right
            window = (
                None if left is None else left // stride,
                None if right is None else -(-right // stride),
            )
        mask_mod, score_mod = spec.mask_mod, spec.score_mod
        if _PartCall.is_absolute(call):
            return _PartCall(call, operands, spec)
        if mask_mod is not None or beyond != (None, None):
            arrays = operands.mask_mod_arrays
            mask_mod = _of_parts(mask_mod, arrays, stride, (), beyond)
        if score_mod is not None:
            dtype = jnp.promote_types(operands.query.dtype, jnp.float32)
            arrays = operands.score_mod_arrays
            score_mod = _of_parts(score_mod, arrays, stride, (dtype,))
        spec = dataclasses.replace(
            spec, local_window_size=window, mask_mod=mask_mod, score_mod=score_mod
        )
        return _PartCall(call, operands, spec)

    @property
    def dtype(self):
        return jnp.promote_types(self.operands.query.dtype, jnp.float32)

    def zeros(self, like: jax.Array) -> Any:
        """Where gradients of ``like`` add up; None where it has none."""
        if not jnp.issubdtype(like.dtype, jnp.floating):
            return None
        zeros = jnp.zeros(like.shape, jnp.promote_types(like.dtype, jnp.float32))
        return autodiff.equally_varying((zeros, self.operands.query))[0]

    def nothing(self, rows: _QueryChunk) -> Residuals:
        """What rows have that see no key."""
        shape = (*rows.query.shape[:3], self.operands.value.shape[3])
        out, lse = jnp.zeros(shape, self.dtype), jnp.full(shape[:3], -jnp.inf, self.dtype)
        return autodiff.equally_varying((Residuals(out=out, lse=lse), rows.query))[0]

    def forward(self, part: Operands) -> Residuals:
        found = autodiff.forward_pass(self.spec, self.call.implementation)(part)
        return Residuals(out=found.out.astype(self.dtype), lse=found.lse)

    def backward(self, part: Operands, saved: Residuals, cotangents: Residuals) -> Operands:
        """The part's gradients, from the out and LSE of whole rows."""
        run = autodiff.backward_pass(self.spec, self.call.implementation)
        return run(part, saved, cotangents.out, cotangents.lse)

    def own(self, arrays: Sequence) -> list:
        """Of a part's arrays of the score, the call's."""
        return list(arrays[: len(self.operands.score_mod_arrays)])

    def unless_hidden(self, function, carry, rows: _QueryChunk, keys: _KeyChunk):
        """``function(carry, operands)``, or ``carry`` where no segment is in both chunks."""
        part = self._operands(rows, keys)
        if rows.ids is None or keys.ids is None:
            return function(carry, part)
        (q_low, q_high), (kv_low, kv_high) = (_ends(ids) for ids in (rows.ids, keys.ids))
        meet = (q_low <= kv_high) & (kv_low <= q_high)
        return lax.cond(meet, function, lambda carry, _: carry, carry, part)

    def _operands(self, rows: _QueryChunk, keys: _KeyChunk) -> Operands:
        whole, stride = self.operands, self.call.layout.stride
        B = rows.query.shape[0]
        first_q, first_kv = (jnp.asarray(x, jnp.int32) for x in (rows.first, keys.first))
        q_offset = (first_q - first_kv) // stride
        origins = (first_kv,) if stride == 1 else (first_q - stride * q_offset, first_kv)
        origins = tuple(jnp.clip(x, 0, analysis.POSITION_LIMIT)[None] for x in origins)
        mask_mod_arrays, score_mod_arrays = whole.mask_mod_arrays, whole.score_mod_arrays
        if not self.is_absolute(self.call):
            mask_mod_arrays += origins if self.spec.mask_mod is not None else ()
            score_mod_arrays += origins if self.spec.score_mod is not None else ()
        batch_index = whole.batch_index
        if batch_index is None and self.spec.mask_mod is not None:
            batch_index = jnp.arange(B, dtype=jnp.int32)

        def lengths(of_sequence: jax.Array | None, first: jax.Array, rows: int):
            if of_sequence is None:
                return None
            return jnp.clip(-((first - of_sequence) // stride), 0, rows)

        segments = None
        if rows.ids is not None and keys.ids is not None:
            segments = segments_of_ids(rows.ids, keys.ids, per_segment=False)
        part = Operands(
            query=rows.query,
            key=keys.key,
            value=keys.value,
            q_offset=jnp.broadcast_to(q_offset, (B,)),
            query_seq_lengths=lengths(whole.query_seq_lengths, first_q, rows.query.shape[1]),
            key_value_seq_lengths=lengths(whole.key_value_seq_lengths, first_kv, keys.key.shape[1]),
            batch_index=batch_index,
            head_index=whole.head_index,
            mask_mod_arrays=mask_mod_arrays,
            score_mod_arrays=score_mod_arrays,
            segment_ids=segments,
        )
        return autodiff.equally_varying(part)

    @staticmethod
    def is_absolute(call: _Call) -> bool:
        """Whether keys have their own numbers: masks and scores then hold as they are."""
        return call.method == "all_gather" and call.layout.stride == 1


def _ends(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest id of a segment, the smallest beyond all if there is none."""
    smallest = jnp.min(jnp.where(ids >= 0, ids, np.iinfo(np.int32).max))
    return smallest, jnp.max(ids)


def _of_parts(
    function: TracedFunction | None,
    arrays: tuple[jax.Array, ...],
    stride: int,
    score: tuple[Any, ...],
    window: tuple[int | None, int | None] = (None, None),
) -> TracedFunction:
    """A mask or a score as a function of positions within parts; a mask within a window.

    It closes over two arrays more, of which the first may be left out at stride 1: what to add to
    ``stride`` times a row's position and to a key's number.
    """
    count = len(arrays)

    def on_part(closed_over, arguments):
        *values, q, kv = arguments
        arrays, origins = closed_over[:count], closed_over[count:]
        q, kv = stride * q + origins[0], stride * kv + origins[-1]
        left, right = window
        shown = [] if left is None else [kv >= q - left]
        shown += [] if right is None else [kv <= q + right]
        if function is not None:
            shown += jaxpr_as_fun(ClosedJaxpr(function.jaxpr, arrays))(*values, q, kv)
        return functools.reduce(jnp.logical_and, shown) if len(shown) > 1 else shown[0]

    index = jax.ShapeDtypeStruct((), jnp.int32)
    closed_over = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays]
    closed_over += [index] * (1 if stride == 1 else 2)
    return masks.trace_over(
        on_part, closed_over, [*(jax.ShapeDtypeStruct((), d) for d in score), *[index] * 4]
    )
