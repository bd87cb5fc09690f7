"""A chunk of queries and a chunk of keys as a call of their own."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jax_flashcute import analysis, autodiff, masks
from jax_flashcute.context.steps import Call, KeyChunk, QueryChunk
from jax_flashcute.masks import TracedFunction
from jax_flashcute.segments import segments_of_ids
from jax_flashcute.spec import AttentionSpec, Operands, Residuals


@dataclass(frozen=True)
class PartCall:
    """Attention of a chunk of queries to a chunk of keys, as a call of its own.

    A row's position and a key's number are those within the chunks, so that one ``q_offset`` says
    how causal masks and windows lie and the kernels skip what they hide.  What else depends on
    positions is a function of them and of where the chunks start.

    Attributes:
      call: the whole call.
      operands: this device's operands.
      spec: of every part.
    """

    call: Call
    operands: Operands
    spec: AttentionSpec

    @staticmethod
    def of(call: Call, operands: Operands) -> "PartCall":
        spec, stride = call.spec, call.layout.stride
        left, right = spec.reach
        window, beyond = spec.local_window_size, (None, None)
        if stride > 1 and window is not None:
            # Its edge lies between two strides, elsewhere for every pair of devices.
            beyond = left, None if spec.is_causal else right
            window = (
                None if left is None else left // stride,
                None if right is None else -(-right // stride),
            )
        mask_mod, score_mod = spec.mask_mod, spec.score_mod
        if PartCall.is_absolute(call):
            return PartCall(call, operands, spec)
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
        return PartCall(call, operands, spec)

    @property
    def dtype(self):
        return jnp.promote_types(self.operands.query.dtype, jnp.float32)

    def zeros(self, like: jax.Array) -> Any:
        """Where gradients of ``like`` add up; None where it has none."""
        if not jnp.issubdtype(like.dtype, jnp.floating):
            return None
        zeros = jnp.zeros(like.shape, jnp.promote_types(like.dtype, jnp.float32))
        return autodiff.equally_varying((zeros, self.operands.query))[0]

    def nothing(self, rows: QueryChunk) -> Residuals:
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

    def unless_hidden(self, function, carry, rows: QueryChunk, keys: KeyChunk):
        """``function(carry, operands)``, or ``carry`` where no segment is in both chunks."""
        part = self._operands(rows, keys)
        if rows.ids is None or keys.ids is None:
            return function(carry, part)
        (q_low, q_high), (kv_low, kv_high) = (_ends(ids) for ids in (rows.ids, keys.ids))
        meet = (q_low <= kv_high) & (kv_low <= q_high)
        return lax.cond(meet, function, lambda carry, _: carry, carry, part)

    def _operands(self, rows: QueryChunk, keys: KeyChunk) -> Operands:
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
    def is_absolute(call: Call) -> bool:
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
