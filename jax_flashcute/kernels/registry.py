"""Which kernel serves a call, every reason why one does not, and how it is built.

Works on shapes alone: nothing here needs a device, a compiler or JAX.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from jax_flashcute.kernels.config import FwdConfig, forward_config
from jax_flashcute.spec import AttentionSpec, Operands

Direction = Literal["fwd", "bwd"]

ARCHITECTURES = ("sm_90a",)
"""The architectures that kernels exist for."""

DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 256
SERVED_OPERANDS = frozenset(
    ("query", "key", "value", "q_offset", "query_seq_lengths", "key_value_seq_lengths")
)
OPTIONAL_OPERANDS = ("q_offset", "query_seq_lengths", "key_value_seq_lengths")
"""Those of ``SERVED_OPERANDS`` that may be absent, in the order in which kernels take them."""


class Shaped(Protocol):
    """An array, or anything with its shape and dtype."""

    shape: Any
    dtype: Any


@dataclasses.dataclass(frozen=True)
class KernelKey:
    """What makes one compiled kernel differ from another.

    Attributes:
      kernel: its name, such as ``sm90_forward``.
      arch: the architecture it is compiled for.
      dtype: name of the dtype of query, key and value.
      head_dim, head_dim_v: of query and key, of value.
      group: query heads that share a key/value head.
      pack_gqa: those heads share a tile of query rows.
      scale: factor on the scores.
      window: visible keys left and right of a query; None where unbounded.
      optional: the optional operands that are present.
      config: tile sizes and the like.
      num_sms: multiprocessors that persistent blocks are spread over.
    """

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    head_dim_v: int
    group: int
    pack_gqa: bool
    scale: float
    window: tuple[int | None, int | None]
    optional: tuple[str, ...]
    config: FwdConfig
    num_sms: int


def window_of(spec: AttentionSpec) -> tuple[int | None, int | None]:
    """The keys a query sees left and right of its position: causal is ``(None, 0)``."""
    left, right = spec.local_window_size or (None, None)
    if spec.is_causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def reasons_against(
    spec: AttentionSpec, operands: Operands, direction: Direction, arch: str | None = None
) -> list[str]:
    """Every reason why no kernel serves a call; empty where one does.

    Args:
      spec: the static part of the call.
      operands: its arrays, or anything with their shapes and dtypes.
      direction: ``"fwd"`` or ``"bwd"``.
      arch: the architecture it would run on; None for any that kernels exist for.
    """
    reasons = []
    if direction == "bwd":
        reasons.append("there is no backward kernel yet")
    if arch is not None and arch not in ARCHITECTURES:
        reasons.append(f"kernels exist for {', '.join(ARCHITECTURES)}, not for {arch}")
    dtype = str(operands.query.dtype)
    if dtype not in DTYPES:
        reasons.append(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    for name, dim in (
        ("head_dim", operands.query.shape[-1]),
        ("value head_dim", operands.value.shape[-1]),
    ):
        if not isinstance(dim, int):
            reasons.append(f"{name} must be a number, got the symbol {dim}")
        elif dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            reasons.append(f"{name} must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {dim}")
    for name in operands.present():
        if name not in SERVED_OPERANDS:
            reasons.append(f"no kernel takes {name} yet")
    if spec.logits_soft_cap is not None:
        reasons.append("no kernel takes logits_soft_cap yet")
    if not (math.isfinite(spec.scale) and spec.scale >= 0):
        reasons.append(f"scale must be finite and not negative, got {spec.scale}")
    if any(dim == 0 for array in _main(operands) for dim in array.shape):
        reasons.append("an operand is empty")
    return reasons


def _main(operands: Operands) -> tuple[Shaped, Shaped, Shaped]:
    return operands.query, operands.key, operands.value


def forward_key(spec: AttentionSpec, operands: Operands, arch: str, num_sms: int) -> KernelKey:
    """The forward kernel that serves a call that nothing speaks against."""
    query, key, value = _main(operands)
    heads, kv_heads = query.shape[2], key.shape[2]
    group = heads // kv_heads
    config = forward_config(query.shape[3], value.shape[3])
    present = operands.present()
    return KernelKey(
        kernel="sm90_forward",
        arch=arch,
        dtype=str(query.dtype),
        head_dim=query.shape[3],
        head_dim_v=value.shape[3],
        group=group,
        pack_gqa=packing_pays(query.shape[1], group, config),
        scale=spec.scale,
        window=window_of(spec),
        optional=tuple(name for name in OPTIONAL_OPERANDS if name in present),
        config=config,
        num_sms=num_sms,
    )


def packing_pays(q_length: Any, group: int, config: FwdConfig) -> bool:
    """Whether a tile of several heads' rows wastes clearly fewer rows than one head's.

    A length that is only known at run time is taken to be long.
    """
    if group == 1 or group > 64 or not isinstance(q_length, int):
        return False
    unpacked = group * math.ceil(q_length / config.tile_m)
    packed = math.ceil(q_length / (64 // group * config.warpgroups))
    return packed <= 0.9 * unpacked


def arrays_of(key: KernelKey) -> Sequence[tuple[Any, tuple[int, ...]] | None]:
    """Element type and divisibility of each array a kernel takes, None for an absent one."""
    import cutlass

    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[key.dtype]
    qk, v = (dtype, (1, 1, 1, key.head_dim)), (dtype, (1, 1, 1, key.head_dim_v))
    integers = (cutlass.Int32, (1,))
    return [
        qk,
        qk,
        v,
        *(integers if name in key.optional else None for name in OPTIONAL_OPERANDS),
        v,
        (cutlass.Float32, (1, 1, 1)),
        integers,
    ]


def builder(key: KernelKey) -> Callable[[], Callable[..., None]]:
    """What makes the launcher; to be called while tracing."""
    import cutlass

    from jax_flashcute.kernels.common.intervals import IntervalMask
    from jax_flashcute.kernels.sm90.forward import ForwardSm90

    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[key.dtype]
    return lambda: ForwardSm90(
        key.config,
        dtype,
        key.head_dim,
        key.head_dim_v,
        key.group,
        key.pack_gqa,
        key.scale,
        IntervalMask(*key.window),
        key.num_sms,
    )
