"""Kernels compiled for the simulator's own tests, each once in a process."""

import functools

from jax_flashcute.analysis import window_interval
from jax_flashcute.ffi.compile import ArrayType, CompiledKernel, compile_kernel
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config import FwdConfig, backward_config, forward_config

NUM_SMS = 2
"""Persistent blocks of the forward kernel: fewer than the tiles of most tests."""


@functools.cache
def forward(
    head_dim: int = 128,
    group: int = 1,
    *,
    pack_gqa: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    optional: tuple[str, ...] = (),
    dtype: str = "bfloat16",
    config: FwdConfig | None = None,
) -> CompiledKernel:
    """The Hopper forward kernel, PTX and line info kept; ``scale`` is ``head_dim ** -0.5``."""
    key = registry.KernelKey(
        kernel="sm90_forward",
        arch="sm_90a",
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim,
        group=group,
        pack_gqa=pack_gqa,
        scale=head_dim**-0.5,
        interval=window_interval(*window),
        optional=optional,
        config=config or forward_config(head_dim, head_dim),
        num_sms=NUM_SMS,
    )
    arrays = [None if a is None else ArrayType(*a) for a in registry.arrays_of(key)]
    return compile_kernel(
        registry.builder(key), arrays, key.arch, keep_intermediates=True, line_info=True
    )


def forward_barriers(config: FwdConfig) -> list[str]:
    """The Hopper forward's mbarriers by address: each pipeline's stages, full ones first."""
    from jax_flashcute.kernels.sm90.forward import TILE_STAGES

    pipelines = {"q": 1, "k": config.kv_stages, "v": config.kv_stages, "tile": TILE_STAGES}
    names = [
        f"{pipeline}[{stage}] {state}, its {waiting} waiting"
        for pipeline, stages in pipelines.items()
        for state, waiting in (("full", "consumers"), ("empty", "producer"))
        for stage in range(stages)
    ]
    return [*names, "tail of V"]


@functools.cache
def backward(
    head_dim: int = 128, group: int = 1, *, window: tuple[int | None, int | None] = (None, None)
) -> CompiledKernel:
    """The Hopper backward launcher (three kernels) in bfloat16, without optional operands."""
    import cutlass

    from jax_flashcute.kernels.common.intervals import IntervalMask
    from jax_flashcute.kernels.sm90.backward import BackwardSm90

    config = backward_config(head_dim, head_dim)
    rows = ArrayType(cutlass.BFloat16, (1, 1, 1, head_dim))
    floats = ArrayType(cutlass.Float32, (1, 1, 1))
    arrays = [rows, rows, rows, rows, floats, rows, None, None, None, None, rows, rows, rows]
    arrays += [floats] * 3

    def build():
        return BackwardSm90(
            config, cutlass.BFloat16, head_dim, head_dim, group, head_dim**-0.5,
            IntervalMask(window_interval(*window)),
        )  # fmt: skip

    return compile_kernel(build, arrays, "sm_90a", keep_intermediates=True, line_info=True)
