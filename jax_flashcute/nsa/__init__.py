"""Native sparse attention (Yuan et al., 2025, arXiv:2502.11089) and the pieces it is made of."""

from jax_flashcute.nsa.attention import native_sparse_attention
from jax_flashcute.nsa.compression import compress_kv
from jax_flashcute.nsa.config import NSAConfig
from jax_flashcute.nsa.gating import gate
from jax_flashcute.nsa.selection import (
    Selection,
    query_tile_means,
    score_blocks,
    select_blocks,
    to_block_mask,
)

__all__ = [
    "NSAConfig",
    "Selection",
    "compress_kv",
    "gate",
    "native_sparse_attention",
    "query_tile_means",
    "score_blocks",
    "select_blocks",
    "to_block_mask",
]
