"""Which implementation serves a call, and the call itself.

``"cute"``, ``"xla"`` and ``"reference"`` are used or refused, never replaced.  ``None`` takes the
kernel where a program is lowered for CUDA and a kernel can serve the call, and the XLA path
everywhere else; forward and backward choose on their own, because they share their residuals.
"""

import functools
from typing import Literal

import jax
from jax import lax

from jax_flashcute import reference, xla
from jax_flashcute.spec import AttentionSpec, Operands, Residuals

Direction = Literal["fwd", "bwd"]
Implementation = Literal["cute", "xla", "reference"] | None

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
    """
    try:
        from jax_flashcute import plan
    except ImportError as error:
        return [f"the kernels cannot be imported: {error}"]
    return plan.reasons_against(spec, operands, direction)


def refuse_unless_served(spec: AttentionSpec, operands: Operands, direction: Direction) -> None:
    """Raise NotImplementedError with every reason if no kernel serves the call."""
    reasons = reasons_against_kernel(spec, operands, direction)
    if reasons:
        passes = {"fwd": "forward", "bwd": "backward"}
        raise NotImplementedError(
            f'implementation="cute" has no kernel for the {passes[direction]} pass of this call:\n'
            + "\n".join(f"  - {reason}" for reason in reasons)
        )


def forward(spec: AttentionSpec, implementation: Implementation, operands: Operands) -> Residuals:
    """The forward pass by ``"cute"``, ``"xla"`` or, for None, by what the platform has."""
    if implementation == "xla":
        return xla.forward(spec, operands)
    if implementation == "cute":
        refuse_unless_served(spec, operands, "fwd")
        return _kernel_forward(spec, operands)
    if reasons_against_kernel(spec, operands, "fwd"):
        return xla.forward(spec, operands)
    return lax.platform_dependent(
        operands,
        cuda=functools.partial(_kernel_forward, spec),
        default=functools.partial(xla.forward, spec),
    )


def backward(
    spec: AttentionSpec,
    implementation: Implementation,
    operands: Operands,
    residuals: Residuals,
    dout: jax.Array,
    dlse: jax.Array,
) -> Operands:
    """The backward pass, likewise; the residuals may come from any implementation."""
    arguments = (operands, residuals, dout, dlse)
    if implementation == "xla":
        return xla.backward(spec, *arguments)
    if implementation == "cute":
        refuse_unless_served(spec, operands, "bwd")
        return _kernel_backward(spec, *arguments)
    if reasons_against_kernel(spec, operands, "bwd"):
        return xla.backward(spec, *arguments)
    return lax.platform_dependent(
        *arguments,
        cuda=functools.partial(_kernel_backward, spec),
        default=functools.partial(xla.backward, spec),
    )


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

    return call.backward(spec, operands, residuals, dout, dlse)
