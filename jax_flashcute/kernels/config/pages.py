"""How keys in pages are loaded on Hopper, by the size of a page."""

import dataclasses

from jax_flashcute.kernels.config.sm90 import FwdConfig, busy_producer, staggered

SMALLEST_BOX = 8
"""Rows of a page that are worth a TMA copy of their own; smaller pages are copied by threads."""


def loads_pages_by_tma(page_size: int) -> bool:
    return page_size >= SMALLEST_BOX


SMALLEST_SHARED_BOX = 2
"""Rows of a page that several warps load by TMA, 128 bytes of each at a time; docs/lab-notebook.md:
single ones are too many."""


def shares_boxes(page_size: int, head_dim: int, head_dim_v: int) -> bool:
    """Whether several warps of Hopper's forward load pages too small for one to do so by TMA."""
    if loads_pages_by_tma(page_size) or page_size < SMALLEST_SHARED_BOX:
        return False
    return head_dim % 64 == head_dim_v % 64 == 0


def paged_config(config: FwdConfig, page_size: int, head_dim: int, head_dim_v: int) -> FwdConfig:
    """A forward configuration for keys in pages: where warps share boxes they want a third stage.

    So many take their time; where there is no room, there are two stages.
    """
    shares = shares_boxes(page_size, head_dim, head_dim_v)
    if config.warpgroups == 1 and shares and config.kv_stages < 3:
        deeper = dataclasses.replace(config, kv_stages=3)
        return config if deeper.reasons_invalid(head_dim, head_dim_v) else deeper
    return busy_producer(config)


LARGEST_GATHERED_PAGE = 32
"""Keys of a page that is better gathered where many tiles of queries visit it: each tile would take
too many copies; docs/lab-notebook.md."""

LEAST_GATHERED_VISITS = 32
"""Tiles of queries for each key/value head from which gathering pays, by count: blocks must not
come to keys faster than they are gathered."""

MOST_GATHERED_BYTES = 512 * 1024 * 1024
"""Of the arrays that keys and values are gathered into, which a call takes beside its pages."""

UNIT_KEYS = 16
"""Keys of one head that a warp gathers at a time; divides every ``tile_n``."""


def gathered_shapes(
    tile_n: int, batch: int, kv_length: int, kv_heads: int, head_dim: int, head_dim_v: int
) -> list[tuple[int, ...]]:
    """Shapes of what keys and values in pages are gathered into, and of the counts beside them."""
    rows = (batch, kv_length, kv_heads)
    counts = 1 + batch * kv_heads * (1 + -(-kv_length // tile_n))
    return [(*rows, head_dim), (*rows, head_dim_v), (counts,)]


def gathering(config: FwdConfig) -> FwdConfig:
    """A forward configuration that gathers pages of keys and values into arrays."""
    found = dataclasses.replace(staggered(config), gathers_pages=True)
    if config.warpgroups != 2:
        return found
    return dataclasses.replace(found, consumer_registers=224, producer_registers=56)
