"""The file of one compiled kernel, in the store and in bundles.

A magic word, the SHA-256 of what follows, a line of JSON that says what the kernel is, and the
compressed object.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from dataclasses import asdict, fields
from pathlib import Path

from jax_flashcute.ffi.compile import CompiledKernel
from jax_flashcute.ffi.toolchain import Toolchain
from jax_flashcute.kernels.elements import names_of
from jax_flashcute.kernels.key import AnyKey, KernelKey

MAGIC = b"flashcute kernel 2\n"
SUFFIX = ".kernel"
PART_SUFFIX = ".part"
"""Of a file that is being written; what a killed process leaves of it is nobody's."""


class DamagedKernelError(ValueError):
    """A file does not hold what was written to it."""


def entry_name(key: AnyKey, toolchain: Toolchain) -> str:
    """The content address of a kernel, without suffix."""
    return hashlib.sha256(f"{key!r}\n{toolchain}".encode()).hexdigest()


def describe(key: AnyKey, toolchain: Toolchain) -> dict[str, object]:
    """What a kernel is, for people: JSON values by name."""
    plain = {f.name: getattr(key, f.name) for f in fields(key)}
    if isinstance(key, KernelKey):
        tilings = (key.config, getattr(key.config, "dq_pass", None))
        dims = key.head_dim, key.head_dim_v
        plain |= {
            "interval": str(key.interval),
            "union": [str(interval) for interval in key.union],
            "optional": list(key.optional),
            "config": repr(key.config),
            "elements": names_of(key.elements),
            "row_bounds": None if key.row_bounds is None else asdict(key.row_bounds),
            "smem_bytes": max(t.smem_bytes(*dims) for t in tilings if t is not None),
        }
    return {**plain, "toolchain": asdict(toolchain)}


def pack(key: AnyKey, kernel: CompiledKernel, toolchain: Toolchain) -> bytes:
    """The content of a kernel's file."""
    description = json.dumps(describe(key, toolchain), sort_keys=True).encode()
    payload = description + b"\n" + zlib.compress(kernel.object)
    return MAGIC + hashlib.sha256(payload).digest() + payload


def unpack(content: bytes) -> tuple[dict, CompiledKernel]:
    """The description and the kernel of a file's content.

    Raises:
      DamagedKernelError: the content is not what ``pack`` gave.
    """
    checksum, payload = content[len(MAGIC) :][:32], content[len(MAGIC) + 32 :]
    if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != checksum:
        raise DamagedKernelError("damaged")
    line, _, compressed = payload.partition(b"\n")
    description = json.loads(line)
    return description, CompiledKernel(zlib.decompress(compressed), description["arch"])


def write(path: Path, content: bytes) -> None:
    """Writes a file aside and renames it, so that a reader sees a whole one or none.

    Raises:
      OSError: it cannot be written; nothing of it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f"{path.stem}.", suffix=PART_SUFFIX, delete=False
    ) as file:
        try:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)  # a bundle is for other users too
            file.close()
            os.replace(file.name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
