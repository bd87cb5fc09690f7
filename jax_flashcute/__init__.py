"""FlashAttention for JAX: attention that is exact, fast and linear in memory."""

from jax_flashcute import masks, scores
from jax_flashcute.api import (
    Explanation,
    dot_product_attention,
    explain,
    flash_attention,
    paged_attention,
)
from jax_flashcute.spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "Explanation",
    "dot_product_attention",
    "explain",
    "flash_attention",
    "masks",
    "paged_attention",
    "scores",
]
