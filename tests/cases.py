"""Attention calls that are tested: shapes that divide nothing, and every feature of a call.

Shared by the tests on a CPU, in simulation and on a GPU, so that each runs the same edges.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashcute import masks
from jax_flashcute.spec import AttentionSpec

# Lengths around the edges of words, warps and tiles.
EDGE_LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129)
LONG_EDGE_LENGTHS = (*EDGE_LENGTHS, 1000, 4097)
GROUPS = (1, 3, 7, 8)


@dataclass(frozen=True)
class Case:
    """One call of ``flash_attention``.

    Attributes:
      batch, seqlen_q, seqlen_k, kv_heads, group, head_dim, head_dim_v: sizes; there are
        ``kv_heads * group`` query heads.
      causal: the causal mask.
      window: ``local_window_size``.
      soft_cap: ``logits_soft_cap``.
      offset: a ``q_offset`` per sequence; some rows see no key, where causal or windowed.
      lengths: query and key lengths per sequence, 0 and full among them.
      bias: which of the dimensions "bnts" the bias has at full size; None for no bias.
      mask: likewise for the boolean mask.
      sinks: a sink per query head.
      mask_mod: a mask function that closes over no array.
    """

    batch: int = 2
    seqlen_q: int = 129
    seqlen_k: int = 150
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 16
    head_dim_v: int = 16
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    soft_cap: float | None = None
    offset: bool = False
    lengths: bool = False
    bias: str | None = None
    mask: str | None = None
    sinks: bool = False
    mask_mod: Callable | None = None

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def static(self) -> dict:
        """Keyword arguments that are no arrays."""
        return {
            "is_causal": self.causal,
            "local_window_size": self.window,
            "logits_soft_cap": self.soft_cap,
            "mask_mod": self.mask_mod,
        }

    def spec(self, **more) -> AttentionSpec:
        """The static part of the call at the default scale, as kernels and the reference take it.

        A mask function is kept whole; ``batch_index`` says what the reference needs with it.
        """
        mask_mod = None if self.mask_mod is None else masks.trace_mask(self.mask_mod)[0]
        scale = self.head_dim**-0.5
        return AttentionSpec(scale, self.causal, self.window, mask_mod=mask_mod, **more)

    def batch_index(self) -> dict:
        """The operand that a mask function goes with."""
        return {} if self.mask_mod is None else {"batch_index": jnp.arange(self.batch)}

    def arrays(self, dtype=jnp.float32, seed: int = 0, *, poison: bool = True) -> dict:
        """Array arguments by name.

        Args:
          dtype: of query, key and value; bias and sinks are float32, or float64 if these are.
          seed: of the random values.
          poison: fill what stands beyond the lengths with NaN.
        """
        rng = np.random.default_rng(seed)
        statistics = jnp.promote_types(dtype, jnp.float32)
        B, T, S, N, K = self.batch, self.seqlen_q, self.seqlen_k, self.q_heads, self.kv_heads
        arrays = {
            "query": rng.standard_normal((B, T, N, self.head_dim)),
            "key": rng.standard_normal((B, S, K, self.head_dim)),
            "value": rng.standard_normal((B, S, K, self.head_dim_v)),
        }
        arrays = {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
        if self.offset:
            offsets = rng.integers(-T, S + 1, B)
            offsets[0] = S - T
            arrays["q_offset"] = jnp.asarray(offsets, jnp.int32)
        if self.lengths:
            for name, rows, longest in (
                ("query_seq_lengths", ("query",), T),
                ("key_value_seq_lengths", ("key", "value"), S),
            ):
                lengths = rng.integers(0, longest + 1, B)
                lengths[-1] = longest if name.startswith("query") else longest // 2
                arrays[name] = jnp.asarray(lengths, jnp.int32)
                for row in rows if poison else ():
                    beyond = np.arange(longest)[None, :] >= lengths[:, None]
                    arrays[row] = jnp.where(beyond[:, :, None, None], jnp.nan, arrays[row])
        full = {"b": B, "n": N, "t": T, "s": S}
        if self.bias is not None:
            shape = tuple(full[d] if d in self.bias else 1 for d in "bnts")
            arrays["bias"] = jnp.asarray(rng.standard_normal(shape), statistics)
        if self.mask is not None:
            shape = tuple(full[d] if d in self.mask else 1 for d in "bnts")
            arrays["mask"] = jnp.asarray(rng.random(shape) < 0.7)
        if self.sinks:
            arrays["sinks"] = jnp.asarray(rng.standard_normal(N), statistics)
        return arrays


# Each feature alone, and then together where they meet in the code.
FEATURES = {
    "full": Case(),
    "causal": Case(causal=True),
    "causal_offset": Case(causal=True, offset=True, batch=3),
    "causal_more_queries": Case(causal=True, seqlen_q=200, seqlen_k=70, offset=True),
    "window": Case(window=(20, 7)),
    "window_open_left": Case(window=(None, 0)),
    "window_open_right": Case(window=(5, None), offset=True),
    "window_causal": Case(window=(30, 30), causal=True, offset=True),
    "lengths": Case(lengths=True, batch=4),
    "lengths_causal": Case(lengths=True, batch=4, causal=True),
    "soft_cap": Case(soft_cap=1.5),
    "groups": Case(group=3),
    "multi_query": Case(kv_heads=1, group=7, causal=True),
    "value_head_dim": Case(head_dim=24, head_dim_v=8, group=2),
    "bias_full": Case(bias="bnts"),
    "bias_heads": Case(bias="n", group=2),
    "bias_queries": Case(bias="t"),
    "bias_keys": Case(bias="bs", group=2),
    "bias_relative": Case(bias="nts", causal=True, group=2),
    "bias_one": Case(bias=""),
    "mask_full": Case(mask="bnts", group=2),
    "mask_shared": Case(mask="ts"),
    "mask_keys": Case(mask="bs", causal=True),
    "sinks": Case(sinks=True, group=3),
    "sinks_empty_rows": Case(sinks=True, causal=True, offset=True, lengths=True),
    "everything": Case(
        batch=3,
        group=2,
        head_dim_v=24,
        causal=True,
        window=(60, None),
        soft_cap=2.0,
        offset=True,
        lengths=True,
        bias="ns",
        mask="bt",
        sinks=True,
    ),
}


def edge_cases(lengths=LONG_EDGE_LENGTHS, groups=GROUPS) -> list[Case]:
    """Every pair of edge lengths, full and causal, aligned at the start and with offsets."""
    cases = []
    pairs = itertools.product(lengths, lengths)
    variants = itertools.cycle(
        itertools.product(groups, ((False, False), (True, False), (True, True)))
    )
    for seqlen_q, seqlen_k in pairs:
        for _ in range(3):
            group, (causal, offset) = next(variants)
            cases.append(
                Case(
                    seqlen_q=seqlen_q,
                    seqlen_k=seqlen_k,
                    kv_heads=1 if group > 1 else 2,
                    group=group,
                    head_dim=64,
                    head_dim_v=64,
                    causal=causal,
                    offset=offset,
                )
            )
    return cases


def differentiable(arrays: dict) -> dict[str, jax.Array]:
    """Those of the arrays that have a gradient."""
    return {
        name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)
    }
