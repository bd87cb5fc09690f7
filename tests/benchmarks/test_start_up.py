"""Where a bundle is measured there is no compiler; its plans and its table say what was run."""

import os
import tomllib
from pathlib import Path

import pytest

from benchmarks import start_up
from jax_flashcute.cli import ahead


def test_the_runtime_alone(tmp_path: Path) -> None:
    pytest.importorskip("cutlass")
    start_up.runtime_only(tmp_path)
    assert list(tmp_path.rglob("libcute_dsl_runtime.so"))
    environment = dict(os.environ)
    assert not start_up.compiler_is_absent(environment)
    assert start_up.compiler_is_absent(environment | {"PYTHONPATH": str(tmp_path)})


def test_plans_are_calls() -> None:
    calls = tomllib.loads(start_up.plans())["call"]
    assert len(calls) == 10
    assert {call.get("function", "flash_attention") for call in calls} <= set(ahead.FUNCTIONS)


def test_the_table_has_every_figure() -> None:
    rows = [
        {"what": "server", **start_up.ABSENT, "first_token": 3.25, "commit": "c"},
        {"what": "demo", "error": "RuntimeError: no"},
    ]
    assert start_up.table(rows).splitlines()[2:] == [
        "| server | bundle, no compiler | first token 3.25 |",
        "| demo |  | error RuntimeError: no |",
    ]
