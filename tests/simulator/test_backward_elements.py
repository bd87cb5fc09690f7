"""The Hopper backward with masks and scores by element, in simulation, against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import reference, xla
from jax_flashcute.ffi import fixed_point
from jax_flashcute.ffi.call import other_inputs, sum_exponents
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.elements import summed_arrays
from jax_flashcute.spec import LEAST_LSE, Operands, Residuals
from tests.cases import Case
from tests.simulator import simulate
from tests.simulator.test_forward_elements import compiled, operands_of, sized, widened
from tests.simulator.test_forward_segments import call_of
from tests.user_functions import MASKS, SCORES

MAIN = ("query", "key", "value")
TOLERANCE = 8e-3
"""Relative error of a gradient in the Frobenius norm: products of bfloat16 probabilities."""
OF_ROUNDED = 0.2
"""Likewise of an array by which bfloat16 scores change: the gradients of a row, each rounded to
bfloat16, cancel but for those of the LSE."""


def is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def check(case: Case, mask_mod=None, score_mod=None, *, arch: str = "sm_90a", **how):
    spec, operands = operands_of(case, "bfloat16", mask_mod, score_mod)
    check_call(case, spec, operands, arch=arch, **how)


def check_call(case: Case, spec, operands, *, arch: str = "sm_90a", **how) -> dict:
    """Returns the gradients."""
    dtype = "bfloat16"
    assert not registry.reasons_against(spec, operands, "bwd", arch)
    wide = widened(operands)
    names = (*MAIN, "sinks", "bias")
    floats = {n: getattr(wide, n) for n in names if getattr(wide, n) is not None}
    floats |= {f"array {i}": x for i, x in enumerate(summed_arrays(spec, operands)[1])}
    others = {n: x for n, x in vars(wide).items() if n not in floats}

    def attend(floats):
        given = [x for n, x in floats.items() if n not in names]
        of_mod = tuple(given.pop(0) if is_float(x) else x for x in operands.score_mod_arrays)
        main = {n: x for n, x in floats.items() if n in names}
        found = reference.attention(spec, Operands(**main, **others | {"score_mod_arrays": of_mod}))
        return found.out, found.lse

    rng = np.random.default_rng(1)
    rows = (case.batch, case.seqlen_q, case.q_heads)
    d_out = jnp.asarray(rng.standard_normal((*rows, case.head_dim_v)), dtype)
    d_lse = jnp.asarray(rng.standard_normal(rows), jnp.float32)
    (out, lse), pull = jax.vjp(jax.jit(attend), floats)
    alive = jnp.isfinite(lse) & (lse > LEAST_LSE)
    if case.lengths:
        inside = jnp.arange(case.seqlen_q)[None] < operands.query_seq_lengths[:, None]
        alive &= inside[..., None]
    clean = jnp.where(alive[..., None], d_out.astype(jnp.float32), 0), jnp.where(alive, d_lse, 0)
    (want,) = pull(clean)

    residuals = Residuals(out=out.astype(dtype), lse=lse)
    got = simulated(spec, operands, residuals, d_out, d_lse, arch=arch, **how)
    if case.sinks:
        got["sinks"] = xla.sink_gradient(operands, residuals, d_out, d_lse)
    for name, expected in want.items():
        expected = np.asarray(expected, np.float64)
        actual = np.asarray(got[name]).astype(np.float64)
        assert np.isfinite(actual).all(), name
        error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-2)
        rounded = name.startswith("array") and want[name].dtype == jnp.bfloat16
        assert error < (OF_ROUNDED if rounded else TOLERANCE), (name, error)
    return got


def simulated(
    spec, operands: Operands, residuals: Residuals, d_out, d_lse, *, arch: str = "sm_90a", **how
) -> dict:
    """The gradients that the kernel gives, by operand and, of a score's arrays, by number."""
    key = registry.kernel_key(spec, operands, "bwd", arch, 0)
    saved = operands, residuals, d_out, d_lse
    inputs = [*(getattr(operands, n) for n in MAIN), residuals.out, residuals.lse, d_out, d_lse]
    inputs += other_inputs(key, spec, operands)
    exponents = sum_exponents(key, spec, *saved)
    outputs = [(getattr(operands, n).shape, operands.query.dtype) for n in MAIN]
    biases, arrays = summed_arrays(spec, operands)
    sums = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (*biases, *arrays)]
    if exponents:
        sums = fixed_point.raw(key.elements, sums)
    outputs += [(x.shape, x.dtype) for x in sums]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    inputs = [np.asarray(x) for x in (*inputs, *exponents)]
    found = simulate(compiled(key), *inputs, outputs=outputs, **how)
    sums = [jnp.asarray(x) for x in found[3 : 3 + len(sums)]]
    if exponents:
        sums = fixed_point.as_floats(key.elements, *exponents, sums)
    summed = ["bias"] * len(biases) + [f"array {i}" for i in range(len(arrays))]
    return dict(zip((*MAIN, *summed), (*found[:3], *sums), strict=True))


EVERYTHING = {"batch": 3, "causal": True, "offset": True, "lengths": True}
CASES = {
    "soft_cap": sized(64, soft_cap=1.5, causal=True),
    "mask": sized(64, mask="nts", group=3, seqlen_q=70, seqlen_k=140),
    "sinks": sized(64, sinks=True, group=3, **EVERYTHING),
    "everything": sized(128, **EVERYTHING, window=(90, 3), soft_cap=2.0, mask="bt", sinks=True),
    "256_mask": sized(256, mask="bs", seqlen_q=70, seqlen_k=140),
    "256_soft_cap": sized(256, soft_cap=1.5, group=3, seqlen_k=140, **EVERYTHING),
}


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items()])
def test_operand(case: Case):
    check(case)


def slow_but(quick: set[str], names) -> list:
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in names]


BIASES = {
    "bnts": sized(64, bias="bnts", kv_heads=2, group=3, lengths=True, batch=2, soft_cap=2.0),
    "s": sized(64, bias="s", group=3, seqlen_q=70, seqlen_k=140, batch=2),
    "nt": sized(128, bias="nt", group=3, **EVERYTHING),
    "b": sized(64, bias="b", **EVERYTHING),
    # Of these the heads of a group take turns at a tile.
    "ts": sized(64, bias="ts", group=3, kv_heads=2, seqlen_q=150, **EVERYTHING),
    "256": sized(256, bias="bns", group=3, seqlen_q=70, soft_cap=2.0, **EVERYTHING),
}


@pytest.mark.parametrize("name", slow_but({"bnts", "nt", "ts", "256"}, BIASES))
def test_bias(name: str):
    check(BIASES[name])


SMALL = sized(64, group=3, kv_heads=2, seqlen_q=70, seqlen_k=140, batch=2, offset=True)


OF_NUMBERS = (
    *("alibi_of_numbers", "soft_cap", "squared", "gated", "hidden_by_score", "distance_decay"),
)
"""Scores that close over no array of floats."""
QUICK = {
    *("t5_buckets", "key_bias", "bias_with_fill", "gated", "hidden_by_score", "low_rank"),
}


@pytest.mark.parametrize("name", slow_but(QUICK, SCORES))
def test_score(name: str):
    check(SMALL, score_mod=SCORES[name](SMALL))


# The forward evaluates each.
@pytest.mark.parametrize("name", slow_but({"documents", "from_bits", "nothing"}, MASKS))
def test_mask(name: str):
    check(SMALL, mask_mod=MASKS[name](SMALL))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_together(head_dim: int):
    case = sized(head_dim, seqlen_q=130, **EVERYTHING)
    check(case, MASKS["documents"](case), SCORES["alibi_of_numbers"](case))


def test_elements_that_tiles_have_in_common():
    """Distances are clipped in most tiles, and not in all."""
    case = sized(64, seqlen_q=150, seqlen_k=340, batch=2, offset=True, lengths=True)
    table = np.random.default_rng(0).standard_normal((case.q_heads, 21))
    table = jnp.asarray(table, jnp.float32)
    check(case, None, lambda s, b, h, q, kv: s + table[h, jnp.clip(q - kv, -10, 10) + 10])


def test_elements_in_common_of_another_derivative():
    """A sum whose derivative in the score is not 1, of a table without a gradient."""

    @jax.custom_vjp
    def halved(score):
        return score

    halved.defvjp(lambda score: (score, None), lambda _, cotangent: (cotangent / 2,))
    case = sized(64, seqlen_q=70, seqlen_k=256)
    table = jnp.asarray(np.random.default_rng(0).integers(-2, 3, 21), jnp.int32)
    check(
        case, None, lambda s, b, h, q, kv: halved(s) + 1.0 * table[jnp.clip(q - kv, -10, 10) + 10]
    )


INFINITE_AT_0 = {
    "derivative": lambda s, b, h, q, kv: jnp.sign(s) * jnp.sqrt(jnp.abs(s)),
    "score": lambda s, b, h, q, kv: s - 0.1 * jnp.log(jnp.abs(s)),
}


@pytest.mark.parametrize("name", INFINITE_AT_0)
def test_what_is_infinite_at_0(name: str):
    """Beyond the last row products are 0, and nothing is hidden where keys fill their tiles."""
    check(Case(1, 100, 256, 1, 1, 64, 64), score_mod=INFINITE_AT_0[name])


def test_table_by_distance_within_a_segment() -> None:
    """Positions start anew in each segment, so tiles far apart in an array may be near by them."""
    table = jnp.asarray(np.random.default_rng(0).standard_normal((1, 21)), jnp.float32)
    ends = np.array([0, 5, 261, 384])
    spec, operands = call_of(
        (1, 384, 384),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        positions="segment",
        score_mod=lambda s, b, h, q, kv: s + table[h, jnp.clip(q - kv, -10, 10) + 10],
    )
    check_call(sized(64, seqlen_q=384, seqlen_k=384), spec, operands)


def table_and_slopes(case: Case):
    """Read by a clipped distance and by an unbounded one, by key, and where the score says so."""
    rng = np.random.default_rng(0)
    shapes = (case.q_heads, 21), (case.q_heads,), (case.batch, case.seqlen_k)
    table, slopes, keys = (jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes)

    def score_mod(score, b, h, q, kv):
        near = jnp.clip(q - kv, -10, 10) + 10
        return score + table[h, near] - 0.1 * slopes[h] * (q - kv) + keys[b, kv]

    return score_mod


GROUPS = sized(64, group=3, seqlen_q=70, seqlen_k=140, **EVERYTHING | {"batch": 2})
DETERMINISTIC = {
    "many": (dataclasses.replace(GROUPS, bias="ts"), table_and_slopes),
    # What these add no norm bounds: a first run of the kernel does.
    "query_temperature": (
        dataclasses.replace(GROUPS, seqlen_q=40, seqlen_k=70),
        SCORES["query_temperature"],
    ),
    "gated": (dataclasses.replace(GROUPS, bias="bns"), SCORES["gated"]),
    "relative_bias": (dataclasses.replace(GROUPS, seqlen_k=260), SCORES["relative_bias"]),
    "t5_buckets": (GROUPS, SCORES["t5_buckets"]),
    "bias_ts": (BIASES["ts"], None),
    "bias_bnts": (BIASES["bnts"], None),
    "bias_bns": (dataclasses.replace(GROUPS, bias="bns", head_dim=128, head_dim_v=128), None),
    "256_many": (dataclasses.replace(GROUPS, bias="ts", head_dim=256), table_and_slopes),
    "256_gated": (dataclasses.replace(GROUPS, head_dim=256, head_dim_v=256), SCORES["gated"]),
}


def softened(case: Case):
    """``log`` is infinite where nothing is seen."""
    return lambda s, b, h, q, kv: jnp.log(1.0 + jnp.exp(s)) * (h + 1) - q * 0.01


WIDE = {
    "136": ((136, 136), {"soft_cap": 2.0}, softened),
    "192_128": ((192, 128), {"soft_cap": 2.0, "group": 2}, softened),
    "64_256": ((64, 256), {"soft_cap": 2.0}, softened),
    "256": ((256, 256), {"soft_cap": 2.0}, softened),
    "136_t5": ((136, 136), {"group": 2}, SCORES["t5_buckets"]),
    "192_128_temperature": ((192, 128), {"group": 3}, SCORES["query_temperature"]),
    "64_256_gated": ((64, 256), {"group": 2, "bias": "bns", "soft_cap": 2.0}, SCORES["gated"]),
    "256_bias": ((256, 256), {"group": 3, "bias": "bnts"}, None),
    "256_softened": ((256, 256), {"bias": "ts", "soft_cap": 2.0}, softened),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_where_warpgroups_share_keys(name: str) -> None:
    (head_dim, head_dim_v), features, score = WIDE[name]
    case = sized(head_dim, seqlen_q=130, **EVERYTHING, **features)
    case = dataclasses.replace(case, head_dim_v=head_dim_v)
    check(case, score_mod=score(case) if score else None)


@pytest.mark.parametrize("name", slow_but({"many", "query_temperature"}, DETERMINISTIC))
def test_deterministic(name: str) -> None:
    check_order(*DETERMINISTIC[name])


def check_order(case: Case, score, arch: str = "sm_90a") -> None:
    """Sums do not depend on who adds first; ``score``: of a case, None for none."""
    spec, operands = operands_of(case, "bfloat16", None, score(case) if score else None)
    spec = dataclasses.replace(spec, deterministic=True)
    first = check_call(case, spec, operands, arch=arch)
    how = {"warps": "adversarial", "timing": "shuffled", "seed": 3}
    again = check_call(case, spec, operands, arch=arch, **how)
    for name, gradient in first.items():
        assert np.asarray(gradient).tobytes() == np.asarray(again[name]).tobytes(), name


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
def test_not_a_number_is_not_lost(arch: str) -> None:
    """Integers have none: a sum that has one among its addends makes the whole array NaN."""
    case, score = DETERMINISTIC["query_temperature"]
    spec, operands = operands_of(case, "bfloat16", None, score(case))
    spec = dataclasses.replace(spec, deterministic=True)
    operands = dataclasses.replace(operands, value=operands.value.at[1, 3].set(jnp.nan))
    residuals = xla.forward(spec, operands)
    d_lse = jnp.zeros_like(residuals.lse)
    found = simulated(spec, operands, residuals, residuals.out, d_lse, arch=arch)
    assert np.isnan(found["array 0"]).all()
