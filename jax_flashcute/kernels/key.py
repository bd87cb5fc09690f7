"""The compile key of a kernel."""

from dataclasses import dataclass
from typing import Literal

from jax_flashcute.analysis import Interval
from jax_flashcute.bounds import RowBounds
from jax_flashcute.kernels import nsa
from jax_flashcute.kernels.config.sm90 import BwdConfig, FwdConfig
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100, FwdConfigSm100
from jax_flashcute.kernels.config.workspace import takes_turns
from jax_flashcute.kernels.elements import ElementFunctions

Direction = Literal["fwd", "bwd"]

OPTIONAL_OPERANDS = ("q_offset", "query_seq_lengths", "key_value_seq_lengths")
"""Lengths and offsets, which may be absent, in the order in which kernels take them."""


@dataclass(frozen=True)
class KernelKey:
    """What makes one compiled kernel differ from another.

    Attributes:
      kernel: its name, a key of ``KERNELS``.
      arch: the architecture it is compiled for.
      dtype: name of the dtype of query, key and value.
      head_dim, head_dim_v: of query and key, of value.
      group: query heads that share a key/value head.
      pack_gqa: those heads share a tile of query rows; forward only.
      scale: factor on the scores.
      interval: the keys a query sees, between bounds that rise with its position.
      optional: the optional operands that are present.
      config: tile sizes and the like.
      num_sms: multiprocessors that persistent blocks are spread over; 0 where it does not matter.
      split_kv: a row's keys are divided among blocks; forward only.
      elements: what is done to single scores; None where nothing.
      page_size: keys of a page, where keys and values are paged; forward only.
      batch_invariant: the parts of a row's keys do not follow from the number of batch entries.
      row_bounds: each row's keys stand in arrays; None where they follow from its position.
      has_lists: the tiles that are visited stand in lists.
      union: intervals within ``interval``: a query sees the keys of at least one; none where it
        sees all of ``interval``.
      packed_mask: which of batch, heads and rows a mask in bits varies along, of "bnt"; None
        without one.
    """

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    head_dim_v: int
    group: int
    pack_gqa: bool
    scale: float
    interval: Interval
    optional: tuple[str, ...]
    config: FwdConfig | FwdConfigSm100 | BwdConfig | BwdConfigSm100
    num_sms: int
    split_kv: bool = False
    elements: ElementFunctions | None = None
    page_size: int | None = None
    batch_invariant: bool = False
    row_bounds: RowBounds | None = None
    has_lists: bool = False
    union: tuple[Interval, ...] = ()
    packed_mask: str | None = None

    @property
    def direction(self) -> Direction:
        return "bwd" if isinstance(self.config, (BwdConfig, BwdConfigSm100)) else "fwd"

    @property
    def has_ranks(self) -> bool:
        """Whether blocks take turns at dQ in an order that stands in an array."""
        if isinstance(self.config, (FwdConfig, FwdConfigSm100)) or not takes_turns(self.config):
            return False
        return self.has_lists or self.row_bounds is not None

    @property
    def visits_both_ways(self) -> bool:
        """Whether some blocks visit tiles of queries and others tiles of keys."""
        return isinstance(self.config, BwdConfigSm100) and self.config.passes != ()

    @property
    def gathers_pages(self) -> bool:
        """Whether keys and values in pages are gathered into arrays as the kernel goes."""
        return isinstance(self.config, FwdConfig) and self.config.gathers_pages

    @property
    def joins_parts(self) -> bool:
        """Whether the block that stores the last part of a row's keys adds them up."""
        return isinstance(self.config, FwdConfig) and self.config.joins_parts

    @property
    def tile(self) -> tuple[int, int]:
        """Query rows (of each head) and keys of a tile; for the backward, keys and query rows."""
        if isinstance(self.config, (BwdConfig, BwdConfigSm100)):
            return self.config.tile_n, self.config.tile_m
        slab = self.config.slab_rows
        tokens = slab // self.group if self.pack_gqa else slab
        return tokens * (self.config.tile_m // slab), self.config.tile_n


AnyKey = KernelKey | nsa.NSAKernelKey
"""The key of any kernel."""
