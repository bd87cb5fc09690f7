"""Finding a Python for the virtual environment, and saying what to install where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# A pyenv shim whose version is not selected, a complete Python, one without python3-venv.
BROKEN = "#!/bin/sh\necho 'command not found' >&2\nexit 127\n"
COMPLETE = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
WITHOUT_VENV = f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec "{sys.executable}" "$@"\n'


def find_python(
    folder: Path, scripts: dict[str, str], **environment: str
) -> subprocess.CompletedProcess[str]:
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return subprocess.run(
        [REPOSITORY / "tools" / "find_python.sh"],
        env={"PATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", ["python3", "python3.12", "python3.13", "python"])
def test_finds_a_python_by_any_of_its_names(tmp_path: Path, name: str) -> None:
    result = find_python(tmp_path, {"python3": BROKEN} | {name: COMPLETE})
    assert result.returncode == 0
    assert os.path.samefile(result.stdout.strip(), sys.executable)


def test_finds_a_version_that_pyenv_has_but_not_selected(tmp_path: Path) -> None:
    versions = tmp_path / "root" / "versions" / "3.12.9" / "bin"
    versions.mkdir(parents=True)
    (versions / "python").write_text(COMPLETE)
    (versions / "python").chmod(0o755)
    pyenv = f"#!/bin/sh\necho '{tmp_path}/root'\n"
    scripts = {"python3": BROKEN, "python3.12": BROKEN, "pyenv": pyenv}
    result = find_python(tmp_path, scripts, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert result.returncode == 0
    assert Path(result.stdout.strip()).exists()


def test_says_what_to_install(tmp_path: Path) -> None:
    result = find_python(tmp_path, {"python3": BROKEN})
    assert result.returncode == 1
    assert "Python 3.12 or newer is needed" in result.stderr
    for command in ("sudo apt-get install python3", "pyenv install 3.12", "uv python install 3.12"):
        assert command in result.stderr


def test_says_when_only_venv_is_missing(tmp_path: Path) -> None:
    result = find_python(tmp_path, {"python3": WITHOUT_VENV})
    assert result.returncode == 1
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"sudo apt-get install python{version}-venv" in result.stderr


def test_a_named_python_is_used_or_refused(tmp_path: Path) -> None:
    result = find_python(tmp_path, {"mine": COMPLETE}, PYTHON=str(tmp_path / "mine"))
    assert result.returncode == 0
    result = find_python(tmp_path, {"python3": COMPLETE}, PYTHON=str(tmp_path / "missing"))
    assert result.returncode == 1
    assert "is not a Python >= 3.12" in result.stderr
