"""vmap: a mapped axis becomes part of the batch, so that one call serves all of it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jax_flashcute.spec import Operands, Residuals

# Operands whose batch dimension may be 1 and then holds for the whole batch.
_SHARED_MASKS = ("mask", "packed_mask", "mask_mod_arrays", "block_mask")
_BROADCAST = (*_SHARED_MASKS, "bias", "sinks", "score_mod_arrays")


def fold_forward(function: Callable[[Operands], Residuals]) -> Callable[[Operands], Residuals]:
    """``function`` with a vmap rule that folds the mapped axis into the batch dimension."""
    folded = custom_vmap(function)

    @folded.def_vmap
    def rule(axis_size, in_batched, operands):  # pyright: ignore[reportUnusedFunction]
        (batched,) = in_batched if isinstance(in_batched, (list, tuple)) else (in_batched,)
        B = operands.query.shape[1 if batched.query else 0]
        fold = _Fold(axis_size, B)
        residuals = folded(fold.operands(operands, batched, shared=_BROADCAST))
        residuals = jax.tree.map(fold.undo, residuals)
        return residuals, jax.tree.map(lambda _: True, residuals)

    return folded


def fold_backward(
    function: Callable[[Operands, Residuals, jax.Array, jax.Array], Operands],
) -> Callable[[Operands, Residuals, jax.Array, jax.Array], Operands]:
    """Likewise for a backward pass ``(operands, residuals, dout, dlse) -> gradients``.

    Each element of the mapped axis gets gradients of its own, so an operand that has a gradient
    is never shared between them.
    """
    folded = custom_vmap(function)

    @folded.def_vmap
    def rule(axis_size, in_batched, operands, *others):  # pyright: ignore[reportUnusedFunction]
        batched, *others_batched = in_batched
        B = operands.query.shape[1 if batched.query else 0]
        fold = _Fold(axis_size, B)
        others = jax.tree.map(fold.array, tuple(others), tuple(others_batched))
        gradients = folded(
            fold.operands(operands, batched, shared=_SHARED_MASKS),
            *others,
        )
        unfolded = {}
        for name in gradients.present():
            unfolded[name] = jax.tree.map(
                fold.undo_gradient,
                getattr(gradients, name),
                getattr(operands, name),
                getattr(batched, name),
                is_leaf=lambda gradient: gradient is None,
            )
        gradients = dataclasses.replace(gradients, **unfolded)
        return gradients, jax.tree.map(lambda _: True, gradients)

    return folded


@dataclasses.dataclass(frozen=True)
class _Fold:
    """A mapped axis of ``axis_size`` in front of a batch of ``B``."""

    axis_size: int
    B: int

    def array(self, array: jax.Array, batched: bool) -> jax.Array:
        """(axis_size, 1|B, ...) if batched, else (1|B, ...), to (axis_size * B, ...)."""
        if not batched:
            array = array[None]
        shape = (self.axis_size, self.B, *array.shape[2:])
        return jnp.broadcast_to(array, shape).reshape(self.axis_size * self.B, *shape[2:])

    def operands(self, operands: Operands, batched: Operands, shared: tuple[str, ...]) -> Operands:
        """Every operand folded, but for those in ``shared`` that are one for the whole batch."""

        is_paged = operands.page_table is not None
        if is_paged and (batched.key or batched.value):
            raise NotImplementedError("vmap of paged_attention over pages: map queries and tables")

        def unless_shared(name: str, array: jax.Array, is_batched: bool) -> jax.Array:
            if is_paged and name in ("key", "value"):
                return array
            if name in shared and not is_batched and array.shape[0] == 1:
                return array
            return self.array(array, is_batched)

        folded = {
            name: jax.tree.map(
                functools.partial(unless_shared, name),
                getattr(operands, name),
                getattr(batched, name),
            )
            for name in operands.present()
        }
        return dataclasses.replace(operands, **folded)

    def undo(self, array: jax.Array) -> jax.Array:
        """(axis_size * B, ...) to (axis_size, B, ...)."""
        return array.reshape(self.axis_size, self.B, *array.shape[1:])

    def undo_gradient(
        self, gradient: jax.Array | None, operand: jax.Array, batched: bool
    ) -> jax.Array | None:
        """The gradient of an operand whose batch dimension is 1 or B; None has none."""
        if gradient is None:
            return None
        b = operand.shape[1 if batched else 0]
        gradient = self.undo(gradient)
        return gradient if b == self.B else jnp.sum(gradient, axis=1, keepdims=True)
