"""What the documentation is given as it is built."""

import json

import numpy as np

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


def test_what_is_simulated_for_blackwell_agrees_with_the_reference() -> None:
    record = json.loads((docs_hooks.RESULTS / "simulator" / "agreement.json").read_text())
    assert record["arch"] == "sm_100a"
    assert len(record["calls"]) == 28
    for name, of_call in record["calls"].items():
        assert set(of_call) == ({"O", "LSE"} if "pages" in name else {"O", "LSE", "dQ", "dK", "dV"})
        for result, entry in of_call.items():
            samples = (docs_hooks.decoded(entry[x]) for x in ("samples", "expected"))
            errors = entry["error"], docs_hooks.error(*samples)
            assert max(errors) < (1e-5 if result == "LSE" else 1e-2), (name, result, errors)


def test_the_agreement_table_compares_what_both_have(tmp_path, monkeypatch) -> None:
    one = {"samples": docs_hooks.encoded(np.ones(5)), "expected": docs_hooks.encoded(np.ones(5))}
    other = {"samples": docs_hooks.encoded(np.full(5, 1.5))}
    for machine, calls in (
        ("simulator", {"causal": {"O": one, "LSE": one}, "window": {"O": one}}),
        ("h200", {"causal": {"O": other, "LSE": one}}),
    ):
        (tmp_path / machine).mkdir()
        made = {"date": "2026-01-01T", "commit": "c"}
        record = {"arch": "sm", "device": machine, **made, "calls": calls}
        (tmp_path / machine / "agreement.json").write_text(json.dumps(record))
    monkeypatch.setattr(docs_hooks, "RESULTS", tmp_path)
    text = docs_hooks.agreement_table()
    assert "|  | sm, simulator | sm, h200 | apart |" in text
    assert "O 0.0e+00<br>LSE 0.0e+00 | O 5.0e-01<br>LSE 0.0e+00 | O 5.0e-01<br>LSE" in text
    assert "window" not in text


def test_pictures_are_drawn() -> None:
    assert docs_hooks.PICTURES["causal"]().counts == {"full": 15, "partial": 6, "skipped": 15}
