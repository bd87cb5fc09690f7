"""``jax-flashcute doctor``: what works on this machine in plain words, and what to install."""

import argparse
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from typing import Literal

import jax

from jax_flashcute import plan
from jax_flashcute.ffi import bundle, resources, runtime, store
from jax_flashcute.ffi.compile import HOST_TARGETS
from jax_flashcute.ffi.toolchain import COMPILER, INSTALL_COMPILER, toolchain, version
from jax_flashcute.kernels import registry

Finding = tuple[Literal["yes", "no", "broken"], str, str]
"""Whether something works, what, and in what follows details or what to do about it."""


def run(options: argparse.Namespace) -> int:
    """Prints the findings; returns 1 where something is broken that was meant to work."""
    del options
    broken = False
    for check in CHECKS:
        for works, what, details in _findings(check):
            broken |= works == "broken"
            print(f"[{works:^6}] {what}" + (f": {details}" if details else ""))
    return 1 if broken else 0


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Those of a check, and the error that ended it, whatever it is."""
    try:
        yield from check()
    except Exception as error:
        yield "broken", check.__name__.strip("_"), f"{type(error).__name__}: {error}"


def _machine() -> Iterator[Finding]:
    system, machine = platform.system(), platform.machine()
    fits = system == "Linux" and machine in HOST_TARGETS
    yield (
        "yes" if fits else "no",
        f"kernels can be launched from {system} on {machine}",
        "" if fits else "Linux on x86_64 or aarch64 is needed; elsewhere the XLA path runs",
    )
    yield "yes", f"the XLA path runs here, JAX {jax.__version__}", jax.default_backend()


def _arch() -> Iterator[Finding]:
    target = plan.target() if os.environ.get(plan.ARCH_VARIABLE) else None
    if target is not None:
        archs = registry.ARCHITECTURES["fwd"]
        yield (
            "yes" if target.arch in archs else "no",
            f"kernels are planned for {target}",
            f"{plan.ARCH_VARIABLE} names it"
            + ("" if target.arch in archs else f"; there are kernels for {', '.join(archs)}"),
        )


def _gpu() -> Iterator[Finding]:
    try:
        devices = jax.devices("cuda")
    except RuntimeError as error:
        driver = shutil.which("nvidia-smi")
        yield (
            "broken" if driver else "no",
            "JAX sees a CUDA device",
            'there is a driver: pip install "jax[cuda13]"' if driver else str(error).split("\n")[0],
        )
        return
    for device in devices:
        found = plan.target_of(device)
        yield "yes", f"JAX sees {device.device_kind}", f"--arch {found}"
        for direction, name in (("fwd", "forward"), ("bwd", "backward")):
            archs = registry.ARCHITECTURES[direction]
            yield (
                "yes" if found.arch in archs else "no",
                f"there are {name} kernels for it",
                "" if found.arch in archs else f"only for {', '.join(archs)}; the XLA path runs",
            )


def _kernels() -> Iterator[Finding]:
    try:
        yield "yes", "kernels can be run", str(runtime.find_library())
    except ImportError as error:
        yield "no", "kernels can be run", str(error)
    if importlib.util.find_spec("cutlass") and importlib.util.find_spec("cuda"):
        yield "yes", "kernels can be compiled", f"{COMPILER} {version(COMPILER)}"
    else:
        yield "no", "kernels can be compiled", f"{INSTALL_COMPILER}; bundles run without it"
    try:
        yield "yes", "jax-flashcute inspect can read them", str(resources.find_tools())
    except ImportError as error:
        yield "no", "jax-flashcute inspect can read them", str(error)


def _mode() -> Iterator[Finding]:
    mode = store.compile_mode()
    meaning = {
        "jit": "what is missing is compiled",
        "aot": "what is missing runs on the XLA path",
        "error": "what is missing is an error",
    }
    yield "yes", f"{store.COMPILE_VARIABLE} is {mode}", meaning[mode]


def _places() -> Iterator[Finding]:
    directory = store.directory()
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    count = len(list(directory.glob(f"*{store.SUFFIX}"))) if directory.is_dir() else 0
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    free = shutil.disk_usage(existing).free / 2**20
    yield (
        "yes" if writable and free > 100 else "broken",
        f"the store {directory} can be written",
        f"{count} kernels, {free:.0f} MiB free"
        if writable
        else f"name another directory with {store.CACHE_VARIABLE}",
    )
    try:
        installed, refused = bundle.installed()
        for found in (*bundle.named(), *installed):
            yield (
                "yes",
                f"the bundle {found.path} can be used",
                f"{len(found.files())} kernels for {', '.join(found.targets)}",
            )
        for reason in refused:
            yield "broken", "an installed bundle can be used", reason
    except bundle.BundleRefusedError as error:
        yield "broken", f"{bundle.BUNDLE_VARIABLE} can be used", str(error)
    yield "yes", "this toolchain", str(toolchain())


def _extras() -> Iterator[Finding]:
    for module, what in (("flax", "jax_flashcute.nn"), ("tqdm", "progress bars")):
        found = importlib.util.find_spec(module) is not None
        yield "yes" if found else "no", what, "" if found else f"pip install {module}"


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(_machine, _arch, _gpu, _kernels, _mode, _places, _extras),
)
"""Every check, in the order in which they are printed."""
