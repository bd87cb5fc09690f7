"""What one attention call computes: its static part and its arrays.

``AttentionSpec`` holds everything that is known while tracing and is part of a kernel's identity.
``Operands`` holds the arrays; an absent one is ``None``, so the structure of the tree says which
features a call uses.  The forward and the backward pass take the same pair, so they cannot
disagree about a mask.

Dimensions, everywhere in this package:

    B  batch            T  query length      N  query heads      H   head_dim of query and key
                        S  key length        K  key/value heads  Hv  head_dim of value
    G = N // K  query heads that share one key/value head
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_flashcute.block_mask import BlockMask
from jax_flashcute.masks import TracedFunction
from jax_flashcute.segments import Segments

LEAST_LSE = -(2.0**24)
"""In float32, an LSE below it does not tell a row's probabilities: the row has no gradient, as one
that sees no key."""


@dataclass(frozen=True)
class AttentionSpec:
    """The static part of an attention call.

    Attributes:
      scale: factor on ``query @ key``; already resolved (never None).
      is_causal: query at position p sees keys ``kv <= p``.
      local_window_size: ``(left, right)``: position p sees keys ``p - left <= kv <= p + right``;
        ``None`` in either place leaves that side open, ``None`` for the whole means no window.
      logits_soft_cap: ``c`` in ``c * tanh(score / c)``, applied to the scaled score before the
        bias; ``None`` for none.
      deterministic: gradients are bit-identical between runs; see ``flash_attention``.
      batch_invariant: a batch entry's result does not depend on the number of entries, bit for bit.
      mask_mod: traced ``(b, h, q_idx, kv_idx) -> bool``; False hides a key.
      score_mod: traced ``(score, b, h, q_idx, kv_idx) -> score``, applied to the scaled score
        before the soft cap.
      constants: of the operands ``"bias"`` and ``"score_mod_arrays"`` those whose gradients nobody
        asks for, which a backward pass may give as zeros.
      may_make_lists: a kernel may have lists of tiles made from ``mask_mod`` in the call.

    A query row i stands at position ``i + q_offset``; ``q_offset`` is an operand.  Where segments
    have positions of their own, those stand in for i and for the number of a key.
    """

    scale: float
    is_causal: bool = False
    local_window_size: tuple[int | None, int | None] | None = None
    logits_soft_cap: float | None = None
    deterministic: bool = False
    batch_invariant: bool = False
    mask_mod: TracedFunction | None = None
    score_mod: TracedFunction | None = None
    constants: tuple[str, ...] = ()
    may_make_lists: bool = False

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """``(left, right)``: position p sees only ``p - left <= kv <= p + right``; None is open."""
        left, right = self.local_window_size or (None, None)
        if self.is_causal:
            right = 0 if right is None else min(right, 0)
        return left, right


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """The arrays of an attention call, with an explicit batch dimension.

    Attributes:
      query: (B, T, N, H), floating point.
      key: (B, S, K, H), same dtype.
      value: (B, S, K, Hv), same dtype.
      q_offset: (B,) int32: position of query row 0; absent means 0.
      query_seq_lengths: (B,) int32: rows at or beyond it give output 0, LSE -inf, gradient 0.
      key_value_seq_lengths: (B,) int32: keys at or beyond it are invisible and may hold NaN.
      bias: (1|B, 1|N, 1|T, 1|S) floating point, added to the scaled score.
      mask: (1|B, 1|N, 1|T, 1|S) bool, False hides.
      packed_mask: (1|B, 1|N, 1|T, ceil(S / 32)) uint32: bit j, from the lowest, of word w is key
        32 w + j; 0 hides.
      sinks: (1|B, N) float32: one extra logit per head that takes part in the normaliser only.
      batch_index: (B,) int32: the ``b`` that ``mask_mod`` and ``score_mod`` see; present where one
        of them is.
      head_index: (N,) int32: the ``h`` that they see, where this is a part of the heads; absent
        means 0..N-1.
      mask_mod_arrays: what ``mask_mod`` closes over: (1|B, ...) each.
      score_mod_arrays: what ``score_mod`` closes over, likewise.
      page_table: (B, max_pages) int32, where keys and values are paged: then key is (num_pages,
        page_size, K, H), value likewise, S is max_pages * page_size, and token s of a batch entry
        is slot s % page_size of page ``page_table[b, s // page_size]``.
      segment_ids: packed sequences: a row sees keys of its own segment alone.
      block_mask: the tiles that are visited; ``mask_mod`` holds in the partial ones only.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    q_offset: jax.Array | None = None
    query_seq_lengths: jax.Array | None = None
    key_value_seq_lengths: jax.Array | None = None
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    packed_mask: jax.Array | None = None
    sinks: jax.Array | None = None
    batch_index: jax.Array | None = None
    head_index: jax.Array | None = None
    mask_mod_arrays: tuple[jax.Array, ...] = ()
    score_mod_arrays: tuple[jax.Array, ...] = ()
    page_table: jax.Array | None = None
    segment_ids: Segments | None = None
    block_mask: BlockMask | None = None

    @property
    def kv_length(self) -> int:
        """S: keys that a batch entry can have."""
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return pages * self.key.shape[1]

    def present(self) -> tuple[str, ...]:
        """Names of the arrays that this call has, in field order."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return tuple(name for name, value in fields if not _absent(value))


def _absent(value: object) -> bool:
    return value is None or (isinstance(value, tuple) and not value)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """What the backward pass needs of the forward pass.

    Attributes:
      out: (B, T, N, Hv), in the dtype of the operands.
      lse: (B, T, N) float32 (float64 where the operands are): log of the sum of exp of the scores
        and the sink; -inf where no key is visible (the sink where there is one) and in padded rows.
    """

    out: jax.Array
    lse: jax.Array

    def row_statistics(
        self, dout: jax.Array, dlse: jax.Array, dtype
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """dout with zeros in rows without a gradient, the LSE, and ``sum(dout * out) - dlse``.

        Args:
          dout: (B, T, N, Hv), the cotangent of out.
          dlse: (B, T, N), the cotangent of lse.
          dtype: of the statistics, (B, T, N) each.
        """
        empty = self.lse == -jnp.inf
        if dtype == jnp.float32:
            empty = self.lse < LEAST_LSE
        # An infinite LSE makes exp(score - lse) exactly 0 in rows that have no gradient.
        lse = jnp.where(empty, jnp.inf, self.lse.astype(dtype))
        dout = jnp.where(empty[..., None], jnp.zeros((), dout.dtype), dout)
        delta = jnp.sum(dout.astype(dtype) * self.out.astype(dtype), axis=-1)
        return dout, lse, delta - jnp.where(empty, 0, dlse.astype(dtype))
