"""Context parallelism on 1, 2, 4, ... devices of one machine: time, and share of perfect scaling.

    python -m benchmarks.context_parallel --length 262144 --devices 1,2,4 \\
        --out benchmarks/results/h200/context_parallel.json

One causal sequence, forward and forward with backward, by every method and order, in turns on the
host's clock: several devices' work is timed, and every call is waited for.  ``efficiency`` is one
device's time over P times that of P devices; one device runs ``flash_attention``.
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed; ``method`` and ``order`` are None on one device."""

    devices: int
    method: str | None
    order: str | None
    backward: bool

    @property
    def pass_(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"


def settings(devices, methods, orders, passes) -> list[Setting]:
    found = []
    for count, pass_ in itertools.product(devices, passes):
        backward = pass_ == "fwd+bwd"
        pairs = [(None, None)] if count == 1 else itertools.product(methods, orders)
        found += [Setting(count, method, order, backward) for method, order in pairs]
    return found


def step(case: Case, setting: Setting) -> Callable[[], None]:
    """A call that runs the setting once and waits for it."""
    chosen = jax.devices()[: setting.devices]
    mesh = jax.make_mesh((setting.devices,), ("context",), (AxisType.Auto,), devices=chosen)
    rows = NamedSharding(mesh, PartitionSpec(None, "context"))
    if setting.devices == 1:
        attend = functools.partial(flash_attention, is_causal=True)
    else:
        attend = functools.partial(
            context_parallel_attention,
            mesh=mesh,
            axis_name="context",
            context_parallel=setting.method,
            order=setting.order,
            is_causal=True,
        )

    def array(seed: int, heads: int):
        # Only a device's own part of it is ever made.
        shape = (case.batch, case.seqlen_q, heads, case.head_dim)
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
    """Seconds of every setting: the median of ``rounds``, after one call that compiles."""
    steps = [step(case, setting) for setting in chosen]
    for call in steps:
        call()
    seconds_of: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for call, seconds in zip(steps, seconds_of, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    rows = []
    for setting, seconds in zip(chosen, seconds_of, strict=True):
        ms = statistics.median(seconds) * 1e3
        spread = (max(seconds) - min(seconds)) * 1e3
        rows.append(row_of(case, setting) | {"ms": ms, "ms_spread": spread, "calls": rounds})
        print(f"{setting.devices} {setting.method} {setting.order} {setting.pass_}: {ms:.3f} ms")
    alone = {row["pass"]: row["ms"] for row in rows if row["devices"] == 1}
    for row in rows:
        if row["pass"] in alone:
            row["efficiency"] = alone[row["pass"]] / (row["devices"] * row["ms"])
    return rows


def row_of(case: Case, setting: Setting) -> dict:
    return {
        "devices": setting.devices,
        "context_parallel": setting.method,
        "order": setting.order,
        "pass": setting.pass_,
        "batch": case.batch,
        "seqlen_q": case.seqlen_q,
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
    parser.add_argument("--length", type=int, default=2**18, help="positions of the sequence")
    parser.add_argument("--heads", default="32,8", help="query and key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--devices", default="1,2,4", help="how many, in turn")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--passes", default="fwd,fwd+bwd")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file of the rows")
    options = parser.parse_args(arguments)
    q_heads, kv_heads = (int(n) for n in options.heads.split(","))
    sizes = (options.length, options.length, q_heads, kv_heads, options.head_dim, options.head_dim)
    case = Case("context", 1, *sizes, causal=True, dtype=options.dtype)
    wanted = [int(n) for n in options.devices.split(",")]
    there = len(jax.devices())
    for count in [n for n in wanted if n > there]:
        print(f"left out: {count} devices, of which there are {there}", file=sys.stderr)
    lists = (x.split(",") for x in (options.methods, options.orders, options.passes))
    chosen = settings([n for n in wanted if n <= there], *lists)
    rows = measure(case, chosen, options.rounds)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    # Keys travel beside the kernels only where XLA schedules them so.
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=true")
    main()
