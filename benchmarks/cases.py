"""The attention calls that are measured, by suite.

A pass is ``fwd`` or ``bwd``; the backward pass is the gradient of all three inputs alone, from
saved residuals.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from benchmarks import functions

Pass = Literal["fwd", "bwd"]
PASSES: tuple[Pass, ...] = ("fwd", "bwd")

KEPT = {"sparse01": 0.01, "sparse05": 0.05, "sparse10": 0.1, "sparse25": 0.25, "sparse50": 0.5}
"""The fraction of all 128 x 128 tiles that a case's lists keep, by its name."""

SPARSE_TILE = 128

DOCUMENTS = {
    "packed_8k": functions.document_lengths(16, 8192),
    "packed_64k": functions.document_lengths(64, 65536),
}
"""Lengths of the documents that a case's sequences are packed of, by its name."""

BUILDING = "build_block_mask"
"""The case that makes lists of tiles from a mask and calls no attention."""

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

NSA_STAGES = ("nsa", "nsa_compress", "nsa_select", "nsa_gate")
"""Native sparse attention with its default sizes, and its stages, as names of cases."""
NSA_BLOCK, NSA_SELECTED, NSA_WINDOW, NSA_TILE = 64, 16, 512, 256


@dataclass(frozen=True)
class Case:
    """One attention call: query (B, T, N, H), key (B, S, K, H), value (B, S, K, Hv).

    ``kv_lengths``: keys of each batch entry, where they differ; ``page_size``: keys and values lie
    in pages of so many, in random order unless ``in_order``.  A causal mask aligns queries and keys
    at their ends.
    """

    name: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    q_heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    dtype: str = "bfloat16"
    kv_lengths: tuple[int, ...] | None = None
    page_size: int | None = None
    in_order: bool = False

    def page_table(self) -> np.ndarray:
        """(B, pages of an entry) int32: every page of the batch once."""
        if self.page_size is None:
            raise ValueError(f"{self.name} has no pages")
        pages = self.seqlen_k // self.page_size
        order = np.arange(self.batch * pages)
        if not self.in_order:
            order = np.random.default_rng(0).permutation(order)
        return order.reshape(self.batch, pages).astype(np.int32)

    @property
    def kept(self) -> float | None:
        """The fraction of tiles that lists keep; None for a case without lists."""
        return KEPT.get(self.name)

    @property
    def documents(self) -> tuple[int, ...] | None:
        """Lengths of the documents in a sequence, which do not see each other; None for one."""
        return DOCUMENTS.get(self.name)

    @property
    def is_plain(self) -> bool:
        """Whether the case is attention without lists, documents, lengths, mask or score."""
        has_more = self.kept is not None or self.documents is not None or self.has_function
        return not (has_more or self.name == BUILDING or self.kv_lengths is not None)

    @property
    def has_function(self) -> bool:
        """Whether a mask or a score of ``benchmarks.functions`` belongs to the case."""
        return self.name in (*functions.MASKS, *functions.SCORES)

    def tile_lists(self) -> list[list[int]]:
        """The key tiles that each row of tiles keeps: drawn once for all, ascending."""
        if self.kept is None:
            raise ValueError(f"name must be one of {list(KEPT)}; got {self.name}")
        tiles = self.seqlen_k // SPARSE_TILE
        count = max(1, round(self.kept * tiles))
        rng = np.random.default_rng(0)
        rows = range(self.seqlen_q // SPARSE_TILE)
        return [sorted(rng.choice(tiles, count, replace=False).tolist()) for _ in rows]

    @property
    def label(self) -> str:
        """What tells this case from the others of its suite, short enough for a table."""
        if self.seqlen_q == self.seqlen_k:
            lengths = f"{self.batch}x{self.seqlen_q}"
        else:
            lengths = f"{self.batch}x{self.seqlen_q}/{self.seqlen_k}"
        dims = f"{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            dims += f"/{self.head_dim_v}"
        mask = "causal" if self.causal else "full"
        mask += " skewed" if self.kv_lengths else ""
        mask += f" pages of {self.page_size}" if self.page_size else ""
        mask += " in order" if self.in_order else ""
        mask += "" if self.kept is None else f" {self.kept:.0%} of tiles"
        mask += "" if self.documents is None else f" {len(self.documents)} documents"
        mask += " lists" if self.name == BUILDING else ""
        mask = self.name if self.has_function else mask
        stage = f"{self.name} " if self.is_nsa else ""
        return f"{stage}hd{dims} {lengths} {self.q_heads}/{self.kv_heads} {mask}"

    @property
    def is_nsa(self) -> bool:
        """Whether native sparse attention or a stage of it is measured, not dense attention."""
        return self.name in NSA_STAGES

    @property
    def is_memory_bound(self) -> bool:
        """Whether its bytes are what it is measured by."""
        return self.is_decode or self.name in ("nsa_compress", "nsa_gate")

    @property
    def is_decode(self) -> bool:
        """Whether reading keys and values, not the products, sets the pace."""
        return self.seqlen_q <= 16

    def flops(self, pass_: Pass) -> float:
        """Floating-point operations of the products, by the field's convention.

        Two products forward; five backward, three of them over head_dim.  A causal mask counts
        for half of the scores where there are as many queries as keys, other masks for the pairs
        that they show.  Of native sparse attention,
        the keys that a late row sees count; of its selection, the products of tile means with half
        of the blocks.
        """
        if self.name == "nsa_select":
            tiles, blocks = self.seqlen_q / NSA_TILE, self.seqlen_k / NSA_BLOCK
            return self.batch * self.kv_heads * tiles * blocks * self.head_dim
        keys = sum(self.kv_lengths) if self.kv_lengths else self.batch * self.seqlen_k
        scores = self.q_heads * self.seqlen_q * keys
        if self.kept is not None:
            scores = self.batch * self.q_heads * SPARSE_TILE**2 * sum(map(len, self.tile_lists()))
        if self.documents is not None:
            scores = self.batch * self.q_heads * sum(length**2 for length in self.documents)
        if self.name in functions.MASKS:
            visible = functions.visible_pairs(self.name, self.seqlen_q, self.seqlen_k)
            scores = self.batch * self.q_heads * visible
        if self.causal:
            scores *= 1 - self.seqlen_q / (2 * self.seqlen_k)
        if self.is_nsa:
            near = min(NSA_WINDOW, self.seqlen_k) + min(NSA_BLOCK * NSA_SELECTED, self.seqlen_k)
            scores = scores / NSA_BLOCK + self.batch * self.q_heads * self.seqlen_q * near
        if pass_ == "fwd":
            return 2.0 * scores * (self.head_dim + self.head_dim_v)
        return 2.0 * scores * (3 * self.head_dim + 2 * self.head_dim_v)

    def bytes(self, dtype: str, pass_: Pass = "fwd") -> float:
        """Bytes of the three inputs and the output, each once.

        Of the gates and the compression of native sparse attention: all that they read and write.
        """
        rows = self.batch * self.seqlen_q * self.q_heads * BYTES[dtype]
        tokens = self.batch * self.seqlen_k * self.kv_heads * BYTES[dtype]
        widths = self.head_dim + self.head_dim_v
        if self.name == "nsa_gate":
            branches = 4 if pass_ == "fwd" else 7
            return float(
                rows * (self.head_dim * (1 + (pass_ == "bwd")) + branches * self.head_dim_v)
            )
        if self.name == "nsa_compress":
            return float(tokens * widths * (1 + 1 / NSA_BLOCK))
        query_and_out = self.batch * self.seqlen_q * self.q_heads
        keys = sum(self.kv_lengths) if self.kv_lengths else self.batch * self.seqlen_k
        key_and_value = keys * self.kv_heads
        return float(
            (query_and_out + key_and_value) * (self.head_dim + self.head_dim_v) * BYTES[dtype]
        )

    def rate(self, pass_: Pass, dtype: str, ms: float) -> dict[str, float]:
        """The rate that a time amounts to: ``gbs`` where memory sets the pace, else ``tflops``."""
        if self.is_memory_bound:
            return {"gbs": self.bytes(dtype, pass_) / ms / 1e6}
        return {"tflops": self.flops(pass_) / ms / 1e9}


def square(
    name: str, head_dim: int, batch: int, seqlen: int, q_heads: int, kv_heads: int, *, causal: bool
) -> Case:
    """Self-attention: as many queries as keys, one head_dim."""
    return Case(name, batch, seqlen, seqlen, q_heads, kv_heads, head_dim, head_dim, causal=causal)


# (head_dim, batch, seqlen, q_heads, kv_heads, causal): constant work per head_dim, short to long.
DENSE = tuple(
    square("dense", head_dim, batch, seqlen, q_heads, kv_heads, causal=causal)
    for head_dim, batch, seqlen, q_heads, kv_heads, causal in [
        (64, 4, 4096, 32, 32, False),
        (64, 4, 4096, 32, 32, True),
        (64, 1, 16384, 32, 32, False),
        (64, 1, 16384, 32, 32, True),
        (128, 16, 1024, 16, 16, False),
        (128, 16, 1024, 16, 16, True),
        (128, 4, 4096, 16, 16, False),
        (128, 4, 4096, 16, 16, True),
        (128, 2, 8192, 32, 8, True),
        (128, 1, 16384, 16, 16, False),
        (128, 1, 16384, 16, 16, True),
        (256, 4, 4096, 8, 8, False),
        (256, 4, 4096, 8, 8, True),
        (256, 1, 16384, 8, 8, False),
        (256, 1, 16384, 8, 8, True),
    ]
)

DECODE = tuple(
    Case(f"decode_b{batch}", batch, 1, seqlen_k, q_heads, kv_heads, 128, 128)
    for batch, seqlen_k, q_heads, kv_heads in [
        (32, 8192, 32, 8),
        (128, 2048, 64, 8),
        (1, 131072, 32, 8),
    ]
)

# Log-uniform from 64 to 131,072, in no order.
SKEWED_LENGTHS = tuple(round(64 * 2048 ** (5 * i % 16 / 15)) for i in range(16))
DECODE += (Case("decode_skewed", 16, 1, 131072, 32, 8, 128, 128, kv_lengths=SKEWED_LENGTHS),)

# So few sequences that they hardly fill a GPU, yet more keys than its cache holds; and one that is
# 64 times as long as the others.
DECODE_SMALL = tuple(
    Case("decode_small", batch, 1, seqlen_k, q_heads, kv_heads, 128, 128)
    for batch, seqlen_k, q_heads, kv_heads in [
        (4, 4096, 32, 8),
        (8, 2048, 32, 8),
        (8, 4096, 32, 8),
        (8, 8192, 32, 8),
        (12, 4096, 32, 8),
        (64, 2048, 8, 1),
        (64, 4096, 8, 1),
    ]
)
ONE_LONG = (*(64,) * 7, 4096)
DECODE_SMALL += (Case("decode_one_long", 8, 1, 4096, 32, 8, 128, 128, kv_lengths=ONE_LONG),)

PAGE_SIZES = tuple(2**i for i in range(10))
# "paged<size>" beside "not_paged": decode, and a prefill of the last queries of longer sequences.
PAGED = tuple(
    Case(
        f"paged{page_size}" if page_size else "not_paged",
        *(batch, seqlen_q, seqlen_k, q_heads, kv_heads, 128, 128),
        causal=seqlen_q > 1,
        page_size=page_size,
    )
    for batch, seqlen_q, seqlen_k, q_heads, kv_heads in [
        (32, 1, 8192, 32, 8),
        (128, 1, 2048, 64, 8),
        (4, 1, 65536, 16, 16),
        (4, 2048, 8192, 32, 8),
    ]
    for page_size in (None, *PAGE_SIZES)
)

# The same decode from pages that follow each other in memory: what is left of the price of pages
# is the kernel's, and what goes is that of reading memory in random pieces.
PAGED_ORDER = tuple(case for case in PAGED if case.seqlen_q == 1)
PAGED_ORDER += tuple(replace(case, in_order=True) for case in PAGED_ORDER if case.page_size)

# From 4K to 1M tokens; the dense forward beside it is a case of its own, of the same lengths.
NSA = tuple(
    square(name, 128, 1, 2**log2, 32, 8, causal=True)
    for log2 in range(12, 21)
    for name in (*NSA_STAGES, "dense_causal")
)

# Groups of 16 heads, which fla-org's kernels need.
NSA_GROUP_16 = tuple(
    square("nsa", 128, 1, 2**log2, 64, 4, causal=True) for log2 in (12, 14, 16, 17)
)

# Small enough for a CPU: shows that the harness works, and nothing about speed.
TINY = (
    square("tiny", 32, 1, 64, 4, 2, causal=True),
    square("tiny", 64, 2, 128, 2, 2, causal=False),
)
TINY_NSA = tuple(square(name, 32, 1, 300, 4, 2, causal=True) for name in NSA_STAGES)
TINY_NSA += (square("dense_causal", 32, 1, 300, 4, 2, causal=True),)

SPARSE = tuple(square(name, 128, 1, 32768, 32, 8, causal=False) for name in KEPT)

PACKED = tuple(
    square(name, 128, 1, sum(lengths), 32, 8, causal=True) for name, lengths in DOCUMENTS.items()
)

BUILD = (square(BUILDING, 128, 1, 8192, 32, 8, causal=True),)

# Masks and scores as functions, beside full and causal attention.
FUNCTIONS = (
    square("full", 128, 1, 8192, 32, 8, causal=False),
    square("causal", 128, 1, 8192, 32, 8, causal=True),
)
FUNCTIONS += tuple(
    square(name, 128, 1, 8192, 32, 8, causal=False)
    for name in (*functions.MASKS, *functions.SCORES)
    if name not in functions.COMPRESS
)
FUNCTIONS += tuple(
    Case(name, 1, 32768, 32768 // factor, 16, 16, 128, 128)
    for name, factor in functions.COMPRESS.items()
)

SUITES: dict[str, tuple[Case, ...]] = {
    "dense": DENSE,
    "decode": DECODE,
    "decode_small": DECODE_SMALL,
    "paged": PAGED,
    "paged_order": PAGED_ORDER,
    "nsa": NSA,
    "nsa_group_16": NSA_GROUP_16,
    "sparse": SPARSE,
    "packed": PACKED,
    "build": BUILD,
    "functions": FUNCTIONS,
    "tiny": TINY,
    "tiny_nsa": TINY_NSA,
}
