"""Results rows, grouped by run and laid out as Markdown tables."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cases import BUILDING, SUITES, Case

OURS = "jax_flashcute"
UNITS = {"tflops": "TFLOP/s", "gbs": "GB/s", "calls_ms": "calls a millisecond"}
CASE_FIELDS = (
    "batch",
    "seqlen_q",
    "seqlen_k",
    "q_heads",
    "kv_heads",
    "head_dim",
    "head_dim_v",
    "causal",
)

SUITE_OF = {case.name: suite for suite, cases in reversed(SUITES.items()) for case in cases}
"""The suite of a case, by name; a case that is in none any more stands for itself."""

Row = dict[str, Any]
Group = tuple[str, str, tuple[str, ...], str]
"""Suite, pass, implementations, unit."""


def suite(row: Row) -> str:
    """The suite of a row's case."""
    return SUITE_OF.get(row["case"], row["case"])


def label(row: Row) -> str:
    """The label of a row's case, with its name where the suite's does not tell it."""
    name = row["case"]
    text = Case(name, **{field: row[field] for field in CASE_FIELDS}).label
    return text if name == suite(row) or name in text else f"{name} {text}"


def latest_runs(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows by group: a cell's from the latest run of that company alone.

    Figures of different runs are not compared, so runs with other peers stand apart.
    """
    runs: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        runs[row["case"], row["pass"], label(row), row["run"]].append(row)
    latest: dict[tuple[str, str, str, tuple[str, ...]], list[Row]] = {}
    for (case, pass_, cell, _), run in runs.items():
        key = case, pass_, cell, tuple(implementations(run))
        if key not in latest or _age(run) > _age(latest[key]):
            latest[key] = run
    groups: dict[Group, list[Row]] = defaultdict(list)
    for (_, pass_, _, company), run in latest.items():
        groups[suite(run[0]), pass_, company, rate(run[0])[1]] += run
    return dict(
        sorted(groups.items(), key=lambda g: (g[0][0], g[0][1] != "fwd", -len(g[1]), g[0][2:]))
    )


def _age(run: list[Row]) -> tuple[str, str]:
    return max((row["date"], row["run"]) for row in run)


def by_cell(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows by the case's label, then by implementation, in the order of measurement."""
    cells: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cells[label(row)][row["implementation"]] = row
    return dict(cells)


def implementations(rows: Iterable[Row]) -> list[str]:
    """Names in the order of measurement, ours first."""
    return sorted(dict.fromkeys(row["implementation"] for row in rows), key=lambda n: n != OURS)


def rate(row: Row) -> tuple[float, str]:
    """The rate of a row and its unit's key; what makes lists has no products to count."""
    if row["case"] == BUILDING:
        return 1 / row["ms"], "calls_ms"
    return next((row[unit], unit) for unit in UNITS if unit in row)


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def table(rows: list[Row]) -> str:
    """A Markdown table: a line a cell, a column an implementation, the worst ratio last.

    Of one implementation alone, its times.
    """
    names = implementations(rows)
    cells = by_cell(rows)
    others = [name for name in names if name != OURS]
    unit = UNITS[rate(rows[0])[1]]
    header = [f"case, {unit}", *names]
    compare = OURS in names and bool(others)
    if compare:
        header.append(f"{OURS} / best other")
    elif len(names) == 1:
        header.append("ms")
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    ratios: dict[str, list[float]] = defaultdict(list)
    for name_of_cell, measured in cells.items():
        rates = {name: rate(row)[0] for name, row in measured.items()}
        best = max(rates.values())
        line = [name_of_cell]
        for name in names:
            if name not in rates:
                line.append("–")
                continue
            text = f"{rates[name]:.0f}"
            line.append(f"**{text}**" if rates[name] == best and len(names) > 1 else text)
        if compare:
            times = {name: row["ms"] for name, row in measured.items()}
            against = {
                name: times[name] / times[OURS]
                for name in others
                if name in times and OURS in times
            }
            for name, ratio in against.items():
                ratios[name].append(ratio)
            line.append(f"{min(against.values()):.2f}" if against else "–")
        elif len(names) == 1:
            line.append(f"{measured[names[0]]['ms']:.4f}")
        lines.append(line)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if ratios:
        means = ", ".join(
            f"{geometric_mean(each):.3f} of {name} ({len(each)} cells)"
            for name, each in ratios.items()
        )
        text += f"\n\nSpeed of {OURS}, geometric mean: {means}."
    return text
