"""What the documentation is given as it is built."""

import json

from tools import docs_hooks


def test_the_support_table_gives_the_registrys_reasons() -> None:
    rows = dict(docs_hooks.support())
    assert rows["`is_causal`"]["Hopper, forward"] == []
    assert rows["`is_causal`"]["Hopper, backward"] == []
    assert any("float32" in reason for reason in rows["float32"]["Hopper, forward"])
    assert all(reasons.keys() == docs_hooks.COLUMNS.keys() for reasons in rows.values())
    table = docs_hooks.on_page_markdown("<!-- support table -->", None, None, None)
    assert "| `is_causal` | yes | yes |" in table
    assert "1. " in table


def test_transform_tables_are_those_recorded(tmp_path, monkeypatch) -> None:
    cells = {"dense": {"jit": "passes", "grad": "passes"}, "paged": {"grad": "NotImplemented: no"}}
    record = {"device": "a machine", "jax": "1", "date": "2026-01-01T", "commit": "c"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "transforms.json").write_text(json.dumps(record | {"cells": cells}))
    monkeypatch.setattr(docs_hooks, "RESULTS", tmp_path)
    text = docs_hooks.transform_tables()
    assert "## On a machine" in text
    assert "| jit | passes | not run |" in text
    assert "| grad | passes | refused (1) |" in text
    assert "1. NotImplemented: no" in text


def test_times_are_those_measured_last(tmp_path, monkeypatch) -> None:
    row = {"case": "causal", "pass": "fwd", "implementation": "jax_flashcute", "gpu": "a GPU"}
    row |= {"seqlen_q": 4096, "seqlen_k": 4096, "q_heads": 8, "kv_heads": 2}
    rows = [row | {"date": f"2026-01-0{day}", "ms": float(day)} for day in (2, 3, 1)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "functions.json").write_text(json.dumps(rows))
    monkeypatch.setattr(docs_hooks, "RESULTS", tmp_path)
    text = docs_hooks.times_of_functions()
    assert "On one a GPU" in text
    assert "| `is_causal` | 4,096 on 4,096, 8/2 | 3.00 | – |" in text


def test_the_recorded_table_is_whole() -> None:
    record = json.loads((docs_hooks.RESULTS / "cpu" / "transforms.json").read_text())
    assert len(record["cells"]) == 9
    assert {len(outcomes) for outcomes in record["cells"].values()} == {12}


def test_pictures_are_drawn() -> None:
    assert docs_hooks.PICTURES["causal"]().counts == {"full": 15, "partial": 6, "skipped": 15}
