"""Which implementation serves a call, and the call itself.

``"cute"``, ``"xla"`` and ``"reference"`` are used or refused, never replaced.  ``None`` takes the
kernel where a program is lowered for CUDA and a kernel can serve the call, and the XLA path
everywhere else; forward and backward choose on their own, because they share their residuals.
"""

import dataclasses
import functools
from typing import Literal

import jax
from jax import lax

from jax_flashcute import plan, reference, xla
from jax_flashcute.spec import AttentionSpec, Operands, Residuals

Direction = Literal["fwd", "bwd"]
Implementation = Literal["cute", "xla", "reference"] | None
ServedBy = Literal["cute", "xla", "platform"]

IMPLEMENTATIONS: tuple[Implementation, ...] = (None, "cute", "xla", "reference")

dense = functools.partial(jax.jit, static_argnames="spec")(reference.attention)


def reasons_against_kernel(
    spec: AttentionSpec, operands: Operands, direction: Direction
) -> list[str]:
    """Every reason why no CuTe kernel can serve the call in this direction; empty if one can.

    Args:
      spec: the static part of the call.
      operands: its arrays, or ``jax.ShapeDtypeStruct`` in their places.
      direction: the forward or the backward pass.

    The architecture is that of this machine's GPU, or the one that ``JAX_FLASHCUTE_ARCH`` names;
    without either, any that kernels exist for.
    """
    reasons = plan.reasons_against(spec, operands, direction)
    if not reasons and plan.target() is not None:
        from jax_flashcute.ffi import store

        reasons = store.reasons_against(plan.make_plan(spec, operands, direction))
    return reasons


def refuse_unless_served(spec: AttentionSpec, operands: Operands, direction: Direction) -> None:
    """Raise NotImplementedError with every reason if no kernel serves the call."""
    reasons = reasons_against_kernel(spec, operands, direction)
    if reasons:
        passes = {"fwd": "forward", "bwd": "backward"}
        raise NotImplementedError(
            f'implementation="cute" has no kernel for the {passes[direction]} pass of this call:\n'
            + "\n".join(f"  - {reason}" for reason in reasons)
        )


def served_by(
    spec: AttentionSpec, implementation: Implementation, operands: Operands, direction: Direction
) -> ServedBy:
    """What serves a pass for which ``"cute"``, ``"xla"`` or None was asked.

    Raises:
      NotImplementedError: ``"cute"`` cannot serve it.
    """
    if implementation == "cute":
        refuse_unless_served(spec, operands, direction)
        return "cute"
    if implementation == "xla" or reasons_against_kernel(spec, operands, direction):
        return "xla"
    return "platform"


# Under jit, so that a call outside of any compiles once and not at every call.


@functools.partial(jax.jit, static_argnames=("spec", "served_by"))
def forward(spec: AttentionSpec, served_by: ServedBy, operands: Operands) -> Residuals:
    """The forward pass by what ``served_by`` gave for it."""
    return choose(
        served_by,
        functools.partial(_kernel_forward, spec),
        functools.partial(xla.forward, spec),
        operands,
    )


@functools.partial(jax.jit, static_argnames=("spec", "served_by"))
def backward(
    spec: AttentionSpec,
    served_by: ServedBy,
    operands: Operands,
    residuals: Residuals,
    dout: jax.Array,
    dlse: jax.Array,
) -> Operands:
    """The backward pass, likewise; the residuals may come from any implementation."""
    return choose(
        served_by,
        functools.partial(_kernel_backward, spec),
        functools.partial(xla.backward, spec),
        operands,
        residuals,
        dout,
        dlse,
    )


def choose(served_by: ServedBy, kernel, blockwise, *arguments):
    """Calls what ``served_by`` names: the kernel, the XLA path, or what the platform has."""
    match served_by:
        case "cute":
            return kernel(*arguments)
        case "xla":
            return blockwise(*arguments)
        case _:
            return lax.platform_dependent(*arguments, cuda=kernel, default=blockwise)


def _kernel_forward(spec: AttentionSpec, operands: Operands) -> Residuals:
    from jax_flashcute.ffi import call

    return call.forward(spec, operands)


def _kernel_backward(
    spec: AttentionSpec,
    operands: Operands,
    residuals: Residuals,
    dout: jax.Array,
    dlse: jax.Array,
) -> Operands:
    from jax_flashcute.ffi import call

    gradients = call.backward(spec, operands, residuals, dout, dlse)
    return dataclasses.replace(gradients, sinks=xla.sink_gradient(operands, residuals, dout, dlse))
