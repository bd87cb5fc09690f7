"""What every test shares: the two markers, and the record of a run on a GPU.

``gpu`` tests are skipped where JAX finds no CUDA device; ``slow`` ones are deselected unless
``--run-slow`` is given.  ``--record-run FILE`` writes what was run, where and with which outcome,
so that the last run on a GPU can be kept beside the benchmark results.
"""

import functools
import json
import os
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

# Tests share a GPU with each other and with other programs: take memory as it is needed.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# References take the first product that XLA knows: to try them all out is most of a test on a GPU.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
    "--xla_gpu_force_compilation_parallelism=2",
)
# Meshes are tested over this many devices of the CPU.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("jax_flashcute")
    group.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    group.addoption(
        "--record-run",
        metavar="FILE",
        type=Path,
        help="write command, device, versions, date and counts of this run to FILE (JSON)",
    )
    group.addoption(
        "--record-transforms",
        metavar="FILE",
        type=Path,
        help="write the table of tests/transforms/test_matrix.py to FILE (JSON)",
    )


class TransformRecorder:
    """Gathers the table of transforms from the workers' reports and writes it when the run ends."""

    def __init__(self, path: Path):
        self.path = path
        self.cells: list[tuple[tuple[int, int], str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # What a skipped test noted stays out, a failed one's says so.
        if report.when == "call" and not report.skipped:
            found = [value for name, value in report.user_properties if name == "transform"]
            self.cells += [(tuple(place), *rest) for place, *rest in found]

    def pytest_sessionfinish(self) -> None:
        import jax

        table: dict[str, dict[str, str]] = {}
        for _, feature, transform, outcome in sorted(self.cells):
            table.setdefault(feature, {})[transform] = outcome
        record = {
            "device": jax.devices()[0].device_kind,
            "devices": len(jax.devices()),
            "jax": jax.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "cells": table,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=2) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist hand their reports to the controller, which alone writes.
    if config.getoption("--record-run") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(RunRecorder(config.getoption("--record-run")), "run-recorder")
    elif config.getoption("--record-run"):
        config.pluginmanager.register(WorkerDevice(), "worker-device")
    path = config.getoption("--record-transforms")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(TransformRecorder(path), "transform-recorder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := no_cuda_device()):
        pytest.skip(reason)


@functools.cache
def no_cuda_device() -> str | None:
    """Why JAX has no CUDA device to test on, or None where it has one."""
    import jax

    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"JAX has no CUDA device: {str(error).splitlines()[0]}"
    return None


def device_in_use() -> dict[str, str]:
    """What JAX runs on in this process."""
    import jax

    device = jax.devices()[0]
    version = device.client.platform_version.strip()
    return {"device": device.device_kind, "platform_version": version}


class WorkerDevice:
    """Tells the controller of pytest-xdist what a worker's tests ran on."""

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        session.config.workeroutput["device"] = device_in_use()  # pyright: ignore


class RunRecorder:
    """Counts the outcomes of a run and writes them to a JSON file when it ends."""

    def __init__(self, path: Path):
        self.path = path
        self.start = time.monotonic()
        self.counts = dict.fromkeys(["passed", "failed", "error", "skipped", "xfailed"], 0)
        self.not_passed: list[str] = []
        self.device: dict[str, str] | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self.device = getattr(node, "workeroutput", {}).get("device") or self.device

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "wasxfail"):
            outcome = "xfailed"
        elif report.failed:
            outcome = "failed" if report.when == "call" else "error"
        elif report.skipped or report.when == "call":
            outcome = report.outcome
        else:
            return
        self.counts[outcome] += 1
        if outcome in ("failed", "error"):
            self.not_passed.append(f"{report.nodeid} ({report.when})")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        import jax
        import jaxlib

        # A path outside the repository shrinks to its name.
        words = map(str, session.config.invocation_params.args)
        arguments = [Path(word).name if Path(word).is_absolute() else word for word in words]
        record = {
            "command": shlex.join(["python", "-m", "pytest", *arguments]),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **(self.device or device_in_use()),
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "seconds": round(time.monotonic() - self.start, 1),
            "exit_status": int(exitstatus),
            "counts": self.counts,
            "not_passed": self.not_passed,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=2) + "\n")


def commit() -> str | None:
    """The commit that is tested, as the environment or git names it."""
    named = os.environ.get("JAX_FLASHCUTE_COMMIT")
    return named or git("describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")


def git(*arguments: str) -> str | None:
    """The output of a git command in this repository, or None where git cannot tell."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
