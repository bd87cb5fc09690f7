"""The Hopper forward on keys and values in pages, in simulation, against the dense reference.

Slots and pages that no sequence uses hold NaN, and entries of the table beyond a sequence's length
hold numbers of no page.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import reference
from jax_flashcute.kernels import registry
from jax_flashcute.spec import AttentionSpec, Operands
from tests.simulator import simulate
from tests.simulator.test_forward_features import compiled

SPEC = AttentionSpec(0.125, is_causal=True)
BF16 = jnp.dtype("bfloat16")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of ``paged_attention``, as its checked arguments are; ``queries``: their lengths."""

    page_size: int
    lengths: tuple[int, ...]
    head_dim: int = 64
    head_dim_v: int = 64
    group: int = 1
    kv_heads: int = 1
    seqlen_q: int = 1
    queries: tuple[int, ...] | None = None
    pages: str = "permuted"
    spec: AttentionSpec = SPEC
    sinks: bool = False
    num_sms: int = 2

    def operands(self) -> Operands:
        rng = np.random.default_rng(self.page_size)
        B, K, page_size = len(self.lengths), self.kv_heads, self.page_size
        most = -(-max(self.lengths) // page_size) + 1
        num_pages = B * most + 2
        table = rng.permutation(num_pages)[: B * most].reshape(B, most)
        if self.pages == "shared":
            table[:] = table[0]
        elif self.pages == "repeated":
            table[:] = table[:, :1]
        lengths = np.asarray(self.lengths, np.int32)
        used = np.zeros((num_pages, page_size), bool)
        for row, length in zip(table, lengths, strict=True):
            tokens = np.arange(length)
            used[row[tokens // page_size], tokens % page_size] = True
            row[-(-length // page_size) :] = rng.choice([-1, num_pages, 2**31 - 1, -(2**31)])

        def pages(width: int) -> jax.Array:
            values = rng.standard_normal((num_pages, page_size, K, width))
            return jnp.asarray(np.where(used[..., None, None], values, np.nan), BF16)

        rows = lengths if self.queries is None else np.asarray(self.queries, np.int32)
        rows = np.minimum(rows, self.seqlen_q) if self.queries else self.seqlen_q
        query = rng.standard_normal((B, self.seqlen_q, K * self.group, self.head_dim))
        return Operands(
            query=jnp.asarray(query, BF16),
            key=pages(self.head_dim),
            value=pages(self.head_dim_v),
            q_offset=jnp.asarray(lengths - rows, jnp.int32),
            query_seq_lengths=jnp.asarray(rows, jnp.int32) if self.queries else None,
            key_value_seq_lengths=jnp.asarray(lengths),
            page_table=jnp.asarray(table, jnp.int32),
            sinks=jnp.linspace(-1.0, 1.0, K * self.group)[None] if self.sinks else None,
        )


def check(call: Call, **how) -> registry.KernelKey:
    operands, spec = call.operands(), call.spec
    assert not registry.reasons_against(spec, operands, "fwd", "sm_90a")
    key = registry.kernel_key(spec, operands, "fwd", "sm_90a", call.num_sms)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == BF16 else x, operands)
    want = reference.attention(spec, wide)
    inputs = [operands.query, operands.key, operands.value]
    given = (getattr(operands, name) for name in registry.OPTIONAL_OPERANDS)
    inputs += [x for x in given if x is not None]
    inputs += [x for x in (operands.page_table, operands.sinks) if x is not None]
    rows = operands.query.shape[:3]
    outputs = [((*rows, call.head_dim_v), BF16), (rows, np.dtype(np.float32))]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    out, lse, *_ = simulate(compiled(key), *(np.asarray(x) for x in inputs), outputs=outputs, **how)
    np.testing.assert_allclose(out.astype(np.float32), want.out, atol=0.02, rtol=0.02)
    np.testing.assert_allclose(lse, want.lse, atol=2e-4, rtol=1e-5)
    return key


CASES = {
    "8_prefill": Call(8, (0, 7, 8, 9, 157), seqlen_q=70, queries=(3, 1, 0, 70, 65)),
    "512_chunk_72_40": Call(512, (700, 257), 72, 40, seqlen_q=64, group=3, pages="shared"),
}


@pytest.mark.parametrize("call", CASES.values(), ids=list(CASES))
def test_prefill(call: Call) -> None:
    assert not check(call).split_kv


SPLIT_CASES = {
    "16_decode": Call(16, (1601, 0, 15, 700), 128, 128, group=8, num_sms=16),
}


@pytest.mark.parametrize("call", SPLIT_CASES.values(), ids=list(SPLIT_CASES))
def test_split_kv(call: Call) -> None:
    assert check(call, timing="shuffled", warps="adversarial").split_kv
