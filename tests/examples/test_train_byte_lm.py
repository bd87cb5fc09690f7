"""The example that trains: it runs, and its loss does not depend on the implementation."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from byte_decoder import load_model
from train_byte_lm import cross_entropy, cut, read_standard_library

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "model.safetensors"
SHORT = ["--steps", "12", "--seq-len", "48", "--batch", "2"]


def train(out: Path, *arguments: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    script = REPOSITORY / "examples" / "train_byte_lm.py"
    result = subprocess.run(
        [sys.executable, script, "--out", out, "--save", out / MODEL, *SHORT, *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (out / "log.json").exists(), result.stderr
    return json.loads((out / "log.json").read_text()), result


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("training")
    return {name: train(folder / name, "--implementation", name) for name in ("xla", "reference")}


def test_it_trains_and_says_so(logs) -> None:
    log, result = logs["xla"]
    bits = log["bits_per_byte"]
    assert len(bits) == 12
    assert np.mean(bits[-3:]) < np.mean(bits[:3]) - 0.5
    assert "Held-out text" in result.stdout
    assert "What it writes" in result.stdout
    assert 2 < log["bigram_bits_per_byte"] < 5
    assert log["tokens_per_second"] > 0


def test_too_few_steps_fail_with_the_reason(logs) -> None:
    """Twelve steps do not beat a bigram model by a tenth: the exit code has to say so."""
    log, result = logs["xla"]
    assert log["held_out_bits_per_byte"] > 0.9 * log["bigram_bits_per_byte"]
    assert result.returncode == 1
    assert "not clearly better" in result.stderr


def test_losses_agree_between_implementations(logs) -> None:
    ours, reference = (logs[name][0]["bits_per_byte"] for name in ("xla", "reference"))
    np.testing.assert_allclose(ours, reference, rtol=2e-3)


def test_the_saved_model_has_learned(logs) -> None:
    """What comes back predicts text as well as the log says, not as one that was never trained."""
    log, _ = logs["xla"]
    model = load_model(Path(log["arguments"]["save"]), "float32", "xla")
    assert dataclasses.asdict(model.config) == log["model"]
    _, held_out = read_standard_library()
    windows = cut(held_out, np.linspace(0, len(held_out) - 49, 24).astype(np.int64), 49)
    bits = float(cross_entropy(model, jnp.asarray(windows))) / math.log(2)
    assert bits < np.mean(log["bits_per_byte"][:3]) - 0.5


def test_several_logs_make_one_picture(logs, tmp_path: Path) -> None:
    folder = Path(logs["xla"][0]["arguments"]["out"]).parent
    assert (folder / "xla" / "loss.png").read_bytes().startswith(b"\x89PNG")
    script = REPOSITORY / "examples" / "plot_losses.py"
    paths = [folder / name / "log.json" for name in logs]
    subprocess.run([sys.executable, script, *paths, "--out", tmp_path / "both.png"], check=True)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
