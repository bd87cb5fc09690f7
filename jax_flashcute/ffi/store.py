"""Compiled kernels on disk: each compiled once, shared by all processes, checked when read.

An entry's name is the SHA-256 of everything its bytes depend on: the plan, the versions of the
toolchain, and the sources of the kernels.  A file holds a magic word, the SHA-256 of what follows,
and the compressed object.  Files are written aside and renamed, so that a reader sees a whole one
or none; a lock per entry lets one process compile while the others wait.  Where the disk is full,
read-only or broken, kernels are compiled for this process alone, with one warning.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from jax_flashcute.ffi.compile import ArrayType, CompiledKernel, compile_kernel
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.registry import AnyKey

CACHE_VARIABLE = "JAX_FLASHCUTE_CACHE_DIR"
"""Environment variable that names the directory of the store."""

COMPILE_VARIABLE = "JAX_FLASHCUTE_COMPILE"
"""Environment variable: ``jit`` compiles what the store lacks; ``aot`` uses what it has and leaves
the rest to the XLA path; ``error`` makes a compile an error."""

MODES = ("jit", "aot", "error")
MAGIC = b"flashcute kernel 1\n"
SUFFIX = ".kernel"
PART_SUFFIX = ".part"

_memory: dict[AnyKey, CompiledKernel] = {}
_memory_lock = threading.Lock()
_compiles = 0


class KernelNotCompiledError(RuntimeError):
    """A kernel is missing where compiling is not allowed."""


def compile_mode() -> str:
    """The value of ``JAX_FLASHCUTE_COMPILE``, ``jit`` where unset."""
    mode = os.environ.get(COMPILE_VARIABLE) or "jit"
    if mode not in MODES:
        raise ValueError(f"{COMPILE_VARIABLE} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def directory() -> Path:
    """Where the store is: ``JAX_FLASHCUTE_CACHE_DIR``, else the user's cache directory."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "jax_flashcute"


def compiles() -> int:
    """How many kernels this process has compiled."""
    return _compiles


@functools.cache
def toolchain() -> str:
    """Versions of everything that decides a kernel's bytes besides its plan."""
    package = Path(registry.__file__).parent.parent
    sources = hashlib.sha256()
    for folder in (package / "kernels", package / "ffi"):
        for path in sorted(folder.rglob("*.py")):
            sources.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return f"nvidia-cutlass-dsl {_version('nvidia-cutlass-dsl')}; sources {sources.hexdigest()}"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def entry_name(key: AnyKey) -> str:
    """The content address of a kernel, without suffix."""
    return hashlib.sha256(f"{key!r}\n{toolchain()}".encode()).hexdigest()


def get(key: AnyKey) -> CompiledKernel:
    """The kernel of a plan, from memory, from disk, or compiled and stored.

    Raises:
      KernelNotCompiledError: it is missing, and ``JAX_FLASHCUTE_COMPILE`` forbids to compile it.
      ImportError: it has to be compiled, and the compiler is not installed.
    """
    with _memory_lock:
        kernel = _memory.get(key)
        if kernel is None:
            kernel = _memory[key] = _load_or_compile(key)
        return kernel


def contains(key: AnyKey) -> bool:
    """Whether a plan's kernel is in memory or on disk."""
    with _memory_lock:
        if key not in _memory:
            kernel = _read(key)
            if kernel is None:
                return False
            _memory[key] = kernel
        return True


def reasons_against(key: AnyKey) -> list[str]:
    """Why a plan's kernel is not to be had: in ``aot`` mode, that it was not compiled before."""
    if compile_mode() != "aot" or contains(key):
        return []
    return [f"{COMPILE_VARIABLE}=aot and {directory()} has no compiled kernel for {key}"]


def forget() -> None:
    """Drops the kernels held in memory; those on disk stay."""
    with _memory_lock:
        _memory.clear()


def _load_or_compile(key: AnyKey) -> CompiledKernel:
    kernel = _read(key)
    if kernel is not None:
        return kernel
    if compile_mode() != "jit":
        raise KernelNotCompiledError(
            f"{COMPILE_VARIABLE}={compile_mode()} and {directory()} has no compiled kernel for "
            f"{key}"
        )
    with _locked(key):
        # Another process may have compiled it while this one waited.
        kernel = _read(key)
        if kernel is None:
            kernel = _compile(key)
            _write(key, kernel)
    return kernel


def _compile(key: AnyKey) -> CompiledKernel:
    global _compiles
    arrays = [None if a is None else ArrayType(*a) for a in registry.arrays_of(key)]
    kernel = compile_kernel(registry.builder(key), arrays, key.arch)
    _compiles += 1
    return kernel


def _path(key: AnyKey) -> Path:
    return directory() / (entry_name(key) + SUFFIX)


def _read(key: AnyKey) -> CompiledKernel | None:
    path = _path(key)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _warn_once(f"{directory()} cannot be read", f"({error}); kernels are compiled anew")
        return None
    checksum, payload = content[len(MAGIC) :][:32], content[len(MAGIC) + 32 :]
    if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != checksum:
        _warn_once(f"{path} is damaged", "and taken for absent")
        return None
    return CompiledKernel(zlib.decompress(payload), key.arch)


def _write(key: AnyKey, kernel: CompiledKernel) -> None:
    payload = zlib.compress(kernel.object)
    path = _path(key)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f"{path.stem}.", suffix=PART_SUFFIX, delete=False
        ) as file:
            temporary = file.name
            file.write(MAGIC + hashlib.sha256(payload).digest() + payload)
        os.replace(temporary, path)
    except OSError as error:
        _warn_not_kept(error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def _locked(key: AnyKey) -> Iterator[None]:
    """Holds the entry's lock among processes, or none where the directory cannot be written."""
    with contextlib.ExitStack() as stack:
        try:
            directory().mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(directory() / (entry_name(key) + ".lock"), "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever wrote these was killed: it held the lock while it wrote.
            for part in directory().glob(f"{entry_name(key)}.*{PART_SUFFIX}"):
                part.unlink(missing_ok=True)
        except OSError as error:
            _warn_not_kept(error)
        yield


def _warn_not_kept(error: OSError) -> None:
    _warn_once(f"{directory()} cannot be written", f"({error}); kernels are not kept")


_warned: set[str] = set()


def _warn_once(problem: str, details: str) -> None:
    """Warns of a problem the first time it is met."""
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(f"jax_flashcute: {problem} {details}", stacklevel=4)
