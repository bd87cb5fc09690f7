"""Blockwise attention in XLA, for every platform: memory linear in the sequence lengths.

Scores exist one (block_q, block_kv) tile at a time, with an online softmax forward (Milakov and
Gimelshein, 2018) and recomputation from the LSE backward (Dao, 2023).  Tiles that causality, the
window or the lengths hide from the whole batch are skipped; with a ``block_mask``, those that it
lists for no batch and no head.

Inside, everything query-like is laid out as (num_q, B, K, G * block_q, ...) and everything
key-like as (num_kv, B, K, block_kv, ...): a tile is then one plain batched matrix product, and
the G query heads of a key head are rows of it.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashcute.block_mask import BlockMask, compact
from jax_flashcute.spec import AttentionSpec, Operands, Residuals
from jax_flashcute.tile_kinds import FULL, HIDDEN
from jax_flashcute.visibility import (
    element_indices,
    key_block_range,
    paged_rows,
    query_block_range,
    unpacked,
    visible,
    zero_beyond,
)

# Elements of one tile of scores over all heads and batches.  On a CPU, 4 MiB in float32 stay in a
# core's cache: at 16 MiB, training steps of small models took twice as long (2 cores of an EPYC).
# An accelerator starts several kernels per tile and wants few, large ones.
_TILE_ELEMENTS_CPU = 2**20
_TILE_ELEMENTS_ACCELERATOR = 2**24
_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 1024


def forward(spec: AttentionSpec, operands: Operands) -> Residuals:
    """Attention; see ``reference.attention`` for the semantics, which are the same."""
    return _by_platform(functools.partial(_forward, spec), operands)


def backward(
    spec: AttentionSpec,
    operands: Operands,
    residuals: Residuals,
    dout: jax.Array,
    dlse: jax.Array,
) -> Operands:
    """Gradients of ``forward``, whichever implementation computed the residuals.

    Args:
      spec: the static part of the call.
      operands: its arrays.
      residuals: out (B, T, N, Hv) and lse (B, T, N) of the forward pass.
      dout: (B, T, N, Hv), the cotangent of out.
      dlse: (B, T, N), the cotangent of lse.

    Returns:
      ``Operands`` with the gradients of query, key, value, bias, sinks and the floating-point
      arrays of score_mod, each in its operand's shape and dtype, and None for all others.
    """
    return _by_platform(functools.partial(_backward, spec), operands, residuals, dout, dlse)


def _by_platform(function, *arguments):
    """``function(tile_elements, *arguments)`` with what suits the platform lowered for."""
    return lax.platform_dependent(
        *arguments,
        cpu=functools.partial(function, _TILE_ELEMENTS_CPU),
        default=functools.partial(function, _TILE_ELEMENTS_ACCELERATOR),
    )


@functools.partial(jax.jit, static_argnames=("spec", "tile_elements"))
def _forward(spec: AttentionSpec, tile_elements: int, operands: Operands) -> Residuals:
    tiles = _Tiles.of(operands, tile_elements)
    dtype = _statistics_dtype(operands)
    query = tiles.split_q(zero_beyond(operands.query, operands.query_seq_lengths))
    key_block, value_block = tiles.kv_blocks(operands)
    value = operands.value
    bias, mask = (tiles.pad_elements(x) for x in (operands.bias, operands.mask))
    listed = _Listed.of(operands.block_mask)
    zero = _varying_zero(operands, dtype)

    def attend(i, results):
        q_i = _at(query, i)
        rows = q_i.shape[:-1]

        def accumulate(j, carry, kinds=None):
            acc, row_max, row_sum = carry
            score = _matmul_transposed(q_i, key_block(j), dtype) * spec.scale
            score, _ = tiles.modified(score, i, j, spec, operands)
            score, _ = _capped(spec, score)
            score = tiles.on_elements(score, i, j, spec, operands, bias, mask, kinds)
            new_max = jnp.maximum(row_max, jnp.max(score, axis=-1, keepdims=True))
            # Until a key is visible the maximum is -inf, and -inf - -inf is NaN.
            shift = jnp.where(new_max == -jnp.inf, 0, new_max)
            weight = jnp.exp(score - shift)
            shrink = jnp.exp(row_max - shift)
            row_sum = row_sum * shrink + jnp.sum(weight, axis=-1, keepdims=True)
            acc = acc * shrink + _matmul(weight.astype(value.dtype), value_block(j), dtype)
            return acc, new_max, row_sum

        row_max, row_sum = zero - jnp.inf, zero
        if operands.sinks is not None:
            row_max = tiles.per_head_rows(operands.sinks.astype(dtype))
            row_sum = jnp.where(row_max == -jnp.inf, 0, 1).astype(dtype) + zero
        carry = (
            jnp.broadcast_to(zero, (*rows, value.shape[-1])),
            jnp.broadcast_to(row_max + zero, (*rows, 1)),
            jnp.broadcast_to(row_sum, (*rows, 1)),
        )
        first_q = i * tiles.block_q
        if listed is not None:
            acc, row_max, row_sum = listed.over_keys(i, accumulate, carry)
        else:
            start, stop = key_block_range(
                spec, operands, first_q, first_q + tiles.block_q - 1, tiles.block_kv, tiles.num_kv
            )
            acc, row_max, row_sum = _loop(start, stop, tiles.num_kv, accumulate, carry)
        empty = row_sum == 0
        row_sum = jnp.where(empty, 1, row_sum)
        lse = jnp.where(empty, -jnp.inf, row_max + jnp.log(row_sum))
        out = (acc / row_sum).astype(value.dtype)
        return _put(results[0], i, out), _put(results[1], i, lse)

    shape = query.shape[:-1]
    results = (
        jnp.broadcast_to(zero.astype(value.dtype), (*shape, value.shape[-1])),
        jnp.broadcast_to(zero, (*shape, 1)),
    )
    out, lse = _loop(0, tiles.num_q, tiles.num_q, attend, results)
    out, lse = tiles.join_q(out), tiles.join_q(lse)[..., 0]
    if operands.query_seq_lengths is not None:
        padded = ~zero_beyond(jnp.ones(lse.shape, bool), operands.query_seq_lengths)
        out = jnp.where(padded[..., None], 0, out)
        lse = jnp.where(padded, -jnp.inf, lse)
    return Residuals(out=out, lse=lse)


@functools.partial(jax.jit, static_argnames=("spec", "tile_elements"))
def _backward(
    spec: AttentionSpec,
    tile_elements: int,
    operands: Operands,
    residuals: Residuals,
    dout: jax.Array,
    dlse: jax.Array,
) -> Operands:
    tiles = _Tiles.of(operands, tile_elements)
    dtype = _statistics_dtype(operands)
    dout, lse, delta = residuals.row_statistics(dout, dlse, dtype)

    query = tiles.split_q(zero_beyond(operands.query, operands.query_seq_lengths))
    key = tiles.split_kv(zero_beyond(operands.key, operands.key_value_seq_lengths))
    value = tiles.split_kv(zero_beyond(operands.value, operands.key_value_seq_lengths))
    bias, mask = (tiles.pad_elements(x) for x in (operands.bias, operands.mask))
    douts = tiles.split_q(dout)
    # Tiles are transposed here, keys by queries, so that four of the five products need no
    # transposition of a tile; row statistics lie along the last axis.
    lses = jnp.swapaxes(tiles.split_q(lse[..., None], fill=jnp.inf), -1, -2)
    deltas = jnp.swapaxes(tiles.split_q(delta[..., None]), -1, -2)
    listed = _Listed.of(operands.block_mask, transposed=True)
    zero = _varying_zero((operands, dout, dlse), dtype)

    def key_block(j, carry):
        dquery, dkey, dvalue, dbias, dmod = carry

        def accumulate(i, carry, kinds=None):
            dquery, dk, dv, dbias, dmod = carry
            q_i, k_j, do_i = _at(query, i), _at(key, j), _at(douts, i)
            score = _matmul_transposed(k_j, q_i, dtype) * spec.scale
            score, score_vjp = tiles.modified(score, i, j, spec, operands, transposed=True)
            score, slope = _capped(spec, score)
            score = tiles.on_elements(
                score, i, j, spec, operands, bias, mask, kinds, transposed=True
            )
            weight = jnp.exp(score - _at(lses, i))
            dv = dv + _matmul(weight.astype(do_i.dtype), do_i, dtype)
            dweight = _matmul_transposed(_at(value, j), do_i, dtype)
            dscore = weight * (dweight - _at(deltas, i))
            if dbias is not None:
                dbias = tiles.add_to_elements(dbias, i, j, dscore)
            if slope is not None:
                dscore = dscore * slope
            if score_vjp is not None:
                dscore, darrays = score_vjp(dscore)
                dmod = jax.tree.map(lambda total, d: total + d.astype(dtype), dmod, darrays)
            dscore = dscore.astype(q_i.dtype)
            dk = dk + _matmul(dscore, q_i, dtype)
            dq = _matmul(jnp.swapaxes(dscore, -1, -2), k_j, dtype)
            return _put(dquery, i, _at(dquery, i) + dq), dk, dv, dbias, dmod

        first_kv = j * tiles.block_kv
        carry = (
            dquery,
            jnp.broadcast_to(zero, key.shape[1:]),
            jnp.broadcast_to(zero, value.shape[1:]),
            dbias,
            dmod,
        )
        if listed is not None:
            carry = listed.over_queries(j, accumulate, carry)
        else:
            start, stop = query_block_range(
                spec, operands, first_kv, first_kv + tiles.block_kv - 1, tiles.block_q, tiles.num_q
            )
            carry = _loop(start, stop, tiles.num_q, accumulate, carry)
        dquery, dk, dv, dbias, dmod = carry
        dk = (dk * spec.scale).astype(key.dtype)
        dkey, dvalue = _put(dkey, j, dk), _put(dvalue, j, dv.astype(value.dtype))
        return dquery, dkey, dvalue, dbias, dmod

    carry = (
        jnp.broadcast_to(zero, query.shape),
        jnp.broadcast_to(zero.astype(key.dtype), key.shape),
        jnp.broadcast_to(zero.astype(value.dtype), value.shape),
        None if bias is None else jnp.broadcast_to(zero, bias.shape),
        [jnp.broadcast_to(zero, x.shape) for x in _floating(operands.score_mod_arrays)],
    )
    dquery, dkey, dvalue, dbias, dmod = _loop(0, tiles.num_kv, tiles.num_kv, key_block, carry)
    dsinks = None
    if operands.sinks is not None:
        dsinks = _sink_gradient(operands.sinks, lse, delta)
    if dbias is not None and operands.bias is not None:
        T, S = operands.bias.shape[2:]
        dbias = dbias[:, :, :T, :S].astype(operands.bias.dtype)
    gradients = Operands(
        query=(tiles.join_q(dquery) * spec.scale).astype(operands.query.dtype),
        key=tiles.join_kv(dkey),
        value=tiles.join_kv(dvalue),
        bias=dbias,
        sinks=dsinks,
    )
    return dataclasses.replace(
        gradients,
        mask_mod_arrays=(None,) * len(operands.mask_mod_arrays),
        score_mod_arrays=_with_floating(
            (None,) * len(operands.score_mod_arrays), operands.score_mod_arrays, dmod
        ),
    )


def sink_gradient(
    operands: Operands, residuals: Residuals, dout: jax.Array, dlse: jax.Array
) -> jax.Array | None:
    """The gradient of ``operands.sinks``, from what ``backward`` gets; None where there are none.

    A sink is a key without a value, so its score's gradient is -P delta.
    """
    if operands.sinks is None:
        return None
    _, lse, delta = residuals.row_statistics(dout, dlse, _statistics_dtype(operands))
    return _sink_gradient(operands.sinks, lse, delta)


def _sink_gradient(sinks: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    dsink = -jnp.exp(sinks.astype(lse.dtype)[:, None, :] - lse) * delta
    axes = (1,) if sinks.shape[0] == lse.shape[0] else (0, 1)
    return jnp.sum(dsink, axis=axes).reshape(sinks.shape).astype(sinks.dtype)


def _statistics_dtype(operands: Operands):
    return jnp.promote_types(operands.query.dtype, jnp.float32)


def _matmul(a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    return jnp.einsum("bkrx,bkxy->bkry", a, b, preferred_element_type=dtype)


def _matmul_transposed(a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    return jnp.einsum("bkrx,bkyx->bkry", a, b, preferred_element_type=dtype)


def _floating(arrays: tuple[jax.Array, ...]) -> list[jax.Array]:
    return [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]


def _with_floating(values, arrays: tuple[jax.Array, ...], floating):
    """``values`` with those of ``floating``, in order and dtype, where ``arrays`` are so."""
    rest = iter(floating)
    return tuple(
        next(rest).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else value
        for value, x in zip(values, arrays, strict=True)
    )


def _capped(spec: AttentionSpec, score: jax.Array):
    """The capped score, and the slope of the cap (None without one)."""
    if spec.logits_soft_cap is None:
        return score, None
    bounded = jnp.tanh(score / spec.logits_soft_cap)
    return spec.logits_soft_cap * bounded, 1 - bounded * bounded


def _loop(start, stop, count, body, carry):
    """``fori_loop``; of a loop that can have one turn at most only the turn is left.

    A turn outside of ``start..stop`` changes nothing but time: its keys are all masked.
    """
    if isinstance(count, int) and count == 1:
        return body(0, carry)
    if not (isinstance(start, int) and isinstance(stop, int)):
        start, stop = jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)
    return lax.fori_loop(start, stop, body, carry)


def _at(array: jax.Array, index) -> jax.Array:
    return lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _put(array: jax.Array, index, block: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, block, index, 0)


def _varying_zero(tree, dtype) -> jax.Array:
    """A scalar 0 that varies over the mesh axes of all of ``tree``, inside a ``shard_map``.

    Loop carries built from it have the type that the loop body gives them.  Sums over nothing
    carry that type and read no data.
    """
    zero = jnp.zeros((), dtype)
    return sum((jnp.sum(x[:0].astype(dtype)) for x in jax.tree.leaves(tree)), zero)


@dataclass(frozen=True)
class _Listed:
    """The tiles of a ``BlockMask`` that one loop visits, by tile row or, transposed, by key tile.

    All batches and heads share a loop, so it visits what any of them lists.

    Attributes:
      kinds: (1|B, 1|N, M, key tiles), as ``BlockMask.kinds`` gives them.
      full: counts and indices of the tiles that are full in every batch and head.
      other: likewise of those that hide something from some.
    """

    kinds: jax.Array
    full: tuple[jax.Array, jax.Array]
    other: tuple[jax.Array, jax.Array]

    @staticmethod
    def of(block_mask: BlockMask | None, *, transposed: bool = False) -> "_Listed | None":
        if block_mask is None:
            return None
        kinds = block_mask.kinds()
        full = jnp.all(kinds == FULL, axis=(0, 1))
        other = jnp.any(kinds != HIDDEN, axis=(0, 1)) & ~full
        if transposed:
            full, other = full.T, other.T
        return _Listed(kinds, compact(full), compact(other))

    def over_keys(self, i, accumulate, carry):
        """``accumulate(j, carry, kinds)`` over the key tiles of tile row i.

        ``kinds`` is (1|B, 1|N), None where the tile is full everywhere.
        """
        return self._over(i, accumulate, carry, lambda j: self.kinds[:, :, i, j])

    def over_queries(self, j, accumulate, carry):
        """``accumulate(i, carry, kinds)`` over the tile rows that see key tile j."""
        return self._over(j, accumulate, carry, lambda i: self.kinds[:, :, i, j])

    def _over(self, row, accumulate, carry, kinds_of):
        counts, indices = (_at(x, row) for x in self.full)

        def without_mask(turn, carry):
            return accumulate(_at(indices, turn), carry)

        carry = lax.fori_loop(0, counts, without_mask, carry)
        other_counts, other_indices = (_at(x, row) for x in self.other)

        def with_mask(turn, carry):
            tile = _at(other_indices, turn)
            return accumulate(tile, carry, kinds_of(tile))

        return lax.fori_loop(0, other_counts, with_mask, carry)


@dataclass(frozen=True)
class _Tiles:
    """How one call is cut into tiles; dimensions may be symbolic (``jax.export``)."""

    B: int
    T: int
    S: int
    K: int
    G: int
    block_q: int
    block_kv: int

    @staticmethod
    def of(operands: Operands, tile_elements: int) -> "_Tiles":
        B, T, N, _ = operands.query.shape
        S, K = operands.kv_length, operands.key.shape[2]
        if operands.block_mask is not None:
            tile_m, tile_n = operands.block_mask.tile_m, operands.block_mask.tile_n
            return _Tiles(B=B, T=T, S=S, K=K, G=N // K, block_q=tile_m, block_kv=tile_n)
        largest = _LARGEST_BLOCK
        products = B * N if isinstance(B, int) and isinstance(N, int) else 64
        while largest > _SMALLEST_BLOCK and products * largest * largest > tile_elements:
            largest //= 2
        return _Tiles(
            B=B,
            T=T,
            S=S,
            K=K,
            G=N // K,
            block_q=_even_block(T, largest),
            block_kv=_even_block(S, largest),
        )

    @property
    def num_q(self):
        return _at_least_one(-(-self.T // self.block_q))

    @property
    def num_kv(self):
        return _at_least_one(-(-self.S // self.block_kv))

    def split_q(self, array: jax.Array, fill: float = 0) -> jax.Array:
        """(B, T, N, X) -> (num_q, B, K, G * block_q, X); rows beyond T hold ``fill``."""
        array = _pad(array, 1, self.num_q * self.block_q, fill)
        X = array.shape[-1]
        array = array.reshape(self.B, self.num_q, self.block_q, self.K, self.G, X)
        array = array.transpose(1, 0, 3, 4, 2, 5)
        return array.reshape(self.num_q, self.B, self.K, self.G * self.block_q, X)

    def join_q(self, blocks: jax.Array) -> jax.Array:
        """The inverse of ``split_q``."""
        X = blocks.shape[-1]
        blocks = blocks.reshape(self.num_q, self.B, self.K, self.G, self.block_q, X)
        blocks = blocks.transpose(1, 0, 4, 2, 3, 5)
        array = blocks.reshape(self.B, self.num_q * self.block_q, self.K * self.G, X)
        return array[:, : self.T]

    def split_kv(self, array: jax.Array) -> jax.Array:
        """(B, S, K, X) -> (num_kv, B, K, block_kv, X); rows beyond S hold 0."""
        array = _pad(array, 1, self.num_kv * self.block_kv, 0)
        array = array.reshape(self.B, self.num_kv, self.block_kv, self.K, array.shape[-1])
        return array.transpose(1, 0, 3, 2, 4)

    def kv_blocks(self, operands: Operands):
        """Two functions of j, (B, K, block_kv, X) each: a block of keys and one of values.

        Paged ones are gathered block by block, so that they never stand in memory as a whole.
        """

        def blocks(array: jax.Array):
            if operands.page_table is None:
                split = self.split_kv(zero_beyond(array, operands.key_value_seq_lengths))
                return lambda j: _at(split, j)
            rows = jnp.arange(self.block_kv)
            return lambda j: jnp.swapaxes(
                paged_rows(array, operands, j * self.block_kv + rows), 1, 2
            )

        return blocks(operands.key), blocks(operands.value)

    def join_kv(self, blocks: jax.Array) -> jax.Array:
        """The inverse of ``split_kv``."""
        blocks = blocks.transpose(1, 0, 3, 2, 4)
        array = blocks.reshape(self.B, self.num_kv * self.block_kv, self.K, blocks.shape[-1])
        return array[:, : self.S]

    def per_head_rows(self, array: jax.Array) -> jax.Array:
        """(1|B, N) -> (1|B, K, G * block_q, 1): a value per head, for every row of a tile."""
        b = array.shape[0]
        array = array.reshape(b, self.K, self.G, 1)
        array = jnp.broadcast_to(array, (b, self.K, self.G, self.block_q))
        return array.reshape(b, self.K, self.G * self.block_q, 1)

    def pad_elements(self, array: jax.Array | None) -> jax.Array | None:
        """A bias or mask (1|B, 1|N, 1|T, 1|S), its full dimensions padded to whole blocks."""
        if array is None:
            return None
        if self._full(array, 2):
            array = _pad(array, 2, self.num_q * self.block_q, 0)
        if self._full(array, 3):
            array = _pad(array, 3, self.num_kv * self.block_kv, 0)
        return array

    def modified(
        self, score: jax.Array, i, j, spec: AttentionSpec, operands: Operands, *, transposed=False
    ):
        """``score_mod`` of tile (i, j), and its transposed derivative (None without one).

        The derivative maps the tile's cotangent to that of ``score`` and those of the floating
        ``operands.score_mod_arrays``.
        """
        function = spec.score_mod
        if function is None:
            return score, None
        indices = self._indices(i, j, operands, transposed)
        grouped = jnp.broadcast_shapes(*(x.shape for x in indices))
        grouped = (self.B, *grouped[1:])
        arrays = operands.score_mod_arrays

        def apply(score, floating):
            given = _with_floating(arrays, arrays, floating)
            result = function(given, score.reshape(grouped), *indices)
            return jnp.broadcast_to(result, grouped).reshape(score.shape).astype(score.dtype)

        return jax.vjp(apply, score, _floating(arrays))

    def _indices(self, i, j, operands: Operands, transposed: bool):
        """``b, h, q_idx, kv_idx`` of tile (i, j), to broadcast to (B, K, G, block_q, block_kv)

        or, transposed, to (B, K, block_kv, G, block_q).
        """
        head = jnp.arange(self.K * self.G).reshape(self.K, self.G)
        q_idx = i * self.block_q + jnp.arange(self.block_q)
        kv_idx = j * self.block_kv + jnp.arange(self.block_kv)
        if transposed:
            head, kv_idx = head[:, None, :, None], kv_idx[:, None, None]
        else:
            head, q_idx = head[:, :, None, None], q_idx[:, None]
        return element_indices(operands, head, q_idx, kv_idx)

    def on_elements(
        self, score, i, j, spec, operands, bias, mask, kinds, *, transposed: bool = False
    ) -> jax.Array:
        """``score`` of tile (i, j) plus its bias, -inf where hidden.

        Args:
          score: (B, K, G * block_q, block_kv), or (B, K, block_kv, G * block_q) if transposed.
          i: query block.
          j: key block.
          spec: the static part of the call.
          operands: its arrays.
          bias: ``operands.bias`` as ``pad_elements`` gives it.
          mask: ``operands.mask`` as ``pad_elements`` gives it.
          kinds: (1|B, 1|N), what the block mask says of the tile; None where it shows all of it.
          transposed: whether ``score`` is.
        """

        def placed(element: jax.Array) -> jax.Array:
            return element.transpose(0, 1, 4, 2, 3) if transposed else element

        seen = self._seen(i, j, spec, operands)
        if mask is not None:
            mask = self._element_tile(mask, i, j)
            seen = mask if seen is None else seen & mask
        if operands.packed_mask is not None:
            bits = self._unpacked_tile(operands.packed_mask, i, j)
            seen = bits if seen is None else seen & bits
        mask_mod = spec.mask_mod
        full = None
        if operands.block_mask is not None:
            if kinds is None:
                mask_mod = None
            else:
                heads = (1, 1) if kinds.shape[1] == 1 else (self.K, self.G)
                kinds = kinds.reshape(-1, *heads, 1, 1)
                full = placed(kinds == FULL)
                seen = (kinds != HIDDEN) if seen is None else seen & (kinds != HIDDEN)
        if bias is None and seen is None and mask_mod is None:
            return score
        grouped = (self.block_kv, self.G, self.block_q)
        grouped = grouped if transposed else (self.G, self.block_q, self.block_kv)
        tile = score.reshape(self.B, self.K, *grouped)
        if bias is not None:
            tile = tile + placed(self._element_tile(bias, i, j)).astype(score.dtype)
        if seen is not None:
            tile = jnp.where(placed(seen), tile, -jnp.inf)
        if mask_mod is not None:
            indices = self._indices(i, j, operands, transposed)
            shown = mask_mod(operands.mask_mod_arrays, *indices)
            tile = jnp.where(shown if full is None else shown | full, tile, -jnp.inf)
        return tile.reshape(score.shape)

    def _unpacked_tile(self, words: jax.Array, i, j) -> jax.Array:
        """Tile (i, j) of a packed mask, like ``_element_tile``'s."""
        rows = i * self.block_q + jnp.arange(self.block_q)
        bits = unpacked(words, rows, j * self.block_kv + jnp.arange(self.block_kv))
        heads = (1, 1) if bits.shape[1] == 1 else (self.K, self.G)
        return bits.reshape(bits.shape[0], *heads, *bits.shape[2:])

    def add_to_elements(self, array: jax.Array, i, j, tile: jax.Array) -> jax.Array:
        """Add a transposed tile's values to a padded (1|B, 1|N, 1|T, 1|S) array, reduced to it."""
        tile = tile.reshape(self.B, self.K, self.block_kv, self.G, self.block_q)
        tile = tile.transpose(0, 1, 3, 4, 2)
        tile = tile.reshape(self.B, self.K * self.G, self.block_q, self.block_kv)
        target = lax.dynamic_slice(array, self._element_start(array, i, j), self._size(array))
        axes = tuple(axis for axis in range(4) if target.shape[axis] != tile.shape[axis])
        target = target + jnp.sum(tile, axis=axes, keepdims=True)
        return lax.dynamic_update_slice(array, target, self._element_start(array, i, j))

    def _seen(self, i, j, spec: AttentionSpec, operands: Operands) -> jax.Array | None:
        """Booleans (1|B, 1, 1, block_q, block_kv), or None where the rules hide nothing.

        Padded query rows are left to the callers, who need not spend a comparison per element.
        """
        q_idx = i * self.block_q + jnp.arange(self.block_q)[None, :, None]
        kv_idx = j * self.block_kv + jnp.arange(self.block_kv)[None, None, :]
        rules = dataclasses.replace(operands, query_seq_lengths=None)
        bounded = spec.is_causal or spec.local_window_size is not None
        seen = None
        bounded = bounded or operands.segment_ids is not None
        if bounded or operands.key_value_seq_lengths is not None:
            seen = visible(spec, rules, q_idx, kv_idx)
        if not (isinstance(self.S, int) and self.num_kv * self.block_kv == self.S):
            inside = (kv_idx < self.S)[None, None]
            seen = inside if seen is None else seen & inside
        return seen

    def _full(self, array: jax.Array, axis: int) -> bool:
        length = (self.T, self.S)[axis - 2]
        # With one row or key in all, broadcast and full are the same, up to padding.
        return array.shape[axis] == length and not (isinstance(length, int) and length == 1)

    def _size(self, array: jax.Array) -> tuple[int, ...]:
        rows = 1 if self._single(array, 2) else self.block_q
        columns = 1 if self._single(array, 3) else self.block_kv
        return (*array.shape[:2], rows, columns)

    def _single(self, array: jax.Array, axis: int) -> bool:
        return isinstance(array.shape[axis], int) and array.shape[axis] == 1

    def _element_start(self, array: jax.Array, i, j):
        row = 0 if self._single(array, 2) else i * self.block_q
        column = 0 if self._single(array, 3) else j * self.block_kv
        # With 64-bit types, a loop between Python's numbers counts in others than one of bounds.
        return tuple(jnp.asarray(x, jnp.int32) for x in (0, 0, row, column))

    def _element_tile(self, array: jax.Array, i, j) -> jax.Array:
        """Tile (i, j) of a padded bias or mask, as (1|B, 1|K, 1|G, 1|block_q, 1|block_kv)."""
        tile = lax.dynamic_slice(array, self._element_start(array, i, j), self._size(array))
        b, n = tile.shape[:2]
        heads = (1, 1) if n == 1 else (self.K, self.G)
        return tile.reshape(b, *heads, *tile.shape[2:])


def _even_block(length, largest: int) -> int:
    """At most ``largest``, such that the last block is nearly full; a multiple of 16, or all."""
    if not isinstance(length, int):
        return min(largest, 256)
    blocks = max(1, -(-length // largest))
    even = -(-length // blocks)
    return max(1, min(length, -(-even // 16) * 16))


def _at_least_one(count):
    return max(count, 1) if isinstance(count, int) else count


def _pad(array: jax.Array, axis: int, length, fill: float) -> jax.Array:
    """``array`` with ``fill`` appended along ``axis`` up to ``length``."""
    if isinstance(length, int) and array.shape[axis] == length:
        return array
    low_high = [(0, 0, 0)] * array.ndim
    low_high[axis] = (0, length - array.shape[axis], 0)
    return lax.pad(array, jnp.asarray(fill, array.dtype), low_high)
