"""FlashAttention for JAX: attention that is exact, fast and linear in memory."""

from jax_flashcute import masks, scores
from jax_flashcute.api import dot_product_attention, flash_attention, paged_attention
from jax_flashcute.block_mask import BlockMask, make_block_mask
from jax_flashcute.context import (
    context_parallel_attention,
    permute_sequence,
    permuted_positions,
    restore_sequence,
)
from jax_flashcute.explanation import Explanation, explain, explain_paged_attention
from jax_flashcute.paged import OutOfPagesError, PageAllocator, PagedKVCache
from jax_flashcute.show import MaskPicture, show_mask
from jax_flashcute.spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "BlockMask",
    "Explanation",
    "MaskPicture",
    "OutOfPagesError",
    "PageAllocator",
    "PagedKVCache",
    "context_parallel_attention",
    "dot_product_attention",
    "explain",
    "explain_paged_attention",
    "flash_attention",
    "make_block_mask",
    "masks",
    "paged_attention",
    "permute_sequence",
    "permuted_positions",
    "restore_sequence",
    "scores",
    "show_mask",
]
