"""Integer arithmetic of the kernels, run on the host and compared with brute force.

``@cute.jit`` functions run without a GPU.  What they may not do aborts the process, so the tables
are filled in a child: ``python -m tests.unit.test_intervals FILE``.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import cutlass
import cutlass.cute as cute
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cutlass import Int32
from cutlass.cute.runtime import make_ptr

from jax_flashcute.analysis import Interval, analyse, rising_interval, rising_union
from jax_flashcute.kernels.common.intervals import (
    IntervalMask,
    UnionMask,
    is_full,
    low_bits,
    tiles_before,
    tiles_of,
)
from jax_flashcute.kernels.common.scheduler import L2_BYTES, TileOrder, section_size
from jax_flashcute.kernels.sm90.fragments import column_words

REPOSITORY = Path(__file__).resolve().parents[2]

# left, right; None is open.  Empty and wide windows, and some on one side of the diagonal.
WINDOWS = [
    *((None, None), (None, 0), (None, 7), (0, None), (40, None)),
    *((5, 3), (33, 0), (0, 40), (0, 0), (70, 90)),
    *((None, -1), (-3, None), (-2, 40), (40, -7)),
]
FUNCTIONS = {
    "chunked": lambda q, kv: q // 24 == kv // 24,
    "chunked_causal": lambda q, kv: (q // 24 == kv // 24) & (kv <= q),
    "blocks": lambda q, kv: q // 24 == kv // 40,
    "prefix": lambda q, kv: (kv < 37) | (kv <= q),
    "prefix_window": lambda q, kv: ((kv < 37) | (kv <= q)) & (kv > q - 30),
    "compressed": lambda q, kv: kv <= q // 3,
    "compressed_late": lambda q, kv: kv * 3 + 5 <= q,
    "expanded": lambda q, kv: (kv // 3 <= q) & (kv // 3 >= q - 9),
    "first_keys": lambda q, kv: kv < 37,
    "last_keys": lambda q, kv: kv >= 37,
}


def window(left: int | None, right: int | None):
    return lambda q, kv: (
        (True if left is None else kv >= q - left) & (True if right is None else kv <= q + right)
    )


# Overlapping, one within the other or far apart, as positions go; in an order and in none.
UNIONS = {
    "first_keys_and_window": lambda q, kv: (kv < 37) | ((kv <= q) & (kv > q - 20)),
    "three": lambda q, kv: (kv >= q + 9) | (kv < 5) | ((kv > q - 90) & (kv < q - 35)),
    "chunks_and_more": lambda q, kv: (q // 24 == kv // 24) | (kv < 70) | (kv // 9 == q // 40),
}

MASKS = {str(sides): window(*sides) for sides in WINDOWS} | FUNCTIONS


def analysed(function):
    """The keys that a mask shows."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.make_jaxpr(lambda b, h, q, kv: jnp.asarray(function(q, kv)))(*[index] * 4)
    return analyse(traced.jaxpr).intervals()


def interval(name: str) -> Interval:
    """What the analysis makes of a mask."""
    found = rising_interval(analysed(MASKS[name]))
    assert found is not None
    return found


def union(name: str) -> UnionMask:
    """The same of several intervals."""
    found = rising_union(analysed(UNIONS[name]), 4)
    assert found is not None
    assert len(found) > 1
    return UnionMask(found)


TILES = (32, 48)
FIRSTS = np.arange(-120, 121, 7)
SPANS = (1, 2, 31, 64)
LENGTHS = (0, 1, 31, 32, 33, 97)
OFFSETS = (-50, 0, 33)
UNION_TILES = 5
"""There are never more."""
COUNTS = np.arange(-70, 100)
COLUMNS = (16, 64, 80, 96, 112, 128, 192, 256)
LIMITS = np.arange(-40, 300)
# m_blocks, kv_heads, batch, heads_per_kv, section
ORDERS = [
    *((1, 1, 1, 1, 1), (7, 1, 1, 1, 1), (3, 4, 2, 1, 3), (5, 2, 3, 4, 2), (2, 3, 5, 7, 15)),
    *((4, 5, 2, 3, 10), (9, 8, 1, 8, 3)),
]
# kv_length, bytes per key, kv_heads, batch
SECTIONS = [
    *((1, 512, 8, 2), (1024, 512, 8, 4), (4096, 512, 8, 4), (16384, 512, 8, 1)),
    *((2**20, 1024, 64, 64), (2**24, 1024, 3, 5), (2**30, 1024, 1, 1), (0, 512, 3, 2)),
]


# ---- on the host, in a child -----------------------------------------------------------------


@cute.jit
def fill_low_bits(out: cute.Pointer, first: Int32, count: Int32):
    table = cute.make_tensor(out, cute.make_layout(count))
    for i in range(count):
        table[i] = Int32(low_bits(first + i))


@cute.jit
def fill_column_words(
    out: cute.Pointer, first: Int32, count: Int32, columns: cutlass.Constexpr[int]
):
    words = (columns // 4 + 31) // 32
    table = cute.make_tensor(out, cute.make_layout((count, 8, words), stride=(8 * words, words, 1)))
    for i in range(count):
        for thread in range(8):
            found = column_words(first + i, thread, columns)
            for w in cutlass.range_constexpr(words):
                table[i, thread, w] = Int32(found[w])


@cute.jit
def fill_block_ranges(
    out: cute.Pointer,
    rows: cute.Pointer,
    count: Int32,
    name: cutlass.Constexpr[str],
    tile: cutlass.Constexpr[int],
):
    """``rows``: (first, last, length) of each; ``out``: its four results."""
    given = cute.make_tensor(rows, cute.make_layout((count, 3), stride=(3, 1)))
    table = cute.make_tensor(out, cute.make_layout((count, 4), stride=(4, 1)))
    for i in range(count):
        a, b, c, d = IntervalMask(interval(name)).block_range(
            given[i, 0], given[i, 1], given[i, 2], tile
        )
        table[i, 0] = a
        table[i, 1] = b
        table[i, 2] = c
        table[i, 3] = d


@cute.jit
def fill_query_ranges(
    out: cute.Pointer,
    rows: cute.Pointer,
    count: Int32,
    name: cutlass.Constexpr[str],
    tile: cutlass.Constexpr[int],
):
    """``rows``: (first, last, offset, length) of each; ``out``: its four results."""
    given = cute.make_tensor(rows, cute.make_layout((count, 4), stride=(4, 1)))
    table = cute.make_tensor(out, cute.make_layout((count, 4), stride=(4, 1)))
    for i in range(count):
        a, b, c, d = IntervalMask(interval(name)).query_range(
            given[i, 0], given[i, 1], given[i, 2], given[i, 3], tile
        )
        table[i, 0] = a
        table[i, 1] = b
        table[i, 2] = c
        table[i, 3] = d


@cute.jit
def fill_union_ranges(
    out: cute.Pointer,
    rows: cute.Pointer,
    count: Int32,
    name: cutlass.Constexpr[str],
    by_key: cutlass.Constexpr[bool],
):
    """``rows``: those of ``block_rows``, or by key of ``query_rows``.

    ``out``: how many tiles; then of each number up to ``UNION_TILES``: the tile of that number,
    whether the tile is full and how many come before it.
    """
    width = 4 if cutlass.const_expr(by_key) else 3
    given = cute.make_tensor(rows, cute.make_layout((count, width), stride=(width, 1)))
    table = cute.make_tensor(
        out, cute.make_layout((count, 1 + 3 * UNION_TILES), stride=(1 + 3 * UNION_TILES, 1))
    )
    for i in range(count):
        if cutlass.const_expr(by_key):
            ranges = union(name).query_ranges(
                given[i, 0], given[i, 1], given[i, 2], given[i, 3], TILES[0]
            )
        else:
            ranges = union(name).block_ranges(given[i, 0], given[i, 1], given[i, 2], TILES[0])
        total, nth = tiles_of(ranges)
        table[i, 0] = total
        for t in cutlass.range_constexpr(UNION_TILES):
            table[i, 1 + 3 * t] = nth(Int32(t))
            table[i, 2 + 3 * t] = Int32(is_full(ranges, Int32(t)))
            table[i, 3 + 3 * t] = tiles_before(ranges, Int32(t))


@cute.jit
def fill_order(
    out: cute.Pointer,
    m_blocks: Int32,
    kv_heads: Int32,
    batch: Int32,
    heads_per_kv: cutlass.Constexpr[int],
    section: Int32,
):
    order = TileOrder(m_blocks, kv_heads, batch, heads_per_kv, section)
    table = cute.make_tensor(out, cute.make_layout((order.num_tiles, 4), stride=(4, 1)))
    for i in range(order.num_tiles):
        m_block, head, kv_head, entry = order.coordinates(i)
        table[i, 0] = m_block
        table[i, 1] = head
        table[i, 2] = kv_head
        table[i, 3] = entry


@cute.jit
def fill_section(
    out: cute.Pointer,
    kv_length: Int32,
    kv_bytes: cutlass.Constexpr[int],
    kv_heads: Int32,
    batch: Int32,
):
    table = cute.make_tensor(out, cute.make_layout(1))
    table[0] = section_size(kv_length, kv_bytes, kv_heads, batch)


def block_rows() -> np.ndarray:
    """(first, last, length) of the cases of ``block_range``."""
    cases = itertools.product(FIRSTS, SPANS, LENGTHS)
    return np.array([(f, f + span - 1, length) for f, span, length in cases], np.int32)


def query_rows() -> np.ndarray:
    """(first, last, offset, length) of the cases of ``query_range``; there is no key below 0."""
    firsts = range(0, 200, 9)
    cases = itertools.product(firsts, SPANS, OFFSETS, LENGTHS)
    return np.array([(f, f + span - 1, o, length) for f, span, o, length in cases], np.int32)


def fill_tables(path: str) -> None:
    tables: dict[str, np.ndarray] = {}

    def table(name: str, *shape: int):
        tables[name] = np.full(shape, -(2**31), np.int32)
        return pointer(tables[name])

    def pointer(array: np.ndarray):
        return make_ptr(Int32, array.ctypes.data, cute.AddressSpace.generic, assumed_align=4)

    fill_low_bits(table("low_bits", len(COUNTS)), int(COUNTS[0]), len(COUNTS))
    for columns in COLUMNS:
        words = (columns // 4 + 31) // 32
        out = table(f"column_words {columns}", len(LIMITS), 8, words)
        fill_column_words(out, int(LIMITS[0]), len(LIMITS), columns)
    for name, fill, rows in (
        ("block_range", fill_block_ranges, block_rows()),
        ("query_range", fill_query_ranges, query_rows()),
    ):
        for mask, tile in itertools.product(MASKS, TILES):
            out = table(f"{name} {mask} {tile}", len(rows), 4)
            fill(out, pointer(rows), len(rows), mask, tile)
    for name, (by_key, rows) in itertools.product(UNIONS, enumerate((block_rows(), query_rows()))):
        out = table(f"union {name} {by_key}", len(rows), 1 + 3 * UNION_TILES)
        fill_union_ranges(out, pointer(rows), len(rows), name, bool(by_key))
    for i, (m_blocks, kv_heads, batch, heads_per_kv, section) in enumerate(ORDERS):
        out = table(f"order {i}", m_blocks * kv_heads * batch * heads_per_kv, 4)
        fill_order(out, m_blocks, kv_heads, batch, heads_per_kv, section)
    for i, (kv_length, kv_bytes, kv_heads, batch) in enumerate(SECTIONS):
        fill_section(table(f"section {i}", 1), kv_length, kv_bytes, kv_heads, batch)
    np.savez(path, **tables)


# ---- the comparison --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("tables") / "tables.npz"
    command = [sys.executable, "-m", "tests.unit.test_intervals", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(path) as file:
        return dict(file)


def test_low_bits(tables) -> None:
    expected = [(1 << min(max(int(count), 0), 32)) - 1 for count in COUNTS]
    np.testing.assert_array_equal(tables["low_bits"].view(np.uint32), expected)


@pytest.mark.parametrize("columns", COLUMNS)
def test_column_words(tables, columns: int) -> None:
    words = tables[f"column_words {columns}"].view(np.uint32)
    i = np.arange(columns // 4)
    for thread in range(8):
        column = 8 * (i // 2) + 2 * (thread % 4) + i % 2
        bits = (words[:, thread, i // 32] >> (i % 32)) & 1
        np.testing.assert_array_equal(bits, column[None, :] < LIMITS[:, None])


def sees(mask: str, position, key):
    """Whether a query position sees a key."""
    return np.broadcast_to(MASKS[mask](position, key), np.broadcast(position, key).shape)


def by_tile(seen: np.ndarray, tile: int) -> np.ndarray:
    """(rows, columns) as (rows, tiles, columns in a tile)."""
    return seen.reshape(seen.shape[0], -1, tile)


def as_set(begin: int, end: int, tiles: int) -> set[int]:
    assert end <= tiles, "a tile beyond the array"
    assert begin >= 0
    return set(range(begin, end))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tile", TILES)
def test_block_range(tables, mask: str, tile: int) -> None:
    ranges = tables[f"block_range {mask} {tile}"]
    for (first, last, length), (n_min, n_max, full_min, full_max) in zip(
        block_rows(), ranges, strict=True
    ):
        tiles = -(-length // tile)
        position = np.arange(first, last + 1)[:, None]
        key = np.arange(tiles * tile)[None, :]
        seen = by_tile(sees(mask, position, key) & (key < length), tile)
        case = f"positions {first}..{last} of {length} keys"
        visited = as_set(n_min, n_max, tiles)
        assert visited >= set(np.flatnonzero(seen.any((0, 2)))), case
        full = as_set(max(full_min, n_min), min(full_max, n_max), tiles)
        assert full == set(np.flatnonzero(seen.all((0, 2)))), case
        # A range has no gaps; where each row sees a key, no tile in it is visited in vain.
        if seen.any((1, 2)).all():
            assert visited == set(np.flatnonzero(seen.any((0, 2)))), case
        elif not seen.any():
            assert len(visited) <= 1, case


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tile", TILES)
def test_query_range(tables, mask: str, tile: int) -> None:
    ranges = tables[f"query_range {mask} {tile}"]
    for (first, last, offset, length), (m_min, m_max, full_min, full_max) in zip(
        query_rows(), ranges, strict=True
    ):
        tiles = -(-length // tile)
        row = np.arange(tiles * tile)
        key = np.arange(first, last + 1)[:, None]
        seen = sees(mask, row[None, :] + offset, key)
        some = by_tile(seen & (row < length), tile)
        every = by_tile(seen | (row >= length), tile)
        case = f"keys {first}..{last}, offset {offset}, {length} rows"
        visited = as_set(m_min, m_max, tiles)
        assert visited >= set(np.flatnonzero(some.any((0, 2)))), case
        full = as_set(max(full_min, m_min), min(full_max, m_max), tiles)
        assert full <= set(np.flatnonzero(every.all((0, 2)))), case
        if some.any((1, 2)).all():
            assert visited == set(np.flatnonzero(some.any((0, 2)))), case
            inner = {m for m in np.flatnonzero(every.all((0, 2))) if (m + 1) * tile <= length}
            assert full >= inner, case


def union_case(row: np.ndarray, by_key: bool):
    """Rows and columns, which of the columns there are, and a function of both for a mask."""
    if by_key:
        first, last, offset, length = row
        return first, last, length, lambda sees, own, other: sees(other + offset, own)
    first, last, length = row
    return first, last, length, lambda sees, own, other: sees(own, other)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("name", UNIONS)
def test_ranges_of_several_intervals(tables, name: str, by_key: bool) -> None:
    rows = query_rows() if by_key else block_rows()
    for row, found in zip(rows, tables[f"union {name} {int(by_key)}"], strict=True):
        first, last, length, seen_by = union_case(row, by_key)
        tiles = -(-length // TILES[0])
        own, other = np.arange(first, last + 1)[:, None], np.arange(tiles * TILES[0])[None, :]
        seen = seen_by(UNIONS[name], own, other)
        some = by_tile(seen & (other < length), TILES[0]).any((0, 2))
        total, (nth, full, before) = found[0], found[1:].reshape(-1, 3).T
        visited = list(nth[:total])
        assert visited == sorted(set(visited)), row
        assert set(visited) <= set(range(tiles)), row
        # In vain only where rows see nothing that one of the intervals could hold.
        assert set(visited) >= set(np.flatnonzero(some)), row
        if by_tile(seen & (other < length), TILES[0]).any((1, 2)).all() and last - first < 3:
            assert len(visited) <= some.sum() + 2, row
        every = by_tile(seen | (by_key & (other >= length)), TILES[0]).all((0, 2))
        assert {t for t in visited if full[t]} <= set(np.flatnonzero(every)), row
        assert list(before) == [sum(v < t for v in visited) for t in range(UNION_TILES)], row


@pytest.mark.parametrize("i", range(len(ORDERS)), ids=lambda i: str(ORDERS[i]))
def test_tile_order(tables, i: int) -> None:
    m_blocks, kv_heads, batch, heads_per_kv, section = ORDERS[i]
    order = [tuple(map(int, row)) for row in tables[f"order {i}"]]
    expected = itertools.product(range(m_blocks), range(kv_heads * heads_per_kv), range(batch))
    assert sorted((m, head, b) for m, head, _, b in order) == sorted(expected)
    assert all(head // heads_per_kv == kv_head for _, head, kv_head, _ in order)
    # The key/value heads of a section, over all batch entries, are done before the next begins,
    # and inside of it the longest tiles come first.
    sections = [(b * kv_heads + kv_head) // section for _, _, kv_head, b in order]
    assert sections == sorted(sections)
    for _, group in itertools.groupby(zip(sections, order, strict=True), key=lambda x: x[0]):
        blocks = [m for _, (m, *_) in group]
        assert blocks == sorted(blocks, reverse=True)


@pytest.mark.parametrize("i", range(len(SECTIONS)), ids=lambda i: str(SECTIONS[i]))
def test_section_size(tables, i: int) -> None:
    kv_length, kv_bytes, kv_heads, batch = SECTIONS[i]
    fitting = L2_BYTES // max(kv_length * kv_bytes, 1)
    assert tables[f"section {i}"][0] == min(max(fitting, 2), kv_heads * batch)


if __name__ == "__main__":
    fill_tables(sys.argv[1])
