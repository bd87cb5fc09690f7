"""What decides a kernel's bytes besides its plan: compiler, sources, the host's processor."""

import functools
import hashlib
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jax_flashcute.kernels import registry

COMPILER = "nvidia-cutlass-dsl"
RUNTIME = "nvidia-cutlass-dsl-libs-cu13"
"""Distributions of the compiler and of the library that runs what it compiled; released together.
The second is all that a machine needs that only runs kernels."""

INSTALL_COMPILER = f'pip install "{COMPILER}[cu13]~=4.8.1" cuda-python'

SOURCES = (
    "kernels/**/*.py",
    "ffi/**/*.py",
    "analysis/**/*.py",
    "block_mask.py",
    "bounds.py",
    "masks.py",
    "spec.py",
)
"""Files that a kernel's bytes depend on: kernels, and what their modules import."""


@dataclass(frozen=True)
class Toolchain:
    """Versions of everything that a compiled kernel depends on.

    Attributes:
      dsl: the version of CuTe DSL; None where neither its compiler nor its runtime is installed
        as a distribution.
      sources: SHA-256 of ``SOURCES``.
      machine: the processor that launches them: ``x86_64`` or ``aarch64``.
    """

    dsl: str | None
    sources: str
    machine: str

    def __str__(self) -> str:
        return f"{COMPILER} {self.dsl or 'absent'}; sources {self.sources}; {self.machine}"

    def reasons_unlike(self, here: "Toolchain") -> list[str]:
        """Why kernels that this toolchain compiled do not run ``here``; empty where they do."""
        reasons = []
        if here.dsl is not None and self.dsl != here.dsl:
            reasons.append(
                f"it was compiled by {COMPILER} {self.dsl}, and {here.dsl} is installed here"
            )
        if self.sources != here.sources:
            reasons.append(
                f"it was compiled from other sources of jax_flashcute ({self.sources[:12]}, and "
                f"{here.sources[:12]} here)"
            )
        if self.machine != here.machine:
            reasons.append(f"it is for {self.machine} hosts, and this one is {here.machine}")
        return reasons


@functools.cache
def toolchain() -> Toolchain:
    """That of this process."""
    package = Path(registry.__file__).parent.parent
    sources = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(package.glob(pattern)):
            sources.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    dsl = version(COMPILER) or version(RUNTIME)
    return Toolchain(dsl, sources.hexdigest(), platform.machine())


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None where it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
