"""The public calls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_flashcute import autodiff
from jax_flashcute.arguments import (
    Blocks,
    Positions,
    Window,
    checked_call,
    checked_paged_call,
    known_implementation,
    reason_against_invariance,
    with_compression,
)
from jax_flashcute.dispatch import Implementation
from jax_flashcute.segments import packed_rows


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

    A row that sees no key gives output 0, LSE -inf and zero gradients.  Scores may hide keys by
    -inf or by large numbers; a row that sees none otherwise, whose LSE is below -2^24 in float32,
    has zero gradients too.

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
        padding, which sees nothing, is seen by none, and may hold NaN.  Ids need not be sorted, and
        padding may stand anywhere: it is cleared in copies, where XLA cannot fuse that with what
        makes the arrays.  Of ids that ascend from 0, with padding as n behind them, boundaries
        ``jnp.searchsorted(ids, jnp.arange(n + 1))`` say the same, and nothing is copied.
      cu_seqlens_q: (n + 1,) or (B, n + 1) integers, not decreasing: segment i is rows
        ``cu_seqlens_q[i]`` up to ``cu_seqlens_q[i + 1]``, which may be none; rows outside of all
        are padding.  n, the most segments there can be, is static; fill up with the last value.
        What stands behind the last boundary may hold NaN; before the first, which is 0 as a rule,
        it may not.  In place of ``segment_ids``.
      cu_seqlens_k: likewise for the keys; left out, those of the query.
      positions: what masks and scores see: ``"sequence"``, positions in the whole sequence, or
        ``"segment"``, positions that start at 0 in every segment (``q_offset`` is added to those
        of rows).  None is ``"sequence"``, but where query and key have segments of their own and
        something reads positions, one must be named.
      return_residual: also return the LSE, which is differentiable.
      deterministic: gradients are bit-identical between runs.  None follows
        ``--xla_gpu_deterministic_ops`` in ``XLA_FLAGS``, without which, on a GPU, the XLA path's
        gradients of arrays that ``score_mod`` indexes are not.  Gradients of ``bias`` and of such
        arrays are then sums in fixed point: one that is not finite makes its whole array NaN.
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
        mask_mod=with_compression(
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
    residuals = autodiff.attention(spec, operands, known_implementation(implementation))
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
    table beyond the length are never used.  The kernels read pages where they lie, but for pages of
    1 to 16 on Hopper that 32 tiles of queries or more visit: these are gathered as the kernel goes,
    into arrays as large as the table has room for, 512 MiB at most.  On the XLA path they are
    gathered a block at a time.  It has no derivatives, but for ``"reference"``.

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
    spec, operands = checked_paged_call(
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
    implementation = known_implementation(implementation)
    if reason := reason_against_invariance(spec, implementation):
        raise NotImplementedError(reason)
    residuals = autodiff.paged_attention(spec, operands, implementation)
    out, lse = residuals.out, residuals.lse
    if cu_seqlens_q is not None:
        total, ends = jnp.shape(query)[0], jnp.asarray(cu_seqlens_q, jnp.int32)
        out, lse = packed_rows(out, ends, total, 0), packed_rows(lse, ends, total, -jnp.inf)
    return (out, lse) if return_residual else out


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
