"""Native sparse attention and its stages as measured steps, and the share of each stage.

    python -m benchmarks.run --cases nsa --passes fwd,bwd --peers jax_flashcute,copy --out nsa.json
    python -m benchmarks.nsa nsa.json

prints a Markdown table: dense causal attention beside native sparse attention at each length, and
what part of the latter each stage takes; what is left is the three branches.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import NSA_BLOCK, NSA_SELECTED, NSA_TILE, NSA_WINDOW, Case, Pass
from benchmarks.measure import Step
from benchmarks.tables import OURS
from jax_flashcute.nsa import (
    NSAConfig,
    compress_kv,
    gate,
    native_sparse_attention,
    select_blocks,
)

CONFIG = NSAConfig(
    block=NSA_BLOCK, num_selected=NSA_SELECTED, window=NSA_WINDOW, query_tile=NSA_TILE
)
STAGES = ("compress", "select", "gate")


def build(case: Case, pass_: Pass, implementation) -> Step:
    """One pass of the stage that the case names, over random normal inputs."""
    B, T, N, H = case.batch, case.seqlen_q, case.q_heads, case.head_dim
    K, Hv = case.kv_heads, case.head_dim_v
    blocks = -(-T // CONFIG.block)
    tokens = ((B, T, N, H), (B, T, K, H), (B, T, K, Hv))

    def attend(query, key, value, weights):
        return native_sparse_attention(
            query, key, value, gate_weights=weights, config=CONFIG, implementation=implementation
        )

    def compress(key, value):
        return compress_kv(key, value, CONFIG.block, implementation=implementation)

    def select(query, key):
        return select_blocks(query, key, CONFIG, kv_length=T, scale=H**-0.5)

    def gated(query, weights, *outputs):
        return gate(query, outputs, weights, implementation=implementation)

    function, shapes = {
        "nsa": (attend, (*tokens, (N, 3, H))),
        "nsa_compress": (compress, tokens[1:]),
        "nsa_select": (select, (tokens[0], (B, blocks, K, H))),
        "nsa_gate": (gated, (tokens[0], (N, 3, H), *[(B, T, N, Hv)] * 3)),
    }[case.name]
    if pass_ == "bwd" and case.name == "nsa_select":
        raise NotImplementedError("the selection has no gradient")

    @jax.jit
    def normal():
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return [jax.random.normal(k, s, case.dtype) for k, s in zip(keys, shapes, strict=True)]

    arrays = normal()
    if pass_ == "fwd":
        forward = jax.jit(function)
        return Step(lambda: forward(*arrays), jax.block_until_ready, case.dtype)
    results, vjp = jax.jit(lambda *x: jax.vjp(function, *x))(*arrays)
    cotangents = jax.tree.map(jnp.ones_like, results)
    backward = jax.jit(lambda vjp, gradient: vjp(gradient))
    return Step(lambda: backward(vjp, cotangents), jax.block_until_ready, case.dtype)


def shares(rows: list[dict[str, Any]], pass_: Pass) -> str:
    """A Markdown table of the lengths for which both dense and sparse attention were measured."""
    times: dict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["pass"] == pass_ and row["implementation"] == OURS:
            times[row["seqlen_q"]][row["case"]] = row["ms"]
    lines = [
        f"| tokens | dense causal, ms | native sparse, ms | times | {' | '.join(STAGES)} |",
        "|---:" * (4 + len(STAGES)) + "|",
    ]
    for length, ms in sorted(times.items()):
        if "nsa" not in ms or "dense_causal" not in ms:
            continue
        parts = [
            f"{ms[f'nsa_{stage}'] / ms['nsa']:.0%}" if f"nsa_{stage}" in ms else "–"
            for stage in STAGES
        ]
        faster = ms["dense_causal"] / ms["nsa"]
        cells = [f"{length:,}", f"{ms['dense_causal']:.3f}", f"{ms['nsa']:.3f}", f"{faster:.2f}"]
        lines.append(f"| {' | '.join(cells + parts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON file of benchmarks.run")
    rows = json.loads(parser.parse_args().results.read_text())
    for pass_, title in (("fwd", "Forward"), ("bwd", "Backward")):
        if any(row["pass"] == pass_ for row in rows):
            print(f"{title}\n\n{shares(rows, pass_)}\n")


if __name__ == "__main__":
    main()
