"""The benchmark of context parallelism runs, small, on devices of a CPU."""

import json
from pathlib import Path

from benchmarks import context_parallel


def test_rows_of_one_and_two_devices(tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.json"
    arguments = (
        "--length 64 --heads 2,1 --head-dim 8 --dtype float32 --devices 1,2,1000 --passes fwd "
        f"--methods ring,flash_attention_3_jax --orders zigzag --rounds 2 --out {out}"
    )
    context_parallel.main(arguments.split())
    rows = json.loads(out.read_text())["rows"]
    found = [(r["devices"], r["context_parallel"], r["order"], r["pass"]) for r in rows]
    assert found == [(1, None, None, "fwd"), (2, "ring", "zigzag", "fwd")]
    assert all(row["ms"] > 0 and row["efficiency"] > 0 for row in rows)
    errors = capsys.readouterr().err
    assert "left out: 1000 devices" in errors
    assert "flash_attn3_jax" in errors  # it is not installed, or has no kernel for a CPU
    context_parallel.plot(rows, "two devices", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    ms, efficiency = rows[1]["ms"], rows[1]["efficiency"]
    assert efficiency == rows[0]["ms"] / (2 * ms)
    assert f"| 64 | fwd | 2 | ring | zigzag | {ms:.2f} | {efficiency:.3f} |" in (
        context_parallel.table(rows)
    )
