"""Bundles: directories of kernels, compiled ahead of time for machines without a compiler.

``JAX_FLASHCUTE_BUNDLE`` names them, separated by colons; an installed wheel that a bundle was made
into is found by itself.  A bundle that another toolchain made is refused, never half used.
"""

import base64
import functools
import hashlib
import importlib.util
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from jax_flashcute.ffi.kernel_file import SUFFIX, entry_name
from jax_flashcute.ffi.toolchain import RUNTIME, Toolchain, toolchain
from jax_flashcute.kernels.key import AnyKey

BUNDLE_VARIABLE = "JAX_FLASHCUTE_BUNDLE"
"""Environment variable that names bundles, separated by colons."""

ENTRY_POINTS = "jax_flashcute.bundles"
"""Group of the entry points by which wheels of bundles are found."""

MANIFEST = "bundle.json"
FORMAT = "jax_flashcute bundle 1"


class BundleRefusedError(RuntimeError):
    """A bundle was named that cannot be used here."""


@dataclass(frozen=True)
class Bundle:
    """A directory of compiled kernels.

    Attributes:
      path: the directory.
      toolchain: what compiled them.
      targets: what for, ``sm_90a:132`` and the like.
    """

    path: Path
    toolchain: Toolchain
    targets: tuple[str, ...]

    @staticmethod
    def open(path: Path) -> "Bundle":
        """The bundle in a directory.

        Raises:
          BundleRefusedError: there is none, or its manifest is damaged.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            if manifest["format"] != FORMAT:
                raise BundleRefusedError(
                    f"the bundle {path} is refused: expected {FORMAT!r}, got {manifest['format']!r}"
                )
            return Bundle(path, Toolchain(**manifest["toolchain"]), tuple(manifest["targets"]))
        except OSError as error:
            raise BundleRefusedError(f"the bundle {path} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BundleRefusedError(
                f"the bundle {path} is refused: {MANIFEST} is damaged ({error!r})"
            ) from error

    def check(self) -> None:
        """Raise BundleRefusedError if its kernels do not run in this process."""
        reasons = self.toolchain.reasons_unlike(toolchain())
        if reasons:
            raise BundleRefusedError(f"the bundle {self.path} is refused: {'; '.join(reasons)}")

    def files(self) -> list[Path]:
        """The files of its kernels."""
        return sorted(self.path.glob(f"*{SUFFIX}"))

    def file(self, key: AnyKey) -> Path:
        """Where the kernel of a plan is, if it has it."""
        return self.path / (entry_name(key, self.toolchain) + SUFFIX)


def named() -> tuple[Bundle, ...]:
    """The bundles that ``JAX_FLASHCUTE_BUNDLE`` names.

    Raises:
      BundleRefusedError: one cannot be used here.
    """
    return _opened(os.environ.get(BUNDLE_VARIABLE, ""))


@functools.lru_cache(maxsize=4)
def _opened(paths: str) -> tuple[Bundle, ...]:
    # Absolute: a process may change its directory before it asks for the next kernel.
    bundles = tuple(Bundle.open(Path(path).resolve()) for path in paths.split(os.pathsep) if path)
    for bundle in bundles:
        bundle.check()
    return bundles


@functools.cache
def installed() -> tuple[tuple[Bundle, ...], tuple[str, ...]]:
    """The bundles of installed wheels, and why others are refused."""
    found, refused = [], []
    for entry_point in metadata.entry_points(group=ENTRY_POINTS):
        spec = importlib.util.find_spec(entry_point.module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            try:
                bundle = Bundle.open(Path(folder))
                bundle.check()
                found.append(bundle)
            except BundleRefusedError as error:
                refused.append(str(error))
    return tuple(found), tuple(refused)


def write_manifest(path: Path, made_by: Toolchain, targets: Sequence[str]) -> None:
    """Makes a directory that holds kernels a bundle.

    Raises:
      BundleRefusedError: it is one already, of another toolchain.
    """
    if (path / MANIFEST).exists():
        bundle = Bundle.open(path)
        if bundle.toolchain != made_by:
            reasons = "; ".join(bundle.toolchain.reasons_unlike(made_by))
            raise BundleRefusedError(f"the bundle {path} cannot be added to: {reasons}")
        targets = sorted({*bundle.targets, *targets})
    manifest = {"format": FORMAT, "toolchain": asdict(made_by), "targets": list(targets)}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def wheel_package(name: str, version: str) -> str:
    """The package of a wheel of that name.

    Raises:
      ValueError: the name or the version is none.
    """
    package = name.replace("-", "_").lower()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", package):
        raise ValueError(f"name must be that of a distribution, got {name!r}")
    if not re.fullmatch(r"\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*", version):
        raise ValueError(f"version must be one as 1.0 or 1.0.dev1, got {version!r}")
    return package


def write_wheel(bundle: Bundle, folder: Path, name: str, version: str) -> Path:
    """Writes a bundle as a wheel, which is used wherever it is installed.

    Args:
      bundle: what it holds.
      folder: where to write it.
      name: the distribution's name; also, with underscores, that of its package.
      version: its version, as ``1.0``.

    Returns:
      The path of the wheel.

    Raises:
      ValueError: as ``wheel_package``.
    """
    package = wheel_package(name, version)
    tag = f"py3-none-linux_{bundle.toolchain.machine}"
    information = f"{package}-{version}.dist-info"
    files = {
        f"{package}/__init__.py": b'"""Kernels for jax_flashcute, found by an entry point."""\n',
        **{
            f"{package}/{p.name}": p.read_bytes() for p in [bundle.path / MANIFEST, *bundle.files()]
        },
        f"{information}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            f"Summary: Compiled kernels for jax_flashcute: {', '.join(bundle.targets)}\n"
            f"Requires-Dist: {RUNTIME}=={bundle.toolchain.dsl}\n"
        ).encode(),
        f"{information}/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: jax-flashcute\nRoot-Is-Purelib: false\nTag: {tag}\n"
        ).encode(),
        f"{information}/entry_points.txt": f"[{ENTRY_POINTS}]\n{package} = {package}\n".encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{information}/RECORD", _record(files, f"{information}/RECORD"))
    return wheel


def _record(files: Mapping[str, bytes], own_path: str) -> str:
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{own_path},,", ""])
