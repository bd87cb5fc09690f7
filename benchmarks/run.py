"""Measure attention implementations side by side.

    python -m benchmarks.run --cases dense --passes fwd \\
        --peers jax_flashcute,jax_nn_cudnn,flash_attention_4 \\
        --out benchmarks/results/h200/dense_fwd.json

Every case is measured by all peers in turns, in one process, before the next; one row a
measurement is written as soon as a case is done.  A peer that is missing or fails is reported and
left out.  ``python -m benchmarks.report`` makes tables and plots of the results.
"""

import argparse
import gc
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Several frameworks share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.cases import PASSES, SUITES, Case, Pass
from benchmarks.cupti import CuptiError, DeviceTimeline
from benchmarks.measure import Clock, DeviceClock, HostClock, Step, Timing, measure
from benchmarks.tables import latest_runs, table

REPOSITORY = Path(__file__).resolve().parent.parent


def some_of(known):
    """A type of argument: some of the names that are known, with commas between."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; known: {', '.join(known)}"
            )
        return chosen

    return parse


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        type=some_of(SUITES),
        default=["dense"],
        metavar="SUITE,...",
        help=", ".join(SUITES),
    )
    parser.add_argument(
        "--passes",
        type=some_of(PASSES),
        default=["fwd"],
        metavar="PASS,...",
        help=", ".join(PASSES),
    )
    parser.add_argument(
        "--peers",
        type=some_of(peers.NAMES),
        default=["jax_flashcute", "jax_nn_cudnn"],
        metavar="PEER,...",
        help=", ".join(peers.NAMES),
    )
    parser.add_argument("--filter", default="", help="only cases whose label matches this pattern")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--warm-up",
        type=float,
        default=0,
        metavar="MS",
        help="keep each implementation busy for so long before its turn is timed: clocks then have "
        "settled under its load (default: one call)",
    )
    parser.add_argument("--clock", choices=["auto", "device", "host"], default="auto")
    parser.add_argument("--allow-cpu", action="store_true", help="run also where JAX has no GPU")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--append", action="store_true", help="keep the rows that --out has")
    return parser.parse_args(argv)


def choose_clock(asked: str) -> Clock:
    """The device's clock where it works, tried on a few products; else the host's.

    Raises:
      CuptiError: the device's clock was asked for by name and does not work.
    """
    if asked == "host" or (asked == "auto" and jax.default_backend() != "gpu"):
        return HostClock()
    try:
        clock = DeviceClock(DeviceTimeline())
        x = jnp.ones((2048, 2048))
        product = jax.jit(jnp.matmul)
        step = Step(lambda: product(x, x), jax.block_until_ready, "float32")
        step.run(2)
        start = time.perf_counter()
        busy = sum(clock.time(step, 8))
        elapsed = (time.perf_counter() - start) * 1e3
        if not 0 < busy <= elapsed:
            raise CuptiError(f"eight products were busy for {busy:.3f} of {elapsed:.3f} ms")
    except (CuptiError, RuntimeError) as error:
        if asked == "device":
            raise
        print(f"No device clock ({error}): the host's clock stands in.", file=sys.stderr)
        return HostClock()
    return clock


def commit() -> str:
    """The commit that is measured, from git or, in a copy without it, from the environment."""
    if given := os.environ.get("JAX_FLASHCUTE_COMMIT"):
        return given
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def command_line(argv: list[str], program: str = "benchmarks.run") -> str:
    """The command as results tell it: a path outside the repository shrinks to its name."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    return shlex.join(["python", "-m", program, *words])


def needs_gpu(allow_cpu: bool) -> bool:
    """Whether nothing is to be measured here, which is said."""
    platform = jax.devices()[0].platform
    if platform == "gpu" or allow_cpu:
        return False
    print(f"JAX runs on {platform}; --allow-cpu measures there.", file=sys.stderr)
    return True


def run_details(clock: Clock, command: str) -> dict[str, str]:
    """What all rows of a run have in common."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": jax.devices()[0].device_kind,
        "clock": clock.name,
        "command": command,
    }


def build_steps(names: list[str], case: Case, pass_: Pass, skip: "SkipLog") -> dict[str, Step]:
    """Compile and warm up every peer; those that fail are logged and left out."""
    steps = {}
    for name in names:
        start = time.perf_counter()
        try:
            if case.is_nsa and name not in peers.NSA:
                raise NotImplementedError("measures dense attention alone")
            step = peers.load(name).build(case, pass_)
            step.run(1)
        except Exception as error:  # a peer's failure must not stop the others
            skip(name, error)
        else:
            steps[name] = step
            print(f"    {name}: ready in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return steps


class SkipLog:
    """Says what was not measured and why, at once and again at the end."""

    def __init__(self):
        self.entries: list[str] = []
        self.where = ""

    def __call__(self, name: str, reason: Exception | str) -> None:
        if isinstance(reason, Exception):
            first_line = (str(reason).strip() or "no message").splitlines()[0]
            reason = f"{type(reason).__name__}: {first_line[:300]}"
        entry = f"{self.where}{name}: {reason}"
        self.entries.append(entry)
        print(f"  skipped {entry}", file=sys.stderr)


def row(
    run: dict[str, Any], case: Case, pass_: Pass, name: str, step: Step, timing: Timing
) -> dict[str, Any]:
    """One measurement as it stands in the results."""
    rate = case.rate(pass_, step.dtype, timing.ms)
    return {
        **run,
        "case": case.name,
        "pass": pass_,
        "implementation": name,
        "batch": case.batch,
        "seqlen_q": case.seqlen_q,
        "seqlen_k": case.seqlen_k,
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "head_dim_v": case.head_dim_v,
        "causal": case.causal,
        "dtype": step.dtype,
        "ms": round(timing.ms, 5),
        "ms_spread": round(timing.ms_spread, 5),
        "calls": timing.calls,
        **{key: round(value, 2) for key, value in rate.items()},
        **({"setting": step.setting} if step.setting else {}),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a results file whole, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def release_memory() -> None:
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if needs_gpu(args.allow_cpu):
        return 2

    clock = choose_clock(args.clock)
    run = {
        "run": f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        **run_details(clock, command_line(argv)),
    }
    print(f"Run {run['run']} on {run['gpu']}, {clock.name} clock", file=sys.stderr)

    skip = SkipLog()
    names = []
    for name in args.peers:
        try:
            reason = peers.load(name).available()
        except Exception as error:  # an installation may be broken in any way
            reason = f"{type(error).__name__}: {error}"
        if reason:
            skip(name, reason)
        else:
            names.append(name)

    rows = json.loads(args.out.read_text()) if args.append and args.out.exists() else []
    before = len(rows)
    for suite in args.cases:
        for case in SUITES[suite]:
            if not re.search(args.filter, case.label):
                continue
            for pass_ in args.passes:
                skip.where = f"{case.label} {pass_}: "
                print(f"  {case.name} {case.label} {pass_}", file=sys.stderr)
                steps = build_steps(names, case, pass_, skip)
                timings = measure(steps, clock, args.rounds, skip, args.warm_up)
                for name, timing in timings.items():
                    rows.append(row(run, case, pass_, name, steps[name], timing))
                    rate = case.rate(pass_, steps[name].dtype, timing.ms)
                    shown = ", ".join(f"{value:.0f} {unit}" for unit, value in rate.items())
                    print(
                        f"{case.name} {case.label} {pass_}  {name:<22} "
                        f"{timing.ms:.4f} ms ± {timing.ms_spread:.4f}  {shown}  "
                        f"{steps[name].setting}".rstrip(),
                        flush=True,
                    )
                if args.out:
                    write_rows(args.out, rows)
                del steps
                release_memory()

    for group in latest_runs(rows[before:]).values():
        print(f"\n{table(group)}")
    if skip.entries:
        print("Not measured:", *skip.entries, sep="\n  ", file=sys.stderr)
    return 0 if len(rows) > before else 1


if __name__ == "__main__":
    sys.exit(main())
