"""Keys and values that grow, in pages: the arrays on the device, and who holds which page.

``PagedKVCache`` is a pytree that ``paged_attention`` reads.  Appending to it is a scatter, which
under donation writes into the buffers that are there.  ``PageAllocator`` lives on the host, apart
from every array: it hands out page numbers, which the caller puts into the cache's table.

Sequences share whole pages only, those that a common prefix fills to the last slot.  Tokens are
only ever appended, so a shared page is never written again and nothing is ever copied; what the
prefix has beyond its last full page, fewer tokens than a page, each sequence computes for itself.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify
from jax.typing import ArrayLike, DTypeLike

from jax_flashcute.given import extent, numbers, whole
from jax_flashcute.promotion import own_sharding


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_pages", "v_pages", "page_table", "lengths"],
    meta_fields=[],
)
@dataclass(frozen=True)
class PagedKVCache:
    """The keys and values of a batch of sequences, in pages, for every layer of a model.

    Token s of sequence b is slot ``s % page_size`` of page ``page_table[b, s // page_size]``, in
    every layer the same.  A pytree whose leaves keep their shapes while sequences grow, so that a
    jitted step compiles once; the layers' pages are arrays of their own, so that a kernel reads
    them where they are.

    In a model's step, each layer appends its own tokens and attends to them, and at the end the
    lengths advance once::

        cache = cache.append_layer(layer, key, value, token_counts)
        out = paged_attention(query, cache.k_pages[layer], cache.v_pages[layer],
                              cache.page_table, cache.lengths + token_counts,
                              q_lengths=token_counts)
        ...
        cache = cache.advance(token_counts)

    Donate the cache to the jitted step (``donate_argnums``): its pages are then updated in place.

    Attributes:
      k_pages: for each layer (num_pages, page_size, K, H).
      v_pages: for each layer (num_pages, page_size, K, Hv).
      page_table: (B, max_pages) int32; entries that no token has reached yet may hold anything.
      lengths: (B,) int32, tokens of each sequence.
    """

    k_pages: tuple[jax.Array, ...]
    v_pages: tuple[jax.Array, ...]
    page_table: jax.Array
    lengths: jax.Array

    @staticmethod
    def empty(
        *,
        layers: int,
        num_pages: int,
        page_size: int,
        batch: int,
        max_pages: int,
        kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        dtype: DTypeLike,
    ) -> "PagedKVCache":
        """A cache without tokens, its tables without pages (-1).

        Args:
          layers: attention layers.
          num_pages: pages of each layer.
          page_size: tokens a page, a power of two from 1 to 512.
          batch: B, sequences.
          max_pages: pages that one sequence can have.
          kv_heads: K.
          head_dim: H.
          value_head_dim: Hv; by default H.
          dtype: floating dtype of the pages.

        Raises:
          ValueError: a size is no positive integer, page_size no power of two from 1 to 512, or
            dtype not floating.
        """
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        layers, batch = whole("layers", layers, 1), extent("batch", batch, 1)
        max_pages, kv_heads = extent("max_pages", max_pages, 1), whole("kv_heads", kv_heads, 1)
        widths = whole("head_dim", head_dim, 1), whole("value_head_dim", value_head_dim, 1)
        shape = (extent("num_pages", num_pages, 1), checked_page_size(page_size), kv_heads)
        dtype = _floating(dtype)

        def pages(width):
            return tuple(jnp.zeros((*shape, width), dtype) for _ in range(layers))

        return PagedKVCache(
            k_pages=pages(widths[0]),
            v_pages=pages(widths[1]),
            page_table=jnp.full((batch, max_pages), -1, jnp.int32),
            lengths=jnp.zeros(batch, jnp.int32),
        )

    @property
    def layers(self) -> int:
        return len(self.k_pages)

    @property
    def num_pages(self) -> int:
        return self.k_pages[0].shape[0]

    @property
    def page_size(self) -> int:
        return self.k_pages[0].shape[1]

    def with_sequences(self, page_table: ArrayLike, lengths: ArrayLike) -> "PagedKVCache":
        """The same pages, seen as other sequences; the batch may be another one too.

        Args:
          page_table: (B, max_pages) integers.
          lengths: (B,) integers.

        Raises:
          ValueError: a shape or dtype does not fit.
        """
        page_table, lengths = numbers("page_table", page_table), numbers("lengths", lengths)
        for name, array in (("page_table", page_table), ("lengths", lengths)):
            if not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"{name} must be integers; got dtype {array.dtype.name}")
        if page_table.ndim != 2 or lengths.shape != page_table.shape[:1]:
            raise ValueError(
                "page_table must be (batch, max_pages) and lengths (batch,); got shapes "
                f"{page_table.shape} and {lengths.shape}"
            )
        return replace(
            self, page_table=page_table.astype(jnp.int32), lengths=lengths.astype(jnp.int32)
        )

    def append(
        self,
        keys: Sequence[ArrayLike] | jax.Array,
        values: Sequence[ArrayLike] | jax.Array,
        token_counts: ArrayLike | None = None,
        *,
        checked: bool = False,
    ) -> "PagedKVCache":
        """Append tokens in every layer, and advance the lengths.

        Args:
          keys: for each layer (B, T, K, H), in the pages' dtype.
          values: for each layer (B, T, K, Hv).
          token_counts: as for ``append_layer``.
          checked: as for ``append_layer``.

        Raises:
          ValueError: as for ``append_layer``, or the number of layers does not fit.
        """
        for name, arrays in (("keys", keys), ("values", values)):
            if len(arrays) != self.layers:
                raise ValueError(f"{name} must be of {self.layers} layers; got {len(arrays)}")
        cache = self
        for layer in range(self.layers):
            cache = cache.append_layer(
                layer, keys[layer], values[layer], token_counts, checked=checked
            )
        return cache.advance(jnp.shape(keys[0])[1] if token_counts is None else token_counts)

    def append_layer(
        self,
        layer: int,
        key: ArrayLike,
        value: ArrayLike,
        token_counts: ArrayLike | None = None,
        *,
        checked: bool = False,
    ) -> "PagedKVCache":
        """Write the next tokens of one layer behind those that the sequences have.

        The lengths stay: ``advance`` moves them when all layers are written.

        Args:
          layer: which one, static.
          key: (B, T, K, H), in the pages' dtype.
          value: (B, T, K, Hv).
          token_counts: (B,) or scalar integers, from 0 to T: of each sequence the first so many
            tokens are appended, the rest is padding, may hold anything and is written nowhere; by
            default T.  Concrete ones are always checked.
          checked: raise where a token finds no page, because the table is full or its entry is
            no page, and where traced token_counts do not fit: at once for concrete arrays, through
            ``jax.experimental.checkify`` for traced ones.  Otherwise such a token is written
            nowhere: allocate its page beforehand.

        Raises:
          ValueError: an argument does not fit; it is named.
        """
        layer = whole("layer", layer, 0)
        if layer >= self.layers:
            raise ValueError(f"layer must be from 0 to {self.layers - 1}; got {layer}")
        key, value = numbers("key", key), numbers("value", value)
        B, pages = self.page_table.shape[0], (self.k_pages[layer], self.v_pages[layer])
        for name, array, into in zip(("key", "value"), (key, value), pages, strict=True):
            expected = (B, key.shape[1] if key.ndim == 4 else "T", *into.shape[2:])
            if array.shape != expected or array.dtype != into.dtype:
                raise ValueError(
                    f"{name} must be {expected} in {into.dtype.name}, as the cache has it; "
                    f"got shape {array.shape} in {array.dtype.name}"
                )
        T = key.shape[1]
        counts = _counts(T if token_counts is None else token_counts, B, T)
        page, slot, is_kept = self._places(T, counts)
        if checked:
            _check_appended(is_kept, counts, T)
        k_pages, v_pages = (
            into.at[page, slot].set(array, mode="drop", out_sharding=own_sharding(into))
            for into, array in zip(pages, (key, value), strict=True)
        )
        return replace(
            self,
            k_pages=(*self.k_pages[:layer], k_pages, *self.k_pages[layer + 1 :]),
            v_pages=(*self.v_pages[:layer], v_pages, *self.v_pages[layer + 1 :]),
        )

    def advance(self, token_counts: ArrayLike) -> "PagedKVCache":
        """Lengths grown by (B,) or scalar integers, once all layers have appended.

        Raises:
          ValueError: token_counts does not fit, or concrete ones are negative.
        """
        return replace(self, lengths=self.lengths + _counts(token_counts, self.lengths.shape[0]))

    def _places(self, T: int, counts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Page and slot of (B, T) tokens, the page out of range for those not to be written."""
        new = jnp.arange(T, dtype=jnp.int32)
        position = self.lengths[:, None] + new
        page = jnp.take_along_axis(
            self.page_table, position // self.page_size, axis=1, mode="fill", fill_value=-1
        )
        is_kept = (new < counts[:, None]) & (page >= 0) & (page < self.num_pages)
        # A negative index would count from the end; one beyond the end is dropped.
        page = jnp.where(is_kept, page, self.num_pages)
        return page, position % self.page_size, is_kept


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free.  Nothing was allocated.

    Attributes:
      needed: pages asked for.
      free: pages that were free.
      num_pages: pages there are.
    """

    def __init__(self, needed: int, free: int, num_pages: int):
        super().__init__(
            f"{needed} pages are needed and {free} of {num_pages} are free: free those of a "
            "sequence, or make the cache with more pages"
        )
        self.needed, self.free, self.num_pages = needed, free, num_pages


class PageAllocator:
    """Hands out page numbers on the host and counts the holders of each page.

    A page is free when nobody holds it.  Every method does all that it is asked or, where it
    raises, nothing.  It knows no arrays: ``table`` makes of the numbers what
    ``PagedKVCache.with_sequences`` takes.
    """

    def __init__(self, num_pages: int, page_size: int):
        """All ``num_pages`` pages of ``page_size`` tokens free.

        Raises:
          ValueError: num_pages is no positive integer, or page_size no power of two from 1 to 512.
        """
        self.num_pages = whole("num_pages", num_pages, 1)
        self.page_size = checked_page_size(page_size)
        self._holders = [0] * self.num_pages
        self._free = list(range(self.num_pages - 1, -1, -1))  # a stack: page 0 comes first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold a page: 0 where it is free.

        Raises:
          ValueError: no such page.
        """
        self._check(page)
        return self._holders[page]

    def pages_for(self, tokens: int) -> int:
        """How many pages hold so many tokens.

        Raises:
          ValueError: tokens is no integer, or negative.
        """
        return -(-whole("tokens", tokens, 0) // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """``count`` free pages, each held once from now on.

        Raises:
          OutOfPagesError: fewer are free.
          ValueError: count is no integer, or negative.
        """
        count = whole("count", count, 0)
        if count > len(self._free):
            raise OutOfPagesError(count, len(self._free), self.num_pages)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def grow(self, pages: list[int], tokens: int) -> None:
        """Extend a sequence's list of pages in place, so that it has room for so many tokens.

        Raises:
          OutOfPagesError: too few are free; the list is as it was.
          ValueError: tokens is negative.
        """
        pages += self.allocate(max(0, self.pages_for(tokens) - len(pages)))

    def share(self, pages: Sequence[int], tokens: int) -> list[int]:
        """The pages that the first ``tokens`` tokens of a sequence fill to the last slot.

        Each is held once more from now on.  A sequence that begins with the same tokens starts
        with these pages, and with ``len(result) * page_size`` tokens.

        Raises:
          ValueError: tokens is negative or more than the pages hold, or a page is not held by
            anyone.
        """
        tokens = whole("tokens", tokens, 0)
        if tokens > len(pages) * self.page_size:
            raise ValueError(
                f"tokens must be from 0 to {len(pages) * self.page_size}, which {len(pages)} "
                f"pages hold; got {tokens}"
            )
        shared = list(pages[: tokens // self.page_size])
        for page in shared:
            self._check_held(page, 1)
        for page in shared:
            self._holders[page] += 1
        return shared

    def free(self, pages: Sequence[int] | np.ndarray) -> None:
        """One holder less for each page, which is free again without any.

        Raises:
          ValueError: a page is held fewer times than it is to be freed.
        """
        pages = [whole("pages", page, 0) for page in pages]
        for page in pages:
            self._check_held(page, pages.count(page))
        # In reverse, so that allocating as many again gives the same order.
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def table(self, sequences: Sequence[Sequence[int]], max_pages: int) -> np.ndarray:
        """Each sequence's pages as a row of a (B, max_pages) int32 table, -1 behind the last.

        Raises:
          ValueError: a sequence has more pages than max_pages, or a page that nobody holds.
        """
        max_pages = whole("max_pages", max_pages, 0)
        table = np.full((len(sequences), max_pages), -1, np.int32)
        for row, pages in zip(table, sequences, strict=True):
            if len(pages) > max_pages:
                raise ValueError(f"sequences must have at most {max_pages} pages; got {len(pages)}")
            for page in pages:
                self._check_held(page, 1)
            row[: len(pages)] = pages
        return table

    def _check(self, page: int) -> None:
        if whole("pages", page, 0) >= self.num_pages:
            raise ValueError(f"pages must be from 0 to {self.num_pages - 1}; got {page}")

    def _check_held(self, page: int, times: int) -> None:
        self._check(page)
        if self._holders[page] < times:
            raise ValueError(
                f"pages must be held {times} times or more; page {page} is held "
                f"{self._holders[page]} times"
            )


def checked_page_size(page_size: int) -> int:
    """Raises ValueError unless it is a power of two from 1 to 512."""
    size = whole("page_size", page_size, 1)
    if size not in [2**i for i in range(10)]:
        raise ValueError(f"page_size must be a power of two from 1 to 512; got {page_size}")
    return size


def _floating(dtype: DTypeLike) -> np.dtype:
    try:
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            return jnp.dtype(dtype)
    except TypeError:
        pass
    raise ValueError(f"dtype must be floating; got {dtype!r}")


def _counts(token_counts: ArrayLike, B: int, T: int | None = None) -> jax.Array:
    """(B,) int32; ValueError where they do not fit, as far as they are concrete."""
    counts = numbers("token_counts", token_counts)
    if counts.shape not in ((), (B,)) or not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(
            f"token_counts must be integers, a scalar or ({B},); got shape {counts.shape} in "
            f"{counts.dtype.name}"
        )
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(token_counts)):
        with jax.ensure_compile_time_eval():  # inside jit too
            is_unfit = bool(jnp.any(_are_unfit(jnp.asarray(token_counts), T)))
        if is_unfit:
            expected = "must not be negative" if T is None else f"must be from 0 to {T}"
            raise ValueError(f"token_counts {expected}; got {token_counts}")
    return jnp.broadcast_to(counts.astype(jnp.int32), B)


def _are_unfit(counts: jax.Array, T: int | None) -> jax.Array:
    return counts < 0 if T is None else (counts < 0) | (counts > T)


def _check_appended(is_kept: jax.Array, counts: jax.Array, T: int) -> None:
    is_homeless = is_kept.sum(axis=1) < counts
    for wrong, message in (
        (jnp.any(_are_unfit(counts, T)), f"token_counts must be from 0 to {T}"),
        (jnp.any(is_homeless), "page_table must hold a page for every new token"),
    ):
        if isinstance(wrong, Tracer):
            checkify.check(~wrong, message)
        elif wrong:
            raise ValueError(f"{message}; got token_counts {counts}")
