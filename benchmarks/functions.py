"""Masks and scores that are measured, one definition for every array library.

A case is known by its name: ``window256`` and ``compress4`` say their sizes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

MASKS = (
    *("causal_lambda", "window256", "prefix512", "documents", "compress4", "compress64"),
    "scattered",
)
SCORES = ("identity_score", "alibi", "relative_bias", "kv_bias", "pair_bias")
COMPRESS = {"compress4": 4, "compress64": 64}
REACH = 128
"""Distances at which the relative bias stops to differ."""


def mask_mod(name: str, seqlen: int, library: Any) -> Callable[..., Any] | None:
    """The mask of a case as a function ``(b, h, q, kv) -> bool``; None where it has none.

    Args:
      name: of the case.
      seqlen: its keys.
      library: ``jax.numpy``, or what has its ``asarray``.
    """
    match name:
        case "causal_lambda":
            return lambda b, h, q, kv: kv <= q
        case "window256":
            return lambda b, h, q, kv: (kv <= q) & (kv > q - 256)
        case "prefix512":
            return lambda b, h, q, kv: (kv < 512) | (kv <= q)
        case "documents":
            first = library.asarray(first_positions(seqlen))
            return lambda b, h, q, kv: (first[q] <= kv) & (kv <= q)
        case "compress4" | "compress64":
            factor = COMPRESS[name]
            return lambda b, h, q, kv: kv <= q // factor
        case "scattered":
            return lambda b, h, q, kv: ((q ^ kv) & 3) != 3
    return None


def score_mod(name: str, seqlen: int, heads: int, library: Any) -> Callable[..., Any] | None:
    """The score of a case as a function ``(score, b, h, q, kv) -> score``; None where it has none.

    Args:
      name: of the case.
      seqlen: its keys.
      heads: its query heads.
      library: ``jax.numpy``, or what has its ``asarray`` and ``clip``.
    """
    rng = np.random.default_rng(0)
    match name:
        case "identity_score":
            return lambda score, b, h, q, kv: score
        case "alibi":
            slopes = library.asarray(
                2.0 ** (-8 * np.arange(1, heads + 1, dtype=np.float32) / heads)
            )
            return lambda score, b, h, q, kv: score - slopes[h] * (q - kv)
        case "relative_bias":
            table = library.asarray(rng.standard_normal((heads, 2 * REACH + 1), np.float32))
            return lambda score, b, h, q, kv: (
                score + table[h, library.clip(q - kv, -REACH, REACH) + REACH]
            )
        case "kv_bias":
            bias = library.asarray(rng.standard_normal(seqlen, np.float32))
            return lambda score, b, h, q, kv: score + bias[kv]
        case "pair_bias":
            pairs = library.asarray(rng.standard_normal((seqlen, seqlen), np.float32))
            return lambda score, b, h, q, kv: score + pairs[q, kv]
    return None


def document_lengths(count: int, total: int) -> tuple[int, ...]:
    """Lengths of mixed documents, the longest about 30 times the shortest, that fill ``total``."""
    weights = [2 ** (5 * (7 * i % count) / (count - 1)) for i in range(count)]
    ends = [round(total * sum(weights[: i + 1]) / sum(weights)) for i in range(count)]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def first_positions(seqlen: int) -> np.ndarray:
    """Where the document of each position starts, of 16: (seqlen,) int32."""
    lengths = np.array(document_lengths(16, seqlen), np.int32)
    return np.repeat(np.cumsum(lengths, dtype=np.int32) - lengths, lengths)


def visible_pairs(name: str, seqlen_q: int, seqlen_k: int) -> int:
    """Pairs of a query and a key that a head's mask shows."""
    visible = mask_mod(name, seqlen_k, np)
    if visible is None:
        return seqlen_q * seqlen_k
    keys = np.arange(seqlen_k, dtype=np.int32)
    rows = np.array_split(np.arange(seqlen_q, dtype=np.int32), max(1, seqlen_q // 1024))
    return sum(int(np.count_nonzero(visible(0, 0, row[:, None], keys))) for row in rows)
