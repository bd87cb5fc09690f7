"""Tile configurations of the kernels, what makes one valid, and how one is chosen."""

from dataclasses import dataclass, replace

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
      overlap_epilogue: O has shared memory of its own, so that the next tile's Q can be loaded
        while this tile's O is still being written; else O reuses Q's.
      rescale_threshold: O and the row sums are rescaled only once the row maximum has grown by
        more than this many powers of two; 0 rescales at every tile.
      consumer_registers, producer_registers: registers a thread, after reallocation.
    """

    warpgroups: int
    tile_n: int
    kv_stages: int
    overlap_epilogue: bool = True
    rescale_threshold: float = 8.0
    consumer_registers: int = 240
    producer_registers: int = 24

    @property
    def tile_m(self) -> int:
        return 64 * self.warpgroups

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory in bytes, without barriers, for 16-bit operands."""
        h, hv = round_up(head_dim, 16), round_up(head_dim_v, 16)
        q, o = self.tile_m * h, self.tile_m * hv
        kv = self.kv_stages * self.tile_n * (h + hv)
        return 2 * (kv + (q + o if self.overlap_epilogue else max(q, o)))

    def reasons_invalid(self, head_dim: int, head_dim_v: int) -> list[str]:
        """Every reason why this configuration cannot be compiled for these head_dims."""
        reasons = []
        if self.warpgroups not in (1, 2, 3):
            reasons.append(f"warpgroups must be 1, 2 or 3, got {self.warpgroups}")
        if self.tile_n % 16 or not 16 <= self.tile_n <= 256:
            reasons.append(f"tile_n must be a multiple of 16 from 16 to 256, got {self.tile_n}")
        if self.kv_stages < 1:
            reasons.append(f"kv_stages must be at least 1, got {self.kv_stages}")
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
    """The forward configuration for a pair of head_dims on Hopper."""
    if max(head_dim, head_dim_v) <= 64:
        config = FwdConfig(3, 128, 2, consumer_registers=160, producer_registers=32)
    elif max(head_dim, head_dim_v) <= 128:
        config = FwdConfig(2, 128, 2)
    elif head_dim_v <= 128:
        config = FwdConfig(2, 112, 2, overlap_epilogue=False)
    elif max(head_dim, head_dim_v) <= 192:
        config = FwdConfig(2, 96, 2, overlap_epilogue=False)
    else:
        config = FwdConfig(2, 80, 2, overlap_epilogue=False)
    if not config.overlap_epilogue:
        roomier = replace(config, overlap_epilogue=True)
        if not roomier.reasons_invalid(head_dim, head_dim_v):
            config = roomier
    return config
