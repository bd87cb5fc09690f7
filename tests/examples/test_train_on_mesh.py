"""Data, tensor and context parallelism train what one device trains."""

import json
from pathlib import Path

import numpy as np
import pytest
import train_on_mesh
from byte_decoder import ModelConfig

ARGUMENTS = "--steps 4 --seq-len 16 --batch 2 --dtype float32 --learning-rate 0.03"


def test_every_mesh_trains_alike(tmp_path: Path, monkeypatch, capsys) -> None:
    config = ModelConfig(layers=1, width=16, q_heads=4, kv_heads=2, head_dim=8, hidden=16)
    monkeypatch.setitem(train_on_mesh.SIZES, "tiny", config)
    text = np.random.default_rng(0).integers(97, 123, 4000, np.uint8)
    monkeypatch.setattr(train_on_mesh, "read_standard_library", lambda: (text, text))
    out = tmp_path / "rows.json"
    arguments = f"train_on_mesh.py --meshes 1x1x1,2x2x2,100x1x1 {ARGUMENTS} --out {out}"
    monkeypatch.setattr("sys.argv", arguments.split())
    assert train_on_mesh.main() == 0
    one, eight = json.loads(out.read_text())["rows"]
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert eight["mesh"] == {"data": 2, "model": 2, "context": 2}
    assert eight["bits_per_byte"] == pytest.approx(one["bits_per_byte"], abs=1e-4)
    assert one["bits_per_byte"][-1] < one["bits_per_byte"][0]
    assert one["tokens_per_second"] > 0
    assert "left out: 100x1x1; there are 8 devices" in capsys.readouterr().err
