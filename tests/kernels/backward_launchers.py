"""Backward launchers compiled for a ``Case``, each once in a process, and their arrays."""

import dataclasses
import functools

from jax_flashcute.analysis import Interval
from jax_flashcute.ffi.compile import ArrayType
from jax_flashcute.kernels import launchers, masking
from jax_flashcute.kernels.config.sm90 import BwdConfig, backward_config
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100, backward_config_sm100
from jax_flashcute.kernels.config.workspace import counts_heads, has_dq_sums, workspace_shapes
from jax_flashcute.spec import Operands
from tests.cases import Case
from tests.simulator.compiled import SimulatedKernel, compile_to_simulate


@dataclasses.dataclass(frozen=True)
class Launcher:
    """What a backward launcher is compiled for.

    Attributes:
      interval, union: the keys a query sees, as in ``key.KernelKey``.
      optional: the optional arrays that it takes, of dlse, q_offset, query_seq_lengths and
        key_value_seq_lengths.
    """

    head_dim: int
    head_dim_v: int
    group: int
    interval: Interval
    optional: tuple[str, ...]
    dtype: str
    config: BwdConfig | BwdConfigSm100
    arch: str = "sm_90a"
    union: tuple[Interval, ...] = ()

    @functools.cache  # noqa: B019 - as many as there are cases
    def compiled(self) -> SimulatedKernel:
        import cutlass

        from jax_flashcute.kernels.common.intervals import mask_of

        backward = launchers.backward_class(self.config)
        dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[self.dtype]
        qk, v = (ArrayType(dtype, (1, 1, 1, h)) for h in (self.head_dim, self.head_dim_v))
        rows, integers = ArrayType(cutlass.Float32, (1, 1, 1)), ArrayType(cutlass.Int32, (1,))
        optional = [
            element if name in self.optional else None
            for name, element in (
                ("dlse", rows),
                ("q_offset", integers),
                ("query_seq_lengths", integers),
                ("key_value_seq_lengths", integers),
            )
        ]

        sums = rows if has_dq_sums(self.config) else None
        counts = [ArrayType(cutlass.Int32, (1, 1)) if counts_heads(self.config) else None]
        counts = counts if isinstance(self.config, BwdConfig) else []
        turns = [ArrayType(cutlass.Int32, (1, 1, 1))] if self.config.deterministic else []

        def build():
            return backward(
                self.config,
                dtype,
                self.head_dim,
                self.head_dim_v,
                self.group,
                self.head_dim**-0.5,
                mask_of(self.interval, self.union),
            )

        return compile_to_simulate(
            build,
            [qk, qk, v, v, rows, v, *optional, qk, qk, v, sums, rows, rows, *counts, *turns],
            self.arch,
            repr(self),
        )


def launcher(
    case: Case,
    dtype: str,
    *,
    config: BwdConfig | BwdConfigSm100 | None = None,
    arch: str = "sm_90a",
) -> Launcher:
    interval = masking.interval_of(case.spec())
    assert interval is not None
    optional = (("dlse",) if case.lengths else ()) + (("q_offset",) if case.offset else ())
    if case.lengths:
        optional += ("query_seq_lengths", "key_value_seq_lengths")
    choose = functools.partial(backward_config, may_part=True)
    choose = choose if arch == "sm_90a" else backward_config_sm100
    return Launcher(
        case.head_dim,
        case.head_dim_v,
        case.group,
        interval,
        optional,
        dtype,
        config or choose(case.head_dim, case.head_dim_v),
        arch,
        masking.union_of(case.spec(), Operands(None, None, None)),
    )


def scratch_of(case: Case, config: BwdConfig | BwdConfigSm100) -> list[tuple[tuple[int, ...], str]]:
    return workspace_shapes(
        config,
        case.batch,
        case.seqlen_q,
        case.seqlen_k,
        case.q_heads,
        case.kv_heads,
        case.head_dim,
        case.head_dim_v,
    )
