"""How long cases take as parts of another one, from single calls that take turns.

    python -m benchmarks.call_by_call --cases paged --filter 4x2048 --base '^not_paged ' \\
        --out benchmarks/results/h200/paged_call_by_call.json

Or as parts of the same case of another implementation (``--against``).

A GPU's clocks follow its power draw within tens of milliseconds.  Two kernels that are timed over
many calls each, as ``benchmarks.run`` does, run at clocks of their own; where each call comes right
after one of the other both have the same, and quartiles of the ratio lie 0.001 apart.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.cases import PASSES, SUITES, Case, Pass
from benchmarks.measure import Clock, Step
from benchmarks.run import (
    choose_clock,
    command_line,
    needs_gpu,
    release_memory,
    run_details,
    some_of,
)

WARM_UP = 10
"""Turns that do not count."""


def ratios(step: Step, base: Step, clock: Clock, pairs: int) -> dict[str, Any]:
    """The ratio of a step's calls to those of ``base`` right after them, and both in ms.

    Args:
      step: what is measured.
      base: what it is compared with.
      clock: what times both.
      pairs: of calls that count.
    """
    turns = clock.time_in_turns([step, base], WARM_UP + pairs)[WARM_UP:]
    found = [ms / of_base for ms, of_base in turns]
    low, median, high = statistics.quantiles(found, n=4)
    return {
        "ratio": round(median, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "ms": round(statistics.median(ms for ms, _ in turns), 5),
        "base_ms": round(statistics.median(ms for _, ms in turns), 5),
        "pairs": pairs,
    }


def named(case: Case) -> str:
    """A case's name and label, which ``--filter`` and ``--base`` are looked for in."""
    return f"{case.name} {case.label}"


def measure_pass(args: argparse.Namespace, pass_: Pass, clock: Clock) -> list[dict[str, Any]]:
    """A row for each case and round; a case that fails is reported and left out."""
    build = peers.load(args.peer).build
    cases = [case for suite in args.cases for case in SUITES[suite]]
    chosen = [case for case in cases if re.search(args.filter, named(case))]
    base_case, base, rows = None, None, []
    if args.base is not None:
        bases = [case for case in chosen if re.search(args.base, named(case))]
        if len(bases) != 1:
            raise SystemExit(f"--base must match one case of {len(chosen)}, got {len(bases)}")
        base_case = bases[0]
        base = build(base_case, pass_)
    for case in chosen:
        if case == base_case:
            continue
        step = other = None
        try:
            step, other = build(case, pass_), base or peers.load(args.against).build(case, pass_)
            for each in (step, other):
                each.run(1)
            for _ in range(args.rounds):
                row = {"case": case.name, "label": case.label, "pass": pass_}
                row |= {"implementation": args.peer}
                row["base"] = args.against if base_case is None else named(base_case)
                rows.append(row | ratios(step, other, clock, args.pairs))
                print(f"{named(case)} {pass_}  {rows[-1]['ratio']:.4f}", flush=True)
        except Exception as error:  # one that fails must not stop the others
            print(f"  skipped {named(case)}: {type(error).__name__}: {error}", file=sys.stderr)
        del step, other
        release_memory()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a case, its ratios in every round."""
    lines = ["| case | of | ratio, by round | quartiles | ms | of the other |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = row["case"], row["label"], row["pass"], row["base"]
        groups.setdefault(key, []).append(row)
    for (case, label, pass_, base), group in groups.items():
        cells = [f"{case} {label} {pass_}", base, ", ".join(f"{row['ratio']:.3f}" for row in group)]
        ends = [row["ratio_quartiles"] for row in group]
        cells.append(f"{min(low for low, _ in ends):.3f} to {max(high for _, high in ends):.3f}")
        cells += [f"{statistics.median(row[x] for row in group):.4f}" for x in ("ms", "base_ms")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=some_of(SUITES), default=["paged"])
    parser.add_argument("--passes", type=some_of(PASSES), default=["fwd"])
    parser.add_argument("--filter", default="", help="only cases whose name and label match")
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--base", help="pattern of the one case that others are parts of")
    base.add_argument("--against", choices=peers.NAMES, help="whose same cases they are parts of")
    parser.add_argument("--peer", default="jax_flashcute", choices=peers.NAMES)
    parser.add_argument("--pairs", type=int, default=40, help="of calls, in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clock", choices=["auto", "device", "host"], default="auto")
    parser.add_argument("--allow-cpu", action="store_true", help="run also where JAX has no GPU")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args(argv)
    if needs_gpu(args.allow_cpu):
        return 2
    clock = choose_clock(args.clock)
    rows = [row for pass_ in args.passes for row in measure_pass(args, pass_, clock)]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run = run_details(clock, command_line(argv, "benchmarks.call_by_call"))
        args.out.write_text(json.dumps({**run, "rows": rows}, indent=1) + "\n")
    print(f"\n{table(rows)}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
