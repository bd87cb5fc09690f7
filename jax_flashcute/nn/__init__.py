"""Attention for Flax: ``attention_fn`` for its modules, and modules of its own.

``make_attention_fn`` needs no Flax; the modules ``FlashAttention``, ``KVCache`` and
``NativeSparseAttention`` do.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jax_flashcute.nn.attention_fn import make_attention_fn

if TYPE_CHECKING:
    from jax_flashcute.nn.modules import FlashAttention, KVCache
    from jax_flashcute.nn.native_sparse_attention import NativeSparseAttention

__all__ = ["FlashAttention", "KVCache", "NativeSparseAttention", "make_attention_fn"]

_MODULES = {
    "FlashAttention": "modules",
    "KVCache": "modules",
    "NativeSparseAttention": "native_sparse_attention",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
