"""Tile configurations of Hopper's kernels, what makes one valid, and how one is chosen."""

import dataclasses
from dataclasses import dataclass

from jax_flashcute.kernels.config.memory import lacks_registers, lacks_smem, round_up

FEW_ROWS = 8
"""Rows of a product that one warp holds, a thread one of its two."""


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
      bias_itemsize: bytes of a number of a bias over queries and keys, a tile of which is in shared
        memory; 0: there is none, or it is read from where it is.
      joins_parts: with split-KV, the block that stores the last part of a row's keys adds them up;
        otherwise a second kernel does.
      query_rows: of a slab, from its first one on, that may hold queries: all 64 or, of one
        warpgroup, ``FEW_ROWS``; of other rows there are products, and no softmax.
      reads_keys_once: one block reads a key, and L2 is to give it up before anything else.
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
    bias_itemsize: int = 0
    joins_parts: bool = False
    query_rows: int = 64
    reads_keys_once: bool = False

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

    def key_tile_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Of K and V of a key tile in shared memory, for 16-bit operands."""
        return 2 * self.tile_n * (round_up(head_dim, 16) + round_up(head_dim_v, 16))

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory in bytes, without barriers, for 16-bit operands."""
        queries = 2 * self.q_stages * self.tile_m * round_up(head_dim, 16)
        keys = self.kv_stages * self.key_tile_bytes(head_dim, head_dim_v)
        return queries + keys + self.bias_itemsize * self.tile_m * self.tile_n

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
        if self.query_rows not in ((FEW_ROWS, 64) if self.warpgroups == 1 else (64,)):
            reasons.append(
                f"query_rows must be 64, or {FEW_ROWS} with one warpgroup, got {self.query_rows}"
            )
        reasons += lacks_smem(self.smem_bytes(head_dim, head_dim_v) + 1024)
        consumers = [self.consumer_registers] * self.warpgroups
        reasons += lacks_registers([self.producer_registers, *consumers])
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

    Measured for head_dim 128, without lists, pages and what is done to single scores;
    docs/lab-notebook.md.
    """
    if config.warpgroups != 2 or config.takes_turns:
        return config
    return dataclasses.replace(config, q_stages=2)


def staging_bias(config: FwdConfig, itemsize: int, head_dim: int, head_dim_v: int) -> FwdConfig:
    """A forward configuration that brings tiles of a bias over queries and keys to shared memory.

    The same one where there is no room for them.  A second tile of the bias gains nothing, a
    second query tile a little; docs/lab-notebook.md.
    """
    for queries in (staggered(config), config):
        found = dataclasses.replace(queries, bias_itemsize=itemsize)
        if not found.reasons_invalid(head_dim, head_dim_v):
            return busy_producer(found)
    return config


FEW_ROWS_BYTES = 144 * 1024
"""Of keys and values on their way to a multiprocessor, at most, in such calls: with head_dim 128
an H200 reads faster with 128 KB than with 192; docs/lab-notebook.md."""


LEAST_FEW_ROWS_TILES = 4
"""Key tiles from which few rows have a configuration of their own though keys are not divided:
with fewer it was not measured, and a tile of work's queries would be waited for."""


def few_rows_config(head_dim: int, head_dim_v: int, rows: int) -> FwdConfig:
    """The forward configuration where a tile of 64 rows holds all queries.

    One warpgroup, and keys on their way to shared memory: such calls wait for memory, as long as
    the softmax of a tile, for which nothing else is computed meanwhile, takes less.

    Args:
      head_dim, head_dim_v: of query and key, of value.
      rows: that queries fill.
    """
    usual = forward_config(head_dim, head_dim_v)
    stages = min(6, max(2, FEW_ROWS_BYTES // usual.key_tile_bytes(head_dim, head_dim_v)))
    query_rows = FEW_ROWS if rows <= FEW_ROWS else 64
    return FwdConfig(1, usual.tile_n, stages, takes_turns=False, query_rows=query_rows)


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
        reasons += lacks_smem(self.smem_bytes(head_dim, head_dim_v) + 1024, "shared memory for dQ")
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
        reasons += lacks_smem(self.smem_bytes(head_dim, head_dim_v) + 1024)
        consumers = [self.consumer_registers] * self.warpgroups
        reasons += lacks_registers([self.producer_registers, *consumers])
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
