"""The example with sparse beside dense attention: both train on the same text, both are drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_both_models_train(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "train_nsa.py"
    arguments = ["--steps", "10", "--seq-len", "48", "--batch", "2", "--window", "16"]
    result = subprocess.run(
        [sys.executable, script, "--out", tmp_path, *arguments, "--implementation", "xla"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    logs = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("dense", "sparse")]
    for log in logs:
        bits = log["bits_per_byte"]
        assert len(bits) == 10
        assert np.mean(bits[-3:]) < np.mean(bits[:3]) - 0.5
    # Three layers of gates: (N, 3, H) each.
    assert logs[1]["parameters"] - logs[0]["parameters"] == 3 * 4 * 3 * 32
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
