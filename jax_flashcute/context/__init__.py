"""Context parallelism: one sequence over the devices of a mesh axis, exactly."""

from jax_flashcute.context.attention import context_parallel_attention
from jax_flashcute.context.order import (
    ORDERS,
    permute_sequence,
    permuted_positions,
    restore_sequence,
)
from jax_flashcute.context.steps import METHODS

__all__ = [
    "METHODS",
    "ORDERS",
    "context_parallel_attention",
    "permute_sequence",
    "permuted_positions",
    "restore_sequence",
]
