"""Which module may import which, and what importing the package must not bring along."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_flashcute

PACKAGE = Path(jax_flashcute.__file__).parent
REPOSITORY = PACKAGE.parent


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_importing(module: str) -> set[str]:
    """Files of the package, relative to it, that import a module or something inside it."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name == module or name.startswith(f"{module}.") for name in imported_modules(path))
    }


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    importlinter = pytest.importorskip("importlinter.cli")
    assert (
        importlinter.lint_imports(config_filename=str(REPOSITORY / "pyproject.toml"), no_cache=True)
        == 0
    )


def test_kernels_import_no_jax() -> None:
    offenders = {name for name in files_importing("jax") if name.startswith("kernels/")}
    assert offenders <= {"kernels/lowering/derivative.py", "kernels/lowering/inlining.py"}


def test_only_kernels_and_ffi_import_the_compiler() -> None:
    offenders = {n for n in files_importing("cutlass") if not n.startswith(("kernels/", "ffi/"))}
    assert not offenders


def test_only_ffi_imports_jax_ffi() -> None:
    offenders = {name for name in files_importing("jax.ffi") if not name.startswith("ffi/")}
    assert not offenders


def test_import_brings_no_compiler() -> None:
    result = run_python(
        "import sys, jax_flashcute; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'cutlass', 'torch', 'flax'}))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_import_starts_no_backend() -> None:
    """With a platform that does not exist, the import works and the first use of JAX fails."""
    result = run_python("import jax_flashcute", JAX_PLATFORMS="no_such_platform")
    assert result.returncode == 0, result.stderr
    result = run_python("import jax; jax.devices()", JAX_PLATFORMS="no_such_platform")
    assert result.returncode != 0


@pytest.mark.parametrize("name", ["ffi", "kernels"])
def test_links_lead_into_the_package(name: str) -> None:
    link = REPOSITORY / name
    assert link.is_symlink()
    assert link.readlink() == Path("jax_flashcute") / name
