"""From a call to the kernel that serves it: the target architecture and the compile key."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jax_flashcute.kernels import nsa, registry
from jax_flashcute.kernels.key import Direction, KernelKey
from jax_flashcute.spec import AttentionSpec, Operands

ARCH_VARIABLE = "JAX_FLASHCUTE_ARCH"
"""Environment variable that names the architecture to compile for, such as ``sm_90a``, and after a
colon the number of multiprocessors, as ``sm_90a:114``; without it, ``DEFAULT_NUM_SMS``."""

DEFAULT_NUM_SMS = 132
"""Multiprocessors assumed where no device tells: H100 SXM and H200."""


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for."""

    arch: str
    num_sms: int

    def __str__(self) -> str:
        return f"{self.arch}:{self.num_sms}"


def target() -> Target | None:
    """The target that ``JAX_FLASHCUTE_ARCH`` names, else the first CUDA device, else None."""
    named = os.environ.get(ARCH_VARIABLE)
    if named:
        arch, _, num_sms = named.partition(":")
        if num_sms and not (num_sms.isdecimal() and int(num_sms)):
            raise ValueError(
                f"{ARCH_VARIABLE} must be an architecture, and after a colon a number of "
                f"multiprocessors where they are not {DEFAULT_NUM_SMS}; got {named!r}"
            )
        return Target(arch, int(num_sms or DEFAULT_NUM_SMS))
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None
    return target_of(device)


def target_of(device: Any) -> Target:
    """The target that a CUDA device is, one of ``jax.devices("cuda")``."""
    capability = str(device.compute_capability).replace(".", "")
    suffix = "a" if int(capability) >= 90 else ""
    return Target(f"sm_{capability}{suffix}", getattr(device, "core_count", DEFAULT_NUM_SMS))


def reasons_against(spec: AttentionSpec, operands: Operands, direction: Direction) -> list[str]:
    """``registry.reasons_against`` on the architecture that a program would be lowered for."""
    known = target()
    return registry.reasons_against(spec, operands, direction, known.arch if known else None)


def make_plan(spec: AttentionSpec, operands: Operands, direction: Direction = "fwd") -> KernelKey:
    """The compile key of the kernel of a call.

    Raises:
      NotImplementedError: no kernel serves the call, with every reason; or there is neither a
        CUDA device nor a named architecture to compile for.
    """
    known = _target_or_refuse(registry.ARCHITECTURES[direction])
    reasons = registry.reasons_against(spec, operands, direction, known.arch)
    if reasons:
        raise NotImplementedError("no kernel serves this call:\n  - " + "\n  - ".join(reasons))
    return registry.kernel_key(spec, operands, direction, known.arch, known.num_sms)


def make_nsa_plan(key: nsa.NSAKernelKey) -> nsa.NSAKernelKey:
    """The compile key with the architecture that a program is lowered for.

    Raises:
      NotImplementedError: no such kernel exists for it; or as for ``make_plan``.
    """
    arch = _target_or_refuse(nsa.ARCHITECTURES).arch
    reasons = nsa.reasons_against((), (), arch)
    if reasons:
        raise NotImplementedError(f"no kernel {key.kernel}: {reasons[0]}")
    return dataclasses.replace(key, arch=arch)


def _target_or_refuse(architectures: Sequence[str]) -> Target:
    known = target()
    if known is None:
        raise NotImplementedError(
            "lowering for CUDA on a machine without a CUDA device: set "
            f"{ARCH_VARIABLE} to the architecture to compile for, one of "
            f"{', '.join(architectures)}"
        )
    return known
