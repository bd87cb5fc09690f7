"""Which blocks of keys the rows of a query tile see: scores by means, the top of them, lists."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashcute.block_mask import BlockMask
from jax_flashcute.nsa.compression import block_means
from jax_flashcute.nsa.config import NSAConfig
from jax_flashcute.nsa.packing import Tiling, whole
from jax_flashcute.promotion import of_any_rank

# Query tiles whose scores against all blocks exist at once.
_TILES_AT_ONCE = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Selection:
    """The blocks that each query tile sees, for each key/value head and its group of query heads.

    Attributes:
      counts: (B, K, tiles) int32.
      indices: (B, K, tiles, width) int32: ascending as far as ``counts`` says, no block twice; 0
        beyond.
    """

    counts: jax.Array
    indices: jax.Array


def query_tile_means(
    query: jax.Array, kv_heads: int, query_tile: int, counts: jax.Array | None = None
) -> jax.Array:
    """The mean query of a tile and of the heads that share a key/value head.

    Args:
      query: (B, T, N, H).
      kv_heads: K.
      query_tile: rows of a tile; the last tile's mean is over the rows that it has.
      counts: (1|B, tiles) integers: the mean is over so many first rows of each tile; None for all.

    Returns:
      (B, K, tiles, H) float32.
    """
    B, _, N, H = query.shape
    means = block_means(query, query_tile, counts)
    means = jnp.mean(means.reshape(B, -1, kv_heads, N // kv_heads, H), axis=3)
    return jnp.swapaxes(means, 1, 2)


def score_blocks(tile_means: jax.Array, compressed_key: jax.Array, scale: float) -> jax.Array:
    """``scale * tile_means[b, k, i] . compressed_key[b, j, k]``, in float32.

    The mean over rows (and heads) of ``q . k`` is the mean query's product with k, at a fraction
    of the work.

    Args:
      tile_means: (B, K, tiles, H), as ``query_tile_means`` gives them.
      compressed_key: (B, blocks, K, H).
      scale: factor on the scores.

    Returns:
      (B, K, tiles, blocks).
    """
    scores = jnp.einsum(
        "bkih,bjkh->bkij",
        tile_means,
        compressed_key.astype(tile_means.dtype),
        precision=lax.Precision.HIGHEST,
    )
    return scale * scores


@of_any_rank
def select_blocks(
    query: jax.Array,
    compressed_key: jax.Array,
    config: NSAConfig,
    *,
    kv_length: int,
    scale: float,
    is_causal: bool = True,
    tiling: Tiling | None = None,
) -> Selection:
    """The blocks of highest score for each query tile, with its own (and the first) forced in.

    Candidates of tile i are, if causal, the blocks that begin before the tile ends,
    ``j * block < (i + 1) * query_tile``, else all.  The blocks that overlap the tile are forced
    in, and so is block 0 with ``config.force_first``; the highest scores fill up to
    ``config.num_selected``, the lowest index first among equals.  Not differentiable: gradients
    are zero.  Memory is that of the result and of the scores of 64 tiles.

    Args:
      query: (B, T, N, H).
      compressed_key: (B, ceil(S / block), K, H).
      config: sizes.
      kv_length: S.
      scale: factor on the scores.
      is_causal: whether later blocks are no candidates.
      tiling: which rows, and keys of which sequence, a tile has; None for one of full length.  A
        tile's candidates are blocks of its own sequence, whose first block takes block 0's place.

    Raises:
      ValueError: N is no multiple of K.
    """
    query, compressed_key = lax.stop_gradient((query, compressed_key))
    if query.shape[2] % compressed_key.shape[2]:
        raise ValueError(
            f"query must have a multiple of compressed_key's {compressed_key.shape[2]} heads; "
            f"got {query.shape[2]}"
        )
    tile, block, blocks = config.query_tile, config.block, compressed_key.shape[1]
    row_counts = None
    if tiling is None:
        tiling = whole(config, query.shape[1], kv_length)
    else:
        row_counts = tiling.row_counts(tile)
    means = query_tile_means(query, compressed_key.shape[2], tile, row_counts)
    # A tile of rows overlaps at most so many blocks; the first block comes on top.
    most_forced = -(-(tile - 1) // block) + 1 + config.force_first
    width = min(blocks, max(config.num_selected, most_forced))
    j = jnp.arange(blocks)

    def of_tile(arguments):
        i, rows_end, keys_start, keys_end = arguments
        scores = score_blocks(lax.dynamic_slice_in_dim(means, i, 1, axis=2), compressed_key, scale)
        rows_end, keys_start, keys_end = (x[:, None] for x in (rows_end, keys_start, keys_end))
        last = rows_end if is_causal else keys_end
        candidate = (j * block >= keys_start) & (j * block < last) & (rows_end > i * tile)
        forced = (j * block < jnp.minimum(rows_end, keys_end)) & ((j + 1) * block > i * tile)
        if config.force_first:
            forced = forced | (j * block == keys_start)
        forced = forced & candidate
        scores = jnp.where(candidate[:, None], scores[:, :, 0], -jnp.inf)
        scores = jnp.where(forced[:, None], jnp.inf, scores)
        values, indices = lax.top_k(scores, width)
        wanted = jnp.maximum(config.num_selected, jnp.sum(forced, axis=-1))
        kept = (jnp.arange(width) < wanted[:, None, None]) & (values > -jnp.inf)
        ascending = jnp.sort(jnp.where(kept, indices, blocks), axis=-1)
        return jnp.sum(kept, axis=-1), jnp.where(ascending < blocks, ascending, 0)

    tiles = means.shape[2]
    ranges = (x.T for x in (tiling.rows_end, tiling.keys_start, tiling.keys_end))
    counts, indices = lax.map(
        of_tile, (jnp.arange(tiles), *ranges), batch_size=min(_TILES_AT_ONCE, tiles)
    )
    return Selection(
        counts=jnp.moveaxis(counts, 0, 2).astype(jnp.int32),
        indices=jnp.moveaxis(indices, 0, 2).astype(jnp.int32),
    )


def to_block_mask(
    selection: Selection,
    config: NSAConfig,
    *,
    q_heads: int,
    q_length: int,
    kv_length: int,
    tile_n: int | None = None,
) -> BlockMask:
    """The selected blocks as full tiles of a ``BlockMask`` for every query head.

    Args:
      selection: as ``select_blocks`` gives it.
      config: sizes; ``tile_m`` of the result is ``config.query_tile``.
      q_heads: N, a multiple of the selection's key/value heads.
      q_length: T.
      kv_length: S.
      tile_n: keys of a tile; a divisor of ``config.block``, which is the default.

    Raises:
      ValueError: ``tile_n`` does not divide ``config.block``: a tile would show keys of blocks
        that are not selected; or ``q_heads`` is no multiple of the selection's heads.
    """
    if q_heads < 1 or q_heads % selection.counts.shape[1]:
        raise ValueError(
            f"q_heads must be a multiple of the selection's {selection.counts.shape[1]} heads; "
            f"got {q_heads}"
        )
    tile_n = config.block if tile_n is None else tile_n
    if tile_n < 1 or config.block % tile_n:
        raise ValueError(f"tile_n must divide config.block, {config.block}; got {tile_n}")
    per_block = config.block // tile_n
    tiles = -(-kv_length // tile_n)
    indices = selection.indices[..., None] * per_block + jnp.arange(per_block, dtype=jnp.int32)
    indices = indices.reshape(*indices.shape[:-2], -1)
    listed = jnp.arange(indices.shape[-1]) < selection.counts[..., None] * per_block
    # The last block may have fewer tiles than others; it stands last.
    counts = jnp.sum(listed & (indices < tiles), axis=-1, dtype=jnp.int32)
    indices = jnp.where(listed & (indices < tiles), indices, 0)
    group = q_heads // selection.counts.shape[1]
    counts, indices = (jnp.repeat(x, group, axis=1) for x in (counts, indices))
    return BlockMask.from_indices(
        jnp.zeros((1, 1, counts.shape[2]), jnp.int32),
        jnp.zeros((1, 1, counts.shape[2], 0), jnp.int32),
        counts,
        indices,
        q_length=q_length,
        kv_length=kv_length,
        tile_m=config.query_tile,
        tile_n=tile_n,
    )
