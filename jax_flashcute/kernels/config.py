"""Tile configurations of the kernels, what makes one valid, and how one is chosen."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

SMEM_BYTES = 227 * 1024
"""Shared memory one block can have on Hopper and Blackwell."""


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


@dataclass(frozen=True)
class FwdConfig:
    """How the forward kernel is tiled.

    Attributes:
      warpgroups: consumer warpgroups; each owns 64 query rows.
      tile_n: keys per tile.
      kv_stages: depth of the K and of the V pipeline.
      rescale_threshold: O and the row sums are rescaled only once the row maximum has grown by
        more than this many powers of two; 0 rescales at every tile.
      takes_turns: warpgroups issue their products in turns, so that the softmax of one runs beside
        the products of another.
      cluster: blocks that visit the same key tiles, for as many heads of a group, and load each
        together; 1 or 2.
      consumer_registers, producer_registers: registers a thread, after reallocation.
      q_stages: query tiles in shared memory.  With two, warpgroups may be in different tiles, and
        the others begin a tile behind the first one.
      gathers_pages: keys and values in pages are gathered into arrays as the kernel goes, from
        which tiles are loaded.
    """

    warpgroups: int
    tile_n: int
    kv_stages: int
    rescale_threshold: float = 8.0
    takes_turns: bool = True
    cluster: int = 1
    consumer_registers: int = 240
    producer_registers: int = 24
    q_stages: int = 1
    gathers_pages: bool = False

    @property
    def tile_m(self) -> int:
        return 64 * self.warpgroups

    @property
    def reallocates_registers(self) -> bool:
        """Whether the producer gives registers to the consumers; two warpgroups have enough."""
        return self.warpgroups > 1

    @property
    def slab_rows(self) -> int:
        """Query rows of one matrix product."""
        return 64

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory in bytes, without barriers, for 16-bit operands."""
        h, hv = round_up(head_dim, 16), round_up(head_dim_v, 16)
        queries = self.q_stages * self.tile_m * h
        return 2 * (queries + self.kv_stages * self.tile_n * (h + hv))

    def reasons_invalid(self, head_dim: int, head_dim_v: int) -> list[str]:
        """Every reason why this configuration cannot be compiled for these head_dims."""
        reasons = []
        if self.warpgroups not in (1, 2, 3):
            reasons.append(f"warpgroups must be 1, 2 or 3, got {self.warpgroups}")
        if self.tile_n % 16 or not 16 <= self.tile_n <= 256:
            reasons.append(f"tile_n must be a multiple of 16 from 16 to 256, got {self.tile_n}")
        if self.kv_stages < 1:
            reasons.append(f"kv_stages must be at least 1, got {self.kv_stages}")
        if self.cluster not in (1, 2):
            reasons.append(f"cluster must be 1 or 2, got {self.cluster}")
        smem = self.smem_bytes(head_dim, head_dim_v) + 1024
        if smem > SMEM_BYTES:
            reasons.append(f"shared memory: {smem} bytes needed, {SMEM_BYTES} available")
        registers = 128 * (self.warpgroups * self.consumer_registers + self.producer_registers)
        if registers > 65536:
            reasons.append(f"registers: {registers} needed, 65536 available")
        # The accumulators of S and O, and P in 16 bits, live in registers together.
        accumulators = (self.tile_n * 3 // 2 + round_up(head_dim_v, 16)) // 2
        if accumulators + 24 > self.consumer_registers:
            reasons.append(
                f"registers a thread: {accumulators} for accumulators alone, "
                f"{self.consumer_registers} available"
            )
        return reasons


def forward_config(head_dim: int, head_dim_v: int) -> FwdConfig:
    """The forward configuration for a pair of head_dims on Hopper.

    Chosen among tile_n 64 to 192, two to four stages, turns or none, on an NVIDIA H200 over
    lengths 1,024 to 16,384; docs/lab-notebook.md has the figures.
    """
    widest = max(head_dim, head_dim_v)
    if widest <= 64:
        return FwdConfig(3, 128, 2, consumer_registers=160, producer_registers=32)
    if widest <= 128:
        return FwdConfig(2, 128, 2, takes_turns=False)
    if head_dim_v <= 128:
        # Two stages of 112 keys beside Q need more shared memory than there is above 240.
        return FwdConfig(2, 112 if head_dim <= 240 else 96, 2)
    if widest <= 192:
        return FwdConfig(2, 96, 2)
    return FwdConfig(2, 64, 2)


def staggered(config: FwdConfig) -> FwdConfig:
    """A forward configuration with two query tiles, where two warpgroups do not take turns.

    Measured for head_dim 128, without lists, pages and scores; docs/lab-notebook.md.
    """
    if config.warpgroups != 2 or config.takes_turns:
        return config
    return dataclasses.replace(config, q_stages=2)


FEW_ROWS_BYTES = 144 * 1024
"""Of keys and values on their way to a multiprocessor, at most, in such calls: with head_dim 128
an H200 reads faster with 128 KB than with 192; docs/lab-notebook.md."""


def few_rows_config(head_dim: int, head_dim_v: int) -> FwdConfig:
    """The forward configuration where a tile of 64 rows holds all queries, split-KV's.

    One warpgroup, and keys on their way to shared memory: such calls wait for memory.
    """
    tile_n = forward_config(head_dim, head_dim_v).tile_n
    stage_bytes = 2 * tile_n * (round_up(head_dim, 16) + round_up(head_dim_v, 16))
    stages = min(6, max(2, FEW_ROWS_BYTES // stage_bytes))
    return FwdConfig(1, tile_n, stages, takes_turns=False)


SMALLEST_BOX = 8
"""Rows of a page that are worth a TMA copy of their own; smaller pages are copied by threads."""


def loads_pages_by_tma(page_size: int) -> bool:
    return page_size >= SMALLEST_BOX


SMALLEST_SHARED_BOX = 4
"""Rows of a page that several warps load by TMA, 128 bytes of each at a time; docs/lab-notebook.md:
with 2 and 1 the copies are too many."""


def shares_boxes(config: FwdConfig, page_size: int, head_dim: int, head_dim_v: int) -> bool:
    """Whether several warps of Hopper's forward load pages too small for one to do so by TMA."""
    if loads_pages_by_tma(page_size) or page_size < SMALLEST_SHARED_BOX:
        return False
    # Where there are few queries, memory is waited for and not the copies' instructions.
    return config.warpgroups > 1 and head_dim % 64 == head_dim_v % 64 == 0


def paged_config(config: FwdConfig, page_size: int, head_dim: int, head_dim_v: int) -> FwdConfig:
    """A forward configuration for keys in pages: threads that copy them want a third stage.

    They wait for one tile while the next is on its way; where there is no room, they do not.
    """
    if config.warpgroups == 1 and not loads_pages_by_tma(page_size) and config.kv_stages < 3:
        deeper = dataclasses.replace(config, kv_stages=3)
        return config if deeper.reasons_invalid(head_dim, head_dim_v) else deeper
    return busy_producer(config)


LARGEST_GATHERED_PAGE = 16
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


def busy_producer(config: FwdConfig) -> FwdConfig:
    """A forward configuration whose producer warpgroup does more than TMA copies of whole tiles."""
    if config.warpgroups != 2:
        return config
    # Of the 168 registers a thread that a block of 384 threads is launched with.
    return dataclasses.replace(config, consumer_registers=232, producer_registers=40)


def dividing(
    config: FwdConfig, tile_m: int, tile_n: int, head_dim: int, head_dim_v: int
) -> FwdConfig | None:
    """The configuration nearest to ``config`` whose tiles divide these; None where none does."""
    for warpgroups in range(config.warpgroups, 0, -1):
        for columns in range(config.tile_n, 0, -16):
            if tile_m % (64 * warpgroups) or tile_n % columns:
                continue
            found = dataclasses.replace(config, tile_n=columns)
            if warpgroups != config.warpgroups:
                found = FwdConfig(
                    warpgroups, columns, config.kv_stages, takes_turns=warpgroups == 2
                )
            if not found.reasons_invalid(head_dim, head_dim_v):
                return found
    return None


ROWS_SM100 = 128
"""Query rows of one matrix product on Blackwell."""

MIN_SPLIT_TILES = 4
"""A row's keys are divided into one part for each so many key tiles, at most."""
MAX_SPLITS = 128
VARYING_SPLIT_TILES = 16
"""Key tiles of a part of the longest sequence, where lengths vary and are not known: a block that
draws its last part late keeps the others waiting for no longer than these take."""


def most_splits(tiles: int, key_tiles: int, num_sms: int, lengths_vary: bool) -> int:
    """Parts into which a row's keys are divided at most; 1 where splitting does not pay.

    Args:
      tiles: tiles there are without splits: batch entries times heads.
      key_tiles: of the longest row that the arrays can hold.
      num_sms: multiprocessors that share the work.
      lengths_vary: batch entries have lengths of their own, known on the device alone.
    """
    limit = max(1, min(key_tiles // MIN_SPLIT_TILES, MAX_SPLITS))

    def efficiency(splits: int) -> float:
        blocks = tiles * splits
        return blocks / (-(-blocks // num_sms) * num_sms)

    best = max(efficiency(splits) for splits in range(1, limit + 1))
    splits = next(s for s in range(1, limit + 1) if efficiency(s) >= 0.95 * best)
    if lengths_vary:
        splits = max(splits, min(limit, key_tiles // VARYING_SPLIT_TILES))
    return splits


def batch_invariant_splits(key_tiles: int) -> int:
    """``most_splits`` by the keys of a row alone: parts of ``MIN_SPLIT_TILES`` where they fit."""
    return max(1, min(-(-key_tiles // MIN_SPLIT_TILES), MAX_SPLITS))


@dataclass(frozen=True)
class FwdConfigSm100:
    """How the forward kernel on Blackwell is tiled.

    Attributes:
      query_tiles: tiles of 128 query rows that a block has in flight, each with a softmax
        warpgroup of its own.
      tile_n: keys per tile.
      kv_stages: depth of the K and of the V pipeline.
      rescale_threshold: as in ``FwdConfig``.
      polynomial_every: of a tile in which no key is hidden, one of so many pairs of exponentials
        is computed by a polynomial on the FMA pipes; 0 for none.
      softmax_registers, correction_registers, other_registers: registers a thread, after
        reallocation.
    """

    query_tiles: int
    tile_n: int
    kv_stages: int
    rescale_threshold: float = 8.0
    polynomial_every: int = 0
    softmax_registers: int = 176
    correction_registers: int = 80
    other_registers: int = 80

    @property
    def tile_m(self) -> int:
        return 128 * self.query_tiles

    @property
    def threads(self) -> int:
        """Of the softmax warpgroups, the correction and the warps that load and issue."""
        return 128 * (self.query_tiles + 2)

    @property
    def slab_rows(self) -> int:
        """Query rows of one matrix product."""
        return 128

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory in bytes, without barriers, for 16-bit operands."""
        h, hv = round_up(head_dim, 16), round_up(head_dim_v, 16)
        return 2 * (self.tile_m * h + self.kv_stages * self.tile_n * (h + hv))

    def reasons_invalid(self, head_dim: int, head_dim_v: int) -> list[str]:
        """Every reason why this configuration cannot be compiled for these head_dims."""
        reasons = []
        if self.query_tiles not in (1, 2):
            reasons.append(f"query_tiles must be 1 or 2, got {self.query_tiles}")
        if self.tile_n % 32 or not 32 <= self.tile_n <= 128:
            reasons.append(f"tile_n must be a multiple of 32 from 32 to 128, got {self.tile_n}")
        if self.kv_stages < 1:
            reasons.append(f"kv_stages must be at least 1, got {self.kv_stages}")
        smem = self.smem_bytes(head_dim, head_dim_v) + 2048
        if smem > SMEM_BYTES:
            reasons.append(f"shared memory: {smem} bytes needed, {SMEM_BYTES} available")
        columns = self.query_tiles * (self.tile_n + round_up(head_dim_v, 16))
        if columns > 512:
            reasons.append(f"tensor memory: {columns} columns needed, 512 available")
        registers = 128 * (
            self.query_tiles * self.softmax_registers
            + self.correction_registers
            + self.other_registers
        )
        if registers > 65536:
            reasons.append(f"registers: {registers} needed, 65536 available")
        return reasons


def forward_config_sm100(head_dim: int, head_dim_v: int) -> FwdConfigSm100:
    """The forward configuration for a pair of head_dims on Blackwell.

    The largest tiles that fit, and as many stages as fit with them; not measured on any GPU.
    Exponentials are left to the FMA pipes where the special-function unit, of 16 a cycle, would
    take longer than the products: by count, not by measurement (docs/blackwell.md).
    """
    if max(head_dim, head_dim_v) <= 64:
        return FwdConfigSm100(2, 128, 4, polynomial_every=4)
    if max(head_dim, head_dim_v) <= 128:
        return FwdConfigSm100(2, 128, 2, polynomial_every=8)
    tile_n = 96 if max(head_dim, head_dim_v) <= 192 else 64
    return FwdConfigSm100(
        1, tile_n, 2, softmax_registers=224, correction_registers=96, other_registers=96
    )


def few_rows_config_sm100(head_dim: int, head_dim_v: int) -> FwdConfigSm100:
    """The forward configuration on Blackwell where one query tile holds all queries, split-KV's.

    As on Hopper: one query tile, and as many keys on their way to shared memory as fit.
    """
    config = FwdConfigSm100(
        1,
        forward_config_sm100(head_dim, head_dim_v).tile_n,
        6,
        softmax_registers=224,
        correction_registers=120,
        other_registers=152,
    )
    while config.reasons_invalid(head_dim, head_dim_v):
        config = dataclasses.replace(config, kv_stages=config.kv_stages - 1)
    return config


def dividing_sm100(
    config: FwdConfigSm100, tile_m: int, tile_n: int, head_dim: int, head_dim_v: int
) -> FwdConfigSm100 | None:
    """The configuration nearest to ``config`` whose tiles divide these; None where none does."""
    if tile_m % ROWS_SM100:
        return None
    if tile_m % config.tile_m:
        # One query tile: registers as for the head_dims that have no room for two.
        config = dataclasses.replace(
            config,
            query_tiles=1,
            softmax_registers=224,
            correction_registers=96,
            other_registers=96,
        )
    for columns in range(config.tile_n, 0, -32):
        found = dataclasses.replace(config, tile_n=columns)
        if tile_n % columns == 0 and not found.reasons_invalid(head_dim, head_dim_v):
            return found
    return None


@dataclass(frozen=True)
class DqConfig:
    """How the backward's pass for dQ is tiled, on Hopper.

    A block owns 64 query rows a warpgroup and goes over the key tiles that they see.

    Attributes:
      warpgroups: consumer warpgroups.
      tile_n: keys per tile.
      k_stages, v_stages: depth of the pipelines of K and of V.
      consumer_registers, producer_registers: registers a thread, after reallocation.
    """

    warpgroups: int = 2
    tile_n: int = 64
    k_stages: int = 2
    v_stages: int = 1
    consumer_registers: int = 240
    producer_registers: int = 24

    @property
    def tile_m(self) -> int:
        return 64 * self.warpgroups

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory in bytes, without barriers, for 16-bit operands."""
        h, hv = round_up(head_dim, 16), round_up(head_dim_v, 16)
        keys = self.tile_n * (self.k_stages * h + self.v_stages * hv)
        return 2 * (self.tile_m * (h + hv) + keys)

    def reasons_invalid(self, head_dim: int, head_dim_v: int) -> list[str]:
        """Every reason why this configuration cannot be compiled for these head_dims."""
        reasons = []
        if self.warpgroups not in (1, 2):
            reasons.append(f"warpgroups of dQ must be 1 or 2, got {self.warpgroups}")
        if self.tile_n % 16 or not 16 <= self.tile_n <= 256:
            reasons.append(f"tile_n of dQ must be a multiple of 16 up to 256, got {self.tile_n}")
        if self.k_stages < 2 or self.v_stages < 1:
            reasons.append(
                "dQ needs k_stages of at least 2 and v_stages of at least 1, "
                f"got {self.k_stages} and {self.v_stages}"
            )
        smem = self.smem_bytes(head_dim, head_dim_v) + 1024
        if smem > SMEM_BYTES:
            reasons.append(f"shared memory for dQ: {smem} bytes needed, {SMEM_BYTES} available")
        # dQ, S and dP in float32 and dS in 16 bits.
        accumulators = round_up(head_dim, 16) // 2 + self.tile_n + self.tile_n // 4
        if accumulators + 24 > self.consumer_registers:
            reasons.append(
                f"registers a thread for dQ: {accumulators} for accumulators alone, "
                f"{self.consumer_registers} available"
            )
        return reasons


@dataclass(frozen=True)
class BwdConfig:
    """How the backward kernel is tiled.

    A block owns ``tile_n`` keys and goes over the query tiles that see them.

    Attributes:
      warpgroups: consumer warpgroups; each owns 64 keys.
      tile_m: query rows per tile.
      q_stages, do_stages: depth of the pipelines of Q and of dO.
      ds_stages: buffers of dS in shared memory; with one, the warpgroups meet once more a tile.
      dq_split: how the warpgroups share dQ = dS K of a tile: "columns" of K, equal parts; "none",
        the first one alone; "chunks" of 64 columns, in turns; or "apart", by ``dq_pass``.
      by_role: two warpgroups share 64 keys, for head_dims whose dK and dV do not fit in the
        registers of one: the first holds P and dV, the second dP, dS and dK.
      dq_pass: a kernel of its own for dQ, which computes the scores once more: seven products in
        place of five, and nothing is added up in global memory.
      deterministic: blocks add to dQ in a fixed order, each waiting for those before it.
      resident_bytes: where not 0, blocks that run together work on so many bytes of Q, dO and dQ:
        one of more heads is several, which carry dK and dV on through global memory.
      consumer_registers, producer_registers: registers a thread, after reallocation.
    """

    warpgroups: int
    tile_m: int
    q_stages: int = 2
    do_stages: int = 2
    ds_stages: int = 2
    dq_split: str = "none"
    by_role: bool = False
    dq_pass: DqConfig | None = None
    deterministic: bool = False
    resident_bytes: int = 0
    consumer_registers: int = 240
    producer_registers: int = 24

    @property
    def tile_n(self) -> int:
        return 64 if self.by_role else 64 * self.warpgroups

    @property
    def reallocates_registers(self) -> bool:
        """Whether the producer gives registers to the consumers; two warpgroups have enough."""
        return self.warpgroups > 1

    def padded_head_dim(self, head_dim: int) -> int:
        """Columns of Q, K and dQ in shared memory and registers."""
        return round_up(head_dim, 64 if self.dq_split == "chunks" and head_dim > 64 else 16)

    def dq_parts(self, head_dim: int) -> int:
        """Parts of a tile's dQ, each computed by one warpgroup."""
        if self.dq_split == "chunks":
            return -(-head_dim // 64)
        if self.dq_split == "apart":
            return 0
        return 1 if self.dq_split == "none" else self.warpgroups

    def dq_warps(self, head_dim: int) -> int:
        """Warps that add parts of dQ to the sum in global memory, each at its own pace."""
        return min(self.dq_parts(head_dim), 2) if self.by_role else 1

    def dq_part_shape(self, head_dim: int) -> tuple[int, int]:
        """Rows and columns of a part of dQ."""
        h = self.padded_head_dim(head_dim)
        return 64, {"columns": h // self.warpgroups, "chunks": min(h, 64)}.get(self.dq_split, h)

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory in bytes, without barriers, for 16-bit operands."""
        h, hv = self.padded_head_dim(head_dim), round_up(head_dim_v, 16)
        keys = 2 * self.tile_n * (h + hv)
        queries = self.tile_m * (self.q_stages * (2 * h + 4) + self.do_stages * (2 * hv + 4))
        ds = 2 * self.ds_stages * self.tile_m * self.tile_n
        return keys + queries + ds + 4 * (self.p_values + self.dq_values(head_dim))

    @property
    def p_values(self) -> int:
        """Float32 probabilities in shared memory, on their way between warpgroups."""
        return self.tile_m * self.tile_n if self.by_role else 0

    def dq_values(self, head_dim: int) -> int:
        """Float32 values of dQ in shared memory, on their way to global memory."""
        rows, columns = self.dq_part_shape(head_dim)
        return rows * columns * min(self.dq_parts(head_dim), self.warpgroups)

    def reasons_invalid(self, head_dim: int, head_dim_v: int) -> list[str]:
        """Every reason why this configuration cannot be compiled for these head_dims."""
        reasons = []
        h, hv = self.padded_head_dim(head_dim), round_up(head_dim_v, 16)
        if self.warpgroups not in (1, 2, 3):
            reasons.append(f"warpgroups must be 1, 2 or 3, got {self.warpgroups}")
        if self.tile_m != 64:
            reasons.append(f"tile_m must be 64, got {self.tile_m}")
        splits = ("columns", "none", "chunks", "apart")
        if self.dq_split not in splits:
            reasons.append(f"dq_split must be one of {splits}, got {self.dq_split!r}")
        if self.by_role != (self.dq_split in ("chunks", "apart")):
            reasons.append(f"by_role={self.by_role} does not go with dq_split={self.dq_split!r}")
        ds_stages = 0 if self.dq_split == "apart" else 1
        if self.by_role and (self.warpgroups, self.ds_stages) != (2, ds_stages):
            reasons.append(
                f"by_role needs warpgroups=2 and ds_stages={ds_stages}, "
                f"got {self.warpgroups} and {self.ds_stages}"
            )
        if (self.dq_split == "apart") != (self.dq_pass is not None):
            reasons.append(f"dq_split={self.dq_split!r} does not go with dq_pass={self.dq_pass}")
        if self.dq_pass is not None:
            reasons += self.dq_pass.reasons_invalid(head_dim, head_dim_v)
        if self.resident_bytes and (self.by_role or self.deterministic):
            reasons.append("resident_bytes goes with neither by_role nor deterministic")
        if self.dq_split == "columns" and h % (64 * self.warpgroups):
            reasons.append(f"dq_split=columns needs head_dim to divide into 64s, got {head_dim}")
        if max(h, hv) > 256:
            reasons.append(f"head_dims must be at most 256, got {head_dim} and {head_dim_v}")
        smem = self.smem_bytes(head_dim, head_dim_v) + 1024
        if smem > SMEM_BYTES:
            reasons.append(f"shared memory: {smem} bytes needed, {SMEM_BYTES} available")
        registers = 128 * (self.warpgroups * self.consumer_registers + self.producer_registers)
        if registers > 65536:
            reasons.append(f"registers: {registers} needed, 65536 available")
        dq = 0 if self.dq_pass else self.dq_part_shape(head_dim)[1] // 2
        if self.by_role:
            # dK or dV, the next S, dQ and the 16-bit P or dS live in registers together.
            accumulators = max(h, hv) // 2 + self.tile_m // 2 + self.tile_m // 4 + dq
        else:
            # dK and dV, then S and dP (and the 16-bit P), or dQ and the 16-bit P and dS.
            accumulators = (h + hv) // 2 + max(self.tile_m, self.tile_m // 2 + dq)
        if accumulators + 24 > self.consumer_registers:
            reasons.append(
                f"registers a thread: {accumulators} for accumulators alone, "
                f"{self.consumer_registers} available"
            )
        return reasons


def backward_config(
    head_dim: int, head_dim_v: int, deterministic: bool = False, *, may_part: bool = False
) -> BwdConfig:
    """The backward configuration for a pair of head_dims on Hopper.

    ``may_part``: a pass of its own for dQ can serve the call; its gradients do not depend on the
    order of blocks.

    Chosen on an NVIDIA H200 over lengths 4,096 and 16,384, full and causal.  Up to 64, three
    warpgroups and tiles of 64 rows took as long as two and 128 rows, or up to 2% less; two and 64
    rows took 15% more.  With a pass for dQ the backward took 0.67 to 0.74 of its time without at
    256, and 0.82 (192/128) to 0.88 (192/192) at 192.
    """
    # Below 192 dQ is narrower and the pass is not measured; it computes S and dP once more.
    if may_part and head_dim >= 192:
        return BwdConfig(2, 64, ds_stages=0, dq_split="apart", by_role=True, dq_pass=DqConfig())
    if max(head_dim, head_dim_v) > 128:
        config = BwdConfig(2, 64, ds_stages=1, dq_split="chunks", by_role=True)
        if config.reasons_invalid(head_dim, head_dim_v):
            config = dataclasses.replace(config, do_stages=1)
    elif max(head_dim, head_dim_v) <= 64:
        config = BwdConfig(3, 64, dq_split="none", consumer_registers=160, producer_registers=32)
    elif round_up(head_dim, 16) == 128:
        config = BwdConfig(2, 64, dq_split="columns")
    else:
        config = BwdConfig(2, 64, dq_split="none")
    return dataclasses.replace(config, deterministic=deterministic)


LAUNCH_REGISTERS = 168
"""A thread's, of a block of 384, before reallocation."""


@dataclass(frozen=True)
class PassConfigSm100:
    """How one of the backward's passes on Blackwell is tiled: each computes one gradient.

    A block owns 128 rows of it, and goes over tiles of 128 rows of the other side, half by half.

    Attributes:
      target: what the gradient is of: "value", "key" or "query".
      first_stages, second_stages: depth of the pipelines, in halves of a tile, of Q and of dO; of
        K and of V where ``target`` is "query".
      gradient_registers, other_registers: registers a thread, after reallocation, of the
        warpgroups that compute P and dS and of the warps that load and issue.
    """

    target: Literal["value", "key", "query"]
    first_stages: int
    second_stages: int
    gradient_registers: int = 176
    other_registers: int = 152

    tile_m: ClassVar[int] = 128
    tile_n: ClassVar[int] = 128
    half: ClassVar[int] = 64
    threads: ClassVar[int] = 384

    def gradient_width(self, head_dim: int, head_dim_v: int) -> int:
        """Columns of the gradient in tensor memory."""
        return round_up(head_dim_v if self.target == "value" else head_dim, 16)

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory in bytes, without barriers, for 16-bit operands."""
        h, hv = round_up(head_dim, 16), round_up(head_dim_v, 16)
        own = 2 * self.tile_n * (h if self.target == "value" else h + hv)
        streams = self.first_stages * (2 * h + 4) + self.second_stages * (2 * hv + 4)
        return own + self.half * streams

    def columns(self, head_dim: int, head_dim_v: int) -> int:
        """Columns of tensor memory: S and dP, then the gradient."""
        return 256 + self.gradient_width(head_dim, head_dim_v)

    def reasons_invalid(self, head_dim: int, head_dim_v: int) -> list[str]:
        """Every reason why this pass cannot be compiled for these head_dims."""
        reasons = []
        # The gradient leaves by two stages of the pipeline that its product reads.
        least = (1, 2) if self.target == "value" else (2, 1)
        if self.first_stages < least[0] or self.second_stages < least[1]:
            reasons.append(
                f"the pass for the gradient of {self.target} needs {least[0]} and {least[1]} "
                f"stages at least, got {self.first_stages} and {self.second_stages}"
            )
        smem = self.smem_bytes(head_dim, head_dim_v) + 1024
        if smem > SMEM_BYTES:
            reasons.append(f"shared memory: {smem} bytes needed, {SMEM_BYTES} available")
        columns = self.columns(head_dim, head_dim_v)
        if columns > 512:
            reasons.append(f"tensor memory: {columns} columns needed, 512 available")
        registers = 128 * (2 * self.gradient_registers + self.other_registers)
        available = self.threads * LAUNCH_REGISTERS
        if registers > available:
            reasons.append(f"registers: {registers} needed, {available} available")
        return reasons


@dataclass(frozen=True)
class BwdConfigSm100:
    """How the backward kernel on Blackwell is tiled: 128 keys a block, tiles of 128 queries.

    Attributes:
      q_stages, do_stages: depth of the pipelines of Q and of dO.
      in_turn: S, dP and dQ of a tile follow each other in one place in tensor memory, for
        head_dims whose dK and dV leave no room for more.
      passes: a kernel for each gradient, for head_dims whose dK and dV leave no room for anything
        else: eight products in place of five, and nothing is added up in global memory.
      deterministic: blocks add to dQ in a fixed order, each waiting for those before it.
      cta_group: blocks that share their products, 1 or 2; each then holds half of every operand B.
      gradient_registers, reduce_registers, other_registers: registers a thread, after
        reallocation, of the warpgroups that compute P and dS, of the warps that add dQ, of those
        that load and issue.
    """

    q_stages: int
    do_stages: int
    in_turn: bool = False
    passes: tuple[PassConfigSm100, ...] = ()
    deterministic: bool = False
    cta_group: int = 1
    gradient_registers: int = 160
    reduce_registers: int = 80
    other_registers: int = 112

    tile_m: ClassVar[int] = 128
    threads: ClassVar[int] = 512

    @property
    def tile_n(self) -> int:
        """Keys of a group of blocks."""
        return 128 * self.cta_group

    def padded_head_dim(self, head_dim: int) -> int:
        """Columns of Q, K and dQ in shared and tensor memory."""
        return round_up(head_dim, 16)

    def dq_warps(self, head_dim: int) -> int:
        """Warps that add dQ to the sum in global memory, each at its own pace."""
        return 4 * self.cta_group

    def dq_columns(self, head_dim: int) -> int:
        """Columns of dQ in tensor memory: a block of a pair has the rows of half a tile."""
        return self.padded_head_dim(head_dim) // self.cta_group

    def shares_dq(self, head_dim: int, head_dim_v: int) -> bool:
        """Whether dQ takes the columns of dP in tensor memory."""
        h, hv = self.padded_head_dim(head_dim), round_up(head_dim_v, 16)
        return self.in_turn or 2 * 128 + hv + h + self.dq_columns(head_dim) > 512

    def columns(self, head_dim: int, head_dim_v: int) -> int:
        """Columns of tensor memory: S, dP, P and dQ, then dV and dK."""
        if self.passes:
            return max(each.columns(head_dim, head_dim_v) for each in self.passes)
        h, hv = self.padded_head_dim(head_dim), round_up(head_dim_v, 16)
        if self.in_turn:
            return 192 + hv + h
        dq = 0 if self.shares_dq(head_dim, head_dim_v) else self.dq_columns(head_dim)
        return 256 + hv + h + dq

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory in bytes, without barriers, for 16-bit operands."""
        if self.passes:
            return max(each.smem_bytes(head_dim, head_dim_v) for each in self.passes)
        h, hv = self.padded_head_dim(head_dim), round_up(head_dim_v, 16)
        queries = self.q_stages * (2 * h + 4) + self.do_stages * (2 * hv + 4)
        # A block of a pair has half the columns of the other's K as well, and of its own again.
        again = 2 * h if self.cta_group == 2 else 0
        # K and V, Q and dO, dS, and two chunks of 32 float32 columns of dQ.
        return 128 * (2 * (h + hv) + again + queries + 2 * 128 + 2 * 4 * 32)

    def reasons_invalid(self, head_dim: int, head_dim_v: int) -> list[str]:
        """Every reason why this configuration cannot be compiled for these head_dims."""
        if self.passes:
            found = [each.reasons_invalid(head_dim, head_dim_v) for each in self.passes]
            return [reason for reasons in found for reason in reasons]
        reasons = []
        h = self.padded_head_dim(head_dim)
        if self.cta_group not in (1, 2):
            reasons.append(f"cta_group must be 1 or 2, got {self.cta_group}")
        if self.cta_group == 2 and (self.in_turn or h % 32 or round_up(head_dim_v, 16) % 32):
            reasons.append(
                "cta_group=2 needs in_turn=False and head_dims that pad to multiples of 32, "
                f"got in_turn={self.in_turn}, {head_dim} and {head_dim_v}"
            )
        if self.q_stages < (1 if self.in_turn or self.cta_group == 2 else 2) or self.do_stages < 1:
            reasons.append(
                "q_stages must be at least 2, or 1 in turn or with cta_group=2, and do_stages at "
                f"least 1, got {self.q_stages} and {self.do_stages}"
            )
        if not self.in_turn and max(head_dim, head_dim_v) > 128:
            reasons.append(
                f"head_dims above 128 need in_turn=True, got {head_dim} and {head_dim_v}"
            )
        if h > 192:
            reasons.append(
                f"tensor memory: dQ has 192 columns on Blackwell, head_dim is {head_dim}"
            )
        columns = self.columns(head_dim, head_dim_v)
        if columns > 512:
            reasons.append(f"tensor memory: {columns} columns needed, 512 available")
        smem = self.smem_bytes(head_dim, head_dim_v) + 1024
        if smem > SMEM_BYTES:
            reasons.append(f"shared memory: {smem} bytes needed, {SMEM_BYTES} available")
        registers = 128 * (
            2 * self.gradient_registers + self.reduce_registers + self.other_registers
        )
        if registers > 65536:
            reasons.append(f"registers: {registers} needed, 65536 available")
        return reasons


MOST_PASS_STAGES = 4


def pass_config_sm100(
    target: Literal["value", "key", "query"], head_dim: int, head_dim_v: int
) -> PassConfigSm100:
    """As many stages as fit, those first whose operand the gradient's product reads."""
    config = PassConfigSm100(target, *((1, 2) if target == "value" else (2, 1)))
    while True:
        stages = {"first_stages": config.first_stages, "second_stages": config.second_stages}
        by_need = sorted(stages, reverse=target == "value")
        name = min(by_need, key=lambda each: stages[each])
        longer = dataclasses.replace(config, **{name: stages[name] + 1})
        if stages[name] == MOST_PASS_STAGES or longer.reasons_invalid(head_dim, head_dim_v):
            return config
        config = longer


def backward_config_sm100(
    head_dim: int, head_dim_v: int, deterministic: bool = False, *, may_pair: bool = True
) -> BwdConfigSm100:
    """The backward configuration for a pair of head_dims on Blackwell.

    As many stages as fit; not measured on any GPU.  Blocks work in pairs, which read 3/4 of the
    bytes of shared memory (docs/blackwell.md), where they can and ``may_pair``.
    """
    if max(head_dim, head_dim_v) > 128:
        # The product warp keeps the addresses of all operands, which have one stage, in registers.
        config = BwdConfigSm100(1, 1, in_turn=True, deterministic=deterministic)
        config = dataclasses.replace(
            config, gradient_registers=144, reduce_registers=72, other_registers=152
        )
        if not config.reasons_invalid(head_dim, head_dim_v):
            return config
        targets: tuple[Literal["value", "key", "query"], ...] = ("value", "key", "query")
        passes = tuple(pass_config_sm100(each, head_dim, head_dim_v) for each in targets)
        # Their sums have one order.
        return BwdConfigSm100(0, 0, passes=passes)
    config = BwdConfigSm100(2, 2, deterministic=deterministic)
    # Rings of one stage suffice pairs: S gives Q back before dK takes it from a ring of its own.
    pair = dataclasses.replace(
        config, cta_group=2, gradient_registers=152, reduce_registers=88, other_registers=120
    )
    pairs = (pair, dataclasses.replace(pair, q_stages=1, do_stages=1))
    if may_pair and min(head_dim, head_dim_v) > 48:
        for found in pairs:
            if not found.reasons_invalid(head_dim, head_dim_v):
                return found
    if config.reasons_invalid(head_dim, head_dim_v):
        config = dataclasses.replace(config, do_stages=1)
    return config


def dividing_backward(
    config: BwdConfig, tile_m: int, tile_n: int, head_dim: int, head_dim_v: int
) -> BwdConfig | None:
    """The configuration nearest to ``config`` whose tiles divide these; None where none does."""
    narrower = [
        BwdConfig(warpgroups, 64, dq_split="none", deterministic=config.deterministic)
        for warpgroups in (2, 1)
        if warpgroups < config.warpgroups and not config.by_role
    ]
    # Where dK and dV do not fit in the registers of one warpgroup, two share its keys.
    by_role = BwdConfig(2, 64, ds_stages=1, dq_split="chunks", by_role=True)
    narrower.append(dataclasses.replace(by_role, deterministic=config.deterministic))
    for found in (config, *narrower):
        fits = not (tile_m % found.tile_m or tile_n % found.tile_n)
        if fits and not found.reasons_invalid(head_dim, head_dim_v):
            return found
    return None


RESIDENT_BYTES = 16 * 1024 * 1024
"""Of ``BwdConfig.resident_bytes`` with lists of tiles, as ``scheduler.L2_BYTES``."""


def in_parts(config: BwdConfig) -> BwdConfig:
    """The backward configuration for lists of tiles that a group of heads visits."""
    if config.by_role or config.deterministic:
        return config
    return dataclasses.replace(config, resident_bytes=RESIDENT_BYTES)


def has_dq_sums(config: BwdConfig | BwdConfigSm100) -> bool:
    """Whether blocks add to dQ in global memory, in float32."""
    return not (config.passes if isinstance(config, BwdConfigSm100) else config.dq_pass)


def workspace_shapes(
    config: BwdConfig | BwdConfigSm100,
    batch: int,
    q_length: int,
    kv_length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    head_dim_v: int,
) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the backward launcher's scratch outputs, in its argument order.

    Where it is summed in global memory, dQ in float32, tile by tile in the order of the registers
    that held it; the log-sum-exp in base 2 and the row sums of dO * O, both padded to whole query
    tiles; where the configuration is deterministic, how many blocks have added to each tile's dQ;
    where blocks are in parts, how many of each are done, and its dV and dK in float32.  None needs
    initialising.
    """
    m_blocks = -(-q_length // config.tile_m)
    h = config.padded_head_dim(head_dim)
    rows = (batch, heads, m_blocks * config.tile_m)
    shapes: list[tuple[tuple[int, ...], str]] = [(rows, "float32")] * 2
    if has_dq_sums(config):
        shapes.insert(0, ((batch, heads, m_blocks * config.tile_m * h), "float32"))
    if config.deterministic:
        shapes.append(((batch, heads, m_blocks * config.dq_warps(head_dim)), "int32"))
    if isinstance(config, BwdConfig) and config.resident_bytes:
        n_blocks = -(-kv_length // config.tile_n)
        width = h + round_up(head_dim_v, 16)
        shapes.append(((batch, kv_heads, n_blocks), "int32"))
        shapes.append(((batch, kv_heads, n_blocks * config.tile_n * width), "float32"))
    return shapes
