"""What is recorded of Blackwell's kernels in simulation, and its table beside a Hopper GPU's."""

import json

import numpy as np
import pytest

from tests.simulator import agreement, agreement_table

FORWARD = {"O", "LSE"}
FEATURES = {
    "backward: pairs of blocks",
    "backward: a kernel for each gradient",
    "backward: deterministic",
    "backward: gradients of arrays",
    "forward: heads share a tile",
    "forward: split-KV",
    "pages by TMA",
    "pages by asynchronous copies",
    "lists given",
    "lists made in the call",
    "bounds of rows in arrays",
    "ids are compared",
    "2 intervals",
    "3 intervals",
    "a mask in bits",
    "scores are changed",
    "scores are hidden one by one",
    "forward: sinks",
}


@pytest.fixture(scope="module")
def simulated() -> dict:
    return json.loads(agreement_table.RECORDS[0].read_text())


def test_what_is_simulated_for_blackwell_agrees_with_the_reference(simulated: dict) -> None:
    assert simulated["arch"] == "sm_100a"
    assert simulated["calls"].keys() == agreement.CALLS.keys() | agreement.PAGES.keys()
    for name, of_call in simulated["calls"].items():
        results = FORWARD | set(() if name in agreement.PAGES else agreement.gradients_of(name))
        assert of_call["results"].keys() == results
        for result, entry in of_call["results"].items():
            samples = (agreement_table.decoded(entry[x]) for x in ("samples", "expected"))
            errors = entry["error"], agreement_table.error(*samples)
            assert max(errors) < (1e-5 if result == "LSE" else 1e-2), (name, result, errors)


def test_every_feature_is_among_what_is_simulated(simulated: dict) -> None:
    found = {feature for of_call in simulated["calls"].values() for feature in of_call["features"]}
    assert FEATURES <= found, FEATURES - found


def test_features_are_those_of_the_kernels(simulated: dict) -> None:
    for name in ("several pairs of blocks", "segments", "split-KV, groups of 7", "pages of 4"):
        assert agreement.features(name, "sm_100a") == simulated["calls"][name]["features"]


def test_the_table_compares_what_both_have() -> None:
    ones, more = (agreement_table.encoded(np.full(5, x)) for x in (1.0, 1.5))
    one, other = {"samples": ones, "expected": ones}, {"samples": more}
    calls = {"causal": {"O": one, "LSE": one}, "window": {"O": one}}
    records = []
    for device, given in (("simulator", calls), ("a GPU", {"causal": {"O": other, "LSE": one}})):
        of_calls = {n: {"features": ["lists given"], "results": x} for n, x in given.items()}
        made = {"arch": "sm", "device": device, "date": "2026-01-01T", "commit": "c"}
        records.append(made | {"calls": of_calls})
    text = agreement_table.page(*records)
    assert "| call | sm, simulator | sm, a GPU | apart |" in text
    row = "| causal<br>*lists given* | O 0.0e+00<br>LSE 0.0e+00 | O 5.0e-01<br>LSE 0.0e+00 | O 5.0"
    assert row in text
    runs = "simulated on 2026-01-01 at `c` (2) and run on 2026-01-01 at `c` (1). "
    assert f"1 calls, {runs}" in text
    assert text.endswith("Simulated alone: window.\n")


def test_the_page_is_that_of_the_records() -> None:
    records = [json.loads(x.read_text()) if x.exists() else None for x in agreement_table.RECORDS]
    assert agreement_table.PAGE.read_text() == agreement_table.page(*records)
