"""Compiled kernels on disk: each compiled once, shared by all processes, checked when read.

An entry's name is the SHA-256 of everything its bytes depend on: the plan, the versions of the
toolchain, and the sources of the kernels.  Files are written aside and renamed, so that a reader
sees a whole one or none; a lock per entry lets one process compile while the others wait.  Where
the disk is full, read-only or broken, kernels are compiled for this process alone, with one
warning.  Bundles are looked into first; nothing is written to them.
"""

import contextlib
import fcntl
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from jax_flashcute.ffi import bundle, kernel_file
from jax_flashcute.ffi.compile import ArrayType, CompiledKernel, compile_kernel
from jax_flashcute.ffi.kernel_file import PART_SUFFIX, SUFFIX
from jax_flashcute.ffi.toolchain import toolchain
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.key import AnyKey

CACHE_VARIABLE = "JAX_FLASHCUTE_CACHE_DIR"
"""Environment variable that names the directory of the store."""

COMPILE_VARIABLE = "JAX_FLASHCUTE_COMPILE"
"""Environment variable: ``jit`` compiles what the store lacks; ``aot`` uses what it has and leaves
the rest to the XLA path; ``error`` makes a compile an error."""

MODES = ("jit", "aot", "error")

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


def entry_name(key: AnyKey) -> str:
    """The content address of a kernel, without suffix."""
    return kernel_file.entry_name(key, toolchain())


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
    return [_not_compiled(key)]


def _not_compiled(key: AnyKey) -> str:
    places = [str(b.path) for b in (*bundle.named(), *bundle.installed()[0])] + [str(directory())]
    has = "has" if len(places) == 1 else "have"
    refused = "".join(f"; {reason}" for reason in bundle.installed()[1])
    return (
        f"{COMPILE_VARIABLE}={compile_mode()} and {', '.join(places)} {has} no compiled kernel for "
        f"{key}{refused}"
    )


def forget() -> None:
    """Drops the kernels held in memory; those on disk stay."""
    with _memory_lock:
        _memory.clear()


def _load_or_compile(key: AnyKey) -> CompiledKernel:
    kernel = _read(key)
    if kernel is not None:
        return kernel
    if compile_mode() != "jit":
        raise KernelNotCompiledError(_not_compiled(key))
    with _locked(key):
        # Another process may have compiled it while this one waited.
        kernel = _read(key)
        if kernel is None:
            kernel = _compile(key)
            _write(key, kernel)
    return kernel


def _compile(key: AnyKey) -> CompiledKernel:
    global _compiles
    kernel = compile_key(key, toolchain().machine)
    _compiles += 1
    return kernel


def compile_key(key: AnyKey, machine: str) -> CompiledKernel:
    """Compiles a kernel, whatever the store has, to be launched by an x86_64 or aarch64 host."""
    arrays = [None if a is None else ArrayType(*a) for a in registry.arrays_of(key)]
    return compile_kernel(registry.builder(key), arrays, key.arch, machine=machine)


def _path(key: AnyKey) -> Path:
    return directory() / (entry_name(key) + SUFFIX)


def _read(key: AnyKey) -> CompiledKernel | None:
    """The kernel of a plan from a bundle or from the store, None where none has it."""
    installed, refused = bundle.installed()
    for reason in refused:
        _warn_once(reason, "")
    for found in (*bundle.named(), *installed):
        kernel = _read_file(found.file(key))
        if kernel is not None:
            return kernel
    return _read_file(_path(key))


def _read_file(path: Path) -> CompiledKernel | None:
    try:
        return kernel_file.unpack(path.read_bytes())[1]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _warn_once(f"{path.parent} cannot be read", f"({error}); kernels are compiled anew")
    except kernel_file.DamagedKernelError:
        _warn_once(f"{path} is damaged", "and taken for absent")
    return None


def _write(key: AnyKey, kernel: CompiledKernel) -> None:
    try:
        kernel_file.write(_path(key), kernel_file.pack(key, kernel, toolchain()))
    except OSError as error:
        _warn_not_kept(error)


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
