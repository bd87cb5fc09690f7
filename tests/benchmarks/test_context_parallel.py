"""The benchmark of context parallelism runs, small, on devices of a CPU."""

import json
from pathlib import Path

from benchmarks import context_parallel


def test_rows_of_one_and_two_devices(tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.json"
    context_parallel.main(
        f"--length 64 --heads 2,1 --head-dim 8 --dtype float32 --devices 1,2,1000 "
        f"--methods ring --orders zigzag --passes fwd --rounds 2 --out {out}".split()
    )
    rows = json.loads(out.read_text())
    found = [(r["devices"], r["context_parallel"], r["order"], r["pass"]) for r in rows]
    assert found == [(1, None, None, "fwd"), (2, "ring", "zigzag", "fwd")]
    assert all(row["ms"] > 0 and row["efficiency"] > 0 for row in rows)
    assert "left out: 1000 devices" in capsys.readouterr().err
