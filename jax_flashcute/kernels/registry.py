"""Which kernel serves a call, every reason why one does not, and how it is built.

Works on shapes alone: nothing here needs a device, a compiler or JAX.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from jax_flashcute.analysis import (
    Interval,
    analyse,
    intersection,
    rising_interval,
    window,
    window_interval,
)
from jax_flashcute.kernels.config import (
    BwdConfig,
    FwdConfig,
    FwdConfigSm100,
    backward_config,
    few_rows_config,
    forward_config,
    forward_config_sm100,
    most_splits,
    workspace_shapes,
)
from jax_flashcute.spec import AttentionSpec, Operands

Direction = Literal["fwd", "bwd"]

ARCHITECTURES = {"fwd": ("sm_90a", "sm_100a", "sm_103a"), "bwd": ("sm_90a",)}
"""The architectures that kernels exist for, by direction."""

BLACKWELL = ("sm_100a", "sm_103a")
"""Those with tcgen05 and tensor memory; no such GPU has run the kernels yet."""

DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 256
SERVED_OPERANDS = frozenset(
    ("query", "key", "value", "q_offset", "query_seq_lengths", "key_value_seq_lengths")
)
OPTIONAL_OPERANDS = ("q_offset", "query_seq_lengths", "key_value_seq_lengths")
"""Those of ``SERVED_OPERANDS`` that may be absent, in the order in which kernels take them."""
FUNCTION_OPERANDS = frozenset(("batch_index", "head_index", "mask_mod_arrays", "score_mod_arrays"))
"""What ``mask_mod`` and ``score_mod`` read, which are refused by their own names."""


class Shaped(Protocol):
    """An array, or anything with its shape and dtype."""

    shape: Any
    dtype: Any


@dataclasses.dataclass(frozen=True)
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
      split_kv: a row's keys are divided among blocks; Hopper's forward only.
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
    config: FwdConfig | FwdConfigSm100 | BwdConfig
    num_sms: int
    split_kv: bool = False


def interval_of(spec: AttentionSpec) -> Interval | None:
    """The keys a query sees by its position: causal is ``kv < q + 1``.

    None where ``mask_mod`` shows something else than one interval whose bounds rise with q.
    """
    left, right = spec.local_window_size or (None, None)
    if spec.is_causal:
        right = 0 if right is None else min(right, 0)
    keys = (window_interval(left, right),)
    if spec.mask_mod is not None:
        keys = intersection(keys, analyse(spec.mask_mod.jaxpr).intervals())
    return rising_interval(keys)


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
    if arch is not None and arch not in ARCHITECTURES[direction]:
        reasons.append(_no_kernel_for(arch, direction))
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
        if name not in SERVED_OPERANDS | FUNCTION_OPERANDS:
            reasons.append(f"no kernel takes {name} yet")
    if interval_of(spec) is None:
        reasons.append(
            "no kernel takes a mask_mod yet that is not known to be one interval of keys with "
            "bounds that rise with q_idx"
        )
    if spec.score_mod is not None:
        reasons.append("no kernel takes score_mod yet")
    if spec.logits_soft_cap is not None:
        reasons.append("no kernel takes logits_soft_cap yet")
    if not (math.isfinite(spec.scale) and spec.scale >= 0):
        reasons.append(f"scale must be finite and not negative, got {spec.scale}")
    if any(dim == 0 for array in _main(operands) for dim in array.shape):
        reasons.append("an operand is empty")
    if direction == "bwd" and not reasons:
        dims = operands.query.shape[-1], operands.value.shape[-1]
        reasons += backward_config(*dims, spec.deterministic).reasons_invalid(*dims)
    return reasons


def _no_kernel_for(arch: str, direction: Direction) -> str:
    if direction == "fwd":
        reason = f"kernels exist for {', '.join(ARCHITECTURES['fwd'])}, not for {arch}"
    else:
        (only,) = ARCHITECTURES["bwd"]
        reason = f"backward kernels exist for {only} alone, not for {arch}"
    if arch.startswith("sm_12"):
        reason += ", which is a Blackwell without the tcgen05 instructions and the tensor memory"
    return reason


def _main(operands: Operands) -> tuple[Shaped, Shaped, Shaped]:
    return operands.query, operands.key, operands.value


def kernel_key(
    spec: AttentionSpec, operands: Operands, direction: Direction, arch: str, num_sms: int
) -> KernelKey:
    """The kernel that serves a call that nothing speaks against."""
    query, key, value = _main(operands)
    passes = {"fwd": "forward", "bwd": "backward"}[direction]
    group = query.shape[2] // key.shape[2]
    dims = query.shape[3], value.shape[3]
    present = operands.present()
    config: FwdConfig | FwdConfigSm100 | BwdConfig
    split_kv = False
    interval = interval_of(spec)
    assert interval is not None, "reasons_against must be asked first"
    if direction == "fwd":
        config = forward_config_sm100(*dims) if arch in BLACKWELL else forward_config(*dims)
        pack_gqa = packing_pays(query.shape[1], group, config)
        if arch not in BLACKWELL and num_splits(interval, operands, num_sms) > 1:
            config, split_kv = few_rows_config(*dims), True
            pack_gqa = packing_pays(query.shape[1], group, config)
    else:
        config, pack_gqa, num_sms = backward_config(*dims, spec.deterministic), False, 0
    return KernelKey(
        kernel=f"{'sm100' if arch in BLACKWELL else 'sm90'}_{passes}",
        arch=arch,
        dtype=str(query.dtype),
        head_dim=dims[0],
        head_dim_v=dims[1],
        group=group,
        pack_gqa=pack_gqa,
        scale=spec.scale,
        interval=interval,
        optional=tuple(name for name in OPTIONAL_OPERANDS if name in present),
        config=config,
        num_sms=num_sms,
        split_kv=split_kv,
    )


def num_splits(interval: Interval, operands: Operands, num_sms: int) -> int:
    """Parts into which the forward kernel divides a row's keys at most; by shapes alone.

    1 where the queries fill more than one row of tiles, or a dimension is known at run time only.
    """
    query, key, value = _main(operands)
    sizes = (*query.shape[:3], *key.shape[1:3])
    if not all(isinstance(size, int) for size in sizes):
        return 1
    B, T, N, S, K = sizes
    config = few_rows_config(query.shape[3], value.shape[3])
    pack_gqa = packing_pays(T, N // K, config)
    if T > (64 // (N // K) if pack_gqa else 64):
        return 1
    left, right = window((interval,)) or (None, None)
    keys = S if left is None or right is None else min(S, left + right + T + config.tile_n)
    key_tiles = -(-max(keys, 1) // config.tile_n)
    lengths_vary = operands.key_value_seq_lengths is not None and B > 1
    return most_splits(B * (K if pack_gqa else N), key_tiles, num_sms, lengths_vary)


def packing_pays(q_length: Any, group: int, config: FwdConfig | FwdConfigSm100) -> bool:
    """Whether a tile of several heads' rows wastes clearly fewer rows than one head's.

    A length that is only known at run time is taken to be long.
    """
    if group == 1 or group > config.slab_rows or not isinstance(q_length, int):
        return False
    slabs = config.tile_m // config.slab_rows
    unpacked = group * math.ceil(q_length / config.tile_m)
    packed = math.ceil(q_length / (config.slab_rows // group * slabs))
    return packed <= 0.9 * unpacked


def arrays_of(key: KernelKey) -> Sequence[tuple[Any, tuple[int, ...]] | None]:
    """Element type and divisibility of each array a kernel takes, None for an absent one."""
    return KERNELS[key.kernel].arrays(key)


def builder(key: KernelKey) -> Callable[[], Callable[..., None]]:
    """What makes the launcher; to be called while tracing."""
    return KERNELS[key.kernel].builder(key)


def scratch_shapes(key: KernelKey, operands: Operands) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of a kernel's scratch outputs, which follow its results."""
    return KERNELS[key.kernel].scratch(key, operands)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a kernel is built and called; each field is a function of its key."""

    arrays: Callable[[KernelKey], Sequence[tuple[Any, tuple[int, ...]] | None]]
    builder: Callable[[KernelKey], Callable[[], Callable[..., None]]]
    scratch: Callable[[KernelKey, Operands], list[tuple[tuple[int, ...], str]]]


def _element_type(key: KernelKey):
    import cutlass

    return {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[key.dtype]


def _forward_arrays(key: KernelKey):
    import cutlass

    qk = (_element_type(key), (1, 1, 1, key.head_dim))
    v = (_element_type(key), (1, 1, 1, key.head_dim_v))
    lse, counter = (cutlass.Float32, (1, 1, 1)), (cutlass.Int32, (1,))
    partials = []
    if key.split_kv:
        partials = [
            (cutlass.Float32, (1, 1, 1, 1, key.head_dim_v)),
            (cutlass.Float32, (1, 1, 1, 1)),
        ]
    return [qk, qk, v, *_optional_arrays(key), v, lse, counter, *partials]


def _backward_arrays(key: KernelKey):
    import cutlass

    qk = (_element_type(key), (1, 1, 1, key.head_dim))
    v = (_element_type(key), (1, 1, 1, key.head_dim_v))
    rows = (cutlass.Float32, (1, 1, 1))
    turns = [(cutlass.Int32, (1, 1, 1))] if key.config.deterministic else []
    inputs = [qk, qk, v, v, rows, v, rows, *_optional_arrays(key)]
    return [*inputs, qk, qk, v, rows, rows, rows, *turns]


def _optional_arrays(key: KernelKey):
    import cutlass

    return [(cutlass.Int32, (1,)) if n in key.optional else None for n in OPTIONAL_OPERANDS]


def _forward_builder(key: KernelKey):
    from jax_flashcute.kernels.common.intervals import IntervalMask
    from jax_flashcute.kernels.sm90.forward import ForwardSm90
    from jax_flashcute.kernels.sm100.forward import ForwardSm100

    forward = {
        "sm90_forward": partial(ForwardSm90, split_kv=key.split_kv),
        "sm100_forward": ForwardSm100,
    }[key.kernel]
    return lambda: forward(
        key.config,
        _element_type(key),
        key.head_dim,
        key.head_dim_v,
        key.group,
        key.pack_gqa,
        key.scale,
        IntervalMask(key.interval),
        key.num_sms,
    )


def _forward_scratch(key: KernelKey, operands: Operands):
    """The tile counter, and O and LSE of each part of the keys."""
    shapes: list[tuple[tuple[int, ...], str]] = [((1,), "int32")]
    if key.split_kv:
        B, T, N, _ = operands.query.shape
        rows = (num_splits(key.interval, operands, key.num_sms), B, T, N)
        shapes += [((*rows, key.head_dim_v), "float32"), (rows, "float32")]
    return shapes


def _backward_builder(key: KernelKey):
    from jax_flashcute.kernels.common.intervals import IntervalMask
    from jax_flashcute.kernels.sm90.backward import BackwardSm90

    return lambda: BackwardSm90(
        key.config,
        _element_type(key),
        key.head_dim,
        key.head_dim_v,
        key.group,
        key.scale,
        IntervalMask(key.interval),
    )


def _backward_scratch(key: KernelKey, operands: Operands):
    B, T, N, H = operands.query.shape
    _, S, K, Hv = operands.value.shape
    return workspace_shapes(key.config, B, T, S, N, K, H, Hv)


KERNELS = {
    "sm90_forward": Kernel(_forward_arrays, _forward_builder, _forward_scratch),
    "sm100_forward": Kernel(_forward_arrays, _forward_builder, _forward_scratch),
    "sm90_backward": Kernel(_backward_arrays, _backward_builder, _backward_scratch),
}
"""Every kernel by name."""
