"""The paged cache and its allocator: against a plain Python model, and in the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from jax.experimental import checkify

from jax_flashcute import (
    OutOfPagesError,
    PageAllocator,
    PagedKVCache,
    flash_attention,
    paged_attention,
)

LAYERS, HEADS, HEAD_DIM, VALUE_HEAD_DIM = 2, 2, 4, 3
BATCH, CHUNK, PAGE_SIZE, MAX_PAGES, NUM_PAGES = 3, 5, 4, 5, 9


def make_cache(dtype=jnp.float32, num_pages=NUM_PAGES, page_size=PAGE_SIZE, **sizes):
    sizes = {"layers": LAYERS, "batch": BATCH, "max_pages": MAX_PAGES, "kv_heads": HEADS} | sizes
    return PagedKVCache.empty(
        num_pages=num_pages,
        page_size=page_size,
        head_dim=HEAD_DIM,
        value_head_dim=VALUE_HEAD_DIM,
        dtype=dtype,
        **sizes,
    )


def draw(rng, batch: int, length: int, dtype=np.float32):
    """Keys and values of new tokens: (LAYERS, batch, length, HEADS, ·)."""
    return tuple(
        rng.standard_normal((LAYERS, batch, length, HEADS, width)).astype(dtype)
        for width in (HEAD_DIM, VALUE_HEAD_DIM)
    )


attend = jax.jit(paged_attention)
append = jax.jit(lambda cache, *arrays: cache.append(*arrays), donate_argnums=0)


class Sequences(RuleBasedStateMachine):
    """Sequences start, share, grow and end; a dictionary of token lists says what must be there.

    The cache has as many pages as the allocator, so that allocating fails often.
    """

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.cache = make_cache()
        # What nobody has written must never be seen.
        self.cache = jax.tree.map(
            lambda x: x.at[:].set(jnp.nan) if x.dtype == jnp.float32 else x, self.cache
        )
        self.expected = [np.stack(p) for p in (self.cache.k_pages, self.cache.v_pages)]
        self.allocator = PageAllocator(NUM_PAGES, PAGE_SIZE)
        self.pages: dict[int, list[int]] = {}
        self.model: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.started = 0

    def start(self, pages, tokens):
        self.pages[self.started], self.model[self.started] = pages, tokens
        self.started += 1

    @precondition(lambda self: len(self.model) < BATCH)
    @rule()
    def start_empty(self):
        self.start([], [])

    def with_a_full_page(self):
        return [s for s, tokens in sorted(self.model.items()) if len(tokens) >= PAGE_SIZE]

    @precondition(with_a_full_page)
    @rule(data=st.data())
    def start_from_a_prefix(self, data):
        source = data.draw(st.sampled_from(self.with_a_full_page()))
        tokens = max(0, len(self.model[source]) - data.draw(st.integers(0, PAGE_SIZE)))
        shared = self.allocator.share(self.pages[source], tokens)
        assert len(shared) == tokens // PAGE_SIZE
        self.start(shared, self.model[source][: len(shared) * PAGE_SIZE])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def append(self, data):
        chosen = data.draw(
            st.lists(st.sampled_from(sorted(self.model)), min_size=1, max_size=BATCH, unique=True)
        )
        counts = np.zeros(BATCH, np.int32)
        for row, sequence in enumerate(chosen):
            room = MAX_PAGES * PAGE_SIZE - len(self.model[sequence])
            count = min(room, CHUNK - data.draw(st.integers(0, CHUNK)))
            tokens = len(self.model[sequence]) + count
            pages = self.pages[sequence]
            needed = self.allocator.pages_for(tokens) - len(pages)
            before = (list(pages), self.allocator.num_free)
            if needed > self.allocator.num_free:
                with pytest.raises(OutOfPagesError, match=f"{needed} pages are needed"):
                    self.allocator.grow(pages, tokens)
                assert (pages, self.allocator.num_free) == before
            else:
                self.allocator.grow(pages, tokens)
                counts[row] = count
        keys, values = draw(self.rng, BATCH, CHUNK)
        is_padding = np.arange(CHUNK) >= counts[:, None]
        keys[:, is_padding] = values[:, is_padding] = np.nan
        lists = [self.pages[s] for s in chosen] + [[]] * (BATCH - len(chosen))
        lengths = np.zeros(BATCH, np.int32)
        lengths[: len(chosen)] = [len(self.model[s]) for s in chosen]
        cache = self.cache.with_sequences(self.allocator.table(lists, MAX_PAGES), lengths)
        self.cache = append(cache, keys, values, counts)
        np.testing.assert_array_equal(self.cache.lengths, lengths + counts)
        for row, sequence in enumerate(chosen):
            new = [(keys[:, row, t], values[:, row, t]) for t in range(counts[row])]
            self.model[sequence] = self.model[sequence] + new
            for position, token in enumerate(new, lengths[row]):
                place = self.pages[sequence][position // PAGE_SIZE], position % PAGE_SIZE
                for pages, x in zip(self.expected, token, strict=True):
                    pages[:, *place] = x

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def end(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        self.allocator.free(self.pages.pop(sequence))
        del self.model[sequence]

    @invariant()
    def every_token_is_where_the_table_says(self):
        k_pages, v_pages = np.stack(self.cache.k_pages), np.stack(self.cache.v_pages)
        for sequence, tokens in self.model.items():
            for position, (key, value) in enumerate(tokens):
                place = self.pages[sequence][position // PAGE_SIZE], position % PAGE_SIZE
                np.testing.assert_array_equal(k_pages[:, *place], key)
                np.testing.assert_array_equal(v_pages[:, *place], value)

    @invariant()
    def nothing_else_is_written(self):
        for pages, expected in zip(
            (self.cache.k_pages, self.cache.v_pages), self.expected, strict=True
        ):
            np.testing.assert_array_equal(np.stack(pages), expected)

    @invariant()
    def every_page_is_counted(self):
        held = [page for pages in self.pages.values() for page in pages]
        assert [self.allocator.holders(p) for p in range(NUM_PAGES)] == [
            held.count(p) for p in range(NUM_PAGES)
        ]
        assert self.allocator.num_free == NUM_PAGES - len(set(held))

    @invariant()
    def growing_compiles_once(self):
        assert append._cache_size() <= 1


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=25, stateful_step_count=20)


def copies_of(compiled, shape: tuple[int, ...]) -> list[str]:
    """Instructions that make another array of this shape out of one: copies and conversions."""
    dimensions = ",".join(map(str, shape))
    pattern = rf" = \(?\w+\[{dimensions}\]\S*.* (copy|copy-start|convert|transpose)\("
    return [line for line in compiled.as_text().splitlines() if re.search(pattern, line)]


def step(cache, keys, values, query, counts):
    """What a decoder does: each layer appends and attends, and the next depends on the result."""
    seen = jnp.zeros((), cache.k_pages[0].dtype)
    for layer in range(LAYERS):
        cache = cache.append_layer(layer, keys[layer] + seen, values[layer] + seen, counts)
        pages = cache.k_pages[layer], cache.v_pages[layer]
        lengths = cache.lengths + counts
        out = paged_attention(query, *pages, cache.page_table, lengths, q_lengths=counts)
        seen = out.sum().astype(seen.dtype)
    return cache.advance(counts), seen


def check_in_place(dtype) -> None:
    """``step`` under donation: every page array is its own output, and nothing is copied."""
    cache = make_cache(dtype, num_pages=1024, page_size=16)
    keys, values = draw(np.random.default_rng(0), BATCH, CHUNK, dtype)
    query = jnp.ones((BATCH, CHUNK, 2 * HEADS, HEAD_DIM), dtype)
    arguments = (cache, keys, values, query, jnp.ones(BATCH, jnp.int32))
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    all_pages = (*cache.k_pages, *cache.v_pages)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(pages.nbytes for pages in all_pages)
    assert memory.temp_size_in_bytes < cache.v_pages[0].nbytes
    for pages in all_pages:
        assert not copies_of(compiled, pages.shape)

    addresses = [pages.unsafe_buffer_pointer() for pages in all_pages]
    after, _ = compiled(*arguments)
    assert [p.unsafe_buffer_pointer() for p in (*after.k_pages, *after.v_pages)] == addresses
    assert all(pages.is_deleted() for pages in (*cache.k_pages, *cache.v_pages))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_step_updates_in_place(dtype) -> None:
    check_in_place(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_donated_step_updates_in_place_on_a_gpu(dtype) -> None:
    check_in_place(dtype)


def test_without_donation_the_copies_are_found() -> None:
    """The test above can fail."""
    cache = make_cache(num_pages=1024, page_size=16)
    arrays = draw(np.random.default_rng(0), BATCH, CHUNK)
    compiled = jax.jit(lambda cache, *a: cache.append(*a)).lower(cache, *arrays).compile()
    assert not compiled.memory_analysis().alias_size_in_bytes
    for pages in (*cache.k_pages, *cache.v_pages):
        assert copies_of(compiled, pages.shape)


@pytest.mark.parametrize("page_size", [1, 8])
def test_chunks_then_tokens_attend_as_dense(page_size: int) -> None:
    """A prompt in chunks, then single tokens, sequences of different lengths, pages shuffled."""
    rng = np.random.default_rng(page_size)
    totals, num_pages = np.array([13, 0, 9]), 40
    max_pages = -(-int(totals.max()) // page_size)
    table = rng.permutation(num_pages)[: BATCH * max_pages].reshape(BATCH, max_pages)
    cache = make_cache(num_pages=num_pages, page_size=page_size, max_pages=max_pages)
    cache = cache.with_sequences(table, np.zeros(BATCH, np.int32))
    keys, values = draw(rng, BATCH, totals.max())
    query = rng.standard_normal((BATCH, totals.max(), 3 * HEADS, HEAD_DIM)).astype(np.float32)
    want = flash_attention(query, keys[1], values[1], is_causal=True, implementation="reference")

    chunks = [5, 5, *[1] * (int(totals.max()) - 10)]
    start = 0
    for T in chunks:
        now = slice(start, start + T)
        counts = np.clip(totals - start, 0, T).astype(np.int32)
        is_new = np.arange(T) < counts[:, None]
        new = [np.where(is_new[..., None, None], x[:, :, now], np.nan) for x in (keys, values)]
        cache = cache.append(*new, counts, checked=True)
        pages = cache.k_pages[1], cache.v_pages[1]
        out = attend(query[:, now], *pages, cache.page_table, cache.lengths, q_lengths=counts)
        np.testing.assert_allclose(
            out, np.where(is_new[..., None, None], want[:, now], 0), atol=2e-6
        )
        start += T
    np.testing.assert_array_equal(cache.lengths, totals)


def test_tokens_without_a_page() -> None:
    """They are written nowhere, the last page of all least; ``checked`` raises."""
    cache = make_cache().with_sequences([[2, -1], [NUM_PAGES, 0], [3, 1]], [3, 0, 7])
    keys, values = draw(np.random.default_rng(0), BATCH, 2)
    after = cache.append(keys, values)
    written = [np.flatnonzero(np.asarray(p).any(axis=(2, 3))) for p in after.k_pages]
    for layer in range(LAYERS):
        # Sequence 0 has one slot left, sequence 1 no page, sequence 2 its last slot of all.
        np.testing.assert_array_equal(written[layer], [1 * PAGE_SIZE + 3, 2 * PAGE_SIZE + 3])
    with pytest.raises(ValueError, match="a page for every new token"):
        cache.append(keys, values, checked=True)
    with pytest.raises(ValueError, match="token_counts must be from 0 to 2"):
        cache.append(keys, values, [1, 0, 3])
    appended = checkify.checkify(jax.jit(lambda c, n: c.append(keys, values, n, checked=True)))
    error, _ = appended(cache, jnp.ones(BATCH, jnp.int32))
    with pytest.raises(Exception, match="a page for every new token"):
        error.throw()
    error, _ = appended(cache, jnp.array([1, 0, 3]))
    with pytest.raises(Exception, match="token_counts must be from 0 to 2"):
        error.throw()
    error, after = appended(cache, jnp.array([1, 0, 1]))
    error.throw()
    np.testing.assert_array_equal(after.lengths, [4, 0, 8])


def test_bad_arguments_are_named() -> None:
    cache = make_cache()
    keys, values = draw(np.random.default_rng(0), BATCH, 1)
    cases = [
        (lambda: make_cache(page_size=3), "page_size must be a power of two from 1 to 512; got 3"),
        (
            lambda: make_cache(page_size=16.0),
            "page_size must be an integer of at least 1; got 16.0",
        ),
        (lambda: make_cache(layers=0), "layers must be an integer of at least 1; got 0"),
        (lambda: make_cache(layers=1.5), "layers must be an integer of at least 1; got 1.5"),
        (lambda: make_cache("float33"), "dtype must be floating; got 'float33'"),
        (lambda: make_cache(None), "dtype must be floating; got None"),
        (lambda: cache.append_layer(0.5, keys[0], values[0]), "layer must be an integer"),
        (lambda: cache.append_layer(0, None, values[0]), "key must be an array of numbers"),
        (lambda: cache.append(keys, values, "1"), "token_counts must be an array of numbers"),
        (lambda: cache.append(keys[:1], values), "keys must be of 2 layers; got 1"),
        (lambda: cache.append(keys[:, :2], values), r"key must be \(3, 1, 2, 4\) in float32"),
        (lambda: cache.append(keys, values[..., :2]), r"value must be \(3, 1, 2, 3\)"),
        (lambda: cache.append(keys.astype("float16"), values), "got .* in float16"),
        (lambda: cache.append_layer(2, keys[0], values[0]), "layer must be from 0 to 1; got 2"),
        (lambda: cache.append(keys, values, [1, 1]), "token_counts must be integers"),
        (lambda: cache.append(keys, values, [1, 2, 0]), "token_counts must be from 0 to 1; got"),
        (lambda: cache.append_layer(0, keys[0], values[0], -1), "from 0 to 1; got -1"),
        (lambda: cache.advance(1.0), "token_counts must be integers"),
        (lambda: cache.advance([0, -1, 0]), "token_counts must not be negative; got"),
        (lambda: jax.jit(lambda c: c.advance(-1))(cache), "must not be negative; got -1"),
        (lambda: make_cache(jnp.int32), "dtype must be floating; got .*int32"),
        (lambda: cache.with_sequences(np.zeros((2, 3)), [0, 0]), "page_table must be integers"),
        (lambda: cache.with_sequences([[0, 1]], [0, 0]), r"got shapes \(1, 2\) and \(2,\)"),
        (lambda: PageAllocator(0, 4), "num_pages must be an integer of at least 1; got 0"),
        (lambda: PageAllocator("4", 4), "num_pages must be an integer of at least 1; got '4'"),
        (lambda: PageAllocator(4, 48), "page_size must be a power of two"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_pages_change_nothing() -> None:
    allocator = PageAllocator(4, PAGE_SIZE)
    pages = allocator.allocate(3)
    for call, message in [
        (lambda: allocator.free([pages[0], pages[1], pages[0]]), "held 2 times or more"),
        (lambda: allocator.free([pages[0], 3]), "page 3 is held 0 times"),
        (lambda: allocator.free([pages[0], 4]), "pages must be from 0 to 3; got 4"),
        (lambda: allocator.share([pages[0], 3], 8), "page 3 is held 0 times"),
        (lambda: allocator.share(pages, 13), "tokens must be from 0 to 12"),
        (lambda: allocator.allocate(-1), "count must be an integer of at least 0; got -1"),
        (lambda: allocator.allocate(1.0), "count must be an integer of at least 0; got 1.0"),
        (lambda: allocator.free([0.0]), "pages must be an integer of at least 0; got 0.0"),
        (lambda: allocator.pages_for(-3), "tokens must be an integer of at least 0; got -3"),
        (lambda: allocator.grow(pages, -3), "tokens must be an integer of at least 0; got -3"),
        (lambda: allocator.table([pages], 2), "at most 2 pages; got 3"),
        (lambda: allocator.table([[3]], 2), "page 3 is held 0 times"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
        assert [allocator.holders(page) for page in range(4)] == [1, 1, 1, 0]
    with pytest.raises(OutOfPagesError) as raised:
        allocator.allocate(2)
    assert (raised.value.needed, raised.value.free, raised.value.num_pages) == (2, 1, 4)
    assert allocator.allocate(1) == [3]
    allocator.free(np.array([*pages, 3]))
    assert allocator.num_free == 4


def test_export_of_a_cache_with_symbolic_sizes() -> None:
    def run(query, key, table, pages):
        sizes = {"batch": query.shape[0], "max_pages": table.shape[1], "num_pages": pages.shape[0]}
        cache = PagedKVCache.empty(
            layers=1, page_size=4, kv_heads=1, head_dim=8, dtype=jnp.float32, **sizes
        )
        cache = cache.with_sequences(table, jnp.zeros(query.shape[0], jnp.int32))
        cache = cache.append_layer(0, key, key, 3).advance(3)
        pages = cache.k_pages[0], cache.v_pages[0]
        return paged_attention(query, *pages, cache.page_table, cache.lengths, is_causal=True)

    B, P, N = jax.export.symbolic_shape("b, p, n")
    query, key = (jax.random.normal(jax.random.key(h), (2, 3, h, 8)) for h in (2, 1))
    arrays = query, key, jnp.array([[3, 0], [1, 2]]), jnp.zeros(4)
    shapes = (B, 3, 2, 8), (B, 3, 1, 8), (B, P), (N,)
    signature = [jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(shapes, arrays, strict=True)]
    found = jax.export.export(jax.jit(run))(*signature).call(*arrays)
    wanted = flash_attention(query, key, key, is_causal=True)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
