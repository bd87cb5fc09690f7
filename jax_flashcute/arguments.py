"""Arguments of the public calls are checked and given one form here, and nowhere else."""

import dataclasses
import math
import operator
import os
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from jax_flashcute import analysis, masks
from jax_flashcute.block_mask import BlockMask
from jax_flashcute.dispatch import IMPLEMENTATIONS, Implementation
from jax_flashcute.given import flag, numbers, whole
from jax_flashcute.paged import checked_page_size
from jax_flashcute.segments import (
    Segments,
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
    is_causal = flag("is_causal", is_causal)
    positional = is_causal or any(x is not None for x in (window, mask_mod, score_mod))
    segments = _checked_segments(
        segment_ids, cu_seqlens_q, cu_seqlens_k, positions, (B, T, S), positional=positional
    )
    query_seq_lengths = _per_batch("query_seq_lengths", query_seq_lengths, B)
    key_value_seq_lengths = _per_batch("key_value_seq_lengths", key_value_seq_lengths, B)
    by_boundaries = segments is not None and segment_ids is None
    if by_boundaries:
        # Padding lies behind the last boundary, which is a length: nothing is copied to clear it.
        ends = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        key_value_seq_lengths = _up_to(ends, key_value_seq_lengths, B)
        # Rows beyond a length have no sink.
        if sinks is None:
            query_seq_lengths = _up_to(cu_seqlens_q, query_seq_lengths, B)
    elif segments is not None:
        key, value = (_zero_padding(x, segments.kv_ids) for x in (key, value))
    if segments is not None and (sinks is not None or not by_boundaries):
        query = _zero_padding(query, segments.q_ids)
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
        scale=_number("scale", scale),
        is_causal=is_causal,
        local_window_size=window,
        logits_soft_cap=_checked_cap(logits_soft_cap),
        deterministic=(
            follows_xla_flags() if deterministic is None else flag("deterministic", deterministic)
        ),
        mask_mod=mask_mod,
        score_mod=score_mod,
        may_make_lists=isinstance(block_mask, str) and mask_mod is not None,
    )
    operands = Operands(
        query=query,
        key=key,
        value=value,
        q_offset=_per_batch("q_offset", q_offset, B),
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
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


def checked_paged_call(
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
    checked = flag("checked", checked)
    arrays = {"query": query, "k_pages": k_pages, "v_pages": v_pages, "page_table": page_table}
    query, k_pages, v_pages, page_table = (numbers(*item) for item in arrays.items())
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
    rows = _per_batch("q_lengths", q_lengths, B)
    of_positions = (features[name] for name in ("local_window_size", "mask_mod", "score_mod"))
    if q_offset is None and T == 1 and rows is None and all(x is None for x in of_positions):
        # The last token sees every key: nothing asks where it is.
        features["is_causal"] = False
    elif q_offset is None:
        keys = jnp.clip(lengths, 0, page_table.shape[1] * page_size)
        q_offset = keys - (T if rows is None else jnp.clip(rows, 0, T))
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
    spec = dataclasses.replace(spec, batch_invariant=flag("batch_invariant", batch_invariant))
    table = page_table.astype(jnp.int32)
    return spec, dataclasses.replace(operands, key=k_pages, value=v_pages, page_table=table)


def known_implementation(implementation: Implementation) -> Implementation:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {list(IMPLEMENTATIONS)}; got {implementation!r}"
        )
    return implementation


def reason_against_invariance(spec: AttentionSpec, implementation: Implementation) -> str | None:
    if not spec.batch_invariant or implementation == "cute":
        return None
    return (
        f'batch_invariant needs implementation="cute"; got {implementation!r}, in which XLA '
        "chooses how sums are ordered by the size of the batch"
    )


def _rows_by_sequence(query, page_table, q_lengths, cu_seqlens_q, max_q_length, *, checked):
    """Packed queries as (B, T, N, H), and how many of the rows are some."""
    if q_lengths is not None:
        raise ValueError("q_lengths must be left out where cu_seqlens_q is given; got both")
    if query.ndim != 3:
        raise ValueError(
            f"query must be (total, heads, head_dim) with cu_seqlens_q; got shape {query.shape}"
        )
    ends = numbers("cu_seqlens_q", cu_seqlens_q)
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
    length = whole("max_q_length", length, 0)
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


def _check_pages(query, k_pages, v_pages, page_table) -> None:
    if query.ndim != 4:
        raise ValueError(f"query must be (batch, length, heads, head_dim); got {query.shape}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.ndim != 4 or pages.shape[:3] != k_pages.shape[:3]:
            raise ValueError(
                f"{name} must be (num_pages, page_size, heads, head_dim), alike for keys and "
                f"values; got shape {pages.shape}"
            )
        if pages.dtype != query.dtype:
            raise ValueError(
                f"{name} must have query's dtype, {query.dtype.name}; got {pages.dtype.name}"
            )
    if k_pages.shape[3] != query.shape[3]:
        raise ValueError(
            f"k_pages must have query's head_dim, {query.shape[3]}; got {k_pages.shape[3]}"
        )
    checked_page_size(k_pages.shape[1])
    for name, of_what, size in (
        ("k_pages", "page", k_pages.shape[0]),
        ("page_table", "page for each sequence", page_table.shape[-1] if page_table.ndim else 1),
    ):
        if isinstance(size, int) and size == 0:
            raise ValueError(f"{name} must have room for at least one {of_what}; got none")
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


def _checked_inputs(query, key, value) -> tuple[jax.Array, jax.Array, jax.Array]:
    arrays = {"query": query, "key": key, "value": value}
    arrays = {name: numbers(name, array) for name, array in arrays.items()}
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


def _int32(name: str, value) -> jax.Array:
    """Integers as int32; those of the host that do not fit are refused."""
    if isinstance(value, (int, np.integer, np.ndarray)) and np.size(value):
        least, most = np.min(value), np.max(value)
        limits = np.iinfo(np.int32)
        if least < limits.min or most > limits.max:
            raise ValueError(f"{name} must be integers of 32 bits; got {least} to {most}")
    array = numbers(name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers; got dtype {array.dtype.name}")
    return array.astype(jnp.int32)


def _number(name: str, value) -> float:
    """A number that is part of the program."""
    try:
        return float(_scalar(name, value))
    except (TypeError, ValueError) as error:
        what = "a scalar" if np.ndim(value) else "a number, known while tracing"
        raise ValueError(f"{name} must be {what}; got {value!r}") from error


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
            is_length = operator.index(side) >= 0
        except TypeError:
            is_length = False
        if not is_length:
            raise ValueError(
                "local_window_size must hold integers of at least 0, known while tracing, or None "
                f"for an open side; got {window!r}"
            )
    left, right = (None if s is None or s >= _UNBOUNDED else int(s) for s in sides)
    return None if left is None and right is None else (left, right)


def with_compression(mask_mod, compress_factor, complete_only, is_causal, local_window_size):
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
    cap = _number("logits_soft_cap", cap)
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"logits_soft_cap must be a positive number or None; got {cap}")
    return cap


def _per_batch(name: str, array, B) -> jax.Array | None:
    """Integers, scalar or (B,), as (B,) int32; None where they say nothing."""
    if array is None or (name == "q_offset" and isinstance(array, int) and array == 0):
        return None
    array = _int32(name, array)
    if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != B):
        raise ValueError(f"{name} must be a scalar or ({B},); got shape {array.shape}")
    return jnp.broadcast_to(array, (B,))


def _elementwise(name: str, array, kind, kind_name: str, full_shape) -> jax.Array | None:
    """A bias or a mask, as (1|B, 1|N, 1|T, 1|S)."""
    if array is None:
        return None
    array = numbers(name, array)
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
    words = numbers("packed_mask", words)
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
    array = _int32(name, array)
    if array.shape not in ((length,), (1, length), (B, length)):
        raise ValueError(f"{name} must be ({B}, {length}) or ({length},); got {array.shape}")
    return jnp.broadcast_to(array, (B, length))


def _checked_boundaries(pair, B: int) -> tuple[jax.Array, jax.Array]:
    """``cu_seqlens_q`` and ``cu_seqlens_k`` as (B, segments + 1) int32."""
    boundaries = []
    for name, array in zip(("cu_seqlens_q", "cu_seqlens_k"), pair, strict=True):
        parts = jax.tree.leaves(array) if isinstance(array, (list, tuple)) else [array]
        is_known = all(isinstance(x, (int, np.integer, np.ndarray)) for x in parts)
        if is_known and np.ndim(array) and np.any(np.diff(array) < 0):
            raise ValueError(f"{name} must not decrease; got {array}")
        array = _int32(name, array)
        if array.ndim not in (1, 2) or array.shape[-1] < 1 or array.shape[:-1] not in ((), (B,)):
            raise ValueError(
                f"{name} must be (segments + 1,) or ({B}, segments + 1); got shape {array.shape}"
            )
        boundaries.append(jnp.broadcast_to(array, (B, array.shape[-1])))
    if boundaries[0].shape != boundaries[1].shape:
        raise ValueError(
            "cu_seqlens_k must have as many segments as cu_seqlens_q, "
            f"{boundaries[0].shape[1] - 1}; got {boundaries[1].shape[1] - 1}"
        )
    return boundaries[0], boundaries[1]


def _up_to(boundaries, lengths: jax.Array | None, B: int) -> jax.Array:
    """(B,) lengths that end at the last boundary, or before."""
    ends = jnp.broadcast_to(jnp.asarray(boundaries)[..., -1].astype(jnp.int32), (B,))
    return ends if lengths is None else jnp.minimum(lengths, ends)


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
    sinks = numbers("sinks", sinks)
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"sinks must be floating point; got dtype {sinks.dtype.name}")
    if sinks.shape != (N,):
        raise ValueError(f"sinks must have one value per query head, ({N},); got {sinks.shape}")
    return sinks.astype(jnp.promote_types(sinks.dtype, jnp.float32))[None]


def follows_xla_flags() -> bool:
    """Whether XLA itself has been told to be deterministic on GPUs."""
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    on = ("", "=true", "=True", "=1")
    flags = os.environ.get("XLA_FLAGS", "").split()
    return any(flag == name + value for flag in flags for name in names for value in on)
