"""Make tables and plots of measured results.

    python -m benchmarks.report            # benchmarks/results/<gpu>/ -> docs/measured/<gpu>.md

For every cell and set of implementations the latest run is shown: figures stand on one line only
where they were measured side by side.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import call_by_call, context_parallel, nsa, start_up
from benchmarks.tables import OURS, UNITS, Row, by_cell, implementations, latest_runs, rate, table

REPOSITORY = Path(__file__).resolve().parent.parent
PASS_NAMES = {"fwd": "forward", "bwd": "backward"}


def read_rows(folder: Path) -> list[Row]:
    """The rows of all results files of a folder; a file that is no list holds something else."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, list):
            rows += content
    return rows


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


def footnotes(rows: list[Row]) -> list[str]:
    """Which runs a table shows, how they were timed and started, and what ran in another dtype."""
    clocks = {"device": "busy time of the GPU", "host": "the host's clock over asynchronous calls"}
    lines = []
    for run in {row["run"]: row for row in rows}.values():
        lines += [
            f"Run `{run['run']}`, commit `{run['commit']}`, {run['date'][:10]}; "
            f"{clocks[run['clock']]}:",
            "",
            "```sh",
            run["command"],
            "```",
            "",
        ]
    dtypes = {row["implementation"]: row["dtype"] for row in rows}
    lines += [f"`{name}` ran in {dtype}." for name, dtype in dtypes.items() if dtype != "bfloat16"]
    return lines


def rows_of(path: Path) -> list[dict]:
    """The rows of a program with a file of its own; none where it has not run."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def sections(results: Path, out: Path, gpu: str) -> tuple[list[str], list[Path]]:
    """Lines on native sparse attention, several devices and starting, and the plots written."""
    lines: list[str] = []
    written = []
    if (path := results / "nsa.json").exists():
        rows = json.loads(path.read_text())
        picture = out / f"{results.name}_nsa_curve.png"
        nsa.plot(rows, f"Dense causal and native sparse attention, {gpu}", picture)
        written.append(picture)
        lines += ["", "## native sparse attention over the length", ""]
        lines += [f"![Time and stages over the length, {gpu}]({picture.name})"]
        for pass_, name in PASS_NAMES.items():
            lines += ["", f"{name.capitalize()}:", "", nsa.shares(rows, pass_)]
    if rows := rows_of(results / "context_parallel.json"):
        picture = out / f"{results.name}_context_parallel.png"
        context_parallel.plot(rows, f"One causal sequence on several devices, {gpu}", picture)
        written.append(picture)
        lines += [
            *("", "## context parallelism", "", f"![Scaling over devices, {gpu}]({picture.name})"),
            *("", context_parallel.table(rows), ""),
            f"`python -m benchmarks.context_parallel`, {rows[0]['date'][:10]}, on the host's",
            "clock; of perfect scaling by the one device above, of the same run.",
        ]
    if rows := rows_of(results / "train_on_mesh.json"):
        lines += ["", "## training on meshes", "", mesh_table(rows), ""]
        lines.append("`examples/train_on_mesh.py`; data x model x context.")
    for path in sorted(results.glob("*_call_by_call.json")):
        made = json.loads(path.read_text())
        suite = path.stem.removesuffix("_call_by_call")
        lines += ["", f"## {suite}, single calls in turns", ""]
        lines += [call_by_call.table(made["rows"]), ""]
        lines += [f"`{made['command']}`, commit `{made['commit']}`, {made['date'][:10]}."]
    if rows := rows_of(results / "start_up.json"):
        lines += ["", "## starting", "", start_up.table(rows), ""]
        lines += [f"Commit `{rows[0]['commit']}`, {rows[0]['date'][:10]};"]
        lines.append("`python -m benchmarks.start_up`. All times are the host's, in seconds or ms.")
    return lines, written


def mesh_table(rows: list[dict]) -> str:
    """Tokens a second of ``examples/train_on_mesh.py``."""
    lines = [
        "| mesh | devices | tokens | tokens a second | first and last loss, bits a byte |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = ["x".join(map(str, row["mesh"].values())), str(row["devices"])]
        cells += [f"{row['batch']} x {row['seq_len']:,}", f"{row['tokens_per_second']:,.0f}"]
        cells.append(f"{row['bits_per_byte'][0]:.4f}, {row['bits_per_byte'][-1]:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
        "Made by `python -m benchmarks.report` from the results in the repository. What stands on",
        "one line was measured in one run: all implementations in one process, in turns, on random",
        "normal inputs. A bar's whisker is the distance between the medians of the fastest and the",
        "slowest round.",
    ]
    written = []
    headings = set()
    for (suite, pass_, company, unit), rows in groups.items():
        # The company with the most rows has the plain name.
        name, heading = f"{results.name}_{suite}_{pass_}", f"{suite}, {PASS_NAMES[pass_]}"
        apart = [peer for peer in company if peer != OURS]
        for words, shown in ((apart, ", ".join(apart)), ([unit], UNITS[unit])):
            if heading in headings and words:
                name, heading = "_".join([name, *words]), f"{heading}: {shown}"
        headings.add(heading)
        lines += ["", f"## {heading}", ""]
        if len(rows) > 1:
            picture = out / f"{name}.png"
            plot(rows, f"{heading}, {gpu}", picture)
            written.append(picture)
            lines += [f"![{heading}, {gpu}]({picture.name})", ""]
        lines += [table(rows), "", *footnotes(rows)]
    more, pictures = sections(results, out, gpu)
    lines += more
    written += pictures
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
