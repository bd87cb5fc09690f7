"""Paged attention against dense attention over the gathered pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jax_flashcute import explain, explain_paged_attention, flash_attention, paged_attention, plan
from jax_flashcute.kernels import registry
from jax_flashcute.spec import AttentionSpec, Operands


def make(page_size: int, lengths, group: int = 3, seqlen_q: int = 2, pages: str = "permuted"):
    """Paged arguments with NaN wherever nothing may be read, and the dense keys and values."""
    rng = np.random.default_rng(page_size)
    B, K, H, Hv = len(lengths), 2, 16, 8
    max_pages = -(-max(lengths) // page_size) + 1
    num_pages = B * max_pages + 3
    table = rng.permutation(num_pages)[: B * max_pages].reshape(B, max_pages)
    if pages == "shared":
        table[:] = table[0]
    elif pages == "repeated":
        table[:] = table[:, :1]
    k_pages = np.full((num_pages, page_size, K, H), np.nan, np.float32)
    v_pages = np.full((num_pages, page_size, K, Hv), np.nan, np.float32)
    for b, length in enumerate(lengths):
        for s in range(length):
            k_pages[table[b, s // page_size], s % page_size] = rng.standard_normal((K, H))
            v_pages[table[b, s // page_size], s % page_size] = rng.standard_normal((K, Hv))
    rows = np.arange(max_pages * page_size)
    key = k_pages[table[:, rows // page_size], rows % page_size]
    value = v_pages[table[:, rows // page_size], rows % page_size]
    table = table.astype(np.int32)
    for b, length in enumerate(lengths):
        table[b, -(-length // page_size) :] = rng.choice([-1, num_pages, 2**31 - 1])
    query = rng.standard_normal((B, seqlen_q, K * group, H)).astype(np.float32)
    return (query, k_pages, v_pages, table, np.asarray(lengths, np.int32)), (key, value)


def check(arrays, dense, implementation="xla", q_lengths=None, is_causal=True, **how):
    query, *_, lengths = arrays
    how |= {"is_causal": is_causal, "return_residual": True}
    paged = functools.partial(
        paged_attention, implementation=implementation, q_lengths=q_lengths, **how
    )
    out, lse = jax.jit(paged)(*arrays)
    want, want_lse = flash_attention(
        query,
        *dense,
        q_offset=lengths - (query.shape[1] if q_lengths is None else q_lengths),
        query_seq_lengths=q_lengths,
        key_value_seq_lengths=lengths,
        implementation="reference",
        **how,
    )
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, atol=2e-5)


@pytest.mark.parametrize("page_size", [1, 2, 8, 64, 512])
@pytest.mark.parametrize("pages", ["permuted", "shared", "repeated"])
def test_against_gathered_pages(page_size: int, pages: str) -> None:
    lengths = (0, 1, page_size - 1, page_size, page_size + 1, 257)
    if pages == "repeated":
        lengths = (2 * page_size, page_size)
    elif pages == "shared":
        lengths = (257, 257)
    check(*make(page_size, lengths, pages=pages))


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("seqlen_q", [1, 300])
def test_groups_and_query_lengths(group: int, seqlen_q: int) -> None:
    arrays, dense = make(16, (0, 33, 400), group, seqlen_q)
    check(arrays, dense)
    check(arrays, dense, "reference")
    check(arrays, dense, q_lengths=np.array([0, 1, seqlen_q], np.int32))


def test_windows_caps_and_sinks() -> None:
    arrays, dense = make(8, (5, 100, 77), seqlen_q=4)
    sinks = np.linspace(-1, 1, 6, dtype=np.float32)
    check(arrays, dense, local_window_size=(20, 0), logits_soft_cap=2.0, sinks=sinks)
    check(arrays, dense, is_causal=False)


def test_masks_and_scores_see_numbers_of_tokens() -> None:
    arrays, dense = make(8, (5, 100, 77), seqlen_q=4)
    slopes = jnp.linspace(0.1, 0.5, 6)
    check(
        arrays,
        dense,
        mask_mod=lambda b, h, q, kv: (q - kv) % 3 != 1,
        score_mod=lambda score, b, h, q, kv: score + slopes[h] * (kv - q),
    )


def test_vmap() -> None:
    (query, k_pages, v_pages, table, lengths), _ = make(8, (9, 30))
    attend = functools.partial(paged_attention, implementation="xla")
    given = (np.stack([query, query + 1]), k_pages, v_pages, np.stack([table, table]))
    shorter = np.stack([lengths, lengths - 3])
    got = jax.vmap(attend, in_axes=(0, None, None, 0, 0))(*given, shorter)
    for i in range(2):
        want = attend(query + i, k_pages, v_pages, table, shorter[i])
        np.testing.assert_allclose(got[i], want, atol=1e-5)
    stacked = np.stack([k_pages, k_pages])
    with pytest.raises(NotImplementedError, match="vmap of paged_attention over pages"):
        jax.vmap(attend, (None, 0, None, None, None))(query, stacked, v_pages, table, lengths)


def test_bad_page_numbers() -> None:
    (query, k_pages, v_pages, table, lengths), _ = make(4, (9, 30))
    paged_attention(query, k_pages, v_pages, table, lengths, checked=True)
    table[1, 3] = len(k_pages)
    arrays = query, k_pages, v_pages, table, lengths
    assert np.isfinite(paged_attention(*arrays)).all()
    with pytest.raises(ValueError, match="page_table must hold numbers from 0"):
        paged_attention(*arrays, checked=True)
    attend = functools.partial(paged_attention, checked=True)
    error, _ = jax.jit(checkify.checkify(attend))(*map(jnp.asarray, arrays))
    with pytest.raises(checkify.JaxRuntimeError, match="page_table must hold"):
        error.throw()


def test_what_does_not_fit_is_named() -> None:
    (query, k_pages, v_pages, table, lengths), _ = make(4, (9, 30))
    with pytest.raises(ValueError, match="page_size must be a power of two"):
        paged_attention(query, k_pages[:, :3], v_pages[:, :3], table, lengths)
    with pytest.raises(ValueError, match="page_table must be"):
        paged_attention(query, k_pages, v_pages, table[0], lengths)
    with pytest.raises(ValueError, match="v_pages must be"):
        paged_attention(query, k_pages, v_pages[:1], table, lengths)
    with pytest.raises(ValueError, match="v_pages must have query's dtype, float32; got bfloat16"):
        paged_attention(query, k_pages, v_pages.astype(jnp.bfloat16), table, lengths)
    with pytest.raises(ValueError, match="k_pages must have query's head_dim"):
        paged_attention(query, k_pages[..., 1:], v_pages, table, lengths)
    with pytest.raises(ValueError, match="checked must be True or False"):
        paged_attention(query, k_pages, v_pages, table, lengths, checked="no")
    with pytest.raises(ValueError, match="k_pages must have room for at least one page"):
        paged_attention(query, k_pages[:0], v_pages[:0], table, lengths)
    with pytest.raises(ValueError, match="page_table must have room for at least one page"):
        paged_attention(query, k_pages, v_pages, table[:, :0], lengths)
    with pytest.raises(NotImplementedError, match='batch_invariant needs implementation="cute"'):
        paged_attention(query, k_pages, v_pages, table, lengths, batch_invariant=True)
    with pytest.raises(NotImplementedError, match="no derivatives"):
        jax.grad(lambda q: paged_attention(q, k_pages, v_pages, table, lengths).sum())(query)


def in_bfloat16(page_size: int) -> list[jax.Array]:
    arrays, _ = make(page_size, (9, 30))
    return [jnp.asarray(x, jnp.bfloat16 if x.dtype == np.float32 else None) for x in arrays]


def test_what_no_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_FLASHCUTE_ARCH", "sm_120a")
    arrays = in_bfloat16(8)
    with pytest.raises(NotImplementedError, match="not for sm_120a"):
        paged_attention(*arrays, implementation="cute")
    program = jax.jit(paged_attention).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "CuteDSL" not in program.as_text()


@pytest.mark.parametrize("page_size", [2, 16])
def test_copied_keys_are_counted_in_32_bits(page_size: int) -> None:
    integers = jax.ShapeDtypeStruct((1,), jnp.int32)
    pages = jax.ShapeDtypeStruct((2**31 // page_size, page_size, 1, 8), jnp.bfloat16)
    operands = Operands(
        query=jax.ShapeDtypeStruct((1, 1, 1, 8), jnp.bfloat16),
        key=pages,
        value=pages,
        q_offset=integers,
        key_value_seq_lengths=integers,
        page_table=jax.ShapeDtypeStruct((1, 9), jnp.int32),
    )
    reasons = registry.reasons_against(AttentionSpec(1.0), operands, "fwd", "sm_90a")
    copied = ["pages of 2 must hold fewer than 2^31 keys, got 1073741824 pages"]
    assert reasons == (copied if page_size == 2 else [])


@pytest.mark.parametrize(("arch", "page_size"), [("sm_90a", 16), ("sm_100a", 32)])
def test_a_kernel_is_taken(monkeypatch: pytest.MonkeyPatch, arch: str, page_size: int) -> None:
    monkeypatch.setenv("JAX_FLASHCUTE_ARCH", arch)
    # Another page size than above: what is traced is kept.
    traced = jax.jit(paged_attention).trace(*in_bfloat16(page_size))
    assert "CuteDSL" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("implementation", "longest"), [("xla", None), ("reference", 30)])
def test_packed_queries(implementation, longest: int | None) -> None:
    """Prefill, a chunk, decode and a sequence without rows in one array, and rows of none."""
    (query, k_pages, v_pages, table, lengths), dense = make(8, (30, 100, 77, 5), seqlen_q=30)
    counts = np.array([30, 7, 0, 1], np.int32)
    ends = np.concatenate([[2], 2 + np.cumsum(counts)]).astype(np.int32)
    rows = [query[b, :count] for b, count in enumerate(counts)]
    nan = np.full((2, *query.shape[2:]), np.nan, np.float32)
    packed = np.concatenate([nan, *rows, nan])
    features = {"logits_soft_cap": 2.0, "local_window_size": (60, 0)}
    attend = functools.partial(paged_attention, implementation=implementation, **features)
    call = functools.partial(attend, max_q_length=longest, return_residual=True)
    given = packed, k_pages, v_pages, table, lengths
    out, lse = jax.jit(call)(*given, cu_seqlens_q=ends)
    want, want_lse = flash_attention(
        query,
        *dense,
        is_causal=True,
        q_offset=lengths - counts,
        query_seq_lengths=counts,
        key_value_seq_lengths=lengths,
        return_residual=True,
        implementation="reference",
        **features,
    )
    for b, count in enumerate(counts):
        np.testing.assert_allclose(out[ends[b] : ends[b + 1]], want[b, :count], atol=2e-5)
        np.testing.assert_allclose(lse[ends[b] : ends[b + 1]], want_lse[b, :count], atol=2e-5)
    for outside in (slice(0, 2), slice(int(ends[-1]), None)):
        assert (out[outside] == 0).all()
        assert np.isneginf(lse[outside]).all()
    assert attend(packed[:0], *given[1:], cu_seqlens_q=np.zeros(5, np.int32)).shape[0] == 0
    with pytest.raises(ValueError, match="by at most max_q_length=29"):
        attend(*given, cu_seqlens_q=ends, max_q_length=29, checked=True)


def test_packed_queries_that_do_not_fit_are_named() -> None:
    (query, *pages), _ = make(4, (9, 30))
    ends = np.array([0, 1, 2], np.int32)
    for wrong, message in (
        ({"cu_seqlens_q": ends}, "query must be"),
        ({"cu_seqlens_q": ends, "q_lengths": 1}, "q_lengths must be left out"),
        ({"max_q_length": 3}, "max_q_length goes with"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(query, *pages, **wrong)
    with pytest.raises(ValueError, match="cu_seqlens_q must be"):
        paged_attention(query[0], *pages, cu_seqlens_q=ends[1:])
    with pytest.raises(ValueError, match="max_q_length must be"):
        paged_attention(query[0], *pages, cu_seqlens_q=ends, max_q_length=-1)


def test_no_packed_queries_at_all() -> None:
    (query, *pages), _ = make(4, (9, 30))
    out = paged_attention(
        query[0, :0], *pages, cu_seqlens_q=np.zeros(3, np.int32), max_q_length=np.int64(4)
    )
    assert out.shape == (0, query.shape[2], pages[1].shape[3])
    out, lse = paged_attention(
        query[0],
        *pages,
        cu_seqlens_q=np.array([0, 1, 1], np.int32),
        max_q_length=0,
        return_residual=True,
    )
    assert not out.any()
    assert np.isneginf(lse).all()


def decode(page_size: int, **how):
    """``explain_paged_attention`` of a decode step of 16 sequences, by shapes alone."""
    query = jax.ShapeDtypeStruct((16, how.pop("seqlen_q", 1), 32, 128), jnp.bfloat16)
    query = how.pop("query", query)
    pages = jax.ShapeDtypeStruct((2**20 // page_size, page_size, 8, 128), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((16, 2**16 // page_size), jnp.int32)
    lengths = jax.ShapeDtypeStruct((16,), jnp.int32)
    return explain_paged_attention(query, pages, pages, table, lengths, **how)


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a")
    sinks = jax.ShapeDtypeStruct((32,), jnp.float32)
    for page_size, copies in ((1, "asynchronous copies"), (2, "TMA"), (512, "TMA")):
        told = decode(page_size, sinks=sinks, logits_soft_cap=5.0)
        assert (told.forward, told.backward, told.splits) == ("cute", "refused", 128)
        assert told.page_copies == copies
        assert f"pages: loaded by {copies}" in str(told)
        assert "divided into 128 parts at most" in str(told)
    assert decode(16, seqlen_q=300).splits == 1
    assert decode(1, seqlen_q=300).page_copies == "asynchronous copies"
    assert decode(16, implementation="cute", batch_invariant=True).splits == 128
    packed = jax.ShapeDtypeStruct((40, 32, 128), jnp.bfloat16)
    ends = jax.ShapeDtypeStruct((17,), jnp.int32)
    told = decode(16, query=packed, cu_seqlens_q=ends, max_q_length=8)
    assert (told.forward, told.splits) == ("cute", 32)
    refused = decode(16, batch_invariant=True)
    assert (refused.forward, refused.elsewhere) == ("refused", "refused")
    assert "batch_invariant" in refused.forward_reasons[0]
    assert decode(16, implementation="reference").backward == "reference"
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_80")
    told = decode(16)
    assert (told.forward, told.splits, told.page_copies) == ("xla", None, None)
    with pytest.raises(ValueError, match="kv_lengths must be integers"):
        explain_paged_attention(*make(4, (9, 30))[0][:4], None)


def test_small_pages_that_many_tiles_visit_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a")

    def copies(page_size: int = 1, queries: int = 2048, keys: int = 8192, **how) -> str | None:
        query = jax.ShapeDtypeStruct((4, queries, 32, 128), jnp.bfloat16)
        pages = jax.ShapeDtypeStruct((2**16 // page_size, page_size, 8, 128), jnp.bfloat16)
        table = jax.ShapeDtypeStruct((4, keys // page_size), jnp.int32)
        lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
        how = {name: lengths if x == "lengths" else x for name, x in how.items()}
        return explain_paged_attention(query, pages, pages, table, lengths, **how).page_copies

    assert copies() == copies(32) == copies(is_causal=False) == "TMA, once gathered"
    assert copies(64) == "TMA"
    few = {"queries": 512}
    long = {"keys": 2**16}
    assert copies(**few) == copies(**long) == "asynchronous copies"
    for how in (
        {"q_lengths": "lengths"},
        {"local_window_size": (300, 0)},
        {"logits_soft_cap": 5.0},
    ):
        assert copies(**how) == "asynchronous copies"


def test_explain_of_a_dense_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a")
    query = jax.ShapeDtypeStruct((1, 1, 32, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 131072, 8, 128), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((131072,), jnp.float32)
    assert explain(query, key, key, bias=bias).splits == 16
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a:78")
    assert explain(query, key, key).splits == 8
