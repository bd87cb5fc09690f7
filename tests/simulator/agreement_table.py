"""Results of two runs of ``agreement.py`` side by side, and what is kept of a result for it."""

import base64
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "agreement.md"
RECORDS = tuple(RESULTS / machine / "agreement.json" for machine in ("simulator", "h200"))
"""What is simulated for Blackwell, and what a Hopper GPU gives."""

SAMPLES = 192
"""Numbers of each array that are kept."""

TEXT = """\
# Blackwell beside Hopper

Written by `python -m tests.simulator.agreement --table`. **No Blackwell GPU has run its kernels.**
What stands for one is the simulator, which runs the compiled kernels for sm_100a on a CPU; here the
same calls, with the same seeds, go through the kernels for sm_90a on a Hopper GPU. Each number is
the norm of a difference over that of the result, at 192 places of each: of either from the
reference in float64, and of the two from each other. Results in bfloat16 are rounded to 2^-9 of
themselves, 2e-3. In italics what a call's Blackwell kernels have and those of dense calls lack.
Biases and arrays of scores have gradients in one call, and pages none at all.

```sh
python -m tests.simulator.agreement --arch sm_100a --out benchmarks/results/simulator/agreement.json
python -m tests.simulator.agreement --arch sm_90a --gpu --out benchmarks/results/h200/agreement.json
python -m tests.simulator.agreement --table
```

"""


def encoded(array: np.ndarray) -> str:
    """Numbers of an array at places that follow from its size, as float32."""
    places = np.random.default_rng(array.size).integers(0, array.size, SAMPLES)
    return base64.b64encode(array.reshape(-1)[places].astype("<f4").tobytes()).decode()


def decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The norm of the difference over that of ``wanted``; equal infinities differ by 0."""
    equal = found == wanted
    difference = np.where(equal, 0, found - np.where(equal, 0, wanted))
    finite = np.where(np.isfinite(wanted), wanted, 0)
    return float(np.linalg.norm(difference) / max(np.linalg.norm(finite), 1e-2))


def errors(
    simulated: dict[str, Any], measured: dict[str, Any]
) -> Iterator[tuple[str, str, float, float, float]]:
    """Of every result of both: call, result, the errors of either, and how far they are apart.

    All over the samples, as ``error`` has it: against the reference, and the last of one against
    the other.
    """
    for name, of_call in simulated["calls"].items():
        for result, entry in of_call["results"].items():
            other = measured["calls"].get(name, {"results": {}})["results"].get(result)
            if other is not None:
                here, there = decoded(entry["samples"]), decoded(other["samples"])
                wanted = decoded(entry["expected"])
                yield name, result, error(here, wanted), error(there, wanted), error(there, here)


def page(simulated: dict[str, Any], measured: dict[str, Any] | None) -> str:
    """docs/agreement.md of two records, or where one has not been made."""
    if measured is None:
        return f"{TEXT}Not run on both yet.\n"
    heads = [f"{record['arch']}, {record['device']}" for record in (simulated, measured)]
    lines = [["call", *heads, "apart"], ["---", "---", "---", "---"]]
    cells: dict[str, list[list[str]]] = {}
    for name, result, *numbers in errors(simulated, measured):
        cells.setdefault(name, []).append([f"{result} {number:.1e}" for number in numbers])
    for name, of_call in cells.items():
        features = "; ".join(simulated["calls"][name]["features"])
        of_name = f"{name}<br>*{features}*" if features else name
        lines.append([of_name, *map("<br>".join, zip(*of_call, strict=True))])
    missing = [name for name in simulated["calls"] if name not in cells]
    runs = (f"{x['date'][:10]} at {commits(x)}" for x in (simulated, measured))
    notes = f"{len(cells)} calls, simulated on {' and run on '.join(runs)}."
    if missing:
        notes += f" Simulated alone: {'; '.join(missing)}."
    return TEXT + "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{notes}\n"


def commits(record: dict[str, Any]) -> str:
    """At which its calls were run, and how many at each."""
    counts = Counter(
        of_call.get("commit", record["commit"]) for of_call in record["calls"].values()
    )
    return ", ".join(f"`{commit}` ({count})" for commit, count in counts.items())


def write_page() -> None:
    simulated, measured = (json.loads(x.read_text()) if x.exists() else None for x in RECORDS)
    if simulated is None:
        raise FileNotFoundError(f"nothing is simulated: {RECORDS[0]} does not exist")
    PAGE.write_text(page(simulated, measured))
