"""The branches of native sparse attention, weighted by gates and summed."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_flashcute.autodiff import equally_varying
from jax_flashcute.dispatch import Implementation
from jax_flashcute.kernels.nsa import NSAKernelKey, gate_parts
from jax_flashcute.nsa.passes import Pass, run, served_by

BRANCHES = 3


def gate(
    query: jax.Array,
    outputs: Sequence[jax.Array],
    weights: jax.Array | None = None,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """``sum_i sigmoid(query . weights[:, i]) * outputs[i]`` per row and head, in float32.

    With weights, one kernel on the GPUs that have it (head_dims that are multiples of 8 up to 256,
    16-bit dtypes), forward and backward, reads and writes everything once.

    Args:
      query: (B, T, N, H).
      outputs: three arrays (B, T, N, Hv).
      weights: (N, 3, H); None for the mean of the three.
      implementation: as for ``flash_attention``; without weights, XLA computes it in any case.

    Returns:
      (B, T, N, Hv) in the outputs' dtype.

    Raises:
      ValueError: an array's shape does not fit; or there are not three outputs.
      NotImplementedError: ``implementation="cute"`` cannot serve it; every reason is given.
    """
    if len(outputs) != BRANCHES:
        raise ValueError(f"outputs must be three arrays; got {len(outputs)}")
    for x in outputs:
        if x.shape[:3] != query.shape[:3] or x.shape != outputs[0].shape:
            raise ValueError(
                f"outputs must each be {(*query.shape[:3], outputs[0].shape[-1])}; got {x.shape}"
            )
    if weights is None:
        return weighted_sum(jnp.full((*query.shape[:3], BRANCHES), 1 / 3, jnp.float32), outputs)
    N, H = query.shape[2:]
    if weights.shape != (N, BRANCHES, H):
        raise ValueError(f"weights must be {(N, BRANCHES, H)}; got {weights.shape}")
    weights = weights.astype(jnp.promote_types(query.dtype, jnp.float32))[None]
    if implementation == "reference":
        return _formula(query, *outputs, weights)
    arrays = equally_varying((query, *outputs, weights))
    return _gated(implementation, *arrays)


def weighted_sum(gates: jax.Array, outputs: Sequence[jax.Array]) -> jax.Array:
    """``sum_i gates[..., i] * outputs[i]`` in float32, in the outputs' dtype."""
    dtype = jnp.promote_types(outputs[0].dtype, jnp.float32)
    parts = (gates[..., i, None].astype(dtype) * x.astype(dtype) for i, x in enumerate(outputs))
    return sum(parts, jnp.zeros((), dtype)).astype(outputs[0].dtype)


def _formula(query, *outputs_and_weights) -> jax.Array:
    """Of query, the three outputs and weights (1|B, N, 3, H)."""
    *outputs, weights = outputs_and_weights
    weights = jnp.broadcast_to(weights, (query.shape[0], *weights.shape[1:]))
    logits = jnp.einsum(
        "btnh,bnch->btnc",
        query.astype(weights.dtype),
        weights,
        precision=jax.lax.Precision.HIGHEST,
    )
    return weighted_sum(jax.nn.sigmoid(logits), outputs)


# Batch, rows, heads, head_dim of query, head_dim of value, branches.
_INPUTS = ("btnh", "btnv", "btnv", "btnv", "bnch")


@dataclass(frozen=True)
class _Forward(Pass):
    inputs, results, local, shared = _INPUTS, ("btnv",), "btn", (4,)

    def kernel(self, *arrays):
        from jax_flashcute.ffi import call

        out = arrays[1]
        return call.nsa_kernel(
            _key("nsa_gate", *arrays[:2]), [(out.shape, out.dtype.name)], *arrays
        )

    def formula(self, *arrays):
        return (_formula(*arrays),)


@dataclass(frozen=True)
class _Backward(Pass):
    """The weights' gradient is that of each batch entry."""

    inputs, results, local, shared = (*_INPUTS, "btnv"), _INPUTS, "btn", (4,)

    def kernel(self, *arrays):
        from jax_flashcute.ffi import call

        B, T, N, H = arrays[0].shape
        parts = (B, gate_parts(B, T, N), N, BRANCHES, H)
        shapes = [*((x.shape, x.dtype.name) for x in arrays[:4]), (parts, "float32")]
        key = _key("nsa_gate_backward", *arrays[:2])
        *gradients, weights = call.nsa_kernel(key, shapes, *arrays)
        return *gradients, jnp.sum(weights, axis=1)

    def formula(self, *arrays):
        *primals, weights, dout = arrays
        weights = jnp.broadcast_to(weights, (dout.shape[0], *weights.shape[1:]))
        return jax.vjp(_formula, *primals, weights)[1](dout)


def _key(kernel, query, out) -> NSAKernelKey:
    return NSAKernelKey(kernel, query.dtype.name, query.shape[3], out.shape[3])


def _served_by(implementation: Implementation, kernel, arrays):
    query, *outputs = arrays[:4]
    names = ("query", "the first output", "the second output", "the third output")
    return served_by(
        implementation,
        "the gates" if kernel == "nsa_gate" else "the gates' gradients",
        list(zip(names, (query, *outputs), strict=True)),
        (query.shape[3], outputs[0].shape[3]),
        _key(kernel, query, outputs[0]),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(implementation: Implementation, *arrays: jax.Array) -> jax.Array:
    return run(_Forward(_served_by(implementation, "nsa_gate", arrays)), *arrays)[0]


def _gated_fwd(implementation: Implementation, *arrays: jax.Array):
    return _gated(implementation, *arrays), arrays


def _gated_bwd(implementation: Implementation, arrays, dout):
    one = _Backward(_served_by(implementation, "nsa_gate_backward", arrays))
    *gradients, weights = run(one, *arrays, dout)
    if arrays[-1].shape[0] == 1:
        weights = jnp.sum(weights, axis=0, keepdims=True)
    return *gradients, weights


_gated.defvjp(_gated_fwd, _gated_bwd)
