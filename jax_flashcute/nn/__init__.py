"""Attention for Flax: ``attention_fn`` for its modules, and a module with a cache of its own.

``make_attention_fn`` needs no Flax; ``FlashAttention`` and ``KVCache`` do.
"""

from typing import TYPE_CHECKING, Any

from jax_flashcute.nn.attention_fn import make_attention_fn

if TYPE_CHECKING:
    from jax_flashcute.nn.modules import FlashAttention, KVCache

__all__ = ["FlashAttention", "KVCache", "make_attention_fn"]


def __getattr__(name: str) -> Any:
    if name in ("FlashAttention", "KVCache"):
        from jax_flashcute.nn import modules

        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
