"""Kernels of native sparse attention beside the attention itself: what they serve, how they build.

Works on shapes alone, as ``registry`` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a")
"""The architectures that the kernels are compiled for; on sm_100a and sm_103a none has run yet."""

DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 256

GATE_PARTS = 8192
"""Sums of the gate weights' gradient that are made at once, each by a few lanes: enough to keep a
GPU busy, few enough that writing them is little."""


Name = Literal["nsa_gate", "nsa_gate_backward", "nsa_compress", "nsa_compress_backward"]
KERNELS: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class NSAKernelKey:
    """What makes one of these kernels differ from another.

    Attributes:
      kernel: its name, a key of ``registry.KERNELS``.
      arch: the architecture it is compiled for; empty until a program is lowered.
      dtype: name of the dtype of query, key, value and the branches' outputs.
      head_dim, head_dim_v: of query and key, of value and the branches' outputs.
      block: tokens of a block; compression only.
      mean_dtype: name of the dtype of the means; compression only.
      has_counts: how many tokens of each block count is an operand; compression only.
    """

    kernel: Name
    dtype: str
    head_dim: int
    head_dim_v: int
    block: int = 0
    mean_dtype: str = ""
    has_counts: bool = False
    arch: str = ""


def reasons_against(
    shapes: Sequence[tuple[str, Any]], head_dims: Sequence[Any], arch: str | None
) -> list[str]:
    """Every reason why these kernels cannot serve a call; empty where they can.

    Args:
      shapes: the arrays by name: anything with a shape and a dtype.
      head_dims: the head_dims among their dimensions.
      arch: the architecture it would run on; None for any that kernels exist for.
    """
    reasons = []
    if arch is not None and arch not in ARCHITECTURES:
        reasons.append(f"kernels exist for {', '.join(ARCHITECTURES)}, not for {arch}")
    dtypes = {name: str(x.dtype) for name, x in shapes}
    if len(set(dtypes.values())) > 1:
        reasons.append(f"dtypes must be equal, got {dtypes}")
    reasons += [
        f"the dtype of {name} must be one of {', '.join(DTYPES)}, got {dtype}"
        for name, dtype in dtypes.items()
        if dtype not in DTYPES
    ]
    for dim in dict.fromkeys(head_dims):
        if not isinstance(dim, int):
            reasons.append(f"head_dim must be a number, got the symbol {dim}")
        elif dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            reasons.append(f"head_dim must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {dim}")
    reasons += [f"{name} is empty" for name, x in shapes if 0 in x.shape]
    return reasons


def gate_parts(batch: Any, q_length: Any, heads: Any) -> Any:
    """Parts in which each weight's gradient is summed; dimensions may be symbols."""
    if not isinstance(batch, int) or not isinstance(heads, int):
        return 64
    parts = max(1, GATE_PARTS // (batch * heads))
    return min(parts, q_length) if isinstance(q_length, int) else parts


def no_scratch(key: NSAKernelKey, operands: Any) -> list[tuple[tuple[int, ...], str]]:
    """These kernels write nothing but their results."""
    return []


def arrays_of(key: NSAKernelKey) -> list[tuple[Any, tuple[int, ...]] | None]:
    """Element type and divisibility of each array, inputs first."""
    import cutlass

    types = {
        "bfloat16": cutlass.BFloat16,
        "float16": cutlass.Float16,
        "float32": cutlass.Float32,
    }
    element = types[key.dtype]
    qk, v = ((element, (1, 1, 1, h)) for h in (key.head_dim, key.head_dim_v))
    if key.kernel == "nsa_gate":
        return [qk, v, v, v, (cutlass.Float32, (1, 1, 1, key.head_dim)), v]
    if key.kernel == "nsa_gate_backward":
        weights = (cutlass.Float32, (1, 1, 1, key.head_dim))
        parts = (cutlass.Float32, (1, 1, 1, 1, key.head_dim))
        return [qk, v, v, v, weights, v, qk, v, v, v, parts]
    counts = (cutlass.Int32, (1, 1)) if key.has_counts else None
    means = [(types[key.mean_dtype], (1, 1, 1, h)) for h in (key.head_dim, key.head_dim_v)]
    if key.kernel == "nsa_compress":
        return [qk, v, counts, *means]
    return [*means, counts, qk, v]


def builder(key: NSAKernelKey) -> Callable[[], Callable[..., None]]:
    """What makes the launcher; to be called while tracing."""
    types = arrays_of(key)
    return (_gate if key.kernel.startswith("nsa_gate") else _compress)(key, types)


def _gate(key: NSAKernelKey, types):
    from jax_flashcute.kernels.extra.gate import Gate, GateBackward

    kernel = Gate if key.kernel == "nsa_gate" else GateBackward
    return lambda: kernel(types[0][0], key.head_dim, key.head_dim_v).launch


def _compress(key: NSAKernelKey, types):
    from jax_flashcute.kernels.extra.compress import Compress, CompressBackward

    if key.kernel == "nsa_compress":
        kernel, dtype, mean_dtype = Compress, types[0][0], types[3][0]
    else:
        kernel, dtype, mean_dtype = CompressBackward, types[3][0], types[0][0]
    return lambda: kernel(dtype, mean_dtype, key.block, key.head_dim, key.head_dim_v).launch
