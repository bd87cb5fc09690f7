"""The public calls: arguments are checked and given one form here, and nowhere else."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental import checkify
from jax.typing import ArrayLike

from jax_flashcute import analysis, autodiff, dispatch, masks, plan
from jax_flashcute.block_mask import BlockMask
from jax_flashcute.dispatch import IMPLEMENTATIONS, Implementation
from jax_flashcute.kernels import registry
from jax_flashcute.paged import check_page_size
from jax_flashcute.segments import (
    Segments,
    packed_rows,
    rows_by_sequence,
    segments_of_boundaries,
    segments_of_ids,
)
from jax_flashcute.spec import AttentionSpec, Operands

Positions = Literal["sequence", "segment"] | None
Blocks = BlockMask | Literal["auto"] | None
Window = int | tuple[int | None, int | None] | None

_DTYPES = ("float16", "bfloat16", "float32", "float64")
# No sequence reaches this far, and positions and windows add up in int32.
_UNBOUNDED = 2**30


def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    packed_mask: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    compress_factor: int | None = None,
    complete_only: bool = False,
    block_mask: Blocks = "auto",
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    positions: Positions = None,
    return_residual: bool = False,
    deterministic: bool | None = None,
    implementation: Implementation = None,
):
    """Softmax attention, exact, without the T by S matrix of scores in memory.

    Computes ``softmax(cap(score_mod(scale * query @ key^T)) + bias) @ value`` per head, over the
    keys that a query row may see.  Dimensions: B batch, T query length, S key length, N query
    heads, K key/value heads (N a multiple of K: grouped queries), H head_dim, Hv head_dim of value.

    A row that sees no key gives output 0, LSE -inf and zero gradients.

    ``mask_mod`` and ``score_mod`` may close over Python numbers, which are part of the program,
    and over arrays, traced or not, which are run-time operands: new values compile nothing anew,
    nor does the same lambda made again.  Floating-point arrays that ``score_mod`` closes over have
    gradients.  As in all of JAX, an index beyond the end of such an array reads its last element.

    Args:
      query: (B, T, N, H) or (T, N, H); float16, bfloat16, float32 or (with x64) float64.
      key: (B, S, K, H) or (S, K, H), same dtype.
      value: (B, S, K, Hv) or (S, K, Hv), same dtype.
      bias: (1|B, 1|N, 1|T, 1|S) floating point, added to the scaled and capped scores; leading
        dimensions may be left out.  It is never expanded, and has a gradient.
      mask: booleans of such a shape; False hides a key.
      packed_mask: the same in bits, (1|B, 1|N, 1|T, ceil(S / 32)) uint32: bit j, from the lowest,
        of word w is key ``32 w + j``.  ``mask_mod=masks.from_bits(words)`` is the same by position.
      scale: factor on the scores; 1 / sqrt(H) by default.  A traced scale multiplies the query
        instead, in the query's dtype.
      is_causal: the row at position p sees keys ``kv <= p``.
      q_offset: position of query row 0: an integer, a scalar array or (B,), traced or not.  0
        aligns query and key at the start; S - T aligns them at the end.
      query_seq_lengths: (B,) or scalar integers; rows at or beyond give output 0, LSE -inf and
        gradient 0, whatever they hold.
      key_value_seq_lengths: (B,) or scalar integers; keys at or beyond are invisible, whatever
        they hold.
      local_window_size: ``(left, right)``: the row at position p sees ``p - left <= kv <= p +
        right``; None leaves a side open; an integer is both sides.
      logits_soft_cap: c > 0 in ``c * tanh(score / c)``, applied before the bias.
      sinks: (N,) floating point: an extra logit per head that takes part in the normaliser only.
        Differentiable.
      mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, in jnp on int32 scalars: batch index, query head,
        position of the row (row i is at ``i + q_offset``) and number of the key.  False hides the
        key, on top of what everything else hides.  One that is ``q_idx - left <= kv_idx <= q_idx +
        right``, however it is written, or has such a condition, takes the path of
        ``local_window_size`` for it (positions are taken to be below 2^24 then); one interval of
        keys with bounds that rise with q_idx is served by kernels too; what else it says is
        evaluated block by block.
      score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, in jnp on scalars, the score in float32
        (float64 for float64 operands).  It is evaluated for hidden keys too, where its derivatives
        must be finite.
      compress_factor: each key stands for a block of so many positions: position q sees keys
        ``kv <= q // compress_factor``; ``masks.compressed_causal``, in place of ``is_causal``.
      complete_only: of those, only blocks that end at or before the position.
      block_mask: the tiles that are visited (see ``make_block_mask``): nothing is visible outside
        of them, and ``mask_mod`` is evaluated in the partial ones alone.  All else that hides keys
        holds in every tile; ``compress_factor`` counts as part of ``mask_mod``.  With ``"auto"``,
        a kernel whose ``mask_mod`` is no interval of keys makes exact lists in the call, where
        shapes promise that they pay: 2^27 scores at least, each list shared by 4 heads at least,
        no segments (``explain`` says).  None: every tile is visited.
      segment_ids: packed sequences: (B, T) or (T,) integers for query and key alike, or a pair for
        query rows (B, T) and keys (B, S).  A row sees keys of its own id alone.  A negative id is
        padding, which sees nothing, is seen by none, and may hold NaN.  Ids need not be sorted.
      cu_seqlens_q: (n + 1,) or (B, n + 1) integers, not decreasing: segment i is rows
        ``cu_seqlens_q[i]`` up to ``cu_seqlens_q[i + 1]``, which may be none; rows outside of all
        are padding.  n, the most segments there can be, is static; fill up with the last value.
        In place of ``segment_ids``.
      cu_seqlens_k: likewise for the keys; left out, those of the query.
      positions: what masks and scores see: ``"sequence"``, positions in the whole sequence, or
        ``"segment"``, positions that start at 0 in every segment (``q_offset`` is added to those
        of rows).  None is ``"sequence"``, but where query and key have segments of their own and
        something reads positions, one must be named.
      return_residual: also return the LSE, which is differentiable.
      deterministic: gradients are bit-identical between runs.  None follows
        ``--xla_gpu_deterministic_ops`` in ``XLA_FLAGS``.
      implementation: ``"cute"`` (kernels for Hopper and Blackwell), ``"xla"`` (every platform,
        memory linear in T), ``"reference"`` (dense, float32, differentiable any number of times),
        used or refused; None takes the fastest that can serve the call.  See ``explain``.

    Returns:
      out, (B, T, N, Hv) or (T, N, Hv) in the query's dtype; with ``return_residual``, ``(out,
      lse)`` with lse (B, T, N) or (T, N) in float32 (float64 for float64 operands).

    Raises:
      ValueError: an argument does not fit; it is named.
      NotImplementedError: the implementation asked for cannot serve the call; every reason is
        given.
    """
    spec, operands = checked_call(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        packed_mask=packed_mask,
        scale=scale,
        is_causal=is_causal,
        q_offset=q_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        mask_mod=_with_compression(
            mask_mod, compress_factor, complete_only, is_causal, local_window_size
        ),
        score_mod=score_mod,
        block_mask=block_mask,
        segment_ids=segment_ids,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        positions=positions,
        deterministic=deterministic,
    )
    residuals = autodiff.attention(spec, operands, _known(implementation))
    out, lse = residuals.out, residuals.lse
    if jnp.ndim(query) == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def paged_attention(
    query: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    page_table: ArrayLike,
    kv_lengths: ArrayLike,
    *,
    q_lengths: ArrayLike | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    max_q_length: int | None = None,
    q_offset: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    batch_invariant: bool = False,
    checked: bool = False,
    return_residual: bool = False,
    implementation: Implementation = None,
):
    """Attention over keys and values that lie in pages, for inference: prefill, chunks and decode.

    Token s of sequence b is slot ``s % page_size`` of page ``page_table[b, s // page_size]``.
    Pages may repeat and be shared.  Unused slots and pages may hold anything, and entries of the
    table beyond the length are never used.  The kernels read pages where they lie; on the
    XLA path they are gathered a block at a time.  It has no derivatives, but for ``"reference"``.

    Args:
      query: (B, T, N, H), or with ``cu_seqlens_q`` (total, N, H): the last tokens of each sequence,
        as far as ``q_offset`` is left out.
      k_pages: (num_pages, page_size, K, H), page_size a power of two from 1 to 512; query's dtype.
      v_pages: (num_pages, page_size, K, Hv), same dtype.
      page_table: (B, max_pages) integers.
      kv_lengths: (B,) or scalar integers: tokens in the pages, at most max_pages * page_size.
      q_lengths: (B,) or scalar integers; rows at or beyond give output 0 and LSE -inf.
      cu_seqlens_q: (B + 1,) integers, not decreasing, in place of ``q_lengths``: sequence b's
        queries are rows ``cu_seqlens_q[b]`` up to ``cu_seqlens_q[b + 1]`` of one array, so that
        prefill, chunks and decode share a call; rows outside of all give output 0 and LSE -inf.
        Between, they are copied to (B, max_q_length, N, H).
      max_q_length: the most rows of a sequence, static; by default all rows there are.  Rows beyond
        give output 0 and LSE -inf; ``checked`` refuses them.
      q_offset: position of query row 0, (B,) or scalar integers; by default ``kv_lengths -
        q_lengths``, which aligns queries and keys at their ends.
      scale: as for ``flash_attention``.
      is_causal: as for ``flash_attention``, but on by default.
      local_window_size: as for ``flash_attention``.
      logits_soft_cap: as for ``flash_attention``.
      sinks: as for ``flash_attention``.
      mask_mod: as for ``flash_attention``; ``kv_idx`` is a token's number in its sequence.
      score_mod: as for ``flash_attention``, likewise.
      batch_invariant: a sequence's result does not depend on what else is in the batch, nor on the
        number of sequences, bit for bit, among calls with one query length T.  For
        ``implementation="cute"`` alone; decode is somewhat slower.
      checked: raise where a page in use is out of range or a length does not fit the table: at once
        for concrete arrays, through ``jax.experimental.checkify`` for traced ones.  Otherwise such
        a page reads as zeros and the length is clipped.
      return_residual: also return the LSE.
      implementation: ``"cute"``, ``"xla"``, ``"reference"`` or None, as for
        ``flash_attention``.

    Returns:
      out (B, T, N, Hv) in the query's dtype; with ``return_residual``, ``(out, lse)`` with lse
      (B, T, N) in float32 (float64 for float64 operands).  With ``cu_seqlens_q``, (total, N, Hv)
      and (total, N).

    Raises:
      ValueError: an argument does not fit; it is named.
      NotImplementedError: the implementation asked for cannot serve the call, a derivative was
        asked for, or a vmap over the pages themselves.
    """
    spec, operands = _checked_paged_call(
        query,
        k_pages,
        v_pages,
        page_table,
        kv_lengths,
        q_lengths=q_lengths,
        cu_seqlens_q=cu_seqlens_q,
        max_q_length=max_q_length,
        q_offset=q_offset,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        mask_mod=mask_mod,
        score_mod=score_mod,
        batch_invariant=batch_invariant,
        checked=checked,
    )
    implementation = _known(implementation)
    if reason := _reason_against_invariance(spec, implementation):
        raise NotImplementedError(reason)
    residuals = autodiff.paged_attention(spec, operands, implementation)
    out, lse = residuals.out, residuals.lse
    if cu_seqlens_q is not None:
        total, ends = jnp.shape(query)[0], jnp.asarray(cu_seqlens_q, jnp.int32)
        out, lse = packed_rows(out, ends, total, 0), packed_rows(lse, ends, total, -jnp.inf)
    return (out, lse) if return_residual else out


def _checked_paged_call(
    query,
    k_pages,
    v_pages,
    page_table,
    kv_lengths,
    *,
    q_lengths,
    cu_seqlens_q,
    max_q_length,
    q_offset,
    batch_invariant,
    checked,
    **features,
) -> tuple[AttentionSpec, Operands]:
    """``checked_call`` of keys and values in pages; ``features``: what it takes as it is."""
    query, k_pages, v_pages, page_table = (
        jnp.asarray(x) for x in (query, k_pages, v_pages, page_table)
    )
    if cu_seqlens_q is not None:
        query, q_lengths = _rows_by_sequence(
            query, page_table, q_lengths, cu_seqlens_q, max_q_length, checked=checked
        )
    elif max_q_length is not None:
        raise ValueError(f"max_q_length goes with cu_seqlens_q alone; got {max_q_length}")
    _check_pages(query, k_pages, v_pages, page_table)
    B, T = query.shape[:2]
    num_pages, page_size = k_pages.shape[:2]
    lengths = _per_batch("kv_lengths", kv_lengths, B)
    if lengths is None:
        raise ValueError("kv_lengths must be integers; got None")
    if checked:
        _check_page_numbers(page_table, lengths, num_pages, page_size)
    lengths = jnp.clip(lengths, 0, page_table.shape[1] * page_size)
    rows = _per_batch("q_lengths", q_lengths, B)
    if q_offset is None:
        q_offset = lengths - (T if rows is None else jnp.clip(rows, 0, T))
    # Everything but the keys and values is checked as for arrays without any key.
    spec, operands = checked_call(
        query,
        jnp.zeros((B, 0, *k_pages.shape[2:]), k_pages.dtype),
        jnp.zeros((B, 0, *v_pages.shape[2:]), v_pages.dtype),
        bias=None,
        mask=None,
        q_offset=q_offset,
        query_seq_lengths=rows,
        key_value_seq_lengths=lengths,
        block_mask=None,
        segment_ids=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        positions=None,
        deterministic=None,
        **features,
    )
    spec = dataclasses.replace(spec, batch_invariant=bool(batch_invariant))
    table = page_table.astype(jnp.int32)
    return spec, dataclasses.replace(operands, key=k_pages, value=v_pages, page_table=table)


def _rows_by_sequence(query, page_table, q_lengths, cu_seqlens_q, max_q_length, *, checked):
    """Packed queries as (B, T, N, H), and how many of the rows are some."""
    if q_lengths is not None:
        raise ValueError("q_lengths must be left out where cu_seqlens_q is given; got both")
    if query.ndim != 3:
        raise ValueError(
            f"query must be (total, heads, head_dim) with cu_seqlens_q; got shape {query.shape}"
        )
    ends = jnp.asarray(cu_seqlens_q)
    if not jnp.issubdtype(ends.dtype, jnp.integer):
        raise ValueError(f"cu_seqlens_q must be integers; got dtype {ends.dtype.name}")
    if page_table.ndim == 2 and ends.shape != (page_table.shape[0] + 1,):
        raise ValueError(
            f"cu_seqlens_q must be (batch + 1 = {page_table.shape[0] + 1},); got shape {ends.shape}"
        )
    total = query.shape[0]
    if max_q_length is None and not isinstance(total, int):
        raise ValueError(
            "max_q_length must be given where the number of queries is known at run time only; "
            "got None"
        )
    length = total if max_q_length is None else max_q_length
    if not isinstance(length, (int, np.integer)) or length < 0:
        raise ValueError(f"max_q_length must be an integer that is not negative; got {length!r}")
    length = int(length)
    ends = ends.astype(jnp.int32)
    counts = ends[1:] - ends[:-1]
    if checked:
        _raise_where(
            jnp.any((counts < 0) | (counts > length)) | (ends[0] < 0) | (ends[-1] > total),
            f"cu_seqlens_q must rise within 0..{total}, by at most max_q_length={length}",
            f"{ends}",
        )
    counts = jnp.clip(counts, 0, length)
    if isinstance(total, int) and total == 0:
        return jnp.zeros((counts.shape[0], length, *query.shape[1:]), query.dtype), counts
    return rows_by_sequence(query, ends, length), counts


def _reason_against_invariance(spec: AttentionSpec, implementation: Implementation) -> str | None:
    if not spec.batch_invariant or implementation == "cute":
        return None
    return (
        f'batch_invariant needs implementation="cute"; got {implementation!r}, in which XLA '
        "chooses how sums are ordered by the size of the batch"
    )


def _check_pages(query, k_pages, v_pages, page_table) -> None:
    if query.ndim != 4:
        raise ValueError(f"query must be (batch, length, heads, head_dim); got {query.shape}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.ndim != 4 or pages.shape[:3] != k_pages.shape[:3]:
            raise ValueError(
                f"{name} must be (num_pages, page_size, heads, head_dim), alike for keys and "
                f"values; got shape {pages.shape}"
            )
    check_page_size(k_pages.shape[1])
    if page_table.ndim != 2 or page_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"page_table must be (batch={query.shape[0]}, max_pages); got shape {page_table.shape}"
        )
    if not jnp.issubdtype(page_table.dtype, jnp.integer):
        raise ValueError(f"page_table must be integers; got dtype {page_table.dtype.name}")


def _check_page_numbers(page_table, lengths, num_pages: int, page_size: int) -> None:
    """Raises for a page in use that is out of range, and for a length that does not fit."""
    first = jnp.arange(page_table.shape[1]) * page_size
    is_bad = (first < lengths[:, None]) & ((page_table < 0) | (page_table >= num_pages))
    is_unfit = (lengths < 0) | (lengths > page_table.shape[1] * page_size)
    got = f"{page_table} and lengths {lengths}"
    message = f"page_table must hold numbers from 0 to {num_pages - 1} in use"
    _raise_where(jnp.any(is_bad), message, got)
    _raise_where(jnp.any(is_unfit), "kv_lengths must be from 0 to max_pages * page_size", got)


def _raise_where(wrong: jax.Array, message: str, got: str) -> None:
    """Raises at once for concrete arrays, through ``checkify`` for traced ones."""
    if isinstance(wrong, Tracer):
        checkify.check(~wrong, message)
    elif wrong:
        raise ValueError(f"{message}; got {got}")


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation = None,
    return_residual: bool = False,
):
    """``jax.nn.dot_product_attention``, argument for argument, in linear memory.

    Two results are better defined than there: a row that sees no key gives 0 (and residual -inf),
    where ``jax.nn`` gives the mean of all values; and what stands beyond
    ``key_value_seq_lengths`` may be NaN.

    Args:
      query: (B, T, N, H) or (T, N, H).
      key: (B, S, K, H) or (S, K, H).
      value: as ``key``.
      bias: broadcastable to (B, N, T, S), added to the scaled scores.
      mask: booleans broadcastable to (B, N, T, S); False hides a key.
      scale: factor on the scores; 1 / sqrt(H) by default.
      is_causal: query row i sees keys ``kv <= i``.
      query_seq_lengths: (B,) int32; rows at or beyond give 0.
      key_value_seq_lengths: (B,) int32; keys at or beyond are invisible.
      local_window_size: ``(left, right)`` or one integer for both.
      implementation: as for ``flash_attention``.
      return_residual: also return the LSE (B, T, N), in the operands' dtype and, as in
        ``jax.nn``, without a gradient.

    Returns:
      An array of query's shape, or a pair of it and the LSE.

    Raises:
      ValueError: an argument does not fit; it is named.
      NotImplementedError: the implementation asked for cannot serve the call.
    """

    def four_dimensional(array: ArrayLike) -> jax.Array:
        array = jnp.asarray(array)
        return array.reshape((1,) * (4 - array.ndim) + array.shape)

    shape = jnp.shape(query)
    query, key, value = (four_dimensional(x) for x in (query, key, value))
    if value.shape != key.shape:
        raise ValueError(
            f"value must have the shape of key, {key.shape}, as in jax.nn; got {value.shape} "
            "(flash_attention takes another head_dim for value)"
        )
    if bias is not None:
        bias = jnp.asarray(bias)
        bias = bias if jnp.issubdtype(bias.dtype, jnp.floating) else bias.astype(jnp.float32)
    out, lse = flash_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residual=True,
    )
    out = out.reshape(shape)
    if return_residual:
        return out, lax.stop_gradient(lse.astype(out.dtype).reshape(shape[:-1]))
    return out


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call takes, and why.

    Attributes:
      implementation: what was asked for.
      forward: what serves the forward pass where the program is lowered for CUDA: ``"cute"``,
        ``"xla"``, ``"reference"``, or ``"refused"``.
      backward: what serves the backward pass there.
      forward_reasons: every reason why no kernel serves the forward pass; empty if one does.
      backward_reasons: likewise for the backward pass.
      elsewhere: what serves both on every other platform.
      keys: the intervals of keys that a position sees by ``is_causal``, the window and
        ``mask_mod``, such as ``"q - 127 <= kv < q + 1"`` or ``"kv < 4 or q - 127 <= kv < q + 1"``;
        None where they are not known to be intervals.
      tiles: what the forward kernel makes of those, Hopper's where there is no GPU:
        ``{"tile_m", "tile_n", "full", "partial", "skipped"}``, counted for one head; None where
        there is none, or where offsets or lengths known at run time alone decide.
      loads: the arrays that ``mask_mod`` and ``score_mod`` read, and how: ``"uniform"`` once a row,
        ``"contiguous"`` along the keys, or ``"gather"``.
      splits: parts into which the forward kernel divides the keys of a row at most, Hopper's where
        there is no GPU; shorter sequences have fewer.  None where no kernel serves the call.
      page_copies: how that kernel loads pages: ``"TMA"`` or ``"asynchronous copies"``; None
        without pages.
      lists: whether that kernel visits tiles by lists: ``"given"``, ``"made from mask_mod in the
        call"``, or ``"none"`` and why not.
    """

    implementation: Implementation
    forward: str
    backward: str
    forward_reasons: tuple[str, ...]
    backward_reasons: tuple[str, ...]
    elsewhere: str
    keys: str | None
    tiles: dict[str, int] | None
    loads: tuple[str, ...]
    splits: int | None = None
    page_copies: str | None = None
    lists: str = "none"

    def __str__(self) -> str:
        lines = [f"implementation={self.implementation!r}"]
        passes = (
            ("forward", self.forward, self.forward_reasons),
            ("backward", self.backward, self.backward_reasons),
        )
        for name, served_by, reasons in passes:
            lines.append(f"{name} on CUDA: {served_by}")
            if reasons:
                lines.append("  no kernel serves it:")
                lines.extend(f"  - {reason}" for reason in reasons)
        lines.append(f"forward and backward on other platforms: {self.elsewhere}")
        lines.append(f"keys seen: {self.keys or 'not known to be intervals'}")
        if self.tiles is not None:
            tiles = dict(self.tiles)
            size = f"{tiles.pop('tile_m')} x {tiles.pop('tile_n')}"
            counts = ", ".join(f"{count} {name}" for name, count in tiles.items())
            lines.append(f"tiles of {size} in a head: {counts}")
        if self.splits is not None and self.splits > 1:
            lines.append(f"keys of a row: divided into {self.splits} parts at most")
        if self.page_copies is not None:
            lines.append(f"pages: loaded by {self.page_copies}")
        if self.lists != "none":
            lines.append(f"lists of tiles: {self.lists}")
        lines.extend(self.loads)
        return "\n".join(lines)


def explain(
    query,
    key,
    value,
    *,
    bias=None,
    mask=None,
    packed_mask=None,
    scale: float | None = None,
    is_causal: bool = False,
    q_offset=0,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks=None,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    compress_factor: int | None = None,
    complete_only: bool = False,
    block_mask: Blocks = "auto",
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    positions: Positions = None,
    return_residual: bool = False,
    deterministic: bool | None = None,
    implementation: Implementation = None,
) -> Explanation:
    """Say which implementation ``flash_attention`` would take for these arguments, and why.

    Args are those of ``flash_attention``; arrays may be ``jax.ShapeDtypeStruct``.  Nothing is
    computed and no device is needed.

    Raises:
      ValueError: an argument does not fit; it is named.
    """
    del return_residual
    mask_mod = _with_compression(
        mask_mod, compress_factor, complete_only, is_causal, local_window_size
    )
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "packed_mask": packed_mask,
        "q_offset": q_offset,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "sinks": sinks,
        "block_mask": block_mask,
        "segment_ids": segment_ids,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    spec, operands = _abstract_call(
        checked_call,
        arrays,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        mask_mod=mask_mod,
        score_mod=score_mod,
        positions=positions,
        deterministic=deterministic,
    )
    return _explanation(spec, operands, _known(implementation))


def explain_paged_attention(
    query,
    k_pages,
    v_pages,
    page_table,
    kv_lengths,
    *,
    q_lengths=None,
    cu_seqlens_q=None,
    max_q_length: int | None = None,
    q_offset=None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks=None,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    batch_invariant: bool = False,
    checked: bool = False,
    return_residual: bool = False,
    implementation: Implementation = None,
) -> Explanation:
    """Say which implementation ``paged_attention`` would take for these arguments, and why.

    Args are those of ``paged_attention``; arrays may be ``jax.ShapeDtypeStruct``.  Nothing is
    computed and no device is needed.

    Raises:
      ValueError: an argument does not fit; it is named.
    """
    del checked, return_residual
    arrays = {
        "query": query,
        "k_pages": k_pages,
        "v_pages": v_pages,
        "page_table": page_table,
        "kv_lengths": kv_lengths,
        "q_lengths": q_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "q_offset": q_offset,
        "sinks": sinks,
    }
    spec, operands = _abstract_call(
        _checked_paged_call,
        arrays,
        max_q_length=max_q_length,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        mask_mod=mask_mod,
        score_mod=score_mod,
        batch_invariant=batch_invariant,
        checked=False,
    )
    return _explanation(spec, operands, _known(implementation))


def _abstract_call(
    make: Callable[..., tuple[AttentionSpec, Operands]], arrays: dict[str, Any], **options
) -> tuple[AttentionSpec, Operands]:
    """What ``make`` gives for arrays or their shapes, without computing anything."""
    static = {name: x for name, x in arrays.items() if x is None or isinstance(x, (int, str))}
    shaped = {name: x for name, x in arrays.items() if name not in static}
    specs = []

    def operands_of(shaped):
        spec, operands = make(**static, **shaped, **options)
        specs.append(spec)
        return operands

    operands = jax.eval_shape(operands_of, shaped)
    return specs[0], operands


def _explanation(
    spec: AttentionSpec, operands: Operands, implementation: Implementation
) -> Explanation:
    reasons = {
        direction: tuple(dispatch.reasons_against_kernel(spec, operands, direction))
        for direction in ("fwd", "bwd")
    }
    invariance = _reason_against_invariance(spec, implementation)

    def served_by(direction: str) -> str:
        if invariance or (operands.page_table is not None and direction == "bwd"):
            # Attention over pages has no derivatives, but for the reference's.
            return "reference" if implementation == "reference" and not invariance else "refused"
        match implementation:
            case None:
                return "xla" if reasons[direction] else "cute"
            case "cute":
                return "refused" if reasons[direction] else "cute"
            case _:
                return implementation

    elsewhere = {None: "xla", "cute": "refused"}.get(implementation, str(implementation))
    target = plan.target() or plan.Target("sm_90a", plan.DEFAULT_NUM_SMS)
    key = tiles = None
    if not reasons["fwd"]:
        key = registry.kernel_key(spec, operands, "fwd", target.arch, target.num_sms)
        tiles = registry.tile_counts(spec, operands, target.arch, target.num_sms)
    return Explanation(
        implementation=implementation,
        forward=served_by("fwd"),
        backward=served_by("bwd"),
        forward_reasons=(*([invariance] if invariance else []), *reasons["fwd"]),
        backward_reasons=reasons["bwd"],
        elsewhere="refused" if invariance else elsewhere,
        keys=registry.keys_of(spec, operands, target.arch),
        tiles=tiles,
        loads=tuple(_loads(spec)),
        splits=None if key is None else registry.splits_of(key, operands),
        page_copies=None if key is None else registry.page_copies(key),
        lists="none" if key is None else _lists(spec, operands, target.arch),
    )


def _lists(spec: AttentionSpec, operands: Operands, arch: str) -> str:
    """Whether the forward kernel visits tiles by lists, and why not where it might."""
    if operands.block_mask is not None:
        return "given"
    reasons = registry.reasons_against_making_lists(spec, operands, arch)
    if not reasons:
        return "made from mask_mod in the call"
    return f"none, for {' and '.join(reasons)}" if spec.may_make_lists else "none"


def _loads(spec: AttentionSpec) -> Iterator[str]:
    """How the arrays that a mask and a score close over are read, in words."""
    for name, function in (("mask_mod", spec.mask_mod), ("score_mod", spec.score_mod)):
        if function is not None:
            for load in analysis.loads(analysis.analyse(function.jaxpr)):
                shape = ", ".join(str(size) for size in load.shape)
                yield f"{name} reads {load.dtype}[{shape}]: {load.kind}"


def _known(implementation: Implementation) -> Implementation:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {list(IMPLEMENTATIONS)}; got {implementation!r}"
        )
    return implementation


def checked_call(
    query,
    key,
    value,
    *,
    bias,
    mask,
    scale,
    is_causal,
    q_offset,
    query_seq_lengths,
    key_value_seq_lengths,
    local_window_size,
    logits_soft_cap,
    sinks,
    mask_mod,
    score_mod,
    block_mask,
    segment_ids,
    cu_seqlens_q,
    cu_seqlens_k,
    positions,
    deterministic,
    packed_mask=None,
) -> tuple[AttentionSpec, Operands]:
    """The call's spec and operands, or a ValueError that names the argument."""
    query, key, value = _checked_inputs(query, key, value)
    B, T, N, H = query.shape
    S = key.shape[1]
    element_shape = (B, N, T, S)
    if scale is None:
        scale = 1.0 / math.sqrt(H)
    elif isinstance(scale, Tracer):
        query = (query * _scalar("scale", scale)).astype(query.dtype)
        scale = 1.0
    window = _checked_window(local_window_size)
    positional = is_causal or any(x is not None for x in (window, mask_mod, score_mod))
    segments = _checked_segments(
        segment_ids, cu_seqlens_q, cu_seqlens_k, positions, (B, T, S), positional=positional
    )
    if segments is not None:
        query = _zero_padding(query, segments.q_ids)
        key, value = (_zero_padding(x, segments.kv_ids) for x in (key, value))
    at_rows = isinstance(q_offset, int) and q_offset == 0 and segments is None
    has_lists = isinstance(block_mask, BlockMask)
    if packed_mask is None and at_rows and not has_lists:
        mask_mod, packed_mask = _words_of(mask_mod, element_shape)
    mask_mod_arrays = ()
    if mask_mod is not None:
        mask_mod, mask_mod_arrays = masks.trace_mask(mask_mod)
        # A listed full tile shows all of itself, whatever mask_mod says, so that stays whole.
        if not has_lists and _is_within(analysis.POSITION_LIMIT, T, S, q_offset):
            found, mask_mod, mask_mod_arrays = masks.split_window(mask_mod, mask_mod_arrays)
            sides = zip(window or (None, None), found, strict=True)
            left, right = (masks.smallest(pair) for pair in sides)
            window = None if left is None and right is None else (left, right)
    if score_mod is None:
        score_mod_arrays = ()
    else:
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        score_mod, score_mod_arrays = masks.trace_score(score_mod, dtype)
    indexed = mask_mod is not None or score_mod is not None
    spec = AttentionSpec(
        scale=float(_scalar("scale", scale)),
        is_causal=bool(is_causal),
        local_window_size=window,
        logits_soft_cap=_checked_cap(logits_soft_cap),
        deterministic=_follows_xla_flags() if deterministic is None else bool(deterministic),
        mask_mod=mask_mod,
        score_mod=score_mod,
        may_make_lists=isinstance(block_mask, str) and mask_mod is not None,
    )
    operands = Operands(
        query=query,
        key=key,
        value=value,
        q_offset=_per_batch("q_offset", q_offset, B),
        query_seq_lengths=_per_batch("query_seq_lengths", query_seq_lengths, B),
        key_value_seq_lengths=_per_batch("key_value_seq_lengths", key_value_seq_lengths, B),
        bias=_elementwise("bias", bias, jnp.floating, "floating point", element_shape),
        mask=_elementwise("mask", mask, jnp.bool_, "bool", element_shape),
        packed_mask=_checked_words(packed_mask, element_shape),
        sinks=_checked_sinks(sinks, N),
        batch_index=jnp.arange(B, dtype=jnp.int32) if indexed else None,
        mask_mod_arrays=mask_mod_arrays,
        score_mod_arrays=score_mod_arrays,
        segment_ids=segments,
        block_mask=_checked_block_mask(block_mask, element_shape),
    )
    return spec, operands


def _checked_inputs(query, key, value) -> tuple[jax.Array, jax.Array, jax.Array]:
    arrays = {"query": query, "key": key, "value": value}
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    query, key, value = arrays.values()
    for name, array in arrays.items():
        if array.ndim not in (3, 4):
            raise ValueError(
                f"{name} must be (batch, length, heads, head_dim) or (length, heads, head_dim); "
                f"got shape {array.shape}"
            )
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{name} must have a dtype of {_DTYPES}; got {array.dtype.name}")
        if array.ndim != query.ndim:
            raise ValueError(
                f"{name} must have as many dimensions as query, {query.ndim}; "
                f"got shape {array.shape}"
            )
        if array.dtype != query.dtype:
            raise ValueError(
                f"{name} must have query's dtype, {query.dtype.name}; got {array.dtype.name}"
            )
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    B, _, N, H = query.shape
    _, S, K, _ = key.shape
    if key.shape[0] != B or key.shape[3] != H:
        raise ValueError(
            f"key must have query's batch and head_dim, (batch={B}, head_dim={H}); "
            f"got (batch={key.shape[0]}, head_dim={key.shape[3]})"
        )
    if value.shape[:3] != (B, S, K):
        raise ValueError(
            f"value must have key's batch, length and heads, {(B, S, K)}; got {value.shape[:3]}"
        )
    if N == 0 or K == 0 or H == 0 or value.shape[3] == 0:
        raise ValueError(
            "query, key and value must have at least one head and one feature; got shapes "
            f"{query.shape}, {key.shape}, {value.shape}"
        )
    if N % K != 0:
        raise ValueError(f"query must have a multiple of key's {K} heads; got {N}")
    return query, key, value


def _scalar(name: str, value):
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar; got shape {jnp.shape(value)}")
    return value


def _checked_window(window: Window) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    sides = window if isinstance(window, (tuple, list)) else (window, window)
    if len(sides) != 2:
        raise ValueError(
            f"local_window_size must be an integer or a pair (left, right); got {window!r}"
        )
    for side in sides:
        if side is None:
            continue
        try:
            negative = side.__index__() < 0
        except AttributeError:
            negative = True
        if negative:
            raise ValueError(
                "local_window_size must hold integers of at least 0, or None for an open side; "
                f"got {window!r}"
            )
    left, right = (None if s is None or s >= _UNBOUNDED else int(s) for s in sides)
    return None if left is None and right is None else (left, right)


def _with_compression(mask_mod, compress_factor, complete_only, is_causal, local_window_size):
    """``mask_mod``, with the built-in mask of compressed keys where a call asks for it."""
    if compress_factor is None:
        if complete_only:
            raise ValueError("complete_only needs compress_factor; got None for it")
        return mask_mod
    excluded = {"is_causal": is_causal, "local_window_size": local_window_size is not None}
    for name, is_given in excluded.items():
        if is_given:
            raise ValueError(
                f"compress_factor excludes {name}: positions of queries and numbers of keys are "
                "in different units"
            )
    compressed = masks.compressed_causal(compress_factor, complete_only=complete_only)
    return compressed if mask_mod is None else compressed & mask_mod


def _is_within(limit: int, *positions) -> bool:
    """Whether all numbers that are known while tracing are; lengths and offsets that are not
    known until run time are taken to be."""
    return all(abs(p) < limit for p in positions if isinstance(p, int))


def _checked_cap(cap: float | None) -> float | None:
    if cap is None:
        return None
    cap = float(cap)
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"logits_soft_cap must be a positive number or None; got {cap}")
    return cap


def _per_batch(name: str, array, B) -> jax.Array | None:
    """Integers, scalar or (B,), as (B,) int32; None where they say nothing."""
    if array is None or (name == "q_offset" and isinstance(array, int) and array == 0):
        return None
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers; got dtype {array.dtype.name}")
    if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != B):
        raise ValueError(f"{name} must be a scalar or ({B},); got shape {array.shape}")
    return jnp.broadcast_to(array.astype(jnp.int32), (B,))


def _elementwise(name: str, array, kind, kind_name: str, full_shape) -> jax.Array | None:
    """A bias or a mask, as (1|B, 1|N, 1|T, 1|S)."""
    if array is None:
        return None
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} must be {kind_name}; got dtype {array.dtype.name}")
    shape = (1,) * (4 - array.ndim) + array.shape
    fits = len(shape) == 4 and all(
        length in (1, full) for length, full in zip(shape, full_shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} must broadcast to (batch, heads, query length, key length) = {full_shape}; "
            f"got shape {array.shape}"
        )
    return array.reshape(shape)


def _words_of(mask_mod, element_shape):
    """``(mask_mod, packed_mask)``: ``masks.from_bits`` alone, as the latter where it fits."""
    words = mask_mod.words if isinstance(mask_mod, masks.Mask) else None
    if words is None:
        return mask_mod, None
    B, N, T, S = element_shape
    shape = words.shape
    fits = shape[0] in (1, B) and shape[1] in (1, N) and shape[2:] == (T, -(-S // 32))
    return (None, words) if fits else (mask_mod, None)


def _checked_words(words, element_shape) -> jax.Array | None:
    if words is None:
        return None
    words = jnp.asarray(words)
    *full, S = element_shape
    full = (*full, -(-S // 32))
    fits = words.ndim == 4 and words.shape[3] == full[3] and words.dtype == jnp.uint32
    fits = fits and all(n in (1, length) for n, length in zip(words.shape, full, strict=True))
    if not fits:
        raise ValueError(
            "packed_mask must be uint32 of shape (1 or batch, 1 or heads, 1 or query length, "
            f"ceil(key length / 32)), here up to {full}; got {words.dtype.name} of shape "
            f"{words.shape}"
        )
    return words


def _checked_segments(
    segment_ids, cu_seqlens_q, cu_seqlens_k, positions, shape, *, positional: bool
) -> Segments | None:
    """Segments from ids or boundaries, for (B, T, S); None where the call has none."""
    if positions not in (None, "sequence", "segment"):
        raise ValueError(f'positions must be "sequence", "segment" or None; got {positions!r}')
    if segment_ids is None and cu_seqlens_q is None and cu_seqlens_k is None:
        if positions == "segment":
            raise ValueError('positions="segment" needs segment_ids or cu_seqlens_q')
        return None
    B, T, S = shape
    if segment_ids is not None:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise ValueError("segment_ids and cu_seqlens_q cannot be given together")
        name, given, is_pair = "segment_ids", segment_ids, isinstance(segment_ids, (tuple, list))
        pair = tuple(given) if is_pair else (given, given)
        if len(pair) != 2:
            raise ValueError(
                f"segment_ids must be one array or a pair for query and key; got {len(pair)} arrays"
            )
    else:
        if cu_seqlens_q is None:
            raise ValueError("cu_seqlens_k must be given together with cu_seqlens_q")
        name, is_pair = "cu_seqlens_q", cu_seqlens_k is not None
        pair = (cu_seqlens_q, cu_seqlens_k if is_pair else cu_seqlens_q)
    if not is_pair and T != S:
        raise ValueError(
            f"{name} alone holds for query and key, which must have one length; got {T} and {S}"
        )
    if is_pair and positional and positions is None:
        raise ValueError(
            'positions must be "segment" or "sequence" where query and key have segments of their '
            "own and a mask or a score reads positions; got None"
        )
    per_segment = positions == "segment"
    is_empty = any(isinstance(length, int) and length == 0 for length in (T, S))
    if segment_ids is not None:
        q_ids = _ids("segment_ids", pair[0], B, T)
        kv_ids = _ids("segment_ids", pair[1], B, S) if is_pair else q_ids
        return None if is_empty else segments_of_ids(q_ids, kv_ids, per_segment=per_segment)
    boundaries = _checked_boundaries(pair, B)
    if is_empty:
        return None
    return segments_of_boundaries(*boundaries, T, S, per_segment=per_segment)


def _ids(name: str, array, B: int, length: int) -> jax.Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers; got dtype {array.dtype.name}")
    if array.shape not in ((length,), (1, length), (B, length)):
        raise ValueError(f"{name} must be ({B}, {length}) or ({length},); got {array.shape}")
    return jnp.broadcast_to(array.astype(jnp.int32), (B, length))


def _checked_boundaries(pair, B: int) -> tuple[jax.Array, jax.Array]:
    """``cu_seqlens_q`` and ``cu_seqlens_k`` as (B, segments + 1) int32."""
    boundaries = []
    for name, array in zip(("cu_seqlens_q", "cu_seqlens_k"), pair, strict=True):
        array = jnp.asarray(array)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers; got dtype {array.dtype.name}")
        if array.ndim not in (1, 2) or array.shape[-1] < 1 or array.shape[:-1] not in ((), (B,)):
            raise ValueError(
                f"{name} must be (segments + 1,) or ({B}, segments + 1); got shape {array.shape}"
            )
        boundaries.append(jnp.broadcast_to(array.astype(jnp.int32), (B, array.shape[-1])))
    if boundaries[0].shape != boundaries[1].shape:
        raise ValueError(
            "cu_seqlens_k must have as many segments as cu_seqlens_q, "
            f"{boundaries[0].shape[1] - 1}; got {boundaries[1].shape[1] - 1}"
        )
    return boundaries[0], boundaries[1]


def _zero_padding(array: jax.Array, ids: jax.Array) -> jax.Array:
    """Zeros in the rows of (B, rows, heads, features) that are padding: they may hold NaN."""
    return jnp.where(ids[:, :, None, None] >= 0, array, jnp.zeros((), array.dtype))


def _checked_block_mask(block_mask, element_shape) -> BlockMask | None:
    if block_mask is None or (isinstance(block_mask, str) and block_mask == "auto"):
        return None
    if not isinstance(block_mask, BlockMask):
        raise ValueError(
            'block_mask must be a BlockMask, such as make_block_mask gives, "auto" or None; '
            f"got {type(block_mask).__name__}"
        )
    B, N, T, S = element_shape
    if (block_mask.q_length, block_mask.kv_length) != (T, S):
        raise ValueError(
            f"block_mask must be made for query length {T} and key length {S}; "
            f"got one for {block_mask.q_length} and {block_mask.kv_length}"
        )
    for array in jax.tree.leaves(block_mask):
        b, n = array.shape[:2]
        if b not in (1, B) or n not in (1, N):
            raise ValueError(
                f"block_mask must have batch 1 or {B} and heads 1 or {N}; got batch {b}, heads {n}"
            )
    return block_mask


def _checked_sinks(sinks, N: int) -> jax.Array | None:
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"sinks must be floating point; got dtype {sinks.dtype.name}")
    if sinks.shape != (N,):
        raise ValueError(f"sinks must have one value per query head, ({N},); got {sinks.shape}")
    return sinks.astype(jnp.promote_types(sinks.dtype, jnp.float32))[None]


def _follows_xla_flags() -> bool:
    """Whether XLA itself has been told to be deterministic on GPUs."""
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    on = ("", "=true", "=True", "=1")
    flags = os.environ.get("XLA_FLAGS", "").split()
    return any(flag == name + value for flag in flags for name in names for value in on)
