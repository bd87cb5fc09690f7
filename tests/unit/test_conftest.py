"""The suite's own options: slow tests wait to be asked for, and a run can be recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"

TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert 0

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.gpu
def test_gpu(): pass

@pytest.fixture
def broken(): raise ValueError("no")

def test_errs(broken): pass

@pytest.mark.xfail
def test_fails_as_expected(): assert 0
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu:\n  slow:\n")
    return tmp_path


def run(suite: Path, *arguments: str, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=suite,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_slow_tests_wait_to_be_asked_for(suite: Path) -> None:
    assert "1 deselected" in run(suite, "--collect-only", "-q").stdout
    assert "deselected" not in run(suite, "--collect-only", "-q", "--run-slow").stdout


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_recorded_run_tells_what_happened(suite: Path, workers: str) -> None:
    arguments = ["-n", workers, "--record-run", "records/run.json"]
    result = run(suite, *arguments, JAX_FLASHCUTE_COMMIT="0123abc")
    record = json.loads((suite / "records" / "run.json").read_text())
    assert record["counts"] == {"passed": 1, "failed": 1, "error": 1, "skipped": 1, "xfailed": 1}
    assert record["not_passed"] == [
        "test_it.py::test_fails (call)",
        "test_it.py::test_errs (setup)",
    ]
    assert record["exit_status"] == result.returncode == 1
    assert record["command"] == f"python -m pytest -p no:cacheprovider {' '.join(arguments)}"
    assert record["commit"] == "0123abc"
    assert record["device"] == "cpu"
    assert "JAX has no CUDA device" in run(suite, "-rs", "-m", "gpu").stdout
