"""Tile configurations of Blackwell's kernels, what makes one valid, and how one is chosen."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from jax_flashcute.kernels.config.memory import lacks_registers, lacks_smem, round_up

ROWS_SM100 = 128
"""Query rows of one matrix product on Blackwell."""


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
        reasons += lacks_smem(self.smem_bytes(head_dim, head_dim_v) + 2048)
        columns = self.query_tiles * (self.tile_n + round_up(head_dim_v, 16))
        if columns > 512:
            reasons.append(f"tensor memory: {columns} columns needed, 512 available")
        softmax = [self.softmax_registers] * self.query_tiles
        reasons += lacks_registers([*softmax, self.correction_registers, self.other_registers])
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
        reasons += lacks_smem(self.smem_bytes(head_dim, head_dim_v) + 1024)
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
      deterministic: blocks add to dQ in a fixed order, each waiting for those before it; in passes,
        what they add to gradients of arrays is added in fixed point.
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
        reasons += lacks_smem(self.smem_bytes(head_dim, head_dim_v) + 1024)
        gradients = [self.gradient_registers] * 2
        reasons += lacks_registers([*gradients, self.reduce_registers, self.other_registers])
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
