"""``paged_attention`` on a GPU: equal to attention over gathered pages.

Slots that no sequence uses hold NaN, and entries of the table beyond a length are no pages.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import PagedKVCache, flash_attention, paged_attention, plan
from jax_flashcute.kernels.description import page_copies
from jax_flashcute.kernels.key import KernelKey
from jax_flashcute.spec import AttentionSpec, Operands
from tests.kernels.gpu_cases import compile_in_parallel

pytestmark = pytest.mark.gpu

PAGE_SIZES = [2**i for i in range(10)]
GROUPS = (1, 3, 8, 16)
QUERIES = (1, 2, 5, 64, 300)
KV_HEADS = 2
# Tokens that a table has room for: whole pages of every size.
ROOM = 17 * 512
DIMS = (64, 64)


class Pages:
    """Keys and values in pages for sequences of given lengths, and the same without pages."""

    def __init__(self, page_size: int, lengths: Sequence[int], kind: str, dims=DIMS, dtype="f4"):
        rng = np.random.default_rng(page_size)
        B, most = len(lengths), ROOM // page_size
        num_pages = B * most + 3
        table = rng.permutation(num_pages)[: B * most].reshape(B, most)
        if kind == "shared":
            table[:] = table[0]
        elif kind == "repeated":
            table[:] = table[:, :1]
        rows = np.arange(ROOM)
        used = np.zeros((num_pages, page_size), bool)
        for entry, length in zip(table, lengths, strict=True):
            used[entry[rows[:length] // page_size], rows[:length] % page_size] = True

        def pages(width: int) -> np.ndarray:
            x = rng.standard_normal((num_pages, page_size, KV_HEADS, width), np.float32)
            x[~used] = np.nan
            return x.astype(dtype)

        self.k_pages, self.v_pages = (pages(width) for width in dims)
        at = table[:, rows // page_size], rows % page_size
        self.dense = self.k_pages[at], self.v_pages[at]
        self.lengths = np.asarray(lengths, np.int32)
        self.table = table.astype(np.int32)
        for entry, length in zip(self.table, lengths, strict=True):
            entry[-(-length // page_size) :] = rng.choice([-1, num_pages, 2**31 - 1])

    @property
    def paged(self):
        return self.k_pages, self.v_pages, self.table, self.lengths


def query_of(pages: Pages, seqlen_q: int, group: int) -> np.ndarray:
    rng = np.random.default_rng(seqlen_q)
    shape = (len(pages.lengths), seqlen_q, KV_HEADS * group, pages.k_pages.shape[-1])
    return rng.standard_normal(shape, np.float32).astype(pages.k_pages.dtype)


def compare(pages: Pages, query: np.ndarray, *, q_lengths=None, is_causal=True, **features) -> None:
    """Close to the reference in float32, and equal to the kernel on gathered pages."""
    features |= {"is_causal": is_causal, "return_residual": True}
    paged = functools.partial(paged_attention, implementation="cute", **features)
    out, lse = jax.jit(paged)(query, *pages.paged, q_lengths=q_lengths)
    place = {
        "q_offset": pages.lengths - (query.shape[1] if q_lengths is None else q_lengths),
        "query_seq_lengths": q_lengths,
        "key_value_seq_lengths": pages.lengths,
    }
    dense = functools.partial(flash_attention, **features)
    wide = (x.astype(np.float32) for x in (query, *pages.dense))
    want, want_lse = jax.jit(functools.partial(dense, implementation="reference"))(*wide, **place)
    np.testing.assert_allclose(out.astype(np.float32), want, atol=0.02, rtol=0.02)
    np.testing.assert_allclose(lse, want_lse, atol=1e-3, rtol=1e-5)
    same = jax.jit(functools.partial(dense, implementation="cute"))(query, *pages.dense, **place)
    np.testing.assert_array_equal(out, same[0])
    np.testing.assert_array_equal(lse, same[1])


def edge_lengths(page_size: int) -> tuple[int, ...]:
    return (0, 1, page_size - 1, page_size, page_size + 1, 257, 8191)


def grid_key(page_size: int, group: int, seqlen_q: int) -> KernelKey:
    B = len(edge_lengths(page_size))
    integers = jax.ShapeDtypeStruct((B,), jnp.int32)
    most = ROOM // page_size
    pages = jax.ShapeDtypeStruct((B * most + 3, page_size, KV_HEADS, DIMS[0]), jnp.bfloat16)
    query = (B, seqlen_q, KV_HEADS * group, DIMS[0])
    operands = Operands(
        query=jax.ShapeDtypeStruct(query, jnp.bfloat16),
        key=pages,
        value=pages,
        q_offset=integers,
        key_value_seq_lengths=integers,
        page_table=jax.ShapeDtypeStruct((B, most), jnp.int32),
    )
    return plan.make_plan(AttentionSpec(DIMS[0] ** -0.5, is_causal=True), operands)


@pytest.fixture(scope="module")
def compiled() -> None:
    compile_in_parallel(
        grid_key(page_size, group, seqlen_q)
        for page_size in PAGE_SIZES
        for group in GROUPS
        for seqlen_q in QUERIES
    )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["permuted", "shared", "repeated"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_grid(page_size: int, kind: str) -> None:
    pages = Pages(page_size, edge_lengths(page_size), kind, dtype=jnp.bfloat16)
    for group in GROUPS:
        for seqlen_q in QUERIES:
            compare(pages, query_of(pages, seqlen_q, group))


@pytest.mark.parametrize(
    ("page_size", "features"),
    [
        (1, {}),
        (2, {"dims": (128, 128)}),
        (32, {"dims": (128, 128)}),
        (1, {"dims": (192, 128), "is_causal": False}),
    ],
    ids=["1_64", "2_128", "32_128", "1_192_128_full"],
)
def test_gathered(page_size: int, features: dict) -> None:
    """Small pages that many tiles of queries visit."""
    features = dict(features)
    pages = Pages(
        page_size, (0, 8191, 257), "permuted", features.pop("dims", DIMS), dtype=jnp.bfloat16
    )
    query = query_of(pages, 1100, 8)
    place = {"q_offset": pages.lengths, "key_value_seq_lengths": pages.lengths}
    arrays = {"query": query, "key": pages.k_pages, "value": pages.v_pages} | place
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in arrays.items()}
    table = jax.ShapeDtypeStruct(pages.table.shape, jnp.int32)
    key = plan.make_plan(
        AttentionSpec(0.125, features.get("is_causal", True)), Operands(**shapes, page_table=table)
    )
    assert page_copies(key) == "TMA, once gathered"
    compare(pages, query, **features)


SINKS = np.linspace(-1, 1, 3 * KV_HEADS, dtype=np.float32)
FEATURES = {
    "half": {"dtype": np.float16},
    "256": {"dims": (256, 256)},
    "192_128": {"dims": (192, 128)},
    "72_40": {"dims": (72, 40), "dtype": np.float16},
    "128_window": {"dims": (128, 128), "local_window_size": (300, 0)},
    "128_two_sided": {"dims": (128, 128), "local_window_size": (70, 30), "is_causal": False},
    "cap": {"logits_soft_cap": 5.0},
    "sinks": {"sinks": SINKS},
    "full": {"is_causal": False},
    "sinks_cap_window": {"sinks": SINKS, "logits_soft_cap": 5.0, "local_window_size": (3000, 0)},
    "mask_score": {
        "mask_mod": lambda b, h, q, kv: (q - kv) % 3 != 1,
        "score_mod": lambda score, b, h, q, kv: score + 0.01 * (h + 1) * (kv - q),
        "sinks": SINKS,
    },
}


@pytest.mark.parametrize("page_size", [1, 4, 16, 128, 512])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, page_size: int) -> None:
    features = dict(FEATURES[name])
    dims, dtype = features.pop("dims", DIMS), features.pop("dtype", jnp.bfloat16)
    pages = Pages(page_size, (0, 31, 1000, 8191), "permuted", dims, dtype)
    for seqlen_q in (1, 100):
        query = query_of(pages, seqlen_q, 3)
        compare(pages, query, **features)
        q_lengths = np.array([0, 1, seqlen_q // 2, seqlen_q], np.int32)
        compare(pages, query, q_lengths=q_lengths, **features)


@pytest.mark.parametrize("page_size", [2, 64])
def test_skewed_lengths(page_size: int) -> None:
    lengths = (8, 8000, *(8,) * 30)
    pages = Pages(page_size, lengths, "permuted", (128, 128), jnp.bfloat16)
    compare(pages, query_of(pages, 1, 8))
    sinks = np.linspace(-1, 1, 8 * KV_HEADS, dtype=np.float32)
    compare(pages, query_of(pages, 1, 8), sinks=sinks, logits_soft_cap=5.0)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 100])
@pytest.mark.parametrize("page_size", [2, 16])
def test_a_sequence_does_not_depend_on_the_batch(
    page_size: int, seqlen_q: int, capped: bool
) -> None:
    """Bit for bit, with other sequences beside it, of other lengths, at other places."""
    pages = Pages(page_size, (8000, 3, 700, 0, 5000), "permuted", dtype=jnp.bfloat16)
    query = query_of(pages, seqlen_q, 8)
    features = {"sinks": np.linspace(-1, 1, 8 * KV_HEADS, dtype=np.float32), "logits_soft_cap": 5.0}
    call = functools.partial(
        paged_attention, implementation="cute", batch_invariant=True, return_residual=True,
        **(features if capped else {}),
    )  # fmt: skip
    k_pages, v_pages, table, lengths = pages.paged

    def results(some: list[int], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return jax.jit(call)(query[some], k_pages, v_pages, table[some], lengths[some])

    everything = list(range(len(lengths)))
    out, lse = results(everything, lengths)
    for some in ([0], [2, 4], [4, 1, 2, 0], [0, *[1] * 70]):
        part, part_lse = results(some, lengths)
        np.testing.assert_array_equal(part, out[np.array(some)])
        np.testing.assert_array_equal(part_lse, lse[np.array(some)])
    # The batch mates of the first and the third alone are changed: they grow, shrink, end.
    others = lengths - np.array([0, 3, 0, 0, 4999], np.int32)
    part, part_lse = results(everything, others)
    for kept in (0, 2):
        np.testing.assert_array_equal(part[kept], out[kept])
        np.testing.assert_array_equal(part_lse[kept], lse[kept])


@pytest.mark.parametrize("page_size", [4, 64])
def test_packed_queries(page_size: int) -> None:
    """Prefill, a chunk and decode in one array: bit for bit as with rows of padding."""
    pages = Pages(page_size, (300, 8191, 1000, 0, 77), "permuted", (192, 128), jnp.bfloat16)
    query = query_of(pages, 300, 3)
    counts = np.array([300, 1, 64, 0, 2], np.int32)
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    packed = np.concatenate([query[b, :count] for b, count in enumerate(counts)])
    features = {"local_window_size": (3000, 0), "logits_soft_cap": 5.0, "return_residual": True}
    call = jax.jit(functools.partial(paged_attention, implementation="cute", **features))
    together = functools.partial(paged_attention, implementation="cute", max_q_length=300)
    out, lse = jax.jit(functools.partial(together, **features))(
        packed, *pages.paged, cu_seqlens_q=ends
    )
    want, want_lse = call(query, *pages.paged, q_lengths=counts)
    for b, count in enumerate(counts):
        np.testing.assert_array_equal(out[ends[b] : ends[b + 1]], want[b, :count])
        np.testing.assert_array_equal(lse[ends[b] : ends[b + 1]], want_lse[b, :count])


@pytest.mark.parametrize("page_size", [4, 32])
def test_a_page_out_of_range_reads_as_zeros(page_size: int) -> None:
    pages = Pages(page_size, (100, 700), "permuted", dtype=jnp.bfloat16)
    for number in (-1, len(pages.k_pages), 2**31 - 1):
        pages.table[:, 1] = number
        query = query_of(pages, 5, 3)
        out, want = (
            jax.jit(functools.partial(paged_attention, implementation=i))(query, *pages.paged)
            for i in ("cute", "xla")
        )
        np.testing.assert_allclose(
            out.astype(np.float32), want.astype(np.float32), atol=0.02, rtol=0.02
        )


@pytest.mark.parametrize("page_size", [4, 64])
def test_pages_beyond_four_gibibytes(page_size: int) -> None:
    """The pages in use lie at the far end of six GiB of keys and as many of values."""
    heads, width, length = 8, 128, 500
    num_pages = 6 * 2**30 // (page_size * heads * width * 2)
    used = -(-length // page_size)
    rng = np.random.default_rng(0)

    def pages(seed: int) -> tuple[jax.Array, jax.Array]:
        few = jax.random.normal(jax.random.key(seed), (used, page_size, heads, width))
        few = few.astype(jnp.bfloat16)
        far = jnp.zeros((num_pages, page_size, heads, width), jnp.bfloat16)
        return few, jax.jit(lambda x, few: x.at[num_pages - used :].set(few), donate_argnums=0)(
            far, few
        )

    (keys, k_pages), (values, v_pages) = pages(0), pages(1)
    query = rng.standard_normal((1, 3, heads, width)).astype(jnp.bfloat16)
    order = rng.permutation(used)
    lengths = np.array([length], np.int32)
    call = jax.jit(functools.partial(paged_attention, implementation="cute"))
    far = (num_pages - used + order)[None].astype(np.int32)
    out = call(query, k_pages, v_pages, far, lengths)
    want = call(query, keys, values, order[None].astype(np.int32), lengths)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("page_size", [4, 16])
def test_growing_sequences_in_command_buffers(page_size: int) -> None:
    """Donated steps of one program, captured in CUDA graphs as soon as may be and not at all."""
    layers, B, heads, width, room = 4, 3, 2, 64, 512
    cache = PagedKVCache.empty(
        layers=layers,
        batch=B,
        num_pages=B * room // page_size,
        page_size=page_size,
        max_pages=room // page_size,
        kv_heads=heads,
        head_dim=width,
        dtype=jnp.bfloat16,
    )
    table = np.random.default_rng(0).permutation(B * room // page_size).reshape(B, -1)

    def step(cache: PagedKVCache, new: jax.Array) -> tuple[PagedKVCache, jax.Array]:
        tokens = jnp.array([1, 0, 1], jnp.int32)
        out = new
        for layer in range(layers):
            cache = cache.append_layer(layer, out[:, :, :heads], out[:, :, heads : 2 * heads])
            pages = cache.k_pages[layer], cache.v_pages[layer], cache.page_table
            out = paged_attention(out, *pages, cache.lengths + 1, implementation="cute")
        return cache.advance(tokens), out

    def outputs(options: dict) -> list[np.ndarray]:
        run = jax.jit(step, donate_argnums=0, compiler_options=options)
        state = jax.tree.map(jnp.copy, cache).with_sequences(
            jnp.asarray(table, jnp.int32), jnp.array([3, 300, 127], jnp.int32)
        )
        found = []
        for i in range(2 * page_size + 3):
            new = jax.random.normal(jax.random.key(i), (B, 1, 3 * heads, width), jnp.bfloat16)
            state, out = run(state, new)
            found.append(np.asarray(out))
        assert run._cache_size() == 1
        return found

    captured = outputs({"xla_gpu_graph_min_graph_size": 1})
    assert np.isfinite(np.asarray(captured, np.float32)).all()
    np.testing.assert_array_equal(captured, outputs({"xla_gpu_enable_command_buffer": ""}))
