"""Native sparse attention and its stages as measured steps, and the share of each stage.

    python -m benchmarks.run --cases nsa --passes fwd,bwd --peers jax_flashcute,copy --out nsa.json
    python -m benchmarks.nsa nsa.json

prints a Markdown table: dense causal attention beside native sparse attention at each length, and
what part of the latter each stage takes; what is left is the three branches.
``python -m benchmarks.report`` draws it.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.cases import NSA_BLOCK, NSA_SELECTED, NSA_TILE, NSA_WINDOW, Case, Pass
from benchmarks.measure import Step
from benchmarks.tables import OURS, Row
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


def relative(rows: list[Row], case: str, pass_: Pass) -> dict[int, tuple[Row, Row]]:
    """By length: a case's row and native sparse attention's, of the latest run that has both."""
    runs: dict[tuple[int, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        is_ours = row["pass"] == pass_ and row["implementation"] == OURS
        if is_ours and row["q_heads"] < 16 * row["kv_heads"]:  # else of the suite nsa_group_16
            runs[row["seqlen_q"], row["run"]][row["case"]] = row
    found: dict[int, tuple[Row, Row]] = {}
    for (length, _), cases in sorted(runs.items()):
        if "nsa" in cases and case in cases:
            if length not in found or found[length][1]["date"] <= cases["nsa"]["date"]:
                found[length] = cases[case], cases["nsa"]
    return dict(sorted(found.items()))


def shares(rows: list[Row], pass_: Pass) -> str:
    """A Markdown table: both attentions at each length, and what part each stage takes.

    What is divided by what was measured in one run.
    """
    dense, whole = (relative(rows, case, pass_) for case in ("dense_causal", "nsa"))
    stages = [relative(rows, f"nsa_{stage}", pass_) for stage in STAGES]
    lines = [
        f"| tokens | dense causal, ms | native sparse, ms | times | {' | '.join(STAGES)} |",
        "|---:" * (4 + len(STAGES)) + "|",
    ]
    for length, (_, alone) in whole.items():
        beside, sparse = dense.get(length, (None, alone))
        cells = [f"{length:,}", f"{beside['ms']:.3f}" if beside else "–", f"{sparse['ms']:.3f}"]
        cells.append(f"{beside['ms'] / sparse['ms']:.2f}" if beside else "–")
        for stage in stages:
            pair = stage.get(length)
            cells.append(f"{pair[0]['ms'] / pair[1]['ms']:.0%}" if pair else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Both attentions' times over the length, and the parts of the forward."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for pass_, style in (("fwd", "-"), ("bwd", "--")):
        name = "forward" if pass_ == "fwd" else "backward"
        for case, label, color in (
            ("dense_causal", "dense causal", "tab:gray"),
            ("nsa", "native sparse", "tab:blue"),
        ):
            points = {n: pair[0]["ms"] for n, pair in relative(rows, case, pass_).items()}
            if points:
                left.plot(list(points), list(points.values()), style, marker="o", markersize=4,
                          color=color, label=f"{label}, {name}")  # fmt: skip
    left.set(xlabel="tokens", ylabel="ms", yscale="log", title="Time")
    pairs = [relative(rows, f"nsa_{stage}", "fwd") for stage in STAGES]
    lengths = [n for n in relative(rows, "nsa", "fwd") if all(n in pair for pair in pairs)]
    parts = [[pair[n][0]["ms"] / pair[n][1]["ms"] for n in lengths] for pair in pairs]
    rest = [1 - sum(part) for part in zip(*parts, strict=True)]
    if lengths:
        names = [*STAGES, "the three branches"]
        right.stackplot(lengths, *parts, rest, labels=names, alpha=0.8)
        right.legend(loc="upper left", fontsize=8)
    right.set(xlabel="tokens", ylabel="part of the forward", ylim=(0, 1), title="Stages")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
