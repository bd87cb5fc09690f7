"""Make tables and plots of measured results.

    python -m benchmarks.report            # benchmarks/results/<gpu>/ -> docs/measured/<gpu>.md

For every case and pass, the latest run that measured it is shown: figures stand side by side only
where they were measured side by side.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.cases import Case

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = "jax_flashcute"
UNITS = {"tflops": "TFLOP/s", "gbs": "GB/s"}
PASS_NAMES = {"fwd": "forward", "bwd": "backward"}
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

Row = dict[str, Any]


def read_rows(folder: Path) -> list[Row]:
    """The rows of all results files of a folder; a file that is no list holds something else."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, list):
            rows += content
    return rows


def latest_runs(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (case, pass), of the run with the latest date alone."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["case"], row["pass"]].append(row)
    for key, group in groups.items():
        latest = max(group, key=lambda row: (row["date"], row["run"]))["run"]
        groups[key] = [row for row in group if row["run"] == latest]
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != "fwd")))


def by_cell(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows by the case's label, then by implementation, in the order of measurement."""
    cells: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        case = Case(row["case"], **{field: row[field] for field in CASE_FIELDS})
        cells[case.label][row["implementation"]] = row
    return dict(cells)


def implementations(rows: Iterable[Row]) -> list[str]:
    """Names in the order of measurement, ours first."""
    return sorted(dict.fromkeys(row["implementation"] for row in rows), key=lambda n: n != OURS)


def rate(row: Row) -> tuple[float, str]:
    """The rate of a row and its unit's key."""
    return next((row[unit], unit) for unit in UNITS if unit in row)


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def table(rows: list[Row]) -> str:
    """A Markdown table: a line a cell, a column an implementation, the worst ratio last."""
    names = implementations(rows)
    cells = by_cell(rows)
    others = [name for name in names if name != OURS]
    unit = UNITS[rate(rows[0])[1]]
    header = [f"case, {unit}", *names]
    compare = OURS in names and bool(others)
    if compare:
        header.append(f"{OURS} / best other")
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    ratios: dict[str, list[float]] = defaultdict(list)
    for label, measured in cells.items():
        rates = {name: rate(row)[0] for name, row in measured.items()}
        best = max(rates.values())
        line = [label]
        for name in names:
            if name not in rates:
                line.append("–")
                continue
            text = f"{rates[name]:.0f}"
            line.append(f"**{text}**" if rates[name] == best else text)
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
        lines.append(line)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if ratios:
        means = ", ".join(
            f"{geometric_mean(each):.3f} of {name} ({len(each)} cells)"
            for name, each in ratios.items()
        )
        text += f"\n\nSpeed of {OURS}, geometric mean: {means}."
    return text


def plot(rows: list[Row], title: str, path: Path) -> None:
    """A bar chart: a group a cell, a bar an implementation."""
    names = implementations(rows)
    cells = by_cell(rows)
    figure, axes = plt.subplots(figsize=(max(6, 0.85 * len(cells) + 2), 4.4), layout="constrained")
    colors = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        places, heights, errors = [], [], []
        for x, measured in enumerate(cells.values()):
            if name in measured:
                row = measured[name]
                value = rate(row)[0]
                places.append(x + (i - (len(names) - 1) / 2) * width)
                heights.append(value)
                errors.append(value * row["ms_spread"] / row["ms"] / 2)
        axes.bar(places, heights, width * 0.92, yerr=errors, color=colors[name], label=name,
                 error_kw={"linewidth": 0.7})  # fmt: skip
    labels = [label.replace(" ", "\n") for label in cells]
    axes.set_xticks(np.arange(len(cells)), labels, fontsize=8)
    axes.margins(x=0.01)
    axes.set_ylabel(UNITS[rate(rows[0])[1]])
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, ncols=min(5, len(names)), fontsize=8, loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(results: Path, out: Path) -> list[Path]:
    """Write ``<gpu>.md`` and its plots for one GPU's results; the paths written."""
    groups = latest_runs(read_rows(results))
    if not groups:
        return []
    out.mkdir(parents=True, exist_ok=True)
    gpu = next(iter(groups.values()))[0]["gpu"]
    lines = [
        f"# Measured on {gpu}",
        "",
        "Made by `python -m benchmarks.report` from the results in the repository. Each table is",
        "one run: all implementations in one process, in turns, on random normal inputs. A bar's",
        "whisker is the distance between the medians of the fastest and the slowest round.",
    ]
    written = []
    for (case, pass_), rows in groups.items():
        first = rows[0]
        picture = out / f"{results.name}_{case}_{pass_}.png"
        title = f"{case}, {PASS_NAMES[pass_]}, {gpu}"
        plot(rows, title, picture)
        written.append(picture)
        clock = {
            "device": "busy time of the GPU",
            "host": "the host's clock over many asynchronous calls",
        }[first.get("clock", "host")]
        others = sorted({row["dtype"] for row in rows} - {"bfloat16"})
        exceptions = [
            f"{row['implementation']} ran in {row['dtype']}."
            for row in {row["implementation"]: row for row in rows}.values()
            if row["dtype"] in others
        ]
        lines += [
            "",
            f"## {case}, {PASS_NAMES[pass_]}",
            "",
            f"![{title}]({picture.name})",
            "",
            table(rows),
            "",
            f"Run `{first['run']}`, commit `{first['commit']}`, {first['date'][:10]}; {clock}. "
            + " ".join(exceptions),
            "",
            "```sh",
            first.get("command", ""),
            "```",
        ]
    page = out / f"{results.name}.md"
    page.write_text("\n".join(line.rstrip() for line in lines) + "\n")
    return [page, *written]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "measured")
    args = parser.parse_args(argv)
    folders = sorted(path for path in args.results.glob("*") if path.is_dir())
    written = [path for folder in folders for path in report(folder, args.out)]
    for path in written:
        print(f"Wrote {path}")
    if not written:
        print(f"No results under {args.results}", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
