"""The Hopper backward in simulation: small cases of every feature, with poison and race checks."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_flashcute import masks, reference
from jax_flashcute.kernels.config.sm90 import BwdConfig, backward_config
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100
from jax_flashcute.spec import Operands
from tests.cases import Case
from tests.kernels.backward_launchers import launcher, scratch_of
from tests.simulator import simulate
from tests.simulator.test_forward_features import FIRST_KEYS, THREE

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Relative error of a gradient in the Frobenius norm: products of 16-bit probabilities.
TOLERANCE = {"bfloat16": 6e-3, "float16": 1e-3}


@functools.cache
def expected(case: Case, dtype: str):
    """Inputs of the launcher, and the gradients in float32 from the same inputs."""
    arrays = case.arrays(jnp.float32, poison=True)
    for name in ("query", "key", "value"):
        arrays[name] = arrays[name].astype(dtype)
    rng = np.random.default_rng(1)
    rows = (case.batch, case.seqlen_q, case.q_heads)
    d_out = jnp.asarray(rng.standard_normal((*rows, case.head_dim_v)), dtype)
    d_lse = rng.standard_normal(rows) if case.lengths else np.zeros(rows)
    d_lse = jnp.asarray(d_lse, jnp.float32)
    spec = case.spec()
    # Beyond the length dO and dLSE may be anything; the reference multiplies them by 0.
    if case.lengths:
        beyond = jnp.arange(case.seqlen_q)[None] >= arrays["query_seq_lengths"][:, None]
        clean = jnp.where(beyond[..., None, None], 0, d_out), jnp.where(beyond[..., None], 0, d_lse)
        d_out = jnp.where(beyond[..., None, None], jnp.nan, d_out)
        d_lse = jnp.where(beyond[..., None], jnp.nan, d_lse)
    else:
        clean = d_out, d_lse
    main = {k: arrays[k].astype(jnp.float32) for k in ("query", "key", "value")}
    others = {k: v for k, v in arrays.items() if k not in main} | case.batch_index()

    @jax.jit
    def run(main, others, cotangents):
        def attend(main):
            found = reference.attention(spec, Operands(**main, **others))
            return found.out, found.lse

        primals, vjp = jax.vjp(attend, main)
        return primals, vjp(cotangents)[0]

    (out, lse), gradients = run(
        main, others, (clean[0].astype(jnp.float32), jnp.where(jnp.isinf(clean[1]), 0, clean[1]))
    )
    inputs = [arrays["query"], arrays["key"], arrays["value"], out.astype(dtype), lse, d_out]
    inputs += [d_lse] if case.lengths else []
    inputs += [
        arrays[name]
        for name in ("q_offset", "query_seq_lengths", "key_value_seq_lengths")
        if name in arrays
    ]
    return [np.asarray(x) for x in inputs], {k: np.asarray(v) for k, v in gradients.items()}


def check(
    case: Case,
    dtype: str = "bfloat16",
    *,
    config: BwdConfig | BwdConfigSm100 | None = None,
    arch: str = "sm_90a",
    **how,
):
    kernel = launcher(case, dtype, config=config, arch=arch)
    inputs, gradients = expected(case, dtype)
    lse = inputs[4]
    scratch = [(shape, np.dtype(name)) for shape, name in scratch_of(case, kernel.config)]
    outputs = [(gradients[name].shape, DTYPES[dtype]) for name in ("query", "key", "value")]
    found = simulate(kernel.compiled(), *inputs, outputs=outputs + scratch, **how)
    for name, got in zip(("query", "key", "value"), found, strict=False):
        got, want = got.astype(np.float64), gradients[name].astype(np.float64)
        assert np.isfinite(got).all(), name
        # Where every query sees one key alone, dQ and dK are 0 but for float32 rounding.
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-2)
        assert error < TOLERANCE[dtype], (name, error)
        # Exactly 0: queries that see no key, keys that no query sees, what lies beyond a length.
        idle = np.isneginf(lse) if name == "query" else (gradients["value"] == 0).all(-1)
        assert (got[idle] == 0).all(), name


def sized(head_dim: int, head_dim_v: int | None = None, **kw) -> Case:
    shape = {"batch": 1, "kv_heads": 1, "seqlen_q": 150, "seqlen_k": 200} | kw
    return Case(head_dim=head_dim, head_dim_v=head_dim_v or head_dim, **shape)


EVERYTHING = {"batch": 3, "causal": True, "offset": True, "lengths": True}

CASES = {
    "64": sized(64),
    "128": sized(128, seqlen_q=130, seqlen_k=129),
    "128_everything": sized(128, **EVERYTHING),
    "64_groups": sized(64, group=3, causal=True, seqlen_q=129),
    "72_40_lengths": sized(72, 40, group=2, lengths=True, batch=2),
    "256": sized(256, seqlen_q=130, seqlen_k=129),
    "192_128_everything": sized(192, 128, group=2, **EVERYTHING),
    "128_window": sized(128, window=(40, 10), offset=True, batch=2),
    "64_chunked": sized(64, mask_mod=masks.chunked(80), causal=True, offset=True, batch=2),
    "64_first_keys": sized(
        64, mask_mod=FIRST_KEYS, seqlen_k=500, **EVERYTHING | {"causal": False, "batch": 2}
    ),
}
SLOW_CASES = {
    "8": sized(8, kv_heads=2, causal=True),
    "16_one_row": sized(16, seqlen_q=1, group=7),
    "64_one_key": sized(64, seqlen_k=1, group=2),
    "64_everything": sized(64, group=2, **EVERYTHING),
    "64_128": sized(64, 128, window=(None, 5)),
    "96_causal": sized(96, causal=True, group=8, kv_heads=2),
    "112_128_window": sized(112, 128, **EVERYTHING | {"window": (70, None)}),
    "136_40_causal": sized(136, 40, causal=True, kv_heads=2),
    "64_256_groups": sized(64, 256, causal=True, group=3),
    "256_64_window": sized(256, 64, window=(40, 10), offset=True, batch=2),
    "192": sized(192, seqlen_k=1),
    "64_prefix": sized(64, mask_mod=masks.prefix_lm(70), group=2),
    "128_compressed": sized(128, mask_mod=masks.compressed_causal(3), seqlen_q=300, offset=True),
    "128_three": sized(128, mask_mod=THREE, seqlen_q=500, group=2),
    "256_64_not_near": sized(
        *(256, 64), mask_mod=~masks.sliding_window(60, 20), window=(200, 100), offset=True, batch=2
    ),
    "64_complete_only": sized(64, mask_mod=masks.compressed_causal(4, complete_only=True)),
    "256_prefix_window": sized(
        256, mask_mod=masks.prefix_lm(70), window=(90, None), lengths=True, batch=2
    ),
    "256_window_lengths": sized(256, window=(90, 20), group=3, **EVERYTHING | {"causal": False}),
    "256_first_keys": sized(256, mask_mod=FIRST_KEYS, seqlen_k=500, offset=True, lengths=True),
    "256_everything": sized(256, **EVERYTHING),
    "128_long": sized(128, seqlen_q=400, seqlen_k=500, kv_heads=2, causal=True),
    "128_more_queries": sized(128, seqlen_q=300, seqlen_k=70, causal=True, offset=True),
}


def slowly(cases: dict[str, Case]) -> list:
    return [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in cases.items()]


def slowly_named(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "case", [*(pytest.param(c, id=n) for n, c in CASES.items()), *slowly(SLOW_CASES)]
)
def test_gradients(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", slowly(CASES | SLOW_CASES))
@pytest.mark.parametrize(("timing", "warps"), [("early", "adversarial"), ("shuffled", "seeded")])
def test_gradients_under_any_timing(case: Case, timing: str, warps: str) -> None:
    check(case, timing=timing, warps=warps, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["64", "128_everything", "72_40_lengths", "192_128_everything"])
def test_half_precision(name: str) -> None:
    check(CASES[name], "float16")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(sized(64, window=(100, 20), seqlen_k=500, offset=True, group=2), id="64"),
        *slowly({name: CASES[name] for name in ("128_everything", "192_128_everything", "256")}),
        *slowly({"three": sized(64, mask_mod=THREE, seqlen_q=300, seqlen_k=500, offset=True)}),
        *slowly({"long": sized(128, seqlen_q=300, seqlen_k=600, causal=True, offset=True)}),
    ],
)
def test_deterministic(case: Case) -> None:
    """A block that waits for a turn that never comes, or has passed, is a deadlock."""
    check(case, config=backward_config(case.head_dim, case.head_dim_v, deterministic=True))


@pytest.mark.parametrize("name", ["256", *slowly_named("192_128_everything", "256_64_window")])
def test_dq_summed_in_global_memory(name: str) -> None:
    """Above 128 the other kernel, of calls that the pass for dQ does not serve."""
    case = (CASES | SLOW_CASES)[name]
    check(case, config=backward_config(case.head_dim, case.head_dim_v))


def test_configurations_are_valid() -> None:
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            for may_part in (False, True):
                config = backward_config(head_dim, head_dim_v, may_part=may_part)
                assert config.reasons_invalid(head_dim, head_dim_v) == []
