"""Kernels compiled to be simulated: each once, shared by processes and by runs of the tests.

Compiling takes far longer than simulating.  So what was compiled is kept in pytest's cache folder
until a source of the package or the compiler's version changes, and Python lines, a third of the
work, are asked for only where a finding or a picture names them.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from unittest import mock

import numpy as np

import jax_flashcute
from jax_flashcute.analysis import window_interval
from jax_flashcute.ffi.compile import ArrayType, CompiledKernel, compile_kernel
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config.sm90 import FwdConfig, backward_config, forward_config
from jax_flashcute.kernels.key import AnyKey, KernelKey

NUM_SMS = 2
"""Persistent blocks of the forward kernel: fewer than the tiles of most tests."""

FOLDER = Path(__file__).resolve().parents[2] / ".pytest_cache" / "kernels"


@dataclass(frozen=True)
class SimulatedKernel(CompiledKernel):
    """A kernel whose PTX names no Python lines.

    Attributes:
      with_lines: compiles it again, with them; None in a copy, whose PTX may be another.
    """

    with_lines: Callable[[], CompiledKernel] | None = field(
        init=False, default=None, repr=False, compare=False
    )


def compile_to_simulate(
    build: Callable[[], Callable[..., None]],
    arrays: Sequence[ArrayType | None],
    arch: str,
    identity: str,
) -> SimulatedKernel:
    """``compile_kernel`` with PTX and cubin kept, or what it returned for the same ``identity``.

    Args:
      identity: text that, with the package's sources, says what is compiled.
    """
    path = _folder() / (hashlib.sha256(f"{arch} {identity}".encode()).hexdigest() + ".npz")
    with _locked(path.with_suffix(".lock")):
        kernel = _read(path, arch)
        if kernel is None:
            made = compile_kernel(build, arrays, arch, keep_intermediates=True)
            kernel = SimulatedKernel(made.object, arch, made.ptx, made.cubin)
            _write(path, kernel)
    lines = functools.partial(
        compile_kernel, build, arrays, arch, keep_intermediates=True, line_info=True
    )
    object.__setattr__(kernel, "with_lines", functools.cache(lines))
    return kernel


@functools.cache
def _folder() -> Path:
    """Of kernels that this package's sources and compiler make; those of others are deleted."""
    root = Path(jax_flashcute.__file__).parent
    digest = hashlib.sha256(metadata.version("nvidia-cutlass-dsl").encode())
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    folder = FOLDER / digest.hexdigest()[:16]
    with _locked(FOLDER.with_suffix(".lock")):
        if not folder.exists():
            shutil.rmtree(FOLDER, ignore_errors=True)
            folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path, arch: str) -> SimulatedKernel | None:
    try:
        with np.load(path) as kept:
            found = {name: kept[name].tobytes() for name in kept.files}
    except (OSError, ValueError, zipfile.BadZipFile):  # absent, or cut short
        return None
    return SimulatedKernel(found["object"], arch, found["ptx"].decode(), found["cubin"])


def _write(path: Path, kernel: SimulatedKernel) -> None:
    assert kernel.ptx is not None
    assert kernel.cubin is not None
    part = path.with_suffix(f".{os.getpid()}.part.npz")
    parts = {"object": kernel.object, "ptx": kernel.ptx.encode(), "cubin": kernel.cubin}
    np.savez_compressed(part, **{n: np.frombuffer(x, np.uint8) for n, x in parts.items()})
    part.replace(path)


@functools.cache
def kernel_of(key: AnyKey) -> SimulatedKernel:
    """The kernel of a plan."""
    arrays = [None if a is None else ArrayType(*a) for a in registry.arrays_of(key)]
    return compile_to_simulate(registry.builder(key), arrays, key.arch, repr(key))


@functools.cache
def forward(
    head_dim: int = 128,
    group: int = 1,
    *,
    pack_gqa: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    optional: tuple[str, ...] = (),
    dtype: str = "bfloat16",
    config: FwdConfig | None = None,
) -> SimulatedKernel:
    """The Hopper forward kernel; ``scale`` is ``head_dim ** -0.5``."""
    key = KernelKey(
        kernel="sm90_forward",
        arch="sm_90a",
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim,
        group=group,
        pack_gqa=pack_gqa,
        scale=head_dim**-0.5,
        interval=window_interval(*window),
        optional=optional,
        config=config or forward_config(head_dim, head_dim),
        num_sms=NUM_SMS,
    )
    return kernel_of(key)


def forward_barriers(config: FwdConfig) -> list[str]:
    """The Hopper forward's mbarriers by address: each pipeline's stages, full ones first."""
    from jax_flashcute.kernels.sm90.forward import TILE_STAGES

    pipelines = {"q": 1, "k": config.kv_stages, "v": config.kv_stages, "tile": TILE_STAGES}
    names = [
        f"{pipeline}[{stage}] {state}, its {waiting} waiting"
        for pipeline, stages in pipelines.items()
        for state, waiting in (("full", "consumers"), ("empty", "producer"))
        for stage in range(stages)
    ]
    return [*names, "tail of V"]


@functools.cache
def backward(
    head_dim: int = 128,
    group: int = 1,
    *,
    window: tuple[int | None, int | None] = (None, None),
    deterministic: bool = False,
    least_heads: bool = False,
) -> SimulatedKernel:
    """The Hopper backward launcher (three kernels) in bfloat16, without optional operands.

    ``least_heads``: as few key/value heads are worked on together as there may be, two.
    """
    import cutlass

    from jax_flashcute.kernels.common import scheduler, turns
    from jax_flashcute.kernels.common.intervals import IntervalMask
    from jax_flashcute.kernels.sm90.backward import BackwardSm90

    config = backward_config(head_dim, head_dim, deterministic)
    rows = ArrayType(cutlass.BFloat16, (1, 1, 1, head_dim))
    floats = ArrayType(cutlass.Float32, (1, 1, 1))
    arrays = [rows, rows, rows, rows, floats, rows, None, None, None, None, rows, rows, rows]
    arrays += [floats, floats, floats, ArrayType(cutlass.Int32, (1, 1))]
    arrays += [ArrayType(cutlass.Int32, (1, 1, 1))] * deterministic

    def build():
        return BackwardSm90(
            config, cutlass.BFloat16, head_dim, head_dim, group, head_dim**-0.5,
            IntervalMask(window_interval(*window)),
        )  # fmt: skip

    identity = f"BackwardSm90 {config} {head_dim} {group} {window} {least_heads}"
    if not least_heads:
        return compile_to_simulate(build, arrays, "sm_90a", identity)
    with mock.patch.object(scheduler, "L2_BYTES", 1), mock.patch.object(turns, "LEAST_SECTION", 2):
        return compile_to_simulate(build, arrays, "sm_90a", identity)
