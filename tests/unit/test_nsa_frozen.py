"""Native sparse attention on the XLA path at real head_dims, against float64; all six gradients."""

import pytest

from tests.nsa_cases import CASES, check

FAST = ("below_a_block",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_against_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASES[name], "float32", "xla", monkeypatch)
