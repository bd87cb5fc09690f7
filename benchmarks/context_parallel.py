"""Context parallelism on 1, 2, 4, ... devices of one machine: time, and share of perfect scaling.

    python -m benchmarks.context_parallel --length 131072,262144 --devices 1,2,4 \\
        --out benchmarks/results/h200/context_parallel.json

One causal sequence, forward and forward with backward, by every method and order, in turns on the
host's clock: several devices' work is timed, and every call is waited for.  ``efficiency`` is one
device's time over P times that of P devices; one device runs ``flash_attention``.
``--methods ring,all_gather,flash_attention_3_jax`` has the ring of that package beside ours, which
divides a sequence into one part a device and leaves the first idle while the last one works; its
efficiency is against our time on one device, too.  ``python -m benchmarks.report`` draws the rows.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.cases import Case
from benchmarks.run import commit
from jax_flashcute import flash_attention
from jax_flashcute.context import METHODS, ORDERS, context_parallel_attention

PEER = "flash_attention_3_jax"
"""The ring of flash-attn3-jax, as a method."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed; ``method`` and ``order`` are None on one device."""

    length: int
    devices: int
    method: str | None
    order: str | None
    backward: bool

    @property
    def pass_(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"


def settings(length, devices, methods, orders, passes) -> list[Setting]:
    found = []
    for count, pass_ in itertools.product(devices, passes):
        pairs: list[tuple] = [(None, None)]
        if count > 1:
            pairs = list(itertools.product([m for m in methods if m != PEER], orders))
            pairs += [(PEER, "contiguous")] if PEER in methods else []
        backward = pass_ == "fwd+bwd"
        found += [Setting(length, count, method, order, backward) for method, order in pairs]
    return found


def attention_of(setting: Setting, mesh: jax.sharding.Mesh) -> Callable:
    """The attention that is timed, of query, key and value on the mesh."""
    if setting.devices == 1:
        return functools.partial(flash_attention, is_causal=True)
    if setting.method == PEER:
        # Its ring takes over where the lengths are sharded.
        from flash_attn3_jax import flash_mha

        return functools.partial(flash_mha, is_causal=True)
    return functools.partial(
        context_parallel_attention,
        mesh=mesh,
        axis_name="context",
        context_parallel=setting.method,
        order=setting.order,
        is_causal=True,
    )


def step(case: Case, setting: Setting) -> Callable[[], None]:
    """A call that runs the setting once and waits for it."""
    chosen = jax.devices()[: setting.devices]
    mesh = jax.make_mesh((setting.devices,), ("context",), (AxisType.Auto,), devices=chosen)
    rows = NamedSharding(mesh, PartitionSpec(None, "context", None, None))
    attend = attention_of(setting, mesh)

    def array(seed: int, heads: int):
        # Only a device's own part of it is ever made.
        shape = (case.batch, setting.length, heads, case.head_dim)
        make = jax.jit(
            lambda: jax.random.normal(jax.random.key(seed), shape, case.dtype), out_shardings=rows
        )
        return make()

    arrays = [array(0, case.q_heads), array(1, case.kv_heads), array(2, case.kv_heads)]

    def forward_and_backward(cotangent, *arrays):
        out, vjp = jax.vjp(attend, *arrays)
        return out, vjp(cotangent)

    if setting.backward:
        run = jax.jit(forward_and_backward)
        arrays = [array(3, case.q_heads), *arrays]
    else:
        run = jax.jit(attend)
    return lambda: jax.block_until_ready(run(*arrays))


def measure(case: Case, chosen: list[Setting], rounds: int) -> list[dict]:
    """Rows of every setting: the median of ``rounds`` calls, after one that compiles.

    A setting that fails is reported and left out.
    """
    steps: dict[Setting, Callable[[], None]] = {}
    for setting in chosen:
        try:
            call = step(case, setting)
            call()
        except Exception as error:  # must not stop the others
            first_line = (str(error).strip() or "no message").splitlines()[0]
            print(f"left out: {setting}: {type(error).__name__}: {first_line}", file=sys.stderr)
        else:
            steps[setting] = call
    seconds_of: dict[Setting, list[float]] = {setting: [] for setting in steps}
    for _ in range(rounds):
        for setting, call in steps.items():
            start = time.perf_counter()
            call()
            seconds_of[setting].append(time.perf_counter() - start)
    ms_of = {setting: statistics.median(seconds) * 1e3 for setting, seconds in seconds_of.items()}
    rows = []
    for setting, ms in ms_of.items():
        spread = (max(seconds_of[setting]) - min(seconds_of[setting])) * 1e3
        row = row_of(case, setting) | {"ms": ms, "ms_spread": spread, "calls": rounds}
        alone = dataclasses.replace(setting, devices=1, method=None, order=None)
        if alone in ms_of:
            row["efficiency"] = ms_of[alone] / (setting.devices * ms)
        rows.append(row)
        print(
            f"{setting.length} {setting.devices} {setting.method} {setting.order} "
            f"{setting.pass_}: {ms:.3f} ms, efficiency {row.get('efficiency', 0):.3f}",
            flush=True,
        )
    return rows


def row_of(case: Case, setting: Setting) -> dict:
    return {
        "devices": setting.devices,
        "context_parallel": setting.method,
        "order": setting.order,
        "pass": setting.pass_,
        "batch": case.batch,
        "seqlen_q": setting.length,
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "causal": True,
        "dtype": case.dtype,
        "gpu": jax.devices()[0].device_kind,
        "clock": "host",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", default=str(2**18), help="positions of the sequence, in turn")
    parser.add_argument("--heads", default="32,8", help="query and key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--devices", default="1,2,4", help="how many, in turn")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"also {PEER}")
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--passes", default="fwd,fwd+bwd")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file of the rows")
    options = parser.parse_args(arguments)
    q_heads, kv_heads = (int(n) for n in options.heads.split(","))
    lengths = [int(n) for n in options.length.split(",")]
    sizes = (lengths[0], lengths[0], q_heads, kv_heads, options.head_dim, options.head_dim)
    case = Case("context", 1, *sizes, causal=True, dtype=options.dtype)
    wanted = [int(n) for n in options.devices.split(",")]
    there = len(jax.devices())
    for count in [n for n in wanted if n > there]:
        print(f"left out: {count} devices, of which there are {there}", file=sys.stderr)
    lists = [x.split(",") for x in (options.methods, options.orders, options.passes)]
    rows = []
    # One length after another: their arrays would not always fit beside each other.
    for length in lengths:
        chosen = settings(length, [n for n in wanted if n <= there], *lists)
        rows += measure(case, chosen, options.rounds)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a line for every length, pass, number of devices, method, order and commit.

    A run's rows follow its own one device, which their part of perfect scaling is of.
    """
    lines = [
        "| tokens | pass | devices | method | order | ms | of perfect scaling | commit |",
        "|---:|---|---:|---|---|---:|---:|---|",
    ]
    for row in rows:
        cells = [f"{row['seqlen_q']:,}", row["pass"], str(row["devices"])]
        cells += [row["context_parallel"] or "–", row["order"] or "–", f"{row['ms']:.2f}"]
        cells.append(f"{row['efficiency']:.3f}" if "efficiency" in row else "–")
        cells.append(f"`{row['commit']}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Scaling over devices: a plot a pass, a line for every method, order and length."""
    import matplotlib.pyplot as plt

    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure, plots = plt.subplots(
        1, len(passes), figsize=(5 * len(passes), 4.2), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, pass_ in zip(plots[0], passes, strict=True):
        lines: dict[tuple, dict[int, float]] = {}
        for row in rows:
            if row["pass"] == pass_ and row["devices"] > 1 and "efficiency" in row:
                line = row["context_parallel"], row["order"], row["seqlen_q"]
                lines.setdefault(line, {1: 1.0})[row["devices"]] = row["efficiency"]
        for (method, order, length), points in lines.items():
            label = f"{method}, {order}, {length:,}"
            axes.plot(list(points), list(points.values()), marker="o", label=label)
        axes.set_title(pass_, fontsize=10)
        axes.set_xlabel("devices")
        axes.set_xticks(sorted({row["devices"] for row in rows}))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    plots[0][0].set_ylabel("part of perfect scaling")
    lowest = min(row.get("efficiency", 1) for row in rows)
    plots[0][0].set_ylim(min(0.8, lowest - 0.02), 1.05)  # shared by all
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    # Keys travel beside the kernels only where XLA schedules them so.
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=true")
    main()
