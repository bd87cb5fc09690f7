"""What the documentation is given as it is built: tables from the registry and from results of
tests, and pictures of masks.  Run by mkdocs (``hooks`` in mkdocs.yml); nothing generated is kept.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashcute import make_block_mask, masks, scores, show_mask
from jax_flashcute.arguments import checked_call
from jax_flashcute.kernels import registry
from jax_flashcute.spec import AttentionSpec, Operands

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"

# ---- mkdocs ----------------------------------------------------------------------------------


def on_files(files, config):
    """Pictures, as if they stood in docs/pictures/."""
    from mkdocs.structure.files import File

    for name, draw in PICTURES.items():
        path = f"pictures/{name}.png"
        files.append(File.generated(config, path, content=draw().png()))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Tables in place of ``<!-- name -->``."""
    del page, config, files
    for name, make in TABLES.items():
        mark = f"<!-- {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


# ---- pictures --------------------------------------------------------------------------------

T = 96
_TILES = {"tile_m": 16, "tile_n": 16}
PICTURES: dict[str, Callable[[], Any]] = {
    "causal": lambda: show_mask(masks.causal, T, **_TILES),
    "sliding_window": lambda: show_mask(masks.sliding_window(24), T, **_TILES),
    "chunked_causal": lambda: show_mask(masks.chunked(32) & masks.causal, T, **_TILES),
    "prefix_lm": lambda: show_mask(masks.prefix_lm(24), T, **_TILES),
    "documents_causal": lambda: show_mask(
        masks.causal & masks.documents(jnp.repeat(jnp.arange(3), jnp.asarray([20, 44, 32]))),
        T,
        **_TILES,
    ),
    "sinks_and_window": lambda: show_mask(
        masks.causal & (masks.sliding_window(24) | (lambda b, h, q, kv: kv < 4)), T, **_TILES
    ),
    "dilated": lambda: show_mask(masks.dilated(48, 3), T, **_TILES),
    "compressed_causal": lambda: show_mask(
        masks.compressed_causal(4, complete_only=True), T, T // 4, tile_m=16, tile_n=8
    ),
}

# ---- the support matrix ----------------------------------------------------------------------

COLUMNS = {
    "Hopper, forward": ("sm_90a", "fwd"),
    "Hopper, backward": ("sm_90a", "bwd"),
    "Blackwell, forward": ("sm_100a", "fwd"),
    "Blackwell, backward": ("sm_100a", "bwd"),
}
_B, _T, _N, _K = 2, 256, 8, 2


def _shape(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _call(dtype=jnp.bfloat16, head_dim: int = 128, head_dim_v: int | None = None, **options):
    """Spec and operands of a call, of shapes alone."""
    arguments: dict[str, Any] = dict.fromkeys(inspect.signature(checked_call).parameters)
    arguments |= {"is_causal": False, "q_offset": 0}
    arguments |= {
        "query": _shape(_B, _T, _N, head_dim, dtype=dtype),
        "key": _shape(_B, _T, _K, head_dim, dtype=dtype),
        "value": _shape(_B, _T, _K, head_dim_v or head_dim, dtype=dtype),
    }
    arguments |= {name: x() if name == "block_mask" else x for name, x in options.items()}
    arrays = {n: x for n, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {n: x for n, x in arguments.items() if n not in arrays}
    found: list[AttentionSpec] = []

    def operands_of(arrays) -> Operands:
        spec, operands = checked_call(**static, **arrays)
        found.append(spec)
        return operands

    operands = jax.eval_shape(operands_of, arrays)
    return found[0], operands


def _paged_call():
    spec, operands = _call(is_causal=True, key_value_seq_lengths=_shape(_B, dtype=jnp.int32))
    pages = _shape(64, 64, _K, 128)
    table = _shape(_B, _T // 64, dtype=jnp.int32)
    return spec, dataclasses.replace(operands, key=pages, value=pages, page_table=table)


_ROWS: dict[str, Callable[[], tuple[AttentionSpec, Operands]]] = {
    "bfloat16, head_dim 128": _call,
    "float16": lambda: _call(jnp.float16),
    "float32": lambda: _call(jnp.float32),
    "head_dim 64": lambda: _call(head_dim=64),
    "head_dim 256": lambda: _call(head_dim=256),
    "head_dim 192, value 128": lambda: _call(head_dim=192, head_dim_v=128),
    "head_dim 60": lambda: _call(head_dim=60),
    "head_dim 512": lambda: _call(head_dim=512),
    "`is_causal`": lambda: _call(is_causal=True),
    "`local_window_size`": lambda: _call(local_window_size=(127, 0)),
    "`q_offset`": lambda: _call(q_offset=_shape(dtype=jnp.int32)),
    "lengths": lambda: _call(
        query_seq_lengths=_shape(_B, dtype=jnp.int32),
        key_value_seq_lengths=_shape(_B, dtype=jnp.int32),
    ),
    "`deterministic`": lambda: _call(deterministic=True),
    "`logits_soft_cap`": lambda: _call(logits_soft_cap=30.0),
    "`sinks`": lambda: _call(sinks=_shape(_N, dtype=jnp.float32)),
    "`mask`": lambda: _call(mask=_shape(_B, 1, _T, _T, dtype=jnp.bool_)),
    "`bias`": lambda: _call(bias=_shape(1, _N, _T, _T, dtype=jnp.float32)),
    "`mask_mod`: one interval (`prefix_lm`)": lambda: _call(mask_mod=masks.prefix_lm(64)),
    "`mask_mod`: any other (`dilated`)": lambda: _call(mask_mod=masks.dilated(64, 3)),
    "`score_mod` of numbers": lambda: _call(score_mod=lambda s, b, h, q, kv: s - 0.1 * (q - kv)),
    "`score_mod` of an array (`alibi`)": lambda: _call(
        score_mod=scores.alibi(scores.alibi_slopes(_N))
    ),
    "`block_mask`": lambda: _call(
        mask_mod=masks.causal,
        block_mask=lambda: make_block_mask(masks.causal, 1, 1, _T, _T, tile_m=128, tile_n=128),
    ),
    "`segment_ids`": lambda: _call(segment_ids=_shape(_B, _T, dtype=jnp.int32)),
    "`paged_attention`": _paged_call,
}


def support() -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Every feature, and for every column the reasons against it; none where a kernel serves it."""
    for name, call in _ROWS.items():
        spec, operands = call()
        reasons = {}
        for column, (arch, direction) in COLUMNS.items():
            if operands.page_table is not None and direction == "bwd":
                reasons[column] = ["paged_attention has no derivatives"]
            else:
                reasons[column] = registry.reasons_against(spec, operands, direction, arch)
        yield name, reasons


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class _Notes:
    """Numbered notes beneath a table, each once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> str:
        return f"({self._numbers.setdefault(text, len(self._numbers) + 1)})"

    def __str__(self) -> str:
        return "\n".join(f"{number}. {text}" for text, number in self._numbers.items())


def support_table() -> str:
    notes, rows = _Notes(), []
    for name, reasons in support():
        cells = [
            "no " + " ".join(notes.number(r) for r in found) if found else "yes"
            for found in reasons.values()
        ]
        rows.append([name, *cells])
    return f"{_table(['', *COLUMNS], rows)}\n\n{notes}"


# ---- the transform matrix --------------------------------------------------------------------


def _devices(record: dict[str, Any]) -> str:
    count = record.get("devices", 1)
    return record["device"] if count == 1 else f"{count} × {record['device']}"


def transform_tables() -> str:
    """One table for every machine that the tests were recorded on."""
    texts = []
    for path in sorted(RESULTS.glob("*/transforms.json")):
        record = json.loads(path.read_text())
        cells, notes = record["cells"], _Notes()
        transforms = list(dict.fromkeys(t for outcomes in cells.values() for t in outcomes))

        def cell(outcome: str | None, notes=notes) -> str:
            if outcome is None:
                return "not run"
            return outcome if outcome in ("passes", "fails") else f"refused {notes.number(outcome)}"

        rows = [[t, *(cell(outcomes.get(t)) for outcomes in cells.values())] for t in transforms]
        texts.append(
            f"## On {_devices(record)}\n\n{_table(['', *cells], rows)}\n\n{notes}\n\n"
            f"JAX {record['jax']}, {record['date'][:10]}, commit `{record['commit']}`."
        )
    return "\n\n".join(texts)


# ---- times of masks and scores ---------------------------------------------------------------

_FUNCTIONS = {
    "full": "none",
    "causal": "`is_causal`",
    "causal_lambda": "`lambda b, h, q, kv: kv <= q`",
    "window256": "`masks.causal & masks.sliding_window(256)`",
    "prefix512": "`masks.prefix_lm(512)`",
    "documents": "`masks.causal & masks.documents(ids)`",
    "alibi": "`scores.alibi(slopes)`",
    "relative_bias": "`scores.relative_bias(table)`",
    "kv_bias": "a score of an array by key",
    "compress4": "`compress_factor=4`",
    "compress64": "`compress_factor=64`",
}


def times_of_functions() -> str:
    """Of every mask and score that was measured, the latest; on every GPU with results."""
    texts = []
    for path in sorted(RESULTS.glob("*/functions.json")):
        latest: dict[tuple[str, str], dict[str, Any]] = {}
        for row in json.loads(path.read_text()):
            if row["implementation"] == "jax_flashcute":
                cell = row["case"], row["pass"]
                latest[cell] = max(row, latest.get(cell, row), key=lambda r: r["date"])
        rows = []
        for case, words in _FUNCTIONS.items():
            found = [latest.get((case, pass_)) for pass_ in ("fwd", "bwd")]
            if not any(found):
                continue
            row = next(r for r in found if r)
            size = f"{row['seqlen_q']:,} on {row['seqlen_k']:,}, {row['q_heads']}/{row['kv_heads']}"
            rows.append([words, size, *(f"{r['ms']:.2f}" if r else "–" for r in found)])
        gpu = next(iter(latest.values()))["gpu"]
        head = ["", "rows on keys, heads", "forward, ms", "backward, ms"]
        texts.append(f"On one {gpu}, head_dim 128, bfloat16:\n\n{_table(head, rows)}")
    return "\n\n".join(texts)


TABLES: dict[str, Callable[[], str]] = {
    "times of functions": times_of_functions,
    "support table": support_table,
    "transform tables": transform_tables,
}
