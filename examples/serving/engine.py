"""The device's side of serving: one step of the model on a paged cache, compiled once per bucket.

A step takes the next tokens of several sequences and returns the most probable byte after each.
Its shape is its bucket: one sequence by a chunk of tokens for prompts, or several sequences by one
token for decoding.  Lengths and page tables are arrays, so that nothing compiles while sequences
grow; the cache is donated, so that its pages are written where they are.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from byte_decoder import ByteDecoder
from flax import nnx

from jax_flashcute import PageAllocator, PagedKVCache, paged_attention


@functools.partial(jax.jit, static_argnames=("graph", "implementation"), donate_argnames="cache")
def next_tokens(
    graph, state, cache: PagedKVCache, tokens: jax.Array, token_counts: jax.Array, implementation
) -> tuple[jax.Array, PagedKVCache]:
    """Run (B, T) tokens, as many as `token_counts` says; the (B,) bytes that follow, the cache."""

    def attend(layer, query, key, value):
        nonlocal cache
        cache = cache.append_layer(layer, key, value, token_counts)
        return paged_attention(
            query,
            cache.k_pages[layer],
            cache.v_pages[layer],
            cache.page_table,
            cache.lengths + token_counts,
            q_lengths=token_counts,
            implementation=implementation,
        )

    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    logits = nnx.merge(graph, state)(tokens, positions, attend)
    last = jnp.maximum(token_counts - 1, 0)[:, None, None]
    logits = jnp.take_along_axis(logits, last, axis=1)[:, 0]
    return jnp.argmax(logits, axis=-1), cache.advance(token_counts)


class Engine:
    """A model and its cache; the host says which tokens go where."""

    def __init__(
        self,
        model: ByteDecoder,
        *,
        num_pages: int,
        page_size: int,
        max_tokens: int,
        max_batch: int,
        chunk_sizes: Sequence[int],
        implementation: str | None = None,
    ):
        """`max_tokens` of one sequence, prompt and output; `chunk_sizes` are the prompt buckets."""
        if not chunk_sizes or min(chunk_sizes) < 1:
            raise ValueError(f"chunk_sizes must be one or more of at least 1; got {chunk_sizes}")
        self.graph, self.state = nnx.split(model)
        self.implementation = implementation
        self.programs: dict[tuple[int, int], jax.stages.Compiled] = {}  # by bucket
        self.allocator = PageAllocator(num_pages, page_size)
        self.max_tokens = max_tokens
        self.max_pages = self.allocator.pages_for(max_tokens)
        self.max_batch = max_batch
        self.chunk_sizes = sorted(chunk_sizes)
        self.batch_sizes = sorted({min(2**i, max_batch) for i in range(max_batch.bit_length() + 1)})
        config = model.config
        self.cache = PagedKVCache.empty(
            layers=config.layers,
            num_pages=num_pages,
            page_size=page_size,
            batch=max_batch,
            max_pages=self.max_pages,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=model.logits.dtype,
        )

    def warm_up(self) -> int:
        """Compile every bucket and run each once; the number of buckets."""
        buckets = [(1, chunk) for chunk in self.chunk_sizes]
        buckets += [(batch, 1) for batch in self.batch_sizes if (batch, 1) not in buckets]
        # One after the other: XLA times matrix products on the device, where programs that are
        # compiled side by side get in each other's way.
        for bucket in buckets:
            self.programs[bucket] = self._lower(bucket).compile()
        for batch, length in buckets:
            self._step(np.zeros((batch, length), np.int32), np.zeros(batch, np.int32), [], [])
        return len(buckets)

    def _lower(self, bucket: tuple[int, int]) -> jax.stages.Lowered:
        batch, length = bucket
        counts = np.zeros(batch, np.int32)
        table = self.allocator.table([[]] * batch, self.max_pages)
        cache = self.cache.with_sequences(table, counts)
        tokens = np.zeros((batch, length), np.int32)
        return next_tokens.lower(self.graph, self.state, cache, tokens, counts, self.implementation)

    def prefill(self, tokens: Sequence[int], pages: Sequence[int], length: int) -> int:
        """Run a chunk of one sequence that has `length` tokens in its pages; the byte to follow."""
        bucket = next(size for size in self.chunk_sizes if size >= len(tokens))
        padded = np.zeros((1, bucket), np.int32)
        padded[0, : len(tokens)] = tokens
        return int(self._step(padded, np.array([len(tokens)], np.int32), [pages], [length])[0])

    def decode(
        self, tokens: Sequence[int], pages: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> list[int]:
        """Run one token of each sequence; the bytes to follow."""
        bucket = next(size for size in self.batch_sizes if size >= len(tokens))
        padded = np.zeros((bucket, 1), np.int32)
        padded[: len(tokens), 0] = tokens
        token_counts = (np.arange(bucket) < len(tokens)).astype(np.int32)
        return self._step(padded, token_counts, pages, lengths)[: len(tokens)].tolist()

    def _step(self, tokens, token_counts, pages, lengths) -> np.ndarray:
        """Rows beyond the given pages are padding, which computes nothing that anyone reads."""
        padding = len(tokens) - len(pages)
        table = self.allocator.table([*pages, *[[]] * padding], self.max_pages)
        padded = np.array([*lengths, *[0] * padding], np.int32)
        cache = self.cache.with_sequences(table, padded)
        bucket = tokens.shape
        if bucket not in self.programs:
            self.programs[bucket] = self._lower(bucket).compile()
        following, self.cache = self.programs[bucket](self.state, cache, tokens, token_counts)
        return np.asarray(following)
