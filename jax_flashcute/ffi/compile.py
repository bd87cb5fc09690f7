"""Compiles a CuTe launcher to one object that serves every shape, on any machine.

The object follows the calling convention of the CuTe runtime's XLA FFI target: a stream, then for
each array a pointer to ``{void* data; int64* dims}``.  All dimensions are read at run time, so one
object serves all batch sizes, lengths and head counts; only a dimension whose divisibility the
kernel relies on is declared.  Compiling needs no GPU.
"""

import contextlib
import hashlib
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax_flashcute.ffi.runtime import load_library

ENTRY_PREFIX = "cutlass_call"
"""The prefix under which the runtime looks for the entry point in an object."""

XLA_ALIGNMENT = 256
"""Bytes to which XLA aligns every buffer."""

HOST_TARGETS = {
    "x86_64": "'llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64-v2'",
    "aarch64": "linux-aarch64",
}
"""What launchers are compiled for: any processor of a kind, not the one that compiles, which may
have instructions that others lack."""


@dataclass(frozen=True)
class ArrayType:
    """One buffer of a kernel: its CuTe element type and what always divides each dimension.

    ``divisibility`` has an entry for each dimension; 1 promises nothing.
    """

    dtype: Any
    divisibility: tuple[int, ...]


@dataclass(frozen=True)
class CompiledKernel:
    """A compiled launcher.

    Attributes:
      object: an ELF relocatable with the host launcher and the GPU code.
      arch: the architecture it was compiled for, such as ``sm_90a``.
      ptx: the PTX of every kernel, where it was asked to be kept.
      cubin: the GPU code on its own, where it was asked to be kept.
    """

    object: bytes
    arch: str
    ptx: str | None = field(default=None, repr=False)
    cubin: bytes | None = field(default=None, repr=False)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the object."""
        return hashlib.sha256(self.object).digest()


def compile_kernel(
    build: Callable[[], Callable[..., None]],
    arrays: Sequence[ArrayType | None],
    arch: str,
    *,
    machine: str | None = None,
    keep_intermediates: bool = False,
    line_info: bool = False,
) -> CompiledKernel:
    """Compiles a launcher for ``arch``.

    Args:
      build: makes the launcher; called while tracing.  The launcher takes a stream, then one
        tensor for each entry of ``arrays``.
      arrays: the types of the arrays; ``None`` where the launcher gets ``None``.
      arch: ``sm_90a``, ``sm_100a`` or ``sm_103a``.
      machine: the processor of the host that launches it, a key of ``HOST_TARGETS``; by default
        this one's.
      keep_intermediates: keep the PTX and the cubin in the result.
      line_info: put the Python lines into them.

    Raises:
      ImportError: the CuTe DSL compiler is not installed.
      ValueError: there is no such machine.
    """
    machine = machine or platform.machine()
    if machine not in HOST_TARGETS:
        raise ValueError(f"machine must be one of {', '.join(HOST_TARGETS)}, got {machine!r}")

    import cuda.bindings.driver as cuda
    import cutlass.cute as cute
    from cutlass import AddressSpace
    from cutlass.jax.types import JaxArray, JaxTracedArray

    from jax_flashcute.ffi.entry import entry

    load_library()  # the object links against it when it is written
    descriptors = [
        JaxTracedArray(
            JaxArray(
                a.dtype,
                tuple(_Unknown() for _ in a.divisibility),
                AddressSpace.gmem,
                XLA_ALIGNMENT,
                tuple(reversed(range(len(a.divisibility)))),
                None,
                False,
                a.divisibility,
            )
        )
        for a in arrays
        if a is not None
    ]
    with contextlib.ExitStack() as stack:
        options = [f"--gpu-arch {arch}", f"--host-target {HOST_TARGETS[machine]}"]
        if keep_intermediates:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            options += [f"--dump-dir={folder}", "--keep-ptx", "--keep-cubin"]
        if line_info:
            options.append("--generate-line-info")
        compiled = cute.compile(
            entry,
            cuda.CUstream(0),
            *descriptors,
            build=build,
            present=tuple(a is not None for a in arrays),
            options=" ".join(options),
        )
        ptx, cubin = None, None
        if keep_intermediates:
            ptx = "\n".join(
                p.read_text().replace("\0", "") for p in sorted(Path(folder).glob("*.ptx"))
            )
            cubins = [p.read_bytes() for p in sorted(Path(folder).glob("*.cubin"))]
            cubin = cubins[0] if cubins else None
    return CompiledKernel(compiled.dump_to_object(ENTRY_PREFIX), arch, ptx, cubin)


class _Unknown:
    """A dimension about which nothing is known when compiling."""
